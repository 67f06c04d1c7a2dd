"""Both ends of a robot over UDP, on real sockets and with a clock of the test's own."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kouros.deploy import udp
from kouros.deploy.udp import GONE, LARGEST_MESSAGE, Address, RobotServer, UdpRobot, decode, encode

JOINTS = ("knee", "hip")
CONTRACT = {"robot": "g1", "joint_names": list(JOINTS), "control_dt": 0.02}
GAINS = ({"knee": 100.0, "hip": 80.0}, {"knee": 2.0, "hip": 1.5})
SENSORS = {
    "time": 12.3,
    "base_ang_vel": [0.1, -0.2, 1 / 3],
    "joint_pos": {"hip": 0.25, "knee": -1e-7},
}
COMMAND: dict[str, Any] = {"mode": "policy", "targets": {"knee": 0.5, "hip": -0.1}}
COMMAND |= dict(zip(("stiffness", "damping"), GAINS, strict=True))
# The fixtures are good for all examples: whatever comes, they stay as they are.
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Clock:
    """Time that passes only while somebody sleeps, and others do their work."""

    def __init__(self) -> None:
        self.now, self.meanwhile = 100.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(udp, "time", clock)
    return clock


@pytest.fixture
def server(clock: Clock) -> Iterator[RobotServer]:
    """A robot's end that looks for messages while others wait."""
    with contextlib.closing(RobotServer("g1", JOINTS, port=0)) as server:
        clock.meanwhile = server.poll
        yield server


@pytest.fixture
def robot(server: RobotServer) -> Iterator[UdpRobot]:
    """Its controller."""
    with contextlib.closing(UdpRobot(server.address, CONTRACT)) as robot:
        yield robot


def command(robot: UdpRobot, mode: str = "policy") -> None:
    robot.write(mode, COMMAND["targets"], GAINS)


def place(robot: UdpRobot) -> Address:
    """Where a controller's end is."""
    return robot._socket.getsockname()


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.setblocking(False)
        yield stranger


def refusal(stranger: socket.socket) -> str:
    message = decode(stranger.recv(LARGEST_MESSAGE))
    assert message and message["type"] == "refused"
    return message["reason"]


class TestMeeting:
    def test_both_hear_each_other_exactly(self, server: RobotServer, robot: UdpRobot) -> None:
        assert server.controller == place(robot)
        assert robot.read() is None
        server.send_sensors(SENSORS)
        assert robot.read() == SENSORS
        assert robot.read() is None and server.poll() is None
        command(robot)
        assert server.poll() == {"kouros": 1, "type": "command", **COMMAND}
        assert server.poll() is None
        assert robot.garbage == 0

    def test_the_newest_counts(self, server: RobotServer, robot: UdpRobot) -> None:
        for k in range(5):
            server.send_sensors({"time": float(k)})
            command(robot, f"mode {k}")
        assert robot.read() == {"time": 4.0}
        newest = server.poll()
        assert newest and newest["mode"] == "mode 4"

    def test_another_robot(self, server: RobotServer) -> None:
        with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:\d+ refuses: this is a 'g1', not a 'h1'"):
            UdpRobot(server.address, {**CONTRACT, "robot": "h1"})
        assert server.controller is None

    def test_other_joints(self, server: RobotServer) -> None:
        with pytest.raises(ConnectionError, match=r"has other joints than the policy: ankle, hip$"):
            UdpRobot(server.address, {**CONTRACT, "joint_names": ["knee", "ankle"]})

    @pytest.mark.parametrize(
        ("welcome", "message"),
        [
            ({"robot": "h1", "joint_names": list(JOINTS)}, "is a 'h1', the policy was trained on 'g1'"),
            ({}, "is a None, the policy was trained"),
            ({"robot": "g1"}, "has other joints than the policy: hip, knee"),
            ({"robot": "g1", "joint_names": 2}, "has other joints"),
            ({"robot": "g1", "joint_names": [["knee"], None, 3]}, "has other joints"),
            ({"robot": "g1", "joint_names": {"knee": 1, "hip": 2}}, "has other joints"),
        ],
    )
    def test_whoever_answers_is_looked_at(
        self, clock: Clock, stranger: socket.socket, welcome: dict[str, Any], message: str
    ) -> None:
        def answer() -> None:
            _, sender = stranger.recvfrom(LARGEST_MESSAGE)
            stranger.sendto(encode("welcome", **welcome), sender)

        clock.meanwhile = answer
        with pytest.raises(ConnectionError, match=message):
            UdpRobot(stranger.getsockname(), CONTRACT)

    def test_nobody_is_there(self, stranger: socket.socket) -> None:
        """Nothing listens, or what listens says nothing; by the clock on the wall."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            nothing = closed.getsockname()
        for address in (nothing, stranger.getsockname()):
            begin = time.monotonic()
            with pytest.raises(ConnectionError, match=rf"{address[1]}: no robot answers within 0\.2 s; is"):
                UdpRobot(address, CONTRACT, timeout=0.2)
            assert 0.2 <= time.monotonic() - begin < 2.0

    def test_an_address_that_cannot_be(self) -> None:
        with pytest.raises(ConnectionError, match=r"^255\.255\.255\.255:5: Permission denied"):
            UdpRobot(("255.255.255.255", 5), CONTRACT)

    def test_a_robot_that_comes_later_is_found(self, clock: Clock) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            address = free.getsockname()
        servers: list[RobotServer] = []

        def later() -> None:
            if clock.now > 101.0 and not servers:
                servers.append(RobotServer("g1", JOINTS, port=address[1]))
            for server in servers:
                server.poll()

        clock.meanwhile = later
        with contextlib.closing(UdpRobot(address, CONTRACT)):
            assert 101.0 < clock.now < 101.2
        servers[0].close()

    @pytest.mark.parametrize(
        "period", [None, "fast", [0.02], 0.0, -1.0, math.nan, math.inf, 1.5, pytest.param(10**400, id="huge")]
    )
    def test_a_period_that_is_none(self, server: RobotServer, stranger: socket.socket, period: Any) -> None:
        stranger.sendto(encode("hello", robot="g1", control_dt=period), server.address)
        assert server.poll() is None
        assert refusal(stranger).endswith("must lie in (0, 1] s") and server.controller is None


class TestOneController:
    def test_a_second_one_is_refused(self, server: RobotServer, robot: UdpRobot) -> None:
        """By the first one's address; and the first goes on undisturbed."""
        host, port = place(robot)
        for _ in range(3):
            with pytest.raises(ConnectionError, match=f"refuses: {host}:{port} controls this robot"):
                UdpRobot(server.address, CONTRACT)
            assert server.controller == place(robot)
            server.send_sensors(SENSORS)
            assert robot.read() == SENSORS
            command(robot)
            newest = server.poll()
            assert newest and newest["mode"] == "policy"

    def test_commands_of_others_move_nothing(
        self, server: RobotServer, robot: UdpRobot, stranger: socket.socket
    ) -> None:
        for kind, content in (("command", COMMAND), ("bye", {}), ("sensors", SENSORS)):
            stranger.sendto(encode(kind, **content), server.address)
            assert server.poll() is None
            assert refusal(stranger) == "another controller has this robot"
        assert server.controller == place(robot) and robot.read() is None

    def test_without_a_hello_there_is_no_command(self, server: RobotServer, stranger: socket.socket) -> None:
        stranger.sendto(encode("command", **COMMAND), server.address)
        assert server.poll() is None
        assert refusal(stranger) == "say hello first"
        server.send_sensors(SENSORS)
        with pytest.raises(BlockingIOError):
            stranger.recv(LARGEST_MESSAGE)

    def test_after_a_goodbye_another_may_come(self, server: RobotServer, robot: UdpRobot) -> None:
        command(robot)
        robot.close()
        assert server.poll() == {"mode": "damping"}
        assert server.controller is None
        with contextlib.closing(UdpRobot(server.address, CONTRACT)) as second:
            assert server.controller == place(second)

    def test_after_a_silence_another_may_come(
        self, server: RobotServer, robot: UdpRobot, clock: Clock
    ) -> None:
        """And the first hears that it has lost the robot."""
        command(robot)
        server.poll()
        clock.now += 0.9 * GONE
        with pytest.raises(ConnectionError, match="controls this robot"):
            UdpRobot(server.address, CONTRACT)
        clock.now += 0.1 * GONE
        with contextlib.closing(UdpRobot(server.address, CONTRACT)) as second:
            assert server.controller == place(second)
            assert robot.read() is None
            command(robot)
            assert server.poll() is None
            with pytest.raises(ConnectionError, match="refuses: another controller has this robot"):
                robot.read()

    def test_strangers_are_not_heard(
        self, server: RobotServer, robot: UdpRobot, stranger: socket.socket
    ) -> None:
        for message in (encode("sensors", **SENSORS), encode("refused", reason="go"), b"garbage"):
            stranger.sendto(message, place(robot))
        assert robot.read() is None and robot.garbage == 0

    def test_a_robot_that_is_gone_is_silent(self, server: RobotServer, robot: UdpRobot) -> None:
        server.close()
        for _ in range(3):
            command(robot)
            assert robot.read() is None


class TestWatchdog:
    def test_brakes_after_two_silent_periods(
        self, server: RobotServer, robot: UdpRobot, clock: Clock
    ) -> None:
        for _ in range(3):
            command(robot)
            newest = server.poll()
            assert newest and newest["mode"] == "policy"
            for _ in range(3):
                clock.now += 0.013
                assert server.poll() is None
            for _ in range(3):
                clock.now += 0.002
                assert server.poll() == {"mode": "damping"}

    def test_begins_when_the_controller_does(
        self, server: RobotServer, robot: UdpRobot, clock: Clock
    ) -> None:
        """Which has a second for its own beginning."""
        clock.now += 0.9
        assert server.poll() is None
        clock.now += 0.2
        assert server.poll() == {"mode": "damping"}

    def test_what_is_no_command_does_not_count(
        self, server: RobotServer, robot: UdpRobot, clock: Clock
    ) -> None:
        command(robot)
        server.poll()
        for _ in range(5):
            clock.now += 0.01
            robot._socket.send(b"garbage")
            robot._socket.send(encode("command", mode="policy"))
            last = server.poll()
        assert last == {"mode": "damping"}


no_json = st.binary(max_size=300) | st.sampled_from(
    [b"[" * 50_000, b'{"kouros":' * 5_000, b"9" * 5_000, b'{"kouros":1}', b"\xff\xfe{}", bytes(60_000)]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
kinds = st.sampled_from(["hello", "command", "bye", "welcome", "sensors", "refused", "no kind"]) | json_values
fields = st.sampled_from(
    ["robot", "control_dt", "mode", "targets", "stiffness", "damping", "time", "joint_names", "reason"]
)
messages = st.builds(
    lambda kind, content: encode("", **{**content, "type": kind}),
    kinds,
    st.dictionaries(fields, json_values, max_size=5),
)
numbers = st.floats() | st.just(10**400) | st.none() | st.text(max_size=3)


def good(joints: dict[str, Any]) -> bool:
    return joints.keys() == set(JOINTS) and all(type(x) is float and abs(x) < 1e6 for x in joints.values())


some_joints = st.dictionaries(st.sampled_from([*JOINTS, "tail"]), numbers, max_size=3)
bad_joints = some_joints.filter(lambda joints: not good(joints)) | json_values
bad_commands = st.one_of(
    st.builds(lambda part, joints: {**COMMAND, part: joints}, st.sampled_from([*COMMAND][1:]), bad_joints),
    st.builds(lambda mode: {**COMMAND, "mode": mode}, json_values.filter(lambda m: not isinstance(m, str))),
    st.builds(lambda part: {k: v for k, v in COMMAND.items() if k != part}, st.sampled_from([*COMMAND])),
)


class TestGarbage:
    @QUICK
    @given(data=no_json | st.builds(lambda value: json.dumps(value).encode(), json_values))
    def test_is_no_message(self, data: bytes) -> None:
        assert decode(data) is None

    @QUICK
    @given(data=no_json | messages)
    def test_moves_no_robot(
        self, server: RobotServer, stranger: socket.socket, clock: Clock, data: bytes
    ) -> None:
        """Whoever sends it; and it answers the next hello."""
        stranger.sendto(data, server.address)
        assert server.poll() is None
        with contextlib.closing(UdpRobot(server.address, CONTRACT)) as robot:
            robot._socket.send(data)
            newest = server.poll()
            assert newest in (None, {"mode": "damping"})
            assert (newest is None) == (server.controller == place(robot))
        server.poll()
        clock.now += 3.0 * GONE

    @QUICK
    @given(content=bad_commands)
    def test_a_command_is_whole_or_none(
        self, server: RobotServer, robot: UdpRobot, content: dict[str, Any]
    ) -> None:
        """The last good one holds, until it is too old."""
        robot._socket.send(encode("command", **content))
        assert server.poll() is None
        command(robot)
        robot._socket.send(encode("command", **content))
        newest = server.poll()
        assert newest and newest["targets"] == COMMAND["targets"]

    @QUICK
    @given(data=no_json | messages)
    def test_stops_no_controller(self, server: RobotServer, robot: UdpRobot, data: bytes) -> None:
        """It is counted and left aside; what claims to be sensors is for the loop to judge."""
        before, message = robot.garbage, decode(data)
        server.send_bytes(data, place(robot))
        kind = message and message["type"]
        if kind == "refused":
            with pytest.raises(ConnectionError, match="the robot refuses"):
                robot.read()
        else:
            found = robot.read()
            assert (found is None) == (kind != "sensors")
        assert robot.garbage == before + (message is None)
        server.send_sensors(SENSORS)
        server.send_bytes(data if message is None else b"", place(robot))
        assert robot.read() == SENSORS

    def test_a_message_that_is_too_long(self, server: RobotServer, stranger: socket.socket) -> None:
        long = encode("hello", robot="g1", control_dt=0.02, more="x" * LARGEST_MESSAGE)
        stranger.sendto(long, server.address)
        assert server.poll() is None and server.controller is None


def test_a_robots_end_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules)  # Debian's own sitecustomize among them\n"
        "from kouros.deploy.udp import RobotServer\n"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before} - {'kouros'}\n"
        "print(sorted(n for n in names if n not in sys.stdlib_module_names and n[0] != '_'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
