"""Where sites of a robot are, from its joint positions alone: forward kinematics over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
import torch
from torch import nn

HINGE = int(mujoco.mjtJoint.mjJNT_HINGE)


def read_chains(model: mujoco.MjModel, base: str, sites: Sequence[str]) -> list[dict[str, Any]]:
    """The hinges between a body and each of some sites, as plain data.

    Returns:
      For each site: its name; ``links``, from the body outwards, each with the name of its ``joint``, the
      place ``pos`` (m) and turn ``quat`` of its frame in the one before, where the joint is at zero, and the
      ``axis`` through the frame's origin that the joint turns it about; ``offset``, the site's place in the
      last link (m).

    Raises:
      KeyError: no such body or site.
      ValueError: the body does not carry a site, or a joint in between is no hinge.
    """
    chains = []
    for site in sites:
        body, path = int(model.site(site).bodyid[0]), []
        while body != model.body(base).id:
            if body == 0:
                raise ValueError(f"site {site!r}: is not carried by the body {base!r}")
            path.append(body)
            body = int(model.body_parentid[body])
        links = []
        pos, quat = np.zeros(3), np.array([1.0, 0.0, 0.0, 0.0])  # since the last hinge
        for body in reversed(path):
            pos = pos + _rotated(quat, model.body_pos[body])
            quat = _product(quat, model.body_quat[body])
            first = int(model.body_jntadr[body])
            for joint in range(first, first + int(model.body_jntnum[body])):
                name, axis, anchor = model.joint(joint).name, model.jnt_axis[joint], model.jnt_pos[joint]
                if model.jnt_type[joint] != HINGE:
                    raise ValueError(f"joint {name!r}: is no hinge, and forward kinematics knows no other")
                zero = np.zeros(4)
                mujoco.mju_axisAngle2Quat(zero, axis, -float(model.qpos0[model.jnt_qposadr[joint]]))
                pos, quat = pos + _rotated(quat, anchor), _product(quat, zero)
                links.append(
                    {"joint": name, "pos": pos.tolist(), "quat": quat.tolist(), "axis": axis.tolist()}
                )
                pos, quat = -anchor, np.array([1.0, 0.0, 0.0, 0.0])
        offset = pos + _rotated(quat, model.site(site).pos)
        chains.append({"site": site, "links": links, "offset": offset.tolist()})
    return chains


class SitePositions(nn.Module):
    """Positions of sites in the frame of a body: ``(n, num_joints)`` in rad to ``(n, num_sites, 3)`` in m.

    From the site inwards, each link takes a point by ``pos + R(quat) R(axis, angle) point``; the turn about
    the axis is Rodrigues' formula, ``a a^T + cos (1 - a a^T) + sin [a]x``.

    Args:
      chains: of the sites, from :func:`read_chains`.
      joint_names: of the joint vector.

    Raises:
      ValueError: a chain has a joint that is not in the vector.
    """

    def __init__(self, chains: Sequence[dict[str, Any]], joint_names: Sequence[str]) -> None:
        super().__init__()
        names = list(joint_names)
        shape = (len(chains), max(1, *(len(chain["links"]) for chain in chains)))
        joint = np.zeros(shape, np.int64)
        pos = np.zeros((*shape, 3))
        # A chain shorter than the longest ends in links that change nothing.
        fixed = np.tile(np.eye(3), (*shape, 1, 1))
        cos, sin = np.zeros((*shape, 3, 3)), np.zeros((*shape, 3, 3))
        for k, chain in enumerate(chains):
            for i, link in enumerate(chain["links"]):
                if link["joint"] not in names:
                    raise ValueError(f"joint {link['joint']!r} on the way to {chain['site']!r}: not actuated")
                joint[k, i], pos[k, i] = names.index(link["joint"]), link["pos"]
                matrix, axis = np.zeros(9), np.array(link["axis"])
                mujoco.mju_quat2Mat(matrix, np.array(link["quat"]))
                frame = matrix.reshape(3, 3)
                along = np.outer(axis, axis)
                fixed[k, i], cos[k, i] = frame @ along, frame @ (np.eye(3) - along)
                sin[k, i] = frame @ np.cross(np.eye(3), axis)
        offset = np.array([chain["offset"] for chain in chains])
        self.joint = nn.Buffer(torch.tensor(joint.flatten()))
        self.pos, self.offset = nn.Buffer(torch.tensor(pos).float()), nn.Buffer(torch.tensor(offset).float())
        self.fixed, self.cos, self.sin = (nn.Buffer(torch.tensor(m).float()) for m in (fixed, cos, sin))

    def forward(self, joint_pos: torch.Tensor) -> torch.Tensor:
        angle = joint_pos[:, self.joint].unflatten(1, self.pos.shape[:2])[..., None, None]
        turn = self.fixed + torch.cos(angle) * self.cos + torch.sin(angle) * self.sin
        point: torch.Tensor = self.offset
        for i in reversed(range(self.pos.shape[1])):
            # Not a matrix product: on a GPU that would be ten bits of mantissa.
            point = self.pos[:, i] + (turn[:, :, i] * point.unsqueeze(-2)).sum(-1)
        return point


def _rotated(quat: np.ndarray, vec: np.ndarray) -> np.ndarray:
    result = np.zeros(3)
    mujoco.mju_rotVecQuat(result, vec, quat)
    return result


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    result = np.zeros(4)
    mujoco.mju_mulQuat(result, a, b)
    return result
