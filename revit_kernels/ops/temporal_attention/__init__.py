"""Attention across the frames of a clip: each position of the grid attends over its own tokens, one in every frame."""

import torch
from torch import Tensor

from revit_kernels.dispatch import contiguous, contiguous_rows, one_device, register
from revit_kernels.ops.attention import check_gradient, check_scale
from revit_kernels.ops.derivatives import once_differentiable


def _fake_forward(q, *_):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


_PLACES = "Tensor cu_seqlens, Tensor frames, SymInt max_frames, SymInt prefix, float scale, str? backend"
_forward = register(
    "temporal_attention",
    "forward",
    f"(Tensor q, Tensor k, Tensor v, {_PLACES}) -> (Tensor, Tensor)",
    _fake_forward,
    check=lambda args: _check_as_laid_out(args),
)
_backward = register(
    "temporal_attention",
    "backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PLACES}) -> (Tensor, Tensor, Tensor)",
    lambda grad, q, *_: tuple(q.new_empty(q.shape) for _ in range(3)),
    check=lambda args: _check_backward(args),
)


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, frames, *told):
        out, lse = _forward(q, k, v, cu_seqlens, frames, *told)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, frames)
        ctx.told = told
        return out

    @staticmethod
    @once_differentiable("temporal_attention")
    def backward(ctx, grad):
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return *_backward(grad, *ctx.saved_tensors, *ctx.told), *[None] * 6


def _check(q, k, v, cu_seqlens, frames, max_frames, prefix, scale) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or x.shape != q.shape or not x.shape[2]:
            raise ValueError(f"{name} must be (tokens, heads, head_dim) like q, got {tuple(x.shape)}")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    for name, x, size, words in (
        ("cu_seqlens", cu_seqlens, None, "clips + 1"),
        ("frames", frames, cu_seqlens.shape[0] - 1 if cu_seqlens.ndim == 1 else -1, "clips"),
    ):
        fits = x.ndim == 1 and (x.shape[0] > 0 if size is None else x.shape[0] == size)
        if not fits or x.dtype != torch.int32:
            raise ValueError(f"{name} must be ({words},) int32, got {tuple(x.shape)} {x.dtype}")
    for name, n in (("max_frames", max_frames), ("prefix", prefix)):
        if not isinstance(n, int | torch.SymInt) or n < 0:
            raise ValueError(f"{name} must be an integer, at least 0, got {n!r}")
    check_scale(scale)
    one_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens, frames=frames)


def _check_as_laid_out(args):
    """Raise ValueError for what the public function refuses or copies first: GPU kernels do not check tensors."""
    q, k, v, cu_seqlens, frames = args.q, args.k, args.v, args.cu_seqlens, args.frames
    _check(q, k, v, cu_seqlens, frames, args.max_frames, args.prefix, args.scale)
    contiguous_rows(q=q, k=k, v=v)
    contiguous(cu_seqlens=cu_seqlens, frames=frames)


def _check_backward(args):
    _check_as_laid_out(args)
    check_gradient(args)


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    frames: Tensor,
    max_frames: int,
    *,
    prefix: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T scale) v among the tokens at one position of a clip's frames (TimeSformer, arXiv:2102.05095).

    A clip's rows are its frames one after the other, all of equally many rows; row p of every frame is position p. So
    the sequences of a clip are its rows p, p + stride, p + 2 stride, ..., with stride = rows / frames.

    q: (tokens, heads, head_dim); like k and v it may be a strided view, of a fused qkv say
    k: like q
    v: like q
    cu_seqlens: (clips + 1,) int32, where each clip's rows begin and end
    frames: (clips,) int32, how many frames each clip has; a clip of none attends to nothing
    max_frames: at least the frames of the longest clip, known to the host
    prefix: rows at the start of each frame that take no part: its class tokens
    scale:  head_dim ** -0.5 if not given; must not be negative

    Returns (tokens, heads, head_dim), contiguous, in the dtype of q; products and softmax are accumulated in fp32. Rows
    of a prefix, of no clip, or left over where a clip's rows are no multiple of its frames, are zeros, and are never
    read. Differentiable once in q, k and v.
    Raises ValueError for arguments that do not fit together, NotImplementedError if no backend takes them.
    """
    scale = q.shape[-1] ** -0.5 if scale is None and q.ndim == 3 and q.shape[2] else 0.0 if scale is None else scale
    _check(q, k, v, cu_seqlens, frames, max_frames, prefix, scale)
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    args = (q, k, v, cu_seqlens.contiguous(), frames.contiguous(), max_frames, prefix, scale, backend)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _TemporalAttention.apply(*args)
    return _forward(*args)[0]


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """Small arguments, as a backend's `forward` takes them."""
    q, k, v = torch.zeros(6, 3, 2, 64, device=device, dtype=dtype).unbind(1)
    cu_seqlens, frames = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 6], [2]))
    return q, k, v, cu_seqlens, frames, 2, 1, 0.125
