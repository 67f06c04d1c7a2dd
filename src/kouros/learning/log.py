"""The log of a run: a file of rows, TensorBoard's events, Weights & Biases, the learning curve."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kouros.files import replacing
from kouros.learning.monitor import WandbLogger, add_histogram, histogram
from kouros.learning.ppo import PPOAgent


class RunLogger:
    """``metrics.jsonl`` (a line every ``log_interval`` iterations), TensorBoard events, the learning curve.

    What cannot be written is kept, and written as soon as that is possible again; so is all of it when
    somebody has deleted the folder.

    Args:
      folder: the run's.
      iteration: what came after it in an interrupted run is forgotten, as the checkpoint did.
      wandb: also gets all of it, and is closed with it.
      tell: given a line of text when something cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        iteration: int,
        wandb: WandbLogger | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.folder, self._path, self._tell, self._wandb = folder, folder / "metrics.jsonl", tell, wandb
        rows = read_metrics(self._path) if iteration else []
        self.rows = [row for row in rows if row["iteration"] <= iteration]
        self._plotted = self._counted = -math.inf
        self._files = contextlib.ExitStack()
        self._broken: float | None = None  # the first iteration whose row could not be written
        self._open(iteration + 1)
        self.minutes = self.rows[-1]["minutes"] if self.rows else 0.0

    def forget(self, iteration: int) -> None:
        """Drop what came after an iteration."""
        self.rows = [row for row in self.rows if row["iteration"] <= iteration]
        try:
            self._open(iteration + 1)
        except OSError as error:
            self._wait(error, iteration + 1)

    def _wait(self, error: OSError, first: float) -> None:
        """What came from that iteration on is written when that is possible again."""
        if not self._broken:
            self._tell(f"[bold red]the log cannot be written[/bold red]: {error}; it is kept for later")
        self._broken = min(first, self._broken or first)

    def _open(self, purge: int) -> None:
        """Write all rows anew and go on from there; TensorBoard drops what it has of ``purge`` and after."""
        from torch.utils.tensorboard import SummaryWriter

        self._close()
        with replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = self._files.enter_context(self._path.open("a", encoding="utf-8"))
        self._board = SummaryWriter(str(self.folder), purge_step=purge)
        self._files.callback(self._board.close)

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._files.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._wandb:
            self._wandb.close()

    def write(self, log: dict[str, float]) -> None:
        self.rows.append(log)
        if self._wandb:
            self._wandb.write(log)
        try:
            if not self._path.exists() or self._broken:
                first = self._broken or self.rows[0]["iteration"]
                self._open(int(first))
                new = [row for row in self.rows if row["iteration"] >= first]
                self._broken = None
            else:
                self._file.write(json.dumps(log) + "\n")
                self._file.flush()
                new = [log]
            for row in new:
                for key, value in row.items():
                    self._board.add_scalar(key, value, int(row["iteration"]))
            self._board.flush()
        except OSError as error:
            self._wait(error, log["iteration"])

    def write_histograms(self, agent: PPOAgent, every: float = 0.0) -> None:
        """Of the last step's actions and observations, unless that was less than ``every`` seconds ago."""
        if time.monotonic() - self._counted < every or self._broken:
            return
        self._counted = time.monotonic()
        counted = {name: histogram(values) for name, values in agent.last_step().items()}
        drawn = {f"histogram/{name}": h for name, h in counted.items() if h}
        with contextlib.suppress(OSError):
            for name, h in drawn.items():
                add_histogram(self._board, name, h, agent.iteration)
        if self._wandb:
            self._wandb.write_histograms(drawn, agent.iteration)

    def plot(self, every: float = 0.0) -> None:
        """``learning_curve.png`` of all rows so far, unless it was drawn less than ``every`` seconds ago."""
        if self.rows and time.monotonic() - self._plotted >= every:
            with contextlib.suppress(OSError):  # a picture is drawn again
                plot_learning_curve(self.rows, self.folder / "learning_curve.png")
            self._plotted = time.monotonic()


class NoLogger:
    """Of the processes that do not write."""

    minutes = 0.0

    def __enter__(self) -> NoLogger:
        return self

    def __exit__(self, *_: object) -> None: ...
    def forget(self, iteration: int) -> None: ...
    def write(self, log: dict[str, float]) -> None: ...
    def write_histograms(self, agent: PPOAgent, every: float = 0.0) -> None: ...
    def plot(self, every: float = 0.0) -> None: ...


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl``, without a last line that a crash cut short."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def plot_learning_curve(rows: list[dict[str, float]], path: Path) -> None:
    """Episode length, tracking errors, reward terms and learning diagnostics over samples, as PNG."""
    from matplotlib.figure import Figure

    x = [row["steps"] for row in rows]

    def draw(axes: Any, keys: list[str]) -> None:
        for key in keys:
            axes.plot(x, [row.get(key, math.nan) for row in rows], label=key.split("/")[-1], lw=1.2)
        axes.set_xlabel("million control steps")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=7, loc="best")

    figure = Figure(figsize=(11, 7), layout="constrained")
    length, errors, rewards, learning = figure.subplots(2, 2).flat
    draw(length, ["episode/length"])
    length.set_title("length of finished episodes, control steps")
    draw(errors, ["task/velocity_error", "task/yaw_rate_error", "task/harness"])
    errors.set_title("tracking error with exploration noise (m/s, rad/s); harness")
    terms = [k for k in rows[-1] if k.startswith("reward/") and k != "reward/mean"]
    draw(rewards, sorted(terms, key=lambda k: -abs(rows[-1][k]))[:8])
    rewards.set_title("reward per second, largest terms")
    draw(
        learning,
        [
            "learning/approx_kl",
            "learning/clip_fraction",
            "learning/explained_variance",
            "learning/std",
        ],
    )
    learning.set_title("learning")
    figure.suptitle(f"{rows[-1]['minutes']:.1f} minutes, {x[-1]:.2f} M steps")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
