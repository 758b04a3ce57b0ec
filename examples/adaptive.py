"""What each budget costs and gives: the ReViT that comes with the package chooses a length for each image.

revit samples samples && python examples/adaptive.py samples/fashion
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from revit_kernels import AdaptiveViT
from revit_kernels.models.registry import SHIPPED, SHIPPED_ASSIGNER

files = sorted(Path(sys.argv[1]).glob("*/*.png"))
images = [Image.open(file).convert("RGB") for file in files]

full = None
for budget in ("1.5x", "2x", "3x"):  # or "80tokens", "90%", "full-0.3", "full"
    adaptive = AdaptiveViT.from_files(SHIPPED, SHIPPED_ASSIGNER, policy="assigner+cascade", budget=budget)
    if full is None:
        full = adaptive.model(images).argmax(-1)
        longest = adaptive.model.num_prefix_tokens + adaptive.menu[0][0] * adaptive.menu[0][1]
    answers = adaptive.predict(images)
    same = (answers.logits.argmax(-1) == full).float().mean()
    share = answers.tokens.float().mean() / longest
    lengths = torch.bincount(answers.choice, minlength=len(adaptive.menu)).tolist()
    mix = ", ".join(f"{n} at {h}x{w}" for (h, w), n in zip(adaptive.menu, lengths))
    print(f"{budget}: {share:.0%} of the tokens, {same:.0%} answered as at full length; {mix}")
