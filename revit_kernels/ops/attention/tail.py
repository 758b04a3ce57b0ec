"""What several backends leave to their caller: rows of no image, and rows that start on 16 bytes."""

from functools import cache

import torch
from torch import Tensor


@cache
def _kernel():
    """The launch of the Triton kernel, or None where there is no Triton."""
    try:
        from revit_kernels.ops.attention import tail_triton
    except ImportError:
        return None
    return tail_triton.launch


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of boundaries are one: autograd may give another object for the same tensor."""
    return a is b or a.data_ptr() == b.data_ptr()


def outside(rows: int, cu_seqlens: Tensor, cu_others: Tensor) -> Tensor:
    """(rows,) bool: whether the row is of no image, or of an image that has no rows among the others."""
    row = torch.arange(rows, dtype=torch.int32, device=cu_seqlens.device)
    beyond = row >= cu_seqlens[-1]
    if same(cu_seqlens, cu_others):
        return beyond
    image = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    alone = torch.cat([cu_others.diff() <= 0, beyond.new_ones(1)])  # its last row is for rows of no image
    return beyond | alone[image]


def zero_(x: Tensor, cu_seqlens: Tensor, cu_others: Tensor) -> Tensor:
    """x, (rows, ...) and contiguous, with zeros in the rows `outside`, without waiting for the device."""
    if not x.numel():
        return x
    if x.is_cuda and same(cu_seqlens, cu_others) and _kernel():
        _kernel()(x, cu_seqlens)
        return x
    mask = outside(x.shape[0], cu_seqlens, cu_others)
    return x.masked_fill_(mask.view(-1, *[1] * (x.ndim - 1)), 0)


def cleaned(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A contiguous copy of x, (rows, heads, head_dim), with zeros from row cu_seqlens[-1] on."""
    inside = torch.arange(x.shape[0], dtype=torch.int32, device=x.device) < cu_seqlens[-1]
    return torch.where(inside[:, None, None], x, 0).contiguous()


def aligned(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where a row of a head does not start on 16 bytes; head_dim is contiguous already."""
    return [
        x
        if x.data_ptr() % 16 == 0 and not any(stride * x.element_size() % 16 for stride in x.stride()[:2])
        else x.clone(memory_format=torch.contiguous_format)
        for x in tensors
    ]
