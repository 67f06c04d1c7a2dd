"""The GPU engine, on Warp's cpu device, against the C engine; and what a CUDA graph asks of the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_actions
from kouros import graphs
from kouros.envs.config import (
    TASKS,
    CurriculumConfig,
    HumanoidEnvConfig,
    RandomizationConfig,
    randomization,
)
from kouros.envs.humanoid import _STATE, HumanoidBaseEnv
from kouros.envs.scene import make_model
from kouros.envs.wrappers import Env, ObservationWrapper, make_env
from kouros.learning.config import PPOConfig
from kouros.learning.ppo import PPOAgent
from kouros.physics.simulation import Simulation, make_simulation
from kouros.robots.robot import Robot

WORLDS = 100


def config(**changes) -> HumanoidEnvConfig:
    return HumanoidEnvConfig(engine="warp", **changes)


def random_states(model: mujoco.MjModel, robot: Robot) -> dict[str, torch.Tensor]:
    """Robots in odd poses with their soles a little into or above the ground, moving and driven."""
    rng = np.random.default_rng(0)
    qpos = np.tile(model.qpos0, (WORLDS, 1))
    qpos[:, 7:] = robot.default_joint_pos + rng.uniform(-0.2, 0.2, (WORLDS, model.nu))
    tilt = 0.1 * rng.standard_normal((WORLDS, 3))
    qpos[:, 3:7] = np.concatenate([np.ones((WORLDS, 1)), tilt], axis=1)
    qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
    data = mujoco.MjData(model)
    soles = [g for g in range(model.ngeom) if "sole" in model.geom(g).name]
    for row in qpos:
        data.qpos[:] = row
        mujoco.mj_kinematics(model, data)
        row[2] -= data.geom_xpos[soles, 2].min() - rng.uniform(-0.005, 0.03)
    qvel = 0.5 * rng.standard_normal((WORLDS, model.nv))
    ctrl = robot.default_joint_pos + 0.3 * rng.standard_normal((WORLDS, model.nu))
    wrench = 20.0 * rng.standard_normal((WORLDS, 6))
    found = {"qpos": qpos, "qvel": qvel, "ctrl": ctrl, "wrench": wrench}
    return {k: torch.from_numpy(v) for k, v in found.items()}


def put(sim: Simulation, states: dict[str, torch.Tensor]) -> None:
    sim.qpos.copy_(states["qpos"])
    sim.qvel.copy_(states["qvel"])
    sim.ctrl.copy_(states["ctrl"])
    sim.field("xfrc_applied")[:, 1].copy_(states["wrench"])


@pytest.fixture(scope="module")
def model(robot: Robot) -> mujoco.MjModel:
    # Solved to the end: what is compared is the physics, not where the solvers stopped.
    return make_model(robot, HumanoidEnvConfig(solver_iterations=100, line_search_iterations=50))


@pytest.fixture(scope="module")
def states(model: mujoco.MjModel, robot: Robot) -> dict[str, torch.Tensor]:
    return random_states(model, robot)


@pytest.fixture(scope="module")
def warp(model: mujoco.MjModel) -> Simulation:
    return make_simulation(model, WORLDS, engine="warp", contacts=8)


def test_one_step_from_random_states_agrees_with_mujoco_c(
    model: mujoco.MjModel, states: dict[str, torch.Tensor], warp: Simulation
) -> None:
    c = make_simulation(model, WORLDS)
    for sim in (c, warp):
        sim.reset()
        put(sim, states)
        sim.step()
    touching = c.sensor("left_foot_contact")[:, 0] + c.sensor("right_foot_contact")[:, 0]
    assert (touching > 0).float().mean() > 0.3 and (touching == 0).any()
    torch.testing.assert_close(warp.qpos.double(), c.qpos, atol=1e-4, rtol=0)
    # Velocities change by forces of hundreds of newtons in a step: single precision of that.
    torch.testing.assert_close(warp.qvel.double(), c.qvel, atol=5e-3, rtol=1e-3)
    for i in range(model.nsensor):
        name = model.sensor(i).name
        scale = c.sensor(name).abs().amax(0).clamp(min=1.0)
        assert ((warp.sensor(name) - c.sensor(name)).abs() / scale).max() < 5e-3, name
    assert not warp.overflow().any()


def test_masked_calls_touch_only_their_rows(
    model: mujoco.MjModel, states: dict[str, torch.Tensor], warp: Simulation
) -> None:
    put(warp, states)
    warp.step(2)
    mask = torch.arange(WORLDS) % 3 == 0
    warp.qvel[0] = torch.nan  # a sick world must come back clean
    before = warp.state_dict()
    warp.reset(mask)
    warp.kinematics(mask)
    after = warp.state_dict()
    for name, values in before.items():
        assert torch.equal(after[name][~mask], values[~mask]), name
    assert torch.equal(warp.qpos[mask], torch.tensor(model.qpos0).float().expand(int(mask.sum()), -1))
    for name in ("qvel", "qacc_warmstart", "ctrl", "xfrc_applied", "time"):
        assert (after[name][mask] == 0).all(), name
    warp.forward(mask)
    for name, values in before.items():
        assert torch.equal(warp.state_dict()[name][~mask], values[~mask]), name


@pytest.mark.parametrize("engine", ["c", "warp"])
def test_kinematics_is_forward_without_forces(
    model: mujoco.MjModel, states: dict[str, torch.Tensor], warp: Simulation, engine: str
) -> None:
    sim = warp if engine == "warp" else make_simulation(model, WORLDS)
    put(sim, states)
    sim.forward()
    expected = sim.sensordata.clone()
    assert (sim.sensor("left_foot_contact") != 0).any()
    sim.kinematics()
    found = sim.sensordata
    forces = torch.from_numpy(
        np.repeat(model.sensor_needstage == mujoco.mjtStage.mjSTAGE_ACC, model.sensor_dim)
    )
    torch.testing.assert_close(found[:, ~forces], expected[:, ~forces])
    assert (found[:, forces] == 0).all()


def test_n_plus_n_equals_2n_through_a_state_dict(
    model: mujoco.MjModel, states: dict[str, torch.Tensor], warp: Simulation
) -> None:
    warp.reset()
    put(warp, states)
    warp.step(3)
    saved = warp.state_dict()
    warp.step(3)
    expected = warp.qpos.clone()
    warp.load_state_dict(saved)
    warp.step(3)
    assert torch.equal(warp.qpos, expected)
    with pytest.raises(ValueError, match=r"time is \(100,\) in the file and \(2,\) here"):
        make_simulation(model, 2, engine="warp").load_state_dict(saved)
    with pytest.raises(ValueError, match="not of MuJoCo C"):
        make_simulation(model, WORLDS).load_state_dict(saved)
    with pytest.raises(ValueError, match="time is nothing in the file"):
        warp.load_state_dict(make_simulation(model, WORLDS).state_dict())


def test_one_world_as_mjdata(states: dict[str, torch.Tensor], warp: Simulation) -> None:
    put(warp, states)
    warp.forward()
    data = warp.data(7)
    np.testing.assert_allclose(data.qpos, states["qpos"][7], atol=1e-6)
    np.testing.assert_allclose(
        data.sensor("left_foot_position").data, warp.sensor("left_foot_position")[7], atol=1e-5
    )


def test_model_fields_are_per_world(model: mujoco.MjModel) -> None:
    """In the air: twice the gravity is twice the fall, twice the mass half the acceleration by a force."""
    sim = make_simulation(model, 3, engine="warp")
    sim.model_field("opt.gravity")[1, 2] *= 2.0
    sim.model_field("body_mass")[2] *= 2.0
    sim.set_const()
    assert sim.model_field("body_subtreemass")[2, 1] == pytest.approx(2 * model.body_subtreemass[1], rel=1e-5)
    sim.qpos[:, 2] = 5.0
    sim.field("xfrc_applied")[:, 1, 2] = torch.tensor([0.0, 0.0, 100.0])
    start = sim.qpos[:, 2].clone()
    sim.step(20)
    for world, expected in enumerate([-9.81, -19.62, 100.0 / (2 * model.body_mass.sum()) - 9.81]):
        data = sim.data(world)
        mujoco.mj_subtreeVel(data.model, data)
        assert data.subtree_linvel[0, 2] / (20 * model.opt.timestep) == pytest.approx(expected, rel=2e-3)
    assert (sim.qpos[:, 2] < start).all()


def test_overflow_is_told(model: mujoco.MjModel, robot: Robot, states: dict[str, torch.Tensor]) -> None:
    sim = make_simulation(model, WORLDS, engine="warp", contacts=1)
    put(sim, states)
    assert not sim.overflow().any()
    sim.step()
    assert sim.overflow().any()
    assert not make_simulation(model, 2).overflow().any()  # MuJoCo C has room for all


class NoHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: a value read by the host, a shape that depends on data."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal.default",
        "lift_fresh",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in self.FORBIDDEN), f"{name} in a step that must be recordable"
        if name.startswith("aten.index."):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, "a bool mask as index: a shape of data"
        return func(*args, **(kwargs or {}))


def refuse_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would wait for the device raises, by name: beside :class:`NoHost`, which sees operators only."""
    for name in ("numpy", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__"):

        def refuse(*_: object, name: str = name) -> None:
            raise AssertionError(f"Tensor.{name} in a step that must be recordable")

        monkeypatch.setattr(torch.Tensor, name, refuse)


EVERYTHING: dict[str, Any] = {
    "num_envs": 4,
    "actuator": "explicit",
    "torque_speed": True,
    "pose_range": {"shoulder": 0.3, "waist_yaw": 0.2},
    "crouch": (0.0, 0.3),
    "randomization": dataclasses.replace(
        randomization("sim2real"),
        push_interval=(0.02, 0.06),
        friction_loss=(0.0, 0.3),
        sensor_delay=(0.0, 0.03),
    ),
}


def test_the_step_never_asks_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    env = HumanoidBaseEnv(config(max_episode_length=2, resampling_interval=0.04, **EVERYTHING))
    env.reset(seed=0)
    actions = torch.zeros(4, 29)
    refuse_the_host(monkeypatch)
    with NoHost():
        for _ in range(3):
            env._step(actions)


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[0, 2]],
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_the_guard_notices(forbidden) -> None:
    with pytest.raises(AssertionError, match=r"must be recordable|a shape of data"), NoHost():
        forbidden(torch.ones(3))


@pytest.mark.parametrize("engine", ["c", "warp"])
def test_state_stays_where_it_is(engine: str) -> None:
    """A recorded step reads what the last replay left: in the same memory."""
    env = HumanoidBaseEnv(HumanoidEnvConfig(engine=engine, **EVERYTHING))
    env.reset(seed=0)

    def places() -> list[int]:
        own = [getattr(env, name) for name in (*_STATE, "_read")]
        holders = (env.randomization, env.actuators, env.levels, env.poses)
        parts = [part.tensors().values() for part in holders]
        return [tensor.data_ptr() for tensors in (own, *parts) for tensor in tensors]

    before = places()
    for _ in range(5):
        env.step(torch.zeros(4, 29))
    env.load_state_dict(env.state_dict())
    assert places() == before


def poison(holder: object, places: set[int]) -> None:
    """Spoil all of an object's float tensors that do not lie in the given places."""
    for value in vars(holder).values():
        outside = isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in places
        if outside and value.is_floating_point():
            value.fill_(torch.nan)


@pytest.mark.parametrize("task", ["walk", "walk-rough", "stand"])
def test_a_step_reads_nothing_that_the_last_one_left_elsewhere(task: str) -> None:
    """A graph would read there what it found when it was recorded, or what others have put there since."""
    env_config = dataclasses.replace(
        TASKS[task](),
        heading_fraction=0.5,
        max_episode_length=6,
        resampling_interval=0.06,
        harness_fall_time=0.1,
        wrappers=("kinematic", "history:2", "normalize"),
        curriculum=CurriculumConfig(
            enabled=True,
            names=("robust", "calm"),
            terrain_difficulty=(1.0 * (task == "walk-rough"), 0.0),
            command_speed=(1.0, 1.0),
            push_frequency=(1.0, 0.0),
            mass_variance=(1.0, 0.0),
            friction_variance=(1.0, 0.0),
        ),
        **EVERYTHING,
    )
    clean, spoilt = (make_env(env_config) for _ in range(2))
    for env in (clean, spoilt):
        env.reset(seed=0)

    def holders(env: Env) -> list[object]:
        layers: list[object] = [env]
        while isinstance(env, ObservationWrapper):
            env = env.env
            layers.append(env)
        parts = [env.randomization, env.actuators, env.commands, env.poses, env.levels, env.curriculum]
        return [*layers, *parts]

    def storages(env: Env) -> list[set[int]]:
        tensors = ([v for v in vars(h).values() if isinstance(v, torch.Tensor)] for h in holders(env))
        return [{v.untyped_storage().data_ptr() for v in found} for found in tensors]

    generator = torch.Generator().manual_seed(0)
    before = storages(spoilt)
    spoilt.step(torch.zeros(4, 29))
    clean.step(torch.zeros(4, 29))
    stay = set().union(*(a & b for a, b in zip(before, storages(spoilt), strict=True)))
    for _ in range(12):
        for holder in holders(spoilt):
            poison(holder, stay)
        actions = random_actions(clean, generator, 1.0)
        for x, y in zip(clean.step(actions)[:2], spoilt.step(actions)[:2], strict=True):
            assert torch.equal(x, y)


def test_both_engines_make_the_same_task() -> None:
    """The same seed, the same actions: what the task makes of both engines' physics agrees."""
    actions = 0.3 * torch.randn(5, 32, 29, generator=torch.Generator().manual_seed(0))
    steps = {}
    for engine in ("c", "warp"):
        env = HumanoidBaseEnv(
            HumanoidEnvConfig(
                num_envs=32,
                engine=engine,
                solver_iterations=100,
                harness=0.5,
                randomization=RandomizationConfig(friction=(0.3, 1.2), mass=(0.8, 1.2), gravity=(-0.5, 0.5)),
            )
        )
        env.reset(seed=0)
        steps[engine] = [env.step(a) for a in actions]
    for (obs, reward, fallen, _, info), (obs_c, reward_c, fallen_c, _, info_c) in zip(
        steps["warp"], steps["c"], strict=True
    ):
        assert torch.equal(fallen, fallen_c)
        close = (info["critic_obs"] - info_c["critic_obs"]).abs().amax(-1) < 0.05
        assert close.float().mean() > 0.9  # a contact made one timestep sooner is another landing
        assert (reward - reward_c).abs().median() < 1e-3
        assert (obs - obs_c).abs().median() < 1e-4


def test_a_sick_world_is_reset_and_counted() -> None:
    env = HumanoidBaseEnv(config(num_envs=4))
    env.reset(seed=0)
    env.simulation.qvel[2] = torch.nan
    obs, reward, terminated, _, info = env.step(torch.zeros(4, 29))
    assert terminated.tolist() == [False, False, True, False]
    assert info["metrics"][env.metric_names.index("task/sick_worlds")].tolist() == [0, 0, 1, 0]
    assert torch.isfinite(obs).all() and torch.isfinite(reward).all()
    assert torch.isfinite(env.simulation.qpos).all()
    assert torch.isfinite(env.step(torch.zeros(4, 29))[0]).all()


class Stand(graphs.Recorded):
    """A recording without a GPU: tried out and put back as a real one, and replayed line by line."""

    def __init__(self, function, device, generators=(), owner=None, tensors=()) -> None:
        with graphs.trying_out(generators, owner, tensors):
            function()
            function()
        self.function = function

    def replay(self):
        with graphs.trying_out((), None, ()):  # as while recording: nothing is recorded inside
            return self.function()


def test_recorded_training_is_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying a step out leaves no trace, and a replay reads what the last one left: bit for bit."""
    monkeypatch.setattr("kouros.learning.ppo.Recorded", Stand)
    monkeypatch.setattr("kouros.envs.humanoid.Recorded", Stand)
    agents, logs = [], []
    for recorded in (True, False):
        env = HumanoidBaseEnv(config(max_episode_length=9, **EVERYTHING))
        env.graph_safe = recorded
        agents.append(PPOAgent(env, PPOConfig(horizon=6, minibatches=2), seed=3))
        agents[-1]._record_steps = recorded
        agents[-1].train(3, logs.append)
        env.step(torch.zeros(4, 29))
        agents[-1].train(1, logs.append)
    for a, b in zip(*(agent.actor.parameters() for agent in agents), strict=True):
        assert torch.equal(a, b)
    for one, other in zip(logs[:4], logs[4:], strict=True):
        assert {k: v for k, v in one.items() if "time/" not in k} == {
            k: v for k, v in other.items() if "time/" not in k
        }


def test_one_iteration_of_learning() -> None:
    agent = PPOAgent(HumanoidBaseEnv(config(num_envs=8)), PPOConfig(horizon=4, minibatches=2))
    before = agent.actor.mlp[0].weight.detach().clone()
    logs: list[dict[str, float]] = []
    agent.train(2, logs.append)
    assert not torch.equal(agent.actor.mlp[0].weight, before)
    assert all(np.isfinite(list(log.values())).all() for log in logs)
