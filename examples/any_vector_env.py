"""PPOAgent on somebody else's environment: Gymnasium's pendulum.

python examples/any_vector_env.py        swings it up in about three minutes
"""

from __future__ import annotations

import sys

import gymnasium

from kouros import PPOAgent, PPOConfig


def main(iterations: int = 120) -> None:
    env = gymnasium.make_vec("Pendulum-v1", num_envs=16, vectorization_mode="sync")
    config = PPOConfig(
        horizon=128,
        minibatches=32,
        epochs=10,
        learning_rate=1e-3,
        gamma=0.95,
        actor_hidden=(64, 64),
        critic_hidden=(64, 64),
        value_clip=False,
    )
    agent = PPOAgent(env, config)

    def show(log: dict[str, float]) -> None:
        if agent.iteration % 10 == 0:
            print(f"iteration {agent.iteration}: reward a step {log['reward/mean']:.2f}")

    agent.train(iterations, show)
    print(f"return of an episode under the mean action: {agent.evaluate(16)['return']:.0f}")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
