"""Features of every image in an archive, in batches of so many tokens, and which images are similar.

python examples/embed_archive.py photos.tar --model vit_small_patch14_dinov2 --pretrained
"""

import argparse

import numpy as np
import torch

from revit_kernels import create_model
from revit_kernels.data.images import find_images
from revit_kernels.serving.batching import token_batches
from revit_kernels.serving.infer import GridRule, full_length
from revit_kernels.serving.loading import load_all

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("archive", help=".tar, .zip or .parquet; a folder or a list does as well")
parser.add_argument("--model", default="vit_tiny_patch16_224", help="a name or a .safetensors file")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--batch-tokens", type=int, default=8192)
args = parser.parse_args()

model = create_model(args.model, args.pretrained).eval()
engine, prefix = model.engine(), model.num_prefix_tokens
paths = find_images([args.archive], True)[0]
rule = GridRule(model.patch_embed.patch_size, full_length(model))  # each image keeps its own aspect

names, features = [], []
images = (image for image in load_all(paths, rule, workers=2, ahead=64) if image.error is None)
for batch in token_batches(images, args.batch_tokens, lambda image: prefix + image.grid[0] * image.grid[1]):
    with torch.inference_mode():
        tokens = engine.features([i.pixels for i in batch], grids=[i.grid for i in batch], channels_last=True)
        features.append(engine.forward_head(tokens, pre_logits=True).float())
    names += [image.path for image in batch]

x = torch.nn.functional.normalize(torch.cat(features), dim=-1)
np.savez("features.npz", paths=names, features=x.numpy())
print(f"features of {len(names)} images, {x.shape[1]} each, in features.npz")
nearest = (x @ x.T).fill_diagonal_(-1).max(-1)
for i in nearest.values.topk(min(3, len(names))).indices.tolist():
    print(f"{names[i]} is nearest to {names[nearest.indices[i]]}: {nearest.values[i]:.3f}")
