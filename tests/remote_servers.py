"""Servers for tests of tools/remote.py: our own policy behind chat completions, with failures on
request, and transformers serve (it brings torch)."""
import base64
import functools
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import free_port
from PIL import Image

from checkpoint import load_policy, save_policy
from make_data import VlnEgo
from model import CONTRACT, policy_class
from sft import step_groups


@functools.lru_cache(None)
def learned_checkpoint(ego, prompt, steps=25, words=None):
    """A tiny policy that has learned the walks of `ego` by heart -> its folder, beside them.
    words: JSON of the contract's, for the prompt dialog-words-1."""
    folder = os.path.join(os.path.dirname(ego), f"learned_{prompt}")
    data, kind = VlnEgo(ego), policy_class(prompt)
    contract = {**kind.default_contract, **{key: value for key, value in data.meta["robot"].items()
                                            if key in CONTRACT}, "dataset": "houses"}
    if "memory" in contract:
        contract["memory"] = {**contract["memory"], "budget": 3, "recent": 2}
    if words:
        contract["words"] = json.loads(words)
    texts = [episode["instruction"] for episode in data.episodes]
    policy = load_policy("tiny", contract=contract, texts=texts)
    units = step_groups(data, 0, 0, None if policy.whole_walks else 4)[:8]
    examples, frames = policy.load_batch(data, units)
    inputs, mask = policy.model_inputs(policy.tokenize_answers(examples), frames)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = -(policy(*inputs) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_policy(policy, folder)
    return folder


def house_argv(ego, ckpt, out, *flags):
    houses = os.path.join(os.path.dirname(os.path.dirname(ego)), "houses")
    return ["--episodes", houses, "--split", "val_unseen", "--ckpt", ckpt, "--max-actions", "24",
            "--sims", "2", "--out", str(out), *flags]


class PolicyServer:
    """Chat completions answered by a checkpoint, each request by itself, from its messages alone.

    fault(n, body) -> None, (status, text, headers), "reset", or "late": what goes wrong with the
    n-th request. strict: refuse fields that OpenAI's API lacks, as transformers serve does.
    """

    def __init__(self, folder, fault=lambda n, body: None, strict=False, more_tokens=0):
        self.policy, self.fault, self.strict = load_policy(folder).eval(), fault, strict
        self.bodies, self.lock, self.more_tokens = [], threading.Lock(), more_tokens
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                owner.handle(self)

            def do_GET(self):
                owner.send(self, 200, json.dumps({"version": "0.1"}))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    @staticmethod
    def send(handler, status, text, headers=()):
        handler.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(text.encode())))):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            n = len(self.bodies)
            self.bodies.append(body)
        fault = self.fault(n, body)
        if fault == "reset":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif fault == "late":
            time.sleep(3)
        elif fault:
            self.send(handler, *fault)
        elif handler.path != "/v1/chat/completions" or self.strict and "top_k" in body:
            self.send(handler, 422, json.dumps({"detail": "unknown field"}))
        else:
            self.send(handler, 200, json.dumps(self.complete(body)))

    def complete(self, body):
        """The chat template and generate() once more for the whole conversation."""
        texts, frames = [], []
        for message in body["messages"]:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            text = ""
            for part in parts:
                if part["type"] == "text":
                    text += part["text"]
                    continue
                kind, content = part["image_url"]["url"].split(",")
                assert kind == "data:image/png;base64"
                frames.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))))
                text += "<image>"
            texts.append((message["role"], text))
        with self.lock, torch.no_grad():
            prompt = self.policy.prompt(texts[-1][1], self.policy.encode_frames(frames),
                                        tuple(texts[:-1]))
            found = self.policy.generate([prompt], max_new_tokens=body["max_tokens"],
                                         draft="chat" not in self.policy.contract["prompt"])
        assert sorted(map(int, body["logit_bias"])) == sorted(self.policy.banned.tolist())
        ids = found.completion_ids[0][found.completion_mask[0]].tolist()
        ended = ids[-1] == self.policy.end_token
        return {"choices": [{"message": {"role": "assistant", "content": found.texts[0]},
                             "finish_reason": "stop" if ended else "length"}],
                "usage": {"prompt_tokens": len(prompt.ids) + self.more_tokens,
                          "completion_tokens": len(ids)}}


def wait_until_it_answers(url, process=None):
    deadline = time.monotonic() + 300                           # a guard, not a measurement
    while True:
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        try:
            return urllib.request.urlopen(url + "/health", timeout=5).close()
        except OSError:
            time.sleep(0.1)


def serve_process(ckpt, port):
    """tools.serve in a process of its own, once it answers."""
    process = subprocess.Popen([sys.executable, "-m", "tools.serve", "--ckpt", str(ckpt), "--port",
                                str(port)], cwd=ROOT)
    wait_until_it_answers(f"http://127.0.0.1:{port}", process)
    return process


# ---------------------------------------------------------------- transformers serve

# What `transformers serve` needs beyond requirements.txt. torchvision's own dependency, a CUDA
# build of torch, is left out.
WHEELS = (["fastapi", "uvicorn", "openai"], ["--no-deps", "torchvision"])


def transformers_serve_packages(folder):
    """A folder with WHEELS: $TRANSFORMERS_SERVE, or fetched. Skips the test where neither is."""
    if os.environ.get("TRANSFORMERS_SERVE"):
        return os.environ["TRANSFORMERS_SERVE"]
    for wheels in WHEELS:
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target",
                               str(folder), *wheels], capture_output=True, text=True, timeout=500)
        if done.returncode:
            pytest.skip("needs the wheels of `transformers serve` from PyPI "
                        f"({done.stderr.strip().splitlines()[-1][:120]})")
    return str(folder)


class TransformersServe:
    """`transformers serve FOLDER` in a process of its own, on a port that stays the same."""

    def __init__(self, packages, model):
        self.packages, self.model, self.port, self.process = packages, str(model), free_port(), None
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "tests", "transformers_serve.py"), "serve",
             self.model, "--device", "cpu", "--port", str(self.port)],
            env={**os.environ, "PYTHONPATH": self.packages},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = []
        threading.Thread(target=lambda: errors.extend(self.process.stderr), daemon=True).start()
        deadline = time.monotonic() + 300                      # a guard, not a measurement
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(errors)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)

    def kill(self):
        self.process.kill()
        self.process.wait()
