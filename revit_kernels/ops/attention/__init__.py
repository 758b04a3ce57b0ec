"""Attention within each image of a packed batch: bidirectional, exact, no padding."""

import torch
from torch import Tensor

from revit_kernels.dispatch import contiguous, contiguous_rows, one_device, register, same_form
from revit_kernels.ops.attention import rotary as rotation
from revit_kernels.ops.attention.handover import order
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.ops.derivatives import once_differentiable

_ROTARY = " Tensor? cos, Tensor? sin, Tensor? row, bool half, str? backend"


def _fake_forward(q, *_):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


_forward = register(
    "attention",
    "forward",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor cu_seqlens_k, SymInt max_seqlen_k,"
    f" float scale,{_ROTARY}) -> (Tensor, Tensor)",
    _fake_forward,
    lambda args: order("forward", args.q.device, max(args.max_seqlen, args.max_seqlen_k)),
    check=lambda args: _check_as_laid_out(args),
)
_backward = register(
    "attention",
    "backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen,"
    f" Tensor cu_seqlens_k, SymInt max_seqlen_k, float scale,{_ROTARY}) -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    lambda args: order("backward", args.q.device, max(args.max_seqlen, args.max_seqlen_k)),
    check=lambda args: _check_backward(args),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, row, half, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, backend):
        if cu_seqlens_k is None:  # the same: torch.compile takes no tensor twice
            cu_seqlens_k = cu_seqlens
        told = (scale, cos, sin, row, half, backend)
        out, lse = _forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, *told)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cu_seqlens_k, cos, sin, row)
        ctx.told = max_seqlen, max_seqlen_k, scale, half, backend
        return out

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx, grad):
        *tensors, cu_seqlens, cu_seqlens_k, cos, sin, row = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        max_seqlen, max_seqlen_k, scale, half, backend = ctx.told
        lengths = (cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
        dq, dk, dv = _backward(grad, *tensors, *lengths, scale, cos, sin, row, half, backend)
        dcos = dsin = None
        if any(ctx.needs_input_grad[3:5]):
            dcos, dsin = rotation.table_gradients(tensors[:2], (dq, dk), cos, sin, row, half, cu_seqlens)
        return dq, dk, dv, dcos, dsin, *[None] * 8


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


def check_scale(scale):
    """Raise ValueError for a scale that not every kernel takes."""
    if not 0 <= scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be finite in float32 and not negative, got {scale}")


def _check_as_laid_out(args):
    """Raise ValueError for what the public function refuses or copies first: GPU kernels do not check tensors."""
    q, k, v = args.q, args.k, args.v
    _check(q, k, v, args.cu_seqlens, args.cu_seqlens_k, args.max_seqlen, args.max_seqlen_k)
    check_scale(args.scale)
    one_device(q=q, k=k, v=v, cu_seqlens=args.cu_seqlens, cu_seqlens_k=args.cu_seqlens_k)
    contiguous_rows(q=q, k=k, v=v)
    turned = {"cos": args.cos, "sin": args.sin, "row": args.row}
    if len(given := [name for name, tensor in turned.items() if tensor is not None]) == 3:
        rotation.check(Rotary(*turned.values()), q, k.shape != q.shape)
    elif given:
        raise ValueError(f"cos, sin and row must be given together, got {' and '.join(given)} alone")
    contiguous(cu_seqlens=args.cu_seqlens, cu_seqlens_k=args.cu_seqlens_k, **turned)


def _check_backward(args):
    _check_as_laid_out(args)
    check_gradient(args)


def check_gradient(args):
    """Raise ValueError unless grad, out and lse belong to q: (tokens, heads, head_dim), lse (tokens, heads)."""
    same_form(args.q, grad=args.grad, out=args.out)
    same_form(args.q.new_empty(args.q.shape[:2], dtype=torch.promote_types(args.q.dtype, torch.float32)), lse=args.lse)
    one_device(q=args.q, grad=args.grad, out=args.out, lse=args.lse)
    contiguous_rows(grad=args.grad)
    contiguous(out=args.out, lse=args.lse)


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
    rotary: Rotary | None = None,
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
    rotary: angles by which q and k are turned as they are loaded, rounded to their dtype; not for cross attention

    Returns (tokens, heads, head_dim), contiguous, in the dtype of q; products and softmax are accumulated in fp32.
    Rows of no image, and of an image without keys, are zeros. Differentiable once in q, k, v, and in
    cos and sin of rotary, which must be of one angle.
    Raises ValueError for arguments that do not fit together, NotImplementedError if no backend takes them.
    """
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k must be given together")
    plain = cu_seqlens_k is None and _plain(q, k, v, cu_seqlens, max_seqlen)
    if cu_seqlens_k is None:
        if not plain and q.ndim == k.ndim == 3 and k.shape[0] != q.shape[0]:
            raise ValueError(f"k must have the {q.shape[0]} tokens of q unless cu_seqlens_k is given, got {k.shape[0]}")
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    if not plain:
        _check(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    one_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    check_scale(scale)
    cos = sin = row = None
    half = False
    if rotary is not None:
        rotation.check(rotary, q, cu_seqlens_k is not cu_seqlens)
        if rotary.cos.shape[0]:
            cos, sin, row, half = (*(t.contiguous() for t in rotary[:3]), rotary.half)
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    boundaries_k = None if cu_seqlens_k is cu_seqlens else cu_seqlens_k.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, cos, sin)):
        lengths = (cu_seqlens, max_seqlen, boundaries_k, max_seqlen_k)
        return _Attention.apply(q, k, v, cos, sin, row, half, *lengths, scale, backend)
    boundaries_k = cu_seqlens if boundaries_k is None else boundaries_k
    told = (scale, cos, sin, row, half, backend)
    return _forward(q, k, v, cu_seqlens, max_seqlen, boundaries_k, max_seqlen_k, *told)[0]


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """Small arguments, as a backend's `forward` takes them."""
    q, k, v = torch.zeros(4, 3, 2, 64, device=device, dtype=dtype).unbind(1)
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    return q, k, v, cu_seqlens, 3, cu_seqlens, 3, 0.125
