#!/usr/bin/env bash
# Install what is needed and run tests.
#
#   bash test.sh                          every test, in two processes
#   bash test.sh -q tests/test_lsm.py     what pytest is asked for, in one
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
# A process takes whole files, so that what the tests of a file share is made once.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder tests
exec python -m pytest -q --durations=8 "$@"
