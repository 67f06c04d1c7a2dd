"""What goes wrong on the way: nobody else notices, it is counted, and the training goes on."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import make_env
from kouros.cli import main
from kouros.envs.replay import LENGTH, Replay
from kouros.envs.rewards import REWARDS
from kouros.learning import checkpoint, recovery
from kouros.learning.config import TrainConfig
from kouros.learning.log import RunLogger, read_metrics
from kouros.learning.ppo import PPOAgent
from kouros.learning.recovery import DivergedError, Watch
from kouros.learning.run import train
from test_learning import SMALL, Target
from test_run import TINY, asked, tiny


def test_a_reward_that_is_not_finite_makes_a_world_sick(monkeypatch) -> None:
    """It is reset and counted; the other worlds step on bit for bit as beside a sound one."""
    envs = [make_env(4) for _ in range(2)]
    actions = torch.zeros(4, 29)
    bad = torch.zeros(4)
    alive = REWARDS["alive"]
    monkeypatch.setitem(REWARDS, "alive", lambda env: alive(env) + bad)
    sound = [envs[0].step(actions) for _ in range(3)]
    outcomes = []
    for value in (0.0, math.inf, 0.0):
        bad[2] = value
        outcomes.append(envs[1].step(actions))
    _, reward, terminated, _, info = outcomes[1]
    names = envs[1].metric_names
    assert terminated.tolist() == [False, False, True, False]
    assert reward[2] == 0.0
    assert torch.isfinite(info["metrics"]).all()
    assert info["metrics"][names.index("task/sick_worlds")].tolist() == [0, 0, 1, 0]
    others = [0, 1, 3]
    for ours, theirs in zip(outcomes, sound, strict=True):
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert torch.equal(a[others], b[others])


class TestReplay:
    @pytest.mark.parametrize("steps", [3, LENGTH - 1, LENGTH + 7])
    def test_holds_the_last_steps_of_the_sick_world(self, steps: int) -> None:
        env = make_env(3, max_episode_length=1000, harness=1.0)
        generator = torch.Generator().manual_seed(0)
        seen = []
        for step in range(steps):
            if step == steps - 1:
                env.simulation.qvel[1, 8] = torch.nan
            action = 0.3 * torch.randn(3, 29, generator=generator)
            env.step(action)
            if step < steps - 1:
                seen.append((env.simulation.qpos[1].numpy().copy(), action[1].numpy()))
        replay = env.recorder.take()
        assert replay is not None
        assert replay.world == 1
        assert replay.first == max(1, steps - LENGTH + 1)
        assert len(replay.qpos) == min(steps, LENGTH)
        for row, (qpos, action) in enumerate(seen[-(LENGTH - 1) :]):
            np.testing.assert_allclose(replay.qpos[row], qpos, rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(replay.action[row], action)
        assert not np.isfinite(replay.qvel[-1]).all()
        assert env.recorder.take() is None

    def test_is_of_one_episode(self) -> None:
        env = make_env(2, max_episode_length=5, harness=1.0)
        for step in range(13):
            if step == 12:
                env.simulation.qpos[0, 2] = 1e20
            env.step(torch.zeros(2, 29))
        replay = env.recorder.take()
        assert replay is not None
        assert (replay.world, replay.first, len(replay.qpos)) == (0, 1, 3)

    def test_is_of_one_history(self) -> None:
        """A training that goes back takes the worlds back; what they did meanwhile is not what led there."""
        env = make_env(2, max_episode_length=1000, harness=1.0)
        for _ in range(3):
            env.step(torch.zeros(2, 29))
        before = env.state_dict()
        for _ in range(4):
            env.step(torch.zeros(2, 29))
        env.load_state_dict(before)
        env.simulation.qvel[0, 8] = torch.nan
        env.step(torch.zeros(2, 29))
        replay = env.recorder.take()
        assert replay is not None
        assert (replay.first, len(replay.qpos)) == (4, 1)

    def test_is_saved_by_a_run_and_played(self, tmp_path: Path, monkeypatch, capsys) -> None:
        collect, calls = PPOAgent.collect_rollouts, []

        def sicken(agent: PPOAgent):
            calls.append(None)
            if len(calls) == 2:
                agent.env.simulation.qvel[5, 10] = math.nan
            return collect(agent)

        monkeypatch.setattr(PPOAgent, "collect_rollouts", sicken)
        folder = train(tiny(tmp_path / "run", 3 * 64))
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["task/sick_worlds"] > 0 for row in rows] == [False, True, False]
        assert all(math.isfinite(value) for row in rows for value in row.values())
        path = folder / "sick-000002.npz"
        assert Replay.load(path).world == 5
        assert main(["play", "--replay", str(path), "--width", "64", "--height", "48"]) == 0
        said = capsys.readouterr().out
        assert re.search(
            r"world 5, step 9 of its episode: \d+ of 71 numbers .*not finite.* was the fastest", said
        )
        assert path.with_suffix(".mp4").stat().st_size > 1000

    def test_what_is_no_replay_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "sick.npz"
        with pytest.raises(FileNotFoundError, match="sick-ITERATION"):
            Replay.load(path)
        np.savez(path, qpos=np.array([{"an": "object"}]))
        with pytest.raises(ValueError, match="damaged, or not a replay"):
            Replay.load(path)


class TestDivergence:
    @pytest.mark.parametrize(
        ("row", "bad"),
        [
            ({"learning/approx_kl": 0.02}, False),
            ({"learning/value_loss": math.nan}, True),
            ({"learning/approx_kl": 30.0}, True),
            ({"learning/skipped_updates": 5.0}, False),
            ({"learning/skipped_updates": 6.0}, True),
            ({"reward/mean": math.nan}, False),
        ],
    )
    def test_three_bad_rows_in_a_row(self, row: dict[str, float], bad: bool) -> None:
        watch = Watch(gradients=10)
        assert [bool(watch.judge(row)) for _ in range(3)] == [False, False, bad]
        for sequence in ([row, row, {}, row, row],):
            assert not any(Watch(10).judge(each) for each in sequence)

    def test_a_training_goes_back_with_a_smaller_step(self, tmp_path: Path, monkeypatch) -> None:
        """A learning rate of 3 ruins the policy; the run finds one that does not, and ends well."""
        config = tiny(tmp_path / "run", 12 * 64)
        config.ppo.learning_rate, config.save_interval = 3.0, 2
        config.ppo.epochs = 1
        said = io.StringIO()
        folder = train(config, Console(file=said, width=200))
        rows = read_metrics(folder / "metrics.jsonl")
        assert rows[-1]["learning/rollbacks"] > 3
        assert rows[-1]["learning/learning_rate"] < 1.0
        assert [row["iteration"] for row in rows] == list(range(1, 13))
        assert "the training diverges" in said.getvalue()
        assert all(torch.isfinite(p).all() for p in checkpoint.load(folder / "policy.pt")["actor"].values())

    def test_what_no_rate_saves_ends_with_a_word(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(recovery, "ROLLBACKS", 2)
        monkeypatch.setattr(Watch, "_trouble", lambda self, log: "as told")
        with pytest.raises(DivergedError, match="as told"):
            train(tiny(tmp_path / "run", 40 * 64))
        assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["resume"]["iteration"] == 0

    def test_the_rate_comes_back_by_a_fifth_a_checkpoint(self, tmp_path: Path, monkeypatch) -> None:
        judge, rows = Watch.judge, []

        def once(watch: Watch, log: dict[str, float]) -> str:
            rows.append(log["learning/learning_rate"] if len(rows) else 0.0)
            return "as told" if len(rows) == 3 else judge(watch, log)

        monkeypatch.setattr(Watch, "judge", once)
        config = tiny(tmp_path / "run", 12 * 64)
        config.save_interval = 2
        train(config)
        rate = config.ppo.learning_rate
        kept = read_metrics(tmp_path / "run" / "metrics.jsonl")[2:]
        factors = [min(1.0, 0.5 * 1.2 ** (n // 2)) for n in range(10)]
        assert [row["learning/learning_rate"] for row in kept] == pytest.approx([rate * f for f in factors])

    def test_going_back_while_the_disk_is_full(self, tmp_path: Path, monkeypatch) -> None:
        def refuse(*_: Path) -> None:
            raise OSError("No space left on device")

        said: list[str] = []
        with RunLogger(tmp_path, 0, tell=said.append) as logger:
            row = {"steps": 1.0, "minutes": 0.0}
            for i in (1, 2, 3):
                logger.write({"iteration": i, **row})
            with monkeypatch.context() as patch:
                patch.setattr("kouros.files.os.replace", refuse)
                logger.forget(1)
                logger.write({"iteration": 2, **row})
            logger.write({"iteration": 3, **row})
        assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        assert len(said) == 1 and "kept for later" in said[0]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_bad_gradient_now_and_then_harms_nothing(self, bad: float, monkeypatch) -> None:
        agent = PPOAgent(Target(), SMALL)
        loss_of, calls = agent._actor_loss, []

        def sometimes(batch, rows):
            calls.append(None)
            loss, log = loss_of(batch, rows)
            return (loss * bad if len(calls) % 3 == 0 else loss), log

        monkeypatch.setattr(agent, "_actor_loss", sometimes)
        logs: list[dict[str, float]] = []
        agent.train(7, logs.append)
        assert sum(log["learning/skipped_updates"] for log in logs[1:]) == len(calls) // 3
        assert all(torch.isfinite(p).all() for p in agent.actor.parameters())


class TestDisk:
    def test_full_for_a_while(self, tmp_path: Path, monkeypatch) -> None:
        """What could not be written is written later, and nothing is missing in the end."""
        write, failures = checkpoint.write, []

        def sometimes(path: Path, data: bytes) -> None:
            if 3 <= len(read_metrics(tmp_path / "run" / "metrics.jsonl")) <= 9:
                failures.append(path)
                raise OSError(f"could not write {path} (No space left on device)")
            write(path, data)

        monkeypatch.setattr(checkpoint, "write", sometimes)
        said = io.StringIO()
        folder = train(tiny(tmp_path / "run", 15 * 64, save_interval=4), Console(file=said, width=200))
        assert 2 <= len(failures) <= 3
        assert "the training goes on" in said.getvalue()
        assert checkpoint.load(folder / "checkpoint.pt")["resume"]["iteration"] == 15

    def test_log_that_cannot_be_written_is_kept(self, tmp_path: Path) -> None:
        told: list[str] = []
        with RunLogger(tmp_path, 0, tell=told.append) as logger:
            for i in range(1, 9):
                if i == 4:
                    logger._file.close()
                    logger._file = open("/dev/full", "w")  # noqa: SIM115 (the operating system's full disk)
                logger.write({"iteration": i, "steps": i, "minutes": i})
        assert len(told) == 1
        assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
        assert scalars(tmp_path) == list(range(1, 9))

    def test_a_terminal_that_is_a_file_on_a_full_disk(self, tmp_path: Path) -> None:
        full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (closing it fails too)
        folder = train(tiny(tmp_path / "run", 2 * 64), Console(file=full))
        assert len(read_metrics(folder / "metrics.jsonl")) == 2
        with pytest.raises(OSError, match="No space left"):
            full.close()

    def test_folder_is_deleted(self, tmp_path: Path, monkeypatch) -> None:
        folder, collect, calls = tmp_path / "run", PPOAgent.collect_rollouts, []

        def delete(agent: PPOAgent):
            calls.append(None)
            if len(calls) == 5:
                shutil.rmtree(folder)
            return collect(agent)

        monkeypatch.setattr(PPOAgent, "collect_rollouts", delete)
        train(tiny(folder, 8 * 64, save_interval=3))
        assert [row["iteration"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 9))
        assert scalars(folder) == list(range(1, 9))
        train(TrainConfig(resume=folder, device="cpu", steps=9 * 64))
        assert checkpoint.load(folder / "checkpoint.pt")["resume"]["iteration"] == 9


def scalars(folder: Path) -> list[int]:
    """Steps of a curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("minutes")]


@pytest.mark.parametrize(("keep", "expected"), [(0, []), (2, [4, 6]), (-1, [0, 2, 4, 6])])
def test_old_checkpoints_are_pruned_by_a_rule(tmp_path: Path, keep: int, expected: list[int]) -> None:
    folder = train(tiny(tmp_path / "run", 6 * 64, keep=keep, save_interval=2))
    kept = sorted(folder.glob("checkpoint-*.pt"))
    assert [int(path.stem.partition("-")[2]) for path in kept] == expected
    for path in kept:
        assert checkpoint.load(path)["resume"]["iteration"] == int(path.stem.partition("-")[2])


KILLING = """
import os, random, signal, sys, time
import torch
from kouros.learning import checkpoint
torch.set_num_threads(1)  # a forked child would wait for its parent's other threads
path, chance = sys.argv[1], random.Random(0)
for kill in range(100):
    child = os.fork()  # of one interpreter: to import torch takes longer than all the rest
    if not child:
        n = checkpoint.load(path)["n"]
        while True:
            n += 1
            checkpoint.save(path, {"n": n, "x": torch.full((200_000,), float(n))})
    first = os.stat(path).st_mtime_ns
    while os.stat(path).st_mtime_ns == first:  # until it has saved once
        time.sleep(0.001)
    time.sleep(0.03 * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    content = checkpoint.load(path)
    assert (content["x"] == content["n"]).all()
print(content["n"])
"""


def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """100 times: a process that does nothing but save is killed at a random moment."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"n": 0, "x": torch.zeros(200_000)})
    command = [sys.executable, "-c", KILLING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 100


def differing(a: object, b: object, name: str = "") -> list[str]:
    """Names of what two trees of tensors and plain data do not share, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differing(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            found
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for found in differing(x, y, f"{name}.{i}")
        ]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [name]
    return [] if a == b else [name]


def test_killed_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    """40 iterations, against 20, kill -9 somewhere in them, and a resume: the same bytes, the same log."""
    changes = {"--env.wrappers": "history:2", "--randomize": "sim2real", "--save-interval": "5"}
    given = [word for item in changes.items() for word in item] + ["--env.curriculum.enabled"]
    given += [
        "--env.curriculum.terrain-difficulty",
        *5 * ["0"],
        "--env.curriculum.push-frequency",
        *5 * ["0"],
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*TINY, *given, "--device=cpu", f"--steps={40 * 64}"]
    first = subprocess.Popen(
        [sys.executable, "-m", "kouros", "train", *options, "--run", str(parts)], stdout=subprocess.DEVNULL
    )
    while len(read_metrics(parts / "metrics.jsonl")) < 20:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert 15 <= checkpoint.load(parts / "checkpoint.pt")["resume"]["iteration"] < 40
    train(asked(*options, f"--run={whole}"))
    train(asked(f"--resume={parts}"))
    a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (whole, parts))
    assert set(differing(a, b)) <= {".contract.training.run"}
    assert {"env", "now", "generator", "critic", "actor_optimizer", "critic_optimizer"} <= a["resume"].keys()
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (whole, parts)]
    for rows in logs:
        for row in rows:
            for name in [name for name in row if name.startswith(("time/", "hardware/", "minutes"))]:
                del row[name]
    assert logs[0] == logs[1]
    assert not list(parts.glob(".*.pt"))  # nor what the kill left half written
