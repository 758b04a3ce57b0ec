#!/usr/bin/env bash
# ReViT-S on CIFAR-10: a pretrained ViT-S/14 made resizable, fine-tuned, labelled, assigned and measured on the 10,000
# test images. Two and a quarter hours on 2 cores of a Zen 4 CPU. Training goes on where it was killed.
#   recipes/cifar10.sh [FOLDER]
set -euo pipefail
run=${1:-runs/cifar10}
revit data cifar10
[ -f samples/vit_small_patch14_dinov2.safetensors ] || revit samples samples
revit train vit_small_patch14_dinov2 --checkpoint samples/vit_small_patch14_dinov2.safetensors --data cifar10 \
    --held-out 5000 --menu 7x7,5x5,3x3 --epochs 3 --batch 64 --lr 3e-4 --layer-decay 0.75 \
    --warmup 0.1 --crop pad --flip --bf16 --resume --output "$run"
revit label "$run/model.safetensors" --data cifar10 --held-out 5000 --probabilities \
    --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" --data cifar10 \
    --convolutions 5 --crop pad --flip --epochs 36 --resume --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" --data cifar10 \
    --policies random,assigner,cascade,assigner+cascade,scout+cascade,oracle \
    --budgets 2x,2.2x,2.4x,full-0.3 --timed 768 --output "$run/report"
