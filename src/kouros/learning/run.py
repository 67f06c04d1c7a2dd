"""A training run: its folder, its log, its progress display and its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kouros import __version__
from kouros.devices import describe_device, has_gpu, pick_device
from kouros.envs.config import CALM, HumanoidEnvConfig
from kouros.envs.contract import check_contract, policy_contract, require_version
from kouros.envs.wrappers import make_env, make_policy_env
from kouros.files import replacing, write_json
from kouros.learning import checkpoint
from kouros.learning.config import DEFAULT_STEPS, PPOConfig, TrainConfig, train_defaults
from kouros.learning.monitor import (
    Hardware,
    WandbLogger,
    add_histogram,
    histogram,
    randomization_log,
    require_wandb,
)
from kouros.learning.networks import ActorNetwork, CriticNetwork
from kouros.learning.ppo import PPOAgent
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
# Seconds between histograms.
HISTOGRAM_INTERVAL = 30.0


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Train until ``config.steps`` or ``config.minutes``, whichever comes first; Ctrl-C saves.

    The run folder gets ``config.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoint.pt``
    (to resume from), ``policy.pt`` (weights and configuration) and ``learning_curve.png``.

    Returns:
      The run folder.

    Raises:
      FileExistsError: the folder holds a run already.
      FileNotFoundError, ValueError: the run to resume is missing, damaged or of another kind.
      OSError: the disk is full; what was saved before is whole.
      ImportError, RuntimeError: Weights & Biases is asked for, and is not installed, or refuses.
    """
    console = console or Console()
    device = pick_device(config.device)
    if config.resume:
        config = resumed(config, device)
    steps = config.steps or DEFAULT_STEPS[device.partition(":")[0]]
    folder = config.run or config.resume or Path("runs", f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    path = folder / "checkpoint.pt"
    if not config.resume and path.exists():
        raise FileExistsError(f"run={folder}: holds a run already; use --resume {folder} or another name")
    require_room(folder)
    if config.wandb:
        require_wandb(config.wandb)
    if device == "cpu" and config.device == "auto" and has_gpu():
        console.print("there is a GPU that cannot be used, kouros doctor says why: training on the CPU")
    if device.startswith("cuda"):
        console.print("on a GPU: the first use on a machine compiles the physics, for two minutes or so")
    env = make_env(config.env, device)
    agent = PPOAgent(env, config.ppo, config.seed)
    if config.resume:
        check_contract(checkpoint.load(path).get("contract"), env, f"checkpoint {path}")
        agent.load_checkpoint(path)
    write_json(folder / "config.json", {**dataclasses.asdict(config), "run": folder, "steps": steps})
    console.print(f"{config.task} · {env.simulation} · run folder {folder}")

    origin = {"run": str(folder), "kouros": __version__, "revision": _revision()}
    origin["device"] = describe_device(device)
    saved, overflown = -1, 0.0
    told = len(env.curriculum.manager.history) if env.curriculum else 0

    def save() -> None:
        nonlocal saved
        saved = agent.iteration
        training = {**origin, "task": config.task, "seed": config.seed, "steps": agent.total_steps}
        extra = {"contract": {**policy_contract(env), "training": training}}
        agent.save_checkpoint(path, **extra)
        policy = {**extra, **agent.policy_state()}
        checkpoint.save(folder / "policy.pt", policy)
        if config.keep:
            checkpoint.save(folder / f"policy-{agent.iteration:06}.pt", policy)

    start = time.monotonic()
    display = _Display(steps, config.minutes, console)
    wandb = WandbLogger(folder, config) if config.wandb else None
    hardware = Hardware(device)
    with _say_how_to_go_on(folder), RunLogger(folder, agent.iteration, wandb) as logger, display:

        def after_iteration(log: dict[str, float]) -> bool:
            nonlocal overflown, told
            minutes = logger.minutes + (time.monotonic() - start) / 60.0
            log |= {
                "iteration": agent.iteration,
                "steps": agent.total_steps / 1e6,
                "minutes": minutes,
                **hardware.read(),
                **randomization_log(env),
            }
            logger.write(log)
            logger.write_histograms(agent, every=HISTOGRAM_INTERVAL)
            display.show(log)
            for move in env.curriculum.manager.history[told:] if env.curriculum else ():
                told += 1
                console.print(
                    f"curriculum: {move['from']} -> {move['to']} after {move['episodes']} episodes, "
                    f"{100 * move['success_rate']:.0f} % successful"
                )
            if log.get("task/overflown_worlds", 0.0) > overflown:
                overflown = log["task/overflown_worlds"]
                console.print(
                    "[bold red]contacts overflow[/bold red]: MuJoCo Warp has no room for all and leaves some "
                    "out; raise CONTACTS in kouros/envs/scene.py"
                )
            if agent.iteration - saved >= config.save_interval:
                save()
                logger.plot(every=PLOT_INTERVAL)
            return stop.is_set() or agent.total_steps >= steps or minutes >= config.minutes

        with interrupted() as stop:  # after the iteration in hand
            remaining = max(0, math.ceil((steps - agent.total_steps) / agent.samples))
            if not remaining:
                console.print(f"{agent.total_steps:,} control steps are done; --steps N goes further")
            save()
            agent.train(remaining, after_iteration, config.log_interval)
            save()
            logger.plot()
    if stop.is_set():
        console.print(f"stopped and saved; go on with: kouros train --resume {folder}")
    return folder


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
def _say_how_to_go_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"{error}; what was saved is whole: make room, then kouros train --resume {folder}"
        raise OSError(text) from error


def from_plain(cls: type, values: dict[str, Any]) -> Any:
    """A configuration from plain data: JSON knows no tuples.

    Raises:
      ValueError: a field this version does not have.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise ValueError(f"{cls.__name__}: unknown field {', '.join(sorted(unknown))}")
    hints = get_type_hints(cls)

    def made(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hints[name]):
            return from_plain(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: made(name, value) for name, value in values.items()})


class RunLogger:
    """``metrics.jsonl`` (a line every ``log_interval`` iterations), TensorBoard events, the learning curve.

    Args:
      folder: the run's.
      iteration: what came after it in an interrupted run is forgotten, as the checkpoint did.
      wandb: also gets all of it, and is closed with it.
    """

    def __init__(self, folder: Path, iteration: int, wandb: WandbLogger | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._wandb = wandb
        path = folder / "metrics.jsonl"
        rows = read_metrics(path) if iteration else []
        self.rows = [row for row in rows if row["iteration"] <= iteration]
        self.minutes = self.rows[-1]["minutes"] if self.rows else 0.0
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._plotted = self._counted = -math.inf
        purge = self.rows[-1]["iteration"] + 1 if self.rows else None
        self._board = SummaryWriter(str(folder), purge_step=purge)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.close()

    def write(self, log: dict[str, float]) -> None:
        self.rows.append(log)
        self._file.write(json.dumps(log) + "\n")
        self._file.flush()
        for key, value in log.items():
            self._board.add_scalar(key, value, int(log["iteration"]))
        if self._wandb:
            self._wandb.write(log)

    def write_histograms(self, agent: PPOAgent, every: float = 0.0) -> None:
        """Of the last step's actions and observations, unless that was less than ``every`` seconds ago."""
        if time.monotonic() - self._counted < every:
            return
        self._counted = time.monotonic()
        counted = {name: histogram(values) for name, values in agent.last_step().items()}
        drawn = {f"histogram/{name}": h for name, h in counted.items() if h}
        for name, h in drawn.items():
            add_histogram(self._board, name, h, agent.iteration)
        if self._wandb:
            self._wandb.write_histograms(drawn, agent.iteration)

    def plot(self, every: float = 0.0) -> None:
        """``learning_curve.png`` of all rows so far, unless it was drawn less than ``every`` seconds ago."""
        if self.rows and time.monotonic() - self._plotted >= every:
            plot_learning_curve(self.rows, self.folder / "learning_curve.png")
            self._plotted = time.monotonic()


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
