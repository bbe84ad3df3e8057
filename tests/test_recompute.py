"""tools/recompute.py: it agrees with evaluate.py's folders, and finds what was changed in them."""
import ast
import json
import os
import shutil
import sys

import pytest
from conftest import GLB, ROOT, script
from helpers import evaluate_plane, write_plane

from cli import read_json, read_rows, write_json, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 walks of the random agent in 6 scenes, two of which have no score, and their truth."""
    base = tmp_path_factory.mktemp("recompute")
    changes = {str(i): {"scene_id": f"houses/h{i % 6}/h.glb"} for i in range(12)}
    changes["3"]["info"], changes["5"]["info"] = {"refused": True}, {"distance": float("inf")}
    changes["6"]["info"] = {"beyond": [0.5, float("nan")]}
    for i in range(12):
        changes[str(i)].setdefault("info", {})
    data = write_plane(base / "data", n=12, **changes)
    for i in range(6):
        os.makedirs(base / f"data/scenes/houses/h{i}")
        (base / f"data/scenes/houses/h{i}/h.glb").write_bytes(GLB)
    with pytest.MonkeyPatch.context() as patch:
        for agent in ("random", "oracle"):
            evaluate_plane(patch, data, base / agent, "--agent", agent, "--max-actions", "14")
    return base


def recompute(*arguments):
    """-> exit status, output."""
    done = script("-m", "tools.recompute", *arguments, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def test_it_agrees_with_what_evaluate_wrote(folder):
    truth = folder / "data/val/val_gt.json.gz"
    status, out = recompute(folder / "random", folder / "oracle", "--truth", truth)
    assert status == 0 and out.count(" numbers, 0 do not agree\n") == 2 == len(out.splitlines())
    status, shorter = recompute(folder / "random")
    count = [int(text.split(": ")[1].split()[0]) for text in (out, shorter)]
    assert status == 0 and count[0] - count[1] == 10            # the nDTW of ten scored episodes


def change_row(field, value):
    """Change a field of the first episode that has a score, or of all that value() is given."""
    def change(path):
        rows = read_rows(path / "episodes.jsonl")
        row = next(row for row in rows if "success" in row)
        row[field] = value(row[field]) if callable(value) else value
        write_lines(path / "episodes.jsonl", rows)
    return change


def change_json(name, *keys, value):
    def change(path):
        content = read_json(path / name)
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value(inner[keys[-1]])
        write_json(path / name, content)
    return change


def more_rows(path):
    with open(path / "episodes.jsonl", "a") as file:
        file.write(json.dumps(read_rows(path / "episodes.jsonl")[0]) + "\n")


def fewer_rows(path):
    write_lines(path / "episodes.jsonl", read_rows(path / "episodes.jsonl")[1:])


@pytest.mark.parametrize("change, name", [
    (change_row("success", lambda value: 1 - value), "success of episode 0"),
    (change_row("oracle_success", lambda value: 1 - value), "oracle_success of episode 0"),
    (change_row("spl", 0.9), "spl of episode 0"), (change_row("ndtw", 0.99), "ndtw of episode 0"),
    (change_row("sdtw_3m", 0.9), "sdtw_3m of episode 0"),
    (change_row("path_length", lambda value: value + .01), "path_length of episode 0"),
    (change_row("poses", lambda value: [[9, 9, 9, 0], *value[1:]]), "path_length of episode 0"),
    (change_row("poses", lambda value: value[1:]), "poses of episode 0"),
    (change_row("actions", lambda value: value[1:]), "steps of episode 0"),
    (change_row("distance_to_goal", lambda value: value + 1), "mean of distance_to_goal"),
    (change_row("start_distance", 0.5), "spl_3m of episode 0"),
    (change_row("decisions", 7), "decisions: 0 is recorded, 7 recomputed"),
    (more_rows, "scored: 10 is recorded, 11 recomputed"),
    (fewer_rows, "episodes: 12 is recorded, 11 recomputed"),
    (change_json("results.json", "metrics", "success", "mean", value=lambda v: v + .01),
     "mean of success:"),
    (change_json("results.json", "metrics", "success", "ci", value=lambda v: [v[0], v[1] - .01]),
     "interval of success:"),
    (change_json("results.json", "metrics", "path_length", "ci",
                 value=lambda v: [v[0] + .25 * (v[1] - v[0]), v[1]]), "interval of path_length:"),
    (change_json("results.json", "metrics", value=lambda v: {
        name: v[name] for name in v if name != "success"}), "names of metrics"),
    (change_row("actions", lambda value: value[:-1] + "1"), "success of episode 0"),
    (change_json("results.json", "no_way_at_end", value=lambda v: v + 1), "no_way_at_end:"),
    (change_json("results.json", "ends", "stop", value=lambda v: v + 1), "ends:"),
    (change_json("protocol.json", "episodes", "unfinished", value=lambda v: v + 1), "unfinished:"),
    (change_json("run.json", "radius_m", value=lambda v: .01), "success of episode"),
    (change_json("run.json", "episodes", value=lambda v: 13), "asked:"),
])
def test_what_was_changed_is_found(folder, tmp_path, change, name):
    which = "random" if "success of" not in name and "spl" not in name else "oracle"
    copy = shutil.copytree(folder / which, tmp_path / "copy")
    change(copy)
    status, out = recompute(copy, "--truth", folder / "data/val/val_gt.json.gz")
    assert status == 1 and name in out and " 0 do not agree" not in out


def test_a_folder_that_is_not_complete_is_refused_in_a_sentence(folder, tmp_path):
    copy = shutil.copytree(folder / "random", tmp_path / "copy")
    os.remove(copy / "results.json")
    done = script("-m", "tools.recompute", copy, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "recompute.py: error: FileNotFoundError(") and "is the folder complete?" in done.stderr
    (copy / "results.json").write_text("[]")
    done = script("-m", "tools.recompute", copy, check=False)
    assert done.returncode == 2 and "is the folder complete?" in done.stderr


def test_it_is_short_and_needs_nothing_but_python():
    with open(os.path.join(ROOT, "tools/recompute.py")) as file:
        text = file.read()
    imported = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(text))
                 if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names and len(text.splitlines()) <= 126
