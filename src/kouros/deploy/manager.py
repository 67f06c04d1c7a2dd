"""Several policies of one robot, one of them active: blended switches, and conditions that switch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from kouros.checks import check_choice
from kouros.deploy.runner import Gains, PolicyRunner, SensorError, Sensors, Targets, _names

Condition = Callable[[Sensors], bool]


def fallen(sensors: Sensors) -> bool:
    """Tilted by more than 60 degrees."""
    return _tilt(sensors) > math.radians(60.0)


def upright(sensors: Sensors) -> bool:
    """Tilted by less than 10 degrees, turning at less than 1 rad/s."""
    return _tilt(sensors) < math.radians(10.0) and math.hypot(*sensors["base_ang_vel"]) < 1.0


def disturbed(sensors: Sensors) -> bool:
    """Tilted by more than 20 degrees, or rolling and pitching at more than 2.5 rad/s (walking: up to 2.7)."""
    roll, pitch, _ = sensors["base_ang_vel"]
    return _tilt(sensors) > math.radians(20.0) or math.hypot(roll, pitch) > 2.5


def commanded(sensors: Sensors) -> bool:
    """Asked to move: the norm of the command is more than 0.05, m/s and rad/s together."""
    return math.hypot(*sensors["command"]) > 0.05


def idle(sensors: Sensors) -> bool:
    """Not asked to move."""
    return not commanded(sensors)


def _tilt(sensors: Sensors) -> float:
    """Angle between the base's axis and the vertical, rad."""
    x, y, z = sensors["projected_gravity"]
    return math.atan2(math.hypot(x, y), -z)


CONDITIONS: dict[str, Condition] = {
    condition.__name__: condition for condition in (fallen, upright, disturbed, commanded, idle)
}


class MultiPolicyManager:
    """Policies of one robot by name, of which one is active; runs like a :class:`PolicyRunner`.

    The policies may differ in sensors, histories, gains and rates. Each acts at its own rate from when it
    was switched in, and its targets are held in between; while a switch blends from one to the other, both
    act, and whoever does not act is at its beginning. Time is counted in calls of :meth:`step`: a loop that
    stalls makes no target jump.

    Args:
      control_dt: time between two calls of :meth:`step`, s; that of the fastest policy if None.
      blend_time: how long a switch takes, s, rounded to whole steps; 0: at once, the safest for a robot in
        mid-stride (docs/several-policies.md).

    Attributes:
      policies: the :class:`PolicyRunner` of each name.
      active: name of the policy that acts; at first the first one added.
      joint_names: the joints that they move.
      sensors: names of what :meth:`step` takes besides ``time``, of all policies, those of the first first.
      control_dt: time between two calls of :meth:`step`, s.
      gains: stiffness and damping that belong to the last targets, N m/rad and N m s/rad, by joint name.
      history: the switches since the first step: time on the robot's clock, from, to, and why: the name of
        a condition, or ``asked``.

    Raises:
      ValueError: a time that is not one.
    """

    def __init__(self, control_dt: float | None = None, blend_time: float = 0.0) -> None:
        if control_dt is not None and not 0.0 < control_dt < math.inf:
            raise ValueError(f"control_dt={control_dt!r}: must be greater than 0 and finite, s")
        self._given, self.control_dt = control_dt, control_dt or 0.0
        self.blend_time = _checked_time("blend_time", blend_time)
        self.policies: dict[str, PolicyRunner] = {}
        self.joint_names: tuple[str, ...] = ()
        self.sensors: tuple[str, ...] = ()
        self.active = self._first = ""
        self._every: dict[str, int] = {}
        self._transitions: list[tuple[str, str, str, Condition, float]] = []
        self.reset()

    @property
    def contract(self) -> dict[str, Any]:
        """What the active policy says of itself."""
        return self.policies[self.active].contract

    @property
    def backend(self) -> str:
        """What runs the policies, in words."""
        return "; ".join(dict.fromkeys(policy.backend for policy in self.policies.values()))

    def add_policy(self, name: str, policy: str | Path | PolicyRunner) -> None:
        """Add a policy, at its beginning.

        Args:
          name: what it is to be called here.
          policy: a runner, or the path of a policy file.

        Raises:
          FileNotFoundError, ValueError: no policy file; the name or the runner is there already; of another
            robot, control mode or joints; its ``control_dt`` is no whole multiple of the manager's.
        """
        if name in (*self.policies, "*"):
            raise ValueError(f"name={name!r}: taken; choose another than {', '.join((*self.policies, '*'))}")
        runner = PolicyRunner(policy) if isinstance(policy, str | Path) else policy
        if not runner.sensors:
            raise ValueError(f"policy {name!r}: a plain network; add the policy file beside it")
        for other, its in self.policies.items():
            if runner is its:
                raise ValueError(
                    f"policy {name!r}: the runner is {other!r} already; make another of the file"
                )
            for field in ("robot", "control_mode"):
                if runner.contract[field] != its.contract[field]:
                    ours, theirs = runner.contract[field], its.contract[field]
                    raise ValueError(f"policy {name!r}: {field}={ours!r}, that of {other!r} is {theirs!r}")
            if set(runner.joint_names) != set(its.joint_names):
                what = f"policy {name!r}: joint_names"
                raise ValueError(_names(what, runner.joint_names, its.joint_names))
        rates = {other: its.control_dt for other, its in self.policies.items()} | {name: runner.control_dt}
        # Once it moves, its loop keeps the time.
        control_dt = (self.control_dt if self._sent else self._given) or min(rates.values())
        every = {other: round(rate / control_dt) for other, rate in rates.items()}
        for other, rate in rates.items():
            if every[other] < 1 or abs(rate - every[other] * control_dt) > 1e-6:
                raise ValueError(
                    f"policy {other!r}: control_dt={rate:g} is no whole multiple of the manager's "
                    f"{control_dt:g}; give MultiPolicyManager(control_dt=...) one that divides all"
                )
        runner.reset()
        self.policies[name], self._every, self.control_dt = runner, every, control_dt
        self.joint_names = self.joint_names or runner.joint_names
        self.sensors = tuple(dict.fromkeys((*self.sensors, *runner.sensors)))
        if not self._first:
            self._first = name
            self.reset()

    def add_transition(self, source: str, target: str, when: str | Condition, after: float = 0.0) -> None:
        """Switch by itself: from one policy to another when a condition has held for some time.

        Args:
          source: the policy that has to be active; ``*``: any but the target.
          target: the policy to switch to.
          when: one of :data:`CONDITIONS` by name, or a function of the sensors.
          after: how long it has to hold without a break while the source is active, s, on the robot's clock;
            with ``*`` a switch between two others is no break. Of several that have, the first added counts.

        Raises:
          ValueError: an unknown name, or a time that is not one.
        """
        check_choice("source", source, (*self.policies, "*"))
        check_choice("target", target, self.policies)
        if source == target:
            raise ValueError(f"target={target!r}: is the source too; name another policy")
        if not callable(when):
            check_choice("when", when, CONDITIONS)
        condition = when if callable(when) else CONDITIONS[when]
        why = str(getattr(when, "__name__", when))
        self._transitions.append((source, target, why, condition, _checked_time("after", after)))

    def switch_policy(self, name: str, blend_time: float | None = None) -> bool:
        """Make another policy the active one, from its beginning, from the next step on.

        Targets and gains of the k-th step from now are ``(1 - w) old + w new`` with ``w = k control_dt /
        blend_time``, at most 1. The old policy acts on until the blend is over; it holds its last targets
        where a sensor that only it needs is missing or wrong, and where it is itself the one to switch to. In
        the middle of another blend, ``old`` is the policy that was coming, plus the constant by which what
        was last sent differed from it: in a blend targets never jump. One that was coming but has not acted
        yet is passed over. Before the first step there is nothing to blend from: the policy is the one to
        begin with.

        Args:
          name: of the policy.
          blend_time: s; the manager's if None.

        Returns:
          Whether another one was active.

        Raises:
          ValueError: an unknown name, or a time that is not one.
        """
        check_choice("policy", name, self.policies)
        blend_time = self.blend_time if blend_time is None else _checked_time("blend_time", blend_time)
        if name == self.active:
            return False
        if self._sent:
            self._switch(name, "asked", blend_time, self._time)
        else:
            self._first = name
            self.reset()
        return True

    def reset(self) -> None:
        """Begin anew, with the policy that was active before the first step; no blend, no history."""
        for policy in self.policies.values():
            policy.reset()
        self.active = self._first
        self.gains: Gains = self.policies[self.active].gains if self.policies else ({}, {})
        self.history: list[tuple[float, str, str, str]] = []
        self._time, self._ticks, self._blend = -math.inf, 0, 0
        self._since: dict[int, float] = {}
        self._held: Targets = {}
        self._sent: Targets = {}
        # Of a blend: who leaves, its targets, what is added to them, and the gains before it.
        self._leaving, self._leaving_ticks = "", 0
        self._old: Targets = {}
        self._owed: Targets = {}
        self._from = self.gains

    def step(self, sensors: Sensors) -> Targets:
        """One control step: transitions, then the active policy, then the blend.

        Args:
          sensors: by name: ``time``, s, all that the active policy needs, and any other of :attr:`sensors`;
            each as in :meth:`PolicyRunner.act`.

        Returns:
          A position target for each joint by its name, rad.

        Raises:
          SensorError: a sensor is missing, unknown, mis-shaped, not finite, or not newer than the last, or a
            condition cannot be told by them; nothing has moved on.
          RuntimeError: the policy gave a target that is not finite.
          ValueError: there is no policy.
        """
        self._check(sensors)
        since, due = self._judge(sensors)
        name, why = due or (self.active, "")
        policy, own = self.policies[name], self._those_of(name, sensors)
        if due:
            policy.read(own)  # what is wrong with them is found before anybody moves
            self._since = since
            self._switch(name, why, self.blend_time, sensors["time"])
        if self._ticks % self._every[name]:
            policy.read(own)
        else:
            self._held = policy.act(own)
        self._time = sensors["time"]
        if not due:
            self._since = since
        self._ticks += 1
        self._sent, self.gains = self._held, policy.gains
        if self._ticks < self._blend:
            self._advance_leaving(sensors)
            old = {joint: self._old[joint] + self._owed[joint] for joint in self.joint_names}
            stiffness, damping = map(self._mixed, self._from, policy.gains)
            self._sent, self.gains = self._mixed(old, self._held), (stiffness, damping)
        elif self._leaving:
            self._dismiss()
        return dict(self._sent)

    act = step

    def get_all_actions(self, sensors: Sensors) -> dict[str, Targets]:
        """What each policy would give for these sensors, by its name; none of them moves on.

        The active one goes on from where it is, before the :meth:`step` with the same sensors, and so does
        the one that leaves in a blend; the others begin. No rate and no blend: what the policies say, not
        what is sent.

        Raises:
          SensorError: as :meth:`step`; where a sensor is missing, the policy that needs it is named.
        """
        self._check(sensors)
        return {name: policy.peek(self._those_of(name, sensors)) for name, policy in self.policies.items()}

    def warm(self) -> None:
        """Run every policy once for nothing, so that the next step finds it in the processor's caches."""
        for policy in self.policies.values():
            policy.warm()

    def _check(self, sensors: Sensors) -> None:
        if not self.policies:
            raise ValueError("policies: there is none; add_policy() first")
        known = {"time", *self.sensors}
        if "time" not in sensors or not sensors.keys() <= known:
            raise SensorError(_names("sensors", sensors, known))
        time = sensors["time"]
        if not (isinstance(time, Real) and float(time) > self._time):
            raise SensorError(f"time={time!r}: stale or no number, the last sensors were of {self._time!r}")

    def _those_of(self, name: str, sensors: Sensors) -> Sensors:
        expected = ("time", *self.policies[name].sensors)
        own = {sensor: sensors[sensor] for sensor in expected if sensor in sensors}
        if len(own) < len(expected):
            raise SensorError(_names(f"policy {name!r}: sensors", own, expected))
        return own

    def _judge(self, sensors: Sensors) -> tuple[dict[int, float], tuple[str, str] | None]:
        """Since when the conditions hold that do, and target and name of the transition that is due."""
        time: float = sensors["time"]
        since: dict[int, float] = {}
        due: tuple[str, str] | None = None
        for number, (source, target, why, condition, after) in enumerate(self._transitions):
            if source not in (self.active, "*") or target == self.active:
                continue
            try:
                holds = condition(sensors)
            except (LookupError, TypeError, ValueError) as error:
                raise SensorError(f"transition to {target!r}: {why} cannot be told: {error!r}") from error
            if holds:
                since[number] = self._since.get(number, time)
                if time - since[number] >= after - 1e-9:
                    due = due or (target, why)
        return since, due

    def _switch(self, name: str, why: str, blend_time: float, time: float) -> None:
        """Make ``name`` the active one, and begin a blend from what was last sent."""
        self.history.append((time, self.active, name, why))
        if self._ticks:  # else it has not acted: who was leaving still is
            self._dismiss()
            self._leaving, self._leaving_ticks, self._old = self.active, self._ticks, self._held
            self._owed = {joint: self._sent[joint] - self._held[joint] for joint in self.joint_names}
            self._from = self.gains
        if name == self._leaving:
            self._dismiss()
        self.policies[name].reset()
        self.active, self._ticks = name, 0
        anybodys = [source == "*" and target != name for source, target, *_ in self._transitions]
        self._since = {number: time for number, time in self._since.items() if anybodys[number]}
        self._blend = round(blend_time / self.control_dt) if self._sent else 0

    def _dismiss(self) -> None:
        """Who leaves acts no longer."""
        if self._leaving:
            self.policies[self._leaving].reset()
        self._leaving = ""

    def _advance_leaving(self, sensors: Sensors) -> None:
        """The step of who leaves, if anybody does; where its sensors are missing or wrong, nothing moves."""
        if self._leaving and self._leaving_ticks % self._every[self._leaving] == 0:
            with contextlib.suppress(SensorError):
                self._old = self.policies[self._leaving].act(self._those_of(self._leaving, sensors))
        self._leaving_ticks += 1

    def _mixed(self, start: dict[str, float], goal: dict[str, float]) -> dict[str, float]:
        weight = self._ticks / self._blend
        return {joint: (1.0 - weight) * start[joint] + weight * goal[joint] for joint in self.joint_names}


def _checked_time(field: str, value: float) -> float:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{field}={value!r}: must be finite and not negative, s")
    return value
