"""How a Triton kernel quantizes a row to e4m3."""

import os

import triton
import triton.language as tl

from revit_kernels.ops.e4m3 import E4M3_MAX

LARGEST = tl.constexpr(E4M3_MAX)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def quantize_rows(x):
    """x [rows, columns] as e4m3 over a scale per row, which brings its largest number to LARGEST, and the scale."""
    scale = tl.max(tl.abs(x), 1) / LARGEST
    scale = tl.where(scale == 0, 1.0, scale)
    x = x / scale[:, None]
    if INTERPRETED:  # whose own rounding loses the carry into the exponent
        step = tl.exp2(tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(x), 1e-9))), -6.0) - 3)
        x = tl.where(x < 0, -step, step) * tl.floor(tl.abs(x) / step + 0.5)
    return x.to(tl.float8e4nv), scale
