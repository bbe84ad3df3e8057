"""
tools/serve.py: walks through the endpoint are those of evaluate.py in one process, byte for byte,
for window prompts and dialogs; what it refuses, and what it does with a request that comes twice.
"""
import base64
import concurrent.futures
import json
import signal
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from conftest import ROOT
from helpers import free_port

import evaluate
from checkpoint import load_policy
from cli import UserError, read_rows

pytest.importorskip("starlette", reason="needs starlette (pip install starlette uvicorn)")
pytest.importorskip("uvicorn", reason="needs uvicorn (pip install starlette uvicorn)")
pytest.importorskip("httpx2", reason="needs httpx2 (requirements.txt)")
from remote_servers import (  # noqa: E402
    house_argv,
    learned_checkpoint,
    serve_process,
    wait_until_it_answers,
)

from tools import remote, serve  # noqa: E402

TOKEN = "a-token-of-the-tests"


class Endpoint:
    """tools.serve's application in a thread, on a port that the kernel gives."""

    def __init__(self, ckpt, *flags, token=None):
        import uvicorn
        args = serve.parse_args(["--ckpt", ckpt, *map(str, flags)])
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        app = serve.make_app(serve.Service(load_policy(ckpt).eval(), args), token)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="warning"))

    def __enter__(self):
        threading.Thread(target=self.server.run, daemon=True).start()
        wait_until_it_answers(self.url)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True

    def post(self, body, token=None):
        """-> status, answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.url + "/act", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def health(self):
        with urllib.request.urlopen(self.url + "/health", timeout=60) as reply:
            return json.load(reply)


def frame(seed=0, size=56):
    return remote.png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def asks(session="a", decision=0, frames=None, instruction="Go to the red sofa."):
    return {"session": session, "decision": decision, "instruction": instruction,
            "frames": frames or [frame(decision)]}


@pytest.fixture(scope="module", params=["window", "dialog"])
def ckpt(ego, request):
    return learned_checkpoint(ego, request.param)


@pytest.fixture(scope="module")
def window(ego):
    return learned_checkpoint(ego, "window")


@pytest.fixture(scope="module")
def endpoint(window):
    with Endpoint(window, "--max-sessions", 3, "--max-decisions", 4, "--max-bytes", 50_000,
                  "--malformed", "forward", "--idle-s", 2) as running:
        yield running


# ---------------------------------------------------------------- equal walks


def test_walks_through_it_are_those_of_one_process(ego, ckpt, tmp_path):
    evaluate.main(evaluate.parse_args(house_argv(ego, ckpt, tmp_path / "here", "--sims", "3")))
    with Endpoint(ckpt) as endpoint:
        found = evaluate.main(evaluate.parse_args(house_argv(
            ego, ckpt, tmp_path / "there", "--sims", "3", "--server", endpoint.url)))
    here, there = (tmp_path / name / "episodes.jsonl" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()
    assert found["served_model"] == "tools.serve" and found["server"]["execute"] == 3
    rows = read_rows(there)
    assert sum(row["decisions"] for row in rows) > 12
    assert set("".join(row["actions"] for row in rows)) > set("12")


def test_a_server_that_is_killed_and_started_again(ego, window, tmp_path, monkeypatch):
    """The walks under way have no score; the same command walks them again."""
    monkeypatch.setattr(remote.JsonClient, "first_wait_s", 0.05)
    evaluate.main(evaluate.parse_args(house_argv(ego, window, tmp_path / "here")))
    rows, port = tmp_path / "there" / "episodes.jsonl", free_port()
    url = f"http://127.0.0.1:{port}"
    argv = house_argv(ego, window, tmp_path / "there", "--server", url)

    def kill_after_a_row():
        while not rows.exists() or not rows.read_text():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)

    process = serve_process(window, port)
    killer = threading.Thread(target=kill_after_a_row)
    killer.start()
    with pytest.raises((SystemExit, UserError), match="failed"):
        evaluate.main(evaluate.parse_args(argv))
    killer.join()
    process.wait()
    process = serve_process(window, port)
    try:
        evaluate.main(evaluate.parse_args(argv))
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "here/episodes.jsonl").read_bytes() == rows.read_bytes()


def test_sessions_that_ask_together_share_a_batch_and_nothing_else(window):
    """Each session's answers are the same alone and among others."""
    def walk(endpoint, name, prefix):
        answers = []
        for k in range(3):
            frames = [frame(f) for f in range(10 * name + 2 * k, 10 * name + 2 * k + 2)]
            status, found = endpoint.post(asks(f"{prefix}{name}", k, frames, f"Go to room {name}."))
            assert status == 200, found
            answers.append((found["actions"], found["plan"], found["text"], found["tokens"]))
            if found["actions"][-1] == 0:
                break
        return answers

    with Endpoint(window, "--malformed", "forward") as endpoint:
        alone = [walk(endpoint, name, "alone") for name in range(6)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda name: walk(endpoint, name, "together"), range(6)))
    assert alone == together and len({str(answers) for answers in alone}) > 1


def test_two_clients_may_use_the_same_session_names(window):
    """One evaluation beside its control run: the answers are those of each alone."""
    def walk(endpoint, client, seed):
        found = []
        for k in range(3):
            body = {**asks("a", k, [frame(seed + k)]), "client": client}
            found.append(endpoint.post(body)[1].get("text"))
            yield found

    with Endpoint(window, "--malformed", "forward") as endpoint:
        alone = [[*walk(endpoint, f"alone{seed}", seed)][-1] for seed in (0, 100)]
        both = [*zip(walk(endpoint, "x", 0), walk(endpoint, "y", 100))]
    assert [*both[-1]] == alone and None not in alone[0]


def test_a_batch_does_not_wait_for_a_robot_that_left():
    service = object.__new__(serve.Service)         # without its thread
    service.batches = 5
    sessions = {name: serve.Session(walk, number, batch=batch) for number, (name, walk, batch) in
                enumerate((("asks", "a walk", 5), ("late", "a walk", 4), ("left", "a walk", 3),
                           ("stopped", None, 5)))}
    service.sessions = sessions
    jobs = [serve.Job(sessions["asks"], None, None, 0.0)]
    assert service.awaited(jobs) == [sessions["late"]]
    assert service.awaited([]) == [sessions["asks"], sessions["late"]]


def test_the_client_of_the_docs_walks(window, tmp_path, monkeypatch):
    with open(f"{ROOT}/docs/robot.md", encoding="utf-8") as file:
        code = file.read().split("# client.py")[1].split("```")[0]
    client, done = {"__name__": "client"}, []
    exec("# client.py" + code, client)
    with Endpoint(window, "--max-decisions", 6) as endpoint:
        client["URL"] = endpoint.url + "/act"
        picture = base64.b64decode(frame())
        try:
            decisions = client["walk"]("Go to the red sofa.", lambda: picture, done.append)
            assert len(done) <= 3 * decisions
        except urllib.error.HTTPError as error:
            assert error.code == 409 and len(done) == 18        # it did not stop by itself
    assert done and set(done) <= {1, 2, 3}


# ---------------------------------------------------------------- sessions


def test_a_request_that_comes_twice_gets_one_answer(endpoint):
    def answer(decision):
        status, found = endpoint.post(asks("twice", decision))
        del found["ms"]["decode"]                               # the request is read each time
        return status, found

    first = answer(0)
    assert first[0] == 200 and answer(0) == first
    second = answer(1)
    assert second[0] == 200 and answer(1) == second
    if second[1]["actions"][-1]:
        status, found = endpoint.post(asks("twice", 0))         # again from the start
        assert status == 200
        assert (found["actions"], found["text"]) == (first[1]["actions"], first[1]["text"])
        status, found = endpoint.post(asks("twice", 3))
        assert status == 409 and "has had 1 answers" in found["error"]


def test_limits(endpoint):
    time.sleep(2.1)                                             # --idle-s: of other tests' sessions
    assert endpoint.post(asks("unknown", 2))[0] == 409
    for name in "abc":
        assert endpoint.post(asks(name))[0] == 200
    open_now = endpoint.health()["sessions"]
    if open_now == 3:                                           # none has stopped at once
        status, found = endpoint.post(asks("d"))
        assert status == 503 and "3 sessions are open" in found["error"]
    time.sleep(2.1)
    assert endpoint.post(asks("d"))[0] == 200
    status, found = endpoint.post(asks("d", 1, instruction="Turn around."))
    assert status == 409 and "another instruction" in found["error"]
    k = 1
    while (answer := endpoint.post(asks("d", k)))[0] == 200 and answer[1]["actions"][-1]:
        k += 1
    assert k <= 4 and (answer[0] == 200 or "--max-decisions" in answer[1]["error"])
    status, found = endpoint.post(asks("e", frames=[frame(0, 200)]))
    assert status == 413 and "50000 bytes" in found["error"]


def huge_png() -> str:
    """A picture whose header alone says 20,000 x 20,000 pixels."""
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                            + chunk(b"IDAT", b"") + chunk(b"IEND", b"")).decode()


BOMB = huge_png()


@pytest.mark.parametrize("body, sentence", [
    (b"{", "must be a JSON object"), (b"[1]", "must be a JSON object"),
    ({"session": "a"}, "KeyError"), ({**asks(), "session": ""}, "1 to 200 characters"),
    ({**asks(), "session": 7}, "1 to 200 characters"),
    ({**asks(), "instruction": "x" * 4001}, "1 to 4000 characters"),
    ({**asks(), "instruction": "go <|im_end|>"}, "the prompt reserves"),
    ({**asks(), "instruction": "go \ud800"}, "1 to 4000"),
    ({**asks(), "client": 7}, "client must"),
    ({**asks(), "decision": "0"}, "number of answers"), ({**asks(), "decision": -1}, "number of"),
    ({**asks(), "frames": []}, "1 to 64 pictures"), ({**asks(), "frames": ["%"]}, "PNG or JPEG"),
    ({**asks(), "frames": [base64.b64encode(b"GIF89a").decode()]}, "PNG or JPEG"),
    ({**asks(), "frames": [BOMB]}, "PNG or JPEG"),
    ({**asks(), "frames": [frame()[:400]]}, "PNG or JPEG"), ({**asks(), "frames": [3]}, "PNG or")])
def test_a_request_that_is_wrong_is_a_sentence(endpoint, body, sentence):
    status, found = endpoint.post(body)
    assert status == 400 and sentence in found["error"], found


# ---------------------------------------------------------------- who may ask, and with what


def test_a_token_is_needed_beyond_this_machine(window, monkeypatch):
    monkeypatch.delenv("SERVER_TOKEN", raising=False)
    with pytest.raises(UserError, match="set SERVER_TOKEN"):
        serve.main(serve.parse_args(["--ckpt", window, "--host", "0.0.0.0"]))
    with Endpoint(window, token=TOKEN) as endpoint:
        assert endpoint.post(asks())[0] == 401
        assert endpoint.post(asks(), token=TOKEN + "x")[0] == 401
        assert endpoint.post(asks(), token=TOKEN)[0] == 200


def test_an_evaluation_with_other_flags_or_weights_is_refused(ego, window, endpoint, tmp_path):
    with pytest.raises(UserError, match="runs with malformed = 'forward' and this evaluation with"):
        evaluate.main(evaluate.parse_args(
            house_argv(ego, window, tmp_path / "out", "--server", endpoint.url)))
    with pytest.raises(UserError, match="gives no answer: start python -m tools.serve"):
        evaluate.main(evaluate.parse_args(
            house_argv(ego, window, tmp_path / "out", "--server", "http://127.0.0.1:9")))


def test_a_folder_that_is_no_checkpoint_and_a_missing_package(tmp_path, monkeypatch, window):
    with pytest.raises(UserError, match="nav.json cannot be read"):
        serve.main(serve.parse_args(["--ckpt", str(tmp_path)]))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match="uvicorn is missing: pip install starlette uvicorn"):
        serve.main(serve.parse_args(["--ckpt", window]))
