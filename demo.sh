#!/usr/bin/env bash
# The whole story on a bare machine, without a GPU: houses are built, an expert's walks recorded, a
# tiny Qwen2-VL learns from them (SFT), walks, is improved by GRPO with the time-decayed reward, and
# walks again. Under half an hour on two cores.   bash demo.sh
#
# The scripts are the real ones and know nothing of a demo: what makes it small is the flags below.
# Run it again after an interruption and it goes on where it was; `rm -r data ckpt results` restarts.
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
stage() {      # name, command...: say it, run it, remember how long it took; skip what is done
  local name=$1 from; shift
  if grep -qs "\"$name\"" results/minutes.jsonl; then return; fi
  echo; echo "== $name: $*"
  from=$(date +%s)
  "$@"
  minutes "$name" "$from" >> results/minutes.jsonl
}
walk() {       # name, flags...: evaluate.py on $SPLITS. No expert takes more than 60 actions, so 150
  local name=$1 split; shift       # cuts off only those who wander, and every row has the same cap.
  for split in $SPLITS; do
    python evaluate.py --split "$split" --device cpu --sims 8 --max-actions 150 \
      --out "results/${name}_$split" "$@"
  done
}
SPLITS="val_seen val_unseen"
[ -e results/minutes.jsonl ] || minutes setup "$started" > results/minutes.jsonl

# 1. A world: 500 houses to learn in, 50 others, and walks in them with what somebody would say.
stage houses python -m world.houses --train-houses 500 --val-episodes 200
stage record python make_data.py --split train --noise 0.1
stage record_val python make_data.py --split val_seen

# 2. Imitation, in two courses through the same script: first to look (no memory: short prompts, so
#    several times as many decisions a minute), then with the frames that Long-Short Memory keeps.
stage look $TRAIN sft.py --model tiny --out ckpt/look --memory-budget 0 --lr 2e-3 --max-steps 4500 $LEARN
stage sft $TRAIN sft.py --model ckpt/look --out ckpt/sft --memory-budget 4 --memory-recent 4 \
  --lr 1e-3 --max-steps 2000 $LEARN

# 3. Reinforcement: the policy's own plans, compared in groups of eight. The same 1,600 prompts four
#    times over, so that the sampled reward of one pass can be held against that of the next.
stage grpo $TRAIN grpo.py --init ckpt/sft --out ckpt/grpo --lr 3e-5 --gamma 0.5 \
  --no-divide-by-spread --prompts 1600 --epochs 4 --batch-size 64 --val-every 25 --save-every 25 $CPU

# 4. Everybody walks: 200 episodes in houses that were trained in, 200 in houses that were not.
#    Two control runs: with black pictures, and with the instruction of another walk.
for agent in stop random forward oracle; do
  stage "walk_$agent" walk "$agent" --agent "$agent"
done
stage walk_sft walk sft --ckpt ckpt/sft
stage walk_grpo walk grpo --ckpt ckpt/grpo --pictures 6
SPLITS="val_unseen"
stage walk_blank_frames walk blank_frames --ckpt ckpt/sft --blank-frames
stage walk_shuffled_instruction walk shuffled_instruction --ckpt ckpt/sft --shuffled-instruction

# 5. What happened, in one table, with what half of the input could reach, and the same numbers for
#    machines in results/demo.json.
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
echo "pictures     results/grpo_val_unseen/pictures    (what it saw, where it went)"
echo "curves       ckpt/grpo/curves.png; tensorboard --logdir ckpt"
echo "rollouts     ckpt/grpo/samples.txt               (a prompt, its eight plans, their rewards)"
echo "checkpoints  ckpt/look ckpt/sft ckpt/grpo"
