"""The peer half of the GPU benchmark: mjlab's G1 flat velocity task, its env.step and its PPO iteration.

    PYTHONPATH=(mjlab 1.6.0 and its needs) MUJOCO_GL=disabled python benchmarks/_mjlab_peer.py 4096 [cuda:0]

Imports nothing of Kouros, because mjlab needs another MuJoCo. Task, networks and PPO are as mjlab registers
them; the iteration is that of rsl_rl's ``OnPolicyRunner.learn`` without a logger. The last line on stdout is
a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import mjlab.tasks  # noqa: F401  (fills the registry)
import torch
from mjlab.envs import ManagerBasedRlEnv
from mjlab.rl import RslRlVecEnvWrapper
from mjlab.tasks.registry import load_env_cfg, load_rl_cfg, load_runner_cls
from mjlab.utils.torch import configure_torch_backends
from rsl_rl.utils import check_nan

TASK = "Mjlab-Velocity-Flat-Unitree-G1"
PACKAGES = ("mjlab", "rsl-rl-lib", "mujoco", "mujoco-warp", "warp-lang", "torch")


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall-clock time of a call, its work on the device included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(worlds: int, device: str) -> dict:
    steps, iterations = (200, 10) if device.startswith("cuda") else (10, 1)
    configure_torch_backends()  # TF32, as mjlab trains
    agent = load_rl_cfg(TASK)
    config = load_env_cfg(TASK)
    config.scene.num_envs, config.seed = worlds, agent.seed

    start = time.perf_counter()
    env = RslRlVecEnvWrapper(ManagerBasedRlEnv(config, device), clip_actions=agent.clip_actions)
    runner = load_runner_cls(TASK)(env, dataclasses.asdict(agent), None, device)
    build = time.perf_counter() - start
    # As mjlab trains: episodes that do not end all at once.
    env.episode_length_buf = torch.randint_like(env.episode_length_buf, high=int(env.max_episode_length))

    @torch.inference_mode()
    def env_steps(count: int) -> None:
        for _ in range(count):
            env.unwrapped.step(0.5 * torch.randn(worlds, env.num_actions, device=device))

    env_steps(5)
    env_step = seconds(lambda: env_steps(steps), device) / steps

    alg, horizon = runner.alg, agent.num_steps_per_env
    obs = env.get_observations()
    alg.train_mode()

    @torch.inference_mode()
    def rollout() -> None:
        nonlocal obs
        for _ in range(horizon):
            obs, rewards, dones, extras = env.step(alg.act(obs))
            check_nan(obs, rewards, dones)
            alg.process_env_step(obs, rewards, dones, extras)

    def update() -> None:
        with torch.inference_mode():
            alg.compute_returns(obs)
        alg.update()

    rollout()
    update()
    times = [(seconds(rollout, device), seconds(update, device)) for _ in range(iterations)]
    rollout_time, update_time = (sum(column) / iterations for column in zip(*times, strict=True))
    return {
        "worlds": worlds,
        "env_steps_per_second": worlds / env_step,
        "rollout_steps_per_second": horizon * worlds / rollout_time,
        "update_ms": 1e3 * update_time,
        "iteration_ms": 1e3 * (rollout_time + update_time),
        "build_seconds": build,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="mjlab's G1 flat velocity task, measured.")
    parser.add_argument("worlds", type=int, help="number of worlds")
    parser.add_argument("device", nargs="?", default="cuda:0", help="device of Torch and Warp")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.worlds, arguments.device)))
