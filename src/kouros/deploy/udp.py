"""A robot over UDP: both ends. Messages are JSON datagrams, joints by name, SI units; see docs/deploy.md.

Needs the standard library alone, so that a robot's own computer can hold its end without anything else.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

PROTOCOL = 1
LARGEST_MESSAGE = 60_000
PORT = 47470
# A controller that was silent for so long (s) has gone: another may come.
GONE = 1.0

Address = tuple[str, int]
Gains = tuple[Mapping[str, float], Mapping[str, float]]


def encode(kind: str, **content: Any) -> bytes:
    """A message."""
    return json.dumps({"kouros": PROTOCOL, "type": kind, **content}, separators=(",", ":")).encode()


def decode(data: bytes) -> dict[str, Any] | None:
    """A message, or None for what is none."""
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(data)
        if isinstance(message, dict) and message.get("kouros") == PROTOCOL and "type" in message:
            return message
    return None


class UdpRobot:
    """The controller's end: a robot to read from and to write to.

    Args:
      address: host and port of the robot's end.
      contract: of the policy: the robot must be its robot and have its joints.
      timeout: how long to wait for the robot, s.

    Attributes:
      garbage: number of datagrams that were no messages, and were ignored.

    Raises:
      ConnectionError: no answer, or the robot refuses: it is another one, or somebody else controls it.
    """

    def __init__(self, address: Address, contract: Mapping[str, Any], timeout: float = 3.0) -> None:
        self.address, self.garbage = address, 0
        self._gains: tuple[Gains | None, bytes] = (None, b"")
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            try:
                self._socket.connect(address)  # nobody else is heard
            except OSError as error:
                raise ConnectionError("{}:{}: {}".format(*address, error.strerror or error)) from error
            self._socket.setblocking(False)
            self._meet(contract, timeout)
        except BaseException:
            self._socket.close()
            raise

    def _meet(self, contract: Mapping[str, Any], timeout: float) -> None:
        hello = encode("hello", robot=contract["robot"], control_dt=contract["control_dt"])
        where = "{}:{}".format(*self.address)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with contextlib.suppress(ConnectionRefusedError):  # nobody there yet
                self._socket.send(hello)
            time.sleep(0.05)
            for message in self._messages():
                if message["type"] == "refused":
                    raise ConnectionError(f"{where} refuses: {message.get('reason')}")
                if message["type"] == "welcome":
                    self._check(message, contract, where)
                    return
        raise ConnectionError(f"{where}: no robot answers within {timeout:g} s; is its end running there?")

    @staticmethod
    def _check(welcome: Mapping[str, Any], contract: Mapping[str, Any], where: str) -> None:
        robot, joints = welcome.get("robot"), welcome.get("joint_names")
        if robot != contract["robot"]:
            raise ConnectionError(f"{where}: is a {robot!r}, the policy was trained on {contract['robot']!r}")
        named = set(map(str, joints)) if isinstance(joints, list) else set()
        if differ := sorted(named ^ set(contract["joint_names"])):
            raise ConnectionError(f"{where}: has other joints than the policy: {', '.join(differ[:5])}")

    def _messages(self) -> Iterator[dict[str, Any]]:
        """What has come in since the last time, the newest first: of a stream only that is worth decoding."""
        data: list[bytes] = []
        with contextlib.suppress(
            BlockingIOError, ConnectionRefusedError
        ):  # nothing more; nobody there any more
            while True:
                data.append(self._socket.recv(LARGEST_MESSAGE))
        for datagram in reversed(data):
            message = decode(datagram)
            if message is None:
                self.garbage += 1
            else:
                yield message

    def read(self) -> dict[str, Any] | None:
        """The newest sensors, by name, or None if none have come since the last call.

        Raises:
          ConnectionError: the robot has ended the session.
        """
        for message in self._messages():
            if message["type"] == "refused":
                raise ConnectionError(f"the robot refuses: {message.get('reason')}")
            if message["type"] == "sensors":
                return {name: value for name, value in message.items() if name not in ("kouros", "type")}
        return None

    def write(self, mode: str, targets: Mapping[str, float], gains: Gains) -> None:
        """Command the servos: targets (rad), stiffness (N m/rad) and damping (N m s/rad) by joint."""
        if gains != self._gains[0]:  # two thirds of a message, nearly always those of the last one
            stiffness, damping = ({**each} for each in gains)
            text = json.dumps({"stiffness": stiffness, "damping": damping}, separators=(",", ":"))
            self._gains = (stiffness, damping), text[1:].encode()
        message = encode("command", mode=mode, targets=targets)[:-1] + b"," + self._gains[1]
        with contextlib.suppress(ConnectionRefusedError, BlockingIOError):
            self._socket.send(message)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(encode("bye"))
        self._socket.close()


class RobotServer:
    """The robot's end: streams sensors to one controller and takes its commands; any other is refused.

    Args:
      robot: its name.
      joint_names: its joints, in any order.
      host, port: where to listen; port 0 picks a free one. The controller may be on another machine: listen
        on a network that you trust, nothing is encrypted.

    Attributes:
      controller: address of the controller, None without one.
      address: where it listens.
    """

    def __init__(self, robot: str, joint_names: tuple[str, ...], host: str = "127.0.0.1", port: int = PORT):
        self.robot, self.joint_names = robot, joint_names
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, port))
        self._socket.setblocking(False)
        self.address: Address = self._socket.getsockname()
        self.controller: Address | None = None
        self._timeout = self._heard = 0.0

    def poll(self) -> dict[str, Any] | None:
        """The controller's newest command: ``mode``, ``targets``, ``stiffness`` and ``damping`` by joint.

        ``mode`` is ``damping``, without targets, when the controller has said goodbye, or nothing for two of
        its periods. None if nothing has changed.
        """
        newest = None
        while True:
            try:
                data, sender = self._socket.recvfrom(LARGEST_MESSAGE)
            except (BlockingIOError, ConnectionRefusedError):
                break
            message = decode(data)
            if message is None:
                continue
            now = time.monotonic()
            if message["type"] == "hello":
                self._greet(message, sender, now)
            elif sender != self.controller:
                reason = "another controller has this robot" if self.controller else "say hello first"
                self._send("refused", sender, reason=reason)
            elif message["type"] == "bye":
                self.controller = None
                newest = {"mode": "damping"}
            elif message["type"] == "command" and self._complete(message):
                self._heard, newest = now, message
        if newest is None and self.controller and time.monotonic() - self._heard > self._timeout:
            newest = {"mode": "damping"}
        return newest

    def _greet(self, hello: dict[str, Any], sender: Address, now: float) -> None:
        gone, period = now - self._heard > GONE, hello.get("control_dt")
        if self.controller not in (None, sender) and not gone:
            host, port = self.controller or sender
            self._send("refused", sender, reason=f"{host}:{port} controls this robot")
        elif hello.get("robot") != self.robot:
            self._send("refused", sender, reason=f"this is a {self.robot!r}, not a {hello.get('robot')!r}")
        elif not (isinstance(period, int | float) and 0 < period <= 1):
            self._send("refused", sender, reason=f"control_dt={period!r}: must lie in (0, 1] s")
        else:
            self.controller, self._heard = sender, now + 1.0  # time to begin in
            self._timeout = 2.0 * period
            self._send("welcome", sender, robot=self.robot, joint_names=list(self.joint_names))

    def _complete(self, command: dict[str, Any]) -> bool:
        """Whether a command has a mode, and names every joint, with finite numbers."""
        if not isinstance(command.get("mode"), str):
            return False
        for part in ("targets", "stiffness", "damping"):
            values = command.get(part)
            if not isinstance(values, dict) or values.keys() != set(self.joint_names):
                return False
            if not all(isinstance(value, int | float) and abs(value) < 1e6 for value in values.values()):
                return False
        return True

    def send_sensors(self, sensors: Mapping[str, Any]) -> None:
        """Send sensors to the controller, if there is one."""
        if self.controller:
            self._send("sensors", self.controller, **sensors)

    def _send(self, kind: str, receiver: Address, **content: Any) -> None:
        self.send_bytes(encode(kind, **content), receiver)

    def send_bytes(self, data: bytes, receiver: Address) -> None:
        with contextlib.suppress(OSError):  # gone, or the buffer is full: the next one will do
            self._socket.sendto(data, receiver)

    def close(self) -> None:
        self._socket.close()
