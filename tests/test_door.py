"""pool.py's door: who is let in, who is not and how the log says so, and that walking through it is
walking. Servers are real processes; strangers are bare sockets that speak the protocol as badly as
they like, and count their HMACs by themselves, from the text at the top of pool.py."""
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, script
from test_sim import EPISODE, ROBOT, SCENE_ID, two_rooms, write_house

import evaluate
import make_data
import pool
import sim
from cli import UserError
from reward import FORWARD

KEY = b"k" * 20 + b"0123456789abcdef"
STALL_S = 1


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "sim.key"
    path.write_bytes(KEY + b"\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """<this>/scenes with one house, and another house beside it, which is nobody's business."""
    folder = tmp_path_factory.mktemp("disk")
    for place in ("scenes", "private"):
        write_house(str(folder / place / SCENE_ID), two_rooms())
    os.symlink(folder / "private", folder / "scenes" / "link")
    return str(folder / "scenes")


class Server:
    """A `python sim.py --serve` of its own."""

    def __init__(self, scenes, key_file, log, *flags, port=0):
        self.log_path = str(log)
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "sim.py", "--serve", str(port), "--scenes", scenes, "--sim-key",
                 key_file, "--stall-timeout", str(STALL_S), *map(str, flags)], cwd=ROOT, stderr=log)
        place, = self.wait_for(r"(127\.0\.0\.1:\d+): serves \d+ simulators")
        self.where = pool.address(place)

    def wait_for(self, pattern, seconds=15):
        """The groups of a pattern, once a line of the log has it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(pattern, self.text())
            if found:
                return found.groups()
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in:\n{self.text()}")

    def text(self):
        with open(self.log_path) as file:
            return file.read()

    def says(self, line, what):
        """The log has a line about this connection."""
        self.wait_for(re.escape(pool.name_of(line)) + ": " + what)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        assert self.process.wait(10) == 0


@pytest.fixture(scope="module")
def serving(scenes, key_file, tmp_path_factory):
    """Starts servers, and ends them whatever happens."""
    servers = []

    def start(*flags, scenes=scenes, **more):
        log = tmp_path_factory.mktemp("log") / "log"
        servers.append(Server(scenes, key_file, log, *flags, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(serving):
    return serving()


@pytest.fixture(scope="module")
def another(serving):
    return serving()


# ---------------------------------------------------------------- strangers


def prove(role, server_nonce, client_nonce, key=KEY):
    text = b"vln simulator 1 " + role + b" " + server_nonce + client_nonce
    return hmac.new(key, text, hashlib.sha256).digest()


def frame(**message):
    """A message without arrays, the long way."""
    text = json.dumps(dict(message, arrays=[])).encode()
    return struct.pack("<IQ", len(text), 0) + text


def greeting(line):
    """The server's nonce, read to the byte."""
    size, _ = struct.unpack("<IQ", line.recv(12, socket.MSG_WAITALL))
    return bytes.fromhex(json.loads(line.recv(size, socket.MSG_WAITALL))["nonce"])


def says_nothing(line):
    pass


def leaves(line):
    line.shutdown(socket.SHUT_WR)


def speaks_http(line):
    line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def announces_a_gigabyte(line):
    line.sendall(struct.pack("<IQ", 1 << 30, 0))


def announces_an_array(line):
    line.sendall(struct.pack("<IQ", 10, 1 << 40))


def sends_no_json(line):
    line.sendall(struct.pack("<IQ", 10, 0) + b"\xff" * 10)


def sends_a_list(line):
    line.sendall(struct.pack("<IQ", 4, 0) + b"[[]]")


def hangs_amid_the_handshake(line):
    line.sendall(frame(nonce="00" * 32, proof="00" * 32)[:-9])


def leaves_the_proof_out(line):
    line.sendall(frame(nonce="00" * 32))


def sends_numbers(line):
    line.sendall(frame(nonce=3, proof=[1]))


def has_another_key(line):
    mine, theirs = secrets.token_bytes(32), greeting(line)
    line.sendall(frame(nonce=mine.hex(), proof=prove(b"client", theirs, mine, b"x" * 36).hex()))


def reflects_the_servers_role(line):
    mine, theirs = secrets.token_bytes(32), greeting(line)
    line.sendall(frame(nonce=mine.hex(), proof=prove(b"server", theirs, mine).hex()))


def reflects_the_servers_nonce(line):
    theirs = greeting(line)
    line.sendall(frame(nonce=theirs.hex(), proof=theirs.hex()))


@pytest.mark.parametrize("does, said", [
    (says_nothing, "refused: silent for 1 s"),
    (leaves, "refused: left"),
    (speaks_http, "refused: a message of .* bytes; at most 1024"),
    (announces_a_gigabyte, "refused: a message of 1073741824 "),
    (announces_an_array, "refused: a message of 10 . 1099511627776 bytes; at most 1024 . 0"),
    (sends_no_json, "refused: no message of ours .*UnicodeDecodeError"),
    (sends_a_list, "refused: no message of ours"),
    (hangs_amid_the_handshake, "refused: silent for 1 s in the middle of a message"),
    (leaves_the_proof_out, "refused: no proof in the handshake"),
    (sends_numbers, "refused: no nonce in the handshake"),
    (has_another_key, "refused: does not know the key"),
    (reflects_the_servers_role, "refused: does not know the key"),
    (reflects_the_servers_nonce, "refused: does not know the key")])
def test_strangers_are_refused_and_logged(server, does, said):
    with socket.create_connection(server.where, timeout=10) as line:
        does(line)
        server.says(line.getsockname(), said)
        rest = b""
        while True:  # hung up on, after no more than the server's nonce
            try:
                chunk = line.recv(4096)
            except ConnectionResetError:
                break
            if not chunk:
                break
            rest += chunk
        assert len(rest) <= len(frame(nonce="00" * 32)) and b"proof" not in rest


def test_a_replayed_handshake_is_refused(server):
    said = []

    class Tapped(socket.socket):
        def sendall(self, data):
            said.append(bytes(data))
            return super().sendall(data)

    with Tapped() as line:
        line.connect(server.where)
        pool.enter(line, KEY, bytearray())
        server.says(line.getsockname(), "let in")
    with socket.create_connection(server.where, timeout=10) as line:
        line.sendall(b"".join(said))
        server.says(line.getsockname(), "refused: does not know the key")


def fake_server(behave):
    """A server that does not know the key, for one visitor. -> its address"""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        with listener:
            line, _ = listener.accept()
            with line:
                line.sendall(frame(nonce="5a" * 32))
                behave(line)

    threading.Thread(target=run, daemon=True).start()
    return listener.getsockname()


def test_a_client_refuses_a_server_that_does_not_know_the_key_either():
    def echo(line):
        reply = pool.hear(line, bytearray(), pool.HANDSHAKE)
        line.sendall(frame(proof=reply["proof"]))

    with pytest.raises(UserError, match="--sim-hosts 127.*it does not know our key itself"):
        pool.knock(fake_server(echo), KEY)
    with pytest.raises(UserError, match="it hung up on us: it has another key"):
        pool.knock(fake_server(lambda line: line.recv(4096)), KEY)
    with pytest.raises(UserError, match="a message of 3000000000 "):
        pool.knock(fake_server(lambda line: line.sendall(struct.pack("<IQ", 3000000000, 0))), KEY)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        where = gone.getsockname()
    with pytest.raises(UserError, match="refused; does `python sim.py --serve` run there"):
        pool.knock(where, KEY)


def test_a_crowd_at_the_door_is_turned_away_and_the_owner_gets_in_later(serving, key_file):
    server = serving("--sims", 1)
    crowd = [socket.create_connection(server.where) for _ in range(pool.STRANGERS + 2)]
    server.wait_for(f"refused: {pool.STRANGERS} others are at the door")
    for line in crowd:
        line.close()
    with pool_of(key_file, [server], sims=1) as mine:
        assert walk_a_little(mine)
        with pytest.raises(UserError, match="all simulators of this server are taken: see --sims"):
            pool_of(key_file, [server], sims=1)
        server.wait_for("refused: all simulators are taken")
    with pool_of(key_file, [server], sims=1) as mine:
        assert walk_a_little(mine)


# ---------------------------------------------------------------- those who know the key


def pool_of(key_file, servers, sims=2, **more):
    return sim.SimPool("house", ROBOT, None, sims, hosts=[server.where for server in servers],
                       key_file=key_file, **{"timeout_s": 30, **more})


def walk_a_little(pool, i=0):
    pool.submit(i, "reset", episode=EPISODE)
    pool.wait(i)
    pool.submit(i, "step", actions=[FORWARD, FORWARD])
    return pool.wait(i)


@pytest.fixture
def guest(server):
    """Someone who was let in and has a simulator, as a Worker to misuse."""
    worker = pool.knock(server.where, KEY)
    worker.send({"verb": "start", "kind": "house", "robot": ROBOT, "gpu": None})
    assert answer(worker)["pid"]
    yield worker
    worker.line.close()


def answer(worker):
    message = None
    while message is None:
        message = worker.receive()
    return message


def sealed(worker, head, body=b"", announce=None):
    """A message with any header at all, under a true MAC."""
    text = json.dumps(head).encode()
    parts = [struct.pack("<IQ", *(announce or (len(text), len(body)))), text, body]
    worker.line.sendall(b"".join(parts) + worker.seal.sign(parts))


def changes_a_byte(worker):
    data = bytearray(pool.encode({"verb": "reset", "episode": EPISODE}, worker.seal))
    data[60] ^= 1
    worker.line.sendall(data)


def says_it_twice(worker):
    worker.line.sendall(2 * pool.encode({"verb": "missing", "scenes": []}, worker.seal))


def leaves_one_out(worker):
    pool.encode({"verb": "missing", "scenes": []}, worker.seal)
    worker.send({"verb": "missing", "scenes": []})


def sends_the_answer_back(worker):
    received = []

    class Tap:
        def recv(self, size):
            received.append(line.recv(size))
            return received[-1]

    line, worker.line = worker.line, Tap()
    pool.Worker.send(type("", (), {"line": line, "seal": worker.seal}), {"verb": "missing",
                                                                         "scenes": []})
    answer(worker)
    worker.line = line
    line.sendall(b"".join(received))


def hangs_amid_a_request(worker):
    worker.line.sendall(pool.encode({"verb": "missing", "scenes": []}, worker.seal)[:-3])


@pytest.mark.parametrize("does, said", [
    (changes_a_byte, "a message was changed on its way, or it is not the next one"),
    (says_it_twice, "a message was changed"),
    (leaves_one_out, "a message was changed"),
    (sends_the_answer_back, "a message was changed"),
    (hangs_amid_a_request, "silent for 1 s in the middle of a message"),
    (lambda w: sealed(w, {"arrays": [["x", "|O8", [1]]]}, b"\0" * 8), "no message of ours.*O8"),
    (lambda w: sealed(w, {"arrays": [["x", "<f8", [-1]]]}, b"\0" * 8), "no message of ours"),
    (lambda w: sealed(w, {"arrays": [["x", "<f8", [1 << 20, 1 << 20]]]}), "no message of ours"),
    (lambda w: sealed(w, {"arrays": []}, b"left over"), "no message of ours.*9 bytes"),
    (lambda w: sealed(w, ["verb"]), "no message of ours"),
    (lambda w: sealed(w, {}, announce=(1 << 31, 0)), "a message of 2147483648 "),
    (lambda w: sealed(w, {}, announce=(2, 1 << 40)), "a message of 2 . 1099511627776 "),
], ids=lambda value: value.__name__ if callable(value) else value[:30])
def test_a_guest_who_talks_nonsense_is_dropped_and_logged(server, guest, does, said):
    name = guest.line.getsockname()
    does(guest)
    server.says(name, "dropped: " + said)
    server.says(name, r"simulator process \d+ exited with 3")
    with pytest.raises(EOFError):
        while True:
            answer(guest)


def test_a_request_that_means_nothing_is_answered_and_the_next_one_served(guest):
    for request in ({"verb": "fly"}, {}, {"verb": "reset", "episode": [1]}, {"verb": ["reset"]},
                    {"verb": "reset", "episode": dict(EPISODE, scene_id=7)},
                    {"verb": "reset", "episode": dict(EPISODE, scene_id="a\0b")},
                    {"verb": "start", "kind": "os", "robot": {}, "gpu": None}):
        guest.send(request)
        assert answer(guest)["error"] == "bug", request
    guest.send({"verb": "reset", "episode": EPISODE})
    assert answer(guest)["frame"].shape == (18, 24, 3)


def test_scenes_outside_of_the_servers_folder_are_refused(server, guest, scenes):
    private = os.path.join(os.path.dirname(scenes), "private", SCENE_ID)
    for scene_id in (f"../private/{SCENE_ID}", private, f"link/{SCENE_ID}", "..",
                     f"houses/../../private/{SCENE_ID}", f"../scenes-too/{SCENE_ID}"):
        for request in ({"verb": "reset", "episode": dict(EPISODE, scene_id=scene_id)},
                        {"verb": "record", "episode": dict(EPISODE, scene_id=scene_id)},
                        {"verb": "check", "scene_id": scene_id},
                        {"verb": "missing", "scenes": [SCENE_ID, scene_id]}):
            guest.send(request)
            said = answer(guest)
            assert said["error"] == "SimError"
            assert "outside of the server's --scenes" in said["text"]
        server.says(guest.line.getsockname(), "refused: scene " + re.escape(repr(scene_id)))
    guest.send({"verb": "check", "scene_id": f"houses/../{SCENE_ID}"})
    assert answer(guest)["goal_m"] > 0
    with pytest.raises(ValueError, match="startswith|NUL|null"):
        pool.confine(scenes, {"scene_id": "a\0b"})


def test_a_guest_who_idles_is_sent_home(serving, key_file):
    server = serving("--idle-timeout", 0.5)
    with pool_of(key_file, [server], sims=1) as mine:
        server.wait_for("dropped: silent for 0.5 s\n")
        mine.submit(0, "reset", episode=EPISODE)
        with pytest.raises(sim.SimDied, match="hung up .*'reset'.*started anew"):
            mine.wait(0)


def test_mutilated_messages_are_refused_and_nothing_else_happens():
    rng = np.random.default_rng(0)
    whole = pool.encode({"verb": "x", "frames": np.zeros((2, 3), np.float32), "n": [1, 2]})
    outcomes = set()
    for _ in range(3000):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        try:
            message, used = pool.decode(data, (1 << 10, 1 << 10))
            assert used in (0, len(data)) and (message is None) == (used == 0)
            outcomes.add(used > 0)
        except pool.Refused:
            outcomes.add("refused")
        data.clear()  # and nothing holds on to the buffer
    assert outcomes == {True, False, "refused"}


# ---------------------------------------------------------------- walking through the door


def pid_of(worker):
    pid, = re.findall(r"process (\d+) of 127", worker.name)
    return int(pid)


def test_a_killed_or_hung_remote_simulator_is_named_and_reconnected(server, another, key_file):
    with pool_of(key_file, [server, another]) as mine:
        for i, host in enumerate((server, another)):
            assert mine.workers[i].line.getpeername() == host.where
            walk_a_little(mine, i)
        killed, hung = (pid_of(worker) for worker in mine.workers)
        os.kill(killed, signal.SIGKILL)
        mine.submit(0, "step", actions=[FORWARD])
        with pytest.raises(sim.SimDied, match=f"simulator 0 .process {killed} of "
                           f"{pool.name_of(server.where)}. hung up .*'step'.*episode 7.*anew"):
            mine.wait(0)
        server.wait_for(f"process {killed} was killed by SIGKILL")

        os.kill(hung, signal.SIGSTOP)
        mine.timeout_s = 1
        mine.submit(1, "step", actions=[FORWARD])
        mine.timeout_s = 30
        mine.submit(0, "reset", episode=EPISODE)
        answers = dict([mine.wait_any(), mine.wait_any()])  # the healthy one is served meanwhile
        assert "frame" in answers[0]
        assert f"process {hung} of " in str(answers[1]) and "no answer in 1 s" in str(answers[1])
        another.wait_for(f"process {hung} was killed by SIGKILL")  # it did not outlive its user
        assert (walk_a_little(mine, 0)["frames"] == walk_a_little(mine, 1)["frames"]).all()


def test_a_server_that_comes_back_is_found_again(serving, key_file):
    server = serving()
    with pool_of(key_file, [server], sims=1) as mine:
        before = walk_a_little(mine)
        server.stop()
        mine.submit(0, "step", actions=[FORWARD])
        threading.Timer(1, lambda: serving(port=server.where[1])).start()
        with pytest.raises(sim.SimDied, match="hung up"):
            mine.wait(0)
        assert (walk_a_little(mine)["frames"] == before["frames"]).all()


class Deadly(sim.SimPool):
    """Kills one busy simulator after 10 answers and another one after 30."""
    answers, killed = 0, frozenset()

    def wait_any(self, *within):
        self.answers += 1
        if self.answers in (10, 30):
            busy = {pid_of(worker) for worker in self.workers if worker.verb}
            victim = min(busy - self.killed)
            self.killed |= {victim}
            os.kill(victim, signal.SIGKILL)
        return super().wait_any(*within)


@pytest.fixture(scope="module")
def houses(ego):
    return os.path.join(ego, "..", "..", "houses")


def test_two_machines_walk_what_one_walks_even_if_simulators_are_killed(
        houses, serving, key_file, tmp_path, monkeypatch):
    servers = [serving(scenes=f"{houses}/scenes") for _ in range(2)]
    hosts = ",".join(pool.name_of(server.where) for server in servers)
    there = ["--sim-hosts", hosts, "--sim-key", key_file]

    def walk(name, *flags):
        evaluate.main(evaluate.parse_args(["--episodes", houses, "--agent", "oracle", "--sims", "4",
                                           "--out", str(tmp_path / name), *flags]))
        return [(tmp_path / name / file).read_bytes()
                for file in ("episodes.jsonl", "results.json")]

    here = walk("here")
    assert walk("there", *there) == here
    for server in servers:
        server.wait_for("let in(?s:.*)let in")
    monkeypatch.setattr(evaluate, "SimPool", Deadly)
    assert walk("disturbed", *there) == here
    deadline = time.monotonic() + 15                          # its log is a moment behind
    while (deaths := sum(server.text().count("by SIGKILL") for server in servers)) < 2:
        assert time.monotonic() < deadline, f"{deaths} of 2 deaths are in the logs"
        time.sleep(0.05)

    def record(name, *flags):
        make_data.main(make_data.parse_args(["--episodes", houses, "--out", str(tmp_path / name),
                                             "--noise", "0.2", "--limit", "6", *flags]))
        return {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.*")}

    assert record("ego_here", "--shard-walks", "2") == record(
        "ego_there", "--shard-walks", "2", *there)


def test_scenes_that_the_server_lacks_are_named_before_anything_walks(
        server, houses, key_file, tmp_path):
    there = ["--episodes", houses, "--sim-hosts", pool.name_of(server.where), "--sim-key", key_file]
    said = f"scenes are missing on {pool.name_of(server.where)}, the first is houses/"
    with pytest.raises(UserError, match=said):
        evaluate.main(evaluate.parse_args([*there, "--agent", "oracle", "--out",
                                           str(tmp_path / "walk")]))
    with pytest.raises(UserError, match=said):
        make_data.main(make_data.parse_args([*there, "--out", str(tmp_path / "ego")]))


def test_check_through_the_door(server, key_file):
    there = ("sim.py", "--check", "--sim-hosts", pool.name_of(server.where), "--sim-key", key_file)
    assert script(*there, "--scene", SCENE_ID).stdout.rstrip().endswith("ready")
    done = script(*there, check=False)
    assert done.returncode == 2 and "name one of them with --scene" in done.stderr
    done = script(*there, "--scene", "../x.glb", check=False)
    assert done.returncode == 2 and "outside of the server's --scenes" in done.stderr


# ---------------------------------------------------------------- keys and flags


def refused(*flags, **more):
    done = subprocess.run([sys.executable, "sim.py", *map(str, flags)], cwd=ROOT, text=True,
                          capture_output=True, timeout=30, **more)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_bad_key_is_refused_in_a_sentence(tmp_path, scenes, key_file):
    short, open_to_all = tmp_path / "short", tmp_path / "open"
    short.write_text("hunter2\n")
    short.chmod(0o600)
    shutil.copy(key_file, open_to_all)
    open_to_all.chmod(0o644)
    for command in (("--serve", "0", "--scenes", scenes),
                    ("--check", "--scene", SCENE_ID, "--sim-hosts", "127.0.0.1:9")):
        bare = {key: value for key, value in os.environ.items() if key != "VLN_SIM_KEY"}
        assert "need a shared key" in refused(*command, env=bare)
        assert "7 characters are too few" in refused(*command, "--sim-key", short)
        assert "chmod 600" in refused(*command, "--sim-key", open_to_all)
        assert "No such file" in refused(*command, env=dict(bare, VLN_SIM_KEY=str(tmp_path / "x")))


def test_the_server_says_what_is_wrong_with_its_flags(scenes, key_file):
    key = ("--sim-key", key_file)
    assert "not HOST:PORT" in refused("--serve", "localhost", *key)
    assert "no such folder" in refused("--serve", "0", "--scenes", "/no/such", *key)
    assert "no such program" in refused("--serve", "0", "--scenes", scenes, "--sim-python", "/no",
                                        *key)
    assert "one simulator or more" in refused("--serve", "0", "--scenes", scenes, "--sims", 0, *key)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = pool.name_of(taken.getsockname())
        assert f"--serve {where}: Address already in use" in refused(
            "--serve", where, "--scenes", scenes, *key)


def test_the_simulators_interpreter_can_be_another_one(scenes, key_file, tmp_path):
    def python(name, line):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return path

    other = python("other", f'touch {tmp_path}/used; exec {sys.executable} "$@"')
    done = script("sim.py", "--check", "--scenes", scenes, "--scene", SCENE_ID, "--sim-python",
                  other)
    assert done.stdout.rstrip().endswith("ready") and (tmp_path / "used").exists()
    bare = python("bare", f'exec {sys.executable} -S "$@"')  # without site-packages
    said = refused("--check", "--scenes", scenes, "--scene", SCENE_ID, "--sim-python", bare)
    assert "No module named 'numpy'; a simulator needs numpy and pillow" in said
    assert "exited with 1 while starting" in said
    with pytest.raises(UserError, match="--sim-python: with --sim-hosts, give it to their"):
        sim.SimPool("house", ROBOT, None, sim_python=str(bare), hosts=[("127.0.0.1", 9)],
                    key_file=key_file)


def test_simulators_are_spread_over_gpus_and_hosts(scenes, server, another, key_file, monkeypatch,
                                                   capsys):
    for module in (make_data, evaluate, sim):
        assert module.parse_args(["--sim-gpus", "0,1"]).sim_gpus == [0, 1]
        assert module.parse_args(["--sim-hosts", "a:1,[::1]:2"]).sim_hosts == [("a", 1), ("::1", 2)]
        for wrong in (["--sim-gpus", "0;1"], ["--sim-gpus", "-1"], ["--sim-hosts", "a"],
                      ["--sim-hosts", "a:70000"]):
            with pytest.raises(SystemExit):
                module.parse_args(wrong)
            assert "is not" in capsys.readouterr().err
    sent, send = [], pool.Worker.send

    def spy(worker, message):
        sent.append(message["gpu"])
        send(worker, message)

    monkeypatch.setattr(pool.Worker, "send", spy)
    with sim.SimPool("house", ROBOT, scenes, 3, gpus=[0, 1]):
        assert sent == [0, 1, 0]
    with pool_of(key_file, [server, another], 5, gpus=[0, 1]) as mine:
        assert sent[3:] == [0, 0, 1, 1, 0]
        ports = [worker.line.getpeername()[1] for worker in mine.workers]
        assert ports == [server.where[1], another.where[1]] * 2 + [server.where[1]]
