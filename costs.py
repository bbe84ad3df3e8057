"""
What a forward pass costs, from a model's sizes alone: FLOPs for the log, bytes for --micro-tokens.

config is transformers' configuration of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, or its vision or text
part.
"""
from __future__ import annotations

from typing import NamedTuple


class TowerSizes(NamedTuple):
    """A vision tower by its sizes: `mlp` is the width between an MLP's `mlp_products` products, and
    `mergers` turn patches into features of width `out`."""
    width: int
    mlp: int
    mlp_products: int
    mergers: int
    out: int


def tower_sizes(config) -> TowerSizes:
    """transformers' vision config -> its sizes. Qwen2-VL names them in its own way; Qwen2.5-VL's
    MLP has a gate; Qwen3-VL has a merger for each deepstack level beside the last."""
    if hasattr(config, "embed_dim"):
        return TowerSizes(config.embed_dim, int(config.embed_dim * config.mlp_ratio), 2, 1,
                          config.hidden_size)
    products = 3 if hasattr(config, "window_size") else 2
    mergers = 1 + len(getattr(config, "deepstack_visual_indexes", ()))
    return TowerSizes(config.hidden_size, config.intermediate_size, products, mergers,
                      config.out_hidden_size)


def vision_flops(config, patches: int) -> float:
    """FLOPs of one frame's forward pass through the tower. Only matrix products and attention
    count, a multiplication with its addition as two; config: transformers' vision config. Windows
    (Qwen2.5-VL) count as whole ones, those at a frame's edge too.

    One block of width 2 and a fourfold MLP has 4*4 + 2*2*8 = 48 weights, the patches 3*14*14*2, the
    merger, of 4 patches to a token, 8*8 + 8*3; attention is 2 products of 4 x 4 x 2:
    >>> from types import SimpleNamespace as C
    >>> vision_flops(C(depth=1, embed_dim=2, mlp_ratio=4, hidden_size=3, patch_size=14,
    ...                spatial_merge_size=2), 4) == 2 * (4 * (1176 + 48) + 88) + 2 * 2 * 32
    True
    """
    e, mlp, products, mergers, out = tower_sizes(config)
    merged = e * config.spatial_merge_size ** 2
    weights = 3 * config.patch_size ** 2 * e + config.depth * (4 * e * e + products * e * mlp)
    merger = mergers * (merged * merged + merged * out) / config.spatial_merge_size ** 2
    whole = len(getattr(config, "fullatt_block_indexes", range(config.depth)))
    window = (getattr(config, "window_size", 0) // config.patch_size) ** 2
    seen = whole * patches + (config.depth - whole) * min(window, patches)  # keys of all blocks
    return 2 * patches * (weights + merger) + 4 * patches * seen * e


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decoder_flops(config, new: int, before: float = 0) -> float:
    """FLOPs of `new` tokens' forward pass through the decoder's layers, over `before` cached ones;
    without the vocabulary. config: transformers' text config. A token sees half of the new ones on
    average.

    One layer of width 2, one head, a MLP of 3: 4 * 2*2 + 3 * 2*3 = 34 weights; 5 tokens after 10:
    >>> from types import SimpleNamespace as C
    >>> tiny = C(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=3,
    ...          num_hidden_layers=1)
    >>> decoder_flops(tiny, 5, 10) == 2 * 5 * 34 + 2 * 2 * 5 * 2 * (10 + 2.5)
    True
    """
    h, heads, kv_heads = (config.hidden_size, config.num_attention_heads,
                          config.num_key_value_heads)
    weights = 2 * h * (heads + kv_heads) * head_size(config) + 3 * h * config.intermediate_size
    attention = 4 * heads * head_size(config) * new * (before + new / 2)
    return config.num_hidden_layers * (2 * new * weights + attention)


def activation_bytes(config, tokens: int, patches: int, answers: int, itemsize: int,
                     checkpointing: bool = False) -> float:
    """Bytes kept for the backward pass of decoder tokens and vision patches: an estimate, within a
    fifth of what autograd keeps (tests/test_bench.py). answers: tokens of which log-probabilities
    are taken; their logits are fp32, kept once and there three more times in passing.
    """
    text, vision = config.text_config, config.vision_config
    tower = tower_sizes(vision)
    token = 15 * text.hidden_size + 4 * text.intermediate_size
    patch = 14 * tower.width + 3 * tower.mlp
    logits = 4 * 4 * answers * text.vocab_size
    if checkpointing:            # each layer's input; and one layer whole, when it is recomputed
        return logits + itemsize * (
            tokens * (text.num_hidden_layers * text.hidden_size + token)
            + patches * (vision.depth * tower.width + patch))
    return logits + itemsize * (tokens * text.num_hidden_layers * token
                                + patches * vision.depth * patch)
