"""
tools/remote.py: a server decides. Held against the evaluation in this process: on a plane with our
own policy behind chat completions (remote_servers.PolicyServer: failures on request), and in houses
with `transformers serve`, which nobody here wrote.
"""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from helpers import FakePool, slow, write_plane

import evaluate
from cli import UserError, read_rows

pytest.importorskip("httpx2", reason="needs httpx2 (requirements.txt)")
from remote_servers import (  # noqa: E402
    PolicyServer,
    TransformersServe,
    house_argv,
    learned_checkpoint,
    transformers_serve_packages,
)

from tools import remote  # noqa: E402


@pytest.fixture(scope="module", params=["window", "dialog"])
def ckpt(ego, request):
    return learned_checkpoint(ego, request.param)


@pytest.fixture(scope="module")
def window(ego):
    return learned_checkpoint(ego, "window")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote.JsonClient, "first_wait_s", 0.01)


def walk_plane(monkeypatch, data, out, ckpt, *flags):
    monkeypatch.setattr(evaluate, "SimPool", FakePool)
    argv = ["--split", "val", "--episodes", data, "--out", str(out), "--ckpt", ckpt,
            "--max-actions", "20", "--sims", "3", *map(str, flags)]
    return evaluate.main(evaluate.parse_args(argv))


def at(server, *flags):
    return ["--server", server.url, "--served-model", "it", *flags]


def rows_of(out):
    return (out / "episodes.jsonl").read_bytes()


# ---------------------------------------------------------------- equal walks


def test_a_server_walks_as_this_process_does(ego, tmp_path, ckpt):
    evaluate.main(evaluate.parse_args(house_argv(ego, ckpt, tmp_path / "here")))
    with PolicyServer(ckpt) as server:
        found = evaluate.main(evaluate.parse_args(
            house_argv(ego, ckpt, tmp_path / "there", *at(server))))
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")
    rows = read_rows(tmp_path / "here" / "episodes.jsonl")
    assert sum(row["decisions"] for row in rows) > 12                   # or nothing was compared
    assert sum(row["malformed"] for row in rows) < 3
    assert set("".join(row["actions"] for row in rows)) > set("12")
    asked = server.bodies[0]                                            # the check
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.0, 1.0, -1)
    assert asked["repetition_penalty"] == 1.0 and "seed" not in asked
    assert found["server"]["version"] == {"version": "0.1"}
    assert found["server"]["request"]["top_k"] == -1
    timing = json.loads((tmp_path / "there" / "timing.json").read_text())
    assert timing["server_requests"] == len(server.bodies) - 1
    assert (found["device"], found["dtype"], found["served_model"]) == (None, None, "it")


def test_blank_frames_are_blank_there_too_and_samples_have_seeds(monkeypatch, tmp_path, window):
    data = write_plane(tmp_path / "data", n=3)
    walk_plane(monkeypatch, data, tmp_path / "here", window, "--blank-frames")
    with PolicyServer(window) as server:
        walk_plane(monkeypatch, data, tmp_path / "there", window, "--blank-frames", *at(server))
        assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")
        server.bodies.clear()
        walk_plane(monkeypatch, data, tmp_path / "hot", window, "--temperature", "0.5", *at(server))
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == len(seeds) and {b["temperature"] for b in server.bodies} == {0.5}


def test_a_server_that_refuses_vllms_fields_is_asked_without(monkeypatch, tmp_path, window):
    data = write_plane(tmp_path / "data", n=2)
    with PolicyServer(window, strict=True) as server:
        found = walk_plane(monkeypatch, data, tmp_path / "out", window, *at(server))
        assert [("top_k" in body) for body in server.bodies[:3]] == [True, False, False]
        assert "top_k" not in found["server"]["request"]
        path = os.path.join(window, "generation_config.json")
        before = open(path).read()
        try:
            with open(path, "w") as file:
                json.dump({"repetition_penalty": 1.05}, file)
            with pytest.raises(UserError, match="generation_config.json asks for 1.05"):
                walk_plane(monkeypatch, data, tmp_path / "no", window, *at(server))
        finally:
            with open(path, "w") as file:
                file.write(before)


def test_no_robot_waits_for_another(monkeypatch, tmp_path, window):
    """Episode 0's second request is answered only when all other episodes have ended."""
    data, others_ended = write_plane(tmp_path / "data", n=6), threading.Event()
    asked = []

    def fault(n, body):
        if "place number 0" in body["messages"][0]["content"][0]["text"] and n > 0:
            asked.append(n)
            if len(asked) == 2:
                assert others_ended.wait(120)

    run_episodes = remote.run_episodes

    def watched(*args, **kwargs):
        for i, walk in enumerate(run_episodes(*args, **kwargs)):
            if i == 4:
                others_ended.set()
            assert (walk.name == "0") == (i == 5)
            yield walk

    monkeypatch.setattr(remote, "run_episodes", watched)
    with PolicyServer(window, fault) as server:
        walk_plane(monkeypatch, data, tmp_path / "out", window, *at(server, "--sims", "2"))
    assert len(asked) > 1


# ---------------------------------------------------------------- failures


def test_what_a_repetition_cures_changes_nothing(monkeypatch, tmp_path, window):
    """Each kind of failure, at every fourth request."""
    data = write_plane(tmp_path / "data")
    faults = ["reset", "late", (503, "busy", [("Retry-After", "0")]), (500, "Internal Error"),
              (429, "{}"), (408, ""), (502, "<html>"), (504, ""), (200, "not JSON"), (200, "[]")]
    kinds = []

    def fault(n, body):
        if n % 4 == 3:
            kinds.append(n)
            return faults[len(kinds) % len(faults)]

    walk_plane(monkeypatch, data, tmp_path / "here", window)
    with PolicyServer(window, fault) as server:
        walk_plane(monkeypatch, data, tmp_path / "there", window,
                   *at(server, "--server-timeout", "2"))
    assert len(kinds) >= len(faults)
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")
    timing = json.loads((tmp_path / "there" / "timing.json").read_text())
    assert timing["server_retries"] == len(kinds)


def test_a_failure_is_no_result_and_is_walked_again(monkeypatch, tmp_path, window, capsys):
    data = write_plane(tmp_path / "data", n=5)
    walk_plane(monkeypatch, data, tmp_path / "here", window)

    def fault(n, body):
        return (503, "out of memory") if "number 3" in str(body["messages"][0]) else None

    with PolicyServer(window, fault) as server:
        with pytest.raises(SystemExit, match="1 episodes ended in simulator or server errors and "
                           "have no score .first 3: .*failed 4 times, at last with status 503"):
            walk_plane(monkeypatch, data, tmp_path / "there", window, *at(server))
        assert "4 of 5 episodes scored" in capsys.readouterr().out
        row = next(r for r in read_rows(tmp_path / "there" / "episodes.jsonl")
                   if r["episode_id"] == 3)
        assert row["end"] == "error" and "success" not in row
        server.fault = lambda n, body: None
        walk_plane(monkeypatch, data, tmp_path / "there", window, *at(server))
    assert "walks 1 episodes" in capsys.readouterr().out
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")


@pytest.mark.parametrize("reason, fails", [("abort", True), ("content_filter", True),
                                           ("stop", False), ("length", False), (None, False)])
def test_an_answer_that_the_server_cut_off_is_no_answer(reason, fails):
    reply = {"choices": [{"message": {"content": None}, "finish_reason": reason}]}
    if fails:
        with pytest.raises(remote.ServerFailed, match=reason):
            remote.read_answer(reply)
    else:
        assert remote.read_answer(reply) == ("", reason == "length", {})


def test_a_server_that_is_gone_ends_the_run_and_the_run_goes_on(monkeypatch, tmp_path, window):
    data = write_plane(tmp_path / "data")
    walk_plane(monkeypatch, data, tmp_path / "here", window)
    with PolicyServer(window, lambda n, body: "reset" if n > 15 else None) as server:
        with pytest.raises(UserError, match="failed 4 walks in a row .*goes on where this one"):
            walk_plane(monkeypatch, data, tmp_path / "there", window, *at(server))
        assert not (tmp_path / "there" / "results.json").exists()
        server.fault = lambda n, body: None
        walk_plane(monkeypatch, data, tmp_path / "there", window, *at(server))
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")


def test_a_broken_request_ends_the_run_at_once(monkeypatch, tmp_path, window):
    data = write_plane(tmp_path / "data", n=3)
    for status in (400, 401, 404, 413, 422):
        def fault(n, body, status=status):
            return (status, '{"detail": "it is wrong"}') if n > 4 else None

        with PolicyServer(window, fault) as server:
            with pytest.raises(UserError, match=f"status {status} .*it is wrong"):
                walk_plane(monkeypatch, data, tmp_path / str(status), window, *at(server))
            assert len(server.bodies) <= 5 + 3                          # three robots were asking
        assert read_rows(tmp_path / str(status) / "episodes.jsonl") == []


def test_what_is_refused_before_the_first_walk(monkeypatch, tmp_path, window):
    data = write_plane(tmp_path / "data", n=2)

    def refused(sentence, *flags):
        with pytest.raises(UserError, match=sentence):
            walk_plane(monkeypatch, data, tmp_path / "out", window, *flags)
        assert not (tmp_path / "out" / "episodes.jsonl").exists()

    refused("belongs to a --server", "--server", "http://127.0.0.1:1/v1")
    refused("belongs to a --server", "--served-model", "it")
    for address in ("localhost:8000/v1", "http://localhost:abc/v1"):
        refused("is no address; give one like", "--server", address, "--served-model", "it")
    refused("--agent stop is none", "--server", "http://h/v1", "--served-model", "it", "--agent",
            "stop")
    refused("failed 4 times.*ConnectError.* start the server", "--server",
            "http://127.0.0.1:9/v1", "--served-model", "it")
    with PolicyServer(window, more_tokens=3) as server:
        refused("counts 47 prompt tokens and we count 44|counts .* its chat template", *at(server))
    with PolicyServer(window, lambda n, body: (404, "no such model")) as server:
        refused("status 404 .no such model.*--served-model", *at(server))
    with PolicyServer(window, lambda n, body: (200, '{"hello": 1}')) as server:
        refused("is no chat completion", *at(server))


# ---------------------------------------------------------------- a server that nobody here wrote


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return transformers_serve_packages(tmp_path_factory.mktemp("packages"))


def test_transformers_serve_walks_as_this_process_does(ego, ckpt, packages, tmp_path):
    evaluate.main(evaluate.parse_args(house_argv(ego, ckpt, tmp_path / "here")))
    with TransformersServe(packages, ckpt) as server:
        evaluate.main(evaluate.parse_args(house_argv(
            ego, ckpt, tmp_path / "there", "--server", server.url, "--served-model", ckpt)))
    here, there = (read_rows(tmp_path / name / "episodes.jsonl") for name in ("here", "there"))
    for row in here + there:                            # it strips white space around an answer
        if "unreadable" in row:
            row["unreadable"] = row["unreadable"].strip()
    assert here == there and sum(row["malformed"] for row in there) < 3


@slow
def test_transformers_serve_and_the_evaluation_may_be_killed(ego, window, packages, tmp_path):
    """First the server in mid-run, then evaluate.py; each time the same command goes on."""
    evaluate.main(evaluate.parse_args(house_argv(ego, window, tmp_path / "here")))
    out, rows = tmp_path / "there", tmp_path / "there" / "episodes.jsonl"
    with TransformersServe(packages, window) as server:
        argv = house_argv(ego, window, out, "--server", server.url, "--served-model", window)

        def run_until_a_row(kill):
            process = subprocess.Popen([sys.executable, "evaluate.py", *argv], cwd=ROOT, text=True,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            known, deadline = rows.read_text() if rows.exists() else "", time.monotonic() + 300
            while not rows.exists() or rows.read_text() == known:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            kill(process)
            return process.wait(timeout=300), process.stderr.read()

        status, said = run_until_a_row(lambda process: server.kill())
        assert status in (1, 2) and ("server errors" in said or "start it again" in said), said
        server.start()
        assert run_until_a_row(lambda process: process.kill())[0] == -signal.SIGKILL
        evaluate.main(evaluate.parse_args(argv))
    assert rows_of(tmp_path / "here") == rows_of(out)
