"""Pages about runs: one file each, with all that is on it inside, so that it can be sent to anybody."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from kouros.envs.config import RandomizationConfig, flatten
from kouros.envs.evaluation import WalkResult, evaluate_walk
from kouros.envs.play import write_video
from kouros.files import plain, read_table, replacing
from kouros.learning.checkpoint import digest, load
from kouros.learning.config import DEFAULT_STEPS, train_defaults
from kouros.learning.log import read_metrics
from kouros.learning.run import load_policy

Rows = list[dict[str, float]]

PROGRESS = ("episode/length", "episode/return", "task/velocity_error", "task/yaw_rate_error")
# Sections of curves: (title, what is said of it, prefixes of keys in the log, whether its charts are large).
SECTIONS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Progress", "what it is all for", PROGRESS, True),
    (
        "Reward",
        "each term times its weight, per second; mean: all of them, per control step",
        ("reward/",),
        False,
    ),
    ("Task", "help, terrain and curriculum", ("task/", "curriculum/"), False),
    ("Learning", "means over the gradient steps of an iteration", ("learning/",), False),
    ("Robots", "what was randomized: mean over the worlds, and deviation", ("randomization/",), False),
    (
        "Speed and hardware",
        "seconds an iteration; CPU as a percentage of one core",
        ("time/", "hardware/"),
        False,
    ),
)
UNITS = {
    "episode/length": "steps",
    "task/velocity_error": "m/s",
    "task/yaw_rate_error": "rad/s",
    "time/steps_per_second": "/s",
    "hardware/cpu_percent": "%",
    "hardware/gpu_percent": "%",
    "hardware/memory_gb": "GB",
    "hardware/gpu_memory_gb": "GB",
}
COUNTS = ("iteration", "steps", "minutes")
# Readable on white and on black.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#d946ef", "#eab308", "#ef4444", "#06b6d4", "#84704f")
# Points of a curve: as many as a small chart can show.
POINTS = 200
# A drawn colour that stands for that of the page's text, dark or light.
INK = "#010203"
# Of the video: walk a curve. One that follows no commands stands.
COMMAND = (0.6, 0.0, 0.3)
# Nothing is loaded from anywhere, and no script runs, whatever a file of the run holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; media-src data:; img-src data:"


def write_report(folder: Path, episodes: int = 32) -> Path:
    """Write ``report.html`` into a run's folder: video, walking test, curves, configuration, origin.

    The walking test is that of ``eval.json`` if it is of this policy; else it is made, not saved.

    Args:
      folder: the run's.
      episodes: of 20 s, where the test has to be made.

    Returns:
      The page.

    Raises:
      FileNotFoundError, ValueError: no run there, or one without a log; a policy that is damaged or of
        another version.
      OSError: the page cannot be written.
    """
    rows, config = _read_run(folder)
    if not (folder / "policy.pt").is_file():
        raise FileNotFoundError(f"run {folder}: no policy.pt; kouros train --resume {folder} writes one")
    actor, env_config, contract = load_policy(folder)
    statistics, training = contract.get("statistics"), contract.get("training", {})
    result, test = _saved_test(folder)
    if result is None:
        with Progress(transient=True) as progress:
            task = progress.add_task(f"{episodes} episodes of 20 s")

            def show(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            result = evaluate_walk(actor.act, env_config, episodes, progress=show, statistics=statistics)
        test = f"{episodes} episodes of 20 s; kouros eval tests more"
    failures = result.failures()
    what = "walks" if result.walks else "stands"
    verdict = f"{what}: every figure holds" if not failures else f"figures missed: {len(failures)}"
    name = folder.resolve().name
    minutes, steps = f"{rows[-1]['minutes']:.1f}", f"{rows[-1]['steps']:.2f}"
    head = f"""<header><h1>{_text(name)}</h1>
<p class="facts">{_text(config["task"])} · {steps} million control steps · {minutes} minutes ·
{_text(training.get("device") or "device not said")} · seed {_text(config["seed"])}</p>
<p class="badge {"missed" if failures else "ok"}">{verdict}</p></header>"""

    def film(path: Path) -> None:
        write_video(actor.act, env_config, path, COMMAND, 8.0, (480, 360), 12, 0, statistics, draft=True)

    cells = [
        (_text(row[0]), _text(row[1]), _text(row[2]), f'<span class="{row[3]}">{row[3]}</span>')
        for row in result.table()
    ]
    tested = _table(("figure", "measured", "should be", ""), cells)
    origin = {
        "kouros": training.get("kouros"),
        "Git revision": training.get("revision"),
        "device": training.get("device"),
        "seed": config["seed"],
        "minutes of training": minutes,
        "control steps": f"{1e6 * rows[-1]['steps']:,.0f}",
        "iterations": f"{rows[-1]['iteration']:,.0f}",
    }
    flat, default = flatten(config), flatten(_defaults(config, training.get("device") or "cpu"))
    changed = [
        (_key(key), *(_value(table[key]) if key in table else "-" for table in (flat, default)))
        for key in {**flat, **default}
        if flat.get(key) != default.get(key) and key not in ("run", "resume")
    ]
    usual = "It has the defaults of its task, preset and device throughout."
    facts = _table(
        (),
        [(_text(key), _text("not said" if value in (None, "") else value)) for key, value in origin.items()],
    )
    every = _table(("option", "value"), [(_key(key), _value(value)) for key, value in flat.items()])
    body = f"""{head}
<div class="pair"><div class="card">{_video(film)}{facts}</div>
<div class="card scroll">{tested}<p class="note">{_text(test)}</p></div></div>
{_curves({name: rows})}
<h2>Configuration <small>what differs from the defaults of its task, preset and device</small></h2>
<div class="card scroll">{_table(("option", "this run", "default"), changed, usual)}
<details><summary>all {len(flat)} options</summary>{every}</details></div>"""
    return _write(folder / "report.html", name, body)


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write a page with the curves of several runs on common axes, their last figures, and how they differ.

    Args:
      folders: of the runs, two or more.
      output: the page.

    Raises:
      FileNotFoundError, ValueError: one of them is no run, or has no log; fewer than two.
      OSError: the page cannot be written.
    """
    said = f"runs={', '.join(map(str, folders))}"
    if not 2 <= len(folders) <= len(COLOURS):
        raise ValueError(f"{said}: name two to {len(COLOURS)}, the lines that can be told apart on a chart")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"{said}: each of them once")
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    runs = {name: _read_run(folder) for name, folder in zip(names, folders, strict=True)}
    logs = {name: rows for name, (rows, _) in runs.items()}
    marks = [f'<i style="background:{COLOURS[i]}"></i>{_text(name)}' for i, name in enumerate(names)]
    tests = [_saved_test(folder)[0] for folder in folders]

    def figures(keys: Iterable[str]) -> str:
        cells = [(_key(key), *(_number(_last(rows, key)) for rows in logs.values())) for key in keys]
        return _table(("key", *marks), cells)

    bar = {name: figure for test in tests if test for name, figure in test.bar.items()}
    tested = [
        (
            f"{_text(what)}, {_text(unit)}",
            *(f"{getattr(test, field):.3f}" if test and field in test.bar else "" for test in tests),
        )
        for field, (what, unit, _, _) in bar.items()
    ]
    flat = [flatten(config) for _, config in runs.values()]
    differing = [
        (_key(key), *(_value(config[key]) if key in config else "-" for config in flat))
        for key in {key: None for config in flat for key in config}
        if key not in ("run", "resume") and any(config.get(key) != flat[0].get(key) for config in flat)
    ]
    body = f"""<header><h1>{len(names)} runs compared</h1>
</header>
<div class="axis"><ul class="legend">{"".join(f"<li>{mark}</li>" for mark in marks)}</ul>
over <label><input type="radio" name="axis" checked> million control steps</label>
<label><input type="radio" name="axis" id="minutes"> minutes</label></div>
{_curves(logs, ("steps", "minutes"))}
<h2>Walking test <small>of each run's eval.json, as kouros eval writes it</small></h2>
<div class="card scroll">{_table(("figure", *marks), tested, "None of them has one yet.")}</div>
<h2>Last figures <small>means over the last twentieth of each log</small></h2>
<div class="card scroll">{figures((*COUNTS, *PROGRESS, "reward/mean"))}
<details><summary>all of them</summary>{figures(_keys(logs.values()))}</details></div>
<h2>Configuration <small>where they differ</small></h2>
<div class="card scroll">{_table(("option", *marks), differing, "Nowhere.")}</div>"""
    return _write(output, " · ".join(names), body)


def _read_run(folder: Path) -> tuple[Rows, dict[str, Any]]:
    """Its log and its configuration."""
    rows, path = read_metrics(folder / "metrics.jsonl"), folder / "config.json"
    if not rows or not path.is_file():
        missing = "config.json" if rows else "metrics.jsonl, or it is empty"
        raise FileNotFoundError(f"run {folder}: no {missing}; name the folder of a run that has begun")
    if not all(set(COUNTS) <= set(row) for row in rows):
        raise ValueError(f"{folder / 'metrics.jsonl'}: damaged: a row without one of {', '.join(COUNTS)}")
    return rows, read_table(path, "task", "seed", "env", "ppo")


def _saved_test(folder: Path) -> tuple[WalkResult | None, str]:
    """The walking test that ``kouros eval`` left, and what it was; None if there is none of this policy as it
    is now, under the conditions of the test."""
    path, policy = folder / "eval.json", folder / "policy.pt"
    if not path.is_file() or not policy.is_file():
        return None, ""
    saved = read_table(path)
    fields = [field.name for field in dataclasses.fields(WalkResult)]
    if not {*fields, "weights"} <= set(saved):  # another suite, another version
        return None, ""
    calm = plain(dataclasses.asdict(RandomizationConfig()))
    if saved["weights"] != digest(load(policy)["actor"]) or saved["randomization"] != calm:
        return None, ""
    figures: dict[str, Any] = {name: math.nan if saved[name] is None else saved[name] for name in fields}
    result = WalkResult(**figures)
    if result.seconds < 20.0:
        return None, ""
    return result, f"eval.json: {result.episodes} episodes of {result.seconds:g} s, seed {saved.get('seed')}"


def _defaults(config: Mapping[str, Any], device: str) -> Any:
    """What ``kouros train`` begins with for that task and preset, as ``config.json`` would hold it."""
    default = train_defaults(device, config["task"], config.get("randomize", "none"))
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return plain(
        {**dataclasses.asdict(default), "task": "walk", "randomize": "none", "steps": DEFAULT_STEPS[kind]}
    )


def _keys(logs: Iterable[Rows]) -> list[str]:
    """All keys of some logs but what counts the rows, in the order of their first appearance."""
    return [key for key in {key: None for rows in logs for row in rows for key in row} if key not in COUNTS]


def _last(rows: Rows, key: str) -> float:
    """Mean over the last twentieth of a log; what counts, as it ended."""
    values = [row.get(key, math.nan) for row in rows]
    return values[-1] if key in COUNTS else _mean(np.array(values[-max(1, len(values) // 20) :], float))


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _curves(runs: Mapping[str, Rows], axes: Sequence[str] = ("steps",)) -> str:
    """The sections with a chart for each key: small ones side by side, a line for each run."""
    left, parts = _keys(runs.values()), []
    for title, note, prefixes, large in SECTIONS:
        keys = [key for prefix in prefixes for key in left if key.startswith(prefix)]
        left = [key for key in left if key not in keys]
        if keys:
            figures = "".join(_figure(key, runs, axes, large) for key in keys)
            text = note if len(axes) > 1 else f"{note}; over million control steps"
            size = " large" if large else ""
            parts.append(f'<h2>{title} <small>{text}</small></h2><div class="charts{size}">{figures}</div>')
    return "\n".join(parts)


def _figure(key: str, runs: Mapping[str, Rows], axes: Sequence[str], large: bool) -> str:
    name = key if large else key.split("/", 1)[-1]
    last = ""
    if len(runs) == 1:
        unit = f" <small>{UNITS[key]}</small>" if key in UNITS else ""
        last = "".join(f"{_number(_last(rows, key))}{unit}" for rows in runs.values())
    charts = "".join(
        f'<div class="by-{axis}">{_chart([_curve(rows, axis, key) for rows in runs.values()], large)}</div>'
        for axis in axes
    )
    return (
        f'<figure class="card chart"><figcaption><span class="key">{_text(name)}</span>'
        f'<span class="last">{last}</span></figcaption>{charts}</figure>'
    )


def _curve(rows: Rows, axis: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """At most :data:`POINTS` points of a curve, each the mean of what lies there."""
    pairs = np.array([(row[axis], row.get(key, math.nan)) for row in rows], float)
    bins = np.array_split(pairs, min(POINTS, len(pairs)))
    return np.array([_mean(part[:, 0]) for part in bins]), np.array([_mean(part[:, 1]) for part in bins])


def _chart(curves: Sequence[tuple[np.ndarray, np.ndarray]], large: bool) -> str:
    """Curves as an SVG element that takes its ink from the page."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = (5.6, 1.9) if large else (2.2, 1.2)
    left, right, bottom = 0.5 / width, 1.0 - 0.14 / width, 0.22 / height
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left, bottom, right - left, 0.96 - bottom))
        for i, (x, y) in enumerate(curves):
            marker = "o" if np.isfinite(y).sum() == 1 else ""
            axes.plot(x, y, color=COLOURS[i], lw=1.4, marker=marker, ms=3)
        axes.spines[:].set_visible(False)
        axes.grid(color=INK, alpha=0.18, lw=0.5)
        axes.tick_params(length=0, colors=INK)
        axes.xaxis.set_major_locator(MaxNLocator(8 if large else 4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.set_xlim(0.0, 1.02 * max(x[-1] for x, _ in curves))
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True)
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # What a page does not need: its own size, addresses of namespaces, names that other charts have too.
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    return re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg)


def _video(write: Callable[[Path], None]) -> str:
    """A video element with the video in it, or a sentence where this machine cannot make one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        try:
            write(path)
        except (RuntimeError, OSError) as error:
            return f'<p class="note">No video: {_text(error)}</p>'
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<video controls autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _text(value: object) -> str:
    return html.escape(str(value))


def _key(name: str) -> str:
    return f"<code>{_text(name)}</code>"


def _value(value: object) -> str:
    return f"<code>{_text(json.dumps(value))}</code>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "") -> str:
    """A table of cells that are HTML already, or what is said where there are none."""
    if not rows:
        return f'<p class="note">{_text(empty)}</p>'
    titles = "".join(f"<th>{title}</th>" for title in head)
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}<tbody>{lines}</tbody></table>"


def _write(path: Path, title: str, body: str) -> Path:
    """The page, whole or not at all."""
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)} · Kouros</title>
<style>{style}</style></head><body>
{body}
</body></html>
"""
    with replacing(path) as temporary:
        temporary.write_text(page, "utf-8")
    return path
