#!/usr/bin/env bash
# Fill the GPU table of docs/speed.md on one H100 or H200, in under nine minutes and without network:
#
#     bash bench/gpu.sh                                  -> bench/results_gpu.json, bench/gpu.log
#     bash bench/gpu.sh --device cpu --shape tiny        # a dry run, and a test
#
# It needs torch 2.11 or newer, transformers 5.17 or newer, numpy, pillow and tqdm. DeepSpeed is not
# needed for the table: bench/gpu.py measures the policy with torch's AdamW. Where DeepSpeed can be
# imported, sft.py and grpo.py themselves run a few steps, too, which shows whether what
# --micro-tokens auto chooses fits. On a machine without network carry it as a wheel in .whl/ (made
# elsewhere by: DS_BUILD_OPS=0 pip wheel --no-deps -w .whl deepspeed hjson); they are installed into
# a temporary folder. Where TRL can be imported, bench/grpo_step.py runs as well, against TRL.
# PYTHON names the interpreter; OUT, a folder, takes the two files.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-bench} device=cuda shapes="2B 7B"
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2 ;;
    --shape) shapes=$2 ;;
    *) echo "gpu.sh: $1 is not --device or --shape" >&2; exit 2 ;;
  esac
  shift 2
done
[ "$device" = cuda ] || export DS_ACCELERATOR=cpu
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
work=$(mktemp -d) rows=$out/gpu.rows log=$out/gpu.log failed=0
rm -f "$rows"
trap 'rm -rf "$work"' EXIT
if ls .whl/*.whl > /dev/null 2>&1; then
  "$python" -m pip install -q --no-index --no-deps --target "$work/site" .whl/*.whl &&
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
has() { "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))"; }
# run SECONDS COMMAND..: what takes longer is ended, and the rest goes on
run() {
  echo "== ${*:2}"
  local seconds=$1
  [ "$device" = cuda ] || seconds=$((20 * seconds))             # a CPU has no hurry
  timeout "$seconds" "${@:2}" 2>&1 | grep -v -i 'warn\|it/s\|deprecat'
  [ "${PIPESTATUS[0]}" = 0 ] || { echo "FAILED: ${*:2}"; failed=1; }
}

{
  [ "$device" = cpu ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  for shape in $shapes; do
    run 170 "$python" bench/gpu.py --device "$device" --shape "$shape" --results "$rows"
  done
  shape=${shapes%% *}
  if has deepspeed && [ "$device" = cuda ]; then
    run 60 "$python" bench/gpu.py --device "$device" --shape "$shape" --write "$work/world"
    common="--device $device --val-decisions 1"
    run 70 "$python" sft.py --model "$work/world/policy" --data "$work/world/train" \
      --out "$work/sft" --batch-size 16 --max-steps 3 $common
    run 70 "$python" grpo.py --init "$work/world/policy" --data "$work/world/train" \
      --out "$work/grpo" --batch-size 2 --max-steps 3 $common
    tail -n 1 "$work/sft/log.jsonl" "$work/grpo/log.jsonl"
  else
    echo "no DeepSpeed, or no GPU: sft.py and grpo.py themselves were not run (see the top of gpu.sh)"
  fi
  if has trl && [ "$device" = cuda ]; then
    run 120 "$python" bench/grpo_step.py --device cuda --shape "$shape" --results "$rows"
  fi
  if [ "$device" = cuda ] && [ $SECONDS -lt 380 ]; then
    run 150 "$python" bench/gpu.py --device cuda --shape "$shape" --compile --results "$rows"
  fi
  [ ! -s "$rows" ] || "$python" bench/common.py "$rows" "$out/results_gpu.json"
  exit $failed
} 2>&1 | tee "$log"
