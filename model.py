"""
The policy: Qwen2-VL as a robot that reads an instruction, looks, and writes its next six actions.

The weights, the configuration, the tokenizer and the files on disk are Hugging Face's. The forward
pass is written out here, over the same modules, because a navigator's batch has a structure that
no general forward can see:

    one walk   = one instruction, T frames, T decisions;  a decision looks at <= 17 of the T frames
    one group  = one prompt, G sampled plans               (GRPO)

so a frame is encoded once however many decisions look at it, the words that prompts have in common
are run once, a group's prompt is run once for its G plans, and the vocabulary is multiplied only
where an answer stands. All of it is exact: tests/test_model.py holds every piece against
transformers' own tokenizer, image processor, positions, logits and generate().

Read it in this order
    prompt     instruction and frames -> text with <image> marks          window_prompt
    frames     uint8 pictures -> patches -> features                      Policy.encode_frames
    tokens     text and features -> ids and 3-D positions                 Policy.prompt
    decoder    embeddings -> hidden states, with a cache that may be shared   Policy.decode
    training   log-probability of given answers                           Policy.logps
    sampling   answers, drafted by the plan grammar and verified          Policy.generate
    dialogs    whole episodes as one sequence; a cache kept across turns  Policy.reply
    disk       load_policy, save_policy

Shapes     B prompts, G answers each, N = B*G rows (siblings adjacent), T new tokens, P cached
           tokens, C answer tokens, H hidden size, V vocabulary

A checkpoint folder is what from_pretrained reads, plus nav.json: the navigation contract (degrees
and metres, horizon, memory, image budget, prompt version): evaluate.py acts as sft.py taught.

[1] Qwen2-VL, https://arxiv.org/abs/2409.12191 (M-RoPE: section 2.1)
[2] VLN-R1, https://arxiv.org/abs/2506.17221
[3] ActiveVLN, https://github.com/arvillion/ActiveVLN (dialogs: one conversation per episode)
"""
from __future__ import annotations

import json
import math
import os
import shutil
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

from cli import UserError, write_json
from reward import (
    RESERVED_MARKS,
    STOP,
    action_phrases,
    merged_phrases,
    parse_answer,
    write_plan,
)

HUB_NAMES = {"Qwen2-VL-2B": "Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL-7B": "Qwen/Qwen2-VL-7B-Instruct"}

# ---------------------------------------------------------------- the contract and the prompt

# What a checkpoint promises to whoever runs it: its robot (a row of sim.ROBOTS, here R2R's; null
# where the data did not tell) and how it is asked. 65,536 pixels is the paper's image budget [2];
# the memory's numbers are not public: lsm.py says why these.
NAV = {
    "version": 1, "dataset": "", "prompt": "window-1", "horizon": 6,
    "turn_deg": 15, "forward_m": 0.25, "hfov_deg": 90, "camera_height_m": 1.25,
    "radius_m": 0.1, "height_m": 1.5, "sliding": True, "width": 640, "height": 480,
    "min_pixels": 56 * 56, "max_pixels": 65536,
    "memory": {"name": "lsm", "budget": 16, "recent": 8, "short_stride": 1, "long_stride": 4},
}
# A dialog's: the conversation is its memory. At each turn a frame is shown, and up to `horizon`
# moves are answered, each of 1 to `merge` equal actions (ActiveVLN's numbers [3]).
DIALOG = {**{key: NAV[key] for key in NAV if key != "memory"},
          "prompt": "dialog-1", "horizon": 3, "merge": 3}
CONTRACTS = {contract["prompt"].split("-")[0]: contract for contract in (NAV, DIALOG)}
NULLABLE = {"hfov_deg", "camera_height_m", "radius_m", "height_m", "sliding", "width", "height"}


def is_dialog(nav):
    return nav["prompt"] == DIALOG["prompt"]


def words_of(instruction):
    """An instruction on one line. UserError if it could be taken for a picture or a turn."""
    if any(mark in instruction for mark in RESERVED_MARKS):
        raise UserError(f"the instruction {instruction!r} holds a reserved mark "
                        f"({' or '.join(RESERVED_MARKS)}); take it out of the episode file")
    return " ".join(instruction.split())


def dialog_prompt(instruction, nav):
    """What opens a dialog, the first frame included; every later turn is an <image> and no more."""
    moves = ", ".join(merged_phrases(nav["turn_deg"], nav["forward_m"], nav["merge"]).values())
    return (f"You are a robot walking through a building. At each view, write your next 1 to "
            f"{nav['horizon']} moves from: {moves}.\nInstruction: {words_of(instruction)}\n<image>")


def window_prompt(instruction, n_history, nav):
    """One decision, as text: the words first (they are the same all along a walk), then the eyes.

    instruction str; n_history: remembered frames, oldest first -> str with n_history + 1 <image>.
    """
    phrases = action_phrases(nav["turn_deg"], nav["forward_m"])
    options = ", ".join(phrases[a] for a in (1, 2, 3, STOP))
    return (f"You are a robot walking through a building. Choose your next {nav['horizon']} actions"
            f" from: {options}.\nInstruction: {words_of(instruction)}\n"
            f"Seen before: {'<image>' * n_history}\nNow: <image>")


# ---------------------------------------------------------------- frames: pictures -> patches

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)        # CLIP's, as every Qwen2-VL checkpoint has
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def fit_pixels(height, width, min_pixels, max_pixels, factor=28):
    """The size at which a frame is seen: multiples of `factor`, area within budget, aspect kept.

    The rule of Qwen2-VL's image processor [1]. 640x480 under 65,536 pixels is 280x196 = 70 tokens:
    >>> fit_pixels(480, 640, 56 * 56, 65536)
    (196, 280)
    >>> fit_pixels(56, 56, 56 * 56, 65536)
    (56, 56)
    """
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def resize(frame, nav):
    """uint8 (H, W, 3) -> uint8 (h, w, 3) within the contract's pixel budget (PIL bicubic)."""
    h, w = fit_pixels(*frame.shape[:2], nav["min_pixels"], nav["max_pixels"])
    if frame.shape[:2] == (h, w):
        return np.ascontiguousarray(frame)
    return np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC))


def patchify(frames, patch=14, merge=2, mean=IMAGE_MEAN, std=IMAGE_STD):
    """uint8 (n, h, w, 3) -> float32 (n, p, 3 * patch * patch), normalised, in merge order.

    Merge order: the four patches that become one token are neighbours in the sequence [1]. The
    processor of transformers repeats every still frame to fill the two-frame (temporal) patch; we
    keep one copy and add the two halves of the weight instead (PatchProjection).
    """
    n, h, w, _ = frames.shape
    mean, std = (torch.tensor(x, device=frames.device) * 255 for x in (mean, std))
    x = (frames.float() - mean) / std
    x = x.view(n, h // patch // merge, merge, patch, w // patch // merge, merge, patch, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, -1, 3 * patch * patch)


class PatchProjection(nn.Module):
    """Qwen2-VL's Conv3d over patches (kernel = stride), as the matrix product that it is.

    The parameter keeps Conv3d's name and shape, so checkpoints load and save unchanged; Conv3d
    itself is one to two orders slower on some cuDNN builds (pytorch#174051) and on CPUs.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight                               # (E, 3, 2, patch, patch)

    def forward(self, x):
        if x.dim() == 5:                                        # transformers' own forward
            return F.linear(x.flatten(1), self.weight.flatten(1))
        return F.linear(x, self.weight.sum(dim=2).flatten(1))   # a still frame: both halves see it


def rotate(x, cos, sin):
    """Rotary embedding in the half-split layout: x (..., D) with cos, sin (..., D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


@lru_cache(maxsize=64)
def patch_angles(h, w, merge, head_dim, device):
    """cos, sin (p, head_dim) of the vision tower's 2-D rotary embedding, in merge order."""
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    order = [g.view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
             for g in (rows, cols)]
    inv_freq = 10000.0 ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = torch.cat([g[:, None] * inv_freq for g in order], dim=-1).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)


# ---------------------------------------------------------------- tokens: where each one stands


@lru_cache(maxsize=4096)
def mrope_positions(runs):
    """M-RoPE positions [1] of a sequence: runs, a tuple of n (words) or (h, w) (an image's tokens)
    -> int64 (3, L) for time, height, width.

    Words move one step on all three axes; an image stands still in time and spreads over height
    and width; what follows starts after its longer side. Hand-worked: a word, a 1x2 image, a word:
    >>> mrope_positions((1, (1, 2), 1)).tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    parts, now = [], 0
    for run in runs:
        if isinstance(run, int):
            parts.append(np.arange(now, now + run)[None].repeat(3, axis=0))
            now += run
        else:
            h, w = run
            parts.append(now + np.stack([np.zeros(h * w, dtype=np.int64),
                                         np.repeat(np.arange(h), w), np.tile(np.arange(w), h)]))
            now += max(h, w)
    return torch.from_numpy(np.concatenate(parts, axis=1))


# ---------------------------------------------------------------- what it costs


def vision_flops(config, patches):
    """FLOPs of one frame's forward pass through the tower. Only matrix products and attention
    count, a multiplication with its addition as two; config: transformers' Qwen2VLVisionConfig.

    One block of width 2 and a fourfold MLP has 4*4 + 2*2*8 = 48 weights, the patches 3*14*14*2, the
    merger, of 4 patches to a token, 8*8 + 8*3; attention is 2 products of 4 x 4 x 2:
    >>> from types import SimpleNamespace as C
    >>> vision_flops(C(depth=1, embed_dim=2, mlp_ratio=4, hidden_size=3, patch_size=14,
    ...                spatial_merge_size=2), 4) == 2 * (4 * (1176 + 48) + 88) + 2 * 2 * 32
    True
    """
    e, merged = config.embed_dim, config.embed_dim * config.spatial_merge_size ** 2
    block = 4 * e * e + 2 * e * int(e * config.mlp_ratio)
    weights = 3 * config.patch_size ** 2 * e + config.depth * block
    merger = (merged * merged + merged * config.hidden_size) / config.spatial_merge_size ** 2
    return 2 * patches * (weights + merger) + config.depth * 4 * patches ** 2 * e


def decoder_flops(config, new, before=0):
    """FLOPs of `new` tokens' forward pass through the decoder's layers, `before` standing in its
    cache; the vocabulary is apart. config: Qwen2VLTextConfig. Each looks at half of the new ones.

    One layer of width 2, one head, a MLP of 3: 4 * 2*2 + 3 * 2*3 = 34 weights; 5 tokens after 10:
    >>> from types import SimpleNamespace as C
    >>> tiny = C(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=3,
    ...          num_hidden_layers=1)
    >>> decoder_flops(tiny, 5, 10) == 2 * 5 * 34 + 2 * 2 * 5 * 2 * (10 + 2.5)
    True
    """
    h, kv = config.hidden_size, config.num_key_value_heads / config.num_attention_heads
    weights = 2 * h * h + 2 * h * h * kv + 3 * h * config.intermediate_size
    return config.num_hidden_layers * (2 * new * weights + 4 * h * new * (before + new / 2))


def activation_bytes(config, tokens, patches, itemsize, checkpointing=False):
    """What the backward pass will ask for, of decoder tokens and of vision patches, roughly.

    Counted in tests/test_bench.py from what autograd really keeps: within a fifth of it.
    """
    text, vision = config.text_config, config.vision_config
    token = 15 * text.hidden_size + 4 * text.intermediate_size
    patch = 26 * vision.embed_dim
    if checkpointing:            # each layer's input; and one layer whole, when it is recomputed
        return itemsize * (
            tokens * (text.num_hidden_layers * text.hidden_size + token)
            + patches * (vision.depth * vision.embed_dim + patch))
    return itemsize * (tokens * text.num_hidden_layers * token + patches * vision.depth * patch)


class Prompt(NamedTuple):
    """One decision, ready to run."""
    ids: list            # L ints, images expanded to one id per feature
    positions: torch.Tensor   # (3, L) on the CPU
    features: list       # one (rows, cols, H) tensor per image, in reading order
    head: int            # ids before the first image: words that a walk's decisions have in common


class Cache(NamedTuple):
    """What later tokens may look at. keys[l], values[l] (N, kv_heads, P, D); valid (N, P) bool.

    shared: another Cache, of N / G rows: what G siblings have in common, before their own.
    """
    keys: list
    values: list
    valid: torch.Tensor
    shared: Cache = None

    def rows(self, index):
        """The cache of rows index (N',): repeats share nothing but the numbers, gradients add."""
        return Cache([k[index] for k in self.keys], [v[index] for v in self.values],
                     self.valid[index])

    def siblings(self, group_size):
        """An empty cache for G rows behind each of these, which are not copied for it."""
        n = len(self.valid) * group_size
        return Cache([k.new_zeros(n, k.shape[1], 0, k.shape[3]) for k in self.keys],
                     [v.new_zeros(n, v.shape[1], 0, v.shape[3]) for v in self.values],
                     self.valid.new_zeros(n, 0), self)

    def drop(self, keep):
        """Mark cached tokens unseen where keep (N, P) is False: a rejected draft."""
        return self._replace(valid=self.valid & keep)

    def detach(self):
        """The numbers without their history."""
        return self._replace(keys=[k.detach() for k in self.keys],
                             values=[v.detach() for v in self.values])


class Thread(NamedTuple):
    """A conversation as the decoder remembers it between two turns."""
    kv: torch.Tensor     # (2 * layers, kv_heads, P, D): keys, then values
    said: list           # ids drawn last and not read yet: the answer's end
    now: int             # the position of said[0]


class Rollout(NamedTuple):
    """N = B*G answers: completion_ids (N, C), completion_mask (N, C) bool, <|im_end|> inside."""
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    texts: list
    passes: int          # decoder passes after the prompt


# ---------------------------------------------------------------- the policy


def attend(q, k, v, mask):
    """q (N, heads, T, D) looks at k, v (N, kv_heads, S, D) where mask (N, 1, T, S) is True."""
    share = q.shape[1] // k.shape[1]
    if share > 1:                                               # grouped-query heads
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def together(x, groups):
    """Rows (N, heads, T, D) of siblings, one behind another: (groups, heads, N / groups * T, D)."""
    return x.view(groups, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def apart(x, n):
    """The way back from together(): -> (n, heads, T, D)."""
    groups, heads, _, d = x.shape
    return x.view(groups, heads, n // groups, -1, d).transpose(1, 2).flatten(0, 1)


def certain(node):
    """The tokens that follow a node of a tree {token: node} without a choice, and their end."""
    tokens = []
    while len(node) == 1:
        (token, node), = node.items()
        tokens.append(token)
    return tokens, node


class Policy(nn.Module):
    """A Qwen2-VL model, its tokenizer and its navigation contract.

    files: {name: bytes} of the folder it was loaded from (KEPT_FILES), for save_policy().
    """

    def __init__(self, model, tokenizer, nav, files=None):
        super().__init__()
        self.model, self.tokenizer, self.files = model, tokenizer, files or {}
        self.processor = image_processor(self.files, model.config.vision_config)
        self.nan_logits = False          # has a sampled token's distribution not been finite?
        self.promise(nav)
        self.checkpointing = False
        self.flops = self.tokens = 0     # computed, and learned from, since engine.work() asked
        if isinstance(self.vision.patch_embed.proj, nn.Conv3d):
            self.vision.patch_embed.proj = PatchProjection(self.vision.patch_embed.proj)

        text = model.config.text_config
        self.head_dim = text.hidden_size // text.num_attention_heads
        rope = getattr(text, "rope_parameters", None) or text.rope_scaling
        self.mrope_section = rope["mrope_section"]
        theta = rope.get("rope_theta") or text.rope_theta
        self.inv_freq = theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        token = tokenizer.convert_tokens_to_ids
        self.image_token, self.end_token = token("<|image_pad|>"), token("<|im_end|>")
        # The policy may not draw pictures: these ids have probability zero in sampling and in the
        # log-probs alike, so the two are one distribution.
        self.banned = [token(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
                                          "<|vision_end|>", "<|vision_pad|>")
                       if token(t) is not None and token(t) != tokenizer.unk_token_id]
        self._words = {}                                        # text piece -> token ids

    def promise(self, nav):
        """Take up a navigation contract: what is taught from here on, in its degrees and metres."""
        self.nav, self.phrases = nav, action_phrases(nav["turn_deg"], nav["forward_m"])
        self.merged = merged_phrases(nav["turn_deg"], nav["forward_m"], nav.get("merge", 1))
        self._trie = None                                       # the plan grammar, made when needed

    @property
    def vision(self):
        return self.model.model.visual

    @property
    def lm(self):
        return self.model.model.language_model

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def dtype(self):
        return next(self.model.parameters()).dtype

    def _block(self, function, *inputs):
        """Run one layer; with activation checkpointing, recompute it in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def _spend(self, forward, tokens=0, learns=True):
        """Count FLOPs: a backward pass costs twice its forward pass. Nothing is counted that is
        computed twice, or for padding."""
        learns = learns and torch.is_grad_enabled()
        self.flops += forward * (3 if learns else 1)
        self.tokens += tokens if learns else 0

    # ------------------------------------------------------------ frames -> features

    def encode_frames(self, frames):
        """uint8 (H, W, 3) arrays, of any sizes -> list of (rows, cols, H) tensors, differentiable.

        The tower attends within a frame only, so a frame's features do not depend on its company.
        All sizes go through it together, one call of each module: under ZeRO-3 a call is a
        collective, and ranks may hold different numbers of sizes.
        """
        small = [resize(np.asarray(f), self.nav) for f in frames]
        if not small:
            return []
        features = [None] * len(small)
        sizes = sorted({f.shape for f in small})
        index = [[i for i, f in enumerate(small) if f.shape == size] for size in sizes]
        pixels = [torch.from_numpy(np.stack([small[i] for i in some])).to(self.device)
                  for some in index]
        for some, found in zip(index, self._tower(pixels)):
            for i, feature in zip(some, found.unbind(0)):
                features[i] = feature
        return features

    def _tower(self, pixels):
        """uint8 (n, h, w, 3) for each size -> (n, rows, cols, H) for each: transformers' tower,
        every module called once, over all patches in a row (X, E); attention once for each size.
        """
        attn, merge = self.vision.blocks[0].attn, self.vision.spatial_merge_size
        heads = attn.num_heads
        grids = [(len(p), p.shape[1] // 14, p.shape[2] // 14) for p in pixels]
        self._spend(sum(n * vision_flops(self.model.config.vision_config, h * w)
                        for n, h, w in grids), learns=attn.qkv.weight.requires_grad)
        mean, std = self.processor["image_mean"], self.processor["image_std"]
        x = torch.cat([patchify(p, merge=merge, mean=mean, std=std).flatten(0, 1) for p in pixels])
        x = self.vision.patch_embed.proj(x.to(self.dtype))                                # (X, E)
        counts = [n * h * w for n, h, w in grids]

        def layer(block, x):
            rows, parts = block.attn.qkv(block.norm1(x)).split(counts), []
            for qkv, (n, h, w) in zip(rows, grids):
                q, k, v = qkv.view(n, h * w, 3, heads, -1).permute(2, 0, 3, 1, 4)
                cos, sin = patch_angles(h, w, merge, q.shape[-1], q.device)
                q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
                y = F.scaled_dot_product_attention(q, k, v)
                parts.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
            x = x + block.attn.proj(torch.cat(parts))
            return x + block.mlp(block.norm2(x))

        for block in self.vision.blocks:
            x = self._block(layer, block, x)
        found = self.vision.merger(x).split([count // merge ** 2 for count in counts])
        return [f.view(n, h // merge, w // merge, -1) for f, (n, h, w) in zip(found, grids)]

    # ------------------------------------------------------------ text -> ids

    def _encode(self, text):
        if text not in self._words:
            if len(self._words) > 50_000:
                self._words.clear()
            self._words[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._words[text]

    def prompt(self, text, features, before=()):
        """One user turn and the opening of the answer, in the model's own chat template.

        text with one <image> per tensor in features [(rows, cols, H)] -> Prompt
        before: earlier messages of the chat, ((role, text), ..); their <image> come first.
        """
        chat = self._chat(text, before).replace("<image>",
                                                "<|vision_start|><|image_pad|><|vision_end|>")
        pieces = chat.split("<|image_pad|>")                    # special tokens split cleanly
        if len(pieces) != len(features) + 1:
            raise UserError(f"the prompt has {len(pieces) - 1} <image> marks for {len(features)} "
                            "frames; make them agree")
        return self._assemble(pieces, features)

    def _assemble(self, pieces, features):
        """Texts with a frame between each two -> Prompt, its positions from 0."""
        ids = list(self._encode(pieces[0]))
        head, runs = len(ids), [len(ids)]
        for feature, piece in zip(features, pieces[1:]):
            words = self._encode(piece)
            runs += [tuple(feature.shape[:2]), len(words)]
            ids += [self.image_token] * (feature.shape[0] * feature.shape[1]) + words
        return Prompt(ids, mrope_positions(tuple(runs)), features, head)

    def _chat(self, text, before=()):
        """The chat template around a text; rendered once and filled in, for it is slow. With
        earlier messages before it: rendered each time, as they differ from record to record."""
        if before:
            return self.tokenizer.apply_chat_template(
                [{"role": role, "content": words} for role, words in (*before, ("user", text))],
                tokenize=False, add_generation_prompt=True)
        if not hasattr(self, "_template"):
            mark = "\x00"
            self._template = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": mark}], tokenize=False,
                add_generation_prompt=True).split(mark)
            # What a later turn of a dialog stands between; its first token, <|im_end|>, belongs to
            # the answer before it.
            self._later = [part.removeprefix("<|im_end|>") for part in
                           self.tokenizer.apply_chat_template(
                               [{"role": role, "content": mark} for role in
                                ("user", "assistant", "user")], tokenize=False,
                               add_generation_prompt=True).split(mark)[2:]]
            self._later[1] = "<|im_end|>" + self._later[1]
        return self._template[0] + text + self._template[1]

    def turn(self, instruction, feature):
        """What comes before an answer of a dialog -> Prompt. instruction None: a later turn."""
        opening = self._chat(dialog_prompt(instruction or "", self.nav))
        text = opening if instruction is not None else "<image>".join(self._later)
        before, after = text.split("<image>")
        return self._assemble([before + "<|vision_start|>", "<|vision_end|>" + after], [feature])

    def answers(self, texts):
        """Texts -> completion_ids, completion_mask (N, C), each closed by <|im_end|>."""
        ids, mask = self._padded([self._encode(text) + [self.end_token] for text in texts])
        return ids.to(self.device), mask.to(self.device)

    def _padded(self, rows):
        """Lists of ids -> ids, mask (N, C), padded on the right."""
        ids = torch.full((len(rows), max(map(len, rows))), self.end_token)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = True
        return ids, mask

    # ------------------------------------------------------------ the decoder

    def decode(self, embeds, positions, valid, past=None, sees=None):
        """Run new tokens over a cache: transformers' decoder layers, one causal pass.

        embeds (N, T, H); positions (3, N, T); valid (N, T) bool, False for padding; past: Cache of
        N rows (which may have a shared part) or None; sees: which new tokens see which, (N, T, T)
        bool, default causal -> hidden (N, T, H) after the last norm, Cache of P + T tokens.
        A row never looks at padding, at rejected drafts, or at another row.
        """
        n, t, _ = embeds.shape
        if sees is None:
            sees = torch.ones(t, t, dtype=torch.bool, device=embeds.device).tril()
        shared = past.shared if past is not None else None
        mask = sees & valid[:, None, :]
        if past is not None:
            mask = torch.cat((past.valid[:, None, :].expand(n, t, -1), mask), dim=-1)
        if shared is not None:          # siblings become one row: all see what they share, none
            groups = len(shared.valid)  # another's own
            mine = torch.eye(n // groups, dtype=torch.bool, device=mask.device)[:, None, :, None]
            mask = mask.view(groups, n // groups, t, 1, -1) & mine
            mask = torch.cat((shared.valid[:, None, :].expand(-1, n // groups * t, -1),
                              mask.flatten(3).flatten(1, 2)), dim=-1)
        mask = mask[:, None]                                            # (N, 1, T, P + T)
        cos, sin = self._angles(positions, embeds.dtype)
        real = valid.flatten().nonzero().squeeze(1)     # padding is there for attention only

        def padded(x):
            return x.new_zeros(n * t, x.shape[-1]).index_copy(0, real, x).view(n, t, -1)

        def layer(block, x, k_past, v_past, *kv_shared):
            attn, y = block.self_attn, block.input_layernorm(x)
            q, k, v = (padded(proj(y)).view(n, t, -1, self.head_dim).transpose(1, 2)
                       for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if k_past is not None:
                k, v = torch.cat((k_past, k), dim=2), torch.cat((v_past, v), dim=2)
            if kv_shared:
                every_k, every_v = (torch.cat((common, together(own, groups)), dim=2)
                                    for common, own in zip(kv_shared, (k, v)))
                y = apart(attend(together(q, groups), every_k, every_v, mask), n)
            else:
                y = attend(q, k, v, mask)
            x = x + attn.o_proj(y.transpose(1, 2).flatten(2).flatten(0, 1)[real])
            return x + block.mlp(block.post_attention_layernorm(x)), k, v

        x, keys, values = embeds.flatten(0, 1)[real], [], []                            # (X, H)
        for i, block in enumerate(self.lm.layers):
            k, v = (past.keys[i], past.values[i]) if past is not None else (None, None)
            common = (shared.keys[i], shared.values[i]) if shared is not None else ()
            x, k, v = self._block(layer, block, x, k, v, *common)
            keys.append(k)
            values.append(v)
        seen = valid if past is None else torch.cat((past.valid, valid), dim=1)
        return padded(self.lm.norm(x)), Cache(keys, values, seen, shared)

    def _angles(self, positions, dtype):
        """cos, sin (N, 1, T, D) of M-RoPE: frequency bands take turns at time, height, width."""
        freqs = positions[..., None].float() * self.inv_freq.to(positions.device)   # (3, N, T, D/2)
        bands = freqs.split(self.mrope_section, dim=-1)
        angles = torch.cat([band[i % 3] for i, band in enumerate(bands)], dim=-1).repeat(1, 1, 2)
        return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)

    def _embed(self, rows, features):
        """Padded id rows with their images' features in place -> (N, T, H).

        rows (N, T) int64 on the CPU; features: per row, its list of (rows, cols, H) tensors.
        """
        embeds = self.lm.embed_tokens(rows.to(self.device))
        where = (rows == self.image_token).flatten().nonzero().squeeze(1).to(self.device)
        if len(where):
            # Each distinct tensor once, then one gather: a frame shared by eight decisions is
            # stored once, and its gradient is summed once.
            unique, start, offset = [], {}, 0
            for f in (f for row in features for f in row):
                if id(f) not in start:
                    start[id(f)] = offset
                    unique.append(f.flatten(0, 1))
                    offset += unique[-1].shape[0]
            index = np.concatenate([np.arange(start[id(f)], start[id(f)] + f.shape[0] * f.shape[1])
                                    for row in features for f in row])
            bank = torch.cat(unique)[torch.from_numpy(index).to(self.device)]
            embeds = embeds.flatten(0, 1).index_copy(0, where, bank.to(embeds.dtype))
            embeds = embeds.view(*rows.shape, -1)
        return embeds

    def _run(self, segments, past=None, before=(), sees=None):
        """Pad segments (ids, positions (3, L), features) to one batch and decode it.

        before: how many tokens stand before each (for the count of FLOPs only).
        """
        new = [len(ids) for ids, _, _ in segments]
        self._spend(sum(decoder_flops(self.model.config.text_config, n, b)
                        for n, b in zip(new, before or [0] * len(new))), sum(new))
        width = max(len(ids) for ids, _, _ in segments)
        rows = torch.full((len(segments), width), self.end_token)
        positions = torch.zeros(3, len(segments), width, dtype=torch.long)
        valid = torch.zeros(rows.shape, dtype=torch.bool)
        for i, (ids, where, _) in enumerate(segments):
            rows[i, :len(ids)] = torch.tensor(ids)
            positions[:, i, :len(ids)] = where
            valid[i, :len(ids)] = True
        embeds = self._embed(rows, [features for _, _, features in segments])
        return self.decode(embeds, positions.to(self.device), valid.to(self.device), past, sees)

    def _heads(self, prompts):
        """Run the words that prompts begin with, each distinct text once -> Cache with B rows.

        Shared words are exact, not an approximation: causal attention lets nothing later change
        them. Done even when no two prompts begin alike: under ZeRO-3 every pass is a collective, so
        the number of passes may not depend on what a rank happens to have drawn.
        """
        texts = [tuple(p.ids[:p.head]) for p in prompts]
        unique = list(dict.fromkeys(texts))
        first = [prompts[texts.index(text)] for text in unique]
        _, cache = self._run([(p.ids[:p.head], p.positions[:, :p.head], []) for p in first])
        return cache.rows(torch.tensor([unique.index(text) for text in texts], device=self.device))

    def _prefill(self, prompts):
        """Run whole prompts -> hidden state of each one's last token (B, H), Cache of B rows."""
        tails = [self._tail(p, p.head) for p in prompts]
        hidden, cache = self._run(tails, self._heads(prompts), [p.head for p in prompts])
        return hidden[range(len(tails)), [len(t[0]) - 1 for t in tails]], cache

    def _tail(self, prompt, cut, answer=()):
        """The part of a prompt after its first `cut` ids, followed by answer ids."""
        after = prompt.positions.max() + 1 + torch.arange(len(answer))
        where = torch.cat((prompt.positions[:, cut:], after.expand(3, -1)), dim=1)
        return prompt.ids[cut:] + list(answer), where, prompt.features

    def _logits(self, hidden, temperature):
        """hidden (..., H) -> fp32 logits (..., V), vision tokens at minus infinity."""
        logits = self.model.lm_head(hidden).float() / temperature
        self._spend(2 * logits.numel() * hidden.shape[-1])
        logits[..., self.banned] = -math.inf
        return logits

    # ------------------------------------------------------------ training: log-probabilities

    def read(self, decisions, frames):
        """Decisions (make_data.Decision: frames are keys, the current one last) and frames
        {key: uint8 (H, W, 3), or features that encode_frames made} -> one Prompt each. Every
        distinct frame is encoded once.
        """
        new = [key for key, frame in frames.items() if not torch.is_tensor(frame)]
        features = {**frames, **dict(zip(new, self.encode_frames([frames[key] for key in new])))}
        return [self.prompt(d.prompt or window_prompt(d.instruction, len(d.frames) - 1, self.nav),
                            [features[key] for key in d.frames], d.before) for d in decisions]

    def sizes(self, decisions, frames, group_size=1, branches=None):
        """Tokens that the decoder is given for each decision and its answers; of a dialog (with
        ids), the whole of it and its branches. frames as load_batch() shrank them, or features."""
        blank = {key: f if torch.is_tensor(f) else torch.empty(*(x // 28 for x in f.shape[:2]), 0)
                 for key, f in frames.items()}
        if is_dialog(self.nav):
            return [len(self.transcript(d, [blank[key] for key in d.frames])[0][0])
                    + sum(len(ids) for _, ids in some or ())
                    for d, some in zip(decisions, branches or [()] * len(decisions))]
        answer = len(self._encode(write_plan([1] * self.nav["horizon"], self.phrases))) + 1
        return [len(p.ids) + group_size * answer for p in self.read(decisions, blank)]

    def activations(self, decisions, frames, group_size=1, branches=None):
        """Bytes that a forward pass on these leaves behind for its backward pass, estimated."""
        patches = sum(f.shape[0] * f.shape[1] // 14 ** 2 for f in frames.values())
        trains = next(self.vision.parameters()).requires_grad
        tokens = sum(self.sizes(decisions, frames, group_size, branches))
        return activation_bytes(self.model.config, tokens, patches * trains, self.dtype.itemsize,
                                self.checkpointing)

    def forward(self, decisions, frames, *rest, **named):
        """read() and logps() in one call: under ZeRO-3 the weights are only there inside it.

        decisions, frames, completion_ids, completion_mask, group_size, temperature -> logps(), or
        dialogs, frames, branches, temperature -> dialog_logps(), by the contract.
        """
        if is_dialog(self.nav):
            return self.dialog_logps(decisions, frames, *rest, **named)
        return self.logps(self.read(decisions, frames), *rest, **named)

    def imagine(self, decisions, frames, group_size, temperature, seeds):
        """read(), generate() and logps() of what was sampled -> Rollout, logps (B*G, C).

        The prompts are run once for both: what is sampled from is what is differentiated.
        """
        prompts = self.read(decisions, frames)
        prefill = self._prefill(prompts)
        roll = self.generate(prompts, group_size, temperature, seeds, prefill=prefill)
        return roll, self.logps(prompts, roll.completion_ids, roll.completion_mask, group_size,
                                temperature, prefill)

    def logps(self, prompts, completion_ids, completion_mask, group_size=1, temperature=1.0,
              prefill=None):
        """log p(answer token | everything before it), at answer positions only.

        prompts: B Prompts; completion_ids, completion_mask (B*G, C), siblings adjacent, padded on
        the right -> logps (B*G, C) fp32, differentiable, 0 where masked.
        The distribution is the one generate() samples from: same temperature, same banned ids.
        prefill: the prompts' own, if they have been run already.
        """
        lengths = completion_mask.sum(dim=1).tolist()
        ids = [row[:n] for row, n in zip(completion_ids.tolist(), lengths)]

        if group_size == 1 and prefill is None:      # prompt and answer in one row
            tails = [self._tail(p, p.head, a[:-1]) for p, a in zip(prompts, ids)]
            hidden, _ = self._run(tails, self._heads(prompts), [p.head for p in prompts])
            start = [len(t[0]) - max(len(a) - 1, 0) - 1 for t, a in zip(tails, ids)]
        else:                                        # the prompt once, its G answers over its cache
            last, cache = prefill or self._prefill(prompts)
            siblings = torch.arange(len(prompts), device=self.device).repeat_interleave(group_size)
            answers = [self._tail(prompts[i // group_size], len(prompts[i // group_size].ids),
                                  a[:-1])[:2] + ([],) for i, a in enumerate(ids)]
            hidden, _ = self._run([a if a[0] else ([self.end_token], torch.zeros(3, 1), [])
                                   for a in answers], cache.siblings(group_size),
                                  [len(prompts[i // group_size].ids) for i in range(len(ids))])
            hidden = torch.cat((last[siblings][:, None], hidden), dim=1)
            start = [0] * len(ids)

        column = torch.arange(completion_ids.shape[1], device=self.device)
        where = torch.tensor(start, device=self.device)[:, None] + column              # (N, C)
        row = torch.arange(len(ids), device=self.device)[:, None].expand_as(where)
        picked = completion_mask.nonzero(as_tuple=True)
        logits = self._logits(hidden[row[picked], where[picked]], temperature)         # (tokens, V)
        token = completion_ids[picked]
        logps = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        out = torch.zeros(completion_ids.shape, device=self.device)
        return out.index_put(picked, logps)

    # ------------------------------------------------------------ sampling

    @torch.no_grad()
    def generate(self, prompts, group_size=1, temperature=0.0, seeds=None, draft=True,
                 max_new_tokens=96, prefill=None):
        """Sample G answers per prompt (temperature 0: the most likely one) -> Rollout.

        seeds: one int per prompt; the j-th token of an answer is drawn with the j-th number of its
        own stream, so an answer depends on its prompt and seed, never on the batch around it.
        draft: after "A" only ". Move forward 25 cm" is a plan, so those tokens are proposed and
        checked in one pass. At each proposed place the policy draws its own token from its own
        distribution; the first that differs from the proposal ends it, and stands. That is
        sampling, token for token: the proposal only decides how many tokens a pass may yield.
        """
        hidden, cache = prefill or self._prefill(prompts)
        cache = cache.detach()                       # a prefill may have been run to learn from
        start = [int(p.positions.max()) + 1 for p in prompts]
        answers, _, passes = self._answer(
            hidden, cache.siblings(group_size), start, [len(p.ids) for p in prompts], group_size,
            temperature, seeds, draft, max_new_tokens)
        ids, mask = self._padded(answers)
        texts = [self.text(a) for a in answers]
        return Rollout(ids.to(self.device), mask.to(self.device), texts, passes)

    def text(self, answer):
        """Ids of an answer -> its words, without the end mark."""
        return self.tokenizer.decode(answer[:-1] if answer[-1:] == [self.end_token] else answer)

    def actions(self, answer):
        """Ids of a dialog's answer -> the actions to carry out; [] if it is not well formed."""
        if answer[-1] != self.end_token:
            return []
        return parse_answer(self.text(answer), self.merged, self.nav["horizon"])

    def _answer(self, hidden, cache, start, before, group_size, temperature, seeds, draft,
                max_new_tokens):
        """G answers after each of B prompts, whose last hidden states (B, H), next positions and
        lengths are given, and the Cache of B*G rows -> lists of ids (B*G), the Cache that has read
        all but the last id of each, decoder passes."""
        siblings = torch.arange(len(start), device=self.device).repeat_interleave(group_size)
        hidden = hidden[siblings][:, None]                                             # (N, 1, H)
        noise = self._noise(seeds, len(start), group_size, max_new_tokens, temperature)
        start = torch.tensor(start).repeat_interleave(group_size)

        answers, done, passes = [[] for _ in start], [False] * len(start), 0
        proposals = [[] for _ in start]
        while True:
            # 1. draw at every open place; keep what agrees with the proposal, and one token more
            logits = self._logits(hidden, temperature or 1.0)                          # (N, K+1, V)
            drawn = self._draw(logits, noise, [len(a) for a in answers], proposals)
            kept = torch.ones(len(answers), hidden.shape[1], dtype=torch.bool)
            for i, answer in enumerate(answers):
                if done[i]:
                    kept[i] = False          # it waits for the others, and was run along with them
                    continue
                for j, token in enumerate(drawn[i][:len(proposals[i]) + 1]):
                    answer.append(token)
                    done[i] = token == self.end_token or len(answer) == max_new_tokens
                    if done[i] or j == len(proposals[i]) or token != proposals[i][j]:
                        break
                kept[i, 1 + j:] = False      # column 0 is the token before the proposal: it stands
            if passes:
                old = torch.ones(len(answers), cache.valid.shape[1] - kept.shape[1],
                                 dtype=torch.bool)
                cache = cache.drop(torch.cat((old, kept), dim=1).to(self.device))
            if all(done):
                break
            # 2. propose what the grammar leaves no choice about, and run it in one pass
            proposals = [self.draft(a) if draft and not d else [] for a, d in zip(answers, done)]
            room = [max_new_tokens - len(a) - 1 for a in answers]
            proposals = [p[:max(r, 0)] for p, r in zip(proposals, room)]
            segments = [([a[-1]] + p, (start[i] + len(a) - 1 + torch.arange(1 + len(p)))
                         .expand(3, -1), []) for i, (a, p) in enumerate(zip(answers, proposals))]
            hidden, cache = self._run(segments, cache, [
                before[i // group_size] + len(a) - 1 for i, a in enumerate(answers)])
            passes += 1
        return answers, cache, passes

    def _noise(self, seeds, n_prompts, group_size, length, temperature):
        """Uniform numbers (B*G, length) from each prompt's own stream; None if greedy."""
        if temperature == 0:
            return None
        seeds = seeds if seeds is not None else torch.randint(2 ** 62, (n_prompts,)).tolist()
        return torch.cat([torch.rand(group_size, length, dtype=torch.float64,
                                     generator=torch.Generator().manual_seed(seed))
                          for seed in seeds])

    def _draw(self, logits, noise, lengths, proposals):
        """One token per row and open place: argmax, or the inverse of the distribution function.

        Where no distribution is (NaN, infinity) any token is returned and nan_logits is set: one
        rank that raised here would leave the others waiting. Whoever samples reads the flag.
        """
        self.nan_logits |= not bool(logits.amax(dim=-1).isfinite().all())
        if noise is None:
            return logits.argmax(dim=-1).tolist()
        cdf = logits.double().softmax(dim=-1).cumsum(dim=-1)                           # (N, K, V)
        place = torch.tensor(lengths)[:, None] + torch.arange(logits.shape[1])
        u = noise.gather(1, place.clamp(max=noise.shape[1] - 1)).to(self.device)
        return torch.searchsorted(cdf, (u * cdf[..., -1])[..., None], right=True
                                  ).squeeze(-1).clamp(max=logits.shape[-1] - 1).tolist()

    def draft(self, answer, guess=8):
        """The tokens that must follow `answer` (list of ids) if it is to become a plan; often none.

        The grammar is the set of all plans of `horizon` actions in which nothing follows a stop but
        stops (of a dialog: 1 to `horizon` merged ones, a stop the last), tokenized once into a
        tree: where the tree does not fork, the next token is certain. At a fork it is guessed that
        the last action is repeated, for up to `guess` tokens: a robot mostly goes on doing what it
        did, and a wrong guess costs little. An answer that has left the tree is taken up again
        where it looks like the second action of a plan. It is no plan any more, but it will go on
        in phrases, and without a draft this one row would keep its whole batch waiting.
        """
        if self._trie is None:
            self._trie = self._grammar()
            ends = [certain(first)[1] for first in self._trie.values()]
            self._second = next((node for node in ends if node), {})        # behind a first action
        node, last = self._trie, None            # last: which branch was taken at the last fork
        for token in answer:
            before, node = node, node.get(token) or self._second.get(token) or {}
            if len(before) > 1 and token in before:
                last = list(before).index(token)
        tokens, node = certain(node)
        most = len(tokens) + guess
        while last is not None and len(node) > last and len(tokens) < most:
            token = list(node)[last]
            more, node = certain(node[token])
            tokens += [token, *more]
        return tokens[:most]

    def _grammar(self):
        plans, texts = [[]], []
        for _ in range(self.nav["horizon"]):
            if is_dialog(self.nav):
                plans = [p + [m] for p in plans if p[-1:] != ["stop"] for m in self.merged.values()]
                texts += [", ".join(plan) for plan in plans]
            else:
                plans = [p + [a] for p in plans for a in ([STOP] if p and p[-1] == STOP
                                                          else sorted(self.phrases))]
        root = {}
        for text in texts or [write_plan(plan, self.phrases) for plan in plans]:
            node = root
            for token in self._encode(text) + [self.end_token]:
                node = node.setdefault(token, {})
        return root

    # ------------------------------------------------------------ dialogs: whole episodes

    def spell(self, dialogs):
        """Dialogs whose answers are texts -> the same with token ids, as they would be sampled."""
        return [d._replace(answers=tuple(self._encode(text) + [self.end_token]
                                         for text in d.answers)) for d in dialogs]

    def transcript(self, dialog, features):
        """A dialog with ids, and its frames' features -> (ids, positions (3, L), features), and
        where each turn's answer begins in ids and in positions: [(index, position), ..]."""
        ids, positions, begins, now = [], [], [], 0
        for k, (answer, feature) in enumerate(zip(dialog.answers, features)):
            asked = self.turn(dialog.instruction if k == 0 else None, feature)
            then = now + int(asked.positions.max()) + 1
            begins.append((len(ids) + len(asked.ids), then))
            ids += asked.ids + list(answer)
            positions += [now + asked.positions, torch.arange(then, then + len(answer)
                                                              ).expand(3, -1)]
            now = then + len(answer)
        return (ids, torch.cat(positions, dim=1), list(features)), begins

    def dialog_logps(self, dialogs, frames, branches=None, temperature=1.0, with_greedy=False):
        """log p(answer token | the conversation before it): one pass for whole episodes.

        dialogs: N, with ids; frames {key: uint8 (H, W, 3)}, every one encoded once -> logps (N, C)
        fp32, differentiable: a dialog's answers one after the other, 0 where it has no more.
        branches: per dialog [(turn, ids), ..], answers that could have been given at that turn
        -> (branches of all dialogs, C) instead. They stand behind the walk in its row and see what
        came before their turn, and themselves: a tree, run in the same pass.
        with_greedy: -> (logps, is it the likeliest token? bool of that shape).
        """
        features = dict(zip(frames, self.encode_frames(list(frames.values()))))
        segments, rows = [], []                # rows: per output row, [(segment, from, token), ..]
        for i, dialog in enumerate(dialogs):
            (ids, positions, seen), begins = self.transcript(
                dialog, [features[key] for key in dialog.frames])
            since, upto = [0] * len(ids), [0] * len(ids)
            if branches is None:
                rows.append([(i, at + j - 1, token) for (at, _), answer in
                             zip(begins, dialog.answers) for j, token in enumerate(answer)])
            for turn, answer in branches[i] if branches else ():
                (at, now), place = begins[turn], len(ids)
                rows.append([(i, at - 1 if j == 0 else place + j - 1, token)
                             for j, token in enumerate(answer)])
                more = len(answer) - 1                          # nothing follows its last token
                ids, since, upto = ids + answer[:-1], since + [place] * more, upto + [at] * more
                positions = torch.cat((positions, torch.arange(now, now + more).expand(3, -1)), 1)
            segments.append((ids, positions, seen, since, upto))
        hidden, where = self._run_packed(segments)

        rows = [[(where[i][0], where[i][1] + place, token) for i, place, token in spots]
                for spots in rows]
        row, place, token = (torch.tensor(x, device=self.device)
                             for x in zip(*(spot for spots in rows for spot in spots)))
        logits = self._logits(hidden[row, place], temperature)                         # (tokens, V)
        logps = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        lengths = torch.tensor([len(spots) for spots in rows], device=self.device)
        there = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        logps = torch.zeros(there.shape, device=self.device).masked_scatter(there, logps)
        if with_greedy:
            return logps, torch.zeros_like(there).masked_scatter(there, logits.argmax(1) == token)
        return logps

    def _run_packed(self, segments):
        """Run segments (ids, positions, features, since, upto) several to a row: walks differ much
        in length. Token t of one sees its own tokens since[t] .. t and 0 .. upto[t] - 1.
        -> hidden (rows, T, H); where each segment went: [(row, column), ..]
        """
        width, filled, where = max(len(segment[0]) for segment in segments), [], {}
        for i in sorted(range(len(segments)), key=lambda i: -len(segments[i][0])):    # first fit
            size = len(segments[i][0])
            row = next((r for r, n in enumerate(filled) if n + size <= width), len(filled))
            filled += [0] * (row == len(filled))
            where[i] = row, filled[row]
            filled[row] += size

        bounds = torch.zeros(3, len(filled), width, dtype=torch.long)     # own start, since, upto
        joined = [([], [], []) for _ in filled]
        for i in sorted(where, key=where.get):
            (row, at), (ids, positions, features, since, upto) = where[i], segments[i]
            bounds[:, row, at:at + len(ids)] = at + torch.tensor([[0] * len(ids), since, upto])
            for part, more in zip(joined[row], (ids, [positions], features)):
                part.extend(more)
        start, since, upto = bounds.to(self.device)[..., None]                     # (rows, T, 1)
        column = torch.arange(width, device=self.device)
        sees = ((column >= since) & (column <= column[:, None])) | ((column >= start)
                                                                    & (column < upto))
        hidden, _ = self._run([(ids, torch.cat(positions, dim=1), features)
                               for ids, positions, features in joined], sees=sees)
        return hidden, where

    @torch.no_grad()
    def reply(self, threads, instructions, features, group_size=1, temperature=0.0, seeds=None,
              draft=True, max_new_tokens=48):
        """The next turn of N dialogs, whatever turn each is at -> G answers (ids) for each, and
        the Threads with which the dialogs go on, in which the first of the G was given.

        threads: Thread, or None where a dialog opens with its instruction; features: one
        (rows, cols, H) tensor each. The caches are ragged; here they are padded to one batch.
        seeds and draft as for generate().
        """
        segments = []
        for thread, instruction, feature in zip(threads, instructions, features):
            asked = self.turn(None if thread else instruction, feature)
            said, now = (thread.said, thread.now) if thread else ([], 0)
            unread = torch.arange(now, now + len(said)).expand(3, -1)
            segments.append((said + asked.ids, torch.cat(
                (unread, now + len(said) + asked.positions), dim=1), [feature]))
        before = [thread.kv.shape[2] if thread else 0 for thread in threads]
        hidden, cache = self._run(segments, self._join(threads), before)
        hidden = hidden[range(len(segments)), [len(ids) - 1 for ids, _, _ in segments]]
        siblings = torch.arange(len(segments), device=self.device).repeat_interleave(group_size)
        start = [int(positions.max()) + 1 for _, positions, _ in segments]
        answers, cache, _ = self._answer(
            hidden, cache.rows(siblings), start,
            [n + len(ids) for n, (ids, _, _) in zip(before, segments)], group_size, temperature,
            seeds, draft, max_new_tokens)
        kv, groups = torch.stack(cache.keys + cache.values), []    # (2 layers, N G, heads, P, D)
        for i, now in enumerate(start):
            group = answers[i * group_size:(i + 1) * group_size]
            keep = cache.valid[i * group_size].nonzero().squeeze(1)
            groups.append((group, Thread(kv[:, i * group_size].index_select(2, keep),
                                         group[0][-1:], now + len(group[0]) - 1)))
        return [group for group, _ in groups], [thread for _, thread in groups]

    def _join(self, threads):
        """Threads of different lengths -> one Cache, padded on the right; None if all are new."""
        old = [(i, thread.kv) for i, thread in enumerate(threads) if thread]
        if not old:
            return None
        layers, heads, _, size = old[0][1].shape
        width = max(kv.shape[2] for _, kv in old)
        kv = old[0][1].new_zeros(layers, len(threads), heads, width, size)
        valid = torch.zeros(len(threads), width, dtype=torch.bool, device=kv.device)
        for i, known in old:
            kv[:, i, :, :known.shape[2]], valid[i, :known.shape[2]] = known, True
        keys, values = kv.chunk(2)
        return Cache(list(keys), list(values), valid)


# ---------------------------------------------------------------- disk


# What a checkpoint brings besides its weights and config.json, and takes along when it is saved.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "chat_template.json",
                   "chat_template.jinja")
KEPT_FILES = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json",
              "generation_config.json")
# Settings that the forward pass above takes as given: {key of config.json: values it stands for}.
# Whatever it leaves to transformers' own modules (widths, norms, activations) may be anything.
TEXT_KEYS = {"model_type": ("qwen2_vl_text", "qwen2_vl"), "use_sliding_window": (False,),
             "attention_dropout": (0,), "attention_bias": (True,), "partial_rotary_factor": (1,)}
VISION_KEYS = {"model_type": ("qwen2_vl", "qwen2_vl_vision"), "patch_size": (14,),
               "spatial_merge_size": (2,), "temporal_patch_size": (2,), "in_channels": (3,),
               "in_chans": (3,), "attention_dropout": (0,)}
PROCESSOR_KEYS = {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
                  "rescale_factor": (1 / 255,), "resample": (3,), "patch_size": (14,),
                  "merge_size": (2,), "temporal_patch_size": (2,)}


def load_policy(name, nav=None, device="cpu", dtype="float32", texts=None, seed=0):
    """A folder, a hub id, a short name of HUB_NAMES, or "tiny" (built from `texts`) -> Policy.

    nav: the contract for a model that carries none (a fresh start); a checkpoint's own nav.json
    wins. texts: the data set's words, from which tiny's byte-level BPE is learned.
    UserError when the weights are not there, not whole, not finite, or need another forward pass.
    """
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    if name == "tiny":
        return build_tiny(texts or [], nav or NAV, seed).to(device, getattr(torch, dtype))
    source = name if os.path.isdir(name) else HUB_NAMES.get(name, name)
    try:
        check_config(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="sdpa",
            output_loading_info=True, ignore_mismatched_sizes=True)     # check_weights names them
    except UserError:
        raise
    except Exception as error:          # the library raises what it likes at a file it cannot read
        told = (str(error).splitlines() or [repr(error)])[0]
        if os.path.isdir(name):
            raise UserError(f"{name} does not load as a model ({told}); copy it again, or give "
                            "another folder") from error
        raise UserError(
            f"no model at {source!r}: it is neither a folder here nor in the Hugging Face cache, "
            f"and the hub did not give it ({told}). On a machine with network"
            f" run `hf download {source} --local-dir models/{os.path.basename(source)}`, "
            "copy the folder here and pass --model FOLDER; or use --model tiny") from error
    check_weights(model, report, source)
    check_tokenizer(tokenizer, model, source)
    contract = read_file(source, "nav.json")
    files = {file: read_file(source, file) for file in KEPT_FILES}
    policy = Policy(model.to(device), tokenizer,
                    read_contract(source, contract) if contract else nav or NAV,
                    {file: content for file, content in files.items() if content is not None})
    check_template(policy, source)
    return policy


def read_file(source, name):
    """A file of a folder or of a hub id -> bytes, or None where it has no such file."""
    from transformers.utils import cached_file
    path = (os.path.join(source, name) if os.path.isdir(source) else cached_file(
        source, name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries
        =False, _raise_exceptions_for_connection_errors=False))
    if not path or not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        return f.read()


def read_object(where, content):
    """Bytes of a JSON file -> dict. UserError if it is anything else."""
    try:
        content = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); copy that file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no JSON object; copy that file again")
    return content


def is_like(value, example):
    """Is a JSON value of the example's kind? A number must be finite, an object hold its keys.

    >>> is_like(2, 0.25), is_like(True, 1), is_like({"a": "x"}, {"a": 1}), is_like({}, {"a": 1})
    (True, False, False, False)
    """
    if isinstance(example, dict):
        return isinstance(value, dict) and all(is_like(value.get(k), v) for k, v in example.items())
    if isinstance(example, (bool, str)):
        return type(value) is type(example)
    return type(value) in (int, float) and math.isfinite(value)


def read_contract(source, content):
    """nav.json, whole and of a version that this code has -> dict."""
    path = os.path.join(source, "nav.json")
    nav = read_object(path, content)
    for key in ("version", "prompt"):
        spoken = [contract[key] for contract in CONTRACTS.values()]
        if nav.get(key) not in spoken:
            raise UserError(f"{path}: {key} is {nav.get(key)!r} and this code speaks "
                            f"{spoken[0]!r}; run the code that trained it, or train anew")
    for key, like in (DIALOG if is_dialog(nav) else NAV).items():
        value = nav.get(key)
        if not (is_like(value, like) or value is None and key in nav and key in NULLABLE):
            raise UserError(f"{path}: {key} is {value!r} and should be like {like!r}; copy "
                            "nav.json again from the checkpoint")
    return nav


def refuse_values(where, found, known):
    """UserError if a key of `found` says what the code does not do. known: {key: its values}."""
    for key, values in known.items():
        if found.get(key) is not None and found[key] not in values:
            raise UserError(f"{where}: {key} is {found[key]!r}, which this code does not implement "
                            f"(it stands for {values[0]!r}); give another checkpoint")


def check_config(source):
    """UserError if a folder's config.json asks for what the forward pass does not do."""
    from transformers import AutoConfig
    path, content = os.path.join(source, "config.json"), read_file(source, "config.json")
    if read_file(source, "adapter_config.json") is not None:
        raise UserError(f"{source} holds a LoRA adapter (adapter_config.json), which is not part of"
                        " the weights yet: merge it into its base model (PEFT: "
                        "merge_and_unload(), then save_pretrained()) and give that folder")
    if content is None:
        AutoConfig.from_pretrained(source)                # says what is missing, and where it asked
    config = read_object(path, content)
    if config.get("model_type") != "qwen2_vl":
        raise UserError(f"{source} is a {config.get('model_type')}; this project drives qwen2_vl "
                        "models (Qwen2-VL-2B, Qwen2-VL-7B, or a checkpoint of ours)")
    refuse_values(path, config, {"quantization_config": (None,)})
    text = config.get("text_config") or {k: v for k, v in config.items() if k != "model_type"}
    vision = config.get("vision_config") or {}
    refuse_values(path, text, TEXT_KEYS)
    refuse_values(f"{path}, vision_config", vision, VISION_KEYS)
    for i, kind in enumerate(text.get("layer_types") or []):
        refuse_values(path, {f"layer_types[{i}]": kind}, {f"layer_types[{i}]": ("full_attention",)})
    check_rotary(path, text, vision)


def check_rotary(path, text, vision):
    """The part of check_config() that is about positions and the sizes of heads."""
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    rope = {**(text.get("rope_parameters") or {}), **(text.get("rope_scaling") or {})}
    for key in ("type", "rope_type"):
        refuse_values(f"{path}, rope_scaling", rope, {key: ("default", "mrope")})
    refuse_values(f"{path}, rope_scaling", rope, {"partial_rotary_factor": (1,)})
    refuse_values(f"{path}, vision_config, rope_parameters", vision.get("rope_parameters") or {},
                  {"rope_theta": (10000,), "rope_type": ("axial", "default")})
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads and hidden % heads == 0):
        raise UserError(f"{path}: hidden_size {hidden} and num_attention_heads {heads} do not give "
                        "the size of a head; copy config.json again")
    refuse_values(path, text, {"head_dim": (hidden // heads,)})
    section = rope.get("mrope_section")
    if not isinstance(section, list) or len(section) != 3 or 2 * sum(section) != hidden // heads:
        raise UserError(f"{path}: mrope_section is {section}; it should be three numbers that are "
                        f"{hidden // heads // 2} together (half of a head of {hidden // heads}); "
                        "copy config.json again")
    refuse_values(f"{path}, vision_config", vision, {"hidden_size": (hidden,)})


def a_few(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_sound(tensor):
    """Is a tensor of weights finite, and so are its squares? Beyond 1e19 no norm of it is, and the
    forward pass gives NaN.

    >>> is_sound(torch.ones(3)), is_sound(torch.tensor([1, math.nan])), is_sound(torch.tensor(1e22))
    (True, False, False)
    """
    return bool(torch.linalg.vector_norm(tensor, dtype=torch.float32).square().isfinite())


def check_weights(model, report, source):
    """Every tensor there, none left over, each of its shape and finite; else UserError.

    report: the loading info of from_pretrained().
    """
    mend = "copy the folder again whole, or give another"
    if report["mismatched_keys"]:
        key, there, wanted = min(report["mismatched_keys"])
        raise UserError(f"{source}: {key} is {tuple(there)} in the weights and {tuple(wanted)} by "
                        "config.json (vocab_size, hidden_size ..); the two are not of one model: "
                        + mend)
    if report["missing_keys"]:
        untied = ("; tie_word_embeddings is false in config.json, so the weights must hold the head"
                  if "lm_head.weight" in report["missing_keys"] else "")
        raise UserError(f"{source}: its weights lack {a_few(report['missing_keys'])}{untied}; "
                        + mend)
    if report["unexpected_keys"]:
        raise UserError(f"{source}: its weights hold {a_few(report['unexpected_keys'])}, which a "
                        "Qwen2-VL of its config.json does not have; merge adapters first, or "
                        + mend)
    if model.config.tie_word_embeddings and (model.lm_head.weight is not
                                             model.get_input_embeddings().weight):
        raise UserError(f"{source}: config.json says tie_word_embeddings and the weights hold a "
                        "lm_head.weight of its own; set tie_word_embeddings to false there")
    broken = [key for key, tensor in model.named_parameters() if not is_sound(tensor)]
    if broken:
        raise UserError(f"{source}: {a_few(broken)} hold numbers that are not finite (NaN, "
                        "infinity, or above 1e19): the run that wrote it has diverged; train again "
                        "with a lower --lr, or give an earlier checkpoint")


def check_tokenizer(tokenizer, model, source):
    """UserError if the tokenizer lacks a mark of the prompt, or is not of this model."""
    config, rows = model.config, model.get_input_embeddings().num_embeddings
    lacking = [mark for mark in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                                 "<|image_pad|>")
               if tokenizer(mark, add_special_tokens=False)["input_ids"]
               != [tokenizer.convert_tokens_to_ids(mark)]]
    if lacking:
        raise UserError(f"{source}: its tokenizer has no token {', '.join(lacking)}; copy the "
                        "tokenizer's files from the model that it was trained from")
    most = max(tokenizer.get_vocab().values())
    if most >= rows:
        raise UserError(f"{source}: its tokenizer has ids up to {most} and the weights embed {rows}"
                        "; copy the tokenizer's files from the model that it was trained from")
    for key, mark in (("image_token_id", "<|image_pad|>"),
                      ("vision_start_token_id", "<|vision_start|>")):
        if getattr(config, key) != tokenizer.convert_tokens_to_ids(mark):
            raise UserError(f"{source}: config.json says {key} {getattr(config, key)} and the "
                            f"tokenizer's {mark} is {tokenizer.convert_tokens_to_ids(mark)}; copy "
                            "both from one model")


def check_template(policy, source):
    """UserError if the chat template does not put a user's text, unchanged, between its marks."""
    try:
        policy._chat("")
        parts = [*policy._template, *policy._later]
    except Exception as error:             # jinja's own, and transformers' where there is none
        raise UserError(f"{source}: its chat template does not render ({error}); copy the "
                        "tokenizer's files, chat_template included, again") from error
    if len(policy._template) != 2 or len(policy._later) != 2 or "<|im_start|>" not in parts[1]:
        raise UserError(f"{source}: its chat template does not show a user's text once and open "
                        "the answer; copy the tokenizer's files, chat_template included, again")


def image_processor(files, vision):
    """The settings by which pictures were prepared for these weights -> dict, Qwen2-VL's where the
    folder has none. UserError if they ask for what patchify() does not do."""
    content = {}
    if "preprocessor_config.json" in files:
        content = read_object("preprocessor_config.json", files["preprocessor_config.json"])
    elif "processor_config.json" in files:                        # as transformers 5 writes it
        content = read_object("processor_config.json", files["processor_config.json"]
                              ).get("image_processor") or {}
    refuse_values("preprocessor_config.json", content, PROCESSOR_KEYS)
    for key, default in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        values = content.setdefault(key, list(default))
        if not (isinstance(values, list) and len(values) == 3 and all(
                isinstance(v, (int, float)) and 0 <= v < math.inf for v in values)):
            raise UserError(f"preprocessor_config.json: {key} is {values}; it should be three "
                            "numbers; copy that file again")
    if 0 in content["image_std"]:
        raise UserError("preprocessor_config.json: image_std holds a 0; copy that file again")
    return {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size, **content}


def save_policy(policy, folder, state_dict=None):
    """Write a folder that from_pretrained (transformers 4 and 5) reads and vLLM serves, plus
    nav.json.

    Everything goes to a temporary folder first and is moved into place file by file, so a crash
    leaves each file whole. state_dict: consolidated weights of policy (ZeRO), else its own.
    """
    temporary = os.path.join(folder, ".saving")
    shutil.rmtree(temporary, ignore_errors=True)             # of a save that was killed
    os.makedirs(temporary)
    if state_dict is not None:
        state_dict = {k[len("model."):]: v for k, v in state_dict.items() if k.startswith("model.")}
    policy.model.save_pretrained(temporary, state_dict=state_dict)
    if "tokenizer_config.json" not in policy.files:
        policy.tokenizer.save_pretrained(temporary)
    for file, content in policy.files.items():
        if file != "processor_config.json":       # its picture settings would outrank those below
            with open(os.path.join(temporary, file), "wb") as f:
                f.write(content)
    pixels = {"min_pixels": policy.nav["min_pixels"], "max_pixels": policy.nav["max_pixels"]}
    processor = {**policy.processor, **pixels, "size": {
        "shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}}
    for file, content in (("preprocessor_config.json", processor), ("nav.json", policy.nav)):
        write_json(os.path.join(temporary, file), content)
    for file, change in (("config.json", for_version_4), ("tokenizer_config.json", plain_classes)):
        path = os.path.join(temporary, file)
        with open(path, encoding="utf-8") as f:
            content = change(json.load(f))
        write_json(path, content)
    # safetensors makes its file readable for its owner alone; the other files follow the umask.
    mode = os.stat(os.path.join(temporary, "nav.json")).st_mode
    for file in sorted(os.listdir(temporary)):
        os.chmod(os.path.join(temporary, file), mode)
        os.replace(os.path.join(temporary, file), os.path.join(folder, file))
    os.rmdir(temporary)


def for_version_4(config):
    """config.json of transformers 5, with the keys of version 4 beside its own: there
    rope_parameters is not read, and rope_theta falls back to 1e6 without a word."""
    text = config["text_config"]
    rope = text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default",
                            "mrope_section": rope["mrope_section"]}
    return config


def plain_classes(config):
    """tokenizer_config.json of transformers 5 in words that version 4 knows as well."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


# ---------------------------------------------------------------- tiny: the same model, small

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
                  "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
                  "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>"]
# Qwen2-VL's template. A content is a text (ours: the images are marks in it already) or a list of
# parts, {"type": "text", "text": ..} or an image, as servers are sent it. Videos are left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'image_url') or 'image' in content"
    " or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Words are split as Qwen2 splits them, but an option of a plan ("A. Move forward 25 cm, ") and a
# line of the prompt's frame stay whole, so that a BPE learned on them makes each one token.
WHOLE = [r"[A-D]\. [^,.\n<]+(?:, )?", r"You are a helpful assistant\.",
         r"(?:move forward|turn left|turn right) [\d.]+ (?:cm|degrees)(?:, )?",
         r"You are a robot [^:\n]+: ", r"(?:system|user|assistant)\n", r"\.\nInstruction: ",
         r"\nSeen before: ", r"\nNow: "]
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def tiny_tokenizer(texts, nav, vocab_size=1536):
    """A byte-level BPE learned on the data set's own words -> PreTrainedTokenizerFast."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("|".join([*WHOLE, QWEN_SPLIT])), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    phrases = action_phrases(nav["turn_deg"], nav["forward_m"])
    opening = dialog_prompt if is_dialog(nav) else lambda text, nav: window_prompt(text, 0, nav)
    corpus = [opening(text, nav).replace("<image>", "") for text in sorted(set(texts))]
    often = ["system\n", "You are a helpful assistant.", "user\n", "assistant\n",
             *(write_plan([a, a], phrases) for a in sorted(phrases))]
    if is_dialog(nav):
        often = often[:4] + [f"{move}, {move}" for move in merged_phrases(
            nav["turn_deg"], nav["forward_m"], nav["merge"]).values()]
    corpus += often * max(len(corpus), 8)
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left", chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"])       # no token_type_ids: Qwen2 has none


def build_tiny(texts, nav, seed=0):
    """Qwen2-VL's classes at 1/2000 of the size, random weights, deterministic from the seed."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    tokenizer = tiny_tokenizer(texts, nav)
    token = tokenizer.convert_tokens_to_ids
    hidden = 128
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
            num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=32768, tie_word_embeddings=True,
            bos_token_id=token("<|endoftext|>"), eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
            initializer_range=hidden ** -0.5,
            # A few dozen positions, not thousands: the slow bands, which tell columns, must turn.
            rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                             "mrope_section": [8, 12, 12]}),
        vision_config=dict(depth=2, embed_dim=64, num_heads=2, mlp_ratio=4, hidden_size=hidden,
                           patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
                           initializer_range=64 ** -0.5),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return Policy(model, tokenizer, nav)
