"""The curriculum's laws: only success moves it, and every figure of a stage shows in the worlds."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from conftest import make_env
from kouros import CurriculumManager, CurriculumStage
from kouros.envs.config import CURRICULUM_FIELDS, CurriculumConfig, HumanoidEnvConfig, RandomizationConfig
from kouros.envs.curriculum import RunningCurriculum, make_stages
from kouros.envs.humanoid import _STATE, HumanoidBaseEnv
from kouros.learning.config import PPOConfig, TrainConfig
from kouros.learning.log import read_metrics
from kouros.learning.ppo import PPOAgent
from kouros.learning.run import load_policy, train
from test_warp import NoHost

FLAT: dict[str, Any] = {"enabled": True, "terrain_difficulty": (0.0,) * 5}
# Commands alone: what an environment without randomization can follow.
SPEED: dict[str, Any] = FLAT | dict.fromkeys(
    ("push_frequency", "mass_variance", "friction_variance"), (0.0,) * 5
)
STILL = RandomizationConfig(initial_velocity=(0.0, 0.0))
RANDOM = RandomizationConfig(
    mass=(0.8, 1.4), friction=(0.4, 1.2), push_velocity=(0.5, 0.5), push_interval=(0.04, 0.08), population=100
)


class TestManager:
    def test_five_stages_to_success(self) -> None:
        curriculum = CurriculumManager()
        assert len(curriculum.stages) == 5
        names = [curriculum.stages[0].name]
        for progress in (0.25, 0.5, 0.75, 1.0):
            before = curriculum.get_current_params()
            assert curriculum.update(successes=83, episodes=100)
            assert curriculum.get_progress() == progress
            assert curriculum.get_current_params() != before
            names.append(curriculum.stages[curriculum.stage].name)
        assert not curriculum.update(100, 100)
        assert tuple(curriculum.get_current_params()) == CURRICULUM_FIELDS
        moves = [(m["from"], m["to"], m["episodes"], m["success_rate"]) for m in curriculum.history]
        assert moves == [(a, b, 100, 0.83) for a, b in itertools.pairwise(names)]

    @settings(max_examples=200, deadline=None)
    @given(
        calls=st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), max_size=60),
        retreat=st.floats(0, 0.79),
        least=st.integers(1, 100),
        cut=st.integers(0, 60),
    )
    def test_it_moves_by_one_and_on_the_pooled_rate_alone(
        self, calls: list[tuple[int, float]], retreat: float, least: int, cut: int
    ) -> None:
        """Against a loop over single episodes; and a manager that is saved and loaded on the way."""
        curriculum = CurriculumManager(advance_at=0.8, retreat_below=retreat, min_episodes=least)
        pool: list[bool] = []
        for i, (episodes, share) in enumerate(calls):
            if i == cut:
                saved = curriculum.state_dict()
                curriculum = CurriculumManager(advance_at=0.8, retreat_below=retreat, min_episodes=least)
                curriculum.load_state_dict(saved)
            successes = int(share * episodes)
            pool += [True] * successes + [False] * (episodes - successes)
            before = curriculum.stage
            moved = curriculum.update(successes, episodes)
            expected = before
            if len(pool) >= least:
                rate = sum(pool) / len(pool)
                expected += 1 if rate >= 0.8 else -1 if rate < retreat else 0
                expected = min(max(expected, 0), 4)
                assert curriculum.success_rate == rate
                pool = []
            assert curriculum.stage == expected
            assert moved == (expected != before)
        climbs = [1 if m["success_rate"] >= 0.8 else -1 for m in curriculum.history]
        assert sum(climbs) == curriculum.stage

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: CurriculumManager(stages=[CurriculumStage("a")]), "stages: 1 of them"),
            (
                lambda: CurriculumManager(stages=[CurriculumStage("a"), CurriculumStage("b")]),
                "stages: 'b' changes nothing after 'a'",
            ),
            (lambda: CurriculumStage("a", push_frequency=2.0), r"push_frequency=2.0: must lie in \[0, 1\]"),
            (lambda: CurriculumManager(advance_at=0.0), r"advance_at=0.0: must lie in \(0, 1\]"),
            (
                lambda: CurriculumManager(retreat_below=0.8),
                r"retreat_below=0.8: must lie in \[0, advance_at=0.8",
            ),
            (lambda: CurriculumManager(min_episodes=0), "min_episodes=0: must be greater than 0"),
            (lambda: CurriculumManager().update(3, 2), "successes=3 of episodes=2"),
            (lambda: CurriculumManager().update(-1, 2), "successes=-1"),
            (lambda: CurriculumConfig(names=("a",)), "names=.*at least two"),
            (
                lambda: CurriculumConfig(mass_variance=(0.0, 1.0)),
                r"mass_variance=\(0.0, 1.0\): must have one entry for each of the 5 stages: standing",
            ),
            (lambda: CurriculumConfig(command_speed=(0, 0.5, 0.7, 0.8, 1.2)), "command_speed=.*must lie in"),
            (lambda: CurriculumConfig(success_error=float("nan")), "success_error=nan: must be finite"),
        ],
    )
    def test_bad_input(self, make, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_state_of_another_curriculum(self) -> None:
        state = CurriculumManager().state_dict() | {"stage": 4}
        with pytest.raises(ValueError, match="stage=4: of another curriculum; 2 here"):
            CurriculumManager([CurriculumStage("a", 0.0), CurriculumStage("b", 1.0)]).load_state_dict(state)


def running(n: int, **config: object) -> tuple[RunningCurriculum, dict[str, float]]:
    """A curriculum over ``n`` worlds, and the figures in force."""
    in_force: dict[str, float] = {}
    targets = {name: lambda value, name=name: in_force.__setitem__(name, value) for name in CURRICULUM_FIELDS}
    made = CurriculumConfig(enabled=True, retreat_below=0.4, **config)  # type: ignore[arg-type]
    return RunningCurriculum(made, n, torch.device("cpu"), targets), in_force


class TestSuccess:
    def finish(self, velocity: list, command: list, good: bool = True, steps: int = 10) -> bool:
        """Whether one episode of a velocity under a command counts as a success."""
        curriculum, _ = running(1, min_episodes=1)
        for step in range(1, steps + 1):
            done = torch.tensor([step == steps])
            both = (torch.tensor([x], dtype=torch.float32) for x in (velocity, command))
            curriculum.count(*both, torch.tensor([step]), done, done & good)
        curriculum.advance()
        assert curriculum.manager.success_rate in (0.0, 1.0)
        return curriculum.manager.success_rate == 1.0

    def test_it_takes_a_time_out_and_velocity_and_way(self) -> None:
        assert self.finish([0.5, 0.0, 0.0], [0.6, 0.1, 0.1])
        assert self.finish([0.05, 0.0, 0.0], [0.0, 0.0, 0.0])  # stood as told, swaying
        assert not self.finish([0.5, 0.0, 0.0], [0.6, 0.1, 0.1], good=False)  # fell, or hung in a harness
        assert not self.finish([0.2, 0.0, 0.0], [0.6, 0.0, 0.0])  # error 0.4 m/s
        assert not self.finish([0.0, 0.0, 0.0], [0.2, 0.0, 0.0])  # error 0.2 m/s, by standing still

    @pytest.mark.parametrize("seed", range(3))
    def test_counts_are_those_of_a_loop(self, seed: int) -> None:
        """Rounds of the latest episode of each world, all begun in the round; three of them a judgement."""
        n, rng = 7, np.random.default_rng(seed)
        curriculum, in_force = running(n, min_episodes=20)
        stages = make_stages(curriculum.config)
        begun = [True] * n  # whether the episode under way counts
        latest: dict[int, bool] = {}
        pool: list[bool] = []
        for step in range(600):
            done = torch.from_numpy(rng.random(n) < rng.random(n) * 0.5)
            good = done & torch.from_numpy(rng.random(n) < 0.55 + 0.4 * (step % 200 < 100))
            zero = torch.zeros(n, 3)
            curriculum.count(zero, zero, torch.ones(n), done, good)
            curriculum.begin(done)
            for world in done.nonzero().flatten().tolist():
                if begun[world]:
                    latest[world] = bool(good[world])
                begun[world] = True
            before = curriculum.manager.stage
            log = curriculum.advance()
            expected = before
            if len(latest) == n:
                pool += latest.values()
                latest, begun = {}, [False] * n
            if len(pool) >= 20:
                rate = np.mean(pool)
                assert log["curriculum/success"] == pytest.approx(rate)
                expected = min(max(before + int(rate >= 0.8) - int(rate < 0.4), 0), 4)
                pool = []
            assert curriculum.manager.stage == expected
            assert in_force == stages[curriculum.manager.stage].params()
        assert len(curriculum.manager.history) > 2
        again, loaded = running(n, min_episodes=20)
        again.load_state_dict(curriculum.state_dict())
        assert again.manager.stage > 0 and loaded == in_force

    def test_short_falls_weigh_no_more_than_long_successes(self) -> None:
        """One world of ten falls in every step, the others succeed after a hundred: nine in ten."""
        curriculum, _ = running(10, min_episodes=10)
        falls = torch.arange(10) == 0
        for step in range(1, 101):
            done = falls | (step == 100)
            curriculum.count(
                torch.zeros(10, 3), torch.zeros(10, 3), torch.full((10,), step), done, done & ~falls
            )
            curriculum.begin(done)
            curriculum.advance()
        assert curriculum.manager.success_rate == 0.9 and curriculum.manager.stage == 1


def put_stage(env: HumanoidBaseEnv, stage: int) -> None:
    """Up or down to a stage, by success and failure alone."""
    assert env.curriculum
    manager, n = env.curriculum.manager, env.num_envs
    while manager.stage != stage:
        env.curriculum._ended.fill_(1)
        env.curriculum._succeeded.fill_(manager.stage < stage)
        env.advance_curriculum()
    env.reset(options={"reset_mask": torch.ones(n, dtype=torch.bool)})


class TestFigures:
    """Each figure of a stage, measured in the worlds at a stage that has none, some and all of it."""

    STAGES: dict[str, Any] = FLAT | {
        "command_speed": (0.0, 0.4, 1.0, 0.2, 0.3),
        "push_frequency": (0.0, 0.5, 1.0, 0.0, 0.0),
        "mass_variance": (0.0, 0.5, 1.0, 0.0, 0.0),
        "friction_variance": (0.0, 0.5, 1.0, 0.0, 0.0),
    }

    @pytest.fixture(params=["c", "warp"])
    def env(self, request: pytest.FixtureRequest) -> HumanoidBaseEnv:
        n = 200 if request.param == "c" else 20
        curriculum = CurriculumConfig(**self.STAGES)
        return make_env(n, engine=request.param, randomization=RANDOM, curriculum=curriculum, harness=0.0)

    def test_command_speed_mass_and_friction(self, env: HumanoidBaseEnv) -> None:
        model, sim = env.simulation.model, env.simulation
        nominal = torch.as_tensor(model.body_mass[1:]).float()
        ground = model.geom("ground").id
        for stage, share in [(0, 0.0), (1, 0.5), (2, 1.0), (1, 0.5), (0, 0.0)]:
            put_stage(env, stage)
            speed = self.STAGES["command_speed"][stage]
            vx = env.command[:, 0]
            assert vx.max() <= 1.0 * speed + 1e-6 and vx.min() >= -0.5 * speed - 1e-6
            assert vx.max() >= 0.6 * speed and bool((vx == 0).all()) == (speed == 0)
            factor = sim.model_field("body_mass")[:, 1:].float() / nominal
            assert factor.min() >= 1 - 0.2 * share - 1e-5 and factor.max() <= 1 + 0.4 * share + 1e-5
            assert factor.max() - factor.min() >= 0.9 * 0.6 * share
            friction = sim.model_field("geom_friction")[:, ground, 0]
            assert friction.min() >= 1 - 0.6 * share - 1e-5 and friction.max() <= 1 + 0.2 * share + 1e-5
            assert friction.max() - friction.min() >= 0.7 * 0.8 * share

    def test_push_frequency(self, env: HumanoidBaseEnv) -> None:
        """Pushes are jumps of the clock; a push interval is 3 steps of 0.02 s on average."""
        counts = []
        for stage in (0, 1, 2):
            put_stage(env, stage)
            pushes = 0
            for _ in range(12):
                before = env.until_push.clone()
                *_, terminated, truncated, _ = env.step(torch.zeros(env.num_envs, 29))
                pushes += int(((env.until_push > before) & ~(terminated | truncated)).sum())
            counts.append(pushes / env.num_envs)
        assert counts[0] == 0
        assert counts[2] > 2.5
        assert counts[1] == pytest.approx(counts[2] / 2, rel=0.3)

    @pytest.mark.parametrize("field", [f for f in CURRICULUM_FIELDS if f != "command_speed"])
    def test_what_drives_nothing_is_refused(self, field: str) -> None:
        curriculum = CurriculumConfig(**SPEED | {field: (0.0, 0.0, 0.0, 0.5, 1.0)})
        with pytest.raises(ValueError, match=rf"curriculum\.{field}=\(0.0, .*switched off; switch it on"):
            make_env(1, curriculum=curriculum)


class TestTraining:
    def env(self, **changes: object) -> HumanoidBaseEnv:
        """Short episodes under no harness, which time out before anyone can fall."""
        short = {"max_episode_length": 5, "harness": 0.0, "randomization": STILL, "resampling_interval": 0.04}
        curriculum = CurriculumConfig(**SPEED, min_episodes=8, success_error=5.0)
        return make_env(8, **{**short, "curriculum": curriculum, **changes})

    def agent(self, **changes: object) -> PPOAgent:
        return PPOAgent(self.env(**changes), PPOConfig(horizon=4, minibatches=2, actor_hidden=(16,)), seed=1)

    def test_the_last_stage_is_reached_and_every_advance_is_in_the_log(self) -> None:
        agent = self.agent(standing_fraction=1.0)  # whoever lasts stands as told
        rows: list[dict[str, float]] = []
        agent.train(20, rows.append)
        stages = [int(row["curriculum/stage"]) for row in rows]
        assert stages[0] <= 1 and stages[-1] == 4 and sorted(set(stages)) == [0, 1, 2, 3, 4]
        for before, row, stage in zip(stages, rows[1:], stages[1:], strict=False):
            assert stage in (before, before + 1)
            if stage > before:
                assert row["curriculum/success"] >= 0.8
            assert row["curriculum/progress"] == stage / 4
        assert len(agent.env.curriculum.manager.history) == 4  # type: ignore[attr-defined]

    def test_who_only_stands_does_not_get_past_standing(self) -> None:
        """Zero actions: a success at the first stage; then commands come and it is back there."""
        env = self.env(standing_fraction=0.0)
        stages = []
        for _ in range(40):
            env.step(torch.zeros(8, 29))
            stages.append(env.advance_curriculum()["curriculum/stage"])
        assert set(stages) == {0.0, 1.0} and stages.index(1.0) < len(stages) - stages[::-1].index(0.0) - 1

    def test_nothing_without_a_curriculum(self) -> None:
        assert make_env(2).advance_curriculum() == {}

    def test_reset_by_seed_begins_at_the_first_stage(self) -> None:
        env = self.env(standing_fraction=1.0)
        for _ in range(12):
            env.step(torch.zeros(8, 29))
            env.advance_curriculum()
        assert env.curriculum and env.curriculum.manager.stage > 0 and env.command_speed > 0
        env.reset(seed=0)
        assert env.curriculum.manager.stage == 0 and env.command_speed == 0

    @pytest.mark.parametrize(("log_interval", "first"), [(1, 5), (3, 7)])
    def test_n_plus_n_equals_2n(self, tmp_path: Path, log_interval: int, first: int) -> None:
        """Stopped anywhere, also between two rows of the log."""
        easy = CurriculumConfig(**SPEED, min_episodes=8, success_error=5.0, advance_at=0.4, retreat_below=0.1)
        whole, part, rest = (self.agent(standing_fraction=0.6, curriculum=easy) for _ in range(3))
        whole.train(20, log_interval=log_interval)
        part.train(first, log_interval=log_interval)
        part.save_checkpoint(tmp_path / "c.pt")
        rest.load_checkpoint(tmp_path / "c.pt")
        rest.train(20 - first, log_interval=log_interval)
        for a, b in zip(whole.actor.parameters(), rest.actor.parameters(), strict=True):
            assert torch.equal(a, b)
        ends = [agent.env.state_dict()["curriculum"] for agent in (whole, rest)]  # type: ignore[attr-defined]
        assert ends[0].pop("manager") == ends[1].pop("manager")
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        moves = [len(agent.env.curriculum.manager.history) for agent in (part, rest)]  # type: ignore[attr-defined]
        assert 0 < moves[0] < moves[1]

    def test_a_loaded_stage_is_in_force(self) -> None:
        def make() -> HumanoidBaseEnv:
            return make_env(8, randomization=RANDOM, curriculum=CurriculumConfig(**FLAT))

        env, again = make(), make()
        put_stage(env, 3)
        again.load_state_dict(env.state_dict())
        assert again.command_speed == env.command_speed
        assert again.randomization.push_frequency == 0.5
        for _ in range(3):
            a, b = (e.reset()[1]["critic_obs"] for e in (env, again))
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match="curriculum: switched on"):
            make_env(8).load_state_dict(env.state_dict())

    def test_a_run_tells_its_moves_and_its_policy_needs_no_curriculum(self, tmp_path: Path) -> None:
        env = self.env(standing_fraction=1.0).config
        ppo = PPOConfig(horizon=4, minibatches=2, actor_hidden=(16,), critic_hidden=(16,))
        text = io.StringIO()
        config = TrainConfig(run=tmp_path / "run", steps=32 * 5, device="cpu", env=env, ppo=ppo)
        folder = train(config, Console(file=text, width=200))
        assert "curriculum: standing -> slow walking after 8 episodes, 100 % successful" in text.getvalue()
        train(TrainConfig(resume=folder, steps=32 * 12, device="cpu"), Console(file=text, width=200))
        assert text.getvalue().count("curriculum: standing -> slow walking") == 1
        rows = read_metrics(folder / "metrics.jsonl")
        moved = [
            row
            for before, row in itertools.pairwise(rows)
            if row["curriculum/stage"] > before["curriculum/stage"]
        ]
        assert moved and all(row["curriculum/success"] >= 0.8 for row in moved)
        _, config_of_policy, _ = load_policy(folder)
        assert config_of_policy.curriculum == env.curriculum


def test_the_step_never_asks_the_host_and_state_stays_where_it_is() -> None:
    config = HumanoidEnvConfig(
        num_envs=4,
        engine="warp",
        heading_fraction=0.5,
        max_episode_length=2,
        randomization=RANDOM,
        curriculum=CurriculumConfig(**FLAT, min_episodes=4),
    )
    env = HumanoidBaseEnv(config)
    env.reset(seed=0)
    curriculum = env.curriculum
    assert curriculum

    def places() -> list[int]:
        tensors = [getattr(env, name) for name in _STATE] + [env.randomization.push_frequency]
        return [
            t.data_ptr() for t in (*tensors, *(v for v in vars(curriculum).values() if torch.is_tensor(v)))
        ]

    before = places()
    for _ in range(2):
        with NoHost():
            for _ in range(4):
                env._step(torch.zeros(4, 29))
        env.advance_curriculum()
        env.load_state_dict(env.state_dict())
        put_stage(env, 2)
    assert places() == before
