"""
The forward pass of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: frames -> features, tokens -> hidden states.

transformers runs its own vision tower and its own decoder: norms, MLPs, rotations, windows,
deepstack and whatever else tells the families apart is the library's. It is given two attention
functions of ours, which see queries, keys and values, and a patch projection, because a
navigator's batch has a structure that a general forward pass cannot use:

    one walk   = one instruction, T frames, T decisions;  a decision looks at <= 17 of the T frames
    one group  = one prompt, G sampled plans                (GRPO)

So a frame is encoded once for all decisions that look at it, G answers share the keys and values
of their prompt without a copy, and padding costs attention only. tests/test_families.py compares
all of it with the library's own models.

Read it in this order
    frames      uint8 pictures -> patches                              fit_pixels, patchify
    positions   M-RoPE of words and images                             mrope_positions
    attention   what transformers calls in each layer                  decoder_attention
    passes      patches -> features; tokens -> hidden states           Qwen.encode, Qwen.decode
    checks      what a folder must hold for this pass to be right      load_model

Shapes      N rows, T new tokens, P cached tokens, X real (unpadded) tokens of all rows, H hidden
            size, D size of a head, L deepstack levels (Qwen3-VL; else 0)

[1] Qwen2-VL, https://arxiv.org/abs/2409.12191 (M-RoPE: section 2.1)
"""
from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from costs import decoder_flops, vision_flops

# ---------------------------------------------------------------- frames: pictures -> patches


class ImageFormat(NamedTuple):
    """How a model wants its pictures: `patch` pixels a side, merge x merge patches to a token,
    colours (in 0..1) less `mean` over `std`."""
    patch: int
    merge: int
    mean: tuple
    std: tuple

    @property
    def factor(self) -> int:
        """Height and width of a frame are multiples of this: the pixels of a token's side."""
        return self.patch * self.merge


def fit_pixels(height: int, width: int, min_pixels: int, max_pixels: int,
               factor: int) -> tuple[int, int]:
    """The size at which a frame is seen: multiples of `factor`, area within budget, aspect kept.

    The rule of Qwen2-VL's image processor [1]. 640x480 under 65,536 pixels is 280x196 = 70 tokens,
    and in Qwen3-VL 288x192 = 54:
    >>> fit_pixels(480, 640, 56 * 56, 65536, 28), fit_pixels(480, 640, 56 * 56, 65536, 32)
    ((196, 280), (192, 288))
    >>> fit_pixels(56, 56, 56 * 56, 65536, 28)
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


def patchify(frames: Tensor, image_format: ImageFormat) -> Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, p, 3 * patch * patch), normalised, in merge order.

    Merge order: the patches that become one token are neighbours in the sequence [1]. The
    processor of transformers repeats every still frame to fill the two-frame (temporal) patch; we
    keep one copy and add the two halves of the weight instead (PatchProjection).
    """
    (n, h, w, _), (patch, merge, *colours) = frames.shape, image_format
    mean, std = (torch.tensor(x, device=frames.device) * 255 for x in colours)
    x = (frames.float() - mean) / std
    x = x.view(n, h // patch // merge, merge, patch, w // patch // merge, merge, patch, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, -1, 3 * patch * patch)


class PatchProjection(nn.Module):
    """The tower's Conv3d over patches (kernel = stride), as the matrix product that it is.

    The parameters keep Conv3d's names and shapes, so checkpoints load and save unchanged; Conv3d
    itself is one to two orders slower on some cuDNN builds (pytorch#174051) and on CPUs.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias         # (E, 3, 2, patch, patch), (E)

    def forward(self, x: Tensor) -> Tensor:
        """(X, 3 * patch * patch) still patches, or (X, 3 * 2 * patch * patch) as transformers'
        processor makes them -> (X, E)."""
        weight = self.weight                # used in this module only: ZeRO-3 gathers it here
        if 2 * x.shape[-1] == weight[0].numel():                # both halves see a still frame
            weight = weight.sum(dim=2)
        return F.linear(x.to(weight.dtype), weight.flatten(1), self.bias)


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


# ---------------------------------------------------------------- attention

COMMON, HIDDEN = 0, -1           # values of a token's `branch`; an answer's tokens have 1, 2, ..


class Segment(NamedTuple):
    """Tokens of one row that are run together. branch: per token, COMMON where all later tokens of
    the row see it, g where only answer g does; None: all are common."""
    ids: list[int]
    positions: Tensor             # (3, L) on the CPU
    features: list[Tensor]        # one (rows, cols, (1 + L) H) tensor per image, in reading order
    branch: list[int] | None = None


class Cache(NamedTuple):
    """Keys and values that later tokens attend to: keys[l], values[l] (N, kv_heads, P, D).

    branch (N, P) int64: as a Segment's; HIDDEN for padding and for rejected drafts. So the answers
    to a prompt share its row and see the prompt and themselves.
    """
    keys: list[Tensor]
    values: list[Tensor]
    branch: Tensor

    def rows(self, index: Tensor) -> Cache:
        """The cache of rows index (N',), copied; the gradients of repeated rows add up."""
        return Cache([k.index_select(0, index) for k in self.keys],
                     [v.index_select(0, index) for v in self.values],
                     self.branch.index_select(0, index))

    def detach(self) -> Cache:
        return self._replace(keys=[k.detach() for k in self.keys],
                             values=[v.detach() for v in self.values])


def branch_visibility(branch: Tensor, past: int) -> Callable:
    """Which tokens behind `past` cached ones see which: sees(row, head, query, key) -> bool, of
    numbers or of index tensors. A token sees what is common or of its own branch, up to itself.

    branch (N, P + T): of all keys. (What padded queries see does not matter.)
    """
    def sees(row, head, query, key):
        seen = branch[row, key]
        return ((seen == COMMON) | (seen == branch[row, past + query])) & (key <= past + query)
    return sees


class DecoderPass:
    """What decoder_attention() knows about one pass, and the keys and values that it leaves.

    Linear layers, norms and MLPs run on the X real tokens of all rows, one after another. Only
    attention needs rows: there the X tokens are put at their places, `real`, in (N, T).

    real: int64 (X,), None if nothing is padded; mask: what Qwen._mask made; None: causal.
    """

    def __init__(self, n: int, t: int, real: Tensor | None, mask, past: Cache | None):
        self.n, self.t, self.real, self.mask, self.past = n, t, real, mask, past
        self.keys, self.values = [], []

    def rows(self, x: Tensor) -> Tensor:
        """(1, heads, X, D) -> (N, heads, T, D); without padding no number moves."""
        _, heads, _, d = x.shape
        x = x[0].transpose(0, 1)
        if self.real is not None:
            x = x.new_zeros(self.n * self.t, heads, d).index_copy(0, self.real, x)
        return x.view(self.n, self.t, heads, d).transpose(1, 2)

    def packed(self, y: Tensor) -> Tensor:
        """(N, heads, T, D) -> (1, X, heads, D)"""
        y = y.transpose(1, 2).flatten(0, 1)
        return (y if self.real is None else y.index_select(0, self.real))[None]

    def join_past(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values behind the cached ones; the result is kept."""
        if self.past is not None:
            k = torch.cat((self.past.keys[layer], k), dim=2)
            v = torch.cat((self.past.values[layer], v), dim=2)
        if layer == len(self.keys):        # not when activation checkpointing runs a layer again
            self.keys.append(k)
            self.values.append(v)
        return k, v


def decoder_attention(module, query, key, value, attention_mask, scaling=None, decoder_pass=None,
                      **kwargs):
    """The attention of a decoder layer; keys and queries are normed and rotated already.

    query (1, heads, X, D), key and value (1, kv_heads, X, D) -> (1, X, heads, D), None. Without a
    decoder_pass, in transformers' own forward and generate(), it is transformers' own.
    """
    if decoder_pass is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)
    q, k, v = map(decoder_pass.rows, (query, key, value))
    k, v = decoder_pass.join_past(module.layer_idx, k, v)
    mask, kv_heads = decoder_pass.mask, k.shape[1]
    if mask is None:
        # Nothing is cached and padding is on the right: all that a token must not see comes later.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                           enable_gqa=kv_heads < q.shape[1])
    elif not torch.is_tensor(mask):
        y = block_attention()(q, k, v, block_mask=mask, scale=scaling,
                              enable_gqa=kv_heads < q.shape[1])
    else:
        # Heads that share keys become rows of one head: kernels with a mask know no grouped heads,
        # and copies of k and v for each would be kept for the backward pass.
        y = F.scaled_dot_product_attention(q.unflatten(1, (kv_heads, -1)).flatten(2, 3), k, v,
                                           attn_mask=mask, scale=scaling)
        y = y.unflatten(2, (-1, decoder_pass.t)).flatten(1, 2)
    return decoder_pass.packed(y), None


BLOCK = 128                      # tokens a side; a block that no query sees is not computed


@lru_cache(maxsize=1)
def block_attention() -> Callable:
    """flex_attention, compiled once for all lengths and masks."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True)


def vision_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None,
                     **kwargs):
    """The attention of a tower block: within frames, or within windows (Qwen2.5-VL).

    query, key, value (1, heads, X, D); cu_seq_lens_q: where segments begin, and the end -> (1, X,
    heads, D), None. Segments of one length are run together as a batch.
    """
    batches = equal_segments(tuple(cu_seq_lens_q.tolist()), query.device)
    parts = []
    for n, length, place in batches:
        some = (x[0] if len(batches) == 1 else x[0].index_select(1, place)
                for x in (query, key, value))
        q, k, v = (x.unflatten(1, (n, length)).transpose(0, 1) for x in some)     # (n, heads, ..)
        y = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        parts.append(y.transpose(1, 2).flatten(0, 1))
    if len(batches) == 1:
        return parts[0][None], None
    y, place = torch.cat(parts), torch.cat([place for *_, place in batches])
    return torch.empty_like(y).index_copy(0, place, y)[None], None


@lru_cache(maxsize=64)
def equal_segments(bounds: tuple, device) -> list[tuple[int, int, Tensor]]:
    """Segments bounds[i]..bounds[i + 1] -> [(how many, their length, the places of their tokens)].

    >>> [(n, length, place.tolist()) for n, length, place in equal_segments((0, 2, 3, 5), "cpu")]
    [(2, 2, [0, 1, 3, 4]), (1, 1, [2])]
    """
    starts, lengths = np.array(bounds[:-1]), np.diff(bounds)
    return [(int((lengths == length).sum()), length, torch.from_numpy(
        (starts[lengths == length, None] + np.arange(length)).ravel()).to(device))
        for length in dict.fromkeys(lengths.tolist())]


# transformers' towers hand all frames over at once only to what they take for flash attention,
# by its name; to others one frame (in Qwen2.5-VL one window) at a time.
DECODER_ATTENTION, VISION_ATTENTION = "navigator", "navigator_flash"


def register_attention():
    """Tell transformers of our functions. (It is imported when needed: that takes seconds.)

    They are not compiled: they read a pass's own lists and numbers, which differ in each layer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register(DECODER_ATTENTION, torch.compiler.disable(decoder_attention))
    AttentionMaskInterface.register(DECODER_ATTENTION, sdpa_mask)       # for its own generate()
    AttentionInterface.register(VISION_ATTENTION, torch.compiler.disable(vision_attention))


@lru_cache(maxsize=64)
def tower_geometry(grids: tuple, merge: int, patch: int, window: int | None, side: int | None,
                   device) -> dict:
    """The arguments of a tower that follow from the frames' sizes: grids, (frames, rows, columns)
    in patches for each size. They are made once, and lengths stay on the CPU: a tower that made
    them itself would wait for the GPU in each pass, and attention in each block.

    window: pixels of a window's side (Qwen2.5-VL); side: of the learned position grid (Qwen3-VL).
    """
    from transformers import vision_utils
    grid = torch.tensor(grids)
    made = {"position_ids": vision_utils.get_vision_position_ids(grid, merge).to(device),
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
            "max_seqlen": max(h * w for _, h, w in grids)}
    if window:
        index, bounds = vision_utils.get_vision_window_index(grid, merge, window, patch)
        made |= {"window_index": index.to(device), "cu_window_seqlens": bounds,
                 "max_window_seqlen": (window // patch) ** 2}
    if side:
        places, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge)
        made |= {"interp_indices": places.to(device), "interp_weights": weights.to(device)}
    return {"grid_thw": grid, **made}


# ---------------------------------------------------------------- the passes


class Qwen(nn.Module):
    """A Qwen-VL model of transformers, run by the attention functions above.

    processor: the settings of its image processor (image_processor()).
    """

    base: str | None = None         # folder of the frozen model, if only an adapter is trained
    block_masks, fixed_passes = False, None     # set by compile_layers() on GPUs

    def __init__(self, model: nn.Module, processor: dict):
        super().__init__()
        self.model = model
        self.image_format = ImageFormat(processor["patch_size"], processor["merge_size"],
                                        tuple(processor["image_mean"]),
                                        tuple(processor["image_std"]))
        self.flops = self.tokens = 0     # computed, and trained on, since engine.py last read them
        register_attention()
        self.vision.config._attn_implementation = VISION_ATTENTION
        self.lm.config._attn_implementation = DECODER_ATTENTION
        proj = self.vision.patch_embed.proj
        if isinstance(proj, nn.Conv3d):
            # The module around it would cut still patches as if each were there twice.
            self.vision.patch_embed = nn.Sequential(OrderedDict(proj=PatchProjection(proj)))

    @property
    def vision(self) -> nn.Module:
        return self.model.model.visual

    @property
    def lm(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def trains_vision(self) -> bool:
        return any(p.requires_grad for p in self.vision.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.vision.blocks, *self.lm.layers]

    def compile_layers(self, backend: str | Callable = "inductor"):
        """torch.compile attention's projections, MLP and norms of each layer: one graph serves all
        layers of a kind and all lengths. It is made in the first pass that needs it. On a GPU long
        passes get flex_attention with block masks, and short ones become CUDA graphs (decoding.py).

        A layer as a whole would not do: transformers checkpoints inside of it, and nothing is
        compiled within checkpoint() where a graph has a break, as attention is one.
        """
        if self.device.type == "cuda":
            self.block_masks, self.fixed_passes = True, {}
        torch.compiler.config.recompile_limit = 64     # one file's models count together
        for layer in self.layers:
            for part in layer.children():
                part.compile(dynamic=True, backend=backend)

    @property
    def checkpointing(self) -> bool:
        return self.lm.layers[0].gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool):
        """Recompute layers in the backward pass, as transformers' layers can do themselves."""
        for layer in self.layers:
            layer.gradient_checkpointing = on
            layer._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, preserve_rng_state=False)   # none draws numbers
        self.model.train(on)             # a condition of theirs; without dropout nothing else

    def _apply(self, fn, *args, **kwargs):
        """What .to() and .bfloat16() do, but the frequencies of positions stay fp32: in bf16 the
        angles of far tokens would be wrong."""
        before = {name: buffer for name, buffer in self.named_buffers() if "inv_freq" in name}
        super()._apply(fn, *args, **kwargs)
        for name, buffer in before.items():
            module, _, key = name.rpartition(".")
            module = self.get_submodule(module)
            setattr(module, key, buffer.to(getattr(module, key).device))
        return self

    def _count_flops(self, forward: float, tokens: int = 0, trainable: bool = True):
        """Add a pass to the counters; a backward pass costs twice its forward pass, and as much as
        it where the weights are frozen under an adapter, whose own products are not counted.
        Recomputation and padding are not counted."""
        trains = trainable and torch.is_grad_enabled()
        self.flops += forward * (1 if not trains else 2 if self.base else 3)
        self.tokens += tokens if trains else 0

    # ------------------------------------------------------------ frames -> features

    def encode(self, frames: list[np.ndarray]) -> list[Tensor]:
        """Resized uint8 frames (h, w, 3) of any sizes -> (rows, cols, (1 + L) H) each,
        differentiable: what goes in place of the image's tokens, and behind it, along the last
        axis, what Qwen3-VL adds to the hidden states after its first L layers.

        The tower attends within a frame, so its features do not depend on the other frames. All
        sizes are run in one pass: under ZeRO-3 every call of a module is a collective, and ranks
        may hold different numbers of sizes.
        """
        if not frames:
            return []
        patch, merge = self.image_format.patch, self.image_format.merge
        sizes = sorted({f.shape for f in frames})
        index = [[i for i, f in enumerate(frames) if f.shape == size] for size in sizes]
        grids = tuple((len(some), h // patch, w // patch)
                      for some, (h, w, _) in zip(index, sizes))
        self._count_flops(sum(n * vision_flops(self.vision.config, h * w) for n, h, w in grids),
                          trainable=self.trains_vision)
        pixels = (torch.from_numpy(np.stack([frames[i] for i in some])).to(self.device)
                  for some in index)
        out = self.vision(
            torch.cat([patchify(p, self.image_format).flatten(0, 1) for p in pixels]),
            **tower_geometry(grids, merge, patch, getattr(self.vision, "window_size", None),
                             getattr(self.vision, "num_grid_per_side", None), self.device))
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        parts = torch.cat(levels, dim=-1).split([n * h * w // merge ** 2 for n, h, w in grids])
        features = [None] * len(frames)
        for some, part, (n, h, w) in zip(index, parts, grids):
            for i, feature in zip(some, part.view(n, h // merge, w // merge, -1).unbind(0)):
                features[i] = feature
        return features

    # ------------------------------------------------------------ tokens -> hidden states

    def embed(self, ids: Tensor, features: list[Tensor]) -> tuple[Tensor, dict]:
        """Ids with their images' features in place -> (X, H), and the decoder's arguments for
        deepstack, if the features have such levels.

        ids (X,) int64 on the CPU; features: the (rows, cols, (1 + L) H) tensors, in reading order.
        """
        embeds = self.lm.embed_tokens(ids.to(self.device))
        if not features:
            return embeds, {}
        # A frame that eight decisions look at was encoded once: its gradients add up there.
        shown = torch.cat([f.flatten(0, 1) for f in features]).to(embeds.dtype)
        first, *levels = shown.split(embeds.shape[-1], dim=-1)
        is_image = ids == self.model.config.image_token_id
        where = is_image.nonzero().squeeze(1).to(self.device)
        deepstack = {"visual_pos_masks": is_image[None].to(self.device),
                     "deepstack_visual_embeds": levels} if levels else {}
        return embeds.index_copy(0, where, first), deepstack

    def decode(self, segments: list[Segment], past: Cache | None = None,
               before: list[float] | None = None, sees: Callable | None = None
               ) -> tuple[Tensor, Cache]:
        """Run a segment for each row over that row's cache, in one pass of transformers' decoder ->
        hidden (N, T, H) after the last norm, padded on the right, and the Cache of P + T tokens.

        past: of N rows; before: the number of cached tokens that a segment's tokens see (for the
        count of FLOPs only); sees(row, head, query, key): which new tokens see which (without
        past), default: branch_visibility().
        A token never sees padding, a rejected draft, another row, or another answer's branch.
        """
        lengths = torch.tensor([len(segment.ids) for segment in segments])
        n, t = len(segments), int(lengths.max())
        there = torch.arange(t) < lengths[:, None]
        branch = torch.full((n, t), HIDDEN).masked_scatter(there, torch.tensor(
            [b for s in segments for b in s.branch or [COMMON] * len(s.ids)])).to(self.device)
        # What is not padded does not need to be moved: index None.
        real = None if there.all() else there.flatten().nonzero().squeeze(1).to(self.device)
        self.count_decoder_flops(segments, before or [0] * n)
        embeds, deepstack = self.embed(torch.tensor([i for s in segments for i in s.ids]),
                                       [f for s in segments for f in s.features])
        positions = torch.cat([s.positions for s in segments], dim=1).to(self.device)    # (3, X)
        seen = branch if past is None else torch.cat((past.branch, branch), dim=1)
        causal = past is None and sees is None and not any(s.branch for s in segments)
        mask = None if causal else self._mask(
            sees or branch_visibility(seen, seen.shape[1] - t), seen.shape, t)
        state = DecoderPass(n, t, real, mask, past)
        hidden = self.lm(inputs_embeds=embeds[None], position_ids=positions[:, None],
                         use_cache=False, decoder_pass=state, **deepstack).last_hidden_state[0]
        if real is not None:
            hidden = hidden.new_zeros(n * t, hidden.shape[-1]).index_copy(0, real, hidden)
        return hidden.view(n, t, -1), Cache(state.keys, state.values, seen)

    def _mask(self, sees: Callable, shape: tuple[int, int], t: int):
        """One mask for all layers: a BlockMask for long passes on a GPU, or a dense one."""
        if not self.block_masks or t < BLOCK:
            return self.dense_mask(sees, shape, t)
        from torch.nn.attention.flex_attention import create_block_mask
        return create_block_mask(sees, shape[0], None, t, shape[1], device=self.device,
                                 BLOCK_SIZE=BLOCK)

    def dense_mask(self, sees: Callable, shape: tuple[int, int], t: int) -> Tensor:
        """shape (N, P + T) of the keys -> (N, 1, R * T, P + T), added to the scores (0 or minus
        infinity), once for each of the R heads that share keys."""
        row, query, key = (torch.arange(size, device=self.device)
                           for size in (shape[0], t, shape[1]))
        mask = sees(row[:, None, None], 0, query[:, None], key)
        added = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        added = added.masked_fill_(~mask, -math.inf)
        repeats = self.lm.config.num_attention_heads // self.lm.config.num_key_value_heads
        return (added.repeat(1, repeats, 1) if repeats > 1 else added)[:, None]

    def count_decoder_flops(self, segments: list[Segment], before: list[float]):
        new = sum(len(segment.ids) for segment in segments)
        pairs = 0                                   # of a token and a key that it sees
        for segment, cached in zip(segments, before):
            sizes = Counter(segment.branch or [COMMON] * len(segment.ids))
            common = sizes.pop(COMMON, 0)
            pairs += common * (cached + common / 2) + sum(
                own * (cached + common + own / 2) for own in sizes.values())
        self._count_flops(decoder_flops(self.lm.config, new, pairs / new - new / 2), new)
