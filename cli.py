"""
What all scripts share at the command line: number types, help with defaults, errors in one
sentence, files of JSON, one process per output folder.

Imports  the standard library only, in Python 3.9 syntax: a simulator's interpreter loads this file
"""
from __future__ import annotations

import argparse
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """A mistake that the user can correct. The message states, in a sentence, what and how."""


def positive_int(text: str) -> int:
    """The type of flags that count something: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole_number(text: str) -> int:
    """The type of flags that may also be 0: a whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def non_negative(text: str) -> float:
    """The type of flags that hold a finite number of 0 or more: argparse's float takes nan."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of 0 or more")
    return value


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """-h shows the default of every flag that has one. argparse's own formatter leaves out flags
    without help, and adds "(default: None)" where the help already describes the default."""

    def add_argument(self, action):
        if not action.help and action.default is not None:
            action.help = "default: %(default)s"
        super().add_argument(action)

    def _get_help_string(self, action):
        if action.default is None or "default: " in action.help:
            return action.help
        return super()._get_help_string(action)


def run_cli(main: Callable, parse_args: Callable):
    """main(parse_args()). A UserError becomes `x.py: error: <sentence>` and exit status 2; so does
    a full disk. A closed output pipe (`| head`) ends the program without a message."""
    name = os.path.basename(sys.argv[0])
    try:
        try:
            result = main(parse_args())
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # for the final flush
            sys.exit(1)
        except Exception as error:
            reason = disk_full(error)
            if not reason:
                raise
            sys.unraisablehook = lambda _: None        # closing the open files fails as well
            raise UserError(f"the disk is full ({reason}); free some space and run the same "
                            "command again: it goes on from the last complete file") from None
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


# Messages of libraries that hide the system's error: safetensors and tokenizers (Rust) quote it,
# torch.save reports only that its file is shorter than it should be.
DISK_FULL_MESSAGES = (
    "No space left on device", "Disk quota exceeded", "File too large", "os error 28",
    "os error 122", "os error 27", "file write failed", "unexpected pos")


def disk_full(error: BaseException | None) -> str | None:
    """The message of an exception, or of one of its causes, that means a full disk; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
        if any(words in str(error) for words in DISK_FULL_MESSAGES):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


# ---------------------------------------------------------------- files


def fingerprint(folder: str) -> str:
    """A hash of 64 samples of each file of weights: a retrained checkpoint is another one."""
    return hash_samples(sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))))


def hash_samples(paths: Iterable[str]) -> str:
    """A hash of 64 samples of each file."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            for k in range(64):
                file.seek(size * k // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def write_text(path: str, text: str) -> None:
    """Atomic write: to a temporary file in the same folder, flushed to the disk, then renamed."""
    temporary = f"{path}.{os.getpid()}.tmp"            # ranks may write one file at the same time
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str, content: Any, indent: int | None = 2) -> None:
    """write_text() of JSON. ValueError if a number is not finite: JSON has no NaN."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_lines(path: str, rows: Iterable[dict]) -> None:
    """write_text() of JSON lines, one per row. ValueError if a number is not finite."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path: str) -> Any:
    """OSError or ValueError if it cannot be read. (world.episodes.read_json is for files that
    users bring.)"""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_rows(path: str) -> list[dict]:
    """The rows of a file that a run appends JSON lines to. A last line that was cut short by a kill
    is left out; UserError if another line is damaged."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return [json.loads(line) for line in data[:data.rfind(b"\n") + 1].splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder and start again") from None


HELD = {}                                          # this process's locks: {file: handle}


def lock_folder(folder: str, flag: str = "--out", name: str = ".lock") -> int | None:
    """Make a folder and lock it until the process ends; the same process may lock it again.
    UserError if another process has locked it, or if it is not writable. The kernel releases the
    lock however the process ends; the lock file `name` stays, empty."""
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write there ({error.strerror}); choose another "
                        "folder") from None
    file = os.fstat(handle).st_dev, os.fstat(handle).st_ino
    if file in HELD:
        os.close(handle)
        return HELD[file]
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"{flag} {folder} is being written by another process; wait until it "
                            "has ended, or choose another folder") from None
        return None                                # a file system without locks
    os.set_inheritable(handle, False)
    HELD[file] = handle                            # never closed, so held until the process ends
    return handle
