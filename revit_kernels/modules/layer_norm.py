"""Normalisation of packed tokens, with the residual add and LayerScale before it in the same pass.

Token-length-aware: LengthLayerNorm and LengthRmsNorm hold an affine for each length of a model's menu.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.modules.fp8 import product_dtype
from revit_kernels.modules.lengths import Grid, join, select, whole_table
from revit_kernels.modules.linear import is_plain, traced
from revit_kernels.ops.linear.fp8 import Quantized
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


class _PerLength(nn.Module):
    """An affine per length of a menu: the longest's stands where it always did, the others' in `shorter_*`.

    So a checkpoint without the additional keys is a plain model's, at full length. Tokens of a grid that is not on the
    menu get the affine interpolated between those of its neighbours.
    """

    menu: tuple[Grid, ...]

    @classmethod
    def from_norm(cls, norm: nn.Module, menu: tuple[Grid, ...]) -> nn.Module:
        """The norm with its own affine for every length; shares its parameters, and starts the others from them."""
        new = cls.__new__(cls)
        new.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in norm.__dict__.items()})
        new.menu = menu
        for name in ("weight", "bias"):
            parameter = new._parameters.get(name)
            if parameter is not None:
                # `repeat` would import SymPy on the meta device: longer than all else of loading a model takes
                rows = parameter.new_empty((len(menu) - 1, *parameter.shape)).copy_(parameter.detach())
                new.register_parameter(f"shorter_{name}", nn.Parameter(rows, requires_grad=parameter.requires_grad))
        new._join()
        return new

    def _join(self) -> None:
        for name in ("weight", "bias"):
            longest, shorter = (self._parameters.get(key) for key in (name, f"shorter_{name}"))
            if longest is not None and shorter is not None:
                join(longest, shorter)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._join()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)  # which may have assigned other memory
        self._join()

    def __setstate__(self, state):
        super().__setstate__(state)
        self._join()

    def affine(self, packing: Packing) -> tuple[Tensor | None, Tensor | None]:
        """(lengths of the packing's menu, dim) weight and bias, a row each; (dim,) where that menu has one length."""
        return tuple(
            None
            if getattr(self, name, None) is None
            else select(getattr(self, name), getattr(self, f"shorter_{name}"), self.menu, packing.menu)
            for name in ("weight", "bias")
        )

    def table(self) -> tuple[Tensor | None, Tensor | None]:
        """(lengths of the norm's own menu, dim) weight and bias, a row each."""
        return tuple(
            None
            if getattr(self, name, None) is None
            else whole_table(getattr(self, name), getattr(self, f"shorter_{name}"))
            for name in ("weight", "bias")
        )

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """x: (capacity, ..., dim), (images, ..., dim), or dense. Without a packing the longest length's affine runs."""
        if packing is None:
            return super().forward(x)
        if traced(x):
            return self._by_torch(x, packing)
        return normalise_plain(self, x, packing)[0]

    def _by_torch(self, x: Tensor, packing: Packing) -> Tensor:
        """`forward` of a dense batch, by torch's ops alone."""
        weight, bias = self.affine(packing)
        if isinstance(self, RmsNorm):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LengthLayerNorm(_PerLength, LayerNorm):
    """LayerNorm with an affine per token length (ReViT, arXiv:2112.01686)."""


class LengthRmsNorm(_PerLength, RmsNorm):
    """RmsNorm with an affine per token length."""


PER_LENGTH = {"LayerNorm": LengthLayerNorm, "RmsNorm": LengthRmsNorm}
PLAIN = (*PER_LENGTH, *(cls.__name__ for cls in PER_LENGTH.values()))


def apply_norm(norm: nn.Module, x: Tensor, packing: Packing) -> Tensor:
    """norm(x), with the affine of each token's length where the norm has one per length."""
    return norm(x, packing) if isinstance(norm, _PerLength) else norm(x)


def _rows(x: Tensor, packing: Packing) -> Tensor | None:
    """Which affine each row of x (flattened to its last dimension) uses; None where all use one."""
    if len(packing.menu) == 1:
        return packing.first_row if x.ndim == 2 and x.shape[0] == packing.capacity else None
    row = packing.row if x.shape[0] == packing.capacity else packing.length_index
    inner = x.shape[1:-1].numel()
    return row if inner == 1 else row.repeat_interleave(inner)


def normalise(
    norm: nn.Module,
    x: Tensor,
    packing: Packing,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    pooled: bool = False,
) -> tuple[Tensor, Tensor]:
    """norm(x + gamma * branch), and x + gamma * branch, in one pass where `norm` is a plain LayerNorm or RmsNorm.

    x, branch: (capacity, dim), or (images, length, dim) where all images are of one length; pooled: (images, dim)
    gamma:     (dim,) or None
    """
    if traced(x) or not is_plain(norm, *PLAIN):
        x = add(x, branch, gamma)
        return apply_norm(norm, x, packing), x
    return normalise_plain(norm, x, packing, branch, gamma, pooled)


def normalise_plain(norm, x: Tensor, packing: Packing, branch=None, gamma=None, pooled=False) -> tuple[Tensor, Tensor]:
    """`normalise` for a norm that is known to be plain."""
    dim = x.shape[-1]
    rms = isinstance(norm, RmsNorm) or type(norm).__name__ == "RmsNorm"
    if isinstance(norm, _PerLength):
        weight, bias = norm.affine(packing)
        row = _rows(x, packing) if not pooled else packing.length_index if len(packing.menu) > 1 else None
    else:
        weight, bias = norm.weight, None if rms else norm.bias
        row = None if pooled else packing.first_row
    args = (x.reshape(-1, dim), weight, bias, row)
    branch = None if branch is None else branch.reshape(-1, dim)
    options = {"branch": branch, "gamma": gamma, "eps": norm.eps, "rms": rms}
    if _quantizes(norm):
        values, scale, total = ops.layer_norm_fp8(*args, **options)
        return Quantized(values.view_as(x), scale, product_dtype(x)), total.view_as(x)
    result = ops.layer_norm(*args, **options)
    y, total = (result, x) if branch is None else result
    return y.view_as(x), total.view_as(x)


def quantize_for(norm: nn.Module, *layers: nn.Module) -> None:
    """Let the norm give e4m3, while each of the layers, through which all goes that it gives, is as plain as it is now.

    layers: as they are called one inside the other, ending in an Fp8Linear
    """
    norm.__dict__["quantizes_for"] = [(layer, type(layer).__name__) for layer in layers]  # not as its submodules


def _quantizes(norm: nn.Module) -> bool:
    layers = norm.__dict__.get("quantizes_for")
    return layers is not None and not torch.is_grad_enabled() and all(is_plain(*layer) for layer in layers)


def add(x: Tensor, branch: Tensor | None, gamma: Tensor | None) -> Tensor:
    """x + gamma * branch; gamma and branch may be None."""
    if branch is None:
        return x
    return x + branch if gamma is None else x + gamma * branch
