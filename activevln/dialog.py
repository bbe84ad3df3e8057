"""
The policy as a conversation: a whole walk is one dialog (ActiveVLN [1]).

The instruction and the first frame are asked once. The answer is up to three moves, each of one to
three equal actions: "move forward 75 cm, turn left 30 degrees"; the next frame follows, and so on.
The conversation is the memory. One forward pass trains whole walks, several to a row, and a cache
that is kept across turns walks them: each turn runs only its new frame and its answer.

Read it in this order
    language   moves <-> text                                    merged_phrases, parse_answer
    data       recorded walks -> dialogs                         merge_walk, DialogPolicy.dialog
    training   log-probabilities of whole dialogs, packed        DialogPolicy.dialog_logps
    acting     the next turn of many dialogs at once             DialogPolicy.generate_turn

Shapes     N dialogs, T tokens of a packed row, C answer tokens, P cached tokens, V vocabulary

sft.py --prompt dialog trains it, activevln/grpo_online.py goes on from there, evaluate.py runs it:
all by the contract's prompt name (model.policy_class). Nothing at the root imports this file.

[1] https://arxiv.org/abs/2509.12618, https://github.com/arvillion/ActiveVLN (the numbers of DIALOG)
"""
from __future__ import annotations

import random
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from model import CONTRACT, Policy, Prompt, clean_instruction
from qwen import COMMON, HIDDEN, Cache, Segment
from reward import FORWARD, LEFT, RIGHT, STOP

# The contract: each turn is answered with up to `horizon` moves of 1 to `merge` equal actions.
DIALOG = {**{key: CONTRACT[key] for key in CONTRACT if key != "memory"},
          "prompt": "dialog-1", "horizon": 3, "merge": 3}
MAX_TURN_TOKENS = 48        # of an answer; three moves are 21 of Qwen's
MOVES = {"forward": "move forward {} cm", "left": "turn left {} degrees",
         "right": "turn right {} degrees", "stop": "stop"}


# ---------------------------------------------------------------- language


def merged_phrases(turn_deg: float, forward_m: float, merge: int = 3, moves: dict = MOVES) -> dict:
    """{(action, how often): its phrase}: 1 to `merge` equal actions in one move.

    >>> list(merged_phrases(15, 0.25, 2).values())     # doctest: +NORMALIZE_WHITESPACE
    ['move forward 25 cm', 'move forward 50 cm', 'turn left 15 degrees', 'turn left 30 degrees',
     'turn right 15 degrees', 'turn right 30 degrees', 'stop']
    """
    sizes = {"forward": (FORWARD, 100 * forward_m), "left": (LEFT, turn_deg),
             "right": (RIGHT, turn_deg)}
    return {**{(action, n): moves[name].replace("{}", f"{round(n * size, 3):g}")
               for name, (action, size) in sizes.items() for n in range(1, merge + 1)},
            (STOP, 1): moves["stop"]}


def contract_phrases(contract: dict) -> dict:
    return merged_phrases(contract["turn_deg"], contract["forward_m"], contract["merge"],
                          contract.get("moves", MOVES))


def parse_answer(text: str, merged: dict, horizon: int) -> list[int]:
    """An answer -> its actions, one by one; [] unless all of it is right.

    merged: merged_phrases(..); at most `horizon` moves, and nothing after a stop. This parser is
    strict in training and in evaluation alike.

    >>> merged = merged_phrases(30, 0.25)
    >>> parse_answer("move forward 75 cm, turn left 30 degrees, stop", merged, 3)
    [1, 1, 1, 2, 0]
    >>> parse_answer("move forward 80 cm", merged, 3), parse_answer("stop, stop", merged, 3)
    ([], [])
    """
    keys_of, slots = {phrase: key for key, phrase in merged.items()}, text.split(", ")
    keys = [keys_of.get(slot) for slot in slots]
    if None in keys or len(keys) > horizon or (STOP, 1) in keys[:-1]:
        return []
    return [action for action, n in keys for _ in range(n)]


def dialog_prompt(instruction: str, contract: dict) -> str:
    """The first turn of a dialog; every later turn is an <image> and nothing else."""
    moves = ", ".join(contract_phrases(contract).values())
    return (f"You are a robot walking through a building. At each view, write your next 1 to "
            f"{contract['horizon']} moves from: {moves}.\n"
            f"Instruction: {clean_instruction(instruction)}\n<image>")


# ---------------------------------------------------------------- data


class Dialog(NamedTuple):
    """A whole walk as one conversation: at each turn a frame, and the answer given to it."""
    instruction: str
    frames: tuple           # keys, one per turn
    answers: tuple          # per turn: its text, or (after tokenize_answers) its token ids
    in_loss: tuple          # per turn: is the answer trained on?


class Turn(NamedTuple):
    """A part of a recorded walk that one answer covers."""
    t: int                  # its first step
    moves: list             # [(action, how often), ..]
    in_loss: bool


def merge_walk(actions: list[int], in_loss: list[bool], rng: np.random.Generator,
               horizon: int = 3, merge: int = 3, chance: float = 0.7, vary: bool = False
               ) -> list[Turn]:
    """Cut a walk into the turns of a dialog.

    Equal actions are merged at random: the next one joins with probability `chance`, up to `merge`
    of them; `horizon` such moves make an answer. The chance is ActiveVLN's, estimated from its
    8,000 released episodes. vary: 1 to `horizon` moves, drawn for each answer.
    in_loss: per step, is it what the expert would do? All steps of a turn agree in it: a
    perturbation is a turn of its own, shown as it happened and not trained on.

    >>> [tuple(turn) for turn in merge_walk([1, 1, 1, 1, 2, 0], [True] * 6,
    ...                                     np.random.default_rng(0), horizon=2, chance=1)]
    [(0, [(1, 3), (1, 1)], True), (4, [(2, 1), (0, 1)], True)]
    """
    turns, t, room = [], 0, 0
    while t < len(actions):
        n, kind = 1, (actions[t], in_loss[t])
        while (n < merge and t + n < len(actions) and (actions[t + n], in_loss[t + n]) == kind
               and rng.random() < chance):
            n += 1
        if room == 0 or turns[-1].in_loss != in_loss[t]:
            turns.append(Turn(t, [], in_loss[t]))
            room = int(rng.integers(1, horizon + 1)) if vary else horizon
        turns[-1].moves.append((actions[t], n))
        t, room = t + n, room - 1
    return turns


class DialogCache(NamedTuple):
    """What is kept of a dialog between two turns."""
    kv: Tensor              # (2 * layers, kv_heads, P, D): keys, then values
    pending_ids: list       # ids sampled last and not run yet: the answer's end
    next_position: int      # the position of pending_ids[0]


class AnswerStart(NamedTuple):
    """Where a turn's answer begins in a dialog's tokens."""
    index: int
    position: int


class PackedSegment(NamedTuple):
    """A dialog and its branches. Token t sees the tokens since[t] .. t and 0 .. upto[t] - 1."""
    ids: list[int]
    positions: Tensor       # (3, L)
    features: list[Tensor]
    since: list[int]
    upto: list[int]


# ---------------------------------------------------------------- the policy


class DialogPolicy(Policy):
    """A policy whose training examples are whole walks, and which answers turn by turn."""

    default_contract, max_horizon = DIALOG, 3
    whole_walks = True
    val_metrics = ("loss", "right")             # right: share of answer tokens that are the argmax

    @staticmethod
    def arrange(data):
        if not data.whole_walks:
            raise UserError(f"--prompt dialog needs whole walks and {data.json_path} holds single "
                            "answers; give a VLN-Ego folder (make_data.py --import-walk reads "
                            "released walks)")
        return data

    def set_contract(self, contract: dict):
        super().set_contract(contract)
        self.merged = contract_phrases(contract)

    # ------------------------------------------------------------ text and frames -> tokens

    def _template_parts(self) -> list[str]:
        """The chat template's text before and after a user's first text, before and after a later
        one. <|im_end|>, which follows an answer, belongs to the answer."""
        later = self._render((role, "\x00") for role in ("user", "assistant", "user"))
        later = [part.removeprefix("<|im_end|>") for part in later.split("\x00")[2:]]
        if len(later) != 2:
            raise ValueError("it does not show each text of a conversation once")
        return [*super()._template_parts(), later[0], "<|im_end|>" + later[1]]

    def instruction_prompt(self, instruction: str, n_history: int = 0) -> str:
        """The text of a dialog's first turn."""
        return dialog_prompt(instruction, self.contract)

    def later_prompt(self, instruction: str) -> str:
        """The text of every later turn."""
        return "<image>"

    def turn_prompt(self, instruction: str, feature: Tensor, first: bool = True) -> Prompt:
        """What comes before an answer: at the first turn, or at a later one."""
        self._chat("")                                          # renders the template once
        opening, closing = self._chat_parts[:2] if first else self._chat_parts[2:]
        text = (self.instruction_prompt if first else self.later_prompt)(instruction)
        before, after = (opening + text + closing).split("<image>")
        return self._assemble([before + "<|vision_start|>", "<|vision_end|>" + after], [feature])

    def longest_prompt(self, height: int, width: int) -> Prompt:
        return self.turn_prompt("x", self._blank_frame(height, width))

    def tokenize_answers(self, dialogs: list[Dialog]) -> list[Dialog]:
        """Dialogs whose answers are texts -> the same with token ids, as they would be sampled."""
        return [d._replace(answers=tuple(self._encode(text) + [self.end_token]
                                         for text in d.answers)) for d in dialogs]

    def dialog_tokens(self, dialog: Dialog, features: list[Tensor]
                      ) -> tuple[Segment, list[AnswerStart]]:
        """A dialog with ids, and its frames' features -> its tokens, and where answers begin.

        Positions in a prompt count from 0, and a frame's tokens share some of theirs. In the dialog
        the turn begins at position `now`, its answer at `then`.
        """
        ids, positions, starts, now = [], [], [], 0
        for k, (answer, feature) in enumerate(zip(dialog.answers, features)):
            prompt = self.turn_prompt(dialog.instruction, feature, first=k == 0)
            then = now + prompt.next_position
            starts.append(AnswerStart(len(ids) + len(prompt.ids), then))
            ids += prompt.ids + list(answer)
            positions += [now + prompt.positions, torch.arange(then, then + len(answer)
                                                               ).expand(3, -1)]
            now = then + len(answer)
        return Segment(ids, torch.cat(positions, dim=1), list(features)), starts

    def _answer_texts(self) -> list[str]:
        """All answers: 1 to `horizon` moves, a stop only at the end."""
        plans, texts = [[]], []
        for _ in range(self.contract["horizon"]):
            plans = [p + [m] for p in plans if p[-1:] != ["stop"] for m in self.merged.values()]
            texts += [", ".join(plan) for plan in plans]
        return texts

    def actions(self, answer: list[int]) -> list[int]:
        """Ids of an answer -> the actions to carry out; [] if it is malformed."""
        return self.parse(self.text(answer)) if answer[-1] == self.end_token else []

    def parse(self, text: str) -> list[int]:
        return parse_answer(text, self.merged, self.contract["horizon"])

    # ------------------------------------------------------------ training: log-probabilities

    def forward(self, dialogs: list[Dialog], frames: dict, *rest, **named):
        """dialog_logps(), as the call that DeepSpeed wraps."""
        return self.dialog_logps(dialogs, frames, *rest, **named)

    def dialog_logps(self, dialogs: list[Dialog], frames: dict, branches: list | None = None,
                     temperature: float = 1.0, with_stats: bool = False):
        """log p(answer token | the conversation before it): one pass for whole walks.

        dialogs: N, with ids; frames {key: uint8 (H, W, 3)}, every one encoded once -> logps (N, C)
        fp32, differentiable: a dialog's answers one after the other, 0 where it has no more.
        branches: per dialog [(turn, ids), ..], answers that could have been given at that turn
        -> (branches of all dialogs, C) instead. They stand behind the walk in its row and see what
        came before their turn, and themselves: a tree, run in the same pass.
        with_stats: -> TokenStats.
        """
        features = dict(zip(frames, self.encode_frames(list(frames.values()))))
        segments, spots = [], []
        for i, dialog in enumerate(dialogs):
            segment, starts = self.dialog_tokens(dialog, [features[key] for key in dialog.frames])
            if branches is None:
                # The hidden state before a token predicts it: index - 1 for an answer's first.
                spots.append([(i, start.index + j - 1, token)
                              for start, answer in zip(starts, dialog.answers)
                              for j, token in enumerate(answer)])
            packed, more = append_branches(segment, starts, branches[i] if branches else ())
            segments.append(packed)
            spots += [[(i, place, token) for place, token in row] for row in more]
        hidden, where = self._forward_packed(segments)

        # spots: per output row, [(segment, place in it, token), ..]; where: a segment's row, column
        spots = [[(where[i][0], where[i][1] + place, token) for i, place, token in row]
                 for row in spots]
        return self._logps_at(hidden, spots, temperature, with_stats=with_stats)

    def _forward_packed(self, segments: list[PackedSegment]) -> tuple[Tensor, dict]:
        """Run segments several to a row, for walks differ much in length -> hidden (rows, T, H),
        {segment: (row, column of its first token)}."""
        # 1. First fit, the longest first: a row is as wide as the longest segment.
        width, filled, where = max(len(segment.ids) for segment in segments), [], {}
        for i in sorted(range(len(segments)), key=lambda i: -len(segments[i].ids)):
            size = len(segments[i].ids)
            row = next((r for r, n in enumerate(filled) if n + size <= width), len(filled))
            filled += [0] * (row == len(filled))
            where[i] = row, filled[row]
            filled[row] += size

        # 2. Lay them out. bounds (3, rows, T) holds columns: for each token the first of its own
        #    segment, and its since and upto, which were places in the segment.
        bounds = torch.zeros(3, len(filled), width, dtype=torch.long)
        joined = [([], [], []) for _ in filled]
        for i in sorted(where, key=where.get):
            (row, at), (ids, positions, features, since, upto) = where[i], segments[i]
            bounds[:, row, at:at + len(ids)] = at + torch.tensor([[0] * len(ids), since, upto])
            for part, more in zip(joined[row], (ids, [positions], features)):
                part.extend(more)

        # 3. Both ranges lie in the token's own segment, and positions restart with each, so a
        #    token sees what it would see in a row of its own.
        start, since, upto = bounds.to(self.device)

        def sees(row, head, query, key):
            return ((key >= since[row, query]) & (key <= query)
                    | (key >= start[row, query]) & (key < upto[row, query]))
        hidden, _ = self.decode([Segment(ids, torch.cat(positions, dim=1), features)
                                 for ids, positions, features in joined], sees=sees)
        return hidden, where

    # ------------------------------------------------------------ acting: cached turns

    @torch.no_grad()
    def generate_turn(self, caches: list[DialogCache | None], instructions: list[str],
                      features: list[Tensor], group_size: int = 1, temperature: float = 0.0,
                      seeds: list[int] | None = None, draft: bool = True,
                      max_new_tokens: int = MAX_TURN_TOKENS, top_p: float = 1.0
                      ) -> tuple[list, list[DialogCache]]:
        """The next turn of N dialogs, whatever turn each is at -> G answers (ids) for each, and
        the caches with which the dialogs go on, in which the first of the G was given.

        caches: None where a dialog opens with its instruction; features: one (rows, cols, H) tensor
        each; seeds and draft: as for generate().
        """
        segments = []
        for cache, instruction, feature in zip(caches, instructions, features):
            # Not run yet: the end of the last answer, then the new turn, right behind it.
            prompt = self.turn_prompt(instruction, feature, first=cache is None)
            pending, now = (cache.pending_ids, cache.next_position) if cache else ([], 0)
            positions = torch.cat((torch.arange(now, now + len(pending)).expand(3, -1),
                                   now + len(pending) + prompt.positions), dim=1)
            segments.append(Segment(pending + prompt.ids, positions, [feature]))
        before = [cache.kv.shape[2] if cache else 0 for cache in caches]
        hidden, past = self.decode(segments, self._batch_caches(caches), before)
        hidden = hidden[range(len(segments)), [len(segment.ids) - 1 for segment in segments]]
        start = [int(segment.positions.max()) + 1 for segment in segments]
        answers, past, _ = self._decode_loop(
            hidden, past, start, [n + len(segment.ids) for n, segment in zip(before, segments)],
            group_size, temperature, seeds, draft, max_new_tokens, top_p)
        groups = [answers[i:i + group_size] for i in range(0, len(answers), group_size)]
        return groups, self._split_caches(past, [group[0] for group in groups], start)

    def _batch_caches(self, caches: list[DialogCache | None]) -> Cache | None:
        """Caches of different lengths -> one Cache, padded on the right; None if all are new."""
        old = [(i, cache.kv) for i, cache in enumerate(caches) if cache]
        if not old:
            return None
        layers, heads, _, size = old[0][1].shape
        width = max(kv.shape[2] for _, kv in old)
        kv = old[0][1].new_zeros(layers, len(caches), heads, width, size)
        branch = torch.full((len(caches), width), HIDDEN, device=kv.device)
        for i, known in old:
            kv[:, i, :, :known.shape[2]], branch[i, :known.shape[2]] = known, COMMON
        keys, values = kv.chunk(2)
        return Cache(list(keys), list(values), branch)

    def _split_caches(self, cache: Cache, answers: list, start: list[int]) -> list[DialogCache]:
        """Each row with its first answer, without padding, rejected drafts and other answers -> its
        DialogCache. answers: the first of each row; start: their first positions."""
        kv = torch.stack(cache.keys + cache.values)             # (2 layers, N, heads, P, D)
        keep = [((row == COMMON) | (row == 1)).nonzero().squeeze(1) for row in cache.branch]
        return [DialogCache(kv[:, i].index_select(2, keep[i]), answer[-1:],
                            start[i] + len(answer) - 1) for i, answer in enumerate(answers)]

    # ------------------------------------------------------------ what the scripts ask of a policy

    def dialog(self, data, i: int, seed: int, vary: bool = False) -> Dialog:
        """Episode i of a VLN-Ego folder, its actions merged by (seed, i): each seed gives other
        turns."""
        episode, contract = data.episodes[i], self.contract
        walk = data.walks[episode["walk_id"]]
        in_loss = [str(action) == label[:1] for action, label in
                   zip(walk["actions"], walk.get("labels", map(str, walk["actions"])))]
        turns = merge_walk(walk["actions"], in_loss, np.random.default_rng((seed, i)),
                           contract["horizon"], contract["merge"], vary=vary)
        return Dialog(episode["instruction"], tuple((walk["walk_id"], turn.t) for turn in turns),
                      tuple(", ".join(self.merged[move] for move in turn.moves) for turn in turns),
                      tuple(turn.in_loss for turn in turns))

    def load_batch(self, data, units: list, vary_turns: bool = False) -> tuple[list, dict]:
        """sft.py's units [(episode, seed of its merging), ..] -> dialogs, frames."""
        dialogs = [self.dialog(data, episode, seed, vary_turns) for episode, seed in units]
        return dialogs, self.load_frames(data, dialogs)

    def model_inputs(self, dialogs: list[Dialog], frames: dict) -> tuple[tuple, Tensor]:
        """Dialogs with ids -> the inputs of forward(), and the mask (N, C) of its loss."""
        rows = [torch.tensor([own for own, answer in zip(d.in_loss, d.answers) for _ in answer])
                for d in dialogs]
        mask = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return (dialogs, frames), mask.to(self.device)

    def validate(self, dialogs: list[Dialog], frames: dict) -> list[tuple[float, float]]:
        inputs, mask = self.model_inputs(self.tokenize_answers(dialogs), frames)
        logps, likeliest, _ = self(*inputs, with_stats=True)
        tokens = mask.sum().item()
        return [(-(logps * mask).sum().item(), tokens), ((likeliest & mask).sum().item(), tokens)]

    def token_counts(self, dialogs: list[Dialog], frames: dict, branches: list | None = None
                     ) -> list[int]:
        """Tokens of each dialog (with ids) and of its branches."""
        blank = self._blank_features(frames)
        return [len(self.dialog_tokens(d, [blank[key] for key in d.frames])[0].ids)
                + sum(len(ids) for _, ids in some or ())
                for d, some in zip(dialogs, branches or [()] * len(dialogs))]

    def answer_tokens(self, dialogs: list[Dialog], branches: list | None = None) -> int:
        if branches:
            return sum(len(ids) for some in branches for _, ids in some or ())
        return sum(len(answer) for d in dialogs for answer in d.answers)

    def walk_lengths(self, data, vary_turns: bool = False) -> list[tuple[str, int]]:
        """The dialogs of the longest instruction and of the longest walk, as the first epoch
        merges them."""
        episodes = range(len(data.episodes))
        chosen = [max(episodes, key=lambda i: len(data.episodes[i]["instruction"])),
                  max(episodes, key=lambda i: len(data.steps(i)))]
        dialogs = self.tokenize_answers([self.dialog(data, i, 0, vary_turns) for i in chosen])
        return self._named_lengths(data, chosen, dialogs)

    def agent(self, execute: int | None = None, malformed: str = "stop", blank: bool = False,
              temperature: float = 0.0, seed: int = 0, group_size: int = 1,
              top_p: float | None = None) -> Callable:
        """The agent of evaluate.py and grpo_online.py: encode frames, generate a turn, parse.

        execute: not used, an answer is carried out whole; group_size: answers sampled at each turn
        (activevln/grpo_online.py compares them), of which the first is given; top_p: default: the
        contract's.
        """
        if top_p is None:
            top_p = self.contract.get("sampling", {}).get("top_p", 1.0)

        @torch.no_grad()
        def decide(walks):
            frames = [self.resize(walk.frames[-1]) for walk in walks]
            features = self.encode_frames([np.zeros_like(f) if blank else f for f in frames])
            seeds = [random.Random(f"{seed} {walk.name} {len(walk.decisions)}").getrandbits(62)
                     for walk in walks] if temperature > 0 else None
            groups, caches = self.generate_turn(
                [walk.dialog_cache for walk in walks], [walk.instruction for walk in walks],
                features, group_size, temperature, seeds, top_p=top_p)
            plans = [self.actions(answers[0]) for answers in groups]
            for walk, frame, answers, cache, plan in zip(walks, frames, groups, caches, plans):
                walk.dialog_cache = cache
                walk.tokens = cache.kv.shape[2] + len(cache.pending_ids)
                walk.add_decision(self.text(answers[0]), plan, frame, answers)
            return [plan or [STOP if malformed == "stop" else FORWARD] for plan in plans]
        return decide

    @classmethod
    def tiny_corpus(cls, texts: list[str], contract: dict) -> tuple[list[str], list[str]]:
        moves = contract_phrases(contract).values()
        return [dialog_prompt(text, contract) for text in texts], [f"{m}, {m}" for m in moves]


def append_branches(segment: Segment, starts: list[AnswerStart], branches: list
                    ) -> tuple[PackedSegment, list]:
    """A dialog's tokens with branches [(turn, ids), ..] behind them -> PackedSegment, and per
    branch [(place whose hidden state predicts the token, token), ..].

    The walk's own tokens are causal (since 0, upto 0). A branch's tokens see their own branch
    (since its first) and the dialog up to their turn (upto), at the positions that follow it: the
    same keys as if the walk had ended there with this answer.
    """
    ids, positions, features = list(segment.ids), [segment.positions], segment.features
    since, upto, spots = [0] * len(ids), [0] * len(ids), []
    for turn, answer in branches:
        (at, now), place = starts[turn], len(ids)
        spots.append([(at - 1 if j == 0 else place + j - 1, token)
                      for j, token in enumerate(answer)])
        more = len(answer) - 1                                  # the last token predicts nothing
        ids, since, upto = ids + answer[:-1], since + [place] * more, upto + [at] * more
        positions.append(torch.arange(now, now + more).expand(3, -1))
    return PackedSegment(ids, torch.cat(positions, dim=1), features, since, upto), spots
