"""Self-distillation between lengths: every image at every length in one packed forward, the longest teaching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels.clips import ClipPacking
from revit_kernels.modules.lengths import Grid
from revit_kernels.packing import Packing


@dataclass(frozen=True)
class Objective:
    """What a ReViT is trained for.

    distillation: how much of a shorter length's loss is the divergence from the longest length's answer; the rest is
                  cross-entropy with the truth. 0: every length learns from the truth alone
    temperature:  of both softmaxes in that divergence
    smoothing:    label smoothing of the cross-entropy

    The loss is the mean over lengths: CE(z_1, y) for the longest, and for each shorter one
    (1 - distillation) CE(z_i, y) + distillation * temperature^2 * KL(softmax(z_1 / t) || softmax(z_i / t)), where z_1
    is detached. The form is the usual one of self-distillation; the weights are ours.
    """

    distillation: float = 0.5
    temperature: float = 1.0
    smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must be between 0 and 1, got {self.distillation}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def __call__(self, logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss, losses).

        logits:  (lengths, images, classes), longest length first
        targets: (images,) classes, or (images, classes) probabilities
        teacher: (images, classes), logits that take the place of z_1 in the divergence

        losses: (lengths,), detached, each length's own
        """
        logits = logits.float() if logits.dtype != torch.float64 else logits
        longest, shorter = logits[0], logits[1:]
        truth = [F.cross_entropy(z, targets, label_smoothing=self.smoothing) for z in logits]
        losses = [truth[0]]
        teacher = F.log_softmax((longest if teacher is None else teacher.to(logits)).detach() / self.temperature, -1)
        for z, own in zip(shorter, truth[1:]):
            if self.distillation:
                student = F.log_softmax(z / self.temperature, -1)
                apart = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2
                own = (1 - self.distillation) * own + self.distillation * apart
            losses.append(own)
        losses = torch.stack(losses)
        return losses.mean(), losses.detach()


@lru_cache(maxsize=32)
def all_lengths(
    menu: tuple[Grid, ...],
    images: int,
    prefix: int,
    device: torch.device,
    per_frame: bool | None = None,
    lengths: tuple[int, ...] | None = None,
) -> Packing:
    """The packing of every image at these rows of the menu, or all: all images at the first of them first. Kept, since
    steps repeat."""
    grids = [menu[i] for i in (range(len(menu)) if lengths is None else lengths) for _ in range(images)]
    with torch.inference_mode(False):  # else what is kept could not be saved for a backward
        if per_frame is None:
            return Packing.from_grids(grids, prefix, menu=menu, device=device)
        return ClipPacking.from_grids(grids, prefix, per_frame=per_frame, menu=menu, device=device)


def packed_logits(
    forward: Callable,
    images: Tensor | list[Tensor],
    menu,
    prefix: int,
    per_frame: bool | None = None,
    lengths: tuple[int, ...] | None = None,
    **options,
) -> Tensor:
    """(lengths, images, classes): the answers at every length of the menu, from one packed forward.

    forward: a VarLenViT, or what wraps it (DistributedDataParallel, torch.compile)
    images:  as VarLenViT takes them; clips, where per_frame says whether each frame has prefix tokens (ClipPacking)
    lengths: rows of the menu to answer at; None: all
    """
    count, rows = len(images), len(menu if lengths is None else lengths)
    device = images.device if isinstance(images, Tensor) else images[0].device
    repeated = images.repeat(rows, *[1] * (images.ndim - 1)) if isinstance(images, Tensor) else list(images) * rows
    packing = all_lengths(menu, count, prefix, device, per_frame, lengths)
    return forward(repeated, packing=packing, **options).unflatten(0, (rows, count))
