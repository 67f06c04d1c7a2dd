"""Domain randomization: every episode gets a robot from a population drawn about the nominal one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kouros.checks import check_choice
from kouros.envs.actuators import MOTOR_TERMS, Actuators
from kouros.envs.config import HumanoidEnvConfig
from kouros.envs.observations import OBSERVATIONS, reflection
from kouros.envs.scene import ground_geoms
from kouros.physics.cpu import CpuSimulation
from kouros.robots.robot import mirror_pairs

# Terms drawn once for each joint or body, and how they reflect (see observations.Mirror); the rest of them
# are vectors and single numbers.
MIRRORS = {
    "mass": "bodies",
    "center_of_mass": "vector",
    "joint_damping": "joint_pairs",
    "armature": "joint_pairs",
    "friction_loss": "joint_pairs",
    "motor_strength": "joint_pairs",
    "stiffness": "joint_pairs",
    "damping": "joint_pairs",
    "gravity": "vector",
    "encoder_bias": "joints",
}
# Terms after which MuJoCo's derived constants have to follow.
INERTIAL = ("mass", "center_of_mass", "armature")
# What a curriculum may scale: a share of the range about nominal, and of pushes a factor on how often.
SCALES = ("mass", "friction", "push_frequency")


class DomainRandomizer:
    """Draws the physical parameters of every world, for every episode anew.

    A *population* of robots is drawn at the seed, all about the nominal model, and MuJoCo computes the
    constants that follow from each robot's inertias (``mj_setConst``). At a reset a world gets one of
    these robots at random: on a GPU a gather instead of a solver, and on both engines the same robots.
    Nothing compounds, because nothing is read back from the worlds.

    Attributes:
      names: the terms that are on.
      columns: where each of them lies in ``values``.
      values: ``(num_envs, size)`` float32, what each world has now, in the units of the config: what the
        critic sees.
      mirror: how ``values`` reflects, see :func:`kouros.envs.observations.reflection`.
      noise: ``(num_envs, obs_dim)``, this step's noise on the policy's observation.
      frames: the last observations as they were measured, the newest first, ``(ages, num_envs, obs_dim)``.
      push_frequency: factor on how often pushes come, a tensor.

    Args:
      config: of the environment.
      actuators: the worlds' servos, which know the simulation and the robot.
      observations: slices of the policy's observation, by term.
      generator: of the environment; draws which robot a world gets, noise and pushes.

    Raises:
      ValueError: a term that is on could change nothing in this environment.
    """

    def __init__(
        self,
        config: HumanoidEnvConfig,
        actuators: Actuators,
        observations: dict[str, slice],
        generator: torch.Generator,
    ) -> None:
        self.config = config.randomization
        self.simulation, self.robot = actuators.simulation, actuators.robot
        self.device = device = self.simulation.device
        self.num_envs = n = self.simulation.num_worlds
        self._actuators, self._generator = actuators, generator
        self._control_dt = config.control_dt
        self.names = tuple(self.config.enabled())
        self._require_effects(config, observations)
        model, joints = self.simulation.model, self.robot.num_joints
        counts = {"joints": joints, "joint_pairs": joints, "bodies": model.nbody - 1, "vector": 3}
        kinds = [MIRRORS.get(name, "scalar") for name in self.names]
        sizes = [counts.get(kind, 1) for kind in kinds]
        ends = np.cumsum([0, *sizes]).tolist()
        self.columns = {name: slice(*ends[i : i + 2]) for i, name in enumerate(self.names)}
        pairs = mirror_pairs([model.body(i).name for i in range(1, model.nbody)])
        rules = {"bodies": (pairs, np.ones_like(pairs))}
        self.mirror = reflection(kinds, sizes, self.robot, rules)
        self.values = torch.zeros(n, ends[-1], device=device)
        self.push_frequency = torch.ones((), device=device)
        self._scale = {"mass": 1.0, "friction": 1.0}
        self._seed = 0
        self._live = self._live_fields()
        self._tables: dict[str, torch.Tensor] = {}
        if self.names:
            self._draw_population()

        width = max(part.stop for part in observations.values())
        std = torch.zeros(width)
        measured = torch.zeros(width, dtype=torch.bool)
        for name, part in observations.items():
            std[part] = self.config.observation_noise.get(name, 0.0)
            measured[part] = OBSERVATIONS[name].measured
        self._noise_std, self._measured = std.to(device), measured.to(device)
        self._noisy = bool((std > 0).any())
        self.noise = torch.zeros(n, width, device=device)
        self._joint_pos = observations.get("joint_pos")
        self._default_joint_pos = torch.tensor(self.robot.default_joint_pos).float().to(device)
        inexact = {*self.names, *self.config.observation_noise} & {
            "encoder_bias",
            "sensor_delay",
            "joint_pos",
        }
        self._inexact = bool(inexact)
        self._encoder = self._joint_pos if "encoder_bias" in self.names else None
        ages = 0
        if "sensor_delay" in self.names:
            ages = int(np.ceil(self.config.sensor_delay[1] / self._control_dt - 1e-9))
        self.frames = torch.zeros(ages + 1, n, width, device=device)

    def _require_effects(self, config: HumanoidEnvConfig, observations: dict[str, slice]) -> None:
        """Raise ``ValueError`` for a term that is on and could change nothing."""

        def refuse(name: str, why: str) -> None:
            value = getattr(self.config, name)
            raise ValueError(f"randomization.{name}={value!r}: would change nothing: {why}; leave it out")

        mode, on = config.control_mode, self.names
        if "stiffness" in on and mode != "position":
            refuse("stiffness", f"control_mode={mode!r} has no position gain")
        if "damping" in on and mode == "effort":
            refuse("damping", "control_mode='effort' has no velocity gain")
        if "encoder_bias" in on and mode != "position" and "joint_pos" not in observations:
            refuse("encoder_bias", "neither the servos nor the policy read joint positions")
        if "action_delay" in on and round(self.config.action_delay[1] / config.timestep) == 0:
            refuse("action_delay", f"it is less than half a physics step of {config.timestep:g} s")
        for name in self.config.observation_noise:
            check_choice("randomization.observation_noise", name, observations)
        measured = [name for name in observations if OBSERVATIONS[name].measured]
        if "sensor_delay" in on and not measured:
            refuse("sensor_delay", "the policy observes no sensor")

    def __getitem__(self, name: str) -> torch.Tensor:
        """What each world has of a term now, ``(num_envs, size)``, live.

        Raises:
          ValueError: a term that is off, or unknown.
        """
        check_choice("randomization", name, self.names)
        return self.values[:, self.columns[name]]

    def _live_fields(self) -> dict[str, torch.Tensor]:
        """What the terms change in the worlds, by name; live."""
        sim, on = self.simulation, self.names
        fields = {name: sim.model_field(name) for name, term in FIELDS.items() if term in on}
        if any(term in on for term in INERTIAL):
            fields |= {name: sim.model_field(name) for name in sim.derived}
        if "friction" in on:
            fields["friction"] = sim.model_field("geom_friction")[:, ground_geoms(sim.model), 0]
        if any(term in on for term in MOTOR_TERMS):
            fields |= self._actuators.parameters()
        return fields

    def _draw_population(self) -> None:
        """Draw the robots, and make of them what the simulation needs; in the same memory each time."""
        config, model = self.config, self.simulation.model
        generator = torch.Generator().manual_seed(self._seed)
        size = self.values.shape[1]
        uniform = torch.rand(config.population, size, generator=generator, dtype=torch.float64)
        terms = {}
        for name, part in self.columns.items():
            nominal, scale = float(name in config.FACTORS), self._scale.get(name, 1.0)
            low, high = (nominal + scale * (bound - nominal) for bound in getattr(config, name))
            terms[name] = draw(uniform[:, part], low, high, config.distributions.get(name, "uniform"))

        # Worlds that are never stepped: MuJoCo C computes what follows from the inertias, for either engine.
        pool = CpuSimulation(model, config.population)
        joints, torso = self._actuators.dofs, int(model.site(self.robot.torso).bodyid[0])
        if "mass" in terms:
            pool.model_field("body_mass")[:, 1:] *= terms["mass"]
            pool.model_field("body_inertia")[:, 1:] *= terms["mass"].unsqueeze(-1)
        if "center_of_mass" in terms:
            pool.model_field("body_ipos")[:, torso] += terms["center_of_mass"]
        if "armature" in terms:
            pool.model_field("dof_armature")[:, joints] *= terms["armature"]
        if "joint_damping" in terms:
            pool.model_field("dof_damping")[:, joints] += terms["joint_damping"]
        if "friction_loss" in terms:
            pool.model_field("dof_frictionloss")[:, joints] += terms["friction_loss"]
        if "gravity" in terms:
            pool.model_field("opt.gravity")[...] += terms["gravity"]
        if any(term in terms for term in INERTIAL):
            pool.set_const()
        tables = self._actuators.population(terms)
        if "friction" in terms:
            tables["friction"] = terms["friction"].expand(-1, self._live["friction"].shape[1])
        k = config.population
        parts = [torch.zeros(k, 0)]
        for name, live in self._live.items():
            table = tables[name] if name in tables else pool.model_field(name)
            parts.append(table.expand(k, *live.shape[1:]).reshape(k, -1))
        self._store("model", torch.cat(parts, dim=1).to(self.device, self.simulation.dtype))
        self._store("values", torch.cat([*terms.values()], dim=1).to(self.values))

    def _store(self, name: str, table: torch.Tensor) -> None:
        if name in self._tables:  # a recorded step reads it there
            self._tables[name].copy_(table)
        else:
            self._tables[name] = table

    def seed(self, seed: int) -> None:
        """Draw the population anew; a world keeps what it has until its next reset."""
        if seed != self._seed:
            self._seed = seed
            if self.names:
                self._draw_population()

    def set_scale(self, name: str, value: float) -> None:
        """Narrow a term for a curriculum.

        Args:
          name: ``mass`` or ``friction``: share of the configured range about nominal, from the next episodes
            on; ``push_frequency``: factor on how often pushes come, 0 for never, from the next draw on.
          value: from 0 to 1 for a share, not negative for a factor.

        Raises:
          ValueError: an unknown or a disabled term, or a value out of range.
        """
        check_choice("set_scale", name, SCALES)
        if not (value >= 0.0 and (value <= 1.0 or name == "push_frequency")):
            raise ValueError(f"set_scale({name!r}, {value}): shares lie in [0, 1], factors are not negative")
        if name == "push_frequency":
            if not self.config.push_velocity[1]:
                raise ValueError("set_scale('push_frequency'): no pushes; give push_velocity a range")
            self.push_frequency.fill_(value)
        else:
            check_choice("set_scale", name, self.names)
            if value != self._scale[name]:
                self._scale[name] = value
                self._draw_population()

    def randomize(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Choose a robot of the population for each world of the mask, bool ``(num_envs,)``.

        Returns:
          What all worlds have then, by term, ``(num_envs, size)`` each; :meth:`apply_to_robot` makes it so.
        """
        chosen = torch.rand(self.num_envs, generator=self._generator, device=self.device)
        self._choice = (chosen * self.config.population).long()
        values = self._tables["values"].index_select(0, self._choice)
        torch.where(mask.unsqueeze(-1), values, self.values, out=self.values)
        return {name: self[name] for name in self.names}

    def apply_to_robot(self, mask: torch.Tensor) -> None:
        """Write what :meth:`randomize` chose into the simulation's worlds of the mask."""
        chosen = self._tables["model"].index_select(0, self._choice)
        parts = chosen.split([live[0].numel() for live in self._live.values()], dim=1)
        for live, part in zip(self._live.values(), parts, strict=True):
            rows = mask.view(-1, *[1] * (live.dim() - 1))
            torch.where(rows, part.view_as(live), live, out=live)

    def apply_dynamics_adaptation(self, actions: torch.Tensor) -> torch.Tensor:
        """What becomes of actions ``(num_envs, num_joints)`` on their way: noise. (They also come late, see
        :class:`Actuators`.)"""
        return actions + self.get_action_noise() if self.config.action_noise else actions

    def get_action_noise(self) -> torch.Tensor:
        """Noise for one step, ``(num_envs, num_joints)``, in units of action."""
        return self._normal(self.robot.num_joints) * self.config.action_noise

    def get_observation_noise(self) -> torch.Tensor:
        """Noise for one step, ``(num_envs, obs_dim)``, in the units of the terms."""
        return self._normal(len(self._noise_std)) * self._noise_std

    def _normal(self, size: int) -> torch.Tensor:
        return torch.randn(self.num_envs, size, generator=self._generator, device=self.device)

    def begin(self, mask: torch.Tensor) -> None:
        """Episodes begin in the worlds of the mask, ``(num_envs,)``: new noise on what they see first."""
        if self._noisy:
            self.noise.copy_(torch.where(mask.unsqueeze(-1), self.get_observation_noise(), self.noise))

    def advance(self) -> None:
        """A control step passes: new noise, older frames."""
        if self._noisy:
            self.noise.copy_(self.get_observation_noise())
        if len(self.frames) > 1:
            self.frames[1:] = self.frames[:-1].clone()

    def observe(self, true: torch.Tensor, fresh: torch.Tensor | None = None) -> torch.Tensor:
        """What the policy is told: bias, then noise, then delay.

        Args:
          true: observation of the present state, ``(num_envs, obs_dim)``.
          fresh: bool ``(num_envs,)``, worlds that have no past: what they see now is what they have seen.
        """
        seen = true + self.noise if self._noisy else true
        if self._encoder:
            seen = seen.clone() if seen is true else seen
            seen[:, self._encoder] += self["encoder_bias"]
        if len(self.frames) == 1:
            return seen
        self.frames[0] = seen
        if fresh is not None:
            self.frames.copy_(torch.where(fresh.view(1, -1, 1), seen, self.frames))
        age = self["sensor_delay"] / self._control_dt
        late = self.frames[-1]
        for i in reversed(range(len(self.frames) - 1)):
            late = torch.lerp(self.frames[i], late, (age - i).clamp(0.0, 1.0))
        return torch.where(self._measured, late, seen)

    def joint_positions(self, true: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """What the policy knows of the joint positions, rad: its observation of them; ``true`` itself where
        that is exact; what the encoders read where it observes none.

        Args:
          true: joint positions, ``(num_envs, num_joints)``.
          seen: what :meth:`observe` returned.
        """
        if self._joint_pos and self._inexact:
            return seen[:, self._joint_pos] + self._default_joint_pos
        return true + self["encoder_bias"] if "encoder_bias" in self.names else true

    def tensors(self) -> dict[str, torch.Tensor]:
        """What one step leaves for the next."""
        return {name: getattr(self, name) for name in ("values", "noise", "frames", "push_frequency")}

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return {"seed": self._seed, "scale": dict(self._scale), **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["seed"], state["scale"]) != (self._seed, self._scale):
            self._seed, self._scale = state["seed"], dict(state["scale"])
            if self.names:
                self._draw_population()
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])


# Model fields of the simulation, and the term that changes each.
FIELDS = {
    "body_mass": "mass",
    "body_inertia": "mass",
    "body_ipos": "center_of_mass",
    "dof_armature": "armature",
    "dof_damping": "joint_damping",
    "dof_frictionloss": "friction_loss",
    "opt.gravity": "gravity",
}


def draw(uniform: torch.Tensor, low: float, high: float, distribution: str) -> torch.Tensor:
    """Turn uniform numbers in [0, 1) into draws between ``low`` and ``high``; see ``RandomizationConfig``."""
    if distribution == "log_uniform":
        return low * (high / low) ** uniform
    if distribution == "normal":
        cut = torch.erf(torch.tensor(2.0 / 2.0**0.5, dtype=uniform.dtype))  # the share within 2 deviations
        deviations = 2.0**0.5 * torch.erfinv(cut * (2.0 * uniform - 1.0))
        return 0.5 * (low + high) + 0.25 * (high - low) * deviations
    return low + (high - low) * uniform
