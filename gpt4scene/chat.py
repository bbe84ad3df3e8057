"""
The policy that answers questions about pictures: a scene's pictures first, then a question [1].

A scene has many questions (66 in ScanQA's validation set), and its pictures are the long part of a
prompt: 33 of them are 8,400 tokens and more. They stand first, so what the policy computes for them
does not depend on the question: they are run once, and the questions with their answers are
branches of that row, which see the pictures and themselves. This is exact, in training and in
answering; tests/test_chat.py compares it with separate rows and with transformers.

Read it in this order
    data       records with equal pictures -> a scene with its questions    SceneQuestions
    training   log-probabilities of answers                                 ChatPolicy.forward
    answering  greedy answers to a scene's questions                        ChatPolicy.answer

Shapes     S scenes, K questions of a scene, N = all questions, C answer tokens

sft.py --prompt chat trains it, gpt4scene/answer.py runs it: by the contract's prompt name
(model.policy_class). There is no robot in this contract, so evaluate.py and grpo.py refuse it.

[1] GPT4Scene, https://arxiv.org/abs/2501.01428
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cli import UserError
from make_data import Decision
from model import Policy, Prompt
from qwen import Cache, Segment, fit_pixels

# The contract: no robot, but how large pictures are seen. 512 and 128 are GPT4Scene's; pixels are
# Qwen2-VL's own bounds.
CHAT = {"version": 1, "dataset": "", "prompt": "chat-1", "min_pixels": 56 * 56,
        "max_pixels": 12845056, "longest_side": 512, "max_new_tokens": 128}


def seen_size(height: int, width: int, contract: dict, factor: int) -> tuple[int, int]:
    """The size at which a picture is seen: its longest side is limited first, as LLaMA-Factory's
    --image_resolution does; then Qwen's own rule. What has been resized already is left alone.

    >>> seen_size(968, 1296, CHAT, 28), seen_size(490, 512, CHAT, 28), seen_size(56, 56, CHAT, 28)
    ((392, 504), (504, 504), (56, 56))
    """
    limit, longest = contract["longest_side"], max(height, width)
    if longest > max(limit, round(limit / factor) * factor):
        height, width = int(height * limit / longest), int(width * limit / longest)
    return fit_pixels(height, width, contract["min_pixels"], contract["max_pixels"], factor)


def picture_tokens(path: str, contract: dict, factor: int) -> int:
    """Tokens of a picture, from its header."""
    try:
        with Image.open(path) as image:
            height, width = seen_size(*image.size[::-1], contract, factor)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read ({error}); copy it again") from None
    return height * width // factor ** 2


# ---------------------------------------------------------------- data


class SceneQuestions:
    """A ShareGPT file as scenes: records with the same pictures and system text are the steps of
    one episode, so that sft.py's --steps-per-walk trains so many of them together."""

    whole_walks = True                              # see make_data.VlnEgo

    def __init__(self, data):
        self.data, self.meta, self.notes = data, {"dataset": data.meta["dataset"]}, data.notes
        self.frame, self.questions, scenes = data.frame, [], {}
        for i, record in enumerate(data.records):
            human, marks = record.rounds[0][0], r"(?:\s*<image>)+\s*"
            question = re.sub(f"^{marks}", "", human)
            if len(record.rounds) > 1 or "<image>" in question or not question.strip():
                raise UserError(f"{data.json_path}: record {i} is not one question behind all its "
                                "<image> marks, as --prompt chat shows them; give each question a "
                                "record of its own and move the marks to its beginning")
            self.questions.append(question)
            scenes.setdefault((record.system, record.images), []).append(i)
        self.records = list(scenes.values())        # of each scene: the numbers of its records
        self.episodes = [{"episode_id": rows[0]} for rows in self.records]

    def __len__(self) -> int:
        return len(self.episodes)

    def steps(self, i: int) -> list[int]:
        return list(range(len(self.records[i])))

    def decision(self, i: int, t: int, contract: dict) -> Decision:
        number = self.records[i][t]
        record = self.data.records[number]
        before = (("system", record.system),) if record.system else ()
        return Decision("", record.images, (), self.questions[number], record.rounds[0][1], before)

    def check_plans(self, contract: dict) -> None:
        """Answers are texts here: any will do."""

    def lengths(self, policy: ChatPolicy) -> list[tuple[str, int]]:
        """The longest record of each scene -> [(name, tokens, at most)], as engine.check_lengths
        wants them."""
        found = []
        for numbers in self.records:
            records = [self.data.records[number] for number in numbers]
            texts = [r.system + "".join(r.rounds[0]) for r in records]
            longest = max(range(len(texts)), key=lambda k: len(texts[k].encode()))
            found.append((f"record {numbers[longest]}", policy.length_bound(
                [self.data.find(key) for key in records[0].images], texts)))
        return found


# ---------------------------------------------------------------- the policy


class ScenePrefix(NamedTuple):
    """What all questions of a scene have in common, and which they are."""
    prompt: Prompt              # the chat's opening and the pictures
    members: list[int]          # numbers of the decisions


class ChatPolicy(Policy):
    """A policy whose prompts are pictures and then a question, and which answers with a text."""

    default_contract, val_metrics = CHAT, ("loss", "exact_match")

    def set_contract(self, contract: dict):
        self.contract, self._picture_tokens = contract, {}

    @staticmethod
    def arrange(data) -> SceneQuestions:
        if data.whole_walks:
            raise UserError("--prompt chat needs questions and got the walks of "
                            f"{data.folder}; give ShareGPT files, such as gpt4scene.scenes writes")
        return SceneQuestions(data)

    @staticmethod
    def texts(sources: list) -> list[str]:
        return [text for data in sources for question, record in zip(
            data.questions, data.data.records) for text in (question, record.rounds[0][1])]

    @classmethod
    def tiny_corpus(cls, texts: list[str], contract: dict) -> tuple[list[str], list[str]]:
        return texts, []

    # ------------------------------------------------------------ pictures and text -> tokens

    def fit_pixels(self, height: int, width: int) -> tuple[int, int]:
        return seen_size(height, width, self.contract, self.image_format.factor)

    def length_bound(self, pictures: Iterable[str], texts: Iterable[str], more: int = 0) -> int:
        """Tokens of a prompt with the longest of the texts, at most: a byte is at most one token.
        pictures: files, of which the headers are read; more: tokens of an answer"""
        files = [path for path in pictures if path not in self._picture_tokens]
        self._picture_tokens.update((path, picture_tokens(
            path, self.contract, self.image_format.factor)) for path in files)
        return (64 + max(len(text.encode()) for text in texts) + more
                + sum(self._picture_tokens[path] + 2 for path in pictures))

    def picture_prompt(self, features: list[Tensor], before: tuple = ()) -> Prompt:
        """The chat up to a question: its opening, and the pictures one after the other."""
        opening = self._chat("\0", before).split("\0")[0]
        between = ["<|vision_end|><|vision_start|>"] * (len(features) - 1)
        return self._assemble([opening + "<|vision_start|>", *between, "<|vision_end|>"], features)

    def question_ids(self, question: str) -> list[int]:
        """A question and the opening of its answer."""
        return self._encode(question + self._chat("\0").split("\0")[1])

    def _scenes(self, decisions: list, features: dict) -> list[ScenePrefix]:
        members = {}
        for k, d in enumerate(decisions):
            members.setdefault((d.before, d.frames), []).append(k)
        return [ScenePrefix(self.picture_prompt([features[key] for key in keys], before), some)
                for (before, keys), some in members.items()]

    def token_counts(self, decisions: list, frames: dict, group_size: int = 1) -> list[int]:
        """Tokens of each question with its answer; a scene's first one has its pictures, too."""
        counts = [len(self.question_ids(d.prompt)) + self.answer_tokens([d], group_size)
                  for d in decisions]
        for prompt, members in self._scenes(decisions, self._blank_features(frames)):
            counts[members[0]] += len(prompt.ids)
        return counts

    def answer_tokens(self, decisions: list, group_size: int = 1) -> int:
        return group_size * sum(len(self._encode(d.answer)) + 1 for d in decisions)

    def walk_lengths(self, data: SceneQuestions, vary_turns: bool = False
                     ) -> list[tuple[str, int]]:
        return data.lengths(self)

    # ------------------------------------------------------------ training: log-probabilities

    def run_pictures(self, scenes: list[ScenePrefix]) -> Cache:
        """A row for each scene."""
        return self.decode([Segment(p.ids, p.positions, p.features) for p, _ in scenes])[1]

    def forward(self, decisions: list, frames: dict, completion_ids: Tensor,
                completion_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(answer token | everything before it) -> (N, C) fp32, differentiable, 0 where
        masked. Two passes: the pictures of each scene, then all its questions with answers.

        decisions: N, of any scenes; frames {key: uint8 (H, W, 3)}, every one encoded once;
        completion_ids, completion_mask (N, C): Policy.answers
        """
        features = dict(zip(frames, self.encode_frames(list(frames.values()))))
        scenes = self._scenes(decisions, features)
        return self._answer_logps(scenes, self.run_pictures(scenes), decisions, completion_ids,
                                  completion_mask, temperature)

    def _answer_logps(self, scenes: list[ScenePrefix], cache: Cache, decisions: list, ids: Tensor,
                      mask: Tensor, temperature: float = 1.0) -> Tensor:
        answers = [row[:n] for row, n in zip(ids.tolist(), mask.sum(dim=1).tolist())]
        segments, spots = [], [[] for _ in decisions]
        for row, (prompt, members) in enumerate(scenes):
            tails, column = [], 0
            for k in members:
                asked = self.question_ids(decisions[k].prompt)
                # The state before a token predicts it; an answer's last token predicts nothing.
                spots[k] = [(row, column + len(asked) - 1 + j, token)
                            for j, token in enumerate(answers[k])]
                tails.append(asked + answers[k][:-1])
                column += len(tails[-1])
            segments.append(branches(tails, [prompt.next_position] * len(tails)))
        hidden, _ = self.decode(segments, cache, [len(prompt.ids) for prompt, _ in scenes])
        return self._logps_at(hidden, spots, temperature, ids.shape[1])

    # ------------------------------------------------------------ answering

    @torch.no_grad()
    def answer(self, prompt: Prompt, cache: Cache, questions: list[str],
               max_new_tokens: int | None = None) -> list[list[int]]:
        """The greedy answers to questions about one scene -> their ids; <|im_end|> is the last of
        each that was not cut off.

        prompt, cache: the scene's picture_prompt(), and run_pictures()'s row of it, which is left
        as it is: more questions may follow.
        """
        limit = max_new_tokens or self.contract["max_new_tokens"]
        answers, new = [[] for _ in questions], [self.question_ids(q) for q in questions]
        places, seen = [prompt.next_position] * len(questions), len(prompt.ids)
        while any(new):
            hidden, cache = self.decode([branches(new, places)], cache, [seen])
            live = [k for k, ids in enumerate(new) if ids]
            last = torch.tensor([len(new[k]) for k in live]).cumsum(0) - 1
            logits = self._logits(hidden[0, last.to(self.device)], 1.0)
            self.nan_logits = self.nan_logits | ~logits.amax(dim=-1).isfinite().all()
            places = [place + len(ids) for place, ids in zip(places, new)]
            new = [[] for _ in questions]
            for k, token in zip(live, logits.argmax(dim=-1).tolist()):
                answers[k].append(token)
                if token != self.end_token and len(answers[k]) < limit:
                    new[k] = [token]
        return answers

    def validate(self, decisions: list, frames: dict) -> list[tuple[float, float]]:
        """(sum, count) of the loss, and of greedy answers that are equal to the given ones."""
        features = dict(zip(frames, self.encode_frames(list(frames.values()))))
        scenes, (ids, mask) = self._scenes(decisions, features), self.tokenize_targets(decisions)
        cache, right = self.run_pictures(scenes), 0
        loss = -self._answer_logps(scenes, cache, decisions, ids, mask).sum().item()
        for row, (prompt, members) in enumerate(scenes):
            found = self.answer(prompt, cache.rows(torch.tensor([row], device=self.device)),
                                [decisions[k].prompt for k in members])
            right += sum(self.text(answer) == decisions[k].answer
                         for answer, k in zip(found, members))
        return [(loss, mask.sum().item()), (right, len(decisions))]


def branches(tails: list[list[int]], places: list[int]) -> Segment:
    """Lists of ids as branches 1, 2, .. of one row, each at its own place behind what they share:
    none sees another. An empty list adds nothing."""
    positions = torch.cat([place + torch.arange(len(ids)) for ids, place in zip(tails, places)])
    return Segment([token for ids in tails for token in ids], positions.expand(3, -1), [],
                   [g for g, ids in enumerate(tails, start=1) for _ in ids])
