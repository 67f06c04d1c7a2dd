"""The walking test is itself tested: what it counts, what it measures, and that no policy softens it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mujoco
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_env
from kouros.envs.config import HumanoidEnvConfig, RandomizationConfig
from kouros.envs.evaluation import (
    ROBUST,
    WalkResult,
    _Soles,
    _Steps,
    evaluate_walk,
    robust_randomization,
    wilson_interval,
)
from test_env import OTHER


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_interval_equals_scipys(n: int, data) -> None:
    k = data.draw(st.integers(0, n))
    expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(k, n, scipy.stats.norm.ppf(0.975)), expected, atol=1e-9)


def test_clearance_is_the_lowest_point_of_the_soles() -> None:
    """Against points all over each capsule, in random poses."""
    env = make_env(8, randomization=RandomizationConfig(initial_joint_pos=(-1.0, 1.0)))
    env.simulation.qpos[:, 3:7] = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    soles = _Soles(env)
    env.simulation.forward()
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((20_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for world, heights in enumerate(soles.clearance()):
        data, model = env.simulation.data(world), env.simulation.model
        for body, height in zip(env.robot.foot_bodies, heights, strict=True):
            lowest = math.inf
            for geom in np.flatnonzero(model.geom_bodyid == model.body(body).id):
                if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CAPSULE and model.geom_conaffinity[geom]:
                    radius, half = model.geom_size[geom, :2]
                    axis = np.sign(directions[:, 2:]) * [0, 0, half]
                    points = radius * directions + axis
                    points = points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
                    lowest = min(lowest, points[:, 2].min())
            assert height.item() == pytest.approx(lowest, abs=2e-5)


def test_a_step_is_a_swing_that_lands() -> None:
    """The left foot swings once for 0.3 s, 5 cm high; the right one chatters for 0.04 s; both stand."""
    steps = _Steps(1, 0.02)
    left = [True] * 5 + [False] * 15 + [True] * 30
    right = [True] * 10 + [False] * 2 + [True] * 38
    landings = []
    for time, contact in enumerate(zip(left, right, strict=True)):
        height = 0.05 * math.sin(math.pi * (time - 4) / 16) if not contact[0] else 0.0
        landed, peak = steps.update(torch.tensor([contact]), torch.tensor([[height, 0.01]]))
        if landed.any():
            landings.append((time, landed[0].tolist(), round(peak[0, 0].item(), 3)))
    assert landings == [(20, [True, False], 0.05)]


def limp(obs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(obs), 29)


LIMP = HumanoidEnvConfig(control_mode="effort")


def test_a_limp_robot_does_not_walk() -> None:
    result = evaluate_walk(limp, LIMP, episodes=8, seconds=3.0)
    assert result.survival == 0.0
    assert result.survival_low == pytest.approx(0.0)
    assert {"survival", "clearance_left", "steps_left"} <= set(result.failures())


def test_no_policy_softens_its_own_test() -> None:
    """Whatever a run trained with: falls, first states and commands are the task's."""
    soft = dataclasses.replace(
        LIMP,
        fall_height=0.0,
        fall_tilt=math.pi,
        randomization=RandomizationConfig(initial_velocity=(0.0, 0.0), friction=(2.0, 2.0)),
        command_vx=(0.0, 0.0),
        standing_fraction=1.0,
        max_episode_length=3,
        num_envs=3,
    )
    # As text: what was measured nowhere is NaN, which equals nothing.
    expected, found = (str(evaluate_walk(limp, c, episodes=8, seconds=1.5)) for c in (LIMP, soft))
    assert found == expected


# What a policy brings along to its test: the robot's physics and servos, its observation and its gait; and
# what only a training looks at.
POLICYS_OWN = {
    *("robot", "engine", "num_threads", "graph", "timestep", "frame_skip", "solver_iterations"),
    *("line_search_iterations", "control_mode", "actuator", "torque_speed", "action_scale", "action_limit"),
    *(
        "gait_period",
        "swing_fraction",
        "swing_height",
        "actor_observations",
        "critic_observations",
        "wrappers",
    ),
    *("rewards", "tracking_sigma", "tracking_time", "target_height", "pose_weights", "harness_fall_time"),
}


@pytest.mark.parametrize("straight", [False, True])
def test_the_test_takes_every_other_figure_from_the_task(
    monkeypatch: pytest.MonkeyPatch, straight: bool
) -> None:
    """A new field of the configuration is decided on here, or a policy may choose it."""
    seen: list[HumanoidEnvConfig] = []

    def look(config: HumanoidEnvConfig, statistics: None) -> None:
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr("kouros.envs.evaluation.make_policy_env", look)
    clock = {name: getattr(HumanoidEnvConfig(), name) for name in ("timestep", "frame_skip")}
    easy = dataclasses.replace(HumanoidEnvConfig(), **{**OTHER, **clock, "heading_fraction": 0.7})
    for config in (HumanoidEnvConfig(), easy):
        with pytest.raises(InterruptedError):
            evaluate_walk(limp, config, straight=straight)
    for field in dataclasses.fields(HumanoidEnvConfig):
        same = getattr(seen[0], field.name) == getattr(seen[1], field.name)
        assert same or field.name in POLICYS_OWN, field.name


@pytest.mark.parametrize("condition", ROBUST)
def test_conditions_fit_policies_that_observe_little(condition: str) -> None:
    config = HumanoidEnvConfig(actor_observations=("projected_gravity", "command", "joint_pos"))
    result = evaluate_walk(limp, config, 2, 0.04, randomization=robust_randomization(condition, config))
    assert result.survival == 1.0


@pytest.mark.parametrize("walks", [True, False])
def test_what_could_not_be_measured_is_missed(walks: bool) -> None:
    figures: dict[str, Any] = {field.name: math.nan for field in dataclasses.fields(WalkResult)}
    bar = WalkResult(**{**figures, "walks": walks}).bar
    good = {**figures, "walks": walks, **{name: low for name, (_, _, low, _) in bar.items()}}
    assert WalkResult(**good).failures() == []
    assert ("clearance_left" in bar) == walks != ("pose_error" in bar)
    for name in bar:
        assert WalkResult(**{**good, name: math.nan}).failures() == [name]
