#!/usr/bin/env bash
# ReViT-S on CIFAR-10: a pretrained ViT-S/14 made resizable, fine-tuned, labelled, assigned and measured on the 10,000
# test images. An hour and three quarters on one core of a Zen 4 CPU. Training goes on where it was killed.
#   recipes/cifar10.sh [FOLDER]
set -euo pipefail
run=${1:-runs/cifar10}
revit data cifar10
[ -f samples/vit_small_patch14_dinov2.safetensors ] || revit samples samples
revit train vit_small_patch14_dinov2 --checkpoint samples/vit_small_patch14_dinov2.safetensors --data cifar10 \
    --held-out 5000 --menu 7x7,5x5,4x4,3x3 --lengths-per-step 2 --epochs 1 --batch 64 --lr 3e-4 --layer-decay 0.75 \
    --warmup 0.1 --crop pad --flip --bf16 --resume --output "$run/first"
# Two lengths a step are cheap, and leave the shortest behind: a third of an epoch more with all of them.
revit train "$run/first/model.safetensors" --data cifar10 --held-out 5000 --epochs 0.32 --batch 64 --lr 1.5e-4 \
    --layer-decay 0.75 --warmup 0.1 --crop pad --flip --bf16 --resume --output "$run"
revit label "$run/model.safetensors" --data cifar10 --held-out 5000 --probabilities \
    --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" --data cifar10 \
    --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" --data cifar10 \
    --policies random,assigner,cascade,assigner+cascade,scout+cascade,oracle --budgets 2.1x,2.5x,full-0.3 \
    --timed 768 --output "$run/report"
