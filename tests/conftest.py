"""What several tests use."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "")

import pytest
import torch

from kouros.envs import wrappers
from kouros.envs.config import TASKS
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.robots import get_robot
from kouros.robots.robot import Robot


@pytest.fixture(scope="session")
def robot() -> Robot:
    return get_robot("g1")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy file of the shipped ``walk``, with its plain form beside it. Not to be changed."""
    from kouros.deploy.export import OnnxExporter
    from kouros.envs.contract import record_policy
    from kouros.learning.run import load_policy

    actor, config, contract = load_policy("walk")
    path = tmp_path_factory.mktemp("exported") / "policy.onnx"
    OnnxExporter(actor, contract).export(path, record_policy(actor.act, config, steps=200))
    return path


def make_env(num_envs: int = 8, seed: int = 0, task: str = "walk", **config: object) -> HumanoidBaseEnv:
    env = wrappers.make_env(dataclasses.replace(TASKS[task](), num_envs=num_envs, **config))  # type: ignore[arg-type]
    env.reset(seed=seed)
    return env


def random_actions(env: HumanoidBaseEnv, generator: torch.Generator, scale: float = 0.5):
    return scale * torch.randn(env.action_space.shape, generator=generator)
