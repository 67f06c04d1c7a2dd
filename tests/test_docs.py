"""What the pages show runs: every Python block, those of a page in order in one namespace."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tyro

from kouros.cli import _commands
from kouros.envs.observations import OBSERVATIONS
from kouros.envs.rewards import REWARDS
from kouros.envs.terrain import TILES
from kouros.robots import get_robot

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "src/kouros/policies/README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = [page for page in PAGES if BLOCK.search(page.read_text("utf-8"))]


class SwitchedOffError(Exception):
    """The robot of ``docs/policy-file.md`` was switched off: its loop has no end."""


def robots_computer() -> dict[str, Any]:
    """What ``docs/policy-file.md`` leaves to the reader: a robot's sensors and servos."""
    sent: list[np.ndarray] = []

    def read_robot(joint_names: list[str]) -> dict[str, np.ndarray]:
        still = np.zeros((1, len(joint_names)), np.float32)
        sensors = {
            "base_ang_vel": still[:, :3],
            "command": still[:, :3],
            "joint_pos": still,
            "joint_vel": still,
        }
        return {**sensors, "projected_gravity": np.array([[0.0, 0.0, -1.0]], np.float32)}

    def send_to_robot(joint_names: list[str], targets: np.ndarray, *gains: list[float]) -> None:
        assert len(joint_names) == len(targets) == len(gains[0]) == len(gains[1])
        sent.append(targets)
        if len(sent) == 3:
            raise SwitchedOffError

    return {"read_robot": read_robot, "send_to_robot": send_to_robot}


def read_sensors(names: tuple[str, ...]) -> dict[str, Any]:
    """What the README leaves to the reader: named sensors of a G1 that stands."""
    robot = get_robot("g1")
    pose = dict(zip(robot.joint_names, robot.default_joint_pos, strict=True))
    sensors = {
        "joint_pos": pose,
        "joint_vel": dict.fromkeys(pose, 0.0),
        "projected_gravity": [0.0, 0.0, -1.0],
    }
    return {"time": 0.0, **{name: sensors.get(name, [0.0, 0.0, 0.0]) for name in names}}


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a page registers is gone after it."""
    with mock.patch.dict(REWARDS), mock.patch.dict(OBSERVATIONS), mock.patch.dict(TILES):
        yield


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(
    page: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported, tmp_path / "policy.onnx")
    text = page.read_text("utf-8")
    endless = page.stem == "policy-file"
    given = robots_computer() if endless else {"read_robot": read_sensors}
    namespace = {"__name__": page.stem, **given}
    with pytest.raises(SwitchedOffError) if endless else contextlib.nullcontext():
        for block in BLOCK.finditer(text):
            before = text.count("\n", 0, block.start(1))  # so that errors name the page's own lines
            exec(compile("\n" * before + block[1], str(page), "exec"), namespace)


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every ``kouros ...`` of the pages, in bash blocks and within sentences, and where it stands."""
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        lines = re.findall(r"^kouros (.*)$", blocks, re.MULTILINE) + re.findall(r"`kouros ([^`]+)`", prose)
        for line in lines:
            words = ["1" if word == "N" else word for word in shlex.split(line, comments=True)]
            yield f"{page.name}: kouros {line}", [word for word in words if word != "--help"]


def test_command_lines_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kouros.cli.pick_device", lambda device: "cpu")  # some are for a GPU
    lines = list(command_lines())
    assert len(lines) > 30
    for where, words in lines:
        try:
            if words:
                tyro.cli(_commands(words), args=words)
        except (SystemExit, ValueError) as error:
            raise AssertionError(where) from error


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for file in re.findall(r"\b(?:benchmarks|examples|src|tests)/[\w/]+\.\w+", text):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
