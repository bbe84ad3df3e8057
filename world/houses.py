"""
Generate houses, and walks in them with instructions: the data of the embedded world.

The real task (R2R in Matterport scans) needs a licence, a simulator and a big model. This file
makes a small world in the same formats: rooms with coloured walls, doorways and furniture, and
instructions such as

    turn left, go into the pink room, turn right and stop by the yellow sofa.

A start and a goal are drawn, the simulator's expert walks between them, and the instruction is made
from its actions (the side of its first turn, the doors that it crossed, what it passed):

    unambiguous     a thing is unique in its house by (colour, kind); a door is named by the room
                    that it leads to; a turn has its side, even "turn around to the left".
    language-only   is not enough: no instruction holds a distance or a number of turns.
    vision-only     is not enough: several things are in view, and one of them is meant.
                    `python -m tools.bounds` prints upper bounds for either: vision-only .54,
                    language-only .35 (level 1, val_unseen, 200 walks).

Run it   python -m world.houses                              # 500 houses, 4000 walks: the demo's
         python -m world.houses --level 3 --train-houses 200 --out data/houses3
Writes   <out>/scenes/houses/<name>/<name>.glb (one house, some 45 kB), args.json (the flags), and
         <out>/<split>/<split>.json.gz, <split>_gt.json.gz for train, val_seen (train's houses, new
         walks) and val_unseen (new houses), in the schema of R2R_VLNCE v1-3 [1];  <out>/walks/
         holds finished houses, which another run with the same flags and code reuses
Expect   half a minute on two idle cores. The same seed gives the same houses, walks and sentences
         with any --jobs; on one machine with the same libraries the files are identical

[1] Krantz et al. 2020, VLN-CE, https://arxiv.org/abs/2004.02857
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
from typing import NamedTuple

import numpy as np
import trimesh
from PIL import Image
from tqdm import tqdm

from cli import DefaultsFormatter, UserError, lock_folder, positive_int, run_cli, whole_number
from reward import FORWARD, LEFT, RIGHT, STOP
from world import house_sim
from world.episodes import scene_hash
from world.house_sim import HouseSim
from world.robots import ROBOTS, rotation_of, turn_between

SPLITS = ("train", "val_seen", "val_unseen")

# Words for turns, by the least size in degrees. At level 1 a turn of 30 is not mentioned (the goal
# is in view then), and larger ones share one word: the fewer sizes the words distinguish, the lower
# is the bound of a language-only policy, which has one action sequence for each wording.
PLAIN = {45: ["turn {}"]}
FINE = {
    10: ["turn slightly {}", "turn a bit {}"],
    45: ["turn {}"],
    135: ["turn around to the {}", "turn back to the {}"],
}

# 1 is the demo's: short instructions, in which colours alone distinguish things. At 2 and 3 rooms
# are named by colour and kind, turns have three sizes, and passed things are mentioned.
# rooms: in a house; side: of a room, metres; things: in a room (in the single room of a house at
# level 1); cross: share of walks that start in another room than the goal's, if there is one;
# metres: shortest and longest walk (geodesic).
# Level 4 has the words of level 1, and each of its walks goes to a thing in the other room and then
# back to the room where it started: a policy needs a memory of having been at the thing.
LEVELS = {
    1: dict(rooms=(1, 2), side=(4.5, 6.0), things=(4, 5), cross=0.5, metres=(2.5, 7), turns=PLAIN),
    2: dict(rooms=(2, 3), side=(3.5, 5.5), things=(3, 4), cross=0.75, metres=(3, 10), turns=FINE),
    3: dict(rooms=(3, 6), side=(3.5, 5.5), things=(3, 4), cross=1.0, metres=(5, 20), turns=FINE),
    4: dict(rooms=(2, 2), side=(3.5, 5.0), things=(3, 3), cross=0.0, metres=(2.5, 6), turns=PLAIN),
}


def plain(level: int) -> bool:
    """Has the level few words, so that colours alone distinguish things?"""
    return LEVELS[level]["turns"] is PLAIN


# Walls have pale colours and things strong ones, with different names: with the light every shade
# of a thing is far from every shade of a wall (tests/test_houses.py measures how far).
WALLS = {
    "pink": (243, 170, 192),
    "brown": (172, 130, 96),
    "cyan": (135, 216, 222),
    "lilac": (196, 172, 242),
    "cream": (246, 230, 176),
    "white": (242, 242, 242),
}
PAINTS = {
    "red": (208, 26, 34),
    "green": (24, 140, 46),
    "blue": (30, 66, 210),
    "yellow": (244, 208, 16),
    "purple": (132, 34, 168),
    "orange": (246, 122, 12),
}
FLOORS = ((150, 148, 146), (122, 118, 114), (176, 172, 168))
CEILING, FRAME, PICTURE = (226, 226, 224), (58, 48, 42), (40, 40, 44)

# Light comes from above and a little from one corner: (-x, +x, -y, +y, -z, +z), as in `faces`.
LIGHT = np.array([0.86, 0.95, 0.66, 1.0, 0.81, 0.90])

# Furniture in metres, standing with its back at z = 0 and its front towards +z, centred on x = 0:
# boxes (x0, y0, z0, x1, y1, z1, shade). Big and plain: kinds must differ in 56 pixels.
FURNITURE = {
    "sofa": ((-0.9, 0, 0, 0.9, 0.45, 0.9, 1.0), (-0.9, 0.45, 0, 0.9, 1.0, 0.25, 0.9),
             (-0.9, 0.45, 0.25, -0.65, 0.72, 0.9, 0.85), (0.65, 0.45, 0.25, 0.9, 0.72, 0.9, 0.85)),
    "table": ((-0.65, 0.68, 0, 0.65, 0.8, 0.9, 1.0), (-0.3, 0, 0.2, 0.3, 0.68, 0.7, 0.8)),
    "chair": ((-0.35, 0, 0, 0.35, 0.5, 0.7, 1.0), (-0.35, 0.5, 0, 0.35, 1.2, 0.15, 0.85)),
    "lamp": ((-0.2, 0, 0.1, 0.2, 0.1, 0.5, 0.8), (-0.05, 0.1, 0.25, 0.05, 1.15, 0.35, 0.8),
             (-0.3, 1.15, 0, 0.3, 1.75, 0.6, 1.0)),
    "wardrobe": ((-0.6, 0.1, 0, 0.6, 2.0, 0.6, 1.0), (-0.55, 0, 0, 0.55, 0.1, 0.55, 0.8)),
    "plant": ((-0.2, 0, 0.15, 0.2, 0.4, 0.55, 0.8), (-0.35, 0.4, 0, 0.35, 0.95, 0.7, 1.0),
              (-0.2, 0.95, 0.15, 0.2, 1.4, 0.55, 0.9)),
    "bed": ((-0.75, 0, 0, 0.75, 0.5, 2.0, 1.0), (-0.75, 0.5, 0, 0.75, 1.1, 0.12, 0.85),
            (-0.5, 0.5, 0.2, 0.5, 0.64, 0.6, 0.9)),
}

# The kind of a room is that of the thing that is placed in it first.
ROOM_KINDS = {
    "bedroom": "bed",
    "lounge": "sofa",
    "kitchen": "table",
    "study": "chair",
    "dressing room": "wardrobe",
    "garden room": "plant",
}

HEIGHT, SLAB = 2.5, 0.08  # metres: a room's height; half the thickness of a wall between rooms
# habitat's navigation mesh counts heights in cells of 0.2 m from the lowest point, rounded up: just
# under one cell puts it 1 mm above the floor. With 0.1 m the mesh, and the camera after a step,
# would be 10 cm above it.
FLOOR_M = 0.199
DOOR_WIDTH, DOOR_HEIGHT = 1.2, 2.1
PASSAGE = 0.75  # metres between things, so that a body of 0.36 m passes and can stand in front
STAND_OFF = 0.5  # metres from a thing to the goal in front of it
START_CLEARANCE = 0.3  # metres between the body and anything else where a walk starts
MIN_SPL = 0.9  # of the expert's walk; others are drawn again
MAX_WORDS = 200  # R2R pads instruction_tokens to this


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].strip(),
        formatter_class=DefaultsFormatter,
    )
    add = p.add_argument_group("files").add_argument
    add("--out", default="data/houses", help="folder for scenes and episodes")
    add = p.add_argument_group("houses and walks").add_argument
    add("--seed", type=whole_number, default=0)
    add("--level", type=int, choices=sorted(LEVELS), default=1, help="1 easy .. 3 hard; 4: there "
        "and back")
    add("--train-houses", type=positive_int, default=500)
    add("--walks-per-house", type=positive_int, default=8,
        help="training walks in each training house")
    add("--unseen-houses", type=positive_int, default=50, help="houses of val_unseen")
    add("--val-episodes", type=positive_int, default=200, help="in val_seen, and in val_unseen")
    add = p.add_argument_group("machine").add_argument
    add("--jobs", type=positive_int, default=os.cpu_count(),
        help="processes; the files do not depend on it")
    return p.parse_args(argv)


# ---------------------------------------------------------------- a house, as boxes


class Box(NamedTuple):
    role: str  # floor, ceiling, wall, object, decor; walls and objects stop a body
    name: str  # "red sofa", "pink room" or ""
    lo: list  # metres, world axes: y is up
    hi: list
    colour: tuple  # RGB before light
    texture: str


class Room(NamedTuple):
    name: str
    wall: str  # the colour of its walls, unique in the house
    lo: np.ndarray  # (2,) x and z of the outline, the room's own half of each wall included
    hi: np.ndarray


class Door(NamedTuple):
    rooms: tuple  # the two rooms' numbers
    axis: int  # 0: one walks through it along x; 1: along z
    at: float  # where the two half walls meet, along that axis
    centre: float  # along the other axis


class Thing(NamedTuple):
    name: str
    room: int
    lo: np.ndarray  # (2,) x and z of the footprint
    hi: np.ndarray

    @property
    def kind(self) -> str:
        return self.name.split(maxsplit=1)[1]                # its name without the colour


class House(NamedTuple):
    rooms: list
    doors: list
    things: list
    boxes: list


def build_house(rng, level: int) -> House:
    """Draw houses until each room of one has at least three things."""
    few, many = LEVELS[level]["rooms"]
    while True:
        outlines, doors = lay_out(rng, int(rng.integers(few, many + 1)), LEVELS[level]["side"])
        walls = rng.choice(list(WALLS), len(outlines), replace=False).tolist()
        kinds = rng.choice(list(ROOM_KINDS), len(outlines)).tolist()
        rooms = [
            Room(f"{wall} {'room' if plain(level) else kind}", wall, *outline)
            for wall, kind, outline in zip(walls, kinds, outlines)
        ]
        things, boxes = furnish(rng, level, rooms, doors)
        if min(sum(t.room == n for t in things) for n in range(len(rooms))) >= 3:
            return House(rooms, doors, things, build_walls(rng, rooms, doors) + boxes)


def apart(lo, hi, other_lo, other_hi, gap: float) -> bool:
    """Are two rectangles at least `gap` apart along x or along z?"""
    return bool(np.any(other_lo - hi >= gap - 1e-9) or np.any(lo - other_hi >= gap - 1e-9))


def lay_out(rng, count: int, side_m: tuple[float, float]) -> tuple[list, list[Door]]:
    """`count` outlines and the doors between them. Each room is attached to an earlier one, so the
    doors form a tree, with one way from room to room. -> [(lo, hi)], [Door]"""
    outlines, doors = [(np.zeros(2), rng.uniform(*side_m, 2).round(1))], []
    while len(outlines) < count:
        old, axis, side = int(rng.integers(len(outlines))), *rng.integers(2, size=2).tolist()
        (lo, hi), size, along = outlines[old], rng.uniform(*side_m, 2).round(1), 1 - axis
        shared = DOOR_WIDTH + 1.0  # metres of common wall, at least
        new = np.zeros(2)
        new[axis] = hi[axis] if side else lo[axis] - size[axis]
        new[along] = rng.uniform(lo[along] - size[along] + shared, hi[along] - shared)
        new = new.round(1)
        if all(apart(new, new + size, *outline, 0) for outline in outlines):
            low, high = max(lo[along], new[along]), min(hi[along], new[along] + size[along])
            centre = rng.uniform(low + 1.0, high - 1.0) if high - low > 2 else (low + high) / 2
            at = float(hi[axis] if side else lo[axis])
            doors.append(Door((old, len(outlines)), axis, at, round(float(centre), 2)))
            outlines.append((new, new + size))
    return outlines, doors


def furnish(rng, level: int, rooms: list[Room], doors: list[Door]):
    """Things with their backs to the walls, as many as fit. -> [Thing], their boxes"""
    things, boxes, used = [], [], set()
    for number, room in enumerate(rooms):
        few, many = LEVELS[level]["things"]
        wanted = 3 if plain(level) and len(rooms) > 1 else int(rng.integers(few, many + 1))
        full = [doorstep(door) for door in doors if number in door.rooms]
        kinds = rng.permutation(list(FURNITURE)).tolist()
        kinds.sort(key=lambda kind: kind != ROOM_KINDS.get(room.name.partition(" ")[2]))
        here = set()  # colours: unique in a room; at level 1 in the house
        for kind in kinds:
            paints = [p for p in PAINTS if p not in here and f"{p} {kind}" not in used]
            placed = place(rng, kind, room.lo + SLAB, room.hi - SLAB, full)
            if len(here) == wanted or not paints or placed is None:
                continue
            paint = str(rng.choice(paints))
            parts, lo, hi = placed
            for corners, (*_, shade) in zip(parts, FURNITURE[kind]):
                colour = tuple(round(c * shade) for c in PAINTS[paint])
                boxes.append(Box("object", f"{paint} {kind}", *corners, colour, "cloth"))
            things.append(Thing(f"{paint} {kind}", number, lo, hi))
            full.append((lo, hi))
            here.add(paint)
            used |= {f"{paint} {k}" for k in (FURNITURE if plain(level) else [kind])}
    return things, boxes


def doorstep(door: Door) -> tuple[np.ndarray, np.ndarray]:
    """The rectangle of a doorway; things are at least PASSAGE away. -> lo, hi"""
    lo, hi = np.zeros(2), np.zeros(2)
    lo[door.axis], hi[door.axis] = door.at - 0.4, door.at + 0.4
    lo[1 - door.axis], hi[1 - door.axis] = door.centre - 0.3, door.centre + 0.3
    return lo, hi


def place(rng, kind: str, lo, hi, full: list):
    """Place a piece of furniture with its back to a wall of the room's inside lo..hi, PASSAGE away
    from the rectangles in `full`. -> boxes [(lo, hi)], footprint lo, hi; or None: no place found"""
    parts = np.array(FURNITURE[kind])
    for _ in range(40):
        x, z, back = parts[:, [0, 3]], parts[:, [2, 5]], int(rng.integers(4))
        for _ in range(back):  # quarter turns about +y: the front looks to +z, +x, -z, -x
            x, z = z, -x
        near = np.array([x.min(), z.min()])
        size = np.array([x.max(), z.max()]) - near
        corner = rng.uniform(lo, hi - size)
        # in a corner or well away from it: no nooks in which a body gets stuck
        corner = np.where(corner - lo < PASSAGE, lo, corner)
        corner = np.where(hi - size - corner < PASSAGE, hi - size, corner)
        wall = 1 - back % 2
        corner[wall] = (lo if back < 2 else hi - size)[wall]
        corner = corner.round(2)
        if all(apart(corner, corner + size, *rectangle, PASSAGE) for rectangle in full):
            x, z = np.sort(x - near[0] + corner[0]), np.sort(z - near[1] + corner[1])
            boxes = np.stack([x, parts[:, [1, 4]], z], axis=2).round(3)  # (parts, 2, 3)
            return boxes.tolist(), corner, corner + size
    return None


def build_walls(rng, rooms: list[Room], doors: list[Door]) -> list[Box]:
    """Floors, ceilings, walls with their openings, door frames and pictures."""
    boxes = []
    for number, room in enumerate(rooms):
        (x0, z0), (x1, z1) = room.lo.tolist(), room.hi.tolist()
        floor = FLOORS[rng.integers(len(FLOORS))], str(rng.choice(["tiles", "planks"]))
        boxes.append(Box("floor", room.name, [x0, -FLOOR_M, z0], [x1, 0.0, z1], *floor))
        high = [x0, HEIGHT, z0], [x1, HEIGHT + 0.1, z1]
        boxes.append(Box("ceiling", room.name, *high, CEILING, "cloth"))
        here = [door for door in doors if number in door.rooms]
        for axis, end in ((0, 0), (0, 1), (1, 0), (1, 1)):
            boxes += build_wall(rng, room, here, axis, end)
    return boxes


def build_wall(rng, room: Room, doors: list[Door], axis: int, end: int) -> list[Box]:
    """The wall that bounds a room along `axis`, at its low (0) or high (1) end."""
    edge = (room.lo, room.hi)[end][axis]
    slab = functools.partial(at_wall, room, axis, end, (0, SLAB))
    proud = functools.partial(at_wall, room, axis, end, (SLAB, SLAB + 0.03))
    boxes, paint = [], (WALLS[room.wall], "wallpaper")
    trim = SLAB * axis  # the walls across z stand between those across x
    cuts = [room.lo[1 - axis] + trim, room.hi[1 - axis] - trim]
    for door in doors:
        if door.axis == axis and abs(door.at - edge) < 1e-6:
            cuts += [door.centre - DOOR_WIDTH / 2, door.centre + DOOR_WIDTH / 2]
    cuts.sort()
    for along in zip(cuts[::2], cuts[1::2]):
        boxes.append(Box("wall", room.name, *slab(along, (0, HEIGHT)), *paint))
    for left, right in zip(cuts[1:-1:2], cuts[2::2]):
        lintel = slab((left, right), (DOOR_HEIGHT, HEIGHT))
        boxes.append(Box("wall", room.name, *lintel, *paint))
        top = DOOR_HEIGHT + 0.12
        for part in (proud((left - 0.12, left), (0, top)), proud((right, right + 0.12), (0, top)),
                     proud((left, right), (DOOR_HEIGHT, top))):
            boxes.append(Box("decor", "", *part, FRAME, "cloth"))
    if len(cuts) == 2 and rng.random() < 0.5:
        middle = rng.uniform(cuts[0] + 0.6, cuts[1] - 0.6)
        picture = proud((middle - 0.45, middle + 0.45), (1.3, 1.9))
        boxes.append(Box("decor", "", *picture, PICTURE, "cloth"))
    return boxes


def at_wall(room: Room, axis: int, end: int, depths, along, heights):
    """A box at the wall that bounds a room along `axis`, at its low (0) or high (1) end; depths
    count inwards from the outline. -> lo, hi"""
    edge = (room.lo, room.hi)[end][axis]
    across = sorted(edge + (1 - 2 * end) * depth for depth in depths)
    x, z = (across, along) if axis == 0 else (along, across)
    return np.stack([x, heights, z], axis=1).round(3).tolist()


# ---------------------------------------------------------------- the scene file


def textures() -> dict[str, np.ndarray]:
    """Grey patterns for one square metre, {name: (32, 32) uint8}; they repeat. On a wall the rows
    are heights (row 0 is 0 m, 1 m, ..), so the wallpaper has an edge at the camera's height,
    1.25 m, and a wall right before the camera is never one blank colour."""
    row, column = np.mgrid[:32, :32]
    grain = np.random.default_rng(0).integers(0, 9, (32, 32))
    patterns = {
        "wallpaper": 22 * ((row + 24) // 16 % 2) + 9 * (column // 16 % 2),
        "tiles": 34 * ((row // 16 + column // 16) % 2) + grain,
        "planks": 12 * (column // 4 * 5 % 4) + 20 * (column % 4 == 0),
        "cloth": 14 * (row // 8 % 2) + grain,
    }
    return {name: (255 - darker).astype(np.uint8) for name, darker in patterns.items()}


def faces(lo, hi) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a box, face by face: -x, +x, -y, +y, -z, +z, anticlockwise from outside.
    -> corners (24, 3) in world metres, uv (24, 2): the two world coordinates within the face"""
    ends, corners, uv = np.array([lo, hi], float), [], []
    for axis, (u, v) in enumerate(((2, 1), (0, 2), (0, 1))):
        for end in (0, 1):
            quad = np.zeros((4, 3))
            quad[:, axis] = ends[end, axis]
            quad[:, u], quad[:, v] = ends[[0, 1, 1, 0], u], ends[[0, 0, 1, 1], v]
            if (end == 0) != (axis < 2):  # u x v points along -x, -y, +z: turn the others
                quad = quad[[0, 3, 2, 1]]
            corners.append(quad)
            uv.append(quad[:, [u, v]])
    return np.concatenate(corners), np.concatenate(uv)


def write_glb(path: str, boxes: list[Box]) -> None:
    """The boxes as one .glb: a mesh per axis-aligned box, named "role|name|number".

    habitat takes a bare .glb for a Matterport scan, which is z-up (StageAttributesManager.cpp), so
    world (x, y, z) is stored as (x, -z, y). It renders without lights, so light is part of the
    vertex colours: pixel = COLOR_0 * texture / 255; textures are grey and repeat every metre. Two
    things are for its navigation mesh: a ceiling has no upper side, or the roof would be walkable
    (the top of a wide wardrobe or table is, but no step leads there); and a floor is 19.9 cm thick
    (see FLOOR_M).
    """
    materials = {  # RGB: a texture of one channel may be drawn red
        name: trimesh.visual.material.PBRMaterial(
            name=name, baseColorTexture=Image.fromarray(grey).convert("RGB"), metallicFactor=0.0,
            roughnessFactor=1.0)
        for name, grey in textures().items()}
    triangles = np.concatenate([[[k, k + 1, k + 2], [k, k + 2, k + 3]] for k in range(0, 24, 4)])
    lidless = np.delete(triangles, (6, 7), axis=0)  # without the upper side, +y
    scene = trimesh.Scene()
    for number, box in enumerate(boxes):
        corners, uv = faces(box.lo, box.hi)
        colour = np.full((6, 4), 255, np.uint8)
        colour[:, :3] = np.outer(LIGHT, box.colour).round()
        # trimesh counts v from a picture's bottom and glTF from its top
        visual = trimesh.visual.TextureVisuals(uv * (1, -1) + (0, 1), materials[box.texture])
        visual.vertex_attributes["color"] = colour.repeat(4, axis=0)  # or COLOR_0 is dropped
        stored = corners[:, [0, 2, 1]] * (1, -1, 1)
        sides = lidless if box.role == "ceiling" else triangles
        mesh = trimesh.Trimesh(stored, sides, visual=visual, process=False)
        name = f"{box.role}|{box.name}|{number}"
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    write_file(path, trimesh.exchange.gltf.export_glb(scene, include_normals=False))


def write_file(path: str, data: bytes) -> None:
    """Atomic write of bytes; makes the folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".tmp", "wb") as file:
        file.write(data)
    os.replace(path + ".tmp", path)


# ---------------------------------------------------------------- a walk


def free(sim: HouseSim, points: np.ndarray, gap: float) -> np.ndarray:
    """At which points (N, 2) is the body at least `gap` metres from everything? -> (N,) bool"""
    return ~house_sim.inside_any(sim.graph.lo - gap, sim.graph.hi + gap, points)


def room_at(house: House, x: float, z: float) -> int:
    """Number of the room whose outline holds the point."""
    return next(n for n, room in enumerate(house.rooms)
                if (room.lo <= (x, z)).all() and ((x, z) <= room.hi).all())


def in_front_of(sim: HouseSim, house: House, thing: Thing) -> np.ndarray:
    """Points STAND_OFF metres from a thing, in its room, where a body can stand. -> (N, 2)"""
    angles = np.radians(np.arange(2.5, 360, 5))
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ring = STAND_OFF * ring + np.where(ring > 0, thing.hi, thing.lo)  # around each corner
    (x0, z0), (x1, z1), d = thing.lo, thing.hi, STAND_OFF
    sides = [(x, z) for x in np.linspace(x0, x1, 15) for z in (z0 - d, z1 + d)]
    sides += [(x, z) for z in np.linspace(z0, z1, 15) for x in (x0 - d, x1 + d)]
    points = np.concatenate([ring, sides])
    room = house.rooms[thing.room]
    inside = ((points > room.lo) & (points < room.hi)).all(axis=1)
    return points[inside & free(sim, points, 0.02)].round(4)


def walk(sim: HouseSim, goal: list[float], limit: int = 200) -> tuple[list[int], np.ndarray]:
    """The expert's walk from the simulator's pose. -> actions, the last one STOP unless cut at
    `limit`; poses (len(actions), 3): x, z, heading before each (degrees, left +, not wrapped)"""
    actions, poses, heading = [], [], 0.0
    while len(actions) < limit and STOP not in actions[-1:]:
        actions.append(sim.expert_action(goal))
        poses.append((*sim.spot, heading))
        if actions[-1] != STOP:
            sim.act(actions[-1])
        heading += {LEFT: 1, RIGHT: -1}.get(actions[-1], 0) * sim.robot["turn_deg"]
    return actions, np.array(poses)


def draw_start(rng, sim: HouseSim, house: House, thing: Thing, crosses: bool) -> dict | None:
    """The start of a walk to a thing. None if the drawn place is not free."""
    others = [n for n in range(len(house.rooms)) if n != thing.room]
    room = house.rooms[rng.choice(others) if crosses else thing.room]
    gap = sim.robot["radius_m"] + START_CLEARANCE
    spot = rng.uniform(room.lo + SLAB + gap, room.hi - SLAB - gap).round(3)
    if not all(apart(spot, spot, other.lo, other.hi, gap) for other in house.things):
        return None
    turns = round(360 / sim.robot["turn_deg"])
    return {"start_position": [float(spot[0]), 0.0, float(spot[1])],
            "start_rotation": rotation_of(2 * math.pi / turns * int(rng.integers(turns)))}


def find_goal(sim: HouseSim, house: House, thing: Thing, start: list[float],
              level: int) -> list[float] | None:
    """The goal [x, y, z] of a walk to the thing: of the points in front of it the one through which
    the shortest path to its middle goes. None if that is too near for the level, or too far."""
    fronts = in_front_of(sim, house, thing)
    if not len(fronts):
        return None
    metres = house_sim.distances(sim.graph, sim.distances_to(start), fronts)[0]  # symmetric
    best = (metres + np.hypot(*(fronts - (thing.lo + thing.hi) / 2).T)).argmin()
    nearest, furthest = LEVELS[level]["metres"]
    if not nearest <= metres[best] <= furthest:
        return None
    return [float(fronts[best, 0]), 0.0, float(fronts[best, 1])]


def draw_walk(rng, sim: HouseSim, house: House, scene_id: str, level: int,
              crosses: bool) -> dict | None:
    """One walk: a start, a thing to go to, the expert's actions, and the instruction. None if the
    draw is rejected: too short or long, no free start, or a detour by the expert.
    -> {"episode": R2R's fields without ids and tokens, "truth": R2R's ground truth}"""
    # 1. the start, and the goal in front of a thing
    thing = house.things[rng.integers(len(house.things))]
    start = draw_start(rng, sim, house, thing, crosses)
    if start is None:
        return None
    sim.reset({"scene_id": scene_id, **start})
    goal = find_goal(sim, house, thing, start["start_position"], level)
    if goal is None:
        return None

    # 2. the expert's walk; it must not enter a room twice: no instruction can describe that
    path, metres = sim.path(goal), sim.geodesic([goal])
    actions, poses = walk(sim, goal)
    steps = np.hypot(*np.diff(poses[:, :2], axis=0).T).sum()
    legs = read_legs(house, thing, actions, poses)
    rooms = [leg["room"] for leg in legs]
    if actions[-1] != STOP or metres / max(steps, metres) < MIN_SPL or len(set(rooms)) < len(rooms):
        return None
    if legs[0]["turn_deg"] == 0 and rng.random() < 0.5:  # else "straight on" succeeds too often
        return None

    info = {"geodesic_distance": metres, "level": level, "goal": thing.name,
            "rooms": [house.rooms[n].name for n in rooms], "first_turn_deg": legs[0]["turn_deg"]}
    text = write_instruction(rng, house, legs, thing.name, level)
    return walk_records({"scene_id": scene_id, **start}, info, goal, text, path, actions, poses)


def draw_return_walk(rng, sim: HouseSim, house: House, scene_id: str, level: int) -> dict | None:
    """draw_walk of level 4: to a thing in another room, and back to one where the walk started.
    Its goal is 1.5 m or more from the start. The reference path leads past both things, so a noisy
    expert needs `make_data.py --waypoints reference`; SPL is of the direct way, so read SDTW."""
    # 1. the start, the thing that is visited, and the goal
    thing, visited = (house.things[n] for n in rng.choice(len(house.things), 2, replace=False))
    start = draw_start(rng, sim, house, thing, crosses=False)
    same_kind = [t for t in house.things if (t.room, t.kind) == (thing.room, thing.kind)]
    if start is None or visited.room == thing.room or len(same_kind) > 1:
        return None
    sim.reset({"scene_id": scene_id, **start})
    via = find_goal(sim, house, visited, start["start_position"], level)
    goal = via and find_goal(sim, house, thing, via, level)
    if goal is None or sim.geodesic([goal]) < 1.5:
        return None

    # 2. the expert's walk, there and back
    direct, path = sim.geodesic([goal]), sim.path(via)
    metres = sim.geodesic([via])
    there, poses = walk(sim, via)
    path += sim.path(goal)[1:]
    metres += sim.geodesic([goal])
    back, poses_back = walk(sim, goal)
    poses_back[:, 2] += poses[-1, 2]
    legs = read_legs(house, visited, there, poses)
    rooms = [leg["room"] for leg in legs]
    poses, actions = np.concatenate([poses[:-1], poses_back]), there[:-1] + back
    steps = np.hypot(*np.diff(poses[:, :2], axis=0).T).sum()
    if {there[-1], back[-1]} != {STOP} or metres / max(steps, metres) < MIN_SPL or (
            len(set(rooms)) < len(rooms)):
        return None

    # 3. the records
    info = {"geodesic_distance": direct, "level": level, "goal": thing.name, "via": visited.name,
            "rooms": [house.rooms[n].name for n in rooms], "first_turn_deg": legs[0]["turn_deg"]}
    text = write_instruction(rng, house, legs, visited.name, level, ("go up to", "walk up to"))
    text += str(rng.choice([" go back to the room where you started and stop by the {}.",
                            " then return to the room that you came from and wait by the {}."
                            ])).format(thing.kind)
    return walk_records({"scene_id": scene_id, **start}, info, goal, text, path, actions, poses)


def walk_records(start: dict, info: dict, goal: list[float], text: str, path: list, actions, poses
                 ) -> dict:
    """What draw_walk returns. poses: as walk() gives them."""
    stands = [0] + [t + 1 for t, action in enumerate(actions) if action == FORWARD]
    return {
        "episode": {**start, "info": info, "goals": [{"position": goal, "radius": 1.0}],
                    "instruction": {"instruction_text": text}, "reference_path": path},
        "truth": {"locations": [[float(poses[t, 0]), 0.0, float(poses[t, 1])] for t in stands],
                  "actions": actions, "forward_steps": len(stands) - 1}}


# ---------------------------------------------------------------- from a walk to words


def read_legs(house: House, goal_thing: Thing, actions, poses) -> list[dict]:
    """A walk, room by room. A leg begins where a room is entered. Its turn is the net turn before
    the first step (first leg), or around the door: from the step before it to the fourth after it.
    -> [{"room": number, "turn_deg": left +, "passed": None or (name, side)}]"""
    rooms = [room_at(house, x, z) for x, z, _ in poses]
    entered = [t for t in range(1, len(rooms)) if rooms[t] != rooms[t - 1]]
    steps = [t for t, action in enumerate(actions) if action == FORWARD]
    legs = []
    for start, end in zip([0] + entered, entered + [len(actions)]):
        behind = [t for t in steps if t < start][-2:]
        ahead = [t for t in steps if t >= start] + [len(actions) - 1] * 4
        since, until = (behind[0], ahead[3]) if behind else (0, ahead[0])
        inside = poses[[t for t in steps if start <= t < end]]
        legs.append({"room": rooms[start],
                     "turn_deg": float(poses[until, 2] - poses[since, 2]),
                     "passed": passed(house, goal_thing, rooms[start], inside)})
    return legs


def passed(house: House, goal_thing: Thing, room: int, poses) -> tuple[str, str] | None:
    """The thing that was passed most closely in this part of a walk: at most 1.5 m away, and 50 to
    130 degrees from straight ahead. -> (name, "left" or "right"), or None"""
    near = []
    for thing in house.things:
        if thing.room == room and thing.name != goal_thing.name:
            for x, z, heading in poses:
                dx, dz = (thing.lo + thing.hi) / 2 - (x, z)
                bearing = turn_between(heading, math.degrees(math.atan2(-dx, -dz)))
                metres, side = math.hypot(dx, dz), "left" if bearing > 0 else "right"
                if 50 <= abs(bearing) <= 130 and metres <= 1.5:
                    near.append((metres, thing.name, side))
    return min(near)[1:] if near else None


STOPS = ("stop at", "stop by", "stop in front of", "wait at", "wait by", "wait in front of")


def write_instruction(rng, house: House, legs: list[dict], goal: str, level: int,
                      ends: tuple[str, ...] = STOPS) -> str:
    """The instruction for a walk. It never gives degrees; levels above 1 have more wordings, and
    mention what was passed. ends: what is done at the goal."""

    def pick(*phrases):
        return str(rng.choice(phrases))

    parts = []
    for number, leg in enumerate(legs):
        room = house.rooms[leg["room"]].name
        side, size = ("left" if leg["turn_deg"] > 0 else "right"), abs(leg["turn_deg"])
        if number > 0:
            ways = [f"enter the {room}", f"go into the {room}", f"walk into the {room}"]
            ways += [f"take the door to the {room}", f"go through the door to the {room}"]
            parts.append(pick(*ways[: 4 if plain(level) else 5]))
        sizes = [least for least in LEVELS[level]["turns"] if size >= least]
        if sizes and (number == 0 or size >= 45):  # a slight turn at a door is not mentioned
            parts.append(pick(*LEVELS[level]["turns"][max(sizes)]).format(side))
        if not plain(level) and leg["passed"]:
            ways = "pass the {} on your {}", "walk past the {} on the {}"
            parts.append(pick(*ways).format(*leg["passed"]))
    if not parts:
        return pick("go", "walk") + f" straight to the {goal} and stop."
    text = parts[0]
    for part in parts[1:]:
        text += (", " if plain(level) else pick(", ", ", then ", " and ")) + part
    return text + pick(" and ", ", then ") + pick(*ends) + f" the {goal}."


def words_of(text: str) -> list[str]:
    """R2R's tokens: lower-case words and full stops; commas and the like are left out.

    >>> words_of("Turn left, then stop.")
    ['turn', 'left', 'then', 'stop', '.']
    """
    return re.findall(r"[a-z0-9']+|\.", text.lower())


def vocabulary(texts: list[str]) -> dict:
    """R2R's `instruction_vocab`."""
    words = ["<pad>", "<unk>"] + sorted({word for text in texts for word in words_of(text)})
    index = {word: i for i, word in enumerate(words)}
    return dict(word_list=words, word2idx_dict=index, stoi=index, itos=words,
                num_vocab=len(words), UNK_INDEX=1, PAD_INDEX=0)


# ---------------------------------------------------------------- files


def make_house(task: dict) -> dict[str, list]:
    """Draw one house and its walks, and write its scene. One task of a process.

    task = {"out", "name", "level", "draw": ints that seed it, "walks": {split: count}, "code"}
    -> {split: [walk]}; also written to <out>/walks/<name>.json, which a second run reads.
    """
    scene = os.path.join(task["out"], "scenes", "houses", task["name"], task["name"] + ".glb")
    cache = os.path.join(task["out"], "walks", task["name"] + ".json")
    order = {key: value for key, value in task.items() if key != "out"}
    if os.path.exists(scene) and os.path.exists(cache):
        with open(cache) as file:
            done = json.load(file)
        if done["order"] == order:
            return done["walks"]

    scene_id, level = f"houses/{task['name']}/{task['name']}.glb", task["level"]
    if os.path.exists(cache):                   # of another scene; before this one is written
        os.remove(cache)
    for attempt in range(100):
        house = build_house(np.random.default_rng([*task["draw"], attempt]), level)
        write_glb(scene, house.boxes)
        sim = HouseSim(ROBOTS["houses"], os.path.join(task["out"], "scenes"))
        walks = {}
        for number, (split, wanted) in enumerate(task["walks"].items()):
            # a generator for each split: more training walks do not change the validation walks
            rng = np.random.default_rng([*task["draw"], attempt, number + 1])
            walks[split] = []
            for _ in range(wanted):
                crosses = len(house.rooms) > 1 and rng.random() < LEVELS[level]["cross"]
                which = (sim, house, scene_id, level)
                draws = (draw_return_walk(rng, *which) if level == 4 else
                         draw_walk(rng, *which, crosses) for _ in range(400 if level == 4 else 100))
                walks[split] += itertools.islice(filter(None, draws), 1)
        if all(len(walks[split]) == wanted for split, wanted in task["walks"].items()):
            write_file(cache, json.dumps({"order": order, "walks": walks}).encode())
            return walks
    raise UserError(f"no house in 100 has such walks at level {level}; try another --seed")


def plan_work(args) -> list[dict]:
    """One task per house (see make_house). The validation walks of a split are spread evenly."""
    code = hashlib.sha256()
    for module in (__file__, house_sim.__file__):
        with open(module, "rb") as file:
            code.update(file.read())
    tasks = []
    for first, prefix, houses in ((0, "h", args.train_houses), (1, "u", args.unseen_houses)):
        for i in range(houses):
            share = args.val_episodes // houses + (i < args.val_episodes % houses)
            walks = {"train": args.walks_per_house, "val_seen": share} if prefix == "h" else {
                "val_unseen": share}
            tasks.append({"out": args.out, "name": f"{prefix}{i:05d}", "level": args.level,
                          "draw": [args.seed, first, i], "walks": walks,
                          "code": code.hexdigest()[:16]})
    return tasks


def write_split(out: str, split: str, walks: list, vocab: dict, first_trajectory: int) -> None:
    """The two files of a split in the schema of R2R_VLNCE v1-3: ids count from 1, as ints in the
    episodes and as strings in the ground truth. "scenes" {scene_id: hash} is an addition, by which
    episodes.check_scenes() finds episodes of one world on scenes of another."""
    episodes, truths = [], {}
    for number, walk in enumerate(walks):
        text = walk["episode"]["instruction"]["instruction_text"]
        tokens = [vocab["stoi"][word] for word in words_of(text)]
        tokens += [vocab["PAD_INDEX"]] * (MAX_WORDS - len(tokens))
        episodes.append({"episode_id": number + 1, "trajectory_id": first_trajectory + number,
                         **walk["episode"],
                         "instruction": {"instruction_text": text, "instruction_tokens": tokens}})
        truths[str(number + 1)] = walk["truth"]
    scenes = {name: scene_hash(os.path.join(out, "scenes", name))
              for name in sorted({episode["scene_id"] for episode in episodes})}
    content = {"episodes": episodes, "instruction_vocab": vocab, "scenes": scenes}
    for name, data in ((split, content), (f"{split}_gt", truths)):
        packed = gzip.compress(json.dumps(data).encode(), 6, mtime=0)  # no clock in the bytes
        write_file(os.path.join(out, split, name + ".json.gz"), packed)


def report(args, splits: dict[str, list], vocab: dict):
    """Print statistics of each split and three of its instructions."""
    print(f"{args.train_houses} + {args.unseen_houses} houses of level {args.level}; "
          f"vocabulary {vocab['num_vocab']} words")
    for split, walks in splits.items():
        actions = collections.Counter(a for w in walks for a in w["truth"]["actions"])
        total = sum(actions.values())
        lengths = [len(w["truth"]["actions"]) for w in walks]
        metres = np.array([w["episode"]["info"]["geodesic_distance"] for w in walks])
        words = [len(words_of(w["episode"]["instruction"]["instruction_text"])) - 1 for w in walks]
        crossed = np.mean([len(w["episode"]["info"]["rooms"]) > 1 for w in walks])
        shares = " ".join(f"{name} {actions[a] / total:.0%}" for a, name in
                          enumerate(("stop", "forward", "left", "right")))
        print(f"\n{split}: {len(walks)} walks, {total} actions ({shares})\n"
              f"  actions {min(lengths)}..{max(lengths)}, median {np.median(lengths):.0f}; "
              f"metres {metres.min():.1f}..{metres.max():.1f}, mean {metres.mean():.1f}; "
              f"words mean {np.mean(words):.1f}, most {max(words)}; "
              f"through a door {100 * crossed:.0f}%")
        for item in walks[len(walks) // 6 :: max(1, len(walks) // 3)][:3]:
            print("  -", item["episode"]["instruction"]["instruction_text"])


def main(args):
    lock_folder(args.out)
    made_by = {key: value for key, value in vars(args).items() if key not in ("out", "jobs")}
    write_file(os.path.join(args.out, "args.json"), json.dumps(made_by, indent=1).encode())

    # 1. draw the houses, each with all its walks
    tasks = plan_work(args)
    bar = dict(total=len(tasks), desc="houses", unit="house", smoothing=0,
               mininterval=1 if sys.stderr.isatty() else 30)
    if args.jobs == 1:
        done = list(tqdm(map(make_house, tasks), **bar))
    else:
        spawn = multiprocessing.get_context("spawn")  # no locks or threads inherited
        with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
            done = list(tqdm(pool.map(make_house, tasks, chunksize=4), **bar))

    # 2. collect the splits, build one vocabulary for all, write
    splits = {split: [w for walks in done for w in walks.get(split, [])] for split in SPLITS}
    texts = [w["episode"]["instruction"]["instruction_text"] for s in splits.values() for w in s]
    vocab, trajectory = vocabulary(texts), 1
    for split, walks in splits.items():
        write_split(args.out, split, walks, vocab, trajectory)
        trajectory += len(walks)
    report(args, splits, vocab)


if __name__ == "__main__":
    run_cli(main, parse_args)
