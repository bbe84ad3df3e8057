"""
Answer questions about scenes: on every GPU, and a run that is killed goes on.

The unit of work is a scene with its open questions. Its pictures are run once, and its questions
are answered greedily, --together at a time, as branches behind them (gpt4scene/chat.py). Scenes are
assigned to the ranks, those with most questions first. Ranks do not communicate: each appends
to its own file, and any number of them takes up what others left.

Run it   python -m gpt4scene.answer data/scenes --ckpt ckpt/scenes
         torchrun --nproc_per_node 8 -m gpt4scene.answer data/scenes --ckpt ckpt/scenes
         python -m gpt4scene.answer data/scenes --ckpt ckpt/scenes --pictures blank   # a control
         python -m gpt4scene.answer data/scenes --ckpt ckpt/scenes --server URL --served-model NAME
Reads    annotations, known by their names (gpt4scene/scores.py), each record with "scene_id" and
         "prompt"; --images {scene: [pictures]}
Writes   --out   run.json (settings), answers[.<rank>].jsonl: {"key": "scanqa/17", "pred": "Brown.",
         "tokens": 3, "cut": false}, the key being the benchmark and the position in its file;
         failed.<rank>.json if a rank fails. gpt4scene.scores reads the folder
Expect   the same command goes on where it was stopped. Exit status 0 says that this rank's part is
         answered, and the rank that ends last says that all is
"""
from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_policy
from cli import (
    DefaultsFormatter,
    UserError,
    fingerprint,
    non_negative,
    positive_int,
    read_rows,
    run_cli,
    write_json,
    write_lines,
)
from engine import check_lengths, prefetch
from evaluate import check_server_flags, open_out
from gpt4scene.chat import ChatPolicy, ScenePrefix
from gpt4scene.scores import NEEDS, read_annotations, read_lines
from make_data import decode
from reward import RESERVED_TOKENS
from world.episodes import read_json


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m gpt4scene.answer",
                                formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    p.add_argument("annotations", nargs="+", metavar="ANNOTATIONS", help="annotation files, or "
                   "folders of them; a folder's files for training are left out")
    p.add_argument("--ckpt", default="ckpt/scenes", help="a folder written by sft.py --prompt chat")
    p.add_argument("--images", metavar="FILE", help="{scene: [pictures]}; default: the "
                   "selected_images_*.json in the folder of ANNOTATIONS")
    p.add_argument("--image-root", help="where paths start; default: the folder of --images")
    p.add_argument("--out", help="default: results/<checkpoint>[_<pictures>]")
    p.add_argument("--pictures", choices=("own", "blank", "other"), default="own",
                   help="control runs: black pictures, or those of the next scene")
    p.add_argument("--together", type=positive_int, default=16,
                   help="questions that are answered in one pass")
    p.add_argument("--max-new-tokens", type=positive_int, help="of an answer; default: "
                   "the checkpoint's")
    p.add_argument("--server", metavar="URL", help="an OpenAI-compatible server that runs the "
                   "model of --ckpt, as http://127.0.0.1:8000/v1")
    p.add_argument("--served-model", metavar="NAME", help="the model's name there")
    p.add_argument("--server-timeout", type=non_negative, default=120,
                   help="seconds for a request's answer")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="default: bfloat16 on GPUs, else float32")
    p.add_argument("--threads", type=positive_int, default=1, help="CPU threads per process")
    return p.parse_args(argv)


# ---------------------------------------------------------------- what is asked


class Scene(NamedTuple):
    name: str
    pictures: list[str]         # files
    questions: dict[str, str]   # {key: prompt}


def find_images(args) -> str:
    """--images, or the one such file beside the annotations."""
    if args.images:
        return args.images
    folders = dict.fromkeys(path if os.path.isdir(path) else os.path.dirname(path)
                            for path in args.annotations)
    found = [path for folder in folders for path in sorted(glob.glob(
        os.path.join(glob.escape(folder), "selected_images_*.json"))) if "train" not in path[
            len(folder):]]
    if len(found) != 1:
        raise UserError(f"{len(found)} files selected_images_*.json stand beside the annotations; "
                        "name the one that lists each scene's pictures with --images")
    return found[0]


def read_scenes(args) -> list[Scene]:
    """All scenes with questions, those with most questions first. UserError if a file that is
    named there is not there."""
    questions, path = defaultdict(dict), find_images(args)
    files, images = read_annotations(args.annotations), read_json(path)
    for name in [name for name in NEEDS if name in files]:
        for i, row in enumerate(files[name]):
            scene, prompt = row.get("scene_id"), row.get("prompt")
            if not isinstance(prompt, str) or not prompt.strip() or any(
                    mark in prompt for mark in RESERVED_TOKENS):
                raise UserError(f"record {i} of {name} has no \"prompt\" that could be asked (text "
                                f"without {' or '.join(RESERVED_TOKENS)}): make the file with "
                                "gpt4scene.scenes, from the official one")
            named = isinstance(images, dict) and isinstance(scene, str)
            shown = images.get(scene) if named else None
            if not shown or not isinstance(shown, list) or not all(
                    isinstance(one, str) for one in shown):
                raise UserError(f"{path} lists no pictures of {scene}, which record {i} of {name} "
                                "asks about: give the file of the same split with --images")
            questions[scene][f"{name}/{i}"] = prompt
    if not questions:
        raise UserError(f"{args.annotations[0]} asks nothing: name files of {', '.join(NEEDS)}")
    root = args.image_root or os.path.dirname(path)
    scenes = [Scene(name, [os.path.join(root, one) for one in images[name]], asked)
              for name, asked in questions.items()]
    for file in (file for scene in scenes for file in scene.pictures):
        if not os.path.isfile(file):
            raise UserError(f"the picture {file} is not there: copy it, or say where the paths of "
                            f"{path} start with --image-root")
    return sorted(scenes, key=lambda scene: (-len(scene.questions), scene.name))


# ---------------------------------------------------------------- answering


def load_chat_policy(args, scenes: list[Scene]) -> ChatPolicy:
    """The policy of --ckpt; without weights, if a server has them."""
    local_rank = os.environ.get("LOCAL_RANK", 0)
    device = "meta" if args.server else f"cuda:{local_rank}" if args.device == "cuda" else "cpu"
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    policy = load_policy(args.ckpt, device=device, dtype=dtype).eval()
    if not isinstance(policy, ChatPolicy):
        raise UserError(f"{args.ckpt} is no checkpoint of sft.py --prompt chat: its nav.json says "
                        f"{policy.contract['prompt']}")
    policy.contract["max_new_tokens"] = args.max_new_tokens or policy.contract["max_new_tokens"]
    longest = [(scene.name, policy.length_bound(scene.pictures, scene.questions.values(),
                                                policy.contract["max_new_tokens"]))
               for scene in scenes]
    check_lengths(policy, longest, args.ckpt)
    return policy


def load_pictures(policy: ChatPolicy, scene: Scene, others: dict[str, Scene], kind: str
                  ) -> list[np.ndarray]:
    """A scene's pictures, resized: uint8 (h, w, 3) each. kind: --pictures"""
    found = []
    for file in (others[scene.name] if kind == "other" else scene).pictures:
        with open(file, "rb") as opened:
            found.append(policy.resize(decode(opened.read(), f"the picture {file}")))
    return [np.zeros_like(frame) for frame in found] if kind == "blank" else found


@torch.no_grad()
def answer_scene(policy: ChatPolicy, frames: list[np.ndarray], questions: dict[str, str],
                 together: int) -> Iterator[list[dict]]:
    """Yield groups of rows {"key", "pred", "tokens", "cut"}: the pictures are run once for all."""
    prompt = policy.picture_prompt(policy.encode_frames(frames))
    cache, keys = policy.run_pictures([ScenePrefix(prompt, [])]), list(questions)
    for k in range(0, len(keys), together):
        some = keys[k:k + together]
        answers = policy.answer(prompt, cache, [questions[key] for key in some])
        if policy.nan_logits:
            raise UserError("the checkpoint gives logits that are not finite: the run that wrote "
                            "it has diverged; train again with a lower --lr")
        yield [{"key": key, "pred": policy.text(ids), "tokens": len(ids),
                "cut": ids[-1] != policy.end_token} for key, ids in zip(some, answers)]


def scene_request(server, pictures: list[str], question: str) -> dict:
    """pictures: as data URLs"""
    from tools.remote import content_parts
    content = content_parts("<image>" * len(pictures) + question, pictures)
    return {**server.request, "messages": [{"role": "user", "content": content}]}


def connect(args, policy: ChatPolicy, scene: Scene, out: str) -> Any:
    """The server of --server, after a first request, about a scene (server.json)."""
    from tools.remote import ChatServer, JsonClient, picture_url
    client = JsonClient(args.server, args.server_timeout, os.environ.get("SERVER_TOKEN"))
    server = ChatServer(client, args.served_model, policy, policy.contract["max_new_tokens"])
    frames, question = load_pictures(policy, scene, {}, "own"), next(iter(scene.questions.values()))
    features = policy._blank_features(dict(enumerate(frames)))
    ours = policy.prompt("<image>" * len(frames) + question, [*features.values()])
    write_json(os.path.join(out, "server.json"), server.check_request(
        scene_request(server, [*map(picture_url, frames)], question), len(ours.ids)))
    return server


def ask_scene(server, frames: list[np.ndarray], questions: dict[str, str], together: int
              ) -> Iterator[list[dict]]:
    """answer_scene() by a server: a request for each question. All of a scene begin with its
    pictures, which the server's prefix cache keeps."""
    from tools.remote import ServerFailed, picture_url, read_answer
    keys, pictures = list(questions), [*map(picture_url, frames)]       # encoded once
    for k in range(0, len(keys), together):
        asked = {key: server.client.submit(server.client.post(
            "/chat/completions", scene_request(server, pictures, questions[key])))
            for key in keys[k:k + together]}
        try:
            found = {key: read_answer(future.result()) for key, future in asked.items()}
        except ServerFailed as error:
            raise UserError(f"{error}: start the server again; the same command goes on") from None
        yield [{"key": key, "pred": text, "tokens": usage.get("completion_tokens"), "cut": cut}
               for key, (text, cut, usage) in found.items()]


def answer_all(args, policy: ChatPolicy, answer: Callable, scenes: list[Scene], todo: list[Scene],
               path: str) -> None:
    """Answer the questions of todo; each group is on the disk before the next one is asked.
    answer: answer_scene() or ask_scene(), with its first argument"""
    ordered = sorted(scenes, key=lambda scene: scene.name)
    others = {scene.name: other for scene, other in zip(ordered, ordered[1:] + ordered[:1])}

    def load(k: int) -> list[np.ndarray]:
        return load_pictures(policy, todo[k], others, args.pictures)
    total = sum(len(scene.questions) for scene in todo)
    with open(path, "a") as file, tqdm(total=total, unit="question", mininterval=1 if
                                       sys.stderr.isatty() else 30) as bar:
        for k, frames, _ in prefetch(load, range(len(todo))):
            for rows in answer(frames, todo[k].questions, args.together):
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(rows))


# ---------------------------------------------------------------- the run


def known_answers(out: str) -> set[str]:
    return set(read_lines(sorted(glob.glob(os.path.join(glob.escape(out), "answers*.jsonl")))))


def naming_failures(out: str, rank: int, work: Callable) -> None:
    """work(), with its error noted in --out, where the other ranks find it."""
    path = os.path.join(out, f"failed.{rank}.json")
    try:
        work()
    except BaseException as error:
        write_json(path, {"rank": rank, "time": time.time(), "error": str(error) or repr(error)})
        raise


def check_coverage(out: str, scenes: list[Scene], mine: list[Scene], rank: int) -> None:
    """Say whether all is answered. UserError if a rank has failed, or answers of this one lack."""
    known = known_answers(out)
    missing = [key for scene in scenes for key in scene.questions if key not in known]
    failed = [read_json(path) for path in glob.glob(os.path.join(glob.escape(out),
                                                                 "failed.*.json"))]
    total = sum(len(scene.questions) for scene in scenes)
    if not missing:
        print(f"all {total} questions are answered: python -m gpt4scene.scores {out} ANNOTATIONS")
    elif failed:
        first = min(failed, key=lambda row: row["time"])
        raise UserError(f"{len(missing)} of {total} answers are missing in {out}; rank "
                        f"{first['rank']} failed first: {first['error']}. Run the same command "
                        "again")
    elif any(key in missing for scene in mine for key in scene.questions):
        raise UserError(f"{len(missing)} of {total} answers are missing in {out}, first "
                        f"{missing[0]}: run the same command again")
    else:
        print(f"rank {rank} is done; {len(missing)} answers of other ranks are not there yet")


def main(args):
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(args.threads)
    if args.server and not args.served_model:
        raise UserError("--server needs --served-model, and an address that ends in /v1: a server "
                        "of chat completions answers (tools.serve moves robots)")
    check_server_flags(argparse.Namespace(agent="policy", **vars(args)))

    # 1. what is asked, and which answers are there already
    scenes, ckpt = read_scenes(args), os.path.normpath(args.ckpt)
    control = f"_{args.pictures}" * (args.pictures != "own")
    out = args.out or f"results/{os.path.basename(ckpt)}{control}"
    policy = load_chat_policy(args, scenes)
    asked = json.dumps(sorted([s.name, s.questions, s.pictures] for s in scenes))
    open_out(out, {"ckpt": ckpt, "weights": fingerprint(ckpt), "contract": policy.contract,
                   "dtype": None if args.server else str(policy.dtype), "pictures": args.pictures,
                   "asked": hashlib.sha256(asked.encode()).hexdigest()[:16],
                   **({"served_model": args.served_model} if args.server else {})})
    path = os.path.join(out, f"answers.{rank}.jsonl" if world_size > 1 else "answers.jsonl")
    if os.path.exists(path):
        write_lines(path, read_rows(path))                  # without a line that a kill cut short
    for stale in glob.glob(os.path.join(glob.escape(out), "failed.*.json")):
        owner = int(stale.split(".")[-2])
        if owner == rank or owner >= world_size:            # of an earlier run of this command
            os.remove(stale)
    known, mine = known_answers(out), scenes[rank::world_size]
    todo = [scene._replace(questions={key: prompt for key, prompt in scene.questions.items()
                                      if key not in known}) for scene in mine]
    todo = [scene for scene in todo if scene.questions]
    print(f"{out}: rank {rank} of {world_size} answers {sum(len(s.questions) for s in todo)} "
          f"questions of {len(todo)} scenes", flush=True)

    # 2. answer, 3. check
    def work():
        answer = partial(ask_scene, connect(args, policy, scenes[-1], out)) if args.server else (
            partial(answer_scene, policy))
        answer_all(args, policy, answer, scenes, todo, path)
    if todo:
        naming_failures(out, rank, work)
    check_coverage(out, scenes, mine, rank)


if __name__ == "__main__":
    run_cli(main, parse_args)
