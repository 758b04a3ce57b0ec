"""A whole pre-norm Transformer block on packed tokens, at inference."""

from typing import NamedTuple

import torch
from torch import Tensor

from revit_kernels.dispatch import one_device, register

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
KINDS = (None, "int8")


class BlockWeights(NamedTuple):
    """A block's parameters.

    norm1, norm2:             (dim,), or (lengths, dim) for an affine per token length; so are their biases
    qkv:                      (3 * heads * head_dim, dim); proj: (dim, heads * head_dim)
    fc1:                      (hidden, dim); fc2: (dim, hidden)
    gamma1, gamma2:           (dim,) LayerScale of the two branches, or None
    biases:                   one number per output, or None
    """

    norm1: Tensor
    norm1_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    gamma1: Tensor | None
    norm2: Tensor
    norm2_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor | None
    fc2: Tensor
    fc2_bias: Tensor | None
    gamma2: Tensor | None


_OPTIONAL = ("qkv_bias", "proj_bias", "gamma1", "fc1_bias", "fc2_bias", "gamma2")
_WEIGHTS = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in BlockWeights._fields)

_forward = register(
    "block",
    "forward",
    f"(Tensor x, Tensor cu_seqlens, Tensor? row, {_WEIGHTS}, int heads, float eps1, float eps2, float scale, "
    "str activation, str? kind, str? backend) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)


def _check(x, cu_seqlens, w, heads, row, activation, kind):
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (tokens, dim) of a floating-point dtype, got {tuple(x.shape)} {x.dtype}")
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0] or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (images + 1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if row is not None and (row.shape != x.shape[:1] or row.dtype != torch.int32):
        raise ValueError(f"row must be ({x.shape[0]},) int32, got {tuple(row.shape)} {row.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    dim, width, hidden = x.shape[1], w.proj.shape[1], w.fc1.shape[0]
    if heads < 1 or width % heads:
        raise ValueError(f"proj must take heads * head_dim inputs, got {width} for {heads} heads")
    expected = {"qkv": (3 * width, dim), "proj": (dim, width), "fc1": (hidden, dim), "fc2": (dim, hidden)}
    expected |= {"qkv_bias": (3 * width,), "fc1_bias": (hidden,)}
    expected |= {name: (dim,) for name in ("proj_bias", "fc2_bias", "gamma1", "gamma2")}
    for name, shape in expected.items():
        tensor = getattr(w, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    for name in ("norm1", "norm1_bias", "norm2", "norm2_bias"):
        tensor = getattr(w, name)
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != dim or (tensor.ndim == 2 and row is None):
            raise ValueError(f"{name} must be ({dim},), or (lengths, {dim}) beside a row, got {tuple(tensor.shape)}")


def block(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: BlockWeights,
    heads: int,
    *,
    row: Tensor | None = None,
    eps: tuple[float, float] = (1e-6, 1e-6),
    scale: float | None = None,
    activation: str = "gelu",
    kind: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + gamma1 * proj(attention(qkv(norm1(x)))), and then y + gamma2 * fc2(activation(fc1(norm2(y)))) of that.

    x:          (tokens, dim)
    cu_seqlens: (images + 1,) int32, where each image begins; tokens see those of their own image
    row:        (tokens,) int32, which of the norms' affines each token uses; None for the first
    eps:        of norm1 and norm2
    scale:      of the scores; head_dim ** -0.5 if not given
    activation: "gelu" (erf), "gelu_tanh" or "quick_gelu"
    kind:       None, or "int8": weights in 255 steps per output, what they multiply in 256 steps per token, found as
                it comes; products exact, all else as without

    Returns (tokens, dim) in the dtype of x, accumulated in fp32; rows of no image are zeros. Records no gradients.
    Raises ValueError for arguments that do not fit together, NotImplementedError where no backend takes them.
    """
    _check(x, cu_seqlens, weights, heads, row, activation, kind)
    one_device(x=x, cu_seqlens=cu_seqlens, row=row, **weights._asdict())
    scale = (weights.proj.shape[1] // heads) ** -0.5 if scale is None else scale
    with torch.no_grad():
        return _forward(x, cu_seqlens, row, *weights, heads, *eps, scale, activation, kind, backend)


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """Small arguments, as a backend's `forward` takes them."""

    def zeros(*shape):
        return torch.zeros(shape, device=device, dtype=dtype)

    weights = BlockWeights(
        *(zeros(16), zeros(16), zeros(48, 16), zeros(48), zeros(16, 16), zeros(16), None),
        *(zeros(16), zeros(16), zeros(64, 16), zeros(64), zeros(16, 64), zeros(16), None),
    )
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    return zeros(4, 16), cu_seqlens, None, *weights, 2, 1e-6, 1e-6, 0.125, "gelu", None
