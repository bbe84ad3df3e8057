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
from tools import remote

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

    def edit_episode(self, **values):
        """Fields of the first episode; those that are functions change the value that is there."""
        def change(content):
            episode = content["episodes"][0]
            episode.update({key: value(episode[key]) if callable(value) else value
                            for key, value in values.items()})
        self.edit(change)

    def edit_rows(self, change: Callable):
        rows = read_rows(self.out / "episodes.jsonl")
        change(rows)
        write_lines(self.out / "episodes.jsonl", rows)


# ---------------------------------------------------------------- episodes and ground truth


def half_an_episode_file(case):
    path = case.houses / "val_unseen" / "val_unseen.json.gz"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return case.walk()


def ground_truth_of_another_split(case):
    """With the ids that are asked for, so that every episode finds one."""
    found = []
    case.edit(lambda truths: found.extend(truths.values()), "val_seen", "_gt")
    case.edit(lambda truths: truths.update(zip(truths, found)), ending="_gt")
    return case.walk()


def equal_keys_in_the_ground_truth(case):
    path = case.houses / "val_unseen" / "val_unseen_gt.json.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress((text[:-1] + ', "1": {}, "1": {}}').encode()))
    return case.walk()


def duplicate_ids(case):
    case.edit(lambda content: content["episodes"][1].update(
        episode_id=content["episodes"][0]["episode_id"]))
    return case.walk()


def two_radii(case):
    case.edit_episode(goals=lambda goals: [{**goals[0], "radius": 2.0}])
    return case.walk()


def another_radius(case):
    def change(content):
        for episode in content["episodes"]:
            episode["goals"][0]["radius"] = 3.0
    case.edit(change)
    return case.walk()


def mirrored_headings(case):
    """Right is taken for left: all start rotations are turned the other way."""
    def change(content):
        for episode in content["episodes"]:
            episode["start_rotation"][1] *= -1
    case.edit(change)
    return case.walk()


def vertical_axis_z(case):
    def change(content):
        for episode in content["episodes"]:
            x, y, z = episode["start_position"]
            episode["start_position"] = [x, -z, y]
    case.edit(change)
    return case.walk()


def no_ground_truth(case):
    os.remove(case.houses / "val_unseen" / "val_unseen_gt.json.gz")
    return case.walk()


# ---------------------------------------------------------------- scenes


def stale_scenes(case):
    one, other = case.scene("u00000").read_bytes(), case.scene("u00001").read_bytes()
    case.scene("u00000").write_bytes(other)
    case.scene("u00001").write_bytes(one)
    return case.walk()


def other_scenes_when_it_goes_on(case):
    """An episode file without hashes, as R2R's, and another scene between two runs."""
    case.edit(lambda content: content.pop("scenes"))
    case.walk()
    case.scene("u00000").write_bytes(case.scene("u00001").read_bytes())
    return case.walk()


def half_a_scene(case):
    case.edit(lambda content: content.pop("scenes"))
    path = case.scene("u00000")
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return case.walk()


# ---------------------------------------------------------------- recordings


def shifted_labels(case):
    """The actions of every walk moved by one step: each frame gets the next frame's label."""
    rows = read_rows(case.ego / "walks.jsonl")
    write_lines(case.ego / "walks.jsonl", [
        {**row, "actions": row["actions"][1:] + [0]} for row in rows])
    return case.train()


def half_a_frame_store(case):
    path = next((case.ego / "frames").iterdir())
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return case.train()


# ---------------------------------------------------------------- policy, server and simulator


def mixed_dtypes(case):
    case.policy()
    return case.policy("--dtype", "bfloat16")


def other_weights(case):
    """The same folder, trained further, while its results folder goes on."""
    case.policy()
    policy = load_policy(str(case.ckpt))
    with torch.no_grad():
        next(policy.parameters()).add_(0.01)
    save_policy(policy, str(case.ckpt))
    return case.policy()


def edited_prompt(case):
    case.policy()
    known = model.window_prompt
    model.window_prompt = lambda *given: known(*given).replace("action", "step")
    try:
        return case.policy()
    finally:
        model.window_prompt = known


def weights_that_give_no_numbers(case):
    policy = load_policy(str(case.ckpt))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1e17)
    save_policy(policy, str(case.ckpt))
    return case.policy()


def unreadable_answers(case):
    """Of an untrained policy."""
    contract = load_policy(str(case.ckpt)).contract
    save_policy(load_policy("tiny", contract=contract, texts=["go"]), str(case.ckpt))
    return case.policy()


def another_prompt_at_the_server(case):
    with PolicyServer(str(case.ckpt), more_tokens=1) as server:
        return case.policy("--server", server.url, "--served-model", "it")


def a_server_that_fails(case):
    """It answers the check, and no request after it."""
    remote.JsonClient.first_wait_s, wait_s = 0.01, remote.JsonClient.first_wait_s
    try:
        with PolicyServer(str(case.ckpt), lambda n, body: n and (500, "full", ())) as server:
            return case.policy("--server", server.url, "--served-model", "it")
    finally:
        remote.JsonClient.first_wait_s = wait_s


def a_simulator_of_other_code(case):
    for name in ("cli.py", "reward.py", "world"):
        source = Path(ROOT) / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, case.folder / name)
    with open(case.folder / "world" / "house_sim.py", "a") as file:
        file.write("\nCONTACT_M = 1e-3\n")
    return case.walk("--sim-command", f"sh -c 'cd {case.folder} && {sys.executable} -m "
                                      "world.worker'")


def a_simulator_of_another_version(case):
    case.walk("--max-actions", 9)
    simulator = read_json(case.out / "simulator.json")
    write_json(case.out / "simulator.json", {**simulator, "simulator": "house_sim 1"})
    case.edit_rows(lambda rows: rows.pop())
    return case.walk("--max-actions", 9)


# ---------------------------------------------------------------- results folders


def again(*flags):
    """A second run with other flags in the folder of the first."""
    def inject(case):
        case.walk()
        return case.walk(*flags)
    return inject


def changed_results(change: Callable):
    """change(rows) of a complete folder, which is then recomputed."""
    def inject(case):
        case.walk(agent="oracle")
        case.edit_rows(change)
        return case.recompute()
    return inject


def half_a_row(case):
    """The last row is cut, as by a kill."""
    case.walk()
    path = case.out / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    return case.walk()


def a_damaged_row(case):
    case.walk()
    path = case.out / "episodes.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"end"', b'"end', 1))
    return case.walk()


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


def flags_given(*flags, who="walk"):
    return lambda case: getattr(case, who)(*flags)


def episode_with(**values):
    def inject(case):
        case.edit_episode(**values)
        return case.walk()
    return inject


NAN, FAR = float("nan"), [500.0, 0.0, 500.0]
INJECTIONS = [
    Injection("half an episode file", half_an_episode_file, "refused", "is truncated"),
    Injection("NaN in a start position", episode_with(start_position=[NAN, 0, 0]), "refused",
              "invalid 'start_position'"),
    Injection("NaN in a goal", episode_with(goals=[{"position": [NAN, 0, 0], "radius": 1.0}]),
              "named", "1 unreachable"),
    Injection("a goal that no path reaches", episode_with(goals=[{
        "position": FAR, "radius": 1.0}]), "named", "1 unreachable"),
    Injection("rotations in the order w, x, y, z", episode_with(
        start_rotation=lambda q: [q[3], *q[:3]]), "refused", "invalid 'start_rotation'"),
    Injection("duplicate ids", duplicate_ids, "refused", "not unique"),
    Injection("equal keys in the ground truth", equal_keys_in_the_ground_truth, "refused",
              "there twice"),
    Injection("ground truth of another split", ground_truth_of_another_split, "refused",
              "ground truth starts"),
    Injection("ground truth of fewer episodes", lambda case: case.edit(
        lambda truths: truths.popitem(), ending="_gt") or case.walk(), "refused",
        "no ground truth to measure by"),
    Injection("no ground truth", no_ground_truth, "named", "nDTW and SDTW are not measured"),
    Injection("headings mirrored", mirrored_headings, "refused", "ground truth"),
    Injection("start positions with z up", vertical_axis_z, "refused", "ground truth starts"),
    Injection("goals of two radii", two_radii, "refused", "no common radius"),
    Injection("another radius", another_radius, "named", r"success_m 3\.0 \(there 1\.0\)"),
    Injection("a split that is not there", flags_given("--split", "val"), "refused",
              "no episodes of split 'val'"),
    Injection("stale scenes", stale_scenes, "refused", "one world on scenes of another"),
    Injection("other scenes when a run goes on", other_scenes_when_it_goes_on, "refused",
              "other scenes"),
    Injection("half a scene", half_a_scene, "refused", "is truncated"),
    Injection("a robot of another turn angle", flags_given("--robot", "r2r"), "refused",
              "walked with turns of 30"),
    Injection("another turn angle than the policy's", flags_given(
        "--turn-deg", 15, who="policy"), "refused", "trained with turn_deg = 30"),
    Injection("another HFOV than the policy's", flags_given(
        "--hfov-deg", 79, who="policy"), "refused", "trained with hfov_deg = 90"),
    Injection("another HFOV for a baseline", flags_given("--hfov-deg", 79), "named",
              r"hfov_deg 79\.0 \(there 90\)"),
    Injection("another step cap", flags_given("--max-actions", 400), "named",
              r"max_actions 400 \(there 500\)"),
    Injection("black frames", flags_given("--blank-frames", who="policy"), "named",
              "control run: blank frames"),
    Injection("shifted labels in a recording", shifted_labels, "refused",
              "actions shifted"),
    Injection("half a file of frames", half_a_frame_store, "refused", "missing or truncated"),
    Injection("mixed dtypes in one folder", mixed_dtypes, "refused", "of other dtype"),
    Injection("other weights in one folder", other_weights, "refused", "of other weights"),
    Injection("an edited prompt in one folder", edited_prompt, "refused", "other prompt_sha256"),
    Injection("another split in one folder", again("--split", "val_seen"), "refused",
              "another measurement .*split"),
    Injection("another cap in one folder", again("--max-actions", 400), "refused",
              "of other max_actions"),
    Injection("weights that give no numbers", weights_that_give_no_numbers, "refused",
              "not finite"),
    Injection("unreadable answers", unreadable_answers, "named", "100.0% .* plans unreadable"),
    Injection("another prompt at the server", another_prompt_at_the_server, "refused",
              "prompt tokens"),
    Injection("a server that fails", a_server_that_fails, "refused", "failed 2 walks in a row"),
    Injection("a simulator of other code", a_simulator_of_other_code, "refused",
              "runs other code"),
    Injection("a simulator of another version", a_simulator_of_another_version, "refused",
              "begun with house_sim 1"),
    Injection("half a row", half_a_row, "named", "walks 1 episodes"),
    Injection("a damaged row", a_damaged_row, "refused", "is damaged"),
    Injection("two processes in one folder", two_processes_in_one_folder, "refused",
              "being written by another process"),
    Injection("a success that was changed", changed_results(
        lambda rows: rows[0].update(success=1 - rows[0]["success"])), "found", "success of"),
    Injection("a row taken out", changed_results(lambda rows: rows.pop()), "found", "episodes: 4"),
    Injection("a row twice", changed_results(lambda rows: rows.append(rows[0])), "found",
              "scored: 4 is recorded, 5"),
    Injection("a comparison of other episodes", comparison_of_other_episodes, "refused",
              "did not measure the same thing"),
]


def line_with(words: str, text: str) -> str:
    """The line that holds the pattern, from 30 letters before it; else the last line."""
    for line in text.splitlines():
        found = re.search(words, line)
        if found:
            start = max(0, min(found.start() - 30, len(line) - 100))
            return ".." * bool(start) + line[start:start + 100].strip()
    return (text.strip().splitlines() or [""])[-1][:100]


def main(ego: str, folder: str) -> int:
    """Print the table -> how many injections were neither refused nor named."""
    wrong = 0
    print("\n| injected | answer | exit status | its words |\n|---|---|---|---|")
    for number, (name, inject, answer, words) in enumerate(INJECTIONS):
        place = Path(folder) / str(number)
        shutil.rmtree(place, ignore_errors=True)
        done = inject(Case(ego, place))
        text = done.stdout + done.stderr
        good = done.returncode == EXIT[answer] and re.search(words, text) is not None
        wrong += not good
        print(f"| {name} | {answer if good else 'NOT ' + answer} | {done.returncode} | "
              f"{line_with(words, text)} |", flush=True)
        shutil.rmtree(place)
    print(f"{len(INJECTIONS) - wrong} of {len(INJECTIONS)} injections are refused, found or named")
    return wrong
