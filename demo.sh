#!/usr/bin/env bash
# The whole pipeline on a machine without a GPU: build houses, record an expert's walks, train a
# tiny Qwen2-VL on them (SFT), record its own walks, improve it on these with GRPO and the
# time-decayed reward, and evaluate both. The end of a run stands in the README.   bash demo.sh
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
LEARN="$CPU --optimizer muon --batch-size 64 --steps-per-walk 4 --val-every 300 --save-every 300"
mkdir -p results

record_times() { echo "{\"stage\": \"$1\", \"began\": $2, \"ended\": $(date +%s)}"; }
stage() {      # name, command...: run it and record its times, unless it is done already
  local name=$1 from; shift
  if grep -qs "\"$name\"" results/minutes.jsonl; then return; fi
  echo; echo "== $name: $*"
  from=$(date +%s)
  "$@"
  record_times "$name" "$from" >> results/minutes.jsonl
}
# name, flags...: evaluate.py. No expert takes more than 60 actions, so a limit of 150 ends only
# walks that wander, and every row of the table has the same limit.
walk() {
  local name=$1; shift
  python evaluate.py --device cpu --sims 24 --max-actions 150 --out "results/$name" "$@"
}
[ -e results/minutes.jsonl ] || record_times setup "$started" > results/minutes.jsonl

# 1. Data: 500 houses to train in, 200 others, and walks in them with instructions.
stage houses python -m world.houses --train-houses 500 --unseen-houses 200 --val-episodes 1200
stage record_val python make_data.py --split val_seen --limit 200

# The first pictures: what the expert does, and what a policy does that has learned nothing.
stage untrained python sft.py --model tiny --data data/vln_ego/val_seen --out ckpt/untrained \
  --max-steps 1 $LEARN
FIRST="--split val_unseen --limit 8 --pictures 4"
stage first_oracle walk first_oracle $FIRST --agent oracle
stage first_untrained walk first_untrained $FIRST --ckpt ckpt/untrained
echo "the first pictures: results/first_oracle/pictures, results/first_untrained/pictures"
stage record python make_data.py --split train --noise 0.1

# 2. SFT, in two stages: first without memory (short prompts, so several times as many decisions
#    per minute), then with the frames that Long-Short Memory keeps. With 2,000 and 800 updates the
#    policy walks much better, and stage two has less to gain (docs/evidence.md).
stage look $TRAIN sft.py --model tiny --out ckpt/look --memory-budget 0 --lr 2e-3 --max-steps 1500 $LEARN
stage sft $TRAIN sft.py --model ckpt/look --out ckpt/sft --memory-budget 4 --memory-recent 4 \
  --lr 1e-3 --max-steps 600 $LEARN

# 3. GRPO where the policy itself walks: its own walks in training houses, with what the expert
#    would do at every pose; then its plans there, compared in groups of eight.
stage own_walks python make_data.py --policy ckpt/sft --limit 1000 --max-actions 60 --sims 24 \
  --device cpu --out data/own
stage grpo $TRAIN grpo.py --init ckpt/sft --data data/own/train --val-data data/vln_ego/val_seen \
  --out ckpt/grpo --lr 3e-4 --gamma 0.5 --scale-rewards none --prompts 6400 --batch-size 64 \
  --val-every 50 --save-every 50 $CPU

# 4. Evaluate. SFT and GRPO walk 1,200 episodes in houses never seen, since 200 cannot show a
#    difference of .03; the other agents walk 200 of them. Two control runs: with black pictures,
#    and with the instruction of another walk.
for agent in stop random forward oracle; do
  stage "walk_$agent" walk "$agent" --split val_unseen --limit 200 --agent "$agent"
done
walk_policy() {
  stage "walk_$1_seen" walk "$1_seen" --split val_seen --limit 200 --ckpt "ckpt/$1"
  stage "walk_$1" walk "$1" --split val_unseen --ckpt "ckpt/$1" --pictures 6 --page 100
}
control() { stage "walk_$1" walk "$1" --split val_unseen --limit 200 --ckpt ckpt/sft "$2"; }
# Two evaluations at a time. If one fails, the other is ended.
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
{ walk_policy sft; control shuffled_instruction --shuffled-instruction; } & other=$!
walk_policy grpo
control blank_frames --blank-frames
wait "$other"

# 5. Two tables, that of the 200 walks with upper bounds for policies that use half of the input; as
#    JSON in results/.
echo
python -m tools.report --summary results/{stop,random,forward,sft_seen,grpo_seen,oracle} \
  results/{blank_frames,shuffled_instruction} --bounds --out results/demo_200.json
echo
python -m tools.report --summary results/{sft,grpo} --out results/demo.json
echo
echo "GRPO against SFT, walk by walk, in houses never trained in:"
python -m tools.report results/sft results/grpo
echo
python -m tools.page results/sft results/grpo --out results/page > results/page.txt
echo "Does every number follow from the episodes? (tools/recompute.py, the standard library only)"
python -m tools.recompute results/sft results/grpo
echo
echo "card         results/grpo/protocol.json          (what was measured, and how others do it)"
echo "page         results/page/index.html             (open it: both policies, step by step)"
echo "pictures     results/grpo/pictures               (its frames and its paths)"
echo "curves       ckpt/grpo/curves.png; tensorboard --logdir ckpt"
echo "rollouts     ckpt/grpo/samples.txt               (a prompt, its eight plans, their rewards)"
echo "checkpoints  ckpt/look ckpt/sft ckpt/grpo"
