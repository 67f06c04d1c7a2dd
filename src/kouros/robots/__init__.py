"""Robots: what each one is, by name."""

from __future__ import annotations

from kouros.checks import check_choice
from kouros.robots.g1 import g1
from kouros.robots.robot import Robot

ROBOTS = {"g1": g1}


def get_robot(name: str) -> Robot:
    """The robot of that name.

    Raises:
      ValueError: no such robot; the message lists those there are.
    """
    check_choice("robot", name, ROBOTS)
    return ROBOTS[name]()
