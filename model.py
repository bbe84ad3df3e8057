"""
The policy: Qwen2-VL as a robot that reads an instruction, looks, and writes its next six actions.

The forward pass is qwen.py's. Here is what makes it a policy: the navigation contract, the prompt,
its tokens, log-probabilities of given answers (training), sampled answers (acting), and the folder
on disk. What prompts have in common is run once, a prompt is run once for its G answers, and the
vocabulary is multiplied only where an answer stands. tests/test_model.py compares all of it with
transformers' tokenizer, image processor, positions, logits and generate().

Read it in this order
    prompt     instruction and frames -> text with <image> placeholders    window_prompt
    tokens     text and features -> ids and 3-D positions                  Policy.prompt
    training   log-probability of given answers                            Policy.logps
    sampling   answers, drafted by the plan grammar and verified           Policy.generate
    acting     the agent that evaluate.py runs                             Policy.agent
    disk       load_policy, save_policy

Shapes     B prompts, G answers each, N = B*G rows (siblings adjacent), T new tokens, P cached
           tokens, C answer tokens, H hidden size, V vocabulary

A checkpoint folder is what from_pretrained reads, plus nav.json: the navigation contract (degrees
and metres, horizon, memory, image budget, prompt version), which evaluate.py obeys. The contract's
prompt decides which class a checkpoint is (policy_class): ActiveVLN's dialogs are a subclass.

[1] Qwen2-VL, https://arxiv.org/abs/2409.12191      [2] VLN-R1, https://arxiv.org/abs/2506.17221
"""
from __future__ import annotations

import importlib
import json
import math
import os
import random
import shutil
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import UserError, write_json
from lsm import pick_frames
from qwen import (
    Cache,
    Qwen,
    Segment,
    activation_bytes,
    fit_pixels,
    image_processor,
    load_model,
    mrope_positions,
    read_file,
    read_object,
    resize,
)
from reward import (
    FORWARD,
    MAX_ANSWER_TOKENS,
    RESERVED_TOKENS,
    STOP,
    action_phrases,
    parse_control,
    parse_plan,
    write_plan,
)

HUB_NAMES = {"Qwen2-VL-2B": "Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL-7B": "Qwen/Qwen2-VL-7B-Instruct"}

# ---------------------------------------------------------------- the contract and the prompt

# What a checkpoint was trained for: its robot (a row of world.robots.ROBOTS, here R2R's; null where
# the data did not say) and its prompt. 65,536 pixels is the paper's image budget [2]; the memory's
# numbers are not public: lsm.py says why these.
CONTRACT = {
    "version": 1, "dataset": "", "prompt": "window-1", "horizon": 6,
    "turn_deg": 15, "forward_m": 0.25, "hfov_deg": 90, "camera_height_m": 1.25,
    "radius_m": 0.1, "height_m": 1.5, "sliding": True, "width": 640, "height": 480,
    "min_pixels": 56 * 56, "max_pixels": 65536,
    "memory": {"name": "lsm", "budget": 16, "recent": 8, "short_stride": 1, "long_stride": 4},
}
NULLABLE = {"hfov_deg", "camera_height_m", "radius_m", "height_m", "sliding", "width", "height"}
# The prompts that this code can train and run: {prompt: (module, class)}. Imported when needed.
POLICIES = {"window-1": ("model", "Policy"), "dialog-1": ("activevln.dialog", "DialogPolicy")}


def policy_class(prompt: str) -> type[Policy]:
    """The class for a contract's prompt, by its whole name or without its version."""
    module, name = next(place for key, place in POLICIES.items()
                        if prompt in (key, key.split("-")[0]))
    return Policy if module == "model" else getattr(importlib.import_module(module), name)


def clean_instruction(instruction: str) -> str:
    """An instruction on one line. UserError if it could be read as an image or a chat mark."""
    if any(mark in instruction for mark in RESERVED_TOKENS):
        raise UserError(f"the instruction {instruction!r} holds a reserved mark "
                        f"({' or '.join(RESERVED_TOKENS)}); take it out of the episode file")
    return " ".join(instruction.split())


def window_prompt(instruction: str, n_history: int, contract: dict) -> str:
    """One decision, as text with n_history + 1 <image> placeholders: remembered frames, oldest
    first, then the current one. The instruction comes first: it is the same all along a walk."""
    phrases = action_phrases(contract["turn_deg"], contract["forward_m"])
    options = ", ".join(phrases[a] for a in (1, 2, 3, STOP))
    return (f"You are a robot walking through a building. Choose your next {contract['horizon']} "
            f"actions from: {options}.\nInstruction: {clean_instruction(instruction)}\n"
            f"Seen before: {'<image>' * n_history}\nNow: <image>")


# ---------------------------------------------------------------- the policy


class Prompt(NamedTuple):
    """One decision as tokens: a qwen.Segment, and the length of the prefix that it may share."""
    ids: list[int]            # images expanded to one id per feature
    positions: Tensor         # (3, L) on the CPU
    features: list[Tensor]    # one (rows, cols, H) tensor per image, in reading order
    prefix_len: int           # ids before the first image: equal for all decisions of a walk

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


class Rollout(NamedTuple):
    """N = B*G answers. The ids end in <|im_end|> unless they were cut off; the texts lack it."""
    completion_ids: Tensor    # (N, C)
    completion_mask: Tensor   # (N, C) bool
    texts: list[str]
    passes: int               # decoder passes after the prompt


def forced_tokens(node: dict) -> tuple[list[int], dict]:
    """The tokens that follow a node of a tree {token: node} without a fork, and the node there."""
    tokens = []
    while len(node) == 1:
        (token, node), = node.items()
        tokens.append(token)
    return tokens, node


def accept(drawn: list[list[int]], proposals: list[list[int]], answers: list[list[int]],
           done: list[bool], end_token: int, limit: int) -> Tensor:
    """Extend the answers by what was drawn, up to the first token that differs from its proposal,
    that one included -> kept (N, K + 1) bool: which of the tokens just run belong to an answer.

    Column 0 is the last token of the answer so far, columns 1.. are the proposed ones.
    """
    kept = torch.ones(len(answers), len(drawn[0]), dtype=torch.bool)
    for i, answer in enumerate(answers):
        if done[i]:
            kept[i] = False              # a finished row runs along with the others and is ignored
            continue
        for j, token in enumerate(drawn[i][:len(proposals[i]) + 1]):
            answer.append(token)
            done[i] = token == end_token or len(answer) == limit
            if done[i] or j == len(proposals[i]) or token != proposals[i][j]:
                break
        kept[i, 1 + j:] = False
    return kept


class Policy(Qwen):
    """A Qwen2-VL model, its tokenizer and its navigation contract.

    files: {name: bytes} of the folder it was loaded from (KEPT_FILES), for save_policy().
    """

    default_contract, max_horizon = CONTRACT, 8     # _answer_texts() lists all plans there are
    whole_walks = False                         # is a training example a whole walk?
    val_metrics = ("loss", "first_action_acc", "exact_match")     # of validate()

    def __init__(self, model, tokenizer, contract: dict, files: dict | None = None):
        files = files or {}
        processor = image_processor(files, model.config.vision_config)
        super().__init__(model, processor["image_mean"], processor["image_std"])
        self.tokenizer, self.files, self.processor = tokenizer, files, processor
        self.nan_logits = False          # was a sampled token's distribution not finite?
        self.set_contract(contract)
        token = tokenizer.convert_tokens_to_ids
        self.image_token, self.end_token = token("<|image_pad|>"), token("<|im_end|>")
        # The policy may not write image tokens: these ids have probability zero in sampling and in
        # the log-probabilities alike, so the two are one distribution.
        self.banned = [token(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
                                          "<|vision_end|>", "<|vision_pad|>")
                       if token(t) is not None and token(t) != tokenizer.unk_token_id]
        self._token_cache = {}                                  # text piece -> ids
        self._chat_parts = None                                 # the chat template around a text

    def set_contract(self, contract: dict):
        """Set the navigation contract (turn angle, step length, horizon ..)."""
        self.contract = contract
        self.phrases = action_phrases(contract["turn_deg"], contract["forward_m"])
        self._grammar = None                                    # built when first needed

    # ------------------------------------------------------------ text and frames -> tokens

    def encode_frames(self, frames: list[np.ndarray]) -> list[Tensor]:
        """uint8 (H, W, 3) arrays, of any sizes -> (rows, cols, H) tensors, differentiable."""
        return self.encode([resize(np.asarray(f), self.contract) for f in frames])

    def _encode(self, text: str) -> list[int]:
        if text not in self._token_cache:
            if len(self._token_cache) > 50_000:
                self._token_cache.clear()
            self._token_cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._token_cache[text]

    def text(self, ids: list[int]) -> str:
        """The text of an answer, without the end mark."""
        return self.tokenizer.decode(ids[:-1] if ids[-1:] == [self.end_token] else ids)

    def prompt(self, text: str, features: list[Tensor], before: tuple = ()) -> Prompt:
        """One user turn and the opening of the answer, in the model's own chat template.

        text: with one <image> per tensor in features [(rows, cols, H)]
        before: earlier messages of the chat, ((role, text), ..); their <image> come first.
        """
        chat = self._chat(text, before).replace("<image>",
                                                "<|vision_start|><|image_pad|><|vision_end|>")
        pieces = chat.split("<|image_pad|>")                    # special tokens split cleanly
        if len(pieces) != len(features) + 1:
            raise UserError(f"the prompt has {len(pieces) - 1} <image> placeholders for "
                            f"{len(features)} frames; make them agree")
        return self._assemble(pieces, features)

    def _assemble(self, pieces: list[str], features: list[Tensor]) -> Prompt:
        """Texts with a frame between each two -> Prompt, its positions from 0."""
        ids = list(self._encode(pieces[0]))
        prefix_len, runs = len(ids), [len(ids)]
        for feature, piece in zip(features, pieces[1:]):
            words = self._encode(piece)
            runs += [tuple(feature.shape[:2]), len(words)]
            ids += [self.image_token] * (feature.shape[0] * feature.shape[1]) + words
        return Prompt(ids, mrope_positions(tuple(runs)), features, prefix_len)

    def _render(self, messages) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages], tokenize=False,
            add_generation_prompt=True)

    def _chat(self, text: str, before: tuple = ()) -> str:
        """The chat template around a text. It is rendered once and filled in, for it is slow; with
        earlier messages, which differ from record to record, it is rendered each time."""
        if before:
            return self._render((*before, ("user", text)))
        if self._chat_parts is None:
            self._chat_parts = self._template_parts()
        return self._chat_parts[0] + text + self._chat_parts[1]

    def _template_parts(self) -> list[str]:
        """The chat template's text before and after a user's. ValueError if it has no such two."""
        parts = self._render([("user", "\x00")]).split("\x00")
        if len(parts) != 2 or "<|im_start|>" not in parts[1]:
            raise ValueError("it does not show a user's text once and open the answer")
        return parts

    def answers(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> completion_ids, completion_mask (N, C), each closed by <|im_end|>."""
        ids, mask = self._padded([self._encode(text) + [self.end_token] for text in texts])
        return ids.to(self.device), mask.to(self.device)

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids -> ids, mask (N, C), padded on the right."""
        ids = torch.full((len(rows), max(map(len, rows))), self.end_token)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = True
        return ids, mask

    def instruction_prompt(self, instruction: str, n_history: int) -> str:
        return window_prompt(instruction, n_history, self.contract)

    def build_prompts(self, decisions: list, frames: dict) -> list[Prompt]:
        """One Prompt per decision (make_data.Decision: its frames are keys, the current one last).

        frames: {key: uint8 (H, W, 3), or features that encode_frames made}; each is encoded once.
        """
        new = [key for key, frame in frames.items() if not torch.is_tensor(frame)]
        features = {**frames, **dict(zip(new, self.encode_frames([frames[key] for key in new])))}
        return [self.prompt(d.prompt or self.instruction_prompt(d.instruction, len(d.frames) - 1),
                            [features[key] for key in d.frames], d.before) for d in decisions]

    # ------------------------------------------------------------ prompts -> hidden states

    def _prefill_shared_prefix(self, prompts: list[Prompt]) -> Cache:
        """Run the words that prompts begin with, each distinct text once -> Cache with B rows.

        This is exact: with causal attention nothing later changes them. It is done even when no two
        prompts begin alike: under ZeRO-3 every pass is a collective, so the number of passes may
        not depend on what a rank happens to have drawn.
        """
        texts = [tuple(p.ids[:p.prefix_len]) for p in prompts]
        unique = list(dict.fromkeys(texts))
        first = [prompts[texts.index(text)] for text in unique]
        _, cache = self._forward_padded([Segment(p.ids[:p.prefix_len],
                                                 p.positions[:, :p.prefix_len], [])
                                         for p in first])
        return cache.rows(torch.tensor([unique.index(text) for text in texts], device=self.device))

    def _prefill(self, prompts: list[Prompt]) -> tuple[Tensor, Cache]:
        """Run whole prompts -> hidden state of each one's last token (B, H), Cache of B rows."""
        suffixes = [self._suffix(p, p.prefix_len) for p in prompts]
        hidden, cache = self._forward_padded(suffixes, self._prefill_shared_prefix(prompts),
                                             [p.prefix_len for p in prompts])
        return hidden[range(len(suffixes)), [len(s.ids) - 1 for s in suffixes]], cache

    def _suffix(self, prompt: Prompt, cut: int, answer: list[int] = ()) -> Segment:
        """The part of a prompt after its first `cut` ids, followed by answer ids."""
        after = prompt.next_position + torch.arange(len(answer))
        where = torch.cat((prompt.positions[:, cut:], after.expand(3, -1)), dim=1)
        return Segment(prompt.ids[cut:] + list(answer), where,
                       prompt.features if cut < len(prompt.ids) else [])

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """hidden (..., H) -> fp32 logits (..., V), vision tokens at minus infinity."""
        logits = self.model.lm_head(hidden).float() / temperature
        self._count_flops(2 * logits.numel() * hidden.shape[-1])
        logits[..., self.banned] = -math.inf
        return logits

    def _token_logps(self, hidden: Tensor, tokens: Tensor, temperature: float):
        """hidden (X, H), tokens (X,) -> log p of each token (X,), logits (X, V)."""
        logits = self._logits(hidden, temperature)
        return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=1), logits

    # ------------------------------------------------------------ training: log-probabilities

    def forward(self, decisions: list, frames: dict, *rest, **named) -> Tensor:
        """build_prompts() and logps() in one call: under ZeRO-3 the weights are only there in it.

        decisions, frames, completion_ids, completion_mask, group_size, temperature
        """
        return self.logps(self.build_prompts(decisions, frames), *rest, **named)

    def sample_with_logps(self, decisions: list, frames: dict, group_size: int,
                          temperature: float, seeds: list[int]) -> tuple[Rollout, Tensor]:
        """build_prompts(), generate(), and logps() of what was sampled -> Rollout, logps (B*G, C).

        The prompts are run once for both: what is sampled from is what is differentiated.
        """
        prompts = self.build_prompts(decisions, frames)
        prefill = self._prefill(prompts)
        rollout = self.generate(prompts, group_size, temperature, seeds, prefill=prefill)
        return rollout, self.logps(prompts, rollout.completion_ids, rollout.completion_mask,
                                   group_size, temperature, prefill)

    def logps(self, prompts: list[Prompt], completion_ids: Tensor, completion_mask: Tensor,
              group_size: int = 1, temperature: float = 1.0, prefill: tuple | None = None
              ) -> Tensor:
        """log p(answer token | everything before it), at answer positions only.

        prompts: B Prompts; completion_ids, completion_mask (B*G, C), siblings adjacent, padded on
        the right -> logps (B*G, C) fp32, differentiable, 0 where masked.
        The distribution is the one generate() samples from: same temperature, same banned ids.
        prefill: _prefill(prompts), if the prompts have been run already.
        """
        lengths = completion_mask.sum(dim=1).tolist()
        ids = [row[:n] for row, n in zip(completion_ids.tolist(), lengths)]
        # The hidden state BEFORE a token predicts it, so an answer's last token is never run, and
        # start[i] is the column of hidden (N, columns, H) that predicts the first token of row i.
        if group_size == 1 and prefill is None:      # prompt and answer in one row
            hidden, start = self._hidden_of_rows(prompts, ids)
        else:                                        # the prompt once, its G answers over its cache
            hidden = self._hidden_of_groups(prompts, ids, group_size, prefill)
            start = [0] * len(ids)
        column = torch.arange(completion_ids.shape[1], device=self.device)
        where = torch.tensor(start, device=self.device)[:, None] + column              # (N, C)
        row = torch.arange(len(ids), device=self.device)[:, None].expand_as(where)
        picked = completion_mask.nonzero(as_tuple=True)        # rows and columns of the X tokens
        logps, _ = self._token_logps(hidden[row[picked], where[picked]], completion_ids[picked],
                                     temperature)
        out = torch.zeros(completion_ids.shape, device=self.device)
        return out.index_put(picked, logps)

    def _hidden_of_rows(self, prompts, ids) -> tuple[Tensor, list[int]]:
        """Each prompt with its answer behind it, over the shared prefixes -> hidden, start."""
        tails = [self._suffix(p, p.prefix_len, answer[:-1]) for p, answer in zip(prompts, ids)]
        hidden, _ = self._forward_padded(tails, self._prefill_shared_prefix(prompts),
                                         [p.prefix_len for p in prompts])
        return hidden, [len(tail.ids) - max(len(answer) - 1, 0) - 1
                        for tail, answer in zip(tails, ids)]

    def _hidden_of_groups(self, prompts, ids, group_size, prefill) -> Tensor:
        """Column 0 is the prompt's last hidden state, the same for its G rows; the answers' tokens
        follow, run over the prompt's keys and values."""
        last, cache = prefill or self._prefill(prompts)
        siblings = torch.arange(len(prompts), device=self.device).repeat_interleave(group_size)
        owners = [prompts[i // group_size] for i in range(len(ids))]
        answers = [self._suffix(p, len(p.ids), a[:-1]) for p, a in zip(owners, ids)]
        dummy = Segment([self.end_token], torch.zeros(3, 1), [])  # for an answer of one token
        hidden, _ = self._forward_padded([a if a.ids else dummy for a in answers],
                                         cache.siblings(group_size), [len(p.ids) for p in owners])
        return torch.cat((last[siblings][:, None], hidden), dim=1)

    # ------------------------------------------------------------ sampling

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], group_size: int = 1, temperature: float = 0.0,
                 seeds: list[int] | None = None, draft: bool = True,
                 max_new_tokens: int = MAX_ANSWER_TOKENS, prefill: tuple | None = None) -> Rollout:
        """Sample G answers per prompt (temperature 0: the most likely one).

        seeds: one int per prompt; the j-th token of an answer is drawn with the j-th number of its
        own stream, so an answer depends on its prompt and seed, never on the batch around it.
        draft: after "A" only ". Move forward 25 cm" is a plan, so those tokens are proposed and
        checked in one pass. At each proposed place the policy draws its own token from its own
        distribution; the first that differs from the proposal ends it, and stands. That is
        sampling, token for token: the proposal only decides how many tokens a pass may yield.
        """
        hidden, cache = prefill or self._prefill(prompts)
        cache = cache.detach()                       # a prefill may be differentiated later
        answers, _, passes = self._decode_loop(
            hidden, cache.siblings(group_size), [p.next_position for p in prompts],
            [len(p.ids) for p in prompts], group_size, temperature, seeds, draft, max_new_tokens)
        ids, mask = self._padded(answers)
        texts = [self.text(answer) for answer in answers]
        return Rollout(ids.to(self.device), mask.to(self.device), texts, passes)

    def _decode_loop(self, hidden: Tensor, cache: Cache, start: list[int], before: list[int],
                     group_size: int, temperature: float, seeds: list[int] | None, draft: bool,
                     max_new_tokens: int) -> tuple[list[list[int]], Cache, int]:
        """G answers after each of B prompts -> ids (B*G lists), Cache, number of decoder passes.

        hidden (B, H): the prompts' last states; start, before: their next positions and lengths;
        cache: of B*G rows. The Cache returned has read all but the last id of each answer.
        """
        siblings = torch.arange(len(start), device=self.device).repeat_interleave(group_size)
        hidden = hidden[siblings][:, None]                                             # (N, 1, H)
        uniforms = self._uniforms(seeds, len(start), group_size, max_new_tokens, temperature)
        start = torch.tensor(start).repeat_interleave(group_size)
        answers, done, passes = [[] for _ in start], [False] * len(start), 0
        proposals = [[] for _ in start]
        while True:
            # 1. Draw one token at every place that was run: (N, K + 1) for K proposed tokens. The
            #    state at place j has seen the first j proposed tokens, so its draw is a sample of
            #    the policy as long as those were drawn as well; accept() stops where they differ.
            logits = self._logits(hidden, temperature or 1.0)                          # (N, K+1, V)
            drawn = self._sample(logits, uniforms, [len(a) for a in answers], proposals)
            kept = accept(drawn, proposals, answers, done, self.end_token, max_new_tokens)
            if passes:
                # 2. Hide the keys of rejected tokens. They stay in the cache as padding, and the
                #    next token's position comes from the answer's length, not from the cache.
                old = torch.ones(len(answers), cache.valid.shape[1] - kept.shape[1],
                                 dtype=torch.bool)
                cache = cache.drop(torch.cat((old, kept), dim=1).to(self.device))
            if all(done):
                return answers, cache, passes
            # 3. Propose the tokens that the grammar forces, and run them with the last token.
            proposals = [self.draft(a)[:max(max_new_tokens - len(a) - 1, 0)] if draft and not d
                         else [] for a, d in zip(answers, done)]
            segments = [Segment([a[-1]] + p, (start[i] + len(a) - 1 + torch.arange(1 + len(p)))
                                .expand(3, -1), [])
                        for i, (a, p) in enumerate(zip(answers, proposals))]
            hidden, cache = self._forward_padded(segments, cache, [
                before[i // group_size] + len(a) - 1 for i, a in enumerate(answers)])
            passes += 1

    def _uniforms(self, seeds, n_prompts, group_size, length, temperature) -> Tensor | None:
        """Uniform numbers (B*G, length) from each prompt's own stream; None if greedy."""
        if temperature == 0:
            return None
        seeds = seeds if seeds is not None else torch.randint(2 ** 62, (n_prompts,)).tolist()
        return torch.cat([torch.rand(group_size, length, dtype=torch.float64,
                                     generator=torch.Generator().manual_seed(seed))
                          for seed in seeds])

    def _sample(self, logits, uniforms, lengths, proposals) -> list[list[int]]:
        """One token per row and place: argmax, or the inverse of the distribution function.

        Where the logits are not finite any token is returned and nan_logits is set: a rank that
        raised here would leave the others waiting. The caller reads the flag.
        """
        self.nan_logits |= not bool(logits.amax(dim=-1).isfinite().all())
        if uniforms is None:
            return logits.argmax(dim=-1).tolist()
        cdf = logits.double().softmax(dim=-1).cumsum(dim=-1)                           # (N, K+1, V)
        place = torch.tensor(lengths)[:, None] + torch.arange(logits.shape[1])         # in answer
        u = uniforms.gather(1, place.clamp(max=uniforms.shape[1] - 1)).to(self.device)
        return torch.searchsorted(cdf, (u * cdf[..., -1])[..., None], right=True
                                  ).squeeze(-1).clamp(max=logits.shape[-1] - 1).tolist()

    def draft(self, answer: list[int], guess: int = 8) -> list[int]:
        """The tokens that must follow `answer` if it is to become a plan; often none.

        The grammar is the set of all valid answers, tokenized once into a tree: where the tree does
        not fork, the next token is forced. At a fork the guess is that the last action is repeated,
        for up to `guess` tokens: robots mostly do, and a wrong guess costs little. An answer that
        has left the tree is found again where it looks like the second action of a plan. It is no
        plan any more, but it will go on in phrases, and without a draft this one row would keep its
        whole batch waiting.
        """
        if self._grammar is None:
            self._grammar = self._build_grammar()
            ends = [forced_tokens(first)[1] for first in self._grammar.values()]
            self._second = next((node for node in ends if node), {})        # behind a first action
        node, last = self._grammar, None         # last: which branch was taken at the last fork
        for token in answer:
            before, node = node, node.get(token) or self._second.get(token) or {}
            if len(before) > 1 and token in before:
                last = list(before).index(token)
        tokens, node = forced_tokens(node)
        most = len(tokens) + guess
        while last is not None and len(node) > last and len(tokens) < most:
            token = list(node)[last]
            more, node = forced_tokens(node[token])
            tokens += [token, *more]
        return tokens[:most]

    def _build_grammar(self) -> dict:
        """All valid answers as a tree of tokens, {token: {token: ..}}."""
        root = {}
        for text in self._answer_texts():
            node = root
            for token in self._encode(text) + [self.end_token]:
                node = node.setdefault(token, {})
        return root

    def _answer_texts(self) -> list[str]:
        """All plans of `horizon` actions in which only stops follow a stop."""
        plans = [[]]
        for _ in range(self.contract["horizon"]):
            plans = [plan + [a] for plan in plans for a in (
                [STOP] if plan[-1:] == [STOP] else sorted(self.phrases))]
        return [write_plan(plan, self.phrases) for plan in plans]

    # ------------------------------------------------------------ what the scripts ask of a policy

    def load_batch(self, data, units: list, vary_turns: bool = False) -> tuple[list, dict]:
        """sft.py's units [(episode, (t, ..)), ..] -> decisions, {frame key: uint8 (H, W, 3)}."""
        decisions = [data.decision(episode, t, self.contract)
                     for episode, steps in units for t in steps]
        return decisions, self.load_frames(data, decisions)

    def load_frames(self, data, examples: list) -> dict:
        return {key: resize(data.frame(key), self.contract) for e in examples for key in e.frames}

    def tokenize_answers(self, decisions: list) -> list:
        """Examples as token_counts() and model_inputs() take them. (Dialogs need their ids.)"""
        return decisions

    def tokenize_targets(self, decisions: list) -> tuple[Tensor, Tensor]:
        return self.answers([d.answer or write_plan(d.plan, self.phrases) for d in decisions])

    def model_inputs(self, decisions: list, frames: dict) -> tuple[tuple, Tensor]:
        """-> the inputs of forward() for the expert's answers, and the mask (N, C) of its loss."""
        ids, mask = self.tokenize_targets(decisions)
        return (decisions, frames, ids, mask), mask

    def validate(self, decisions: list, frames: dict) -> list[tuple[float, float]]:
        """(sum, count) of each of val_metrics: the loss, and greedy plans against the expert's
        (the first action, all of them)."""
        prompts = self.build_prompts(decisions, frames)
        ids, mask = self.tokenize_targets(decisions)
        loss = -self.logps(prompts, ids, mask).sum().item()
        plans = [parse_plan(text, self.phrases, self.contract["horizon"])
                 for text in self.generate(prompts).texts]
        right = [[a == b for a, b in zip(plan, d.plan)] for plan, d in zip(plans, decisions)]
        return [(loss, mask.sum().item()), (sum(r[0] for r in right if r), len(right)),
                (sum(map(all, right)), len(right))]

    def token_counts(self, decisions: list, frames: dict, group_size: int = 1) -> list[int]:
        """Tokens of each decision with its answers. frames: as load_batch() made them, or features.
        """
        answer = len(self._encode(write_plan([1] * self.contract["horizon"], self.phrases))) + 1
        return [len(p.ids) + group_size * answer
                for p in self.build_prompts(decisions, self._blank_features(frames))]

    def _blank_features(self, frames: dict) -> dict:
        """Features of the right shape and no numbers: enough to count tokens."""
        return {key: f if torch.is_tensor(f) else torch.empty(*(x // 28 for x in f.shape[:2]), 0)
                for key, f in frames.items()}

    def activations(self, decisions: list, frames: dict, *rest, **named) -> float:
        """Bytes that a forward pass keeps for its backward pass, estimated. rest: token_counts's"""
        patches = sum(f.shape[0] * f.shape[1] // 14 ** 2 for f in frames.values())
        trains = next(self.vision.parameters()).requires_grad
        tokens = sum(self.token_counts(decisions, frames, *rest, **named))
        return activation_bytes(self.model.config, tokens, patches * trains, self.dtype.itemsize,
                                self.checkpointing)

    def walk_lengths(self, data, vary_turns: bool = False) -> list[tuple[str, int]]:
        """The longest example of a VLN-Ego folder -> [(name of its episode, tokens)]: the longest
        instruction with as many frames as the memory keeps."""
        wordy = max(range(len(data.episodes)), key=lambda i: len(data.episodes[i]["instruction"]))
        decision = data.decision(wordy, data.steps(wordy)[0], self.contract)
        decision = decision._replace(frames=tuple(range(self.contract["memory"]["budget"] + 1)))
        return self._named_lengths(data, [wordy], [decision])

    def _named_lengths(self, data, indices: list[int], examples: list) -> list[tuple[str, int]]:
        frame = self._blank_frame(self.contract["height"] or 480, self.contract["width"] or 640)
        counts = self.token_counts(examples, {key: frame for e in examples for key in e.frames})
        return [(f"episode {data.episodes[i].get('episode_id', i)}", count)
                for i, count in zip(indices, counts)]

    def _blank_frame(self, height: int, width: int) -> Tensor:
        h, w = fit_pixels(height, width, self.contract["min_pixels"], self.contract["max_pixels"])
        return torch.empty(h // 28, w // 28, 0)

    def longest_prompt(self, height: int, width: int) -> Prompt:
        """The longest prompt of a one-word instruction: with all the frames that memory can hold.
        height, width: of the camera."""
        past = max(len(pick_frames(t, **self.contract["memory"])) for t in range(500))
        return self.prompt(self.instruction_prompt("x", past),
                           [self._blank_frame(height, width)] * (past + 1))

    def agent(self, execute: int = 3, malformed: str = "stop", blank: bool = False,
              temperature: float = 0.0, seed: int = 0) -> Callable:
        """evaluate.py's agent(walks) -> plans: encode, remember, write, read.

        execute: actions of a plan that are carried out; malformed: "stop" or "forward", what an
        unreadable answer makes the robot do; blank: show black frames.
        """
        @torch.no_grad()
        def decide(walks):
            # 1. encode: a frame once, all robots' new ones in one call
            new = [(walk, frame) for walk in walks for frame in walk.frames]
            frames = [np.zeros_like(frame) if blank else frame for _, frame in new]
            for (walk, _), feature in zip(new, self.encode_frames(frames)):
                walk.features.append(feature)
            # 2. remember
            prompts = []
            for walk in walks:
                t = len(walk.features) - 1
                past = pick_frames(t, **self.contract["memory"])
                prompts.append(self.prompt(self.instruction_prompt(walk.instruction, len(past)),
                                           [walk.features[i] for i in (*past, t)]))
            # 3. write
            seeds = [random.Random(f"{seed} {walk.name} {len(walk.actions)}").getrandbits(32)
                     for walk in walks] if temperature > 0 else None
            rollout = self.generate(prompts, temperature=temperature, seeds=seeds, draft=True)
            # 4. read
            plans = [parse_control(text, self.phrases) for text in rollout.texts]
            for walk, prompt, text, plan, mask in zip(walks, prompts, rollout.texts, plans,
                                                      rollout.completion_mask):
                walk.tokens += len(prompt.ids) + int(mask.sum())
                walk.add_decision(text, plan)
            return [plan[:execute] or [STOP if malformed == "stop" else FORWARD] for plan in plans]
        return decide

    @classmethod
    def tiny_corpus(cls, texts: list[str], contract: dict) -> tuple[list[str], list[str]]:
        """Prompts and answers from which tiny's tokenizer is learned."""
        phrases = action_phrases(contract["turn_deg"], contract["forward_m"])
        return ([window_prompt(text, 0, contract) for text in texts],
                [write_plan([a, a], phrases) for a in sorted(phrases)])


# ---------------------------------------------------------------- disk

# What a checkpoint brings besides its weights and config.json, and takes along when it is saved.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "chat_template.json",
                   "chat_template.jinja")
KEPT_FILES = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json",
              "generation_config.json")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def load_policy(name: str, contract: dict | None = None, device: str = "cpu",
                dtype: str = "float32", texts: list[str] | None = None, seed: int = 0,
                replace_contract: bool = False, atomic_patterns: list[str] | None = None
                ) -> Policy:
    """A folder, a hub id, a short name of HUB_NAMES, or "tiny" (built from `texts`) -> Policy.

    contract: for a model that has none; otherwise the checkpoint's own nav.json is used, unless
    replace_contract. texts, atomic_patterns: of tiny's tokenizer.
    UserError when the weights are not there, not whole, not finite, or need another forward pass.
    """
    if name == "tiny":
        patterns = ATOMIC_PATTERNS if atomic_patterns is None else atomic_patterns
        tiny = build_tiny(texts or [], contract or CONTRACT, seed, patterns)
        return tiny.to(device, getattr(torch, dtype))
    from transformers import AutoTokenizer
    source = name if os.path.isdir(name) else HUB_NAMES.get(name, name)
    try:
        model = load_model(source, getattr(torch, dtype))
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
    own = read_contract(source, stored) if stored else None
    contract = contract if replace_contract and contract else own or contract or CONTRACT
    policy = policy_class(contract["prompt"])(
        model.to(device), tokenizer, contract,
        {file: content for file, content in files.items() if content is not None})
    check_template(policy, source)
    return policy


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


def read_contract(source: str, content: bytes) -> dict:
    """The bytes of nav.json -> dict, complete and of a version that this code has."""
    path = os.path.join(source, "nav.json")
    contract = read_object(path, content)
    for key, known in (("version", [CONTRACT["version"]]), ("prompt", list(POLICIES))):
        if contract.get(key) not in known:
            raise UserError(f"{path}: {key} is {contract.get(key)!r} and this code speaks "
                            f"{known[0]!r}; run the code that trained it, or train again")
    for key, like in policy_class(contract["prompt"]).default_contract.items():
        value = contract.get(key)
        if not (is_like(value, like) or value is None and key in contract and key in NULLABLE):
            raise UserError(f"{path}: {key} is {value!r} and should be like {like!r}; copy "
                            "nav.json again from the checkpoint")
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
    policy.model.save_pretrained(temporary, state_dict=state_dict)
    if "tokenizer_config.json" not in policy.files:
        policy.tokenizer.save_pretrained(temporary)
    for file, content in policy.files.items():
        if file != "processor_config.json":       # its picture settings would outrank those below
            with open(os.path.join(temporary, file), "wb") as f:
                f.write(content)
    pixels = {key: policy.contract[key] for key in ("min_pixels", "max_pixels")}
    processor = {**policy.processor, **pixels, "size": {
        "shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}}
    for file, content in (("preprocessor_config.json", processor), ("nav.json", policy.contract)):
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



def for_version_4(config: dict) -> dict:
    """config.json of transformers 5, with the keys of version 4 beside its own: version
    4 does not read rope_parameters, and silently takes 1e6 for rope_theta."""
    text = config["text_config"]
    rope = text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default",
                            "mrope_section": rope["mrope_section"]}
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
    r"[A-D]\. [^,.\n<]+(?:, )?", r"You are a helpful assistant\.",
    r"(?:move forward|turn left|turn right) [\d.]+ (?:cm|degrees)(?:, )?",
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


def build_tiny(texts: list[str], contract: dict, seed: int, atomic_patterns: list[str]) -> Policy:
    """Qwen2-VL's classes at 1/2000 of the size, random weights, deterministic from the seed."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    tokenizer = tiny_tokenizer(texts, contract, atomic_patterns)
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
            # A few dozen positions, not thousands: the slow bands encode columns and must turn.
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
    return policy_class(contract["prompt"])(model, tokenizer, contract)
