#!/usr/bin/env bash
# ReViT-S on 1,997 phone photographs of groceries: the pretrained ViT-S/14 at up to 16x16 patches, fine-tuned on 540.
# Twenty minutes on 2 cores of a Zen 4 CPU; on one without bf16 leave out --bf16: 35 minutes, the report's run.
# Training goes on where it was killed.
#   recipes/groceries.sh [FOLDER]
set -euo pipefail
run=${1:-runs/groceries}
revit data groceries
[ -f samples/vit_small_patch14_dinov2.safetensors ] || revit samples samples
revit train vit_small_patch14_dinov2 --checkpoint samples/vit_small_patch14_dinov2.safetensors --data groceries \
    --held-out 0.2 --menu 16x16,10x10,7x7,4x4 --epochs 3 --batch 16 --lr 3e-4 --layer-decay 0.75 --warmup 0.1 \
    --crop resized --flip --bf16 --resume --output "$run"
revit label "$run/model.safetensors" --data groceries --held-out 0.2 --probabilities \
    --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" --data groceries \
    --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" --data groceries --timed 128 \
    --budgets 2x,full-0.2 --output "$run/report"
