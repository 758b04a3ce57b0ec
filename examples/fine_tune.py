"""Fine-tune a model on a folder with a folder for each class, each image at its own size and shape.

python examples/fine_tune.py FOLDER
"""

import argparse
import random
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from revit_kernels import create_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="begin with timm's weights")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch", type=int, default=32)
args = parser.parse_args()

torch.manual_seed(0)
random.seed(0)
classes = sorted(path.name for path in args.folder.iterdir() if path.is_dir())
files = [(path, classes.index(path.parent.name)) for path in sorted(args.folder.glob("*/*"))]
random.shuffle(files)
held_out, files = files[: len(files) // 5], files[len(files) // 5 :]
options = {} if args.pretrained else {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4}
model = create_model(args.model, args.pretrained, num_classes=len(classes), **options)
steps = args.epochs * -(-len(files) // args.batch)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4 if args.pretrained else 2e-3, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, optimiser.defaults["lr"], total_steps=steps)


def load(some):
    """Images as they are: no resizing, no padding, one packed batch."""
    images = [Image.open(path).convert("RGB") for path, _ in some]
    return images, torch.tensor([label for _, label in some])


for epoch in range(args.epochs):
    model.train()
    random.shuffle(files)
    for start in range(0, len(files), args.batch):
        images, labels = load(files[start : start + args.batch])
        loss = cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        images, labels = load(held_out)
        right = (model(images).argmax(-1) == labels).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, right on {right:.1%} of {len(held_out)} images held out")
