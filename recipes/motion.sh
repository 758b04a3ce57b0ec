#!/usr/bin/env bash
# TimeSformer-S on clips of camera motion: the first six blocks of the pretrained ViT-S/14, inflated, at up to 8 frames
# of 6x6 patches. Meant to take at most an hour on 2 cores; NOT RUN at this length: trials of 150 steps stayed at
# chance (docs/video.md). A length of one frame, from which the motion cannot be told, is on the menu as the control.
# Training goes on where it was killed.
#   recipes/motion.sh [FOLDER] [CLIPS] [EPOCHS]
set -euo pipefail
run=${1:-runs/motion} data="motion#clips=${2:-4000}" epochs=${3:-2}
revit data motion
[ -f samples/vit_small_patch14_dinov2.safetensors ] || revit samples samples --no-fashion
revit train timesformer_small_patch14_224 --checkpoint samples/vit_small_patch14_dinov2.safetensors \
    --model-args depth=6 --data "$data" --held-out 0.15 --menu 8x6x6,4x6x6,4x4x4,2x4x4,1x4x4 --epochs "$epochs" \
    --batch 16 --lr 5e-4 --warmup 0.1 --bf16 --resume --output "$run"
revit label "$run/model.safetensors" --data "$data" --held-out 0.15 --probabilities --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" --data "$data" \
    --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" --data "motion#clips=1000" --timed 128 \
    --budgets 1.5x,2x,full-0.5 --output "$run/report"
