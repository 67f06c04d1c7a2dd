"""Rotations over tensors of any leading shape. Quaternions are (w, x, y, z), unit length."""

from __future__ import annotations

import torch


def rotate(quat: torch.Tensor, vec: torch.Tensor) -> torch.Tensor:
    """``R(quat) vec``: from the rotated frame to the reference frame, ``(..., 3)``."""
    w, xyz = quat[..., :1], quat[..., 1:]
    t = 2.0 * torch.linalg.cross(xyz, vec)
    return vec + w * t + torch.linalg.cross(xyz, t)


def rotate_inverse(quat: torch.Tensor, vec: torch.Tensor) -> torch.Tensor:
    """``R(quat)^T vec``: from the reference frame to the rotated frame, ``(..., 3)``."""
    w, xyz = quat[..., :1], quat[..., 1:]
    t = 2.0 * torch.linalg.cross(xyz, vec)
    return vec - w * t + torch.linalg.cross(xyz, t)


def up_in_body(quat: torch.Tensor) -> torch.Tensor:
    """The world's upward direction seen from the body, ``(..., 3)``: the third row of ``R(quat)``."""
    w, x, y, z = quat.unbind(-1)
    return torch.stack((2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y)), dim=-1)


def yaw_of(quat: torch.Tensor) -> torch.Tensor:
    """Heading of the body's x axis about the world's z axis, rad in (-pi, pi], ``(...)``."""
    w, x, y, z = quat.unbind(-1)
    return torch.atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))


def quat_from_yaw(yaw: torch.Tensor) -> torch.Tensor:
    """Rotation by ``yaw`` (rad) about the z axis, ``(..., 4)``."""
    zero = torch.zeros_like(yaw)
    return torch.stack((torch.cos(0.5 * yaw), zero, zero, torch.sin(0.5 * yaw)), dim=-1)
