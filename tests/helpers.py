"""What several test files share."""
import gzip
import json
import os

import numpy as np
import trimesh
from PIL import Image

from world.robots import ROBOTS


def write_gz(path, data):
    """JSON, gzipped, with NaN as RxR's files hold it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        json.dump(data, f)


# ---------------------------------------------------------------- a house of two rooms

ROBOT = dict(ROBOTS["houses"], width=24, height=18)
LIGHT = (0.75, 0.8, 0.55, 1.0, 0.9, 0.7)  # of the six faces, in the scene's order
UV = ((2, 1), (0, 2), (0, 1))  # texture axes of x-, y- and z-faces


def write_house(path, boxes):
    """boxes: (role, name, lo, hi, rgb). The format of houses.py, written the short way."""
    noise = np.random.default_rng(0).integers(150, 256, (32, 32), dtype=np.uint8)
    picture = Image.fromarray(np.stack([noise] * 3, axis=-1))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=picture, name="grey")
    scene = trimesh.Scene()
    for number, (role, name, lo, hi, rgb) in enumerate(boxes):
        points, faces, colours, uv = [], [], [], []
        for face in range(6):
            axis, upper = face // 2, face % 2
            b, c = [a for a in range(3) if a != axis]
            corners = np.array([[lo, hi][upper]] * 4, float)
            corners[:, b] = [lo[b], hi[b], hi[b], lo[b]]
            corners[:, c] = [lo[c], lo[c], hi[c], hi[c]]
            normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])[axis]
            order = [0, 1, 2] if (normal > 0) == bool(upper) else [0, 2, 1]
            faces += [[4 * face + k for k in order], [4 * face + k for k in
                      ([0, 2, 3] if order == [0, 1, 2] else [0, 3, 2])]]
            points.append(corners)
            colours += [[int(v * LIGHT[face]) for v in rgb] + [255]] * 4
            uv.append(corners[:, UV[axis]])
        points, uv = np.concatenate(points), np.concatenate(uv)
        points = points[:, [0, 2, 1]] * [1, -1, 1]  # Z-up
        mesh = trimesh.Trimesh(points, faces, process=False)
        mesh.visual = trimesh.visual.TextureVisuals(uv=uv * [1, -1], material=material)  # it flips
        mesh.visual.vertex_attributes["color"] = np.array(colours, np.uint8)
        label = f"{role}|{name}|{number}"
        scene.add_geometry(mesh, node_name=label, geom_name=label)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    scene.export(path)


def two_rooms():
    """8 x 4 m: the blue room (x < 0) and the pink room, a doorway 1 m wide, a sofa and a table."""
    walls = [((-4.1, -4), (-2.1, 2.1)), ((4, 4.1), (-2.1, 2.1)), ((-4.1, 4.1), (-2.1, -2)),
             ((-4.1, 4.1), (2, 2.1)), ((-0.08, 0), (-2, -0.5)), ((-0.08, 0), (0.5, 2)),
             ((0, 0.08), (-2, -0.5)), ((0, 0.08), (0.5, 2))]
    boxes = []
    for room, x0, x1, rgb in (("blue room", -4, 0, (90, 110, 220)), ("pink room", 0, 4, (230, 140,
                                                                                    170))):
        boxes += [("floor", room, (x0, -0.1, -2), (x1, 0, 2), rgb),
                  ("ceiling", room, (x0, 2.5, -2), (x1, 2.6, 2), (240, 240, 240))]
    for (x0, x1), (z0, z1) in walls:
        room = "blue room" if x0 + x1 < 0 else "pink room" if x1 - x0 < 1 else ""
        boxes.append(("wall", room, (x0, 0, z0), (x1, 2.5, z1), (200, 190, 160)))
    boxes += [("wall", "blue room", (-0.08, 2.1, -0.5), (0, 2.5, 0.5), (200, 190, 160)),
              ("wall", "pink room", (0, 2.1, -0.5), (0.08, 2.5, 0.5), (200, 190, 160)),
              ("object", "red sofa", (1.5, 0, -0.6), (2.3, 0.4, 0.9), (220, 30, 30)),
              ("object", "red sofa", (2.1, 0, -0.6), (2.3, 0.9, 0.9), (220, 30, 30)),
              ("object", "green table", (-2.6, 0, 0.6), (-1.6, 0.8, 1.3), (30, 160, 60)),
              ("decor", "", (-3.999, 1.2, -0.5), (-3.95, 1.8, 0.5), (250, 220, 40))]
    return boxes


SCENE_ID = "houses/two/two.glb"
EPISODE = {"episode_id": 7, "scene_id": SCENE_ID, "start_position": [-3, 0, -1],
           "start_rotation": [0, 0, 0, 1], "goals": [{"position": [3.2, 0, 0.2], "radius": 1.0}]}
