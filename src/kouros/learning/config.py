"""The learner's figures. Nothing here imports torch, so that ``kouros --help`` is quick."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

from kouros.checks import check_choice, require, require_numbers
from kouros.envs.config import PRESETS, TASKS, HumanoidEnvConfig, Preset, randomization

Activation = Literal["elu", "relu", "silu", "tanh"]

# Bounds of the actions' standard deviation. Fixed, not learnt: exploration neither dies nor explodes.
STD_RANGE = (0.05, 2.0)


@dataclasses.dataclass
class PPOConfig:
    """Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347)."""

    horizon: int = 12
    """Control steps each world takes between updates."""
    epochs: int = 5
    """Passes over the collected samples in one update."""
    minibatches: int = 4
    """Parts the samples are split into; each is one gradient step an epoch."""
    learning_rate: float = 4e-4
    """Adam's step size."""
    target_kl: float = 0.0
    """Where this is not 0, the learning rate adapts: it is divided by 1.5 after an update that moved the
    policy by more than twice this (mean KL divergence), multiplied after less than half of it."""
    gamma: float = 0.97
    """Discount per control step."""
    gae_lambda: float = 0.9
    """Weight of longer returns in the advantage (Schulman et al. 2015, arXiv 1506.02438)."""
    clip: float = 0.2
    """Probability ratio beyond which a sample stops pulling."""
    value_clip: bool = True
    """Clip the change of a value estimate to +- clip, in units of value."""
    entropy_weight: float = 0.001
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    actor_hidden: tuple[int, ...] = (256, 128)
    """Units of the policy's hidden layers."""
    critic_hidden: tuple[int, ...] = (256, 128)
    """Units of the value function's hidden layers."""
    activation: Activation = "elu"
    """Activation of hidden layers."""
    layer_norm: bool = False
    """Normalize each hidden layer."""
    initial_std: float = 1.0
    """Standard deviation of the actions before learning, in units of action."""
    squash: bool = False
    """Pass actions through tanh to the bounds of the action space; else they are clipped there."""
    normalize_observations: bool = True
    """Shift and scale observations by their running mean and deviation, inside the networks."""
    graph: bool = True
    """On a GPU, record a control step and a gradient step once as CUDA graphs and replay them; off: the
    same lines one by one, for debugging."""
    symmetric: bool = True
    """Make the networks mirror-symmetric, where the environment says how it mirrors: a situation
    and its mirror image get mirrored actions and equal values."""

    def __post_init__(self) -> None:
        require_numbers(self)
        check_choice("activation", self.activation, get_args(Activation))
        positive = "horizon epochs minibatches learning_rate clip max_grad_norm"
        for name in positive.split():
            require(self, name, getattr(self, name) > 0, "must be greater than 0")
        for name in ("gamma", "gae_lambda"):
            require(self, name, 0 <= getattr(self, name) <= 1, "must lie in [0, 1]")
        require(self, "target_kl", self.target_kl >= 0, "must not be negative")
        seen = self.target_kl == 0 or self.epochs * self.minibatches > 1
        require(self, "target_kl", seen, "needs more than one gradient step: it is measured before each")
        require(self, "entropy_weight", self.entropy_weight >= 0, "must not be negative")
        low, high = STD_RANGE
        require(self, "initial_std", low <= self.initial_std <= high, f"must lie in [{low:g}, {high:g}]")
        for name in ("actor_hidden", "critic_hidden"):
            require(self, name, all(n > 0 for n in getattr(self, name)), "sizes must be positive")


DEFAULT_STEPS = {"cpu": 2_500_000, "cuda": 20_000_000}


@dataclasses.dataclass
class TrainConfig:
    """Train a humanoid to walk; the run's folder gets the policy.
    Ten minutes or so on two cores, one on a GPU: each has its own defaults, shown here for this machine."""

    task: str = "walk"
    """Task, by name: it sets the defaults of --env."""
    randomize: Preset = "none"
    """What differs from world to world and episode to episode: a preset of --env.randomization."""
    run: Path | None = None
    """Folder of the run; runs/TASK-DATE-TIME if not given."""
    resume: Path | None = None
    """Folder of a run to go on with, exactly where its last checkpoint stands."""
    steps: int | None = None
    """Control steps, of all worlds together, to train for.
    If not given: 2.5 million, on a GPU 20 million, or what the resumed run was given."""
    minutes: float = math.inf
    """Minutes of training after which to stop, if the steps are not done by then.
    What a resumed run trained before counts."""
    save_interval: int = 50
    """Iterations between checkpoints."""
    keep: int = 0
    """Checkpoints to keep besides the newest, which is checkpoint.pt, as checkpoint-ITERATION.pt: the last
    so many, or -1 for all."""
    log_interval: int = 1
    """Iterations between rows of the log, which hold means over them; a GPU never waits in between."""
    seed: int = 0
    """Seed of networks, exploration and worlds: the same seed gives the same policy on the CPU."""
    wandb: str = ""
    """Project of Weights & Biases to send the log to as well; needs pip install 'kouros[wandb]'."""
    report: bool = True
    """At the end, make report.html: curves, the walking test and a video on one page."""
    device: str = "auto"
    """Where the worlds and the networks live: cpu, cuda, cuda:N, or auto for a GPU where there is one."""
    env: HumanoidEnvConfig = dataclasses.field(default_factory=HumanoidEnvConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_choice("randomize", self.randomize, PRESETS)
        for name in ("steps", "minutes", "save_interval", "log_interval"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "must be greater than 0")
        require(self, "seed", self.seed >= 0, "must not be negative")
        require(self, "keep", self.keep >= -1, "must be -1, for all, or more")
        if self.resume and self.run not in (None, self.resume):
            raise ValueError(f"run={self.run}: --resume goes on in its own folder; leave --run out")


# What a GPU changes in the defaults: many worlds cost it little more time than few.
ON_GPU = TrainConfig(
    save_interval=500,
    log_interval=10,
    env=HumanoidEnvConfig(num_envs=2048),
    ppo=PPOConfig(minibatches=16),
)


def train_defaults(device: str, task: str = "walk", randomize: Preset = "none") -> TrainConfig:
    """What ``kouros train`` begins with on that device, for a task and a preset, if nothing else is said.

    Raises:
      ValueError: an unknown task or preset.
    """
    check_choice("task", task, TASKS)
    config = copy.deepcopy(ON_GPU) if device.startswith("cuda") else TrainConfig()
    config.task, config.randomize = task, randomize
    config.env = dataclasses.replace(TASKS[task](), num_envs=config.env.num_envs)
    if randomize != "none":
        config.env.randomization = randomization(randomize)
    return config
