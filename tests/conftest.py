"""What several tests use."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "")

import pytest
import torch

from kouros.deploy.export import OnnxExporter
from kouros.envs import wrappers
from kouros.envs.config import TASKS, HumanoidEnvConfig, stand
from kouros.envs.contract import policy_contract, record_policy
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.learning.networks import ActorNetwork
from kouros.learning.run import load_policy
from kouros.robots import get_robot
from kouros.robots.robot import Robot


@pytest.fixture(scope="session")
def robot() -> Robot:
    return get_robot("g1")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy file of the shipped ``walk``, with its plain form beside it. Not to be changed."""
    actor, config, contract = load_policy("walk")
    path = tmp_path_factory.mktemp("exported") / "policy.onnx"
    OnnxExporter(actor, contract).export(path, record_policy(actor.act, config, steps=200))
    return path


# The robot is held up, so that any policy has many steps; commands and poses change often.
HELD: dict[str, Any] = {
    "num_envs": 1,
    "harness": 1.0,
    "harness_fall_time": 1e9,
    "resampling_interval": 0.2,
    "max_episode_length": 10**6,
}
Policy = tuple[Callable[[torch.Tensor], torch.Tensor], HumanoidEnvConfig, Path]


def exported_policy(config: HumanoidEnvConfig, folder: Path) -> Policy:
    """A policy with random weights in the last layer, its environment and its file."""
    env = wrappers.make_env(config)
    actor = ActorNetwork(env.single_observation_space.shape[0], 29, (32,))
    torch.nn.init.normal_(actor.mlp[-1].weight, std=0.03, generator=torch.Generator().manual_seed(0))
    actor.low.fill_(-config.action_limit)
    actor.high.fill_(config.action_limit)
    path = folder / "policy.onnx"
    OnnxExporter(actor, policy_contract(env)).export(path, record_policy(actor.act, config, 100))
    return actor.act, config, path


@pytest.fixture(scope="session")
def policies(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """The shipped policy; one that sees its hands and its past; one that holds poses."""
    actor, config, _ = load_policy("walk")
    stacked = HumanoidEnvConfig(**HELD, wrappers=("history:3", "kinematic"))
    standing = stand()
    for name, value in HELD.items():
        setattr(standing, name, value)
    return {
        "walk": (actor.act, config, exported),
        "stacked": exported_policy(stacked, tmp_path_factory.mktemp("stacked")),
        "stand": exported_policy(standing, tmp_path_factory.mktemp("stand")),
    }


def make_env(num_envs: int = 8, seed: int = 0, task: str = "walk", **config: object) -> HumanoidBaseEnv:
    env = wrappers.make_env(dataclasses.replace(TASKS[task](), num_envs=num_envs, **config))  # type: ignore[arg-type]
    env.reset(seed=seed)
    return env


def random_actions(env: HumanoidBaseEnv, generator: torch.Generator, scale: float = 0.5):
    return scale * torch.randn(env.action_space.shape, generator=generator)
