"""
Checkpoints: a Hugging Face folder <-> a policy, and small models from scratch.

A folder is what from_pretrained reads, plus nav.json: the navigation contract (degrees and metres,
horizon, memory, image budget, prompt version), which evaluate.py obeys. Or it holds an adapter of
LoRA (lora.py) instead of the weights. What a folder asks for and the code does not do is refused in
one sentence that names the file and the fix.

Run it   python checkpoint.py --merge ckpt/sft_lora --out ckpt/sft_merged

Read it in this order
    load       folder, hub id or short name -> Policy                      load_policy
    checks     its settings, its weights, its pictures, its words          check_config
    save       Policy -> folder, for transformers 4 and 5 and for servers  save_policy
    tiny       each family's own classes at 1/2000 of the size             build_tiny
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil

import torch
import torch.nn as nn
from torch import Tensor

import lora
from cli import DefaultsFormatter, UserError, run_cli, write_json
from lsm import MEMORIES
from model import CONTRACT, NULLABLE, POLICIES, Policy, policy_class

# ---------------------------------------------------------------- load

HUB_NAMES = {name: f"Qwen/{name}-Instruct" for name in (
    "Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-2B", "Qwen3-VL-4B",
    "Qwen3-VL-8B")}

# What a checkpoint brings besides its weights and config.json, and takes along when it is saved.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "chat_template.json",
                   "chat_template.jinja")
KEPT_FILES = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json",
              "generation_config.json")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def load_policy(name: str, contract: dict | None = None, device: str = "cpu",
                dtype: str = "float32", texts: list[str] | None = None, seed: int = 0,
                replace_contract: bool = False, atomic_patterns: list[str] | None = None,
                lora_rank: int = 0, lora_vision: bool = False) -> Policy:
    """A folder, a hub id, a short name of HUB_NAMES, or a name of TINY (built from `texts`) ->
    Policy.

    contract: for a model that has none; otherwise the checkpoint's own nav.json is used, unless
    replace_contract. texts, atomic_patterns: of tiny's tokenizer. lora_rank: train an adapter, a
    new one or that of the folder; 0: an adapter's folder becomes a whole policy.
    device "meta": without weights, for its prompts and its tokenizer.
    UserError when the weights are not there, not whole, not finite, or need another forward pass.
    """
    if lora.is_adapter(name):
        return load_adapted(name, contract, device, dtype, replace_contract, lora_rank, lora_vision)
    if name in TINY:
        if lora_rank:
            raise UserError(f"--model {name} is made from scratch, and an adapter needs trained "
                            "weights in a folder: train it without --lora-rank first")
        patterns = ATOMIC_PATTERNS if atomic_patterns is None else atomic_patterns
        tiny = build_tiny(TINY[name], texts or [], contract or CONTRACT, seed, patterns)
        return tiny.to(device, getattr(torch, dtype))
    from transformers import AutoTokenizer
    source = name if os.path.isdir(name) else HUB_NAMES.get(name, name)
    try:
        model = load_model(source, getattr(torch, dtype), device == "meta")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except UserError:
        raise
    except Exception as error:          # the library raises what it likes at a file it cannot read
        reason = (str(error).splitlines() or [repr(error)])[0]
        if os.path.isdir(name):
            raise UserError(f"{name} does not load as a model ({reason}); copy it again, or give "
                            "another folder") from error
        raise UserError(
            f"no model at {source!r}: it is neither a folder here nor in the Hugging Face cache, "
            f"and the hub did not give it ({reason}). On a machine with network"
            f" run `hf download {source} --local-dir models/{os.path.basename(source)}`, "
            "copy the folder here and pass --model FOLDER; or use --model tiny") from error
    check_tokenizer(tokenizer, model, source)
    files = {file: read_file(source, file) for file in (*KEPT_FILES, "nav.json")}
    stored = files.pop("nav.json")
    own = read_contract(os.path.join(source, "nav.json"), stored) if stored else None
    contract = contract if replace_contract and contract else own or contract or CONTRACT
    files = {file: content for file, content in files.items() if content is not None}
    policy = policy_class(contract["prompt"])(
        model, tokenizer, contract, image_processor(files, model), files).to(device)
    check_template(policy, source)
    if lora_rank:
        policy.base = os.path.abspath(source) if os.path.isdir(source) else source
        lora.add_adapter(policy.model, lora_rank, lora_vision, policy.base, seed)
    return policy


def load_adapted(folder: str, contract: dict | None, device: str, dtype: str,
                 replace_contract: bool, rank: int, vision: bool) -> Policy:
    """load_policy() of an adapter's folder, whose contract is its own."""
    config, stored = lora.read_config(folder), read_file(folder, "nav.json")
    own = read_contract(os.path.join(folder, "nav.json"), stored) if stored else None
    contract = contract if replace_contract and contract else own or contract
    base = config["base_model_name_or_path"]
    policy = load_policy(base, contract, device, dtype, replace_contract=True)
    lora.load_adapter(policy.model, folder)
    if not rank:
        lora.merge_adapter(policy.model)
        return policy
    has_vision = any("visual." in name for name, _ in lora.adapted_layers(policy.model))
    if (config["r"], has_vision) != (rank, vision):
        raise UserError(f"{folder} holds an adapter of rank {config['r']} "
                        f"{'with' if has_vision else 'without'} the vision tower: give --lora-rank "
                        f"{config['r']}{' --lora-vision' if has_vision else ''}, or merge it first "
                        "(python checkpoint.py --merge)")
    policy.base = base
    return policy


# ---------------------------------------------------------------- checks

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Settings that the attention functions and patchify() take as given: {key of a file: values it
# stands for}. What transformers' modules carry out (widths, norms, windows ..) may be anything.
TEXT_KEYS = {"use_sliding_window": (False,), "attention_dropout": (0,),
             "partial_rotary_factor": (1,)}
VISION_KEYS = {"temporal_patch_size": (2,), "in_channels": (3,), "in_chans": (3,),
               "attention_dropout": (0,)}
ROPE_KEYS = {"type": ("default", "mrope"), "rope_type": ("default", "mrope"),
             "partial_rotary_factor": (1,)}
PROCESSOR_KEYS = {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
                  "rescale_factor": (1 / 255,), "resample": (3,), "temporal_patch_size": (2,)}


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


def load_model(source: str, dtype: torch.dtype, empty: bool = False) -> nn.Module:
    """A folder or hub id -> transformers' model, checked. UserError if the passes of qwen.py would
    compute something else than the checkpoint means, or if its weights are not whole.
    empty: shapes without weights, on the device "meta"."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    check_config(source)
    if empty:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
    model, report = AutoModelForImageTextToText.from_pretrained(
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
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{source} is a {family}; this project drives Qwen2-VL, Qwen2.5-VL and "
                        f"Qwen3-VL models ({', '.join(FAMILIES)})")
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    rope = {**(text.get("rope_parameters") or {}), **(text.get("rope_scaling") or {})}
    layers = {f"layer_types[{i}]": kind for i, kind in enumerate(text.get("layer_types") or [])}
    for where, values, known in (
            ("", config, {"quantization_config": (None,)}), ("", text, TEXT_KEYS),
            (", vision_config", vision, VISION_KEYS), (", rope_scaling", rope, ROPE_KEYS),
            ("", layers, dict.fromkeys(layers, ("full_attention",)))):
        refuse_values(path + where, values, known)
    check_heads(path, text, rope.get("mrope_section"), own_size=family == "qwen3_vl")


def check_heads(path: str, text: dict, section, own_size: bool):
    """The part of check_config() that compares sizes. section: the bands of M-RoPE; own_size: may
    a head have another size than its share of hidden_size?"""
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    size = text.get("head_dim") if own_size else None
    if size is None:
        if not (isinstance(hidden, int) and isinstance(heads, int) and heads
                and hidden % heads == 0):
            raise UserError(f"{path}: hidden_size {hidden} and num_attention_heads {heads} do not "
                            "give the size of a head; copy config.json again")
        size = hidden // heads
        refuse_values(path, text, {"head_dim": (size,), "attention_bias": (True,)})
    if not isinstance(section, list) or len(section) != 3 or 2 * sum(section) != size:
        raise UserError(f"{path}: mrope_section is {section}; it should be three numbers that sum "
                        f"to {size // 2} (half of a head of {size}); copy config.json again")


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
        problem = (f"its weights hold {some_of(extra)}, which a model of its config.json does "
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


def image_processor(files: dict[str, bytes], model: nn.Module) -> dict:
    """The settings by which pictures were prepared for these weights, from the folder's files.
    UserError if they are not there, or ask for what qwen.patchify() does not do."""
    vision = model.config.vision_config
    name = next((name for name in ("preprocessor_config.json", "processor_config.json")
                 if name in files), None)
    if name is None:
        raise UserError("the model's folder has no preprocessor_config.json, so the size and the "
                        "colours of its pictures are not known; copy that file from the model")
    content = read_object(name, files[name])
    if name == "processor_config.json":                           # as transformers 5 writes it
        content = content.get("image_processor") or {}
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    refuse_values(name, content, {**PROCESSOR_KEYS, **{k: (v,) for k, v in sizes.items()}})
    for key in ("image_mean", "image_std"):
        values = content.get(key)
        if not (isinstance(values, list) and len(values) == 3 and all(
                isinstance(v, (int, float)) and 0 <= v < math.inf for v in values)):
            raise UserError(f"{name}: {key} is {values}; it should be three numbers; copy that file"
                            " again")
    if 0 in content["image_std"]:
        raise UserError(f"{name}: image_std holds a 0; copy that file again")
    return {"image_processor_type": "Qwen2VLImageProcessor", **sizes, "temporal_patch_size": 2,
            **content}


def is_like(value, example) -> bool:
    """Is a JSON value of the example's kind? A number must be finite, an object hold its keys.

    >>> is_like(2, 0.25), is_like(True, 1), is_like({"a": "x"}, {"a": 1}), is_like({}, {"a": 1})
    (True, False, False, False)
    """
    if isinstance(example, dict):
        return isinstance(value, dict) and all(is_like(value.get(k), v) for k, v in example.items())
    if isinstance(example, (bool, str)):
        return type(value) is type(example)
    return type(value) in (int, float) and math.isfinite(value)


def read_contract(path: str, content: bytes) -> dict:
    """The bytes of a nav.json -> dict, complete and of a version that this code has."""
    contract = read_object(path, content)
    for key, known in (("version", [CONTRACT["version"]]), ("prompt", list(POLICIES))):
        if contract.get(key) not in known:
            raise UserError(f"{path}: {key} is {contract.get(key)!r} and this code supports "
                            f"{known[0]!r}; run the code that trained it, or train again")
    for key, like in policy_class(contract["prompt"]).default_contract.items():
        value = contract.get(key)
        if not (is_like(value, like) or value is None and key in contract and key in NULLABLE):
            raise UserError(f"{path}: {key} is {value!r} and should be like {like!r}; copy "
                            "that file again from the checkpoint")
    most = policy_class(contract["prompt"]).max_horizon if "horizon" in contract else 0
    if most and contract["horizon"] not in range(1, most + 1):
        raise UserError(f"{path}: horizon is {contract['horizon']} and must be 1 to {most} actions "
                        "an answer; copy that file again from the checkpoint")
    memory = contract.get("memory")
    if memory and (memory["name"] not in MEMORIES or not all(
            type(value) is int and value >= (1 if key.endswith("stride") else 0)
            for key, value in memory.items() if key != "name")):
        raise UserError(f"{path}: memory is {memory!r}; its name must be one of "
                        f"{', '.join(MEMORIES)}, and the others whole numbers of 0 or more (strides"
                        " 1); copy that file again from the checkpoint")
    return contract


def check_tokenizer(tokenizer, model, source: str):
    """UserError if the tokenizer lacks a mark of the prompt, or does not fit the model."""
    token = tokenizer.convert_tokens_to_ids
    lacking = [mark for mark in ("<|im_start|>", "<|im_end|>", *VISION_TOKENS)
               if tokenizer(mark, add_special_tokens=False)["input_ids"] != [token(mark)]]
    most, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    ids = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
    remedy = "copy the tokenizer's files from the model that it was trained from"
    for wrong, problem in (
            (lacking, f"its tokenizer has no token {', '.join(lacking)}"),
            (most >= rows, f"its tokenizer has ids up to {most} and the weights embed {rows}"),
            *((getattr(model.config, key) != token(mark), f"config.json says {key} "
               f"{getattr(model.config, key)} and the tokenizer's {mark} is {token(mark)}")
              for key, mark in ids.items())):
        if wrong:
            raise UserError(f"{source}: {problem}; {remedy}")


def check_template(policy: Policy, source: str):
    """UserError if the chat template does not put a user's text, unchanged, between its marks."""
    try:
        policy._chat("")
    except Exception as error:             # jinja's own, and transformers' where there is none
        raise UserError(f"{source}: its chat template cannot be used ({error}); copy the "
                        "tokenizer's files, chat_template included, again") from error


# ---------------------------------------------------------------- save


def save_policy(policy: Policy, folder: str, state_dict: dict | None = None):
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
    if policy.base:
        lora.save_adapter(policy.model, temporary, state_dict or policy.model.state_dict())
    else:
        save_whole(policy, temporary, state_dict)
    write_json(os.path.join(temporary, "nav.json"), policy.contract)
    # safetensors makes its file readable for its owner alone; the other files follow the umask.
    mode = os.stat(os.path.join(temporary, "nav.json")).st_mode
    for file in sorted(os.listdir(temporary)):
        os.chmod(os.path.join(temporary, file), mode)
        os.replace(os.path.join(temporary, file), os.path.join(folder, file))
    os.rmdir(temporary)


def save_whole(policy: Policy, folder: str, state_dict: dict | None) -> None:
    """All files of a whole model but nav.json, into a new folder."""
    policy.model.save_pretrained(folder, state_dict=state_dict)
    if "tokenizer_config.json" not in policy.files:
        policy.tokenizer.save_pretrained(folder)
    for file, content in policy.files.items():
        if file != "processor_config.json":       # its picture settings would outrank those below
            with open(os.path.join(folder, file), "wb") as f:
                f.write(content)
    pixels = {key: policy.contract[key] for key in ("min_pixels", "max_pixels")}
    processor = {**policy.processor, **pixels, "size": {
        "shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}}
    write_json(os.path.join(folder, "preprocessor_config.json"), processor)
    for file, change in (("config.json", for_version_4), ("tokenizer_config.json", plain_classes)):
        path = os.path.join(folder, file)
        with open(path, encoding="utf-8") as f:
            content = change(json.load(f))
        write_json(path, content)


def for_version_4(config: dict) -> dict:
    """config.json of transformers 5, with the keys of version 4 beside its own: version
    4 does not read rope_parameters, and silently takes 1e6 for rope_theta."""
    text = config["text_config"]
    rope = text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config["model_type"] != "qwen3_vl":
        text["rope_scaling"]["type"] = "mrope"
    return config


def plain_classes(config: dict) -> dict:
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
# Words are split as Qwen2 splits them, but these patterns (an option, a line of the prompt)
# stay whole, so that a BPE learned on them makes each one token.
ATOMIC_PATTERNS = [
    r"[A-D]\. [^,.\n<]+(?:, )?", r"<OBJ\d+>| (?=<OBJ)", r"You are a helpful assistant\.",
    r"(?:move forward|turn left|turn right) [\d.]+ ?(?:cm|degrees)(?:, )?",
    r"You are a robot [^:\n]+: ", r"(?:system|user|assistant)\n", r"\.\nInstruction: ",
    r"\nSeen before: ", r"\nNow: "]
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def tiny_tokenizer(texts: list[str], contract: dict, atomic_patterns: list[str],
                   vocab_size: int = 1536):
    """A byte-level BPE learned on the data set's own words -> PreTrainedTokenizerFast."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("|".join([*atomic_patterns, QWEN_SPLIT])), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    prompts, answers = policy_class(contract["prompt"]).tiny_corpus(sorted(set(texts)), contract)
    corpus = [prompt.replace("<image>", "") for prompt in prompts]
    corpus += ["system\n", "You are a helpful assistant.", "user\n", "assistant\n", *answers
               ] * max(len(corpus), 8)
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left", chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"])       # no token_type_ids: Qwen2 has none


# The families at 1/2000 of the size. What tells them apart is there: windows smaller than a frame,
# heads that share keys, deepstack, heads of a size of their own.
# mrope_section: the bands of time, height, width.
TINY = {"tiny": "qwen2_vl", "tiny-qwen2.5": "qwen2_5_vl", "tiny-qwen3": "qwen3_vl"}
TINY_TEXT = {"qwen2_vl": dict(num_attention_heads=2, num_key_value_heads=2),
             "qwen2_5_vl": dict(num_attention_heads=4, num_key_value_heads=2),
             "qwen3_vl": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=48)}
TINY_BANDS = {"qwen2_vl": {"mrope_section": [8, 12, 12]},
              "qwen2_5_vl": {"mrope_section": [4, 6, 6]},
              "qwen3_vl": {"mrope_section": [8, 8, 8], "mrope_interleaved": True}}
TINY_VISION = {
    "qwen2_vl": dict(depth=2, embed_dim=64, mlp_ratio=4, hidden_size=128, patch_size=14),
    "qwen2_5_vl": dict(depth=2, hidden_size=64, intermediate_size=176, out_hidden_size=128,
                       patch_size=14, window_size=56, fullatt_block_indexes=[1]),
    "qwen3_vl": dict(depth=2, hidden_size=64, intermediate_size=256, out_hidden_size=128,
                     patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def build_tiny(family: str, texts: list[str], contract: dict, seed: int,
               atomic_patterns: list[str]) -> Policy:
    """A family's own classes, small, with random weights, deterministic from the seed."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    tokenizer = tiny_tokenizer(texts, contract, atomic_patterns)
    token = tokenizer.convert_tokens_to_ids
    hidden = 128
    config = AutoConfig.for_model(
        family,
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
            num_hidden_layers=3, max_position_embeddings=32768, tie_word_embeddings=True,
            bos_token_id=token("<|endoftext|>"), eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"), initializer_range=hidden ** -0.5,
            # A few dozen positions, not thousands: the slow bands encode columns and must turn.
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, **TINY_BANDS[family]},
            **TINY_TEXT[family]),
        vision_config=dict(num_heads=2, spatial_merge_size=2, temporal_patch_size=2,
                           initializer_range=64 ** -0.5, **TINY_VISION[family]),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    half = [0.5, 0.5, 0.5]
    mean, std = (half, half) if family == "qwen3_vl" else (CLIP_MEAN, CLIP_STD)
    settings = json.dumps({"image_mean": mean, "image_std": std}).encode()
    processor = image_processor({"preprocessor_config.json": settings}, model)
    return policy_class(contract["prompt"])(model, tokenizer, contract, processor)


# ---------------------------------------------------------------- merging an adapter


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Write an adapter's policy as a whole model.",
                                formatter_class=DefaultsFormatter)
    p.add_argument("--merge", required=True, metavar="FOLDER", help="--out of a --lora-rank run")
    p.add_argument("--out", required=True, help="a new folder: what evaluate.py, transformers and "
                   "vLLM load")
    return p.parse_args(argv)


def main(args):
    if not lora.is_adapter(args.merge):
        raise UserError(f"--merge {args.merge} holds no adapter ({lora.CONFIG}); name the --out of "
                        "a run with --lora-rank")
    if any(os.path.exists(os.path.join(args.out, name)) for name in ("nav.json", "config.json")):
        raise UserError(f"--out {args.out} holds a model already; choose another folder")
    policy = load_policy(args.merge)                  # in fp32: a sum in bf16 would round twice
    base = lora.read_config(args.merge)["base_model_name_or_path"]
    config = read_object(os.path.join(base, "config.json"), read_file(base, "config.json"))
    text = config.get("text_config") or {}                # where Qwen3-VL's own config has it
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"
    save_policy(policy.to(getattr(torch, dtype)), args.out)
    print(f"wrote {args.out}: {base} with the adapter of {args.merge} in its weights ({dtype})")


if __name__ == "__main__":
    run_cli(main, parse_args)
