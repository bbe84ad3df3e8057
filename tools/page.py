"""
A page to look at a results folder: the protocol card, the table, the episodes, and a player.

One static folder that opens from the disk, without a server and without requests to one. For the
episodes that `evaluate.py --page N` recorded, a player shows map, frame, instruction and the plan
in force, step by step. Two folders of the same episodes are shown side by side, with the paired
differences of tools/report.py.

Run it   python evaluate.py --split val_unseen --page 100
         python -m tools.page results/sft_val_unseen results/grpo_val_unseen --out page
Reads    run.json, results.json, protocol.json, episodes*.jsonl, walks/ (save_walk)
Writes   <results folder>/page/index.html, or --out; data/ beside it
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cli import DefaultsFormatter, UserError, read_json, run_cli, write_text
from evaluate import AT_RADIUS, TITLES
from tools.pictures import crop_map, planned_path
from tools.report import Results, bracket, check_same, paired_difference, read_results
from world.protocol import format_card

if TYPE_CHECKING:
    from evaluate import EpisodeState

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
MAP_PIXELS, FRAME_PIXELS, COLUMNS = 360, 192, 10       # a wider frame is shrunk to FRAME_PIXELS
WEBP_PIXELS = 16383                                    # the format's limit of width and height


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.page", formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="one results folder, or two")
    p.add_argument("--out", metavar="FOLDER", help="default: page in the first results folder")
    return p.parse_args(argv)


# ---------------------------------------------------------------- what a run records


def save_walk(walk: EpisodeState, reference: list | None, robot: dict, folder: str):
    """Write <folder>/<episode_id>.json, what the player needs beside the walk's row, and two
    pictures: _map.webp, and _frames.webp, which holds the frames of all poses, COLUMNS or
    more to a row."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, walk.name)
    image, corner = crop_map(walk, reference, MAP_PIXELS)
    image.save(path + "_map.webp", quality=70)
    height, width = walk.video_frames[0].shape[:2]
    scale = min(1.0, FRAME_PIXELS / width)
    width, height = round(width * scale), round(height * scale)
    n = len(walk.video_frames)
    columns = max(COLUMNS, math.ceil(n / (WEBP_PIXELS // height)))      # of a long walk: more
    sheet = Image.new("RGB", (width * min(columns, n), height * math.ceil(n / columns)))
    for t, frame in enumerate(walk.video_frames):
        small = Image.fromarray(np.asarray(frame)).resize((width, height))
        sheet.paste(small, (t % columns * width, t // columns * height))
    sheet.save(path + "_frames.webp", quality=50)
    goals = [goal["position"] for goal in walk.episode["goals"][:1]]
    decisions = [[d.t, d.text, d.plan, flat(planned_path(walk.states[d.t], d.plan, robot))]
                 for d in walk.decisions]
    distances = [state["distance_to_goal"] for state in walk.states]
    content = {"instruction": walk.instruction, "reference": flat(reference or ()),
               "goals": flat(goals), "decisions": decisions, "map": corner,
               "frame": [width, height, columns],
               "distances": [round(d, 2) if d is not None and math.isfinite(d) else None
                             for d in distances]}
    write_text(path + ".json", json.dumps(content, allow_nan=False))


def flat(points) -> list[list[float]]:
    """[[x, y, z], ..] -> [[x, z], ..], to the centimetre."""
    return [[round(float(x), 2), round(float(z), 2)] for x, _, z in points]


# ---------------------------------------------------------------- the page


def script_json(content) -> str:
    """JSON that may stand in a <script>: `</script>` in a text must not end it."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def copy_walks(run: Results, key: str, out: str) -> set[str]:
    """Write data/<key>/ of the page: a script and two pictures per recorded walk -> their names."""
    source, target = os.path.join(run.folder, "walks"), os.path.join(out, "data", key)
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    names = {name for name in run.rows if os.path.exists(os.path.join(source, name + ".json"))}
    for name in names:
        walk, row = read_json(os.path.join(source, name + ".json")), run.rows[name]
        walk |= {"poses": [[round(x, 2), round(z, 2), round(yaw, 3)]
                           for x, _, z, yaw in row["poses"]], "actions": row["actions"]}
        write_text(os.path.join(target, name + ".js"),
                   f"walk({script_json(key)},{script_json(name)},{script_json(walk)})\n")
        for picture in ("_map.webp", "_frames.webp"):
            shutil.copyfile(os.path.join(source, name + picture),
                            os.path.join(target, name + picture))
    return names


ROW_KEYS = ("end", "success", "distance_to_goal", "spl", "ndtw", "steps")


def run_data(run: Results, names: set[str]) -> dict:
    """What index.html holds of one run. rows: [episode_id, scene, *ROW_KEYS, recorded?]"""
    results = read_json(os.path.join(run.folder, "results.json"))
    card = read_json(os.path.join(run.folder, "protocol.json"))
    rows = [[name, str(row["scene_id"]).split("/")[-1].rsplit(".", 1)[0],
             *(row.get(key) for key in ROW_KEYS), name in names] for name, row in run.rows.items()]
    return {"name": run.folder, "card": format_card(card), "rows": rows,
            "radius": run.run["radius_m"], "metrics": results["metrics"]}


def metric_rows(runs: list[Results], data: list[dict]) -> list[list[str]]:
    """The table: [metric, a cell per run, the paired difference if there are two runs]"""
    rows = []
    for name, title in TITLES.items():
        cells = []
        for one in data:
            found = one["metrics"][name]
            ci = found["ci"] and " [{:.3f}, {:.3f}]".format(*found["ci"])
            cells.append("-" if found["mean"] is None else f"{found['mean']:.3f}{ci or ''}")
        if len(runs) == 2:
            found = paired_difference(runs[0].rows, runs[1].rows, name)
            cells.append(f"{found['difference']:+.3f} {bracket(found['ci'])}"
                         if found["episodes"] else "-")
        radius = f" @ {data[0]['radius']:g} m" if name in AT_RADIUS else ""
        rows.append([title + radius, *cells])
    return rows


def write_page(folders: list[str], out: str | None = None) -> str:
    """Write the page of one results folder, or of two -> the path of index.html."""
    if len(folders) > 2:
        raise UserError("a page shows one results folder, or two side by side: name at most two")
    runs = [read_results(folder) for folder in folders]
    for run in runs:
        lacks = [name for name in ("results.json", "protocol.json")
                 if not os.path.exists(os.path.join(run.folder, name))]
        if lacks:
            raise UserError(f"{run.folder} has no {lacks[0]}: run its evaluate.py command to its "
                            "end first")
    if len(runs) == 2:
        check_same(*runs, keys=("data", "split"))
    out = out or os.path.join(folders[0], "page")
    data = [run_data(run, copy_walks(run, key, out)) for run, key in zip(runs, "ab")]
    table = metric_rows(runs, data)
    for one in data:
        del one["metrics"]
    with open(TEMPLATE, encoding="utf-8") as file:
        text = file.read()
    path = os.path.join(out, "index.html")
    write_text(path, text.replace("/*DATA*/", f"const RUNS = {script_json(data)}, "
                                  f"TABLE = {script_json(table)};"))
    return path


def main(args):
    path = write_page(args.folders, args.out)
    size = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names
               in os.walk(os.path.dirname(path)) for name in names)
    print(f"{path} and data/ beside it: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main, parse_args)
