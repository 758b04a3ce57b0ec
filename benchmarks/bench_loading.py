"""Images made ready for a training step, against the step that uses them: is decoding and augmentation the bottleneck?

The rival is the step: a ratio above 1 says how many times faster the images come than they are used, in one process
that does nothing else. On a CPU both share the cores, so loading takes 1 / (1 + ratio) of the time.
"""

import io
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from PIL import Image

from revit_kernels import create_model
from revit_kernels.data.image_set import ArraySet, EncodedSet
from revit_kernels.training.augmentation import augmentation
from revit_kernels.training.loader import Augmented, Order, load
from revit_kernels.training.trainer import Recipe, Trainer

CLASSES = tuple(map(str, range(10)))
SMALL = {"patch_size": 4, "img_size": 28, "embed_dim": 96, "num_heads": 3, "depth": 6}
VIT_S = {"patch_size": 16, "img_size": 224, "embed_dim": 384, "num_heads": 6, "depth": 12}


def in_memory(images: int) -> ArraySet:
    array = np.random.default_rng(0).integers(0, 256, (images, 28, 28), np.uint8)
    return ArraySet("noise", CLASSES, np.arange(images) % 10, array)


def photographs(images: int) -> EncodedSet:
    """JPEG files of 640x480, as smooth as photographs: noise of 40x30 enlarged."""
    rng, files = np.random.default_rng(0), []
    for _ in range(images):
        noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        file = io.BytesIO()
        noise.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return EncodedSet("photographs", CLASSES, np.arange(images) % 10, [str(i) for i in range(images)], files)


CASES = {  # name: images, model, menu, batch, how an image is cropped
    "shipped": (in_memory, SMALL, ((7, 7), (5, 5), (4, 4), (3, 3)), 64, "pad"),
    "photographs": (photographs, VIT_S, ((14, 14), (10, 10), (7, 7)), 8, "resized"),
}


@pytest.mark.parametrize("name", CASES)
def bench_loading(duel, name):
    make, arguments, menu, batch, crop = CASES[name]
    side = arguments["img_size"]
    augmented = Augmented(make(4 * batch), (side, side), augmentation((side, side), crop, flip=True))
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **arguments).make_resizable(menu)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(model.to(device).train(), augmented, Recipe(batch=batch, lr=1e-6, autocast=True))
    batches = cycle(range(10**6))

    def ready():
        epoch = next(batches)
        return next(iter(load(augmented, Order(len(augmented), batch, 0, epoch), workers=0)))

    images, targets = (t.to(device) for t in ready())
    assert images.shape == (batch, side, side, 3) and images.dtype == torch.uint8
    assert len({tuple(image.flatten()[:64].tolist()) for image in islice(images, batch)}) == batch
    duel(ready, lambda: trainer.train_step(images, targets), rounds=9, rival="the step", dtype=torch.bfloat16)
