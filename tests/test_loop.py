"""The real-time loop with servos of the test's own in time of its own, and a simulated robot in real time."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kouros.cli import main
from kouros.deploy import loop
from kouros.deploy.export import plain_path
from kouros.deploy.loop import LoopConfig, LoopReport, Safety, operator_stop, realtime_priority, run_loop
from kouros.deploy.runner import PolicyRunner

KNEE = "left_knee_joint"
COMMAND = {"command": [0.5, 0.0, 0.1]}
SHORT = LoopConfig(seconds=0.4, soft_start=0.2, damping_seconds=0.1)
Sensors = dict[str, Any]
Change = Callable[[Sensors], Sensors | None]


class Clock:
    """Time that passes by a little whenever it is asked for, and while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 50.0

    def perf_counter(self) -> float:
        self.now += 1e-5
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half a second each, of all that the tests have made
    return clock


@pytest.fixture(scope="session")
def policy(exported: Path) -> PolicyRunner:
    return PolicyRunner(exported)


class Other:
    """A policy that acts in another way."""

    def __init__(self, policy: PolicyRunner, act: Callable[[Sensors], dict[str, float]]) -> None:
        self._policy, self.act = policy, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


class Servos:
    """A robot whose joints are where they are told to be, and tremble. New sensors every 2 ms.

    From the time ``wrong`` on its sensors are what ``change`` makes of them, None for none.
    """

    def __init__(self, clock: Clock, policy: PolicyRunner) -> None:
        self.clock, self.wrong = clock, math.inf
        self.change: Change = lambda sensors: sensors
        default = policy.contract["default_joint_pos"]
        self.pose = {joint: x + 0.1 for joint, x in zip(policy.joint_names, default, strict=True)}
        self.sent: list[tuple[float, str, dict[str, float], tuple[dict[str, float], dict[str, float]]]] = []
        self.readings: list[tuple[str, Sensors]] = []
        self._sample = -1

    @property
    def modes(self) -> list[str]:
        return [mode for mode, _ in itertools.groupby(mode for _, mode, _, _ in self.sent)]

    def under(self, mode: str) -> list[tuple[float, dict[str, float]]]:
        """Times and targets of all that was sent in a mode."""
        return [(when, targets) for when, its, targets, _ in self.sent if its == mode]

    def read(self) -> Sensors | None:
        sample = int(self.clock.now / 0.002)
        if sample == self._sample:
            return None
        self._sample, tremble = sample, 1e-4 * math.sin(sample)
        sensors: Sensors = {
            "time": 7.0 + 0.002 * sample,
            "base_ang_vel": [tremble, -tremble, 0.1],
            "projected_gravity": [tremble, 0.0, -1.0],
            "joint_pos": {joint: x + tremble for joint, x in self.pose.items()},
            "joint_vel": dict.fromkeys(self.pose, tremble),
        }
        changed = self.change(sensors) if self.clock.now >= self.wrong else sensors
        if changed is not None:
            self.readings.append((self.sent[-1][1] if self.sent else "", changed))
        return changed

    def write(self, mode: str, targets: dict[str, float], gains: Any) -> None:
        assert targets.keys() == self.pose.keys()
        self.sent.append((self.clock.now, mode, dict(targets), gains))
        if mode != "damping":
            self.pose = dict(targets)


@pytest.fixture
def robot(clock: Clock, policy: PolicyRunner) -> Servos:
    return Servos(clock, policy)


def commanded(seconds: float) -> dict[str, Any]:
    return COMMAND


def run(policy: Any, robot: Servos, config: LoopConfig = SHORT, **options: Any) -> LoopReport:
    return run_loop(policy, robot, config, **{"operator": commanded, **options})


def braked(robot: Servos, policy: PolicyRunner) -> None:
    """The last that was sent, for as long as it is to be, is damping: no stiffness, and finite targets."""
    _, damping = policy.gains
    ends = robot.sent[-round(SHORT.damping_seconds / 0.02) :]
    assert len(robot.under("damping")) == len(ends) == 5
    for _, mode, targets, (stiffness, its_damping) in ends:
        assert mode == "damping"
        assert stiffness == dict.fromkeys(policy.joint_names, 0.0) and its_damping == damping
        assert all(map(math.isfinite, targets.values()))


class TestPhases:
    def test_come_in_order_and_on_time(self, policy: PolicyRunner, robot: Servos) -> None:
        told: list[str] = []
        report = run(policy, robot, tell=told.append)
        assert robot.modes == ["soft start", "policy", "damping"]
        assert [line.partition(":")[0] for line in told] == robot.modes
        assert (report.reason, report.fault, report.missed, report.silent) == ("the time is up", False, 0, 0)
        assert len(robot.under("soft start")) == 11 and len(robot.under("policy")) == 20
        for mode in ("soft start", "policy"):
            times = np.array([when for when, _ in robot.under(mode)])
            np.testing.assert_allclose(times, times[0] + 0.02 * np.arange(len(times)), atol=2e-4)
        assert len(report.wake) == len(report.act) == len(report.sent) == 20
        assert 0.0 <= max(report.wake) < 1e-4 and 0.0 < max(report.sent) < 2e-4
        gains = [gains for _, mode, _, gains in robot.sent if mode != "damping"]
        assert all(its == policy.gains for its in gains)
        braked(robot, policy)

    def test_soft_start_goes_from_the_measured_pose_to_the_default(
        self, policy: PolicyRunner, robot: Servos
    ) -> None:
        run(policy, robot)
        measured = robot.readings[0][1]["joint_pos"]
        default = dict(zip(policy.joint_names, policy.contract["default_joint_pos"], strict=True))
        poses = [targets for _, targets in robot.under("soft start")]
        for k, pose in enumerate(poses):
            for joint, target in pose.items():
                between = measured[joint] + k / 10 * (default[joint] - measured[joint])
                assert target == pytest.approx(between, abs=1e-12)
        assert poses[0] == measured and poses[-1] == default

    def test_without_a_soft_start_the_policy_begins(self, policy: PolicyRunner, robot: Servos) -> None:
        run(policy, robot, dataclasses.replace(SHORT, soft_start=0.0))
        assert robot.modes == ["policy", "damping"]

    @pytest.mark.parametrize(("rate", "every"), [(0.0, 1), (50.0, 1), (100.0, 2), (200.0, 4)])
    def test_a_policy_keeps_its_own_rate(
        self, exported: Path, policy: PolicyRunner, robot: Servos, rate: float, every: int
    ) -> None:
        """In every n-th tick, on that tick's sensors; in between its targets are held. As a twin has it."""
        free = dataclasses.replace(SHORT, rate=rate, joint_margin=9.0, speed_factor=99.0)
        seconds: list[float] = []
        report = run(policy, robot, free, operator=lambda s: seconds.append(s) or COMMAND)
        assert report.period == pytest.approx(0.02 / every)
        sent = [targets for _, targets in robot.under("policy")]
        assert len(sent) == 20 * every and len(report.act) == 20
        assert seconds == pytest.approx(0.02 * np.arange(20))
        twin = PolicyRunner(exported)
        # What was read before the first of the policy's commands, and after each but the last.
        mine = [mode == "policy" for mode, _ in robot.readings]
        first = mine.index(True) - 1
        read = [sensors for _, sensors in robot.readings[first : first + len(sent)]]
        for k, sensors in enumerate(read[::every]):
            known = {name: ({**sensors, **COMMAND})[name] for name in ("time", *twin.sensors)}
            expected = twin.act(known)
            assert sent[every * k : every * (k + 1)] == [expected] * every

    @pytest.mark.parametrize("rate", [25.0, 49.0, 75.0, 1e-9])
    def test_other_rates_are_refused(self, policy: PolicyRunner, robot: Servos, rate: float) -> None:
        with pytest.raises(
            ValueError, match=rf"rate={rate:g}: must be a whole multiple of the policy's own, 50 Hz"
        ):
            run(policy, robot, LoopConfig(rate=rate))
        assert not robot.sent

    def test_late_ticks_are_left_out_and_counted(self, policy: PolicyRunner, robot: Servos) -> None:
        """A stall of three and a half periods: the next tick is on the old grid, and none is caught up."""
        clock, stalled = robot.clock, {5: 0.07, 12: 0.003}

        def operator(seconds: float) -> dict[str, Any]:
            clock.now += stalled.pop(round(seconds / 0.02), 0.0)
            return COMMAND

        report = run(policy, robot, operator=operator)
        times = np.array([when for when, _ in robot.under("policy")])
        ticks = (times - times[0]) / 0.02
        assert len(times) == 17 and not stalled
        assert report.missed == 3 + 1  # and the one that was merely late
        late = np.flatnonzero(np.abs(ticks - ticks.round()) > 0.05)
        assert ticks[late] == pytest.approx([5 + 3.5, 12.15], abs=0.01)
        assert ticks[6:] == pytest.approx([9, 10, 11, 12.15, *range(13, 20)], abs=0.01)
        assert report.reason == "the time is up" and ticks[-1] == pytest.approx(19, abs=0.01)

    def test_a_late_tick_delays_no_step_of_the_policy(self, policy: PolicyRunner, robot: Servos) -> None:
        """At four times its rate: it acts when a period has gone by, whatever was left out."""
        clock, steps = robot.clock, []

        def operator(seconds: float) -> dict[str, Any]:
            steps.append(seconds)
            clock.now += 0.013 if len(steps) == 3 else 0.0
            return COMMAND

        run(policy, robot, dataclasses.replace(SHORT, rate=200.0), operator=operator)
        assert steps == pytest.approx(0.02 * np.arange(20))

    def test_ticks_without_news_repeat_the_targets(self, policy: PolicyRunner, robot: Servos) -> None:
        """As long as the last sensors are young enough."""
        config = dataclasses.replace(SHORT, sensor_timeout=0.05)
        robot.wrong, robot.change = robot.clock.now + 0.3, lambda sensors: None
        report = run(policy, robot, config)
        assert report.silent == 2 and report.fault
        *_, before, again, last = [targets for _, targets in robot.under("policy")]
        assert before == again == last


def gone(sensors: Sensors) -> None:
    raise ConnectionError("the robot refuses: it is tired")


def frozen(name: str) -> Change:
    memory: list[Any] = []

    def change(sensors: Sensors) -> Sensors:
        memory.append(sensors[name])
        return {**sensors, name: memory[0]}

    return change


def put(name: str, value: Any) -> Change:
    return lambda sensors: {**sensors, name: value}


def put_joint(name: str, joint: str, value: float) -> Change:
    return lambda sensors: {**sensors, name: {**sensors[name], joint: value}}


def less(these: Sensors, name: str) -> Sensors:
    return {key: value for key, value in these.items() if key != name}


# Each made anew for each robot, since some remember; and what is said of it.
FAULTS: dict[str, tuple[Callable[[], Change], str]] = {
    "no sensors": (lambda: lambda s: None, r"no sensors for \d\d ms: the robot's end is silent or gone"),
    "time stands still": (lambda: frozen("time"), r"stale sensors: time=(\d+\.\d+) came after \1"),
    "time goes back": (lambda: put("time", 1.5), r"stale sensors: time=1\.5 came after"),
    "time is a word": (lambda: put("time", "now"), "time holds what is no finite number"),
    "a frozen sensor": (lambda: frozen("base_ang_vel"), "base_ang_vel is frozen: the same numbers 2 times"),
    "frozen joints": (lambda: frozen("joint_pos"), "joint_pos is frozen: the same numbers 2 times"),
    "nan": (lambda: put("base_ang_vel", [0.0, math.nan, 0.0]), "base_ang_vel holds what is no finite numb"),
    "a joint of nan": (lambda: put_joint("joint_vel", KNEE, math.nan), "joint_vel holds what is no finite"),
    "inf": (lambda: put_joint("joint_pos", KNEE, -math.inf), "joint_pos holds what is no finite number"),
    "null": (lambda: put("projected_gravity", None), "projected_gravity holds what is no finite number"),
    "a missing sensor": (lambda: lambda s: less(s, "projected_gravity"), "projected_gravity is missing"),
    "no time": (lambda: lambda s: less(s, "time"), "time is missing"),
    "a missing joint": (
        lambda: lambda s: {**s, "joint_pos": less(s["joint_pos"], KNEE)},
        "joint_pos is not of the policy's joints",
    ),
    "another joint": (lambda: put_joint("joint_vel", "tail", 0.0), "joint_vel is not of the policy's joints"),
    "joints by place": (lambda: put("joint_vel", [0.0] * 29), "joint_vel is not of the policy's joints"),
    "too fast": (
        lambda: put_joint("joint_vel", KNEE, -90.0),
        rf"{KNEE} turns at -90\.0 rad/s, more than \d\d\.\d",
    ),
    "fallen": (lambda: put("projected_gravity", [0.9, 0.0, -0.43]), "the robot has fallen"),
    "refused": (lambda: gone, "the robot refuses: it is tired"),
}


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_lead_into_damping_within_two_periods(
        self, policy: PolicyRunner, robot: Servos, fault: str
    ) -> None:
        """In the soft start and under the policy; by name, and without an exception."""
        make, message = FAULTS[fault]
        for after, last in ((0.11, "soft start"), (0.37, "policy")):
            robot.__init__(robot.clock, policy)  # type: ignore[misc]
            robot.wrong, robot.change = robot.clock.now + after, make()
            report = run(policy, robot)
            assert report.fault and re.match(message, report.reason), report.reason
            assert robot.modes[-2:] == [last, "damping"]
            assert 0.0 <= robot.under("damping")[0][0] - robot.wrong <= 2 * 0.02
            braked(robot, policy)

    def test_a_sensor_that_only_the_policy_wants(self, policy: PolicyRunner, robot: Servos) -> None:
        robot.wrong, robot.change = robot.clock.now + 0.1, lambda sensors: less(sensors, "base_ang_vel")
        report = run(policy, robot)
        assert report.fault and report.reason.startswith("sensors: 'base_ang_vel' is missing; expected")
        assert robot.modes == ["soft start", "damping"]
        braked(robot, policy)

    @pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("no sensors", "refused")])
    def test_at_the_very_beginning_nothing_else_is_sent(
        self, policy: PolicyRunner, robot: Servos, fault: str
    ) -> None:
        make, message = FAULTS[fault]
        if re.search("came after|frozen", message):
            return  # two readings tell it, not one
        robot.wrong, robot.change = 0.0, make()
        report = run(policy, robot)
        assert report.fault and re.match(message, report.reason), report.reason
        assert robot.modes == ["damping"]
        braked(robot, policy)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [(RuntimeError("has diverged"), "has diverged"), (ValueError(), "ValueError()")],
        ids=["said", "unsaid"],
    )
    def test_a_policy_that_fails(self, policy: PolicyRunner, robot: Servos, error, reason: str) -> None:
        def act(sensors: Sensors) -> dict[str, float]:
            if len(robot.under("policy")) == 7:
                raise error
            return policy.act(sensors)

        report = run(Other(policy, act), robot)
        assert (report.reason, report.fault) == (reason, True)
        assert len(robot.under("policy")) == 7
        braked(robot, policy)

    def test_a_target_that_is_no_number(self, policy: PolicyRunner, robot: Servos) -> None:
        """It is never sent."""
        report = run(Other(policy, lambda sensors: {**robot.pose, KNEE: math.nan}), robot)
        assert report.fault and report.reason == f"the policy's target for {KNEE} is not a number"
        assert robot.modes == ["soft start", "damping"]
        braked(robot, policy)

    def test_a_robot_that_cannot_be_written_to(self, policy: PolicyRunner, robot: Servos) -> None:
        """The loop ends, and says the first reason."""
        writing, reasons = robot.write, iter(["the cable is cut", *30 * ["still cut"]])

        def write(mode: str, targets: dict[str, float], gains: Any) -> None:
            if len(robot.under("policy")) == 4:
                raise OSError(next(reasons))
            writing(mode, targets, gains)

        robot.write = write  # type: ignore[method-assign]
        report = run(policy, robot)
        assert (report.reason, report.fault) == ("the cable is cut", True)

    def test_no_robot_at_all(self, policy: PolicyRunner, robot: Servos) -> None:
        robot.wrong, robot.change = 0.0, lambda sensors: None
        begin = robot.clock.now
        with pytest.raises(TimeoutError, match="no sensors within 3 s: is the robot switched on"):
            run(policy, robot)
        assert 3.0 < robot.clock.now - begin < 3.1 and not robot.sent
        robot.change = gone
        with pytest.raises(TimeoutError, match="the robot refuses: it is tired"):
            run(policy, robot)

    def test_a_quiet_robot_is_not_frozen_if_that_is_said(self, policy: PolicyRunner, robot: Servos) -> None:
        for frozen_after, fault in ((0, False), (3, True)):
            robot.wrong, robot.change = robot.clock.now + 0.3, frozen("joint_vel")
            report = run(policy, robot, dataclasses.replace(SHORT, frozen_after=frozen_after))
            assert report.fault == fault
        assert "the same numbers 4 times" in report.reason

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_whatever_is_sent_is_judged(self, policy: PolicyRunner, data: st.DataObject) -> None:
        """Anything that JSON can say is proper or is called by name; nothing is an exception."""
        values = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=6,
        )
        good = Servos(Clock(), policy).read()
        assert good
        names = st.sampled_from([*good, "lidar", ""])
        sensors = {**good, **data.draw(st.dictionaries(names, values | st.sampled_from([*good.values()])))}
        for name in data.draw(st.sets(st.sampled_from([*good]), max_size=2)):
            sensors.pop(name)
        safety = Safety(policy.contract, SHORT, 0.02)
        assert safety.judge(good) == ""
        assert isinstance(safety.judge({**sensors, "time": good["time"] + 1.0}), str)
        assert isinstance(safety.judge(sensors), str)

    def test_sensors_may_be_arrays(self, policy: PolicyRunner, robot: Servos) -> None:
        def as_arrays(sensors: Sensors) -> Sensors:
            return {k: np.array(v) if isinstance(v, list) else v for k, v in sensors.items()}

        robot.wrong, robot.change = 0.0, as_arrays
        assert run(policy, robot).reason == "the time is up"


class TestEnds:
    @pytest.mark.parametrize(("after", "last"), [(0.1, "soft start"), (0.5, "policy")])
    def test_the_operator_says_stop(
        self, policy: PolicyRunner, robot: Servos, after: float, last: str
    ) -> None:
        when = robot.clock.now + after
        report = run(policy, robot, stop=lambda: robot.clock.now > when)
        assert (report.reason, report.fault) == ("stopped by the operator", False)
        assert robot.modes[-2:] == [last, "damping"]
        assert robot.under("damping")[0][0] - when < 0.03
        braked(robot, policy)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError("x"), SystemExit])
    @pytest.mark.parametrize("where", ["read", "operator", "stop", "act", "tell"])
    def test_an_exception_brakes_before_it_goes_on(
        self, policy: PolicyRunner, robot: Servos, where: str, error
    ) -> None:
        """And leaves no trace in the interpreter."""
        when = robot.clock.now + 0.5

        def raising(inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if robot.clock.now > when:
                    raise error
                return inner(*args)

            return call

        options = {"operator": commanded, "stop": lambda: False, "tell": lambda text: None}
        if where in options:
            options[where] = raising(options[where])
        elif where == "read":
            robot.read = raising(robot.read)  # type: ignore[method-assign]
        acting = Other(policy, raising(policy.act)) if where == "act" else policy
        before = interpreter()
        with pytest.raises(error if isinstance(error, type) else type(error)):
            run(acting, robot, **options)
        assert interpreter() == before
        _, mode, _, (stiffness, _) = robot.sent[-1]
        assert mode == "damping" and set(stiffness.values()) == {0.0}

    @pytest.mark.parametrize("collecting", [True, False])
    def test_the_interpreter_is_as_it_was(
        self, policy: PolicyRunner, robot: Servos, collecting: bool
    ) -> None:
        inside: list[bool] = []
        (gc.enable if collecting else gc.disable)()
        try:
            before = interpreter()
            report = run(policy, robot, tell=lambda text: inside.append(gc.isenabled()))
            assert interpreter() == before
        finally:
            gc.enable()
        assert inside == [False] * 3
        with realtime_priority() as granted:
            assert report.realtime == granted == (os.sched_getscheduler(0) == os.SCHED_FIFO)
        assert interpreter() == before or not collecting


def interpreter() -> tuple[Any, ...]:
    priority = os.sched_getparam(0).sched_priority
    return gc.isenabled(), gc.get_freeze_count(), os.sched_getscheduler(0), priority


class TestLimits:
    @settings(max_examples=100, deadline=None)
    @given(
        margin=st.sampled_from([0.0, 0.1]),
        factor=st.floats(0.1, 2.0),
        wild=arrays(np.float64, (3, 29), elements=st.floats(allow_nan=False) | st.floats(-3, 3)),
    )
    def test_hold_for_any_targets(
        self, policy: PolicyRunner, margin: float, factor: float, wild: np.ndarray
    ) -> None:
        """Within the range, no faster than allowed, and otherwise as near to the target as can be."""
        contract, names = policy.contract, policy.joint_names
        safety = Safety(contract, LoopConfig(joint_margin=margin, speed_factor=factor), 0.02)
        low, high = np.add(np.array(contract["joint_range"]).T, [[-margin], [margin]])
        most = factor * np.array(contract["velocity_limit"]) * 0.02
        before, changed = np.array(contract["default_joint_pos"]), np.zeros(29, int)
        for row in wild:
            given = (dict(zip(names, values.tolist(), strict=True)) for values in (row, before))
            limited = safety.limit(*given)
            found = np.array([limited[name] for name in names])
            expected = np.clip(row, np.maximum(low, before - most), np.minimum(high, before + most))
            np.testing.assert_allclose(found, expected, atol=1e-12)
            assert (low <= found).all() and (found <= high).all()
            changed += found != row
            before = found
        assert list(safety.limited.values()) == changed.tolist()

    def test_hold_for_all_that_is_sent(self, policy: PolicyRunner, robot: Servos) -> None:
        """From a limp pose beyond the range, in a hurry, by a wild policy, at four times its rate."""
        contract, random = policy.contract, np.random.default_rng(0)
        ranges = dict(zip(policy.joint_names, contract["joint_range"], strict=True))
        speeds = dict(zip(policy.joint_names, contract["velocity_limit"], strict=True))
        robot.pose = {name: high + 0.01 for name, (_, high) in ranges.items()}
        wild = Other(policy, lambda sensors: dict(zip(ranges, random.normal(0.0, 9.0, 29), strict=True)))
        config = dataclasses.replace(SHORT, soft_start=0.02, rate=200.0, frozen_after=0, speed_factor=0.8)
        report = run(wild, robot, config)
        sent = [targets for _, mode, targets, _ in robot.sent if mode != "damping"]
        assert len(sent) == 5 + 80
        for a, b in itertools.pairwise(sent):
            for name, (low, high) in ranges.items():
                assert low <= b[name] <= high
                assert abs(b[name] - a[name]) <= 0.8 * speeds[name] * 0.005 + 1e-12
        assert report.limited.keys() == set(ranges)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": 0.0}, r"seconds=0\.0: must be greater than 0"),
        ({"rate": -1.0}, r"rate=-1\.0: must not be negative"),
        ({"rate": math.nan}, "rate=nan: must be finite"),
        ({"soft_start": -0.1}, r"soft_start=-0\.1: must not be negative"),
        ({"fall_tilt": 0.0}, r"fall_tilt=0\.0: must be greater than 0"),
        ({"speed_factor": 0.0}, r"speed_factor=0\.0: must be greater"),
        ({"frozen_after": 0.5}, r"frozen_after=0\.5: must be a whole number"),
        ({"joint_margin": math.inf}, "joint_margin=inf: must be finite"),
    ],
)
def test_bad_figures(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**fields)


def test_a_table_of_percentiles() -> None:
    times = [1e-6 * k for k in range(1, 101)]
    rows = LoopReport(wake=times, act=[5e-6], sent=[]).table()
    assert [row[1:] for row in rows] == [("50", "99", "100"), ("5", "5", "5"), ("nan", "nan", "nan")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_operator_says_stop_with_a_signal(number: signal.Signals) -> None:
    """The second one is an exception, and all is as it was afterwards."""
    before = signal.getsignal(number)
    with operator_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


# From here on in real time, through the command line, against a process of its own. A stall of the machine is
# not what is tested.
PATIENT = "--sensor-timeout=0.3"
BRIEF = ("--soft-start=0.3", "--damping-seconds=0.1", PATIENT)


def kouros(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kouros.cli", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
    )


@dataclasses.dataclass
class Done:
    code: int
    out: str
    err: str

    @classmethod
    def of(cls, process: subprocess.Popen[str], before: str = "") -> Done:
        out, err = process.communicate(timeout=60)
        return cls(process.returncode, before + out, err)

    def braked(self, reason: str) -> None:
        """By a fault of that name, in good order."""
        assert self.code == 1, self.err
        assert re.fullmatch(f"kouros: the robot was braked: {reason}\n", self.err), self.err
        assert re.search(f"damping: {reason}\n", self.out), self.out

    def well(self, reason: str) -> None:
        assert self.code == 0 and self.err == "", self.err
        assert f"damping: {reason}\n" in self.out


def until(process: subprocess.Popen[str], line: str) -> str:
    """What a process has printed up to a line."""
    assert process.stdout
    read = ""
    for found in process.stdout:
        read += found
        if found == f"{line}\n":
            return read
    raise AssertionError(read + (process.stderr.read() if process.stderr else ""))


@contextlib.contextmanager
def simulated() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A simulated robot that is there already, and its address."""
    command = [sys.executable, "-m", "kouros.deploy.simulator", "--parent", str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


# What is said of each fault of the simulated robot.
SAID = {
    "silent": r"no sensors for 3\d\d ms: the robot's end is silent or gone",
    "garbage": r"no sensors for 3\d\d ms: the robot's end is silent or gone",
    "killed": r"no sensors for 3\d\d ms: the robot's end is silent or gone",
    "frozen": "joint_pos is frozen: the same numbers 2 times",
    "nan": "base_ang_vel holds what is no finite number",
}


@pytest.fixture(scope="module")
def done(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Done, Path]]:
    """A run with each fault, and one without, two at a time."""
    folder = tmp_path_factory.mktemp("loop")

    def one(fault: str) -> tuple[Done, Path]:
        path = folder / f"{fault}.json"
        options = (f"--fault={fault}", "--fault-after=0.5", "--seconds=2", f"--output={path}")
        return Done.of(kouros("run", exported, *BRIEF, *options)), path

    with ThreadPoolExecutor(2) as pool:
        names = ("none", *SAID)
        return dict(zip(names, pool.map(one, names), strict=True))


class TestRun:
    def test_survives(self, done: dict[str, tuple[Done, Path]]) -> None:
        result, path = done["none"]
        result.well("the time is up")
        lines = result.out.splitlines()
        assert lines[0].startswith("soft start") and lines[1] == "policy"
        assert "command sent after the deadline" in result.out
        report = json.loads(path.read_text())
        assert report["fault"] is False and report["period"] == 0.02
        assert 80 < len(report["sent"]) <= 100

    @pytest.mark.parametrize("fault", SAID)
    def test_a_fault_brakes(self, done: dict[str, tuple[Done, Path]], fault: str) -> None:
        result, path = done[fault]
        result.braked(SAID[fault])
        report = json.loads(path.read_text())
        assert report["fault"] is True
        assert 10 < len(report["sent"]) < 90  # neither at once nor at the end
        garbage = re.search(r"datagrams that were no messages: (\d+)", result.out)
        assert garbage and (int(garbage[1]) > 0) == (fault == "garbage")

    def test_the_operator_stops_it(self, exported: Path) -> None:
        process = kouros("run", exported, *BRIEF)
        before = until(process, "policy")
        process.send_signal(signal.SIGINT)
        Done.of(process, before).well("stopped by the operator")

    def test_a_second_controller_is_refused_and_a_killed_robot_noticed(self, exported: Path) -> None:
        """The first goes on meanwhile, until its robot is gone for good."""
        with simulated() as (robot, address):
            args = ("run", exported, *BRIEF, "--robot=udp", f"--address={address}")
            first = kouros(*args)
            before = until(first, "policy")
            second = Done.of(kouros(*args))
            assert second.code == 1 and second.out == ""
            assert re.fullmatch(
                rf"kouros: {address} refuses: 127\.0\.0\.1:\d+ controls this robot\n", second.err
            )
            assert first.poll() is None
            robot.send_signal(signal.SIGKILL)
            Done.of(first, before).braked(SAID["killed"])

    def test_a_simulated_robot_goes_with_its_run(self, exported: Path) -> None:
        """Even if nobody could tell it to."""
        process = kouros("run", exported, *BRIEF)
        until(process, "policy")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.communicate()
        end = time.monotonic() + 20
        while Path(f"/proc/{child}").exists() and "Z (" not in Path(f"/proc/{child}/stat").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["nothing.onnx"], r"nothing\.onnx: no such file; kouros export writes one"),
            (["cut.onnx"], r"cut\.onnx: cut short or damaged; export the policy again|damaged, its digest"),
            (["policy.plain.onnx"], r"policy policy\.plain\.onnx: a plain network; run the policy file besi"),
            (["policy.onnx", "--rate=70"], "rate=70: must be a whole multiple of the policy's own, 50 Hz"),
            (["policy.onnx", "--rate=25"], "rate=25: must be a whole multiple"),
        ],
    )
    def test_errors_come_before_any_process(
        self, exported: Path, tmp_path: Path, monkeypatch, capsys, no_process: None, args: list[str], message
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for path in (exported, plain_path(exported)):
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:-100])
        assert main(["run", *args]) == 1
        captured = capsys.readouterr()
        assert re.search(f"^kouros: .*({message})", captured.err) and captured.err.count("\n") == 1
        assert captured.out == ""

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--address=robot"], "address='robot': must be HOST:PORT"),
            (["--address=robot:port"], "address='robot:port': must be HOST:PORT"),
            (["--address=:47470"], "address=':47470': must be HOST:PORT"),
            (["--address=robot:70000"], "must be HOST:PORT"),
            (["--rate=-50"], "rate=-50.0: must not be negative"),
            (["--rate=nan"], "rate=nan: must be finite"),
            (["--rate=fast"], "fast"),
            (["--command", "1", "0", "inf"], "must be finite"),
            (["--seconds=0"], "seconds=0.0: must be greater than 0"),
            (["--fault=asleep"], "asleep"),
            (["--speed-factor=0"], "speed_factor=0.0: must be greater than 0"),
        ],
    )
    def test_bad_options(self, capsys, no_process: None, args: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(["run", "policy.onnx", *args])
        assert exit_.value.code
        captured = capsys.readouterr()
        assert message in " ".join((captured.out + captured.err).replace("│", "").split())

    def test_nobody_at_the_address(self, exported: Path, capsys, no_process: None, monkeypatch) -> None:
        from kouros.deploy import udp

        monkeypatch.setattr(udp.UdpRobot.__init__, "__defaults__", (0.2,))
        assert main(["run", str(exported), "--robot=udp", "--address=127.0.0.1:9"]) == 1
        error = "kouros: 127.0.0.1:9: no robot answers within 0.2 s; is its end running there?\n"
        assert capsys.readouterr().err == error

    def test_help_names_every_option(self, capsys) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(["run", "--help"])
        assert not exit_.value.code
        text = capsys.readouterr().out
        for field in dataclasses.fields(LoopConfig):
            assert f"--{field.name.replace('_', '-')}" in text
        for name in ("--robot", "--address", "--command", "--fault", "--fault-after", "--push", "--output"):
            assert name in text
