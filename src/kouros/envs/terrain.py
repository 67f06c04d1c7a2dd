"""Uneven ground: a field of square tiles by level of difficulty and type, made of boxes and height fields.

The shapes go into the model, so that both engines step on the same ground. Beside them there are two
rasters: ``height``, what a vertical ray from above hits, and ``support``, the same with the holes between
stones and beside gaps filled up: the surface that base and foot heights count from.

Levels, tiles and the rule of promotion follow Rudin et al. 2022 (arXiv 2109.11978).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import torch

from kouros.checks import check_choice
from kouros.envs.config import TerrainConfig

# Sides of a cell of the height fields and of the rasters, m.
CELL = 0.1
RASTER = 0.05
# How far the bottom of the holes lies below the lowest surface, m: a robot that steps in has fallen.
PIT = 1.0
# Depth of a ring between two gaps, m.
RING = 1.0
# Largest distance of a first position from the tile's centre along x and y, and the half side of the
# square around it whose highest point the feet start on, m.
SPAWN_NOISE = 0.3
SPAWN_REACH = 0.3
# Beyond these the engines get slow, and single precision coarse.
MAX_SHAPES = 3000
MAX_SIDE = 200.0

# x0, x1, y0, y1, bottom, top; m, the tile's centre at (0, 0), its edge at height 0.
Box = tuple[float, float, float, float, float, float]
FLOOR = -math.inf  # a bottom: down to the bottom of the holes

# A function of the config, the difficulty and a random generator gives a tile's boxes, or its heights (m)
# at the corners of the cells, rows along y, columns along x.
Tile = Callable[[TerrainConfig, float, np.random.Generator], list[Box] | np.ndarray]
TILES: dict[str, Tile] = {}


def tile(function: Tile) -> Tile:
    """Register a function as the tile type of its own name."""
    TILES[function.__name__] = function
    return function


def _between(bounds: tuple[float, float], difficulty: float) -> float:
    return bounds[0] + difficulty * (bounds[1] - bounds[0])


def _square(half: float, top: float, bottom: float = FLOOR) -> Box:
    return (-half, half, -half, half, bottom, top)


def _ring(inner: float | np.ndarray, outer: float | np.ndarray, top: float) -> list[Box]:
    """Four boxes between two rectangles, given by their half sides."""
    (a, b), (x, y) = np.broadcast_to(inner, 2), np.broadcast_to(outer, 2)
    sides = [(-x, x, b, y), (-x, x, -y, -b), (a, x, -b, b), (-x, -a, -b, b)]
    return [(*side, FLOOR, top) for side in sides]


def _from_edge(config: TerrainConfig) -> np.ndarray:
    """Distance of the cells' corners from the tile's edge, m."""
    x = np.linspace(-0.5, 0.5, round(config.tile_size / CELL) + 1) * config.tile_size
    return 0.5 * config.tile_size - np.maximum(abs(x), abs(x[:, None]))


def _slope(config: TerrainConfig, difficulty: float) -> np.ndarray:
    run = np.minimum(_from_edge(config), 0.5 * (config.tile_size - config.platform))
    return math.tan(_between(config.slope, difficulty)) * run


def _steps(config: TerrainConfig) -> int:
    return int((config.tile_size - config.platform) / (2.0 * config.stair_tread) + 1e-6)


@tile
def flat(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> list[Box]:
    """A plane."""
    return [_square(0.5 * config.tile_size, 0.0)]


@tile
def rough(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> np.ndarray:
    """Heights between -roughness and +roughness, drawn every second cell, straight in between."""
    edge = _from_edge(config)
    n = len(edge) // 2 + 2
    drawn = rng.uniform(-1.0, 1.0, (n, n))
    along = [np.interp(np.arange(len(edge)) / 2.0, np.arange(n), row) for row in drawn]
    noise = [np.interp(np.arange(len(edge)) / 2.0, np.arange(n), column) for column in np.transpose(along)]
    # Down to 0 at the edge, where the next tile begins.
    return _between(config.roughness, difficulty) * np.transpose(noise) * np.clip(2.0 * edge, 0.0, 1.0)


@tile
def slope_up(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> np.ndarray:
    """A pit with sloping sides: up from the middle."""
    return -_slope(config, difficulty)


@tile
def slope_down(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> np.ndarray:
    """A pyramid without its tip: down from the middle."""
    return _slope(config, difficulty)


@tile
def stairs_up(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> list[Box]:
    """A pit with stairs on all sides: up from the middle."""
    n, half, riser = _steps(config), 0.5 * config.tile_size, _between(config.stair_riser, difficulty)
    tread = config.stair_tread
    boxes = [_square(half - n * tread, -n * riser)]
    for k in range(n):
        boxes += _ring(half - (k + 1) * tread, half - k * tread, -k * riser)
    return boxes


@tile
def stairs_down(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> list[Box]:
    """A pyramid of steps: down from the middle."""
    half, riser = 0.5 * config.tile_size, _between(config.stair_riser, difficulty)
    layers = range(1, _steps(config) + 1)
    # Each layer begins a little inside the one below: a foot meets the shapes it stands on, not all.
    return [_square(half, 0.0)] + [
        _square(half - k * config.stair_tread, k * riser, (k - 1) * riser - 0.05) for k in layers
    ]


@tile
def stepping_stones(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> list[Box]:
    """Square stones above a hole, each shifted by up to a quarter of the gap along x and y."""
    gap = _between(config.stone_gap, difficulty)
    count = max(1, round(config.tile_size / (_between(config.stone_size, difficulty) + gap)))
    pitch = config.tile_size / count
    half, centres = 0.5 * (pitch - gap), (np.arange(count) + 0.5) * pitch - 0.5 * config.tile_size
    boxes = [_square(0.5 * config.platform, 0.0)]
    for x in centres:
        for y in centres:
            dx, dy = (float(d) for d in rng.uniform(-0.25, 0.25, 2) * gap)
            if max(abs(x), abs(y)) + half > 0.5 * config.platform:
                boxes.append((x + dx - half, x + dx + half, y + dy - half, y + dy + half, FLOOR, 0.0))
    return boxes


@tile
def obstacles(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> list[Box]:
    """Boxes of half to the full obstacle_height, 0.4 to 1.5 m wide and long, one every 3 m^2 or so."""
    tall, half = _between(config.obstacle_height, difficulty), 0.5 * config.tile_size
    boxes = [_square(half, 0.0)]
    for _ in range(int(config.tile_size**2 / 3.0)):
        dx, dy = rng.uniform(0.2, np.minimum(0.75, 0.25 * half), 2)
        x, y = rng.uniform(-half + dx, half - dx), rng.uniform(-half + dy, half - dy)
        top = tall * rng.uniform(0.5, 1.0)
        if abs(x) - dx > 0.5 * config.platform or abs(y) - dy > 0.5 * config.platform:
            boxes.append((x - dx, x + dx, y - dy, y + dy, -0.05, top))
    return boxes


@tile
def gaps(config: TerrainConfig, difficulty: float, rng: np.random.Generator) -> list[Box]:
    """Gaps to step over around the middle, a ring of 1 m between one and the next."""
    gap, half = _between(config.gap_width, difficulty), 0.5 * config.tile_size
    boxes, inner = [_square(0.5 * config.platform, 0.0)], 0.5 * config.platform + gap
    while inner < half:
        outer = inner + RING
        if outer + gap + 0.5 * RING > half:
            outer = half
        boxes += _ring(inner, outer, 0.0)
        inner = outer + gap
    return boxes


@dataclasses.dataclass
class Terrain:
    """A field of tiles, levels along x and types along y, its centre at (0, 0).

    Attributes:
      boxes: ``(n, 6)``: x0, x1, y0, y1, bottom, top, m, world frame.
      fields: centre ``(x, y)`` and heights of each height field, m.
      floor: height of the bottom of the holes, m.
      centres: of the tiles, ``(levels, types, 2)``, m.
      half: half the field's extent along x and y, border included, ``(2,)``, m.
      height, support: rasters ``(nx, ny)`` of :data:`RASTER`, see the module, m.
    """

    boxes: np.ndarray
    fields: list[tuple[np.ndarray, np.ndarray]]
    floor: float
    centres: np.ndarray
    half: np.ndarray
    height: np.ndarray
    support: np.ndarray


def make_terrain(config: TerrainConfig) -> Terrain:
    """Build the field of a config with at least one type: the same config gives the same field.

    Raises:
      ValueError: an unknown type, or a field larger than the engines take.
    """
    for name in config.types:
        check_choice("terrain.types", name, TILES)
    shape, size = (config.levels, len(config.types)), config.tile_size
    half = 0.5 * size * np.array(shape) + config.border
    if 2.0 * half.max() > MAX_SIDE:
        raise ValueError(
            f"terrain: {shape[0]} levels x {shape[1]} types of {size:g} m and the border make a field of "
            f"{2 * half[0]:g} m x {2 * half[1]:g} m, and a side may be {MAX_SIDE:g} m: "
            "take fewer or smaller tiles"
        )
    centres = (np.stack(list(np.indices(shape)), axis=-1) + 0.5) * size + config.border - half
    boxes, fields = _ring(half - config.border, half, 0.0), []
    for level, difficulty in enumerate(np.linspace(*config.difficulty, config.levels)):
        for column, name in enumerate(config.types):
            rng = np.random.default_rng([config.seed, level, column])
            made, (x, y) = TILES[name](config, float(difficulty), rng), centres[level, column]
            if isinstance(made, list):
                boxes += [(a + x, b + x, c + y, d + y, *heights) for a, b, c, d, *heights in made]
            else:
                fields.append((centres[level, column], made))
    if len(boxes) + len(fields) > MAX_SHAPES:
        raise ValueError(
            f"terrain: {shape[0]} levels x {shape[1]} types make {len(boxes) + len(fields)} shapes, and "
            f"{MAX_SHAPES} is the limit: take fewer levels or types, or larger stones and treads"
        )
    table = np.array(boxes)
    floor = float(min(table[:, 5].min(), *(heights.min() for _, heights in fields), 0.0)) - PIT
    table[:, 4] = np.maximum(table[:, 4], floor)
    height = np.full(np.round(2.0 * half / RASTER).astype(int), -np.inf, np.float32)

    def cells(low: float, high: float, axis: int) -> slice:
        """Cells whose middle lies between the two."""
        first, end = np.ceil((np.array([low, high]) + half[axis]) / RASTER - 0.5 - 1e-6).astype(int)
        return slice(first, end)

    for x0, x1, y0, y1, _, top in table:
        place = cells(x0, x1, 0), cells(y0, y1, 1)
        height[place] = np.maximum(height[place], top)
    for (x, y), heights in fields:
        place = cells(x - size / 2, x + size / 2, 0), cells(y - size / 2, y + size / 2, 1)
        height[place] = _at_raster(heights).T
    hole = np.isinf(height)
    return Terrain(
        table, fields, floor, centres, half, np.where(hole, floor, height), np.where(hole, 0.0, height)
    )


def _at_raster(heights: np.ndarray) -> np.ndarray:
    """A height field at the middles of the raster's cells, four in each of its own.

    MuJoCo cuts a cell into two triangles along the diagonal from (low x, low y) to (high x, high y).
    """
    ll, lh, hl, hh = heights[:-1, :-1], heights[1:, :-1], heights[:-1, 1:], heights[1:, 1:]
    n = len(heights) - 1
    fine = np.empty((2 * n, 2 * n))
    fine[::2, ::2], fine[1::2, 1::2] = 0.75 * ll + 0.25 * hh, 0.25 * ll + 0.75 * hh
    fine[::2, 1::2], fine[1::2, ::2] = (ll + 2.0 * hl + hh) / 4.0, (ll + 2.0 * lh + hh) / 4.0
    return fine


def add_to(spec: mujoco.MjSpec, terrain: Terrain, **ground: Any) -> None:
    """Add the terrain's shapes to a model's world body, named ``terrain_0``, ``terrain_1``...

    Args:
      spec: of the model.
      terrain: to add.
      ground: what every shape has: material, collision bits, friction...
    """
    count = itertools.count()

    def add(kind: mujoco.mjtGeom, **shape: Any) -> None:
        spec.worldbody.add_geom(name=f"terrain_{next(count)}", type=kind, **shape, **ground)

    for x0, x1, y0, y1, bottom, top in terrain.boxes:
        add(
            mujoco.mjtGeom.mjGEOM_BOX,
            pos=[(x0 + x1) / 2, (y0 + y1) / 2, (bottom + top) / 2],
            size=[(x1 - x0) / 2, (y1 - y0) / 2, (top - bottom) / 2],
        )
    for i, ((x, y), heights) in enumerate(terrain.fields):
        low, half = float(heights.min()), 0.5 * CELL * (len(heights) - 1)
        spec.add_hfield(
            name=f"terrain_{i}",
            size=[half, half, max(float(np.ptp(heights)), 1e-3), low - terrain.floor],
            nrow=len(heights),
            ncol=len(heights),
            userdata=heights.ravel(),
        )
        add(mujoco.mjtGeom.mjGEOM_HFIELD, hfieldname=f"terrain_{i}", pos=[x, y, low])


class Ground:
    """A terrain as tensors on a device; every lookup is a gather of fixed shape.

    Attributes:
      centres: of the tiles, ``(levels, types, 2)``, m.
      edge: ``(2,)``, distance from the field's middle along x and y at which it ends, m.
    """

    def __init__(self, terrain: Terrain, device: torch.device) -> None:
        def constant(values: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=device)

        self.centres, self.edge = constant(terrain.centres), constant(terrain.half)
        self._rows, self._columns = terrain.height.shape
        self._height, self._support = constant(terrain.height).flatten(), constant(terrain.support).flatten()
        steps = np.linspace(-SPAWN_REACH, SPAWN_REACH, 7)
        self._around = constant(np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2))

    def height_at(self, xy: torch.Tensor) -> torch.Tensor:
        """Height of what a vertical ray from above hits, m, ``(...)`` of points ``(..., 2)``, world frame."""
        return self._height[self._cell(xy)]

    def support_at(self, xy: torch.Tensor) -> torch.Tensor:
        """The same with holes filled up."""
        return self._support[self._cell(xy)]

    def highest_around(self, xy: torch.Tensor) -> torch.Tensor:
        """The highest support within reach of the feet of a robot that stands there, m."""
        return self.support_at(xy.unsqueeze(-2) + self._around).amax(-1)

    def _cell(self, xy: torch.Tensor) -> torch.Tensor:
        index = ((xy + self.edge) * (1.0 / RASTER)).long()
        row = index[..., 0].clamp(0, self._rows - 1)
        return row * self._columns + index[..., 1].clamp(0, self._columns - 1)


class TerrainLevels:
    """On which tile each world's episodes begin, in tensors that stay where they are.

    Worlds are shared evenly among the types. With ``config.curriculum`` each world has a level of its own,
    see :meth:`change`; without it, a level is drawn for every episode.

    Attributes:
      type: ``(num_envs,)`` int, index of the world's type.
      level: ``(num_envs,)`` int, row of the field.
      highest: scalar, the highest level that worlds are given; write it in place.
      spawn_xy: ``(num_envs, 2)``, where the base was at the reset, m, world frame.
      asked, followed: ``(num_envs,)``, how far the commands of the episode go so far, and how far the robot
        went their way, m.
      metric_names: of :meth:`metrics`; none on a flat plane.

    Args:
      config: of the terrain.
      num_envs: number of worlds.
      generator: of the draws; every world draws, masked or not.
    """

    def __init__(self, config: TerrainConfig, num_envs: int, generator: torch.Generator) -> None:
        self.config, self._generator, device = config, generator, generator.device
        self.type = torch.arange(num_envs, device=device) % max(1, len(config.types))
        self.level = torch.zeros_like(self.type)
        self.highest = torch.tensor(float(config.levels - 1), device=device)
        self.spawn_xy = torch.zeros(num_envs, 2, device=device)
        self.asked, self.followed = (torch.zeros(num_envs, device=device) for _ in range(2))
        names = [config.types[i] for i in self.type.tolist()] if config.types else []
        kinds = list(dict.fromkeys(names))
        self.metric_names = ("task/terrain_level", *(f"task/level_{kind}" for kind in kinds)) if kinds else ()
        # A mean over all worlds is to be the mean over the worlds of a type.
        shares = [[(x == kind) * num_envs / names.count(kind) for x in names] for kind in kinds]
        shares = [[1.0] * num_envs, *shares][: len(self.metric_names)]
        self._shares = torch.tensor(shares, device=device).view(len(shares), num_envs)

    def metrics(self) -> torch.Tensor:
        """Levels, of all and by type, ``(len(metric_names), num_envs)``: rows whose means are the means."""
        return self.level * self._shares

    def begin(self, mask: torch.Tensor, ground: Ground) -> torch.Tensor:
        """Where the worlds of the mask begin their episodes, on the ground, ``(num_envs, 3)``, m."""
        if not self.config.curriculum:
            self.level.copy_(torch.where(mask, self._any(), self.level))
        xy = ground.centres[self.level, self.type] + SPAWN_NOISE * (2.0 * self._uniform(2) - 1.0)
        self.spawn_xy.copy_(torch.where(mask.unsqueeze(-1), xy, self.spawn_xy))
        for way in (self.asked, self.followed):
            way.masked_fill_(mask, 0.0)
        return torch.cat((xy, ground.highest_around(xy).unsqueeze(-1)), dim=-1)

    def follow(self, velocity: torch.Tensor, command: torch.Tensor, dt: float) -> None:
        """Take in a step of ``dt`` seconds: velocities and commands (m/s, base frame), ``(num_envs, 2)``."""
        speed = command.norm(dim=-1)
        along = (velocity * command).sum(-1) / speed.clamp(min=1e-6)
        self.asked.add_(speed, alpha=dt)
        self.followed.add_(along, alpha=dt)

    def change(self, done: torch.Tensor, xy: torch.Tensor, left: torch.Tensor) -> None:
        """Promotion by distance, as in Rudin et al. 2022 (arXiv 2109.11978).

        Up a level where the robot ends more than half a tile from where it began; down where it went less
        than half of the way that its commands asked for, the rest of an episode cut short by a fall
        included. Whoever has solved the highest level gets any.

        Args:
          done: bool ``(num_envs,)``, worlds whose episode ends.
          xy: ``(num_envs, 2)``, where, m, world frame.
          left: ``(num_envs,)``, the way that was still to go, m.
        """
        up = (xy - self.spawn_xy).norm(dim=-1) > 0.5 * self.config.tile_size
        down = (self.followed < 0.5 * (self.asked + left)) & ~up
        level = self.level + up.long() - down.long()
        level = torch.where(level > self.highest, self._any(), level.clamp(min=0))
        self.level.copy_(torch.where(done, level, self.level))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What one step leaves for the next."""
        return {n: getattr(self, n) for n in ("level", "highest", "spawn_xy", "asked", "followed")}

    def _any(self) -> torch.Tensor:
        return (self._uniform(1)[:, 0] * (self.highest.floor() + 1.0)).long()

    def _uniform(self, columns: int) -> torch.Tensor:
        device = self.level.device
        return torch.rand(len(self.level), columns, generator=self._generator, device=device)
