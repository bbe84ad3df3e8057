"""
The way to the simulators: messages, a pool of processes, and a door for other machines.

A simulator (sim.py) is a process of its own, for three reasons: it often needs another Python than
the training stack, it may crash, and several of them are faster. It is asked one thing at a time:

    SimPool  --request-->  sim.py --worker  --answer-->  SimPool          over a socket pair, here
    SimPool  --request-->  sim.py --serve, which starts a worker for it   over TCP, to elsewhere

A message is two sizes, a JSON header, and the bytes of arrays: nothing is ever unpickled, and every
size, type and shape is checked before it is believed. A worker does not know how far away its user
is: the server lets in who knows the key, hands the connection to a new worker as its stdin and
stdout, and is out of the way. So a dead simulator ends only its own connection.

The door. Both sides prove that they know one shared key (a file, never a flag's value) without
showing it, over 32 fresh random bytes of each, s and c; a | b is b after a:

    server -> client    s
    client -> server    c, HMAC(key, "client" | s | c)     each proof names its author, so that it
    server -> client    HMAC(key, "server" | s | c)        cannot be sent back as one's own
    then, below every message: HMAC(HMAC(key, "session" | s | c), author | number | message)

That keeps out whoever has no key, and notices a message that was changed, left out, repeated or
sent back. It does NOT hide anything: who can listen on the wire sees the pictures and the walks,
and who holds the key may use up simulators (not read files: a scene outside of --scenes is
refused). On a network that you do not trust, use `ssh -L`; the server listens on 127.0.0.1 unless
it is told otherwise.

Run it   python sim.py --serve HOST:PORT --sim-key FILE                # where the simulators are
         python evaluate.py --sim-hosts HOST:PORT --sim-key FILE ..    # where the policy is
Expect   a MAC to cost, at each end, 0.01 ms for a frame of 56x56 and 0.6 ms for one of 640x480, on
         a Xeon core with SHA instructions
Imports  numpy, in Python 3.9 syntax: another interpreter has to load this file
"""
import argparse
import hashlib
import hmac
import json
import math
import os
import queue
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback

import numpy as np

from cli import UserError

START_S = 300  # habitat's first renderer may take 45 s on an idle CPU
STALL_S = 10  # for a server to be reached, and for its part of the handshake
RETURN_S = 60  # for a server to come back, once simulators of it were in use
STRANGERS = 32  # at the door at once


class SimError(Exception):
    """The episode or its scene is at fault; the message names the file. The simulator lives on."""


class SimDied(Exception):
    """The simulator's process is at fault: it died or hung. The message names it and its work."""


class Refused(Exception):
    """What came over the line is not what may come over it. There is no going on after this."""


# ---------------------------------------------------------------- messages

SIZES = struct.Struct("<IQ")  # bytes of JSON, bytes of arrays after it
TAG = hashlib.sha256().digest_size
# at most so many bytes of JSON and of arrays; a recorded walk of 500 640x480 frames has 0.5e9
HANDSHAKE, REQUEST, ANSWER = (1 << 10, 0), (1 << 20, 1 << 20), (1 << 24, 1 << 32)


def encode(message, seal=None):
    """A dict whose top-level values may be arrays -> bytes."""
    arrays = {k: np.ascontiguousarray(v) for k, v in message.items() if isinstance(v, np.ndarray)}
    header = {k: v for k, v in message.items() if k not in arrays}
    header["arrays"] = [[k, a.dtype.str, a.shape] for k, a in arrays.items()]
    text = json.dumps(header).encode()
    body = [a.tobytes() for a in arrays.values()]
    parts = [SIZES.pack(len(text), sum(map(len, body))), text, *body]
    return b"".join(parts + ([seal.sign(parts)] if seal else []))


def decode(data, limits=ANSWER, seal=None):
    """The first message in some bytes and how many it took, or (None, 0) if it is not complete.
    Refused as soon as it is clear that no acceptable message begins here.

    >>> decode(encode({"verb": "step", "frames": np.zeros((1, 2))}))[0]
    {'verb': 'step', 'frames': array([[0., 0.]])}
    """
    if len(data) < SIZES.size:
        return None, 0
    head, body = SIZES.unpack_from(data)
    if head > limits[0] or body > limits[1]:
        raise Refused(f"a message of {head} + {body} bytes; at most {limits[0]} + {limits[1]}")
    end = SIZES.size + head + body
    used = end + (TAG if seal else 0)
    if len(data) < used:
        return None, 0
    if seal:
        with memoryview(data) as view:
            seal.check(view[:end], bytes(view[end:used]))
    try:
        message, at = json.loads(bytes(data[SIZES.size:SIZES.size + head])), SIZES.size + head
        for key, dtype, shape in message.pop("arrays"):
            count = math.prod(shape)
            if not re.fullmatch("[<>|][biuf][1248]", dtype) or key in message or len(shape) > 8 \
                    or not all(type(n) is int and 0 <= n <= limits[1] for n in shape) \
                    or at + count * int(dtype[2]) > end:
                raise ValueError(f"array {key!r} of type {dtype!r} and shape {shape}")
            message[key] = np.frombuffer(data, dtype, count, at).reshape(shape).copy()
            at += message[key].nbytes
        if at != end:
            raise ValueError(f"{end - at} bytes that belong to no array")
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise Refused(f"no message of ours ({said[:200]!r})") from None
    return message, used


def hear(line, data, limits, seal=None, first_s=None, rest_s=None):
    """Wait for a whole message; `data` holds what has come and keeps what comes after it. Refused
    if it does not begin within first_s or end within rest_s more; EOFError if the line closes."""
    poller, wait_s, since, begun = select.poll(), first_s, time.monotonic(), False
    poller.register(line, select.POLLIN)
    while True:
        message, used = decode(data, limits, seal)
        if used:
            del data[:used]
            return message
        if data and not begun:
            wait_s, since, begun = rest_s, time.monotonic(), True
        left_s = None if wait_s is None else max(0.0, since + wait_s - time.monotonic())
        if not poller.poll(None if left_s is None else 1e3 * left_s):
            raise Refused(f"silent for {wait_s:g} s" + " in the middle of a message" * begun)
        chunk = receive(line)
        if not chunk:
            raise EOFError("left" + " in the middle of a message" * begun)
        data += chunk


def receive(line):
    """What has arrived, b"" at the end; a connection that broke has ended too."""
    try:
        return line.recv(1 << 20)
    except ConnectionError:
        return b""


def name_of(address):
    """
    >>> name_of(("127.0.0.1", 5050)), name_of(("::1", 5050, 0, 0))
    ('127.0.0.1:5050', '[::1]:5050')
    """
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def log(who, what):
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {who}: {what}\n")
    sys.stderr.flush()


# ---------------------------------------------------------------- the key


def read_key(path):
    """The shared key of a file that nobody else may read. UserError in a sentence if it is none."""
    path = path or os.environ.get("VLN_SIM_KEY")
    if not path:
        raise UserError("simulators on another machine need a shared key: make one with `(umask 77;"
                        " head -c 32 /dev/urandom | base64 > sim.key)`, copy it there, and name it "
                        "with --sim-key or VLN_SIM_KEY on both machines")
    try:
        with open(path, "rb") as file:
            mode, key = os.fstat(file.fileno()).st_mode, file.read(4096).strip()
    except OSError as error:
        raise UserError(f"--sim-key {path}: {error.strerror}") from None
    if mode & 0o077:
        raise UserError(f"--sim-key {path}: others may read this file; chmod 600 {path}")
    if len(key) < 32:
        raise UserError(f"--sim-key {path}: {len(key)} characters are too few for a key; 32 random "
                        "ones or more, as `head -c 32 /dev/urandom | base64` writes them")
    return key


def mac(key, *parts):
    code = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        code.update(part)
    return code.digest()


def proof(key, role, ours_and_theirs):
    """That its author (b"client" or b"server") knows the key; b"session": the key from then on."""
    return mac(key, b"vln simulator 1 ", role, b" ", ours_and_theirs)


class Seal:
    """One side's MACs of a conversation: they depend on the author, on how many messages the author
    has sent before, and on every byte of the message."""

    def __init__(self, session, mine, theirs):
        self.session, self.mine, self.theirs, self.sent, self.heard = session, mine, theirs, 0, 0

    def sign(self, parts):
        self.sent += 1
        return mac(self.session, self.mine, struct.pack("<Q", self.sent), *parts)

    def check(self, data, tag):
        self.heard += 1
        expected = mac(self.session, self.theirs, struct.pack("<Q", self.heard), data)
        if not hmac.compare_digest(expected, tag):
            raise Refused("a message was changed on its way, or it is not the next one")


def token(message, name):
    """32 bytes out of a message of the handshake."""
    value = message.get(name)
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise Refused(f"no {name} in the handshake")
    return bytes.fromhex(value)


def admit(line, key, stall_s):
    """The server's side of the handshake. -> the session's key; Refused, EOFError"""
    mine, data = secrets.token_bytes(32), bytearray()
    line.sendall(encode({"nonce": mine.hex()}))
    reply = hear(line, data, HANDSHAKE, None, stall_s, stall_s)
    nonces = mine + token(reply, "nonce")
    if not hmac.compare_digest(proof(key, b"client", nonces), token(reply, "proof")) or data:
        raise Refused("does not know the key")
    line.sendall(encode({"proof": proof(key, b"server", nonces).hex()}))
    return proof(key, b"session", nonces)


def enter(line, key, data):
    """The client's side of it. -> the session's key; what came after it is in `data`."""
    mine = secrets.token_bytes(32)
    nonces = token(hear(line, data, HANDSHAKE, None, STALL_S, STALL_S), "nonce") + mine
    line.sendall(encode({"nonce": mine.hex(), "proof": proof(key, b"client", nonces).hex()}))
    reply = hear(line, data, HANDSHAKE, None, STALL_S, STALL_S)
    if not hmac.compare_digest(proof(key, b"server", nonces), token(reply, "proof")):
        raise Refused("it does not know our key itself")
    return proof(key, b"session", nonces)


# ---------------------------------------------------------------- a worker

SESSION = "VLN_SIM_SESSION"  # environment variable: the session's key, of a worker behind the door


def spawn(python, scenes_dir, line, *flags, **environment):
    """Start a worker that talks over `line`. OSError if there is no such interpreter."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sim.py")
    return subprocess.Popen(
        [python, script, "--worker", "--scenes", os.path.abspath(scenes_dir), *map(str, flags)],
        stdin=line, stdout=line, env=dict(os.environ, **threads, **environment),
        start_new_session=True)  # Ctrl-C is for the parent; a worker ends when its line closes


def work(simulators, verbs, scenes_dir, idle_s=None, stall_s=None):
    """A worker's whole life: answer the requests that come in at stdin, until it closes.

    simulators: kind -> class; verbs: name -> function(sim, **request). "start" makes the simulator;
    its user says which kind and robot, but where the scenes are is said here.
    """
    line = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not into the answers
    session, sim = os.environ.pop(SESSION, None), None
    requests = queue.Queue(2)  # a user asks one thing at a time; who does not has to wait
    seal = Seal(bytes.fromhex(session), b"server", b"client") if session else None
    who = name_of(line.getpeername()) if session else "simulator"
    waits = (idle_s, stall_s) if session else (None, None)

    def listen():  # in a thread of its own: a closed line ends the worker even while it is busy
        data = bytearray()
        try:
            while True:
                requests.put(hear(line, data, REQUEST, seal, *waits))
        except EOFError:
            os._exit(0)
        except Refused as error:
            log(who, f"dropped: {error}")
            os._exit(3)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        request = requests.get()
        try:
            verb = request.pop("verb", None)
            if session:
                confine(scenes_dir, request)
            if verb == "start":
                sim = simulators[request["kind"]](request["robot"], scenes_dir, request["gpu"])
                answer = {"pid": os.getpid()}
            else:
                answer = verbs[verb](sim, **request)
        except (SimError, UserError) as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        except Refused as error:
            log(who, f"refused: {error}")
            answer = {"error": "SimError", "text": str(error)}
        except Exception:
            answer = {"error": "bug", "text": traceback.format_exc()}
        try:
            line.sendall(encode(answer, seal))
        except OSError:
            os._exit(0)


def confine(scenes_dir, request):
    """Refused if a request names a file outside of the scenes: "..", absolute, or by a link."""
    root = os.path.realpath(scenes_dir)
    episode = request.get("episode") or {}
    for scene_id in [request.get("scene_id"), episode.get("scene_id"), *request.get("scenes", [])]:
        if scene_id is not None:
            path = os.path.realpath(os.path.join(root, scene_id))
            if not path.startswith(os.path.join(root, "")):
                raise Refused(f"scene {scene_id!r} is outside of the server's --scenes (links are "
                              "followed: start it with the folder that they lead to)")


# ---------------------------------------------------------------- the door


def address(text):
    """HOST:PORT, where the host may be left out.

    >>> address("gpu-box:5050"), address("5050"), address("[::1]:5050")
    (('gpu-box', 5050), ('127.0.0.1', 5050), ('::1', 5050))
    """
    host, _, port = text.strip().rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def addresses(text):
    return [address(part) for part in text.split(",")]


def gpu_list(text):
    """
    >>> gpu_list("0,1")
    [0, 1]
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of CUDA indices such as 0,1")
    return [int(part) for part in text.split(",")]


def serve(where, key, sims, scenes_dir, python, idle_s, stall_s):
    """A simulator for everyone who knows the key, `sims` at once, until it is interrupted."""
    python = python or sys.executable
    if not shutil.which(python):
        raise UserError(f"--sim-python {python}: there is no such program")
    if not os.path.isdir(scenes_dir):
        raise UserError(f"--scenes {scenes_dir}: there is no such folder")
    if sims < 1:
        raise UserError(f"--sims {sims}: serving takes one simulator or more")
    try:
        family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
        listener = socket.create_server(where, family=family)
    except OSError as error:
        raise UserError(f"--serve {name_of(where)}: {error.strerror}") from None
    slots, visits = threading.Semaphore(sims), threading.Semaphore(sims + STRANGERS)
    workers = set()

    def start(line, session):
        return spawn(python, scenes_dir, line, "--idle-timeout", idle_s, "--stall-timeout", stall_s,
                     **{SESSION: session.hex()})

    def visit(line, who):
        try:
            with line:
                attend(line, who, key, slots, start, workers, stall_s)
        except OSError as error:
            log(who, f"gone: {error}")
        finally:
            visits.release()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log(name_of(listener.getsockname()), f"serves {sims} simulators in {scenes_dir}")
    try:
        while True:
            line, peer = listener.accept()
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            who = name_of(peer)
            if visits.acquire(blocking=False):
                threading.Thread(target=visit, args=(line, who), daemon=True).start()
            else:
                log(who, f"refused: {STRANGERS} others are at the door")
                line.close()
    except KeyboardInterrupt:
        pass
    finally:
        for process in list(workers):
            process.kill()


def attend(line, who, key, slots, start, workers, stall_s):
    """One visitor of the server, from the handshake to the end of its simulator."""
    try:
        session = admit(line, key, stall_s)
    except (Refused, EOFError, OSError) as error:
        return log(who, f"refused: {error}")
    if not slots.acquire(timeout=stall_s):  # one that is about to end is waited for
        log(who, "refused: all simulators are taken")
        full = {"error": "UserError", "text": "all simulators of this server are taken: see --sims"}
        return line.sendall(encode(full, Seal(session, b"server", b"client")))
    try:
        process = start(line, session)
        workers.add(process)
        log(who, f"let in, to simulator process {process.pid}")
        poller = select.poll()
        poller.register(line, getattr(select, "POLLRDHUP", 0))  # never reads: the worker does
        while process.poll() is None:
            if poller.poll(100):  # the visitor has gone, as the worker sees too unless it hangs
                try:
                    process.wait(stall_s / 2)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        workers.remove(process)
        log(who, f"simulator process {process.pid} {ending(process.returncode)}")
    finally:
        slots.release()  # before the line is closed: who comes back at once finds it free


def ending(code):
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


# ---------------------------------------------------------------- the pool


class Worker:
    """The user's view of one worker: a process here, or a line to a process elsewhere."""

    def __init__(self, line, name, process=None):
        self.line, self.name, self.process = line, name, process
        self.seal, self.data = None, bytearray()  # data: the beginning of an answer
        self.verb = self.episode = self.timeout_s = self.deadline = None  # what it is busy with
        self.reply = None  # a dict or a SimDied, once there is one

    def send(self, message):
        try:
            self.line.sendall(encode(message, self.seal))
        except OSError:
            pass  # it is dead, and receive() will tell

    def receive(self):
        """Read once. -> a message, or None if it is not complete yet; EOFError if it is dead."""
        chunk = receive(self.line)
        if not chunk:
            raise EOFError(self.bury())
        self.data += chunk
        try:
            message, used = decode(self.data, ANSWER, self.seal)
        except Refused as error:
            self.bury(0)
            raise EOFError(f"cannot be understood: {error}") from None
        del self.data[:used]
        return message

    def bury(self, grace_s=1):
        """Make sure that it is dead. -> how it died"""
        if self.process is None:
            return "hung up"
        try:
            self.process.wait(grace_s)  # it closed its line, so it is about to end by itself
        except subprocess.TimeoutExpired:
            self.process.kill()
        return ending(self.process.wait())


def hire(python, scenes_dir):
    """A worker on this machine."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = spawn(python, scenes_dir, theirs)
        except OSError as error:
            raise UserError(f"--sim-python {python}: {error.strerror}") from None
    return Worker(ours, f"process {process.pid}", process)


def knock(where, key, patience_s=0):
    """A worker on another machine; for patience_s it may be away (it may be starting again)."""
    deadline, name = time.monotonic() + patience_s, name_of(where)
    while True:
        try:
            line = socket.create_connection(where, timeout=STALL_S)
            try:
                line.settimeout(None)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                worker = Worker(line, name)
                worker.seal = Seal(enter(line, key, worker.data), b"client", b"server")
                return worker
            except BaseException:
                line.close()
                raise
        except EOFError:
            problem = "it hung up on us: it has another key (--sim-key), or its log says why"
        except Refused as error:
            problem = f"its handshake is wrong: {error}"
        except OSError as error:
            problem = f"{error.strerror or error}; does `python sim.py --serve` run there?"
        if time.monotonic() > deadline:
            raise UserError(f"--sim-hosts {name}: {problem}")
        time.sleep(1)


class SimPool:
    """`sims` simulators, each a process of its own, each asked one thing at a time.

        with SimPool("house", ROBOTS["houses"], "data/houses/scenes", sims=2) as pool:
            pool.submit(0, "reset", episode=episode)      # returns at once
            pool.submit(1, "reset", episode=another)
            i, reply = pool.wait_any()                    # whoever is first

    wait raises SimError if the episode is at fault, SimDied if the process was lost (it has been
    started anew by then, but the episode is gone: reset it); wait_any returns these instead, so
    that the caller knows whose they are. Any other error inside a simulator is a bug: both raise
    RuntimeError with the worker's traceback. sim_python: the interpreter to run the workers in.
    gpus: CUDA indices to spread the simulators over (habitat only). hosts: [(host, port)] of
    servers to take the simulators from, in turn, instead of this machine; key_file: what to show
    them. Where the scenes are is then said there.
    """

    def __init__(self, kind, robot, scenes_dir, sims=2, sim_python=None, timeout_s=120, gpus=None,
                 hosts=None, key_file=None):
        self.python, self.scenes_dir, self.timeout_s = sim_python, scenes_dir, timeout_s
        self.start = {"verb": "start", "kind": kind, "robot": robot}
        self.gpus, self.hosts, self.key = gpus or [None], hosts, hosts and read_key(key_file)
        if hosts and sim_python:
            raise UserError("--sim-python: with --sim-hosts, give it to their `sim.py --serve`")
        self.workers, self.arrived = [], []  # arrived: whose answer is here, oldest first
        self.selector = selectors.DefaultSelector()
        try:
            for i in range(sims):
                self.workers.append(self.launch(i))
            for i in range(sims):
                self.greet(i)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def launch(self, i, patience_s=0):
        """Start worker i and tell it what to be, without waiting for it."""
        if self.hosts:
            card, host = divmod(i, len(self.hosts))
            worker = knock(self.hosts[host], self.key, patience_s)
        else:
            card, worker = i, hire(self.python or sys.executable, self.scenes_dir)
        self.selector.register(worker.line, selectors.EVENT_READ, i)
        worker.send(dict(self.start, gpu=self.gpus[card % len(self.gpus)]))
        return worker

    def greet(self, i):
        """Wait until worker i has started. UserError if it cannot."""
        worker, reply, deadline = self.workers[i], None, time.monotonic() + START_S
        who = f"simulator {i} ({worker.name})"
        with selectors.DefaultSelector() as only:
            only.register(worker.line, selectors.EVENT_READ)
            while reply is None:
                if not only.select(deadline - time.monotonic()):
                    raise UserError(f"{who} did not start in {START_S} s")
                try:
                    reply = worker.receive()
                except EOFError as error:
                    more = "the log of its server tells why" if self.hosts else (
                        "what it printed is above, and `python sim.py --check` tells more")
                    raise UserError(f"{who} {error} while starting; {more}") from None
        if "error" in reply:
            raise UserError(f"{who}: {reply['text']}" if self.hosts else reply["text"])
        if self.hosts:
            worker.name = f"process {reply['pid']} of {worker.name}"

    def require(self, scenes):
        """UserError if a server lacks one of these scenes."""
        for i in range(min(len(self.hosts), len(self.workers))):
            self.submit(i, "missing", scenes=sorted(scenes))
            try:
                missing = self.wait(i)["missing"]
            except (SimError, SimDied) as error:
                raise UserError(f"{name_of(self.hosts[i])}: {error}") from None
            if missing:
                raise UserError(f"{len(missing)} scenes are missing on {name_of(self.hosts[i])}, "
                                f"the first is {missing[0]}: start its server with the --scenes "
                                "that holds them")

    def submit(self, i, verb, **arguments):
        """Ask worker i for something, without waiting for the answer."""
        worker = self.workers[i]
        assert worker.verb is None, f"simulator {i} is still busy with {worker.verb!r}: wait for it"
        if "episode" in arguments:  # send what a simulator reads, not a book of instructions
            keys = ("episode_id", "scene_id", "start_position", "start_rotation", "goals")
            episode = arguments["episode"]
            arguments["episode"] = {key: episode[key] for key in keys if key in episode}
            worker.episode = episode.get("episode_id")
        first = worker.timeout_s is None and self.start["kind"] == "habitat"  # makes a renderer
        worker.verb, worker.timeout_s = verb, max(self.timeout_s, START_S if first else 0)
        worker.deadline = time.monotonic() + worker.timeout_s
        if worker.reply is None:
            worker.send(dict(arguments, verb=verb))
        else:
            self.arrived.append(i)  # it was lost while idle, and so was its state: say so now

    def wait(self, i):
        """The answer of worker i, a dict. Raises SimError, SimDied."""
        while i not in self.arrived:
            self.collect(i)
        self.arrived.remove(i)
        reply = self.take(i)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def wait_any(self, within_s=math.inf):
        """(i, answer) of whichever worker has answered first; a SimError or SimDied is returned.
        None if nobody answers within so many seconds."""
        until = time.monotonic() + within_s
        while not self.arrived:
            self.collect(within_s=until - time.monotonic())
            if not self.arrived and time.monotonic() >= until:
                return None
        i = self.arrived.pop(0)
        reply = self.take(i)
        if isinstance(reply, RuntimeError):
            raise reply
        return i, reply

    def take(self, i):
        worker = self.workers[i]
        reply, worker.reply = worker.reply, None
        verb, worker.verb = worker.verb, None
        if not isinstance(reply, dict) or "error" not in reply:
            return reply
        if reply["error"] == "bug":
            return RuntimeError(f"simulator {i}, {verb!r}: {reply['text']}")
        return SimError(reply["text"])

    def collect(self, i=None, within_s=math.inf):
        """Wait for news (of worker i, or of any), and bury and replace who died or hung."""
        busy = [w.deadline for k, w in enumerate(self.workers)
                if w.verb is not None and i in (None, k)]
        assert busy, "nothing is under way: submit() comes before wait()"
        for key, _ in self.selector.select(max(0.0, min(within_s, min(busy) - time.monotonic()))):
            worker = self.workers[key.data]
            if worker.verb is not None:  # it is not silent: the rest of its answer has time, too
                worker.deadline = time.monotonic() + worker.timeout_s
            try:
                worker.reply = worker.receive()
            except EOFError as error:
                self.replace(key.data, error)
                continue
            if worker.reply is not None:
                self.arrived.append(key.data)
        for k, worker in enumerate(self.workers):
            if worker.verb is not None and worker.reply is None:
                # it may have answered meanwhile, while its user was busy with something else
                if time.monotonic() > worker.deadline and not select.select(
                        [worker.line], [], [], 0)[0]:
                    worker.bury(0)
                    self.replace(k, f"gave no answer in {worker.timeout_s:g} s and was killed")

    def replace(self, i, how):
        """A new worker for a lost one, and the SimDied that its caller will get."""
        lost = self.workers[i]
        work = "while idle" if lost.verb is None else (
            f"during {lost.verb!r}, episode {lost.episode}")
        error = SimDied(f"simulator {i} ({lost.name}) {how} {work}; it was started anew")
        self.selector.unregister(lost.line)
        lost.line.close()
        self.workers[i] = self.launch(i, RETURN_S)
        self.greet(i)
        self.workers[i].verb, self.workers[i].reply = lost.verb, error
        if lost.verb is not None:
            self.arrived.append(i)

    def close(self):
        """End all workers: their lines close, which they obey even while busy."""
        for worker in self.workers:
            worker.line.close()
        for worker in self.workers:
            worker.bury(5)
        self.workers = []
        self.selector.close()
