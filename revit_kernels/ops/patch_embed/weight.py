"""FlexiViT (arXiv:2212.08013, section 3.4): a patch embedding's weight resized to another patch size."""

import numpy as np
import torch
from torch import Tensor

from revit_kernels.device_cache import constant
from revit_kernels.ops.pos_embed.interpolation import MODES, matrix

MOST = 1 << 14  # rows or columns of a patch


def resize_patch_weight(
    weight: Tensor, size: tuple[int, int], *, interpolation: str = "bicubic", antialias: bool = True
) -> Tensor:
    """Resize by the pseudo-inverse: patches resized to `size` give with it what they gave, where nothing was lost.

    weight: (dim, channels, patch_h, patch_w)
    size:   (patch_h, patch_w) wanted

    Returns (dim, channels, *size) in the dtype of the weight, computed in fp32 (fp64 for fp64): timm's
    `resample_patch_embed`. Differentiable. Raises ValueError for a weight or size that is none.
    """
    if weight.ndim != 4 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(
            f"weight must be (dim, channels, patch_h, patch_w) and floating-point, got {tuple(weight.shape)} "
            f"{weight.dtype}"
        )
    for name, patch in (("size", size), ("the patch of weight", weight.shape[2:])):
        if len(patch) != 2 or min(patch) < 1 or max(patch) > MOST:
            raise ValueError(f"{name} must be (patch_h, patch_w), each from 1 to {MOST}, got {tuple(patch)}")
    if interpolation not in MODES:
        raise ValueError(f"interpolation must be one of {MODES}, got {interpolation!r}")
    if tuple(size) == tuple(weight.shape[2:]):
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    # The inverse of a Kronecker product is that of its factors, so that the two axes are resized one by one.
    down, across = (
        _inverse(old, new, interpolation, antialias, wide, weight.device) for old, new in zip(weight.shape[2:], size)
    )
    return torch.einsum("dcyx,yh,xw->dchw", weight.to(wide), down, across).to(weight.dtype)


def _inverse(old: int, new: int, interpolation: str, antialias: bool, dtype, device) -> Tensor:
    """(old, new)"""

    def make() -> Tensor:
        return torch.tensor(np.linalg.pinv(matrix(old, new, interpolation, antialias)), dtype=dtype)

    return constant(("patch weight", old, new, interpolation, antialias, dtype), device, make)
