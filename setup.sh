# What demo.sh and test.sh need, on a bare Debian or Ubuntu with python3. Sourced, not run.
# It makes .venv beside this file once; PYTHON=python3.12 picks another interpreter, VENV another
# folder. On a machine with a GPU, install the torch that suits its driver into .venv first.
VENV="${VENV:-.venv}"
if [ ! -f "$VENV/ready" ] || ! cmp -s requirements.txt "$VENV/ready"; then
  if ! "${PYTHON:-python3}" -c 'import ensurepip' 2>/dev/null; then
    echo "python3 has no venv here: installing python3-venv" >&2
    $([ "$(id -u)" = 0 ] || echo sudo) apt-get update -qq
    $([ "$(id -u)" = 0 ] || echo sudo) apt-get install -y -qq python3-venv
  fi
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  # A CPU build of torch where pip's index has one (README: how to name PyTorch's own).
  "$VENV/bin/python" -c 'import torch' 2>/dev/null \
    || "$VENV/bin/pip" install -q --disable-pip-version-check torch==2.13.0
  "$VENV/bin/pip" install -q --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$VENV/ready"
fi
PATH="$(cd "$VENV/bin" && pwd):$PATH"
# One thread per process: the scripts run one process per core, which is faster than one with two.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
