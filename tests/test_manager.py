"""The manager of several policies against a dozen lines of Python, fresh runners, and a robot that walks."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import make_env
from kouros.deploy.export import OnnxExporter, plain_path
from kouros.deploy.manager import CONDITIONS, MultiPolicyManager
from kouros.deploy.runner import PolicyRunner, SensorError
from kouros.envs.config import CALM
from kouros.envs.contract import policy_contract, policy_sensors, record_policy
from kouros.envs.wrappers import make_policy_env
from kouros.learning.networks import ActorNetwork
from kouros.learning.run import load_policy

JOINTS = ("knee", "hip")
VECTORS = ("base_ang_vel", "projected_gravity", "command")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``walk``, and ``hold``: untrained, at half the rate, softer; with a history and a pose, no command."""
    folder = tmp_path_factory.mktemp("policies")
    actor, config, contract = load_policy("walk")
    OnnxExporter(actor, contract).export(folder / "walk.onnx", record_policy(actor.act, config, 20))
    env = make_env(
        1,
        frame_skip=8,
        standing_fraction=1.0,
        wrappers=("history:3",),
        actor_observations=("base_ang_vel", "projected_gravity", "pose_command", "joint_pos", "last_action"),
    )
    torch.manual_seed(0)
    actor = ActorNetwork(env.single_observation_space.shape[0], 29, hidden=(16,))
    torch.nn.init.normal_(actor.mlp[-1].weight, std=0.1)
    contract = policy_contract(env)
    for name in ("stiffness", "damping"):
        contract[name] = [0.5 * gain for gain in contract[name]]
    recording = record_policy(actor.act, env.config, 20)
    OnnxExporter(actor, contract).export(folder / "hold.onnx", recording)
    return {name: folder / f"{name}.onnx" for name in ("walk", "hold")}


@pytest.fixture
def manager(files: dict[str, Path]) -> MultiPolicyManager:
    """Of both."""
    manager = MultiPolicyManager()
    for name, file in files.items():
        manager.add_policy(name, file)
    return manager


def measured(joint_names: tuple[str, ...], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sensors of a robot that trembles, one in each 20 ms."""
    rng = np.random.default_rng(seed)

    def joints() -> dict[str, float]:
        return dict(zip(joint_names, rng.normal(0.0, 0.3, len(joint_names)).tolist(), strict=True))

    return [
        {
            "time": 5.0 + 0.02 * k,
            "base_ang_vel": rng.normal(0.0, 0.1, 3).tolist(),
            "projected_gravity": [*rng.normal(0.0, 0.05, 2).tolist(), -1.0],
            "command": rng.normal(0.0, 0.5, 3).tolist(),
            **{name: joints() for name in ("pose_command", "joint_pos", "joint_vel")},
        }
        for k in range(count)
    ]


class Fake:
    """A policy whose targets are a level and how often it has acted since its reset."""

    def __init__(self, level: float = 0.0, control_dt: float = 0.02, per_act: float = 0.0, **other: Any):
        self.level, self.control_dt, self.per_act = level, control_dt, per_act
        self.joint_names = other.get("joint_names", JOINTS)
        self.sensors = other.get("sensors", VECTORS)
        self.contract = {"robot": "g1", "control_mode": "position", **other}
        self.gains = (dict.fromkeys(JOINTS, 100.0 + level), dict.fromkeys(JOINTS, 10.0 - level))
        self.backend, self.warmed = "fake", 0
        self.reset()

    def reset(self) -> None:
        self.acts = 0

    def read(self, sensors: dict[str, Any]) -> None:
        assert set(sensors) == {"time", *self.sensors}

    def act(self, sensors: dict[str, Any]) -> dict[str, float]:
        self.read(sensors)
        if sensors["command"][0] == -9.0:
            raise SensorError("broken")
        self.acts += 1
        return dict.fromkeys(self.joint_names, self.level + self.per_act * self.acts)

    def warm(self) -> None:
        self.warmed += 1


def fakes(control_dt: float | None = None, blend_time: float = 0.3, **policies: Any) -> MultiPolicyManager:
    manager = MultiPolicyManager(control_dt, blend_time)
    for name, policy in policies.items():
        manager.add_policy(name, policy)
    return manager


def still(time: float, tilt: float = 0.0, turn: float = 0.0, command: float = 0.0) -> dict[str, Any]:
    tilt = math.radians(tilt)
    gravity = (math.sin(tilt), 0.0, -math.cos(tilt))
    return {
        "time": time,
        "base_ang_vel": (turn, 0.0, 0.0),
        "projected_gravity": gravity,
        "command": (command, 0.0, 0.0),
    }


def levels(manager: MultiPolicyManager, count: int, start: int = 0, **sensors: float) -> list[float]:
    """The knee's targets of some steps."""
    return [manager.step(still(0.02 * k, **sensors))["knee"] for k in range(start, start + count)]


def slowly(
    files: dict[str, Path], rows: list[dict[str, Any]], switches: dict[int, tuple[str, float]]
) -> list[tuple[np.ndarray, ...]]:
    """What is sent in each step, by fresh runners: targets, stiffness and damping as arrays."""
    sent: list[tuple[np.ndarray, ...]] = []
    name, begun, steps = "walk", 0, 0
    runner = PolicyRunner(files[name])
    for k, row in enumerate(rows):
        if k in switches and switches[k][0] != name:
            name, blend_time = switches[k]
            runner, begun, steps = PolicyRunner(files[name]), k, round(blend_time / 0.02) if k else 0
            start = sent[-1] if k else ()
        if name == "walk" or (k - begun) % 2 == 0:
            targets = runner.act({sensor: row[sensor] for sensor in ("time", *runner.sensors)})
        goal = tuple(np.array([*values.values()]) for values in (targets, *runner.gains))
        weight = (k - begun + 1) / steps if k - begun + 1 < steps else 1.0
        if weight < 1.0:
            goal = tuple((1.0 - weight) * a + weight * b for a, b in zip(start, goal, strict=True))
        sent.append(goal)
    return sent


class TestSwitch:
    @settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.dictionaries(
            st.integers(0, 39),
            st.tuples(st.sampled_from(["walk", "hold"]), st.sampled_from([0.0, 0.1, 0.3])),
            max_size=5,
        ),
        st.integers(0, 10**6),
    )
    def test_is_what_fresh_runners_and_the_formula_give(self, files, manager, switches, seed: int) -> None:
        """Rates, histories, sensors, blends, gains: whenever it is switched, within a blend too."""
        manager.reset()
        manager.switch_policy("walk")
        rows = measured(manager.joint_names, 40, seed)
        active = "walk"
        for k, (row, sent) in enumerate(zip(rows, slowly(files, rows, switches), strict=True)):
            if k in switches:
                assert manager.switch_policy(*switches[k]) == (switches[k][0] != active)
                active = switches[k][0]
            targets = manager.step(row)
            assert tuple(targets) == manager.joint_names
            for found, expected in zip((targets, *manager.gains), sent, strict=True):
                np.testing.assert_allclose([*found.values()], expected, rtol=1e-12, atol=1e-12)
        assert manager.active == active

    @settings(deadline=None)
    @given(
        st.dictionaries(
            st.integers(1, 60), st.tuples(st.sampled_from("abc"), st.integers(1, 20)), max_size=12
        )
    )
    def test_never_makes_a_target_jump(self, switches: dict[int, tuple[str, int]]) -> None:
        """No step is longer than its blend's share of the way, whatever is switched when."""
        manager = fakes(a=Fake(-1.0), b=Fake(0.5), c=Fake(3.0))
        before, way, steps = manager.step(still(0.0))["knee"], 0.0, 1
        for k in range(1, 80):
            if k in switches:
                name, count = switches[k]
                if manager.switch_policy(name, 0.02 * count):
                    way, steps = abs(manager.policies[name].level - before), count
            target = manager.step(still(0.02 * k))["knee"]
            assert abs(target - before) <= way / steps + 1e-12
            stiffness, damping = (gains["hip"] for gains in manager.gains)
            assert stiffness == pytest.approx(100.0 + target) and damping == pytest.approx(10.0 - target)
            before = target
        assert before == manager.policies[manager.active].level

    def test_blends_by_the_formula(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0))
        levels(manager, 3)
        assert manager.switch_policy("b", 0.1)
        assert levels(manager, 7, 3) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
        manager.switch_policy("a")  # 0.3 s
        assert levels(manager, 16, 10) == pytest.approx([*(1.0 - k / 15 for k in range(1, 16)), 0.0])
        assert manager.history == [(0.04, "a", "b", "asked"), (0.18, "b", "a", "asked")]

    def test_goes_by_steps_not_by_a_clock_that_jumps(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0))
        manager.step(still(0.0))
        manager.switch_policy("b", 0.1)
        assert [manager.step(still(t))["knee"] for t in (0.02, 9.0)] == pytest.approx([0.2, 0.4])

    def test_a_runner_that_was_used_begins(self) -> None:
        used = Fake(per_act=1.0)
        used.act(still(0.0))
        manager = fakes(a=Fake(), b=used)
        manager.step(still(0.0))
        manager.switch_policy("b", 0.0)
        assert levels(manager, 1, 1) == [1.0]

    def test_to_the_active_policy_is_none(self) -> None:
        manager = fakes(a=Fake(per_act=1.0), b=Fake())
        levels(manager, 3)
        assert manager.switch_policy("a") is False
        assert levels(manager, 1, 3) == [4.0] and manager.history == []

    def test_before_the_first_step_is_where_it_begins(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0))
        assert manager.switch_policy("b") is True
        assert manager.active == "b" and manager.gains == manager.policies["b"].gains
        assert levels(manager, 2) == [1.0, 1.0] and manager.history == []
        manager.switch_policy("a")
        manager.reset()
        assert manager.active == "b" and manager.history == []
        assert levels(manager, 1) == [1.0]

    def test_what_was_returned_is_the_callers(self) -> None:
        manager = fakes(a=Fake(0.0, control_dt=0.04), b=Fake(1.0, control_dt=0.04), control_dt=0.02)
        manager.step(still(0.0))["knee"] = 99.0
        assert levels(manager, 1, 1) == [0.0]
        manager.switch_policy("b", 0.04)
        assert levels(manager, 1, 2) == [0.5]


class TestRates:
    def test_targets_are_held_between_a_policys_own_steps(self) -> None:
        """From when it was switched in, not on a grid of the manager's."""
        manager = fakes(
            fast=Fake(0.0, 0.02, per_act=1.0), slow=Fake(100.0, 0.06, per_act=1.0), control_dt=0.01
        )
        assert manager.control_dt == 0.01
        assert levels(manager, 5) == [1, 1, 2, 2, 3]
        manager.switch_policy("slow", 0.0)
        assert levels(manager, 14, 5) == [101] * 6 + [102] * 6 + [103] * 2
        manager.switch_policy("fast", 0.0)
        assert levels(manager, 3, 19) == [1, 1, 2]

    def test_a_transition_does_not_wait_for_them(self) -> None:
        manager = fakes(a=Fake(0.0, 0.08), b=Fake(1.0, 0.08, per_act=1.0), control_dt=0.02, blend_time=0.0)
        manager.add_transition("a", "b", "fallen")
        assert levels(manager, 3) == [0.0] * 3
        assert levels(manager, 5, 3, tilt=90.0) == [2.0] * 4 + [3.0]

    def test_a_held_target_is_blended_on(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0, 0.06))
        manager.step(still(0.0))
        manager.switch_policy("b", 0.08)
        assert levels(manager, 5, 1) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])

    def test_sensors_are_checked_while_targets_are_held(self, manager: MultiPolicyManager) -> None:
        manager.switch_policy("hold")
        rows = measured(manager.joint_names, 3)
        held = manager.step(rows[0])
        with pytest.raises(SensorError, match=r"base_ang_vel\[1\]=nan: not finite"):
            manager.step({**rows[1], "base_ang_vel": (0.0, math.nan, 0.0)})
        assert manager.step(rows[1]) == held != manager.step(rows[2])

    def test_the_fastest_policys_unless_given(self) -> None:
        assert fakes(a=Fake(control_dt=0.04), b=Fake(control_dt=0.01)).control_dt == 0.01
        moving = fakes(a=Fake(control_dt=0.04), b=Fake(control_dt=0.02))
        moving.step(still(0.0))
        moving.add_policy("late", Fake(control_dt=0.06))
        with pytest.raises(
            ValueError, match=r"policy 'fast': control_dt=0\.01 is no whole multiple of .*0\.02"
        ):
            moving.add_policy("fast", Fake(control_dt=0.01))
        assert list(moving.policies) == ["a", "b", "late"]


class TestTransitions:
    def test_after_a_time_that_is_not_interrupted(self) -> None:
        manager = fakes(walk=Fake(0.0), rise=Fake(1.0), blend_time=0.0)
        manager.add_transition("walk", "rise", "fallen", after=0.1)
        manager.add_transition("rise", "walk", "upright")
        assert levels(manager, 3, 0, tilt=70.0) == [0.0] * 3
        assert levels(manager, 1, 3) == [0.0]  # up again, for one step
        assert levels(manager, 8, 4, tilt=70.0) == [0.0] * 5 + [1.0] * 3
        assert levels(manager, 2, 12, tilt=15.0) == [1.0, 1.0]
        assert levels(manager, 2, 14, turn=1.5) == [1.0, 1.0]
        assert levels(manager, 2, 16) == [0.0, 0.0]
        assert manager.history == [
            (pytest.approx(0.18), "walk", "rise", "fallen"),
            (pytest.approx(0.32), "rise", "walk", "upright"),
        ]

    def test_the_time_is_the_robots_and_begins_anew_with_the_source(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0), blend_time=0.0)
        manager.add_transition("a", "b", "commanded", after=1.0)
        for time, active in ((0.0, "a"), (0.5, "a"), (1.0, "b")):
            manager.step(still(time, command=1.0))
            assert manager.active == active
        manager.switch_policy("a")
        for time, active in ((1.5, "a"), (2.4, "a"), (2.5, "b")):
            manager.step(still(time, command=1.0))
            assert manager.active == active

    def test_the_first_added_that_has_held_wins(self) -> None:
        def always(sensors: Any) -> bool:
            return True

        manager = fakes(a=Fake(0.0), b=Fake(1.0), c=Fake(2.0), blend_time=0.0)
        manager.add_transition("a", "b", always, after=0.03)
        manager.add_transition("*", "c", "fallen")
        manager.add_transition("c", "a", "idle")
        assert levels(manager, 1, 0) == [0.0]
        assert levels(manager, 1, 1, tilt=90.0, command=1.0) == [2.0]  # b's has not held for long enough
        assert levels(manager, 4, 2) == [0.0, 0.0, 0.0, 1.0]
        assert levels(manager, 2, 6, tilt=90.0, command=1.0) == [2.0, 2.0]
        assert [switch[1:] for switch in manager.history] == [
            ("a", "c", "fallen"),
            ("c", "a", "idle"),
            ("a", "b", "always"),
            ("b", "c", "fallen"),
        ]

    def test_blend_from_what_was_sent_and_at_once_in_the_first_step(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0), blend_time=0.08)
        manager.add_transition("a", "b", "fallen")
        manager.add_transition("b", "a", "upright")
        assert levels(manager, 2, 0, tilt=90.0) == [1.0, 1.0]
        assert levels(manager, 2, 2) == pytest.approx([0.75, 0.5])
        assert levels(manager, 2, 4, tilt=90.0) == pytest.approx([0.625, 0.75])
        manager.reset()
        assert manager.active == "a"

    def test_a_step_that_fails_moves_nobody(self) -> None:
        manager = fakes(a=Fake(0.0, per_act=1.0), b=Fake(10.0, per_act=1.0))
        manager.add_transition("a", "b", "fallen")
        levels(manager, 2)
        with pytest.raises(SensorError, match="broken"):
            manager.step(still(0.04, tilt=90.0, command=-9.0))
        assert manager.active == "a" and manager.history == []
        assert levels(manager, 1, 2) == [3.0]
        with pytest.raises(SensorError, match="stale"):
            manager.step(still(0.04, tilt=90.0))
        assert manager.active == "a"

    @pytest.mark.parametrize(
        ("name", "true", "false"),
        [
            ("fallen", {"tilt": 61.0}, {"tilt": 59.0}),
            ("fallen", {"tilt": 180.0}, {"turn": 9.0}),
            ("upright", {"tilt": 9.0, "turn": 0.9}, {"tilt": 11.0}),
            ("upright", {"command": 1.0}, {"turn": 1.1}),
            ("disturbed", {"tilt": 21.0}, {"tilt": 19.0, "turn": 2.4}),
            ("disturbed", {"turn": -2.6}, {"command": 1.0}),
            ("commanded", {"command": -0.06}, {"command": 0.04}),
            ("idle", {"command": 0.04}, {"command": 0.06}),
        ],
    )
    def test_conditions(self, name: str, true: dict[str, float], false: dict[str, float]) -> None:
        assert CONDITIONS[name](still(0.0, **true)) is True
        assert CONDITIONS[name](still(0.0, **false)) is False


class TestSensors:
    def test_are_those_of_all_in_one_order(self, manager: MultiPolicyManager) -> None:
        assert manager.sensors == (*VECTORS, "joint_pos", "joint_vel", "pose_command")
        assert manager.policies["walk"].sensors == (*VECTORS, "joint_pos", "joint_vel")
        assert "command" not in manager.policies["hold"].sensors

    def test_only_the_active_policys_have_to_be_there(self, manager: MultiPolicyManager) -> None:
        row, later, last = measured(manager.joint_names, 3)
        pose, last_pose = row.pop("pose_command"), last.pop("pose_command")
        manager.step(row)
        manager.switch_policy("hold")
        later["pose_command"] = pose
        del later["command"], later["joint_vel"]
        manager.step(later)
        with pytest.raises(SensorError, match="policy 'hold': sensors: 'pose_command' is missing"):
            manager.step(last)
        manager.step({**last, "pose_command": last_pose})

    def test_wrong_ones_are_refused(self, manager: MultiPolicyManager) -> None:
        (row,) = measured(manager.joint_names, 1)
        timeless = {name: value for name, value in row.items() if name != "time"}
        speedless = {name: value for name, value in row.items() if name != "joint_vel"}
        for wrong, message in (
            ({**speedless, "joint_velocity": row["joint_vel"]}, "unknown, did you mean 'joint_vel'"),
            ({**row, "foot_force": (0.0, 0.0, 0.0)}, "'foot_force' is unknown; expected base_ang_vel"),
            (timeless, "'time' is missing"),
            (speedless, "policy 'walk': sensors: 'joint_vel' is missing"),
            ({**row, "time": math.nan}, "time=nan: stale"),
            ({**row, "time": "now"}, "time='now': stale or no number"),
            ({**row, "command": (0.0, 0.0)}, r"command of shape \(2,\)"),
        ):
            with pytest.raises(SensorError, match=message):
                manager.step(wrong)
        manager.step(row)
        manager.switch_policy("hold")
        with pytest.raises(SensorError, match=r"time=5\.0: stale .*the last sensors were of 5\.0"):
            manager.step(row)  # the policy is new, the sensors are not

    def test_a_condition_without_its_sensor(self) -> None:
        manager = fakes(a=Fake(sensors=VECTORS))
        manager.add_policy("b", Fake())
        manager.add_transition("a", "b", lambda sensors: sensors["joint_pos"]["knee"] > 0.0)
        with pytest.raises(
            SensorError, match=r"transition to 'b': <lambda> cannot be told: KeyError\('joint_pos'"
        ):
            manager.step(still(0.0))


class TestGetAllActions:
    def test_is_what_each_would_give_and_moves_nobody(self, files, manager: MultiPolicyManager) -> None:
        alone = PolicyRunner(files["walk"])
        for k, row in enumerate(measured(manager.joint_names, 12)):
            if k % 3:  # one or two times, or not at all
                for _ in range(k % 3):
                    actions = manager.get_all_actions(row)
            fresh = PolicyRunner(files["hold"])
            own = [{name: row[name] for name in ("time", *runner.sensors)} for runner in (alone, fresh)]
            targets = manager.step(row)
            assert targets == alone.act(own[0])
            if k % 3:
                assert actions == {"walk": targets, "hold": fresh.act(own[1])}

    def test_a_switched_out_policy_begins(self, files, manager: MultiPolicyManager) -> None:
        rows = measured(manager.joint_names, 4)
        manager.step(rows[0])
        manager.switch_policy("hold")
        manager.step(rows[1])
        fresh = PolicyRunner(files["walk"])
        expected = fresh.act({name: rows[2][name] for name in ("time", *fresh.sensors)})
        assert manager.get_all_actions(rows[2])["walk"] == expected

    def test_names_the_policy_whose_sensor_is_missing(self, manager: MultiPolicyManager) -> None:
        (row,) = measured(manager.joint_names, 1)
        del row["pose_command"]
        with pytest.raises(SensorError, match="policy 'hold': sensors: 'pose_command' is missing"):
            manager.get_all_actions(row)
        manager.step(row)


class TestLikeAPolicyRunner:
    def test_has_what_a_loop_asks_for(self, files, manager: MultiPolicyManager) -> None:
        runner = PolicyRunner(files["walk"])
        assert MultiPolicyManager.act is MultiPolicyManager.step
        for name in ("joint_names", "control_dt", "contract", "gains", "backend"):
            assert getattr(manager, name) == getattr(runner, name), name
        stiffness, damping = runner.gains
        assert [*stiffness] == [*damping] == [*runner.joint_names]
        assert [*stiffness.values()] == runner.contract["stiffness"]
        rows = measured(manager.joint_names, 3)
        manager.step(rows[0])
        manager.switch_policy("hold", 0.0)
        manager.warm()
        manager.step(rows[1])
        assert manager.contract is manager.policies["hold"].contract
        assert manager.gains[1]["left_knee_joint"] == damping["left_knee_joint"] / 2

    def test_warm_changes_nothing(self, manager: MultiPolicyManager) -> None:
        rows = measured(manager.joint_names, 10)
        runs = []
        for warm in (False, True):
            manager.reset()
            runs.append([])
            for k, row in enumerate(rows):
                if warm:
                    manager.warm()
                if k == 3:
                    manager.switch_policy("hold")
                runs[-1].append(manager.step(row))
        assert runs[0] == runs[1]

    def test_needs_neither_torch_nor_mujoco(self, files: dict[str, Path]) -> None:
        code = """
import sys
sys.modules["torch"] = sys.modules["mujoco"] = sys.modules["gymnasium"] = sys.modules["onnx"] = None
from kouros import MultiPolicyManager
manager = MultiPolicyManager()
manager.add_policy("walk", sys.argv[1])
joints = dict.fromkeys(manager.joint_names, 0.0)
vectors = {"base_ang_vel": (0, 0, 0), "projected_gravity": (0, 0, -1), "command": (0, 0, 0)}
print(len(manager.step({"time": 0.0, **vectors, "joint_pos": joints, "joint_vel": joints})))
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(files["walk"])], capture_output=True, text=True, timeout=120
        )
        assert done.stdout == "29\n", done.stderr

    def test_a_robot_walks_on_through_switches(self, files: dict[str, Path]) -> None:
        """From one copy of the policy to the other every second, its gait clock at zero."""
        _, config, _ = load_policy("walk")
        env = make_policy_env(dataclasses.replace(config, num_envs=1, harness=0.0, **CALM), None)
        env.reset(seed=0)
        manager = MultiPolicyManager()
        for name in ("a", "b"):
            manager.add_policy(name, files["walk"])
        for k in range(250):
            env.set_command(torch.tensor([[0.3, 0.0, 0.0]]))
            sensors: dict[str, Any] = {"time": 0.02 * k}
            for name in manager.sensors:
                values = policy_sensors(env)[name][0].tolist()
                sensors[name] = (
                    dict(zip(manager.joint_names, values, strict=True)) if len(values) > 3 else values
                )
            if k % 50 == 49:
                assert manager.switch_policy("ab"[k // 50 % 2 == 0], 0.1)
            targets = torch.tensor([*manager.step(sensors).values()])
            *_, terminated, _, _ = env.step(((targets - env.action_offset) / env.action_scale).view(1, -1))
            assert not terminated.any(), f"fallen after {0.02 * k:.2f} s"
        assert len(manager.history) == 5
        assert env.simulation.qpos[0, :2].norm() > 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.switch_policy("wlak"), "policy='wlak': choose from walk, run; did you mean 'walk'"),
        (lambda m: m.switch_policy("run", -1.0), r"blend_time=-1\.0: must be finite and not negative, s"),
        (lambda m: m.add_policy("walk", Fake()), r"name='walk': taken; choose another than walk, run, \*"),
        (lambda m: m.add_policy("*", Fake()), r"name='\*': taken"),
        (lambda m: m.add_policy("x", m.policies["run"]), "policy 'x': the runner is 'run' already"),
        (lambda m: m.add_policy("x", Fake(robot="h1")), "policy 'x': robot='h1', that of 'walk' is 'g1'"),
        (lambda m: m.add_policy("x", Fake(control_mode="effort")), "control_mode='effort', that of 'walk'"),
        (
            lambda m: m.add_policy("x", Fake(joint_names=("knee", "hips"))),
            "policy 'x': joint_names: 'hip' is missing; 'hips' is unknown, did you mean 'hip'",
        ),
        (lambda m: m.add_policy("x", Fake(sensors=())), "policy 'x': a plain network"),
        (
            lambda m: m.add_policy("x", Fake(control_dt=0.03)),
            r"policy 'x': control_dt=0\.03 is no whole multiple of the manager's 0\.02; give Multi",
        ),
        (
            lambda m: m.add_policy("x", Fake(control_dt=0.015)),
            r"policy 'walk': control_dt=0\.02 is no whole multiple of the manager's 0\.015",
        ),
        (lambda m: m.add_transition("wakl", "run", "fallen"), "source='wakl': .*did you mean 'walk'"),
        (lambda m: m.add_transition("walk", "rum", "fallen"), "target='rum': .*did you mean 'run'"),
        (lambda m: m.add_transition("walk", "walk", "fallen"), "target='walk': is the source too"),
        (lambda m: m.add_transition("walk", "run", "falen"), "when='falen': .*did you mean 'fallen'"),
        (lambda m: m.add_transition("walk", "run", 3), "when=3: choose from fallen"),
        (lambda m: m.add_transition("walk", "run", "idle", math.nan), "after=nan: must be finite"),
        (lambda _: MultiPolicyManager(control_dt=0.0), r"control_dt=0\.0: must be greater than 0"),
        (lambda _: MultiPolicyManager(blend_time=math.inf), "blend_time=inf: must be finite"),
        (lambda _: MultiPolicyManager().step(still(0.0)), r"there is none; add_policy\(\) first"),
        (lambda _: fakes(control_dt=0.04, a=Fake(control_dt=0.02)), "control_dt=0.02 is no whole multiple"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    manager = fakes(walk=Fake(), run=Fake(1.0))
    with pytest.raises(ValueError, match=message):
        call(manager)
    assert list(manager.policies) == ["walk", "run"] and manager.control_dt == 0.02
    assert levels(manager, 1) == [0.0] and manager.history == []


def test_files_that_are_no_policies(files: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        MultiPolicyManager().add_policy("x", files["walk"].with_name("x.onnx"))
    with pytest.raises(ValueError, match="policy 'x': a plain network"):
        MultiPolicyManager().add_policy("x", plain_path(files["walk"]))
