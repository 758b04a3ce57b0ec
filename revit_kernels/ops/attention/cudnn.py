"""Attention by cuDNN, through torch's aten::_cudnn_attention_forward with ragged offsets.

What it keeps of this op's promises: NaN in the tail is ignored (v is copied without it, and q, k and v are made
contiguous, since not every torch takes their strides into its offsets); lengths are read on the device. Its backward is
not deterministic, and torch before 2.14 takes head_dim for the longest image in it and then writes out of bounds
(pytorch/pytorch#186142): both are refused. Whether an image is bitwise the same in every batch is not documented.
torch 2.11 builds cuDNN's plan anew in every call: expect milliseconds of the host's time.

Never run on a GPU yet: shown is that torch takes the arguments, and what becomes of the results.
"""

from functools import cache

import torch
from torch import Tensor

from revit_kernels import native
from revit_kernels.ops.attention import tail

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIM = 128
BACKWARD_FIXED = (2, 14)  # of torch, which surely holds the fix of June 2026

_forward = torch.ops.aten._cudnn_attention_forward
_backward = torch.ops.aten._cudnn_attention_backward


def _place(x: Tensor) -> str | None:
    if not x.is_cuda:
        return "needs a CUDA tensor"
    if not torch.backends.cudnn.is_available():
        return "this torch was built without cuDNN"
    return None


def _torch() -> tuple[int, ...]:
    return tuple(int(n) for n in torch.__version__.split(".")[:2])


def refusal(step, args):
    if args.cos is not None:
        return "does not turn queries and keys by a rotary table"
    x = args.q
    if why := _place(x) or native.gpu_refusal(DTYPES, x):
        return why
    if (found := native._capability(x.device)) < (9, 0):
        return "needs compute capability 9.0 for packed images, {} has {}.{}".format(x.device, *found)
    if x.shape[2] % 8 or x.shape[2] > HEAD_DIM:
        return f"head_dim must be a multiple of 8, at most {HEAD_DIM}, got {x.shape[2]}"
    if max(x.shape[0], args.k.shape[0]) * x.shape[1] * x.shape[2] >= 2**31:
        return "its offsets are 32 bits: tokens x heads x head_dim must stay below 2^31"
    return _backward_refusal(x, max(args.max_seqlen, args.max_seqlen_k)) if step == "backward" else None


def _backward_refusal(x: Tensor, longest: int) -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    if longest > x.shape[2] and _torch() < BACKWARD_FIXED:
        return f"its backward in torch {torch.__version__} writes out of bounds where an image is longer than head_dim"
    return None


@cache
def _heads_first(device: torch.device) -> bool:
    """Whether this torch's lse is (heads, tokens), as since 2.13 or so, or (tokens, heads, 1)."""
    x = torch.zeros(8, 2, 64, dtype=torch.float16, device=device)
    ends = torch.tensor([0, 8], dtype=torch.int32, device=device)
    return _forward(x, x, x, None, ends, ends, 8, 8, True, 0.0, False, False, scale=1.0)[1].shape[0] == 2


def forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    if not (q.numel() and k.numel() and cu_seqlens.shape[0] > 1 and max_seqlen and max_seqlen_k):
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), q.new_zeros(q.shape[:2], dtype=torch.float32)
    q, k, v = *tail.aligned(q.contiguous(), k.contiguous()), tail.cleaned(v, cu_seqlens_k)
    lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    out, lse, *_ = _forward(q, k, v, None, *lengths, True, 0.0, False, False, scale=scale)
    lse = lse.squeeze(-1) if lse.ndim == 3 else lse.T
    return tuple(tail.zero_(x.contiguous(), cu_seqlens, cu_seqlens_k) for x in (out, lse))


def backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    if not (q.numel() and k.numel() and cu_seqlens.shape[0] > 1 and max_seqlen and max_seqlen_k):
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grad, q = (tail.cleaned(x, cu_seqlens) for x in (grad, q))
    k, v = (tail.cleaned(x, cu_seqlens_k) for x in (k, v))
    lse = lse.T.contiguous() if _heads_first(q.device) else lse[:, :, None]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
    lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    dq, dk, dv = _backward(grad, q, k, v, out, lse, seed, seed, None, *lengths, 0.0, False, scale=scale)
    dq = tail.zero_(dq.contiguous(), cu_seqlens, cu_seqlens_k)
    return dq, *(tail.zero_(x.contiguous(), cu_seqlens_k, cu_seqlens) for x in (dk, dv))
