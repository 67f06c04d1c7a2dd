"""PPOAgent on Gymnasium's MuJoCo tasks, against Stable-Baselines3 with the figures its authors publish.

    pip install -e '.[bench]'
    python benchmarks/gymnasium_ppo.py --jobs 16        # all runs, each in a process of its own
    python benchmarks/gymnasium_ppo.py --summarize      # table, benchmarks/results/gymnasium_ppo.json, figure

Each run (learner, task, seed) leaves one JSON file in ``--output``; one that is there is not run again, so
the benchmark can be stopped, gone on with, and spread over machines: ``--only kouros Hopper-v5 0``. The
peer's runs, which take longer, are saved on the way every 50,000 steps, and go on from there (with new
episodes); on another machine too, but its part does not count for the steps/s. A run has one torch thread
and, where the system can do that, one core. Both learners train in float32 on the CPU, in the same process
layout, from the same ``gymnasium.make``.

What is compared, for both alike: the undiscounted sum of the environment's own rewards. The curve is the
mean of the last 100 finished training episodes; the final return is that of the mean action over 20 episodes
from fixed seeds, with the normalizer as training left it. The steps/s are those of training alone, from the
first step to the last update: making environments, imports and the final test are outside.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from kouros.files import replacing, write_json
from kouros.learning.config import PPOConfig

Learner = Literal["kouros", "sb3"]
Task = Literal["HalfCheetah-v5", "Hopper-v5", "Humanoid-v5"]

# Our settings. In common with the peer's, because it is what these tasks ask for: a small first deviation
# (0.14 = exp(-2); 1 would drown the policy in its own noise), a short discount, rewards and observations
# normalized, two layers of 256. Different, and the reason for the speed: 16 worlds in one batch, so that a
# forward pass and its bookkeeping are shared by 16 steps, and minibatches of 256 instead of 32 or 64. The
# target for the KL divergence finds the learning rate, which depends on the deviation and the task.
COMMON = PPOConfig(
    horizon=128,
    epochs=10,
    minibatches=8,
    learning_rate=3e-4,
    target_kl=0.01,
    gamma=0.98,
    gae_lambda=0.92,
    clip=0.2,
    value_clip=False,  # a bound on the change of values only slows this critic
    entropy_weight=0.0,
    actor_hidden=(256, 256),
    critic_hidden=(256, 256),
    activation="relu",
    initial_std=0.14,
)
WORLDS = 16
# Steps between what the peer's runs save.
SAVE = 50_000
OURS: dict[str, PPOConfig] = {
    "HalfCheetah-v5": COMMON,
    # With a small deviation and a long discount it learns to stand still, for the reward of being alive: more
    # exploration, less foresight. Updates twice as often, in minibatches of 128.
    "Hopper-v5": dataclasses.replace(
        COMMON,
        horizon=64,
        gamma=0.99,
        gae_lambda=0.95,
        initial_std=0.4,
        entropy_weight=0.002,
    ),
    "Humanoid-v5": dataclasses.replace(COMMON, gamma=0.97),
}

# The peer's, word for word: hyperparams/ppo.yml of github.com/DLR-RM/rl-baselines3-zoo at commit 208b6fd,
# entries HalfCheetah-v4, Hopper-v4 and Humanoid-v4 (the newest there are). All of them with normalize: true,
# that is VecNormalize of observations and rewards with the entry's gamma, n_envs: 1, and policy_kwargs
# log_std_init=-2, ortho_init=False, activation_fn=nn.ReLU, net_arch=dict(pi=[256, 256], vf=[256, 256]).
THEIRS: dict[str, dict[str, float]] = {
    "HalfCheetah-v5": {
        "batch_size": 64,
        "n_steps": 512,
        "gamma": 0.98,
        "learning_rate": 2.0633e-05,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
    },
    "Hopper-v5": {
        "batch_size": 32,
        "n_steps": 512,
        "gamma": 0.999,
        "learning_rate": 9.80828e-05,
        "ent_coef": 0.00229519,
        "clip_range": 0.2,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
    },
    "Humanoid-v5": {
        "batch_size": 256,
        "n_steps": 512,
        "gamma": 0.95,
        "learning_rate": 3.56987e-05,
        "ent_coef": 0.00238306,
        "clip_range": 0.3,
        "n_epochs": 5,
        "gae_lambda": 0.9,
        "max_grad_norm": 2,
        "vf_coef": 0.431892,
    },
}

LABELS = {"kouros": "Kouros", "sb3": "Stable-Baselines3"}
PACKAGES = ("torch", "numpy", "mujoco", "gymnasium", "stable-baselines3")
# 97.5% quantiles of Student's t by degrees of freedom: of few seeds, an interval must be wide.
STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FIGURE = Path("docs/gymnasium_ppo.png")
RESULT = Path("benchmarks/results/gymnasium_ppo.json")

Policy = Callable[[np.ndarray], np.ndarray]
Curve = list[tuple[int, float]]


@dataclasses.dataclass
class Config:
    """Returns and steps per second of PPOAgent and of Stable-Baselines3's PPO, on three Gymnasium tasks."""

    learners: tuple[Learner, ...] = ("sb3", "kouros")
    """Which learners."""
    tasks: tuple[Task, ...] = ("HalfCheetah-v5", "Hopper-v5", "Humanoid-v5")
    """Which tasks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Which seeds."""
    steps: int = 1_000_000
    """Environment steps of a run."""
    episodes: int = 20
    """Episodes of the final test."""
    jobs: int = 1
    """Runs side by side. No more than physical cores, if the speed is to count."""
    output: Path = Path("runs/gymnasium_ppo")
    """Folder of the runs' JSON files."""
    only: tuple[Learner, Task, int] | None = None
    """This one run, in this process."""
    summarize: bool = False
    """No runs: table, JSON and figure of those that are there."""


def train_kouros(task: str, seed: int, steps: int, saved: Path) -> tuple[Policy, dict[str, Any]]:
    import gymnasium
    import torch
    from gymnasium.vector import AutoresetMode
    from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics

    from kouros.learning.ppo import PPOAgent

    config = OURS[task]
    # SAME_STEP: no step is lost to a reset; the wrappers below and PPOAgent know that mode.
    worlds = gymnasium.make_vec(
        task, WORLDS, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP, "copy": False}
    )
    raw = RecordEpisodeStatistics(worlds, buffer_length=100)
    agent = PPOAgent(NormalizeReward(raw, gamma=config.gamma), config, seed=seed)
    curve: Curve = []

    def callback(log: dict[str, float]) -> None:
        if raw.return_queue:
            curve.append((agent.total_steps, float(np.mean(raw.return_queue))))

    times = stopwatch()
    agent.train(steps // agent.samples, callback)
    figures = {"steps": agent.total_steps, **times(), "curve": curve}
    return lambda obs: agent.act(torch.as_tensor(obs, dtype=torch.float32)).numpy(), figures


def train_sb3(task: str, seed: int, steps: int, saved: Path) -> tuple[Policy, dict[str, Any]]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    config: dict[str, Any] = THEIRS[task]
    worlds = make_vec_env(task, n_envs=1, seed=seed)
    before: dict[str, Any] = {"machine": processor(), "seconds": 0.0, "cpu_seconds": 0.0, "curve": []}
    parts = [saved.with_suffix(suffix) for suffix in (".model", ".normalizer", ".times")]
    goes_on = parts[-1].exists()  # the last of them that is written
    if goes_on:
        env = VecNormalize.load(str(parts[1]), worlds)
        before = json.loads(parts[2].read_text())
    else:
        env = VecNormalize(worlds, gamma=config["gamma"])
    hidden = [256, 256]
    policy = {
        "log_std_init": -2,
        "ortho_init": False,
        "activation_fn": nn.ReLU,
        "net_arch": {"pi": hidden, "vf": hidden},
    }
    if goes_on:
        model = PPO.load(parts[0], env, device="cpu")
    else:
        model = PPO("MlpPolicy", env, seed=seed, device="cpu", policy_kwargs=policy, **config)
    curve: Curve = [(step, value) for step, value in before["curve"]]
    due = model.num_timesteps + SAVE

    def spent() -> dict[str, Any]:
        """What the machine that began did and took: another one's part counts for the return alone."""
        if before["machine"] != processor():
            return {name: before[name] for name in ("machine", "timed_steps", "seconds", "cpu_seconds")}
        taken = {name: before[name] + value for name, value in times().items()}
        return {"machine": before["machine"], "timed_steps": model.num_timesteps, **taken}

    class Callback(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            episodes = self.model.ep_info_buffer  # the last 100, under VecNormalize: raw
            if episodes:
                curve.append((self.num_timesteps, float(np.mean([e["r"] for e in episodes]))))
            nonlocal due
            if self.num_timesteps >= due:
                due += SAVE
                parts[-1].unlink(missing_ok=True)
                model.save(parts[0])
                env.save(str(parts[1]))
                write_json(parts[2], {**spent(), "curve": curve})

    times = stopwatch()
    model.learn(steps - model.num_timesteps, Callback(), reset_num_timesteps=model.num_timesteps == 0)
    figures = {"steps": model.num_timesteps, **spent(), "curve": curve}
    return lambda obs: model.predict(env.normalize_obs(obs), deterministic=True)[0], figures


def stopwatch() -> Callable[[], dict[str, float]]:
    start, cpu = time.perf_counter(), time.process_time()
    return lambda: {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def evaluate(policy: Policy, task: str, episodes: int) -> list[float]:
    """The raw return of each episode, from seeds that no training uses."""
    import gymnasium

    worlds = gymnasium.make_vec(task, episodes, "sync")
    obs, _ = worlds.reset(seed=1_000_000)
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        obs, reward, terminated, truncated, _ = worlds.step(policy(obs))
        returns += reward * running
        running &= ~(terminated | truncated)
    return returns.tolist()


def run(learner: Learner, task: Task, seed: int, config: Config) -> None:
    import torch

    torch.set_num_threads(1)
    train = {"kouros": train_kouros, "sb3": train_sb3}[learner]
    policy, figures = train(task, seed, config.steps, file_of(config, learner, task, seed))
    curve = figures.pop("curve")
    returns = evaluate(policy, task, config.episodes)
    ours = dataclasses.asdict(OURS[task]) | {"worlds": WORLDS}
    content = {
        "learner": learner,
        "task": task,
        "seed": seed,
        "return": statistics.mean(returns),
        "machine": processor(),
        **figures,
        "steps_per_second": figures.get("timed_steps", figures["steps"]) / figures["seconds"],
        "returns": returns,
        "settings": ours if learner == "kouros" else THEIRS[task],
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
        "curve": thinned(curve),
    }
    write_json(file_of(config, learner, task, seed), content)


def thinned(curve: Curve, points: int = 100) -> dict[str, list[float]]:
    kept = curve[:: math.ceil(len(curve) / points) or 1]
    return {"steps": [step for step, _ in kept], "returns": [round(value, 1) for _, value in kept]}


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: found.get(name, "none") for name in packages}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores"


def file_of(config: Config, learner: str, task: str, seed: int) -> Path:
    return config.output / f"{learner}-{task}-{seed}.json"


def run_all(config: Config) -> None:
    """Every run that is not there yet, ``jobs`` at a time."""
    runs = [(lr, t, s) for lr in config.learners for t in config.tasks for s in config.seeds]
    missing = [r for r in runs if not file_of(config, *r).exists()]
    config.output.mkdir(parents=True, exist_ok=True)
    pins = hasattr(os, "sched_setaffinity")
    cores = sorted(os.sched_getaffinity(0)) if pins else [0]
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(config.jobs):
        slots.put(cores[i % len(cores)])
    console = Console()

    def one(which: tuple[Learner, Task, int]) -> bool:
        core = slots.get()
        log = file_of(config, *which).with_suffix(".log")
        command = [sys.executable, __file__, "--only", *map(str, which), "--output", str(config.output)]
        command += ["--steps", str(config.steps), "--episodes", str(config.episodes)]
        with log.open("w") as file:
            done = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            if pins:
                os.sched_setaffinity(done.pid, {core})
            failed = done.wait() != 0
        slots.put(core)
        console.print(*which, f"failed: see {log}" if failed else "done", highlight=False)
        return not failed

    with ThreadPoolExecutor(config.jobs) as pool:
        if not all(pool.map(one, missing)):
            raise SystemExit(1)


def interval(values: list[float]) -> tuple[float, float]:
    """95% confidence interval of the mean over seeds."""
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return math.nan, math.nan
    half = STUDENT[min(n, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def summarize(config: Config) -> None:
    found = [json.loads(path.read_text()) for path in sorted(config.output.glob("*-v5-*.json"))]
    if not found:
        raise SystemExit(f"no runs in {config.output}")
    summary: dict[str, Any] = {}
    table = Table(title=f"{found[0]['steps'] / 1e6:.2f} million steps; {found[0]['machine']}")
    for column in ("task", "learner", "runs", "return", "spread", "95% interval", "steps/s", "ratio"):
        table.add_column(column, justify="left" if column in ("task", "learner") else "right")
    for task in config.tasks:
        rows: dict[str, Any] = {}
        for learner in ("sb3", "kouros"):
            runs = [r for r in found if (r["learner"], r["task"]) == (learner, task)]
            if not runs:
                continue
            returns, speeds = [r["return"] for r in runs], [r["steps_per_second"] for r in runs]
            rows[learner] = {
                "seeds": [r["seed"] for r in runs],
                "returns": returns,
                "return": statistics.mean(returns),
                "spread": statistics.stdev(returns) if len(returns) > 1 else math.nan,
                "interval": interval(returns),
                "steps_per_second": statistics.mean(speeds),
            }
            row = rows[learner]
            ratio = row["steps_per_second"] / rows["sb3"]["steps_per_second"] if "sb3" in rows else math.nan
            row["speed_ratio"] = ratio
            low, high = row["interval"]
            table.add_row(
                task,
                learner,
                str(len(runs)),
                f"{row['return']:,.0f}",
                f"{row['spread']:,.0f}",
                f"{low:,.0f} to {high:,.0f}",
                f"{row['steps_per_second']:,.0f}",
                f"{ratio:.2f}",
            )
        summary[task] = rows
    Console().print(table)
    write_json(RESULT, {"summary": summary, "runs": found})
    plot(found, config.tasks)
    Console().print(f"saved in {RESULT} and {FIGURE}")


def plot(runs: list[dict[str, Any]], tasks: tuple[str, ...]) -> None:
    """Learning curves: the mean over seeds, and from the lowest to the highest of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for learner, label in LABELS.items():
            curves = [r["curve"] for r in runs if (r["learner"], r["task"]) == (learner, task)]
            curves = [c for c in curves if c["steps"]]
            if not curves:
                continue
            start, end = max(c["steps"][0] for c in curves), min(c["steps"][-1] for c in curves)
            grid = np.linspace(start, end, 200)
            values = np.array([np.interp(grid, c["steps"], c["returns"]) for c in curves])
            (line,) = axes.plot(grid / 1e6, values.mean(0), label=label)
            axes.fill_between(
                grid / 1e6, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0
            )
        axes.set(title=task, xlabel="million steps", xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("return of the last 100 episodes")
    figure.axes[0].legend()
    with replacing(FIGURE) as temporary:
        figure.savefig(temporary, dpi=110)


def main(config: Config) -> None:
    if config.only:
        run(*config.only, config)
        return
    if not config.summarize:
        run_all(config)
    summarize(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
