"""
Known ways to a wrong number, injected one at a time into a copy of two houses, their recording, a
checkpoint or a results folder: is each refused, or named where the number stands?

"refused": exit status 2 and a sentence; "found": tools.recompute exits with 1; "named": the number
is printed with a line that states it. campaign.py runs this and prints the table.
"""
from __future__ import annotations

import fcntl
import gzip
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import ROOT, in_process
from remote_servers import PolicyServer

import model
from checkpoint import load_policy, save_policy
from cli import read_json, read_rows, write_json, write_lines

EXIT = {"refused": 2, "found": 1, "named": 0}


class Case:
    """Fresh copies for one injection, and the commands that it may run."""

    def __init__(self, ego: str, folder: Path):
        self.folder, self.out = folder, folder / "out"
        self.houses, self.ego, self.ckpt = (folder / name for name in ("houses", "ego", "ckpt"))
        shutil.copytree(Path(ego).parents[1] / "houses", self.houses)
        shutil.copytree(ego, self.ego)
        shutil.copytree(Path(ego).parent / "learned_window", self.ckpt)

    def walk(self, *flags, agent="stop"):
        return in_process("evaluate.py", "--episodes", self.houses, "--out", self.out, "--sims", 1,
                          "--limit", 4, "--agent", agent, *flags, check=False)

    def policy(self, *flags):
        return self.walk("--ckpt", self.ckpt, "--device", "cpu", "--max-actions", 24, *flags,
                         agent="policy")

    def train(self):
        return in_process("sft.py", "--model", "tiny", "--data", self.ego, "--out", self.out,
                          "--batch-size", 8, "--max-steps", 1, "--device", "cpu", check=False)

    def recompute(self):
        return in_process("-m", "tools.recompute", self.out, check=False)

    def scene(self, name: str) -> Path:
        return self.houses / "scenes" / "houses" / name / f"{name}.glb"

    def edit(self, change: Callable, split="val_unseen", ending=""):
        """change(content) of an episode file, or with ending "_gt" of its ground truth."""
        path = self.houses / split / f"{split}{ending}.json.gz"
        content = json.loads(gzip.decompress(path.read_bytes()))
        change(content)
        path.write_bytes(gzip.compress(json.dumps(content).encode()))


def halve(path: Path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


# ---------------------------------------------------------------- ways to inject


def flags(*given, who="walk"):
    return lambda case: getattr(case, who)(*given)


def again(*given, who="walk"):
    """A second run in the folder of the first, with other flags."""
    return lambda case: (getattr(case, who)(), getattr(case, who)(*given))[1]


def edited(change: Callable, ending=""):
    """change(content) of the episode file, or of its ground truth."""
    return lambda case: (case.edit(change, ending=ending), case.walk())[1]


def first_episode(**values):
    return edited(lambda content: content["episodes"][0].update(values))


def each_episode(change: Callable):
    return edited(lambda content: [change(episode) for episode in content["episodes"]])


def damaged(change: Callable, then: str, before: str | None = None):
    """change(case) of its files, between two of its commands."""
    def inject(case):
        if before:
            getattr(case, before)()
        change(case)
        return getattr(case, then)()
    return inject


def changed_rows(change: Callable, then: str, before: str):
    """change(rows) of a results folder."""
    def change_file(case):
        rows = read_rows(case.out / "episodes.jsonl")
        change(rows)
        write_lines(case.out / "episodes.jsonl", rows)
    return damaged(change_file, then, before)


def changed_weights(change: Callable, before: str | None = None):
    """change(policy) in place, in the same folder."""
    def change_file(case):
        policy = load_policy(str(case.ckpt))
        with torch.no_grad():
            change(policy)
        save_policy(policy, str(case.ckpt))
    return damaged(change_file, "policy", before)


# ---------------------------------------------------------------- changes that need some lines


def turn_by_w(episode):
    """w, x, y, z for x, y, z, w."""
    episode["start_rotation"] = [episode["start_rotation"][i] for i in (3, 0, 1, 2)]


def mirror(episode):
    """Right is taken for left."""
    episode["start_rotation"][1] *= -1


def turn_z_up(episode):
    for record, key in ((episode, "start_position"), (episode["goals"][0], "position")):
        x, y, z = record[key]
        record[key] = [x, -z, y]


def z_up_without_ground_truth(case):
    os.remove(case.houses / "val_unseen" / "val_unseen_gt.json.gz")
    return each_episode(turn_z_up)(case)


def truth_of_val_seen(case):
    """Under the ids that are asked for, so that every episode finds one."""
    found = []
    case.edit(lambda truths: found.extend(truths.values()), "val_seen", "_gt")
    case.edit(lambda truths: truths.update(zip(truths, found)), ending="_gt")


def exchange_scenes(case):
    one, other = case.scene("u00000").read_bytes(), case.scene("u00001").read_bytes()
    case.scene("u00000").write_bytes(other)
    case.scene("u00001").write_bytes(one)


def without_hashes(case):
    """As R2R's files are."""
    case.edit(lambda content: content.pop("scenes"))


def other_scenes_when_it_goes_on(case):
    without_hashes(case)
    case.walk()
    exchange_scenes(case)
    return case.walk()


def shift_labels(case):
    """Each frame gets the label of the next one."""
    rows = read_rows(case.ego / "walks.jsonl")
    write_lines(case.ego / "walks.jsonl", [
        {**row, "actions": row["actions"][1:] + [0]} for row in rows])


def edited_prompt(case):
    case.policy()
    known = model.window_prompt
    model.window_prompt = lambda *given: known(*given).replace("action", "step")
    try:
        return case.policy()
    finally:
        model.window_prompt = known


def untrained(case):
    contract = load_policy(str(case.ckpt)).contract
    save_policy(load_policy("tiny", contract=contract, texts=["go"]), str(case.ckpt))


def another_prompt_at_the_server(case):
    with PolicyServer(str(case.ckpt), more_tokens=1) as server:
        return case.policy("--server", server.url, "--served-model", "it")


def simulator_of_other_code(case):
    for name in ("cli.py", "reward.py", "world"):
        source = Path(ROOT) / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, case.folder / name)
    with open(case.folder / "world" / "house_sim.py", "a") as file:
        file.write("\nCONTACT_M = 1e-3\n")
    return case.walk("--sim-command",
                     f"sh -c 'cd {case.folder} && {sys.executable} -m world.worker'")


def another_simulator(case):
    path = case.out / "simulator.json"
    write_json(path, {**read_json(path), "simulator": "house_sim 1"})
    path = case.out / "episodes.jsonl"
    write_lines(path, read_rows(path)[:-1])


def cut_row(case):
    """The last one, as a kill may do."""
    path = case.out / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def two_processes_in_one_folder(case):
    case.out.mkdir()
    with open(case.out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return case.walk()


def comparison_of_other_episodes(case):
    case.walk()
    first, case.out = case.out, case.folder / "other"
    case.walk("--limit", 3)
    return in_process("-m", "tools.report", first, case.out, check=False)


# ---------------------------------------------------------------- the table


class Injection(NamedTuple):
    name: str
    inject: Callable
    answer: str                 # a key of EXIT
    words: str                  # which the answer must hold, a pattern


NAN = float("nan")
INJECTIONS = [Injection(*row) for row in (
    ("half an episode file", damaged(lambda case: halve(
        case.houses / "val_unseen" / "val_unseen.json.gz"), "walk"), "refused", "is truncated"),
    ("NaN in a start position", first_episode(start_position=[NAN, 0, 0]), "refused",
     "invalid 'start_position'"),
    ("NaN in a goal", first_episode(goals=[{"position": [NAN, 0, 0], "radius": 1.0}]), "named",
     "1 unreachable"),
    ("a goal that no path reaches", first_episode(goals=[{
        "position": [500.0, 0.0, 500.0], "radius": 1.0}]), "named", "1 unreachable"),
    ("rotations as w, x, y, z", each_episode(turn_by_w), "refused", "invalid 'start_rotation'"),
    ("headings mirrored", each_episode(mirror), "refused", "where the robot does not face"),
    ("positions with z up", each_episode(turn_z_up), "refused", "ground truth starts"),
    ("positions with z up, no ground truth", z_up_without_ground_truth, "named",
     "episodes are invalid .* not on the floor"),
    ("duplicate ids", edited(lambda content: content["episodes"][1].update(
        episode_id=content["episodes"][0]["episode_id"])), "refused", "not unique"),
    ("ground truth of another split", damaged(truth_of_val_seen, "policy"), "refused",
     "ground truth starts"),
    ("ground truth of fewer episodes", edited(lambda truths: truths.popitem(), "_gt"), "refused",
     "no ground truth to measure by"),
    ("no ground truth", damaged(lambda case: os.remove(
        case.houses / "val_unseen" / "val_unseen_gt.json.gz"), "walk"), "named",
     "nDTW and SDTW are not measured"),
    ("goals of two radii", first_episode(goals=[{"position": [0, 0, 0], "radius": 2.0}]),
     "refused", "no common radius"),
    ("another radius", each_episode(lambda episode: episode["goals"][0].update(radius=3.0)),
     "named", r"success_m 3\.0 \(there 1\.0\)"),
    ("stale scenes", damaged(exchange_scenes, "walk"), "refused", "one world on scenes of another"),
    ("other scenes when a run goes on", other_scenes_when_it_goes_on, "refused", "other scenes"),
    ("half a scene", damaged(lambda case: (without_hashes(case), halve(case.scene("u00000"))),
                             "walk"), "refused", "is truncated"),
    ("another turn angle, a baseline", flags("--robot", "r2r"), "refused",
     "walked with turns of 30"),
    ("another turn angle, a policy", flags("--turn-deg", 15, who="policy"), "refused",
     "trained with turn_deg = 30"),
    ("another HFOV, a baseline", flags("--hfov-deg", 79), "named", r"hfov_deg 79\.0 \(there 90\)"),
    ("another HFOV, a policy", flags("--hfov-deg", 79, who="policy"), "refused",
     "trained with hfov_deg = 90"),
    ("another step cap", flags("--max-actions", 400), "named", r"max_actions 400 \(there 500\)"),
    ("black frames", flags("--blank-frames", who="policy"), "named", "control run: blank frames"),
    ("shifted labels in a recording", damaged(shift_labels, "train"), "refused",
     "actions shifted"),
    ("half a file of frames", damaged(lambda case: halve(next((case.ego / "frames").iterdir())),
                                      "train"), "refused", "missing or truncated"),
    ("mixed dtypes in one folder", again("--dtype", "bfloat16", who="policy"), "refused",
     "of other dtype"),
    ("other weights in one folder", changed_weights(
        lambda policy: next(policy.parameters()).add_(0.01), "policy"), "refused",
     "of other weights"),
    ("an edited prompt in one folder", edited_prompt, "refused", "other prompt_sha256"),
    ("another split in one folder", again("--split", "val_seen"), "refused",
     "another measurement .*split"),
    ("another cap in one folder", again("--max-actions", 400), "refused", "of other max_actions"),
    ("weights that give no numbers", changed_weights(
        lambda policy: [weight.mul_(1e17) for weight in policy.parameters()]), "refused",
     "not finite"),
    ("unreadable answers", damaged(untrained, "policy"), "named", "100.0% .* plans unreadable"),
    ("another prompt at the server", another_prompt_at_the_server, "refused", "prompt tokens"),
    ("a simulator of other code", simulator_of_other_code, "refused", "runs other code"),
    ("another simulator in one folder", damaged(another_simulator, "walk", "walk"), "refused",
     "begun with house_sim 1"),
    ("half a row", damaged(cut_row, "walk", "walk"), "named", "walks 1 episodes"),
    ("two processes in one folder", two_processes_in_one_folder, "refused",
     "being written by another process"),
    ("a success that was changed", changed_rows(lambda rows: rows[0].update(
        success=1 - rows[0]["success"]), "recompute", "walk"), "found", "success of episode"),
    ("a row taken out", changed_rows(lambda rows: rows.pop(), "recompute", "walk"), "found",
     "episodes: 4 is recorded, 3"),
    ("a row twice", changed_rows(lambda rows: rows.append(rows[0]), "recompute", "walk"), "found",
     "scored: 4 is recorded, 5"),
    ("a comparison of other episodes", comparison_of_other_episodes, "refused",
     "did not measure the same thing"),
)]


def line_with(words: str, text: str) -> str:
    """90 letters of the line that holds the pattern, from whole words before it; else of the last
    line."""
    for line in text.splitlines():
        line = re.sub(r"^\S+: error: ", "", line)
        found = re.search(words, line)
        if found:
            start = line.rfind(" ", 0, max(0, min(found.start() - 15, len(line) - 90))) + 1
            return ".. " * bool(start) + line[start:start + 90].strip()
    return (text.strip().splitlines() or [""])[-1][:90]


def main(ego: str, folder: str) -> int:
    """Print the table -> how many injections were neither refused nor named."""
    wrong = 0
    print("\n| injected | answer | exit status | its words |\n|---|---|---|---|")
    for number, (name, inject, answer, words) in enumerate(INJECTIONS):
        place = Path(folder) / str(number)
        shutil.rmtree(place, ignore_errors=True)
        done = inject(Case(ego, place))
        text = (done.stdout + done.stderr).replace(f"{place}{os.sep}", "")
        good = done.returncode == EXIT[answer] and re.search(words, text) is not None
        wrong += not good
        print(f"| {name} | {answer if good else 'NOT ' + answer} | {int(done.returncode)} | "
              f"{line_with(words, text)} |", flush=True)
        shutil.rmtree(place)
    print(f"{len(INJECTIONS) - wrong} of {len(INJECTIONS)} injections are refused, found or named")
    return wrong
