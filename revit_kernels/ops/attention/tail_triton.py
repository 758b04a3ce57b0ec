"""Zeros in the rows of no image, without touching the others and without waiting for the device."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_WIDTH = 16, 1024


@triton.jit(do_not_specialize=("end_ptr", "rows"))
def _zero_kernel(x_ptr, end_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    end = tl.load(end_ptr)
    first = tl.program_id(0) * BLOCK_ROWS
    if first + BLOCK_ROWS > end:  # nearly every program has nothing to do
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row >= end) & (row < rows)
        for start in range(0, columns, BLOCK_WIDTH):
            column = start + tl.arange(0, BLOCK_WIDTH)
            at = row.to(tl.int64)[:, None] * columns + column[None, :]  # [BLOCK_ROWS, BLOCK_WIDTH]
            zeros = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), x_ptr.dtype.element_ty)
            tl.store(x_ptr + at, zeros, mask=inside[:, None] & (column < columns)[None, :])


def launch(x: Tensor, cu_seqlens: Tensor) -> None:
    """Zeros in the rows of x, (rows, ...) and contiguous, from cu_seqlens[-1] on."""
    rows = x.shape[0]
    grid = (triton.cdiv(rows, BLOCK_ROWS),)
    _zero_kernel[grid](x, cu_seqlens[-1:], rows, x.numel() // rows, BLOCK_ROWS=BLOCK_ROWS, BLOCK_WIDTH=BLOCK_WIDTH)


def offline():
    """Arguments for compiling the kernel without a GPU."""
    sizes = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_WIDTH": BLOCK_WIDTH}
    for kind in ("bf16", "fp16", "fp32"):
        signature = {"x_ptr": f"*{kind}", "end_ptr": "*i32", "rows": "i32", "columns": "i32"}
        yield {"kernel": _zero_kernel, "signature": signature, "constexprs": sizes}
