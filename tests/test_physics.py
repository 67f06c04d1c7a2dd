"""The CPU engine against plain ``mj_step``, and the articulation view against the model."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kouros.envs.config import HumanoidEnvConfig
from kouros.envs.scene import make_model
from kouros.physics.articulation import ArticulationView
from kouros.physics.rotations import quat_from_yaw, rotate, rotate_inverse, up_in_body, yaw_of
from kouros.physics.simulation import Simulation, make_simulation
from kouros.robots.robot import Robot


@pytest.fixture(scope="module")
def model(robot: Robot) -> mujoco.MjModel:
    return make_model(robot, HumanoidEnvConfig())


def standing(model: mujoco.MjModel, robot: Robot, worlds: int, threads: int = 0) -> Simulation:
    sim = make_simulation(model, worlds, num_threads=threads)
    sim.qpos[:, 2] = robot.base_height
    sim.qpos[:, 7:] = torch.tensor(robot.default_joint_pos)
    sim.ctrl[:] = torch.tensor(robot.default_joint_pos)
    return sim


@pytest.mark.parametrize("threads", [1, 2])
def test_bit_equal_to_a_loop_over_mj_step(robot: Robot, model: mujoco.MjModel, threads: int) -> None:
    worlds, steps = 3, 1000
    sim = standing(model, robot, worlds, threads)
    data = [mujoco.MjData(sim.model) for _ in range(worlds)]
    for world, d in enumerate(data):
        d.qpos[:] = sim.qpos[world]
    rng = np.random.default_rng(0)
    for _ in range(steps // 4):
        ctrl = robot.default_joint_pos + 0.3 * rng.standard_normal((worlds, model.nu))
        sim.ctrl[:] = torch.from_numpy(ctrl)
        sim.step(4)
        for world, d in enumerate(data):
            d.ctrl[:] = ctrl[world]
            for _ in range(4):
                mujoco.mj_step(sim.model, d)
    for world, d in enumerate(data):
        np.testing.assert_array_equal(sim.qpos[world], d.qpos)
        np.testing.assert_array_equal(sim.qvel[world], d.qvel)
        np.testing.assert_array_equal(sim.sensordata[world], d.sensordata)


def test_state_tensors_share_the_engines_memory(robot: Robot, model: mujoco.MjModel) -> None:
    sim = standing(model, robot, 2)
    sim.step()
    before = sim.qpos[0, 2].item()
    height = sim.field("qpos")[:, 2]
    height += 1.0
    assert sim.qpos[0, 2].item() == before + 1.0
    assert sim.data(0).qpos[2] == before + 1.0


@settings(max_examples=15, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=4, max_size=4))
def test_masked_calls_touch_only_their_rows(mask: list[bool]) -> None:
    from kouros.robots import get_robot

    robot = get_robot("g1")
    sim = standing(make_model(robot, HumanoidEnvConfig()), robot, 4)
    rows = torch.tensor(mask)
    sim.step(5)
    names = ("qpos", "qvel", "qacc_warmstart", "sensordata", "xpos")
    before = {name: sim.field(name).clone() for name in names}
    sim.reset(rows)
    sim.forward(rows)
    for name in names:
        after = sim.field(name)
        assert torch.equal(after[~rows], before[name][~rows])
    assert torch.equal(sim.qpos[rows], torch.tensor(sim.model.qpos0).expand(int(rows.sum()), -1))
    assert (sim.qvel[rows] == 0).all()


def test_n_plus_n_equals_2n_through_a_state_dict(robot: Robot, model: mujoco.MjModel) -> None:
    sim = standing(model, robot, 3)
    sim.model_field("body_mass")[1] *= 1.1
    sim.set_const()
    sim.step(20)
    saved = sim.state_dict()
    sim.step(20)
    other = make_simulation(model, 3)
    other.load_state_dict(saved)
    assert torch.equal(other.sensordata, saved["sensordata"])
    other.step(20)
    assert torch.equal(other.qpos, sim.qpos)
    assert torch.equal(other.sensordata, sim.sensordata)


def test_model_fields_are_per_world(robot: Robot, model: mujoco.MjModel) -> None:
    """In the air, twice the gravity is twice the fall."""
    sim = standing(model, robot, 2)
    sim.qpos[:, 2] = 5.0
    start = sim.qpos[:, 2].clone()
    sim.model_field("opt.gravity")[1, 2] *= 2.0
    sim.step(50)
    drop = start - sim.qpos[:, 2]
    assert drop[1] / drop[0] == pytest.approx(2.0, rel=0.02)
    assert model.opt.gravity[2] == -9.81


def test_a_sick_world_stays_alone(robot: Robot, model: mujoco.MjModel) -> None:
    sim, healthy = standing(model, robot, 3), standing(model, robot, 3)
    sim.qpos[1] = float("nan")
    sim.step(4)
    healthy.step(4)
    assert torch.equal(sim.qpos[[0, 2]], healthy.qpos[[0, 2]])
    assert not torch.isfinite(sim.qpos[1]).all()


def test_bad_input_is_named(robot: Robot, model: mujoco.MjModel) -> None:
    with pytest.raises(ValueError, match="num_worlds=0"):
        make_simulation(model, 0)
    with pytest.raises(ValueError, match="num_threads=-1"):
        make_simulation(model, 1, num_threads=-1)
    with pytest.raises(ValueError, match="device='meta'"):
        make_simulation(model, 1, "meta")
    sim = standing(model, robot, 2)
    with pytest.raises(ValueError, match=r"field='qposs'.*did you mean 'qpos'"):
        sim.field("qposs")
    with pytest.raises(ValueError, match="model_field='body_maas'"):
        sim.model_field("body_maas")
    with pytest.raises(KeyError, match="imu_gyro"):
        sim.sensor("gyro")
    with pytest.raises(ValueError, match=r"\(3, .*in the file and \(2, "):
        sim.load_state_dict(standing(model, robot, 3).state_dict())


class TestArticulationView:
    @pytest.fixture()
    def view(self, robot: Robot, model: mujoco.MjModel) -> ArticulationView:
        return ArticulationView(standing(model, robot, 4), robot)

    def test_names(self, view: ArticulationView, robot: Robot) -> None:
        assert (view.num_dof, view.num_bodies, view.count) == (29, 30, 4)
        assert view.dof_names == robot.joint_names
        assert view.body_names[0] == "pelvis"

    def test_setters_touch_their_worlds_and_read_back(self, view: ArticulationView) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor([3, 1])
        others = [0, 2]
        state = view.simulation.state_dict()["state"]
        for get, set_, shape in (
            (view.get_joint_positions, view.set_joint_positions, (2, 29)),
            (view.get_joint_velocities, view.set_joint_velocities, (2, 29)),
            (view.get_velocities, view.set_velocities, (2, 6)),
        ):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            set_(value, ids)
            torch.testing.assert_close(get(ids), value)
        position = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        orientation = quat_from_yaw(torch.tensor([0.5, -1.0], dtype=torch.float64))
        view.set_world_poses(position, orientation, ids)
        for found, expected in zip(view.get_world_poses(ids), (position, orientation), strict=True):
            assert torch.equal(found, expected)
        after = view.simulation.state_dict()["state"]
        assert torch.equal(after[others], state[others])

    def test_velocities_are_in_the_world_frame(self, view: ArticulationView) -> None:
        """A yaw of 90 degrees and a roll rate about the world's x axis: the body's -y axis."""
        quarter = quat_from_yaw(torch.tensor([torch.pi / 2], dtype=torch.float64))
        view.set_world_poses(orientations=quarter, env_ids=[2])
        view.set_velocities(torch.tensor([[0.0, 0, 0, 1, 0, 0]]), [2])
        torch.testing.assert_close(
            view.simulation.qvel[2, 3:6], torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
        )

    def test_targets_make_the_servos_law(self, view: ArticulationView, robot: Robot) -> None:
        """Actuator force = kp (q* - q) + kd (v* - v) + effort, within the limits."""
        sim = view.simulation
        generator = torch.Generator().manual_seed(1)
        q, v, q_target, v_target, effort = (
            s * torch.randn(4, 29, generator=generator, dtype=torch.float64)
            for s in (0.1, 0.1, 0.1, 0.1, 1.0)
        )
        view.set_joint_positions(q)
        view.set_joint_velocities(v)
        view.set_joint_position_targets(q_target)
        view.set_joint_velocity_targets(v_target)
        view.set_joint_efforts(effort)
        force = sim.field("actuator_force")
        sim.forward()
        kp, kd, limit = (torch.tensor(x) for x in (robot.stiffness, robot.damping, robot.effort_limit))
        expected = (kp * (q_target - q) + kd * (v_target - v) + effort).clamp(-limit, limit)
        torch.testing.assert_close(force, expected)
        assert torch.equal(view.get_joint_position_targets(), q_target)
        assert torch.equal(view.get_joint_velocity_targets(), v_target)
        assert torch.equal(view.get_joint_efforts(), effort)

    def test_targets_without_effect_are_refused(self, robot: Robot) -> None:
        effort = make_model(robot, HumanoidEnvConfig(control_mode="effort"))
        view = ArticulationView(make_simulation(effort, 1), robot)
        with pytest.raises(ValueError, match="position targets have no effect"):
            view.set_joint_position_targets(torch.zeros(1, 29))
        with pytest.raises(ValueError, match="velocity targets have no effect"):
            view.set_joint_velocity_targets(torch.zeros(1, 29))

    def test_masses_change_the_physics_of_their_world(self, view: ArticulationView) -> None:
        """In the air, an upward force F on the base gives the centre of mass F / m - g."""
        masses = view.get_body_masses()
        assert masses.sum(-1)[0].item() == pytest.approx(33.3411, abs=1e-3)
        view.set_body_masses(2.0 * masses[[2]], [2])
        sim, force = view.simulation, 100.0
        sim.qpos[:, 2] = 5.0
        sim.field("xfrc_applied")[:, 1, 2] = force
        steps = 10
        sim.step(steps)
        for world in range(4):
            data = sim.data(world)
            mujoco.mj_subtreeVel(data.model, data)
            mass = masses[0].sum().item() * (2.0 if world == 2 else 1.0)
            expected = (force / mass - 9.81) * steps * sim.model.opt.timestep
            assert data.subtree_linvel[0, 2] == pytest.approx(expected, rel=1e-3)
        torch.testing.assert_close(view.get_body_masses([0]), masses[[0]])

    def test_bad_ids_are_refused(self, view: ArticulationView) -> None:
        with pytest.raises(ValueError, match="env_ids"):
            view.get_joint_positions(torch.tensor([True, False, True, False]))
        with pytest.raises(IndexError):
            view.get_joint_positions([7])


finite = st.floats(-3, 3, allow_nan=False)


@given(st.tuples(finite, finite, finite, finite), st.tuples(finite, finite, finite))
def test_rotations_equal_mujocos(quat: tuple, vec: tuple) -> None:
    q = np.add(quat, [4.0, 0, 0, 0])
    q /= np.linalg.norm(q)
    expected = np.zeros(3)
    mujoco.mju_rotVecQuat(expected, np.array(vec), q)
    q_t, v_t = torch.tensor(q), torch.tensor(vec, dtype=torch.float64)
    np.testing.assert_allclose(rotate(q_t, v_t), expected, atol=1e-12)
    np.testing.assert_allclose(rotate_inverse(q_t, rotate(q_t, v_t)), vec, atol=1e-12)
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, q)
    np.testing.assert_allclose(up_in_body(q_t), matrix[6:], atol=1e-12)
    forward = rotate(q_t, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert abs(yaw_of(q_t) - torch.atan2(forward[1], forward[0])) < 1e-9
