"""A training run: its folder, its log, its progress display and its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from filelock import FileLock, Timeout
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kouros import __version__
from kouros.devices import describe_device, has_gpu, pick_device
from kouros.envs.config import CALM, HumanoidEnvConfig, flatten, from_plain
from kouros.envs.contract import check_contract, policy_contract, require_version
from kouros.envs.wrappers import Env, make_env, make_policy_env
from kouros.files import Forgiving, read_table
from kouros.learning import checkpoint
from kouros.learning.config import DEFAULT_STEPS, PPOConfig, TrainConfig, train_defaults
from kouros.learning.log import NoLogger, RunLogger
from kouros.learning.monitor import (
    Hardware,
    WandbLogger,
    randomization_log,
    require_wandb,
)
from kouros.learning.networks import ActorNetwork, CriticNetwork
from kouros.learning.ppo import PPOAgent
from kouros.learning.ranks import Ranks, joined, rank_device
from kouros.learning.recovery import RECOVERY, DivergedError, Keeper, Watch, prune
from kouros.signals import interrupted

# What the display shows: (title, key in the log, format).
COLUMNS = (
    ("iteration", "iteration", "{:.0f}"),
    ("M steps", "steps", "{:.2f}"),
    ("reward a step", "reward/mean", "{:.3f}"),
    ("episode", "episode/length", "{:.0f}"),
    ("velocity error (m/s)", "task/velocity_error", "{:.2f}"),
    ("yaw error (rad/s)", "task/yaw_rate_error", "{:.2f}"),
    ("harness", "task/harness", "{:.2f}"),
    ("steps/s", "time/steps_per_second", "{:,.0f}"),
    ("rollout / learning (s)", "time", "{}"),
)


# Seconds between pictures of the learning curve while a run is under way: drawing takes one.
PLOT_INTERVAL = 30.0
# Replays of sick worlds that a run keeps, the newest.
REPLAYS = 10
# Seconds between histograms.
HISTOGRAM_INTERVAL = 30.0


def train(config: TrainConfig, console: Console | None = None, explicit: bool = False) -> Path:
    """Train until ``config.steps`` or ``config.minutes``, whichever comes first; Ctrl-C saves.

    The run folder gets ``config.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoint.pt``
    (to resume from), ``policy.pt`` (weights and configuration) and ``learning_curve.png``.

    What goes wrong on the way harms nothing else (docs/training.md): a sick world is reset, a gradient that
    is not finite skipped; a training that diverges goes back to its last good state with half the learning
    rate; what cannot be written is written later. Started by torchrun, it shares the worlds among all
    processes, and the first alone writes.

    Args:
      config: what to train, or which run to go on with.
      console: where to tell about it.
      explicit: of a resume, see :func:`resumed`.

    Returns:
      The run folder.

    Raises:
      FileExistsError: the folder holds a run already; another process trains in it.
      FileNotFoundError, ValueError: the run to resume is missing, damaged or of another kind.
      OSError: the disk is full, and was until the end; what was saved before is whole.
      DivergedError: it does, however small the learning rate.
      RuntimeError: another process died.
      ImportError, RuntimeError: Weights & Biases is asked for, and is not installed, or refuses.
    """
    device = rank_device(pick_device(config.device))
    with joined(device) as ranks:
        if not ranks.first:
            console = Console(quiet=True, force_terminal=False)
        console = console or Console()
        console.file = cast(IO[str], Forgiving(console.file))
        if config.resume:
            config = resumed(config, device, explicit)
        return _train(config, device, ranks, console)


def _train(config: TrainConfig, device: str, ranks: Ranks, console: Console) -> Path:
    steps = config.steps or DEFAULT_STEPS[device.partition(":")[0]]
    folder = config.run or config.resume or Path("runs", f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    path = folder / "checkpoint.pt"
    if folder.is_file():
        raise FileExistsError(f"run={folder}: a file; name a folder")
    if not config.resume and path.exists():
        raise FileExistsError(f"run={folder}: holds a run already; use --resume {folder} or another name")
    require_room(folder)
    if config.wandb:
        require_wandb(config.wandb)
    if device == "cpu" and config.device == "auto" and has_gpu():
        console.print("there is a GPU that cannot be used, kouros doctor says why: training on the CPU")
    if device.startswith("cuda"):
        console.print("on a GPU: the first use on a machine compiles the physics, for two minutes or so")
    env = make_env(_share(config.env, ranks), device)
    agent = PPOAgent(env, config.ppo, config.seed, ranks=ranks)
    if config.resume:
        check_contract(checkpoint.load(path).get("contract"), env, f"checkpoint {path}")
        agent.load_checkpoint(path)
    plain = {**dataclasses.asdict(config), "run": folder, "steps": steps}
    origin = {"run": str(folder), "kouros": __version__, "revision": _revision()}
    origin["device"] = describe_device(device)
    console.print(f"{config.task} · {env.simulation} · run folder {folder}")
    if ranks.size > 1:
        console.print(f"{ranks.size} processes, {env.num_envs} worlds each")

    def describe() -> dict[str, Any]:
        training = {**origin, "task": config.task, "seed": config.seed, "steps": agent.total_steps}
        return {"contract": {**policy_contract(env), "training": training}}

    watch = Watch(2 * config.ppo.epochs * config.ppo.minibatches * config.log_interval)
    keeper = Keeper(agent, folder, plain, config.keep, describe, console.print)
    events = _Events(env, folder, ranks, console)
    stop = False

    start = time.monotonic()
    display = _Display(steps, config.minutes, console)
    hardware = Hardware(device)
    logger: RunLogger | NoLogger = NoLogger()
    stack = contextlib.ExitStack()
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_alone(folder))
        for half in folder.glob(".*.pt"):  # of a run that was killed while it wrote
            half.unlink(missing_ok=True)
        wandb = WandbLogger(folder, config, console.print) if config.wandb else None
        logger = RunLogger(folder, agent.iteration, wandb, console.print)
    with stack, _say_how_to_go_on(folder, ranks), logger, display, interrupted() as asked:

        def after_iteration(log: dict[str, float]) -> bool:
            nonlocal stop
            minutes = logger.minutes + (time.monotonic() - start) / 60.0
            log |= {
                "iteration": agent.iteration,
                "steps": agent.total_steps / 1e6,
                "minutes": minutes,
                "learning/rollbacks": keeper.rollbacks,
                **hardware.read(),
                **randomization_log(env),
            }
            logger.write(log)
            logger.write_histograms(agent, every=HISTOGRAM_INTERVAL)
            display.show(log)
            events.tell(agent.iteration, log)
            if trouble := watch.judge(log):
                keeper.roll_back(trouble)
                logger.forget(agent.iteration)
                return True
            if watch.well and keeper.due(config.save_interval):
                if agent.caution < 1.0:
                    agent.scale_rate(min(RECOVERY, 1.0 / agent.caution))
                keeper.save()
                logger.plot(every=PLOT_INTERVAL)
            stop = ranks.any(asked.is_set() or minutes >= config.minutes)
            return stop or agent.total_steps >= steps

        if agent.total_steps >= steps:
            console.print(f"{agent.total_steps:,} control steps are done; --steps N goes further")
        keeper.save()
        while not stop and agent.total_steps < steps:
            remaining = math.ceil((steps - agent.total_steps) / agent.samples)
            agent.train(remaining, after_iteration, config.log_interval)
        if watch.well:
            keeper.save(final=True)
        logger.plot()
    if asked.is_set():
        console.print(f"stopped and saved; go on with: kouros train --resume {folder}")
    return folder


class _Events:
    """Says on the terminal what happened to the worlds, each thing once, and keeps the replays."""

    def __init__(self, env: Env, folder: Path, ranks: Ranks, console: Console) -> None:
        self._env, self._folder, self._ranks, self._tell = env, folder, ranks, console.print
        self._overflown, self._moves = 0.0, len(self._history())

    def _history(self) -> list[dict[str, Any]]:
        return self._env.curriculum.manager.history if self._env.curriculum else []

    def tell(self, iteration: int, log: dict[str, float]) -> None:
        if log.get("task/sick_worlds", 0.0) > 0.0:
            replay = next((r for r in self._ranks.gather(self._env.recorder.take()) if r), None)
            if replay:
                replay.environment = dataclasses.asdict(self._env.config)
                path = self._folder / f"sick-{iteration:06}.npz"
                with contextlib.suppress(OSError):
                    replay.save(path)
                    prune(self._folder, "sick-*.npz", REPLAYS)
                    self._tell(f"a world turned sick and was reset; see it: kouros play --replay {path}")
        if log.get("task/overflown_worlds", 0.0) > self._overflown:
            self._overflown = log["task/overflown_worlds"]
            self._tell(
                "[bold red]contacts overflow[/bold red]: MuJoCo Warp has no room for all and leaves some "
                "out; raise CONTACTS in kouros/envs/scene.py"
            )
        for move in self._history()[self._moves :]:
            self._moves += 1
            self._tell(
                f"curriculum: {move['from']} -> {move['to']} after {move['episodes']} episodes, "
                f"{100 * move['success_rate']:.0f} % successful"
            )


def _share(config: HumanoidEnvConfig, ranks: Ranks) -> HumanoidEnvConfig:
    """The environment of one of several processes: its part of the worlds, and of the cores.

    Raises:
      ValueError: the worlds do not split evenly; or there are statistics that each would have for itself.
    """
    if ranks.size == 1:
        return config
    if config.num_envs % ranks.size:
        raise ValueError(f"env.num_envs={config.num_envs}: must split evenly among {ranks.size} processes")
    if "normalize" in config.wrappers:
        raise ValueError(
            "env.wrappers: normalize would keep statistics of its own in each process; leave it out, the "
            "networks normalize what they see by themselves"
        )
    threads = config.num_threads or max(1, (os.cpu_count() or 1) // ranks.local_size)
    return dataclasses.replace(config, num_envs=config.num_envs // ranks.size, num_threads=threads)


def _revision() -> str:
    """The Git revision of this source, "-dirty" behind it where it was changed; empty for an installed copy,
    which may lie in somebody else's repository."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return ""
    command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


# What a run cannot change on its way, and what of it goes on unless this call says otherwise.
FIXED = ("task", "randomize", "seed", "env", "ppo")
KEPT = ("steps", "save_interval", "log_interval", "keep", "wandb")


def begun(folder: Path) -> TrainConfig:
    """What the run in a folder was asked for.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: its ``config.json`` is damaged, or of another version.
    """
    path = folder / "config.json"
    if folder.is_file():
        raise FileNotFoundError(f"resume={folder}: a file; name the folder of the run")
    if not path.is_file():
        raise FileNotFoundError(f"resume={folder}: no config.json there; name the folder of a run")
    saved = read_table(path, "task", "seed", "env", "ppo", "steps")
    plain = {name: saved[name] for name in ("task", "randomize", "seed", *KEPT) if name in saved}
    env, ppo = from_plain(HumanoidEnvConfig, saved["env"]), from_plain(PPOConfig, saved["ppo"])
    return TrainConfig(**plain, env=env, ppo=ppo)


def resumed(config: TrainConfig, device: str, explicit: bool = False) -> TrainConfig:
    """The configuration of the run ``config.resume``, with what this call asks for besides.

    Args:
      config: what this call asks for.
      device: where it goes on.
      explicit: whether ``config`` was made from :func:`begun`, so that what differs was asked for. Else what
        equals the defaults, or those of the device and of the run's own task and preset, was not said.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: this call asks for something that a run cannot change; the run is damaged.
    """
    assert config.resume
    was = begun(config.resume)
    defaults = (was,) if explicit else (TrainConfig(), train_defaults(device, was.task, was.randomize))
    theirs, ours = _flat(was), _flat(config)
    unsaid = [_flat(each) for each in defaults]
    for name in {**theirs, **ours}:
        given, old = ours.get(name), theirs.get(name)
        if given not in (old, *(each.get(name) for each in unsaid)):
            raise ValueError(
                f"{name}={given!r}: {config.resume} began with {old!r} and goes on so; leave it out"
            )
    kept = [n for n in KEPT if getattr(config, n) in [getattr(each, n) for each in defaults]]
    return dataclasses.replace(config, **{name: getattr(was, name) for name in (*FIXED, *kept)})


def _flat(config: TrainConfig) -> dict[str, Any]:
    """What a run cannot change on its way, by the names of the command line."""
    return flatten({name: value for name, value in dataclasses.asdict(config).items() if name in FIXED})


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process trains in this folder meanwhile.

    Raises:
      FileExistsError: one does.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        text = f"run={folder}: another process is training there; stop it, or use another name"
        raise FileExistsError(text) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            lock.release()


ROOM = 100e6


def require_room(folder: Path) -> None:
    """Raise ``OSError`` unless the disk of a folder that may not be there yet has room for a run."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < ROOM:
        raise OSError(f"run={folder}: {free / 1e6:.0f} MB are free there and a run needs {ROOM / 1e6:.0f}")


@contextlib.contextmanager
def _say_how_to_go_on(folder: Path, ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"{error}; what was saved is whole: make room, then kouros train --resume {folder}"
        raise OSError(text) from error
    except RuntimeError as error:
        if ranks.size == 1 or isinstance(error, DivergedError):
            raise
        text = f"process {ranks.rank} stopped, perhaps because another did ({str(error).splitlines()[0]}); "
        text += f"what was saved is whole: torchrun ... -m kouros train --resume {folder}"
        raise RuntimeError(text) from error


class _Display:
    """A live table and progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int, minutes: float, console: Console) -> None:
        self._console = console
        self._steps, self._minutes = steps, minutes
        self._progress = Progress(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("train", total=1.0)
        self._live = Live(self._progress, console=console, refresh_per_second=4)
        self._last_line = -math.inf

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, log: dict[str, float]) -> None:
        cells = {title: self._cell(key, form, log) for title, key, form in COLUMNS}
        share = max(log["steps"] * 1e6 / self._steps, log["minutes"] / self._minutes)
        self._progress.update(self._task, completed=min(1.0, share))
        if self._console.is_terminal:
            table = Table(*cells, expand=True)
            table.add_row(*cells.values())
            self._live.update(Group(table, self._progress))
        elif time.monotonic() - self._last_line > 10.0:
            self._last_line = time.monotonic()
            text = "; ".join(f"{title}: {value}" for title, value in cells.items())
            self._console.print(f"{100 * share:3.0f} %; {text}", soft_wrap=True)

    @staticmethod
    def _cell(key: str, form: str, log: dict[str, float]) -> str:
        if key == "time":
            return " / ".join(f"{log[f'time/{part}']:.3f}" for part in ("rollout", "learning"))
        return form.format(log[key]) if key in log else "-"


def load_policy(path: str | Path) -> tuple[ActorNetwork, HumanoidEnvConfig, dict[str, Any]]:
    """A trained policy from a run folder, a ``.pt`` file or the name of a shipped one.

    Returns:
      The actor network (its ``act`` is the policy), the configuration of its environment and its
      contract.

    Raises:
      FileNotFoundError: nothing of that name.
      ValueError: damaged, or of another version, robot or contract.
    """
    content = checkpoint.load(find_policy(path))
    contract = require_version(content.get("contract"), f"policy {path}")
    env_config = from_plain(HumanoidEnvConfig, {**contract["environment"], "engine": "auto"})
    single = dataclasses.replace(env_config, num_envs=1, **CALM)
    env = make_policy_env(single, contract.get("statistics"))
    check_contract(contract, env, f"policy {path}")
    ppo = from_plain(PPOConfig, content["ppo"])
    weights = content["actor"]
    actor = ActorNetwork(
        len(weights["normalizer.mean"]),
        len(weights["log_std"]),
        ppo.actor_hidden,
        ppo.activation,
        ppo.layer_norm,
        squash=ppo.squash,
    )
    actor.load_state_dict(weights)
    return actor.eval(), env_config, content["contract"]


def load_critic(path: str | Path) -> CriticNetwork:
    """The critic of a run, from its folder or its ``checkpoint.pt``.

    Raises:
      FileNotFoundError, ValueError: nothing of that name; a policy alone.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else find_policy(path)
    content = checkpoint.load(path)
    if "resume" not in content:
        raise ValueError(f"policy {path}: holds no critic; name the folder of a run, or its checkpoint.pt")
    ppo, weights = from_plain(PPOConfig, content["ppo"]), content["resume"]["critic"]
    critic = CriticNetwork(len(weights["normalizer.mean"]), ppo.critic_hidden, ppo.activation, ppo.layer_norm)
    critic.load_state_dict(weights)
    return critic.eval()


SHIPPED = Path(__file__).parent.parent / "policies"


def find_policy(path: str | Path) -> Path:
    """The file that a run folder, a file or the name of a shipped policy stands for."""
    path = Path(path)
    shipped = sorted(p.stem for p in SHIPPED.glob("*.pt"))
    for candidate in (path, path / "policy.pt", SHIPPED / f"{path}.pt"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"policy {path}: neither a run folder, nor a .pt file, nor a shipped policy ({', '.join(shipped)})"
    )
