"""
The embedded simulator: pictures, motion, geodesics and the expert in the houses of houses.py.

It reads the boxes of a house back from its .glb and needs numpy only.

Picture: the camera only yaws, so all rays of a picture column share their x and z, and all rays of
    a row their y. A ray meets a box if three intervals overlap; the first two are tables over
    (column, box), the third over (row, box). What is left per pixel is one maximum and one
    comparison for each box that the column can see. A pitched camera would break this.
Motion: the body is a square of side 2 * radius; walls and objects grown by the radius become
    rectangles that a point may not enter. Obstacles are what reaches into heights of 0.1 to 1.5 m,
    whatever the robot's height_m.
Geodesics: shortest paths bend only at corners of those rectangles, so distances are exact: a
    visibility graph, built once per house.

Reads    SCENES/<episode["scene_id"]>, a .glb written by houses.py
Expect   on one 2.5 GHz core, a 70-box house: 3500 frames/s at 56x56, 1100 at 112x112, 370 at 224;
         a geodesic in 0.08 ms, an action of the expert in 0.3 ms, a house loaded in 10 ms
Imports  numpy and pillow, in Python 3.9 syntax: the simulator's interpreter loads this file
"""
from __future__ import annotations

import functools
import io
import json
import math
import os
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from reward import FORWARD, LEFT, RIGHT, STOP
from world import SimError
from world.robots import heading, rotation_of, wrap, yaw_of

# ---------------------------------------------------------------- the house, read from its .glb


class Scene(NamedTuple):
    """A house as N boxes. Faces are in the order -x, +x, -y, +y, -z, +z."""

    path: str
    lo: np.ndarray  # (N, 3) metres
    hi: np.ndarray  # (N, 3)
    roles: list  # N of floor, ceiling, wall, object, decor
    names: list  # N of "red sofa" (several boxes may share it), "blue room", ""
    # for the picture; row N is the sky, and a face is 8 * box + 2 * axis + upper
    table: tuple  # lo and hi again: each (3, N + 1) float32
    textures: np.ndarray  # (M, S, S) uint8, grey, one metre each; S is a power of two
    face_texture: np.ndarray  # (8(N + 1),) int32, index into textures
    shade: np.ndarray  # (8(N + 1) * 256,) uint32: the bytes R, G, B, 0 of a face under a grey
    walls: np.ndarray  # indices of the walls that reach from the floor to the ceiling
    screen: tuple  # (bottom, top): the heights that all of those walls fill
    screened: np.ndarray  # (N + 1,) bool: a box that cannot look out above or below such a wall


GLTF_TYPES = {5121: np.uint8, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
GLTF_WIDTH = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def read_glb(path: str) -> tuple:
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
def load_scene(path: str, modified: int) -> Scene:
    """Scene of a house written by houses.py. modified: its mtime, for the cache.

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
            if abs(shift - shift.round()).max() > 1e-3:
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


def shade_table(colours: np.ndarray) -> np.ndarray:
    """(N, 6, 3) uint8 -> (8(N + 1) * 256,) uint32: bytes of colour * grey / 255; black sky."""
    grey = np.arange(256, dtype=np.uint32)[:, None]
    table = np.zeros((len(colours) + 1, 8, 256, 4), np.uint8)
    table[:-1, :6, :, :3] = (colours[:, :, None] * grey + 127) // 255
    return table.view(np.uint32).ravel()


# ---------------------------------------------------------------- the picture


def camera_rays(yaws: np.ndarray, width: int, height: int, hfov_deg: float) -> tuple:
    """Rays through the pixel centres of T cameras, 1 m long along the view, as float32:
    x (T*W,), y (H,), z (T*W,). Left is +, up is +. No component is 0, for 1 / ray."""
    side = math.tan(math.radians(hfov_deg) / 2)
    across = (1 - (np.arange(width) + 0.5) * (2 / width)) * side
    ray_y = (1 - (np.arange(height) + 0.5) * (2 / height)) * side * height / width
    ray_xz = heading(yaws)[:, None] + heading(yaws + math.pi / 2)[:, None] * across[:, None]
    return tuple(np.where(abs(r) < 1e-7, 1e-7, r).astype(np.float32)
                 for r in (ray_xz[..., 0].ravel(), ray_y, ray_xz[..., 1].ravel()))


def cast(scene: Scene, origins: np.ndarray, rays: tuple) -> tuple[np.ndarray, np.ndarray]:
    """What each of the camera_rays() of T cameras at one height (origins: (T, 3)) meets first ->

    code (T*W, H) int32   4 * box + axis of the face; 4 * N where there is nothing. Columns first!
    t    (T*W, H) float32 metres along the viewing direction (a plane's distance, not the ray's)

    Distance and code are packed into one int32: the bits of a positive float sort as the float
    does, so the code replaces the lowest bits (depth keeps a relative precision of some 2^-14).
    A minimum over packed numbers is then the nearest box with its code; ties go to the earlier box.
    """
    n, (ray_x, ray_y, ray_z) = len(scene.roles), rays
    mask = np.int32((1 << (4 * n + 3).bit_length()) - 1)

    def pack(t, code):
        return (np.maximum(t, np.float32(0)).view(np.int32) & ~mask) | code

    origin_x, origin_z = (np.repeat(origins[:, a], len(ray_x) // len(origins)).astype(
        np.float32)[:, None] for a in (0, 2))
    origin_y = np.float32(origins[0, 1])

    # 1. seen from above, where do each column's rays enter and leave each box? (T*W, N + sky)
    (lo_x, lo_y, lo_z), (hi_x, hi_y, hi_z) = scene.table
    x0, x1 = slab(lo_x, hi_x, origin_x, 1 / ray_x[:, None])
    z0, z1 = slab(lo_z, hi_z, origin_z, 1 / ray_z[:, None])
    near, far = np.maximum(x0, z0), np.minimum(x1, z1)

    # 2. the pairs (column, box) that can be seen. Back faces are not drawn, so a box around the
    #    camera is not; behind a wall from floor to ceiling are only other rooms' floors, ceilings
    seen = (near < far) & (far > 0) & ((near > 0) | (lo_y > origin_y) | (hi_y < origin_y))
    if scene.screen[0] < origin_y < scene.screen[1]:
        walls = scene.walls
        screen = np.where(seen[:, walls], near[:, walls], np.float32(1e9)).min(axis=1, initial=1e9)
        seen &= (near <= screen[:, None]) | ~scene.screened
    seen[:, n] = ~seen[:, :n].any(axis=1)  # reduceat() below needs a pair in every column
    pairs = np.flatnonzero(seen)
    column, box = np.divmod(pairs, n + 1)

    # 3. the third interval, per (box, row), and the overlap of all three per (pair, row): a ray is
    #    in the box from the later of its entries to the earlier of its exits
    sky = np.float32(1e30)
    near[:, n], far[:, n] = sky, sky
    y0, y1 = slab(lo_y[:, None], hi_y[:, None], origin_y, 1 / ray_y)  # (N + sky, H)
    y0[n], y1[n] = 0, sky
    code_y = 4 * np.arange(n + 1, dtype=np.int32)[:, None] + 1
    code_xz = 4 * box.astype(np.int32) + 2 * (z0 > x0).ravel()[pairs]
    enter = pack(y0, code_y)[box]  # (pairs, H)
    np.maximum(enter, pack(near.ravel()[pairs], code_xz)[:, None], out=enter)
    leave = np.where(y1 > 0, y1.view(np.int32) | mask, np.int32(-1))[box]
    np.minimum(leave, (far.ravel()[pairs].view(np.int32) | mask)[:, None], out=leave)
    np.copyto(enter, pack(sky, np.int32(4 * n)), where=enter > leave)

    # 4. the nearest pair of each column is what the pixel shows
    first = np.flatnonzero(np.diff(column, prepend=-1))
    best = np.minimum.reduceat(enter, first, axis=0)  # (T*W, H)
    return best & mask, (best & ~mask).view(np.float32)


def slab(lo, hi, origin, inverse) -> tuple[np.ndarray, np.ndarray]:
    """Where a ray (origin, 1 / direction) enters and leaves lo..hi along one axis; broadcasts."""
    a, b = (lo - origin) * inverse, (hi - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def render_views(scene: Scene, origins: np.ndarray, yaws: np.ndarray, width: int, height: int,
                 hfov_deg: float) -> np.ndarray:
    """T pictures from cameras at one height: uint8 (T, H, W, 3), by the nearest texel. Light is
    part of the colours. origins (T, 3) metres, yaws (T,) radians."""
    ray_x, ray_y, ray_z = rays = camera_rays(yaws, width, height, hfov_deg)
    code, t = cast(scene, origins, rays)
    # code -> face: a camera beyond the middle of a box sees the upper of two faces (+x, not -x)
    codes = 4 * len(scene.roles) + 4
    upper = np.zeros((len(origins), len(scene.roles) + 1, 4), np.int32)
    upper[:, :-1, :3] = origins[:, None] > (scene.lo + scene.hi) / 2
    face = (2 * np.arange(codes, dtype=np.int32) + upper.reshape(-1, codes)).ravel()
    origin = np.repeat(origins, width, axis=0).astype(np.float32)
    face = face[code + (np.arange(len(origin), dtype=np.int32) // width * codes)[:, None]]
    # in-face coordinates in metres, moved 256 m up so that truncating is flooring
    t = np.minimum(t, np.float32(1e3))
    x = t * ray_x[:, None] + (origin[:, :1] + 256)
    y = t * ray_y + (origin[:1, 1:2] + 256)
    z = t * ray_z[:, None] + (origin[:, 2:] + 256)
    axis = code & 3
    size = scene.textures.shape[1]
    column = (np.where(axis == 0, z, x) * size).astype(np.int32) & (size - 1)
    row = (np.where(axis == 1, z, y) * size).astype(np.int32) & (size - 1)
    grey = scene.textures.ravel()[(scene.face_texture[face] * size + row) * size + column]
    pixels = scene.shade[face * 256 + grey].reshape(len(origins), width, height)
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 1)).view(np.uint8)
    return pixels.reshape(len(origins), height, width, 4)[..., :3]


# ---------------------------------------------------------------- where a body may be

CONTACT_M = 5e-5  # a body stops this far from what it touches: rounding a pose never puts it inside
CORNER_M = 1e-4  # the graph's corners stand this far outside their rectangle
SNAP_M = 0.05  # a point that is at most this far inside an obstacle is moved out of it


class VisibilityGraph(NamedTuple):
    """The floor plan for a body of one radius: rectangles a point may not enter, and their graph.
    Everything here lives in the plane: points are (x, z)."""

    lo: np.ndarray  # (N, 2)
    hi: np.ndarray  # (N, 2)
    corners: np.ndarray  # (M, 2)
    outward: np.ndarray  # (M, 2) of +-1: where the corner points
    edges: np.ndarray  # (M, M) metres; inf where no shortest path could use the line
    dist: np.ndarray  # (M, M) shortest way between corners


class GoalDistances(NamedTuple):
    """One goal, and how far it is: the waypoints are the goal itself and then every corner."""

    points: np.ndarray  # (1 + M, 2)
    cost: np.ndarray  # (1 + M,) metres from there to the goal, inf if there is no way


def crossings(lo, hi, start, step):
    """Where on the segment start..start+step (..., 2) does a point enter each of N rectangles?
    -> enter (..., N): 0 at start, 1 at the end, inf if it does not enter; axis (..., N) bool: the
    side, False x, True z. This is the slab test, so no step is too long for it."""
    start, step = start[..., None], np.where(step == 0, 1e-30, step)[..., None]
    inverse = 1 / step
    x0, x1 = slab(lo[:, 0], hi[:, 0], start[..., 0, :], inverse[..., 0, :])
    z0, z1 = slab(lo[:, 1], hi[:, 1], start[..., 1, :], inverse[..., 1, :])
    enter, leave = np.maximum(x0, z0), np.minimum(x1, z1)
    hit = (enter < leave) & (leave > 0) & (enter < 1)
    return np.where(hit, np.maximum(enter, 0), np.inf), z0 > x0


def blocked(graph: VisibilityGraph, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Does the segment pass through a rectangle's inside? (..., 2), (..., 2) -> (...) bool."""
    return np.isfinite(crossings(graph.lo, graph.hi, start, end - start)[0]).any(axis=-1)


def inside_any(lo: np.ndarray, hi: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...) bool: strictly inside one of the rectangles (N, 2), (N, 2)."""
    points = points[..., None, :]
    return ((points > lo) & (points < hi)).all(axis=-1).any(axis=-1)


@functools.lru_cache(maxsize=8)
def build_visibility_graph(path: str, modified: int, radius_m: float) -> VisibilityGraph:
    """The visibility graph of a house for a body of one radius. modified: the file's mtime.

    A shortest path is a tight string around corners. So an edge is kept only if the string could
    lie on it at both ends (is_taut), which leaves far fewer segments to test against obstacles.
    """
    scene = load_scene(path, modified)
    solid = np.array([role in ("wall", "object") for role in scene.roles])
    solid &= (scene.lo[:, 1] < 1.5) & (scene.hi[:, 1] > 0.1)
    grow = radius_m - 1e-9  # slightly less, so that touching a side is not crossing it
    lo, hi = scene.lo[solid][:, [0, 2]] - grow, scene.hi[solid][:, [0, 2]] + grow
    # a rectangle within another adds nothing; of two equal ones the first stays
    within = ((lo[:, None] >= lo) & (hi[:, None] <= hi)).all(axis=-1)
    number = np.arange(len(lo))
    keep = ~(within & (~within.T | (number < number[:, None]))).any(axis=1)
    lo, hi = lo[keep], hi[keep]
    # corners of the union: none of the three points just outside a corner lies in a rectangle
    outward = np.tile([(-1, -1), (-1, 1), (1, -1), (1, 1)], (len(lo), 1))  # (4N, 2)
    corners = np.where(outward > 0, np.repeat(hi, 4, axis=0), np.repeat(lo, 4, axis=0))
    around = [inside_any(lo, hi, corners + CORNER_M * outward * turn)
              for turn in ([1, 1], [1, -1], [-1, 1])]
    keep = ~np.any(around, axis=0)
    outward, corners = outward[keep], (corners + CORNER_M * outward)[keep]
    # edges: pairs of corners that see each other, 512 at a time to bound the memory
    m = len(corners)
    edges = np.full((m, m), np.inf)
    graph = VisibilityGraph(lo, hi, corners, outward, edges, edges)
    taut = is_taut(corners - corners[:, None], outward)
    i, j = np.nonzero(np.triu(taut & taut.T, 1))
    for part in range(0, len(i), 512):
        a, b = i[part:part + 512], j[part:part + 512]
        clear = ~blocked(graph, corners[a], corners[b])
        a, b = a[clear], b[clear]
        edges[a, b] = edges[b, a] = np.hypot(*(corners[a] - corners[b]).T)
    # all shortest paths between corners: Floyd-Warshall
    dist = edges.copy()
    np.fill_diagonal(dist, 0)
    for k in range(m):
        np.minimum(dist, dist[:, k:k + 1] + dist[k], out=dist)
    return graph._replace(dist=dist)


def is_taut(step: np.ndarray, outward: np.ndarray) -> np.ndarray:
    """Can a tight string reach (or leave) a corner along this step? Not if both components of the
    step point into the corner's obstacle, or both away from it: there the string would not bend. A
    step along an axis always can, since walls in line are so only up to rounding. (..., M, 2),
    (M, 2) -> (..., M)"""
    x, z = step[..., 0] * outward[:, 0], step[..., 1] * outward[:, 1]
    return (x * z <= 0) | (np.minimum(abs(x), abs(z)) < 2 * CORNER_M)


def snap(graph: VisibilityGraph, point) -> np.ndarray | None:
    """The point itself if it is free, else the nearest free one within SNAP_M, else None. (x, z)"""
    point = np.asarray(point, np.float64)
    lo, hi = graph.lo - CONTACT_M / 2, graph.hi + CONTACT_M / 2
    if not inside_any(lo, hi, point):
        return point
    outside = np.tile(point, (4, len(lo), 1))  # moved to each side of each rectangle
    outside[0, :, 0], outside[1, :, 0] = graph.lo[:, 0] - CONTACT_M, graph.hi[:, 0] + CONTACT_M
    outside[2, :, 1], outside[3, :, 1] = graph.lo[:, 1] - CONTACT_M, graph.hi[:, 1] + CONTACT_M
    outside = outside.reshape(-1, 2)
    outside = np.vstack([outside[~inside_any(lo, hi, outside)], [np.inf, np.inf]])
    metres = np.hypot(*(outside - point).T)
    return outside[metres.argmin()] if metres.min() <= SNAP_M else None


def goal_distances(graph: VisibilityGraph, goal) -> GoalDistances:
    """GoalDistances of one goal (x, z): the way from each corner is one to a corner that sees the
    goal, then straight. A query at any point then needs one more segment: see distances()."""
    goal = snap(graph, goal)
    if goal is None:
        return GoalDistances(np.zeros((1, 2)), np.array([np.inf]))
    straight = np.hypot(*(graph.corners - goal).T)
    straight[blocked(graph, graph.corners, goal[None])] = np.inf
    return GoalDistances(np.vstack([goal, graph.corners]),
                         np.append(0, (graph.dist + straight).min(axis=1, initial=np.inf)))


def distances(graph: VisibilityGraph, to_goal: GoalDistances,
              points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Geodesic metres from each point (Q, 2) to the goal: (Q,), inf if there is no path; and the
    waypoint (Q,) to go to first, an index into to_goal.points, -1 if none.

    A path goes straight to a visible waypoint and then on at its known cost. The shortest is that
    by the first visible waypoint in order of total length, so most queries are answered by testing
    the 4 shortest totals for visibility; only those without a visible one go on to 24, then to all.
    """
    step = to_goal.points - points[:, None]  # (Q, 1 + M, 2)
    total = np.hypot(step[..., 0], step[..., 1]) + to_goal.cost  # lower bounds, (Q, 1 + M)
    if len(to_goal.points) > 1:
        total[:, 1:][~is_taut(step[:, 1:], graph.outward)] = np.inf
    result, waypoint = np.full(len(points), np.inf), np.full(len(points), -1)
    todo = np.flatnonzero(np.isfinite(total).any(axis=1))
    for tries in (4, 24, total.shape[1]):
        if len(todo) == 0:
            break
        tries = min(tries, total.shape[1])
        best = np.argpartition(total[todo], tries - 1, axis=1)[:, :tries]
        length = np.take_along_axis(total[todo], best, axis=1)  # (todo, tries)
        length[blocked(graph, points[todo][:, None], to_goal.points[best])] = np.inf
        winner = length.argmin(axis=1)[:, None]
        shortest = np.take_along_axis(length, winner, axis=1)[:, 0]
        found = np.isfinite(shortest)
        result[todo[found]] = shortest[found]
        waypoint[todo[found]] = np.take_along_axis(best, winner, axis=1)[found, 0]
        todo = todo[~found]
    return result, waypoint


def shortest_path(graph: VisibilityGraph, to_goal: GoalDistances, start) -> list:
    """[(x, z) ...] from start to the goal, both included; [] if there is no path."""
    at = int(distances(graph, to_goal, np.asarray(start)[None])[1][0])
    points = [] if at < 0 else [np.asarray(start), to_goal.points[at]]
    direct = np.hypot(*(to_goal.points - to_goal.points[0]).T)
    while at > 0:
        if to_goal.cost[at] - direct[at] < 1e-9:  # the straight line is free
            at = 0
        else:
            at = 1 + int((graph.edges[at - 1] + to_goal.cost[1:]).argmin())
        points.append(to_goal.points[at])
    return points


def moves(graph: VisibilityGraph, start: np.ndarray, steps: np.ndarray,
          sliding: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where a body at start (2,) or (Q, 2) ends after each step (Q, 2), and did it collide? (Q,)

    It stops at the first obstacle. With sliding, the rest of the step is projected onto that side
    and goes on along it, at most twice, for corners.
    """
    left, bumped = np.array(steps, np.float64), np.zeros(len(steps), bool)
    position = np.array(np.broadcast_to(start, left.shape))
    reach = np.hypot(*left.T).max() + 1e-3
    close = ((graph.lo < position.max(axis=0) + reach)
             & (graph.hi > position.min(axis=0) - reach)).all(axis=1)
    if not close.any():
        return position + left, bumped
    # stop half a contact from the rectangle and step back as much: rounding cannot get one inside
    lo, hi = graph.lo[close] - CONTACT_M / 2, graph.hi[close] + CONTACT_M / 2
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

    version = "house_sim 2"  # counted up when the same actions lead elsewhere or look different

    def __init__(self, robot: dict, scenes_dir: str, gpu: int | None = None):
        self.robot, self.scenes_dir = robot, scenes_dir
        self.turn = math.radians(robot["turn_deg"])
        self.scene = self.graph = None
        self.goals, self.collided, self.half_turn = [], False, 1

    def load(self, scene_id: str) -> None:
        """Enter that scene, at no particular place. SimError if it is missing or damaged."""
        path = os.path.join(self.scenes_dir, scene_id)
        try:
            modified = os.stat(path).st_mtime_ns
        except OSError:
            raise SimError(f"{path}: no such scene; make it with `python -m world.houses`, or see "
                           "--scenes") from None
        self.scene = load_scene(path, modified)
        self.graph = build_visibility_graph(path, modified, self.robot["radius_m"])
        self.fields = {}

    def reset(self, episode: dict) -> None:
        """Load the episode's scene and stand at its start. SimError if either cannot be done, or if
        a goal is not on the floor."""
        self.load(episode["scene_id"])
        self.goals = [goal["position"] for goal in episode.get("goals") or []]
        off = [p for p in (episode["start_position"], *self.goals) if abs(p[1]) > 0.5]
        if off:                                             # its axes are in another order
            raise SimError(f"{self.scene.path}: {off[0]} is not on the floor, where y is 0")
        self.set_pose(episode["start_position"], episode["start_rotation"])
        # A goal straight behind is as near by left turns as by right ones. "Always left" would be a
        # rule that no picture shows, so a hash of the start decides.
        start = repr([*map(float, episode["start_position"]), round(self.yaw, 6)])
        self.half_turn = 1 if zlib.crc32(start.encode()) % 2 else -1

    def set_pose(self, position, rotation) -> None:
        """Move there. SimError if that is inside a wall or an object."""
        x, y, z = map(float, position)
        spot = snap(self.graph, (x, z))
        if spot is None:
            raise SimError(f"{self.scene.path}: the pose {[x, y, z]} is inside an obstacle")
        self.spot, self.y, self.yaw, self.collided = spot, y, yaw_of(rotation), False

    def act(self, action: int) -> bool:
        """1 forward, 2 left, 3 right -> did it collide? There is no action for STOP."""
        self.collided = False
        if action == FORWARD:
            step = self.robot["forward_m"] * heading(self.yaw)
            spots, bumped = moves(self.graph, self.spot, step[None], self.robot["sliding"])
            self.spot, self.collided = spots[0], bool(bumped[0])
        elif action in (LEFT, RIGHT):
            self.yaw = wrap(self.yaw + (self.turn if action == LEFT else -self.turn))
        else:
            raise ValueError(f"{action!r} is not a motion: 1 forward, 2 left, 3 right")
        return self.collided

    def pose(self) -> list[float]:
        """[x, y, z, qx, qy, qz, qw]"""
        return [float(self.spot[0]), self.y, float(self.spot[1])] + rotation_of(self.yaw)

    def state(self) -> dict:
        """Pose, collision of the last action, metres to the nearest goal (inf: no path; None: no
        goal)."""
        pose = self.pose()
        return {"position": pose[:3], "rotation": pose[3:], "collided": self.collided,
                "distance_to_goal": self.geodesic(self.goals) if self.goals else None}

    def observe(self) -> np.ndarray:
        """The view from here: uint8 (H, W, 3)."""
        return self.render([self.pose()])[0]

    def render(self, poses) -> np.ndarray:
        """The views from T poses [x, y, z, qx, qy, qz, qw], without moving: uint8 (T, H, W, 3)."""
        poses = np.asarray(poses, np.float64)
        width, height = self.robot["width"], self.robot["height"]
        views = np.empty((len(poses), height, width, 3), np.uint8)
        at_once = max(1, 12000 // (width * height))  # what stays in the CPU's cache
        for a in range(0, len(poses), at_once):
            part = poses[a:a + at_once]
            if len(set(part[:, 1])) > 1:  # render_views() takes cameras of one height
                views[a:a + at_once] = np.concatenate([self.render([pose]) for pose in part])
                continue
            origins = part[:, :3] + [0, self.robot["camera_height_m"], 0]
            yaws = np.array([yaw_of(pose[3:]) for pose in part])
            views[a:a + at_once] = render_views(self.scene, origins, yaws, width, height,
                                                self.robot["hfov_deg"])
        return views

    def topdown(self) -> tuple[np.ndarray, list[float]]:
        """The plan of the house: uint8 (h, w, 3), its bounds in metres [xmin, zmin, xmax, zmax].
        Rows go with z, so an agent of yaw 0 walks up. Walls are dark, doorways open."""
        scene, metres_per_pixel = self.scene, 0.02
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

    def random_point(self, rng) -> list[float]:
        """A random free position, [x, y, z]."""
        floors = [i for i, role in enumerate(self.scene.roles) if role == "floor"]
        while True:
            i = rng.choice(floors)
            x, z = rng.uniform(self.scene.lo[i], self.scene.hi[i])[[0, 2]]
            if self.free([(x, z)])[0]:
                return [float(x), float(self.scene.hi[i, 1]), float(z)]

    def info(self) -> dict:
        """Facts for world/check.py."""
        return {"boxes": len(self.scene.roles), "textures": list(self.scene.textures.shape),
                "obstacles": len(self.graph.lo), "corners": len(self.graph.corners)}

    def distances_to(self, goal: list[float]) -> GoalDistances:
        """The goal's distances, computed once per episode and goal."""
        key = (float(goal[0]), float(goal[2]))
        if key not in self.fields:
            self.fields[key] = goal_distances(self.graph, key)
        return self.fields[key]

    def geodesic(self, goals: list) -> float:
        """Metres to walk to the nearest of the goals [[x, y, z], ...]; inf if there is no way."""
        def metres(goal):
            return distances(self.graph, self.distances_to(goal), self.spot[None])[0][0]
        return min(float(metres(goal)) for goal in goals)

    def path(self, goal: list[float]) -> list:
        """The shortest way [[x, y, z], ...], both ends included; [] if there is none."""
        points = shortest_path(self.graph, self.distances_to(goal), self.spot)
        return [[float(x), self.y, float(z)] for x, z in points]

    def free(self, points) -> np.ndarray:
        """Could a body stand at these (Q, 2) x, z? -> (Q,) bool"""
        return ~inside_any(self.graph.lo, self.graph.hi, np.asarray(points, np.float64))

    def expert_action(self, goal: list[float] | None = None) -> int:
        """habitat's greedy follower: the first action of the best "turn k times, then step".

        The score is the metres gained, less 0.0125 per turn, less 0.25 for a collision. STOP within
        3/4 of a step, or if no score is above 0. Of two equal ones left is taken; for a half turn
        see reset(). It cannot oscillate: a turn that was taken makes the same choice score more.
        SimError if there is no path to the goal (default: the episode's nearest).
        """
        goals = self.goals if goal is None else [goal]
        here, goal = min((self.geodesic([goal]), goal) for goal in goals)
        to_goal, step = self.distances_to(goal), self.robot["forward_m"]
        if math.isinf(here):
            raise SimError(f"{self.scene.path}: no way to the goal {list(goal)}")
        if here <= 0.75 * step:
            return STOP
        half = round(math.pi / self.turn)
        turns = np.array(sorted(range(1 - half, half), key=lambda k: (abs(k), -k))
                         + [half * self.half_turn])
        steps, effort = step * heading(self.yaw + turns * self.turn), 0.0125 * abs(turns)
        ends, bumped = moves(self.graph, self.spot, steps, self.robot["sliding"])
        score = here - distances(self.graph, to_goal, ends)[0] - effort - 0.25 * bumped
        if score.max() <= 0 and here > step:
            # stuck, as at a door frame: look two steps ahead, with collisions at no cost (this is
            # not in habitat's rule)
            ends, _ = moves(self.graph, ends.repeat(len(steps), axis=0), np.tile(
                steps, (len(steps), 1)), self.robot["sliding"])
            gain = here - distances(self.graph, to_goal, ends)[0].reshape(len(steps), len(steps))
            score = gain.max(axis=1) - effort
        best = int(score.argmax())
        if score[best] <= 0:
            return STOP
        return FORWARD if turns[best] == 0 else LEFT if turns[best] > 0 else RIGHT
