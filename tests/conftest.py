"""Every test runs offline, on one CPU thread, and finds the repository's scripts by name. A GPU is
hidden, because it does not sum in a fixed order; test_gpu.py shows it to the scripts that it runs.
"""
import contextlib
import importlib
import io
import os
import struct
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the GPU was before it was hidden; a process of pytest-xdist inherits both variables.
os.environ.setdefault("GPU_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]


GLB, NAVMESH = b"glTF" + struct.pack("<II", 2, 12), b"TESM"     # the least that has the right marks


def script(*command, check=True):
    """Run one of the project's scripts as a user would -> CompletedProcess with its text."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=check,
                          capture_output=True, text=True)


def in_process(*command, check=True):
    """script() without a process of its own, which saves the start of torch and DeepSpeed: for what
    a script computes, writes and says. Signals, locks and launchers need processes."""
    from cli import run_cli
    name, *argv = [str(word) for word in command if word != "-m"]
    name = name.removeprefix("bench/").removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(module.main, lambda: module.parse_args(argv))
        except SystemExit as left:
            status = left.code or 0
    done = subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())
    assert not check or status == 0, done.stderr
    return done


def make_ego(root):
    """A VLN-Ego folder recorded in two tiny houses, by the project's own scripts; the houses lie
    in ../../houses."""
    script("-m", "world.houses", "--out", root / "houses", "--train-houses", 2,
           "--walks-per-house", 4, "--val-episodes", 4, "--unseen-houses", 2, "--jobs", 1)
    script("make_data.py", "--episodes", root / "houses", "--out", root / "ego", "--sims", 1)
    return str(root / "ego" / "train")


@pytest.fixture(scope="session")
def ego(tmp_path_factory):
    return make_ego(tmp_path_factory.mktemp("ego"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with the house of two rooms (helpers.py)."""
    from helpers import SCENE_ID, two_rooms, write_house
    folder = tmp_path_factory.mktemp("scenes")
    write_house(str(folder / SCENE_ID), two_rooms())
    return str(folder)


@pytest.fixture
def house(scenes):
    """The simulator in that house, at the start of helpers.EPISODE."""
    from helpers import EPISODE, ROBOT

    from world import house_sim
    simulator = house_sim.HouseSim(ROBOT, scenes)
    simulator.reset(EPISODE)
    return simulator


@pytest.fixture(scope="module")
def wordy():
    """A policy whose tokenizer splits phrases, as Qwen2's does: there is something to draft."""
    from policies import texts

    from checkpoint import load_policy
    from model import CONTRACT
    return load_policy("tiny", contract=dict(CONTRACT, turn_deg=30), texts=texts(), seed=1,
                       atomic_patterns=[])


@pytest.fixture(scope="session")
def habitat_python():
    """An interpreter that has habitat-sim: $HABITAT_PYTHON, or this one."""
    python = os.environ.get("HABITAT_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import habitat_sim"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"needs habitat-sim, which {python} lacks: set HABITAT_PYTHON")
    return python
