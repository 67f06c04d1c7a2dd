"""What each figure of the learner is worth: one change at a time, samples and minutes until it walks, and
the reward and the KL divergence between policies at the end.

    python benchmarks/ablation.py --devices cuda:0 cuda:1 --testers 16 \\
        --output benchmarks/results/ablation.json

Each change is trained with three seeds for a fixed number of control steps, and its checkpoints are tested
afterwards (the whole walking test, MuJoCo C) by bisection: the first one that passes, taking it that those
after it do too. The minutes are those of training. A run that is there already is not trained again, nor
tested, so that this can be stopped, gone on with, and spread over sessions.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import queue
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from kouros.files import write_json
from kouros.learning.config import train_defaults
from kouros.learning.log import read_metrics

# Name: fields of PPOConfig, or num_envs.
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "adaptive rate, KL 0.01": {"target_kl": 0.01},
    "half the minibatches": {"minibatches": 0.5},
    "twice the minibatches": {"minibatches": 2.0},
    "3 epochs": {"epochs": 3},
    "8 epochs": {"epochs": 8},
    "networks 128-64": {"actor_hidden": (128, 64), "critic_hidden": (128, 64)},
    "networks 512-256-128": {"actor_hidden": (512, 256, 128), "critic_hidden": (512, 256, 128)},
    "relu": {"activation": "relu"},
    "tanh": {"activation": "tanh"},
    "layer norm": {"layer_norm": True},
    "observations not normalized": {"normalize_observations": False},
    "values not clipped": {"value_clip": False},
    "not symmetric": {"symmetric": False},
    "horizon 6": {"horizon": 6},
    "horizon 24": {"horizon": 24},
    "half the worlds": {"num_envs": 0.5},
    "twice the worlds": {"num_envs": 2.0},
    "no entropy bonus": {"entropy_weight": 0.0},
    "entropy 0.01": {"entropy_weight": 0.01},
}


@dataclasses.dataclass
class Config:
    """Samples and minutes until the walking test is passed, for each change of the learner."""

    changes: tuple[str, ...] = tuple(CHANGES)
    """Which changes, by name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each."""
    devices: tuple[str, ...] = ("cuda:0",)
    """Where to train, one run on each at a time. Name one twice, and the next run starts up meanwhile."""
    testers: int = 8
    """Processes that test, one core each."""
    steps: int = 12_000_000
    """Control steps of a run."""
    every: float = 0.5e6
    """Control steps between checkpoints."""
    runs: Path = Path("runs/ablation")
    """Folder of the runs."""
    output: Path | None = None
    """JSON file for the figures."""
    only: tuple[str, int, str] | None = None
    """For this script's own use: train or test this change with this seed, in this process."""
    device: str = "cuda:0"
    """For this script's own use."""


def folder_of(config: Config, change: str, seed: int) -> Path:
    return config.runs / f"{change.replace(' ', '_').replace(',', '')}-{seed}"


def train_one(config: Config, change: str, seed: int) -> None:
    from kouros.learning.run import train

    run = train_defaults(config.device)
    for name, value in CHANGES[change].items():
        group = run.env if name == "num_envs" else run.ppo
        old = getattr(group, name)
        setattr(
            group, name, round(value * old) if isinstance(value, float) and isinstance(old, int) else value
        )
    run.steps, run.seed, run.device, run.keep = config.steps, seed, config.device, -1
    run.save_interval = max(1, round(config.every / (run.env.num_envs * run.ppo.horizon)))
    run.run = folder_of(config, change, seed)
    with open(config.runs / f"{config.device}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # alone on its device, for the minutes
        train(run, Console(quiet=True))


def test_one(config: Config, change: str, seed: int) -> None:
    """The first checkpoint that walks, by bisection."""
    from kouros.envs.evaluation import evaluate_walk
    from kouros.learning.run import load_policy

    folder = folder_of(config, change, seed)
    rows = {int(row["iteration"]): row for row in read_metrics(folder / "metrics.jsonl")}
    paths = [p for p in sorted(folder.glob("checkpoint-*.pt")) if int(p.stem.partition("-")[2]) in rows]
    tested: dict[int, list[str]] = {}

    def walks(i: int) -> bool:
        actor, env, _ = load_policy(paths[i])
        tested[i] = evaluate_walk(actor.act, dataclasses.replace(env, num_threads=1)).failures()
        return not tested[i]

    low, high = -1, len(paths) - 1
    if walks(high):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if walks(middle) else (middle, high)
    row = rows[int(paths[high].stem.partition("-")[2])]
    result = {"change": change, "seed": seed, "walks": not tested[high], "failures": tested[high]}
    result |= {"steps": row["steps"] * 1e6, "minutes": row["minutes"]}
    write_json(folder / "ablation.json", result | end_of(folder))


def end_of(folder: Path) -> dict[str, float]:
    """What the last 5 % of a run's rows say."""
    rows = read_metrics(folder / "metrics.jsonl")
    last = rows[-max(1, len(rows) // 20) :]
    names = {"reward": "reward/mean", "kl": "learning/approx_kl"}
    return {name: statistics.mean(row[key] for row in last) for name, key in names.items()}


def run_all(config: Config) -> None:
    slots: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in config.devices:
        slots.put(device)
    console = Console()

    def call(change: str, seed: int, what: str, device: str = "cpu") -> bool:
        command = [sys.executable, __file__, "--only", change, str(seed), what, "--device", device]
        command += ["--steps", str(config.steps), "--every", str(config.every), "--runs", str(config.runs)]
        folder = folder_of(config, change, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{what}.txt", "w") as file:
            ok = subprocess.run(command, stdout=file, stderr=file).returncode == 0
        console.print(change, seed, what, "done" if ok else f"failed: see {folder / what}.txt")
        return ok

    def trained(change: str, seed: int) -> None:
        device = slots.get()
        folder = folder_of(config, change, seed)
        rows = read_metrics(folder / "metrics.jsonl")
        ok = bool(rows and rows[-1]["steps"] * 1e6 >= config.steps) or call(change, seed, "train", device)
        slots.put(device)
        if ok:
            tests.append(testers.submit(call, change, seed, "test"))

    tests: list[Future[bool]] = []
    with ThreadPoolExecutor(config.testers) as testers, ThreadPoolExecutor(len(config.devices)) as trainers:
        for seed in config.seeds:
            for change in config.changes:
                if not (folder_of(config, change, seed) / "ablation.json").exists():
                    trainers.submit(trained, change, seed)


def summarize(config: Config) -> None:
    paths = [folder_of(config, c, s) / "ablation.json" for c in config.changes for s in config.seeds]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    table = Table("change", "seeds that walk", "million steps", "minutes", "reward at the end", "KL")
    for change in config.changes:
        runs = [r for r in results if r["change"] == change]
        walking = [r for r in runs if r["walks"]]
        cells = ["-", "-"]
        if walking:
            steps, minutes = ([r[name] for r in walking] for name in ("steps", "minutes"))
            cells = [f"{statistics.mean(steps) / 1e6:.2f} ({min(steps) / 1e6:.2f} to {max(steps) / 1e6:.2f})"]
            cells.append(f"{statistics.mean(minutes):.2f}")
        if runs:
            reward, kl = (statistics.mean(r[name] for r in runs) for name in ("reward", "kl"))
            table.add_row(change, f"{len(walking)} of {len(runs)}", *cells, f"{reward:.4f}", f"{kl:.3f}")
    Console().print(table)
    if config.output:
        write_json(config.output, results)


def main(config: Config) -> None:
    if config.only:
        change, seed, what = config.only
        {"train": train_one, "test": test_one}[what](config, change, seed)
        return
    run_all(config)
    summarize(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
