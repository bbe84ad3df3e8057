"""world/pool.py and world/worker.py: a simulator is a command, whichever way it is reached."""
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from helpers import EPISODE, ROBOT, free_port, is_gone

import evaluate
import make_data
from cli import UserError
from reward import FORWARD, RIGHT, STOP
from world import SimDied, SimError, check, worker
from world import pool as pool_module
from world.episodes import check_scenes
from world.pool import SimPool
from world.robots import simulator_commands

PYTHON = shlex.quote(sys.executable)


@pytest.fixture
def pool(scenes):
    with SimPool("house", ROBOT, scenes, sims=2, timeout_s=30) as pool:
        yield pool


def pool_of(command, scenes_dir, sims=1, **more):
    return SimPool("house", ROBOT, scenes_dir, sims, [shlex.split(command)], **more)


# ---------------------------------------------------------------- answers


def test_the_pool_answers_as_one_simulator_does(pool, house):
    pool.submit(0, "reset", episode=EPISODE)
    pool.submit(1, "record", episode=EPISODE, noise=0.1, seed=1)
    assert pool.wait_any(0) is None                            # a house takes longer to load
    answers = dict([pool.wait_any(), pool.wait_any(60)])
    house.reset(EPISODE)
    assert (answers[0]["frame"] == house.observe()).all()
    assert answers[0]["state"] == house.state()
    expected = worker.record(house, EPISODE, noise=0.1, seed=1)
    assert (answers[1].pop("frames") == expected.pop("frames")).all()
    assert answers[1] == expected

    house.reset(EPISODE)
    pool.submit(0, "step", actions=[RIGHT, RIGHT, FORWARD])
    step = pool.wait(0)
    for action, frame, state in zip([RIGHT, RIGHT, FORWARD], step["frames"], step["states"]):
        house.act(action)
        assert (frame == house.observe()).all() and state == house.state()
    pool.submit(0, "expert")
    assert pool.wait(0) == {"action": house.expert_action()}
    pool.submit(0, "topdown")
    assert (pool.wait(0)["image"] == house.topdown()[0]).all()


def test_a_bad_episode_is_the_episodes_fault_and_a_bug_is_a_bug(pool):
    bad = dict(EPISODE, scene_id="houses/none/none.glb")
    pool.submit(0, "reset", episode=bad)
    with pytest.raises(SimError, match="none.glb.*no such scene"):
        pool.wait(0)
    pool.submit(0, "reset", episode=bad)
    i, error = pool.wait_any()
    assert i == 0 and isinstance(error, SimError)
    pid = pool.workers[0].process.pid
    pool.submit(0, "step", actions=[STOP])
    with pytest.raises(RuntimeError, match="(?s)'step'.*ValueError.*not a motion"):
        pool.wait(0)
    pool.submit(0, "reset", episode=EPISODE, frame=False)
    assert "frame" not in pool.wait(0)
    assert pool.workers[0].process.pid == pid


def test_messages_survive_being_cut_anywhere():
    rng = np.random.default_rng(6)
    sent = [{"request": "x", "far": math.inf, "n": k, "frames": rng.integers(0, 255, (k, 3, 2, 3),
                                                                     dtype=np.uint8),
             "empty": np.zeros((0, 4))} for k in range(4)]
    stream, data, got = b"".join(map(worker.encode, sent)), bytearray(), []
    while stream:
        cut = int(rng.integers(1, 40))
        data += stream[:cut]
        stream = stream[cut:]
        while True:
            message, used = worker.decode(data)
            del data[:used]
            if message is None:
                break
            got.append(message)
    assert len(got) == 4 and not data
    for a, b in zip(sent, got):
        assert set(a) == set(b) and (a["frames"] == b["frames"]).all()
        assert b["frames"].dtype == np.uint8
        assert b["far"] == math.inf
        assert b["n"] == a["n"]


def message_with(header, body=b""):
    text = json.dumps(header).encode()
    return worker.SIZES.pack(len(text), len(body)) + text + body


@pytest.mark.parametrize("data", [
    b"\xff" * 64, message_with([]), message_with({}), message_with({"arrays": [["a", "|O8", [1]]]},
                                                                   b"x" * 8),
    message_with({"arrays": [["a", "<f8", [-1]]]}), message_with({"arrays": [["a", "<f8", [2]]]},
                                                                 b"x" * 8),
    message_with({"arrays": []}, b"rest")])
def test_a_message_that_lies_about_itself_is_refused(data):
    with pytest.raises(worker.ProtocolError):
        worker.decode(data)


# ---------------------------------------------------------------- processes that die or hang


def test_killed_and_hung_simulators_are_noticed_named_and_restarted(pool):
    for i in range(2):
        pool.submit(i, "reset", episode=EPISODE)
        pool.wait(i)
    killed, hung = (worker.process.pid for worker in pool.workers)

    os.kill(killed, signal.SIGKILL)  # while idle: the next request reports it, once
    pool.submit(0, "step", actions=[FORWARD])
    with pytest.raises(SimDied, match=f"simulator 0 .process {killed}.*SIGKILL.*'step'"):
        pool.wait(0)

    pool.timeout_s = 1.5
    os.kill(hung, signal.SIGSTOP)
    pool.submit(1, "step", actions=[FORWARD])
    pool.timeout_s = 30
    pool.submit(0, "reset", episode=EPISODE)
    answers = dict([pool.wait_any(), pool.wait_any()])  # the healthy one is served meanwhile
    assert "frame" in answers[0]
    assert isinstance(answers[1], SimDied)
    assert f"simulator 1 (process {hung}" in str(answers[1])
    assert "gave no answer in 1.5 s" in str(answers[1])
    assert is_gone(killed) and is_gone(hung)
    pool.submit(1, "reset", episode=EPISODE)
    assert pool.wait(1)["state"]["position"] == [-3.0, 0.0, -1.0]


def test_a_simulator_that_dies_while_another_is_awaited_is_reported_with_its_number(pool):
    pool.submit(0, "reset", episode=EPISODE)
    pool.wait(0)
    os.kill(pool.workers[0].process.pid, signal.SIGKILL)
    time.sleep(0.2)
    pool.submit(1, "record", episode=EPISODE)
    assert len(pool.wait(1)["actions"]) > 10
    pool.submit(0, "step", actions=[FORWARD])  # its state is gone: this must not be answered
    i, error = pool.wait_any()
    assert i == 0 and isinstance(error, SimDied)


def worker_with(does):
    """A worker with one more request, in a process that runs `does` first; it has started."""
    code = f"from world import worker; {does}; worker.serve()"
    process = pool_module.WorkerProcess([sys.executable, "-c", code])
    process.send({"request": "start", "kind": "house", "robot": ROBOT, "gpu": None, "scenes": "."})
    return process


def next_answers(process, n):
    answers = []
    while len(answers) < n:
        message = process.next_message()
        if message is None:
            process.read()
        else:
            answers.append(message)
    return answers


def test_what_libraries_print_does_not_reach_the_answers():
    process = worker_with("import os; worker.REQUESTS['chat'] = lambda s: "
                          "os.system('echo hello') or print('hi') or {}")
    process.send({"request": "chat"})
    greeting, started, chat = next_answers(process, 3)
    assert greeting["code"] == worker.code_hash() and chat == {}
    assert started == {"simulator": "house_sim 2"}
    process.process.stdin.close()
    assert process.process.wait(10) == 0


def test_a_worker_ends_with_its_input_even_while_it_is_busy():
    process = worker_with("import time; worker.REQUESTS['sleep'] = lambda s: time.sleep(600)")
    next_answers(process, 2)
    process.send({"request": "sleep"})
    time.sleep(0.2)
    process.process.stdin.close()
    assert process.process.wait(10) == 0


# ---------------------------------------------------------------- commands


def test_a_command_that_passes_through_another_process(scenes):
    with pool_of(f"sh -c 'cd / && {PYTHON} -m world.worker --scenes {scenes}; true'", "/none",
                 sims=2) as pool:
        pool.submit(1, "reset", episode=EPISODE)
        assert pool.wait(1)["state"]["position"] == [-3.0, 0.0, -1.0]
        pids = [w.greeting["pid"] for w in pool.workers]
        assert pids != [w.process.pid for w in pool.workers]
        assert pool.check_scenes([EPISODE]) == check_scenes([EPISODE], scenes)
        with pytest.raises(UserError, match="1 scenes are missing.*the first is houses/none.glb"):
            pool.check_scenes([{"scene_id": "houses/none.glb"}])
        with pytest.raises(UserError, match="episodes of one world on scenes of another"):
            pool.check_scenes([dict(EPISODE, scene_sha256="0" * 16)])
        pool.timeout_s = 1
        pool.submit(0, "reset", episode=EPISODE)
        pool.wait(0)
        os.kill(pids[0], signal.SIGSTOP)                 # the worker hangs; its shell does not
        pool.submit(0, "step", actions=[FORWARD])
        with pytest.raises(SimDied, match="gave no answer"):
            pool.wait(0)
        assert is_gone(pids[0])                          # the whole group was killed


@pytest.mark.parametrize("command, message", [
    (f"sh -c 'echo Welcome to gpu-box; exec {PYTHON} -m world.worker'",
     "printed b'Welcome to gpu-box.*banners"),
    (f"{PYTHON} -S -m world.worker", "exited with 1 while starting"),      # without numpy
    ("sh -c 'exit 7'", "exited with 7 while starting"),
    ("/no/such/program --flag", "does not start: No such file"),
    (f"{PYTHON} -c 'import time; time.sleep(600)'", "did not start in 2 s")])
def test_a_command_that_is_no_worker_is_a_sentence(scenes, monkeypatch, command,
                                                   message):
    monkeypatch.setattr(pool_module, "START_S", 2)
    with pytest.raises(UserError, match=message):
        pool_of(command, scenes)


def test_a_worker_of_other_code_is_refused(scenes, tmp_path):
    for name in ("cli.py", "reward.py", "world"):
        source = os.path.join(ROOT, name)
        (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, tmp_path / name)
    command = f"sh -c 'cd {tmp_path} && {PYTHON} -m world.worker'"
    with pool_of(command, scenes):
        pass                                             # an equal copy is accepted
    with open(tmp_path / "world" / "house_sim.py", "a") as file:
        file.write("\nCONTACT_M = 1e-3\n")
    with pytest.raises(UserError, match="runs other code .hash [0-9a-f]{16}, here [0-9a-f]{16}"):
        pool_of(command, scenes)


def test_a_worker_that_dies_midway_is_started_again(scenes):
    code = ("import os; from world import worker; "
            "worker.REQUESTS['die'] = lambda s: os._exit(9); worker.serve()")
    with SimPool("house", ROBOT, scenes, 1, [[sys.executable, "-c", code]]) as pool:
        pool.submit(0, "die")
        with pytest.raises(SimDied, match="exited with 9 during 'die'.*started again"):
            pool.wait(0)
        pool.submit(0, "reset", episode=EPISODE)
        assert "frame" in pool.wait(0)


def test_commands_and_gpus_are_used_in_turn(scenes, monkeypatch):
    sent, send = [], pool_module.WorkerProcess.send

    def spy(worker, message):
        sent.append(message["gpu"])
        send(worker, message)

    monkeypatch.setattr(pool_module.WorkerProcess, "send", spy)
    commands = [[sys.executable, *flags, "-m", "world.worker"] for flags in ((), ("-u",))]
    with SimPool("house", ROBOT, scenes, 5, commands, gpus=[0, 1]) as pool:
        assert sent == [0, 0, 1, 1, 0]                  # two commands, each with two GPUs
        assert ["-u" in w.process.args for w in pool.workers] == [False, True, False, True, False]


def test_flags_say_how_a_simulator_is_started(capsys):
    for module in (make_data, evaluate, check):
        args = module.parse_args(["--sim-gpus", "0,1", "--sim-command", "ssh a 'cd b && python'",
                                  "--sim-command", "ssh c"])
        assert args.sim_gpus == [0, 1]
        assert simulator_commands(args) == [["ssh", "a", "cd b && python"], ["ssh", "c"]]
        assert simulator_commands(module.parse_args([])) is None
        short = module.parse_args(["--sim-python", "py"])
        assert simulator_commands(short) == [["py", "-m", "world.worker"]]
        with pytest.raises(UserError, match="both name how"):
            simulator_commands(module.parse_args(["--sim-python", "p", "--sim-command", "c"]))
        for wrong in ("0;1", "-1"):
            with pytest.raises(SystemExit):
                module.parse_args(["--sim-gpus", wrong])
            capsys.readouterr()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    """A server on the loopback, with keys of its own -> the ssh command that reaches it."""
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if not (os.path.exists(server) and shutil.which("ssh") and shutil.which("ssh-keygen")):
        pytest.skip("needs OpenSSH's sshd and ssh")
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key],
                       check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    os.makedirs("/run/sshd", exist_ok=True)
    port = free_port()
    process = subprocess.Popen([
        server, "-D", "-e", "-f", "/dev/null", "-h", str(folder / "host"), "-p", str(port),
        "-o", "ListenAddress=127.0.0.1", "-o", "StrictModes=no", "-o", "UsePAM=no",
        "-o", f"AuthorizedKeysFile={folder}/authorized_keys", "-o", "PidFile=none"],
        stderr=subprocess.PIPE)
    ssh = (f"ssh -F /dev/null -i {folder}/user -p {port} -o BatchMode=yes -o LogLevel=ERROR "
           f"-o StrictHostKeyChecking=no -o UserKnownHostsFile={folder}/known 127.0.0.1")
    for _ in range(50):
        if subprocess.run([*shlex.split(ssh), "true"], capture_output=True).returncode == 0:
            break
        time.sleep(0.1)
    else:
        process.kill()
        pytest.skip(f"sshd does not let us in: {process.communicate()[1][-300:]}")
    yield ssh
    process.kill()


def test_a_simulator_behind_ssh(sshd, scenes, house):
    with pool_of(f"{sshd} 'cd {ROOT} && {sys.executable} -m world.worker'", scenes) as pool:
        pool.submit(0, "reset", episode=EPISODE)
        house.reset(EPISODE)
        assert (pool.wait(0)["frame"] == house.observe()).all()
        remote = pool.workers[0].greeting["pid"]
        os.kill(pool.workers[0].process.pid, signal.SIGKILL)      # the connection breaks
        pool.submit(0, "step", actions=[FORWARD])
        with pytest.raises(SimDied):
            pool.wait(0)
        pool.submit(0, "reset", episode=EPISODE)
        assert "frame" in pool.wait(0)
    assert is_gone(remote)                               # no simulator is left behind


# ---------------------------------------------------------------- the check


def run_check(*flags):
    return subprocess.run([sys.executable, "-m", "world.check", *flags], capture_output=True,
                          text=True, timeout=600, cwd=ROOT)


def test_check_says_that_the_machine_is_ready_or_what_is_missing(scenes, tmp_path):
    done = run_check("--scenes", scenes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("ready")
    done = run_check("--scenes", str(tmp_path))
    assert done.returncode == 2 and "world.houses" in done.stderr
    done = run_check("--scenes", scenes, "--sim-python", "/no/such/python")
    assert done.returncode == 2 and "'/no/such/python -m world.worker' does not" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_habitat_the_conda_line_is_given(scenes):
    try:
        import habitat_sim  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="(?s)habitat_sim does not import.*conda create"):
            SimPool("habitat", ROBOT, scenes, sims=1)
    else:
        pytest.skip("habitat_sim is installed here")


def test_a_folder_is_not_continued_with_another_simulator(pool, tmp_path):
    pool.note_versions(tmp_path)
    held = json.loads((tmp_path / "simulator.json").read_text())
    assert held["simulator"] == "house_sim 2" and held["numpy"] == np.__version__
    pool.note_versions(tmp_path)
    for worker_here in pool.workers:
        worker_here.greeting["simulator"] = "habitat-sim 0.3.4 (conda 0.3.4 build)"
    with pytest.raises(UserError, match="was begun with house_sim 2.*go on with habitat-sim 0.3.4"):
        pool.note_versions(tmp_path)
    pool.workers[1].greeting["simulator"] = "habitat-sim 0.3.3 (conda 0.3.3 build)"
    with pytest.raises(UserError, match="has habitat-sim 0.3.3.*has habitat-sim 0.3.4"):
        pool.versions()
