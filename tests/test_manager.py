"""The manager of several policies against a dozen lines of Python, fresh runners, and a robot that walks."""

from __future__ import annotations

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
from kouros.deploy.simulator import AS_TRAINED, SimulatedRobot
from kouros.envs.contract import policy_contract, record_policy
from kouros.learning.networks import ActorNetwork

JOINTS = ("knee", "hip")
VECTORS = ("base_ang_vel", "projected_gravity", "command")


@pytest.fixture(scope="session")
def files(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``walk``, and ``hold``: untrained, at half the rate, softer; with a history and a pose, no command."""
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
    hold = tmp_path_factory.mktemp("hold") / "hold.onnx"
    OnnxExporter(actor, contract).export(hold, record_policy(actor.act, env.config, 20))
    return {"walk": exported, "hold": hold}


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
    """A policy whose targets are a level, how often it has acted since its reset, and a sway."""

    def __init__(
        self,
        level: float = 0.0,
        control_dt: float = 0.02,
        per_act: float = 0.0,
        sway: float = 0.0,
        **other: Any,
    ):
        self.level, self.control_dt, self.per_act, self.sway = level, control_dt, per_act, sway
        self.joint_names = other.get("joint_names", JOINTS)
        self.sensors = other.get("sensors", VECTORS)
        self.contract = {"robot": "g1", "control_mode": "position", **other}
        self.gains = (dict.fromkeys(JOINTS, 100.0 + level), dict.fromkeys(JOINTS, 10.0 - level))
        self.backend = "fake"
        self.reset()

    def reset(self) -> None:
        self.acts = 0

    def read(self, sensors: dict[str, Any]) -> None:
        assert set(sensors) == {"time", *self.sensors}
        if sensors["command"][0] == -9.0:
            raise SensorError("broken")

    def act(self, sensors: dict[str, Any]) -> dict[str, float]:
        self.read(sensors)
        self.acts += 1
        target = self.level + self.per_act * self.acts + self.sway * math.sin(self.acts)
        return dict.fromkeys(self.joint_names, target)


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


class Alone:
    """A policy file from its beginning, at its own rate; targets held where sensors are missing."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.runner, self.ticks, self.held = name, PolicyRunner(file), 0, False

    def own(self, row: dict[str, Any]) -> dict[str, Any]:
        return {sensor: row[sensor] for sensor in ("time", *self.runner.sensors) if sensor in row}

    def step(self, row: dict[str, Any]) -> np.ndarray:
        """Targets, stiffness and damping."""
        due = self.ticks % round(self.runner.control_dt / 0.02) == 0 and not self.held
        if due and len(self.own(row)) == 1 + len(self.runner.sensors):
            self.targets = self.runner.act(self.own(row))
        self.ticks += 1
        self.sent = np.array([[*values.values()] for values in (self.targets, *self.runner.gains)])
        return self.sent


SWITCHES = st.lists(
    st.tuples(st.sampled_from(["walk", "hold"]), st.sampled_from([0.0, 0.06, 0.3])), max_size=3
)


class TestSwitch:
    @settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.dictionaries(st.integers(0, 39), SWITCHES, max_size=6),
        st.sets(st.integers(0, 39), max_size=10),
        st.integers(0, 10**6),
    )
    def test_is_what_fresh_runners_and_the_formula_give(
        self, files, manager, switches, bare: set[int], seed: int
    ) -> None:
        """Rates, histories, sensors, blends, gains: whenever and however often it is switched."""
        manager.reset()
        manager.switch_policy("walk")
        others = {name: PolicyRunner(file) for name, file in files.items()}
        new, old, owed, sent, steps = Alone("walk", files["walk"]), None, 0.0, np.zeros(()), 0
        for k, row in enumerate(measured(manager.joint_names, 40, seed)):
            for name, blend_time in switches.get(k, []):
                assert manager.switch_policy(name, blend_time) == (name != new.name)
                if name != new.name:
                    if new.ticks:
                        old, owed = new, sent - new.sent
                    new, steps = Alone(name, files[name]), round(blend_time / 0.02) if k else 0
                if old and old.name == new.name:
                    old.held = True
            if k in bare:  # of all sensors the active policy's alone
                row = new.own(row)
            else:
                acting = {policy.name: policy.runner for policy in (old, new) if policy and not policy.held}
                assert manager.get_all_actions(row) == {
                    name: runner.peek({sensor: row[sensor] for sensor in ("time", *runner.sensors)})
                    for name, runner in (others | acting).items()
                }
            targets, sent = manager.step(row), new.step(row)
            if new.ticks < steps:
                weight = new.ticks / steps
                sent = (1.0 - weight) * (old.step(row) + owed) + weight * sent
            else:
                old = None
            found = [[*values.values()] for values in (targets, *manager.gains)]
            np.testing.assert_allclose(found, sent, rtol=1e-12, atol=1e-12)
            assert tuple(targets) == manager.joint_names and manager.active == new.name

    @settings(deadline=None)
    @given(
        st.dictionaries(st.integers(1, 60), st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20))))
    )
    def test_never_makes_a_target_jump(self, switches: dict[int, list[tuple[str, int]]]) -> None:
        """No step is longer than a policy's own and the blend's share of the way."""
        manager = fakes(
            **{name: Fake(level, sway=0.1) for name, level in (("a", -1.0), ("b", 0.5), ("c", 3.0))}
        )
        before, way, steps = manager.step(still(0.0))["knee"], 0.0, 1
        for k in range(1, 80):
            for name, count in switches.get(k, []):
                if manager.switch_policy(name, 0.02 * count):
                    way, steps = abs(manager.policies[name].level - before) + 0.3, count
            target = manager.step(still(0.02 * k))["knee"]
            assert abs(target - before) <= 0.1 + way / steps + 1e-12
            before = target
        active = manager.policies[manager.active]
        assert before == active.level + 0.1 * math.sin(active.acts) and manager.gains == active.gains

    def test_blends_by_the_formula(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0))
        levels(manager, 3)
        assert manager.switch_policy("b", 0.1)
        assert levels(manager, 7, 3) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
        manager.switch_policy("a")  # 0.3 s
        assert levels(manager, 16, 10) == pytest.approx([*(1.0 - k / 15 for k in range(1, 16)), 0.0])
        assert manager.history == [(0.04, "a", "b", "asked"), (0.18, "b", "a", "asked")]

    def test_who_leaves_keeps_its_rate_and_who_has_left_begins_anew(self) -> None:
        manager = fakes(a=Fake(0.0, control_dt=0.04), b=Fake(1.0), c=Fake(2.0))
        acts = []

        def step(k: int) -> None:
            manager.step(still(0.02 * k))
            acts.append(tuple(policy.acts for policy in manager.policies.values()))

        for k in range(3):
            step(k)
        manager.switch_policy("b", 0.12)
        for k in range(3, 6):
            step(k)
        manager.switch_policy("c", 0.06)  # in the middle of a blend: a is out of it
        for k in range(6, 10):
            step(k)
        assert acts == [
            *[(1, 0, 0), (1, 0, 0), (2, 0, 0)],
            *[(2, 1, 0), (3, 2, 0), (3, 3, 0)],
            *[(0, 4, 1), (0, 5, 2), (0, 0, 3), (0, 0, 4)],
        ]

    def test_goes_by_steps_not_by_a_clock_that_jumps(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0))
        manager.step(still(0.0))
        manager.switch_policy("b", 0.1)
        assert [manager.step(still(t))["knee"] for t in (0.02, 9.0)] == pytest.approx([0.2, 0.4])

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

    def test_of_whoever_is_active_its_clock_goes_on_over_a_switch(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0), c=Fake(2.0), blend_time=0.0)
        manager.add_transition("a", "b", "commanded", after=0.04)
        manager.add_transition("*", "c", "fallen", after=0.1)
        assert levels(manager, 2, 0, tilt=90.0, command=1.0) == [0.0, 0.0]
        assert levels(manager, 2, 2, tilt=90.0, command=1.0) == [1.0, 1.0]
        manager.switch_policy("a")
        assert levels(manager, 3, 4, tilt=90.0) == [0.0, 2.0, 2.0]

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

    def test_blend_as_any_other_and_at_once_in_the_first_step(self) -> None:
        manager = fakes(a=Fake(0.0), b=Fake(1.0), blend_time=0.08)
        manager.add_transition("a", "b", "fallen")
        manager.add_transition("b", "a", "upright")
        assert levels(manager, 2, 0, tilt=90.0) == [1.0, 1.0]
        assert levels(manager, 2, 2) == pytest.approx([0.75, 0.5])
        assert levels(manager, 2, 4, tilt=90.0) == pytest.approx([0.625, 0.75])
        assert [switch[0] for switch in manager.history] == [0.0, 0.04, 0.08]
        manager.reset()
        assert manager.active == "a" and manager.history == []

    def test_a_step_that_fails_moves_nobody(self) -> None:
        """Not who leaves either, if it is to come back."""
        runs = []
        for fails in (False, True):
            manager = fakes(a=Fake(0.0, per_act=1.0), b=Fake(10.0, per_act=1.0))
            manager.add_transition("b", "a", "fallen")
            levels(manager, 2)
            manager.switch_policy("b")
            runs.append(levels(manager, 3, 2))
            for sensors in (still(0.1, tilt=90.0, command=-9.0), still(0.08, tilt=90.0)) if fails else ():
                with pytest.raises(SensorError, match=r"broken|stale"):
                    manager.step(sensors)
            runs[-1] += levels(manager, 20, 5)
            assert manager.active == "b" and len(manager.history) == 1
        assert runs[0] == runs[1]

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

    def test_a_robot_walks_on_through_switches(self, exported: Path) -> None:
        """From one copy of the policy to the other every two seconds, its gait clock at zero."""
        manager = fakes(a=PolicyRunner(exported), b=PolicyRunner(exported))
        robot = SimulatedRobot(world=AS_TRAINED)
        robot.reset(robot.data.qpos.copy())
        for k in range(250):
            if k % 100 == 99:
                assert manager.switch_policy("ab"[k // 100 % 2 == 0])
            robot.write(manager.step({**robot.read(), "command": (0.3, 0.0, 0.0)}), manager.gains)
            robot.advance(0.02)
            assert robot.tilt < math.radians(30.0), f"after {0.02 * k:.2f} s"
        assert len(manager.history) == 2 and robot.data.qpos[0] > 0.8


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
