"""Sim to sim: a policy file in a world that it was not trained in, beside the one it was.

The world is :mod:`kouros.deploy.simulator`: a plain ``mj_step`` loop without any code of ``kouros.envs``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kouros.deploy.loop import LoopConfig, Safety
from kouros.deploy.policy_file import plain_path, read_policy_file
from kouros.deploy.runner import PolicyRunner
from kouros.deploy.simulator import AS_TRAINED, SimulatedRobot, World
from kouros.envs.config import BENDS, by_part
from kouros.files import replacing

# A policy that survives less often than this in a world is broken by it.
SURVIVES = 0.95
PARITY = 1e-5
COMMAND_TIME = 5.0
STANDING_SHARE = 0.1

WHAT = {
    "timestep": "steps of {:g} s",
    "collisions": "{} collisions",
    "elliptic": "elliptic cones",
    "friction": "friction {:g}",
    "sensor_delay": "sensors {:g} s old",
    "action_delay": "commands {:g} s late",
    "noise": "noise, {:g} of sim2real",
    "shuffled": "shuffled joints",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """Episodes in one world."""

    name: str
    episodes: int
    falls: int
    velocity_error: float
    """Of the base, commanded against true, m/s."""
    pose_error: float
    """Root mean square over joints of what is commanded against true, rad; NaN of a policy without poses."""

    @property
    def survival(self) -> float:
        """Share of episodes without a fall."""
        return 1.0 - self.falls / self.episodes


def conditions() -> dict[str, World]:
    """The worlds: as trained, each difference alone, and all together."""
    whole, worlds = World(), {"as trained": AS_TRAINED}
    for field, text in WHAT.items():
        value = getattr(whole, field)
        worlds[text.format(value)] = dataclasses.replace(AS_TRAINED, **{field: value})
    return {**worlds, "all together": whole}


def verify(
    path: str | Path,
    episodes: int = 100,
    each: int = 20,
    seconds: float = 20.0,
    seed: int = 0,
    push: float | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, list[Trial]]:
    """Try a policy file in the training environment, and in worlds that differ from it.

    Commands last 5 s and are drawn from what the policy was trained to follow; a tenth of them is zero.
    Targets go through the safety layer of the real-time loop.

    Args:
      path: of the policy file; its plain form must lie beside it.
      episodes: in the training environment and in the world that differs in everything.
      each: in the worlds that differ in one thing.
      seconds: length of an episode.
      seed: of first states, commands, pushes and noise.
      push: speed that a push from a random side adds to the base every 4 s, m/s; if None, 0.5 for a policy
        that holds a pose, and none for another.
      workers: processes; as many as there are cores if None.
      progress: called with (episodes done, episodes in all).

    Returns:
      The largest difference, rad, between the joint targets of the training environment and those of the file
      in the simulated robot on the same states; and the trials, the training environment's first.

    Raises:
      ValueError, FileNotFoundError: no policy file, or not one that says what it was trained in.
      RuntimeError: what the file says of itself is not what the training environment says, or the joint
        targets differ by more than 1e-5: it would be fed wrongly.
    """
    path = Path(path)
    _, contract = read_policy_file(path)
    push = (0.5 if "pose_command" in contract["sensors"] else 0.0) if push is None else push
    worlds = conditions()
    jobs = [
        (name, seed + i)
        for name, count in zip(worlds, [each] * (len(worlds) - 1) + [episodes], strict=True)
        for i in range(count)
    ]
    done, total = 0, len(jobs) + episodes
    difference = compare_first_targets(path)
    trials = [_in_training(path, episodes, seconds, seed, push)]
    results: dict[str, list[tuple[bool, float, float]]] = {name: [] for name in worlds}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context) as pool:
        run = functools.partial(_episode, str(path), seconds, push)
        numbers = [number for _, number in jobs]
        for (name, _), result in zip(jobs, pool.map(run, [worlds[n] for n, _ in jobs], numbers), strict=True):
            results[name].append(result)
            done += 1
            if progress:
                progress(episodes + done, total)
    for name, rows in results.items():
        fell, velocity, pose = zip(*rows, strict=True)
        trials.append(Trial(name, len(rows), sum(fell), float(np.mean(velocity)), float(np.mean(pose))))
    return difference, trials


def compare_first_targets(path: Path, states: int = 32) -> float:
    """The largest difference of joint targets, rad, on the same states: the training environment's
    observation through the network alone, and the simulated robot's sensors through the policy file.

    Raises:
      ValueError, FileNotFoundError: this is the plain form, or none lies beside the file.
      RuntimeError: it exceeds 1e-5, or a contract differs from the training environment's.
    """
    import torch

    from kouros.envs.contract import first_difference, policy_sensors
    from kouros.envs.wrappers import make_policy_env

    runner = PolicyRunner(path)
    if not runner.sensors:
        raise ValueError(f"{path}: a plain network; verify the policy file beside it")
    plain = _plain(path)
    config = dataclasses.replace(_environment(runner.contract), num_envs=states)
    env = make_policy_env(config, runner.contract.get("statistics"))
    for file, contract in ((path, runner.contract), (plain_path(path), plain.contract)):
        if name := first_difference(contract, env):
            raise RuntimeError(f"{file}: its {name} is not that of the training environment")
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # somewhere, in motion
        env.step(0.3 * torch.randn(states, env.robot.num_joints, generator=generator))
    env.reset(options={"reset_mask": torch.arange(states) % 2 == 0})
    # A policy file begins without a last action, at the beginning of its gait, without a past.
    for memory in (env.phase, env.coast, env.action):
        memory.zero_()
    getattr(env, "forget", lambda: None)()
    obs = env.observe()
    about = env.action_offset.expand_as(env.action).numpy()
    theirs = about + env.action_scale.numpy() * plain.step(obs.numpy())
    given, names = policy_sensors(env), env.robot.joint_names
    worst = 0.0
    for i in range(states):
        sim = SimulatedRobot(env.robot.name, dataclasses.replace(AS_TRAINED, shuffled=True), seed=i)
        sim.reset(env.simulation.qpos[i].numpy(), env.simulation.qvel[i].numpy())
        pose = dict(zip(names, given["pose_command"][i].tolist(), strict=True))
        sensors = {**sim.read(), "command": given["command"][i].tolist(), "pose_command": pose}
        runner.reset()
        targets = runner.act({name: sensors[name] for name in ("time", *runner.sensors)})
        ours = np.array([targets[name] for name in names])
        worst = max(worst, float(np.abs(ours - theirs[i]).max()))
    if not worst <= PARITY:
        raise RuntimeError(
            f"{path}: on the same states its targets differ by {worst:.2g} rad from the training "
            f"environment's (at most {PARITY:g} is allowed): sensors, joint order or scales are other ones"
        )
    return worst


def _plain(path: Path) -> PolicyRunner:
    if not plain_path(path).is_file():
        raise FileNotFoundError(
            f"{plain_path(path)}: no such file; kouros export writes it beside {path.name}"
        )
    return PolicyRunner(plain_path(path))


def _environment(contract: Mapping[str, Any]) -> Any:
    """The training environment of a policy file, without what disturbs the robot."""
    from kouros.envs.config import CALM, HumanoidEnvConfig, from_plain

    config = from_plain(HumanoidEnvConfig, {**contract["environment"], "engine": "auto"})
    return dataclasses.replace(config, harness=0.0, **CALM)


def _in_training(path: Path, episodes: int, seconds: float, seed: int, push: float) -> Trial:
    """The policy in the environment that it was trained in, by the walking test."""
    import torch

    from kouros.envs.config import RandomizationConfig
    from kouros.envs.evaluation import evaluate_walk

    plain = _plain(path)
    pushes = RandomizationConfig(push_velocity=(push, push), push_interval=(4.0, 4.0))
    result = evaluate_walk(
        lambda obs: torch.from_numpy(plain.step(obs.numpy())),
        _environment(plain.contract),
        episodes,
        seconds,
        seed,
        randomization=pushes if push else None,
        statistics=plain.contract.get("statistics"),
    )
    falls = round(episodes * (1.0 - result.survival))
    return Trial("training environment", episodes, falls, result.velocity_error, result.pose_error)


def _episode(path: str, seconds: float, push: float, world: World, seed: int) -> tuple[bool, float, float]:
    """One robot until it falls or the time is up: whether it fell, velocity error (m/s), pose error (rad)."""
    runner = PolicyRunner(path)
    contract, dt = runner.contract, runner.control_dt
    random = np.random.default_rng(seed)
    sim = SimulatedRobot(contract["robot"], world, seed)
    qpos, qvel = sim.data.qpos.copy(), np.zeros(sim.model.nv)
    qpos[7:] += random.uniform(-0.1, 0.1, len(qpos) - 7)
    qvel[[0, 1, 5]] = random.uniform(-0.5, 0.5, 3)
    sim.reset(qpos, qvel)
    joints, targets = runner.joint_names, sim.joint_positions
    safety = Safety(contract, LoopConfig(), dt)
    operator = commands(contract, random)
    fall_height = contract["environment"]["fall_height"]
    velocity_errors, pose_errors = [], []
    for tick in range(round(seconds / dt)):
        given = next(operator)
        if push and tick % round(4.0 / dt) == round(2.0 / dt):
            angle = random.uniform(0.0, 2.0 * math.pi)
            sim.push((push * math.cos(angle), push * math.sin(angle)))
        sensors = {**sim.read(), **given}
        acted = runner.act({name: sensors[name] for name in ("time", *runner.sensors)})
        targets = safety.limit(acted, targets)
        sim.write(targets, runner.gains)
        sim.advance(dt)
        velocity_errors.append(math.dist(sim.velocity[:2], given["command"][:2]))
        if "pose_command" in runner.sensors:
            true = sim.joint_positions
            pose_errors.append(
                math.sqrt(np.mean([(true[j] - given["pose_command"][j]) ** 2 for j in joints]))
            )
        if sim.tilt > contract["fall_tilt"] or sim.height < fall_height:
            return True, float(np.mean(velocity_errors)), float(np.mean(pose_errors or [math.nan]))
    return False, float(np.mean(velocity_errors)), float(np.mean(pose_errors or [math.nan]))


def commands(contract: Mapping[str, Any], random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """What an operator commands in each control step, drawn anew every 5 s from what was trained."""
    dt, env, names = contract["control_dt"], contract["environment"], contract["joint_names"]
    default, (low, high) = np.array(contract["default_joint_pos"]), np.array(contract["joint_range"]).T
    slowest, fastest = np.array(contract["command_range"]).T
    reach = np.array(by_part("pose_range", env["pose_range"], names))
    bend = np.array(by_part("crouch", BENDS if any(env["crouch"]) else {}, names))
    pose, tick = default.copy(), 0
    while True:
        if tick % round(COMMAND_TIME / dt) == 0:
            goal = default + reach * random.uniform(-1, 1, len(names)) + bend * random.uniform(*env["crouch"])
            goal = goal.clip(low, high)
            stands = "command" not in contract["sensors"] or random.random() < STANDING_SHARE
            command = np.zeros(3) if stands else random.uniform(slowest, fastest)
        most = env["pose_speed"] * dt
        pose = pose + (goal - pose).clip(-most, most)
        yield {"command": command.tolist(), "pose_command": dict(zip(names, pose.tolist(), strict=True))}
        tick += 1


def write_report(path: Path, policy: str, difference: float, trials: list[Trial], seconds: float) -> None:
    """The page: ``path`` in Markdown, and its figure beside it as PNG."""
    from matplotlib.figure import Figure

    from kouros.envs.evaluation import wilson_interval

    posed = not math.isnan(trials[-1].pose_error)
    broken = [trial.name for trial in trials if trial.survival < SURVIVES]
    verdict = f"Broken by: {'; '.join(broken)}." if broken else "No condition breaks it."
    head = "| world | episodes | without a fall | 95 % interval | velocity error (m/s) |"
    lines = [
        f"# {policy} outside of its training",
        "",
        f"{verdict} (Broken: fewer than {100 * SURVIVES:.0f} % of episodes of {seconds:g} s without a fall.)",
        "",
        f"On the same states its joint targets equal the training environment's within {difference:.1g} rad.",
        "",
        f"![survival and error by world]({path.with_suffix('.png').name})",
        "",
        head + (" pose error (rad) |" if posed else ""),
        "| --- | --- | --- | --- | --- |" + (" --- |" if posed else ""),
    ]
    for t in trials:
        low, high = wilson_interval(t.episodes - t.falls, t.episodes)
        mark = "" if t.survival >= SURVIVES else " **broken**"
        row = (
            f"| {t.name} | {t.episodes} | {100 * t.survival:.0f} %{mark} "
            f"| {100 * low:.0f} to {100 * high:.0f} % | {t.velocity_error:.3f} |"
        )
        lines.append(row + (f" {t.pose_error:.3f} |" if posed else ""))
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")

    figure = Figure(figsize=(9, 0.4 * len(trials) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [trial.name for trial in trials]
    shares = np.array([trial.survival for trial in trials])
    limits = np.array([wilson_interval(t.episodes - t.falls, t.episodes) for t in trials]).T
    spread = np.abs(limits - shares)
    colours = ["tab:red" if share < SURVIVES else "tab:blue" for share in shares]
    left.barh(names, 100 * shares, xerr=100 * spread, color=colours, ecolor="0.4", capsize=2)
    left.axvline(100 * SURVIVES, color="0.3", ls="--", lw=1)
    left.set_xlabel("episodes without a fall, %")
    left.set_xlim(0, 103)
    left.invert_yaxis()
    right.barh(names, [t.pose_error if posed else t.velocity_error for t in trials], color=colours)
    right.set_xlabel("pose error, rad" if posed else "velocity error, m/s")
    with replacing(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=110)
