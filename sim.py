"""
The simulators: one small interface, and two worlds behind it.

The agent is a camera on a stick. It stands on the floor, looks ahead, and can do three things:
step forward, turn left, turn right. Everything the project asks of a world is in a few verbs:

    reset(episode)   act(action)   observe()   state()   set_pose(p, q)   render(poses)
    geodesic(goals)  path(goal)    expert_action(goal)   topdown()        objects()

HouseSim    the embedded world, numpy only. It reads the boxes of a house back from its .glb.
            Picture: the camera only ever yaws, so along a picture column all rays share their
            x and z, and along a row their y. Whether a ray meets a box is decided by three
            intervals; the first two are tables over (column, box), the third over (row, box).
            What is left per pixel is one maximum and one comparison for each box which that
            column can see. Any other camera motion (looking up, say) would break this.
            Motion: the body is a square of side 2 * radius; walls and objects grown by the radius
            become rectangles which a point may not enter. Shortest paths bend only at corners of
            those rectangles, so geodesics are exact: a visibility graph, built once per house.
HabitatSim  habitat-sim 0.3.x behind the same verbs (Matterport3D, or the very same houses).

Who wants to walk does not call them: pool.py runs each in a process of its own (habitat-sim needs
another Python, usually), which is this file as a command.

Conventions (all of them habitat's): metres; y is up; a rotation is a quaternion x,y,z,w; the
identity looks along -z; yaw is counter-clockwise seen from above, so turning LEFT adds to it.

Run it   python sim.py --check --scenes data/houses/scenes                # is this machine ready?
         python sim.py --check --sim habitat --scenes data/scene_datasets --sim-python PATH
         python sim.py --serve HOST:PORT --sim-key FILE --scenes ..      # for another machine
Reads    SCENES/<episode["scene_id"]>, written by houses.py or downloaded (Matterport3D)
Expect   on one 2.5 GHz core, a 70-box house: 3500 frames/s at 56x56, 1100 at 112x112, 370 at 224;
         a geodesic in 0.08 ms, an action of the expert in 0.3 ms, a house loaded in 10 ms.
Imports  numpy and pillow, in Python 3.9 syntax: another interpreter has to load this file
"""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from typing import NamedTuple

try:
    import numpy as np
    from PIL import Image
except ImportError as missing:  # --sim-python may name any Python
    sys.exit(f"{sys.executable}: {missing}; a simulator needs numpy and pillow there")

from cli import Help, UserError, run
from pool import SimDied, SimError, SimPool, address, addresses, gpu_list, read_key, serve, work
from reward import FORWARD, LEFT, RIGHT, STOP

# ---------------------------------------------------------------- robots

# One row per data set. Where each value of Habitat's two is from:
#   r2r  VLN-CE habitat_extensions/config/vlnce_task.yaml: TURN_ANGLE 15, FORWARD_STEP_SIZE 0.25,
#        HFOV 90, ALLOW_SLIDING True. It names no body: habitat-lab 0.1.7 habitat/config/default.py
#        holds: AGENT_0 HEIGHT 1.5, RADIUS 0.1, camera POSITION [0, 1.25, 0]. 640x480 is that file's
#        frame and the released VLN-R1 walk's; VLN-CE's own agents saw 224x224.
#   rxr  VLN-CE habitat_extensions/config/rxr_vlnce_english_task.yaml: TURN_ANGLE 30, HFOV 79,
#        camera POSITION [0, 0.88, 0], HEIGHT 0.88, RADIUS 0.18, ALLOW_SLIDING False, 640x480; the
#        step of 0.25 is again default.py's, and the challenge's rule (VLN-CE's README).
#   houses  ours: R2R's camera, RxR's turns and girth, small pictures.
ROBOTS = {
    "houses": dict(turn_deg=30, forward_m=0.25, hfov_deg=90, camera_height_m=1.25, radius_m=0.18,
                   height_m=1.5, sliding=True, width=56, height=56),
    "r2r": dict(turn_deg=15, forward_m=0.25, hfov_deg=90, camera_height_m=1.25, radius_m=0.1,
                height_m=1.5, sliding=True, width=640, height=480),
    "rxr": dict(turn_deg=30, forward_m=0.25, hfov_deg=79, camera_height_m=0.88, radius_m=0.18,
                height_m=0.88, sliding=False, width=640, height=480),
}
# supersample (optional key, default 1): render so many times larger and average (HouseSim only)
ROBOT_HELP = {
    "turn_deg": "of one turn", "forward_m": "of one step", "hfov_deg": "across the picture",
    "camera_height_m": "above the floor", "radius_m": "of the body", "height_m": "of the body",
    "sliding": "along walls", "width": "of a frame, pixels", "height": "of a frame, pixels"}


def add_robot_args(add, default):
    """--robot, which names a row of ROBOTS, and a flag for each value of the row."""
    add("--robot", choices=sorted(ROBOTS), help=f"body and camera; default: {default}")
    for key, value in ROBOTS["houses"].items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {
            "type": int if key in ("width", "height") else float}
        add("--" + key.replace("_", "-"), **kind, help=f"{ROBOT_HELP[key]}; instead of the robot's")


def robot_from_args(args, row):
    """The row with what the flags say instead.

    >>> args = argparse.Namespace(turn_deg=15, sliding=None)
    >>> robot_from_args(args, {"turn_deg": 30, "sliding": True})
    {'turn_deg': 15, 'sliding': True}
    """
    robot = {key: value if vars(args)[key] is None else vars(args)[key]
             for key, value in row.items()}
    wrong = [key for key, value in robot.items() if key != "sliding" and not value > 0]
    if wrong or not robot["turn_deg"] <= 180:
        flag = (wrong or ["turn_deg"])[0].replace("_", "-")
        raise UserError(f"--{flag} must be above 0, and a turn at most 180 degrees")
    return robot


# ---------------------------------------------------------------- poses


def yaw_of(rotation):
    """Yaw in radians, left positive, of a quaternion x,y,z,w that turns about +y.

    >>> yaw_of([0, 0, 0, 1])                                  # the identity looks along -z
    0.0
    >>> round(math.degrees(yaw_of([0, math.sin(math.pi / 12), 0, math.cos(math.pi / 12)])), 6)
    30.0
    """
    _, y, _, w = rotation
    return wrap(2 * math.atan2(y, w))


def rotation_of(yaw):
    """The inverse of yaw_of, with w >= 0: [x, y, z, w]."""
    yaw = wrap(yaw)
    return [0.0, math.sin(yaw / 2), 0.0, math.cos(yaw / 2)]


def wrap(angle):
    """Into (-pi, pi].

    >>> wrap(3 * math.pi) == math.pi and wrap(-math.pi) == math.pi
    True
    """
    return math.pi - (math.pi - angle) % (2 * math.pi)


def heading(yaw):
    """Unit (x, z) of where that yaw looks.

    >>> [round(float(c), 6) + 0.0 for c in heading(math.pi / 2)]      # a left turn away from -z
    [-1.0, 0.0]
    """
    return np.stack([-np.sin(yaw), -np.cos(yaw)], axis=-1)


# ---------------------------------------------------------------- the house, read from its .glb


class Scene(NamedTuple):
    """A house as N boxes. Faces are in the order -x, +x, -y, +y, -z, +z."""

    path: str
    lo: np.ndarray  # (N, 3) metres
    hi: np.ndarray  # (N, 3)
    roles: list  # N of floor, ceiling, wall, object, decor
    names: list  # N of "red sofa" (several boxes may share it), "blue room", ""
    # for the picture; the last row is a place for the sky, and a face is 8 * box + 2 * axis + upper
    table: tuple  # lo and hi again: each (3, N + 1) float32
    textures: np.ndarray  # (M, S, S) uint8, grey, one metre each; S is a power of two
    face_texture: np.ndarray  # (8(N + 1),) int32, index into textures
    shade: np.ndarray  # (8(N + 1) * 256,) uint32: the bytes R, G, B, 0 of a face under a grey
    walls: np.ndarray  # indices of the walls that reach from the floor to the ceiling
    screen: tuple  # (bottom, top): the heights that all of those walls fill
    screened: np.ndarray  # (N + 1,) bool: a box that cannot look out above or below such a wall


GLTF_TYPES = {5121: np.uint8, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
GLTF_WIDTH = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def read_glb(path):
    """A binary glTF file -> (json, accessor(i) -> array (count, width), picture(i) -> PIL image)"""
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as error:
        raise SimError(f"{path}: the scene cannot be read ({error.strerror})") from None
    if data[:4] != b"glTF":
        raise SimError(f"{path}: not a .glb file (it does not begin with 'glTF')")
    size = int.from_bytes(data[8:12], "little")
    if len(data) < max(size, 20):
        raise SimError(f"{path}: truncated, {len(data)} bytes of {size}; write or copy it again")
    split = 20 + int.from_bytes(data[12:16], "little")
    try:
        gltf, blob = json.loads(data[20:split]), memoryview(data)[split + 8:]
    except ValueError as error:
        raise SimError(f"{path}: its JSON part is damaged ({error})") from None

    def view(i, offset=0):
        v = gltf["bufferViews"][i]
        start = v.get("byteOffset", 0)
        return blob[start + offset:start + v["byteLength"]], v.get("byteStride")

    def accessor(i):
        a = gltf["accessors"][i]
        dtype, width = np.dtype(GLTF_TYPES[a["componentType"]]), GLTF_WIDTH[a["type"]]
        raw, stride = view(a["bufferView"], a.get("byteOffset", 0))
        strides = (stride or dtype.itemsize * width, dtype.itemsize)
        return np.ndarray((a["count"], width), dtype, raw, strides=strides)

    def picture(i):
        source = gltf["images"][gltf["textures"][i]["source"]]
        return Image.open(io.BytesIO(view(source["bufferView"])[0]))

    return gltf, accessor, picture


@functools.lru_cache(maxsize=8)
def load_scene(path, modified):
    """Scene of a house written by houses.py. modified (the file's mtime) makes the cache honest.

    The file is Z-up, as Matterport3D's are: world (x, y, z) is stored as (x, -z, y). One node is
    one box, called "role|name|number": 24 vertices, 4 per face. A pixel is COLOR_0 (light baked in)
    times a grey texture that repeats every metre, laid out in world coordinates:
    (u, v) = (z, y) on x-faces, (x, z) on y-faces, (x, y) on z-faces; row 0 is at v = 0.
    """
    gltf, accessor, picture = read_glb(path)
    lo, hi, roles, names, colours, materials = [], [], [], [], [], []
    try:
        for node in gltf["nodes"]:
            if "mesh" not in node:
                continue
            role, name, _ = node["name"].split("|")
            (part,) = gltf["meshes"][node["mesh"]]["primitives"]
            get = {key: accessor(i) for key, i in part["attributes"].items()}
            points = get["POSITION"][:, [0, 2, 1]] * np.float32([1, 1, -1])
            corners = points.reshape(6, 4, 3)  # ValueError if not 24 vertices: not a box of ours
            lo.append(points.min(axis=0)), hi.append(points.max(axis=0))
            for axis, ends in enumerate((corners[0:2], corners[2:4], corners[4:6])):
                if abs(ends[..., axis] - [[lo[-1][axis]], [hi[-1][axis]]]).max() > 1e-5:
                    raise ValueError(f"box {node['name']!r} is not axis-aligned")
            drawn = np.stack([corners[f][:, ((2, 1), (0, 2), (0, 1))[f // 2]] for f in range(6)])
            shift = get["TEXCOORD_0"].reshape(6, 4, 2) - drawn
            if abs(shift - np.round(shift)).max() > 1e-3:
                raise ValueError(f"the texture of {node['name']!r} is not in world metres")
            roles.append(role), names.append(name)
            colours.append(get["COLOR_0"].reshape(6, 4, -1)[:, 0, :3])
            materials.append(part["material"])
        texture_of = [m["pbrMetallicRoughness"]["baseColorTexture"]["index"]
                      for m in gltf["materials"]]
        pictures = [picture(i).convert("L") for i in range(len(gltf["textures"]))]
    except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise SimError(f"{path}: not a house of houses.py ({type(error).__name__}: {error}); "
                       "other scenes need habitat-sim") from None
    if not lo:
        raise SimError(f"{path}: there is no box in it")
    lo, hi = np.stack(lo).astype(np.float64), np.stack(hi).astype(np.float64)
    table = tuple(np.pad(ends, ((0, 1), (0, 0))).T.astype(np.float32) for ends in (lo, hi))
    side = 1 << (max(max(p.size) for p in pictures) - 1).bit_length()
    textures = np.stack([np.asarray(p.resize((side, side), Image.NEAREST)) for p in pictures])
    face_texture = np.repeat([texture_of[m] for m in materials] + [0], 8).astype(np.int32)
    tall = (np.array(roles) == "wall") & (lo[:, 1] <= 1e-3)
    tall &= hi[:, 1] >= hi[tall, 1].max(initial=0) - 1e-3
    bottom, top = lo[tall, 1].max(initial=-np.inf), hi[tall, 1].min(initial=np.inf)
    screened = np.append((lo[:, 1] >= bottom - 1e-6) & (hi[:, 1] <= top + 1e-6), False)
    return Scene(path, lo, hi, roles, names, table, textures, face_texture,
                 shade_table(np.stack(colours)), np.flatnonzero(tall), (bottom, top), screened)


def shade_table(colours):
    """(N, 6, 3) uint8 -> (8(N + 1) * 256,) uint32: colour * grey / 255, as bytes; the sky is black.
    """
    grey = np.arange(256, dtype=np.uint32)[:, None]
    table = np.zeros((len(colours) + 1, 8, 256, 4), np.uint8)
    table[:-1, :6, :, :3] = (colours[:, :, None] * grey + 127) // 255
    return table.view(np.uint32).ravel()


# ---------------------------------------------------------------- the picture


def cast(scene, eyes, yaws, width, height, hfov_deg):
    """What each ray meets first, for T cameras at one height. eyes (T, 3), yaws (T,) radians ->

    code (T*W, H) int32   4 * box + axis of the face; 4 * N where there is nothing. Columns first!
    t    (T*W, H) float32 metres along the viewing direction (a plane's distance, not the ray's)
    rays (x (T*W,), y (H,), z (T*W,)): the ray's direction, scaled to go 1 m along the view

    A distance and a code travel in one number: the bits of a positive float sort as the float does,
    so the lowest few bits of the distance give way to the code, and minimum and maximum carry both
    along. It costs a relative 2^-14 of depth or so (0.6 mm at 10 m); ties go to the earlier box.
    """
    n = len(scene.roles)
    mask = np.int32((1 << (4 * n + 3).bit_length()) - 1)

    def pack(t, code):
        return (np.maximum(t, np.float32(0)).view(np.int32) & ~mask) | code

    # 1. rays through pixel centres; left is +, up is +
    side = math.tan(math.radians(hfov_deg) / 2)
    across = (1 - (np.arange(width) + 0.5) * (2 / width)) * side
    ray_y = (1 - (np.arange(height) + 0.5) * (2 / height)) * side * height / width
    ray_xz = heading(yaws)[:, None] + heading(yaws + math.pi / 2)[:, None] * across[:, None]
    ray_x, ray_y, ray_z = (np.where(abs(r) < 1e-7, 1e-7, r).astype(np.float32)  # never 0: 1 / ray
                           for r in (ray_xz[..., 0].ravel(), ray_y, ray_xz[..., 1].ravel()))
    eye_x, eye_z = (np.repeat(eyes[:, a], width).astype(np.float32)[:, None] for a in (0, 2))
    eye_y = np.float32(eyes[0, 1])

    # 2. seen from above, when do each column's rays enter and leave each box? (T*W, N + sky)
    (lo_x, lo_y, lo_z), (hi_x, hi_y, hi_z) = scene.table
    x0, x1 = slab(lo_x, hi_x, eye_x, 1 / ray_x[:, None])
    z0, z1 = slab(lo_z, hi_z, eye_z, 1 / ray_z[:, None])
    near, far = np.maximum(x0, z0), np.minimum(x1, z1)

    # 3. keep what a column can see. Back faces are not drawn, so a box around the eye is not, and
    #    behind a wall from floor to ceiling there is nothing but other rooms' floors and ceilings
    seen = (near < far) & (far > 0) & ((near > 0) | (lo_y > eye_y) | (hi_y < eye_y))
    if scene.screen[0] < eye_y < scene.screen[1]:
        walls = scene.walls
        screen = np.where(seen[:, walls], near[:, walls], np.float32(1e9)).min(axis=1, initial=1e9)
        seen &= (near <= screen[:, None]) | ~scene.screened
    seen[:, n] = ~seen[:, :n].any(axis=1)  # no column may be left without a pair
    pairs = np.flatnonzero(seen)
    column, box = np.divmod(pairs, n + 1)

    # 4. per pair and row: has the ray entered from the side and from above before leaving either?
    #    Then the nearest pair of each column is what the pixel shows
    sky = np.float32(1e30)
    near[:, n], far[:, n] = sky, sky
    y0, y1 = slab(lo_y[:, None], hi_y[:, None], eye_y, 1 / ray_y)  # (N + sky, H)
    y0[n], y1[n] = 0, sky
    code_y = 4 * np.arange(n + 1, dtype=np.int32)[:, None] + 1
    code_xz = 4 * box.astype(np.int32) + 2 * (z0 > x0).ravel()[pairs]
    enter = pack(y0, code_y)[box]  # (pairs, H)
    np.maximum(enter, pack(near.ravel()[pairs], code_xz)[:, None], out=enter)
    leave = np.where(y1 > 0, y1.view(np.int32) | mask, np.int32(-1))[box]
    np.minimum(leave, (far.ravel()[pairs].view(np.int32) | mask)[:, None], out=leave)
    np.copyto(enter, pack(sky, np.int32(4 * n)), where=enter > leave)
    first = np.flatnonzero(np.diff(column, prepend=-1))
    best = np.minimum.reduceat(enter, first, axis=0)  # (T*W, H)
    return best & mask, (best & ~mask).view(np.float32), (ray_x, ray_y, ray_z)


def slab(lo, hi, origin, inverse):
    """When a ray (origin, 1 / direction) enters and leaves lo..hi along one axis; broadcasts."""
    a, b = (lo - origin) * inverse, (hi - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def render_views(scene, eyes, yaws, width, height, hfov_deg):
    """T pictures from cameras at one height: uint8 (T, H, W, 3). Nearest texel; no fade, no lamp:
    the light is in the colours already."""
    code, t, (ray_x, ray_y, ray_z) = cast(scene, eyes, yaws, width, height, hfov_deg)
    # code -> face: an eye beyond the middle of a box meets the upper face of the two (+x, not -x)
    codes = 4 * len(scene.roles) + 4
    upper = np.zeros((len(eyes), len(scene.roles) + 1, 4), np.int32)
    upper[:, :-1, :3] = eyes[:, None] > (scene.lo + scene.hi) / 2
    face = (2 * np.arange(codes, dtype=np.int32) + upper.reshape(-1, codes)).ravel()
    eye = np.repeat(eyes, width, axis=0).astype(np.float32)
    face = face[code + (np.arange(len(eye), dtype=np.int32) // width * codes)[:, None]]
    # in-face coordinates in metres, moved 256 m up so that truncating is flooring
    t = np.minimum(t, np.float32(1e3))
    x = t * ray_x[:, None] + (eye[:, :1] + 256)
    y = t * ray_y + (eye[:1, 1:2] + 256)
    z = t * ray_z[:, None] + (eye[:, 2:] + 256)
    axis = code & 3
    size = scene.textures.shape[1]
    column = (np.where(axis == 0, z, x) * size).astype(np.int32) & (size - 1)
    row = (np.where(axis == 1, z, y) * size).astype(np.int32) & (size - 1)
    grey = scene.textures.ravel()[(scene.face_texture[face] * size + row) * size + column]
    pixels = scene.shade[face * 256 + grey].reshape(len(eyes), width, height)
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 1)).view(np.uint8)
    return pixels.reshape(len(eyes), height, width, 4)[..., :3]


# ---------------------------------------------------------------- where a body may be

CONTACT_M = 5e-5  # a body stops this far from what it touches: rounding a pose never puts it inside
CORNER_M = 1e-4  # the graph's corners stand this far outside their rectangle
SNAP_M = 0.05  # a point may be this far inside an obstacle and still counts as beside it


class Nav(NamedTuple):
    """The floor plan for a body of one radius: rectangles a point may not enter, and their graph.
    Everything here lives in the plane: points are (x, z)."""

    lo: np.ndarray  # (N, 2)
    hi: np.ndarray  # (N, 2)
    corners: np.ndarray  # (M, 2)
    outward: np.ndarray  # (M, 2) of +-1: where the corner points
    edges: np.ndarray  # (M, M) metres; inf where no shortest path could use the line
    dist: np.ndarray  # (M, M) shortest way between corners


class Field(NamedTuple):
    """One goal, and how far it is: the stations are the goal itself and then every corner."""

    points: np.ndarray  # (1 + M, 2)
    cost: np.ndarray  # (1 + M,) metres from there to the goal, inf if there is no way


def crossings(lo, hi, start, step):
    """Where on its way start..start+step (..., 2) does a point enter each of N rectangles?
    -> enter (..., N): 0 at start, 1 at the end, inf if it does not get in; axis (..., N) bool: the
    side it comes through, False x, True z. The slab test: no step is so long that it could tunnel.
    """
    start, step = start[..., None], np.where(step == 0, 1e-30, step)[..., None]
    inverse = 1 / step
    x0, x1 = slab(lo[:, 0], hi[:, 0], start[..., 0, :], inverse[..., 0, :])
    z0, z1 = slab(lo[:, 1], hi[:, 1], start[..., 1, :], inverse[..., 1, :])
    enter, leave = np.maximum(x0, z0), np.minimum(x1, z1)
    hit = (enter < leave) & (leave > 0) & (enter < 1)
    return np.where(hit, np.maximum(enter, 0), np.inf), z0 > x0


def blocked(nav, start, end):
    """Does the segment pass through a rectangle's inside? (..., 2), (..., 2) -> (...) bool."""
    return np.isfinite(crossings(nav.lo, nav.hi, start, end - start)[0]).any(axis=-1)


def inside_any(lo, hi, points):
    """(..., 2) -> (...) bool: strictly inside one of the rectangles (N, 2), (N, 2)."""
    points = points[..., None, :]
    return ((points > lo) & (points < hi)).all(axis=-1).any(axis=-1)


@functools.lru_cache(maxsize=8)
def build_nav(path, modified, radius_m):
    """The visibility graph of a house. Only lines on which a tight string could lie are kept: at
    each end it grazes the corner, rather than running into it or away from it."""
    scene = load_scene(path, modified)
    solid = np.array([role in ("wall", "object") for role in scene.roles])
    solid &= (scene.lo[:, 1] < 1.5) & (scene.hi[:, 1] > 0.1)
    grow = radius_m - 1e-9  # a hair less, so that touching a side is not crossing it
    lo, hi = scene.lo[solid][:, [0, 2]] - grow, scene.hi[solid][:, [0, 2]] + grow
    # a rectangle within another adds nothing; of two equal ones the first stays
    within = ((lo[:, None] >= lo) & (hi[:, None] <= hi)).all(axis=-1)
    number = np.arange(len(lo))
    keep = ~(within & (~within.T | (number < number[:, None]))).any(axis=1)
    lo, hi = lo[keep], hi[keep]
    # corners of the union: both sides of the rectangle really end there
    outward = np.tile([(-1, -1), (-1, 1), (1, -1), (1, 1)], (len(lo), 1))  # (4N, 2)
    corners = np.where(outward > 0, np.repeat(hi, 4, axis=0), np.repeat(lo, 4, axis=0))
    around = [inside_any(lo, hi, corners + CORNER_M * outward * turn)
              for turn in ([1, 1], [1, -1], [-1, 1])]
    keep = ~np.any(around, axis=0)
    outward, corners = outward[keep], (corners + CORNER_M * outward)[keep]
    # which corners see each other
    m = len(corners)
    edges = np.full((m, m), np.inf)
    nav = Nav(lo, hi, corners, outward, edges, edges)
    grazing = grazes(corners - corners[:, None], outward)
    i, j = np.nonzero(np.triu(grazing & grazing.T, 1))
    for part in range(0, len(i), 512):
        a, b = i[part:part + 512], j[part:part + 512]
        clear = ~blocked(nav, corners[a], corners[b])
        a, b = a[clear], b[clear]
        edges[a, b] = edges[b, a] = np.hypot(*(corners[a] - corners[b]).T)
    dist = edges.copy()
    np.fill_diagonal(dist, 0)
    for k in range(m):  # Floyd-Warshall
        np.minimum(dist, dist[:, k:k + 1] + dist[k], out=dist)
    return nav._replace(dist=dist)


def grazes(step, outward):
    """Can a tight string arrive at (or leave) a corner along this step? It can where the step's two
    components do not both point into the corner's wall, nor both away from it; a step within a hair
    of an axis always may, for walls in line are in line only up to rounding. (..., M, 2), (M, 2)
    """
    x, z = step[..., 0] * outward[:, 0], step[..., 1] * outward[:, 1]
    return (x * z <= 0) | (np.minimum(abs(x), abs(z)) < 2 * CORNER_M)


def snap(nav, point):
    """The point itself if it is free, else the nearest free one within SNAP_M, else None. (x, z)"""
    point = np.asarray(point, np.float64)
    lo, hi = nav.lo - CONTACT_M / 2, nav.hi + CONTACT_M / 2
    if not inside_any(lo, hi, point):
        return point
    beside = np.tile(point, (4, len(lo), 1))
    beside[0, :, 0], beside[1, :, 0] = nav.lo[:, 0] - CONTACT_M, nav.hi[:, 0] + CONTACT_M
    beside[2, :, 1], beside[3, :, 1] = nav.lo[:, 1] - CONTACT_M, nav.hi[:, 1] + CONTACT_M
    beside = beside.reshape(-1, 2)
    beside = np.vstack([beside[~inside_any(lo, hi, beside)], [np.inf, np.inf]])
    away = np.hypot(*(beside - point).T)
    return beside[away.argmin()] if away.min() <= SNAP_M else None


def goal_field(nav, goal):
    """Field of one goal (x, z). After this a query at any point is one step of visibility."""
    goal = snap(nav, goal)
    if goal is None:
        return Field(np.zeros((1, 2)), np.array([np.inf]))
    sight = np.hypot(*(nav.corners - goal).T)
    sight[blocked(nav, nav.corners, goal[None])] = np.inf
    return Field(np.vstack([goal, nav.corners]),
                 np.append(0, (nav.dist + sight).min(axis=1, initial=np.inf)))


def distances(nav, field, points):
    """Geodesic metres from each point (Q, 2) to the field's goal: (Q,), inf if there is no way; and
    the station (Q,) to head for first, -1 if none. The few most promising stations are tried first:
    the first visible one in order of total length is the answer."""
    step = field.points - points[:, None]  # (Q, 1 + M, 2)
    total = np.hypot(step[..., 0], step[..., 1]) + field.cost
    if len(field.points) > 1:
        total[:, 1:][~grazes(step[:, 1:], nav.outward)] = np.inf
    result, station = np.full(len(points), np.inf), np.full(len(points), -1)
    todo = np.flatnonzero(np.isfinite(total).any(axis=1))
    for tries in (4, 24, total.shape[1]):
        if len(todo) == 0:
            break
        tries = min(tries, total.shape[1])
        best = np.argpartition(total[todo], tries - 1, axis=1)[:, :tries]
        length = np.take_along_axis(total[todo], best, axis=1)  # (todo, tries)
        length[blocked(nav, points[todo][:, None], field.points[best])] = np.inf
        winner = length.argmin(axis=1)[:, None]
        shortest = np.take_along_axis(length, winner, axis=1)[:, 0]
        found = np.isfinite(shortest)
        result[todo[found]] = shortest[found]
        station[todo[found]] = np.take_along_axis(best, winner, axis=1)[found, 0]
        todo = todo[~found]
    return result, station


def shortest_path(nav, field, start):
    """[(x, z) ...] from start to the field's goal, both included; [] if there is no way."""
    at = int(distances(nav, field, np.asarray(start)[None])[1][0])
    points = [] if at < 0 else [np.asarray(start), field.points[at]]
    direct = np.hypot(*(field.points - field.points[0]).T)
    while at > 0:
        if field.cost[at] - direct[at] < 1e-9:  # the straight line is free
            at = 0
        else:
            at = 1 + int((nav.edges[at - 1] + field.cost[1:]).argmin())
        points.append(field.points[at])
    return points


def moves(nav, start, steps, sliding):
    """Where a body at start (2,) or (Q, 2) ends up for each wished step (Q, 2); did it bump? (Q,)

    It goes up to the first thing it touches; with sliding, what is left of the step goes on along
    that side (the part across it is lost), and so on twice more, for corners.
    """
    left, bumped = np.array(steps, np.float64), np.zeros(len(steps), bool)
    position = np.array(np.broadcast_to(start, left.shape))
    reach = np.hypot(*left.T).max() + 1e-3
    close = ((nav.lo < position.max(axis=0) + reach)
             & (nav.hi > position.min(axis=0) - reach)).all(axis=1)
    if not close.any():
        return position + left, bumped
    # stop half a contact from the rectangle and step back as much: rounding cannot get one inside
    lo, hi = nav.lo[close] - CONTACT_M / 2, nav.hi[close] + CONTACT_M / 2
    rows = np.arange(len(steps))
    for _ in range(3 if sliding else 1):
        enter, axis = crossings(lo, hi, position, left)
        first = enter.argmin(axis=1)
        go = enter[rows, first]
        hit = np.flatnonzero(np.isfinite(go))
        bumped[hit] = True
        position += left * np.minimum(go, 1)[:, None]
        which, side = first[hit], axis[hit, first[hit]].astype(int)
        position[hit, side] = np.where(left[hit, side] > 0, lo[which, side] - CONTACT_M / 2,
                                       hi[which, side] + CONTACT_M / 2)
        left *= np.maximum(1 - go, 0)[:, None]
        left[hit, side] = 0
        if not left.any():
            break
    return position, bumped


# ---------------------------------------------------------------- the embedded simulator


class HouseSim:
    """A house of houses.py. reset() before anything else; positions are [x, y, z] on the floor."""

    def __init__(self, robot, scenes_dir, gpu=None):
        self.robot, self.scenes_dir = robot, scenes_dir
        self.turn = math.radians(robot["turn_deg"])
        self.scene = self.nav = None
        self.goals, self.collided = [], False

    def load(self, scene_id):
        """Enter that scene, at no particular place. SimError if it is missing or damaged."""
        path = os.path.join(self.scenes_dir, scene_id)
        try:
            modified = os.stat(path).st_mtime_ns
        except OSError:
            raise SimError(f"{path}: no such scene; make it with houses.py, or see --scenes"
                           ) from None
        self.scene = load_scene(path, modified)
        self.nav = build_nav(path, modified, self.robot["radius_m"])
        self.fields = {}

    def reset(self, episode):
        """Load the episode's scene and stand at its start. SimError if either cannot be done."""
        self.load(episode["scene_id"])
        self.goals = [goal["position"] for goal in episode.get("goals") or []]
        self.set_pose(episode["start_position"], episode["start_rotation"])

    def set_pose(self, position, rotation):
        """Stand there. SimError if that is inside a wall or an object."""
        x, y, z = map(float, position)
        spot = snap(self.nav, (x, z))
        if spot is None:
            raise SimError(f"{self.scene.path}: the pose {[x, y, z]} is inside an obstacle")
        self.spot, self.y, self.yaw, self.collided = spot, y, yaw_of(rotation), False

    def act(self, action):
        """1 forward, 2 left, 3 right; True if it bumped. Stopping is the caller's affair."""
        self.collided = False
        if action == FORWARD:
            step = self.robot["forward_m"] * heading(self.yaw)
            spots, bumped = moves(self.nav, self.spot, step[None], self.robot["sliding"])
            self.spot, self.collided = spots[0], bool(bumped[0])
        elif action in (LEFT, RIGHT):
            self.yaw = wrap(self.yaw + (self.turn if action == LEFT else -self.turn))
        else:
            raise ValueError(f"{action!r} is not a motion: 1 forward, 2 left, 3 right")
        return self.collided

    def pose(self):
        """[x, y, z, qx, qy, qz, qw]"""
        return [float(self.spot[0]), self.y, float(self.spot[1])] + rotation_of(self.yaw)

    def state(self):
        """Pose, last action's collision, metres to the nearest goal (inf: no way; None: no goal)"""
        pose = self.pose()
        return {"position": pose[:3], "rotation": pose[3:], "collided": self.collided,
                "distance_to_goal": self.geodesic(self.goals) if self.goals else None}

    def observe(self):
        """What it sees: uint8 (H, W, 3)."""
        return self.render([self.pose()])[0]

    def render(self, poses):
        """The views from T poses [x, y, z, qx, qy, qz, qw], without moving: uint8 (T, H, W, 3)."""
        robot, poses = self.robot, np.asarray(poses, np.float64)
        more = robot.get("supersample", 1)
        width, height = robot["width"], robot["height"]
        views = np.empty((len(poses), height, width, 3), np.uint8)
        at_once = max(1, 12000 // (width * height * more**2))  # what stays in the CPU's cache
        for a in range(0, len(poses), at_once):
            part = poses[a:a + at_once]
            if len(set(part[:, 1])) > 1:  # cameras of one height share their rows
                views[a:a + at_once] = np.concatenate([self.render([pose]) for pose in part])
                continue
            picture = render_views(self.scene, *self.cameras(part), width * more, height * more,
                                   robot["hfov_deg"])
            if more > 1:
                picture = picture.reshape(len(part), height, more, width, more, 3)
                picture = (picture.mean(axis=(2, 4), dtype=np.float32) + 0.5).astype(np.uint8)
            views[a:a + at_once] = picture
        return views

    def cameras(self, poses):
        """Poses (T, 7) -> eyes (T, 3), yaws (T,)."""
        eyes = poses[:, :3] + [0, self.robot["camera_height_m"], 0]
        return eyes, np.array([yaw_of(pose[3:]) for pose in poses])

    def objects(self, poses=None):
        """What is in sight: [{"name", "kind", "bearing_deg", "distance_m", "share"}], largest first

        kind "object": role object. kind "room": the floor or a wall of a room, but not of the one
        the camera is in. Bearing (left +) and distance (on the floor plan) are means over its
        pixels, share is their part of the picture. For poses (T, 7): a list of T such lists.
        """
        if poses is None:
            return self.objects([self.pose()])[0]
        scene, robot, poses = self.scene, self.robot, np.asarray(poses, np.float64)
        kinds = [{"object": "object", "floor": "room", "wall": "room"}.get(role)
                 if name else None for role, name in zip(scene.roles, scene.names)]
        things = sorted({(k, name) for k, name in zip(kinds, scene.names) if k})
        group = [things.index(t) if t[0] else len(things) for t in zip(kinds, scene.names)]
        group = np.array(group + [len(things)])  # the sky is nothing
        half = math.tan(math.radians(robot["hfov_deg"]) / 2)
        across = (1 - (np.arange(robot["width"]) + 0.5) * (2 / robot["width"])) * half
        bearing = np.degrees(np.arctan(across))[:, None]
        lists = []
        for pose in poses:
            eyes, yaws = self.cameras(pose[None])
            code, t, _ = cast(scene, eyes, yaws, robot["width"], robot["height"],
                              robot["hfov_deg"])
            which = group[code >> 2].ravel()
            pixels, degrees, metres = (
                np.bincount(which, np.broadcast_to(w, code.shape).ravel(), len(things) + 1)
                for w in (1.0, bearing, t * np.hypot(1, across)[:, None]))
            under = (scene.lo < eyes[0]) & (scene.hi > eyes[0])
            own = {name for role, name, (x, _, z) in zip(scene.roles, scene.names, under)
                   if role == "floor" and x and z}
            seen = [{"name": name, "kind": kind, "bearing_deg": float(degrees[k] / pixels[k]),
                     "distance_m": float(metres[k] / pixels[k]),
                     "share": float(pixels[k] / code.size)}
                    for k, (kind, name) in enumerate(things) if pixels[k] and name not in own]
            lists.append(sorted(seen, key=lambda thing: -thing["share"]))
        return lists

    def topdown(self, metres_per_pixel=0.02):
        """The plan of the house: uint8 (h, w, 3) and what it shows, [xmin, zmin, xmax, zmax].
        Rows go with z, so an agent of yaw 0 walks up. Walls are dark, doorways open."""
        scene = self.scene
        low = [i for i, role in enumerate(scene.roles) if role != "ceiling" and scene.lo[i, 1] < 1]
        corner = scene.lo[low][:, [0, 2]].min(axis=0) - 0.1
        ends = scene.hi[low][:, [0, 2]].max(axis=0) + 0.1
        width, height = np.ceil((ends - corner) / metres_per_pixel).astype(int)
        image = np.full((height, width, 3), 255, np.uint8)
        for i in sorted(low, key=lambda i: scene.hi[i, 1]):
            (x0, z0), (x1, z1) = ((np.round((p[[0, 2]] - corner) / metres_per_pixel)).astype(int)
                                  for p in (scene.lo[i], scene.hi[i]))
            top = scene.shade[(8 * i + 3) * 256 + 230:][:1].view(np.uint8)[:3]
            image[z0:z1, x0:x1] = 70 if scene.roles[i] == "wall" else top
        far = corner + np.array([width, height]) * metres_per_pixel
        return image, [float(v) for v in (*corner, *far)]

    def somewhere(self, rng):
        """A random place to stand, [x, y, z]."""
        floors = [i for i, role in enumerate(self.scene.roles) if role == "floor"]
        while True:
            i = rng.choice(floors)
            x, z = rng.uniform(self.scene.lo[i], self.scene.hi[i])[[0, 2]]
            if self.free([(x, z)])[0]:
                return [float(x), float(self.scene.hi[i, 1]), float(z)]

    def about(self):
        """Facts for `sim.py --check`."""
        return {"boxes": len(self.scene.roles), "textures": list(self.scene.textures.shape),
                "obstacles": len(self.nav.lo), "corners": len(self.nav.corners)}

    def field(self, goal):
        """The goal's distances, computed once per episode and goal."""
        key = (float(goal[0]), float(goal[2]))
        if key not in self.fields:
            self.fields[key] = goal_field(self.nav, key)
        return self.fields[key]

    def geodesic(self, goals):
        """Metres to walk to the nearest of the goals [[x, y, z], ...]; inf if there is no way."""
        here = self.spot[None]
        return min(float(distances(self.nav, self.field(goal), here)[0][0]) for goal in goals)

    def path(self, goal):
        """The shortest way [[x, y, z], ...], both ends included; [] if there is none."""
        points = shortest_path(self.nav, self.field(goal), self.spot)
        return [[float(x), self.y, float(z)] for x, z in points]

    def free(self, points):
        """Could a body stand at these (Q, 2) x, z? -> (Q,) bool"""
        return ~inside_any(self.nav.lo, self.nav.hi, np.asarray(points, np.float64))

    def expert_action(self, goal=None, stop_radius_m=None):
        """habitat's greedy follower: of all "turn k times, then step", which is worth most?

        Worth is the metres gained, less 0.0125 per turn, less 0.25 for a bump. It returns the first
        action of the best, STOP within the radius (default 3/4 of a step) or if nothing is gained.
        Left of two equals. It cannot dither: a turn taken makes the same choice worth more.
        SimError if there is no way to the goal (default: the episode's nearest).
        """
        goals = self.goals if goal is None else [goal]
        here, goal = min((self.geodesic([goal]), goal) for goal in goals)
        field, step = self.field(goal), self.robot["forward_m"]
        if math.isinf(here):
            raise SimError(f"{self.scene.path}: no way to the goal {list(goal)}")
        if here <= (0.75 * step if stop_radius_m is None else stop_radius_m):
            return STOP
        half = round(math.pi / self.turn)
        turns = np.array(sorted(range(1 - half, half + 1), key=lambda k: (abs(k), -k)))
        steps, effort = step * heading(self.yaw + turns * self.turn), 0.0125 * abs(turns)
        ends, bumped = moves(self.nav, self.spot, steps, self.robot["sliding"])
        worth = here - distances(self.nav, field, ends)[0] - effort - 0.25 * bumped
        if worth.max() <= 0 and here > step:
            # wedged, as at a door post a hair too wide: not habitat's rule any more, but the same
            # one looking two steps ahead, where a bump costs nothing
            ends, _ = moves(self.nav, ends.repeat(len(steps), axis=0), np.tile(
                steps, (len(steps), 1)), self.robot["sliding"])
            gain = here - distances(self.nav, field, ends)[0].reshape(len(steps), len(steps))
            worth = gain.max(axis=1) - effort
        best = int(worth.argmax())
        if worth[best] <= 0:
            return STOP
        return FORWARD if turns[best] == 0 else LEFT if turns[best] > 0 else RIGHT


# ---------------------------------------------------------------- habitat-sim behind the same verbs

HABITAT_MISSING = """habitat_sim does not import in {python} ({error}). Install it with
  conda create -n habitat -c conda-forge -c aihabitat python=3.9 habitat-sim=0.3.3 headless pillow
and pass --sim-python <that environment>/bin/python (`conda env list` shows where it is)"""


def visible_gpus():
    """How many CUDA indices there are, without CUDA's help."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([c for c in chosen.split(",") if c.strip() not in ("", "-1")])
    cards = "/proc/driver/nvidia/gpus"
    return len(os.listdir(cards)) if os.path.isdir(cards) else 0


class HabitatSim:
    """habitat-sim 0.3.x, driven directly: one agent, one colour camera, a picture only when asked.

    gpu: a CUDA index (default: 0 if there is one, else -1 = without CUDA). habitat ABORTS the whole
    process on an index that is not there, so the index is checked before.
    """

    def __init__(self, robot, scenes_dir, gpu=None):
        for log in ("MAGNUM_LOG", "HABITAT_SIM_LOG"):  # a hundred lines per simulator otherwise
            os.environ.setdefault(log, "quiet")
        try:
            import habitat_sim
            import magnum
        except ImportError as error:
            raise UserError(HABITAT_MISSING.format(python=sys.executable, error=error)) from None
        cards = visible_gpus()  # a build without CUDA renders on them, too: EGL knows the indices
        if gpu is not None and gpu >= cards:
            raise UserError(f"GPU {gpu} was asked for, but this machine shows {cards} to CUDA: "
                            "name another with --sim-gpus, or leave it out")
        self.gpu = gpu if gpu is not None else (0 if cards else -1)
        self.habitat, self.magnum, self.sim, self.file = habitat_sim, magnum, None, None
        self.robot, self.scenes_dir = robot, scenes_dir
        self.goals, self.collided = [], False

    def load(self, scene_id):
        path = os.path.join(self.scenes_dir, scene_id)
        if path == self.file:
            return
        if not os.path.exists(path):
            raise SimError(f"{path}: no such scene; see --scenes, and README on Matterport3D")
        habitat, robot = self.habitat, self.robot
        backend = habitat.SimulatorConfiguration()
        backend.scene_id, backend.gpu_device_id = path, self.gpu
        backend.allow_sliding, backend.enable_physics = robot["sliding"], False
        backend.load_semantic_mesh, backend.random_seed = False, 0
        camera = habitat.CameraSensorSpec()
        camera.uuid, camera.sensor_type = "rgb", habitat.SensorType.COLOR
        camera.resolution = [robot["height"], robot["width"]]
        camera.hfov = float(robot["hfov_deg"])
        camera.position = self.magnum.Vector3(0, robot["camera_height_m"], 0)  # a list: TypeError
        names = {FORWARD: ("move_forward", "forward_m"), LEFT: ("turn_left", "turn_deg"),
                 RIGHT: ("turn_right", "turn_deg")}
        agent = habitat.agent.AgentConfiguration(
            height=robot["height_m"], radius=robot["radius_m"], sensor_specifications=[camera],
            action_space={key: habitat.agent.ActionSpec(name, habitat.agent.ActuationSpec(
                amount=float(robot[amount]))) for key, (name, amount) in names.items()})
        config = habitat.Configuration(backend, [agent])
        self.file = None  # if habitat raises below, no scene is loaded
        try:
            if self.sim is None:
                self.sim = habitat.Simulator(config)
            else:
                self.sim.reconfigure(config)
        except (AssertionError, RuntimeError) as error:
            self.sim = None  # what a failure has left of it is not to be trusted
            raise SimError(f"{path}: habitat-sim cannot load this scene ({str(error).strip()}); "
                           "copy it again") from None
        self.agent, self.follower = self.sim.get_agent(0), None
        self.load_navmesh(path)
        self.file = path

    def load_navmesh(self, path):
        """The scene's own .navmesh if it was made for a body like this one, else a new one. This is
        what habitat-sim did when R2R-CE and RxR-CE were made (R2R's robot is the default body, for
        which the files are; RxR's is not), written out because later versions differ. SimError if
        a file is damaged, or missing where distances are to be those of the published mesh."""
        finder, body = self.sim.pathfinder, self.habitat.NavMeshSettings()
        body.set_defaults()
        ordinary = body.agent_radius, body.agent_height
        body.agent_radius, body.agent_height = self.robot["radius_m"], self.robot["height_m"]
        file, self.navmesh = os.path.splitext(path)[0] + ".navmesh", "the scene's file"
        wanted = np.allclose(ordinary, (body.agent_radius, body.agent_height), atol=1e-4)
        if os.path.exists(file):
            if not finder.load_nav_mesh(file):
                raise SimError(f"{file}: habitat-sim cannot load it; copy it again")
        elif wanted and f"{os.sep}mp3d{os.sep}" in path:
            raise SimError(f"{file} is missing, and a new one would give other distances than the "
                           "published: extract the whole of Matterport3D's `habitat` task")
        stored = finder.nav_mesh_settings if finder.is_loaded else None
        if stored is None or abs(stored.agent_radius - body.agent_radius) > 1e-4 or abs(
                stored.agent_height - body.agent_height) > 1e-4:
            self.sim.recompute_navmesh(finder, body)
            self.navmesh = "computed"
        if not finder.is_loaded:  # the agent would walk through walls, with only a warning
            raise SimError(f"{path}: it has no navmesh, and none could be computed")

    def reset(self, episode):
        self.load(episode["scene_id"])
        self.goals = [goal["position"] for goal in episode.get("goals") or []]
        self.set_pose(episode["start_position"], episode["start_rotation"])

    def set_pose(self, position, rotation):
        rotation = np.asarray(rotation, np.float64)
        state = self.habitat.AgentState()
        state.position = np.asarray(position, np.float32)
        state.rotation = rotation / np.linalg.norm(rotation)  # not of unit length: ValueError
        self.agent.set_state(state)
        self.collided = False
        if self.follower is not None:
            self.follower.reset()  # what it remembers of its last moves is not of this place

    def act(self, action):
        """agent.act rather than sim.step: that one would render, and asserts on STOP."""
        if action not in (FORWARD, LEFT, RIGHT):
            raise ValueError(f"{action!r} is not a motion: 1 forward, 2 left, 3 right")
        self.collided = bool(self.agent.act(action))
        return self.collided

    def pose(self):
        state = self.agent.get_state()
        q = state.rotation
        return [float(v) for v in (*state.position, q.x, q.y, q.z, q.w)]

    def state(self):
        pose = self.pose()
        return {"position": pose[:3], "rotation": pose[3:], "collided": self.collided,
                "distance_to_goal": self.geodesic(self.goals) if self.goals else None}

    def observe(self):
        return np.ascontiguousarray(self.sim.get_sensor_observations()["rgb"][..., :3])

    def render(self, poses):
        here, views = self.pose(), []
        for pose in poses:
            self.set_pose(pose[:3], pose[3:])
            views.append(self.observe())
        self.set_pose(here[:3], here[3:])
        return np.stack(views)

    def geodesic(self, goals):
        way = self.habitat.MultiGoalShortestPath()
        way.requested_start = self.agent.get_state().position
        way.requested_ends = [np.asarray(goal, np.float32) for goal in goals]
        found = self.sim.pathfinder.find_path(way)
        metres = float(way.geodesic_distance) if found else math.inf
        return metres if math.isfinite(metres) else math.inf

    def path(self, goal):
        way = self.habitat.ShortestPath()
        way.requested_start = self.agent.get_state().position
        way.requested_end = np.asarray(goal, np.float32)
        return [[float(v) for v in p] for p in way.points] if self.sim.pathfinder.find_path(
            way) else []

    def expert_action(self, goal=None, stop_radius_m=None):
        if goal is None:
            goal = min(self.goals, key=lambda goal: self.geodesic([goal]))
        radius = 0.75 * self.robot["forward_m"] if stop_radius_m is None else stop_radius_m
        if self.follower is None or self.follower.goal_radius != radius:
            self.follower = self.sim.make_greedy_follower(
                0, radius, stop_key=STOP, forward_key=FORWARD, left_key=LEFT, right_key=RIGHT)
        try:
            return int(self.follower.next_action_along(np.asarray(goal, np.float32)))
        except self.habitat.errors.GreedyFollowerError:
            if self.geodesic([goal]) <= self.robot["forward_m"]:
                return STOP  # nothing gets it any closer
            raise SimError(f"{self.file}: habitat's follower finds no way to {list(goal)}"
                           ) from None

    def objects(self, poses=None):
        raise SimError("habitat-sim does not tell the names of what it shows; only HouseSim does")

    def topdown(self, metres_per_pixel=0.02):
        finder = self.sim.pathfinder
        lo, hi = finder.get_bounds()
        plan = finder.get_topdown_view(metres_per_pixel, float(self.agent.get_state().position[1]))
        image = np.where(np.asarray(plan)[..., None], np.uint8(225), np.uint8(90)).repeat(3, axis=2)
        return image, [float(v) for v in (lo[0], lo[2], hi[0], hi[2])]

    def somewhere(self, rng):
        self.sim.pathfinder.seed(int(rng.integers(1 << 30)))
        return [float(v) for v in self.sim.pathfinder.get_random_navigable_point()]

    def about(self):
        finder = self.sim.pathfinder
        return {"habitat_sim": self.habitat.__version__, "gpu_device": self.sim.gpu_device,
                "cuda_build": self.habitat.cuda_enabled,
                "navmesh": self.navmesh, "navmesh_m2": round(float(finder.navigable_area), 1)}


# ---------------------------------------------------------------- what a worker can be asked


def do_reset(sim, episode, frame=True):
    """-> {"frame" (H, W, 3), "state"}"""
    sim.reset(episode)
    return dict({"frame": sim.observe()} if frame else {}, state=sim.state())


def do_step(sim, actions, frames=True):
    """Several motions (no STOP) -> {"frames" (n, H, W, 3): the view after each, "states": [n]};
    frames "last": the view after the last of them only, False: none."""
    states, poses = [], []
    for action in actions:
        sim.act(action)
        states.append(sim.state())
        poses.append(states[-1]["position"] + states[-1]["rotation"])
    seen = poses[-1:] if frames == "last" else poses
    return dict({"frames": sim.render(seen)} if frames else {}, states=states)


def do_load(sim, scene_id):
    """Enter a scene ahead of its walks -> {"cpu_s": what this simulator has used so far}"""
    sim.load(scene_id)
    return {"cpu_s": time.process_time()}


def do_try(sim, episode, poses, plans):
    """At each pose, play each of its plans (motions, no STOP) without a picture -> {"states": per
    pose and plan where it ends: the state, and "way", the shortest way on from there}"""
    sim.reset(episode)
    goal, ends = min(sim.goals, key=lambda goal: sim.geodesic([goal])), []
    for pose, some in zip(poses, plans):
        ends.append([])
        for plan in some:
            sim.set_pose(pose[:3], pose[3:])
            for action in plan:
                sim.act(action)
            ends[-1].append(dict(sim.state(), way=sim.path(goal)))
    return {"states": ends}


def do_check(sim, scene_id):
    """Stand somewhere, look around, walk somewhere else. -> facts for `sim.py --check`"""
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    sim.load(scene_id)
    loaded = time.perf_counter()
    places = [sim.somewhere(rng) for _ in range(40)]
    turned = [rotation_of(yaw) for yaw in rng.uniform(-math.pi, math.pi, len(places))]
    sim.set_pose(places[0], turned[0])
    sim.observe()  # the first picture may compile shaders
    ready = time.perf_counter()
    views = sim.render([p + q for p, q in zip(places, turned)])
    rendered = time.perf_counter()
    goal, metres, actions = places[0], 0.0, 0
    for start, yaw in zip(places, turned):  # the first may be on top of a table
        sim.set_pose(start, yaw)
        goal = max((p for p in places if sim.geodesic([p]) < math.inf), default=start,
                   key=lambda p: sim.geodesic([p]))
        metres = sim.geodesic([goal])
        if metres > 2:
            break
    while actions < 500:
        action = sim.expert_action(goal)
        if action == STOP:
            break
        sim.act(action)
        actions += 1
    walked = time.perf_counter()
    return dict(sim.about(), python=platform.python_version(), numpy=np.__version__, scene=scene_id,
                load_s=round(loaded - began, 2), first_picture_s=round(ready - loaded, 2),
                frames_per_s=round(len(views) / (rendered - ready)), size=list(views.shape[1:]),
                mean_grey=round(float(views.mean()), 1), goal_m=round(metres, 2), actions=actions,
                ended_m=round(sim.geodesic([goal]), 2),
                expert_ms=round(1e3 * (walked - rendered) / (actions + 1), 2))


def record(sim, episode, actions=None, noise=0.0, seed=0, horizon=6, max_steps=500, waypoints=None,
           objects=False):
    """Walk a whole episode; frame t is the view BEFORE actions[t].

    actions given: replay them. None: the expert walks along the waypoints (default: the nearest
    goal), and with probability `noise` per step stumbles: 1 to 4 random motions instead of its own.
    -> {"frames" (T, H, W, 3), "actions" [..., 0], "poses" [[x, y, z, qx, qy, qz, qw] ...],
        "labels": with noise, for each step what the expert would do next from that very place, as
                  `horizon` digits; "" inside a stumble, where nobody asked it. Without noise: None,
        "distance_to_goal": at the end, "objects": what each frame shows, or None}
    SimError if the expert does not stop within max_steps actions.
    """
    sim.reset(episode)
    if actions is None:
        goals = sim.goals
        way = waypoints or [min(goals, key=lambda goal: sim.geodesic([goal]))]
        actions, poses, labels = walk(sim, way, noise, seed, horizon, max_steps)
    else:
        actions, labels = list(actions), None
        actions += [] if actions[-1:] == [STOP] else [STOP]
        poses = [sim.pose()]
        for action in actions[:-1]:
            if action == STOP:
                raise SimError(f"episode {episode.get('episode_id')}: its actions stop midway")
            sim.act(action)
            poses.append(sim.pose())
    end = sim.state()["distance_to_goal"]
    return {"frames": sim.render(poses), "actions": actions, "poses": poses, "labels": labels,
            "distance_to_goal": end, "objects": sim.objects(poses) if objects else None}


def walk(sim, way, noise, seed, horizon, max_steps):
    """The expert's walk along the points of `way`, with stumbles. -> actions, poses, labels"""
    rng = np.random.default_rng(seed)

    def expert(leg):
        action = sim.expert_action(way[leg])
        while action == STOP and leg < len(way) - 1:  # there: on to the next point
            leg += 1
            action = sim.expert_action(way[leg])
        return action, leg

    def foresee(leg):
        here, ahead = sim.pose(), []
        while len(ahead) < horizon and STOP not in ahead:
            action, leg = expert(leg)
            ahead.append(action)
            if action != STOP:
                sim.act(action)
        sim.set_pose(here[:3], here[3:])
        return ahead

    actions, poses, stumble, leg = [], [], [], 0
    asked = {}  # step of a stumble's first motion -> the expert's plan there; None inside of it
    while STOP not in actions[-1:]:
        if len(actions) == max_steps:
            raise SimError(f"the expert did not stop within {max_steps} actions")
        poses.append(sim.pose())
        if stumble:
            asked[len(actions)] = None
            action = stumble.pop()
        else:
            action, leg = expert(leg)
            if action != STOP and rng.random() < noise:
                asked[len(actions)] = foresee(leg)
                stumble = rng.integers(FORWARD, RIGHT + 1, rng.integers(1, 5)).tolist()
                action = stumble.pop()
        actions.append(int(action))
        if action != STOP:
            sim.act(action)
    if not noise:
        return actions, poses, None
    # the expert is deterministic: up to the next stumble it did what it would have done, and there
    # it was asked
    labels, after = [], ""
    for t in reversed(range(len(actions))):
        plan = asked.get(t, actions[t:t + 1])
        after = "" if plan is None else ("".join(map(str, plan)) + after * (t not in asked)
                                         )[:horizon].ljust(horizon, str(STOP))
        labels.append(after)
    return actions, poses, labels[::-1]


VERBS = {
    "reset": do_reset,
    "step": do_step,
    "try": do_try,
    "load": do_load,
    "record": record,
    "check": do_check,
    "expert": lambda sim, goal=None: {"action": sim.expert_action(goal)},
    "distance": lambda sim, goals: {"distance": sim.geodesic(goals)},
    "path": lambda sim, goal: {"points": sim.path(goal)},
    "topdown": lambda sim: dict(zip(("image", "bounds"), sim.topdown())),
    "objects": lambda sim: {"objects": sim.objects()},
    "missing": lambda sim, scenes: {"missing": [
        s for s in scenes if not os.path.isfile(os.path.join(sim.scenes_dir, s))]},
}
SIMULATORS = {"house": HouseSim, "habitat": HabitatSim}


# ---------------------------------------------------------------- is this machine ready?


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    add = p.add_argument_group("files").add_argument
    add("--scenes", default="data/houses/scenes", help="folder that scene_id starts from")
    add("--scene", help="scene id for --check; default: the first .glb below --scenes")
    add = p.add_argument_group("what to do").add_argument
    add("--check", action="store_true", help="load a scene, render, walk, and say what was found")
    add("--serve", type=address, metavar="HOST:PORT",
        help="simulators for another machine; a PORT alone is this machine's only (127.0.0.1)")
    add("--worker", action="store_true", help="answer a SimPool on stdin; not for people")
    add = p.add_argument_group("simulator").add_argument
    add("--sim", choices=sorted(SIMULATORS), default="house", help="which simulator, for --check")
    add("--robot", choices=sorted(ROBOTS), default="houses", help="whose body and camera")
    add("--sim-python", metavar="PATH", help="interpreter to run it in; default: this one")
    add("--sim-gpus", type=gpu_list, metavar="0,1", help="CUDA indices for habitat; default: 0 if "
        "CUDA shows one, else none")
    add("--sim-hosts", type=addresses, metavar="HOST:PORT", help="check simulators served there")
    add("--sim-key", metavar="FILE", help="the key shared with them; default: $VLN_SIM_KEY")
    add = p.add_argument_group("machine").add_argument
    add("--sims", type=int, default=8, help="--serve: simulators at once, for all who come")
    add("--idle-timeout", type=float, default=3600, help="--serve: seconds between two requests")
    add("--stall-timeout", type=float, default=10,
        help="--serve: seconds for a handshake, and for the rest of a request that has begun")
    return p.parse_args(argv)


def main(args):
    if args.worker:
        return work(SIMULATORS, VERBS, args.scenes, args.idle_timeout, args.stall_timeout)
    if args.serve:
        return serve(args.serve, read_key(args.sim_key), args.sims, args.scenes, args.sim_python,
                     args.idle_timeout, args.stall_timeout)
    if not args.check:
        raise UserError("nothing to do; --check looks whether the simulator works on this machine")
    if args.sim_hosts and not args.scene:
        raise UserError("the scenes are on the other machine: name one of them with --scene")
    check(args, args.scene or first_scene(args.scenes))


# What habitat-sim says on stderr, usually while it takes the whole process down, and what helps
ADVICE = (
    ("windowless context|EGL", "OpenGL without a screen needs the driver's EGL: on a GPU machine "
     "the libraries of its driver (in a container NVIDIA_DRIVER_CAPABILITIES=all), on any other "
     "Mesa's (apt install libegl1 libgl1-mesa-dri), and habitat-sim's *headless* build"),
    ("CUDA|GPU", "name another GPU with --sim-gpus (CUDA_VISIBLE_DEVICES renumbers them)"))


def check(args, scene):
    """--check: let one simulator load, look and walk, and print what it found. UserError if
    something is wrong, with what to do about it."""
    os.environ.setdefault("MAGNUM_LOG", "default")  # it names the OpenGL device
    with overhearing() as said:
        try:
            with SimPool(args.sim, ROBOTS[args.robot], args.scenes, 1, args.sim_python, 300,
                         args.sim_gpus, args.sim_hosts, args.sim_key) as pool:
                pool.submit(0, "check", scene_id=scene)
                facts, wrong = pool.wait(0), None
        except (SimError, SimDied, UserError) as error:
            facts, wrong = None, str(error)
    if wrong:
        print(*said[0].splitlines()[-20:], sep="\n", file=sys.stderr)
        helps = [text for pattern, text in ADVICE if re.search(pattern, said[0])][:1]
        raise UserError(". What may help: ".join([wrong.rstrip("."), *helps]))
    device = re.search("Renderer: (.*)", said[0])
    for key, value in {**facts, **({"gl_device": device[1]} if device else {})}.items():
        print(f"{key:>16}  {value}")
    if facts["mean_grey"] < 2:
        raise UserError("the pictures are black. What may help: " + ADVICE[0][1])
    if facts.get("navmesh") == "computed":
        print("no .navmesh for this body lies beside the scene, so one was computed")
    if not facts["actions"]:
        raise UserError("no two places of this scene are 2 m apart: choose another --scene, or see "
                        "the navmesh")
    if not facts["ended_m"] <= max(ROBOTS[args.robot]["forward_m"], 0.25):
        raise UserError(f"the expert stopped {facts['ended_m']} m from its goal: see the navmesh")
    print("ready")


@contextlib.contextmanager
def overhearing():
    """-> a list that will hold what this process and its children have said on stderr."""
    said, stderr = [], os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            said.append(file.read())


def first_scene(scenes_dir):
    """The first .glb below a folder, as a scene id."""
    for folder, folders, files in os.walk(scenes_dir):
        folders.sort()
        scenes = sorted(name for name in files if name.endswith(".glb"))
        if scenes:
            return os.path.relpath(os.path.join(folder, scenes[0]), scenes_dir)
    raise UserError(f"--scenes {scenes_dir}: no .glb in there; `python houses.py` makes some")


if __name__ == "__main__":
    run(main, parse_args)
