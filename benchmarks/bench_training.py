"""A training step at every length of the menu: one packed forward and backward, against a pass for each length.

The rival is the same model, loss and optimiser, its lengths one after the other as dense batches, each with a backward
of its own; the longest goes first, as the others learn from its answers.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from revit_kernels import create_model
from revit_kernels.data.image_set import ArraySet
from revit_kernels.training.augmentation import augmentation
from revit_kernels.training.distillation import Objective, packed_logits
from revit_kernels.training.loader import Augmented
from revit_kernels.training.optimiser import adamw
from revit_kernels.training.trainer import Recipe, Trainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # name: arguments, menu, side of the images in pixels
    "vit_small_patch14": (
        {"patch_size": 14, "img_size": 98, "embed_dim": 384, "num_heads": 6, "depth": 12},
        ((7, 7), (5, 5), (4, 4), (3, 3)),
        32,
    ),
    "vit_small_patch16": (
        {"patch_size": 16, "img_size": 224, "embed_dim": 384, "num_heads": 6, "depth": 12},
        ((14, 14), (10, 10), (7, 7)),
        224,
    ),
    "shipped": (
        {"patch_size": 4, "img_size": 28, "embed_dim": 96, "num_heads": 3, "depth": 6},
        ((7, 7), (5, 5), (4, 4), (3, 3)),
        28,
    ),
}
IMAGES = [8, 32, 64, 128] if DEVICE == "cpu" else [64, 256]
ROUNDS = 9 if DEVICE == "cpu" else 30


class Case:
    def __init__(self, name, images, autocast):
        kwargs, self.menu, side = CASES[name]
        torch.manual_seed(0)
        model = create_model("vit_tiny_patch16_224", num_classes=10, **kwargs).to(DEVICE).train()
        self.model = model.make_resizable(self.menu)
        self.optimiser = adamw(self.model, 1e-6, 0.05, 1.0)
        self.images = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, device=DEVICE)
        self.targets = torch.arange(images, device=DEVICE) % 10
        self.autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=autocast)
        self.objective = Objective()

    @property
    def flops(self):
        """Of the linears and attention, forward and backward."""
        dim, depth = self.model.embed_dim, len(self.model.blocks)
        tokens = [h * w + 1 for h, w in self.menu]
        image = depth * (24 * dim * dim * sum(tokens) + 4 * dim * sum(n * n for n in tokens))
        return 3 * len(self.images) * image

    def update(self):
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def packed(self):
        with self.autocast:
            logits = packed_logits(self.model, self.images, self.menu, 1, channels_last=True)
            loss, losses = self.objective(logits, self.targets)
        loss.backward()
        self.update()
        return losses

    def separate(self):
        losses, teacher = [], None
        for grid in self.menu:
            with self.autocast:
                logits = self.model(self.images, grids=[grid] * len(self.images), channels_last=True)
                pair = logits[None] if teacher is None else torch.stack([teacher, logits])
                # The objective's mean is over the pair; only the last of it has gradients here.
                loss, own = self.objective(pair, self.targets)
            (loss * len(pair) / len(self.menu)).backward()
            teacher = logits.detach() if teacher is None else teacher
            losses.append(own[-1])
        self.update()
        return torch.stack(losses)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def bench_training(duel, name, dtype, images):
    if DEVICE == "cpu" and name == "vit_small_patch16" and images > 32:
        pytest.skip("activations of more than the machine's memory allows for two models")
    case = Case(name, images, dtype == torch.bfloat16)
    ours, theirs = case.packed(), case.separate()
    torch.testing.assert_close(ours.bfloat16(), theirs.bfloat16())  # an update lies between them
    duel(case.packed, case.separate, rounds=ROUNDS, flops=case.flops, rival="a pass per length", dtype=dtype)


class RecipeCase:
    """A whole step of training a model of the shipped one's size, by our trainer and in plain torch and timm."""

    def __init__(self, batch, autocast, drop_path):
        from plain_revit import PlainReViT

        kwargs, menu, side = CASES["shipped"]
        torch.manual_seed(0)
        model = create_model("vit_tiny_patch16_224", num_classes=10, drop_path_rate=drop_path, **kwargs)
        model = model.to(DEVICE).make_resizable(menu)
        array = np.random.default_rng(0).integers(0, 256, (batch, side, side), np.uint8)
        images = ArraySet("noise", tuple(map(str, range(10))), np.arange(batch) % 10, array)
        self.recipe = Recipe(
            epochs=1000, batch=batch, lr=2e-3, ema=0.999, autocast=autocast, objective=Objective(smoothing=0.05)
        )
        self.plain = PlainReViT(model).to(DEVICE).train()
        augmented = Augmented(images, (side, side), augmentation((side, side), "pad", flip=True))
        self.trainer = Trainer(model.train(), augmented, self.recipe)
        self.images = torch.from_numpy(array)[..., None].expand(-1, -1, -1, 3).contiguous().to(DEVICE)
        self.targets = torch.arange(batch, device=DEVICE) % 10
        decayed = [p for p in self.plain.parameters() if p.ndim > 1 and min(p.shape[:2]) > 1]
        others = [p for p in self.plain.parameters() if p.ndim <= 1 or min(p.shape[:2]) <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=self.trainer.recipe.lr / 1000, fused=True)
        average = get_ema_multi_avg_fn(self.recipe.ema)
        self.average = AveragedModel(self.plain, multi_avg_fn=average, use_buffers=True)

    def ours(self):
        return self.trainer.train_step(self.images, self.targets)

    def theirs(self):
        losses, teacher = [], None
        for row in range(len(self.plain.menu)):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.recipe.autocast):
                logits = self.plain(self.images, row)
                pair = logits[None] if teacher is None else torch.stack([teacher, logits])
                loss, own = self.recipe.objective(pair, self.targets)
            (loss * len(pair) / len(self.plain.menu)).backward()
            teacher = logits.detach() if teacher is None else teacher
            losses.append(own[-1])
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update_parameters(self.plain)
        return torch.stack(losses)

    def gradients(self):
        """The norm of all gradients that one step of each has before it is clipped."""
        norms = []
        for step in (self.ours, self.theirs):
            with patched_norm() as found:
                step()
            norms.append(found[0])
        return norms


@contextmanager
def patched_norm():
    """The results of clip_grad_norm_ inside, in a list."""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def remember(*args, **kwargs):
        found.append(clip(*args, **kwargs))
        return found[-1]

    torch.nn.utils.clip_grad_norm_ = remember
    try:
        yield found
    finally:
        torch.nn.utils.clip_grad_norm_ = clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [64])
def bench_recipe(duel, dtype, images):
    """The whole step: forward and backward at every length, clipping, AdamW, the moving average of the weights."""
    case = RecipeCase(images, dtype == torch.bfloat16, drop_path=0.0)
    norms = case.gradients()  # drop path draws other numbers in each
    torch.testing.assert_close(*[torch.as_tensor(norm).bfloat16() for norm in norms])
    torch.testing.assert_close(case.ours().bfloat16(), case.theirs().bfloat16())
    flops = Case("shipped", images, False).flops
    case = RecipeCase(images, dtype == torch.bfloat16, drop_path=0.05)
    duel(case.ours, case.theirs, rounds=15, flops=flops, rival="plain torch", dtype=dtype)
