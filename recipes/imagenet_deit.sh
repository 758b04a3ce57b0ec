#!/usr/bin/env bash
# DeiT-S and DeiT-B made resizable on ImageNet-1k, on one machine of 8 GPUs. NOT RUN: the commands are those of the
# smaller recipes, the numbers those that DeiT is fine-tuned with; nothing here was measured.
#   recipes/imagenet_deit.sh IMAGENET_FOLDER [small|base]
set -euo pipefail
images=$1 size=${2:-small} run=runs/imagenet_deit_${2:-small}
torchrun --standalone --nproc-per-node 8 -m revit_kernels.cli train "deit_${size}_patch16_224" --pretrained \
    --data "$images" --held-out 50000 --menu 14x14,10x10,7x7 --size 224 \
    --epochs 30 --batch 128 --lr 5e-4 --layer-decay 0.75 --warmup 0.1 --drop-path 0.1 --smoothing 0.1 \
    --crop resized --flip --rand 2,9 --mixup 0.8 --cutmix 1.0 --ema 0.9998 --bf16 --workers 12 \
    --tensorboard --resume --output "$run"
revit label "$run/model.safetensors" --data "$images" --held-out 50000 --probabilities \
    --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" --data "$images" \
    --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" --data "$images" --split val \
    --output "$run/report"
