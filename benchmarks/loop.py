"""The real-time loop against the simulated robot, and against a loop that does nothing.

    python benchmarks/loop.py --seconds 600 --output benchmarks/results/loop.json

On a machine that is idle. For each rate: a minute of a bare loop, which sleeps and spins until its deadlines
as ours does and has neither robot nor policy; ``kouros run``; a minute of the bare loop. What the bare loop
is late, the machine was: another process, the kernel, or the host of a virtual machine took the processor
away.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from kouros.deploy.loop import WARM_UP, LoopConfig, realtime_priority
from kouros.files import write_json


@dataclasses.dataclass
class Config:
    """How late commands are, in microseconds after their deadlines."""

    policy: str = "walk"
    """A run folder, a checkpoint or the name of a shipped policy."""
    rates: tuple[float, ...] = (50.0, 200.0)
    """Ticks per second."""
    seconds: float = 600.0
    """Time under the policy for each rate, s."""
    bare_seconds: float = 60.0
    """Time of the bare loop before and after, s."""
    output: Path | None = None
    """JSON file for the figures."""


def bare(rate: float, seconds: float) -> list[float]:
    """How late a loop is awake that does nothing, s."""
    clock, late = time.perf_counter, []
    gc.disable()
    with realtime_priority():
        start = clock() + 0.1
        for tick in range(round(rate * seconds)):
            deadline = start + tick / rate
            time.sleep(max(deadline - WARM_UP - clock(), 0.0))
            while (now := clock()) < deadline:
                pass
            late.append(now - deadline)
    gc.enable()
    return late


def kouros(*arguments: object) -> None:
    command = [sys.executable, "-m", "kouros", *map(str, arguments)]
    subprocess.run(command, stdout=subprocess.DEVNULL)  # a robot that was braked has its report too


def row(name: str, values: list[float], seconds: float) -> dict[str, Any]:
    late = 1e6 * np.array(values)
    return {
        "loop": name,
        "ticks": len(late),
        "median_us": float(np.median(late)),
        "p99_us": float(np.percentile(late, 99)),
        "largest_us": float(late.max()),
        "later_than_2_ms": int((late > 1e6 * LoopConfig.late).sum()),
        "per_hour": float((late > 1e6 * LoopConfig.late).sum() / seconds * 3600),
    }


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "policy.onnx", Path(folder) / "loop.json"
        kouros("export", config.policy, "--output", path)
        for rate in config.rates:
            before = bare(rate, config.bare_seconds)
            kouros("run", path, "--rate", rate, "--seconds", config.seconds, "--output", output)
            report = json.loads(output.read_text())
            after = bare(rate, config.bare_seconds)
            rows.append(row(f"bare, {rate:g} Hz", before + after, 2 * config.bare_seconds))
            rows.append(row(f"awake, {rate:g} Hz", report["wake"], config.seconds))
            rows.append(row(f"command sent, {rate:g} Hz", report["sent"], config.seconds))
            rows[-1] |= {
                "reason": report["reason"],
                "realtime": report["realtime"],
                "silent": report["silent"],
            }
    columns = ("loop", "ticks", "median_us", "p99_us", "largest_us", "later_than_2_ms", "per_hour")
    table = Table(*columns)
    for each in rows:
        table.add_row(*(f"{each[c]:.0f}" if isinstance(each[c], float) else str(each[c]) for c in columns))
    Console().print(table)
    if config.output:
        write_json(config.output, rows)


if __name__ == "__main__":
    main()
