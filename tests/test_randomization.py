"""Domain randomization: every term shows in the physics or in the observation, on both engines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mujoco
import numpy as np
import pytest
import scipy.stats
import torch

from conftest import random_actions
from kouros.envs.config import PRESETS, HumanoidEnvConfig, RandomizationConfig, randomization
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.observations import OBSERVATIONS
from kouros.envs.randomization import draw
from kouros.physics.rotations import rotate

ENGINES = ("c", "warp")
STILL: dict[str, Any] = {"initial_joint_pos": (0.0, 0.0), "initial_velocity": (0.0, 0.0)}
MODEL_TERMS: dict[str, tuple[float, float]] = {
    "mass": (0.8, 1.2),
    "center_of_mass": (-0.05, 0.05),
    "friction": (0.4, 1.2),
    "joint_damping": (0.0, 0.5),
    "armature": (0.7, 1.3),
    "friction_loss": (0.1, 0.4),
    "motor_strength": (0.7, 1.1),
    "stiffness": (0.8, 1.2),
    "damping": (0.8, 1.2),
    "gravity": (-1.0, 1.0),
    "encoder_bias": (-0.05, 0.05),
}


def make(engine: str, n: int = 4, fields: dict[str, Any] | None = None, **terms: Any) -> HumanoidBaseEnv:
    """Robots that stand still at first, without a harness."""
    drawn = RandomizationConfig(population=64, **{**STILL, **terms})
    config = {"num_envs": n, "engine": engine, "harness": 0.0, "randomization": drawn, **(fields or {})}
    env = HumanoidBaseEnv(HumanoidEnvConfig(**config))
    env.reset(seed=0)
    return env


def in_the_air(env: HumanoidBaseEnv) -> None:
    """Where nothing touches: what falls freely has no weight."""
    env.simulation.qpos[:, 2] = 50.0
    env.simulation.forward()


def oracle_model(env: HumanoidBaseEnv, world: int) -> mujoco.MjModel:
    """A world's model, made of the nominal one by what the randomization says of the world."""
    model, robot, draws = env.simulation.model.__copy__(), env.robot, env.randomization
    drawn = {name: draws[name][world].double().numpy() for name in draws.names}
    one, zero = np.ones(robot.num_joints), np.zeros(robot.num_joints)
    dofs = [int(model.joint(name).dofadr[0]) for name in robot.joint_names]
    motors = [model.actuator(name).id for name in robot.joint_names]
    factor = drawn.get("mass", np.ones(model.nbody - 1))
    model.body_mass[1:] *= factor
    model.body_inertia[1:] *= factor[:, None]
    model.body_ipos[model.body("torso_link").id] += drawn.get("center_of_mass", np.zeros(3))
    model.dof_armature[dofs] *= drawn.get("armature", one)
    model.dof_damping[dofs] += drawn.get("joint_damping", zero)
    model.dof_frictionloss[dofs] += drawn.get("friction_loss", zero)
    if "friction" in drawn:
        model.geom_friction[model.geom("ground").id, 0] = drawn["friction"][0]
    model.opt.gravity += drawn.get("gravity", np.zeros(3))
    strength = drawn.get("motor_strength", one)
    kp = robot.stiffness * strength * drawn.get("stiffness", one)
    kd = robot.damping * strength * drawn.get("damping", one)
    model.actuator_gainprm[motors, 0] = kp
    bias = np.stack((-kp * drawn.get("encoder_bias", zero), -kp, -kd), axis=1)
    model.actuator_biasprm[motors, :3] = bias
    limit = robot.effort_limit * strength
    model.actuator_forcerange[motors] = np.stack((-limit, limit), axis=1)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_each_world_is_the_nominal_model_with_its_draws(engine: str) -> None:
    """All terms at once against plain mj_step on a model made by hand, derived constants included."""
    env = make(engine, 3, {"solver_iterations": 50}, **MODEL_TERMS)
    actions = random_actions(env, torch.Generator().manual_seed(1), 1.0)
    models = [oracle_model(env, world) for world in range(3)]
    start = [env.simulation.data(world) for world in range(3)]
    env.step(actions)
    for world, (model, before) in enumerate(zip(models, start, strict=True)):
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = before.qpos, before.qvel
        data.ctrl[:] = (env.action_offset + env.action_scale * actions[world]).double()
        mujoco.mj_step(model, data, nstep=4)
        found = env.simulation.qvel[world].double().numpy()
        # float32 draws on the way to the oracle; and Warp computes in float32 throughout.
        np.testing.assert_allclose(found, data.qvel, atol={"c": 2e-4, "warp": 2e-2}[engine])
        plain = mujoco.MjData(env.simulation.model)
        plain.qpos[:], plain.qvel[:], plain.ctrl[:] = before.qpos, before.qvel, data.ctrl
        mujoco.mj_step(env.simulation.model, plain, nstep=4)
        assert np.abs(found - plain.qvel).max() > 0.3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("term", MODEL_TERMS)
def test_a_term_alone_changes_its_fields_and_the_motion(term: str, engine: str) -> None:
    env, nominal = make(engine, **{term: MODEL_TERMS[term]}), make(engine)
    low, high = MODEL_TERMS[term]
    values = env.randomization[term]
    assert low <= values.min() and values.max() <= high and values.std() > 0.1 * (high - low)
    actions = random_actions(env, torch.Generator().manual_seed(1), 1.0)
    for _ in range(5):
        env.step(actions)
        nominal.step(actions)
    assert (env.simulation.qvel - nominal.simulation.qvel).abs().amax(-1).median() > 1e-3


def momentum(env: HumanoidBaseEnv, world: int) -> np.ndarray:
    """Velocity of the whole robot's centre of mass, m/s."""
    model, state = oracle_model(env, world), env.simulation.data(world)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = state.qpos, state.qvel
    mujoco.mj_forward(model, data)
    mujoco.mj_subtreeVel(model, data)
    return data.subtree_linvel[1].copy()


@pytest.mark.parametrize("engine", ENGINES)
def test_mass_shows_in_the_acceleration_under_a_known_force(engine: str) -> None:
    env = make(engine, 3, mass=(0.5, 2.0))
    in_the_air(env)
    env.simulation.field("xfrc_applied")[:, 1, 0] = 100.0
    nominal = env.simulation.model.body_mass[1:]
    before = [momentum(env, world) for world in range(3)]
    env.step(torch.zeros(3, 29))
    for world in range(3):
        mass = float(env.randomization["mass"][world].double().numpy() @ nominal)
        acceleration = (momentum(env, world) - before[world]) / env.config.control_dt
        np.testing.assert_allclose(acceleration, [100.0 / mass, 0.0, -9.81], atol=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_gravity_shows_in_free_fall(engine: str) -> None:
    env = make(engine, 3, gravity=(-2.0, 2.0))
    in_the_air(env)
    before = [momentum(env, world) for world in range(3)]
    env.step(torch.zeros(3, 29))
    for world in range(3):
        fall = (momentum(env, world) - before[world]) / env.config.control_dt
        expected = env.simulation.model.opt.gravity + env.randomization["gravity"][world].numpy()
        np.testing.assert_allclose(fall, expected, atol=0.02)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_policy_feels_the_gravity_there_is(engine: str) -> None:
    """A robot at rest measures what holds it up, as an accelerometer does; a fall is told by the ground."""
    env = make(engine, 3, gravity=(-2.0, 2.0))
    env.simulation.qpos[:, 3:7] = torch.tensor([0.9, 0.1, -0.2, 0.3]).to(env.simulation.dtype)
    env.simulation.qpos[:, 3:7] /= env.simulation.qpos[:, 3:7].norm(dim=-1, keepdim=True)
    env._refresh()
    found = OBSERVATIONS["projected_gravity"].compute(env)
    for world in range(3):
        data = env.simulation.data(world)
        gravity = env.simulation.model.opt.gravity + env.randomization["gravity"][world].numpy()
        expected = data.xmat[1].reshape(3, 3).T @ (gravity / np.linalg.norm(gravity))
        np.testing.assert_allclose(found[world], expected, atol=1e-5)
    assert (found + env.base_up_b).abs().max() > 0.02


@pytest.mark.parametrize("engine", ENGINES)
def test_friction_decides_what_slides(engine: str) -> None:
    """Dragged by half its weight, a robot slides where mu is well below 0.5, and holds well above."""
    env = make(engine, 16, friction=(0.04, 1.2), distributions={"friction": "log_uniform"})
    friction = env.randomization["friction"][:, 0]
    env.simulation.field("xfrc_applied")[:, 1, 1] = 0.5 * env.weight
    start = env.foot_pos_w[:, :, 1].clone()
    for _ in range(12):
        env.step(torch.zeros(16, 29))
    slid = (env.foot_pos_w[:, :, 1] - start).mean(-1)
    slippery, rough = friction < 0.15, friction > 0.8
    assert slippery.any() and rough.any()
    assert slid[slippery].min() > 3.0 * slid[rough].abs().max()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_center_of_mass_moves_by_its_offset(engine: str) -> None:
    env = make(engine, 3, center_of_mass=(-0.05, 0.05))
    torso = env.simulation.model.body("torso_link").id
    for world in range(3):
        data = env.simulation.data(world)
        moved = data.xipos[torso] - data.xpos[torso]
        nominal = env.simulation.model.body_ipos[torso] + env.randomization["center_of_mass"][world].numpy()
        turned = rotate(torch.from_numpy(data.xquat[torso])[None], torch.from_numpy(nominal)[None])[0]
        np.testing.assert_allclose(moved, turned, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_joint_terms_resist_a_known_torque(engine: str) -> None:
    """A wrist's motor pushes with 0.5 N m in the air: dry friction of 1 N m holds it, the others slow it."""
    speeds = {}
    effort = {"control_mode": "effort"}
    terms = {
        "nominal": {},
        "friction_loss": {"friction_loss": (1.0, 1.0)},
        "joint_damping": {"joint_damping": (0.05, 0.05)},
        "armature": {"armature": (3.0, 3.0)},
        "motor_strength": {"motor_strength": (0.5, 0.5)},
    }
    for name, term in terms.items():
        env = make(engine, 1, effort, **term)
        in_the_air(env)
        action = torch.zeros(1, 29)
        joint = env.robot.joint_names.index("left_wrist_yaw_joint")
        action[:, joint] = 0.5 / env.action_scale[joint]
        env.step(action)
        speeds[name] = float(env.joint_vel[0, joint])
    assert speeds["nominal"] > 1.0
    assert abs(speeds["friction_loss"]) < 0.1 * speeds["nominal"]
    for name in ("joint_damping", "armature"):
        assert 0.05 < speeds[name] / speeds["nominal"] < 0.9, name
    assert speeds["motor_strength"] / speeds["nominal"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("actuator", ["implicit", "explicit"])
@pytest.mark.parametrize("engine", ENGINES)
def test_torque_is_that_of_the_drawn_servo(engine: str, actuator: str) -> None:
    """clip(s (kp f (target - q - bias) - kd g v), +-s limit), for every joint of every world."""
    terms = {name: MODEL_TERMS[name] for name in ("motor_strength", "stiffness", "damping", "encoder_bias")}
    env = make(engine, 4, {"actuator": actuator, "frame_skip": 1}, **terms)
    in_the_air(env)
    generator = torch.Generator().manual_seed(0)
    env.articulation.set_joint_velocities(torch.randn(4, 29, generator=generator))
    robot, drawn = env.robot, env.randomization
    position, velocity = env.articulation.get_joint_positions(), env.articulation.get_joint_velocities()
    actions = 3.0 * torch.randn(4, 29, generator=generator)
    target = env.action_offset + env.action_scale * actions
    force = env.simulation.field("actuator_force")[:, env.articulation.joint_ctrl]
    env.step(actions)
    strength = drawn["motor_strength"]
    kp = strength * drawn["stiffness"] * torch.from_numpy(robot.stiffness)
    kd = strength * drawn["damping"] * torch.from_numpy(robot.damping)
    limit = strength * torch.from_numpy(robot.effort_limit)
    torque = (kp * (target - position - drawn["encoder_bias"]) - kd * velocity).clamp(-limit, limit)
    torch.testing.assert_close(force.float(), torque.float(), atol=2e-3, rtol=1e-4)
    assert (torque.abs() == limit).any() and (torque.abs() < limit).any()


@pytest.mark.parametrize("engine", ENGINES)
def test_implicit_and_explicit_servos_agree(engine: str) -> None:
    """Implicit integration is explicit integration in the limit of short steps."""
    paths = []
    for actuator in ("implicit", "explicit"):
        env = make(engine, 2, {"actuator": actuator, "timestep": 0.0005, "frame_skip": 40})
        in_the_air(env)
        actions = random_actions(env, torch.Generator().manual_seed(0), 1.0)
        steps = []
        for _ in range(4):
            env.step(actions)
            steps.append(env.joint_pos.clone())
        paths.append(torch.stack(steps))
    moved = (paths[0] - env.default_joint_pos).abs().max()
    assert moved > 0.2 and (paths[0] - paths[1]).abs().max() < 0.02 * moved


@pytest.mark.parametrize("actuator", ["implicit", "explicit"])
@pytest.mark.parametrize("engine", ENGINES)
def test_torque_falls_with_speed_as_a_motors(engine: str, actuator: str) -> None:
    """Along the motion full torque up to one speed, none at another, a line between; against it all."""
    env = make(engine, 5, {"torque_speed": True, "actuator": actuator, "frame_skip": 1})
    in_the_air(env)
    robot = env.robot
    joint = robot.joint_names.index("left_knee_joint")
    full, none, limit = robot.full_torque_speed[joint], robot.no_load_speed[joint], robot.effort_limit[joint]
    speeds = torch.tensor([0.5 * full, 0.5 * (full + none), 1.1 * none, -0.9 * none, -1.1 * none])
    env.articulation.set_joint_velocities(torch.zeros(5, 29))
    env.simulation.qvel[:, env.articulation.joint_qvel][:, joint] = speeds.to(env.simulation.dtype)
    action = torch.zeros(5, 29)
    action[:, joint] = 20.0
    force = env.simulation.field("actuator_force")[:, env.articulation.joint_ctrl][:, joint]
    env.step(action)
    expected = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0]) * limit
    torch.testing.assert_close(force.float(), expected.float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_action_delay_shifts_the_step_response_by_exactly_that(engine: str) -> None:
    """In free fall at rest nothing moves but what the action moves."""
    responses = {}
    for steps in (0, 3):
        delay = (steps * 0.005, steps * 0.005)
        env = make(engine, 2, {"frame_skip": 1}, **({"action_delay": delay} if steps else {}))
        in_the_air(env)
        actions = random_actions(env, torch.Generator().manual_seed(0), 1.0)
        path = []
        for _ in range(12):
            env.step(actions)
            path.append(env.joint_pos.clone())
        responses[steps] = torch.stack(path)
    torch.testing.assert_close(responses[3][3:], responses[0][:-3], atol=2e-5, rtol=1e-4)
    assert (responses[3][:3] - env.default_joint_pos).abs().max() < 1e-5
    assert (responses[3][3] - responses[3][2]).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_an_action_delay_may_end_between_control_steps(engine: str) -> None:
    """What each physics step is given, against the targets of so many physics steps before."""
    env = make(engine, 6, action_delay=(0.0, 0.05))
    given: list[torch.Tensor] = []
    drive = env.actuators._drive

    def record(substep: int) -> None:
        drive(substep)
        given.append(env.simulation.ctrl.clone().float())

    env.actuators._drive = record  # type: ignore[method-assign]
    targets = [env.action_offset.expand(6, 29)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        actions = random_actions(env, generator)
        env.step(actions)
        targets.append(env.action_offset + env.action_scale * actions)
    delays = (env.randomization["action_delay"][:, 0] / 0.005).round().long()
    assert len(set(delays.tolist())) > 3
    for world, delay in enumerate(delays.tolist()):
        for tick, ctrl in enumerate(given):
            expected = targets[max(0, math.floor((tick - delay) / 4) + 1)][world]
            torch.testing.assert_close(ctrl[world], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sensor_delay_shows_older_frames_of_the_sensors_alone(engine: str) -> None:
    env = make(engine, 5, {"max_episode_length": 7}, sensor_delay=(0.0, 0.05))
    obs, info = env.reset(seed=0)
    truth = [[frame] * 5 for frame in info["critic_obs"][:, :98].double()]  # the past of each world
    generator = torch.Generator().manual_seed(0)
    late = env.randomization._measured
    for _ in range(12):
        obs, _, terminated, truncated, info = env.step(random_actions(env, generator))
        done = terminated | truncated
        ages = env.randomization["sensor_delay"][:, 0].double() / env.config.control_dt
        for world, past in enumerate(truth):
            frame = info["critic_obs"][world, :98].double()
            past[:] = [frame] * 5 if done[world] else [frame, *past[:-1]]
            whole, part = int(ages[world]), float(ages[world]) % 1.0
            seen = (1.0 - part) * past[whole] + part * past[whole + 1]
            expected = torch.where(late, seen, frame).float()
            torch.testing.assert_close(obs[world], expected, atol=1e-4, rtol=1e-4)
    assert 0 < int(late.sum()) < 98


def test_noise_has_its_deviation_and_nothing_else_has_any() -> None:
    noise = {"joint_pos": 0.02, "base_ang_vel": 0.3}
    env = make("c", 400, {"max_episode_length": 3}, observation_noise=noise)
    for _ in range(4):  # the third ends an episode
        obs, _, _, truncated, info = env.step(torch.zeros(400, 29))
        error = obs - info["critic_obs"][:, :98]
        final = info["final_obs"] - info["final_critic_obs"][:, :98]
        for seen in (error, final):
            assert float(seen[:, 0:3].std()) == pytest.approx(0.3, rel=0.1)
            joints = seen[:, 11:40]
            assert float(joints.std()) == pytest.approx(0.02, rel=0.05)
            rest = torch.cat((seen[:, 3:11], seen[:, 40:]), dim=1)
            assert torch.equal(rest, torch.zeros_like(rest))
    assert not truncated.all()


def test_action_noise_reaches_the_servos_and_not_the_policy() -> None:
    env = make("c", 200, action_noise=0.1)
    actions = torch.ones(200, 29)
    env.step(actions)
    sent = (env.simulation.ctrl.float() - env.action_offset) / env.action_scale
    assert float((sent - 1.0).std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(env.action, actions)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_encoders_bias_is_what_the_policy_is_told(engine: str) -> None:
    env = make(engine, 3, encoder_bias=(-0.1, 0.1))
    obs, info = env.reset(seed=0)
    error = obs - info["critic_obs"][:, :98]
    torch.testing.assert_close(error[:, 11:40], env.randomization["encoder_bias"], atol=1e-6, rtol=0)
    assert torch.equal(error[:, :11], torch.zeros(3, 11)) and torch.equal(error[:, 40:], torch.zeros(3, 58))


def test_initial_states_lie_in_their_ranges() -> None:
    env = make("c", 200, initial_joint_pos=(-0.3, 0.1), initial_velocity=(0.2, 0.6))
    deviation = env.joint_pos - env.default_joint_pos
    velocity = env.simulation.qvel[:, [0, 1, 5]]
    for values, low, high in ((deviation, -0.3, 0.1), (velocity, 0.2, 0.6)):
        assert low - 1e-6 <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high + 1e-6
    assert torch.equal(env.simulation.qvel[:, 6:], torch.zeros(200, 29).double())


@pytest.mark.parametrize("engine", ENGINES)
def test_draws_are_per_world_and_episode_and_never_compound(engine: str) -> None:
    env = make(engine, 6, **MODEL_TERMS)
    draws, sim = env.randomization, env.simulation
    nominal = torch.from_numpy(sim.model.body_mass[1:])
    for _ in range(30):
        env.reset()
    mass = sim.model_field("body_mass")[:, 1:].double()
    torch.testing.assert_close(mass, draws["mass"].double() * nominal, rtol=1e-6, atol=0)
    assert len(draws.values.unique(dim=0)) > 3
    mask = torch.tensor([True, False, True, False, False, False])
    fields = {name: live.clone() for name, live in draws._live.items()}
    values = draws.values.clone()
    env.reset(options={"reset_mask": mask})
    assert not torch.equal(draws.values[mask], values[mask])
    assert torch.equal(draws.values[~mask], values[~mask])
    for name, live in draws._live.items():
        assert torch.equal(live[~mask], fields[name][~mask]), name


def test_both_engines_get_the_same_robots() -> None:
    values = [make(engine, 8, **MODEL_TERMS).randomization.values for engine in ENGINES]
    assert torch.equal(*values)
    other = make("c", 8, **MODEL_TERMS)
    other.reset(seed=1)
    assert not torch.equal(other.randomization.values, values[0])


def test_a_seed_forgets_all_noise_and_delay() -> None:
    """Wherever an environment comes from, the same seed gives what a new one returns."""
    told = dataclasses.replace(randomization("sim2real"), population=8, sensor_delay=(0.0, 0.05))
    env, new = (HumanoidBaseEnv(HumanoidEnvConfig(num_envs=4, randomization=told)) for _ in range(2))
    for _ in range(3):
        env.step(torch.ones(4, 29))
    noise = env.randomization.noise.clone()
    env.reset(options={"reset_mask": torch.tensor([True, False, False, True])})
    assert torch.equal(env.randomization.noise[1:3], noise[1:3])
    assert (env.randomization.noise[0] != noise[0]).any()
    assert torch.equal(env.reset(seed=3)[0], new.reset(seed=3)[0])
    for _ in range(3):
        assert torch.equal(env.step(torch.zeros(4, 29))[0], new.step(torch.zeros(4, 29))[0])


def test_the_critic_sees_the_draws_and_their_reflection_is_one() -> None:
    env = make("c", 4, **MODEL_TERMS)
    _, info = env.reset(seed=0)
    draws = env.randomization
    torch.testing.assert_close(info["critic_obs"][:, -draws.values.shape[1] :], draws.values)
    index, sign = draws.mirror
    assert torch.equal(sign * (sign * draws.values[:, index])[:, index], draws.values)
    model = env.simulation.model
    bodies = [model.body(i).name for i in range(1, model.nbody)]
    start = draws.columns["mass"].start
    left, right = (start + bodies.index(f"{side}_knee_link") for side in ("left", "right"))
    assert int(index[left]) == right and float(sign[left]) == 1.0
    bias = draws.columns["encoder_bias"].start
    yaw = env.robot.joint_names.index("left_hip_yaw_joint")
    assert float(sign[bias + yaw]) == -1.0
    assert len(env.mirror["critic_obs"][0]) == info["critic_obs"].shape[1]


@pytest.mark.parametrize("actuator", ["implicit", "explicit"])
def test_a_mirrored_robot_in_a_mirrored_state_moves_mirrored(
    monkeypatch: pytest.MonkeyPatch, actuator: str
) -> None:
    """World 1 has the reflection of world 0's draws, of every term: physics and observations follow."""
    delays = {"action_delay": (0.0, 0.02), "sensor_delay": (0.0, 0.05)}
    fields = {"actuator": actuator, "torque_speed": True, "solver_iterations": 50, "harness": 0.5}
    env = make("c", 2, fields, **MODEL_TERMS, **delays)
    sim, draws = env.simulation, env.randomization
    assert set(draws.names) == {*RandomizationConfig.FACTORS, *RandomizationConfig.OFFSETS}
    names = iter(draws.names)

    def reflected(*bounds: Any) -> torch.Tensor:
        values, part = draw(*bounds), draws.columns[next(names)]
        index, sign = (rule[part] for rule in draws.mirror)
        values[1] = sign * values[0, index - part.start]
        return values

    monkeypatch.setattr("kouros.envs.randomization.draw", reflected)
    draws._draw_population()
    everyone = torch.ones(2, dtype=torch.bool)
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.arange(n) / 64)  # robots 0 and 1 of 64
    env._randomize(everyone)
    monkeypatch.undo()

    def mirrored(x: torch.Tensor, name: str) -> torch.Tensor:
        index, sign = env.mirror[name]
        return sign.to(x.dtype) * x[:, index]

    sim.qpos[1, :7] = torch.tensor([1.0, -1, 1, 1, -1, 1, -1]).double() * sim.qpos[0, :7]
    sim.qpos[1, 7:] = mirrored(sim.qpos[:1, 7:], "action")
    env.set_command(torch.tensor([[0.4, 0.2, 0.3], [0.4, -0.2, -0.3]]))
    env.phase[:] = torch.tensor([0.1, 0.6])
    env._refresh()
    env._observations(everyone)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):  # then a foot lands one physics step sooner than its image
        action = torch.randn(1, 29, generator=generator)
        obs, *_, info = env.step(torch.cat((action, mirrored(action, "action"))))
        for name, values in (("obs", obs), ("critic_obs", info["critic_obs"])):
            torch.testing.assert_close(mirrored(values[:1], name), values[1:], atol=2e-2, rtol=2e-2)
    assert obs.abs().max() > 0.5 and (draws.values[0] != draws.values[1]).sum() > 100


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "normal"])
def test_distributions_are_scipys(kind: str) -> None:
    low, high = 0.5, 2.0
    found = draw(torch.rand(20_000, dtype=torch.float64), low, high, kind).numpy()
    expected = {
        "uniform": scipy.stats.uniform(low, high - low),
        "log_uniform": scipy.stats.loguniform(low, high),
        "normal": scipy.stats.truncnorm(-2, 2, loc=1.25, scale=0.375),
    }[kind]
    assert low <= found.min() and found.max() <= high
    assert scipy.stats.kstest(found, expected.cdf).statistic < 0.015


def test_a_curriculum_narrows_ranges_and_spaces_pushes() -> None:
    env = make("c", 64, mass=(0.5, 1.5), friction=(0.4, 1.0), push_velocity=(0.5, 0.5))
    draws = env.randomization
    place = {name: live.data_ptr() for name, live in draws._live.items()}
    table = draws._tables["values"].data_ptr()
    draws.set_scale("mass", 0.2)
    draws.set_scale("friction", 0.5)
    env.reset()
    assert 0.9 <= draws["mass"].min() < 0.92 and 1.08 < draws["mass"].max() <= 1.1
    assert 0.7 <= draws["friction"].min() < 0.75 and draws["friction"].max() <= 1.0
    draws.set_scale("push_frequency", 0.0)
    env.reset()
    assert torch.isinf(env.until_push).all()
    draws.set_scale("push_frequency", 2.0)
    env.reset()
    assert env.until_push.min() >= 0.5 and env.until_push.max() <= 1.5
    # A recorded step reads and writes the same memory.
    assert place == {name: live.data_ptr() for name, live in draws._live.items()}
    assert table == draws._tables["values"].data_ptr()
    for name, value in (("mass", 1.5), ("mass", -0.1), ("push_frequency", -1.0), ("moss", 0.5)):
        with pytest.raises(ValueError, match=name):
            draws.set_scale(name, value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run(preset: str) -> None:
    config = HumanoidEnvConfig(num_envs=4, randomization=randomization(preset))
    env = HumanoidBaseEnv(config)
    obs, info = env.reset(seed=0)
    assert obs.shape[1:] == env.single_observation_space.shape
    assert info["critic_obs"].shape[1:] == env.critic_observation_space.shape
    assert (env.randomization.names == ()) == (preset == "none")


def test_every_field_of_the_randomization_is_tested_here() -> None:
    """A field added without a test of its effect fails here."""
    tested = {*MODEL_TERMS, *STILL, "action_delay", "sensor_delay", "action_noise", "observation_noise"}
    elsewhere = {"push_velocity", "push_interval", "distributions", "population"}
    assert {f.name for f in dataclasses.fields(RandomizationConfig)} == tested | elsewhere


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"mass": (1.2, 0.8)}, r"mass=\(1.2, 0.8\): must be \(lowest, highest\)"),
        ({"mass": 1.2}, r"mass=1.2: must be \(lowest, highest\)"),
        ({"mass": (-0.5, 1.0)}, r"mass=.*greater than 0"),
        ({"friction": (0.0, 1.0)}, r"friction=.*greater than 0"),
        ({"friction_loss": (-0.1, 0.0)}, r"friction_loss=.*not be negative"),
        ({"action_delay": (0.0, 0.5)}, r"action_delay=.*at most 0.1 s"),
        ({"sensor_delay": (-0.01, 0.0)}, r"sensor_delay=.*not be negative"),
        ({"encoder_bias": (-4.0, 0.0)}, r"encoder_bias=.*pi"),
        ({"observation_noise": {"joint_pos": -1.0}}, "observation_noise=.*negative"),
        ({"gravity": (float("nan"), 0.0)}, "gravity=.*finite"),
        ({"distributions": {"mass": "cauchy"}}, "distributions.*cauchy"),
        ({"distributions": {"moss": "normal"}}, "moss.*did you mean 'mass'"),
        ({"distributions": {"mass": "normal"}}, "mass is left out"),
        ({"gravity": (-1.0, 1.0), "distributions": {"gravity": "log_uniform"}}, "log_uniform needs"),
        ({"population": 0}, "population=0"),
        ({"push_interval": (0.0, 1.0)}, "push_interval"),
    ],
)
def test_bad_ranges_are_refused(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomizationConfig(**terms)
    with pytest.raises(ValueError, match="choose from none, light, sim2real"):
        randomization("heavy")


@pytest.mark.parametrize(
    ("fields", "terms", "message"),
    [
        ({"control_mode": "effort"}, {"stiffness": (0.9, 1.1)}, "stiffness=.*would change nothing"),
        ({"control_mode": "velocity"}, {"stiffness": (0.9, 1.1)}, "stiffness=.*would change nothing"),
        ({"control_mode": "effort"}, {"damping": (0.9, 1.1)}, "damping=.*would change nothing"),
        ({}, {"action_delay": (0.0, 0.001)}, "action_delay=.*half a physics step"),
        ({}, {"observation_noise": {"joint_acc": 1.0}}, "joint_acc"),
        (
            {"actor_observations": ("command",)},
            {"sensor_delay": (0.0, 0.02)},
            "sensor_delay=.*observes no sensor",
        ),
        (
            {"actor_observations": ("command",), "control_mode": "effort"},
            {"encoder_bias": (0.0, 0.02)},
            "encoder_bias=.*would change nothing",
        ),
    ],
)
def test_a_term_without_effect_is_refused(fields: dict, terms: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("c", 1, fields, **terms)
