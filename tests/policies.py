"""What tests of policies and of trainers share (it brings torch)."""
import json
import os
import subprocess
import sys
from collections import namedtuple

import numpy as np
import torch
from conftest import ROOT
from safetensors.torch import load_file

import engine
import grpo
from model import window_prompt
from qwen import patchify
from reward import write_plan

WORDS = "turn around left right go to the red green blue sofa chair and stop in front of it".split()
Decision = namedtuple("Decision", "instruction frames plan prompt before", defaults=(None, ()))


def texts(n=60):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 9)) for _ in range(n)]


def pictures(n, h=56, w=56, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8))


def pixel_values(frames, policy):
    """What transformers' processor would hand its model: (patches, 1176), both time halves."""
    rows, grids, patch = [], [], policy.image_format.patch
    for frame in frames:
        small = policy.resize(frame)
        patches = patchify(torch.from_numpy(small.copy())[None], policy.image_format)[0]
        rows.append(patches.view(len(patches), 3, 1, -1).expand(-1, 3, 2, -1).flatten(1))
        grids.append([1, small.shape[0] // patch, small.shape[1] // patch])
    return torch.cat(rows), torch.tensor(grids)


def hf_inputs(policy, ids, frames):
    pixels, grids = pixel_values(frames, policy)
    return dict(input_ids=ids, pixel_values=pixels, image_grid_thw=grids,
                mm_token_type_ids=(ids == policy.image_token).int())


def hf_logps(policy, prompt, frames, completion):
    """log p of one completion (C,) by transformers' own forward, vision tokens banned."""
    ids = torch.cat((torch.tensor(prompt.ids), completion))[None]
    logits = policy.model(**hf_inputs(policy, ids, frames)).logits[0]
    logits[:, policy.banned] = -torch.inf
    logps = logits[len(prompt.ids) - 1:-1].log_softmax(-1)
    return logps.gather(1, completion[:, None])[:, 0]


def make_prompt(policy, frames, text=None):
    features = policy.encode_frames(frames)
    instruction = text or texts()[0]
    return policy.prompt(window_prompt(instruction, len(frames) - 1, policy.contract), features)


def learn_plans(policy, steps=80):
    """Learn four plans by heart, so that drafts are often right and sometimes wrong."""
    plans = ([1, 2, 3, 1, 2, 3], [1] * 6, [2, 2, 1, 1, 1, 1], [3] * 6)
    ids, mask = policy.answers([write_plan(p, policy.phrases) for p in plans])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        features = policy.encode_frames(pictures(2))
        prompts = [policy.prompt(window_prompt(texts()[0], 1, policy.contract), features)]
        loss = -policy.logps(prompts, ids, mask, group_size=4).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def learn_to_write(policy, data, steps=40):
    """Plans of random actions: after this it knows how to answer, and not yet what."""
    rng = np.random.default_rng(1)
    decisions, frames = grpo.load_prompts([data], policy, grpo.draw_prompts([data], 2, 0))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(steps):
        plans = rng.integers(0, 4, (8, 6)).tolist()
        ids, mask = policy.answers([write_plan(plan, policy.phrases) for plan in plans])
        loss = -policy(decisions, frames, ids, mask, 4).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---------------------------------------------------------------- runs and weights


def weights_of(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def max_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def log_of(folder):
    """log.jsonl without the clock."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in engine.TIMING_KEYS}
                for line in f]


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in policy.named_parameters() if p.grad is not None}


def relative_difference(a, b):
    """|a - b| / |b| over all weights together."""
    gap = sum(((a[k] - b[k]) ** 2).sum() for k in b)
    return (gap / sum((b[k] ** 2).sum() for k in b)).sqrt().item()


DRIVER = """
import {module} as script
for argv in {argvs!r}:
    script.main(script.parse_args(argv))
"""


def launch(launcher, *command):
    """Run a script under a launcher of processes -> CompletedProcess. RANK and its like, which runs
    inside the tests' own process leave in the environment, are not handed on."""
    env = {k: v for k, v in os.environ.items()
           if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    path = os.pathsep.join(filter(None, (ROOT, env.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, "-m", *launcher, *map(str, command)], timeout=600,
                          env=dict(env, PYTHONPATH=path, OMP_NUM_THREADS="1"), cwd=ROOT,
                          capture_output=True, text=True)


def run_on_two_ranks(folder, module, argvs):
    """module.main() for each argv of the list, in turn, on the same two processes."""
    (folder / "driver.py").write_text(DRIVER.format(module=module, argvs=argvs))
    done = launch(["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
                  folder / "driver.py")
    assert done.returncode == 0, done.stderr[-3000:]
