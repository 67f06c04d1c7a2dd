"""What a run falls back on: who tells that a training diverges, and the last good state to go back to."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kouros.files import write_json
from kouros.learning import checkpoint
from kouros.learning.ppo import PPOAgent

# Bad rows of the log, one after the other, until a training goes back.
PATIENCE = 3
# Mean KL divergence between a policy and the next that is no learning any more.
LARGEST_KL = 1.0
# How often a training goes back to the same state, with half the learning rate each time.
ROLLBACKS = 20
# After that the learning rate comes back by this factor at each checkpoint.
RECOVERY = 1.2
# Iterations until what could not be saved is tried again.
RETRY = 5


class DivergedError(RuntimeError):
    """A training that no smaller learning rate saves."""


class Watch:
    """Tells a training that diverges from one that stumbles, by the rows of its log.

    A row is bad where a figure of the learning is not finite, more than half of the gradients were skipped,
    or the mean KL divergence between a policy and the next is more than :data:`LARGEST_KL`.

    Args:
      gradients: gradient steps between two rows.

    Attributes:
      well: whether the last row was good.
    """

    def __init__(self, gradients: int) -> None:
        self._gradients, self._bad = gradients, 0

    @property
    def well(self) -> bool:
        return self._bad == 0

    def judge(self, log: dict[str, float]) -> str:
        """What is wrong, when so many bad rows came one after the other that it will not mend; else empty."""
        trouble = self._trouble(log)
        self._bad = self._bad + 1 if trouble else 0
        if self._bad < PATIENCE:
            return ""
        self._bad = 0
        return trouble

    def _trouble(self, log: dict[str, float]) -> str:
        for name, value in log.items():
            if name.startswith("learning/") and not math.isfinite(value):
                return f"{name} is {value}"
        if (skipped := log.get("learning/skipped_updates", 0.0)) > self._gradients / 2:
            return f"{skipped:.0f} of {self._gradients} gradients are not finite"
        if (kl := log.get("learning/approx_kl", 0.0)) > LARGEST_KL:
            return f"the policy moves by a KL divergence of {kl:.3g} in one iteration"
        return ""


class Keeper:
    """The last good state of a run: in memory to go back to, on the disk to go on from.

    Of several processes each keeps the state in memory, and the first alone writes; whether it could, all
    of them know, so that they save together.

    Args:
      agent: the learner.
      folder: the run's; gets ``checkpoint.pt``, ``policy.pt`` and ``config.json``.
      config: the run's, as plain data.
      keep: older checkpoints to keep under names of their own, -1 for all.
      describe: what the files hold besides the learner's state.
      tell: given a line of text when something goes wrong.

    Attributes:
      rollbacks: how often the training went back.
    """

    def __init__(
        self,
        agent: PPOAgent,
        folder: Path,
        config: dict[str, Any],
        keep: int,
        describe: Callable[[], dict[str, Any]],
        tell: Callable[[str], None] = print,
    ) -> None:
        self._agent, self._folder, self._config, self._keep = agent, folder, config, keep
        self._describe, self._tell = describe, tell
        self.rollbacks = self._tries = 0
        self._saved = self._unsaved = -1
        self._good = b""

    def due(self, interval: int) -> bool:
        """Whether the last save is so many iterations ago, or failed and should be tried again."""
        iteration = self._agent.iteration
        return iteration - self._saved >= interval or 0 <= self._unsaved <= iteration - RETRY

    def save(self, final: bool = False) -> None:
        """Keep the present state as the good one, and write it.

        Raises:
          OSError: it cannot be written, and this is the first or the ``final`` time; else that is told, and
            tried again.
        """
        agent, path = self._agent, self._folder / "checkpoint.pt"
        content, described = agent.checkpoint_dict(), self._describe()
        self._good = checkpoint.pack({**described, **content})
        self._tries, self._saved = 0, agent.iteration
        failure: OSError | None = None
        try:
            if agent.ranks.first:
                write_json(self._folder / "config.json", self._config)
                checkpoint.write(path, self._good)
                checkpoint.save(self._folder / "policy.pt", {**described, **agent.policy_state()})
                keep_checkpoint(path, agent.iteration, self._keep)
        except OSError as error:
            failure = error
        self._unsaved = agent.iteration if agent.ranks.any(failure is not None) else -1
        if failure and (final or not agent.iteration):
            raise failure
        if failure:
            self._tell(f"[bold red]not saved[/bold red]: {failure}; the training goes on, and tries again")

    def roll_back(self, trouble: str) -> None:
        """Go back to the last good state, with half the learning rate of the time before.

        Raises:
          DivergedError: that has not helped for :data:`ROLLBACKS` times.
        """
        if self._tries == ROLLBACKS:
            raise DivergedError(
                f"the training diverges ({trouble}) after {ROLLBACKS} times half the learning rate; "
                "checkpoint.pt is of before: look at the rewards and observations"
            )
        self._tries, self.rollbacks = self._tries + 1, self.rollbacks + 1
        agent = self._agent
        agent.load_state_dict(checkpoint.unpack(self._good, "the last good state", agent.device))
        factor = 0.5**self._tries
        agent.scale_rate(factor)
        self._tell(
            f"[bold red]the training diverges[/bold red] ({trouble}): back to iteration {agent.iteration}, "
            f"with {factor:g} times its learning rate"
        )


def keep_checkpoint(path: Path, iteration: int, keep: int) -> None:
    """Keep the checkpoint just written under a name of its own too, and of those the newest ``keep``."""
    if not keep:
        return
    kept = path.with_name(f"checkpoint-{iteration:06}.pt")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)  # no second copy: the next checkpoint replaces the name, not the file
    except OSError:
        shutil.copyfile(path, kept)
    if keep > 0:
        prune(path.parent, "checkpoint-*.pt", keep)


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Delete all but the last ``keep`` files of that pattern, by name."""
    for old in sorted(folder.glob(pattern))[:-keep]:
        old.unlink(missing_ok=True)
