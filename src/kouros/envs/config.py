"""The task's figures. Nothing here imports torch or MuJoCo, so that ``kouros --help`` is quick."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

from kouros.checks import check_choice, require, require_numbers, require_range

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


# What a stage of the curriculum sets.
CURRICULUM_FIELDS = (
    "terrain_difficulty",
    "command_speed",
    "push_frequency",
    "mass_variance",
    "friction_variance",
)


@dataclasses.dataclass
class CurriculumConfig:
    """Stages that the training goes through. Every table has one entry in [0, 1] for each stage."""

    enabled: bool = False
    """Train by stages; off: everything at its full strength from the first step on."""
    names: tuple[str, ...] = ("standing", "slow walking", "walking", "rough walking", "robust walking")
    """Names of the stages, for the log."""
    terrain_difficulty: tuple[float, ...] = (0.0, 0.0, 0.0, 0.5, 1.0)
    """Most difficult terrain: 0 is the easiest there is, 1 the hardest."""
    command_speed: tuple[float, ...] = (0.0, 0.4, 0.8, 0.9, 1.0)
    """Factor on the bounds of the velocity commands."""
    push_frequency: tuple[float, ...] = (0.0, 0.0, 0.0, 0.5, 1.0)
    """Factor on how often pushes come; 0: never."""
    mass_variance: tuple[float, ...] = (0.0, 0.0, 0.25, 0.5, 1.0)
    """Share of the configured range of masses about the nominal ones that is drawn from."""
    friction_variance: tuple[float, ...] = (0.0, 0.0, 0.25, 0.5, 1.0)
    """Share of the configured range of friction about the nominal one that is drawn from."""
    advance_at: float = 0.8
    """Share of successful episodes from which on the next stage begins."""
    retreat_below: float = 0.2
    """Share of successful episodes below which the stage before comes back."""
    min_episodes: int = 100
    """Episodes judged together, at least; every world contributes the same number, one or more."""
    success_error: float = 0.3
    """Mean velocity error, m/s, below which an episode without a fall is a success."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self, "names", len(self.names) >= 2, "must name at least two stages")
        for name in CURRICULUM_FIELDS:
            values = getattr(self, name)
            rule = f"must have one entry for each of the {len(self.names)} stages: {', '.join(self.names)}"
            require(self, name, len(values) == len(self.names), rule)
            require(self, name, all(0 <= x <= 1 for x in values), "must lie in [0, 1]")
        require(self, "advance_at", 0 < self.advance_at <= 1, "must lie in (0, 1]")
        rule = f"must lie in [0, advance_at={self.advance_at:g})"
        require(self, "retreat_below", 0 <= self.retreat_below < self.advance_at, rule)
        for name in ("min_episodes", "success_error"):
            require(self, name, getattr(self, name) > 0, "must be greater than 0")


# What may follow the name of a wrapper and a colon.
WRAPPERS = {"kinematic": ("", "velocity", "only-velocity"), "history": None, "normalize": ("",)}


def parse_wrapper(entry: str) -> tuple[str, str]:
    """Name and argument of an entry of ``wrappers``: ``history:5`` is ``("history", "5")``.

    Raises:
      ValueError: no such wrapper, or no such argument.
    """
    name, _, argument = str(entry).partition(":")
    check_choice("wrappers", name, WRAPPERS)
    arguments = WRAPPERS[name]
    if arguments is None:
        if not (argument.isascii() and argument.isdigit() and int(argument) > 0):
            raise ValueError(f"wrappers={entry!r}: say how many observations, at least 1: 'history:5'")
    elif argument not in arguments:
        choices = ", ".join(f"{name}:{a}" if a else name for a in arguments)
        raise ValueError(f"wrappers={entry!r}: choose from {choices}")
    return name, argument


Range = tuple[float, float]
Distribution = Literal["uniform", "log_uniform", "normal"]


@dataclasses.dataclass
class RandomizationConfig:
    """What differs from world to world and from episode to episode.

    A range is (lowest, highest); (nominal, nominal) leaves the term out. Factors are nominal at 1, all
    else at 0. Every draw is about the robot as it was built: nothing compounds. Initial states and pushes
    are drawn anew each time; the rest comes from a population of robots, drawn at the seed, of which
    every episode gets one at random.
    """

    mass: Range = (1.0, 1.0)
    """Factor on mass and inertia, one for each body."""
    center_of_mass: Range = (0.0, 0.0)
    """Offset of the torso's centre of mass along each axis, m."""
    friction: Range = (1.0, 1.0)
    """Friction coefficient of the ground."""
    joint_damping: Range = (0.0, 0.0)
    """Viscous friction of each joint besides the servo's damping, N m s/rad."""
    armature: Range = (1.0, 1.0)
    """Factor on the rotor inertia of each joint."""
    friction_loss: Range = (0.0, 0.0)
    """Dry friction of each joint, N m."""
    motor_strength: Range = (1.0, 1.0)
    """Factor on the torque of each motor and on its limit."""
    stiffness: Range = (1.0, 1.0)
    """Factor on the position gain of each servo."""
    damping: Range = (1.0, 1.0)
    """Factor on the velocity gain of each servo."""
    gravity: Range = (0.0, 0.0)
    """Added to gravity along each axis, m/s^2; 0.5 across is a floor that slopes by 3 degrees."""
    encoder_bias: Range = (0.0, 0.0)
    """What each joint's encoder reads too much, rad: the servo and the policy go by it."""
    action_delay: Range = (0.0, 0.0)
    """Time from a policy's action to its servos, s, in whole physics steps."""
    sensor_delay: Range = (0.0, 0.0)
    """Age of what the policy is told of its sensors, s; between two control steps, the mean of both."""
    action_noise: float = 0.0
    """Standard deviation of what is added to each action on its way, in units of action."""
    observation_noise: dict[str, float] = dataclasses.field(default_factory=dict)
    """Standard deviation of what is added to the policy's observations, by term, in the term's units."""
    push_velocity: Range = (0.0, 0.0)
    """Speed that a push adds to the base at once, horizontally in a random direction, m/s."""
    push_interval: Range = (1.0, 3.0)
    """Shortest and longest time between pushes, s."""
    initial_joint_pos: Range = (-0.1, 0.1)
    """Joint positions about the default pose at reset, rad."""
    initial_velocity: Range = (-0.5, 0.5)
    """Base velocity at reset, m/s in x and y and rad/s in yaw."""
    distributions: dict[str, Distribution] = dataclasses.field(default_factory=dict)
    """How a term is drawn, by its name: uniform (the default), log_uniform, or normal, whose mean is the
    middle of the range and whose 2 standard deviations reach the ends, where it is cut off."""
    population: int = 1024
    """Number of robots that are drawn."""

    FACTORS = ("mass", "friction", "armature", "motor_strength", "stiffness", "damping")
    OFFSETS = (
        "center_of_mass",
        "joint_damping",
        "friction_loss",
        "gravity",
        "encoder_bias",
        "action_delay",
        "sensor_delay",
    )

    def enabled(self) -> list[str]:
        """Terms of the population that are not left out, in the order of the fields."""
        nominal = dict.fromkeys(self.FACTORS, 1.0) | dict.fromkeys(self.OFFSETS, 0.0)
        names = [f.name for f in dataclasses.fields(self) if f.name in nominal]
        return [name for name in names if tuple(getattr(self, name)) != (nominal[name],) * 2]

    def __post_init__(self) -> None:
        require_numbers(self)
        drawn = (*self.FACTORS, *self.OFFSETS)
        for name in (*drawn, "push_velocity", "push_interval", "initial_joint_pos", "initial_velocity"):
            require_range(self, name)
        for name in (*self.FACTORS, "push_interval"):
            require(self, name, getattr(self, name)[0] > 0, "must be greater than 0")
        for name in ("joint_damping", "friction_loss", "action_delay", "sensor_delay", "push_velocity"):
            require(self, name, getattr(self, name)[0] >= 0, "must not be negative")
        for name in ("action_delay", "sensor_delay"):
            require(self, name, getattr(self, name)[1] <= MAX_DELAY, f"must be at most {MAX_DELAY:g} s")
        limit = math.pi
        for name in ("initial_joint_pos", "encoder_bias"):
            low, high = getattr(self, name)
            require(self, name, -limit <= low and high <= limit, "must lie in [-pi, pi] rad")
        require(self, "action_noise", self.action_noise >= 0, "must not be negative")
        require(self, "population", self.population > 0, "must be greater than 0")
        noise = self.observation_noise
        require(self, "observation_noise", all(std >= 0 for std in noise.values()), "must not be negative")
        for name, kind in self.distributions.items():
            check_choice("distributions", name, drawn)
            check_choice(f"distributions[{name}]", kind, get_args(Distribution))
            low, _ = getattr(self, name)
            require(self, name, kind != "log_uniform" or low > 0, "log_uniform needs a lowest value above 0")
            require(self, "distributions", name in self.enabled(), f"{name} is left out: give it a range")


# The longest delay that is remembered, s.
MAX_DELAY = 0.1

NOISE = {"base_ang_vel": 0.1, "projected_gravity": 0.03, "joint_pos": 0.006, "joint_vel": 0.5}

Preset = Literal["none", "light", "sim2real"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "none": {},
    "light": {
        "mass": (0.95, 1.05),
        "friction": (0.5, 1.2),
        "motor_strength": (0.95, 1.05),
        "observation_noise": {name: std / 2 for name, std in NOISE.items()},
        "push_velocity": (0.0, 0.3),
    },
    "sim2real": {
        "mass": (0.8, 1.2),
        "center_of_mass": (-0.03, 0.03),
        "friction": (0.25, 1.2),
        "joint_damping": (0.0, 0.2),
        "armature": (0.8, 1.2),
        "motor_strength": (0.8, 1.1),
        "stiffness": (0.85, 1.15),
        "damping": (0.85, 1.15),
        "gravity": (-0.3, 0.3),
        "encoder_bias": (-0.03, 0.03),
        "action_delay": (0.0, 0.02),
        "sensor_delay": (0.0, 0.01),
        "action_noise": 0.02,
        "observation_noise": NOISE,
        "push_velocity": (0.0, 1.0),
    },
}


def randomization(preset: Preset) -> RandomizationConfig:
    """A preset by name: none, light or sim2real.

    Raises:
      ValueError: an unknown name.
    """
    check_choice("randomize", preset, PRESETS)
    return RandomizationConfig(**copy.deepcopy(PRESETS[preset]))


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
        require(self, "curriculum", not self.curriculum or len(self.types) > 0, "there are no types of tile")
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
    actuator: Literal["implicit", "explicit"] = "implicit"
    """implicit: the engine integrates the servos' damping, stable at any gain. explicit: a torque computed
    from the joint at each physics step, as a motor's own board does."""
    torque_speed: bool = False
    """Limit torque by joint speed as well, as a DC motor does, by the robot's figures."""
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
    heading_fraction: float = 0.0
    """Share of the other commands that ask for a heading, in any direction, instead of a yaw rate."""
    heading_stiffness: float = 0.5
    """Yaw rate for each radian that is left to turn to the heading, 1/s, within command_yaw."""
    resampling_interval: float = 5.0
    """Time between new commands, s."""
    pose_range: dict[str, float] = dataclasses.field(default_factory=dict)
    """How far each joint of the pose to hold may be from the default pose, rad, by part of the joint's name.
    None: the pose is the default pose."""
    crouch: tuple[float, float] = (0.0, 0.0)
    """How far the knees of the pose to hold are bent beyond that, rad; hips and ankles make up for it."""
    pose_speed: float = 1.0
    """Speed of each joint of the pose to hold on its way to a new one, rad/s."""

    gait_period: float = 0.7
    """Duration of a full gait cycle (two steps), s."""
    swing_fraction: float = 0.4
    """Share of the cycle a foot is in the air; below 0.5 both feet touch in between."""
    swing_height: float = 0.09
    """Height of the foot in mid swing, m."""

    randomization: RandomizationConfig = dataclasses.field(default_factory=RandomizationConfig)
    """What differs from world to world and from episode to episode, pushes and noise included."""

    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)
    """Stages that the training goes through."""
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
        "randomization",
    )
    """What the critic sees besides (simulation only)."""
    wrappers: tuple[str, ...] = ()
    """What is made of the policy's observation, one after the other: kinematic (places of both hands),
    kinematic:velocity (and the base's velocity), history:N (the last N observations), normalize."""
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
            "harness_fall_time heading_stiffness pose_speed"
        )
        for name in positive.split():
            require(self, name, getattr(self, name) > 0, "must be greater than 0")
        not_negative = "num_threads standing_command swing_height fall_height target_height"
        for name in not_negative.split():
            require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in ("command_vx", "command_vy", "command_yaw", "crouch"):
            require_range(self, name)
        require(self, "pose_range", all(r >= 0 for r in self.pose_range.values()), "must not be negative")
        require(self, "harness", 0 <= self.harness <= 1, "must lie in [0, 1]")
        for name in ("standing_fraction", "heading_fraction"):
            require(self, name, 0 <= getattr(self, name) <= 1, "must lie in [0, 1]")
        if self.heading_fraction:
            low, high = self.command_yaw
            require(self, "command_yaw", low < 0 < high, "must go both ways, for heading_fraction > 0")
        require(self, "swing_fraction", 0 < self.swing_fraction < 1, "must lie between 0 and 1")
        require(self, "timestep", self.timestep <= 0.02, "must be at most 0.02 s: longer steps diverge")
        for name in ("control_mode", "actuator", "collisions", "engine"):
            check_choice(name, getattr(self, name), get_args(get_type_hints(type(self))[name]))
        for name in ("actor_observations", "critic_observations"):
            terms = getattr(self, name)
            require(self, name, isinstance(terms, tuple | list), "must be a tuple of names")
        require(self, "actor_observations", len(self.actor_observations) > 0, "must not be empty")
        require(self, "wrappers", isinstance(self.wrappers, tuple | list), "must be a tuple of names")
        for entry in self.wrappers:
            parse_wrapper(entry)
        names = [entry.partition(":")[0] for entry in self.wrappers]
        require(self, "wrappers", len(set(names)) == len(names), "each may be there once")
        require(self, "fall_tilt", 0 < self.fall_tilt <= math.pi, "must lie in (0, pi] rad")


# How far a crouch bends a joint for each rad of the knees, by part of its name: the soles stay flat.
BENDS = {"hip_pitch": -0.5, "knee": 1.0, "ankle_pitch": -0.5}


def by_part(field: str, weights: dict[str, float], names: Sequence[str]) -> list[float]:
    """The weight of each name: that of the first key that is part of it, else 0.

    Raises:
      ValueError: a key is part of no name.
    """
    for part in weights:
        if not any(part in name for name in names):
            raise ValueError(f"{field}: {part!r} matches no joint of {', '.join(names)}")
    return [next((w for part, w in weights.items() if part in name), 0.0) for name in names]


# What leaves a robot alone: to be seen and recorded.
CALM: dict[str, Any] = {"randomization": RandomizationConfig(), "curriculum": CurriculumConfig()}


def walk_rough() -> HumanoidEnvConfig:
    """The task ``walk-rough``: the same robot on nine types of ground, with a level per world.

    The critic sees the ground around the robot, the policy does not: it lifts its feet high and feels its
    way. Most commands ask for a heading: who walks straight meets what there is.
    """
    config = HumanoidEnvConfig(
        terrain=TerrainConfig(
            types=ROUGH_TYPES,
            curriculum=True,
            slope=(0.0, math.radians(20.0)),
            stair_riser=(0.02, 0.16),
            obstacle_height=(0.03, 0.15),
            stone_gap=(0.03, 0.15),
            gap_width=(0.03, 0.25),
        ),
        swing_height=0.16,
        heading_fraction=0.8,
        standing_fraction=0.1,
        resampling_interval=10.0,
    )
    config.critic_observations += ("height_scan",)
    return config


def stand() -> HumanoidEnvConfig:
    """The task ``stand``: hold a commanded pose, arms and waist anywhere and knees bent, against pushes.

    The action is about the commanded pose. Two feet on the ground are rewarded, not demanded: who is pushed
    hard takes a step.
    """
    return HumanoidEnvConfig(
        standing_fraction=1.0,
        pose_range={"shoulder": 0.6, "elbow": 0.6, "wrist": 0.4, "waist_yaw": 0.4},
        crouch=(0.0, 0.7),
        randomization=RandomizationConfig(push_velocity=(0.0, 1.0), push_interval=(2.0, 5.0)),
        actor_observations=(
            "base_ang_vel",
            "projected_gravity",
            "pose_command",
            "joint_pos",
            "joint_vel",
            "last_action",
        ),
        rewards={
            "track_linear_velocity": 1.0,
            "track_yaw_rate": 0.5,
            "gait_contact": 0.3,
            "alive": 2.0,
            "tilt": -2.0,
            "roll_pitch_rate": -0.05,
            "vertical_velocity": -0.5,
            "action_rate": -0.01,
            "action_acceleration": -0.002,
            "standing_pose": -1.5,
            "foot_slip": -0.1,
            "joint_velocity": -1e-4,
        },
    )


TASKS: dict[str, Callable[[], HumanoidEnvConfig]] = {
    "walk": HumanoidEnvConfig,
    "walk-rough": walk_rough,
    "stand": stand,
}


def from_plain(cls: type, values: dict[str, Any]) -> Any:
    """A configuration from plain data: JSON knows no tuples.

    Raises:
      ValueError: a field this version does not have.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise ValueError(f"{cls.__name__}: unknown field {', '.join(sorted(unknown))}")
    hints = get_type_hints(cls)

    def made(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hints[name]):
            return from_plain(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: made(name, value) for name, value in values.items()})


def flatten(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables, as ``dataclasses.asdict`` gives them, as one, by the names of the command line."""
    flat: dict[str, Any] = {}
    for name, value in group.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
