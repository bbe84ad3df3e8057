"""
A policy that runs behind a server: what evaluate.py --server asks, and how it waits.

Any server with OpenAI's chat completions decides (vLLM, SGLang, transformers serve); the checkpoint
folder gives the contract, the tokenizer and the prompt. A request is the conversation of one robot.
Frames are resized by the contract here and sent as PNG, so that no setting of the server changes
them; vision tokens are banned by logit_bias; every sampling parameter is sent, for servers take the
checkpoint's generation_config.json otherwise. Before the first walk a request with a black frame is
made: if the server counts other prompt tokens than we do, then its template, its pixel budget or
its tokenizer is another, and nothing is walked.

Each robot has its own request under way: none waits for another. A request that fails is repeated
(TRIES); if all tries fail the walk ends as "error": it has no score, and the same command walks it
again. A server's failure is never an answer of the policy.

The endpoint of tools/serve.py, which keeps the walks' memory itself, is asked in the same way.

Read it in this order
    transport  one POST, its retries and what ends the run       JsonClient
    requests   a walk -> messages, an answer -> actions          ChatServer, ChatPolicy, RobotPolicy
    the loop   simulators and answers, whichever comes first     RemoteLoop

Needs    httpx2 (requirements.txt)
"""
from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import hashlib
import io
import json
import math
import os
import random
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cli import UserError
from evaluate import EpisodeLoop, EpisodeState
from lsm import pick_frames
from model import Policy
from reward import FORWARD, MAX_ANSWER_TOKENS, STOP

TRIES = 4
RETRIED = (408, 429, 500, 502, 503, 504)    # statuses; others mean that the request is wrong
SERVED = ("weights", "contract", "execute", "malformed", "temperature", "seed")     # of tools.serve
FAILED = ("abort", "content_filter", "error")   # finish_reasons of answers that the server cut off
POLL_S = 0.005                              # how long a robot's answer may wait while others move


class ServerFailed(Exception):
    """All tries of a request failed."""


# ---------------------------------------------------------------- transport


class JsonClient:
    """POSTs JSON from a thread with an event loop of its own, any number at a time.

    token: sent as a bearer token. counters: adds "server_requests", "server_retries" and
    "server_s", the seconds that requests took, waits between tries included.
    """

    first_wait_s = 1.0                      # before the second try; doubled before each later one

    def __init__(self, url: str, timeout_s: float = 120, token: str | None = None,
                 counters: Counter | None = None):
        import httpx2
        self.url, self.counters = url.rstrip("/"), Counter() if counters is None else counters
        self.loop = asyncio.new_event_loop()
        self.http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(timeout_s, connect=5), trust_env=False,      # no proxies
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            headers={"Authorization": f"Bearer {token}"} if token else {})
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def submit(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def post(self, path: str, body: dict) -> dict:
        """The JSON object that the server answers with. ServerFailed after TRIES; UserError at a
        status that a repetition would not change."""
        start, wait_s = time.monotonic(), self.first_wait_s
        for attempt in range(TRIES):
            if attempt:
                self.counters["server_retries"] += 1
                await asyncio.sleep(wait_s * random.uniform(1, 1.25))
                wait_s = self.first_wait_s * 2 ** attempt
            try:
                answer, problem, asked_s = await self.try_once(path, body)
            finally:
                self.counters["server_s"] += time.monotonic() - start
                start = time.monotonic()
            if answer is not None:
                self.counters["server_requests"] += 1
                return answer
            wait_s = max(wait_s, asked_s)
        raise ServerFailed(f"{self.url}{path} failed {TRIES} times, at last with {problem}")

    async def try_once(self, path: str, body: dict) -> tuple[dict | None, str, float]:
        """-> answer or None, what failed, and the seconds that the server asks us to wait."""
        import httpx2
        try:
            response = await self.http.post(self.url + path, json=body)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return None, f"{type(error).__name__} {error}".strip(), 0
        said = " ".join(response.text[:300].split())
        if response.status_code in RETRIED:
            return None, f"status {response.status_code} ({said})", retry_after(response.headers)
        if response.status_code != 200:
            raise RequestRefused(self.url + path, response.status_code, said)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        return (answer, "", 0) if isinstance(answer, dict) else (None, f"no JSON ({said})", 0)

    async def get(self, url: str) -> Any:
        """A JSON answer, None if there is none: for what only some servers know."""
        import httpx2
        try:
            response = await self.http.get(url)
            return response.json() if response.status_code == 200 else None
        except (httpx2.HTTPError, ValueError):
            return None

    def close(self):
        def stop():
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_soon(self.loop.stop)
        self.loop.call_soon_threadsafe(stop)


class RequestRefused(UserError):
    """The server answered that a request is wrong."""

    def __init__(self, url: str, status: int, said: str):
        super().__init__(f"{url} refuses the request with status {status} ({said}): see --server "
                         "and --served-model in docs/robot.md")
        self.status = status


def retry_after(headers) -> float:
    """The seconds of a Retry-After header, at most a minute; 0 without one, or with a date.

    >>> retry_after({"retry-after": "3"}), retry_after({"retry-after": "900"}), retry_after({})
    (3.0, 60.0, 0.0)
    """
    text = headers.get("retry-after", "")
    return min(60.0, float(text)) if text.isdecimal() else 0.0


# ---------------------------------------------------------------- requests


class Answer(NamedTuple):
    text: str
    plan: list[int]         # [] if it is unreadable
    tokens: int             # of prompt and answer, as the server counts them


def png(frame: np.ndarray) -> str:
    """uint8 (h, w, 3) -> base64 of a PNG: lossless, and the same bytes for the same frame, so that
    a server's cache finds it again."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def content_parts(text: str, pictures: Iterable[str]) -> list[dict]:
    """A text with <image> placeholders, and a data URL for each -> a message's content.

    >>> content_parts("Now: <image>", ["data:.."])
    [{'type': 'text', 'text': 'Now: '}, {'type': 'image_url', 'image_url': {'url': 'data:..'}}]
    """
    pieces, parts = text.split("<image>"), []
    for piece, picture in zip(pieces, [*pictures, None], strict=True):
        parts += [{"type": "text", "text": piece}] * bool(piece)
        parts += [{"type": "image_url", "image_url": {"url": picture}}] * (picture is not None)
    return parts


def picture_url(frame: np.ndarray) -> str:
    return "data:image/png;base64," + png(frame)


class ChatServer:
    """A server of chat completions that runs the model of a checkpoint folder.

    policy: its contract, prompt and tokenizer; its weights are not needed (device "meta").
    """

    # vLLM and SGLang know these, and take the checkpoint's own values without them; transformers
    # serve refuses them.
    extra = {"top_k": -1, "repetition_penalty": 1.0}

    def __init__(self, client: JsonClient, model: str, policy: Policy, max_tokens: int,
                 temperature: float = 0.0):
        self.client, self.policy = client, policy
        self.request = {"model": model, "temperature": float(temperature),
                        "top_p": policy.contract.get("sampling", {}).get("top_p", 1.0),
                        "max_tokens": max_tokens,
                        "logit_bias": {str(token): -100.0 for token in policy.banned_ids}}

    def check_request(self, body: dict, ours: int) -> dict:
        """Send a request of `ours` prompt tokens -> what was found, for server.json. UserError if
        the server does not read the prompt as we do."""
        try:
            theirs = read_answer(self.first_reply(body))[2].get("prompt_tokens")
        except ServerFailed as error:
            raise UserError(f"{error}: start the server, wait until it is ready, and give its "
                            "address with --server, as in http://127.0.0.1:8000/v1") from None
        if theirs != ours:
            raise UserError(
                f"{self.client.url} counts {theirs} prompt tokens and we count {ours} for the same "
                "words and frame: its chat template, its pixel budget or its tokenizer is another; "
                "serve the folder of --ckpt")
        version = self.client.submit(self.client.get(
            self.client.url.removesuffix("/v1") + "/version")).result()
        return {"url": self.client.url, "version": version, "prompt_tokens": ours,
                "request": self.request}

    def first_reply(self, body: dict) -> dict:
        """The reply to a request with the extra parameters; without them if they are refused."""
        def ask(more):
            return self.client.submit(
                self.client.post("/chat/completions", {**body, **more})).result()
        try:
            reply = ask(self.extra)
        except RequestRefused as error:
            if error.status not in (400, 422):
                raise
            reply = ask({})                         # raises where these were not the reason
            self.check_defaults()
        else:
            self.request |= self.extra
        return reply

    def check_defaults(self):
        """UserError if the checkpoint's generation_config.json changes what the server decides,
        since the server takes no parameters to the contrary."""
        held = json.loads(self.policy.files.get("generation_config.json", b"{}"))
        if held.get("repetition_penalty") not in (None, 1):
            raise UserError(
                f"the server takes no repetition_penalty, and the checkpoint's "
                f"generation_config.json asks for {held['repetition_penalty']}, which changes the "
                "answers: set it to 1 in the folder that is served")

    def close(self):
        self.client.close()


class ChatPolicy(ChatServer):
    """The policy of a checkpoint folder, run by a server of chat completions.

    execute, malformed, blank, temperature, seed: as for Policy.agent().
    """

    def __init__(self, client: JsonClient, model: str, policy: Policy, execute: int = 3,
                 malformed: str = "stop", blank: bool = False, temperature: float = 0.0,
                 seed: int = 0):
        self.dialog = policy.whole_walks
        super().__init__(client, model, policy, 48 if self.dialog else MAX_ANSWER_TOKENS,
                         temperature)
        self.execute, self.blank, self.temperature, self.seed = execute, blank, temperature, seed
        self.fallback = [STOP if malformed == "stop" else FORWARD]

    def check(self, instruction: str, height: int, width: int) -> dict:
        """check_request() with a walk's first request and a black frame."""
        walk = EpisodeState({}, instruction, name="check")
        walk.frames.append(np.zeros((height, width, 3), dtype=np.uint8))
        return self.check_request(self.body(walk), self.prompt_tokens(instruction, height, width))

    def prompt_tokens(self, instruction: str, height: int, width: int) -> int:
        """Of a walk's first request."""
        text = self.policy.instruction_prompt(instruction, 0)
        return len(self.policy.prompt(text, [self.policy._blank_frame(height, width)],
                                      self.policy.opening).ids)

    # ------------------------------------------------------------ a decision

    def ask(self, walk: EpisodeState) -> Future:
        """Send the request for a walk's next plan -> Future of an Answer."""
        return self.client.submit(self.answer(self.body(walk)))

    async def answer(self, body: dict) -> Answer:
        reply = await self.client.post("/chat/completions", body)
        text, cut_off, usage = read_answer(reply)
        plan = [] if self.dialog and cut_off else self.policy.parse(text)
        return Answer(text, plan, sum(usage.get(key) or 0 for key in (
            "prompt_tokens", "completion_tokens")))

    def record(self, walk: EpisodeState, answer: Answer) -> list[int]:
        """Add an answer to its walk -> the actions to carry out."""
        walk.tokens = answer.tokens + (0 if self.dialog else walk.tokens)   # a dialog is one text
        walk.add_decision(answer.text, answer.plan, walk.frames[-1] if self.dialog else None)
        return answer.plan[:None if self.dialog else self.execute] or self.fallback

    def body(self, walk: EpisodeState) -> dict:
        """The request for a walk's next plan. Its features are its frames as data URLs."""
        frames = walk.frames[-1:] if self.dialog else walk.frames
        walk.features += [picture_url(self.policy.resize(np.zeros_like(f) if self.blank else f))
                          for f in frames]
        seed = random.Random(f"{self.seed} {walk.name} {len(walk.actions)}").getrandbits(31)
        return {**self.request, "messages": self.messages(walk),
                **({"seed": seed} if self.temperature > 0 else {})}

    def messages(self, walk: EpisodeState) -> list[dict]:
        """A walk as a chat. Our prompts have no system message: the template adds what it adds."""
        if self.dialog:
            turns = [self.policy.instruction_prompt(walk.instruction, 0)]
            turns += [self.policy.later_prompt(walk.instruction)] * (len(walk.features) - 1)
            messages = [{"role": role, "content": text} for role, text in self.policy.opening]
            for i, (text, picture) in enumerate(zip(turns, walk.features)):
                messages.append({"role": "user", "content": content_parts(text, [picture])})
                if i < len(walk.decisions):
                    messages.append({"role": "assistant", "content": walk.decisions[i].text})
            return messages
        t = len(walk.features) - 1
        past = pick_frames(t, **self.policy.contract["memory"])
        text = self.policy.instruction_prompt(walk.instruction, len(past))
        return [{"role": "user",
                 "content": content_parts(text, [walk.features[i] for i in (*past, t)])}]


def read_answer(reply: dict) -> tuple[str, bool, dict]:
    """A chat completion -> its text, was it cut off, and its usage. UserError if it is none,
    ServerFailed if the server did not end it as a model ends an answer."""
    try:
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
        usage = reply.get("usage") or {}
    except (KeyError, IndexError, TypeError):
        raise UserError(f"the server answered {json.dumps(reply)[:200]}, which is no chat "
                        "completion: --server must name an OpenAI-compatible server, as in "
                        "http://127.0.0.1:8000/v1") from None
    if reason in FAILED:
        raise ServerFailed(f"the server ended an answer with finish_reason {reason!r}")
    return text, reason == "length", usage


class RobotPolicy:
    """The policy that tools/serve.py runs. It keeps the walks' memory and decides by its own flags;
    expected: what /health must say of them. name: this evaluation's, since others may walk the
    same episodes there at the same time."""

    def __init__(self, client: JsonClient, expected: dict, blank: bool, name: str):
        self.client, self.expected, self.blank, self.name = client, expected, blank, name
        self.dialog = expected["contract"]["prompt"].startswith("dialog")

    def check(self, *first_prompt) -> dict:
        """UserError unless the server runs this checkpoint with these flags."""
        found = self.client.submit(self.client.get(self.client.url + "/health")).result()
        if not isinstance(found, dict):
            raise UserError(f"{self.client.url}/health gives no answer: start python -m tools.serve"
                            " there; for an OpenAI-compatible server the address ends in /v1")
        for key, value in self.expected.items():
            if found.get(key) != value:
                raise UserError(f"{self.client.url} runs with {key} = {found.get(key)!r:.200} and "
                                f"this evaluation with {value!r:.200}: start tools.serve with the "
                                "checkpoint and the flags of the evaluation")
        return {"url": self.client.url, **self.expected}

    def ask(self, walk: EpisodeState) -> Future:
        frames = walk.frames[-1:] if self.dialog else walk.frames
        return self.client.submit(self.answer({
            "client": self.name, "session": walk.name, "decision": len(walk.decisions),
            "instruction": walk.instruction,
            "frames": [png(np.zeros_like(f) if self.blank else f) for f in frames]}))

    async def answer(self, body: dict) -> dict:
        try:
            return await self.client.post("/act", body)
        except RequestRefused as error:
            if error.status != 409:
                raise
            raise ServerFailed(str(error)) from None            # started again, it knows no walk

    def record(self, walk: EpisodeState, answer: dict) -> list[int]:
        walk.tokens = answer["tokens"]
        walk.add_decision(answer["text"], answer["plan"])
        return answer["actions"]

    def close(self):
        self.client.close()


# ---------------------------------------------------------------- the loop


@dataclass(eq=False)
class RemoteLoop(EpisodeLoop):
    """EpisodeLoop whose agent (ChatPolicy) answers later, each robot for itself.

    A walk under way is with its simulator, in `waiting`, or in `asked`. None waits for another.
    """
    asked: dict[Future, int] = field(default_factory=dict)  # by answers that are not there yet
    failures: int = 0                                       # walks in a row that the server failed

    def run(self) -> Iterator[EpisodeState]:
        try:
            yield from super().run()
        finally:
            self.agent.close()

    def busy(self) -> int:
        """How many simulators are at work."""
        return len(self.running) - len(self.asked) - len(self.waiting)

    def listen(self):
        """Handle a reply of a simulator, and the answers that have come; wait for one of them."""
        if self.busy():
            arrived = self.pool.wait_any(POLL_S if self.asked else math.inf)
            if arrived is not None:
                self.on_reply(*arrived)
        done, _ = concurrent.futures.wait(
            self.asked, 0 if self.busy() or self.waiting or self.ended else None,
            return_when=concurrent.futures.FIRST_COMPLETED)
        for future in sorted(done, key=self.asked.get):
            self.on_answer(self.asked.pop(future), future)

    def decide(self):
        for sim in sorted(self.waiting):
            self.asked[self.agent.ask(self.running[sim])] = sim
        self.waiting.clear()

    def on_answer(self, sim: int, future: Future):
        """A failure ends the walk without a result; with more than `sims` in a row, the run."""
        try:
            answer = future.result()
        except ServerFailed as error:
            self.failures += 1
            if self.failures > self.sims:
                raise UserError(f"the server has failed {self.failures} walks in a row ({error}); "
                                "start it again: the same command goes on where this one "
                                "ended") from None
            self.finish(sim, "error", str(error))
        else:
            self.failures = 0
            self.act(sim, self.agent.record(self.running[sim], answer))


def run_episodes(pool, walks: Iterable[EpisodeState], agent: ChatPolicy | RobotPolicy, **options
                 ) -> Iterator[EpisodeState]:
    """evaluate.run_episodes() for an agent behind a server."""
    agent.client.counters = options.get("counters", agent.client.counters)
    return RemoteLoop(pool, deque(walks), agent, **options).run()


def connect(args, settings: dict, policy: Policy, out: str) -> ChatPolicy | RobotPolicy:
    """The agent of evaluate.py's flags. out: the results folder, which one evaluation holds."""
    client = JsonClient(args.server, args.server_timeout, os.environ.get("SERVER_TOKEN"))
    if args.served_model:
        return ChatPolicy(client, args.served_model, policy, args.execute, args.malformed,
                          args.blank_frames, args.temperature, args.seed)
    place = f"{socket.gethostname()}:{os.path.abspath(out)}"
    return RobotPolicy(client, {key: settings[key] for key in SERVED}, args.blank_frames,
                       hashlib.sha256(place.encode()).hexdigest())
