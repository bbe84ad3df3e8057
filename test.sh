#!/usr/bin/env bash
# Install what is needed and run every test, in two processes: bash test.sh
# Or some of them, in one process: bash test.sh [pytest arguments], as in: bash test.sh -q tests/test_lsm.py
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
# A process takes whole files, so that what a file's tests share is made once.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder tests
exec python -m pytest -q --durations=8 "$@"
