"""Attention within each image of a packed batch: bidirectional, exact, no padding."""

import math

import torch
from torch import Tensor

from revit_kernels.dispatch import one_device, register
from revit_kernels.ops.attention.handover import order


def _fake_forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


_forward = register(
    "attention",
    "forward",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor cu_seqlens_k, SymInt max_seqlen_k,"
    " float scale, str? backend) -> (Tensor, Tensor)",
    _fake_forward,
    lambda args: order("forward", args.q.device, max(args.max_seqlen, args.max_seqlen_k)),
)
_backward = register(
    "attention",
    "backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_k, float scale, str? backend) -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    lambda args: order("backward", args.q.device, max(args.max_seqlen, args.max_seqlen_k)),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, backend):
        if cu_seqlens_k is None:  # the same: torch.compile takes no tensor twice
            cu_seqlens_k = cu_seqlens
        out, lse = _forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, backend)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cu_seqlens_k)
        ctx.max_seqlen, ctx.max_seqlen_k, ctx.scale, ctx.backend = max_seqlen, max_seqlen_k, scale, backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *tensors, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        lengths = (cu_seqlens, ctx.max_seqlen, cu_seqlens_k, ctx.max_seqlen_k)
        return *_backward(grad, *tensors, *lengths, ctx.scale, ctx.backend), None, None, None, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotate_half: bool = False) -> Tensor:
    """Rotary position embedding, as timm's Eva applies it.

    x:   (tokens, heads, head_dim)
    cos: (tokens, head_dim), or (tokens, heads, head_dim) where each head has angles of its own
    sin: like cos
    rotate_half: which channels make a pair: False for (0, 1), (2, 3), ...; True for (0, head_dim / 2), ...

    Returns (tokens, heads, head_dim) in the dtype of x, computed in the wider of the dtypes.
    """
    cos, sin = (t if t.ndim == 3 else t[:, None] for t in (cos, sin))
    if rotate_half:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def _plain(q, k, v, cu_seqlens, max_seqlen) -> bool:
    """Whether these are self-attention's, beyond doubt: what every block of a model asks, so at little cost."""
    shape, dtype = q.shape, q.dtype
    return (
        len(shape) == 3
        and shape[2] != 0
        and dtype.is_floating_point
        and k.dtype == dtype == v.dtype
        and k.shape == shape == v.shape
        and cu_seqlens.ndim == 1
        and cu_seqlens.shape[0] > 0
        and cu_seqlens.dtype == torch.int32
        and type(max_seqlen) is int
        and max_seqlen >= 0
    )


def _check(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be (tokens, heads, head_dim), got {tuple(x.shape)}")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[1:] != q.shape[1:]:
        raise ValueError(f"k must be (tokens, {q.shape[1]}, {q.shape[2]}), got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[2] == 0:
        raise ValueError("head_dim must be at least 1, got 0")
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if x.ndim != 1 or x.shape[0] < 1 or x.dtype != torch.int32:
            raise ValueError(f"{name} must be (images + 1,) int32, got {tuple(x.shape)} {x.dtype}")
    if cu_seqlens.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must have the {cu_seqlens.shape[0]} boundaries of cu_seqlens, got {cu_seqlens_k.shape[0]}"
        )
    for name, n in (("max_seqlen", max_seqlen), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(n, int | torch.SymInt) or n < 0:
            raise ValueError(f"{name} must be an integer, at least 0, got {n!r}")


def _rotated(q, k, cu_seqlens, rotary):
    if not isinstance(rotary, tuple | list) or len(rotary) not in (2, 3):
        raise ValueError(f"rotary must be (cos, sin) or (cos, sin, rotate_half), got {type(rotary).__name__}")
    cos, sin, *half = rotary
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape not in (q.shape, (q.shape[0], q.shape[2])):
            expected = f"({q.shape[0]}, {q.shape[2]}) or {tuple(q.shape)}"
            raise ValueError(f"{name} of rotary must be {expected}, got {tuple(x.shape)}")
    if q.shape != k.shape:
        raise ValueError("rotary needs queries and keys of the same tokens; rotate them beforehand for cross attention")
    if q.shape[2] % 2:
        raise ValueError(f"rotary needs an even head_dim, got {q.shape[2]}")
    one_device(q=q, cos=cos, sin=sin)
    # Rows of no image may hold NaN, which must not reach the gradients of cos and sin either.
    outside = torch.arange(q.shape[0], device=q.device)[:, None, None] >= cu_seqlens[-1]
    return (rotate(x.masked_fill(outside, 0), cos, sin, *half) for x in (q, k))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    rotary: tuple | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T scale) v within each image.

    q: (tokens, heads, head_dim); like k and v it may be a strided view, of a fused qkv say
    k: (tokens, heads, head_dim), or (key tokens, heads, head_dim) with cu_seqlens_k
    v: like k
    cu_seqlens: (images + 1,) int32, where each image's queries (and its keys, without cu_seqlens_k) begin and end
    max_seqlen: at least the queries of the longest image, known to the host
    cu_seqlens_k, max_seqlen_k: the same for the keys, for cross attention
    scale:  head_dim ** -0.5 if not given; must not be negative
    rotary: (cos, sin) or (cos, sin, rotate_half), applied to q and k first; see `rotate`

    Returns (tokens, heads, head_dim), contiguous, in the dtype of q; products and softmax are accumulated in fp32.
    Rows of no image, and of an image without keys, are zeros. Differentiable once in q, k, v, cos and sin.
    Raises ValueError for arguments that do not fit together, NotImplementedError if no backend takes them.
    """
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k must be given together")
    plain = cu_seqlens_k is None and _plain(q, k, v, cu_seqlens, max_seqlen)
    if cu_seqlens_k is None:
        if not plain and k.shape[:1] != q.shape[:1]:
            raise ValueError(f"k must have the {q.shape[0]} tokens of q unless cu_seqlens_k is given, got {k.shape[0]}")
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    if not plain:
        _check(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    one_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    if rotary is not None:
        q, k = _rotated(q, k, cu_seqlens, rotary)
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    boundaries_k = None if cu_seqlens_k is cu_seqlens else cu_seqlens_k.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, cu_seqlens, max_seqlen, boundaries_k, max_seqlen_k, scale, backend)
    boundaries_k = cu_seqlens if boundaries_k is None else boundaries_k
    return _forward(q, k, v, cu_seqlens, max_seqlen, boundaries_k, max_seqlen_k, scale, backend)[0]


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """Small arguments, as a backend's `forward` takes them."""
    q, k, v = torch.zeros(4, 3, 2, 64, device=device, dtype=dtype).unbind(1)
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    return q, k, v, cu_seqlens, 3, cu_seqlens, 3, 0.125
