"""A training step at every length of the menu: one packed forward and backward, against a pass for each length.

The rival is the same model, loss and optimiser, its lengths one after the other as dense batches, each with a backward
of its own; the longest goes first, as the others learn from its answers.
"""

import pytest
import torch

from revit_kernels import create_model
from revit_kernels.training.distillation import Objective, packed_logits
from revit_kernels.training.optimiser import adamw

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
