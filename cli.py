"""
What every script does at the command line, and does alike: number types, help with defaults, errors
as one sentence, files that are whole or absent, one process per output folder.

Run it   it is imported
Imports  the standard library only, in Python 3.9 syntax: a simulator's interpreter loads this file
"""
import argparse
import errno
import fcntl
import json
import os
import sys


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong and how to mend it."""


def count(text):
    """The type of flags that count something: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """-h shows the default of every flag that has one. argparse's own formatter leaves out flags
    without words of help, and says "None" after words that tell what happens without the flag."""

    def add_argument(self, action):
        if not action.help and action.default is not None:
            action.help = "default: %(default)s"
        super().add_argument(action)

    def _get_help_string(self, action):
        if action.default is None or "default: " in action.help:
            return action.help
        return super()._get_help_string(action)


def run(main, parse_args):
    """main(parse_args()). A UserError becomes `x.py: error: <sentence>` and exit status 2; so does
    a full disk. A reader that has gone (`| head`) ends the program in silence."""
    name = os.path.basename(sys.argv[0])
    try:
        try:
            result = main(parse_args())
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # for the last flush
            sys.exit(1)
        except Exception as error:
            why = disk_full(error)
            if not why:
                raise
            sys.unraisablehook = lambda _: None        # nor can files be closed that are still open
            raise UserError(f"the disk is full ({why}); free some space and run the same command "
                            "again: it goes on from the last complete file") from None
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


# What libraries that hide the system's error say instead: safetensors and tokenizers (Rust) quote
# it, torch.save says only that its file is not as long as it should be.
FULL = ("No space left on device", "Disk quota exceeded", "File too large", "os error 28",
        "os error 122", "os error 27", "file write failed", "unexpected pos")


def disk_full(error):
    """Why an exception, or one that it followed, says that the disk is full; None if none does."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
        if any(words in str(error) for words in FULL):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


# ---------------------------------------------------------------- files


def write_text(path, text):
    """All or nothing: written beside its place, on the disk, then moved there."""
    beside = f"{path}.{os.getpid()}.tmp"               # ranks may write one file at the same time
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path, content, indent=2):
    """write_text() of JSON. ValueError if a number is not finite: JSON knows no NaN."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


HELD = {}                                          # this process's locks: {file: handle}


def lock_folder(folder, flag="--out", name=".lock"):
    """Make a folder and hold it until the process ends, which may take it again. UserError if
    another process holds it, or if it cannot be written. The kernel frees the lock however the
    process ends. name: of the lock's file, which stays there, empty."""
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
        return None                                # a file system without locks: nothing to hold
    os.set_inheritable(handle, False)
    HELD[file] = handle                            # never closed: held for the process's life
    return handle
