"""Kouros: from nothing to a humanoid robot that walks.

The public names, each imported on its first use so that ``import kouros`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Of what a policy says of itself, in checkpoints and policy files; another one is refused.
CONTRACT_VERSION = 2

_HOME = {
    "HumanoidEnvConfig": "kouros.envs.config",
    "CurriculumConfig": "kouros.envs.config",
    "CurriculumManager": "kouros.envs.curriculum",
    "CurriculumStage": "kouros.envs.curriculum",
    "HumanoidBaseEnv": "kouros.envs.humanoid",
    "observation": "kouros.envs.observations",
    "reward": "kouros.envs.rewards",
    "ObservationWrapper": "kouros.envs.wrappers",
    "NormalizeObservation": "kouros.envs.wrappers",
    "HistoryObservation": "kouros.envs.wrappers",
    "KinematicObservation": "kouros.envs.wrappers",
    "make_env": "kouros.envs.wrappers",
    "evaluate_walk": "kouros.envs.evaluation",
    "Robot": "kouros.robots",
    "get_robot": "kouros.robots",
    "Simulation": "kouros.physics.simulation",
    "make_simulation": "kouros.physics.simulation",
    "ArticulationView": "kouros.physics.articulation",
    "PPOConfig": "kouros.learning.config",
    "PPOAgent": "kouros.learning.ppo",
    "ActorNetwork": "kouros.learning.networks",
    "CriticNetwork": "kouros.learning.networks",
    "load_policy": "kouros.learning.run",
    "OnnxExporter": "kouros.deploy.export",
    "PolicyRunner": "kouros.deploy.runner",
    "MultiPolicyManager": "kouros.deploy.manager",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from kouros.deploy.export import OnnxExporter as OnnxExporter
    from kouros.deploy.manager import MultiPolicyManager as MultiPolicyManager
    from kouros.deploy.runner import PolicyRunner as PolicyRunner
    from kouros.envs.config import CurriculumConfig as CurriculumConfig
    from kouros.envs.config import HumanoidEnvConfig as HumanoidEnvConfig
    from kouros.envs.curriculum import CurriculumManager as CurriculumManager
    from kouros.envs.curriculum import CurriculumStage as CurriculumStage
    from kouros.envs.evaluation import evaluate_walk as evaluate_walk
    from kouros.envs.humanoid import HumanoidBaseEnv as HumanoidBaseEnv
    from kouros.envs.observations import observation as observation
    from kouros.envs.rewards import reward as reward
    from kouros.envs.wrappers import HistoryObservation as HistoryObservation
    from kouros.envs.wrappers import KinematicObservation as KinematicObservation
    from kouros.envs.wrappers import NormalizeObservation as NormalizeObservation
    from kouros.envs.wrappers import ObservationWrapper as ObservationWrapper
    from kouros.envs.wrappers import make_env as make_env
    from kouros.learning.config import PPOConfig as PPOConfig
    from kouros.learning.networks import ActorNetwork as ActorNetwork
    from kouros.learning.networks import CriticNetwork as CriticNetwork
    from kouros.learning.ppo import PPOAgent as PPOAgent
    from kouros.learning.run import load_policy as load_policy
    from kouros.physics.articulation import ArticulationView as ArticulationView
    from kouros.physics.simulation import Simulation as Simulation
    from kouros.physics.simulation import make_simulation as make_simulation
    from kouros.robots import Robot as Robot
    from kouros.robots import get_robot as get_robot


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kouros' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *_HOME))
