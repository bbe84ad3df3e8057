"""
How an answer is written with few and cheap decoder passes: drafts, and passes of a fixed shape.

Most of a plan's tokens are certain once its grammar is known. AnswerTree proposes them, a pass runs
them all, and accept() keeps those that the policy itself has drawn (Policy._decode_loop).

A pass of few tokens takes a GPU less time than its kernels' launches take (1,683 of them for a 2B
model). FixedPasses replays it as a CUDA graph, which is one launch.

[1] https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from costs import head_size
from qwen import COMMON, HIDDEN, Cache, DecoderPass, Qwen, Segment, branch_visibility

# ---------------------------------------------------------------- drafts


def forced_tokens(node: dict) -> tuple[list[int], dict]:
    """The tokens that follow a node of a tree {token: node} without a fork, and the node there."""
    tokens = []
    while len(node) == 1:
        (token, node), = node.items()
        tokens.append(token)
    return tokens, node


class AnswerTree:
    """The grammar: all valid answers (lists of ids) as a tree of tokens, {token: {token: ..}}."""

    def __init__(self, answers: Iterable[list[int]]):
        self.root = {}
        for answer in answers:
            node = self.root
            for token in answer:
                node = node.setdefault(token, {})
        ends = [forced_tokens(first)[1] for first in self.root.values()]
        self.second = next((node for node in ends if node), {})         # behind a first action

    def draft(self, answer: list[int], guess: int = 8) -> list[int]:
        """The tokens that must follow `answer` if it is to become valid; often none.

        Where the tree does not fork, the next token is forced. At a fork the guess is that the last
        action is repeated, for up to `guess` tokens: robots mostly do, and a wrong guess costs
        little. An answer that has left the tree is found again where it looks like the second
        action of a plan. It is no plan any more, but it will go on in phrases, and without a draft
        this one row would keep its whole batch waiting.

        >>> tree = AnswerTree([[1, 2, 1, 2, 9], [1, 2, 3, 4, 9], [3, 4, 1, 2, 9], [3, 4, 3, 4, 9]])
        >>> tree.draft([1], guess=0), tree.draft([1, 2, 3]), tree.draft([3])
        ([2], [4, 9], [4, 3, 4, 9])
        """
        node, last = self.root, None             # last: which branch was taken at the last fork
        for token in answer:
            before, node = node, node.get(token) or self.second.get(token) or {}
            if len(before) > 1 and token in before:
                last = list(before).index(token)
        tokens, node = forced_tokens(node)
        most = len(tokens) + guess
        while last is not None and len(node) > last and len(tokens) < most:
            token = list(node)[last]
            more, node = forced_tokens(node[token])
            tokens += [token, *more]
        return tokens[:most]


def accept(drawn: list[list[int]], proposals: list[list[int]], answers: list[list[int]],
           done: list[bool], end_token: int, limit: int) -> list[int]:
    """Extend the answers by what was drawn, up to the first token that differs from its proposal,
    that one included -> how many of each answer's proposed tokens were drawn as well.

    drawn: one token more than proposed for each answer that is not done.
    """
    accepted = [0] * len(answers)
    for i, answer in enumerate(answers):
        if done[i]:
            continue
        for j, token in enumerate(drawn[i]):
            answer.append(token)
            done[i] = token == end_token or len(answer) == limit
            if done[i] or j == len(proposals[i]) or token != proposals[i][j]:
                break
        accepted[i] = j
    return accepted


def next_segments(answers: list[list[int]], proposals: list[list[int]], done: list[bool],
                  start: list[int]) -> tuple[list[Segment], list[list[tuple]]]:
    """The last token of each answer that is not done, and its proposed ones -> a Segment for
    each prompt, and per answer the (row, column) of these tokens."""
    places, group_size = [[] for _ in answers], len(answers) // len(start)
    segments = [Segment([], [], [], []) for _ in start]
    for i in (i for i, d in enumerate(done) if not d):
        (row, g), length = divmod(i, group_size), 1 + len(proposals[i])
        ids, positions, _, branch = segments[row]
        now = start[row] + len(answers[i]) - 1
        places[i] = [(row, len(ids) + j) for j in range(length)]
        ids += [answers[i][-1], *proposals[i]]
        positions += range(now, now + length)
        branch += [g + 1] * length
    return [s._replace(positions=torch.tensor(s.positions, dtype=torch.long).expand(3, -1))
            for s in segments], places


def uniform_numbers(seeds: list[int] | None, n_prompts: int, group_size: int, length: int,
                    temperature: float) -> Tensor | None:
    """Uniform numbers (B*G, length) from each prompt's own stream; None if greedy."""
    if temperature == 0:
        return None
    seeds = seeds if seeds is not None else torch.randint(2 ** 62, (n_prompts,)).tolist()
    return torch.cat([torch.rand(group_size, length, dtype=torch.float64,
                                 generator=torch.Generator().manual_seed(seed))
                      for seed in seeds])


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together have at least the mass top_p; the others get 0. (X, V)

    >>> nucleus(torch.tensor([[0.3, 0.5, 0.2]]), 0.6)
    tensor([[0.3000, 0.5000, 0.0000]])
    """
    ordered, index = probabilities.sort(dim=-1, descending=True)
    kept = ordered * (ordered.cumsum(dim=-1) - ordered < top_p)     # the mass before it
    return torch.zeros_like(probabilities).scatter(-1, index, kept)


def draw_tokens(logits: Tensor, u: Tensor | None, top_p: float = 1.0) -> Tensor:
    """logits (X, V), u (X,) uniform numbers -> tokens (X,): the inverse of the distribution
    function; without u the likeliest."""
    if u is None:
        return logits.argmax(dim=-1)
    probabilities = logits.double().softmax(dim=-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    cdf = probabilities.cumsum(dim=-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True
                              ).squeeze(-1).clamp(max=logits.shape[-1] - 1)


# ---------------------------------------------------------------- passes of a fixed shape

ROOM = 1024                      # tokens that fit behind a cache: some ten passes of 8 answers
KEPT = 2                         # buffers that a policy keeps


class InPlacePass(DecoderPass):
    """A pass that writes keys and values into buffers (N, kv_heads, size, D) at columns (T,)."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], columns: Tensor, mask: Tensor):
        super().__init__(keys[0].shape[0], len(columns), None, mask, None)
        self.keys, self.values, self.columns = keys, values, columns

    def join_past(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.columns, k)
        self.values[layer].index_copy_(2, self.columns, v)
        return self.keys[layer], self.values[layer]


class FixedPasses:
    """Passes of N rows over a cache with room behind it, in buffers that stay where they are.

    A CUDA graph [1] repeats its kernels on the same memory, so nothing may grow: T is rounded up to
    a multiple of 16, with tokens that nothing sees, and there is a graph for each T. On a CPU the
    same pass runs without a graph (tests/test_families.py).
    """

    def __init__(self, policy: Qwen, n: int, size: int):
        config, self.policy = policy.lm.config, policy
        shape = n, config.num_key_value_heads, size, head_size(config)
        self.keys, self.values = ([torch.zeros(shape, dtype=policy.dtype, device=policy.device)
                                   for _ in policy.lm.layers] for _ in range(2))
        self.branch = torch.full((n, size), HIDDEN, device=policy.device)
        self.used, self.graphs = 0, {}           # graphs: T -> (inputs, replay, hidden)

    @classmethod
    def over(cls, policy: Qwen, cache: Cache, kept: dict) -> FixedPasses:
        """The buffers for a cache's size, from kept {(N, size): ..} or made; the cache in them."""
        n, past = cache.branch.shape
        key = n, -(-past // 256) * 256 + ROOM
        made = kept[key] = kept.pop(key, None) or cls(policy, *key)
        while len(kept) > KEPT:
            kept.pop(next(iter(kept)))                               # the one used longest ago
        for buffer, known in zip(made.keys + made.values, cache.keys + cache.values):
            buffer[:, :, :past] = known
        made.branch.fill_(HIDDEN)[:, :past] = cache.branch
        made.used = past
        return made

    @staticmethod
    def width(segments: list[Segment]) -> int:
        return -(-max(len(segment.ids) for segment in segments) // 16) * 16

    def has_room(self, segments: list[Segment]) -> bool:
        return self.used + self.width(segments) <= self.branch.shape[1]

    def __call__(self, segments: list[Segment], before: list[float]) -> tuple[Tensor, Cache]:
        """Qwen.decode() of segments without pictures. What is returned is overwritten by the next
        call: hidden (N, T, H), and the Cache, a part of the buffers."""
        n, t, policy = len(segments), self.width(segments), self.policy
        policy.count_decoder_flops(segments, before)
        ids, positions = torch.zeros(n, t, dtype=torch.long), torch.zeros(3, n, t, dtype=torch.long)
        branch = torch.full((n, t), HIDDEN)
        for i, segment in enumerate(segments):
            length = len(segment.ids)
            ids[i, :length] = torch.tensor(segment.ids)
            positions[:, i, :length] = segment.positions
            branch[i, :length] = torch.tensor(segment.branch or [COMMON] * length)
        past, self.used = self.used, self.used + t
        self.branch[:, past:self.used] = branch.to(policy.device)
        hidden = self._replay(
            t, policy.lm.embed_tokens(ids.to(policy.device).flatten())[None],
            positions.flatten(1).to(policy.device)[:, None],
            torch.arange(past, self.used, device=policy.device),
            policy.dense_mask(branch_visibility(self.branch, past), self.branch.shape, t))
        return hidden.view(n, t, -1), Cache([k[:, :, :self.used] for k in self.keys],
                                            [v[:, :, :self.used] for v in self.values],
                                            self.branch[:, :self.used])

    def _pass(self, embeds: Tensor, positions: Tensor, columns: Tensor, mask: Tensor) -> Tensor:
        return self.policy.lm(
            inputs_embeds=embeds, position_ids=positions, use_cache=False,
            decoder_pass=InPlacePass(self.keys, self.values, columns, mask)).last_hidden_state

    def _replay(self, t: int, *inputs: Tensor) -> Tensor:
        if t not in self.graphs:
            self.graphs[t] = self._record([x.clone() for x in inputs])
        held, replay, hidden = self.graphs[t]
        for own, new in zip(held, inputs):
            own.copy_(new)
        replay()
        return hidden

    def _record(self, held: list[Tensor]) -> tuple[list[Tensor], Callable, Tensor]:
        if self.policy.device.type != "cuda":
            hidden = self._pass(*held)
            return held, lambda: hidden.copy_(self._pass(*held)), hidden
        side = torch.cuda.Stream()                      # libraries set themselves up before capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._pass(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self._pass(*held)
        return held, graph.replay, hidden
