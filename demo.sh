#!/usr/bin/env bash
# The whole pipeline on a machine without a GPU: build houses, record an expert's walks, train a
# tiny Qwen2-VL on them (SFT), improve it with GRPO and the time-decayed reward, and evaluate both. It
# takes less than half an hour on two cores.   bash demo.sh
#
# These are the same scripts as for a full run; only the flags below make it small. After an
# interruption the same command continues; `rm -r data ckpt results` starts again.
set -euo pipefail
cd "$(dirname "$0")"
started=$(date +%s)
. ./setup.sh
export DS_ACCELERATOR=cpu

# One process per core beats one process with two threads. (nproc would obey OMP_NUM_THREADS.)
RANKS=$(( $(getconf _NPROCESSORS_ONLN) < 2 ? 1 : 2 ))
TRAIN="python -m deepspeed.launcher.runner --log_level error --num_gpus $RANKS --master_port 29511"
CPU="--device cpu --dtype float32 --beta2 0.99"
LEARN="$CPU --batch-size 64 --steps-per-walk 4 --val-every 1000 --save-every 1000"
mkdir -p results

minutes() { echo "{\"stage\": \"$1\", \"minutes\": $(awk "BEGIN {print ($(date +%s) - $2) / 60}")}"; }
stage() {      # name, command...: run it and record its minutes, unless it is done already
  local name=$1 from; shift
  if grep -qs "\"$name\"" results/minutes.jsonl; then return; fi
  echo; echo "== $name: $*"
  from=$(date +%s)
  "$@"
  minutes "$name" "$from" >> results/minutes.jsonl
}
# name, flags...: evaluate.py on $SPLITS. No expert takes more than 60 actions, so a limit of 150
# ends only walks that wander, and every row of the table has the same limit.
walk() {
  local name=$1 split; shift
  for split in $SPLITS; do
    python evaluate.py --split "$split" --device cpu --sims 8 --max-actions 150 \
      --out "results/${name}_$split" "$@"
  done
}
SPLITS="val_seen val_unseen"
[ -e results/minutes.jsonl ] || minutes setup "$started" > results/minutes.jsonl

# 1. Data: 500 houses to train in, 50 others, and walks in them with instructions.
stage houses python -m world.houses --train-houses 500 --val-episodes 200
stage record python make_data.py --split train --noise 0.1
stage record_val python make_data.py --split val_seen

# 2. SFT, in two stages: first without memory (short prompts, so several times as many decisions
#    per minute), then with the frames that Long-Short Memory keeps.
stage look $TRAIN sft.py --model tiny --out ckpt/look --memory-budget 0 --lr 2e-3 --max-steps 4500 $LEARN
stage sft $TRAIN sft.py --model ckpt/look --out ckpt/sft --memory-budget 4 --memory-recent 4 \
  --lr 1e-3 --max-steps 2000 $LEARN

# 3. GRPO: the policy's own plans, compared in groups of eight. Four epochs of the same 1,600
#    prompts, so that the sampled reward can be compared from epoch to epoch.
stage grpo $TRAIN grpo.py --init ckpt/sft --out ckpt/grpo --lr 3e-5 --gamma 0.5 \
  --scale-rewards none --prompts 1600 --epochs 4 --batch-size 64 --val-every 25 --save-every 25 $CPU

# 4. Evaluate every agent: 200 episodes in training houses, 200 in houses never seen.
#    Two control runs: with black pictures, and with the instruction of another walk.
for agent in stop random forward oracle; do
  stage "walk_$agent" walk "$agent" --agent "$agent"
done
stage walk_sft walk sft --ckpt ckpt/sft
stage walk_grpo walk grpo --ckpt ckpt/grpo --pictures 6
SPLITS="val_unseen"
stage walk_blank_frames walk blank_frames --ckpt ckpt/sft --blank-frames
stage walk_shuffled_instruction walk shuffled_instruction --ckpt ckpt/sft --shuffled-instruction

# 5. One table, with upper bounds for policies that use half of the input; as JSON in
#    results/demo.json.
echo
rows=()
for agent in stop random forward sft grpo oracle; do
  rows+=("results/${agent}_val_seen" "results/${agent}_val_unseen")
done
python -m tools.report --summary "${rows[@]}" results/blank_frames_val_unseen \
  results/shuffled_instruction_val_unseen --bounds --out results/demo.json
echo
echo "GRPO against SFT, walk by walk, in houses never trained in:"
python -m tools.report results/sft_val_unseen results/grpo_val_unseen
echo
echo "pictures     results/grpo_val_unseen/pictures    (its frames and its paths)"
echo "curves       ckpt/grpo/curves.png; tensorboard --logdir ckpt"
echo "rollouts     ckpt/grpo/samples.txt               (a prompt, its eight plans, their rewards)"
echo "checkpoints  ckpt/look ckpt/sft ckpt/grpo"
