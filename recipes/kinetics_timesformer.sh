#!/usr/bin/env bash
# TimeSformer-B, begun from image weights and made resizable on Kinetics-400, on one machine of 8 GPUs. NOT RUN: no such
# machine was available, and nothing here was measured. The frames are its authors': 8 at a stride of 32.
#   recipes/kinetics_timesformer.sh K400_FOLDER IMAGE_WEIGHTS.safetensors
# K400_FOLDER holds train.csv and val.csv as Kinetics gives them (label, youtube_id, time_start, time_end, split), and
# the videos in train/ and val/. IMAGE_WEIGHTS is a ViT-B/16 with timm's keys.
set -euo pipefail
k400=$1 weights=$2 run=runs/kinetics_timesformer
torchrun --standalone --nproc-per-node 8 -m revit_kernels.cli train timesformer_base_patch16_224 \
    --checkpoint "$weights" --data "$k400/train.csv#videos=$k400/train" --held-out 10000 \
    --menu 8x14x14,8x10x10,4x10x10,4x7x7 --stride 32 --size 224 --epochs 15 --batch 8 --lr 1e-4 --layer-decay 0.75 \
    --warmup 0.1 --drop-path 0.1 --smoothing 0.1 --crop resized --flip --bf16 --checkpointing --workers 12 \
    --tensorboard --resume --output "$run"
revit label "$run/model.safetensors" --data "$k400/train.csv#videos=$k400/train" --held-out 10000 --probabilities \
    --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" \
    --data "$k400/train.csv#videos=$k400/train" --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" \
    --data "$k400/val.csv#videos=$k400/val" --split all --output "$run/report"
