"""
The success rate that half of the input could reach on a split of our houses.

A policy follows instructions only if its success rate is above both bounds. They are computed from
episodes and scenes, without a policy, and are optimistic.

words only    The policy gets the instruction and no frames. Names and the choice among equal
              phrases do not depend on where things stand, so only the wording counts: turns, doors,
              what is passed. For each wording we take the action sequence that succeeds most often,
              in hindsight, among "turn k times, walk n steps, stop" for all k and n, and CANDIDATES
              of the expert's walks of that wording.
pictures only The policy knows the house and its start, but not the instruction. It stops where most
              of the likely goals are within the radius (on a grid of 0.5 m and at the goals). These
              are the goals that world/houses.py could have drawn from that start: each thing at a
              distance that the level allows, weighted by how often a walk begins in another room.
              What houses.py rejects later (detours, half of the walks without a turn) is ignored.
              The episode counts with its probability of success.

Run it   python -m tools.bounds --split val_unseen
         python -m tools.report --summary .. --bounds     # below the table, for its splits
Reads    --episodes, with its scenes; the goals' radius is the data's
Expect   words .35, pictures .54 at level 1 (2.8 likely goals, two often near each other);
         20 seconds for 200 episodes
"""
from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict

import numpy as np

from cli import DefaultsFormatter, UserError, positive_int, run_cli
from evaluate import evenly_spaced
from intervals import cluster_bootstrap, describe_intervals, rate_interval, sampling_units
from reward import FORWARD, LEFT, RIGHT, STOP
from world import houses
from world.episodes import VLNCE_RADIUS_M, dataset_of, read_episodes, read_ground_truth, scenes_of
from world.house_sim import HouseSim, Scene, distances, moves
from world.robots import ROBOTS, heading

CUES = re.compile(r"turn (slightly|a bit|around|back)?(?: ?to the)? ?(left|right)"
                  r"|(?:pass|past) the [a-z ]+? on (?:your|the) (left|right)"
                  r"|(?:enter|into|door to)( the) |(straight) to the ")
GRID_M = 0.5
CANDIDATES = 100  # expert walks tried for each wording


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.bounds", formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    add = p.add_argument
    add("--split", default="val_unseen")
    add("--episodes", default="data/houses", help="folder that world/houses.py wrote")
    add("--limit", type=positive_int, help="so many episodes, spread evenly over the split")
    add("--max-actions", type=positive_int, default=500, help="of a walk; evaluate.py's")
    return p.parse_args(argv)


def wording(text: str) -> tuple[str, ...]:
    """The turns, doors and passed things of an instruction, in order, without names.

    >>> wording("turn left, go into the pink room, turn back to the right and stop by the red bed.")
    ('turn left', 'door', 'turn back right')
    >>> wording("enter the pink study, then pass the red bed on your left and wait at the sofa.")
    ('door', 'pass left')
    """
    cues = []
    for size, side, passed, door, straight in CUES.findall(text):
        size = {"a bit": "slightly", "around": "back"}.get(size, size)
        cues.append("door" if door else "straight" if straight else f"pass {passed}" if passed else
                    " ".join(filter(None, ("turn", size, side))))
    return tuple(cues)


# ---------------------------------------------------------------- words only


def straight_walks(robot: dict, max_actions: int) -> list[list[int]]:
    """Every "turn k times, walk n steps, stop" -> list of action lists."""
    half = round(180 / robot["turn_deg"])
    longest = max(level["metres"][1] for level in houses.LEVELS.values())
    return [[LEFT if k > 0 else RIGHT] * abs(k) + [FORWARD] * n + [STOP]
            for k in range(1 - half, half + 1) for n in range(round(longest / robot["forward_m"]))
            if abs(k) + n < max_actions]


def arrivals(sim: HouseSim, episode: dict, sequences: list[list[int]],
             radius: float) -> np.ndarray:
    """Which action sequences succeed? All are walked at once. -> (len(sequences),) bool"""
    sim.reset(episode)
    spots, yaws = np.tile(sim.spot, (len(sequences), 1)), np.full(len(sequences), sim.yaw)
    longest = max(map(len, sequences))
    actions = np.array([s + [STOP] * (longest - len(s)) for s in sequences])
    for now in actions.T:
        yaws += sim.turn * ((now == LEFT) * 1.0 - (now == RIGHT))
        walking = np.flatnonzero(now == FORWARD)
        if len(walking):
            steps = sim.robot["forward_m"] * heading(yaws[walking])
            spots[walking], _ = moves(sim.graph, spots[walking], steps, sim.robot["sliding"])
    metres = [distances(sim.graph, sim.distances_to(goal), spots)[0] for goal in sim.goals]
    return np.min(metres, axis=0) < radius


def words_only(sim: HouseSim, episodes: list[dict], truths: dict, radius: float,
               max_actions: int) -> tuple[np.ndarray, int]:
    """Does the best sequence of each episode's wording succeed? -> (n,) bool, number of wordings"""
    members = defaultdict(list)
    for i, episode in enumerate(episodes):
        members[wording(episode["instruction"]["instruction_text"])].append(i)
    arrived, plain = np.zeros(len(episodes), bool), straight_walks(sim.robot, max_actions)
    for some in members.values():
        own = [truths[str(episodes[i]["episode_id"])]["actions"]
               for i in evenly_spaced(some, CANDIDATES)]
        sequences = plain + [s for s in own if len(s) <= max_actions]
        found = np.array([arrivals(sim, episodes[i], sequences, radius) for i in some])
        arrived[some] = found[:, found.sum(axis=0).argmax()]
    return arrived, len(members)


# ---------------------------------------------------------------- pictures only


def read_house(scene: Scene) -> houses.House:
    """The rooms and things of a scene; its boxes and doors are not needed."""
    rooms = [houses.Room(name, "", lo[[0, 2]], hi[[0, 2]]) for role, name, lo, hi in
             zip(scene.roles, scene.names, scene.lo, scene.hi) if role == "floor"]
    house, boxes = houses.House(rooms, [], [], []), defaultdict(list)
    for role, name, lo, hi in zip(scene.roles, scene.names, scene.lo, scene.hi):
        if role == "object":
            boxes[name].append((lo[[0, 2]], hi[[0, 2]]))
    for name, corners in boxes.items():
        lo, hi = np.min(corners, axis=(0, 1)), np.max(corners, axis=(0, 1))
        house.things.append(houses.Thing(name, houses.room_at(house, *(lo + hi) / 2), lo, hi))
    return house


def likely_goals(sim: HouseSim, house: houses.House, episode: dict) -> list[tuple]:
    """What houses.draw_walk could have chosen from this start -> [(name, goal (x, z), weight)]."""
    level, start = episode["info"]["level"], episode["start_position"]
    here, others = houses.room_at(house, *sim.spot), len(house.rooms) - 1
    cross, found = houses.LEVELS[level]["cross"], []
    for thing in house.things:
        goal = houses.find_goal(sim, house, thing, start, level)
        weight = 1.0 if not others else cross / others if thing.room != here else 1 - cross
        if goal and weight:
            found.append((thing.name, (goal[0], goal[2]), weight))
    return found


def pictures_only(sim: HouseSim, episode: dict, radius: float) -> tuple[float, int]:
    """-> the probability that the best guess from this start succeeds; number of likely goals"""
    sim.reset(episode)
    house = read_house(sim.scene)
    goals = likely_goals(sim, house, episode)
    if episode["info"]["goal"] not in [name for name, _, _ in goals]:
        raise UserError(f"episode {episode['episode_id']}: houses.py as it is now could not have "
                        "drawn this walk; make the houses again")
    lo, hi = (np.array([getattr(room, end) for room in house.rooms]) for end in ("lo", "hi"))
    x, z = (np.arange(a, b, GRID_M) for a, b in zip(lo.min(axis=0), hi.max(axis=0)))
    grid = np.stack(np.meshgrid(x, z), axis=-1).reshape(-1, 2)
    spots = np.vstack([[goal for _, goal, _ in goals], grid[sim.free(grid)]])
    weights = np.array([weight for _, _, weight in goals])
    near = np.array([distances(sim.graph, sim.distances_to((x, 0, z)), spots)[0] < radius
                     for _, (x, z), _ in goals])                        # (goals, spots)
    return float((weights @ near).max() / weights.sum()), len(goals)


# ---------------------------------------------------------------- both


def bounds_of(source: str, split: str, limit: int | None, robot: dict, radius: float,
              max_actions: int) -> dict:
    """-> {"split", "episodes", "radius_m", "wordings", "likely_goals" (mean), "interval",
    "words_only": {"mean", "ci"}, "pictures_only": {..}}. UserError if these are no houses."""
    episodes = read_episodes(source, split)
    episodes = evenly_spaced(episodes, limit or len(episodes))
    if dataset_of(episodes[0]) != "houses":
        raise UserError(f"{source} holds no houses of ours: these bounds need to know how the "
                        "walks were drawn")
    if any("via" in episode["info"] for episode in episodes):
        raise UserError(f"{source} ({split}) is of level 4, whose walks go to another room and "
                        "back: these bounds are computed for levels 1 to 3")
    truths, scenes = read_ground_truth(source, split), scenes_of(source)
    sim = HouseSim(robot, os.path.abspath(scenes))
    units, kind = sampling_units(episodes)
    arrived, wordings = words_only(sim, episodes, truths, radius, max_actions)
    order = sorted(range(len(episodes)), key=lambda i: episodes[i]["scene_id"])     # a load a scene
    guesses = dict(zip(order, (pictures_only(sim, episodes[i], radius) for i in order)))
    shares, likely = zip(*(guesses[i] for i in range(len(episodes))))
    return {"split": split, "episodes": len(episodes), "radius_m": radius, "wordings": wordings,
            "words_only": {"mean": round(float(arrived.mean()), 6),
                           "ci": rate_interval(arrived, np.ones(len(arrived)), units)},
            "pictures_only": cluster_bootstrap({"p": shares}, units)["p"],
            "likely_goals": round(float(np.mean(likely)), 2),
            "interval": {"units": kind, "n_units": len(set(units))}}


def print_bounds(every: list[dict]):
    """A line for each bound of each split."""
    print("SR that half of the input could reach, computed from the episodes (tools/bounds.py):")
    for name in ("words_only", "pictures_only"):
        for found in every:
            ci = "[{:.2f}, {:.2f}]".format(*found[name]["ci"]) if found[name]["ci"] else "all alike"
            how = (f"best action sequence for each of {found['wordings']} wordings, in hindsight"
                   if name == "words_only" else
                   f"best guess among {found['likely_goals']:.1f} things (mean), map known")
            print(f"{name:15}{found['split']:12}{found['episodes']:6}  {found[name]['mean']:5.2f} "
                  f"{ci:14} {how}")


def main(args):
    goals = [goal for e in read_episodes(args.episodes, args.split) for goal in e["goals"]]
    radius = max((goal.get("radius") or VLNCE_RADIUS_M for goal in goals), default=VLNCE_RADIUS_M)
    found = bounds_of(args.episodes, args.split, args.limit, ROBOTS["houses"], radius,
                      args.max_actions)
    print_bounds([found])
    print("95% intervals: " + describe_intervals(found["interval"]))
    return found


if __name__ == "__main__":
    run_cli(main, parse_args)
