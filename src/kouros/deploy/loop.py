"""The real-time loop: a policy, a robot, absolute deadlines, and a safety layer between them.

The command line imports this for its options: NumPy waits until it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from kouros.checks import require, require_numbers
from kouros.deploy.udp import Gains
from kouros.signals import interrupted

if TYPE_CHECKING:
    from kouros.deploy.runner import Sensors, Targets

# Wake so long (s) before a deadline, run the policy once for nothing, and spin: the caches are warm then, and
# no timer is late.
WARM_UP = 0.0004


class Robot(Protocol):
    """A robot's end of the loop."""

    def read(self) -> dict[str, Any] | None:
        """The newest sensors, by name, with ``time``; None if none have come since the last call."""

    def write(self, mode: str, targets: Mapping[str, float], gains: Gains) -> None:
        """Command the servos: targets (rad), stiffness (N m/rad) and damping (N m s/rad), by joint."""


class Policy(Protocol):
    """A :class:`~kouros.deploy.runner.PolicyRunner`, or several behind a manager."""

    contract: dict[str, Any]
    joint_names: tuple[str, ...]
    sensors: tuple[str, ...]
    control_dt: float

    def act(self, sensors: Sensors, /) -> Targets: ...
    def warm(self) -> None: ...
    def reset(self) -> None: ...
    @property
    def gains(self) -> Gains: ...


@dataclasses.dataclass
class LoopConfig:
    """The loop's figures and the safety layer's limits."""

    seconds: float | None = None
    """Time under the policy, s; until Ctrl-C if not given."""
    rate: float = 0.0
    """Ticks per second: the policy's own rate, or a whole multiple of it, at which sensors are checked and
    commands sent while the policy keeps its own; 0: the policy's own."""
    soft_start: float = 2.0
    """Time from the measured pose to the default pose before the policy begins, s."""
    sensor_timeout: float = 0.0
    """Age of the newest sensors beyond which the robot is damped, s; 0: three quarters of a control
    period of the policy."""
    frozen_after: int = 1
    """The robot is damped when a sensor repeats all its numbers, bit for bit, this many times; 0: never, for
    robots whose sensors have no noise."""
    fall_tilt: float = math.radians(60.0)
    """Tilt beyond which the robot is damped, rad."""
    joint_margin: float = 0.0
    """How far a target may be beyond the joint's limit, rad."""
    speed_factor: float = 1.5
    """Largest speed of a target and of a joint, as a factor on that at which the motor has no torque left."""
    damping_seconds: float = 1.0
    """How long the damping mode is commanded before the loop ends, s."""
    late: float = 0.002
    """A command that is sent so long after its deadline has missed it, s."""

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in ("seconds", "speed_factor", "fall_tilt", "late"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "must be greater than 0")
        for name in (
            "rate",
            "soft_start",
            "sensor_timeout",
            "frozen_after",
            "joint_margin",
            "damping_seconds",
        ):
            require(self, name, getattr(self, name) >= 0, "must not be negative")


class Safety:
    """What stands between a policy and a robot: judges sensors and limits targets.

    Args:
      contract: joints and their limits.
      config: the layer's figures.
      dt: time between ticks, s.

    Attributes:
      limited: number of ticks in which a target was limited, by joint.
    """

    def __init__(self, contract: Mapping[str, Any], config: LoopConfig, dt: float) -> None:
        self.config = config
        self._fastest: dict[str, float] = {}
        self._bounds: dict[str, tuple[float, float, float]] = {}
        figures = (contract[name] for name in ("joint_names", "joint_range", "velocity_limit"))
        for name, (low, high), speed in zip(*figures, strict=True):
            self._fastest[name] = speed = config.speed_factor * speed
            self._bounds[name] = low - config.joint_margin, high + config.joint_margin, speed * dt
        self._last: dict[str, tuple[float, ...]] = {}
        self._repeats: dict[str, int] = {}
        self.limited = dict.fromkeys(self._bounds, 0)

    def judge(self, sensors: Sensors) -> str:
        """Why the robot must be damped; empty if nothing is wrong."""
        numbers = {name: _numbers(value) for name, value in sensors.items()}
        for name, values in numbers.items():
            if not values:
                return f"{name} holds what is no finite number"
        for name in ("time", "projected_gravity", "joint_pos", "joint_vel"):
            if name not in numbers:
                return f"{name} is missing"
        for name in ("joint_pos", "joint_vel"):
            if not isinstance(sensors[name], Mapping) or sensors[name].keys() != self._fastest.keys():
                return f"{name} is not of the policy's joints"
        for joint, speed in sensors["joint_vel"].items():
            if abs(speed) > self._fastest[joint]:
                return f"{joint} turns at {speed:.1f} rad/s, more than {self._fastest[joint]:.1f}"
        if -numbers["projected_gravity"][-1] < math.cos(self.config.fall_tilt):
            return "the robot has fallen"
        if self._last and not numbers["time"] > self._last["time"]:
            return f"stale sensors: time={numbers['time'][0]!r} came after {self._last['time'][0]!r}"
        for name in numbers.keys() - {"time"} if self.config.frozen_after else ():
            same = numbers[name] == self._last.get(name)
            self._repeats[name] = self._repeats.get(name, 0) + 1 if same else 0
            if self._repeats[name] >= self.config.frozen_after:
                return f"{name} is frozen: the same numbers {self._repeats[name] + 1} times"
        self._last = numbers
        return ""

    def limit(self, targets: Targets, before: Targets) -> Targets:
        """Targets within the joints' limits, and no faster than they may be from those before.

        Raises:
          ValueError: a target is NaN.
        """
        limited = {}
        for joint, target in targets.items():
            (low, high, most), last = self._bounds[joint], before[joint]
            if math.isnan(target):
                raise ValueError(f"the policy's target for {joint} is not a number")
            least = min(max(target, low, last - most), high, last + most)
            self.limited[joint] += least != target
            limited[joint] = least
        return limited


def _numbers(value: Any) -> tuple[float, ...]:
    """The numbers of a sensor; none if one of them is not finite, or no number."""
    values = value.values() if isinstance(value, Mapping) else value
    values = values if isinstance(values, Iterable) else (values,)
    try:
        return tuple(values) if math.isfinite(math.hypot(*values)) else ()
    except (TypeError, OverflowError):
        return ()


@dataclasses.dataclass
class LoopReport:
    """How a loop went. Arrays have an entry for each tick under the policy, in s."""

    reason: str = ""
    """Why it ended."""
    fault: bool = False
    """Whether something was wrong."""
    period: float = 0.0
    """Time between ticks, s."""
    missed: int = 0
    """Commands sent more than ``late`` after their deadline, and ticks left out."""
    realtime: bool = False
    """Whether the operating system granted real-time priority."""
    wake: list[float] = dataclasses.field(default_factory=list)
    """From the deadline to the loop's being awake: jitter."""
    act: list[float] = dataclasses.field(default_factory=list)
    """Duration of the policy's steps."""
    sent: list[float] = dataclasses.field(default_factory=list)
    """From the deadline to the command's being sent: latency."""
    silent: int = 0
    """Ticks for which no new sensors had come: the last targets were sent again."""
    limited: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ticks in which a target was limited, by joint."""

    def table(self) -> list[tuple[str, ...]]:
        """Rows of (what, median, 99th percentile, largest), in us."""
        import numpy as np

        rows: list[tuple[str, ...]] = []
        for what, values in (
            ("awake after the deadline (jitter)", self.wake),
            ("the policy's step", self.act),
            ("command sent after the deadline (latency)", self.sent),
        ):
            us = 1e6 * np.array(values or [math.nan])
            rows.append((what, *(f"{x:.0f}" for x in (np.median(us), np.percentile(us, 99), us.max()))))
        return rows


def run_loop(
    policy: Policy,
    robot: Robot,
    config: LoopConfig | None = None,
    operator: Callable[[float], Mapping[str, Any]] = lambda seconds: {},
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda text: None,
) -> LoopReport:
    """Move a robot by a policy at a fixed rate, until the time is up, the operator says stop, or a fault.

    Deadlines are absolute: tick k is due at ``start + k * period``. In each, the newest sensors are read and
    judged, the policy acts (in every n-th, where the loop is n times as fast), its targets are limited and
    sent. First come a soft start from the measured pose to the default pose, last the damping mode, in which
    the servos only brake; into that any fault leads within a tick, and so does an exception.

    Args:
      policy: the policy, or several behind a manager.
      robot: the robot's end.
      config: figures and limits.
      operator: from the time under the policy, s, to what an operator commands: ``command``,
        ``pose_command``.
      stop: asked in every tick; true ends the loop.
      tell: given a line of text when a phase begins.

    Raises:
      ValueError: the rate is no whole multiple of the policy's.
      TimeoutError: no sensors come at all.
    """
    config = config or LoopConfig()
    loop = _Loop(policy, robot, config, ticks_per_step(config.rate, policy.control_dt))
    _wait_for_sensors(robot, loop)
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection takes longer than a tick has to spare
    try:
        with realtime_priority() as loop.report.realtime:
            tell("soft start: from the measured pose to the default pose")
            loop.soft_start(stop)
            if not loop.report.reason:
                tell("policy")
                loop.under_policy(operator, stop)
            tell(f"damping: {loop.report.reason}")
            loop.damp(config.damping_seconds)
    except BaseException:
        loop.command_damping()
        raise
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    loop.report.limited = {joint: n for joint, n in loop.safety.limited.items() if n}
    return loop.report


def ticks_per_step(rate: float, control_dt: float) -> int:
    """How often a loop ticks while its policy acts once; ``ValueError`` if that is no whole number."""
    share = rate * control_dt if rate else 1.0
    if round(share) < 1 or abs(share - round(share)) > 1e-6:
        own = 1.0 / control_dt
        raise ValueError(f"rate={rate:g}: must be a whole multiple of the policy's own, {own:g} Hz")
    return round(share)


class _Loop:
    """What the phases of a loop share: the clock, the last sensors, the last targets."""

    def __init__(self, policy: Policy, robot: Robot, config: LoopConfig, every: int) -> None:
        self.policy, self.robot, self.config, self.every = policy, robot, config, every
        self.period = policy.control_dt / every
        self.timeout = config.sensor_timeout or 0.75 * policy.control_dt
        self.safety = Safety(policy.contract, config, self.period)
        self.report = LoopReport(period=self.period)
        self.sensors: dict[str, Any] = {}
        contract = policy.contract
        self.default = dict(zip(contract["joint_names"], contract["default_joint_pos"], strict=True))
        self.targets: Targets = self.default
        self.received = time.perf_counter()

    def _end(self, reason: object, fault: bool = True) -> None:
        self.report.reason, self.report.fault = str(reason) or repr(reason), fault

    def wait(self, deadline: float) -> float:
        """Sleep, warm the caches, spin; returns the time of waking, at or after the deadline."""
        left = deadline - WARM_UP - time.perf_counter()
        if left > 0.0:
            time.sleep(left)
            self.policy.warm()
        while (now := time.perf_counter()) < deadline:
            pass
        return now

    def listen(self, now: float) -> bool:
        """Take in new sensors if there are any, and judge them; whether there are."""
        try:
            new = self.robot.read()
        except OSError as error:
            self._end(error)
            return False
        if new is None:
            if now - self.received > self.timeout:
                silence = 1e3 * (now - self.received)
                self._end(f"no sensors for {silence:.0f} ms: the robot's end is silent or gone")
            return False
        self.sensors, self.received = new, now
        if wrong := self.safety.judge(new):
            self._end(wrong)
        return True

    def _ticks(self, seconds: float, stop: Callable[[], bool]) -> Iterator[tuple[int, float, float, bool]]:
        """Number, deadline, time of waking and news of each tick, until time is up or something ends it."""
        start, tick = time.perf_counter() + self.period, 0
        while tick * self.period < seconds - 1e-9:
            deadline = start + tick * self.period
            now = self.wait(deadline)
            if not self.report.reason and stop():
                self._end("stopped by the operator", fault=False)
            news = not self.report.reason and self.listen(now)
            if self.report.reason:
                return
            yield tick, deadline, now, news
            late = max(0, math.floor((time.perf_counter() - deadline) / self.period))
            self.report.missed += late  # left out: an old deadline helps nobody
            tick += 1 + late

    def soft_start(self, stop: Callable[[], bool]) -> None:
        if self.report.reason:
            return  # the first sensors were no good: there is no pose to begin at
        begin = self.targets = {joint: float(self.sensors["joint_pos"][joint]) for joint in self.default}
        ticks = round(self.config.soft_start / self.period)
        for tick, *_ in self._ticks((ticks + 1) * self.period if ticks else 0.0, stop):
            share = tick / ticks
            goal = {joint: (1.0 - share) * begin[joint] + share * self.default[joint] for joint in begin}
            self._send("soft start", goal)

    def _send(self, mode: str, goal: Targets) -> None:
        """Send targets as near to a goal as the limits let them be."""
        try:
            self.targets = self.safety.limit(goal, self.targets)
            self.robot.write(mode, self.targets, self.policy.gains)
        except (OSError, ValueError) as error:
            self._end(error)

    def under_policy(self, operator: Callable[[float], Mapping[str, Any]], stop: Callable[[], bool]) -> None:
        report, policy, acted = self.report, self.policy, -self.every
        policy.reset()
        goal = self.targets
        for tick, deadline, now, news in self._ticks(self.config.seconds or math.inf, stop):
            report.silent += not news
            if news and tick - acted >= self.every:
                acted = tick
                given = {**self.sensors, **operator(tick * self.period)}
                known = {name: given[name] for name in ("time", *policy.sensors) if name in given}
                begin = time.perf_counter()
                try:
                    goal = policy.act(known)
                except (ValueError, RuntimeError) as error:
                    self._end(error)
                    return
                report.act.append(time.perf_counter() - begin)
            self._send("policy", goal)
            sent = time.perf_counter() - deadline
            report.wake.append(now - deadline)
            report.sent.append(sent)
            report.missed += self.config.late < sent < self.period
        if not report.reason:
            self._end("the time is up", fault=False)

    def command_damping(self) -> None:
        """The servos brake, and hold nothing."""
        _, damping = self.policy.gains
        limp = dict.fromkeys(self.policy.joint_names, 0.0)
        with contextlib.suppress(OSError):  # the robot's own watchdog brakes it
            self.robot.write("damping", self.targets, (limp, damping))

    def damp(self, seconds: float) -> None:
        for _ in range(max(1, round(seconds / self.period))):
            self.command_damping()
            time.sleep(self.period)


def _wait_for_sensors(robot: Robot, loop: _Loop, seconds: float = 3.0) -> None:
    end = time.perf_counter() + seconds
    while not loop.listen(time.perf_counter()):
        loop.received = time.perf_counter()
        if loop.report.reason or time.perf_counter() > end:
            raise TimeoutError(
                loop.report.reason or f"no sensors within {seconds:g} s: is the robot switched on?"
            )
        time.sleep(0.001)


@contextlib.contextmanager
def realtime_priority() -> Iterator[bool]:
    """Ahead of all that is not real-time, where the operating system permits it."""
    try:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    except (AttributeError, OSError):  # no Linux, or no permission
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, *before)


@contextlib.contextmanager
def operator_stop() -> Iterator[Callable[[], bool]]:
    """Whether the operator has said stop: Ctrl-C, SIGTERM, or Enter in a terminal. A second Ctrl-C is an
    exception, as always; :func:`run_loop` brakes before it goes on."""
    with interrupted() as stopped:

        def wait_for_enter() -> None:
            if sys.stdin.readline():
                stopped.set()

        if sys.stdin is not None and sys.stdin.isatty():
            threading.Thread(target=wait_for_enter, daemon=True).start()
        yield stopped.is_set
