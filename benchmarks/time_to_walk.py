"""How long until it walks: the default command, stopped on the way to be tested, and resumed.

    python benchmarks/time_to_walk.py --seeds 0 1 2 --output benchmarks/results/time_to_walk.json

Stopping changes nothing (resuming is exact) and the minutes are those of training alone: what a run of
``kouros train --seed N`` takes to the same point on the same machine. Runs that are there already are gone
on with, so that the whole may be interrupted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from kouros.envs.evaluation import WalkResult, evaluate_walk
from kouros.files import write_json
from kouros.learning.config import DEFAULT_STEPS, TrainConfig
from kouros.learning.run import load_policy, read_metrics, train


@dataclasses.dataclass
class Config:
    """Samples and minutes of training until the walking test is passed, seed by seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    first: float = 1.25e6
    """Control steps before the first test."""
    every: float = 0.25e6
    """Control steps between tests, until one is passed."""
    steps: int = DEFAULT_STEPS["cpu"]
    """Control steps of a whole run, which ends with a test."""
    runs: Path = Path("runs/time_to_walk")
    """Folder of the runs."""
    output: Path | None = None
    """JSON file for the figures."""


def test(folder: Path) -> dict:
    actor, config, _ = load_policy(folder)
    result = evaluate_walk(actor.act, config)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    progress = {"steps": last["steps"] * 1e6, "minutes": last["minutes"]}
    return {**progress, **dataclasses.asdict(result), "failures": result.failures()}


def run(seed: int, config: Config) -> list[dict]:
    """The tests of one seed's run, the last one at its end."""
    folder = config.runs / f"seed{seed}"
    tests: list[dict] = []
    target = config.first
    while not tests or tests[-1]["steps"] < config.steps:
        steps = int(min(target, config.steps))
        if (folder / "checkpoint.pt").exists():
            train(TrainConfig(resume=folder, steps=steps))
        else:
            train(TrainConfig(run=folder, seed=seed, steps=steps))
        tests.append(test(folder))
        Console().print(f"seed {seed}", tests[-1])
        target = target + config.every if tests[-1]["failures"] else config.steps
    return tests


def main(config: Config) -> None:
    results = {seed: run(seed, config) for seed in config.seeds}
    if config.output:
        write_json(config.output, results)
    measured = ["steps", "minutes", *WalkResult.BAR]
    table = Table("", *(f"seed {s}, {when}" for s in results for when in ("first pass", "end")))
    for name in measured:
        cells = []
        for tests in results.values():
            passed = next((t for t in tests if not t["failures"]), None)
            cells += [f"{t[name]:.4g}" if t else "-" for t in (passed, tests[-1])]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
