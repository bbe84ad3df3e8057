"""Every test runs offline, on one CPU thread, and finds the repository's scripts by name."""
import os
import struct
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


GLB, NAVMESH = b"glTF" + struct.pack("<II", 2, 12), b"TESM"     # the least that has the right marks


def script(*command, check=True):
    """Run one of the project's scripts as a user would -> CompletedProcess with its text."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=check,
                          capture_output=True, text=True)


@pytest.fixture(scope="session")
def ego(tmp_path_factory):
    """A VLN-Ego folder recorded in two tiny houses, by the project's own scripts; the houses lie
    in ../../houses."""
    root = tmp_path_factory.mktemp("ego")
    script("-m", "world.houses", "--out", root / "houses", "--train-houses", 2,
           "--walks-per-house", 4, "--val-episodes", 4, "--unseen-houses", 2, "--jobs", 1)
    script("make_data.py", "--episodes", root / "houses", "--out", root / "ego", "--sims", 1)
    return str(root / "ego" / "train")


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


@pytest.fixture(scope="session")
def habitat_python():
    """An interpreter that has habitat-sim: $HABITAT_PYTHON, or this one."""
    python = os.environ.get("HABITAT_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import habitat_sim"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"needs habitat-sim, which {python} lacks: set HABITAT_PYTHON")
    return python
