"""A reward term of your own: one function, one line of configuration.

python examples/own_reward.py        trains for a minute's worth of steps and prints how the term moves
"""

from __future__ import annotations

import sys

import torch

from kouros import HumanoidBaseEnv, HumanoidEnvConfig, PPOAgent, reward


@reward
def hands_low(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared height of both palms above the hips, m^2."""
    palms = torch.stack([env.simulation.sensor(f"{hand}_position") for hand in env.robot.hands], 1)
    above = palms[:, :, 2].float() - env.base_pos_w[:, 2:3]
    return above.clamp(min=0.0).square().sum(-1)


def main(iterations: int = 30) -> None:
    config = HumanoidEnvConfig()
    config.rewards["hands_low"] = -5.0  # the line
    agent = PPOAgent(HumanoidBaseEnv(config))

    def show(log: dict[str, float]) -> None:
        print(f"iteration {agent.iteration}: hands_low {log['reward/hands_low']:.4f} per second")

    agent.train(iterations, show)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
