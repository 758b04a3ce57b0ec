"""A whole pre-norm Transformer block on packed tokens, at inference."""

from typing import NamedTuple

import torch
from torch import Tensor

from revit_kernels.dispatch import one_device, register
from revit_kernels.ops.attention import rotary as rotation
from revit_kernels.ops.attention.rotary import Rotary

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
KINDS = (None, "int8")


class BlockWeights(NamedTuple):
    """A block's parameters. Those with a default may be missing.

    norm1, norm2:   (dim,), or (lengths, dim) for an affine per token length; so are all norms, and their biases
    qkv:            (3 * heads * head_dim, dim); proj: (dim, heads * head_dim)
    q_norm, k_norm: (head_dim,), of queries and keys
    attended_norm:  (heads * head_dim,), before proj
    gamma1, gamma2: (dim,) LayerScale of the two branches
    fc1:            (hidden, dim), followed by the activation; fc2: (dim, hidden)
    fc1_x:          (hidden, dim), of a gated MLP: what the activation's result is multiplied with
    hidden_norm:    (hidden,), before fc2
    biases:         one number per output, or as their norm
    """

    norm1: Tensor
    qkv: Tensor
    proj: Tensor
    norm2: Tensor
    fc1: Tensor
    fc2: Tensor
    norm1_bias: Tensor | None = None
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm: Tensor | None = None
    k_norm_bias: Tensor | None = None
    attended_norm: Tensor | None = None
    attended_norm_bias: Tensor | None = None
    proj_bias: Tensor | None = None
    gamma1: Tensor | None = None
    norm2_bias: Tensor | None = None
    fc1_bias: Tensor | None = None
    fc1_x: Tensor | None = None
    fc1_x_bias: Tensor | None = None
    hidden_norm: Tensor | None = None
    hidden_norm_bias: Tensor | None = None
    fc2_bias: Tensor | None = None
    gamma2: Tensor | None = None


NORMS = ("norm1", "q_norm", "k_norm", "attended_norm", "norm2", "hidden_norm")
PRODUCTS = ("qkv", "proj", "fc1", "fc1_x", "fc2")


class Eps(NamedTuple):
    """What each norm adds to the mean of squares."""

    norm1: float = 1e-6
    q_norm: float = 1e-6
    k_norm: float = 1e-6
    attended_norm: float = 1e-6
    norm2: float = 1e-6
    hidden_norm: float = 1e-6


class Form(NamedTuple):
    """What blocks that run in one call have in common.

    widths: of x, of what is attended, and of the hidden layer
    others: as `block` takes them
    """

    widths: tuple[int, int, int]
    heads: int
    eps: Eps
    rms: bool
    scale: float
    activation: str


_WEIGHTS = ", ".join(
    f"Tensor{'?' if name in BlockWeights._field_defaults else ''} {name}" for name in BlockWeights._fields
)

_forward = register(
    "block",
    "forward",
    f"(Tensor x, Tensor cu_seqlens, Tensor? row, {_WEIGHTS}, int heads, float[] eps, bool rms, float scale, "
    "str activation, Tensor? cos, Tensor? sin, Tensor? rotary_row, bool half, str? kind, str? backend) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)


def _check(x, cu_seqlens, w, heads, row, eps, activation, kind):
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
    if len(eps) != len(NORMS):
        raise ValueError(f"eps must be an Eps of {len(NORMS)} numbers, got {eps!r}")
    for name in ("proj", "fc1"):
        if getattr(w, name).ndim != 2:
            raise ValueError(f"{name} must be (outputs, inputs), got {tuple(getattr(w, name).shape)}")
    dim, width, hidden = x.shape[1], w.proj.shape[1], w.fc1.shape[0]
    if heads < 1 or width % heads:
        raise ValueError(f"proj must take heads * head_dim inputs, got {width} for {heads} heads")
    expected = {"qkv": (3 * width, dim), "proj": (dim, width), "fc2": (dim, hidden)}
    expected |= {"qkv_bias": (3 * width,), **dict.fromkeys(("proj_bias", "fc2_bias", "gamma1", "gamma2"), (dim,))}
    expected |= {"fc1": (hidden, dim), "fc1_x": (hidden, dim), "fc1_bias": (hidden,), "fc1_x_bias": (hidden,)}
    for name, shape in expected.items():
        tensor = getattr(w, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    for name, size in zip(NORMS, (dim, width // heads, width // heads, width, dim, hidden)):
        weight, bias = getattr(w, name), getattr(w, f"{name}_bias")
        if weight is None:
            continue
        if weight.ndim not in (1, 2) or weight.shape[-1] != size or (weight.ndim == 2 and row is None):
            raise ValueError(f"{name} must be ({size},), or (lengths, {size}) beside a row, got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape:
            raise ValueError(f"{name}_bias must be {tuple(weight.shape)} as {name}, got {tuple(bias.shape)}")
    for name in (*(f"{norm}_bias" for norm in NORMS), "fc1_x_bias"):
        if getattr(w, name) is not None and getattr(w, name.removesuffix("_bias")) is None:
            raise ValueError(f"{name} needs {name.removesuffix('_bias')}")


def block(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: BlockWeights,
    heads: int,
    *,
    row: Tensor | None = None,
    eps: Eps = Eps(),  # noqa: B008 - of numbers
    rms: bool = False,
    scale: float | None = None,
    activation: str = "gelu",
    rotary: Rotary | None = None,
    kind: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x + gamma1 * proj(attended_norm(attention(qkv(norm1(x))))), and of that
    y + gamma2 * fc2(hidden_norm(activation(fc1(norm2(y))) * fc1_x(norm2(y)))).

    x:          (tokens, dim)
    cu_seqlens: (images + 1,) int32, where each image begins; tokens see those of their own image
    row:        (tokens,) int32, which of the norms' affines each token uses; None for the first
    eps:        of each norm
    rms:        whether the norms are RmsNorms, which subtract no mean
    scale:      of the scores; head_dim ** -0.5 if not given
    activation: "gelu" (erf), "gelu_tanh", "quick_gelu" or "silu"
    rotary:     angles by which queries and keys are rotated, after their norms, or None
    kind:       None, or "int8": weights in 255 steps per output, what they multiply in 256 steps per token, found as
                it comes; products exact, all else as without

    Norms of queries and keys, and what a gate multiplies, are rounded to the dtype of x. What is missing in
    `weights` is left out.
    Returns (tokens, dim) in the dtype of x, accumulated in fp32; rows of no image are zeros. Records no gradients.
    Raises ValueError for arguments that do not fit together, NotImplementedError where no backend takes them.
    """
    _check(x, cu_seqlens, weights, heads, row, eps, activation, kind)
    one_device(x=x, cu_seqlens=cu_seqlens, row=row, **weights._asdict())
    head_dim = weights.proj.shape[1] // heads
    scale = head_dim**-0.5 if scale is None else scale
    cos = sin = rotary_row = None
    half = False
    if rotary is not None:
        rotation.check(rotary, x[:, :1, None].expand(-1, heads, head_dim), False)
        if rotary.cos.shape[0]:
            cos, sin, rotary_row, half = rotary
    with torch.no_grad():
        how = (heads, list(eps), rms, scale, activation, cos, sin, rotary_row, half, kind)
        return _forward(x, cu_seqlens, row, *weights, *how, backend)


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """Small arguments, as a backend's `forward` takes them."""

    def zeros(*shape):
        return torch.zeros(shape, device=device, dtype=dtype)

    weights = BlockWeights(
        norm1=zeros(16), qkv=zeros(48, 16), proj=zeros(16, 16), norm2=zeros(16), fc1=zeros(64, 16), fc2=zeros(16, 64)
    )
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    how = (2, list(Eps()), False, 0.125, "gelu", None, None, None, False, None)
    return zeros(4, 16), cu_seqlens, None, *weights, *how
