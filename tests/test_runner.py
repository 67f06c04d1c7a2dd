"""The policy runner: it is the environment's policy, binds by name, and refuses what it cannot run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import HELD, Policy, make_env
from kouros.deploy.export import plain_path
from kouros.deploy.runner import PolicyRunner, SensorError
from kouros.envs.config import CALM, HumanoidEnvConfig
from kouros.envs.contract import policy_sensors
from kouros.envs.wrappers import Env
from kouros.envs.wrappers import make_env as make_wrapped
from kouros.learning import checkpoint
from kouros.learning.config import PPOConfig, TrainConfig
from kouros.learning.run import SHIPPED, load_critic, load_policy, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    ppo = PPOConfig(horizon=8, minibatches=2, actor_hidden=(16,), critic_hidden=(16,))
    env = HumanoidEnvConfig(num_envs=8)
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(TrainConfig(run=folder, steps=128, device="cpu", env=env, ppo=ppo))


def named(env: Env, runner: PolicyRunner, time: float) -> dict[str, Any]:
    """What the robot's computer knows of the only world."""
    told = policy_sensors(env)
    sensors: dict[str, Any] = {"time": time}
    for name in runner.sensors:
        values = told[name][0].tolist()
        joints = len(values) == len(runner.joint_names)
        sensors[name] = dict(zip(runner.joint_names, values, strict=True)) if joints else values
    return sensors


def begun(config: HumanoidEnvConfig, seed: int = 0) -> Env:
    """An environment at the start of an episode, with the gait clock where a runner's is."""
    env = make_wrapped(HumanoidEnvConfig(**{**vars(config), **HELD, **CALM}))
    env.reset(seed=seed)
    env.phase.zero_()
    env.coast.zero_()
    return env


def as_list(runner: PolicyRunner, targets: dict[str, float]) -> list[float]:
    return [targets[name] for name in runner.joint_names]


def still(runner: PolicyRunner, time: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Sensors of a robot that stands in its default pose and is told to walk."""
    pose = dict(zip(runner.joint_names, runner.contract["default_joint_pos"], strict=True))
    sensors = {
        "time": time,
        "base_ang_vel": [0.1, -0.2, 0.3],
        "projected_gravity": [0.0, 0.0, -1.0],
        "command": [0.5, 0.1, -0.2],
        "pose_command": {name: x + 0.1 for name, x in pose.items()},
        "joint_pos": pose,
        "joint_vel": dict.fromkeys(pose, 0.5),
    }
    return {name: sensors[name] for name in ("time", *runner.sensors)} | changes


class TestAct:
    @pytest.mark.parametrize("name", ["walk", "stacked", "stand"])
    def test_repeats_the_environment_step_for_step(self, policies: dict[str, Policy], name: str) -> None:
        """From named sensors alone, through new commands and poses; and again after a reset."""
        policy, config, path = policies[name]
        runner = PolicyRunner(path)
        moved = []
        for seed in range(2):
            env = begun(config, seed)
            runner.reset()
            for t in range(40):
                targets = runner.act(named(env, runner, 0.02 * t))
                offset = env.action_offset.clone()
                with torch.no_grad():
                    _, _, terminated, *_ = env.step(policy(env.observe()))
                assert not terminated.any()
                found = as_list(runner, targets)
                np.testing.assert_allclose(found, env.simulation.ctrl[0], atol=1e-5)
                moved.append(np.abs(found - offset.view(-1).numpy()).max())
        assert np.mean(moved) > 0.02

    def test_a_checkpoint_is_the_same_policy(self, policies: dict[str, Policy]) -> None:
        _, config, path = policies["walk"]
        env, runners = begun(config), [PolicyRunner(path), PolicyRunner("walk")]
        assert runners[0].sensors == runners[1].sensors
        assert runners[0].joint_names == runners[1].joint_names
        for t in range(10):
            a, b = (as_list(runner, runner.act(named(env, runner, t))) for runner in runners)
            np.testing.assert_allclose(a, b, atol=1e-5)
            env.step(torch.zeros(1, 29))

    @pytest.mark.parametrize("name", ["walk", "stand"])
    def test_no_order_matters(self, policies: dict[str, Policy], name: str) -> None:
        """Of the sensors and of the joints in each; numbers of any kind are welcome."""
        runner = PolicyRunner(policies[name][2])
        generator = np.random.default_rng(0)
        sensors = still(runner)
        for joints in (value for value in sensors.values() if isinstance(value, dict)):
            for joint in joints:
                joints[joint] += 0.2 * generator.standard_normal()
        runner.act(sensors)
        sensors["time"] = 1.0
        expected = runner.peek(sensors)

        def shuffled(given: dict[str, Any], chance: random.Random) -> dict[str, Any]:
            return {key: given[key] for key in chance.sample(list(given), len(given))}

        @settings(max_examples=50, deadline=None)
        @given(st.randoms(use_true_random=False), st.sampled_from([list, tuple, np.array, torch.tensor]))
        def check(chance: random.Random, kind: Callable[[list[float]], Any]) -> None:
            mixed = shuffled(sensors, chance)
            for key, value in mixed.items():
                if isinstance(value, dict):
                    mixed[key] = shuffled(value, chance)
                elif isinstance(value, list):
                    mixed[key] = kind(value)
            assert runner.peek(mixed) == pytest.approx(expected, abs=1e-6)
            assert list(runner.peek(mixed)) == list(runner.joint_names)

        check()

    @pytest.mark.parametrize("name", ["walk", "stacked"])
    def test_a_reset_forgets_everything(self, policies: dict[str, Policy], name: str) -> None:
        runner, new = (PolicyRunner(policies[name][2]) for _ in range(2))
        for t in range(5):
            runner.act(still(runner, t))
        later = runner.peek(still(runner, 9.0))
        runner.reset()
        for t in range(3):  # time begins anew too
            assert runner.act(still(runner, t)) == new.act(still(new, t)) != later

    @pytest.mark.parametrize("name", ["walk", "stacked", "stand"])
    def test_a_look_ahead_moves_nothing(self, policies: dict[str, Policy], name: str) -> None:
        runner, twin = (PolicyRunner(policies[name][2]) for _ in range(2))
        for t in range(5):
            sensors = still(runner, 0.02 * t)
            seen = [runner.peek(sensors) for _ in range(3)]
            runner.peek(still(runner, 7.0, base_ang_vel=[9.0, 9.0, 9.0]))
            runner.warm()
            with pytest.raises(SensorError):
                runner.peek(still(runner, 7.0, base_ang_vel=[math.nan] * 3))
            assert runner.act(sensors) == twin.act(sensors) == seen[0] == seen[2]

    def test_what_was_returned_stays(self, policies: dict[str, Policy]) -> None:
        runner = PolicyRunner(policies["walk"][2])
        first = runner.act(still(runner, 0.0))
        before = dict(first)
        assert runner.act(still(runner, 1.0)) != before == first

    def test_is_a_dozen_lines_of_numpy(self, policies: dict[str, Policy]) -> None:
        """The whole control law of the shipped ``walk``, from its weights and its contract."""
        runner, chance = PolicyRunner(policies["walk"][2]), np.random.default_rng(0)
        c, content = runner.contract, checkpoint.load(SHIPPED / "walk.pt")
        w = {name: tensor.double().numpy() for name, tensor in content["actor"].items()}
        assert content["ppo"]["activation"] == "elu" and not content["ppo"]["squash"]
        default, last = np.array(c["default_joint_pos"]), np.zeros(29)
        cycles = np.float32(c["control_dt"] / c["gait_period"])
        phase = coast = np.float32(0.0)  # in the file's own precision: the gait ends where this becomes 0
        for t in range(50):
            command = np.array([0.4, -0.1, 0.3]) if 10 <= t < 15 else np.zeros(3)
            gyro, down, v = chance.standard_normal(3), chance.standard_normal(3), chance.standard_normal(29)
            q = default + 0.1 * chance.standard_normal(29)
            coast = np.float32(1.0) if np.linalg.norm(command) > c["standing_command"] else coast
            clock = np.array([np.sin(2 * np.pi * phase), np.cos(2 * np.pi * phase)]) * (coast > 0)
            obs = np.concatenate([gyro, down, command, clock, q - default, v, last])
            x = (obs - w["normalizer.mean"]) / np.sqrt(w["normalizer.variance"] + 1e-5)
            x = np.clip(x, -10, 10)
            for layer in (0, 2):
                x = w[f"mlp.{layer}.weight"] @ x + w[f"mlp.{layer}.bias"]
                x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
            x = w["mlp.4.weight"] @ x + w["mlp.4.bias"]
            last = np.clip(x, -c["action_limit"], c["action_limit"])
            expected = np.array(c["action_offset"]) + np.array(c["action_scale"]) * last
            phase, coast = (phase + cycles) % np.float32(1.0), max(np.float32(0.0), coast - cycles)
            sensors = {
                "time": t,
                "base_ang_vel": gyro,
                "projected_gravity": down,
                "command": command,
                "joint_pos": dict(zip(runner.joint_names, q, strict=True)),
                "joint_vel": dict(zip(runner.joint_names, v, strict=True)),
            }
            np.testing.assert_allclose(as_list(runner, runner.act(sensors)), expected, atol=1e-5)
        assert coast == 0.0 < phase


KNEE = "left_knee_joint"


def at_knee(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda sensors: sensors["joint_pos"].update({KNEE: value})


def put(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda sensors: sensors.update({name: value})


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda sensors: sensors.update({new: sensors.pop(old)})


def knee_renamed(sensors: dict[str, Any]) -> None:
    sensors["joint_vel"]["left_kneejoint"] = sensors["joint_vel"].pop(KNEE)


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda s: s.pop("command"), "sensors: 'command' is missing; expected base_ang_vel, command"),
    "no time": (lambda s: s.pop("time"), "sensors: 'time' is missing"),
    "misspelt": (
        renamed("base_ang_vel", "base_angvel"),
        "'base_ang_vel' is missing; 'base_angvel' is unknown, did you mean 'base_ang_vel'",
    ),
    "unknown": (put("lidar", [1.0]), "sensors: 'lidar' is unknown; expected"),
    "short": (put("command", [0.0, 0.0]), r"command of shape \(2,\): expected 3 numbers"),
    "long": (put("command", np.zeros(4)), r"command of shape \(4,\): expected 3"),
    "a row": (put("command", np.zeros((1, 3))), r"command of shape \(1, 3\)"),
    "a column": (put("command", np.zeros((3, 1))), r"command of shape \(3, 1\)"),
    "ragged": (put("command", [0.0, [0.0], 0.0]), "command of shape ragged"),
    "a number": (put("command", 0.5), r"command of shape \(\)"),
    "a word": (put("command", "fwd"), r"command of shape \(\)"),
    "words": (put("command", ["0.1", "0.2", "0.3"]), r"command\[0\]='0.1': not a number"),
    "none": (put("command", None), r"command of shape \(\)"),
    "none inside": (put("projected_gravity", [0.0, 0.0, None]), r"projected_gravity\[2\]=None: not a number"),
    "by letters": (put("command", {"x": 1.0, "y": 0.0, "z": 0.0}), r"command of shape \(\): expected 3"),
    "nan": (put("base_ang_vel", [0.0, math.nan, 0.0]), r"base_ang_vel\[1\]=nan: not finite"),
    "inf": (put("base_ang_vel", [0.0, 0.0, -math.inf]), r"base_ang_vel\[2\]=-inf: not finite"),
    "too large": (put("base_ang_vel", [1e30, 0.0, 0.0]), r"base_ang_vel\[0\]=1e\+30: not finite, or beyond"),
    "larger than float32": (put("base_ang_vel", [0, 1e300, 0]), r"base_ang_vel\[1\]=1e\+300: not finite, or"),
    "larger than float": (put("base_ang_vel", [0, 0, 10**400]), r"base_ang_vel\[2\]=10+: not finite"),
    "joints by place": (put("joint_pos", [0.0] * 29), "joint_pos: list has no joint names; expected {joint"),
    "an array": (put("joint_pos", np.zeros(29)), "joint_pos: ndarray has no joint names"),
    "no joints": (put("joint_vel", {}), "joint_vel: 'left_ankle_pitch_joint' is missing; .* expected left"),
    "a joint less": (lambda s: s["joint_vel"].pop(KNEE), f"joint_vel: '{KNEE}' is missing; expected"),
    "a joint more": (lambda s: s["joint_vel"].update(tail=0.0), "joint_vel: 'tail' is unknown; expected"),
    "another joint": (knee_renamed, f"'left_kneejoint' is unknown, did you mean '{KNEE}'"),
    "a joint of nan": (at_knee(math.nan), rf"joint_pos\[{KNEE}\]=nan: not finite"),
    "a joint of inf": (at_knee(np.float32(math.inf)), rf"joint_pos\[{KNEE}\]=.*inf.*: not finite"),
    "a joint too far": (at_knee(1e30), rf"joint_pos\[{KNEE}\]=1e\+30: not finite, or beyond 1e\+18"),
    "a joint of words": (at_knee("0.3"), rf"joint_pos\[{KNEE}\]='0.3': not a number"),
    "a joint of none": (at_knee(None), rf"joint_pos\[{KNEE}\]=None: not a number"),
    "a joint of many": (at_knee([0.3]), rf"joint_pos\[{KNEE}\]=\[0.3\]: not a number"),
    "the same time": (put("time", 0.04), "time=0.04: stale, the last sensors were of 0.04"),
    "an older time": (put("time", 0.02), "time=0.02: stale, the last sensors were of 0.04"),
    "time of nan": (put("time", math.nan), "time=nan: not a finite number of seconds"),
    "time of inf": (put("time", math.inf), "time=inf: not a finite number of seconds"),
    "time of none": (put("time", None), "time=None: not a finite number"),
    "time of words": (put("time", "now"), "time='now': not a finite number"),
    "times": (put("time", np.arange(2.0)), r"time=array\(.*: not a finite number"),
}


class TestBadSensors:
    @pytest.mark.parametrize("bad", BAD)
    def test_are_named_and_leave_no_trace(self, exported: Path, bad: str) -> None:
        """The next step is that of a twin that never saw them."""
        change, message = BAD[bad]
        runner, twin = PolicyRunner(exported), PolicyRunner(exported)
        for one in (runner, twin):
            for t in range(3):
                one.act(still(one, 0.02 * t))
        for _ in range(2):
            sensors = still(runner, 0.06, command=[9.0, 9.0, 9.0])
            change(sensors)
            with pytest.raises(SensorError, match=message):
                runner.act(sensors)
        for t in range(3, 6):
            assert runner.act(still(runner, 0.02 * t)) == twin.act(still(twin, 0.02 * t))

    def test_of_a_stand(self, policies: dict[str, Policy]) -> None:
        runner = PolicyRunner(policies["stand"][2])
        assert runner.sensors == (
            "base_ang_vel",
            "projected_gravity",
            "pose_command",
            "joint_pos",
            "joint_vel",
        )
        with pytest.raises(SensorError, match="'command' is unknown; expected"):
            runner.act(still(runner, command=[0.0] * 3))
        with pytest.raises(SensorError, match="'pose_command' is missing"):
            runner.act({k: v for k, v in still(runner).items() if k != "pose_command"})
        with pytest.raises(SensorError, match="pose_command: list has no joint names"):
            runner.act(still(runner, pose_command=[0.0] * 29))


class TestStep:
    def test_of_one_and_of_many_is_the_actor(self, exported: Path) -> None:
        actor, _, contract = load_policy("walk")
        obs = 3.0 * torch.randn(7, 98, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = actor.act(obs).numpy()
        assert np.abs(expected).max() > 0.5
        for runner in (PolicyRunner(plain_path(exported)), PolicyRunner("walk")):
            assert runner.contract["joint_names"] == contract["joint_names"]
            found = runner.step(obs.numpy())
            rows = [runner.step(row) for row in obs]
            assert found.dtype == rows[0].dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=1e-5)
            np.testing.assert_allclose(rows, expected, atol=1e-5)
            assert runner.step(obs[:0]).shape == (0, 29)
            np.testing.assert_allclose(runner.step(obs[0].double().tolist()), expected[0], atol=1e-5)

    @pytest.mark.parametrize(
        ("obs", "message"),
        [
            (np.zeros(97), r"obs of shape \(97,\): expected \(98,\) or \(n, 98\)"),
            (np.zeros((98, 2)), r"obs of shape \(98, 2\)"),
            (np.zeros((1, 1, 98)), r"obs of shape \(1, 1, 98\)"),
            (0.0, r"obs of shape \(\)"),
            (np.full(98, np.nan), "obs: not finite"),
            (np.full((2, 98), np.inf), "obs: not finite"),
            (np.full(98, 1e300), "obs: not finite"),
            ([1e300] * 98, "obs: not finite"),
        ],
    )
    def test_bad_observations(self, exported: Path, obs: Any, message: str) -> None:
        runner = PolicyRunner(plain_path(exported))
        expected = runner.step(np.zeros(98))
        with pytest.raises(ValueError, match=message):
            runner.step(obs)
        assert np.array_equal(runner.step(np.zeros(98)), expected)

    def test_a_large_observation_is_clipped_as_in_training(self, exported: Path) -> None:
        actor, *_ = load_policy("walk")
        obs = torch.full((98,), 1e25)
        found = PolicyRunner(plain_path(exported)).step(obs)
        np.testing.assert_allclose(found, actor.act(obs).detach(), rtol=1e-4)

    def test_each_form_names_the_other(self, exported: Path) -> None:
        plain, controller = PolicyRunner(plain_path(exported)), PolicyRunner(exported)
        with pytest.raises(
            ValueError, match=r"plain\.onnx: a plain network.*use step\(\), or act\(\) of the"
        ):
            plain.act(still(controller))
        with pytest.raises(
            ValueError, match=r"policy\.onnx: takes named sensors: use act\(\), or step\(\) of"
        ):
            controller.step(np.zeros(98))
        plain.reset()
        plain.warm()


def network(weights: dict[str, torch.Tensor], obs: np.ndarray) -> np.ndarray:
    """Normalizer and a multilayer perceptron with one hidden layer of ELU."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    x = (obs - w["normalizer.mean"]) / np.sqrt(w["normalizer.variance"] + 1e-5)
    x = np.clip(x, -10, 10) @ w["mlp.0.weight"].T + w["mlp.0.bias"]
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) @ w["mlp.2.weight"].T + w["mlp.2.bias"]


class TestActionAndValue:
    def test_against_scipy(self, trained: Path) -> None:
        runner, content = PolicyRunner(trained), checkpoint.load(trained / "checkpoint.pt")
        env = make_env(5)
        obs, info = env.reset(seed=3)
        critic_obs = info["critic_obs"]
        mean = network(content["actor"], obs.double().numpy())
        gaussian = scipy.stats.norm(mean, content["actor"]["log_std"].double().exp().numpy())
        value = network(content["resume"]["critic"], critic_obs.double().numpy())[:, 0]
        given = torch.randn(5, 29, generator=torch.Generator().manual_seed(0))
        for action in (None, given):
            found, log_prob, entropy, values = runner.get_action_and_value(obs, critic_obs, action)
            assert action is None or torch.equal(found, action)
            assert found.shape == (5, 29) and entropy.shape == ()
            np.testing.assert_allclose(log_prob, gaussian.logpdf(found).sum(-1), rtol=1e-5)
            np.testing.assert_allclose(entropy, gaussian.entropy()[0].sum(), rtol=1e-5)
            np.testing.assert_allclose(values, value, atol=1e-5)

    def test_draws_are_of_that_gaussian(self, trained: Path) -> None:
        runner = PolicyRunner(trained / "checkpoint.pt")
        obs = torch.randn(1, 98, generator=torch.Generator().manual_seed(0)).expand(500, -1)
        size = len(load_critic(trained).normalizer.mean)
        torch.manual_seed(0)
        drawn, *_ = runner.get_action_and_value(obs, torch.zeros(500, size))
        content = checkpoint.load(trained / "checkpoint.pt")["actor"]
        scaled = (drawn.numpy() - network(content, obs.numpy())) / content["log_std"].exp().numpy()
        assert scipy.stats.kstest(scaled.ravel(), "norm").statistic < 0.02

    def test_what_has_no_critic_says_so(self, trained: Path, exported: Path) -> None:
        obs = torch.zeros(1, 98)
        for path in (exported, plain_path(exported)):
            with pytest.raises(ValueError, match="a value needs a checkpoint: PolicyRunner of the run's fol"):
                PolicyRunner(path).get_action_and_value(obs)
        for name in ("walk", trained / "policy.pt"):
            with pytest.raises(ValueError, match=r"\.pt: holds no critic; name the folder of a run, or its"):
                PolicyRunner(name).get_action_and_value(obs)
        with pytest.raises(ValueError, match=r"critic_obs of shape \(1, 98\): the critic sees \d+ numbers"):
            PolicyRunner(trained).get_action_and_value(obs)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"device": "tpu"}, ValueError, "device='tpu': choose from cpu, cuda"),
            ({"robot": "h1"}, ValueError, "robot='h1': .* was trained on 'g1'"),
        ],
    )
    def test_by_every_kind(self, exported: Path, options: dict, error: type, message: str) -> None:
        for policy in (exported, plain_path(exported), "walk"):
            with pytest.raises(error, match=message):
                PolicyRunner(policy, **options)
        assert PolicyRunner(exported, robot="g1").contract["robot"] == "g1"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, exported: Path) -> None:
        for path in (exported, plain_path(exported)):
            with pytest.raises(RuntimeError, match=r"device='cuda': onnxruntime .*(without CUDA|cannot use)"):
                PolicyRunner(path, device="cuda")
        with pytest.raises(RuntimeError, match=r"device='cuda': .* use --device cpu"):
            PolicyRunner("walk", device="cuda")

    def test_tensorrt_of_a_checkpoint(self) -> None:
        with pytest.raises(
            ValueError, match="policy walk: TensorRT builds from a policy file: kouros export w"
        ):
            PolicyRunner("walk", use_tensorrt=True)

    def test_a_policy_that_diverged(self, exported: Path) -> None:
        """Its targets are refused, and what it remembers is what it was."""
        runner, twin = PolicyRunner(exported), PolicyRunner(exported)
        backend = runner._backend

        class Diverged:
            def __call__(self) -> None:
                backend.outputs["joint_targets"][0, 4] = math.nan

        runner._backend = Diverged()
        with pytest.raises(RuntimeError, match=r"policy\.onnx: gave a joint target that is not finite"):
            runner.act(still(runner, 0.0))
        runner._backend = backend
        assert runner.act(still(runner, 1.0)) == twin.act(still(twin, 1.0))
