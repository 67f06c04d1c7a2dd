"""What ``kouros verify`` compares and finds wrong, and what it and ``kouros inspect`` say of a file."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Policy
from kouros.cli import main
from kouros.deploy.export import plain_path
from kouros.deploy.policy_file import read_policy_file
from kouros.deploy.simulator import AS_TRAINED, SimulatedRobot, World
from kouros.verify import (
    PARITY,
    SURVIVES,
    Trial,
    _episode,
    commands,
    compare_first_targets,
    conditions,
    verify,
    write_report,
)
from test_policy_file import changed, tiny_model

compare = functools.partial(compare_first_targets, states=6)


def copied(path: Path, folder: Path) -> Path:
    """A policy file and its plain form, in another folder."""
    shutil.copy(plain_path(path), folder)
    return Path(shutil.copy(path, folder))


class TestFirstTargets:
    @pytest.mark.parametrize("name", ["walk", "stacked", "stand"])
    def test_are_the_training_environments(self, policies: dict[str, Policy], name: str) -> None:
        """Also of a policy that remembers: its past begins with the state that both see."""
        assert 0.0 < compare_first_targets(policies[name][2]) <= PARITY

    @pytest.mark.parametrize("form", ["policy.onnx", "policy.plain.onnx"])
    @pytest.mark.parametrize(
        "field", ["joint_names", "action_scale", "default_joint_pos", "stiffness", "control_dt"]
    )
    def test_of_a_file_that_says_something_else(
        self, exported: Path, tmp_path: Path, form: str, field: str
    ) -> None:
        """Of a single joint, in either form; whoever changed it signed it again."""

        def change(model: Any, contract: dict[str, Any]) -> None:
            value = contract[field]
            if field == "joint_names":
                value[3], value[9] = value[9], value[3]
            elif isinstance(value, list):
                value[3] *= 1.001
            else:
                contract[field] = 1.001 * value

        path = copied(exported, tmp_path)
        changed(path.with_name(form), change, path.with_name(form))
        with pytest.raises(RuntimeError, match=rf"{form}: its {field} is not that of the training environ"):
            compare(path)

    @pytest.mark.parametrize("name", ["walk", "stacked", "stand"])
    @pytest.mark.parametrize("sensor", ["base_ang_vel", "projected_gravity", "joint_pos", "joint_vel"])
    def test_of_a_robot_that_feeds_it_wrongly(
        self, policies: dict[str, Policy], monkeypatch: pytest.MonkeyPatch, name: str, sensor: str
    ) -> None:
        """By values in another order: the contracts are alike, the targets are not."""
        reading = SimulatedRobot.read

        def read(robot: SimulatedRobot) -> dict[str, Any]:
            sensors = reading(robot)
            value = sensors[sensor]
            if isinstance(value, dict):
                sensors[sensor] = dict(zip(sorted(value), value.values(), strict=True))
            else:
                sensors[sensor] = value[::-1]
            return sensors

        monkeypatch.setattr(SimulatedRobot, "read", read)
        with pytest.raises(RuntimeError, match=r"policy\.onnx: on the same states its targets differ by"):
            compare(policies[name][2])

    def test_of_a_file_without_its_plain_form(self, exported: Path, tmp_path: Path) -> None:
        path = copied(exported, tmp_path)
        plain_path(path).unlink()
        for check in (compare, verify):
            with pytest.raises(
                FileNotFoundError, match=r"policy\.plain\.onnx: no such file; kouros export writes it besi"
            ):
                check(path)


class TestWorlds:
    def test_differ_from_the_training_in_one_thing_each(self) -> None:
        first, *others, (last, everything) = conditions().items()
        assert first == ("as trained", AS_TRAINED) and everything == World()
        names = {field.name for field in dataclasses.fields(World)}
        different = []
        for _, world in others:
            (field,) = (n for n in names if getattr(world, n) != getattr(AS_TRAINED, n))
            assert getattr(world, field) == getattr(World(), field)
            different.append(field)
        assert sorted(different) == sorted(names)
        assert last == "all together"

    def test_an_episode_repeats_with_its_seed(self, exported: Path) -> None:
        a, b, c = (_episode(str(exported), 0.6, 0.5, World(), seed) for seed in (1, 1, 2))
        assert repr(a) == repr(b) != repr(c)
        fell, velocity_error, pose_error = a
        assert not fell and 0.0 < velocity_error < 1.0 and math.isnan(pose_error)

    def test_a_robot_that_falls_is_seen_to(self, policies: dict[str, Policy]) -> None:
        """Untrained policies do."""
        fell, *_ = _episode(str(policies["stacked"][2]), 6.0, 0.0, AS_TRAINED, 0)
        assert fell


class TestCommands:
    def given(self, path: Path, seconds: float, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        _, contract = read_policy_file(path)
        ticks = round(seconds / contract["control_dt"])
        return contract, list(itertools.islice(commands(contract, np.random.default_rng(seed)), ticks))

    def test_are_of_the_training_and_last_five_seconds(self, exported: Path) -> None:
        contract, given = self.given(exported, 1000.0)
        velocities = np.array([command["command"] for command in given]).reshape(200, 250, 3)
        assert (velocities == velocities[:, :1]).all()
        low, high = np.array(contract["command_range"]).T
        each = velocities[:, 0]
        assert (low <= each).all() and (each <= high).all()
        standing = (each == 0.0).all(axis=1)
        assert 0.03 < standing.mean() < 0.2
        assert np.ptp(each[~standing], axis=0) == pytest.approx(high - low, rel=0.1)

    def test_poses_are_within_reach_and_slow(self, policies: dict[str, Policy]) -> None:
        contract, given = self.given(policies["stand"][2], 60.0)
        names = contract["joint_names"]
        poses = np.array([[command["pose_command"][name] for name in names] for command in given])
        low, high = np.array(contract["joint_range"]).T
        assert (low - 1e-9 <= poses).all() and (poses <= high + 1e-9).all()
        most = contract["environment"]["pose_speed"] * contract["control_dt"]
        assert np.abs(np.diff(poses, axis=0)).max() <= most + 1e-12
        assert np.ptp(poses, axis=0).max() > 0.3
        assert all(command["command"] == [0.0] * 3 for command in given)

    def test_a_policy_that_only_walks_holds_the_default_pose(self, exported: Path) -> None:
        contract, given = self.given(exported, 20.0)
        default = dict(zip(contract["joint_names"], contract["default_joint_pos"], strict=True))
        assert all(command["pose_command"] == pytest.approx(default) for command in given)


def trials(**falls: int) -> list[Trial]:
    return [Trial(name, 100, fell, 0.1, math.nan) for name, fell in falls.items()]


class TestReport:
    def test_names_what_breaks_it(self, tmp_path: Path) -> None:
        """Fewer than 95 % on their feet, no more."""
        path = tmp_path / "page" / "verify.md"
        found = trials(trained=0, slippery=5, late=6, dark=100)
        assert [t.survival for t in found] == [1.0, 0.95, 0.94, 0.0] and SURVIVES == 0.95
        write_report(path, "runs/a/policy.onnx", 2.5e-7, found, 20.0)
        text = path.read_text()
        assert "\nBroken by: late; dark. (Broken: fewer than 95 % of episodes of 20 s" in text
        rows = {row[0]: row for row in re.findall(r"^\| (\w+) \| (\d+) \| (.+?) \|", text, re.MULTILINE)}
        marked = {name: "**broken**" in row[2] for name, row in rows.items() if name != "world"}
        assert marked == {"trained": False, "slippery": False, "late": True, "dark": True}
        assert "within 2e-07 rad" in text and "runs/a/policy.onnx" in text and "nan" not in text
        assert "![survival and error by world](verify.png)" in text
        assert (tmp_path / "page" / "verify.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(p.name for p in path.parent.iterdir()) == ["verify.md", "verify.png"]

    def test_of_a_policy_that_nothing_breaks(self, tmp_path: Path) -> None:
        """And that holds poses: their error has a column."""
        found = [Trial("trained", 20, 0, 0.01, 0.0312), Trial("late", 20, 1, 0.02, 0.05)]
        write_report(tmp_path / "a.md", "p", 0.0, found, 5.0)
        text = (tmp_path / "a.md").read_text()
        assert "No condition breaks it." in text and "broken**" not in text
        assert "pose error (rad) |\n" in text and "| 0.010 | 0.031 |\n" in text
        columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert columns == {7}


class TestVerify:
    def test_a_short_one(
        self, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
    ) -> None:
        """All worlds, the training environment first; the page is what was printed."""
        page = tmp_path / "page.md"
        monkeypatch.setenv("COLUMNS", "120")
        args = ["--episodes=2", "--each=1", "--seconds=1", "--workers=2", f"--output={page}"]
        assert main(["verify", str(exported), *args]) == 0
        shown, text = capsys.readouterr().out, page.read_text()
        rows = re.findall(r"^\| (.+?) \| (\d+) \| 100 % \|", text, re.MULTILINE)
        names = ["training environment", *conditions()]
        assert [name for name, _ in rows] == names
        assert [int(n) for _, n in rows] == [2, *[1] * (len(names) - 2), 2]
        assert all(name in shown for name in names) and "broken" not in shown
        assert page.with_suffix(".png").stat().st_size > 10_000
        assert "No condition breaks it." in text

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["nothing.onnx"], r"nothing\.onnx: no such file; kouros export writes one"),
            (["walk"], "walk: no such file; kouros export writes one"),
            (["alone.onnx"], r"alone\.plain\.onnx: no such file; kouros export writes it beside alone\.onnx"),
            (
                ["policy.plain.onnx"],
                r"policy\.plain\.onnx: a plain network; verify the policy file beside it",
            ),
            (["foreign.onnx"], r"foreign\.onnx: not written by kouros export"),
            (["cut.onnx"], r"cut\.onnx: (cut short or )?damaged"),
        ],
    )
    def test_what_it_cannot_try(self, broken_files: Path, capsys, args: list[str], message: str) -> None:
        before = sorted(broken_files.iterdir())
        assert main(["verify", *args]) == 1
        error = capsys.readouterr().err
        assert re.match(f"kouros: {message}", error) and error.count("\n") == 1
        assert sorted(broken_files.iterdir()) == before

    @pytest.mark.parametrize("option", ["--episodes=0", "--each=0", "--seconds=nan", "--workers=0"])
    def test_bad_options(self, capsys, option: str) -> None:
        with pytest.raises(SystemExit):
            main(["verify", "policy.onnx", option])
        text = "".join(capsys.readouterr())
        assert re.search(f"{option[2:].partition('=')[0]}=.*must be greater than 0", text)


@pytest.fixture
def broken_files(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, of policy files and what is none."""
    monkeypatch.chdir(tmp_path)
    path = copied(exported, tmp_path)
    shutil.copy(path, tmp_path / "alone.onnx")
    (tmp_path / "foreign.onnx").write_bytes(tiny_model("pytorch").SerializeToString())
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-1000])
    return tmp_path


class TestInspect:
    @pytest.mark.parametrize("name", ["walk", "stacked", "stand"])
    def test_says_what_the_file_says(
        self, policies: dict[str, Policy], capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        """Every joint and every sensor, in a terminal of the usual width."""
        path = policies[name][2]
        _, contract = read_policy_file(path)
        assert main(["inspect", str(path)]) == 0
        shown = capsys.readouterr().out
        lines = shown.splitlines()
        assert f"robot: {contract['robot']}, 29 joints" in shown and contract["digest"][:12] in shown
        for sensor in (*contract["sensors"], "state"):
            assert any(re.match(rf"│ {sensor} +│ \d+ ", line) for line in lines), sensor
        columns = ("default_joint_pos", "stiffness", "damping", "effort_limit", "action_scale")
        for i, joint in enumerate(contract["joint_names"]):
            (row,) = (line.split() for line in lines if line.split()[:1] == [joint])
            found = [float(word) for word in row[1:] if ".." not in word]
            expected = [contract[column][i] for column in columns]
            assert found == pytest.approx(expected, rel=6e-3, abs=6e-4), joint
            bounds = [float(word) for word in row[2].split("..")]
            assert bounds == pytest.approx(contract["joint_range"][i], abs=6e-3)
        assert max(map(len, lines)) <= 80

    def test_as_json_it_is_the_contract(self, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for path in (exported, plain_path(exported)):
            assert main(["inspect", str(path), "--json"]) == 0
            assert json.loads(capsys.readouterr().out) == read_policy_file(path)[1]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nothing.onnx", "no such file; kouros export writes one"),
            ("foreign.onnx", "not written by kouros export, or damaged at its start"),
            ("cut.onnx", "(cut short or )?damaged"),
        ],
    )
    def test_what_is_no_policy_file(self, broken_files: Path, capsys, name: str, message: str) -> None:
        for more in ([], ["--json"]):
            assert main(["inspect", name, *more]) == 1
            captured = capsys.readouterr()
            assert re.match(f"kouros: {name}: {message}", captured.err) and captured.out == ""
            assert captured.err.count("\n") == 1
