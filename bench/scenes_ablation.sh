#!/usr/bin/env bash
# The ablation of GPT4Scene's paper in small (docs/gpt4scene.md): what marks, the bird's-eye view and
# frames are worth. The questions are the same in every row; one seed; what is done is skipped.
#     bash bench/scenes_ablation.sh [ROW ..]     default: all rows
set -euo pipefail
cd "$(dirname "$0")/.."
declare -A ROWS=(
  [view]="--frames 0"  [view_no_marks]="--frames 0 --no-marks"
  [frames_2]="--frames 2"  [frames_4]="--frames 4"  [frames_8]="--frames 8"
  [frames_4_no_view]="--frames 4 --no-bev")
TRAIN="python sft.py --prompt chat --device cpu --lr 2e-3 --beta2 0.99"

for row in ${@:-view view_no_marks frames_2 frames_4 frames_8 frames_4_no_view}; do
  data=data/ablation/$row ckpt=ckpt/ablation/$row out=results/ablation/$row
  [ -e "$data/meta.json" ] || python -m gpt4scene.scenes --out "$data" --train-scenes 2000 \
    --rooms 1 --bev-pixels 112 ${ROWS[$row]} > /dev/null
  [ -e "$ckpt/curriculum/nav.json" ] || $TRAIN --model tiny --data "$data"/{dense_train,train}.json \
    --shares 30 1 --val-data "$data/dense_val.json" --out "$ckpt/curriculum" --steps-per-walk 2 \
    --batch-size 40 --schedule constant --max-steps 500
  [ -e "$ckpt/scenes/nav.json" ] || $TRAIN --model "$ckpt/curriculum" --data "$data/train.json" \
    --out "$ckpt/scenes" --steps-per-walk 6 --batch-size 96 --max-steps 1000
  python -m gpt4scene.answer "$data" --ckpt "$ckpt/scenes" --device cpu --out "$out"
  echo "$row: ${ROWS[$row]}"
  python -m gpt4scene.scores "$out" "$data" | grep -E "^  (EM|CIDEr@0.5|Acc@0.5|F1@0.5)  "
done
