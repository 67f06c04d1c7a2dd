"""The walking test: does a policy walk, measured without any help from the training terms."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import mujoco
import torch

from kouros.envs.config import NOISE, TASKS, HumanoidEnvConfig, RandomizationConfig, TerrainConfig
from kouros.envs.wrappers import Env, make_policy_env
from kouros.physics.rotations import quat_from_yaw, rotate, rotate_inverse, yaw_of

# A foot is in the air after this long without contact: shorter gaps are chatter, not steps.
MIN_SWING = 0.06
MOVING_SPEED = 0.3
# Share of commands that are zero, and the time a robot has to come to a halt.
STANDING_SHARE = 0.1
HALT_TIME = 1.0
# Half a tile, m: what there is to climb lies within.
CROSSED = 4.0
# What the test takes from the task, so that no policy sets its own exam.
FIXED = (
    "command_vx",
    "command_vy",
    "command_yaw",
    "standing_command",
    "heading_fraction",
    "heading_stiffness",
    "resampling_interval",
    "pose_range",
    "crouch",
    "pose_speed",
    "fall_tilt",
    "fall_height",
    "curriculum",
)


# Conditions of `kouros eval --suite robust`, one at a time and all together: in part beyond what the preset
# sim2real trains with.
ROBUST: dict[str, dict[str, Any]] = {
    "nominal": {},
    "heavier": {"mass": (1.25, 1.25)},
    "weaker motors": {"motor_strength": (0.7, 0.7)},
    "slippery": {"friction": (0.25, 0.25)},
    "delayed": {"action_delay": (0.03, 0.03), "sensor_delay": (0.01, 0.01)},
    "pushed": {"push_velocity": (1.0, 1.0)},
    "tilted gravity": {"gravity": (-0.8, 0.8)},
    "encoder bias": {"encoder_bias": (-0.06, 0.06)},
    "noisy sensors": {"observation_noise": {name: 1.5 * std for name, std in NOISE.items()}},
    "all together": {
        "mass": (1.1, 1.1),
        "motor_strength": (0.85, 0.85),
        "friction": (0.4, 0.4),
        "action_delay": (0.015, 0.015),
        "sensor_delay": (0.005, 0.005),
        "push_velocity": (0.5, 0.5),
        "gravity": (-0.4, 0.4),
        "encoder_bias": (-0.03, 0.03),
        "observation_noise": NOISE,
    },
}


# Ground of `kouros eval --suite rough`, each on a field of its own.
ROUGH: dict[str, dict[str, Any]] = {
    "flat": {"types": ("flat",)},
    "rough, 5 cm": {"types": ("rough",), "roughness": (0.05, 0.05)},
    "up a slope of 15 degrees": {"types": ("slope_up",), "slope": (math.radians(15),) * 2},
    "down a slope of 15 degrees": {"types": ("slope_down",), "slope": (math.radians(15),) * 2},
    "up stairs of 10 cm": {"types": ("stairs_up",), "stair_riser": (0.1, 0.1)},
    "down stairs of 10 cm": {"types": ("stairs_down",), "stair_riser": (0.1, 0.1)},
    "up stairs of 15 cm": {"types": ("stairs_up",), "stair_riser": (0.15, 0.15)},
    "obstacles of 10 cm": {"types": ("obstacles",), "obstacle_height": (0.1, 0.1)},
    "stepping stones, 10 cm apart": {
        "types": ("stepping_stones",),
        "stone_size": (0.6, 0.6),
        "stone_gap": (0.1, 0.1),
    },
    "gaps of 15 cm": {"types": ("gaps",), "gap_width": (0.15, 0.15)},
}
# Straight ahead, in one direction or another, for the whole episode.
STRAIGHT: dict[str, Any] = {
    "command_vx": (0.5, 0.8),
    "command_vy": (0.0, 0.0),
    "heading_fraction": 1.0,
    "resampling_interval": 1e4,
    "standing_fraction": 0.0,
}


def robust_randomization(condition: str, config: HumanoidEnvConfig) -> RandomizationConfig:
    """One of :data:`ROBUST`, for the environment of a policy: noise on what it observes."""
    terms = copy.deepcopy(ROBUST[condition])
    noise = terms.get("observation_noise", {})
    for name in noise.keys() - set(config.actor_observations):
        del noise[name]
    return RandomizationConfig(**terms)


def rough_field(condition: str) -> TerrainConfig:
    """Nine equal tiles of one of :data:`ROUGH`."""
    figures = ROUGH[condition]
    return TerrainConfig(levels=3, **{**figures, "types": 3 * figures["types"]})


@dataclasses.dataclass(frozen=True)
class WalkResult:
    """What :func:`evaluate_walk` measured. Means are over worlds still on their feet."""

    episodes: int
    seconds: float
    survival: float
    survival_low: float
    survival_high: float
    velocity_error: float
    yaw_rate_error: float
    tilt: float
    clearance_left: float
    clearance_right: float
    steps_left: float
    steps_right: float
    standing_steps: float
    flight_fraction: float
    cost_of_transport: float
    action_rate: float
    pose_error: float
    """Root mean square over joints of the pose to hold against the true one, rad."""
    crossed: float
    """Share of episodes whose robot got 4 m away before it fell, if it did: over what a tile holds."""
    walks: bool = True
    """Whether the policy obeys velocity commands; one that does not is told to stand."""

    # name: (what it is, unit, smallest, largest value that counts as walking)
    BAR = {  # noqa: RUF012 (a table, not a field)
        "survival": ("episodes without a fall", "share", 0.95, 1.0),
        "velocity_error": ("linear velocity error", "m/s", 0.0, 0.2),
        "yaw_rate_error": ("yaw rate error", "rad/s", 0.0, 0.25),
        "tilt": ("tilt of the torso", "deg", 0.0, 10.0),
        "clearance_left": ("left sole's clearance in swing", "m", 0.03, math.inf),
        "clearance_right": ("right sole's clearance in swing", "m", 0.03, math.inf),
        "steps_left": ("left steps, command > 0.3 m/s", "1/s", 0.8, 2.5),
        "steps_right": ("right steps, command > 0.3 m/s", "1/s", 0.8, 2.5),
        "standing_steps": ("steps of a foot, left to stand for 1 s", "1/s", 0.0, 0.2),
        "flight_fraction": ("both feet in the air", "share", 0.0, 0.1),
        "cost_of_transport": ("cost of transport", "J/(N m)", 0.0, math.inf),
        "action_rate": ("change of a joint target per step", "rad", 0.0, math.inf),
    }

    # Of a policy that holds a pose, instead of those of a gait.
    STANDS = ("survival", "velocity_error", "yaw_rate_error", "tilt", "standing_steps")

    @property
    def bar(self) -> dict[str, tuple[str, str, float, float]]:
        """The figures that count, as in BAR."""
        if self.walks:
            return self.BAR
        pose = ("joints off the pose to hold, root mean square", "rad", 0.0, 0.1)
        return {**{name: self.BAR[name] for name in self.STANDS}, "pose_error": pose}

    def failures(self) -> list[str]:
        """Names of the figures that miss the bar (a figure that could not be measured does)."""
        return [
            name for name, (_, _, low, high) in self.bar.items() if not low <= getattr(self, name) <= high
        ]

    def table(self) -> list[tuple[str, str, str, str]]:
        """For each figure of the bar: what it is, what was measured, what counts, and ``ok`` or ``missed``;
        where nothing counts, two empty texts."""
        rows = []
        for name, (what, unit, low, high) in self.bar.items():
            text = f"{getattr(self, name):.3f} {unit}"
            if name == "survival":
                text += f" ({self.survival_low:.3f} to {self.survival_high:.3f})"
            bar = "" if math.isinf(high) and low == 0 else f"{low:g} to {high:g}"
            if math.isinf(high) and low:
                bar = f"at least {low:g}"
            mark = "missed" if name in self.failures() else ("ok" if bar else "")
            rows.append((what, text, bar, mark))
        return rows


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927), 95 % by default."""
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


@torch.no_grad()
def evaluate_walk(
    policy: Callable[[torch.Tensor], torch.Tensor],
    config: HumanoidEnvConfig,
    episodes: int = 256,
    seconds: float = 20.0,
    seed: int = 12345,
    collisions: Literal["feet", "full"] = "feet",
    randomization: RandomizationConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    statistics: dict[str, list[float]] | None = None,
    terrain: TerrainConfig | None = None,
    straight: bool = False,
) -> WalkResult:
    """Run seeded episodes side by side and measure the gait.

    Commands, first states and what counts as a fall are those of the task ``walk``, whatever
    ``config`` trained with; a command lasts 5 s and a tenth of them are zero. A policy that observes no
    command holds the poses of the task ``stand``. An episode ends for good at its first fall.

    Args:
      policy: observations ``(n, obs_dim)`` to actions ``(n, num_joints)``.
      config: the policy's environment: robot, physics, observations, gait.
      episodes: number of episodes.
      seconds: length of an episode.
      seed: of initial states and commands.
      collisions: what touches what, see the config.
      randomization: what differs from episode to episode, nothing if None; what follows a push within
        1 s is not standing.
      progress: called with (steps done, steps in all).
      statistics: ``contract["statistics"]`` of a policy that sees normalized observations.
      terrain: the ground; a flat plane if None, whatever ``config`` trained on. A robot that leaves the
        field goes on from another first state.
      straight: command 0.5 to 0.8 m/s straight ahead in one direction, throughout.
    """
    walks = "command" in config.actor_observations
    task = TASKS["walk" if walks else "stand"]()
    steps = math.ceil(seconds / config.control_dt)
    config = dataclasses.replace(
        config,
        num_envs=episodes,
        max_episode_length=steps + 1,
        harness=0.0,
        standing_fraction=STANDING_SHARE if walks else 1.0,
        collisions=collisions,
        randomization=randomization or RandomizationConfig(),
        terrain=terrain or TerrainConfig(),
        **{name: getattr(task, name) for name in FIXED},
    )
    if straight:
        config = dataclasses.replace(config, **STRAIGHT)
    env = make_policy_env(config, statistics)
    sim, robot = env.simulation, env.robot
    dt = config.control_dt
    force = sim.field("actuator_force")[:, env.articulation.joint_ctrl]
    soles = _Soles(env)

    obs, _ = env.reset(seed=seed)
    alive = torch.ones(episodes, dtype=torch.bool)
    steps_taken = _Steps(episodes, dt)
    since_push = torch.full((episodes,), math.inf)
    start, farthest = env.base_pos_w[:, :2].clone(), torch.zeros(episodes)
    total: dict[str, torch.Tensor] = {}

    def add(name: str, values: torch.Tensor, where: torch.Tensor) -> None:
        """Sum values over the worlds in ``where``, and count those."""
        sums = torch.stack((torch.where(where, values, 0.0).sum(0), where.float().sum(0)))
        total[name] = total.get(name, torch.zeros_like(sums)) + sums

    def mean(name: str) -> torch.Tensor:
        sums = total[name]
        return torch.where(sums[1] > 0, sums[0] / sums[1], torch.nan)

    for step in range(steps):
        command, pose = env.command.clone(), env.pose_command.clone()
        since_command = (env.episode_length % env.resampling_steps + 1) * dt
        before, until_push = env.action.clone(), env.until_push.clone()
        obs, _, terminated, _, _ = env.step(policy(obs))
        # The returned worlds have been reset where they fell: only the others are measured.
        alive &= ~terminated
        away = (env.base_pos_w[:, :2] - start).norm(dim=-1)
        farthest = torch.where(alive, torch.maximum(farthest, away), farthest)

        heading = quat_from_yaw(yaw_of(env.base_quat_w))
        velocity = rotate_inverse(heading, rotate(env.base_quat_w, env.base_lin_vel_b))
        add("velocity_error", (velocity[:, :2] - command[:, :2]).norm(dim=-1), alive)
        add("yaw_rate_error", (env.base_ang_vel_b[:, 2] - command[:, 2]).abs(), alive)
        add("tilt", torch.rad2deg(torch.acos(env.torso_up_w[:, 2].clamp(-1, 1))), alive)
        add("pose_error", (env.joint_pos - pose).square().mean(-1).sqrt(), alive)
        add("action_rate", (env.action - before).abs() @ env.action_scale / robot.num_joints, alive)

        contact = env.foot_contact.bool()
        walking = alive & (command[:, :2].norm(dim=-1) > MOVING_SPEED)
        since_push = torch.where(env.until_push > until_push, 0.0, since_push + dt)
        stopped = (command == 0).all(-1) & (since_command > HALT_TIME) & (since_push > HALT_TIME)
        standing = alive & stopped
        landed, peak = steps_taken.update(contact, soles.clearance())
        add("clearance", peak, landed & walking.unsqueeze(-1))
        add("walking_steps", landed.float() / dt, walking.unsqueeze(-1).expand(-1, 2))
        add("standing_steps", landed.float() / dt, standing.unsqueeze(-1).expand(-1, 2))
        add("flight_fraction", (~contact).all(-1).float(), walking)
        add("power", (force * env.joint_vel).abs().sum(-1), walking)
        add("speed", velocity[:, :2].norm(dim=-1), walking)
        if progress:
            progress(step + 1, steps)

    survivors = int(alive.sum())
    low, high = wilson_interval(survivors, episodes)
    clearance, rate = mean("clearance"), mean("walking_steps")
    return WalkResult(
        episodes=episodes,
        seconds=seconds,
        survival=survivors / episodes,
        survival_low=low,
        survival_high=high,
        velocity_error=float(mean("velocity_error")),
        yaw_rate_error=float(mean("yaw_rate_error")),
        tilt=float(mean("tilt")),
        clearance_left=float(clearance[0]),
        clearance_right=float(clearance[1]),
        steps_left=float(rate[0]),
        steps_right=float(rate[1]),
        standing_steps=float(mean("standing_steps").mean()),
        flight_fraction=float(mean("flight_fraction")),
        cost_of_transport=float(mean("power") / (env.weight * mean("speed"))),
        action_rate=float(mean("action_rate")),
        pose_error=float(mean("pose_error")),
        walks=walks,
        crossed=float((farthest >= CROSSED).float().mean()),
    )


class _Steps:
    """Tells a step from a foot that chatters or stands.

    Args:
      n: number of worlds.
      dt: time between updates, s.
    """

    def __init__(self, n: int, dt: float) -> None:
        self.dt = dt
        self.air_time = torch.zeros(n, 2)
        self.peak = torch.zeros(n, 2)

    def update(self, contact: torch.Tensor, clearance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in contacts (bool) and clearances (m) of both feet, ``(n, 2)`` each.

        Returns:
          Whether a foot has landed from a swing of ``MIN_SWING`` or longer, and the highest clearance
          in it, m.
        """
        # Half a control period is what a clock in whole periods can be wrong by.
        landed = contact & (self.air_time > MIN_SWING - 0.5 * self.dt)
        peak = self.peak
        self.air_time = torch.where(contact, 0.0, self.air_time + self.dt)
        self.peak = torch.where(contact, 0.0, torch.maximum(peak, clearance))
        return landed, peak


class _Soles:
    """The lowest point of each foot: the ends of the capsules of its sole."""

    def __init__(self, env: Env) -> None:
        model, sim = env.simulation.model, env.simulation
        self._env = env
        self._feet = []
        for body in env.robot.foot_bodies:
            geoms = [
                g
                for g in range(model.ngeom)
                if model.geom_bodyid[g] == model.body(body).id
                and model.geom_conaffinity[g] & 1
                and model.geom_type[g] == mujoco.mjtGeom.mjGEOM_CAPSULE
            ]
            size = torch.as_tensor(model.geom_size[geoms])
            self._feet.append((geoms, size[:, 0], size[:, 1]))
        self._position = sim.field("geom_xpos")
        self._rotation = sim.field("geom_xmat")

    def clearance(self) -> torch.Tensor:
        """Height of each foot's lowest point above the ground, m, ``(num_worlds, 2)``."""
        lowest = []
        for geoms, radius, half_length in self._feet:
            # A capsule's axis is the z axis of its frame, the third column of its rotation.
            along = self._rotation[:, geoms][..., 2::3] * half_length.unsqueeze(-1)
            ends = torch.stack((self._position[:, geoms] + along, self._position[:, geoms] - along))
            above = ends[..., 2] - radius - self._env.support_at(ends[..., :2])
            lowest.append(above.amin(-1).amin(0))
        return torch.stack(lowest, dim=-1).float()
