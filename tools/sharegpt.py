"""
ShareGPT files, in and out, and the released walks of VLN-Ego.

ShareGpt reads what LLaMA-Factory and LLaVA read [1]: records of a conversation with pictures.
    file      a JSON array, or JSON lines under either name (.json, .jsonl); UTF-8, BOM or not
    turns     "conversations" of {"from", "value"}, or "messages" of {"role", "content"}; first a
              system turn, if there is one, then human and gpt in turn. Content is text with <image>
              placeholders, or Qwen's list of {"type": "image"} and {"type": "text"}
    pictures  "images" or "image": a path, {"path": ..}, or a list of them, one per <image>
    "system"  a text that replaces the chat template's own system message
Each gpt turn is a decision, trained given all turns before it. Every record is checked when the
file is read; an error names the record's number (from 0) and the field. Texts and labels are used
unchanged, including the released files' shift by one step (see make_data.py).

Run it   python -m tools.sharegpt import rgb_images_r2r_train --robot r2r --out data/released
         python -m tools.sharegpt export data/vln_ego/train --out data/sharegpt
         python -m tools.sharegpt contract data/sharegpt --ckpt llama_factory/output
Reads    import: folders ep_*/traj_* of the released VLN-Ego [2];  export: what make_data.py wrote;
         contract: an export and a model that was trained on it
Writes   import: a VLN-Ego folder;  export: LLaMA-Factory's JSON, pictures, and nav.json, the
         contract of what is trained on it;  contract: --ckpt/nav.json, so that evaluate.py runs it

[1] LLaMA-Factory, data/README.md (ShareGPT format)   [2] VLN-R1, arXiv 2506.17221
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import stat
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

import lsm
from cli import DefaultsFormatter, UserError, lock_folder, positive_int, run_cli, write_json
from make_data import (
    CACHE_BYTES,
    MOST_ASPECT,
    Decision,
    Shard,
    VlnEgo,
    check_instruction,
    decode,
    input_crc32,
    make_shards,
    open_folder,
    require,
    write_tables,
)
from reward import action_phrases, parse_plan, write_plan
from world.episodes import is_text, is_walk, read_json
from world.robots import ROBOTS, add_robot_args, robot_from_args

# ---------------------------------------------------------------- one record

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}
EMPTY = (None, "", [], {})
# Fields that other trainers use, and this one does not.
REFUSED = ("tools", "functions", "videos", "video", "audios", "audio", "objects", "chosen",
           "rejected", "rejected_response", "kto_tag")
USED = {"conversations", "messages", "images", "image", "system", *REFUSED}
PART_PATHS = ("image", "image_url", "path", "url")  # keys of a picture in a list of content
# The model's special tokens, and LLaMA-Factory's placeholders of REFUSED fields.
RESERVED = re.compile(r"<\|[^<>\s]*>?|<video>|<audio>")
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number",
         str: "text", list: "a list", dict: "an object"}


class Record(NamedTuple):
    """One conversation. In a human's text one <image> stands for each of images, in order."""
    system: str             # "": the chat template's own system message
    rounds: tuple           # ((human's text, gpt's answer), ..)
    images: tuple           # paths as written, but with "/" between folders


def kind(value) -> str:
    return KINDS[type(value)]


def filled(record: dict, *keys: str) -> list[str]:
    """Those of the keys under which a record holds something."""
    return [key for key in keys if record.get(key) not in EMPTY]


def others(record: dict, *known: str) -> list[str]:
    """The keys, other than the known ones, under which a record holds something."""
    return filled(record, *sorted(set(record) - set(known)))


def read_text(value, field: str) -> str:
    """A text field -> its text. ValueError if it is not text, or holds a special token."""
    require(isinstance(value, str), f"{field} is {kind(value)}, not text")
    reserved = RESERVED.search(value)
    require(not reserved, f"{field} holds the reserved {reserved and reserved[0]}; take it out")
    require(is_text(value), f"{field} holds half of a UTF-16 pair; repair its encoding")
    return value


def read_path(value, field: str) -> str:
    """A picture: its path, {"path": ..} or {"url": ..} -> the path, "/" between its folders."""
    if isinstance(value, dict):
        more = others(value, "path", "url")
        require(not more, f"{field} holds {', '.join(map(repr, more))}; give only the path of a "
                "picture file")
        value = value.get("path") or value.get("url")
    require(isinstance(value, str) and value.strip() != "",
            f"{field} is {json.dumps(value)[:40]}, not the path of a picture")
    value = value.removeprefix("file://")
    require("://" not in value and not value.startswith("data:"),
            f"{field} is at {value[:40]!r}; download it and give the file's path")
    return value.replace("\\", "/")


def read_content(content, field: str) -> tuple[str, list[str]]:
    """A turn's content, text or a list of parts -> (text with <image>, the paths in its parts)."""
    if not isinstance(content, list):
        return read_text(content, field), []
    texts, paths = [], []
    for k, part in enumerate(content):
        name = f"part {k} of {field}"
        require(isinstance(part, dict), f"{name} is {kind(part)}, not an object")
        type_ = part.get("type") or next(iter(filled(part, "text", "image", "image_url")), None)
        where = filled(part, *PART_PATHS)
        require(type_ in ("text", "image", "image_url") and not others(
            part, "type", "text", *PART_PATHS) and len(where + filled(part, "text")) <= 1,
            f"{name} is {json.dumps(part)[:80]}; known are "
            '{"type": "text", "text": ..} and {"type": "image", "image": path}')
        if type_ == "text":
            texts.append(read_text(part.get("text"), name))
            require("<image>" not in texts[-1], f"{name} holds <image> in its text; give it a part "
                    "of its own")
        else:
            texts.append("<image>")
            paths += [read_path(part[key], name) for key in where]
    return "".join(texts), paths


def read_turns(record: dict) -> tuple[list[tuple[str, str]], list[str]]:
    """A record's turns -> [(role, text), ..], and the picture paths in their parts."""
    keys = filled(record, "conversations", "messages")
    require(len(keys) == 1 and isinstance(record[keys[0]], list),
            "it needs one list, 'conversations' (of from and value) or 'messages' (of role and "
            f"content); it has {', '.join(record) or 'nothing'}")
    turns, paths = [], []
    for k, turn in enumerate(record[keys[0]]):
        require(isinstance(turn, dict), f"turn {k} is {kind(turn)}, not an object")
        names = ("from", "value") if "from" in turn else ("role", "content")
        more = others(turn, *names)
        require(not more,
                f"turn {k} has {', '.join(map(repr, more))}, which is not used; remove it")
        role = turn.get(names[0])
        require(isinstance(role, str) and role in ROLES,
                f"turn {k} has {names[0]!r} {json.dumps(role)}; known are {', '.join(ROLES)}")
        text, named = read_content(turn.get(names[1]), f"{names[1]!r} of turn {k} ({role})")
        turns.append((ROLES[role], text))
        paths += named
    return turns, paths


def read_images(record: dict, paths: list[str]) -> tuple[str, ...]:
    """A record's pictures -> their paths. paths: those in the parts of its turns."""
    found = [paths] if paths else []
    for key in filled(record, "images", "image"):
        value = record[key]
        value = [value] if isinstance(value, (str, dict)) else value
        require(isinstance(value, list), f"{key!r} is {kind(value)}, not a list of paths")
        found.append([read_path(path, f"picture {k} of {key!r}") for k, path in enumerate(value)])
    require(all(other == found[0] for other in found),
            "it names its pictures twice and differently; keep one list of them")
    return tuple(found[0]) if found else ()


def read_record(record) -> Record:
    """A record as JSON gives it -> Record. ValueError names the field that is wrong."""
    require(isinstance(record, dict), f"it is {kind(record)}, not an object")
    for key in filled(record, *REFUSED):            # "[]": LLaMA-Factory's "no tools"
        require(record[key] == "[]", f"it has {key!r}, which is not used here; remove it, or the "
                "record")
    turns, paths = read_turns(record)
    system = record.get("system")
    system = "" if system is None else read_text(system, "'system'")
    if turns and turns[0][0] == "system":
        require(system in ("", turns[0][1]), "it has two system texts that differ; keep one")
        system, turns = turns[0][1], turns[1:]
    roles = [role for role, _ in turns]
    require(turns != [] and roles == ["user", "assistant"] * (len(turns) // 2),
            f"it has the turns {', '.join(roles) or 'none'}; wanted are user (human) and assistant "
            "(gpt) in turn, with at most one system text before them")
    questions, answers = ([text for _, text in turns[k::2]] for k in (0, 1))
    for k, text in enumerate(text for _, text in turns):
        require(text.strip() != "", f"the {('question', 'answer')[k % 2]} of round {k // 2} is "
                "empty; remove the record")
    require("<image>" not in system + "".join(answers),
            "it has <image> in its system text or an answer; only questions show pictures")
    images, n = read_images(record, paths), "".join(questions).count("<image>")
    require(n == len(images), f"it has {n} <image> in its words and {len(images)} images; make "
            "them agree")
    require("<image>" in questions[0], "it has no <image> before its first answer; a decision "
            "needs a picture")
    return Record(system, tuple(zip(questions, answers)), images)


# ---------------------------------------------------------------- a file of records


def read_records(path: str) -> list[tuple[str, object]]:
    """A file -> [(name, value as JSON gives it), ..]. UserError if it holds no list of records."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON in UTF-8 ({error})") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        data = read_json_lines(path, text)
        if data is None:
            raise UserError(f"{path} cannot be read as JSON ({error}); copy it again, or write it "
                            "as a list of records or one record a line") from None
        return data
    if isinstance(data, dict) and filled(data, "conversations", "messages"):
        data = [data]                               # JSON lines, of one line
    if isinstance(data, dict):
        lists = [key for key, value in data.items() if isinstance(value, list)]
        raise UserError(f"{path} holds one object ({', '.join(data)}), not a list of records; " + (
            f"write the list {lists[0]!r} alone" if lists else "write a list"))
    if not isinstance(data, list) or not data:
        raise UserError(f"{path} holds {kind(data) if data else 'no records'}; it must be a list "
                        "of records")
    return [(f"record {i}", value) for i, value in enumerate(data)]


def read_json_lines(path: str, text: str) -> list[tuple[str, object]] | None:
    """Text with one JSON object a line -> [(name, object), ..]; None if it is something else."""
    found = []
    for n, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON may hold U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not found:
                return None
            raise UserError(f"{path}, line {n}: {error}; repair or remove that line") from None
        if not found and not isinstance(value, dict):
            return None
        found.append((f"record {len(found)} (line {n})", value))
    return found or None


# A released picture is ep_1/traj_2/step_0.jpg: these folders say which walk it belongs to.
WALK_FOLDER = re.compile(r"(ep|traj)_\d+")


def split_path(path: str, image_root: str | None) -> tuple[str, ...]:
    """A path -> its parts. With an image_root, an absolute path is taken as relative to that.

    >>> split_path("/data/./a/0.png", None), split_path("/data/a/0.png", "/elsewhere")
    (('/', 'data', 'a', '0.png'), ('data', 'a', '0.png'))
    """
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    return parts if image_root or not path.startswith("/") else ("/", *parts)


def droppable(paths) -> int:
    """How many leading folders may be left out: those that all paths share, except the last one
    and any that names a walk.

    >>> droppable([("VLN-Ego", "data", "ep_1", "0.jpg"), ("VLN-Ego", "data", "ep_2", "0.jpg")])
    2
    >>> droppable([("ep_2", "step_0.png")]), droppable([("images", "a.png"), ("b.png",)])
    (0, 0)
    >>> droppable([("scene1", "images", "0.png"), ("scene2", "images", "0.png")])
    0
    """
    shared = os.path.commonprefix([path[:-1] for path in paths])
    names = [k for k, part in enumerate(shared) if WALK_FOLDER.fullmatch(part)]
    return min([len(shared), *names, *(max(len(path) - 2, 0) for path in paths)])


def holds_bytes(path: str) -> bool:
    try:
        found = os.stat(path)
    except (OSError, ValueError):                   # ValueError: a null byte in the path
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def find_pictures(json_path: str, records: list[Record],
                  image_root: str | None) -> tuple[str, int]:
    """Where the records' pictures are -> (root, k): below root (image_root, or else the JSON's
    folder), when the first k parts of each path are left out. k is the least for which all exist.
    UserError if there is none."""
    root = image_root or os.path.dirname(json_path) or "."
    if not os.path.isdir(root):
        raise UserError(f"--image-root {root} is not a folder")
    paths = {image: split_path(image, image_root) for record in records for image in record.images}

    def missing(k):
        return (image for image, parts in paths.items()
                if not holds_bytes(os.path.join(root, *parts[k:])))

    choices = range(droppable(paths.values()) + 1)
    for k in choices:
        if next(missing(k), None) is None:
            return root, k
    lost, k = min(((list(missing(k)), k) for k in choices), key=lambda item: len(item[0]))
    i = next(i for i, record in enumerate(records) if lost[0] in record.images)
    raise UserError(
        f"{json_path}: {len(lost):,} of {len(paths):,} pictures are not there, or empty; the first "
        f"is {lost[0]} of record {i}, looked for at {os.path.join(root, *paths[lost[0]][k:])}; "
        "give the folder in which the paths start with --image-root, or copy the pictures again")


class ShareGpt:
    """A ShareGPT file, as data: record i, round t -> Decision; picture -> frame."""
    whole_walks = False                             # see make_data.VlnEgo

    def __init__(self, json_path: str, image_root: str | None = None):
        self.json_path, self.records, keys = str(json_path), [], Counter()
        for name, value in read_records(self.json_path):
            try:
                self.records.append(read_record(value))
            except ValueError as error:
                raise UserError(f"{json_path}: {name}: {error}") from None
            keys.update(set(value) - USED)
        self.image_root = image_root
        self.root, self.dropped = find_pictures(self.json_path, self.records, image_root)
        self.notes = [f"{json_path}: pictures below {self.root}, {self.dropped} leading folders "
                      "of each path left out"]
        if keys:
            self.notes.append(f"{json_path}: not used: {', '.join(sorted(map(str, keys)))}")
        self.episodes = [{"episode_id": i, "instruction": record.rounds[0][0]}
                         for i, record in enumerate(self.records)]
        self.meta = {"dataset": os.path.basename(self.json_path), "robot": self.stated_robot()}
        self.frame = lru_cache(CACHE_BYTES // (640 * 480 * 3))(self.read)

    def __len__(self) -> int:
        return len(self.records)

    def stated_robot(self) -> dict:
        """Turn angle and step of the first records that state them. (R2R's state 30 degrees, and
        the pictures show 15.)"""
        robot = {}
        for record in self.records:
            text = record.system + record.rounds[0][0]
            for key, unit, words in (("turn_deg", 1, r"turn left (\d+(?:\.\d+)?) degrees"),
                                     ("forward_m", 100, r"move forward (\d+(?:\.\d+)?) cm")):
                stated = re.search(words, text, re.IGNORECASE)
                if stated and float(stated.group(1)) > 0:
                    robot.setdefault(key, float(stated.group(1)) / unit)
            if len(robot) == 2:
                break
        return robot

    def steps(self, i: int) -> list[int]:
        return list(range(len(self.records[i].rounds)))

    def decision(self, i: int, t: int, contract: dict) -> Decision:
        """Record i up to its round t. The plan is the parsed answer, with None at unreadable
        positions; () if all are."""
        record = self.records[i]
        human, answer = record.rounds[t]
        plan = parse_plan(answer, action_phrases(contract["turn_deg"], contract["forward_m"]),
                          contract["horizon"])
        before = [("system", record.system)] if record.system else []
        for question, earlier in record.rounds[:t]:
            before += [("user", question), ("assistant", earlier)]
        shown = sum(question.count("<image>") for question, _ in record.rounds[:t + 1])
        return Decision("", record.images[:shown], () if set(plan) == {None} else tuple(plan),
                        human, answer, tuple(before))

    def read(self, key: str) -> np.ndarray:
        """key: a picture's path as in its record -> uint8 (H, W, 3). Use .frame(key)."""
        with open(self.find(key), "rb") as file:
            data = file.read()
        try:
            return decode(data, f"the picture {self.find(key)}")
        except UserError as error:
            i = next(i for i, record in enumerate(self.records) if key in record.images)
            raise UserError(f"{error}; it belongs to record {i} of {self.json_path}: copy it "
                            "again, or remove the record") from None

    def find(self, key: str) -> str:
        """A picture's path as in its record -> the file's path."""
        return os.path.join(self.root, *split_path(key, self.image_root)[self.dropped:])

    def check_plans(self, contract: dict) -> None:
        """UserError if no answer can be read as a plan: GRPO could not reward anything."""
        units = ((i, t) for i in range(len(self)) for t in self.steps(i))
        if not any(self.decision(i, t, contract).plan for i, t in units):
            phrases = action_phrases(contract["turn_deg"], contract["forward_m"])
            raise UserError(f"{self.json_path}: no answer is a plan in the policy's words "
                            f"({', '.join(phrases.values())}), so no plan can be rewarded; give "
                            "the data it learned from")

    def lengths(self, policy, least_answer: int = 0) -> list[tuple[str, int]]:
        """Tokens of each record, as engine.check_lengths wants them -> [(name, tokens), ..].

        An upper bound if that is within the model's context (a byte is at most one token), else the
        exact number. UserError if a text holds a special token of this tokenizer.
        least_answer: room for a sampled answer, in tokens.
        """
        special = "|".join(re.escape(token.content) for token in
                           policy.tokenizer.added_tokens_decoder.values() if token.special)
        context = policy.model.config.text_config.max_position_embeddings
        budget, side = policy.contract["max_pixels"], policy.image_format.factor
        most = max(budget / side ** 2, math.sqrt(MOST_ASPECT * budget) / side + 1)  # a thin picture
        found = []
        for i, record in enumerate(self.records):
            text = " ".join([record.system, *(part for both in record.rounds for part in both)])
            token = re.search(special, text) if special else None
            if token:
                raise UserError(f"{self.json_path}: record {i} holds {token[0]}, a special token "
                                "of the model; take it out")
            bound = len(text.encode()) + 64 + 16 * len(record.rounds) + least_answer + math.ceil(
                most * len(record.images))
            found.append((f"record {i}", bound if bound <= context
                          else self.exact_length(i, policy, least_answer)))
        return found

    def exact_length(self, i: int, policy, least_answer: int) -> int:
        """Tokens of the whole of record i, from its pictures' headers."""
        decision = self.decision(i, len(self.records[i].rounds) - 1, policy.contract)
        frames = {}
        for key in decision.frames:
            try:
                with Image.open(self.find(key)) as image:
                    width, height = image.size
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                self.read(key)                      # raises a UserError that describes the problem
                raise
            frames[key] = np.broadcast_to(np.uint8(0), (*policy.fit_pixels(height, width), 3))
        prompt, = policy.token_counts([decision], frames, group_size=0)
        answer = policy.tokenizer(decision.answer, add_special_tokens=False)["input_ids"]
        return prompt + max(len(answer) + 1, least_answer)


# ---------------------------------------------------------------- export


def write_sharegpt(data: VlnEgo, folder: str, contract: dict) -> int:
    """Write a VlnEgo as picture files and the JSON that LLaMA-Factory reads. -> number of records

    Writes <folder>/vln_ego.json, dataset_info.json (LLaMA-Factory's register), nav.json (the
    contract of what is trained on it) and images/<walk>/. Picture files are the recording's own
    bytes. One record a line: R2R's train split is gigabytes.
    """
    from model import window_prompt  # brings torch: only for this
    phrases, n = action_phrases(contract["turn_deg"], contract["forward_m"]), 0
    suffix = "." + data.meta["image_format"]
    for walk_id, walk in data.walks.items():
        os.makedirs(f"{folder}/images/{walk_id}", exist_ok=True)
        for t in range(len(walk["actions"])):
            with open(f"{folder}/images/{walk_id}/{t:04d}{suffix}", "wb") as f:
                f.write(data.frame_bytes((walk_id, t)))
    with open(f"{folder}/vln_ego.json.tmp", "w", encoding="utf-8") as f:
        for d in (data.decision(i, t, contract) for i in range(len(data)) for t in data.steps(i)):
            human = window_prompt(d.instruction, len(d.frames) - 1, contract)
            f.write(("[\n" if n == 0 else ",\n") + json.dumps({
                "conversations": [{"from": "human", "value": human},
                                  {"from": "gpt", "value": write_plan(d.plan, phrases)}],
                "images": [f"images/{walk_id}/{t:04d}{suffix}" for walk_id, t in d.frames]}))
            n += 1
        f.write("\n]\n" if n else "[]\n")
    os.replace(f"{folder}/vln_ego.json.tmp", f"{folder}/vln_ego.json")
    write_json(f"{folder}/dataset_info.json", {"vln_ego": {
        "file_name": "vln_ego.json", "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"}}})
    write_json(f"{folder}/nav.json", contract)
    return n


def export(args) -> None:
    from model import CONTRACT, fit_pixels
    lock_folder(args.out)
    data = VlnEgo(args.recording)
    contract = {**CONTRACT, **data.meta["robot"], "horizon": args.horizon,
                "dataset": data.meta["dataset"], "memory": lsm.memory_from_args(args)}
    n = write_sharegpt(data, args.out, contract)
    pixels = fit_pixels(*(contract[k] for k in ("height", "width", "min_pixels", "max_pixels")),
                        factor=28)                                  # of the template named below
    print(f"{args.out}/vln_ego.json: {n:,} records of {len(data):,} episodes; for LLaMA-Factory: "
          f"template qwen2_vl, image_max_pixels {math.prod(pixels)}; then python -m tools.sharegpt "
          f"contract {args.out} --ckpt FOLDER gives the trained model its nav.json")


# ---------------------------------------------------------------- the contract of an export


def read_object(path: str, wanted: str) -> dict:
    """A JSON file that holds an object. UserError otherwise: "give {wanted}"."""
    content = read_json(path) if os.path.exists(path) else None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; give {wanted}")
    return content


def give_contract(args) -> None:
    """Write the export's contract into a checkpoint that another tool trained on it."""
    from model import CONTRACT
    contract = read_object(os.path.join(args.export, "nav.json"),
                           "a folder that python -m tools.sharegpt export wrote")
    absent = [key for key in CONTRACT if key not in contract]
    if absent or any(contract[key] != CONTRACT[key] for key in ("prompt", "version")):
        raise UserError(f"{args.export}/nav.json is not a contract of this version "
                        f"({', '.join(absent) or 'another version'}); export the recording again")
    contract["max_pixels"] = args.max_pixels or contract["max_pixels"]
    config, adapter, path = (os.path.join(args.ckpt, name) for name in (
        "config.json", "adapter_config.json", "nav.json"))
    if not os.path.exists(config) and os.path.exists(adapter):
        raise UserError(f"{args.ckpt} holds a LoRA adapter alone; merge it into its base model "
                        "first, and give the merged folder")
    model_type = read_object(config, "the folder of a trained model").get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{config} names no model_type; give a model's folder")
    if os.path.exists(path) and read_object(
            path, "another --ckpt, or remove that file") != contract:
        raise UserError(f"{path} is there and differs; remove it to write that of {args.export}")
    write_json(path, contract)
    print(f"wrote {path}: {contract['horizon']} actions, turns of {contract['turn_deg']:g} "
          f"degrees, frames of at most {contract['max_pixels']:,} pixels")


# ---------------------------------------------------------------- the released walks


def walk_folders(folder: str) -> list[str]:
    """Every folder at or below `folder` that holds a released walk, or a part of one.

    Symbolic links are followed. A folder with two paths is found once, by a path without links if
    there is one.
    """
    def fail(error):
        raise UserError(f"{error.filename} cannot be read ({error.strerror})")

    found, seen, starts = [], set(), [os.path.abspath(folder)]
    for start in starts:                            # it grows: links come last
        for root, folders, files in os.walk(start, onerror=fail):
            if os.path.realpath(root) in seen:      # a second path to it, or a cycle
                folders.clear()
                continue
            seen.add(os.path.realpath(root))
            folders.sort()
            starts += [os.path.join(root, name) for name in folders
                       if os.path.islink(os.path.join(root, name))]
            lost = [name for name in files if WALK_FOLDER.fullmatch(name)
                    and not os.path.exists(os.path.join(root, name))]
            if lost:
                raise UserError(f"{os.path.join(root, lost[0])} is a symbolic link to nothing; "
                                "repair or remove it")
            if {"action_list.json", "instruction.txt", "step_0.jpg"} & set(files):
                found.append(root)
    return found


def name_walks(folders: list[str]) -> dict[str, tuple[str, str, str]]:
    """Folders ../ep_1/traj_2 -> {folder: (walk_id, episode_id, trajectory_id)}.

    A walk's id is the last two names, with as many before them as make all ids unique.

    >>> [name for name, *_ in name_walks(["/a/ep_1/traj_1", "/b/ep_1/traj_1"]).values()]
    ['a-ep_1-traj_1', 'b-ep_1-traj_1']
    """
    parts = [folder.strip(os.sep).split(os.sep) for folder in folders]
    for depth in range(2, max(map(len, parts)) + 2):
        walks = ["-".join(names[-depth:]) for names in parts]
        episodes = ["-".join(names[-depth:-1]) for names in parts]
        if len(set(walks)) == len(walks):
            break
    else:
        twice = Counter(walks).most_common(1)[0][0]
        raise UserError(f"two folders would both be the walk {twice}; rename one of them")
    if len(set(episodes)) < len(episodes):          # several walks in one ep_ folder
        episodes = walks
    return {folder: (walk, episode, names[-1])
            for folder, walk, episode, names in zip(folders, walks, episodes, parts)}


def released_walks(folder: str, split: str) -> tuple[list[dict], list[dict]]:
    """Walks of the released VLN-Ego (ep_*/traj_*/action_list.json) at or below folder.

    -> (walks, rows of episodes.jsonl), by episode number. The files hold no scene and no poses.
    For a walk without a usable instruction "damaged" is the reason; import_shard skips it.
    """
    found = sorted(walk_folders(folder),
                   key=lambda root: ([int(n) for n in re.findall(r"\d+", root)], root))
    if not found:
        raise UserError(f"no action_list.json at or below {folder}; give a folder ep_*/traj_*/ "
                        "of the released VLN-Ego, or one that holds such folders")
    walks, rows = [], []
    for root, (walk_id, episode_id, trajectory) in name_walks(found).items():
        text, damaged = "", None
        try:
            with open(f"{root}/instruction.txt", encoding="utf-8-sig") as f:
                text = " ".join(f.read().split())
            check_instruction(text)
        except (OSError, ValueError) as error:
            damaged = f"{root}/instruction.txt: {error}"
        walks.append({"walk_id": walk_id, "folder": root, "actions": None, "damaged": damaged,
                      "episode": {"scene_id": None, "trajectory_id": trajectory}})
        rows.append({"episode_id": episode_id, "walk_id": walk_id, "instruction": text,
                     "split": split})
    return walks, rows


def import_shard(shard: Shard, walks: list[dict]) -> None:
    """Copy released walks into one shard, with their jpg bytes. A damaged walk is skipped."""
    for walk in walks:
        try:
            require(walk["damaged"] is None, walk["damaged"])
            actions = read_json(f"{walk['folder']}/action_list.json")
            require(is_walk(actions), f"{walk['folder']}/action_list.json must be a list of 1, 2, "
                    "3 and a last 0")
            pictures = []
            for t in range(len(actions)):                       # frame t: the view before action t
                with open(f"{walk['folder']}/step_{t}.jpg", "rb") as f:
                    pictures.append(f.read())
                decode(pictures[-1], f"{walk['folder']}/step_{t}.jpg")
            shard.add({"walk_id": walk["walk_id"], **walk["episode"], "actions": actions}, pictures)
        except (OSError, ValueError, UserError) as error:
            shard.skip(walk["walk_id"], "damaged", str(error))
    shard.commit()


def import_walks(folder: str, args) -> None:
    """Released walks -> a VLN-Ego folder. (make_data.py --import-walk calls it with its flags.)"""
    if args.robot in (None, "houses"):
        raise UserError("released walks are R2R's or RxR's: say which with --robot r2r or rxr")
    out, robot = f"{args.out}/{args.split}", robot_from_args(args, ROBOTS[args.robot])
    walks, rows = released_walks(folder, args.split)
    shards = make_shards(walks, args.shard_walks)
    settings = {"split": args.split, "shard_walks": args.shard_walks,
                "input_crc32": input_crc32(walks)}
    for name in open_folder(out, {**settings, "robot": robot}, shards):
        import_shard(Shard(out, name, "jpg"), shards[name])
    write_tables(out, walks, shards, rows, {
        "dataset": args.robot, "split": args.split, "robot": robot, "image_format": "jpg",
        "args": settings})


# ---------------------------------------------------------------- the commands


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.sharegpt", formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    commands = p.add_subparsers(dest="command", required=True)

    def command(name, words):
        return commands.add_parser(name, help=words, description=words,
                                   formatter_class=DefaultsFormatter)

    p_import = command("import", "released walks -> a VLN-Ego folder")
    add = p_import.add_argument
    add("folder", help="the walks are at or below it")
    add("--out", default="data/released", help="the split becomes a folder in here")
    add("--split", default="train")
    add("--shard-walks", type=positive_int, default=64, help="walks per zip")
    add_robot_args(add, "none: say r2r or rxr")

    p_export = command("export", "a VLN-Ego folder -> pictures and JSON for LLaMA-Factory")
    add = p_export.add_argument
    add("recording", help="a folder that make_data.py wrote, e.g. data/vln_ego/train")
    add("--out", default="data/sharegpt", help="folder to write")
    add("--horizon", type=int, choices=range(1, 9), default=6,
        help="actions per answer; the paper's 6")
    lsm.add_memory_args(add)

    p_contract = command("contract", "give the nav.json of an export to what was trained on it")
    add = p_contract.add_argument
    add("export", help="the export that it was trained on")
    add("--ckpt", required=True, metavar="FOLDER", help="the trained model's folder")
    add("--max-pixels", type=positive_int,
        help="pixels of a frame, at most, in that training; default: the export's own")
    return p.parse_args(argv)


def main(args):
    if args.command == "import":
        import_walks(args.folder, args)
    elif args.command == "export":
        export(args)
    else:
        give_contract(args)


if __name__ == "__main__":
    run_cli(main, parse_args)
