"""Normalisation of packed tokens, with the residual add and LayerScale before it in the same pass."""

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.modules.linear import is_plain
from revit_kernels.packing import Packing


class LayerNorm(nn.LayerNorm):
    """LayerNorm with timm's default eps of 1e-6."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True, device=None, dtype=None):
        super().__init__(dim, eps=eps, elementwise_affine=affine, device=device, dtype=dtype)


class RmsNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True, device=None, dtype=None):
        super().__init__()
        self.normalized_shape = (dim,)
        self.eps = eps
        self.elementwise_affine = affine
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype)) if affine else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (y if self.weight is None else y * self.weight).to(x.dtype)


def normalise(
    norm: nn.Module, x: Tensor, packing: Packing, branch: Tensor | None = None, gamma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm(x + gamma * branch), and x + gamma * branch, in one pass where `norm` is a plain LayerNorm or RmsNorm.

    x, branch: (capacity, dim), or (images, length, dim) where all images are of one length
    gamma:     (dim,) or None
    """
    if not is_plain(norm, "LayerNorm", "RmsNorm"):
        x = add(x, branch, gamma)
        return norm(x), x
    dim = x.shape[-1]
    rms = type(norm).__name__ == "RmsNorm"
    result = ops.layer_norm(
        x.reshape(-1, dim),
        norm.weight,
        None if rms else norm.bias,
        packing.first_row,
        branch=None if branch is None else branch.reshape(-1, dim),
        gamma=gamma,
        eps=norm.eps,
        rms=rms,
    )
    y, total = (result, x) if branch is None else result
    return y.view_as(x), total.view_as(x)


def add(x: Tensor, branch: Tensor | None, gamma: Tensor | None) -> Tensor:
    """x + gamma * branch; gamma and branch may be None."""
    if branch is None:
        return x
    return x + branch if gamma is None else x + gamma * branch
