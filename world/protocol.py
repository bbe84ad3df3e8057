"""
The protocol card: what a results folder measured, held against published protocols.

The same weights score ten points apart under another camera angle, step cap or rule for what is a
success. So every results folder says all of it (protocol.json), names the published protocol that
is closest (docs/protocols/*.json, read from public code, each value with its file and commit), and
lists every departure from it. `evaluate.py --protocol NAME` sets the flags that NAME states.

An episode has "ended" if it has a score, "failed" if it cannot have one (the simulator refuses its
start or goal, or no path leads to it), and is "unfinished" if its simulator failed or it has not
walked yet: the same command tries it again. "code" lists all commits that walked.

Run it   python -m doctest world/protocol.py
Reads    docs/protocols/*.json;  writes protocol.json (write_card)
"""
from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import subprocess
from collections import Counter

from cli import UserError, read_json, write_json
from world.episodes import LANGUAGES, find_episodes
from world.robots import ROBOTS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "docs", "protocols")
# What a protocol states that is a flag of evaluate.py; the rest can only be compared.
FLAGS = (*ROBOTS["r2r"], "role", "languages", "max_actions", "malformed", "temperature")
# What evaluate.py always does: EpisodeLoop and episode_metrics.
OURS = {"at_cap": "fail", "success_rule": "<", "malformed_may_succeed": False,
        "ne_unknown": "left out", "ndtw": "exact"}
INTERVAL = ("95%: rates Wilson with a design effect, means a percentile bootstrap over scenes "
            "(intervals.py)")


def protocol_names() -> list[str]:
    return sorted(os.path.basename(path)[:-5] for path in glob.glob(os.path.join(FOLDER, "*.json")))


def read_protocol(name: str) -> dict:
    """{key: value} of a published protocol; keys that its public code does not state are absent.
    All of them walk every episode of a split."""
    path = os.path.join(FOLDER, name + ".json")
    return {"episodes": "all", **{key: value for key, (value, _)
                                  in read_json(path)["values"].items()}}


def protocol_flags(name: str) -> dict:
    """The flags of evaluate.py that a protocol states, as argparse's defaults.

    >>> flags = protocol_flags("janusvln_r2r")
    >>> flags["sim"], flags["hfov_deg"], flags["max_actions"]
    ('habitat', 79, 401)
    """
    stated = read_protocol(name)
    flags = {key: stated[key] for key in FLAGS if key in stated}
    if flags.get("malformed") not in ("stop", "forward"):      # a random action: nothing of ours
        flags.pop("malformed", None)
    return {**flags, "sim": "house" if stated["dataset"] == "houses" else "habitat"}


def measured_values(settings: dict, simulator: str | None) -> dict:
    """A run's settings -> the keys that protocols state; None: it does not apply to this run."""
    policy, rxr = settings["agent"] == "policy", settings["dataset"] == "rxr"
    limit = (settings.get("contract") or {}).get("early_stop", {}).get("actions", math.inf)
    forced = limit < settings["max_actions"]            # STOP comes first, and counts as an action
    return {"dataset": settings["dataset"], **settings["robot"],
            "episodes": settings["episodes"] if settings["limit"] else "all",
            "role": (settings["role"] or "guide") if rxr else None,
            "languages": settings["languages"] or sorted(LANGUAGES) if rxr else None,
            "simulator": simulator and " ".join(simulator.split()[:2]),      # without its build
            "max_actions": limit + 1 if forced else settings["max_actions"],
            "success_m": settings["radius_m"],
            "malformed": settings["malformed"] if policy else None,
            "temperature": settings["temperature"] if policy else None, **OURS,
            "at_cap": "stop" if forced else OURS["at_cap"],
            "malformed_may_succeed": False if policy else None,
            "ndtw": None if settings.get("no_ndtw") else "exact"}


def departures(stated: dict, measured: dict) -> dict:
    """{key: [the protocol's value, ours]} where they differ; what does not apply is left out.

    >>> departures({"hfov_deg": 79, "max_actions": 500}, {"hfov_deg": 90, "max_actions": 500})
    {'hfov_deg': [79, 90]}
    """
    return {key: [value, measured[key]] for key, value in stated.items()
            if measured.get(key) is not None and measured[key] != value}


def closest(measured: dict, name: str | None = None) -> dict:
    """The protocol `name`, or that of the same data set with the fewest departures; of equals the
    one that states more -> {"name", "asked_for", "departures", "not_stated"}."""
    every = {one: read_protocol(one) for one in ([name] if name else protocol_names())}
    best = min(every, key=lambda one: (every[one]["dataset"] != measured["dataset"],
                                       len(departures(every[one], measured)), -len(every[one])))
    return {"name": best, "asked_for": bool(name),
            "departures": departures(every[best], measured),
            "not_stated": sorted(key for key, value in measured.items()
                                 if value is not None and key not in every[best])}


# ---------------------------------------------------------------- the card


def code_commit() -> str | None:
    """The commit of this code, with "+" where a script differs from it; None without git."""
    git = ["git", "-C", ROOT]
    try:
        head = subprocess.run([*git, "rev-parse", "--verify", "HEAD"], capture_output=True,
                              text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", "*.py"],
                                 capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed)


def file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def make_card(settings: dict, rows: list[dict], simulator: dict | None, commits: list,
              name: str | None = None, interval: dict | None = None) -> dict:
    """protocol.json. settings: run.json; rows: the episodes that have walked so far; name: the
    protocol that --protocol asked for; interval: results.json's, if it is there."""
    path = find_episodes(settings["source"], settings["split"], settings["role"])
    ends = Counter(row["end"] for row in rows)
    ended = sum("success" in row for row in rows)
    unfinished = settings["episodes"] - len(rows) + ends["error"]
    measured = measured_values(settings, simulator and simulator["simulator"])
    contract = settings["contract"] or {}
    return {
        "data": {"file": path, "sha256": file_hash(path), "episodes_sha256": settings["data"],
                 **{key: settings[key] for key in ("dataset", "split", "role", "languages",
                                                   "limit")}},
        "episodes": {"asked": settings["episodes"], "ended": ended,
                     "failed": settings["episodes"] - ended - unfinished,
                     "unfinished": unfinished},
        "scenes": settings["scenes"], "simulator": simulator, "robot": settings["robot"],
        "rules": {"second_radius_m": settings["second_radius_m"], **OURS,
                  **{key: measured[key] for key in ("max_actions", "at_cap", "success_m",
                                                    "malformed", "ndtw")},
                  "early_stop": contract.get("early_stop"),
                  "interval": interval or INTERVAL},
        "policy": {**{key: settings[key] for key in (
                       "agent", "agent_file", "ckpt", "weights", "dtype", "device", "execute",
                       "temperature", "seed", "blank_frames", "shuffled_instruction",
                       "prompt_sha256")}, "served_model": settings.get("served_model"),
                   "prompt": contract.get("prompt"), "memory": contract.get("memory"),
                   "top_p": contract.get("sampling", {}).get("top_p")},
        "code": commits, "protocol": closest(measured, name)}


def write_card(out: str, settings: dict, rows: list[dict], name: str | None = None,
               interval: dict | None = None) -> dict:
    """Write <out>/protocol.json -> the card. Commits that an earlier card names are kept."""
    path, sim = os.path.join(out, "protocol.json"), os.path.join(out, "simulator.json")
    try:
        before = read_json(path)["code"] if os.path.exists(path) else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it and run the same command again"
                        ) from None
    commit = code_commit()
    commits = before if commit in before else [*before, commit]
    card = make_card(settings, rows, read_json(sim) if os.path.exists(sim) else None, commits,
                     name, interval)
    write_json(path, card)
    return card


# ---------------------------------------------------------------- in words


def format_card(card: dict) -> str:
    """The card in four lines: data, robot, policy, rules."""
    data, count, robot, policy = (card[key] for key in ("data", "episodes", "robot", "policy"))
    rules, held = card["rules"], card["protocol"]
    simulator = (card["simulator"] or {}).get("simulator", "no simulator yet")
    who = policy["agent"] + f" ({policy['agent_file']})" * bool(policy["agent_file"])
    if policy["ckpt"]:
        decoding = f"temperature {policy['temperature']:g}" if policy["temperature"] else "greedy"
        served = f" served as {policy['served_model']}" * bool(policy["served_model"])
        who = (f"{policy['ckpt']} ({policy['weights']}){served}, prompt {policy['prompt']} "
               f"({policy['prompt_sha256']}), {decoding}, {policy['execute']} actions of a plan")
    answers = f"an unreadable answer: {rules['malformed']}, never a success; "
    who += "".join(f", control run: {key.replace('_', ' ')}" for key in (
        "blank_frames", "shuffled_instruction") if policy[key])
    commits = ", ".join((commit or "without git")[:10] + "+" * (commit or "").endswith("+")
                        for commit in card["code"])
    differ = ", ".join(f"{key} {json.dumps(ours)} (there {json.dumps(theirs)})"
                       for key, (theirs, ours) in held["departures"].items())
    return "\n".join((
        f"data    {data['file']} ({data['sha256'][:16]}), {card['scenes']['count']} scenes "
        f"({card['scenes']['sha256']}); {count['asked']} episodes asked for: {count['ended']} "
        f"ended, {count['failed']} failed, {count['unfinished']} unfinished",
        f"robot   {simulator}: turn {robot['turn_deg']:g} deg, step {robot['forward_m']:g} m, HFOV "
        f"{robot['hfov_deg']:g} deg, camera at {robot['camera_height_m']:g} m, body "
        f"{robot['height_m']:g} m, {'' if robot['sliding'] else 'no '}sliding, "
        f"{robot['width']} x {robot['height']} pixels",
        f"policy  {who}; code {commits}",
        f"rules   at most {rules['max_actions']} actions; success is STOP and d "
        f"{rules['success_rule']} {rules['success_m']:g} m; {answers * bool(policy['ckpt'])}"
        f"nDTW {rules['ndtw'] or 'not measured'}; "
        f"{'protocol' if held['asked_for'] else 'closest protocol'} {held['name']}, departures: "
        f"{differ or 'none'}"))
