"""The log of a run, and the pages about runs: opened in a browser, where there is one."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from kouros import report
from kouros.cli import main
from kouros.envs.config import HumanoidEnvConfig, RandomizationConfig, flatten, stand
from kouros.envs.evaluation import evaluate_walk
from kouros.files import write_json
from kouros.learning import checkpoint
from kouros.learning.config import PPOConfig, TrainConfig
from kouros.learning.log import read_metrics
from kouros.learning.monitor import Hardware, histogram, randomization_log
from kouros.learning.run import resumed, train
from kouros.report import write_comparison, write_report

CHROMIUM = shutil.which("chromium")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")
HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\">'\"&"
# Asks the browser, at the end of a copy of the page, what has become of it.
QUESTIONS = """<script>
addEventListener("load", () => {
  const film = document.querySelector("video"), seen = element => element.getBoundingClientRect();
  const answer = () => document.documentElement.dataset.answer = JSON.stringify({
    title: document.title, scripts: document.scripts.length, text: document.body.textContent,
    images: [...document.images].map(image => image.naturalWidth),
    charts: [...document.querySelectorAll("svg")].map(seen).filter(box => box.width * box.height > 0).length,
    lines: document.querySelectorAll("svg path").length,
    film: film && [film.videoWidth, film.videoHeight, film.duration],
    width: document.documentElement.scrollWidth,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
  });
  if (film && film.readyState < 1) film.onloadedmetadata = answer; else answer();
});
</script>"""


def tiny(run: Path, env: HumanoidEnvConfig | None = None, **changes: Any) -> TrainConfig:
    env = dataclasses.replace(env or HumanoidEnvConfig(), num_envs=8)
    ppo = PPOConfig(horizon=8, minibatches=2, actor_hidden=(16,), critic_hidden=(16,))
    return TrainConfig(**{"run": run, "steps": 192, "device": "cpu", "env": env, "ppo": ppo, **changes})


def quickly(patch: pytest.MonkeyPatch) -> None:
    """Reports with another film, and a short test."""
    patch.setattr(report, "write_video", lambda actor, config, path, *_, **__: film(path))
    patch.setattr(report, "evaluate_walk", functools.partial(evaluate_walk, seconds=1.0))


def film(path: Path) -> None:
    """A second of nothing much, in the format of the real one."""
    import imageio_ffmpeg

    video = imageio_ffmpeg.write_frames(str(path), (64, 48), fps=12, macro_block_size=2)
    video.send(None)
    for i in range(12):
        video.send(bytes([20 * i]) * (64 * 48 * 3))
    video.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs that differ, with their reports; the second on a machine that cannot draw."""
    folder = tmp_path_factory.mktemp("runs")
    random = RandomizationConfig(mass=(0.8, 1.2), push_velocity=(0.0, 1.0))
    first = train(tiny(folder / "first", dataclasses.replace(HumanoidEnvConfig(), randomization=random)))
    second = train(tiny(folder / "second", stand(), task="stand", seed=1))

    def no_film(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot draw here (<no GL>)")

    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        write_report(first, episodes=2)
        patch.setattr(report, "write_video", no_film)
        write_report(second, episodes=2)
    write_comparison([first, second], folder / "compare.html")
    return [first, second]


def chromium(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser that never was anywhere, and asks nobody."""
    assert CHROMIUM
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
    return subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"),
            *(f"--disable-{what}" for what in quiet),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
            *("--virtual-time-budget=10000", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def said(page: Path, folder: Path, width: int = 1280) -> dict[str, Any]:
    """What a browser says of a page; nothing may have gone to its console."""
    text = page.read_text("utf-8").replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    copy = folder / "copy.html"
    copy.write_text(text.replace("</body>", f"{QUESTIONS}</body>"), "utf-8")
    done = chromium(copy, folder, f"--window-size={width},2000", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr

    class Finder(HTMLParser):
        answer = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.answer = dict(attrs).get("data-answer") or self.answer

    finder = Finder()
    finder.feed(done.stdout)
    return json.loads(finder.answer)


class TestInABrowser:
    @in_a_browser
    def test_a_report_is_whole(self, runs: list[Path], tmp_path: Path) -> None:
        """It shows every chart, term and option, plays its video, loads nothing and says no error."""
        seen = said(runs[0] / "report.html", tmp_path)
        rows = read_metrics(runs[0] / "metrics.jsonl")
        keys = {key for row in rows for key in row} - set(report.COUNTS)
        assert seen["charts"] == len(keys)
        assert seen["lines"] > 2 * len(keys)
        for key in keys:
            assert key.split("/")[-1] in seen["text"]
        for option in flatten(json.loads((runs[0] / "config.json").read_text())):
            assert option in seen["text"]
        width, height, seconds = seen["film"]
        assert (width, height) == (64, 48) and 0.5 < seconds < 2.0
        assert all(seen["images"]) and seen["scripts"] == 1
        assert all(name.startswith("data:") for name in seen["loaded"])

    @in_a_browser
    def test_nothing_on_the_page_itself_goes_wrong(self, runs: list[Path], tmp_path: Path) -> None:
        for page in (runs[0] / "report.html", runs[1] / "report.html", runs[0].parent / "compare.html"):
            done = chromium(page, tmp_path, "--dump-dom")
            assert "CONSOLE" not in done.stderr, done.stderr
            assert "</html>" in done.stdout

    @in_a_browser
    def test_without_a_renderer_the_page_says_so(self, runs: list[Path], tmp_path: Path) -> None:
        """And a policy that holds poses has a page like another."""
        seen = said(runs[1] / "report.html", tmp_path)
        assert seen["film"] is None
        assert "No video: cannot draw here (<no GL>)" in seen["text"]
        assert "joints off the pose to hold" in seen["text"] and seen["charts"] > 30

    @in_a_browser
    def test_a_narrow_window_needs_no_scrolling_sideways(self, runs: list[Path], tmp_path: Path) -> None:
        for page in (runs[0] / "report.html", runs[0].parent / "compare.html"):
            assert said(page, tmp_path, width=520)["width"] <= 520

    @in_a_browser
    def test_a_comparison_shows_one_axis_at_a_time(self, runs: list[Path], tmp_path: Path) -> None:
        page = runs[0].parent / "compare.html"
        seen = said(page, tmp_path)
        keys = {k for run in runs for row in read_metrics(run / "metrics.jsonl") for k in row}
        assert seen["charts"] == len(keys - set(report.COUNTS))
        assert all(word in seen["text"] for word in ("first", "second", "seed", "task"))
        other = tmp_path / "minutes.html"
        other.write_text(page.read_text("utf-8").replace('id="minutes"', 'id="minutes" checked'), "utf-8")
        assert said(other, tmp_path)["charts"] == seen["charts"]

    @in_a_browser
    def test_what_files_hold_is_text(self, runs: list[Path], tmp_path: Path, monkeypatch) -> None:
        """Markup in the configuration, in keys and in the run's name is shown, not obeyed."""
        quickly(monkeypatch)
        folder = tmp_path / HOSTILE.replace("/", "")
        shutil.copytree(runs[0], folder)
        config = json.loads((folder / "config.json").read_text())
        config["env"]["rewards"][HOSTILE] = HOSTILE
        (folder / "config.json").write_text(json.dumps({**config, HOSTILE: 1, "wandb": HOSTILE}))
        rows = read_metrics(runs[0] / "metrics.jsonl")
        few = {key: rows[-1][key] for key in (*report.COUNTS, "reward/mean")}
        (folder / "metrics.jsonl").write_text(json.dumps({**few, f"reward/{HOSTILE}": 1.0}) + "\n")
        other = shutil.copytree(folder, tmp_path / "other")
        comparison = write_comparison([folder, other], tmp_path / "compare.html")
        for page in (write_report(folder, episodes=1), comparison):
            seen = said(page, tmp_path)
            assert seen["title"] != "hacked" and seen["scripts"] == 1 and not seen["images"]
            assert HOSTILE in seen["text"]


class TestPages:
    def test_a_page_loads_nothing(self, runs: list[Path]) -> None:
        """No address but data: URIs, nothing that runs, and a policy that forbids both."""
        for page in (runs[0] / "report.html", runs[0].parent / "compare.html"):
            text = re.sub(r'"data:[^"]*"', '"data:"', page.read_text("utf-8"))
            assert not re.search(r"https?:|<script|<link|<iframe|@import|\bon\w+=", text)
            assert set(re.findall(r'(?:src|href)="([^"#]*)', text)) <= {"data:", ""}
            assert "default-src 'none'" in text

    def test_the_saved_test_counts_while_it_is_of_this_policy(self, runs: list[Path], tmp_path: Path) -> None:
        """And under the conditions of the walking test, not those that somebody tried."""
        folder = shutil.copytree(runs[0], tmp_path / "run")
        assert main(["eval", str(folder), "--episodes=3", "--seconds=0.4"]) == 0
        assert report._saved_test(folder)[0] is None  # not even a second
        saved = json.loads((folder / "eval.json").read_text()) | {"seconds": 20.0}
        write_json(folder / "eval.json", saved)
        result, told = report._saved_test(folder)
        assert result and result.episodes == 3 and "3 episodes of 20 s" in told
        write_json(
            folder / "eval.json", saved | {"randomization": {**saved["randomization"], "mass": [2, 3]}}
        )
        assert report._saved_test(folder)[0] is None
        write_json(folder / "eval.json", saved)
        content = checkpoint.load(folder / "policy.pt")
        content["actor"]["log_std"] += 0.1
        checkpoint.save(folder / "policy.pt", content)
        assert report._saved_test(folder)[0] is None

    def test_an_older_checkpoint_overwrites_nothing(self, runs: list[Path], tmp_path: Path) -> None:
        folder = shutil.copytree(runs[0], tmp_path / "run")
        shutil.copy(folder / "checkpoint.pt", folder / "checkpoint-000002.pt")
        assert main(["eval", str(folder / "checkpoint-000002.pt"), "--episodes=2", "--seconds=0.1"]) == 0
        assert (folder / "checkpoint-000002-eval.json").exists()
        assert (folder / "eval.json").exists() == (runs[0] / "eval.json").exists()

    @pytest.mark.parametrize("n", [1, 2, 5, 199, 200, 201, 1234])
    def test_curves_keep_the_mean(self, n: int) -> None:
        """A curve has few points whatever the length of the log, and their weighted mean is the log's."""
        rows = [{"steps": float(i), "x": float(i * i)} for i in range(n)]
        x, y = report._curve(rows, "steps", "x")
        assert len(x) == min(n, report.POINTS) and np.all(np.diff(x) > 0)
        sizes = [len(part) for part in np.array_split(np.arange(n), len(x))]
        np.testing.assert_allclose(np.average(y, weights=sizes), np.mean([row["x"] for row in rows]))

    def test_only_what_differs_from_the_defaults_is_listed_as_different(self, runs: list[Path]) -> None:
        page = (runs[0] / "report.html").read_text("utf-8")
        first = page[page.index("<h2>Configuration") : page.index("<details>")]
        listed = set(re.findall(r"<td><code>([^<]*)</code></td><td><code>", first))
        assert listed == {
            *("steps", "device", "env.num_envs", "ppo.horizon", "ppo.minibatches"),
            *("ppo.actor_hidden", "ppo.critic_hidden"),
            *("env.randomization.mass", "env.randomization.push_velocity"),
        }

    def test_errors(self, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(runs[0], tmp_path / "a" / "first")
        damaged, bare = (shutil.copytree(runs[0], tmp_path / name) for name in ("damaged", "bare"))
        (damaged / "config.json").write_text("{")
        (bare / "policy.pt").unlink()
        for args, message in (
            (["report", str(tmp_path)], r"run .*: no metrics\.jsonl"),
            (["compare", str(runs[0]), str(tmp_path)], r"run .*: no metrics\.jsonl"),
            (["compare", str(runs[0]), f"{runs[0]}/."], "each of them once"),
            (["compare", str(runs[0])], "name two to 8"),
            (["report", str(damaged)], r"config\.json: damaged, not JSON"),
            (["report", str(bare)], r"no policy\.pt"),
        ):
            assert main(args) == 1
            assert re.match(f"kouros: .*{message}", capsys.readouterr().err)
        assert not (tmp_path / "c.html").exists()
        page = write_comparison([runs[0], tmp_path / "a" / "first"], tmp_path / "c.html")  # of one name
        assert str(runs[0]) in page.read_text("utf-8")

    def test_training_makes_one_and_outlives_it(self, runs, monkeypatch, capsys) -> None:
        """The exit status is the run's, whatever becomes of the page."""
        made: list[Path] = []

        def write(folder: Path, *_: Any) -> Path:
            made.append(folder)
            if errors:
                raise errors.pop()
            return folder / "report.html"

        monkeypatch.setattr("kouros.learning.run.train", lambda config, explicit: runs[0])
        monkeypatch.setattr("kouros.cli.export", lambda config: None)
        monkeypatch.setattr(report, "write_report", write)
        errors: list[BaseException] = []
        assert main(["train", "--device=cpu", "--no-report"]) == 0 and made == []
        assert main(["train", "--device=cpu"]) == 0 and made == [runs[0]]
        assert f"saved {runs[0] / 'report.html'}" in capsys.readouterr().out
        for error in (OSError("the disk is full"), ZeroDivisionError("x"), KeyboardInterrupt()):
            errors.append(error)
            assert main(["train", "--device=cpu"]) == 0
            told = capsys.readouterr().err
            assert f"no report ({str(error) or 'interrupted'}); kouros report {runs[0]} makes one" in told


class TestLog:
    def test_the_log_says_what_the_hardware_does(self, runs: list[Path]) -> None:
        for row in read_metrics(runs[0] / "metrics.jsonl"):
            assert 0.0 < row["hardware/cpu_percent"] < 100.0 * (os.cpu_count() or 1) * 1.1
            assert 0.05 < row["hardware/memory_gb"] < 50.0

    def test_cpu_and_memory_follow_what_is_used(self) -> None:
        hardware = Hardware("cpu")
        time.sleep(0.3)
        idle = hardware.read()
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        held = np.ones(int(4e7))  # 320 MB
        busy = hardware.read()
        assert idle["hardware/cpu_percent"] < 50.0 < 4.0 * busy["hardware/cpu_percent"]
        assert busy["hardware/cpu_percent"] > idle["hardware/cpu_percent"]
        gained = busy["hardware/memory_gb"] - idle["hardware/memory_gb"]
        assert gained == pytest.approx(held.nbytes / 1e9, rel=0.2)

    def test_what_was_randomized(self, runs: list[Path]) -> None:
        for row in read_metrics(runs[0] / "metrics.jsonl"):
            assert 0.8 < row["randomization/mass"] < 1.2 and 0 < row["randomization/mass_std"] < 0.2
        assert not [key for key in read_metrics(runs[1] / "metrics.jsonl")[0] if "randomization/" in key]
        assert randomization_log(object()) == {}

    def test_histograms_count_what_is_finite(self) -> None:
        values = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
        h = histogram(values)
        assert h and len(h.edges) == len(h.counts) + 1
        expected, _ = np.histogram(values.numpy(), h.edges.numpy())
        assert np.abs(expected - h.counts.numpy()).max() <= 1  # rounding at an edge
        assert h.counts.sum() == values.numel()
        values[0, 0], values[0, 1] = torch.nan, torch.inf
        for given, count in ((values, values.numel() - 2), (torch.full((4,), 3.0), 4)):
            h = histogram(given)
            assert h and h.counts.sum() == count
        assert histogram(torch.full((4,), torch.nan)) is None

    def test_tensorboard_has_them(self, runs: list[Path]) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(runs[0])).Reload()
        assert set(board.Tags()["histograms"]) == {"histogram/actions", "histogram/observations"}
        value = board.Histograms("histogram/actions")[0].histogram_value
        assert value.num == sum(value.bucket) == 8 * 29
        assert {"hardware/cpu_percent", "hardware/memory_gb"} <= set(board.Tags()["scalars"])


# Stands for the client of a network service, which no test may call: what it would be told.
STUB = """
import json
calls = []
class Histogram:
    def __init__(self, np_histogram): self.counts, self.edges = np_histogram
class Run:
    def define_metric(self, name, step_metric): calls.append(("axis", name, step_metric))
    def log(self, log): calls.append(("log", log))
    def finish(self): calls.append(("finish",))
def init(**options):
    json.dumps(options, default=str)
    calls.append(("init", options))
    if options["project"] == "refused": raise ConnectionError("no login")
    return Run()
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


class TestWandb:
    def test_it_gets_the_log_and_goes_on_with_it(self, wandb: Any, tmp_path: Path) -> None:
        folder = train(tiny(tmp_path / "run", wandb="kouros-tests"))
        assert resumed(TrainConfig(resume=folder, wandb="kouros-tests"), "cpu").wandb == "kouros-tests"
        train(TrainConfig(resume=folder, device="cpu", steps=256, wandb="kouros-tests"))
        begun = [call[1] for call in wandb.calls if call[0] == "init"]
        assert [options["project"] for options in begun] == ["kouros-tests"] * 2
        assert begun[0]["id"] == begun[1]["id"] and begun[0]["config"]["seed"] == 0
        assert wandb.calls.count(("axis", "*", "iteration")) == 2  # wandb's own step may not go back
        sent = [call[1] for call in wandb.calls if call[0] == "log"]
        rows = read_metrics(folder / "metrics.jsonl")
        assert [log for log in sent if "reward/mean" in log] == rows
        drawn = [log for log in sent if "histogram/actions" in log]
        assert [log["iteration"] for log in drawn] == [1, 4]
        assert len(drawn) == 2 and drawn[0]["histogram/actions"].counts.sum() == 8 * 29
        assert [call[0] for call in wandb.calls].count("finish") == 2

    def test_a_service_that_refuses_is_one_line(self, wandb: Any, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="wandb='refused': no login"):
            train(tiny(tmp_path / "run", wandb="refused"))
        assert not (tmp_path / "run" / "checkpoint.pt").exists()

    def test_a_service_that_fails_on_the_way_is_said_once(self, wandb: Any, tmp_path, monkeypatch) -> None:
        def fails(self: Any, *args: Any, **options: Any) -> None:
            raise ConnectionError("no network")

        monkeypatch.setattr(wandb.Run, "log", fails)
        said = io.StringIO()
        folder = train(tiny(tmp_path / "run", wandb="kouros-tests"), Console(file=said, width=200))
        assert said.getvalue().count("Weights & Biases: no network; the training goes on") == 1
        assert (folder / "checkpoint.pt").exists()

    @pytest.mark.parametrize("left", [None, types.ModuleType("wandb")])
    def test_not_installed_is_said_before_the_training(self, left, tmp_path, monkeypatch, capsys) -> None:
        """Nor is the folder of that name, which wandb leaves where it ran, taken for it."""
        monkeypatch.setitem(sys.modules, "wandb", left)
        assert main(["train", "--wandb=mine", f"--run={tmp_path / 'run'}", "--device=cpu"]) == 1
        told = capsys.readouterr().err
        assert "pip install 'kouros[wandb]'" in told and told.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_the_film_of_a_report_is_a_video(tmp_path: Path) -> None:
    page = report._video(film)
    data = re.search(r'src="data:video/mp4;base64,([^"]*)"', page)
    assert data and base64.b64decode(data[1])[4:8] == b"ftyp"
