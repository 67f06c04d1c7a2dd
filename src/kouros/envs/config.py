"""The task's figures. Nothing here imports torch or MuJoCo, so that ``kouros --help`` is quick."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_type_hints

from kouros.checks import check_choice, require, require_numbers

WALK_REWARDS = {
    "track_linear_velocity": 3.0,
    "track_yaw_rate": 2.0,
    "gait_contact": 1.5,
    "gait_height": 2.0,
    "alive": 0.5,
    "tilt": -4.0,
    "base_height": -20.0,
    "roll_pitch_rate": -0.05,
    "vertical_velocity": -0.5,
    "action_rate": -0.01,
    "action_acceleration": -0.002,
    "pose": -0.3,
    "standing_pose": -1.5,
    "foot_slip": -0.1,
    "joint_velocity": -1e-4,
}

ROUGH_TYPES = (
    "flat",
    "rough",
    "slope_up",
    "slope_down",
    "stairs_up",
    "stairs_down",
    "stepping_stones",
    "obstacles",
    "gaps",
)

WALK_POSE_WEIGHTS = {
    "hip_roll": 1.0,
    "hip_yaw": 1.0,
    "hip_pitch": 0.1,
    "knee": 0.1,
    "ankle": 0.2,
    "waist": 2.0,
    "shoulder": 2.0,
    "elbow": 1.5,
    "wrist": 2.0,
}


@dataclasses.dataclass
class TerrainConfig:
    """The ground: a field of square tiles, a row for each level of difficulty and a column for each type.

    A pair is a figure at difficulty 0 and at difficulty 1. The default is a flat plane."""

    types: tuple[str, ...] = ()
    """Types of tile, a column each, from flat, rough, slope_up, slope_down, stairs_up, stairs_down,
    stepping_stones, obstacles and gaps; a type may come more than once. None: a flat plane."""
    levels: int = 6
    """Number of levels."""
    difficulty: tuple[float, float] = (0.0, 1.0)
    """Difficulty of the first and of the last level."""
    curriculum: bool = False
    """Each world begins at the first level, moves up when its robot gets half a tile away from where it
    began, and down when it does less than half of the way that it was commanded. Off: drawn at each reset."""
    tile_size: float = 8.0
    """Side of a tile, m, a multiple of 0.1 m."""
    platform: float = 2.0
    """Side of the square in the middle of a tile that is flat (but for rough), m."""
    border: float = 4.0
    """Width of the flat border around the field, m; a robot that leaves it starts anew."""
    seed: int = 0
    """Seed of what is random in the tiles."""
    roughness: tuple[float, float] = (0.01, 0.06)
    """Heights of rough lie between minus and plus this, m."""
    slope: tuple[float, float] = (0.0, math.radians(25.0))
    """Slope of slope_up and slope_down, rad."""
    stair_riser: tuple[float, float] = (0.02, 0.2)
    """Height of a step of stairs_up and stairs_down, m."""
    stair_tread: float = 0.3
    """Depth of a step, m."""
    stone_size: tuple[float, float] = (0.9, 0.45)
    """Side of a stepping stone, m, rounded so that a whole number of them fills the tile."""
    stone_gap: tuple[float, float] = (0.05, 0.2)
    """Gap between stepping stones, m."""
    obstacle_height: tuple[float, float] = (0.03, 0.2)
    """Height of the tallest obstacles, m."""
    gap_width: tuple[float, float] = (0.05, 0.4)
    """Width of a gap, m."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self, "types", isinstance(self.types, tuple | list), "must be a tuple of names")
        require(self, "levels", self.levels > 0, "must be greater than 0")
        require(self, "seed", self.seed >= 0, "must not be negative")
        low, high = self.difficulty
        require(self, "difficulty", 0 <= low <= high <= 1, "must be (first, last), 0 to 1")
        require(self, "border", self.border >= 1, "must be at least 1 m")
        require(self, "platform", self.platform >= 1, "must be at least 1 m: a robot begins there")
        too_small = "must be at least 2 m more than the platform"
        require(self, "tile_size", self.tile_size >= self.platform + 2, too_small)
        for name in ("tile_size", "border"):
            tenths = 10 * getattr(self, name)
            require(self, name, abs(tenths - round(tenths)) < 1e-6, "must be a multiple of 0.1 m")
        for name in ("roughness", "slope", "stair_riser", "stone_gap", "obstacle_height", "gap_width"):
            require(self, name, min(getattr(self, name)) >= 0, "must not be negative")
        require(self, "slope", max(self.slope) <= math.radians(60), "must be at most 60 degrees, in rad")
        for name in ("stair_tread", "stone_size"):
            least = getattr(self, name) if name == "stair_tread" else min(self.stone_size)
            require(self, name, least >= 0.1, "must be at least 0.1 m")


@dataclasses.dataclass
class HumanoidEnvConfig:
    """A humanoid that follows velocity commands. The defaults are the task ``walk``."""

    robot: str = "g1"
    """Robot, by name."""
    num_envs: int = 256
    """Number of parallel worlds."""
    num_threads: int = 0
    """CPU threads of the physics; 0: as many as there are cores."""
    engine: Literal["auto", "c", "warp"] = "auto"
    """Physics: MuJoCo C, or MuJoCo Warp; auto: C on the CPU, Warp on a GPU."""
    graph: bool = True
    """On a GPU, record the step once as a CUDA graph and replay it; off: the same lines one by one,
    several times slower, for debugging."""

    timestep: float = 0.005
    """Physics step, s."""
    frame_skip: int = 4
    """Physics steps per control step: 4 x 5 ms is 50 Hz control."""
    solver_iterations: int = 10
    """Largest number of constraint solver iterations."""
    line_search_iterations: int = 20
    """Largest number of line search iterations within one solver iteration."""
    collisions: Literal["feet", "full"] = "feet"
    """feet: the soles against the ground, four points each. full: every shape, and the robot itself."""
    terrain: TerrainConfig = dataclasses.field(default_factory=TerrainConfig)
    """The ground, see TerrainConfig; a flat plane by default."""

    control_mode: Literal["position", "velocity", "effort"] = "position"
    """What an action asks of the joint servos; see action_scale."""
    action_scale: float = 1.0
    """Factor on one unit of action. That unit is, by control mode,
    position: the robot's own scale (rad) about the default pose; velocity: 1 rad/s;
    effort: a quarter of the effort limit."""
    action_limit: float = 20.0
    """Actions are clipped to +- this before they are used."""

    max_episode_length: int = 1000
    """Control steps until an episode is truncated (a time-out, not a fall)."""
    fall_tilt: float = math.radians(60.0)
    """Tilt of the base beyond which the episode ends, rad."""
    fall_height: float = 0.45
    """Height of the base below which the episode ends, m."""

    command_vx: tuple[float, float] = (-0.5, 1.0)
    """Forward velocity commands, m/s, base frame."""
    command_vy: tuple[float, float] = (-0.3, 0.3)
    """Sideways velocity commands, m/s, base frame, left is positive."""
    command_yaw: tuple[float, float] = (-0.7, 0.7)
    """Yaw rate commands, rad/s, counter-clockwise is positive."""
    standing_fraction: float = 0.2
    """Share of commands that are exactly zero: stand still."""
    standing_command: float = 0.05
    """Commands no larger than this (their norm, m/s and rad/s together) mean:
    come to a halt within one gait cycle, and stand still."""
    resampling_interval: float = 5.0
    """Time between new commands, s."""

    gait_period: float = 0.7
    """Duration of a full gait cycle (two steps), s."""
    swing_fraction: float = 0.4
    """Share of the cycle a foot is in the air; below 0.5 both feet touch in between."""
    swing_height: float = 0.09
    """Height of the foot in mid swing, m."""

    initial_joint_noise: float = 0.1
    """Largest deviation from the default pose at reset, rad."""
    initial_velocity: float = 0.5
    """Largest base velocity at reset, m/s in x and y and rad/s in yaw."""

    push_velocity: float = 0.0
    """Speed that a push adds to the base at once, m/s, horizontally in a random direction."""
    push_interval: tuple[float, float] = (1.0, 3.0)
    """Shortest and longest time between pushes, s."""
    ground_friction: tuple[float, float] = (1.0, 1.0)
    """Friction coefficients of the ground, one drawn per world and episode."""

    harness: float = 1.0
    """Strength, 0 to 1, that each world's training harness begins with.
    Springs keep the base upright and up, and weaken by themselves as the robot learns;
    the walking test has none."""
    harness_fall_time: float = 0.7
    """Mean time between falls, s, beyond which a harness weakens."""

    actor_observations: tuple[str, ...] = (
        "base_ang_vel",
        "projected_gravity",
        "command",
        "gait_phase",
        "joint_pos",
        "joint_vel",
        "last_action",
    )
    """What the policy sees: only what a real robot measures. SI units, concatenated in this order."""
    critic_observations: tuple[str, ...] = (
        "base_lin_vel",
        "mean_velocity",
        "base_height",
        "foot_height",
        "foot_contact",
        "foot_force",
        "harness",
    )
    """What the critic sees besides (simulation only)."""
    rewards: dict[str, float] = dataclasses.field(default_factory=lambda: dict(WALK_REWARDS))
    """Weight of each reward term by name, per second."""
    tracking_sigma: float = 0.5
    """Velocity error at which a tracking term has fallen to 1/e, m/s and rad/s."""
    tracking_time: float = 0.25
    """Time constant of the velocity average that the tracking terms look at, s: a stride sways."""
    target_height: float = 0.75
    """Base height below which the base_height term starts to grow, m."""
    pose_weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict(WALK_POSE_WEIGHTS))
    """Weight of each joint in the pose term, by part of the joint's name (0 if none fits)."""

    @property
    def control_dt(self) -> float:
        """Time between actions, s."""
        return self.timestep * self.frame_skip

    def __post_init__(self) -> None:
        require_numbers(self)
        positive = (
            "num_envs timestep frame_skip solver_iterations line_search_iterations action_scale "
            "action_limit max_episode_length resampling_interval gait_period tracking_sigma tracking_time "
            "harness_fall_time"
        )
        for name in positive.split():
            require(self, name, getattr(self, name) > 0, "must be greater than 0")
        not_negative = (
            "num_threads standing_command swing_height initial_joint_noise initial_velocity fall_height "
            "target_height push_velocity"
        )
        for name in not_negative.split():
            require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in ("command_vx", "command_vy", "command_yaw", "push_interval", "ground_friction"):
            low, high = getattr(self, name)
            require(self, name, low <= high, "must be (lowest, highest)")
        for name in ("push_interval", "ground_friction"):
            require(self, name, getattr(self, name)[0] > 0, "must be greater than 0")
        require(self, "harness", 0 <= self.harness <= 1, "must lie in [0, 1]")
        require(self, "standing_fraction", 0 <= self.standing_fraction <= 1, "must lie in [0, 1]")
        require(self, "swing_fraction", 0 < self.swing_fraction < 1, "must lie between 0 and 1")
        require(self, "timestep", self.timestep <= 0.02, "must be at most 0.02 s: longer steps diverge")
        require(self, "initial_joint_noise", self.initial_joint_noise <= math.pi, "must be at most pi rad")
        for name in ("control_mode", "collisions", "engine"):
            check_choice(name, getattr(self, name), get_args(get_type_hints(type(self))[name]))
        for name in ("actor_observations", "critic_observations"):
            terms = getattr(self, name)
            require(self, name, isinstance(terms, tuple | list), "must be a tuple of names")
        require(self, "actor_observations", len(self.actor_observations) > 0, "must not be empty")
        require(self, "fall_tilt", 0 < self.fall_tilt <= math.pi, "must lie in (0, pi] rad")


# What leaves a robot alone: to be seen, recorded and compared.
CALM: dict[str, Any] = {"push_velocity": 0.0, "ground_friction": (1.0, 1.0)}


def walk_rough() -> HumanoidEnvConfig:
    """The task ``walk-rough``: the same robot and commands on nine types of ground, with a level per world.

    The critic sees the ground around the robot, the policy does not: it feels its way.
    """
    config = HumanoidEnvConfig(
        terrain=TerrainConfig(types=ROUGH_TYPES, curriculum=True),
        swing_height=0.16,
    )
    config.critic_observations += ("height_scan",)
    return config


TASKS: dict[str, Callable[[], HumanoidEnvConfig]] = {"walk": HumanoidEnvConfig, "walk-rough": walk_rough}
