"""What FlopCounterMode counts for the ops: two for each multiplication and addition of a matrix product."""

import torch
from torch import Tensor

import revit_kernels.ops.attention
import revit_kernels.ops.linear
import revit_kernels.ops.patch_embed
import revit_kernels.ops.temporal_attention  # noqa: F401  (they define the ops)
from revit_kernels.dispatch import FORMULAS
from revit_kernels.ops.block import PRODUCTS, BlockWeights

_ops = torch.ops.revit_kernels


def _counts(op):
    return lambda formula: FORMULAS.setdefault(op, formula)


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or type(x).__name__ == "FakeTensor"  # whose module takes as long to import as all of this


def _pairs(cu_seqlens: Tensor, max_seqlen: int, cu_seqlens_k: Tensor, max_seqlen_k: int) -> int:
    """Queries times keys, of all images; the most there can be where the boundaries have no values."""
    if _has_no_values(cu_seqlens):
        return (cu_seqlens.shape[0] - 1) * max_seqlen * max_seqlen_k
    return int((cu_seqlens.diff().long() * cu_seqlens_k.diff().long()).sum())


@_counts(_ops.attention_forward)
def attention_forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, *_, out_val=None, **__) -> int:
    return 4 * _pairs(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k) * q.shape[1] * q.shape[2]


@_counts(_ops.attention_backward)
def attention_backward(
    grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, *_, out_val=None, **__
) -> int:
    """Five products: the scores again, and the gradients of them, of queries, keys and values."""
    return 10 * _pairs(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k) * q.shape[1] * q.shape[2]


def _pairs_in_time(cu_seqlens: Tensor, frames: Tensor, max_frames: int, prefix: int, tokens: int) -> int:
    """Queries times keys, of all clips; the most there can be where the boundaries have no values."""
    if _has_no_values(cu_seqlens):
        return tokens * max_frames
    patches = cu_seqlens.diff().long() - prefix * frames
    return int((patches * frames).sum())


@_counts(_ops.temporal_attention_forward)
def temporal_attention_forward(q, k, v, cu_seqlens, frames, max_frames, prefix, *_, out_val=None, **__) -> int:
    return 4 * _pairs_in_time(cu_seqlens, frames, max_frames, prefix, q.shape[0]) * q.shape[1] * q.shape[2]


@_counts(_ops.temporal_attention_backward)
def temporal_attention_backward(
    grad, q, k, v, out, lse, cu_seqlens, frames, max_frames, prefix, *_, out_val=None, **__
) -> int:
    return 10 * _pairs_in_time(cu_seqlens, frames, max_frames, prefix, q.shape[0]) * q.shape[1] * q.shape[2]


def _patches(placement: Tensor, image: Tensor) -> int:
    if _has_no_values(placement):
        return image.shape[0]
    return int((placement[:, 0].long() * placement[:, 1]).sum())


@_counts(_ops.patch_embed_forward)
def patch_embed_forward(images, weight, bias, cu_seqlens, placement, image, *_, out_val=None, **__) -> int:
    return 2 * _patches(placement, image) * weight.numel()


@_counts(_ops.patch_embed_backward)
def patch_embed_backward(grad, patches, cu_seqlens, placement, image, *_, out_val=None, **__) -> int:
    return 2 * _patches(placement, image) * grad.shape[1] * patches.shape[1]


@_counts(_ops.linear_forward)
def linear_forward(x, weight, *_, out_val=None, **__) -> int:
    return 2 * x.shape[0] * weight.numel()


@_counts(_ops.linear_backward)
def linear_backward(dy, x, weight, bias, kept, activation, gate, need_x, need_weight, *_, out_val=None, **__) -> int:
    return 2 * x.shape[0] * weight.numel() * (need_x + need_weight)


@_counts(_ops.block_forward)
def block_forward(x, cu_seqlens, row, *rest, out_val=None, **__) -> int:
    w = BlockWeights(*rest[: len(BlockWeights._fields)])
    length = x.shape[0]  # the longest an image can be, where the boundaries have no values
    products = 2 * length * sum(getattr(w, name).numel() for name in PRODUCTS if getattr(w, name) is not None)
    return products + 4 * _pairs(cu_seqlens, length, cu_seqlens, length) * w.proj.shape[1]
