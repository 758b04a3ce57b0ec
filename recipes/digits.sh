#!/usr/bin/env bash
# The whole chain on scikit-learn's digits: train, label, assign, infer, report. Two minutes on 2 cores; CI runs it.
#   recipes/digits.sh [FOLDER] [NAME of a model, such as vit_small_patch16_dinov3] [EPOCHS]
set -euo pipefail
run=${1:-runs/digits} model=${2:-vit_tiny_patch16_224} epochs=${3:-40}
revit data digits
revit train "$model" --model-args img_size=8,patch_size=2,embed_dim=64,depth=3,num_heads=2 --data digits \
    --held-out 300 --menu 4x4,3x3,2x2 --epochs "$epochs" --batch 32 --lr 2e-3 --warmup 0.1 --resume --output "$run"
revit label "$run/model.safetensors" --data digits --held-out 300 --probabilities \
    --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" --data digits --batch 64 --epochs 30 \
    --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" --data digits \
    --budgets 1.5x,2x,full-0.5 --output "$run/report"
