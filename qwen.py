"""
Qwen2-VL's forward pass: frames -> features, tokens -> hidden states.

The weights and modules are transformers' own. The pass over them is written out here, because a
navigator's batch has a structure that a general forward pass cannot use:

    one walk   = one instruction, T frames, T decisions;  a decision looks at <= 17 of the T frames
    one group  = one prompt, G sampled plans                (GRPO)

So a frame is encoded once for all decisions that look at it, G answers share the keys and values
of their prompt without a copy, and padding costs attention only. tests/test_model.py compares all
of it with transformers.

Read it in this order
    frames      uint8 pictures -> patches                              fit_pixels, patchify
    positions   M-RoPE of words and images                             mrope_positions
    costs       FLOPs and bytes of a pass                              vision_flops, decoder_flops
    passes      patches -> features; embeddings -> hidden states       Qwen.encode, Qwen.decode
    checks      what a folder must hold for this pass to be right      load_model

Shapes      N rows, T new tokens, P cached tokens, X real (unpadded) tokens of all rows, H hidden
            size, D size of a head, E width of the vision tower

[1] Qwen2-VL, https://arxiv.org/abs/2409.12191 (M-RoPE: section 2.1)
"""
from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cli import UserError

# ---------------------------------------------------------------- frames: pictures -> patches

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)        # CLIP's, as every Qwen2-VL checkpoint has
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def fit_pixels(height: int, width: int, min_pixels: int, max_pixels: int,
               factor: int = 28) -> tuple[int, int]:
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


def resize(frame: np.ndarray, limits: dict) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (h, w, 3) between limits["min_pixels"] and ["max_pixels"]."""
    h, w = fit_pixels(*frame.shape[:2], limits["min_pixels"], limits["max_pixels"])
    if frame.shape[:2] == (h, w):
        return np.ascontiguousarray(frame)
    return np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC))


def patchify(frames: Tensor, patch: int = 14, merge: int = 2, mean=IMAGE_MEAN,
             std=IMAGE_STD) -> Tensor:
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

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.weight = conv.weight                               # (E, 3, 2, patch, patch)

    def forward(self, x):
        if x.dim() == 5:                                        # transformers' own forward
            return F.linear(x.flatten(1), self.weight.flatten(1))
        return F.linear(x, self.weight.sum(dim=2).flatten(1))   # a still frame: both halves see it


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout: x (..., D) with cos, sin (..., D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


@lru_cache(maxsize=64)
def patch_angles(h: int, w: int, merge: int, head_dim: int, device) -> tuple[Tensor, Tensor]:
    """cos, sin (p, head_dim) of the vision tower's 2-D rotary embedding, in merge order."""
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    order = [g.view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
             for g in (rows, cols)]
    inv_freq = 10000.0 ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = torch.cat([g[:, None] * inv_freq for g in order], dim=-1).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)


# ---------------------------------------------------------------- positions


@lru_cache(maxsize=4096)
def mrope_positions(runs: tuple) -> Tensor:
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


# ---------------------------------------------------------------- costs


def vision_flops(config, patches: int) -> float:
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


def decoder_flops(config, new: int, before: int = 0) -> float:
    """FLOPs of `new` tokens' forward pass through the decoder's layers, over `before` cached ones;
    without the vocabulary. config: Qwen2VLTextConfig. A token sees half of the new ones on average.

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


def activation_bytes(config, tokens: int, patches: int, itemsize: int,
                     checkpointing: bool = False) -> float:
    """Bytes kept for the backward pass of decoder tokens and vision patches: an estimate, within a
    fifth of what autograd keeps (tests/test_bench.py).
    """
    text, vision = config.text_config, config.vision_config
    token = 15 * text.hidden_size + 4 * text.intermediate_size
    patch = 26 * vision.embed_dim
    if checkpointing:            # each layer's input; and one layer whole, when it is recomputed
        return itemsize * (
            tokens * (text.num_hidden_layers * text.hidden_size + token)
            + patches * (vision.depth * vision.embed_dim + patch))
    return itemsize * (tokens * text.num_hidden_layers * token + patches * vision.depth * patch)


# ---------------------------------------------------------------- the cache


class Segment(NamedTuple):
    """Tokens of one row that are run together."""
    ids: list[int]
    positions: Tensor             # (3, L) on the CPU
    features: list[Tensor]        # one (rows, cols, H) tensor per image, in reading order


class Cache(NamedTuple):
    """Keys and values that later tokens attend to: keys[l], values[l] (N, kv_heads, P, D).

    valid (N, P) bool: False for padding and for rejected drafts.
    shared: the Cache of N / G rows that G siblings have in common, before their own tokens.
    """
    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    shared: Cache | None = None

    def rows(self, index: Tensor) -> Cache:
        """The cache of rows index (N',), copied; the gradients of repeated rows add up."""
        return Cache([k[index] for k in self.keys], [v[index] for v in self.values],
                     self.valid[index])

    def siblings(self, group_size: int) -> Cache:
        """An empty cache for G rows behind each of these rows, which are shared, not copied."""
        n = len(self.valid) * group_size
        return Cache([k.new_zeros(n, k.shape[1], 0, k.shape[3]) for k in self.keys],
                     [v.new_zeros(n, v.shape[1], 0, v.shape[3]) for v in self.values],
                     self.valid.new_zeros(n, 0), self)

    def drop(self, keep: Tensor) -> Cache:
        """Hide the cached tokens where keep (N, P) is False: a rejected draft."""
        return self._replace(valid=self.valid & keep)

    def detach(self) -> Cache:
        return self._replace(keys=[k.detach() for k in self.keys],
                             values=[v.detach() for v in self.values])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (N, heads, T, D) attends to k, v (N, kv_heads, S, D) where mask (N, 1, T, S) is True."""
    n_rep = q.shape[1] // k.shape[1]
    if n_rep > 1:                                               # grouped-query heads
        k, v = (x.repeat_interleave(n_rep, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """(N, heads, T, D) -> (groups, heads, N / groups * T, D): siblings behind one another."""
    return x.view(groups, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def unfold_groups(x: Tensor, n: int) -> Tensor:
    """The inverse of fold_groups(): -> (n, heads, T, D)."""
    groups, heads, _, d = x.shape
    return x.view(groups, heads, n // groups, -1, d).transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- the passes


class Qwen(nn.Module):
    """transformers' Qwen2-VL, run by our passes. image_mean, image_std: of its image processor."""

    def __init__(self, model: nn.Module, image_mean=IMAGE_MEAN, image_std=IMAGE_STD):
        super().__init__()
        self.model, self.image_mean, self.image_std = model, image_mean, image_std
        self.checkpointing = False
        self.flops = self.tokens = 0     # computed, and trained on, since engine.py last read them
        if isinstance(self.vision.patch_embed.proj, nn.Conv3d):
            self.vision.patch_embed.proj = PatchProjection(self.vision.patch_embed.proj)
        text = model.config.text_config
        self.head_dim = text.hidden_size // text.num_attention_heads
        rope = getattr(text, "rope_parameters", None) or text.rope_scaling
        self.mrope_section = rope["mrope_section"]
        theta = rope.get("rope_theta") or text.rope_theta
        self.inv_freq = theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)

    @property
    def vision(self) -> nn.Module:
        return self.model.model.visual

    @property
    def lm(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _block(self, function: Callable, *inputs):
        """Run one layer; with activation checkpointing, recompute it in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def _count_flops(self, forward: float, tokens: int = 0, trainable: bool = True):
        """Add a pass to the counters; a backward pass costs twice its forward pass. Recomputation
        and padding are not counted."""
        trains = trainable and torch.is_grad_enabled()
        self.flops += forward * (3 if trains else 1)
        self.tokens += tokens if trains else 0

    # ------------------------------------------------------------ frames -> features

    def encode(self, frames: list[np.ndarray]) -> list[Tensor]:
        """Resized uint8 frames (h, w, 3) of any sizes -> (rows, cols, H) each, differentiable.

        The tower attends within a frame, so its features do not depend on the other frames. All
        sizes are run in one pass: under ZeRO-3 every call of a module is a collective, and ranks
        may hold different numbers of sizes.
        """
        if not frames:
            return []
        features = [None] * len(frames)
        sizes = sorted({f.shape for f in frames})
        index = [[i for i, f in enumerate(frames) if f.shape == size] for size in sizes]
        pixels = [torch.from_numpy(np.stack([frames[i] for i in some])).to(self.device)
                  for some in index]
        for some, encoded in zip(index, self._vision_forward(pixels)):
            for i, feature in zip(some, encoded.unbind(0)):
                features[i] = feature
        return features

    def _vision_forward(self, pixels: list[Tensor]) -> list[Tensor]:
        """uint8 (n, h, w, 3) for each size -> (n, rows, cols, H) for each.

        Every module runs once, over the patches (X, E) of all frames; attention runs once per size,
        as a batch of frames.
        """
        attn, merge = self.vision.blocks[0].attn, self.vision.spatial_merge_size
        heads = attn.num_heads
        grids = [(len(p), p.shape[1] // 14, p.shape[2] // 14) for p in pixels]   # n, rows, columns
        self._count_flops(sum(n * vision_flops(self.model.config.vision_config, h * w)
                              for n, h, w in grids), trainable=attn.qkv.weight.requires_grad)
        x = torch.cat([patchify(p, merge=merge, mean=self.image_mean, std=self.image_std)
                       .flatten(0, 1) for p in pixels])
        x = self.vision.patch_embed.proj(x.to(self.dtype))                                # (X, E)
        counts = [n * h * w for n, h, w in grids]

        def layer(block, x):
            rows, parts = block.attn.qkv(block.norm1(x)).split(counts), []
            for qkv, (n, h, w) in zip(rows, grids):
                # (n h w, 3 E) -> q, k, v of (n, heads, h w, D): a frame is one row of the batch
                q, k, v = qkv.view(n, h * w, 3, heads, -1).permute(2, 0, 3, 1, 4)
                cos, sin = patch_angles(h, w, merge, q.shape[-1], q.device)
                q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
                y = F.scaled_dot_product_attention(q, k, v)
                parts.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
            x = x + block.attn.proj(torch.cat(parts))
            return x + block.mlp(block.norm2(x))

        for block in self.vision.blocks:
            x = self._block(layer, block, x)
        features = self.vision.merger(x).split([count // merge ** 2 for count in counts])
        return [f.view(n, h // merge, w // merge, -1) for f, (n, h, w) in zip(features, grids)]

    # ------------------------------------------------------------ tokens -> hidden states

    def embed(self, rows: Tensor, features: list[list[Tensor]]) -> Tensor:
        """Padded ids with their images' features in place -> (N, T, H).

        rows (N, T) int64 on the CPU; features: the (rows, cols, H) tensors of each row.
        """
        embeds = self.lm.embed_tokens(rows.to(self.device))
        image_token = self.model.config.image_token_id
        where = (rows == image_token).flatten().nonzero().squeeze(1).to(self.device)
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

    def decode(self, embeds: Tensor, positions: Tensor, valid: Tensor, past: Cache | None = None,
               attn_mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Run new tokens over a cache: transformers' decoder layers, one causal pass.

        embeds (N, T, H); positions (3, N, T); valid (N, T) bool, False for padding; past: Cache of
        N rows (it may have a shared part); attn_mask (N, T, T) bool: which new tokens see which,
        default causal -> hidden (N, T, H) after the last norm, Cache of P + T tokens.
        A row never attends to padding, to rejected drafts, or to another row.
        """
        n, t, _ = embeds.shape
        shared = past.shared if past is not None else None
        groups = len(shared.valid) if shared is not None else n
        mask = self._full_mask(valid, past, attn_mask)
        cos, sin = self._angles(positions, embeds.dtype)
        # Linear layers, norms and MLPs run on the X real tokens of all rows, one after another.
        # Only attention needs rows: there the X tokens are put back at their places in (N, T).
        real = valid.flatten().nonzero().squeeze(1)

        def padded(x):                                          # (X, ..) -> (N, T, ..)
            return x.new_zeros(n * t, x.shape[-1]).index_copy(0, real, x).view(n, t, -1)

        def layer(block, x, k_past, v_past, *kv_shared):
            attn, y = block.self_attn, block.input_layernorm(x)
            q, k, v = (padded(proj(y)).view(n, t, -1, self.head_dim).transpose(1, 2)
                       for proj in (attn.q_proj, attn.k_proj, attn.v_proj))      # (N, heads, T, D)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if k_past is not None:                              # (N, kv_heads, P + T, D)
                k, v = torch.cat((k_past, k), dim=2), torch.cat((v_past, v), dim=2)
            if kv_shared:
                # One row per group: the shared keys once, then the siblings' own, one sibling
                # behind another. The mask hides siblings from each other, so each query sees the
                # same keys as in a row of its own.
                every_k, every_v = (torch.cat((common, fold_groups(own, groups)), dim=2)
                                    for common, own in zip(kv_shared, (k, v)))
                y = unfold_groups(attend(fold_groups(q, groups), every_k, every_v, mask), n)
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

    def _full_mask(self, valid: Tensor, past: Cache | None, attn_mask: Tensor | None) -> Tensor:
        """Which keys each new token sees -> bool (N, 1, T, P + T); with a shared cache of S tokens
        (groups, 1, N / groups * T, S + N / groups * (P + T)), for siblings folded to one row."""
        n, t = valid.shape
        if attn_mask is None:
            attn_mask = torch.ones(t, t, dtype=torch.bool, device=valid.device).tril()
        mask = attn_mask & valid[:, None, :]
        if past is not None:
            mask = torch.cat((past.valid[:, None, :].expand(n, t, -1), mask), dim=-1)
        if past is None or past.shared is None:
            return mask[:, None]
        # (groups, G, T, 1, P + T) and a block diagonal over G x G: own tokens yes, siblings' no
        shared = past.shared.valid
        groups, size = len(shared), n // len(shared)
        block_diagonal = torch.eye(size, dtype=torch.bool, device=mask.device)[:, None, :, None]
        mask = mask.view(groups, size, t, 1, -1) & block_diagonal
        return torch.cat((shared[:, None, :].expand(-1, size * t, -1),
                          mask.flatten(3).flatten(1, 2)), dim=-1)[:, None]

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin (N, 1, T, D) of M-RoPE: frequency bands take turns at time, height, width."""
        freqs = positions[..., None].float() * self.inv_freq.to(positions.device)   # (3, N, T, D/2)
        bands = freqs.split(self.mrope_section, dim=-1)
        angles = torch.cat([band[i % 3] for i, band in enumerate(bands)], dim=-1).repeat(1, 1, 2)
        return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)

    def _forward_padded(self, segments: list[Segment], past: Cache | None = None,
                        before: list[int] = (), attn_mask: Tensor | None = None):
        """Pad segments to one batch and decode it -> hidden (N, T, H), Cache.

        before: tokens cached before each segment (for the count of FLOPs only).
        """
        new = [len(segment.ids) for segment in segments]
        self._count_flops(sum(decoder_flops(self.model.config.text_config, n, b)
                              for n, b in zip(new, before or [0] * len(new))), sum(new))
        rows = torch.zeros(len(segments), max(new), dtype=torch.long)
        positions = torch.zeros(3, len(segments), max(new), dtype=torch.long)
        valid = torch.zeros(rows.shape, dtype=torch.bool)
        for i, (ids, where, _) in enumerate(segments):
            rows[i, :len(ids)] = torch.tensor(ids, dtype=torch.long)
            positions[:, i, :len(ids)] = where
            valid[i, :len(ids)] = True
        embeds = self.embed(rows, [segment.features for segment in segments])
        return self.decode(embeds, positions.to(self.device), valid.to(self.device), past,
                           attn_mask)


# ---------------------------------------------------------------- loading, and what it refuses

# Settings that the passes above take as given: {key of config.json: values it stands for}. What
# they leave to transformers' own modules (widths, norms, activations) may be anything.
TEXT_KEYS = {"model_type": ("qwen2_vl_text", "qwen2_vl"), "use_sliding_window": (False,),
             "attention_dropout": (0,), "attention_bias": (True,), "partial_rotary_factor": (1,)}
VISION_KEYS = {"model_type": ("qwen2_vl", "qwen2_vl_vision"), "patch_size": (14,),
               "spatial_merge_size": (2,), "temporal_patch_size": (2,), "in_channels": (3,),
               "in_chans": (3,), "attention_dropout": (0,)}
PROCESSOR_KEYS = {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
                  "rescale_factor": (1 / 255,), "resample": (3,), "patch_size": (14,),
                  "merge_size": (2,), "temporal_patch_size": (2,)}
ROPE_KEYS = {"type": ("default", "mrope"), "rope_type": ("default", "mrope"),
             "partial_rotary_factor": (1,)}


def read_file(source: str, name: str) -> bytes | None:
    """A file of a folder or of a hub id; None where it has no such file."""
    from transformers.utils import cached_file
    path = (os.path.join(source, name) if os.path.isdir(source) else cached_file(
        source, name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries
        =False, _raise_exceptions_for_connection_errors=False))
    if not path or not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        return f.read()


def read_object(where: str, content: bytes) -> dict:
    """Bytes of a JSON file -> dict. UserError if it is anything else."""
    try:
        content = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); copy that file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no JSON object; copy that file again")
    return content


def refuse_values(where: str, values: dict, known: dict):
    """UserError if a key of `values` asks for what the code does not do. known: {key: values}."""
    for key, accepted in known.items():
        if values.get(key) is not None and values[key] not in accepted:
            raise UserError(f"{where}: {key} is {values[key]!r}, which this code does not implement"
                            f" (it stands for {accepted[0]!r}); give another checkpoint")


def load_model(source: str, dtype: torch.dtype) -> nn.Module:
    """A folder or hub id -> transformers' model, checked. UserError if the passes above would
    compute something else than the checkpoint means, or if its weights are not whole."""
    from transformers import Qwen2VLForConditionalGeneration
    check_config(source)
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(
        source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True,
        ignore_mismatched_sizes=True)                           # check_weights() names them
    check_weights(model, report, source)
    return model


def check_config(source: str):
    """UserError if a folder's config.json asks for what the forward pass does not do."""
    from transformers import AutoConfig
    path, content = os.path.join(source, "config.json"), read_file(source, "config.json")
    if read_file(source, "adapter_config.json") is not None:
        raise UserError(f"{source} holds a LoRA adapter (adapter_config.json), which is not part of"
                        " the weights yet: merge it into its base model (PEFT: "
                        "merge_and_unload(), then save_pretrained()) and give that folder")
    if content is None:
        AutoConfig.from_pretrained(source)                      # raises, and names what is missing
    config = read_object(path, content)
    if config.get("model_type") != "qwen2_vl":
        raise UserError(f"{source} is a {config.get('model_type')}; this project drives qwen2_vl "
                        "models (Qwen2-VL-2B, Qwen2-VL-7B, or a checkpoint of ours)")
    text = config.get("text_config") or {k: v for k, v in config.items() if k != "model_type"}
    vision = config.get("vision_config") or {}
    rope = {**(text.get("rope_parameters") or {}), **(text.get("rope_scaling") or {})}
    layers = {f"layer_types[{i}]": kind for i, kind in enumerate(text.get("layer_types") or [])}
    for where, values, known in (
            ("", config, {"quantization_config": (None,)}), ("", text, TEXT_KEYS),
            (", vision_config", vision, VISION_KEYS),
            ("", layers, dict.fromkeys(layers, ("full_attention",))),
            (", rope_scaling", rope, ROPE_KEYS),
            (", vision_config, rope_parameters", vision.get("rope_parameters") or {},
             {"rope_theta": (10000,), "rope_type": ("axial", "default")})):
        refuse_values(path + where, values, known)
    check_sizes(path, text, vision, rope.get("mrope_section"))


def check_sizes(path: str, text: dict, vision: dict, section):
    """The part of check_config() that compares sizes. section: the bands of M-RoPE."""
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads and hidden % heads == 0):
        raise UserError(f"{path}: hidden_size {hidden} and num_attention_heads {heads} do not give "
                        "the size of a head; copy config.json again")
    refuse_values(path, text, {"head_dim": (hidden // heads,)})
    if not isinstance(section, list) or len(section) != 3 or 2 * sum(section) != hidden // heads:
        raise UserError(f"{path}: mrope_section is {section}; it should be three numbers that sum "
                        f"to {hidden // heads // 2} (half of a head of {hidden // heads}); copy "
                        "config.json again")
    refuse_values(f"{path}, vision_config", vision, {"hidden_size": (hidden,)})


def some_of(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_sound(tensor: Tensor) -> bool:
    """Is a weight finite, and are its squares? Above 1e19 its norm and the pass overflow.

    >>> is_sound(torch.ones(3)), is_sound(torch.tensor([1, math.nan])), is_sound(torch.tensor(1e22))
    (True, False, False)
    """
    return bool(torch.linalg.vector_norm(tensor, dtype=torch.float32).square().isfinite())


def check_weights(model: nn.Module, report: dict, source: str):
    """UserError unless every tensor is there, of its shape and finite, and none is left over.

    report: the loading info of from_pretrained().
    """
    remedy = "copy the folder again whole, or give another"
    mismatched, missing, extra = (report[f"{kind}_keys"] for kind in (
        "mismatched", "missing", "unexpected"))
    broken = [key for key, tensor in model.named_parameters() if not is_sound(tensor)]
    untied = model.lm_head.weight is not model.get_input_embeddings().weight
    if mismatched:
        key, there, wanted = min(mismatched)
        problem = (f"{key} is {tuple(there)} in the weights and {tuple(wanted)} by config.json "
                   f"(vocab_size, hidden_size ..); they belong to different models: {remedy}")
    elif missing:
        head = ("; tie_word_embeddings is false in config.json, so the weights must hold the head"
                if "lm_head.weight" in missing else "")
        problem = f"its weights lack {some_of(missing)}{head}; {remedy}"
    elif extra:
        problem = (f"its weights hold {some_of(extra)}, which a Qwen2-VL of its config.json does "
                   f"not have; merge adapters first, or {remedy}")
    elif model.config.tie_word_embeddings and untied:
        problem = ("config.json says tie_word_embeddings and the weights hold a lm_head.weight of "
                   "its own; set tie_word_embeddings to false there")
    elif broken:
        problem = (f"{some_of(broken)} hold numbers that are not finite (NaN, infinity, or above "
                   "1e19): the run that wrote it has diverged; train again with a lower --lr, or "
                   "give an earlier checkpoint")
    else:
        return
    raise UserError(f"{source}: {problem}")


def image_processor(files: dict[str, bytes], vision) -> dict:
    """The settings by which pictures were prepared for these weights; Qwen2-VL's where the folder
    has none. UserError if they ask for what patchify() does not do. vision: the vision config."""
    content, name = {}, "preprocessor_config.json"
    if name in files:
        content = read_object(name, files[name])
    elif "processor_config.json" in files:                        # as transformers 5 writes it
        content = read_object("processor_config.json", files["processor_config.json"]
                              ).get("image_processor") or {}
    refuse_values(name, content, PROCESSOR_KEYS)
    for key, default in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        values = content.setdefault(key, list(default))
        if not (isinstance(values, list) and len(values) == 3 and all(
                isinstance(v, (int, float)) and 0 <= v < math.inf for v in values)):
            raise UserError(f"{name}: {key} is {values}; it should be three numbers; copy that file"
                            " again")
    if 0 in content["image_std"]:
        raise UserError(f"{name}: image_std holds a 0; copy that file again")
    return {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size, **content}
