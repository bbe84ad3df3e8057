#!/usr/bin/env bash
# Install what is needed and run every test: bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
exec python -m pytest -q --durations=8 "${@:-tests}"
