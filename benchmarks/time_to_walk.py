"""How long until it walks: a run with the default command keeps its policies, and they are tested in turn.

    python benchmarks/time_to_walk.py --seeds 0 1 2 --output benchmarks/results/time_to_walk.json

The minutes are those of training, from the first rollout on; the tests come afterwards. A run that is
there already is gone on with, or, if it is finished, only tested.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from kouros.devices import pick_device
from kouros.envs.config import RandomizationConfig
from kouros.envs.evaluation import WalkResult, evaluate_walk
from kouros.files import write_json
from kouros.learning.config import DEFAULT_STEPS, PPOConfig, train_defaults
from kouros.learning.log import read_metrics
from kouros.learning.run import load_policy, train


@dataclasses.dataclass
class Config:
    """Samples and minutes of training until the walking test is passed, seed by seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    device: str = "auto"
    """Where to train; the tests are on the CPU."""
    steps: int | None = None
    """Control steps of a whole run, which ends with a test; the device's default if not given."""
    first: float = 1.25e6
    """Control steps before the first test."""
    every: float = 0.25e6
    """Control steps between tests, until one is passed."""
    randomization: RandomizationConfig = dataclasses.field(default_factory=RandomizationConfig)
    """What differs from episode to episode, in training and in the test."""
    ppo: PPOConfig | None = None
    """The learner; the device's default if not given."""
    runs: Path = Path("runs/time_to_walk")
    """Folder of the runs."""
    output: Path | None = None
    """JSON file for the figures."""


def trained(seed: int, config: Config) -> Path:
    """The folder of the seed's finished run."""
    folder = config.runs / f"seed{seed}"
    device = pick_device(config.device)
    steps = config.steps or DEFAULT_STEPS[device.partition(":")[0]]
    rows = read_metrics(folder / "metrics.jsonl")
    if rows and rows[-1]["steps"] * 1e6 >= steps:
        return folder
    run = train_defaults(device)
    run.steps, run.device, run.keep = steps, device, -1
    run.save_interval = max(1, int(config.every / (run.env.num_envs * run.ppo.horizon)))
    if (folder / "checkpoint.pt").exists():
        return train(dataclasses.replace(run, resume=folder))
    run.env.randomization = config.randomization
    run.ppo = config.ppo or run.ppo
    return train(dataclasses.replace(run, run=folder, seed=seed))


def tested(folder: Path, config: Config) -> list[dict]:
    """The tests of a run's policies until one is passed, and of the last."""
    rows = {int(row["iteration"]): row for row in read_metrics(folder / "metrics.jsonl")}
    policies = sorted(folder.glob("checkpoint-*.pt"))
    tests: list[dict] = []
    for path in policies:
        row = rows.get(int(path.stem.partition("-")[2]))
        last = path == policies[-1]
        passed = any(not t["failures"] for t in tests)
        if row is None or not (last or (row["steps"] * 1e6 >= config.first and not passed)):
            continue
        actor, env, _ = load_policy(path)
        result = evaluate_walk(actor.act, env, randomization=config.randomization)
        progress = {"steps": row["steps"] * 1e6, "minutes": row["minutes"]}
        tests.append({**progress, **dataclasses.asdict(result), "failures": result.failures()})
        Console().print(str(path), tests[-1])
    return tests


def main(config: Config) -> None:
    results = {seed: tested(trained(seed, config), config) for seed in config.seeds}
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
