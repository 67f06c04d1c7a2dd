"""A training run: its folder, its log, its progress display and its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kouros import __version__
from kouros.devices import describe_device, has_gpu, pick_device
from kouros.envs.config import CALM, HumanoidEnvConfig, from_plain
from kouros.envs.contract import check_contract, policy_contract, require_version
from kouros.envs.wrappers import make_env, make_policy_env
from kouros.files import write_json
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


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Train until ``config.steps`` or ``config.minutes``, whichever comes first; Ctrl-C saves.

    The run folder gets ``config.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoint.pt``
    (to resume from), ``policy.pt`` (weights and configuration) and ``learning_curve.png``.

    What goes wrong on the way harms nothing else (docs/training.md): a sick world is reset, a gradient that
    is not finite skipped; a training that diverges goes back to its last good state with half the learning
    rate; what cannot be written is written later. Started by torchrun, it shares the worlds among all
    processes, and the first alone writes.

    Returns:
      The run folder.

    Raises:
      FileExistsError: the folder holds a run already.
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
        console.file = cast(IO[str], _Forgiving(console.file))
        return _train(config, device, ranks, console)


def _train(config: TrainConfig, device: str, ranks: Ranks, console: Console) -> Path:
    if config.resume:
        config = resumed(config, device)
    steps = config.steps or DEFAULT_STEPS[device.partition(":")[0]]
    folder = config.run or config.resume or Path("runs", f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    path = folder / "checkpoint.pt"
    if not config.resume and path.exists():
        raise FileExistsError(f"run={folder}: holds a run already; use --resume {folder} or another name")
    require_room(folder)
    for half in folder.glob(".*.pt") if ranks.first else ():  # of a run that was killed while it wrote
        half.unlink(missing_ok=True)
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

    watch = Watch(2 * config.ppo.epochs * config.ppo.minibatches * config.log_interval)
    saved = unsaved = -1
    good = b""
    stop, rollbacks, overflown = False, 0, 0.0
    told = len(env.curriculum.manager.history) if env.curriculum else 0

    def save(final: bool = False) -> None:
        """Keep the present state as the good one, and write it; what fails is tried again later."""
        nonlocal saved, unsaved, good
        content = agent.checkpoint_dict()
        training = {**origin, "task": config.task, "seed": config.seed, "steps": agent.total_steps}
        extra = {"contract": {**policy_contract(env), "training": training}}
        good = checkpoint.pack({**extra, **content})
        watch.tries, saved = 0, agent.iteration
        if not ranks.first:
            return
        try:
            write_json(folder / "config.json", plain)
            checkpoint.write(path, good)
            checkpoint.save(folder / "policy.pt", {**extra, **agent.policy_state()})
            keep_checkpoint(path, agent.iteration, config.keep)
            unsaved = -1
        except OSError as error:
            if final or not agent.iteration:
                raise
            unsaved = agent.iteration
            console.print(f"[bold red]not saved[/bold red]: {error}; the training goes on, and tries again")

    def roll_back(trouble: str) -> None:
        nonlocal rollbacks
        watch.tries, rollbacks = watch.tries + 1, rollbacks + 1
        agent.load_state_dict(checkpoint.unpack(good, "the last good state", agent.device))
        factor = 0.5**watch.tries
        agent.scale_rate(factor)
        logger.forget(agent.iteration)
        console.print(
            f"[bold red]the training diverges[/bold red] ({trouble}): back to iteration {agent.iteration}, "
            f"with {factor:g} times its learning rate"
        )

    def tell_what_is_wrong(log: dict[str, float]) -> None:
        nonlocal overflown
        if log.get("task/sick_worlds", 0.0) > 0.0:
            replay = next((r for r in ranks.gather(env.recorder.take()) if r), None)
            if replay:
                replay.environment = dataclasses.asdict(env.config)
                name = folder / f"sick-{agent.iteration:06}.npz"
                with contextlib.suppress(OSError):
                    replay.save(name)
                    prune(folder, "sick-*.npz", REPLAYS)
                    console.print(f"a world turned sick and was reset; see it: kouros play --replay {name}")
        if log.get("task/overflown_worlds", 0.0) > overflown:
            overflown = log["task/overflown_worlds"]
            console.print(
                "[bold red]contacts overflow[/bold red]: MuJoCo Warp has no room for all and leaves some "
                "out; raise CONTACTS in kouros/envs/scene.py"
            )

    start = time.monotonic()
    display = _Display(steps, config.minutes, console)
    hardware = Hardware(device)
    logger: RunLogger | NoLogger = NoLogger()
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        wandb = WandbLogger(folder, config, console.print) if config.wandb else None
        logger = RunLogger(folder, agent.iteration, wandb, console.print)
    with _say_how_to_go_on(folder, ranks), logger, display, interrupted() as asked:

        def after_iteration(log: dict[str, float]) -> bool:
            nonlocal stop, told
            minutes = logger.minutes + (time.monotonic() - start) / 60.0
            log |= {
                "iteration": agent.iteration,
                "steps": agent.total_steps / 1e6,
                "minutes": minutes,
                "learning/rollbacks": rollbacks,
                **hardware.read(),
                **randomization_log(env),
            }
            logger.write(log)
            logger.write_histograms(agent, every=HISTOGRAM_INTERVAL)
            display.show(log)
            tell_what_is_wrong(log)
            for move in env.curriculum.manager.history[told:] if env.curriculum else ():
                told += 1
                console.print(
                    f"curriculum: {move['from']} -> {move['to']} after {move['episodes']} episodes, "
                    f"{100 * move['success_rate']:.0f} % successful"
                )
            if trouble := watch.judge(log):
                roll_back(trouble)
                return True
            due = agent.iteration - saved >= config.save_interval
            if watch.well and (due or 0 <= unsaved <= agent.iteration - RETRY):
                if agent.caution < 1.0:
                    agent.scale_rate(min(RECOVERY, 1.0 / agent.caution))
                save()
                logger.plot(every=PLOT_INTERVAL)
            stop = ranks.any(asked.is_set() or minutes >= config.minutes)
            return stop or agent.total_steps >= steps

        if agent.total_steps >= steps:
            console.print(f"{agent.total_steps:,} control steps are done; --steps N goes further")
        save()
        while not stop and agent.total_steps < steps:
            remaining = math.ceil((steps - agent.total_steps) / agent.samples)
            agent.train(remaining, after_iteration, config.log_interval)
        if watch.well:
            save(final=True)
        logger.plot()
    if asked.is_set():
        console.print(f"stopped and saved; go on with: kouros train --resume {folder}")
    return folder


class _Forgiving:
    """A text stream that loses what a full disk has no room for."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._forgiving():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def _forgiving() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise


# Iterations until what could not be saved is tried again.
RETRY = 5
# After a divergence the learning rate comes back by this factor at each checkpoint.
RECOVERY = 1.2


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
      tries: how often the training went back to the same state.
    """

    def __init__(self, gradients: int) -> None:
        self._gradients, self._bad, self.tries = gradients, 0, 0

    @property
    def well(self) -> bool:
        return self._bad == 0

    def judge(self, log: dict[str, float]) -> str:
        """What is wrong, when so many bad rows came one after the other that it will not mend; else empty.

        Raises:
          DivergedError: going back with a smaller step has not helped for :data:`ROLLBACKS` times.
        """
        trouble = self._trouble(log)
        self._bad = self._bad + 1 if trouble else 0
        if self._bad < PATIENCE:
            return ""
        if self.tries == ROLLBACKS:
            raise DivergedError(
                f"the training diverges ({trouble}) after {ROLLBACKS} times half the learning rate; "
                "checkpoint.pt is of before: look at the rewards and observations"
            )
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


PATIENCE = 3
LARGEST_KL = 1.0
ROLLBACKS = 20


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


def resumed(config: TrainConfig, device: str) -> TrainConfig:
    """The configuration of the run ``config.resume``, with this call's ``steps`` (if given) and ``minutes``.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: this call asks for something else than the run began with.
    """
    assert config.resume
    folder = config.resume
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"resume={folder}: no config.json there; name the folder of a run")
    saved: dict[str, Any] = json.loads(path.read_text("utf-8"))
    begun = TrainConfig(
        task=saved["task"],
        randomize=saved.get("randomize", "none"),  # a run from before there was any
        seed=saved["seed"],
        env=from_plain(HumanoidEnvConfig, saved["env"]),
        ppo=from_plain(PPOConfig, saved["ppo"]),
    )
    # What this call did not say: the defaults, or those that the run's own task and preset set.
    cpu, here = _flat(TrainConfig()), _flat(train_defaults(device, begun.task, begun.randomize))
    flat = _flat(config)
    for name, theirs in _flat(begun).items():
        given = flat[name]
        if given not in (cpu[name], here[name], theirs):
            raise ValueError(f"{name}={given!r}: {folder} began with {theirs!r} and goes on so; leave it out")
    changes = {name: getattr(begun, name) for name in ("task", "randomize", "seed", "env", "ppo")}
    return dataclasses.replace(config, steps=config.steps or saved["steps"], **changes)


def _flat(config: TrainConfig) -> dict[str, Any]:
    """What a run cannot change on its way, by the names of the command line."""

    def fields(prefix: str, group: Any) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for field in dataclasses.fields(group):
            name, value = f"{prefix}{field.name}", getattr(group, field.name)
            flat |= fields(f"{name}.", value) if dataclasses.is_dataclass(value) else {name: value}
        return flat

    return {
        "task": config.task,
        "randomize": config.randomize,
        "seed": config.seed,
        **fields("env.", config.env),
        **fields("ppo.", config.ppo),
    }


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
