"""Attention by FlashAttention: the newest installed that takes the tensors, or the one that REVIT_FLASH_ATTN names.

How to have each beside torch's own 2, which needs nothing; `python -m revit_kernels` says which one runs:

    4, CuTe    pip install flash-attn-4: wheels; it compiles its kernels at first use
    3, Hopper  pip install --no-deps xformers==0.0.34 nvidia-cuda-runtime-cu12: wheels; xformers asks for torch 2.10,
               but its FlashAttention keeps to torch's stable ABI: in 2.11 it loads
    2          pip install --no-build-isolation flash-attn: source only, to be compiled with nvcc

What it keeps of this op's promises, by what its sources do:

    two runs alike, bitwise       all: the backward is asked to be deterministic
    an image alike in any batch   all, at one max_seqlen, but for the gradient of q in FA2, torch's too, where one has
                                  more than two blocks of keys (256 tokens on A100 and H100 up to head_dim 128, fewer on
                                  others): how many partial sums there are depends on the number of images
    NaN in the tail is ignored    all; FA3 and FA4 are given copies without it (v forward, four tensors backward)
    NaN stays in its image        FA2 and torch's; in FA3 and FA4 that of v reaches the image before

Never run on a GPU yet: shown is that each is called as its signature says, and that what it gives is turned into what
this op gives (tests/test_rival_attention.py).
"""

import os

import torch
from torch import Tensor

from revit_kernels import native
from revit_kernels.ops.attention import tail
from revit_kernels.ops.attention.flash_versions import VERSIONS

DTYPES = (torch.float16, torch.bfloat16)
_named: str | None = None


def use(version: str | None) -> None:
    """Run this version (fa4, fa3, fa2 or torch), and no other; None for the newest that takes the tensors.

    Raises ValueError for another name.
    """
    global _named
    if version is not None and version not in VERSIONS:
        raise ValueError(f"the version of FlashAttention must be one of {', '.join(VERSIONS)}, got {version!r}")
    _named = version


use(os.environ.get("REVIT_FLASH_ATTN") or None)


def _wanted() -> list:
    return list(VERSIONS.values()) if _named is None else [VERSIONS[_named]]


def _place(x: Tensor) -> str | None:
    return None if x.is_cuda else "needs a CUDA tensor"


def refusal(step, args):
    if args.cos is not None:
        return "does not turn queries and keys by a rotary table"
    x, backward = args.q, step == "backward"
    if why := _place(x) or native.gpu_refusal(DTYPES, x):
        return why
    reasons = {}
    for candidate in _wanted():
        if (why := candidate.refusal(x, backward)) is None:
            return None
        reasons[candidate.name] = why
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def verdicts(x: Tensor, backward: bool = False) -> dict:
    """Why a version does not run on tensors like x, None for the one that does, by version, the newest first."""
    reasons, taken = {}, None
    for candidate in VERSIONS.values():
        why = candidate.refusal(x, backward)
        if _named not in (None, candidate.name):
            why = why or f"REVIT_FLASH_ATTN={_named}"
        elif why is None and taken:
            why = f"could, but {taken.title()} is newer: REVIT_FLASH_ATTN={candidate.name}"
        elif why is None:
            taken = candidate
        reasons[candidate] = why
    return reasons


def version(x: Tensor, backward: bool = False):
    """The version of FlashAttention that runs on tensors like x: (tokens, heads, head_dim).

    Raises NotImplementedError if there is none.
    """
    for candidate in _wanted():
        if candidate.refusal(x, backward) is None:
            return candidate
    raise NotImplementedError(f"no version of FlashAttention takes {tuple(x.shape)} {x.dtype} on {x.device}")


def forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    if not (q.numel() and k.numel() and cu_seqlens.shape[0] > 1 and max_seqlen and max_seqlen_k):
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), q.new_zeros(q.shape[:2], dtype=torch.float32)
    kernel = version(q)
    v = v if kernel.ignores_tail else tail.cleaned(v, cu_seqlens_k)
    q, k, v = tail.aligned(q, k, v)
    out, lse = kernel.forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale)
    out, lse = out.contiguous(), lse.T.contiguous()  # lse: (heads, tokens) -> (tokens, heads)
    return tuple(tail.zero_(x, cu_seqlens, cu_seqlens_k) for x in (out, lse))


def backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    if not (q.numel() and k.numel() and cu_seqlens.shape[0] > 1 and max_seqlen and max_seqlen_k):
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    kernel = version(q, backward=True)
    if not kernel.ignores_tail:
        grad, q = (tail.cleaned(x, cu_seqlens) for x in (grad, q))
        k, v = (tail.cleaned(x, cu_seqlens_k) for x in (k, v))
    grad, q, k, v = tail.aligned(grad, q, k, v)
    lengths = (cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    dq, dk, dv = kernel.backward(grad, q, k, v, out, lse.T.contiguous(), *lengths, scale, deterministic=True)
    dq = tail.zero_(dq.contiguous(), cu_seqlens, cu_seqlens_k)
    return dq, *(tail.zero_(x.contiguous(), cu_seqlens_k, cu_seqlens) for x in (dk, dv))
