"""Where the class token of the last block looks, drawn over an image.

python examples/attention_maps.py IMAGE [MODEL]
"""

import sys

import numpy as np
import torch
from PIL import Image

from revit_kernels import create_model
from revit_kernels.models.registry import SHIPPED

path, name = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(SHIPPED)
model = create_model(name).eval()
image = Image.open(path).convert("RGB")
rows, columns = model.patch_embed.grid_size

with torch.inference_mode():
    maps = model.attention_maps([image], grids=[(rows, columns)])
weights = maps[-1][0][:, 0, model.num_prefix_tokens :].mean(0)  # of all heads, from the class token to the patches
weights = weights.reshape(rows, columns).float().numpy()
for row in weights:
    print("".join(" .:-=+*#%@"[int(9 * value / weights.max())] for value in row for _ in (0, 1)))

heat = Image.fromarray((255 * weights / weights.max()).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
red = Image.merge("RGB", (heat, Image.new("L", image.size), Image.new("L", image.size)))
Image.blend(image, red, 0.5).save("attention.png")
print("attention.png is written")
