#!/usr/bin/env bash
# A small ViT of tubelets on clips of camera motion, from nothing: 8 frames of 28 pixels, a token for 4 frames of 4x4
# pixels. Patches of 14 pixels of the pretrained ViT-S/14, inflated, did not learn which way the picture moves in trials
# of minutes (docs/video.md). Labels are of clips that it was not trained on. The second report is the control: one frame
# of each clip, repeated. Seven minutes on one core of a Zen 4 CPU. Training goes on where it was killed.
#   recipes/motion.sh [FOLDER] [CLIPS]
set -euo pipefail
run=${1:-runs/motion} clips=${2:-36000}
revit data motion
revit train videomae_small_patch16_224 --model-args img_size=28,patch_size=4,embed_dim=96,depth=3,num_heads=3,\
num_frames=8,tubelet_size=4,pos_embed=learn --data "motion#clips=$clips" --held-out 2000 \
    --menu 2x7x7,2x5x5,2x4x4,1x4x4 --epochs 1 --batch 32 --lr 1e-3 --warmup 0.1 --bf16 --resume --output "$run"
fresh="motion#first=$clips,clips=6000"
revit label "$run/model.safetensors" --data "$fresh" --held-out 2000 --probabilities --output "$run/labels.parquet"
revit train-assigner "$run/model.safetensors" --labels "$run/labels.parquet" --data "$fresh" \
    --output "$run/assigner.safetensors"
revit evaluate "$run/model.safetensors" --assigner "$run/assigner.safetensors" --data "motion#clips=4000" --timed 2048 \
    --budgets 1.8x,2.2x,full-0.5 --output "$run/report"
revit evaluate "$run/model.safetensors" --labels "$run/labels.parquet" --data "motion#clips=4000" --frames 1 \
    --timed 256 --policies random --budgets 2x --output "$run/one_frame"
