"""A ReViT so small that it trains in seconds, and images that need different lengths."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from contract import DEVICE

from revit_kernels import create_model
from revit_kernels.data.datasets import ArraySet
from revit_kernels.training.labels import collect
from revit_kernels.training.loader import Augmented
from revit_kernels.training.trainer import Recipe, Trainer

MENU = ((4, 4), (3, 3), (2, 2))
CLASSES = ("flat", "stripes across", "stripes down")


def make_images(count=240, seed=0, name="tiny"):
    """Flat images and stripes of two directions, coarse or so fine that few tokens lose them, under noise."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, count)
    period = rng.choice([4, 8], count)
    at = np.arange(16)
    array = rng.integers(0, 90, (count, 16, 16, 3)).astype(np.int64) + 60
    for i, (target, p) in enumerate(zip(targets, period)):
        wave = 60 * (at // (p // 2) % 2)
        if target:
            array[i] += wave[:, None, None] if target == 1 else wave[None, :, None]
    return ArraySet(name, CLASSES, targets, array.clip(0, 255).astype(np.uint8))


def make_model(**kwargs):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
    return create_model("vit_tiny_patch16_224", **small | kwargs).to(DEVICE).make_resizable(MENU).eval()


@cache
def trained():
    """The model, trained for seconds; do not change it."""
    run = Trainer(make_model(), Augmented(make_images(), (16, 16)), Recipe(epochs=8, batch=16, lr=3e-3))
    run.model.pretrained_cfg = run.model.pretrained_cfg | {"label_names": list(CLASSES)}
    return run.train().eval().requires_grad_(False)


@cache
def labelled():
    """(images, Outcomes with probabilities): the 240 that the model has learnt from, and 200 held out."""
    learnt, apart = make_images(), make_images(200, seed=1, name="held")
    targets, array = (np.concatenate([getattr(s, n) for s in (learnt, apart)]) for n in ("targets", "array"))
    images = ArraySet("held", CLASSES, targets, array)
    outcomes = collect(trained(), images, probabilities=True)
    return images, replace(outcomes, held_out=np.arange(440) >= 240)


@cache
def held_out():
    """(images, Outcomes) of images that the model has not learnt from."""
    images = make_images(200, seed=1, name="held")
    return images, collect(trained(), images)
