"""
The policy: a Qwen-VL model as a robot that reads an instruction, looks, and writes six actions.

The forward pass is qwen.py's. Here is what makes it a policy: the navigation contract, the prompt,
its tokens, log-probabilities of given answers (training) and sampled answers (acting). What prompts
have in common is run once, a prompt is run once for its G answers, and the vocabulary is multiplied
only where an answer stands. tests/test_model.py compares all of it with transformers' tokenizer,
image processor, positions, logits and generate(). Folders are checkpoint.py's.

Read it in this order
    prompt     instruction and frames -> text with <image> placeholders    window_prompt
    tokens     text and features -> ids and 3-D positions                  Policy.prompt
    training   log-probability of given answers                            Policy.logps
    sampling   answers, drafted by the plan grammar and verified           Policy.generate
    acting     the agent that evaluate.py runs                             Policy.agent

Shapes     B prompts, G answers each, N = B*G rows (siblings adjacent), T new tokens, P cached
           tokens, C answer tokens, H hidden size, V vocabulary

The contract's prompt decides which class a policy is (policy_class): ActiveVLN's dialogs and
GPT4Scene's questions are subclasses.

[1] Qwen2-VL, https://arxiv.org/abs/2409.12191      [2] VLN-R1, https://arxiv.org/abs/2506.17221
"""
from __future__ import annotations

import importlib
import math
import random
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cli import UserError
from costs import activation_bytes
from decoding import AnswerTree, FixedPasses, accept, draw_tokens, next_segments, uniform_numbers
from lsm import pick_frames
from qwen import COMMON, HIDDEN, Cache, Qwen, Segment, fit_pixels, mrope_positions
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
POLICIES = {"window-1": ("model", "Policy"), "dialog-1": ("activevln.dialog", "DialogPolicy"),
            "dialog-words-1": ("activevln.released", "WordedPolicy"),
            "chat-1": ("gpt4scene.chat", "ChatPolicy")}


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
    features: list[Tensor]    # one tensor per image (Qwen.encode), in reading order
    prefix_len: int           # ids before the first image: equal for all decisions of a walk

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


class TokenStats(NamedTuple):
    """Of the tokens of N answers, each (N, C), 0 where an answer has no more."""
    logps: Tensor             # fp32, differentiable
    likeliest: Tensor         # bool: is the token the likeliest at its place?
    entropy: Tensor           # of the whole distribution at its place, in nats, no gradient


class Rollout(NamedTuple):
    """N = B*G answers. The ids end in <|im_end|> unless they were cut off; the texts lack it."""
    completion_ids: Tensor    # (N, C)
    completion_mask: Tensor   # (N, C) bool
    texts: list[str]
    passes: int               # decoder passes after the prompt


class Policy(Qwen):
    """A Qwen-VL model, its tokenizer and its navigation contract.

    processor: the settings of its image processor; files: {name: bytes} of the folder it was
    loaded from. Both are for save_policy(), and the sizes and colours of pictures for Qwen.
    """

    default_contract, max_horizon = CONTRACT, 8     # _answer_texts() lists all plans there are
    whole_walks = False                         # is a training example a whole walk?
    opening = ()                                # messages before the first user's, ((role, text), )
    val_metrics = ("loss", "first_action_acc", "exact_match")     # of validate()

    def __init__(self, model, tokenizer, contract: dict, processor: dict,
                 files: dict | None = None):
        super().__init__(model, processor)
        self.tokenizer, self.processor, self.files = tokenizer, processor, files or {}
        self.nan_logits = False          # was a sampled token's distribution not finite?
        self.set_contract(contract)
        token = tokenizer.convert_tokens_to_ids
        self.image_token, self.end_token = token("<|image_pad|>"), token("<|im_end|>")
        # The policy may not write image tokens: these ids have probability zero in sampling and in
        # the log-probabilities alike, so the two are one distribution. A list of them as well, for
        # a policy without weights, of which a server is told.
        self.banned_ids = [token(t) for t in ("<|image_pad|>", "<|video_pad|>",
                                              "<|vision_start|>", "<|vision_end|>",
                                              "<|vision_pad|>")
                           if token(t) is not None and token(t) != tokenizer.unk_token_id]
        self.register_buffer("banned", torch.tensor(self.banned_ids, dtype=torch.long),
                             persistent=False)
        self._token_cache = {}                                  # text piece -> ids
        self._chat_parts = None                                 # the chat template around a text

    def set_contract(self, contract: dict):
        """Set the navigation contract (turn angle, step length, horizon ..)."""
        self.contract = contract
        self.phrases = action_phrases(contract["turn_deg"], contract["forward_m"])
        self._grammar = None                                    # built when first needed

    # ------------------------------------------------------------ text and frames -> tokens

    def fit_pixels(self, height: int, width: int) -> tuple[int, int]:
        """The size at which this model sees a frame, within the contract's budget."""
        return fit_pixels(height, width, self.contract["min_pixels"], self.contract["max_pixels"],
                          self.image_format.factor)

    def resize(self, frame: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (h, w, 3) as this model sees it."""
        h, w = self.fit_pixels(*frame.shape[:2])
        if frame.shape[:2] == (h, w):
            return np.ascontiguousarray(frame)
        return np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC))

    def encode_frames(self, frames: list[np.ndarray]) -> list[Tensor]:
        """uint8 (H, W, 3) arrays, of any sizes -> features (Qwen.encode), differentiable."""
        return self.encode([self.resize(np.asarray(f)) for f in frames])

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

        text: with one <image> per tensor in features (Qwen.encode)
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
        return Prompt(ids, mrope_positions(tuple(runs)), features, min(prefix_len, len(ids) - 1))

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
        parts = self._render([*self.opening, ("user", "\x00")]).split("\x00")
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

    def parse(self, text: str) -> list[int]:
        """An answer -> the actions that the robot can carry out; [] if it is unreadable."""
        return parse_control(text, self.phrases)

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
        _, cache = self.decode([Segment(p.ids[:p.prefix_len], p.positions[:, :p.prefix_len], [])
                                for p in first])
        return cache.rows(torch.tensor([unique.index(text) for text in texts], device=self.device))

    def _prefill(self, prompts: list[Prompt]) -> tuple[Tensor, Cache]:
        """Run whole prompts -> hidden state of each one's last token (B, H), Cache of B rows."""
        suffixes = [self._suffix(p, p.prefix_len) for p in prompts]
        hidden, cache = self.decode(suffixes, self._prefill_shared_prefix(prompts),
                                    [p.prefix_len for p in prompts])
        last = torch.tensor([i * hidden.shape[1] + len(s.ids) - 1 for i, s in enumerate(suffixes)],
                            device=self.device)
        return hidden.flatten(0, 1).index_select(0, last), cache

    def _suffix(self, prompt: Prompt, cut: int, answers: list[list[int]] = ()) -> Segment:
        """The part of a prompt after its first `cut` ids; behind it answers to it, each a branch of
        the row. An answer's last token predicts nothing and is left out."""
        ids, positions = prompt.ids[cut:], [prompt.positions[:, cut:]]
        branch = [COMMON] * len(ids)
        for g, answer in enumerate(answers, start=1):
            ids, branch = ids + answer[:-1], branch + [g] * (len(answer) - 1)
            positions.append((prompt.next_position + torch.arange(len(answer) - 1)).expand(3, -1))
        return Segment(ids, torch.cat(positions, dim=1),
                       prompt.features if cut < len(prompt.ids) else [], branch)

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """hidden (X, H) -> fp32 logits (X, V), vision tokens at minus infinity."""
        logits = self.model.lm_head(hidden).float() / temperature
        self._count_flops(2 * logits.numel() * hidden.shape[-1])
        return logits.index_fill(-1, self.banned, -math.inf)

    def _logps_at(self, hidden: Tensor, spots: list[list[tuple]], temperature: float,
                  columns: int | None = None, with_stats: bool = False) -> Tensor | TokenStats:
        """log p of tokens -> logps (R, columns) fp32, 0 where a row has no more; or TokenStats.

        spots: per row of the result [(row, column of hidden (N, T, H), token that it predicts)].
        """
        row, column, token = torch.tensor([spot for some in spots for spot in some]
                                          ).T.to(self.device)
        picked = hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + column)  # (X, H)
        logits = self._logits(picked, temperature)                                     # (X, V)
        logps = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        columns = columns or max(map(len, spots))
        where = torch.tensor([i * columns + j for i, some in enumerate(spots)
                              for j in range(len(some))], device=self.device)

        def rows(x):
            flat = torch.zeros(len(spots) * columns, dtype=x.dtype, device=self.device)
            return flat.index_copy(0, where, x).view(len(spots), columns)
        if not with_stats:
            return rows(logps)
        # In pieces, for the probabilities of all places are as large as their logits.
        entropy = [torch.special.entr(some.softmax(dim=1)).sum(dim=1)
                   for some in logits.detach().split(64)]
        return TokenStats(rows(logps), rows(logits.argmax(dim=1) == token),
                          rows(torch.cat(entropy)))

    # ------------------------------------------------------------ training: log-probabilities

    def forward(self, decisions: list, frames: dict, *rest, **named) -> Tensor | TokenStats:
        """build_prompts() and logps() in one call: under ZeRO-3 the weights are only there in it.

        decisions, frames, completion_ids, completion_mask, group_size, temperature, with_stats
        """
        return self.logps(self.build_prompts(decisions, frames), *rest, **named)

    def sample_with_logps(self, decisions: list, frames: dict, group_size: int,
                          temperature: float, seeds: list[int]) -> tuple[Rollout, TokenStats]:
        """build_prompts(), generate(), and logps() of what was sampled -> Rollout, TokenStats.

        The prompts are run once for both: what is sampled from is what is differentiated.
        """
        prompts = self.build_prompts(decisions, frames)
        prefill = self._prefill(prompts)
        rollout = self.generate(prompts, group_size, temperature, seeds, prefill=prefill)
        return rollout, self.logps(prompts, rollout.completion_ids, rollout.completion_mask,
                                   group_size, temperature, prefill, with_stats=True)

    def logps(self, prompts: list[Prompt], completion_ids: Tensor, completion_mask: Tensor,
              group_size: int = 1, temperature: float = 1.0, prefill: tuple | None = None,
              with_stats: bool = False) -> Tensor | TokenStats:
        """log p(answer token | everything before it), at answer positions only.

        prompts: B Prompts; completion_ids, completion_mask (B*G, C), siblings adjacent, padded on
        the right -> logps (B*G, C) fp32, differentiable, 0 where masked; with_stats: TokenStats.
        The distribution is the one generate() samples from: same temperature, same banned ids.
        prefill: _prefill(prompts), if the prompts have been run already.
        """
        lengths = completion_mask.sum(dim=1).tolist()
        answers = [row[:n] for row, n in zip(completion_ids.tolist(), lengths)]
        groups = [answers[i:i + group_size] for i in range(0, len(answers), group_size)]
        # 1. Run what has not been run: the prompts' tails, and behind each its G answers.
        cuts = [len(p.ids) if prefill else p.prefix_len for p in prompts]
        segments = [self._suffix(*one) for one in zip(prompts, cuts, groups)]
        if not any(segment.ids for segment in segments):      # answers of one token: none to run
            segments = [Segment([self.end_token], torch.zeros(3, 1, dtype=torch.long), [])
                        for _ in prompts]
        last, cache = prefill or (None, self._prefill_shared_prefix(prompts))
        hidden, _ = self.decode(segments, cache, cuts)
        if prefill:
            hidden = torch.cat((last[:, None], hidden), dim=1)
        # 2. The hidden state BEFORE a token predicts it: for an answer's first, the prompt's last.
        spots = []
        for row, (prompt, cut, group) in enumerate(zip(prompts, cuts, groups)):
            first = 0 if prefill else len(prompt.ids) - cut - 1
            column = first + 1
            for answer in group:
                columns = [first, *range(column, column + len(answer) - 1)]
                column += len(answer) - 1
                spots.append([(row, *pair) for pair in zip(columns, answer)])
        return self._logps_at(hidden, spots, temperature, completion_ids.shape[1], with_stats)

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
        answers, _, passes = self._decode_loop(
            hidden, cache.detach(), [p.next_position for p in prompts],     # or it is learned from
            [len(p.ids) for p in prompts], group_size, temperature, seeds, draft, max_new_tokens)
        ids, mask = self._padded(answers)
        texts = [self.text(answer) for answer in answers]
        return Rollout(ids.to(self.device), mask.to(self.device), texts, passes)

    def _decode_loop(self, hidden: Tensor, cache: Cache, start: list[int], before: list[int],
                     group_size: int, temperature: float, seeds: list[int] | None, draft: bool,
                     max_new_tokens: int, top_p: float = 1.0
                     ) -> tuple[list[list[int]], Cache, int]:
        """G answers after each of B prompts -> ids (B*G lists), Cache, number of decoder passes.

        hidden (B, H): the prompts' last states; start, before: their next positions and lengths;
        cache: of B rows. The Cache returned has read all but the last id of each answer: the G of
        a prompt are branches 1 .. G of its row.
        """
        uniforms = uniform_numbers(seeds, len(start), group_size, max_new_tokens, temperature)
        n = len(start) * group_size
        answers, done, passes = [[] for _ in range(n)], [False] * n, 0
        proposals, hidden = [[] for _ in range(n)], hidden[:, None]
        places = [[(i // group_size, 0)] for i in range(n)]   # rows, columns of hidden (B, T, H)
        fixed = (None if self.fixed_passes is None
                 else FixedPasses.over(self, cache, self.fixed_passes))
        while True:
            # 1. Draw one token at each place of an answer that was run: one more than proposed. The
            #    state at place j has seen the first j proposed tokens, so its draw is a sample of
            #    the policy as long as those were drawn as well; accept() stops where they differ.
            drawn = self._sample(hidden, places, temperature, uniforms, [len(a) for a in answers],
                                 top_p)
            accepted = accept(drawn, proposals, answers, done, self.end_token, max_new_tokens)
            if passes:
                # 2. Hide the keys of rejected tokens. They stay in the cache as padding, and the
                #    next token's position comes from the answer's length, not from the cache.
                rejected = [place for some, k in zip(places, accepted) for place in some[k + 1:]]
                row, column = torch.tensor(rejected, dtype=torch.long).view(-1, 2).T.to(self.device)
                cache.branch[row, column - hidden.shape[1]] = HIDDEN       # counted from the end
            if all(done):
                return answers, cache, passes
            # 3. Propose the tokens that the grammar forces, and run them with the last token.
            proposals = [self.draft(a)[:max(max_new_tokens - len(a) - 1, 0)] if draft and not d
                         else [] for a, d in zip(answers, done)]
            segments, places = next_segments(answers, proposals, done, start)
            own = sum(map(len, answers)) / n - 1
            before_each = [length + own for length in before]
            if fixed and fixed.has_room(segments):
                hidden, cache = fixed(segments, before_each)
            else:
                fixed, (hidden, cache) = None, self.decode(segments, cache, before_each)
            passes += 1

    def _sample(self, hidden, places, temperature, uniforms, lengths, top_p=1.0
                ) -> list[list[int]]:
        """One token for each of an answer's places in hidden (B, T, H): argmax, or the inverse of
        the distribution function. lengths: of the answers so far.

        Where the logits are not finite any token is returned and nan_logits is set: a rank that
        raised here would leave the others waiting. The caller reads the flag.
        """
        row, column = torch.tensor([place for some in places for place in some]).T.to(self.device)
        logits = self._logits(hidden[row, column], temperature or 1.0)                 # (X, V)
        # Stays on the device: to read it here would be to wait for the GPU once more a pass.
        self.nan_logits = self.nan_logits | ~logits.amax(dim=-1).isfinite().all()
        u = None
        if uniforms is not None:
            last = uniforms.shape[1] - 1
            u = uniforms[tuple(torch.tensor(
                [(i, min(length + j, last)) for i, (some, length) in enumerate(zip(places, lengths))
                 for j in range(len(some))]).T)].to(self.device)
        tokens = iter(draw_tokens(logits, u, top_p).tolist())
        return [[next(tokens) for _ in some] for some in places]

    def draft(self, answer: list[int], guess: int = 8) -> list[int]:
        """AnswerTree.draft() of all valid answers."""
        if self._grammar is None:
            self._grammar = AnswerTree([self._encode(text) + [self.end_token]
                                        for text in self._answer_texts()])
        return self._grammar.draft(answer, guess)

    def _answer_texts(self) -> list[str]:
        """All plans of `horizon` actions in which only stops follow a stop."""
        plans = [[]]
        for _ in range(self.contract["horizon"]):
            plans = [plan + [a] for plan in plans for a in (
                [STOP] if plan[-1:] == [STOP] else sorted(self.phrases))]
        return [write_plan(plan, self.phrases) for plan in plans]

    # ------------------------------------------------------------ what the scripts ask of a policy

    @staticmethod
    def arrange(data):
        """An opened --data as this policy learns from it."""
        return data

    @staticmethod
    def texts(sources: list) -> list[str]:
        """The data's own words, for tiny's tokenizer."""
        return [e["instruction"].replace("<image>", "") for data in sources for e in data.episodes]

    def load_batch(self, data, units: list, vary_turns: bool = False) -> tuple[list, dict]:
        """sft.py's units [(episode, (t, ..)), ..] -> decisions, {frame key: uint8 (H, W, 3)}."""
        decisions = [data.decision(episode, t, self.contract)
                     for episode, steps in units for t in steps]
        return decisions, self.load_frames(data, decisions)

    def load_frames(self, data, examples: list) -> dict:
        return {key: self.resize(data.frame(key)) for e in examples for key in e.frames}

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
        (the first action, all of them), where the expert's is known."""
        prompts = self.build_prompts(decisions, frames)
        ids, mask = self.tokenize_targets(decisions)
        loss = -self.logps(prompts, ids, mask).sum().item()
        plans = [parse_plan(text, self.phrases, self.contract["horizon"])
                 for text in self.generate(prompts).texts]
        pairs = [(plan, d.plan) for plan, d in zip(plans, decisions) if d.plan]
        first = [ours[0] == expert[0] for ours, expert in pairs if expert[0] is not None]
        exact = [all(a == b for a, b in zip(ours, expert)) for ours, expert in pairs
                 if None not in expert]
        return [(loss, mask.sum().item()), (sum(first), len(first)), (sum(exact), len(exact))]

    def token_counts(self, decisions: list, frames: dict, group_size: int = 1) -> list[int]:
        """Tokens of each decision with its answers. frames: as load_batch() made them, or features.
        """
        answer = self.answer_tokens([None], group_size)
        return [len(p.ids) + answer
                for p in self.build_prompts(decisions, self._blank_features(frames))]

    def answer_tokens(self, decisions: list, group_size: int = 1) -> int:
        """Tokens of all answers to these decisions."""
        plan = write_plan([1] * self.contract["horizon"], self.phrases)
        return len(decisions) * group_size * (len(self._encode(plan)) + 1)

    def _blank_features(self, frames: dict) -> dict:
        """Features of the right shape and no numbers: enough to count tokens."""
        return {key: f if torch.is_tensor(f) else self._blank_frame(*f.shape[:2])
                for key, f in frames.items()}

    def activations(self, decisions: list, frames: dict, *rest, **named) -> float:
        """Bytes that a forward pass keeps for its backward pass, estimated. rest: token_counts's"""
        patches = sum(f.shape[0] * f.shape[1] for f in frames.values()
                      ) // self.image_format.patch ** 2
        trains = self.trains_vision
        tokens = sum(self.token_counts(decisions, frames, *rest, **named))
        return activation_bytes(self.model.config, tokens, patches * trains,
                                self.answer_tokens(decisions, *rest, **named),
                                self.dtype.itemsize, self.checkpointing)

    def walk_lengths(self, data, vary_turns: bool = False) -> list[tuple[str, int]]:
        """The longest example of a VLN-Ego folder -> [(name of its episode, tokens)]: the longest
        instruction with as many frames as the memory keeps."""
        longest = max(range(len(data.episodes)),
                      key=lambda i: len(data.episodes[i]["instruction"]))
        decision = data.decision(longest, data.steps(longest)[0], self.contract)
        decision = decision._replace(frames=tuple(range(self.contract["memory"]["budget"] + 1)))
        return self._named_lengths(data, [longest], [decision])

    def _named_lengths(self, data, indices: list[int], examples: list) -> list[tuple[str, int]]:
        frame = self._blank_frame(self.contract["height"] or 480, self.contract["width"] or 640)
        counts = self.token_counts(examples, {key: frame for e in examples for key in e.frames})
        return [(f"episode {data.episodes[i].get('episode_id', i)}", count)
                for i, count in zip(indices, counts)]

    def _blank_frame(self, height: int, width: int) -> Tensor:
        h, w = (pixels // self.image_format.factor for pixels in self.fit_pixels(height, width))
        return torch.empty(h, w, 0)

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
