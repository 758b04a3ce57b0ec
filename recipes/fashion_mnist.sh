#!/usr/bin/env bash
# The model that the package ships: a small ReViT on Fashion-MNIST, from scratch, with its assigner and report. An hour
# and a half on one core of a Zen 4 CPU. Training goes on where it was killed.
#   recipes/fashion_mnist.sh [FOLDER]
set -euo pipefail
run=${1:-runs/fashion_mnist}
revit data fashion-mnist
revit train vit_tiny_patch16_224 --model-args img_size=28,patch_size=4,embed_dim=96,depth=6,num_heads=3 \
    --data fashion-mnist --held-out 5000 --menu 7x7,5x5,4x4,3x3 --embedding per_length --lengths-per-step 2 \
    --optimiser muon --epochs 22 --batch 64 --lr 2e-3 --warmup 0.05 --weight-decay 0.05 --drop-path 0.05 \
    --smoothing 0.05 --crop pad --flip --ema 0.999 --bf16 --resume --output "$run"
# Half the size: the weights are kept in bfloat16, and read into a float32 model.
python - "$run" <<'END'
import sys
from safetensors import safe_open
from safetensors.torch import save_file

with safe_open(f"{sys.argv[1]}/model.safetensors", "pt") as file:
    weights = {key: file.get_tensor(key).bfloat16() for key in file.keys()}
    save_file(weights, f"{sys.argv[1]}/shipped.safetensors", file.metadata())
END
revit label "$run/shipped.safetensors" --data fashion-mnist --held-out 5000 --probabilities \
    --output "$run/labels.parquet"
revit train-assigner "$run/shipped.safetensors" --labels "$run/labels.parquet" --data fashion-mnist --resume \
    --output "$run/assigner.safetensors"
revit evaluate "$run/shipped.safetensors" --assigner "$run/assigner.safetensors" --data fashion-mnist \
    --policies random,assigner,cascade,assigner+cascade,scout+cascade,oracle --budgets 1.5x,2x,2.5x,3x,full \
    --timed 2000 --output "$run/report"
