"""Everything that can be switched on, switched on at once: a stopped run goes on as if it had not stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kouros.envs.config import CurriculumConfig, HumanoidEnvConfig, randomization, walk_rough
from kouros.envs.wrappers import make_env
from kouros.learning.config import PPOConfig, TrainConfig, train_defaults
from kouros.learning.ppo import PPOAgent
from kouros.learning.run import resumed


def everything() -> HumanoidEnvConfig:
    task = walk_rough()
    return dataclasses.replace(
        task,
        num_envs=9,
        max_episode_length=7,
        harness=0.0,
        actuator="explicit",
        torque_speed=True,
        wrappers=("kinematic", "history:2", "normalize"),
        terrain=dataclasses.replace(task.terrain, types=("flat", "rough", "stairs_up"), levels=3),
        randomization=dataclasses.replace(
            randomization("sim2real"), push_interval=(0.05, 0.1), sensor_delay=(0.0, 0.03), population=16
        ),
        curriculum=CurriculumConfig(
            enabled=True, min_episodes=9, advance_at=0.2, retreat_below=0.01, success_error=5.0
        ),
    )


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name], f"{where}/{name}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def test_n_plus_n_equals_2n_through_a_checkpoint(tmp_path: Path) -> None:
    small = PPOConfig(horizon=4, minibatches=2, actor_hidden=(16,), critic_hidden=(16,))
    whole, first, second = (PPOAgent(make_env(everything()), small, seed=1) for _ in range(3))
    whole.train(12)
    first.train(7)
    first.save_checkpoint(tmp_path / "a.pt")
    second.load_checkpoint(tmp_path / "a.pt")
    second.train(5)
    assert_same(whole.actor.state_dict(), second.actor.state_dict())
    assert_same(whole.env.state_dict(), second.env.state_dict())  # type: ignore[attr-defined]
    moves = [len(agent.env.curriculum.manager.history) for agent in (first, whole)]  # type: ignore[attr-defined]
    assert 0 < moves[0] < moves[1]


def test_a_run_of_another_task_goes_on_with_its_own_options(tmp_path: Path) -> None:
    """``--task`` and ``--randomize`` set defaults: to repeat them beside --resume asks for nothing new."""
    begun = train_defaults("cpu", "walk-rough", "light")
    begun.env = dataclasses.replace(begun.env, heading_fraction=0.5)
    begun.env.randomization = dataclasses.replace(begun.env.randomization, mass=(0.7, 1.3))
    plain = {**dataclasses.asdict(begun), "steps": 1000}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    for defaults in (TrainConfig(), train_defaults("cpu", "walk-rough", "light")):
        given = dataclasses.replace(defaults, resume=tmp_path)
        found = resumed(given, "cpu")
        assert (found.env, found.task, found.randomize) == (begun.env, "walk-rough", "light")
    other = dataclasses.replace(train_defaults("cpu", "walk", "sim2real"), resume=tmp_path)
    with pytest.raises(ValueError, match=r"randomize='sim2real': .* began with 'light'"):
        resumed(other, "cpu")
    given.env.randomization.mass = (0.5, 1.0)
    with pytest.raises(ValueError, match=r"env\.randomization\.mass=\(0\.5, 1\.0\): .* began with"):
        resumed(given, "cpu")
    del plain["randomize"]
    plain["env"]["push_velocity"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="unknown field push_velocity"):
        resumed(TrainConfig(resume=tmp_path), "cpu")
