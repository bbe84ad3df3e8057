#!/usr/bin/env bash
# Fill the GPU table of docs/speed.md on one H100 or H200, in under nine minutes and without network:
#
#     bash bench/gpu.sh                                  -> bench/results_gpu.json, bench/gpu.log
#     bash bench/gpu.sh --compile                        # the 2B compiled -> bench/results_gpu_compiled.json
#     bash bench/gpu.sh --device cpu --shape tiny        # a dry run, and a test
#
# It needs torch 2.11 or newer, transformers 5.17 or newer, numpy, pillow and tqdm. DeepSpeed is not
# needed for the table: bench/gpu.py measures the policy with torch's AdamW. Where DeepSpeed can be
# imported, sft.py and grpo.py themselves run a few steps, too, which shows whether what
# --micro-tokens auto chooses fits. On a machine without network carry it as a wheel in .whl/ (made
# elsewhere by: DS_BUILD_OPS=0 pip wheel --no-deps -w .whl deepspeed hjson pydantic pydantic-core
# annotated-types, with the Python of that machine); they are installed into a temporary folder.
# PYTHON names the interpreter; OUT, a folder, takes the two files.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-bench} device=cuda shapes="2B 7B" compile=
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift ;;
    --shape) shapes=$2; shift ;;
    --compile) compile=1 ;;
    *) echo "gpu.sh: $1 is not --device, --shape or --compile" >&2; exit 2 ;;
  esac
  shift
done
[ "$device" = cuda ] || export DS_ACCELERATOR=cpu
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
work=$(mktemp -d) rows=$out/gpu.rows log=$out/gpu.log failed=0
results=$out/results_gpu${compile:+_compiled}.json
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
  shape=${shapes%% *}
  if [ "$compile" ]; then
    run 510 "$python" bench/gpu.py --device "$device" --shape "$shape" --compile --results "$rows"
    shapes=
  fi
  for one in $shapes; do
    run 170 "$python" bench/gpu.py --device "$device" --shape "$one" --results "$rows"
  done
  # Most of the time of these two is the state that they save at their end: 31 GB of the 2B.
  if [ ! "$compile" ] && [ "$device" = cuda ] && has deepspeed; then
    run 60 "$python" bench/gpu.py --device "$device" --shape "$shape" --write "$work/world"
    common="--device $device --val-decisions 1 --max-steps 4"
    run 110 "$python" sft.py --model "$work/world/policy" --data "$work/world/train" \
      --out "$work/sft" --batch-size 16 $common
    rm -rf "$work/sft/state"
    run 110 "$python" grpo.py --init "$work/world/policy" --data "$work/world/train" \
      --out "$work/grpo" --batch-size 2 $common
    tail -n 4 "$work/sft/log.jsonl" "$work/grpo/log.jsonl"
  elif [ ! "$compile" ]; then
    echo "no DeepSpeed, or no GPU: sft.py and grpo.py themselves were not run (see the top of gpu.sh)"
  fi
  [ ! -s "$rows" ] || "$python" bench/common.py "$rows" "$results"
  exit $failed
} 2>&1 | tee "$log"
