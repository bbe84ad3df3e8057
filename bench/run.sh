#!/usr/bin/env bash
# Every row of the table in docs/speed.md, about ten minutes on two cores:
#
#     bash bench/run.sh                                  -> bench/results_cpu.json
#     bash bench/run.sh --device cuda --shape 2B         -> bench/results_cuda.json
#
# It evaluates ckpt/sft in data/houses, if demo.sh has made them, and else trains a small policy for
# two minutes. The row of rollouts needs ckpt/sft_dialog (docs/activevln.md). The peers
# (bench/requirements.txt) go into bench/.venv, on top of the project's .venv and never into it.
# BENCH_PYTHON and PEER_PYTHON name other interpreters for the two.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${BENCH_PYTHON:-}" ]; then
  . ./setup.sh
  BENCH_PYTHON=$(command -v python)
fi
if [ -z "${PEER_PYTHON:-}" ]; then
  base=$("$BENCH_PYTHON" -c 'import site; print(site.getsitepackages()[0])')
  if ! { echo "$base"; cat bench/requirements.txt; } | cmp -s - bench/.venv/ready; then
    "$BENCH_PYTHON" -m venv --clear bench/.venv
    echo "$base" > "$(bench/.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
    bench/.venv/bin/python -m pip install -q --disable-pip-version-check -r bench/requirements.txt
    { echo "$base"; cat bench/requirements.txt; } > bench/.venv/ready
  fi
  PEER_PYTHON=bench/.venv/bin/python
fi
export BENCH_PYTHON OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
device=cpu
for word in "$@"; do case $word in cuda) device=cuda;; esac; done
[ $device = cuda ] || export DS_ACCELERATOR=cpu
rows=$(mktemp)                                     # written out even if a bench fails
trap '[ ! -s "$rows" ] || "$BENCH_PYTHON" bench/common.py "$rows" bench/results_$device.json' EXIT
bench() { "$@" --results "$rows" 2> >(grep -v -i 'warn\|it/s\|deprecated' >&2); }

ckpt=${CKPT:-ckpt/sft} dialog=${DIALOG:-ckpt/sft_dialog} houses=${HOUSES:-data/houses} world=bench/world
if [ ! -e "$ckpt/nav.json" ] || [ ! -e "$houses/val_unseen" ]; then
  ckpt=$world/sft houses=$world/demo-houses
  if [ ! -e $ckpt/nav.json ]; then
    "$BENCH_PYTHON" -m world.houses --out $houses --train-houses 60 --val-episodes 48 --unseen-houses 6
    "$BENCH_PYTHON" make_data.py --episodes $houses --out $world/demo-ego
    "$BENCH_PYTHON" sft.py --model tiny --data $world/demo-ego/train --out $ckpt --device cpu \
      --steps-per-walk 4 --memory-budget 4 --memory-recent 4 --lr 2e-3 --beta2 0.99 --max-steps 500
  fi
fi

bench "$PEER_PYTHON" bench/grpo_step.py "$@"
bench "$PEER_PYTHON" bench/sft_step.py --steps-per-walk 8 "$@"
bench "$PEER_PYTHON" bench/sft_step.py --steps-per-walk 1 "$@"
bench "$PEER_PYTHON" bench/scenes.py "$@"
bench "$BENCH_PYTHON" bench/evaluation.py --ckpt "$ckpt" --episodes "$houses" "$@"
bench "$BENCH_PYTHON" bench/passes.py "$@"
bench "$BENCH_PYTHON" bench/passes.py --ckpt "$ckpt" "$@"
bench "$BENCH_PYTHON" bench/recording.py --episodes "$houses" "$@"
bench "$BENCH_PYTHON" bench/simulators.py "$@"
if [ -e "$dialog/nav.json" ]; then
  bench "$BENCH_PYTHON" bench/rollouts.py --ckpt "$dialog" --episodes "$houses" --device $device
fi
bench "$BENCH_PYTHON" bench/utilisation.py "$@"
