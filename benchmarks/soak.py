"""Training with a fault a minute, and whether the policy walks in the end.

    python benchmarks/soak.py --minutes 120 --run runs/soak --output benchmarks/results/soak.json

Each minute one fault, in turn: a world's state turns NaN, or 1e20; a reward turns infinite; a gradient NaN;
the learning rate a thousand times itself; the disk is full for 20 s; the run's folder is deleted; SIGTERM,
after which the run is resumed, as it is if it ends with an error. At the end the walking test.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from rich.console import Console

from kouros.envs.evaluation import evaluate_walk
from kouros.envs.rewards import REWARDS
from kouros.files import write_json
from kouros.learning.config import train_defaults
from kouros.learning.log import read_metrics
from kouros.learning.ppo import PPOAgent
from kouros.learning.run import load_policy, train


@dataclasses.dataclass
class Config:
    """A training with faults."""

    run: Path = Path("runs/soak")
    """Folder of the run."""
    minutes: float = 120.0
    """Time, minutes."""
    every: float = 60.0
    """Time between faults, s."""
    seed: int = 0
    """Of the training."""
    output: Path | None = None
    """JSON file for the result."""
    part: bool = False
    """For this script's own use: train until SIGTERM, with the faults."""


class Faults:
    """Strikes every so many seconds, between two rollouts."""

    def __init__(self, config: Config) -> None:
        self.config, self.next = config, time.monotonic() + config.every
        self.log = config.run.with_suffix(".faults")
        self.reward = 0.0
        strikes = [self.nan_state, self.huge_state, self.infinite_reward, self.nan_gradient]
        strikes += [self.learning_rate, self.full_disk, self.deleted_folder, self.sigterm]
        done = len(self.log.read_text().splitlines()) if self.log.exists() else 0
        self.strikes = itertools.islice(itertools.cycle(strikes), done, None)
        self.collect, self.alive = PPOAgent.collect_rollouts, REWARDS["alive"]
        PPOAgent.collect_rollouts = lambda agent: self.before_rollout(agent)  # type: ignore[method-assign]
        REWARDS["alive"] = self.alive_or_not

    def alive_or_not(self, env) -> torch.Tensor:
        reward = self.alive(env)
        reward[7] += self.reward
        self.reward = 0.0
        return reward

    def before_rollout(self, agent: PPOAgent):
        if time.monotonic() > self.next:
            self.next += self.config.every
            strike: Callable[[PPOAgent], None] = next(self.strikes)
            with open(self.log, "a") as file:
                file.write(f"{agent.iteration} {strike.__name__}\n")
            strike(agent)
        return self.collect(agent)

    def nan_state(self, agent: PPOAgent) -> None:
        agent.env.simulation.qpos[3, 9] = math.nan

    def huge_state(self, agent: PPOAgent) -> None:
        agent.env.simulation.qvel[4] = 1e20

    def infinite_reward(self, agent: PPOAgent) -> None:
        self.reward = math.inf

    def nan_gradient(self, agent: PPOAgent) -> None:
        loss_of = agent._actor_loss

        def once(*args):
            loss, log = loss_of(*args)
            agent._actor_loss = loss_of  # type: ignore[method-assign]
            return loss * math.nan, log

        agent._actor_loss = once  # type: ignore[method-assign]

    def learning_rate(self, agent: PPOAgent) -> None:
        for learner in agent._learners:
            learner.rate.mul_(1000.0)

    def full_disk(self, agent: PPOAgent) -> None:
        most = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
        self.next = max(self.next, time.monotonic() + 25.0)  # this script's own file needs room too
        threading.Timer(20.0, resource.setrlimit, (resource.RLIMIT_FSIZE, (most, most))).start()

    def deleted_folder(self, agent: PPOAgent) -> None:
        shutil.rmtree(self.config.run)

    def sigterm(self, agent: PPOAgent) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def part(config: Config) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resumed = (config.run / "checkpoint.pt").exists()
    begin = train_defaults("cpu")
    begin.steps, begin.minutes, begin.seed, begin.device = 10**9, config.minutes, config.seed, "cpu"
    begin.resume, begin.run = (config.run, None) if resumed else (None, config.run)
    Faults(config)
    train(begin, Console(width=160))


def main(config: Config) -> None:
    if config.part:
        return part(config)
    end = time.monotonic() + 60.0 * config.minutes
    ends: list[int] = []
    while time.monotonic() < end - 5.0:
        left = (end - time.monotonic()) / 60.0
        before = read_metrics(config.run / "metrics.jsonl")
        minutes = left + (before[-1]["minutes"] if before else 0.0)
        options = ["--run", config.run, "--minutes", minutes, "--every", config.every, "--seed", config.seed]
        command = [sys.executable, __file__, "--part", *map(str, options)]
        ends.append(subprocess.run(command).returncode)
    actor, env, _ = load_policy(config.run)
    result = evaluate_walk(actor.act, env)
    rows = read_metrics(config.run / "metrics.jsonl")
    faults = [line.split()[1] for line in config.run.with_suffix(".faults").read_text().splitlines()]
    summary = {
        "minutes": config.minutes,
        "faults": {name: faults.count(name) for name in sorted(set(faults))},
        "restarts": len(ends) - 1,
        "ends_with_an_error": sum(map(bool, ends)),
        "steps": rows[-1]["steps"] * 1e6,
        "rows_with_sick_worlds": sum(row["task/sick_worlds"] > 0 for row in rows),
        "skipped_updates": sum(row.get("learning/skipped_updates", 0) for row in rows),
        "rollbacks_since_the_last_restart": rows[-1]["learning/rollbacks"],
        "figures_not_finite": sum(not math.isfinite(value) for row in rows for value in row.values()),
        "walks": not result.failures(),
        "eval": dataclasses.asdict(result),
    }
    Console().print(json.dumps(summary, indent=1))
    if config.output:
        write_json(config.output, summary)


if __name__ == "__main__":
    main(tyro.cli(Config))
