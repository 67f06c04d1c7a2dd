"""Several processes on the CPU, started by torchrun: they learn as one would."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kouros.envs.config import HumanoidEnvConfig
from kouros.learning import checkpoint
from kouros.learning.log import read_metrics
from kouros.learning.ranks import Ranks
from kouros.learning.run import _share, train
from test_faults import differing
from test_run import TINY, asked

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = [*TORCHRUN, "-m", "--", "kouros", "train", "--no-report"]
# The curriculum's judgement is of all worlds together.
OPTIONS = [*TINY, "--env.curriculum.enabled"]
for figure in ("terrain-difficulty", "push-frequency", "mass-variance", "friction-variance"):
    OPTIONS += [f"--env.curriculum.{figure}", *5 * ["0"]]


def finished(*command: str) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


# An update of random samples: alone of all of them, or in each of two ranks of half of the worlds.
UPDATE = """
import dataclasses, sys
import torch
from kouros.learning.ppo import PPOAgent
from kouros.learning.ranks import joined, rank_device
from test_learning import SMALL, Target

def rollout(agent, worlds):
    generator = torch.Generator().manual_seed(1)
    for name, values in vars(agent._rollout).items():
        shape = (values.shape[0], 64, *values.shape[2:])
        if values.dtype == torch.bool:
            whole = torch.rand(shape, generator=generator) < 0.2
        else:
            whole = 3.0 * torch.randn(shape, generator=generator) + 1.0
        values.copy_(whole[:, worlds])  # drawn on the CPU, the same for all
    r = agent._rollout
    r.done |= r.terminated
    r.valid.fill_(True)
    with torch.no_grad():
        mean = agent.actor(r.obs)
        r.actions.sub_(1.0).mul_(0.3).add_(mean)
        from kouros.learning.networks import log_prob
        r.log_probs.copy_(log_prob(r.actions, mean, agent.actor.log_std))
    return r

device = rank_device(sys.argv[2])
with joined(device) as ranks:
    n = 64 // ranks.size
    config = dataclasses.replace(SMALL, epochs=4, minibatches=1, target_kl=0.02)
    agent = PPOAgent(Target(n), config, 3, device, ranks)
    for _ in range(3):
        agent.update(rollout(agent, slice(ranks.rank * n, (ranks.rank + 1) * n)))
    log = agent._read_log()
    content = {"actor": agent.actor.state_dict(), "critic": agent.critic.state_dict()}
    content["rate"], content["kl"] = agent._actor_learner.rate, log["learning/approx_kl"]
    torch.save(content, f"{sys.argv[1]}/{ranks.size}-{ranks.rank}.pt")
"""


GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize(
    ("device", "tolerance"), [("cpu", 1e-6), pytest.param("cuda", 1e-3, marks=GPUS)], ids=["cpu", "cuda"]
)
def test_an_update_of_two_is_that_of_one(device: str, tolerance: float, tmp_path: Path, monkeypatch) -> None:
    """The same samples, halved among two processes: the same networks, normalizers and rate.

    On GPUs the gradient steps are recorded graphs, all-reduce included, and products are in TF32.
    """
    script = tmp_path / "update.py"
    script.write_text(UPDATE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    finished(sys.executable, str(script), str(tmp_path), device)
    finished(*TORCHRUN, str(script), str(tmp_path), device)
    one, *two = (torch.load(tmp_path / f"{name}.pt", "cpu") for name in ("1-0", "2-0", "2-1"))
    assert not differing(*two)
    for part in ("actor", "critic"):
        for name, values in one[part].items():
            torch.testing.assert_close(two[0][part][name], values, rtol=tolerance, atol=tolerance, msg=name)
    assert two[0]["kl"] == pytest.approx(one["kl"], rel=100 * tolerance)
    assert two[0]["rate"] == one["rate"] != 4e-4


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations of two processes."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    done = finished(*TRAIN, *OPTIONS, "--device=cpu", f"--run={folder}", f"--steps={3 * 64}")
    assert done.stdout.count("2 processes, 4 worlds each") == 1
    return folder


class TestRun:
    def test_the_first_writes_for_all(self, run_of_two: Path) -> None:
        content = checkpoint.load(run_of_two / "checkpoint.pt")
        (other,) = content["resume"]["others"]
        assert content["resume"]["total_steps"] == 3 * 64
        assert not torch.equal(other["now"]["obs"], content["resume"]["now"]["obs"])
        assert [row["iteration"] for row in read_metrics(run_of_two / "metrics.jsonl")] == [1, 2, 3]
        assert (run_of_two / "policy.onnx").exists()

    def test_goes_on_in_as_many_processes_only(self, run_of_two: Path) -> None:
        with pytest.raises(ValueError, match=r"of 2 processes, these are 1; torchrun --nproc-per-node 2"):
            train(asked(f"--resume={run_of_two}", "--steps=640"))

    def test_n_plus_n_equals_2n(self, run_of_two: Path, tmp_path: Path) -> None:
        """Five iterations against three and a resume, both jobs side by side."""
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        shutil.copytree(run_of_two, parts)
        jobs = [
            subprocess.Popen([*TRAIN, "--device=cpu", f"--steps={5 * 64}", *words], stdout=subprocess.DEVNULL)
            for words in ([*OPTIONS, f"--run={whole}"], [f"--resume={parts}"])
        ]
        assert [job.wait(timeout=240) for job in jobs] == [0, 0]
        a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (whole, parts))
        assert set(differing(a, b)) <= {".contract.training.run"}

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPUS)])
    def test_a_dead_process_ends_the_job(self, device: str, tmp_path: Path) -> None:
        """The others end, and the last checkpoint is whole; gloo lets them say so."""
        folder = tmp_path / "run"
        command = [*TRAIN, *TINY, f"--device={device}", f"--run={folder}", "--save-interval=1"]
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while len(read_metrics(folder / "metrics.jsonl")) < 3:
            assert job.poll() is None
            time.sleep(0.1)
        found = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(found[-1]), signal.SIGKILL)
        _, said = job.communicate(timeout=120)
        assert job.returncode != 0
        assert device == "cuda" or "-m kouros train --resume" in said
        assert checkpoint.load(folder / "checkpoint.pt")["resume"]["iteration"] >= 2


FULL_DISK = """
import sys
from kouros.learning import checkpoint
from kouros.cli import main
write, calls = checkpoint.write, []

def sometimes(path, data):
    calls.append(path)  # in the first process alone
    if 3 <= len(calls) <= 4:
        raise OSError(f"could not write {path} (No space left on device)")
    write(path, data)

checkpoint.write = sometimes
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_parts_nobody(tmp_path: Path) -> None:
    """The first process alone sees it; all of them try again together."""
    script, folder = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL_DISK)
    options = [*TINY, "--device=cpu", f"--run={folder}", "--no-report", "--save-interval=3"]
    done = finished(*TORCHRUN, "--", str(script), "train", *options, f"--steps={12 * 64}")
    assert done.stdout.count("tries again") >= 1
    assert checkpoint.load(folder / "checkpoint.pt")["resume"]["iteration"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 9}, r"env\.num_envs=9: must split evenly among 2 processes"),
        ({"wrappers": ("normalize",)}, r"normalize would keep statistics of its own"),
    ],
)
def test_what_cannot_be_shared_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _share(HumanoidEnvConfig(**changes), Ranks(0, 2, 2))


@GPUS
def test_two_gpus_train(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--env.num-envs=512", "--device=cuda", f"--run={folder}"]
    finished(*TRAIN, *options, f"--steps={40 * 512 * 12}", "--log-interval=10")
    finished(*TRAIN, f"--resume={folder}", "--device=cuda", f"--steps={60 * 512 * 12}")
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["iteration"] == 60
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["learning/skipped_updates"] == 0
