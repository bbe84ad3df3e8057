"""
LoRA [1]: train small matrices beside the weights of a policy, and leave the weights as they are.

    y = W x + (alpha / r) B A x           W frozen; A (r, in) random, B (out, r) 0 at the start

The library peft puts its layers into transformers' model, in place, so the passes of qwen.py run as
they are: attention and MLP of each layer of the language model, with --lora-vision of the tower's
blocks too. alpha is 2 r.

A folder holds the adapter in peft's own format (adapter_config.json, adapter_model.safetensors) and
nav.json. adapter_config.json names the folder of the base model, which must stay where it is. peft
and transformers load both together; load_policy() (checkpoint.py) adds the adapter to the weights,
and `python checkpoint.py --merge FOLDER --out WHOLE` writes the sum as a folder of its own, for
everything that loads a model.

[1] https://arxiv.org/abs/2106.09685
"""
from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor

from cli import UserError, read_json

TRAINED, START = "default", "reference"       # adapters by peft's names: START is frozen
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The linear layers of all families, by their place in transformers' model.
TEXT_LAYERS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
VISION_LAYERS = r".*visual\.blocks\.\d+\.(attn|mlp)\.\w*(qkv|proj|fc\d)"


# ---------------------------------------------------------------- flags


def add_lora_args(add) -> None:
    """The flags of the trainers, for `add = parser.add_argument`."""
    add("--lora-rank", type=int, default=0, help="r: train an adapter of this rank and freeze the "
        "weights; 0: train the weights")
    add("--lora-vision", action="store_true", help="adapt the vision tower too")


def check_lora_args(args) -> None:
    """UserError for flags that contradict each other. Without --lora-vision the tower is frozen."""
    if args.lora_rank < 0:
        raise UserError(f"--lora-rank {args.lora_rank} must be 0 (off) or above")
    if args.lora_vision and not args.lora_rank:
        raise UserError("--lora-vision adapts the tower by an adapter: give --lora-rank, too")
    if args.lora_vision and args.freeze_vision:
        raise UserError("--lora-vision trains the vision tower and --freeze-vision does not: "
                        "choose one")
    args.freeze_vision |= args.lora_rank > 0 and not args.lora_vision


# ---------------------------------------------------------------- adapters in a model


def add_adapter(model: nn.Module, rank: int, vision: bool, base: str, seed: int) -> None:
    """Put a new adapter into transformers' model and freeze the rest. base: the model's folder."""
    from peft import LoraConfig
    layers = f"{TEXT_LAYERS}|{VISION_LAYERS}" if vision else TEXT_LAYERS
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers,
                        base_model_name_or_path=base)
    with torch.random.fork_rng(devices=[]):                  # the same A on every rank
        torch.manual_seed(seed)
        inject(model, config, TRAINED)


def inject(model: nn.Module, config, name: str) -> None:
    """Put the layers of an adapter into a model that may have another one. Only TRAINED is used in
    its passes and has gradients."""
    from peft import inject_adapter_in_model
    before = getattr(model, "peft_config", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)             # of a second adapter
        inject_adapter_in_model(config, model, name)
    model.peft_config = before | model.peft_config
    switch_adapter(model, TRAINED)
    for key, weight in model.named_parameters():
        weight.requires_grad_(f".{TRAINED}." in key)


def is_adapter(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, CONFIG)) and not os.path.exists(
        os.path.join(folder, "config.json"))


def read_config(folder: str) -> dict:
    """adapter_config.json of a folder. UserError if it is not LoRA's, or names no base model."""
    try:
        config = read_json(os.path.join(folder, CONFIG))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/{CONFIG} cannot be read ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/{CONFIG} holds no JSON object; copy it again")
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA" or not base or is_adapter(base) or config.get("modules_to_save"):
        raise UserError(f"{folder} holds an adapter of kind {kind} on base_model_name_or_path "
                        f"{base!r}; this code takes a LoRA adapter alone, on the folder of a whole "
                        "model: merge it with peft (merge_and_unload()) and give that folder")
    return config


def load_adapter(model: nn.Module, folder: str, name: str = TRAINED) -> None:
    """Put a folder's adapter into its base model, as the adapter `name`. UserError unless each of
    its tensors has its place there, and each place its tensor."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    try:
        tensors = load_file(os.path.join(folder, WEIGHTS))
        config = LoraConfig.from_pretrained(folder)
        config.lora_dropout = 0.0               # sampling and update must see the same policy
        inject(model, config, name)
        tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        report = set_peft_model_state_dict(model, tensors, name)
    except Exception as error:                # safetensors' and peft's own
        raise UserError(f"{folder}: its adapter does not fit its base model "
                        f"({str(error).splitlines()[0]}); copy both again") from error
    wrong = [*report.unexpected_keys, *(key for key in report.missing_keys if f".{name}." in key)]
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if wrong:
        raise UserError(f"{folder}/{WEIGHTS}: {wrong[0]} is in the adapter or in its base model "
                        "and not in both; copy both again")
    if broken:
        raise UserError(f"{folder}/{WEIGHTS}: {broken[0]} is not finite; give an earlier "
                        "checkpoint")


def adapted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    return [(name, module) for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)]


def merge_adapter(model: nn.Module) -> None:
    """Add the adapter to the weights, and leave a model as it was before there was one."""
    for name, layer in adapted_layers(model):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


@contextlib.contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside this context the model computes with another of its adapters; None: with none."""
    switch_adapter(model, name)
    try:
        yield
    finally:
        switch_adapter(model, TRAINED)


def switch_adapter(model: nn.Module, name: str | None) -> None:
    # peft's own methods would also change requires_grad, on which the optimizer relies.
    for _, layer in adapted_layers(model):
        layer._disable_adapters, layer._active_adapter = name is None, [name or TRAINED]


def save_adapter(model: nn.Module, folder: str, state_dict: dict[str, Tensor]) -> None:
    """Write the adapter as peft does. state_dict: of transformers' model, or at least of it."""
    from safetensors.torch import save_file
    tensors = {f"base_model.model.{key.replace(f'.{TRAINED}.', '.')}": value.contiguous().cpu()
               for key, value in state_dict.items() if f".{TRAINED}." in key}
    save_file(tensors, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
    model.peft_config[TRAINED].save_pretrained(folder)
