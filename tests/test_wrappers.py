"""Observation wrappers: what they return, remember, mirror and save; the policy file does the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from conftest import make_env, random_actions
from kouros.deploy.export import OnnxExporter, PolicyGraph
from kouros.envs import wrappers
from kouros.envs.config import NOISE, HumanoidEnvConfig, RandomizationConfig
from kouros.envs.contract import policy_contract, policy_sensors, record_policy
from kouros.envs.evaluation import evaluate_walk
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.play import _Single
from kouros.envs.scene import make_model
from kouros.envs.wrappers import (
    HistoryObservation,
    KinematicObservation,
    NormalizeObservation,
    ObservationWrapper,
)
from kouros.learning.config import PPOConfig, TrainConfig
from kouros.learning.ppo import PPOAgent
from kouros.learning.run import load_policy, train
from kouros.physics.kinematics import SitePositions, read_chains
from test_warp import NoHost, Stand, refuse_the_host

STACK = ("kinematic", "history:3", "normalize")
SMALL = PPOConfig(horizon=8, minibatches=2, actor_hidden=(16,), critic_hidden=(16,))


def steps(env: Any, count: int, scale: float = 0.5, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [env.step(random_actions(env, generator, scale)) for _ in range(count)]


def twins(*wrappers: str, seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """The same worlds, bare and wrapped."""
    return make_env(seed=seed, **config), make_env(seed=seed, wrappers=wrappers, **config)


class Upside(ObservationWrapper):
    """A wrapper as a user writes it."""

    def observation(self, obs: torch.Tensor) -> torch.Tensor:
        return -obs


class TestForwardKinematics:
    def test_is_the_engines(self, robot) -> None:
        model = make_model(robot, HumanoidEnvConfig())
        data = mujoco.MjData(model)
        names = (*robot.hands, *robot.feet, robot.torso)
        chains = read_chains(model, robot.base_body, names)
        rng = np.random.default_rng(0)
        q = rng.uniform(robot.joint_range[:, 0], robot.joint_range[:, 1], (50, robot.num_joints))
        found = SitePositions(json.loads(json.dumps(chains)), robot.joint_names)(torch.tensor(q).float())
        base = model.body(robot.base_body).id
        for row, points in zip(q, found, strict=True):
            data.qpos[:3], data.qpos[3:7] = rng.standard_normal(3), rng.standard_normal(4)
            data.qpos[7:] = row
            mujoco.mj_kinematics(model, data)
            frame = data.xmat[base].reshape(3, 3)
            expected = np.array([frame.T @ (data.site(name).xpos - data.xpos[base]) for name in names])
            np.testing.assert_allclose(points, expected, atol=1e-6)

    def test_of_a_robot_that_is_not_a_g1(self) -> None:
        """Two hinges in a body, anchors off the origin, a reference angle, a body without a joint."""
        hinge = '<joint name="{}" axis="{}" pos="{}" ref="{}"/>'
        xml = f"""<mujoco><compiler angle="radian"/><worldbody><body name="base" pos="1 2 3"><freejoint/>
        <geom size=".1"/><site name="still" pos=".1 .2 .3"/>
        <body pos=".1 0 .2" quat=".9 .1 .3 .2">{hinge.format("a", "1 2 0", ".1 .2 0", ".3")}
        {hinge.format("b", "0 1 1", "0 .1 .1", "-.2")}<geom size=".1"/>
        <body pos="0 .3 0" euler=".4 .5 .6"><body pos=".1 .1 .1">{hinge.format("c", "0 0 1", "0 0 0", "0")}
        <geom size=".1"/><site name="hand" pos=".2 .3 .1"/></body></body></body>
        </body></worldbody></mujoco>"""
        model = mujoco.MjModel.from_xml_string(xml)
        data = mujoco.MjData(model)
        positions = SitePositions(read_chains(model, "base", ["hand", "still"]), ["c", "a", "b"])
        for q in np.random.default_rng(0).uniform(-2, 2, (10, 3)):
            data.qpos[7:] = q[[1, 2, 0]]
            mujoco.mj_kinematics(model, data)
            expected = np.array([data.site(name).xpos - data.xpos[1] for name in ("hand", "still")])
            np.testing.assert_allclose(positions(torch.tensor(q[None]).float())[0], expected, atol=1e-6)
        with pytest.raises(ValueError, match="joint 'a' on the way to 'hand'"):
            SitePositions(read_chains(model, "base", ["hand"]), ["b", "c"])
        model.jnt_type[1] = mujoco.mjtJoint.mjJNT_SLIDE
        with pytest.raises(ValueError, match="joint 'a': is no hinge"):
            read_chains(model, "base", ["hand"])


@pytest.mark.parametrize(
    "wrappers",
    [
        ("kinematic",),
        ("kinematic:velocity",),
        ("kinematic:only-velocity",),
        ("history:1",),
        ("history:4",),
        ("normalize",),
        STACK,
        ("normalize", "history:2", "kinematic"),
    ],
)
def test_spaces_are_of_what_is_returned(wrappers: tuple[str, ...]) -> None:
    env = make_env(4, wrappers=wrappers, max_episode_length=2)
    assert env.config.wrappers == wrappers
    obs, info = env.reset(seed=0)
    for _ in range(3):
        assert env.observation_space.contains(obs.numpy())
        assert obs.shape[1:] == env.observe().shape[1:] == env.single_observation_space.shape
        assert info["critic_obs"].shape == (4, *env.critic_observation_space.shape)
        assert len(env.mirror["obs"][0]) == obs.shape[1]
        assert len(env.mirror["critic_obs"][0]) == info["critic_obs"].shape[1]
        obs, *_, info = env.step(torch.zeros(4, 29))
        assert info["final_obs"].shape == obs.shape
        assert info["final_critic_obs"].shape == info["critic_obs"].shape


class TestKinematicObservation:
    def test_appends_hands_and_velocity(self) -> None:
        """MuJoCo's own places, in the base frame, to both observations; episodes end in between."""
        bare, env = twins("kinematic:velocity", max_episode_length=7)
        plain = steps(bare, 16)
        for (obs, *_, info), (old, *_, before) in zip(steps(env, 16), plain, strict=True):
            for name, x, y in (("obs", obs, old), *((k, info[k], before[k]) for k in _OBSERVATIONS)):
                assert torch.equal(x[:, :-9], y), name
        for world in range(8):
            data = env.simulation.data(world)
            base = data.body(env.robot.base_body)
            frame = base.xmat.reshape(3, 3)
            hands = [frame.T @ (data.site(hand).xpos - base.xpos) for hand in env.robot.hands]
            expected = np.concatenate([*hands, frame.T @ data.qvel[:3]])
            np.testing.assert_allclose(obs[world, -9:], expected, atol=1e-5)
            np.testing.assert_allclose(info["critic_obs"][world, -9:], expected, atol=1e-5)
        assert (obs[:, -9:-3].abs() > 0.02).all()

    def test_the_last_of_an_episode_is_of_that_episode(self) -> None:
        """As a twin has it whose episodes do not end."""
        env = make_env(wrappers=("kinematic:velocity",), max_episode_length=5, harness=0.0)
        twin = make_env(wrappers=("kinematic:velocity",), harness=0.0)
        last, expected = steps(env, 5)[-1], steps(twin, 5)[-1]
        assert last[3].all() and not expected[3].any()
        assert torch.equal(last[4]["final_obs"], expected[0])
        assert torch.equal(last[4]["final_critic_obs"], expected[4]["critic_obs"])
        assert ((last[0] - last[4]["final_obs"])[:, -9:].abs() > 1e-5).all()

    @pytest.mark.parametrize("told", ["joint_pos", "command"])
    def test_hands_are_where_the_encoders_say(self, told: str) -> None:
        """Of the joint positions that the policy is told, or would be told; the critic's are true."""
        drawn = RandomizationConfig(
            encoder_bias=(-0.1, 0.1), **({"sensor_delay": (0.0, 0.05)} if told == "joint_pos" else {})
        )
        env = make_env(
            6, wrappers=("kinematic",), actor_observations=(told,), randomization=drawn, max_episode_length=4
        )
        hands = env._hands
        for _ in range(6):
            ((obs, _, _, truncated, info),) = steps(env, 1)
            assert torch.equal(env.observe(), obs)
            for name in ("obs", "final_obs"):
                seen = obs if name == "obs" else info[name]
                when = "" if name == "obs" else "final_"
                true = info[f"{when}critic_obs"][:, -6:].view(6, 2, 3)
                rows = torch.ones(6, dtype=torch.bool) if name == "obs" else truncated
                torch.testing.assert_close(true[rows], hands(getattr(env, f"{when}joint_pos"))[rows])
                if told == "joint_pos":
                    read = seen[:, :29] + env.default_joint_pos
                else:
                    read = env.joint_pos + env.randomization["encoder_bias"]
                    rows = rows if name == "obs" else ~truncated  # the ended episode's bias is gone
                found = seen[:, -6:].view(6, 2, 3)
                torch.testing.assert_close(found[rows], hands(read)[rows], atol=1e-6, rtol=0)
        assert (found - true).abs().max() > 0.01


_OBSERVATIONS = ("critic_obs", "final_obs", "final_critic_obs")


class TestHistoryObservation:
    def test_is_each_worlds_last_observations_oldest_first(self) -> None:
        """Against lists in Python, through falls, time-outs, pushes and masked resets."""
        length = 3
        told = RandomizationConfig(
            push_velocity=(0.5, 0.5), push_interval=(0.1, 0.2), observation_noise=NOISE
        )
        config: dict[str, Any] = {"max_episode_length": 11, "randomization": told}
        bare, env = twins("history:3", **config)
        frames = [[row] * length for row in bare.reset(seed=3)[0]]
        assert torch.equal(env.reset(seed=3)[0], _shown(frames))
        generator = torch.Generator().manual_seed(0)
        ends = 0
        for t in range(40):
            action = random_actions(env, generator, 1.5)
            obs, _, terminated, truncated, info = bare.step(action)
            got, *_, got_info = env.step(action)
            done = terminated | truncated
            final = _shown([[*old[1:], row] for old, row in zip(frames, info["final_obs"], strict=True)])
            frames = [
                [row] * length if end else [*old[1:], row]
                for old, row, end in zip(frames, obs, done, strict=True)
            ]
            assert torch.equal(got, _shown(frames))
            assert torch.equal(got_info["final_obs"], torch.where(done[:, None], final, got))
            assert torch.equal(got_info["critic_obs"], info["critic_obs"])
            assert torch.equal(env.observe(), got)
            ends += int(done.sum())
            if t % 9 == 4:
                mask = torch.arange(8) % 3 == t % 2
                obs, _ = bare.reset(options={"reset_mask": mask})
                got, _ = env.reset(options={"reset_mask": mask})
                frames = [
                    [row] * length if new else old for old, row, new in zip(frames, obs, mask, strict=True)
                ]
                assert torch.equal(got, _shown(frames))
        assert ends > 10

    def test_observe_shows_the_present(self) -> None:
        """A command from outside is in the newest place, and everywhere at the start of an episode."""
        env = make_env(2, wrappers=("history:3",), actor_observations=("command",))
        env.reset(seed=0)
        first, second = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.4, 0.2, 0.1]])
        env.set_command(first)
        assert torch.equal(env.observe(), first.repeat(2, 3))
        env.step(torch.zeros(2, 29))
        env.set_command(second)
        assert torch.equal(env.observe(), torch.cat((first, first, second), 1).repeat(2, 1))

    def test_what_was_returned_stays(self) -> None:
        env = make_env(2, wrappers=("history:2",))
        obs, _ = env.reset(seed=0)
        before = obs.clone()
        steps(env, 2)
        assert torch.equal(obs, before)


def _shown(frames: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([torch.cat(rows) for rows in frames])


class TestNormalizeObservation:
    def test_statistics_are_those_of_all_seen(self) -> None:
        bare, env = twins("normalize", max_episode_length=7, num_envs=6)
        seen = [bare.reset(seed=5)[0]]
        env.reset(seed=5)
        data: list[torch.Tensor] = [make_env(6).reset(seed=0)[0], *seen]  # conftest reset both once
        generator = torch.Generator().manual_seed(0)
        for t in range(30):
            action = random_actions(env, generator)
            obs, *_, info = bare.step(action)
            got, *_, got_info = env.step(action)
            env.observe()  # counts nothing
            data.append(obs)
            if t == 20:
                mask = torch.arange(6) < 2
                data.append(bare.reset(options={"reset_mask": mask})[0][mask])
                env.reset(options={"reset_mask": mask})
            if t == 25:
                env.reset(options={"reset_mask": torch.zeros(6, dtype=torch.bool)})
                bare.reset(options={"reset_mask": torch.zeros(6, dtype=torch.bool)})
        rows = torch.cat(data).double().numpy()
        assert env.count == len(rows)
        np.testing.assert_allclose(env.mean, rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(env.variance, rows.var(0), atol=1e-12)
        # Observations are normalized by the statistics of the data and its mirror images.
        index, sign = (part.numpy() for part in bare.mirror["obs"])
        both = np.concatenate([rows, sign * rows[:, index]])
        for raw, normalized in ((obs, got), (info["final_obs"], got_info["final_obs"])):
            expected = np.clip((raw.numpy() - both.mean(0)) / np.sqrt(both.var(0) + 1e-5), -10, 10)
            np.testing.assert_allclose(normalized, expected, atol=1e-4)

    def test_frozen(self) -> None:
        env = make_env(4, wrappers=("normalize",))
        steps(env, 5)
        env.freeze()
        assert env.frozen
        before = (env.mean.clone(), env.count.clone(), env.observe())
        steps(env, 3)
        env.reset(options={"reset_mask": torch.tensor([True, False, False, True])})
        assert torch.equal(env.mean, before[0]) and env.count == before[1]
        env.freeze(False)
        steps(env, 1)
        assert not torch.equal(env.mean, before[0])

    def test_goes_on_from_statistics(self) -> None:
        env = make_env(4, wrappers=STACK)
        steps(env, 5)
        bare = KinematicObservation(HumanoidBaseEnv(dataclasses.replace(env.config, wrappers=())))
        other = NormalizeObservation(HistoryObservation(bare, 3), json.loads(json.dumps(env.statistics)))
        assert other.frozen
        other.load_state_dict({**other.state_dict(), "env": env.state_dict()["env"]})
        assert torch.equal(other.observe(), env.observe())


@pytest.mark.parametrize("wrappers", [("kinematic:velocity", "history:2", "normalize")])
def test_a_mirrored_world_gives_mirrored_observations(wrappers: tuple[str, ...]) -> None:
    """World 1 is the mirror image of world 0, as in test_env."""
    env = make_env(2, wrappers=wrappers, harness=0.5)
    env.reset(seed=0)
    sim = env.simulation

    def mirrored(x: torch.Tensor, name: str) -> torch.Tensor:
        index, sign = env.mirror[name]
        return sign.to(x.dtype) * x[:, index]

    sim.qpos[1, :7] = torch.tensor([1.0, -1, 1, 1, -1, 1, -1], dtype=torch.float64) * sim.qpos[0, :7]
    sim.qpos[1, 7:] = mirrored(sim.qpos[:1, 7:], "action")
    sim.qvel[1, :3] = torch.tensor([1.0, -1, 1]) * sim.qvel[0, :3]
    sim.qvel[1, 3:6] = torch.tensor([-1.0, 1, -1]) * sim.qvel[0, 3:6]
    sim.qvel[1, 6:] = mirrored(sim.qvel[:1, 6:], "action")
    env.set_command(torch.tensor([[0.4, 0.2, 0.3], [0.4, -0.2, -0.3]]))
    env.phase[:] = torch.tensor([0.1, 0.6])
    env.freeze()
    # Statistics of one-sided data, which are not symmetric themselves.
    env.mean.copy_(torch.linspace(-0.2, 0.3, len(env.mean)))
    env.variance.copy_(torch.linspace(0.5, 2.0, len(env.mean)))
    env.freeze()
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        action = 0.3 * torch.randn(1, 29, generator=generator)
        obs, *_, info = env.step(torch.cat((action, mirrored(action, "action"))))
    for name, values in (("obs", obs), ("critic_obs", info["critic_obs"])):
        torch.testing.assert_close(mirrored(values[:1], name), values[1:], atol=2e-2, rtol=2e-2)
    assert obs.abs().max() > 0.5


def test_wrappers_apply_in_their_order() -> None:
    """Innermost first, by hand or by configuration; the other order is something else."""
    config = HumanoidEnvConfig(num_envs=4, max_episode_length=5)
    by_hand: Any = NormalizeObservation(
        HistoryObservation(KinematicObservation(HumanoidBaseEnv(config)), history_length=3)
    )
    by_hand.reset(seed=0)
    by_name = make_env(4, wrappers=STACK, max_episode_length=5)
    other = make_env(4, wrappers=("kinematic", "normalize", "history:3"), max_episode_length=5)
    a, b, c = (steps(env, 8) for env in (by_hand, by_name, other))
    assert by_hand.config == by_name.config
    assert policy_contract(by_hand) == policy_contract(by_name)
    for (obs, *_, info), (same, *_, same_info) in zip(a, b, strict=True):
        assert torch.equal(obs, same) and torch.equal(info["final_obs"], same_info["final_obs"])
    assert obs.shape == c[-1][0].shape and not torch.equal(obs, c[-1][0])


def test_a_mask_touches_only_its_rows() -> None:
    env = make_env(6, wrappers=STACK)
    steps(env, 5)
    before, shown = env.state_dict(), env.observe()
    mask = torch.arange(6) % 2 == 0
    env.freeze()
    env.reset(options={"reset_mask": mask})
    after = env.state_dict()
    for name in ("frames", "begun"):
        old, new = before["env"][name], after["env"][name]
        assert torch.equal(old[~mask], new[~mask])
        assert not torch.equal(old[mask], new[mask])
    assert torch.equal(env.observe()[~mask], shown[~mask])


def test_a_wrapper_of_ones_own() -> None:
    bare = make_env(4, max_episode_length=3)
    env: Any = HistoryObservation(Upside(HumanoidBaseEnv(bare.config)), 2)
    env.reset(seed=0)
    for (obs, *_, info), (got, *_, got_info) in zip(steps(bare, 5), steps(env, 5), strict=True):
        assert torch.equal(got[:, 98:], -obs)
        assert torch.equal(got_info["final_obs"][:, 98:], -info["final_obs"])
    assert torch.equal(env.command, env.unwrapped.command)
    assert env.config.wrappers == ("Upside", "history:2") and bare.config.wrappers == ()


class TestState:
    def test_recorded_training_is_the_same_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trying a step out leaves no trace, and a replay reads what the last one left."""
        monkeypatch.setattr("kouros.learning.ppo.Recorded", Stand)
        agents = []
        for recorded in (True, False):
            agents.append(PPOAgent(make_env(8, wrappers=STACK, max_episode_length=9), SMALL))
            agents[-1]._record_steps = recorded
            agents[-1].train(3)
        for a, b in zip(*(agent.actor.parameters() for agent in agents), strict=True):
            assert torch.equal(a, b)

    def test_stays_where_it_is(self) -> None:
        """A recorded step reads what the last replay left: in the same memory."""
        env = make_env(4, wrappers=STACK)
        layers = [env, env.env, env.env.env]
        places = [{k: v.data_ptr() for k, v in layer._tensors().items()} for layer in layers]
        steps(env, 3)
        env.load_state_dict(env.state_dict())
        assert [{k: v.data_ptr() for k, v in layer._tensors().items()} for layer in layers] == places
        assert sum(map(len, places)) == 9

    def test_of_another_stack_is_refused(self) -> None:
        env, other = make_env(4, wrappers=("history:2",)), make_env(4, wrappers=("history:3",))
        for state in (other.state_dict(), other.env.state_dict()):
            with pytest.raises(ValueError, match="HistoryObservation: the state is of another one"):
                env.load_state_dict(state)


class TestWarp:
    def test_agrees_with_the_c_engine(self) -> None:
        stack = ("kinematic:velocity", "history:2")
        c, warp = (make_env(4, wrappers=stack, engine=engine) for engine in ("c", "warp"))
        a, b = steps(c, 3, 0.1)[-1], steps(warp, 3, 0.1)[-1]
        torch.testing.assert_close(b[0][:, -9:], a[0][:, -9:], atol=1e-2, rtol=0)

    def test_the_step_never_asks_the_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        env = make_env(
            4, wrappers=("kinematic:velocity", "history:2", "normalize"), engine="warp", max_episode_length=2
        )
        actions = torch.zeros(4, 29)
        base = env.unwrapped
        monkeypatch.setattr(base, "step", base._step)  # without the checks of the input
        refuse_the_host(monkeypatch)
        with NoHost():
            for _ in range(3):
                env.step(actions)


class TestExport:
    @pytest.mark.parametrize("wrappers", [STACK, ("history:1", "kinematic", "normalize")])
    def test_the_stack_is_in_the_file(self, tmp_path: Path, wrappers: tuple[str, ...]) -> None:
        """A loop that knows only the file and named sensors repeats the wrapped environment's targets."""
        import onnxruntime

        agent = PPOAgent(make_env(8, wrappers=wrappers), SMALL)
        agent.train(2)
        env: Any = agent.env
        actor, env_config, contract = agent.actor, env.config, policy_contract(env)
        torch.nn.init.normal_(actor.mlp[-1].weight, std=0.03)  # a policy that listens
        statistics = contract.get("statistics")
        path = tmp_path / "policy.onnx"
        recording = record_policy(actor.act, env_config, 100, statistics)
        assert OnnxExporter(actor, contract).export(path, recording) <= 1e-5

        session = onnxruntime.InferenceSession(path)
        state = np.zeros((1, session.get_inputs()[-1].shape[1]), np.float32)
        robot = _Single(actor.act, env_config, 0, statistics)
        robot.env.phase[:], robot.env.coast[:] = 0.0, 0.0
        for t in range(12):
            command = (0.5, 0.0, 0.1 * (t // 5))
            robot.env.set_command(torch.tensor([command]))
            told = policy_sensors(robot.env)
            sensors = {i.name: told[i.name].numpy() for i in session.get_inputs()[:-1]}
            targets, state = session.run(None, {**sensors, "state": state})
            robot.step(command)
            np.testing.assert_allclose(targets, robot.env.simulation.ctrl, atol=1e-4)
        assert np.abs(targets - contract["default_joint_pos"]).max() > 0.02

    def test_statistics_are_the_trainings_last(self, tmp_path: Path) -> None:
        env = HumanoidEnvConfig(num_envs=8, wrappers=("normalize",))
        config = TrainConfig(run=tmp_path / "run", steps=3 * 64, device="cpu", env=env, ppo=SMALL)
        agent = PPOAgent(wrappers.make_env(env), SMALL)
        agent.train(3)
        _, env_config, contract = load_policy(train(config))
        assert contract["statistics"] == agent.env.statistics  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"statistics=None.*contract\['statistics'\]"):
            evaluate_walk(agent.actor.act, env_config, 2, 0.1)
        evaluate_walk(agent.actor.act, env_config, 2, 0.1, statistics=contract["statistics"])

    def test_what_the_file_cannot_hold_is_refused_by_name(self) -> None:
        from kouros.cli import main

        class Longer(HistoryObservation):
            pass

        base = HumanoidBaseEnv(HumanoidEnvConfig(num_envs=1))
        for env, message in (
            (KinematicObservation(base, include_velocity=True), "wrappers='kinematic:velocity': no robot"),
            (Upside(base), "wrappers='Upside': choose from kinematic, history, normalize"),
            (Longer(base, 2), "wrappers='Longer': choose from"),
        ):
            with pytest.raises(ValueError, match=message):
                PolicyGraph(torch.nn.Identity(), policy_contract(env))
        with pytest.raises(TypeError, match="VectorWrapper: no HumanoidBaseEnv"):
            from gymnasium.vector import VectorWrapper

            policy_contract(VectorWrapper(base))  # type: ignore[arg-type]
        assert main(["train", "--env.wrappers", "kinematic:velocity"]) == 1  # before the training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda env: HistoryObservation(env, 0), "history_length=0: must be a whole number, at least 1"),
        (lambda env: HistoryObservation(env, 2.5), r"history_length=2\.5"),
        (lambda env: HistoryObservation(env, True), "history_length=True"),
        (lambda env: KinematicObservation(env, False), "nothing is left to observe"),
        (lambda env: HistoryObservation(HistoryObservation(env, 2), 3), "HistoryObservation: the stack"),
        (lambda env: NormalizeObservation(env, {"mean": [0.0]}), "mean of 1 values, the observation has 98"),
        (lambda _: HumanoidEnvConfig(wrappers=("histroy:5",)), "wrappers='histroy'.*did you mean 'history'"),
        (lambda _: HumanoidEnvConfig(wrappers=("history:0",)), "wrappers='history:0': say how many"),
        (lambda _: HumanoidEnvConfig(wrappers=("history",)), "wrappers='history': say how many"),
        (lambda _: HumanoidEnvConfig(wrappers=("kinematic:hands",)), "choose from kinematic, kinematic:velo"),
        (lambda _: HumanoidEnvConfig(wrappers=("normalize:1",)), "wrappers='normalize:1': choose from"),
        (lambda _: HumanoidEnvConfig(wrappers="normalize"), "wrappers='normalize': must be a tuple"),
        (lambda _: HumanoidEnvConfig(wrappers=("history:2", "history:3")), "each may be there once"),
        (lambda _: HumanoidBaseEnv(HumanoidEnvConfig(wrappers=("normalize",))), "use make_env"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(HumanoidBaseEnv(HumanoidEnvConfig(num_envs=1)))


def test_only_humanoids_are_wrapped() -> None:
    import gymnasium

    with pytest.raises(TypeError, match=r"CartPole.*only a HumanoidBaseEnv can be"):
        HistoryObservation(gymnasium.make_vec("CartPole-v1", num_envs=1), 3)  # type: ignore[arg-type]
