"""
Many simulators at once: each in its own process, with one request at a time.

Processes, for three reasons: habitat-sim often needs another Python than the training stack, a
simulator may crash, and several are faster than one. A command starts each (worker.py); by default
this interpreter's `-m world.worker`. Any command that connects standard input and output to a
worker will do: ssh, docker run -i, srun, kubectl exec -i, conda run --no-capture-output. Encryption
and access control are those of that program.

The worker's greeting holds a hash of its code; a worker with other code is refused. A worker that
dies or hangs is killed, with all processes of its group, and started again; its caller gets
SimDied.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time

from cli import UserError, write_json
from world import SimDied, SimError
from world.episodes import check_scenes
from world.robots import simulator_commands
from world.worker import MAGIC, ProtocolError, code_hash, decode, encode, write_all

START_S = 300  # habitat's first renderer may take 45 s on an idle CPU
RESTARTS = 3  # tries to start a lost simulator again: a remote machine may be booting, too


class WorkerProcess:
    """The process of one worker, and the request that it is busy with."""

    def __init__(self, command: list[str]):
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                env=dict(os.environ, **threads, PYTHONPATH=path),
                start_new_session=True)  # Ctrl-C is for the parent; a worker ends with its input
        except OSError as error:
            raise UserError(f"the simulator's command {' '.join(command)!r} does not start: "
                            f"{error.strerror}; see --sim-python and --sim-command") from None
        self.name, self.greeting = f"process {self.process.pid}", None
        self.data, self.magic = bytearray(), False  # data: received, not decoded yet
        self.request = self.episode = self.timeout_s = self.deadline = None
        self.reply = None  # a dict or a SimDied, once there is one

    def fileno(self) -> int:
        return self.process.stdout.fileno()

    def send(self, message: dict) -> None:
        try:
            write_all(self.process.stdin.fileno(), encode(message))
        except OSError:
            pass  # it is dead, and read() will raise

    def readable(self, within_s: float = 0) -> bool:
        """Does it send anything, or end, within so many seconds?"""
        with selectors.DefaultSelector() as only:
            only.register(self, selectors.EVENT_READ)
            return bool(only.select(max(0.0, within_s)))

    def read(self) -> None:
        """Read once. EOFError if it died."""
        chunk = os.read(self.fileno(), 1 << 20)
        if not chunk:
            raise EOFError(self.kill(grace_s=1))
        self.data += chunk

    def next_message(self) -> dict | None:
        """Take a message from what was read, or None if it is not complete. ProtocolError if it is
        something else."""
        if not self.magic:
            if self.data[:len(MAGIC)] != MAGIC[:len(self.data)]:
                self.kill()
                raise ProtocolError(
                    f"printed {bytes(self.data[:80])!r} before the worker answered: its standard "
                    "output must be the worker's alone; send banners of its login to stderr")
            if len(self.data) < len(MAGIC):
                return None
            del self.data[:len(MAGIC)]
            self.magic = True
        try:
            message, used = decode(self.data)
        except ProtocolError as error:
            self.kill()
            raise ProtocolError(f"sent {error}") from None
        del self.data[:used]
        return message

    def kill(self, grace_s: float = 0) -> str:
        """Kill it and every process that its command has started. -> how it ended"""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = self.process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def close(self, grace_s: float) -> None:
        self.process.stdin.close()
        self.kill(grace_s)
        self.process.stdout.close()


def scenes_used(args, robot: dict, scenes: str, episodes: list[dict]) -> dict:
    """check_scenes(), on this machine or, with --sim-command, where the simulators run."""
    if not args.sim_command:
        return check_scenes(episodes, scenes)
    commands = simulator_commands(args)
    with SimPool(args.sim, robot, scenes, len(commands), commands) as pool:
        return pool.check_scenes(episodes)


class SimPool:
    """`sims` simulators, each in its own process, with one request at a time.

        with SimPool("house", ROBOTS["houses"], "data/houses/scenes", sims=2) as pool:
            pool.submit(0, "reset", episode=episode)      # returns at once
            pool.submit(1, "reset", episode=another)
            i, reply = pool.wait_any()                    # the first that answers

    wait raises SimError if the episode is at fault, SimDied if the process was lost (a new one has
    started, which needs a reset); wait_any returns these with the simulator's number. Any other
    error inside a simulator is a bug: both raise RuntimeError with the worker's traceback.

    commands: argv lists that start a worker, used in turn; default: this interpreter. scenes_dir is
    a folder where the worker runs. gpus: CUDA indices to spread the simulators over (habitat only).
    """

    def __init__(self, kind: str, robot: dict, scenes_dir: str, sims: int = 2,
                 commands: list[list[str]] | None = None, timeout_s: float = 120,
                 gpus: list[int] | None = None):
        self.commands = commands or [[sys.executable, "-m", "world.worker"]]
        self.start = {"request": "start", "kind": kind, "robot": robot, "scenes": str(scenes_dir)}
        self.timeout_s, self.gpus, self.code = timeout_s, gpus or [None], code_hash()
        self.workers, self.arrived = [], []  # arrived: numbers with an answer, oldest first
        self.selector = selectors.DefaultSelector()
        try:
            for i in range(sims):
                self.workers.append(self.launch(i))
            for i in range(sims):
                self.wait_ready(i)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    # ------------------------------------------------------------ start

    def launch(self, i: int) -> WorkerProcess:
        """Start worker i and send it the robot and the scenes, without waiting for it."""
        turn, card = i % len(self.commands), i // len(self.commands)
        worker = WorkerProcess(self.commands[turn])
        self.selector.register(worker, selectors.EVENT_READ, i)
        worker.send(dict(self.start, gpu=self.gpus[card % len(self.gpus)]))
        return worker

    def wait_ready(self, i: int) -> None:
        """Wait for worker i's greeting and its answer to "start". UserError if it cannot start."""
        worker, deadline = self.workers[i], time.monotonic() + START_S
        name = f"simulator {i} ({worker.name}, {' '.join(self.commands[i % len(self.commands)])})"
        worker.greeting = self.first_reply(worker, name, deadline)
        if worker.greeting.get("code") != self.code:
            raise UserError(f"{name} runs other code (hash {worker.greeting.get('code')}, here "
                            f"{self.code}): copy this checkout's scripts to where it runs")
        worker.name = f"process {worker.greeting['pid']} on {worker.greeting['host']}"
        reply = self.first_reply(worker, name, deadline)
        if "error" in reply:
            raise UserError(reply["text"])
        worker.greeting["simulator"] = reply["simulator"]

    @staticmethod
    def first_reply(worker: WorkerProcess, name: str, deadline: float) -> dict:
        try:
            while (reply := worker.next_message()) is None:
                if not worker.readable(deadline - time.monotonic()):
                    raise UserError(f"{name} did not start in {START_S} s")
                worker.read()
        except (EOFError, ProtocolError) as error:
            raise UserError(f"{name} {error} while starting; what it printed is above, and "
                            "`python -m world.check` says more") from None
        return reply

    def versions(self) -> dict:
        """{"simulator", "python", "numpy", "pillow", "code"} of the workers. UserError if two of
        them have different simulators: their walks would differ."""
        greetings = [worker.greeting for worker in self.workers]
        for other in greetings:
            if other["simulator"] != greetings[0]["simulator"]:
                raise UserError(f"{other['host']} has {other['simulator']} and "
                                f"{greetings[0]['host']} has {greetings[0]['simulator']}: use one")
        keys = ("simulator", "python", "numpy", "pillow", "code")
        return {key: greetings[0][key] for key in keys}

    def note_versions(self, folder: str, scene_id: str | None = None) -> None:
        """Write versions() to folder/simulator.json. UserError if it names another simulator:
        habitat-sim's versions differ in how a robot moves along a wall."""
        path, now = os.path.join(folder, "simulator.json"), self.versions()
        if self.start["kind"] == "habitat" and scene_id and not os.path.exists(path):
            with contextlib.suppress(SimError, SimDied):  # the walk in that scene will report it
                self.submit(0, "load", scene_id=scene_id)
                self.wait(0)
                self.submit(0, "stepping")
                now.update(self.wait(0))
        if not os.path.exists(path):
            write_json(path, now)
        with open(path, encoding="utf-8") as file:
            then = json.load(file)
        if then["simulator"] != now["simulator"]:
            raise UserError(f"{folder} was begun with {then['simulator']} and would go on with "
                            f"{now['simulator']}: use the former, or give another --out")

    def check_scenes(self, episodes: list[dict]) -> dict:
        """episodes.check_scenes() on the machines of the simulators. UserError also if two of them
        hold different files."""
        keys, found = ("scene_id", "scene_sha256"), []
        needed = [{key: e[key] for key in keys if key in e} for e in episodes]
        for i in range(min(len(self.commands), len(self.workers))):
            self.submit(i, "check_scenes", episodes=needed)
            try:
                found.append(self.wait(i))
            except SimError as error:
                raise UserError(f"{self.workers[i].name}: {error}") from None
            if found[i] != found[0]:
                raise UserError(f"the scenes for {self.workers[i].name} are not those for "
                                f"{self.workers[0].name}: copy them again")
        return found[0]

    # ------------------------------------------------------------ requests and answers

    def submit(self, i: int, request: str, **arguments) -> None:
        """Send worker i a request (a key of worker.REQUESTS), without waiting for the answer."""
        worker = self.workers[i]
        assert worker.request is None, f"simulator {i} is still busy with {worker.request!r}"
        if "episode" in arguments:  # only the fields that a simulator reads
            keys = ("episode_id", "scene_id", "start_position", "start_rotation", "goals")
            episode = arguments["episode"]
            arguments["episode"] = {key: episode[key] for key in keys if key in episode}
            worker.episode = episode.get("episode_id")
        first = worker.timeout_s is None and self.start["kind"] == "habitat"  # makes a renderer
        worker.request, worker.timeout_s = request, max(self.timeout_s, START_S if first else 0)
        worker.deadline = time.monotonic() + worker.timeout_s
        if worker.reply is None:
            worker.send(dict(arguments, request=request))
        else:
            self.arrived.append(i)  # it was lost while idle, with its state: report that now

    def wait(self, i: int) -> dict:
        """The answer of worker i, a dict. Raises SimError, SimDied."""
        while i not in self.arrived:
            self.collect(i)
        self.arrived.remove(i)
        reply = self.take(i)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def wait_any(self, within_s: float = math.inf) -> tuple | None:
        """(i, answer) of the worker that answers first; the answer may be a SimError or SimDied.
        None if no worker answers within so many seconds."""
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

    def take(self, i: int) -> dict | Exception:
        """The reply of worker i, which is idle from here on."""
        worker = self.workers[i]
        reply, worker.reply = worker.reply, None
        request, worker.request = worker.request, None
        if not isinstance(reply, dict) or "error" not in reply:
            return reply
        if reply["error"] == "bug":
            return RuntimeError(f"simulator {i}, {request!r}: {reply['text']}")
        return SimError(reply["text"])

    def collect(self, i: int | None = None, within_s: float = math.inf) -> None:
        """Wait for an answer (of worker i, or of any), and replace workers that died or hung."""
        busy = [w.deadline for k, w in enumerate(self.workers)
                if w.request is not None and i in (None, k)]
        assert busy, "no request is under way: submit() comes before wait()"
        for key, _ in self.selector.select(max(0.0, min(within_s, min(busy) - time.monotonic()))):
            worker = self.workers[key.data]
            if worker.request is not None:  # a part of the answer came: wait as long for the rest
                worker.deadline = time.monotonic() + worker.timeout_s
            try:
                worker.read()
                worker.reply = worker.next_message()
            except (EOFError, ProtocolError) as error:
                self.replace(key.data, error)
                continue
            if worker.reply is not None:
                self.arrived.append(key.data)
        for k, worker in enumerate(self.workers):
            late = worker.request is not None and time.monotonic() > (worker.deadline or math.inf)
            # readable: it has answered, while the caller of this pool was busy
            if late and worker.reply is None and not worker.readable():
                worker.kill()
                self.replace(k, f"gave no answer in {worker.timeout_s:g} s and was killed")

    def replace(self, i: int, how: str | Exception) -> None:
        """Start a new worker for a lost one; the reply is a SimDied."""
        lost = self.workers[i]
        work = "while idle" if lost.request is None else (
            f"during {lost.request!r}, episode {lost.episode}")
        error = SimDied(f"simulator {i} ({lost.name}) {how} {work}; it was started again")
        for tries in range(1, RESTARTS + 1):
            self.selector.unregister(self.workers[i])
            self.workers[i].close(0)
            self.workers[i] = self.launch(i)
            try:
                self.wait_ready(i)
                break
            except UserError:
                if tries == RESTARTS:
                    raise
                time.sleep(5 * tries)
        self.workers[i].request, self.workers[i].reply = lost.request, error
        if lost.request is not None:
            self.arrived.append(i)

    def close(self) -> None:
        """End all workers, by closing their inputs first; they end even while busy."""
        for worker in self.workers:
            worker.process.stdin.close()
        for worker in self.workers:
            worker.close(5)
        self.workers = []
        self.selector.close()
