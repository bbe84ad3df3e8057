"""setup.sh, in a folder whose name has a space, with an interpreter that only notes what it does.

Run it   python -m pytest tests/test_setup.py
"""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

# An interpreter beside a file `version`. Its venv is a copy of itself; its pip is there when
# pip-is-here is, notes its arguments in ./calls, and fails if they hold the word in ./pip-fails.
STUB = r"""#!/bin/sh
bin="$(dirname "$0")"
read -r release < "$bin/version"
case "$*" in
  --version) echo "Python $release" ;;
  "-c "*ensurepip*) [ ! -e "$bin/no-ensurepip" ] ;;
  "-c import torch") [ -e "$bin/torch-is-here" ] ;;
  "-c "*pip*) [ -e "$bin/pip-is-here" ] && case "$release" in 3.?.*) exit 1 ;; esac ;;
  "-m venv --clear .venv")
    rm -rf .venv && mkdir -p .venv/bin && touch .venv/pyvenv.cfg .venv/bin/pip-is-here
    cp "$0" .venv/bin/python && cp "$bin/version" .venv/bin && echo venv >> calls ;;
  "-m pip install "*)
    echo "$*" >> calls
    case "$*" in *"$(cat pip-fails)"*) exit 1 ;; *torch==*) touch "$bin/torch-is-here" ;; esac ;;
  *) echo "setup.sh never asked this before: $*" >&2; exit 9 ;;
esac
"""
PIP_TORCH = "-m pip install -q --disable-pip-version-check torch==2.13.0"
PIP_REST = "-m pip install -q --disable-pip-version-check -r requirements.txt"
ALL = ["venv", PIP_TORCH, PIP_REST]


def interpreter(folder, release="3.12.1"):
    """The stub as folder/python3."""
    folder.mkdir(parents=True)
    (folder / "python3").write_text(STUB)
    (folder / "python3").chmod(0o755)
    (folder / "version").write_text(release + "\n")
    for name in ("apt-get", "sudo"):                              # never those of this machine
        (folder / name).write_text("#!/bin/sh\nexit 100\n")
        (folder / name).chmod(0o755)
    return folder / "python3"


class Checkout:
    def __init__(self, folder, python):
        self.folder, self.python = folder, python
        folder.mkdir(parents=True)
        for name in ("setup.sh", "requirements.txt"):
            shutil.copy(os.path.join(ROOT, name), folder)
        self.pip_fails_on("nothing")

    def pip_fails_on(self, word):
        (self.folder / "pip-fails").write_text(word)

    def source(self, **variables):
        """Source setup.sh as a user's shell does -> (what python was asked, done). The shell must
        outlive it: the last line of its output is 'status N', and then PATH."""
        (self.folder / "calls").unlink(missing_ok=True)
        env = {"PATH": f"{self.python.parent}:/usr/bin:/bin", **variables}
        done = subprocess.run(["bash", "-c", '. ./setup.sh; echo "status $?"; echo "$PATH"'],
                              cwd=self.folder, env=env, capture_output=True, text=True)
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else [], done

    def good(self, **variables):
        """source(), which must end well and put .venv first. -> what python was asked"""
        calls, done = self.source(**variables)
        status, path = done.stdout.splitlines()[-2:]
        assert status == "status 0", done.stderr
        assert path.startswith(f"{self.folder}/.venv/bin:")
        return calls

    def bad(self, **variables):
        """source(), which must end badly, in a shell that goes on. -> its one sentence"""
        _, done = self.source(**variables)
        status, path = done.stdout.splitlines()[-2:]
        assert status == "status 1" and ".venv" not in path
        assert not (self.folder / ".venv" / "ready").exists()
        return done.stderr


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "my work" / "vln", interpreter(tmp_path / "some python"))


def test_it_installs_once(checkout):
    assert checkout.good() == ALL
    assert checkout.good() == []


@pytest.mark.parametrize("word", ["torch", "requirements.txt"])
def test_a_failed_pip_leaves_no_ready(checkout, word):
    checkout.pip_fails_on(word)
    assert f"{word}" in checkout.bad() and checkout.bad().startswith("setup.sh: pip could not")
    checkout.pip_fails_on("nothing")
    assert checkout.good()[-1] == PIP_REST
    assert checkout.good() == []


def test_a_script_that_stops_at_errors_stops(checkout):
    checkout.pip_fails_on("torch")
    done = subprocess.run(["bash", "-ec", ". ./setup.sh; echo went on"], cwd=checkout.folder,
                          env={"PATH": f"{checkout.python.parent}:/usr/bin:/bin"},
                          capture_output=True, text=True)
    assert done.returncode == 1 and "went on" not in done.stdout


def without_pip(venv):
    (venv / "bin" / "pip-is-here").unlink()


def dangling_python(venv):
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/nowhere/python3")


def empty(venv):
    shutil.rmtree(venv)
    venv.mkdir()


def folders_only(venv):
    empty(venv)
    (venv / "bin").mkdir()


def too_old(venv):
    (venv / "bin" / "version").write_text("3.9.2\n")


def upgraded_python(venv):
    (venv / "bin" / "version").write_text("3.14.0\n")


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("damage", [without_pip, dangling_python, empty, folders_only, too_old,
                                    upgraded_python])
def test_a_broken_environment_is_replaced(checkout, damage, ready):
    checkout.good()
    venv = checkout.folder / ".venv"
    damage(venv)
    if ready:
        shutil.copy(checkout.folder / "requirements.txt", venv / "ready")
    else:
        (venv / "ready").unlink(missing_ok=True)
    assert checkout.good() == ALL
    assert checkout.good() == []


def test_a_patch_release_of_python_is_the_same_python(checkout):
    checkout.good()
    (checkout.folder / ".venv" / "bin" / "version").write_text("3.12.9\n")
    assert checkout.good() == []


@pytest.mark.parametrize("move", [shutil.move, lambda a, b: shutil.copytree(a, b, symlinks=True)])
def test_a_moved_or_copied_checkout_gets_its_own_environment(checkout, tmp_path, move):
    checkout.good()
    move(checkout.folder, tmp_path / "elsewhere")
    checkout.folder = tmp_path / "elsewhere"
    assert checkout.good() == ALL
    assert checkout.good() == []


def test_an_environment_with_a_torch_of_the_users_own_is_kept(checkout):
    by_hand = [checkout.python, "-m", "venv", "--clear", ".venv"]
    subprocess.run(by_hand, cwd=checkout.folder, check=True)
    (checkout.folder / ".venv" / "bin" / "torch-is-here").touch()
    assert checkout.good() == [PIP_REST]


def test_other_requirements_are_installed_and_nothing_else(checkout):
    checkout.good()
    (checkout.folder / "requirements.txt").write_text("torch\n")
    checkout.pip_fails_on("requirements.txt")
    checkout.bad()
    shutil.copy(os.path.join(ROOT, "requirements.txt"), checkout.folder)     # and taken back
    checkout.pip_fails_on("nothing")
    assert checkout.good() == [PIP_REST]


@pytest.mark.parametrize("release", ["3.9.2", "2.7.18"])
def test_an_old_python_gets_a_sentence(tmp_path, release):
    checkout = Checkout(tmp_path / "a b", interpreter(tmp_path / "old", release))
    message = checkout.bad()
    assert "Python 3.10 or newer" in message and release.rsplit(".", 1)[0] in message
    assert "PYTHON=python3.12" in message and message.count("\n") == 1
    assert not (checkout.folder / ".venv").exists()
    new = interpreter(tmp_path / "new python")
    assert checkout.good(PYTHON=str(new)) == ALL
    assert checkout.good() == [], "an environment that fits needs no other interpreter"


def test_an_interpreter_that_is_not_there_gets_a_sentence(checkout):
    message = checkout.bad(PYTHON="python3.99")
    assert "'python3.99 --version' gives" in message and message.count("\n") == 1


def test_another_python_makes_another_environment(checkout, tmp_path):
    checkout.good()
    other = interpreter(tmp_path / "other", "3.13.0")
    assert checkout.good(PYTHON=str(other)) == ALL
    assert checkout.good(PYTHON=str(other)) == [] and checkout.good() == []


def test_a_missing_venv_module_that_cannot_be_installed_is_a_sentence(checkout):
    (checkout.python.parent / "no-ensurepip").touch()
    assert "could not install python3.12-venv" in checkout.bad()


def test_a_folder_that_is_no_environment_is_not_cleared(checkout, tmp_path):
    kept = tmp_path / "thesis.tex"
    kept.write_text("years of work")
    assert "is no virtual environment" in checkout.bad(VENV=str(tmp_path))
    assert kept.exists()


def test_another_folder_is_a_sentence(checkout):
    (checkout.folder / "requirements.txt").unlink()
    assert "cd to the repository" in checkout.bad()


# ---------------------------------------------------------------- commands in the scripts


@pytest.mark.parametrize("script", ["setup.sh", "test.sh", "demo.sh", "bench/run.sh"])
def test_no_script_runs_a_console_script(script):
    """Their first line is a path: it breaks where that has a space, and when .venv is moved."""
    text = Path(ROOT, script).read_text(encoding="utf-8")
    for line in text.splitlines():
        words = re.sub(r"\s#.*|^#.*|(fail|echo) .*|-c '[^']*'", "", line).split()
        words = [word.strip("\"'$(){};").rpartition("=")[2].strip("\"") for word in words]
        for before, word in zip(["", *words], words):
            run = os.path.basename(word) in ("pip", "pytest", "ruff", "deepspeed", "torchrun")
            assert not run or before == "-m", line


def test_removing_what_runs_have_made_removes_nothing_that_git_tracks():
    """demo.sh states: `rm -r data ckpt results` restarts."""
    if not os.path.exists(os.path.join(ROOT, ".git")):
        pytest.skip("needs git's own folder")
    tracked = subprocess.run(["git", "ls-files", "data", "ckpt", "results"], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout
    assert not tracked
    made = ["data/houses/args.json", "ckpt/sft/nav.json", "results/online.json", ".venv/ready"]
    ignored = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout.split()
    assert ignored == made


def test_pillow_has_the_fonts_of_any_size():
    lines = Path(ROOT, "requirements.txt").read_text().splitlines()
    pillow, = (Requirement(line) for line in lines if line.startswith("pillow"))
    assert "10.0.1" not in pillow.specifier and "10.1" in pillow.specifier
