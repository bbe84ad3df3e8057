"""
A checkpoint behind one HTTP endpoint: a robot posts its instruction and frames, and gets actions.

    POST /act     {"session": "robot-7", "decision": 0, "instruction": "Leave the kitchen ..",
                   "frames": ["<base64 of a PNG or JPEG>"]}
              ->  {"actions": [1, 1, 2], "plan": [1, 1, 2, 1, 1, 1], "text": "A. Move ..",
                   "tokens": 131, "ms": {"decode": .., "wait": .., "model": ..}}
    GET  /health  what is served, and how many sessions are open

actions: 0 stop, 1 forward, 2 left, 3 right; carry them out in this order. plan: all that the answer
says, [] if it is unreadable. frames: what the camera saw since the last answer, oldest first: the
first time one, then one after each action (dialogs need the last one only). decision counts the
answers of the session: the same request again gets the same answer, so a lost reply can be asked
for again; decision 0 begins the walk again. Two programs that may use the same session names add a
"client", a text of their own. A session keeps what the policy remembers (features of frames, a
dialog's cache) until its stop, or until it has been idle for --idle-s.

Sessions that ask at the same time share one batch. The batch waits for the other sessions of the
last two batches at most half as long as the last decision took, as evaluate.py does.

Run it   python -m tools.serve --ckpt ckpt/grpo
         SERVER_TOKEN=.. python -m tools.serve --ckpt ckpt/grpo --host 0.0.0.0
Needs    starlette and uvicorn (pip install starlette uvicorn)
"""
from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hashlib
import hmac
import io
import ipaddress
import json
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from checkpoint import load_policy
from cli import (
    DefaultsFormatter,
    UserError,
    fingerprint,
    non_negative,
    positive_int,
    run_cli,
    whole_number,
)
from evaluate import EpisodeState, check_context, choose_device, read_nav
from model import Policy
from reward import STOP
from world.episodes import is_text, text_problem

MAX_FRAMES, MAX_WORDS, MAX_NAME = 64, 4000, 200     # of a request; characters of the two texts
MAX_PIXELS = 4096 * 4096                            # of a frame


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.serve", formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    p.add_argument("--ckpt", required=True, help="checkpoint folder")
    p.add_argument("--host", default="127.0.0.1", help="beyond this machine (0.0.0.0, an address) "
                   "the environment must hold SERVER_TOKEN, which clients send as a bearer token")
    p.add_argument("--port", type=int, default=8008)
    p.add_argument("--execute", type=positive_int, default=3, help="actions of a plan to return")
    p.add_argument("--malformed", choices=("stop", "forward"), default="stop")
    p.add_argument("--temperature", type=non_negative, default=0.0)
    p.add_argument("--seed", type=whole_number, default=0)
    p.add_argument("--max-sessions", type=positive_int, default=64)
    p.add_argument("--max-decisions", type=positive_int, default=500, help="of a session")
    p.add_argument("--max-bytes", type=positive_int, default=32 << 20, help="of a request")
    p.add_argument("--idle-s", type=non_negative, default=600, help="a session is closed after it")
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, "
                   "else float32")
    p.add_argument("--threads", type=positive_int, default=1, help="CPU threads")
    return p.parse_args(argv)


class Refused(Exception):
    """A request that cannot be answered: a status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


# ---------------------------------------------------------------- a request


class ActRequest(NamedTuple):
    client: str
    session: str
    decision: int
    instruction: str
    frames: list[np.ndarray]        # uint8 (H, W, 3)
    digest: str                     # of the body: is it the same request again?

    @property
    def key(self) -> tuple[str, str]:
        return self.client, self.session


def read_request(body: bytes) -> ActRequest:
    """Refused (400) unless the body is such a request, within the limits."""
    try:
        found = json.loads(body)
        session, decision, instruction, pictures = (
            found[key] for key in ("session", "decision", "instruction", "frames"))
        client = found.get("client", "-")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(400, "the body must be a JSON object with session, decision, instruction and "
                      f"frames ({error!r})") from None
    for name, text, most in (("session", session, MAX_NAME), ("client", client, MAX_NAME),
                             ("instruction", instruction, MAX_WORDS)):
        if not is_text(text) or not 0 < len(text) <= most:
            raise Refused(400, f"{name} must be a text of 1 to {most} characters")
    if problem := text_problem(instruction):
        raise Refused(400, f"the instruction cannot be used: {problem}")
    if type(decision) is not int or decision < 0:
        raise Refused(400, "decision must be the number of answers that the session has had")
    if not isinstance(pictures, list) or not 0 < len(pictures) <= MAX_FRAMES:
        raise Refused(400, f"frames must be a list of 1 to {MAX_FRAMES} pictures")
    return ActRequest(client, session, decision, instruction, [read_frame(p) for p in pictures],
                      hashlib.sha256(body).hexdigest())


def read_frame(picture: Any) -> np.ndarray:
    """base64 of a PNG or JPEG -> uint8 (H, W, 3). Refused (400)."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(picture, validate=True)),
                           formats=("PNG", "JPEG"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, TypeError, binascii.Error, SyntaxError,
            Image.DecompressionBombError) as error:
        raise Refused(400, "a frame must be the base64 text of a PNG or JPEG "
                      f"({str(error)[:100]})") from None


# ---------------------------------------------------------------- sessions and batches


@dataclass(eq=False)
class Session:
    walk: EpisodeState | None           # None after its stop
    number: int                         # in the order of their first requests
    answers: int = 0
    batch: int = 0                      # the last one that it was part of
    digest: str = ""                    # of the last request
    reply: asyncio.Future | None = None     # to it
    used: float = field(default_factory=time.monotonic)


class Job(NamedTuple):
    session: Session
    request: ActRequest
    reply: asyncio.Future
    arrived: float


class Service:
    """Sessions, and the thread in which the policy decides for all that wait."""

    def __init__(self, policy: Policy, args):
        self.policy, self.args, self.sessions, self.opened = policy, args, {}, 0
        self.agent = policy.agent(execute=args.execute, malformed=args.malformed,
                                  temperature=args.temperature, seed=args.seed)
        self.jobs, self.last_s, self.batches = queue.Queue(), 0.0, 0
        self.served = {"weights": fingerprint(args.ckpt), "contract": policy.contract,
                       "execute": args.execute, "malformed": args.malformed,
                       "temperature": args.temperature, "seed": args.seed}
        threading.Thread(target=self.run, daemon=True).start()

    # ------------------------------------------------------------ on the event loop

    async def act(self, request: ActRequest) -> dict:
        """The answer to a request. Refused."""
        session = self.sessions.get(request.key)
        if session and request.digest == session.digest and not failed(session.reply):
            return await asyncio.shield(session.reply)              # the same request again
        if session and not session.reply.done():
            raise Refused(409, f"session {request.session!r} has a request under way")
        if request.decision == 0:
            session = self.open(request)
        elif session is None or session.walk is None or request.decision != session.answers:
            raise Refused(409, f"session {request.session!r} has had "
                          f"{session.answers if session else 0} answers, and the request is for "
                          f"decision {request.decision}: begin again with decision 0")
        elif request.instruction != session.walk.instruction:
            raise Refused(409, f"session {request.session!r} has another instruction: begin again "
                          "with decision 0")
        elif session.answers == self.args.max_decisions:
            raise Refused(409, f"session {request.session!r} has had {session.answers} answers, "
                          "which is --max-decisions")
        session.walk.frames += request.frames
        session.digest, session.used = request.digest, time.monotonic()
        session.reply = asyncio.get_running_loop().create_future()
        self.jobs.put(Job(session, request, session.reply, time.perf_counter()))
        return await asyncio.shield(session.reply)

    def open(self, request: ActRequest) -> Session:
        """A new session in place of an old one of its name and client. Refused if there are too
    many."""
        idle = time.monotonic() - self.args.idle_s
        for name in [name for name, s in self.sessions.items()
                     if s.used < idle and s.reply.done() or name == request.key]:
            del self.sessions[name]
        if len(self.open_sessions()) >= self.args.max_sessions:
            raise Refused(503, f"{self.args.max_sessions} sessions are open (--max-sessions)")
        walk = EpisodeState({"episode_id": request.session}, request.instruction)
        self.opened += 1
        self.sessions[request.key] = Session(walk, self.opened)
        return self.sessions[request.key]

    def open_sessions(self) -> list[Session]:
        return [s for s in list(self.sessions.values()) if s.walk is not None]

    # ------------------------------------------------------------ in the thread

    def run(self):
        while True:
            jobs = [self.jobs.get()]
            until = time.perf_counter() + self.last_s / 2
            while self.awaited(jobs):
                try:
                    jobs.append(self.jobs.get(timeout=max(0, until - time.perf_counter())))
                except queue.Empty:
                    break
            self.decide(sorted(jobs, key=lambda job: job.session.number))

    def awaited(self, jobs: list[Job]) -> list[Session]:
        """Open sessions that will probably ask soon. Those that have missed two batches will not: a
        robot may leave without a stop."""
        asked = {job.session for job in jobs}
        return [s for s in self.open_sessions() if s.batch >= self.batches - 1 and s not in asked]

    def decide(self, jobs: list[Job]):
        """One decision for all; each reply is handed over to the event loop."""
        start, self.batches = time.perf_counter(), self.batches + 1
        for job in jobs:
            job.session.batch = self.batches
        try:
            jobs = [job for job in jobs if job.session.answers or self.fits(job)]
            walks = [job.session.walk for job in jobs]
            plans = self.agent(walks) if walks else []
            if self.policy.nan_logits:
                raise ValueError("the checkpoint gives log-probabilities that are not finite")
        except Exception as error:                  # the thread must go on for the other sessions
            for job in jobs:
                job.session.walk = None                             # it may be half changed
                set_later(job.reply, Refused(500, f"{type(error).__name__}: {error}"))
            return
        self.last_s = time.perf_counter() - start
        for job, walk, plan in zip(jobs, walks, plans):
            plan = plan[:plan.index(STOP) + 1] if STOP in plan else plan
            walk.actions += plan
            decision, job.session.answers = walk.decisions[-1], job.session.answers + 1
            if plan[-1] == STOP:
                job.session.walk = None
            set_later(job.reply, {"actions": plan, "plan": decision.plan, "text": decision.text,
                                  "tokens": walk.tokens, "ms": {
                                      "wait": 1000 * (start - job.arrived),
                                      "model": 1000 * self.last_s}})

    def fits(self, job: Job) -> bool:
        """Does the longest prompt of a new session fit the model? If not, it is refused here: a
        tokenizer is not to be used by two threads."""
        height, width = job.request.frames[0].shape[:2]
        try:
            check_context(self.policy, [job.request.instruction],
                          {"height": height, "width": width})
        except UserError as error:
            job.session.walk = None
            set_later(job.reply, Refused(400, str(error)))
        return job.session.walk is not None


def failed(reply: asyncio.Future) -> bool:
    return reply.done() and reply.exception() is not None


def set_later(reply: asyncio.Future, result: dict | Refused):
    """Set a future's result from another thread; a client that has gone is no error."""
    def now():
        if not reply.done():
            reply.set_result(result) if isinstance(result, dict) else reply.set_exception(result)
    reply.get_loop().call_soon_threadsafe(now)


# ---------------------------------------------------------------- HTTP


def make_app(service: Service, token: str | None = None):
    """The ASGI application. token: what a client must send, if anything."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def act(request):
        try:
            check_token(request.headers, token)
            body = await read_body(request, service.args.max_bytes)
            start = time.perf_counter()
            found = await run_in_threadpool(read_request, body)
            decode = 1000 * (time.perf_counter() - start)
            answer = await service.act(found)
            return JSONResponse({**answer, "ms": {"decode": decode, **answer["ms"]}})
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.status,
                                {"Retry-After": "1"} if error.status == 503 else {})

    async def health(request):
        return JSONResponse({**service.served, "sessions": len(service.open_sessions())})

    return Starlette(routes=[Route("/act", act, methods=["POST"]), Route("/health", health)])


def check_token(headers, token: str | None):
    if token and not hmac.compare_digest(headers.get("authorization", "").encode(),
                                         f"Bearer {token}".encode()):
        raise Refused(401, "send the server's token: Authorization: Bearer ..")


async def read_body(request, limit: int) -> bytes:
    """Refused (413) as soon as it is longer than the limit."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"the request is longer than {limit} bytes (--max-bytes)")
    return body


def is_loopback(host: str) -> bool:
    """Is an address reached from this machine only?

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("")
    (True, True, True, False)
    >>> is_loopback("0.0.0.0"), is_loopback("robot.example.org")
    (False, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(args):
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install starlette uvicorn") from None
    token = os.environ.get("SERVER_TOKEN")
    if not token and not is_loopback(args.host):
        raise UserError(f"--host {args.host} can be reached from other machines: set SERVER_TOKEN, "
                        "a secret that clients send, or leave --host out")
    torch.set_num_threads(args.threads)
    device, dtype = choose_device(args)
    if "horizon" not in read_nav(os.path.join(args.ckpt, "nav.json")):
        raise UserError(f"{args.ckpt} answers questions and drives no robot: --ckpt must name a "
                        "folder of --prompt window or dialog")
    policy = load_policy(args.ckpt, device=device, dtype=dtype).eval()
    print(f"{args.ckpt} at http://{args.host}:{args.port}/act", flush=True)
    uvicorn.run(make_app(Service(policy, args), token), host=args.host, port=args.port,
                log_level="warning", timeout_keep_alive=75)


if __name__ == "__main__":
    run_cli(main, parse_args)
