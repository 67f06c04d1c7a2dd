"""Isaac Sim's ArticulationView calls over thousands of MuJoCo worlds: drop robots, hold a pose.

python examples/isaac_style.py
"""

from __future__ import annotations

import sys

import torch

from kouros import HumanoidBaseEnv, HumanoidEnvConfig


def main(steps: int = 100) -> None:
    env = HumanoidBaseEnv(HumanoidEnvConfig(num_envs=64, collisions="full"))
    robots = env.articulation
    print(robots.num_dof, "joints,", robots.num_bodies, "bodies,", robots.count, "worlds")

    # Every second robot is lifted by half a metre and made a tenth heavier.
    lifted = torch.arange(0, 64, 2)
    positions, _ = robots.get_world_poses(lifted)
    robots.set_world_poses(positions + torch.tensor([0.0, 0.0, 0.5]), env_ids=lifted)
    robots.set_body_masses(1.1 * robots.get_body_masses(lifted), lifted)
    robots.set_joint_position_targets(torch.tensor(env.robot.default_joint_pos))

    for step in range(steps):
        env.simulation.step(4)
        if step % 25 == 24:
            height = robots.get_world_poses()[0][:, 2]
            lifted_height, others = height[::2].mean(), height[1::2].mean()
            print(f"{(step + 1) * 0.02:.1f} s: lifted {lifted_height:.2f} m, others {others:.2f} m")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
