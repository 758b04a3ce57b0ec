"""Augmentation by torchvision's transforms, on uint8: the model normalises inside its patch embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CROPS = ("none", "pad", "resized")


def _transforms():
    try:
        from torchvision.transforms import v2
    except Exception as error:  # a torchvision of another torch fails in many ways
        raise ValueError(
            f"augmentation needs a torchvision that fits this torch (pip install torchvision): {error}"
        ) from None
    return v2


def augmentation(
    size: tuple[int, int],
    crop: str = "none",
    flip: bool = False,
    rand: tuple[int, int] | None = None,
    erase: float = 0.0,
    interpolation: str = "bicubic",
) -> Callable[[Tensor], Tensor] | None:
    """What happens to one training image (3, height, width), or clip (frames, 3, height, width), of uint8.

    None for nothing. All frames of a clip are changed in the same way.

    size: (height, width) that every image of a batch has in the end
    crop: "pad": the image shifted by up to an eighth of its size, its edges reflected; "resized": a random part of it
          at a random aspect, resized; "none"
    rand: RandAugment's number of operations and their magnitude
    erase: probability of a random rectangle being erased
    interpolation: of "resized"

    Draws from torch's global generator alone. Raises ValueError without torchvision.
    """
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {CROPS}, got {crop!r}")
    steps = []
    if crop == "none" and not flip and rand is None and not erase:
        return None
    v2 = _transforms()
    if crop == "pad":
        steps.append(v2.RandomCrop(size, padding=[size[1] // 8, size[0] // 8], padding_mode="reflect"))
    elif crop == "resized":
        steps.append(
            v2.RandomResizedCrop(
                size, scale=(0.3, 1.0), interpolation=v2.InterpolationMode(interpolation), antialias=True
            )
        )
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if rand is not None:
        steps.append(v2.RandAugment(*rand))
    if erase:
        steps.append(v2.RandomErasing(erase))
    return v2.Compose(steps)


def mixing(classes: int, mixup: float, cutmix: float) -> Callable | None:
    """(images, targets) -> mixed images and targets (images, classes), by mixup, CutMix, or either at random."""
    if not mixup and not cutmix:
        return None
    v2 = _transforms()
    ways = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    ways += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    way = v2.RandomChoice(ways) if len(ways) > 1 else ways[0]

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """images: (images, height, width, channels) uint8, or clips with frames behind the first dimension"""
        mixed, soft = way(images.movedim(-1, -3).float(), targets)
        mixed = mixed.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()
        return mixed, soft

    return mix
