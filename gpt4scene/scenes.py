"""
GPT4Scene's data: scenes as pictures with numbered marks, and questions about them [1].

A scene is a bird's-eye view and some frames. The objects that a detector proposed carry the same
number on all of them, and texts call them <OBJ007>. Five benchmarks ask:
    scanqa       "What colour is the chair?"                                     free text
    sqa3d        "I am in the middle of the pink room .. What is on my left?"    free text
    scan2cap     "Describe <OBJ003>."                                            free text
    scanrefer    "Which object is this: the chair in the pink room?"             a mark
    multi3dref   "Which objects are these: red or blue things?"                  marks, or none
Embedded: the houses of world/houses.py are the scenes; proposals are the true boxes with noise, in
a random order. The `dense` curriculum, to begin with, lists all marks, in two answers. Real: the
official annotations, attributes (.pt) and pictures become the same files.

Run it   python -m gpt4scene.scenes [--rooms 1] [--no-marks] [--no-bev]
         python -m gpt4scene.scenes --split val --images scannet --scanqa ScanQA_v1.0_val.json \\
             --truth scannet_val_attributes.pt --proposals scannet_mask3d_val_attributes.pt
         python -m gpt4scene.scenes --check data/scenes        # without a GPU or a model
Writes   <out>/images_2D/<scene>/<k>.png, images_3D/<scene>.png (the bird's-eye view); per split
         <split>.json (ShareGPT), dense_<split>.json (ShareGPT, the curriculum),
         selected_images_<split>.json, <benchmark>_<split>.json, scan2cap_<split>_corpus.json,
         attributes_<split>.json (boxes); unique_multiple_lookup.json; at last meta.json: the
         flags, and what best constants reach per template
Expect   700 + 60 scenes in a minute on one core; the same seed gives the same files

[1] GPT4Scene, https://arxiv.org/abs/2501.01428   [2] Chat-Scene (formats), arXiv 2312.08168
"""
from __future__ import annotations

import argparse
import concurrent.futures
import glob
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cli import (
    DefaultsFormatter,
    UserError,
    lock_folder,
    non_negative,
    positive_int,
    run_cli,
    whole_number,
    write_json,
)
from gpt4scene.scores import NEEDS, SQA_TYPES, box_iou, read_attributes
from make_data import encode
from world import houses
from world.episodes import read_json
from world.house_sim import HouseSim, camera_rays, cast
from world.robots import ROBOTS, rotation_of, yaw_of

MIN_IOU = 0.5            # a proposal stands for an object from here on (their run_prepare.sh)
VISIBLE = 0.01           # share of a frame that an object must fill to carry its mark
PATCH = 14               # pixels: Qwen2-VL's vision tower sees patches of this size
CLEARLY = 1.25           # the second nearest is at least so many times as far as the nearest
NUMBERS = "zero one two three four five six seven eight nine ten".split()

# Ours: a released checkpoint knows the prompts of the released annotations, so give it those.
# Embedded scenes use the first wording, real questions draw one.
SHORT_ANSWER = " Answer with one word or a short phrase."
WORDINGS = {
    "scan2cap": ("Describe {}.", "What does {} look like, and where is it?"),
    "scanrefer": ("Which object is this: {}?", 'Give the ID of the object described by "{}".'),
    "multi3dref": ("Which objects are these: {}?", 'List the IDs of any objects like "{}".'),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Make GPT4Scene's pictures and questions.",
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--out", default="data/scenes")
    add("--seed", type=whole_number, default=0)
    add("--frames", type=whole_number, default=8, help="per scene; the paper's 32; 0: none"
        " but the view")
    add("--no-bev", action="store_true", help="without the bird's-eye view")
    add = p.add_argument_group("embedded scenes").add_argument
    add("--train-scenes", type=positive_int, default=700)
    add("--val-scenes", type=positive_int, default=60)
    add("--level", type=int, choices=sorted(houses.LEVELS), default=1, help="of the houses")
    add("--rooms", type=positive_int, help="of every house; default: as the level draws them")
    add("--questions", type=positive_int, default=24, help="K, per scene, of all kinds alike")
    add("--frame-pixels", type=positive_int, default=56)
    add("--bev-pixels", type=positive_int, default=168)
    add("--proposal-noise", type=non_negative, default=1.0,
        help="0: exact boxes, one for every object")
    add("--no-marks", action="store_true", help="leave the numbers off the pictures")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="processes")
    add = p.add_argument_group("real scenes").add_argument
    add("--images", metavar="DIR", help="holds images_3D/<scene>.* and images_2D/<scene>/<k>.*")
    add("--split", default="val", help="what the files are called")
    add("--scanqa", metavar="FILE")
    add("--sqa3d", nargs=2, metavar=("QUESTIONS", "ANNOTATIONS"))
    add("--scan2cap", metavar="FILE", help="ScanRefer's file: its descriptions are the captions")
    add("--scanrefer", metavar="FILE")
    add("--multi3dref", metavar="FILE")
    add("--truth", metavar="FILE", help="scannet_*_attributes.pt: {scene: {objects, locs}}")
    add("--proposals", metavar="FILE", help="scannet_mask3d_*_attributes.pt")
    add = p.add_argument_group("check").add_argument
    add("--check", nargs="+", metavar="PATH", help="only check ShareGPT files, or folders of them")
    add("--image-root", help="where the pictures' paths start; default: the file's folder")
    add("--context", type=positive_int, default=32768, help="tokens; Qwen2-VL's")
    add("--longest-side", type=positive_int, default=512, help="of a picture, in pixels")
    return p.parse_args(argv)


# ---------------------------------------------------------------- boxes


class Boxes(NamedTuple):
    """A scene's n objects and m proposals. A box is (centre x, y, z, size x, y, z), metres, z up.
    """
    labels: list
    truth: np.ndarray           # (n, 6)
    proposal_labels: list
    proposals: np.ndarray       # (m, 6); a proposal's row is its number on the pictures
    best: np.ndarray            # (n,) the proposal that fits an object best
    iou: np.ndarray             # (n,) how well it does

    def mark(self, number: int) -> str | None:
        """The mark that stands for an object; None if no proposal fits it."""
        return f"<OBJ{self.best[number]:03d}>" if self.iou[number] >= MIN_IOU else None


def pair_boxes(labels, truth, proposal_labels, proposals) -> Boxes:
    """Find each object's best proposal."""
    iou = box_iou(truth, np.vstack([proposals, np.zeros((1, 6))]))      # (n, m + 1): m may be 0
    return Boxes(labels, truth, proposal_labels, proposals, iou.argmax(axis=1), iou.max(axis=1))


# ---------------------------------------------------------------- questions of both worlds


class Question(NamedTuple):
    benchmark: str
    template: str               # best constants are counted per template
    prompt: str
    trained: list               # answers, a record each; none if an object has no proposal
    references: list            # answers that are right
    fields: dict                # the benchmark's own: obj_id, sqa_type, ..


class Scene(NamedTuple):
    name: str
    images: list                # paths, relative to --out; the bird's-eye view first
    boxes: Boxes | None
    questions: list
    dense: list = []            # the questions of the curriculum, of an embedded scene


def sqa_type(question: str) -> int:
    """The type by which SQA3D's score is broken down: 0 to 5, by the first word."""
    first = question.lower().split(" ")[0]
    return SQA_TYPES.index(first if first in SQA_TYPES else "other")


def sentence(text: str) -> str:
    """A capital first and a full stop last.

    >>> sentence("dark brown")
    'Dark brown.'
    """
    return text[:1].upper() + text[1:] + ("" if text[-1:] in (".", "!", "?") else ".")


def list_marks(marks: list[str]) -> str:
    """Multi3DRefer's answer.

    >>> list_marks(["<OBJ007>", "<OBJ001>", "<OBJ003>"]), list_marks(["<OBJ002>", "<OBJ001>"])
    ('Yes. <OBJ001>, <OBJ003>, and <OBJ007>.', 'Yes. <OBJ001> and <OBJ002>.')
    """
    *others, last = sorted(set(marks)) or [""]
    comma = "," if len(others) > 1 else ""
    return f"Yes. {', '.join(others)}{comma}{others and ' and ' or ''}{last}." if last else "No."


def text_question(benchmark: str, template: str, prompt: str, *answers: str, **fields) -> Question:
    """ScanQA's or SQA3D's, of an embedded scene: the first of the right answers is trained."""
    return Question(benchmark, template, prompt, [sentence(answers[0])], list(answers), fields)


def caption_question(boxes: Boxes, number: int, captions: list[str], wording: str) -> Question:
    """Scan2Cap: describe the best proposal of object `number`."""
    fields = {"obj_id": number, "pred_id": int(boxes.best[number]),
              "iou": round(float(boxes.iou[number]), 4),
              "ref_captions": [f"sos {caption} eos" for caption in captions]}
    return Question("scan2cap", "caption", wording.format(f"<OBJ{boxes.best[number]:03d}>"),
                    captions if boxes.mark(number) else [], captions, fields)


def refer_question(boxes: Boxes, number: int, text: str, wording: str,
                   template: str = "all") -> Question:
    """ScanRefer: the mark of object `number`, which a text describes."""
    answers = [f"{boxes.mark(number)}."] if boxes.mark(number) else []
    return Question("scanrefer", template, wording.format(text), answers, answers,
                    {"obj_id": number, "pred_id": int(boxes.best[number])})


def multi_question(boxes: Boxes, numbers: list[int], text: str, eval_type: str, wording: str,
                   template: str = "all") -> Question:
    """Multi3DRefer: the marks of all objects that a text describes."""
    marks = [boxes.mark(number) for number in numbers]
    answers = [] if None in marks else [list_marks(marks)]
    return Question("multi3dref", template, wording.format(text), answers, answers,
                    {"eval_type": eval_type, "ref_captions": list(numbers)})


# ---------------------------------------------------------------- questions about a house


class Fact(NamedTuple):
    """What is asked about one thing of a house."""
    number: int
    name: str                   # "red chair"
    colour: str
    kind: str
    room: str                   # "pink room" at any level: that it is a study cannot be seen
    centre: np.ndarray          # (2,) x and z
    near: Fact | None           # the thing of the same room that is clearly the nearest


def read_facts(house: houses.House) -> list[Fact]:
    facts = []
    for number, thing in enumerate(house.things):
        room = f"{house.rooms[thing.room].wall} room"
        facts.append(Fact(number, thing.name, *thing.name.split(" ", 1), room,
                          (thing.lo + thing.hi) / 2, None))
    for fact in list(facts):
        others = [other for other in facts if other.room == fact.room and other.name != fact.name]
        metres = [float(np.hypot(*(other.centre - fact.centre))) for other in others]
        first, second = np.argsort(metres)[:2]
        if metres[second] >= CLEARLY * metres[first]:
            facts[fact.number] = fact._replace(near=others[first])
    return facts


def article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def scanqa_questions(facts: list[Fact]) -> Iterator[Question]:
    kinds, colours, rooms = (Counter(getattr(fact, key) for fact in facts)
                             for key in ("kind", "colour", "room"))
    for fact in facts:
        where = f" in the {fact.room}" if kinds[fact.kind] > 1 else ""
        asked = [("colour", f"What colour is the {fact.kind}{where}?", fact.colour,
                  f"it is {fact.colour}"),
                 ("room", f"In which room is the {fact.name}?", f"the {fact.room}", fact.room)]
        if colours[fact.colour] == 1:
            asked.append(("kind", f"What is {fact.colour}?", f"the {fact.kind}",
                          article(fact.kind), fact.kind))
        if fact.near:
            near = fact.near.name
            asked.append(("nearest", f"What is nearest to the {fact.name}?", f"the {near}",
                          article(near), near))
        yield from (text_question("scanqa", *words, obj_id=fact.number) for words in asked)
    for template, counts, words in (
            ("count", {kind: kinds[kind] for kind in houses.FURNITURE}, "{}s are there"),
            ("count room", rooms, "things are in the {}")):
        for what, n in counts.items():
            yield text_question("scanqa", template, f"How many {words.format(what)}?", NUMBERS[n],
                                str(n))


SIDES = {"front": "in front of me", "left": "on my left", "behind": "behind me",
         "right": "on my right"}


def side_of(middle: np.ndarray, ahead: np.ndarray, point: np.ndarray) -> str | None:
    """On which side of a person in `middle` who looks towards `ahead` is a point? All are (x, z), x
    to the east and z to the south. None: within 10 degrees of two sides' border, or too near.

    >>> north, west = np.array([0, -1]), np.array([-1, 0])
    >>> side_of(np.zeros(2), north, west), side_of(np.zeros(2), west, -west)
    ('left', 'behind')
    """
    (ax, az), (px, pz) = ahead - middle, point - middle
    left_deg = np.degrees(np.arctan2(az * px - ax * pz, ax * px + az * pz)) % 360
    if abs((left_deg + 45) % 90 - 45) > 35 or np.hypot(px, pz) < 0.5:
        return None
    return list(SIDES)[round(left_deg / 90) % 4]


def sqa3d_questions(house: houses.House, facts: list[Fact]) -> Iterator[Question]:
    """From the middle of a room, facing one of its things: all six types."""
    def ask(template, question, *answers):
        return text_question("sqa3d", template, f"{situation} {question}", *answers,
                             sqa_type=sqa_type(question))

    for front in facts:
        room = house.rooms[house.things[front.number].room]
        others = {fact.name: side_of((room.lo + room.hi) / 2, front.centre, fact.centre)
                  for fact in facts if fact.room == front.room and fact.name != front.name}
        if None in others.values():
            continue
        situation = f"I am in the middle of the {front.room} facing the {front.name}."
        for side, words in SIDES.items():
            there = [name for name, other in others.items() if other == side]
            if side != "front" and len(there) == 1:     # what is faced stands in front, too
                yield ask("what", f"What is {words}?", f"the {there[0]}", article(there[0]),
                          there[0])
            if side != "front":
                yield ask("how many", f"How many things are {words}?", NUMBERS[len(there)],
                          str(len(there)))
            for name in others:
                answer = "yes" if name in there else "no"
                yield ask("is", f"Is the {name} {words}?", answer)
                if side in ("left", "right"):
                    yield ask("can", f"Can I see the {name} after I turn {side}?", answer)
        for name, side in others.items():
            yield ask("where", f"Where is the {name}?", SIDES[side])
            if side in ("left", "right"):
                yield ask("which", f"Which side of me is the {name} on?", side, f"the {side}")


def object_questions(facts: list[Fact], boxes: Boxes) -> Iterator[Question]:
    """Scan2Cap's and ScanRefer's: about one object each."""
    kinds, colours = Counter(f.kind for f in facts), Counter(f.colour for f in facts)
    for fact in facts:
        beside = f", next to the {fact.near.name}" if fact.near else ""
        caption = f"This is {article(fact.name)}. It is in the {fact.room}{beside}."
        other = f"{sentence(article(fact.name))[:-1]} in the {fact.room}{beside}."
        question = caption_question(boxes, fact.number, [caption, other], WORDINGS["scan2cap"][0])
        yield question._replace(trained=question.trained[:1])
        texts = {"name": f"the {fact.name}", "room": f"the {fact.kind} in the {fact.room}"}
        texts |= {"colour": f"the {fact.colour} thing"} if colours[fact.colour] == 1 else {}
        texts |= {"kind": f"the {fact.kind}"} if kinds[fact.kind] == 1 else {}
        texts |= {"nearest": f"the thing nearest to the {fact.name}"} if fact.near else {}
        for template, text in texts.items():
            number = fact.near.number if template == "nearest" else fact.number
            yield refer_question(boxes, number, text, WORDINGS["scanrefer"][0], template)


def multi3dref_questions(facts: list[Fact], boxes: Boxes) -> Iterator[Question]:
    """Of all five eval_types; a distractor is another object of the kind that is asked for."""
    def ask(template: str, text: str, matches: Callable, kind: str = ""):
        numbers = [fact.number for fact in facts if matches(fact)]
        distracts = any(fact.kind == kind and not matches(fact) for fact in facts)
        eval_type = "mt" if len(numbers) > 1 else (
            ("st" if numbers else "zt") + ("_w_d" if distracts else "_wo_d"))
        return multi_question(boxes, numbers, text, eval_type, WORDINGS["multi3dref"][0], template)

    for kind in houses.FURNITURE:
        yield ask("kind", f"{kind}s", lambda fact, kind=kind: fact.kind == kind)
        for colour in houses.PAINTS:
            yield ask("name", f"{colour} {kind}s",
                      lambda fact, name=f"{colour} {kind}": fact.name == name, kind)
    for a in houses.PAINTS:
        for b in houses.PAINTS:
            if a < b:
                yield ask("either", f"{a} or {b} things",
                          lambda fact, both=(a, b): fact.colour in both)
    for wall in houses.WALLS:
        yield ask("room", f"things in the {wall} room",
                  lambda fact, room=f"{wall} room": fact.room == room)


def dense_questions(facts: list[Fact], marks: list) -> list[Question]:
    """Answers that say something about every mark: many bindings for few tokens. One goes from
    marks to things, the other from colours to marks."""
    shown = [(f"<OBJ{mark:03d}>", fact) for mark, fact in zip(marks, facts) if mark is not None]
    lists = {"List all objects with their colour and kind.":
             sorted(f"{mark} {fact.name}" for mark, fact in shown),
             "List all colours with their objects.":
             sorted(f"{fact.colour} {mark}" for mark, fact in shown)}
    return [Question("dense", "all", prompt, [", ".join(parts) + "."], [], {})
            for prompt, parts in lists.items()]


def choose_questions(rng, candidates: list[Question], count: int) -> list[Question]:
    """At most `count`: the benchmarks in turn; of one a template at random, of a template an answer
    (or eval_type) at random, so that few answers are right much too often."""
    pools, chosen = {benchmark: [] for benchmark in NEEDS}, []
    for question in candidates:
        pools[question.benchmark].append(question)
    while any(pools.values()) and len(chosen) < count:
        for pool in filter(None, pools.values()):
            template = rng.choice(sorted({question.template for question in pool}))
            groups = defaultdict(list)
            for question in pool:
                if question.template == template:
                    answer = "".join(question.references[:1])
                    groups[question.fields.get("eval_type", answer)].append(question)
            group = groups[rng.choice(sorted(groups))]
            chosen.append(group[rng.integers(len(group))])
            pool.remove(chosen[-1])
    return chosen[:count]


# ---------------------------------------------------------------- pictures of a house

# 3 x 5 pixels a digit: what a frame of 56 pixels has room for and is still read by eye
DIGITS = ("111101101101111", "010110010010111", "111001111100111", "111001111001111",
          "101101111001001", "111100111001111", "111100111101111", "111001010010010",
          "111101111101111", "111101111001111")


def mark_pattern(number: int, scale: int) -> np.ndarray:
    """A number in white on black: uint8 (7, 4 digits + 1), times `scale`."""
    digits = [np.array([*DIGITS[int(digit)]], int).reshape(5, 3) for digit in str(number)]
    pattern = np.pad(np.hstack([np.pad(digit, ((0, 0), (0, 1))) for digit in digits]),
                     ((1, 1), (1, 0)))
    return np.kron(pattern, np.full((scale, scale), 255)).astype(np.uint8)


def draw_marks(image: np.ndarray, shown: np.ndarray, marks: list, label: bool, least: float
               ) -> None:
    """Write each visible thing's number into a picture (h, w, 3), in the middle of the patch that
    shows most of it and least of the others: a number looks the same to the vision tower wherever
    it stands. label: large, and on the thing's colour, which fills the patch.

    shown: (h, w) the thing of each pixel, or -1; least: pixels that a marked thing must have
    """
    def patches(pixels: np.ndarray) -> Counter:
        return Counter(map(tuple, (np.argwhere(pixels) // PATCH).tolist()))
    covered, bare, taken = patches(shown >= 0), image.copy(), set()
    for thing, mark in enumerate(marks):
        own = patches(shown == thing)
        free = sorted(set(own) - taken, key=lambda patch: (covered[patch] - 2 * own[patch], patch))
        if mark is None or own.total() < least or not free:
            continue
        taken.add(free[0])
        top, left = PATCH * np.array(free[0])
        if label:
            image[top:top + PATCH, left:left + PATCH] = np.median(bare[shown == thing], axis=0)
        pattern = mark_pattern(mark, 2 if label else 1)
        (h, w), (height, width) = pattern.shape, shown.shape
        top = min(max(top + (PATCH - h) // 2, 0), height - h)
        left = min(max(left + (PATCH - w) // 2, 0), width - w)
        image[top:top + h, left:left + w] = pattern[..., None]


def birds_eye(house: houses.House, marks: list, pixels: int) -> np.ndarray:
    """The house from above, without ceilings, filling a square: uint8 (pixels, pixels, 3). North,
    -z, is up. Walls are drawn 0.25 m thick, or their colour would be a line of one pixel."""
    lo = np.min([room.lo for room in house.rooms], axis=0)
    size = np.max([room.hi for room in house.rooms], axis=0) - lo
    scale, lo = pixels / size.max(), lo - (size.max() - size) / 2
    rooms = {room.name: room for room in house.rooms}
    image = np.full((pixels, pixels, 3), 255, np.uint8)
    shown, number = np.full((pixels, pixels), -1), {t.name: k for k, t in enumerate(house.things)}
    low = [box for box in house.boxes if box.role == "object"
           or box.role in ("floor", "wall") and box.lo[1] < 1]      # without what is above a door
    for box in sorted(low, key=lambda box: (box.role == "object", box.role == "wall", box.hi[1])):
        start, end = np.array(box.lo)[[0, 2]], np.array(box.hi)[[0, 2]]
        if box.role == "wall":
            start = np.maximum(start - 0.25 + houses.SLAB, rooms[box.name].lo)
            end = np.minimum(end + 0.25 - houses.SLAB, rooms[box.name].hi)
        (x0, z0), (x1, z1) = (((corner - lo) * scale).round().astype(int)
                              for corner in (start, end))
        image[z0:z1, x0:x1] = box.colour
        shown[z0:z1, x0:x1] = number.get(box.name, -1)
    draw_marks(image, shown, marks, True, 1)
    return image


def viewpoints(rng, house: houses.House, sim: HouseSim, count: int) -> np.ndarray:
    """`count` poses (count, 7), spread over the rooms: at the free place next to a room's middle,
    headings in equal steps, the first one at random."""
    poses = []
    for number, room in enumerate(house.rooms):
        views = count // len(house.rooms) + (number < count % len(house.rooms))
        grid = np.stack(np.meshgrid(*np.linspace(room.lo, room.hi, 41).T), axis=-1).reshape(-1, 2)
        grid = grid[sim.free(grid)]
        x, z = grid[np.hypot(*(grid - (room.lo + room.hi) / 2).T).argmin()]
        first = rng.uniform(0, 2 * np.pi)
        poses += [[x, 0, z, *rotation_of(first + 2 * np.pi * k / views)] for k in range(views)]
    return np.array(poses)


def visible_things(sim: HouseSim, house: houses.House, poses: np.ndarray) -> np.ndarray:
    """What each pixel of each view shows: the thing's number, -1 for anything else. (T, H, W)"""
    number = {thing.name: k for k, thing in enumerate(house.things)}
    owner = np.array([number[name] if role == "object" else -1
                      for name, role in zip(sim.scene.names, sim.scene.roles)] + [-1])
    width, height = sim.robot["width"], sim.robot["height"]
    origins = poses[:, :3] + [0, sim.robot["camera_height_m"], 0]
    yaws = np.array([yaw_of(pose[3:]) for pose in poses])
    code, _ = cast(sim.scene, origins,
                   camera_rays(yaws, width, height, sim.robot["hfov_deg"]))
    return owner[code >> 2].reshape(len(poses), width, height).transpose(0, 2, 1)


def draw_frames(rng, house: houses.House, marks: list, count: int, side: int) -> np.ndarray:
    """Views of the house, each visible thing with its mark: uint8 (count, side, side, 3)."""
    with tempfile.TemporaryDirectory() as folder:
        houses.write_glb(f"{folder}/house.glb", house.boxes)
        sim = HouseSim(dict(ROBOTS["houses"], width=side, height=side), folder)
        sim.load("house.glb")
    poses = viewpoints(rng, house, sim, count)
    frames = sim.render(poses)
    for frame, shown in zip(frames, visible_things(sim, house, poses)):
        draw_marks(frame, shown, marks, False, VISIBLE * shown.size)
    return frames


# ---------------------------------------------------------------- embedded scenes


def propose(rng, house: houses.House, noise: float) -> tuple[Boxes, list]:
    """What a detector would say: the true boxes, jittered (one in 16 badly), one in 50 missing, in
    a random order. -> Boxes; the number of each thing on the pictures, None if it is missing"""
    parts = [[box for box in house.boxes if box.role == "object" and box.name == thing.name]
             for thing in house.things]
    lo = np.array([np.min([box.lo for box in boxes], axis=0) for boxes in parts])
    hi = np.array([np.max([box.hi for box in boxes], axis=0) for boxes in parts])
    centres = ((lo + hi) / 2 * (1, 1, -1))[:, [0, 2, 1]]            # z up, as ScanNet's boxes
    truth = np.hstack([centres, (hi - lo)[:, [0, 2, 1]]])
    bad, missing = rng.random((2, len(truth))) < noise * np.array([[1 / 16], [1 / 50]])
    jitter = rng.normal(size=(len(truth), 6)) * np.where(bad, 0.25, 0.05)[:, None] * noise
    order = rng.permutation(np.flatnonzero(~missing))
    proposals = np.hstack([centres + jitter[:, :3] * truth[:, 3:],
                           truth[:, 3:] * np.exp(jitter[:, 3:])])
    numbers = {int(thing): number for number, thing in enumerate(order)}
    labels = [thing.name.split(" ", 1)[1] for thing in house.things]
    return (pair_boxes(labels, truth, [labels[k] for k in order], proposals[order]),
            [numbers.get(k) for k in range(len(truth))])


def make_scene(task: tuple) -> Scene:
    """One house: its boxes, pictures and questions. A worker's unit of work."""
    args, split, number = task
    draw, house = [args.seed, ("train", "val").index(split), number], None
    attempts = (np.random.default_rng([*draw, attempt]) for attempt in range(1000))
    while house is None or args.rooms not in (None, len(house.rooms)):
        house = houses.build_house(next(attempts), args.level)
    # a generator for each: the ablations differ in their pictures, not in their questions
    boxes, marks = propose(np.random.default_rng([*draw, 1000]), house, args.proposal_noise)
    facts = read_facts(house)
    questions = choose_questions(np.random.default_rng([*draw, 1001]), [
        *scanqa_questions(facts), *sqa3d_questions(house, facts), *object_questions(facts, boxes),
        *multi3dref_questions(facts, boxes)], args.questions)
    name, drawn = f"{'hu'[draw[1]]}{number:05d}", [None] * len(marks) if args.no_marks else marks
    pictures = {} if args.no_bev else {
        f"images_3D/{name}.png": birds_eye(house, drawn, args.bev_pixels)}
    for k, frame in enumerate(draw_frames(np.random.default_rng([*draw, 1002]), house, drawn,
                                          args.frames, args.frame_pixels) if args.frames else ()):
        pictures[f"images_2D/{name}/{k}.png"] = frame
    for path, picture in pictures.items():
        houses.write_file(os.path.join(args.out, path), encode(picture, "png"))
    return Scene(name, list(pictures), boxes, questions, dense_questions(facts, marks))


def progress(**bar) -> dict:
    """tqdm's settings: a line in half a minute where the output is a file."""
    return dict(smoothing=0, mininterval=1 if sys.stderr.isatty() else 30, **bar)


def embedded_scenes(args) -> dict[str, list[Scene]]:
    """-> {split: its scenes}"""
    few, many = houses.LEVELS[args.level]["rooms"]
    if args.rooms and not few <= args.rooms <= many:
        raise UserError(f"--rooms {args.rooms}: houses of --level {args.level} have {few} to "
                        f"{many} rooms; choose another level")
    if min(args.frame_pixels, args.bev_pixels) < 28:
        raise UserError("--frame-pixels and --bev-pixels must be at least 28, which is one token")
    sizes = {"train": args.train_scenes, "val": args.val_scenes}
    tasks = [(args, split, number) for split in sizes for number in range(sizes[split])]
    bar = progress(total=len(tasks), desc="scenes", unit="scene")
    if args.jobs == 1:
        done = list(tqdm(map(make_scene, tasks), **bar))
    else:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
            done = list(tqdm(pool.map(make_scene, tasks, chunksize=4), **bar))
    return {"train": done[:args.train_scenes], "val": done[args.train_scenes:]}


# ---------------------------------------------------------------- real scenes


def read_records(path: str, key: str | None = None, **fields: type) -> list[dict]:
    """A file's list of records (the one under `key`, if given), all with these fields. UserError
    names the record and the field."""
    rows = read_json(path)
    if key:
        rows = rows.get(key) if isinstance(rows, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no list of {key or 'records'}; give the official file")
    for k, row in enumerate(rows):
        for field, kind in {"scene_id": str, **fields}.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise UserError(f"{path}: record {k}: {field!r} is missing or of another type than "
                                f"{kind.__name__}; give the official file")
    return rows


def read_sqa3d(questions: str, annotations: str) -> Iterator[dict]:
    """SQA3D's two files as one: each question with its "answers", as texts."""
    answers = {row["question_id"]: [answer["answer"] for answer in row["answers"]] for row in
               read_records(annotations, "annotations", question_id=int, answers=list)}
    for row in read_records(questions, "questions", question_id=int, question=str, situation=str,
                            alternative_situation=list):
        if not answers.get(row["question_id"]):
            raise UserError(f"--sqa3d {questions}: question {row['question_id']} has no answer in "
                            f"{annotations}; give two files of one split")
        yield {**row, "answers": answers[row["question_id"]]}


def real_questions(args, boxes: dict, rng) -> Iterator[tuple[str, Question]]:
    """The annotations that the flags name -> (scene, Question), in the files' order."""
    def target(path, row, number):
        """-> the scene's boxes, the object's number"""
        scene = boxes.get(row["scene_id"])
        if scene is None or not str(number).isdecimal() or int(number) >= len(scene.labels):
            raise UserError(f"{path}: object {number} of {row['scene_id']} has no box in --truth "
                            f"or no proposals; give the attributes of the same split")
        return scene, int(number)

    for row in read_records(args.scanqa, question=str, answers=list) if args.scanqa else ():
        answers = row["answers"]
        distinct = [text for k, text in enumerate(answers) if [text] != answers[max(0, k - 1):k]]
        yield row["scene_id"], Question(
            "scanqa", "all", row["question"] + SHORT_ANSWER, [*map(sentence, distinct)], answers,
            {"qid": row.get("question_id"), "obj_id": (row.get("object_ids") or [0])[0]})
    for row in read_sqa3d(*args.sqa3d) if args.sqa3d else ():
        situation = rng.choice([row["situation"], *row["alternative_situation"]])
        yield row["scene_id"], Question(
            "sqa3d", "all", f"{situation} {row['question']}{SHORT_ANSWER}",
            [sentence(str(rng.choice(row["answers"])))], row["answers"],
            {"qid": row["question_id"], "sqa_type": sqa_type(row["question"])})
    captions = defaultdict(list)
    described = dict(object_id=str, description=str)
    for row in read_records(args.scan2cap, **described) if args.scan2cap else ():
        captions[row["scene_id"], row["object_id"]].append(row["description"].strip())
    for (scene, number), texts in captions.items():
        yield scene, caption_question(*target(args.scan2cap, {"scene_id": scene}, number), texts,
                                      rng.choice(WORDINGS["scan2cap"]))
    for row in read_records(args.scanrefer, **described) if args.scanrefer else ():
        yield row["scene_id"], refer_question(
            *target(args.scanrefer, row, row["object_id"]),
            row["description"].strip().rstrip(".,!?"), rng.choice(WORDINGS["scanrefer"]))
    described = dict(object_ids=list, description=str, eval_type=str)
    for row in read_records(args.multi3dref, **described) if args.multi3dref else ():
        numbers = [target(args.multi3dref, row, number)[1] for number in row["object_ids"]]
        yield row["scene_id"], multi_question(
            target(args.multi3dref, row, 0)[0], numbers, row["description"].strip().rstrip(".,!?"),
            row["eval_type"], rng.choice(WORDINGS["multi3dref"]))


def find_pictures(args, scene: str) -> list[str]:
    """Paths, relative to --out, of a scene's bird's-eye view and of evenly spaced frames."""
    above = sorted(glob.glob(os.path.join(args.images, "images_3D", scene + ".*")))
    frames = sorted(glob.glob(os.path.join(args.images, "images_2D", scene, "*.*")),
                    key=lambda path: [int(n) for n in re.findall(r"\d+", os.path.basename(path))])
    if (args.frames and not frames) or not (above or args.no_bev):
        raise UserError(f"--images {args.images} lacks images_2D/{scene}/ or images_3D/{scene}.png"
                        " (or .jpg); copy them, or leave the view out with --no-bev")
    steps = np.linspace(0, len(frames) - 1, min(args.frames, len(frames))).round().astype(int)
    paths = ([] if args.no_bev else above[:1]) + [frames[step] for step in steps]
    return [os.path.relpath(path, args.out) for path in paths]


def real_scenes(args) -> dict[str, list[Scene]]:
    """-> {split: its scenes}, in the annotations' order"""
    if not args.images:
        raise UserError("real questions need pictures: name their folder with --images")
    boxes, asked = {}, defaultdict(list)
    if args.scan2cap or args.scanrefer or args.multi3dref:
        if not (args.truth and args.proposals):
            raise UserError("questions about objects need boxes: name their .pt files with --truth "
                            "and --proposals")
        truth, *_ = read_attributes(args.truth).values()        # our files hold both
        *_, proposals = read_attributes(args.proposals).values()
        boxes = {scene: pair_boxes(*(entries[scene].get(key, []) for entries in (truth, proposals)
                                     for key in ("objects", "locs")))
                 for scene in truth if scene in proposals}
    for scene, question in real_questions(args, boxes, np.random.default_rng(args.seed)):
        asked[scene].append(question)
    return {args.split: [Scene(scene, find_pictures(args, scene), boxes.get(scene), questions)
                         for scene, questions in asked.items()]}


# ---------------------------------------------------------------- the files


def sharegpt(asked: list[tuple[Scene, Question]]) -> list[dict]:
    """A record for each answer that is trained."""
    return [{"conversations": [
        {"from": "human", "value": "<image>" * len(scene.images) + question.prompt},
        {"from": "gpt", "value": answer}], "images": scene.images}
        for scene, question in asked for answer in question.trained]


def write_split(out: str, split: str, scenes: list[Scene]) -> None:
    """The files of one split."""
    entries, corpus = defaultdict(list), {}
    boxes = {scene.name: scene.boxes for scene in scenes if scene.boxes}
    for scene in scenes:
        for question in scene.questions:
            rows = entries[question.benchmark]
            rows.append({"scene_id": scene.name, "qid": len(rows), "obj_id": 0, "pred_id": 0,
                         "prompt": question.prompt, "ref_captions": question.references,
                         "template": question.template, **question.fields})
            if question.benchmark == "scan2cap":
                corpus[f"{scene.name}|{rows[-1]['obj_id']}"] = rows[-1]["ref_captions"]
    files = {f"{benchmark}_{split}": rows for benchmark, rows in entries.items()}
    files[f"scan2cap_{split}_corpus"] = corpus
    files[f"attributes_{split}"] = {
        "truth": {name: {"locs": b.truth.round(4).tolist(), "objects": b.labels}
                  for name, b in boxes.items()},
        "proposals": {name: {"locs": b.proposals.round(4).tolist(), "objects": b.proposal_labels}
                      for name, b in boxes.items()}}
    files[f"selected_images_{split}"] = {scene.name: scene.images for scene in scenes}
    files[split] = sharegpt([(scene, q) for scene in scenes for q in scene.questions])
    files[f"dense_{split}"] = sharegpt([(scene, q) for scene in scenes for q in scene.dense])
    for benchmark in set(NEEDS) - set(entries):                 # of an earlier run
        if os.path.exists(os.path.join(out, f"{benchmark}_{split}.json")):
            os.remove(os.path.join(out, f"{benchmark}_{split}.json"))
    for name, content in files.items():
        write_json(os.path.join(out, f"{name}.json"), content, indent=None)


def unique_multiple(scenes: list[Scene]) -> dict:
    """ScanRefer's lookup {scene: {object: 0 unique, 1 multiple}}: is there another of its label?
    (The official file goes by 18 classes; copy it over this one for published numbers.)"""
    return {scene.name: {str(k): int(scene.boxes.labels.count(label) > 1)
                         for k, label in enumerate(scene.boxes.labels)}
            for scene in scenes if scene.boxes}


def plain(text: str) -> str:
    return text.lower().rstrip(".")


def best_constants(asked: list[Question], trained: list[Question]) -> dict:
    """What an answer reaches that looks at no picture, by exact match with a reference:
    {"<benchmark>/<template>": {"questions", "answerable": share whose objects have proposals,
    "constant": the best one, "accuracy": its share, "by_text": the share of the answer that
    training gave most often to the same words (of the constant where there are none)}}"""
    memory, groups = defaultdict(Counter), defaultdict(list)
    for question in trained:
        memory[question.prompt].update(map(plain, question.trained[:1]))
    for question in asked:
        groups[f"{question.benchmark}/{question.template}"].append(question)
    table = {}
    for name, group in sorted(groups.items()):
        right = [dict.fromkeys(map(plain, question.references)) for question in group]
        hits = Counter(text for texts in right for text in texts) or Counter({"": 0})
        constant, most = hits.most_common(1)[0]
        said = [(memory[q.prompt].most_common(1) or [(constant, 0)])[0][0] for q in group]
        shares = {"accuracy": most, "by_text": sum(s in r for s, r in zip(said, right)),
                  "answerable": sum(q.trained != [] for q in group)}
        table[name] = {"questions": len(group), "constant": constant,
                       **{key: round(n / len(group), 4) for key, n in shares.items()}}
    return table


# ---------------------------------------------------------------- the check


def check_file(path: str, args) -> str:
    """Read a ShareGPT file, its pictures' headers and its lengths -> a row of the table."""
    from gpt4scene.chat import CHAT, picture_tokens  # which loads torch
    from tools.sharegpt import ShareGpt  # it checks each record, and finds each picture
    data, contract = ShareGpt(path, args.image_root), dict(CHAT, longest_side=args.longest_side)
    names = list(dict.fromkeys(name for record in data.records for name in record.images))
    tokens = {name: picture_tokens(data.find(name), contract, 28)
              for name in tqdm(names, **progress(desc="pictures", unit="picture", leave=False))}
    # At most: a byte is at most one token; 10 for a turn's own words, 40 for the system text, and
    # <|vision_start|> and <|vision_end|> of each picture
    lengths = [sum(tokens[name] + 2 for name in record.images) + 40 + len(record.system.encode())
               + sum(len(text.replace("<image>", "").encode()) + 10
                     for both in record.rounds for text in both) for record in data.records]
    k = int(np.argmax(lengths))
    if lengths[k] > args.context:
        raise UserError(f"{path}: record {k} has up to {lengths[k]:,} tokens, more than --context "
                        f"{args.context:,}; show fewer frames, or lower --longest-side")
    counts = sorted(len(record.images) for record in data.records)
    return (f"{path:40}{len(lengths):9,}{len({r.images for r in data.records}):8,}{len(names):10,}"
            f"{f'{counts[0]}..{counts[-1]}':>9}{statistics.median(lengths):9,.0f}{lengths[k]:9,}"
            f"  record {k}")


def check(args) -> None:
    """All that can be known before a GPU is taken. UserError at the first fault."""
    print(f"{'':40}{'records':>9}{'scenes':>8}{'pictures':>10}{'images':>9}{'median':>9}"
          f"{'longest':>9}  in tokens, at most")
    for path in args.check:
        lists = sorted(glob.glob(os.path.join(glob.escape(path), "selected_images_*.json")))
        if os.path.isdir(path) and not lists:
            raise UserError(f"--check {path} holds no selected_images_*.json; name a folder that "
                            "this script wrote, or a ShareGPT file")
        for file in [name.replace("selected_images_", "") for name in lists] or [path]:
            print(check_file(file, args))


def main(args) -> None:
    if args.check:
        return check(args)
    if args.frames < args.no_bev:
        raise UserError(f"--frames {args.frames} shows nothing: give 0 or more, with --no-bev at "
                        "least 1")
    real = args.scanqa or args.sqa3d or args.scan2cap or args.scanrefer or args.multi3dref
    for flag in ("images", "truth", "proposals"):
        if vars(args)[flag] and not real:
            raise UserError(f"--{flag} belongs to real scenes: name their questions, too, with "
                            "--scanqa, --sqa3d, --scan2cap, --scanrefer or --multi3dref")
    lock_folder(args.out)
    meta = os.path.join(args.out, "meta.json")
    if os.path.exists(meta):
        os.remove(meta)                             # until all files are written
    splits = real_scenes(args) if real else embedded_scenes(args)
    for split, scenes in splits.items():
        write_split(args.out, split, scenes)
    write_json(os.path.join(args.out, "unique_multiple_lookup.json"), unique_multiple(
        [scene for scenes in splits.values() for scene in scenes]), indent=None)

    asked = {split: [question for scene in scenes for question in scene.questions]
             for split, scenes in splits.items()}
    sizes = {split: {"scenes": len(splits[split]), "questions": len(questions),
                     "records": sum(len(question.trained) for question in questions)}
             for split, questions in asked.items()}
    constants = best_constants(asked[[*asked][-1]], asked["train"] if len(asked) > 1 else [])
    for split, size in sizes.items():
        print(f"{split}: {', '.join(f'{count:,} {what}' for what, count in size.items())}")
    print(f"{'':24}{'questions':>9}{'answerable':>12}{'by text':>9}{'constant':>10}")
    for name, row in constants.items():
        print(f"{name:24}{row['questions']:9}{row['answerable']:12.3f}{row['by_text']:9.3f}"
              f"{row['accuracy']:10.3f}  {row['constant'][:40]}")
    flags = {key: value for key, value in vars(args).items() if key not in ("out", "jobs")}
    write_json(meta, {"version": 1, "flags": flags, "splits": sizes, "constants": constants})


if __name__ == "__main__":
    run_cli(main, parse_args)
