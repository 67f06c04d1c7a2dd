"""Runs, files and the command line, on short runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from filelock import FileLock

from kouros.cli import _commands, main
from kouros.envs.config import PRESETS, HumanoidEnvConfig, RandomizationConfig, randomization, walk_rough
from kouros.envs.contract import policy_contract, record_policy
from kouros.envs.evaluation import ROBUST, ROUGH, WalkResult, evaluate_walk, rough_field
from kouros.files import replacing, write_json
from kouros.learning import checkpoint
from kouros.learning.config import PPOConfig, TrainConfig
from kouros.learning.log import read_metrics
from kouros.learning.run import SHIPPED, begun, load_policy, resumed, train

TINY = [
    "--env.num-envs=8",
    "--ppo.horizon=8",
    "--ppo.minibatches=2",
    "--ppo.actor-hidden=16",
    "--ppo.critic-hidden=16",
]


def tiny(run: Path, steps: int, **changes: object) -> TrainConfig:
    env = HumanoidEnvConfig(num_envs=8)
    ppo = PPOConfig(horizon=8, minibatches=2, actor_hidden=(16,), critic_hidden=(16,))
    return TrainConfig(**{"run": run, "steps": steps, "device": "cpu", "env": env, "ppo": ppo, **changes})  # type: ignore[arg-type]


def asked(*args: str) -> TrainConfig:
    """What ``kouros train`` makes of a command line."""
    line = ["train", "--device=cpu", *args]
    return tyro.cli(_commands(line), args=line)


def kouros(*args: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kouros.cli", *args], capture_output=True, text=True, **options
    )


def on_a_full_disk(room: int, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where no file may grow beyond ``room`` bytes: the operating system refuses the write."""
    limit = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
"""
    return subprocess.run([sys.executable, "-c", limit + code], capture_output=True, text=True)


class TestFiles:
    def test_all_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "folder" / "a.json"
        write_json(path, {"a": 1})
        with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
            temporary.write_text("half")
            _ = 1 / 0
        assert json.loads(path.read_text()) == {"a": 1}
        assert list(path.parent.iterdir()) == [path]

    def test_full_disk_is_said_and_harms_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "c.pt"
        checkpoint.save(path, {"x": torch.zeros(10)})
        code = f"""
import torch
from kouros.learning import checkpoint
try:
    checkpoint.save({str(path)!r}, {{"x": torch.zeros(100_000)}})
except OSError as error:
    print(error)
"""
        done = on_a_full_disk(4096, code)
        assert re.search(r"could not write .*c\.pt.*MB are free", done.stdout), done.stderr
        assert checkpoint.load(path)["x"].shape == (10,)
        assert list(tmp_path.iterdir()) == [path]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class TestRun:
    def test_folder_resume_and_exactness(self, tmp_path: Path) -> None:
        """A run of 6 iterations equals 3 and a resume; its log has every iteration once."""
        whole = train(tiny(tmp_path / "whole", 6 * 64))
        parts = train(tiny(tmp_path / "parts", 3 * 64))
        train(TrainConfig(resume=parts, device="cpu", steps=6 * 64))
        a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (whole, parts))
        for key, value in a["actor"].items():
            assert torch.equal(value, b["actor"][key])
        assert torch.equal(a["resume"]["now"]["obs"], b["resume"]["now"]["obs"])
        rows = read_metrics(parts / "metrics.jsonl")
        assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
        for name in ("config.json", "policy.pt", "learning_curve.png"):
            assert (parts / name).stat().st_size > 500
        assert list(parts.glob("events.out.tfevents*"))
        actor, config, contract = load_policy(parts)
        assert actor.act(torch.zeros(1, 98)).shape == (1, 29)
        assert config.num_envs == 8
        assert contract["robot"] == "g1"

    def test_log_after_the_checkpoint_is_forgotten(self, tmp_path: Path) -> None:
        folder = train(tiny(tmp_path / "run", 2 * 64))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"iteration": 3, "steps": 0, "minutes": 0}\n{"iteration": 4, "st')
        train(TrainConfig(resume=folder, device="cpu", steps=3 * 64))
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["iteration"] for row in rows] == [1, 2, 3]
        assert rows[-1]["steps"] > 0

    def test_ctrl_c_saves(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, "-m", "kouros.cli", "train", "--run", str(folder), "--no-report", *TINY],
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and len(read_metrics(folder / "metrics.jsonl")) < 3:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=90)
        assert process.returncode == 0, out
        assert "kouros train --resume" in out
        content = checkpoint.load(folder / "checkpoint.pt")
        assert content["resume"]["iteration"] == read_metrics(folder / "metrics.jsonl")[-1]["iteration"]
        assert (folder / "policy.onnx").exists()

    def test_a_resume_is_the_same_run(self, tmp_path: Path) -> None:
        """It trains as far as the run was asked to, and refuses to become another run."""
        folder = train(tiny(tmp_path / "run", 4 * 64, minutes=1e-9))
        assert checkpoint.load(folder / "checkpoint.pt")["resume"]["iteration"] == 1
        env = dataclasses.replace(HumanoidEnvConfig(), num_envs=9)
        for changes, name in (({"seed": 3}, "seed=3"), ({"env": env}, r"env\.num_envs=9.*began with 8")):
            with pytest.raises(ValueError, match=name):
                train(TrainConfig(resume=folder, device="cpu", **changes))  # type: ignore[arg-type]
        train(TrainConfig(resume=folder, device="cpu"))
        assert checkpoint.load(folder / "checkpoint.pt")["resume"]["iteration"] == 4
        content = checkpoint.load(folder / "checkpoint.pt")
        content["contract"]["gait_period"] = 1.0
        checkpoint.save(folder / "checkpoint.pt", content)
        with pytest.raises(ValueError, match=r"gait_period=1\.0 there, 0\.7 here"):
            train(TrainConfig(resume=folder, device="cpu"))

    def test_a_resume_keeps_its_robots(self, tmp_path: Path) -> None:
        """A run that began with a preset goes on with it, named again or not, and with no other one."""
        mine = ("--randomize=sim2real", "--env.randomization.friction", "0.5", "1.0")
        folder = train(asked(*mine, *TINY, f"--run={tmp_path / 'run'}", "--steps=64"))
        train(asked(f"--resume={folder}", "--steps=128"))
        assert json.loads((folder / "config.json").read_text())["randomize"] == "sim2real"
        drawn = dataclasses.replace(randomization("sim2real"), friction=(0.5, 1.0))
        assert load_policy(folder)[1].randomization == drawn
        assert [row["iteration"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
        for again in (("--randomize=sim2real",), mine):
            assert resumed(asked(f"--resume={folder}", *again), "cpu").env.randomization == drawn
        with pytest.raises(ValueError, match=r"randomize='light'.*began with 'sim2real'"):
            train(asked(f"--resume={folder}", "--randomize=light"))
        with pytest.raises(
            ValueError, match=r"env\.randomization\.mass=\(0\.5, 1\.0\).*began with \(0\.8, 1\.2\)"
        ):
            train(asked(f"--resume={folder}", "--env.randomization.mass", "0.5", "1.0"))

    def test_a_resume_says_no_to_what_was_typed(self, tmp_path: Path, capsys) -> None:
        """Even where that is a default elsewhere; what may change keeps its value unless it is typed."""
        intervals = ("--save-interval=3", "--log-interval=2", "--keep=-1")
        folder = train(asked(*TINY, *intervals, "--seed=4", f"--run={tmp_path / 'run'}", "--steps=128"))
        for typed, message in (
            ("--env.num-envs=256", "env.num_envs=256: .* began with 8"),
            ("--seed=0", "seed=0: .* began with 4"),
        ):
            assert main(["train", f"--resume={folder}", "--device=cpu", typed]) == 1
            assert re.search(message, capsys.readouterr().err)
        for words in ((), ("--log-interval=1",)):
            config = asked(f"--resume={folder}", *words)
            found = resumed(config, "cpu", explicit=True)
            assert (found.save_interval, found.keep, found.steps, found.seed) == (3, -1, 128, 4)
            assert found.log_interval == (1 if words else 2)
        assert resumed(TrainConfig(resume=folder, device="cpu"), "cpu").log_interval == 2

    def test_one_training_a_folder(self, tmp_path: Path) -> None:
        folder = train(tiny(tmp_path / "run", 64))
        (folder / ".half.pt").touch()
        with FileLock(folder / ".lock"), pytest.raises(FileExistsError, match="another process is training"):
            train(TrainConfig(resume=folder, device="cpu", steps=128))
        assert (folder / ".half.pt").exists()  # it may be the other's
        train(TrainConfig(resume=folder, device="cpu", steps=128))
        assert not (folder / ".half.pt").exists()

    def test_a_run_without_a_checkpoint_yet_may_begin_again(self, tmp_path: Path) -> None:
        folder = train(tiny(tmp_path / "run", 64))
        (folder / "checkpoint.pt").unlink()  # as if killed while the first one was written
        train(tiny(folder, 64))

    def test_a_full_disk_in_the_middle_of_a_run(self, tmp_path: Path) -> None:
        """The checkpoint before is whole and the way on is said."""
        folder = train(tiny(tmp_path / "run", 64))
        limit = (folder / "checkpoint.pt").stat().st_size - 1000
        code = f"""
import sys
import kouros.cli
sys.exit(kouros.cli.main(["train", "--resume", {str(folder)!r}, "--steps=640"]))
"""
        done = on_a_full_disk(limit, code)
        assert done.returncode == 1
        assert re.search(rf"kouros: could not write .*kouros train --resume {folder}", done.stderr)
        assert checkpoint.load(folder / "checkpoint.pt")["resume"]["iteration"] == 1

    def test_no_room_is_said_before_the_training(self, tmp_path: Path, monkeypatch) -> None:
        usage = type("Usage", (), {"free": 5e6})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"run=.*5 MB are free there and a run needs 100"):
            train(tiny(tmp_path / "run", 64))
        assert not (tmp_path / "run").exists()

    def test_a_run_is_not_overwritten(self, tmp_path: Path) -> None:
        folder = train(tiny(tmp_path / "run", 64))
        with pytest.raises(FileExistsError, match="--resume"):
            train(tiny(folder, 64))

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda p: TrainConfig(task="run"), ValueError, "task='run'.*walk"),
            (lambda p: TrainConfig(steps=0), ValueError, "steps=0"),
            (lambda p: TrainConfig(resume=p, run=p / "other"), ValueError, "leave --run out"),
            (lambda p: train(TrainConfig(resume=p)), FileNotFoundError, r"no config\.json"),
            (
                lambda p: begun(written(p / "config.json", "x").parent),
                ValueError,
                "config.json: damaged, not",
            ),
            (
                lambda p: begun(written(p / "config.json", "{}").parent),
                ValueError,
                "no env, ppo, seed, steps",
            ),
            (lambda p: begun(written(p / "checkpoint.pt", "")), FileNotFoundError, "a file; name the folder"),
            (lambda p: train(tiny(written(p / "run", ""), 1)), FileExistsError, "a file; name a folder"),
            (lambda p: load_policy(p / "x"), FileNotFoundError, "neither a run folder"),
            (lambda p: train(tiny(p, 1, device="cuda:9")), RuntimeError, "device='cuda:9'"),
        ],
    )
    def test_bad_input(self, tmp_path: Path, make, error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            make(tmp_path)

    def test_policy_of_another_contract_or_version(self, tmp_path: Path) -> None:
        folder = train(tiny(tmp_path / "run", 64))
        content = checkpoint.load(folder / "policy.pt")

        def learnt_in(**changes: object) -> dict[str, Any]:
            contract = content["contract"]
            return {"contract": {**contract, "environment": {**contract["environment"], **changes}}}

        for changes, message in (
            ({"contract": {**content["contract"], "contract_version": 99}}, "contract version 99"),
            (learnt_in(gravity=1.0), "unknown field gravity"),
            (learnt_in(robot="h1"), "robot='h1': choose from g1"),
            (learnt_in(gait_period=1.0), "gait_period=0.7 there, 1.0 here"),
            ({"contract": {**content["contract"], "robot": "h1"}}, "robot='h1' there, 'g1' here"),
            ({"contract": {**content["contract"], "control_dt": 0.01}}, "control_dt=0.01 there"),
            ({"contract": None}, "has no contract"),
        ):
            checkpoint.save(tmp_path / "changed.pt", {**content, **changes})
            with pytest.raises(ValueError, match=message):
                load_policy(tmp_path / "changed.pt")


class TestExport:
    @pytest.mark.parametrize("squash", [False, True])
    def test_the_file_is_the_policy_alone(self, tmp_path: Path, squash: bool) -> None:
        """A loop that knows only the file and named sensors repeats the environment's targets."""
        import onnx
        import onnxruntime

        from conftest import make_env
        from kouros.deploy.export import OnnxExporter
        from kouros.envs.contract import policy_sensors

        config = tiny(tmp_path / "run", 2 * 64)
        config.ppo.squash = squash
        actor, config, contract = load_policy(train(config))
        path = tmp_path / "policy.onnx"
        difference = OnnxExporter(actor, contract).export(path, record_policy(actor.act, config))
        assert difference <= 1e-5

        meta = {p.key: p.value for p in onnx.load(path).metadata_props}
        found = json.loads(meta["kouros"])
        env = make_env(2)
        expected = json.loads(json.dumps(policy_contract(env)))
        assert found["environment"] == {**expected.pop("environment"), "num_envs": 8}
        assert {name: found[name] for name in expected} == expected
        told = {"run": str(tmp_path / "run"), "task": "walk", "seed": 0, "steps": 2 * 64}
        assert told.items() <= found["training"].items()
        session = onnxruntime.InferenceSession(path)
        state = np.zeros((2, 31), np.float32)
        env.phase[:], env.coast[:] = 0.0, 0.0
        for _ in range(20):
            sensors = {name: policy_sensors(env)[name].numpy() for name in found["sensors"]}
            targets, state = session.run(None, {**sensors, "state": state})
            with torch.no_grad():
                env.step(actor.act(env.observe()))
            np.testing.assert_allclose(targets, env.simulation.ctrl, atol=1e-5)

    def test_a_file_that_differs_is_not_written(self, tmp_path: Path) -> None:
        from kouros.deploy.export import OnnxExporter

        folder = train(tiny(tmp_path / "run", 64))
        actor, config, contract = load_policy(folder)
        recording = record_policy(actor.act, config)
        recording["joint_targets"][500, 3] += 1e-3
        path = tmp_path / "policy.onnx"
        path.write_bytes(b"the one before")
        with pytest.raises(RuntimeError, match=r"differs from the trained one by 0\.001"):
            OnnxExporter(actor, contract).export(path, recording)
        assert path.read_bytes() == b"the one before"
        assert sorted(tmp_path.iterdir()) == [path, folder]

    def test_what_a_robot_cannot_measure_is_refused(self) -> None:
        from conftest import make_env
        from kouros.deploy.export import PolicyGraph

        contract = policy_contract(make_env(1, actor_observations=("base_lin_vel",)))
        with pytest.raises(ValueError, match="actor_observations='base_lin_vel'"):
            PolicyGraph(torch.nn.Linear(3, 29), contract)


class TestCommandLine:
    def test_help_names_every_field_with_its_default(self) -> None:
        text = kouros("train", "--help", env={**os.environ, "COLUMNS": "79"}).stdout
        config = TrainConfig()
        for prefix, part in (("", config), ("env.", config.env), ("ppo.", config.ppo)):
            for field in dataclasses.fields(part):
                flag = f"--{prefix}{field.name}".replace("_", "-")
                assert flag in text or f"--{prefix}no-{field.name}".replace("_", "-") in text
                value = getattr(part, field.name)
                if isinstance(value, float | int) and not isinstance(value, bool):
                    after = text.split(f"{flag} ", 1)[1]
                    assert f"(default: {value})" in " ".join(after.split("--")[0].replace("│", "").split()), (
                        flag
                    )

    def test_task_and_preset_set_the_defaults(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Of ``--env`` alone, and what else is said comes on top."""
        rough = walk_rough()
        assert asked("--task=walk-rough").env == rough
        for preset in PRESETS:
            rough.randomization = randomization(preset)
            both = asked("--task", "walk-rough", "--randomize", preset)
            assert both == dataclasses.replace(
                TrainConfig(device="cpu"), task="walk-rough", randomize=preset, env=rough
            )
        changed = asked("--randomize=sim2real", "--env.randomization.mass", "0.5", "1.0", "--env.num-envs=9")
        mine = dataclasses.replace(randomization("sim2real"), mass=(0.5, 1.0))
        assert changed.env == HumanoidEnvConfig(num_envs=9, randomization=mine)
        for line, message in (
            (["train", "--task=run"], "task='run': choose from walk, walk-rough"),
            (["bench", "--randomize=heavy"], "randomize='heavy': choose from none, light, sim2real"),
        ):
            assert main(line) == 1
            assert capsys.readouterr().err.startswith(f"kouros: {message}")
        shown = kouros("train", "--task", "walk-rough", "--randomize", "sim2real", "--help")
        text = " ".join(shown.stdout.replace("│", "").split())
        for flag, default in (
            ("swing-height FLOAT", "0.16"),
            ("terrain.levels INT", "6"),
            ("randomization.mass", "0.8 1.2"),
        ):
            assert f"(default: {default})" in text.split(f"--env.{flag} ", 1)[1].split("--")[0]

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys, kouros.cli\n"
            "try: kouros.cli.main(['--help'])\n"
            "except SystemExit: pass\n"
            "print([m for m in ('torch', 'mujoco', 'numpy', 'matplotlib') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.endswith("[]\n"), done.stdout

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["eval", "nothing-there"], "policy nothing-there: neither a run folder"),
            (["eval", "bytes.pt"], "checkpoint bytes.pt: damaged, or not a checkpoint"),
            (["play", "--seconds=0"], "seconds=0.0"),
            (["play", "--width=0"], "width x height"),
            (["train", "--device=cuda"], "device='cuda'"),
            (["train", "--env.actor-observations", "base_lin_vel"], "actor_observations='base_lin_vel'"),
            (["train", "--env.fall-height=2"], "fall_height=2.0: must be below"),
        ],
    )
    def test_errors_are_one_line(self, tmp_path: Path, args: list[str], message: str) -> None:
        (tmp_path / "bytes.pt").write_bytes(b"root:x:0")
        done = kouros(*args, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith(f"kouros: {message}")
        assert done.stderr.count("\n") == 1
        assert [p.name for p in tmp_path.iterdir()] == ["bytes.pt"]

    def test_eval_play_and_export_work_on_the_shipped_policy(self, tmp_path: Path) -> None:
        env = {**os.environ, "COLUMNS": "120"}
        done = kouros("eval", "--episodes=4", "--seconds=3", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "eval.json").read_text())
        assert result["survival"] == 1.0
        assert "velocity error" in done.stdout
        done = kouros("export", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "policy.onnx").stat().st_size < 2e6
        done = kouros("play", "--seconds=0.4", "--width=320", "--height=240", cwd=tmp_path)
        if done.returncode:
            assert "apt install" in done.stderr
        else:
            assert (tmp_path / "walk.mp4").stat().st_size > 1000

    @pytest.mark.parametrize(("suite", "conditions"), [("robust", ROBUST), ("rough", ROUGH)])
    def test_eval_suites(self, suite, conditions, tmp_path, capsys, monkeypatch) -> None:
        """A row for each condition, tested under that condition and no other."""
        given = []

        def spy(*args: Any, **options: Any) -> WalkResult:
            given.append((options.get("terrain"), options.get("randomization")))
            return evaluate_walk(*args, **options)

        monkeypatch.setattr("kouros.envs.evaluation.evaluate_walk", spy)
        path = tmp_path / "eval.json"
        assert main(["eval", f"--suite={suite}", "--episodes=4", "--seconds=0.2", f"--output={path}"]) == 0
        saved = json.loads(path.read_text())
        assert saved["suite"] == suite and list(saved["conditions"]) == list(conditions)
        figures = {f.name for f in dataclasses.fields(WalkResult)} | {"failures"}
        assert all(set(row) == figures for row in saved["conditions"].values())
        shown = capsys.readouterr().out
        assert all(name.split()[0] in shown for name in conditions)
        if suite == "robust":
            assert given == [(None, RandomizationConfig(**terms)) for terms in conditions.values()]
        else:
            assert given == [(rough_field(name), None) for name in conditions]
        for (name, a), (other, b) in itertools.combinations(zip(conditions, given, strict=True), 2):
            assert a != b, (name, other)

    @pytest.mark.parametrize("suite", ["robust", "rough"])
    def test_a_suite_has_its_own_conditions(self, suite: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["eval", f"--suite={suite}", "--randomization.mass", "0.9", "1.1"])
        captured = capsys.readouterr()
        text = " ".join((captured.out + captured.err).replace("│", "").split())
        assert f"suite='{suite}'" in text and "leave --randomization out" in text

    def test_doctor(self) -> None:
        done = kouros("doctor")
        assert done.returncode == 0
        assert "MuJoCo" in done.stdout

    def test_bench(self, tmp_path: Path) -> None:
        done = kouros("bench", "--worlds=8", "--seconds=0.2", f"--output={tmp_path / 'b.json'}")
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((tmp_path / "b.json").read_text())
        assert 0 < row["env / physics"] <= 1.5
        assert row["worlds"] == 8


def test_shipped_policies_are_small() -> None:
    assert (SHIPPED / "walk.pt").is_file()
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 2e6
