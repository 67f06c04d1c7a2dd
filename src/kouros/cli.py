"""The ``kouros`` command. Heavy imports wait until a command needs them: ``--help`` is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from kouros import __version__
from kouros.checks import require
from kouros.deploy.loop import LoopConfig
from kouros.devices import pick_device
from kouros.envs.config import HumanoidEnvConfig, Preset, RandomizationConfig, TerrainConfig
from kouros.learning.config import PPOConfig, TrainConfig, train_defaults

if TYPE_CHECKING:
    from rich.table import Table

    from kouros.envs.evaluation import WalkResult


@dataclasses.dataclass
class Eval:
    """Test whether a policy walks: seeded episodes, no help from the training terms."""

    policy: tyro.conf.Positional[Path] = Path("walk")
    """Run folder, .pt file, or the name of a shipped policy."""
    episodes: int = 256
    """Number of episodes, side by side."""
    seconds: float = 20.0
    """Length of an episode, s; the command changes every 5 s."""
    seed: int = 12345
    """Seed of initial states and commands."""
    collisions: Literal["feet", "full"] = "feet"
    """feet: as in training. full: every shape of the robot, with the ground and with itself."""
    suite: Literal["walk", "robust", "rough"] = "walk"
    """walk: the walking test. robust: the same under ten conditions, heavier to pushed, one at a time and all
    together. rough: straight ahead on slopes, stairs and more."""
    randomization: RandomizationConfig = dataclasses.field(default_factory=RandomizationConfig)
    """What differs from episode to episode, in the suite walk."""
    output: Path | None = None
    """JSON file; eval.json beside the policy if not given (in this folder for a shipped one)."""

    def __post_init__(self) -> None:
        for name in ("episodes", "seconds"):
            require(self, name, 0 < getattr(self, name) < math.inf, "must be greater than 0, and finite")
        alone = self.suite == "walk" or self.randomization == RandomizationConfig()
        require(self, "suite", alone, "has conditions of its own; leave --randomization out")


@dataclasses.dataclass
class Play:
    """See a policy: an mp4, or MuJoCo's viewer."""

    policy: tyro.conf.Positional[Path] = Path("walk")
    """Run folder, .pt file, or the name of a shipped policy."""
    command: tuple[float, float, float] | None = None
    """vx, vy (m/s) and yaw rate (rad/s) to hold; a tour of several commands if not given."""
    seconds: float = 20.0
    """Length of the video, s."""
    output: Path | None = None
    """Video file; walk.mp4 beside the policy if not given (in this folder for a shipped one)."""
    width: int = 640
    """Width of the video, pixels, up to 1280."""
    height: int = 480
    """Height of the video, pixels, up to 720."""
    fps: int = 25
    """Pictures per second."""
    seed: int = 0
    """Seed of the initial state."""
    terrain: str | None = None
    """Type of ground, such as stairs_up (docs/terrain.md); a plane if not given."""
    difficulty: float = 0.5
    """Of that ground, 0 to 1 on the scale that the policy was trained with."""
    viewer: bool = False
    """Open MuJoCo's viewer instead of writing a video; needs a display."""
    replay: Path | None = None
    """Instead of a policy, sick-ITERATION.npz of a run: what a world did before it turned sick, slowly."""


@dataclasses.dataclass
class Export:
    """Write the policy file: policy.onnx, sensors in and joint targets out."""

    policy: tyro.conf.Positional[Path] = Path("walk")
    """Run folder, .pt file, or the name of a shipped policy."""
    output: Path | None = None
    """ONNX file; policy.onnx beside the policy if not given (in this folder for a shipped one)."""


@dataclasses.dataclass
class Report:
    """Write report.html into a run's folder: curves, walking test, configuration and a video on one page."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    episodes: int = 32
    """Episodes of the walking test, where there is no eval.json of the policy as it is now."""

    def __post_init__(self) -> None:
        require(self, "episodes", self.episodes > 0, "must be greater than 0")


@dataclasses.dataclass
class Compare:
    """Write a page with the curves of several runs on common axes, and what else differs between them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, two to eight."""
    output: Path = Path("compare.html")
    """HTML file."""


@dataclasses.dataclass
class Inspect:
    """Say what a policy file says of itself: robot, joints, gains, sensors, clocks, training."""

    policy: tyro.conf.Positional[Path] = Path("policy.onnx")
    """ONNX file."""
    json: bool = False
    """The whole contract, as JSON."""


@dataclasses.dataclass
class Verify:
    """Try a policy file in a world that it was not trained in, beside the one it was; writes a page."""

    policy: tyro.conf.Positional[Path] = Path("policy.onnx")
    """ONNX file; its plain form must lie beside it."""
    episodes: int = 100
    """Episodes in the training environment, and in the world that differs in everything."""
    each: int = 20
    """Episodes in each of the worlds that differ in one thing."""
    seconds: float = 20.0
    """Length of an episode, s."""
    seed: int = 0
    """Seed of first states, commands, pushes and noise."""
    push: float | None = None
    """Speed that a push adds to the base every 4 s, m/s.
    If not given: 0.5 for a policy that holds poses, none for another."""
    workers: int | None = None
    """Processes; as many as there are cores if not given."""
    output: Path | None = None
    """Markdown file, its figure beside it; verify.md beside the policy if not given."""

    def __post_init__(self) -> None:
        for name in ("episodes", "each", "seconds", "workers"):
            ok = getattr(self, name) is None or 0 < getattr(self, name) < math.inf
            require(self, name, ok, "must be greater than 0, and finite")


@dataclasses.dataclass
class Run:
    """Move a robot by a policy file, in real time: a simulated one, or one over UDP (docs/deploy.md).
    Ctrl-C, or Enter, brakes it."""

    policy: tyro.conf.Positional[Path] = Path("policy.onnx")
    """ONNX file."""
    robot: Literal["sim", "udp"] = "sim"
    """sim: a simulated robot in a process of its own, reached as a real one is. udp: one that is there."""
    address: str = "127.0.0.1:47470"
    """Host and port of the robot's end, for udp."""
    command: tuple[float, float, float] = (0.5, 0.0, 0.0)
    """vx, vy (m/s) and yaw rate (rad/s) of a policy that walks; one that holds a pose holds the default."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = dataclasses.field(default_factory=LoopConfig)
    push: float = 0.0
    """Of the simulated robot: speed that a push from a random side adds to the base every 5 s, m/s."""
    fault: Literal["none", "silent", "frozen", "nan", "garbage", "killed"] = "none"
    """Of the simulated robot: what its sensors do wrong, to see it braked."""
    fault_after: float = 5.0
    """Time of the fault, s after the policy's first command."""
    seed: int = 0
    """Of the simulated robot: seed of its noise, pushes and order of joints."""
    output: Path | None = None
    """JSON file for the report."""

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        require(self, "address", bool(host) and port.isdigit() and int(port) < 65536, "must be HOST:PORT")
        require(self, "command", all(map(math.isfinite, self.command)), "must be finite")


@dataclasses.dataclass
class Bench:
    """Measure this machine: raw physics, environment and learning, in one run."""

    task: str = "walk"
    """Task, by name: it sets the defaults of --env."""
    randomize: Preset = "none"
    """A preset of --env.randomization."""
    worlds: tuple[int, ...] = ()
    """Numbers of worlds to measure with, one after the other.
    If not given: 256, on a GPU 2,048, 4,096 and 16,384."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto for a GPU where there is one."""
    seconds: float = 5.0
    """Time for each number of worlds, s."""
    output: Path | None = None
    """JSON file to save the figures in."""
    env: HumanoidEnvConfig = dataclasses.field(default_factory=HumanoidEnvConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)


@dataclasses.dataclass
class Doctor:
    """Say what this machine can do, and what to install for the rest."""


def train(config: TrainConfig) -> None:
    from kouros.deploy.export import check_measured
    from kouros.learning.run import train

    check_measured(config.env.actor_observations, config.env.wrappers)  # now, not after the training
    folder = train(config, explicit=True)  # a resume's defaults are the run's, see _commands
    if os.environ.get("RANK", "0") != "0":
        return  # of torchrun's processes the first alone writes
    export(Export(folder))
    if config.report:
        try:
            report(Report(folder))
        except (Exception, KeyboardInterrupt) as error:  # the run is whole without it
            reason = str(error) or "interrupted"
            print(f"kouros: no report ({reason}); kouros report {folder} makes one", file=sys.stderr)


def evaluate(config: Eval) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from kouros.envs.evaluation import ROBUST, ROUGH, evaluate_walk, robust_randomization, rough_field
    from kouros.files import write_json
    from kouros.learning.checkpoint import digest
    from kouros.learning.run import load_policy

    actor, env_config, contract = load_policy(config.policy)
    output = config.output or _beside(config.policy, "eval.json")
    conditions: dict[str, dict[str, Any]] = {"": {"randomization": config.randomization}}
    if config.suite == "robust":
        conditions = {name: {"randomization": robust_randomization(name, env_config)} for name in ROBUST}
    elif config.suite == "rough":
        conditions = {name: {"terrain": rough_field(name), "straight": True} for name in ROUGH}
    results: dict[str, WalkResult] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{config.episodes} episodes of {config.seconds:g} s")
        for i, (name, condition) in enumerate(conditions.items()):

            def report(done: int, total: int, before: int = i) -> None:
                progress.update(task, completed=before * total + done, total=len(conditions) * total)

            results[name] = evaluate_walk(
                actor.act,
                env_config,
                config.episodes,
                config.seconds,
                config.seed,
                config.collisions,
                progress=report,
                statistics=contract.get("statistics"),
                **condition,
            )
    test = {name: getattr(config, name) for name in ("policy", "seed", "collisions", "suite")}
    test |= {"weights": digest(actor.state_dict()), "randomization": dataclasses.asdict(config.randomization)}
    plain = {
        name: {**dataclasses.asdict(result), "failures": result.failures()}
        for name, result in results.items()
    }
    write_json(output, {**test, **(plain[""] if config.suite == "walk" else {"conditions": plain})})
    console = Console()
    console.print(
        _walk_table(results[""], config) if config.suite == "walk" else _suite_table(results, config)
    )
    console.print(f"saved in {output}")


def _walk_table(result: WalkResult, config: Eval) -> Table:
    from rich.table import Table

    table = Table("figure", "measured", "walking means", "", title=str(config.policy))
    colours = {"missed": "[red]missed[/red]", "ok": "[green]ok[/green]"}
    for what, measured, bar, mark in result.table():
        table.add_row(what, measured, bar, colours.get(mark, ""))
    return table


def _suite_table(results: dict[str, WalkResult], config: Eval) -> Table:
    from rich.table import Table

    table = Table("condition", title=f"{config.policy}, {config.episodes} episodes each")
    titles = ("without a fall", "95 % interval", "velocity error (m/s)", "yaw rate error (rad/s)")
    for title in (*titles, "got 4 m away")[: 5 if config.suite == "rough" else 4]:
        table.add_column(title, justify="right")
    for name, r in results.items():
        interval = f"{100 * r.survival_low:.1f} to {100 * r.survival_high:.1f}"
        figures = (f"{r.velocity_error:.3f}", f"{r.yaw_rate_error:.3f}", f"{100 * r.crossed:.1f} %")
        table.add_row(name, f"{100 * r.survival:.1f} %", interval, *figures[: len(table.columns) - 3])
    return table


def play(config: Play) -> None:
    from kouros.envs.play import open_viewer, write_replay, write_video
    from kouros.envs.replay import Replay
    from kouros.learning.run import load_policy

    if config.replay:
        output = config.output or config.replay.with_suffix(".mp4")
        print(write_replay(Replay.load(config.replay), output, (config.width, config.height)))
        print(f"saved {output}")
        return
    actor, env_config, contract = load_policy(config.policy)
    statistics = contract.get("statistics")
    ground = TerrainConfig()
    if config.terrain:
        types, difficulty = 3 * (config.terrain,), (config.difficulty, config.difficulty)
        ground = dataclasses.replace(env_config.terrain, types=types, levels=3, difficulty=difficulty)
    env_config = dataclasses.replace(env_config, terrain=ground)
    if config.viewer:
        open_viewer(actor.act, env_config, config.command, config.seed, statistics)
        return
    output = config.output or _beside(config.policy, "walk.mp4")
    write_video(
        actor.act,
        env_config,
        output,
        config.command,
        config.seconds,
        (config.width, config.height),
        config.fps,
        config.seed,
        statistics,
    )
    print(f"saved {output}")


def report(config: Report) -> None:
    from kouros.report import write_report

    print(f"saved {write_report(config.run, config.episodes)}")


def compare(config: Compare) -> None:
    from kouros.report import write_comparison

    print(f"saved {write_comparison(config.runs, config.output)}")


def export(config: Export) -> None:
    from kouros.deploy.export import OnnxExporter
    from kouros.envs.contract import record_policy
    from kouros.learning.run import load_policy

    actor, env_config, contract = load_policy(config.policy)
    output = config.output or _beside(config.policy, "policy.onnx")
    exporter = OnnxExporter(actor, contract)
    recording = record_policy(actor.act, env_config, statistics=contract.get("statistics"))
    difference = exporter.export(output, recording)
    print(f"saved {output} (replays 1,000 steps within {difference:.1g})")


def inspect(config: Inspect) -> None:
    from kouros.deploy.policy_file import read_policy_file

    _, contract = read_policy_file(config.policy)
    if config.json:
        print(json.dumps(contract, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    training, joints = contract.get("training", {}), contract["joint_names"]
    console.print(
        f"[bold]{config.policy}[/bold]: contract version {contract['contract_version']}, "
        f"digest {contract['digest'][:12]}"
    )
    facts = {
        "robot": f"{contract['robot']}, {len(joints)} joints, {contract['control_mode']} control",
        "control period": f"{contract['control_dt']:g} s",
        "action": f"about {contract['action_about']}, within +-{contract['action_limit']:g}",
        "wrappers": ", ".join(contract["wrappers"]) or "none",
        "observation": ", ".join(f"{term['name']} ({term['size']})" for term in contract["observations"]),
        "training": ", ".join(f"{name} {value}" for name, value in training.items() if value) or "not said",
    }
    for name, text in facts.items():
        console.print(f"  {name}: {text}", highlight=False)
    table = Table("input", "size", "unit")
    for name, sensor in contract["sensors"].items():
        table.add_row(name, str(sensor["size"]), sensor["unit"])
    table.add_row("state", str(contract["state"]["size"]), contract["state"]["unit"])
    console.print(table)
    table = Table(Column("joint", no_wrap=True), box=None, padding=(0, 0, 0, 1))
    for title in ("default\nrad", "range\nrad", "kp\nNm/rad", "kd\nNms/rad", "most\nNm", "scale\nrad"):
        table.add_column(title, justify="right", no_wrap=True)
    columns = ("default_joint_pos", "joint_range", "stiffness", "damping", "effort_limit", "action_scale")
    for joint, *figures in zip(joints, *(contract[name] for name in columns), strict=True):
        pos, (low, high), *rest = figures
        table.add_row(joint, f"{pos:.3f}", f"{low:.2f}..{high:.2f}", *(f"{x:.3g}" for x in rest))
    console.print(table)


def verify(config: Verify) -> None:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from kouros.verify import SURVIVES, verify, write_report

    output = config.output or config.policy.parent / "verify.md"
    with Progress(transient=True) as progress:
        task = progress.add_task("episodes")
        difference, trials = verify(
            config.policy,
            config.episodes,
            config.each,
            config.seconds,
            config.seed,
            config.push,
            config.workers,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    write_report(output, str(config.policy), difference, trials, config.seconds)
    posed = not math.isnan(trials[-1].pose_error)
    error = "pose error (rad)" if posed else "velocity error (m/s)"
    table = Table("world", "without a fall", error, "", title=str(config.policy))
    for trial in trials:
        mark = "[green]ok[/green]" if trial.survival >= SURVIVES else "[red]broken[/red]"
        value = trial.pose_error if posed else trial.velocity_error
        table.add_row(trial.name, f"{100 * trial.survival:.0f} % of {trial.episodes}", f"{value:.3f}", mark)
    console = Console()
    console.print(table)
    console.print(f"first targets on the same states equal within {difference:.1g} rad; saved in {output}")


def run(config: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    from kouros.deploy.loop import operator_stop, run_loop, ticks_per_step
    from kouros.deploy.runner import PolicyRunner
    from kouros.deploy.udp import UdpRobot
    from kouros.files import write_json

    console = Console()
    policy = PolicyRunner(config.policy)
    if not policy.sensors:
        raise ValueError(f"policy {config.policy}: a plain network; run the policy file beside it")
    ticks_per_step(config.loop.rate, policy.control_dt)
    pose = dict(zip(policy.joint_names, policy.contract["default_joint_pos"], strict=True))
    given = {"command": list(config.command), "pose_command": pose}
    host, _, port = config.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        address = (host, int(port))
        if config.robot == "sim":
            address = stack.enter_context(_simulated_robot(config, policy.contract["robot"]))
        robot = stack.enter_context(contextlib.closing(UdpRobot(address, policy.contract)))
        stop = stack.enter_context(operator_stop())
        report = run_loop(policy, robot, config.loop, lambda seconds: given, stop, console.print)
    if not report.realtime:
        console.print("no real-time priority: run as root, or grant rtprio in /etc/security/limits.conf")
    table = Table(
        "us", "median", "p99", "largest", title=f"{len(report.sent)} ticks of {1e3 * report.period:g} ms"
    )
    for row in report.table():
        table.add_row(*row)
    console.print(table)
    console.print(
        f"missed deadlines: {report.missed} (later than {1e3 * config.loop.late:g} ms); ticks without new "
        f"sensors: {report.silent}; datagrams that were no messages: {robot.garbage}"
    )
    if report.limited:
        most = sorted(report.limited.items(), key=lambda item: -item[1])[:6]
        console.print("ticks with a limited target: " + ", ".join(f"{joint} {n}" for joint, n in most))
    if config.output:
        write_json(config.output, dataclasses.asdict(report))
    if report.fault:
        raise RuntimeError(f"the robot was braked: {report.reason}")


@contextlib.contextmanager
def _simulated_robot(config: Run, robot: str) -> Iterator[tuple[str, int]]:
    """The address of a simulated robot, in a process that ends with the loop."""
    import subprocess

    command = [sys.executable, "-m", "kouros.deploy.simulator", "--robot", robot]
    command += ["--parent", str(os.getpid())]
    for name in ("seed", "push", "fault", "fault_after"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    # Ctrl-C is the loop's: the robot must still be there to be braked.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("robot='sim': the simulated robot did not start; it needs MuJoCo")
            yield "127.0.0.1", int(line)
        finally:
            process.kill()


def bench(config: Bench) -> None:
    from kouros.files import write_json
    from kouros.learning.bench import Bench as Layers
    from kouros.learning.bench import report

    device = pick_device(config.device)
    worlds = config.worlds or ((256,) if device == "cpu" else (2048, 4096, 16384))
    results = [
        Layers(dataclasses.replace(config.env, num_envs=n), config.ppo, device).measure(config.seconds)
        for n in worlds
    ]
    report(results)
    if config.output:
        write_json(config.output, results)


def doctor(config: Doctor) -> None:
    from kouros.doctor import diagnose

    if not diagnose():
        raise RuntimeError("something that training or seeing it needs is missing, see the table")


def _beside(policy: Path, name: str) -> Path:
    """A file in the policy's own folder, in this one for a shipped policy; of an older checkpoint of a run
    named after that."""
    folder = policy if policy.is_dir() else policy.parent
    return folder / (f"{policy.stem}-{name}" if policy.stem.startswith("checkpoint-") else name)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (TrainConfig, train),
    "eval": (Eval, evaluate),
    "play": (Play, play),
    "report": (Report, report),
    "compare": (Compare, compare),
    "export": (Export, export),
    "inspect": (Inspect, inspect),
    "verify": (Verify, verify),
    "run": (Run, run),
    "bench": (Bench, bench),
    "doctor": (Doctor, doctor),
}


def _given(args: list[str], option: str, otherwise: str) -> str:
    """The last value of an option on the command line."""
    given = [b for a, b in itertools.pairwise(args) if a == option]
    given += [a.removeprefix(f"{option}=") for a in args if a.startswith(f"{option}=")]
    return given[-1] if given else otherwise


def _commands(args: list[str]) -> Any:
    """What tyro parses; the defaults of ``train`` and ``bench`` are those of the device, task and preset, or
    those of the run that goes on."""
    kinds: dict[str, Any] = {}
    for name, (kind, _) in COMMANDS.items():
        default: dict[str, Any] = {}
        if name in ("train", "bench") and args[:1] == [name]:
            resume = _given(args, "--resume", "") if name == "train" else ""
            if resume and (Path(resume) / "config.json").is_file():
                from kouros.learning.run import begun

                begin = begun(Path(resume))
            else:
                begin = train_defaults(
                    pick_device(_given(args, "--device", "auto")) if name == "train" else "cpu",
                    _given(args, "--task", "walk"),
                    _given(args, "--randomize", "none"),  # type: ignore[arg-type]
                )
            default = {"default": begin if name == "train" else Bench(env=begin.env)}
        kinds[name] = Annotated[kind, tyro.conf.subcommand(name, **default)]
    return Union[tuple(kinds.values())]  # noqa: UP007 (made at run time)


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"kouros {__version__}")
        return 0
    try:
        config: Any = tyro.cli(_commands(args), prog="kouros", args=args)
        command = next(function for kind, function in COMMANDS.values() if isinstance(config, kind))
        command(config)
    except BrokenPipeError:  # kouros train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("KOUROS_TRACEBACK"):
            raise
        missing = isinstance(error, ModuleNotFoundError)
        fix = "; this command needs all that kouros depends on: pip install kouros" if missing else ""
        print(f"kouros: {error}{fix}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
