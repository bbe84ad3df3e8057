"""
Decisions a second in closed loop: 16 robots at once, against one robot, Hugging Face's generate and
every frame encoded again at every decision.

    python bench/evaluation.py --ckpt ckpt/sft --episodes data/houses

Both walk the same episodes through evaluate.py's own loop, simulators and metrics; only who decides
differs. The peer is what evaluation scripts do: keep the frames, build the prompt, generate(). Its
prompt and patches are made by our code, which is faster than the processor. Each side has as many
simulator processes as robots; both have --threads threads for the model. Starting simulators and
loading weights is not counted.

Checked: every episode's actions and metrics are the same.
"""
import os
import time

import numpy as np
import torch
from common import ROOT, add_row, in_turn, parser

import evaluate
from checkpoint import load_policy
from lsm import pick_frames
from model import window_prompt
from qwen import patchify
from reward import STOP, parse_control
from world.pool import SimPool


def parse_args(argv=None):
    p = parser(__doc__, repeats=2)
    p.add_argument("--ckpt", default=os.path.join(ROOT, "ckpt", "sft"))
    p.add_argument("--episodes", default=os.path.join(ROOT, "data", "houses"))
    p.add_argument("--split", default="val_unseen")
    p.add_argument("--limit", type=int, default=96, help="episodes")
    p.add_argument("--max-actions", type=int, default=100, help="of a walk; by the 500 of VLN-CE "
                   "one lost robot walks on alone long after all others, in a split of this size")
    p.add_argument("--sims", type=int, default=16, help="robots of ours")
    return p.parse_args(argv)


def hf_inputs(policy, words, frames):
    """What transformers' processor would make of a prompt and its frames."""
    small, patch = [policy.resize(frame) for frame in frames], policy.image_format.patch
    sizes = [(f.shape[0] // patch // 2, f.shape[1] // patch // 2) for f in small]
    ids = policy.prompt(words, [torch.empty(*size, 0) for size in sizes]).ids
    pixels = [patchify(torch.from_numpy(f.copy())[None], policy.image_format)[0] for f in small]
    pixels = [p.view(len(p), 3, 1, -1).expand(-1, 3, 2, -1).flatten(1) for p in pixels]
    ids = torch.tensor([ids], device=policy.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.cat(pixels).to(policy.device, policy.dtype),
            "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w] for h, w in sizes],
                                           device=policy.device),
            "mm_token_type_ids": (ids == policy.image_token).int()}


def hf_agent(policy, model, execute=3):
    """The agent that a script around transformers would have; greedy."""
    @torch.no_grad()
    def agent(walks):
        plans = []
        for walk in walks:
            walk.features += walk.frames             # here: the pictures themselves, all of them
            walk.frames.clear()
            t = len(walk.features) - 1
            past = pick_frames(t, **policy.contract["memory"])
            inputs = hf_inputs(policy, window_prompt(walk.instruction, len(past), policy.contract),
                               [walk.features[i] for i in (*past, t)])
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=96,
                                 suppress_tokens=policy.banned.tolist())
            ids = ids[0, inputs["input_ids"].shape[1]:]
            text = policy.tokenizer.decode([i for i in ids.tolist() if i != policy.end_token])
            walk.add_decision(text, parse_control(text, policy.phrases))
            plans.append(walk.decisions[-1].plan[:execute] or [STOP])
        return plans
    return agent


def walk_all(args, prepared, agent, sims):
    """-> decisions per second, rows by episode."""
    settings, episodes, truths, words, scenes = prepared
    walks = [evaluate.EpisodeState(e, words[str(e["episode_id"])]) for e in episodes]
    rows = {}
    with SimPool("house", settings["robot"], scenes, sims) as pool:
        for sim in range(sims):                      # up and running before the clock starts
            pool.submit(sim, "reset", episode=episodes[sim % len(episodes)], frame=False)
        for sim in range(sims):
            pool.wait(sim)
        start = time.perf_counter()
        for walk in evaluate.run_episodes(pool, walks, agent, sims=sims,
                                          max_actions=args.max_actions):
            rows[walk.name] = evaluate.episode_record(
                walk, truths[walk.name]["locations"], settings["radius_m"],
                settings["second_radius_m"])
        seconds = time.perf_counter() - start
    return sum(row["decisions"] for row in rows.values()) / seconds, rows


def comparable(row):
    """The part of a row that describes the walk: without the number of tokens read."""
    return {key: value for key, value in row.items() if key != "tokens"}


def load_sides(args):
    from transformers import AutoModelForImageTextToText
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    policy = load_policy(args.ckpt, device=args.device, dtype=dtype).eval()
    theirs = AutoModelForImageTextToText.from_pretrained(
        args.ckpt, dtype=policy.dtype, attn_implementation="sdpa").to(args.device).eval()
    return policy, theirs


def main(args):
    torch.set_num_threads(args.threads)
    prepared = evaluate.prepare(evaluate.parse_args(
        ["--ckpt", args.ckpt, "--episodes", args.episodes, "--split", args.split,
         "--limit", str(args.limit)]))
    policy, theirs = load_sides(args)
    ours, peer = in_turn(
        [lambda: walk_all(args, prepared, policy.agent(), args.sims),
         lambda: walk_all(args, prepared, hf_agent(policy, theirs), 1)], args.repeats)
    rows = [side[0][1] for side in (ours, peer)]
    same = sum(comparable(rows[0][name]) == comparable(rows[1][name]) for name in rows[1])
    frames = policy.contract["memory"]["budget"] + 1
    sr = [np.mean([row["success"] for row in side.values()]) for side in rows]
    ours, peer = ([rate for rate, _ in side] for side in (ours, peer))
    add_row(args, f"evaluation, {args.sims} robots", ours, peer,
            "one robot, HF generate, frames encoded again", "decisions/s", same == len(rows[1]),
            f"{same} of {len(rows[1])} episodes with the same actions and metrics (SR {sr[0]:.3f} "
            f"and {sr[1]:.3f})", f"{args.ckpt}, up to {frames} frames, 3 of 6 actions executed, "
            f"{args.threads} thread(s)", higher_is_better=True)


if __name__ == "__main__":
    main(parse_args())
