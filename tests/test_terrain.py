"""Terrain: what each type does to what stands on it, on both engines; heights, levels and their rule."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import mujoco
import numpy as np
import pytest
import torch

from conftest import make_env, random_actions
from kouros.envs.config import (
    ROUGH_TYPES,
    HumanoidEnvConfig,
    RandomizationConfig,
    TerrainConfig,
    from_plain,
    walk_rough,
)
from kouros.envs.evaluation import _Soles, evaluate_walk
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.observations import OBSERVATIONS, SCAN_LIMIT, SCAN_X, SCAN_Y
from kouros.envs.scene import ground_geoms, make_model
from kouros.envs.terrain import PIT, RASTER, SPAWN_NOISE, TILES, Ground, Terrain, add_to, make_terrain
from kouros.physics.rotations import rotate, yaw_of
from kouros.physics.simulation import make_simulation
from kouros.robots.robot import Robot
from test_warp import NoHost, refuse_the_host

SLOPE, RISER, HIGH, GAP = 0.35, 0.1, 0.2, 0.4
RADIUS = 0.03
# One tile of each type, all figures known; 8 m wide with a platform of 2 m: ten treads of 0.3 m.
FIGURES = TerrainConfig(
    types=ROUGH_TYPES,
    levels=1,
    roughness=(0.05, 0.05),
    slope=(SLOPE, SLOPE),
    stair_riser=(RISER, RISER),
    stone_size=(0.6, 0.6),
    stone_gap=(GAP, GAP),
    obstacle_height=(HIGH, HIGH),
    gap_width=(GAP, GAP),
)
# By type: points from the tile's centre and the height of the ground there; None: a hole.
PLACES: dict[str, list[tuple[float, float, float | None]]] = {
    "flat": [(0.0, 0.0, 0.0), (3.9, -3.9, 0.0), (-2.0, 1.0, 0.0)],
    "stairs_up": [(0.0, 0.0, -10 * RISER)] + [(4.0 - 0.15 - 0.3 * k, 0.1, -k * RISER) for k in range(10)],
    "stairs_down": [(0.0, 0.0, 10 * RISER)] + [(0.1, 0.15 - 4.0 + 0.3 * k, k * RISER) for k in range(10)],
    "slope_up": [(0.0, 0.0, -3.0 * math.tan(SLOPE)), (2.5, 0.0, -1.5 * math.tan(SLOPE))],
    "slope_down": [(0.0, 0.0, 3.0 * math.tan(SLOPE)), (-2.0, 0.0, 2.0 * math.tan(SLOPE))],
    # Eight stones of 0.6 m a side, on a lattice of 1 m: the corners between four stones are holes.
    "stepping_stones": [(0.0, 0.0, 0.0), (2.5, 1.5, 0.0), (2.0, 2.0, None), (-3.0, 2.0, None)],
    "gaps": [(0.0, 0.0, 0.0), (1.9, 0.0, 0.0), (1.2, 0.0, None), (0.5, -1.2, None), (2.6, 0.5, None)],
}


@pytest.fixture(scope="module")
def terrain() -> Terrain:
    return make_terrain(FIGURES)


@pytest.fixture(scope="module")
def probe(terrain: Terrain) -> mujoco.MjModel:
    """A short capsule along y that moves along x, y and z and does not turn, on the terrain."""
    spec = mujoco.MjSpec()
    body = spec.worldbody.add_body(name="probe")
    for axis in np.eye(3):
        body.add_joint(type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis)
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CAPSULE,
        size=[RADIUS, 0.02, 0],
        quat=[math.sqrt(0.5), math.sqrt(0.5), 0, 0],
        mass=1.0,
        group=3,
        contype=0,
        conaffinity=1,
    )
    add_to(spec, terrain, contype=1, conaffinity=0, priority=1, friction=[1.0, 0.005, 0.0001])
    spec.option.timestep = 0.005
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    return spec.compile()


def rays(model: mujoco.MjModel, points: np.ndarray) -> np.ndarray:
    """Heights that vertical rays from above hit, robots (other groups) left out, ``(n,)``."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    group, geom = np.array([1, 0, 0, 0, 0, 0], np.uint8), np.zeros(1, np.int32)
    down = np.array([0.0, 0.0, -1.0])
    return np.array(
        [10.0 - mujoco.mj_ray(model, data, np.array([*p, 10.0]), down, group, 1, -1, geom) for p in points]
    )


def level_points(model: mujoco.MjModel, centre: np.ndarray, n: int, within: float) -> np.ndarray:
    """Points of a tile around which the ground is level, found with rays."""
    points = centre + np.random.default_rng(0).uniform(-3.9, 3.9, (n, 2))
    around = [rays(model, points + d) for d in 0.06 * np.array([(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])]
    return points[np.ptp(around, axis=0) <= within]


Rest = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def drop(model: mujoco.MjModel, terrain: Terrain, engine: str) -> Rest:
    """By type: where probes were put, the heights expected there, and where they are 0.5 s later."""
    where, expected, owner = [], [], []
    for name, centre in zip(FIGURES.types, terrain.centres[0], strict=True):
        places = PLACES.get(name)
        if places is None:
            points = level_points(model, centre, 60, 0.1)[:12]
            where += list(points)
            expected += list(rays(model, points))
        else:
            where += [centre + place[:2] for place in places]
            expected += [math.nan if place[2] is None else place[2] for place in places]
        owner += [name] * (len(where) - len(owner))
    xy, height = np.array(where), np.array(expected)
    sim = make_simulation(model, len(xy), engine=engine, contacts=8)  # type: ignore[arg-type]
    start = np.column_stack([xy, np.nan_to_num(height) + 0.05 + RADIUS])
    sim.qpos.copy_(torch.from_numpy(start))
    sim.step(100)
    assert not sim.overflow().any()
    end = sim.qpos.double().numpy()
    mine = np.array(owner)
    return {n: (xy[mine == n], height[mine == n], end[mine == n]) for n in FIGURES.types}


@pytest.fixture(scope="module")
def rest(probe: mujoco.MjModel, terrain: Terrain) -> dict[str, Rest]:
    return {engine: drop(probe, terrain, engine) for engine in ("c", "warp")}


@pytest.mark.parametrize("engine", ["c", "warp"])
class TestWhatItDoes:
    """A body is put down on each type, on each engine."""

    @pytest.mark.parametrize("name", ["flat", "stairs_up", "stairs_down", "stepping_stones", "gaps"])
    def test_carries_at_its_height_and_lets_through_where_it_is_a_hole(self, rest, engine, name) -> None:
        _, height, end = rest[engine][name]
        hole = np.isnan(height)
        assert hole.any() == (name in ("stepping_stones", "gaps"))
        np.testing.assert_allclose(end[~hole, 2], height[~hole] + RADIUS, atol=3e-3)
        assert (end[hole, 2] < -0.5).all()

    @pytest.mark.parametrize("name", ["slope_up", "slope_down"])
    def test_a_slope_carries_a_capsule_at_its_side(self, rest, engine, name) -> None:
        _, height, end = rest[engine][name]
        assert abs(end[0, 2] - height[0] - RADIUS) < 3e-3  # the platform
        above = RADIUS / math.cos(SLOPE)
        moved = end[1, 0] - rest[engine][name][0][1, 0]  # a landing is not quite at once at rest
        assert abs(moved) < 0.03
        assert abs(end[1, 2] - height[1] - above - moved * math.tan(SLOPE)) < 5e-3

    def test_obstacles_carry_at_their_tops(self, rest, engine) -> None:
        _, height, end = rest[engine]["obstacles"]
        np.testing.assert_allclose(end[:, 2], height + RADIUS, atol=3e-3)
        assert (abs(height) < 1e-6).any() and (height > 0.5 * HIGH - 1e-6).any()
        assert ((abs(height) < 1e-6) | (height > 0.5 * HIGH - 1e-6)).all() and height.max() <= HIGH

    def test_rough_ground_is_uneven_underfoot(self, rest, engine) -> None:
        _, height, end = rest[engine]["rough"]
        rise = end[:, 2] - RADIUS - height
        assert (rise > -5e-3).all() and (rise < 0.05).all()
        assert end[:, 2].std() > 0.2 * FIGURES.roughness[1]

    def test_a_slope_pulls_what_its_friction_does_not_hold(self, probe, terrain, engine) -> None:
        """Newton on an incline: a = g (sin s - mu cos s), or nothing where mu > tan s."""
        friction = np.array([0.1, 0.25, 0.6])
        sim = make_simulation(probe, 3, engine=engine, contacts=8)
        sim.model_field("geom_friction")[:, :, 0] = torch.from_numpy(friction).unsqueeze(-1)
        x, y = terrain.centres[0, FIGURES.types.index("slope_down")]
        above = (4.0 - 1.6) * math.tan(SLOPE) + RADIUS / math.cos(SLOPE)
        sim.qpos.copy_(torch.tensor([x + 1.6, y, above]))
        sim.step(80)
        slid = (sim.qpos[:, 0].double().numpy() - x - 1.6) / math.cos(SLOPE)
        pull = np.maximum(9.81 * (math.sin(SLOPE) - friction * math.cos(SLOPE)), 0.0)
        # Contacts are soft, and hold a little less than all.
        np.testing.assert_allclose(slid, 0.5 * pull * 0.4**2, atol=0.03)
        assert slid[0] > slid[1] + 0.05 > slid[2] + 0.1


def test_both_engines_carry_at_the_same_height(rest: dict[str, Rest]) -> None:
    for name in FIGURES.types:
        hole = np.isnan(rest["c"][name][1])
        c, warp = (rest[engine][name][2][~hole] for engine in ("c", "warp"))
        np.testing.assert_allclose(warp, c, atol=5e-3, err_msg=name)


class TestHeights:
    def test_the_raster_is_what_a_ray_hits(self, probe: mujoco.MjModel, terrain: Terrain) -> None:
        """At the middle of every cell exactly, up to single precision; anywhere within the cell's slope."""
        rng = np.random.default_rng(0)
        cell = rng.integers(0, terrain.height.shape, (4000, 2))
        # Without the plane of a whole model, rays into holes hit nothing.
        middle = (cell + 0.5) * RASTER - terrain.half
        found, height = rays(probe, middle), terrain.height[tuple(cell.T)]
        hole = found > 10.0
        assert (height[hole] == terrain.floor).all() and 20 < hole.sum() < 400
        np.testing.assert_allclose(height[~hole], found[~hole], atol=1e-5)
        ground = Ground(terrain, torch.device("cpu"))
        anywhere = middle + rng.uniform(-0.5, 0.5, middle.shape) * RASTER
        asked = ground.height_at(torch.from_numpy(anywhere).float()).numpy()
        assert (abs(asked - rays(probe, anywhere))[~hole] < 0.05).mean() > 0.95

    def test_support_is_height_with_the_holes_filled(self, terrain: Terrain) -> None:
        hole = terrain.height == terrain.floor
        assert (terrain.support[~hole] == terrain.height[~hole]).all()
        assert (terrain.support[hole] == 0.0).all() and hole.any()
        assert terrain.floor == pytest.approx(-3.0 * math.tan(SLOPE) - PIT)

    def test_beyond_the_field_the_ground_is_flat(self, terrain: Terrain) -> None:
        ground = Ground(terrain, torch.device("cpu"))
        far = torch.tensor([[1e5, 0.0], [-1e5, 3.0], [0.0, 99.0], [0.0, -99.0]])
        assert (ground.height_at(far) == 0).all() and (ground.support_at(far) == 0).all()

    @pytest.mark.parametrize("name", ROUGH_TYPES)
    def test_a_tile_ends_at_height_0(self, name: str) -> None:
        """So that any tile may lie beside any other."""
        one = make_terrain(dataclasses.replace(FIGURES, types=(name,)))
        first = round(FIGURES.border / RASTER)
        edge = one.support[first : first + 160, first]
        assert abs(edge).max() < 0.02 and (name == "flat") == (np.ptp(one.height) == 0)

    def test_observations_and_rewards_count_from_the_ground(self) -> None:
        """Robots that stand on a pyramid a metre high see what they see on a plane."""
        on_top = make_env(4, terrain=dataclasses.replace(FIGURES, types=("stairs_down",)))
        plane, soles = make_env(4), _Soles(on_top)
        for env in (on_top, plane):
            env.simulation.qpos[:, 7:] = env.default_joint_pos.double()
            env.simulation.qvel.zero_()
            for _ in range(20):
                *_, info = env.step(torch.zeros(4, 29))
        torch.testing.assert_close(on_top.base_pos_w[:, 2] - 10 * RISER, on_top.base_height)
        for name in ("base_height", "foot_height"):
            a, b = (OBSERVATIONS[name].compute(env) for env in (on_top, plane))
            torch.testing.assert_close(a, b, atol=0.02, rtol=0)
        assert (info["height"] > 0.6).all()
        assert (soles.clearance().abs() < 0.02).all() and on_top.foot_contact.all()

    @pytest.mark.parametrize("engine", ["c", "warp"])
    def test_a_robot_stands_where_its_episode_begins(self, engine: str) -> None:
        """Held upright by the harness, on every type: feet on the ground, at its height."""
        still = RandomizationConfig(initial_joint_pos=(0.0, 0.0), initial_velocity=(0.0, 0.0))
        env = make_env(9, terrain=FIGURES, engine=engine, randomization=still)
        start = env.simulation.qpos[:, :3].clone().float()
        centre = torch.from_numpy(make_terrain(FIGURES).centres[0]).float()
        assert ((start[:, :2] - centre).abs() <= SPAWN_NOISE + 1e-5).all()
        torch.testing.assert_close(start[:, :2], env.spawn_xy)
        level = torch.arange(9) != ROUGH_TYPES.index("rough")
        assert (env.base_height[level] - env.robot.base_height).abs().max() < 1e-5
        for _ in range(15):
            _, _, fallen, *_ = env.step(torch.zeros(9, 29))
            assert not fallen.any()
        assert env.foot_contact.sum(-1).min() >= 1
        assert env.foot_height[level].abs().max() < 0.03 and env.foot_height.abs().max() < 0.1

    def test_a_robot_in_a_hole_has_fallen_and_one_off_the_field_has_not(self) -> None:
        env = make_env(3, terrain=dataclasses.replace(FIGURES, types=("gaps",)))
        env.simulation.qpos[0, :2] = torch.tensor([1.2, 0.0])
        env.simulation.qpos[0, 2] = 0.4
        env.simulation.qpos[1, :2] = torch.tensor([0.0, -7.7])  # the field ends at 8 m
        _, _, terminated, truncated, _ = env.step(torch.zeros(3, 29))
        assert terminated.tolist() == [True, False, False]
        assert truncated.tolist() == [False, True, False]
        assert (env.base_pos_w[:2, :2].abs() < 0.5).all()


class TestScan:
    def test_it_is_rays_around_the_robot(self) -> None:
        env = make_env(9, terrain=FIGURES, critic_observations=("height_scan",))
        rng = torch.Generator().manual_seed(0)
        for _ in range(10):
            env.step(random_actions(env, rng, 1.0))
        centres = env.ground.centres[0]
        env.simulation.qpos[:, :2] = (centres + 2.0 * torch.rand(9, 2, generator=rng)).double()
        env.simulation.qpos[3, 2] += 5.0  # far above: at the limit
        env._refresh()
        scan = OBSERVATIONS["height_scan"].compute(env).view(9, len(SCAN_X), len(SCAN_Y))
        assert (scan[3] == -SCAN_LIMIT).all()
        wrong = []
        for world in range(9):
            base, yaw = env.base_pos_w[world].double().numpy(), float(yaw_of(env.base_quat_w)[world])
            for i, x in enumerate(SCAN_X):
                for j, y in enumerate(SCAN_Y):
                    turned = [x * math.cos(yaw) - y * math.sin(yaw), x * math.sin(yaw) + y * math.cos(yaw)]
                    at = np.array([base[:2] + turned])
                    below = rays(env.simulation.model, at)[0] - (base[2] - env.robot.base_height)
                    wrong.append(abs(scan[world, i, j] - np.clip(below, -SCAN_LIMIT, SCAN_LIMIT)))
        # Half a cell aside: a little on slopes, a step at edges.
        assert np.quantile(wrong, 0.9) < 0.015 and scan.std() > 0.1

    def test_a_mirrored_robot_sees_the_mirrored_scan(self) -> None:
        """A pyramid is its own mirror image in the plane y = 0."""
        types = ("stairs_down",)
        env = make_env(
            2, terrain=dataclasses.replace(FIGURES, types=types), critic_observations=("height_scan",)
        )
        env.simulation.qpos[:, :2] = torch.tensor([[1.03, 0.42], [1.03, -0.42]]).double()
        half = 0.5 * 0.7
        env.simulation.qpos[:, 3:7] = torch.tensor(
            [[math.cos(half), 0, 0, math.sin(half)], [math.cos(half), 0, 0, -math.sin(half)]]
        ).double()
        env._refresh()
        size = len(SCAN_X) * len(SCAN_Y)
        index, sign = (part[-size:] for part in env.mirror["critic_obs"])
        _, critic_obs = env._observations()
        scan, image = critic_obs[:, -size:], sign * critic_obs[:1, index]
        assert (
            (image - scan[1:]).abs() < 1e-5
        ).float().mean() > 0.95  # a point at an edge may fall either way
        assert ((scan[:1] - scan[1:]).abs() < 1e-5).float().mean() < 0.9

    def test_it_is_a_switch_for_the_policy(self) -> None:
        plain = HumanoidEnvConfig()
        env = make_env(2, actor_observations=(*plain.actor_observations, "height_scan"))
        expected = make_env(2).single_observation_space.shape[0] + len(SCAN_X) * len(SCAN_Y)
        assert env.single_observation_space.shape == (expected,)
        scan = env.observe()[:, -1]
        torch.testing.assert_close(scan, env.robot.base_height - env.base_pos_w[:, 2])  # a plane


RULE = TerrainConfig(types=("flat", "stairs_up"), levels=3, curriculum=True)


class TestLevels:
    def test_worlds_are_shared_evenly_and_levels_drawn_up_to_the_cap(self) -> None:
        config = TerrainConfig(types=("flat", "gaps", "rough"), levels=4)
        env = make_env(300, terrain=config)
        assert torch.bincount(env.terrain_type).tolist() == [100, 100, 100]
        for cap, levels in ((3.0, 4), (1.7, 2), (0.0, 1)):
            env.max_terrain_level.fill_(cap)
            env.reset()
            counts = torch.bincount(env.terrain_level, minlength=4)
            assert (counts[:levels] > 300 / levels / 2).all() and (counts[levels:] == 0).all()
        tile = (env.simulation.qpos[:, :2] - env.ground.centres[env.terrain_level, env.terrain_type]).abs()
        assert (tile <= SPAWN_NOISE + 1e-5).all()

    def test_up_and_down_by_the_rule(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against a loop over the worlds; some are carried away, some fall, some may stand."""
        env = make_env(24, terrain=RULE, max_episode_length=8, standing_fraction=0.3)
        sim, dt, moves = env.simulation, env.config.control_dt, {-1: 0, 0: 0, 1: 0}
        asked, followed, ends = np.zeros(24), np.zeros(24), []
        change = env.levels.change

        def watched(*arguments: torch.Tensor) -> None:
            ends.append(env.base_pos_w.clone().numpy())
            change(*arguments)

        monkeypatch.setattr(env.levels, "change", watched)
        rng = np.random.default_rng(0)
        for step in range(80):
            if step % 8 == 5:
                sim.qpos[rng.integers(0, 24, 4), 0] += 4.2
                sim.qpos[rng.integers(0, 24, 2), 3:7] = torch.tensor([0.0, 1, 0, 0]).double()
            if step % 8 == 6:  # a few follow what they are told
                sim.qvel[:12, :2] = 20.0 * env.command[:12, :2].double()
            command, length = env.command.clone().numpy(), env.episode_length.clone().numpy()
            level, start = env.terrain_level.clone().numpy(), env.spawn_xy.clone().numpy()
            ends.clear()
            _, _, terminated, truncated, _ = env.step(torch.zeros(24, 29))
            velocity = env.velocity.numpy()
            for i in range(24):
                speed = np.hypot(*command[i, :2])
                asked[i] += speed * dt
                followed[i] += velocity[i, :2] @ command[i, :2] / max(speed, 1e-6) * dt
                now = int(env.terrain_level[i])
                if not (terminated[i] or truncated[i]):
                    assert now == level[i]
                    continue
                due = asked[i] + terminated[i].item() * speed * dt * (8 - length[i] - 1)
                moved = np.hypot(*(ends[0][i, :2] - start[i]))
                move = 1 if moved > 4.0 else -int(followed[i] < 0.5 * due)
                moves[move] += 1
                if level[i] + move > 2:
                    assert now in (0, 1, 2)
                else:
                    assert now == max(level[i] + move, 0), (step, i)
                asked[i] = followed[i] = 0.0
        assert min(moves.values()) > 5

    def test_a_fall_leaves_the_rest_of_the_way_undone(self) -> None:
        """Two robots have followed so far: the one that falls goes down, the one whose time is over stays."""
        env = make_env(2, terrain=RULE, max_episode_length=40)
        env.terrain_level.fill_(1)
        env.set_command(torch.tensor([0.5, 0.0, 0.0]))
        forward = torch.tensor([[0.5, 0.0, 0.0]]).expand(2, 3)
        for _ in range(4):
            env.simulation.qvel[:, :3] = rotate(env.base_quat_w, forward).double()
            env.step(torch.zeros(2, 29))
        assert (env.levels.followed > 0.8 * env.levels.asked).all()
        env.simulation.qpos[0, 3:7] = torch.tensor([0.0, 1, 0, 0]).double()
        env.episode_length[1] = 39
        _, _, terminated, truncated, _ = env.step(torch.zeros(2, 29))
        assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]
        assert env.terrain_level.tolist() == [0, 1]

    def test_metrics_tell_the_level_of_each_type(self) -> None:
        env = make_env(7, terrain=RULE)
        env.terrain_level.copy_(torch.tensor([0, 1, 2, 0, 1, 2, 1]))
        *_, info = env.step(torch.zeros(7, 29))
        mean = dict(zip(env.metric_names, info["metrics"].mean(1).tolist(), strict=True))
        assert mean["task/terrain_level"] == pytest.approx(1.0)
        assert mean["task/level_flat"] == pytest.approx((0 + 2 + 1 + 1) / 4)
        assert mean["task/level_stairs_up"] == pytest.approx((1 + 0 + 2) / 3)

    def test_a_masked_reset_touches_only_its_rows(self) -> None:
        for curriculum in (True, False):
            env = make_env(8, terrain=dataclasses.replace(RULE, curriculum=curriculum))
            for _ in range(5):
                env.step(torch.zeros(8, 29))
            heights = {"base_height": env.base_height, "foot_height": env.foot_height}
            tensors = {k: v for k, v in (env.levels.tensors() | heights).items() if v.dim()}
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            mask = torch.arange(8) % 3 == 0
            env.reset(options={"reset_mask": mask})
            for name, values in before.items():
                assert torch.equal(tensors[name][~mask], values[~mask]), name
            assert (env.spawn_xy[mask] != before["spawn_xy"][mask]).all()
            assert (env.levels.asked[mask] == 0).all() and (before["asked"] > 0).any()


@pytest.mark.parametrize("curriculum", [True, False])
def test_the_step_never_asks_the_host(monkeypatch: pytest.MonkeyPatch, curriculum: bool) -> None:
    config = walk_rough()
    config = dataclasses.replace(
        config,
        num_envs=9,
        engine="warp",
        max_episode_length=2,
        terrain=dataclasses.replace(FIGURES, curriculum=curriculum),
    )
    env = HumanoidBaseEnv(config)
    env.reset(seed=0)
    actions = torch.zeros(9, 29)
    refuse_the_host(monkeypatch)
    with NoHost():
        for _ in range(3):
            env._step(actions)


def test_the_seed_makes_the_terrain(robot: Robot) -> None:
    config = HumanoidEnvConfig(terrain=FIGURES)
    one, two = make_model(robot, config), make_model(robot, config)
    other = make_model(robot, HumanoidEnvConfig(terrain=dataclasses.replace(FIGURES, seed=1)))
    for name in ("geom_pos", "geom_size", "hfield_data"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name)), name
    names = [one.geom(i).name for i in range(one.ngeom)[ground_geoms(one)]]
    assert names[0] == "ground" and all(name.startswith("terrain") for name in names[1:])
    assert not any(one.geom(i).name.startswith("terrain") for i in range(len(names), one.ngeom))


def test_difficulty_goes_from_the_first_figure_to_the_second() -> None:
    config = TerrainConfig(types=("stairs_down",), levels=3, stair_riser=(0.05, 0.15))
    height = [make_terrain(config).height[round(160 * (i + 0.5)) + 80, 160].item() for i in range(3)]
    assert height == pytest.approx([0.5, 1.0, 1.5])
    half = make_terrain(dataclasses.replace(config, difficulty=(0.5, 0.5), levels=1))
    assert half.height.max() == pytest.approx(1.0)


def test_every_type_is_in_the_task_and_the_config_comes_back_from_a_file() -> None:
    config = walk_rough()
    ours = {name for name, function in TILES.items() if function.__module__ == "kouros.envs.terrain"}
    assert set(config.terrain.types) == ours
    assert from_plain(HumanoidEnvConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_policy_of_rough_ground_is_tested_on_a_plane_or_on_any_terrain() -> None:
    def still(obs: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(obs), 29)

    config = walk_rough()
    plane = evaluate_walk(still, config, episodes=4, seconds=0.4)
    same = evaluate_walk(still, HumanoidEnvConfig(swing_height=0.16), episodes=4, seconds=0.4)
    assert plane == same or (math.isnan(plane.clearance_left) and plane.tilt == same.tilt)
    stairs = dataclasses.replace(FIGURES, types=("stairs_up",) * 2, levels=2)
    assert evaluate_walk(still, config, episodes=4, seconds=0.4, terrain=stairs).tilt > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TerrainConfig(types=("stairs",)),
            "terrain.types='stairs': choose from flat.*did you mean 's",
        ),
        (lambda: TerrainConfig(types=("flat",), levels=0), "levels=0: must be greater than 0"),
        (lambda: TerrainConfig(types=("flat",), levels=40), "levels x 1 types of 8 m.* a side may be 200 m"),
        (
            lambda: TerrainConfig(types=("stepping_stones",) * 9, stone_size=(0.2, 0.2)),
            r"make \d+ shapes, and 3000 is the limit",
        ),
        (lambda: TerrainConfig(curriculum=True), "curriculum=True: there are no types of tile"),
        (lambda: TerrainConfig(types="flat"), "types='flat': must be a tuple of names"),
        (lambda: TerrainConfig(tile_size=3.0), "tile_size=3.0: must be at least 2 m more than the platform"),
        (lambda: TerrainConfig(tile_size=8.05), "tile_size=8.05: must be a multiple of 0.1 m"),
        (lambda: TerrainConfig(difficulty=(0.0, 1.5)), "difficulty=.*: must be"),
        (lambda: TerrainConfig(slope=(0.0, 25.0)), "slope=.*: must be at most 60 degrees, in rad"),
        (lambda: TerrainConfig(stair_riser=(math.nan, 0.1)), "stair_riser=.*: must be finite"),
        (lambda: TerrainConfig(gap_width=(-0.1, 0.1)), "gap_width=.*: must not be negative"),
        (lambda: TerrainConfig(stair_tread=0.0), "stair_tread=0.0: must be at least 0.1 m"),
    ],
)
def test_bad_input(make: Callable[[], TerrainConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HumanoidBaseEnv(HumanoidEnvConfig(num_envs=1, terrain=make()))
