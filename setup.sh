# Installs what demo.sh and test.sh need, on Debian or Ubuntu with Python 3.10 or newer. Source it
# in this folder: `. ./setup.sh`. It makes .venv once, and again if that is broken, was made in
# another folder or for another Python. PYTHON=python3.12 picks an interpreter, VENV another folder. On a
# machine with a GPU, install the torch that suits its driver into .venv first.
VENV="${VENV:-.venv}"
(   # A subshell, so that a failure does not end the shell that sources this. `set -e` is off in it.
  unset CDPATH
  base="${PYTHON:-python3}"
  fail() { echo "setup.sh: $*" >&2; exit 1; }
  release() { "$1" --version 2>&1 | sed -E 's/^(Python [0-9]+\.[0-9]+).*/\1/'; }     # "Python 3.12"
  place() { release "$VENV/bin/python"; (cd "$VENV" && pwd -P); }    # console scripts hold the path
  install() {
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check "$@" || fail "pip could not" \
      "install $* (the reason is above). Fix it and run the same command again"
  }
  [ -f requirements.txt ] || fail "no requirements.txt in $PWD: cd to the repository first"

  # 1. Does the existing environment fit?
  fault=
  if ! "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
  then fault="is incomplete or older than Python 3.10"
  elif [ -f "$VENV/place" ] && [ "$(place)" != "$(cat "$VENV/place")" ]
  then fault="was made in another folder or for another Python"
  elif [ -n "${PYTHON:-}" ] && [ "$(release "$base")" != "$(release "$VENV/bin/python")" ]
  then fault="has another Python than $base"
  elif [ -f "$VENV/place" ] && cmp -s requirements.txt "$VENV/ready"
  then exit 0
  fi

  # 2. If not, make one.
  if [ -n "$fault" ]; then
    found="$(release "$base")"
    case "$found" in "Python 3."[1-9][0-9]*) ;; *)
      fail "Python 3.10 or newer is needed, but '$base --version' gives '$found'. Name another" \
        "interpreter, as in: PYTHON=python3.12 bash test.sh, or PYTHON=python3.12 . ./setup.sh" ;;
    esac
    if [ -e "$VENV" ]; then
      [ "$VENV" = .venv ] || [ -f "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] \
        || fail "VENV=$VENV is no virtual environment: name an empty or a new folder"
      echo "setup.sh: $VENV $fault; making a new one" >&2
    fi
    if ! "$base" -c 'import ensurepip' 2>/dev/null; then
      package="python${found#Python }-venv"
      echo "setup.sh: $base cannot make virtual environments; installing $package" >&2
      root="$([ "$(id -u)" = 0 ] || echo sudo)"
      $root apt-get update -qq; $root apt-get install -y -qq "$package" \
        || fail "could not install $package; install Python's venv module by hand"
    fi
    "$base" -m venv --clear "$VENV" || fail "'$base -m venv $VENV' failed (the reason is above)"
  fi

  # 3. The packages. `ready` is written after all of them are installed.
  rm -f "$VENV/ready" && place > "$VENV/place" || fail "cannot write in $VENV"
  # A CPU build of torch where pip's index has one (README: how to name PyTorch's own).
  "$VENV/bin/python" -c 'import torch' 2>/dev/null || install torch==2.13.0
  install -r requirements.txt
  cp requirements.txt "$VENV/ready" || fail "cannot write in $VENV"
) || return 1 2>/dev/null || exit 1
PATH="$(CDPATH='' cd "$VENV/bin" && pwd):$PATH"
# One thread per process: the scripts run one process per core, which is faster than one with two.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
