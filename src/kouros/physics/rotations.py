"""Rotations over tensors of any leading shape. Quaternions are (w, x, y, z), unit length."""

from __future__ import annotations

import functools

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


def matrix_from_quat(quat: torch.Tensor) -> torch.Tensor:
    """Rotation matrix ``R(quat)``, ``(n, 3, 3)``, from unit quaternions ``(n, 4)``."""
    products = (quat.unsqueeze(-1) * quat.unsqueeze(-2)).flatten(-2)
    return (products @ _products_to_matrix(quat.dtype, quat.device)).unflatten(-1, (3, 3))


@functools.cache
def _products_to_matrix(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The linear map from the 16 products of a quaternion's components to its 9 matrix entries."""
    ww, wx, wy, wz, xx, xy, xz, yy, yz, zz = 0, 1, 2, 3, 5, 6, 7, 10, 11, 15
    entries = (
        {ww: 1, xx: 1, yy: -1, zz: -1},
        {xy: 2, wz: -2},
        {xz: 2, wy: 2},
        {xy: 2, wz: 2},
        {ww: 1, xx: -1, yy: 1, zz: -1},
        {yz: 2, wx: -2},
        {xz: 2, wy: -2},
        {yz: 2, wx: 2},
        {ww: 1, xx: -1, yy: -1, zz: 1},
    )
    table = torch.zeros(16, 9, dtype=dtype)
    for column, entry in enumerate(entries):
        for row, factor in entry.items():
            table[row, column] = factor
    return table.to(device)


def yaw_of(quat: torch.Tensor) -> torch.Tensor:
    """Heading of the body's x axis about the world's z axis, rad in (-pi, pi], ``(...)``."""
    w, x, y, z = quat.unbind(-1)
    return torch.atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))


def quat_from_yaw(yaw: torch.Tensor) -> torch.Tensor:
    """Rotation by ``yaw`` (rad) about the z axis, ``(..., 4)``."""
    zero = torch.zeros_like(yaw)
    return torch.stack((torch.cos(0.5 * yaw), zero, zero, torch.sin(0.5 * yaw)), dim=-1)
