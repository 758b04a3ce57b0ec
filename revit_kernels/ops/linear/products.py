"""What the backends share: products of the vendor's library, and what an epilogue lacks, step by step behind it."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_ROWS = 1024  # the number of rows that oneDNN lays a weight out for; any other number runs too


@cache
def _has_bf16() -> bool:
    """Whether oneDNN takes bf16 here: without AVX512 or AVX-NE-CONVERT it does not."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def rows_are_independent() -> bool:
    """Whether oneDNN, told the layout of a weight, gives a row the same bits whatever rows stand beside it.

    So it was found to be with AVX512, and not to be with AVX2 alone.
    """
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _onednn(x: Tensor) -> bool:
    """Whether oneDNN's inner product takes these: on a CPU it is up to twice F.linear in fp32, and equal in bf16."""
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _has_bf16()))
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, by oneDNN on a CPU, by cuBLAS on a GPU."""
    if not _onednn(x):
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if rows == 1:  # one row alone would take oneDNN's matrix-vector path, which adds in another order
        x = x.expand(2, -1)
    if x.dtype == torch.float32:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")[:rows]


def derivative_products(dh: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool):
    """dh @ weight and dh.T @ x, each an empty tensor where it is not needed."""
    dx = dweight = x.new_empty(0)
    if need_x and x.dtype == torch.float32 and _onednn(x):  # up to 1.2 times as fast as mm; in bf16 equal
        dx = torch.ops.mkldnn._linear_pointwise(dh.contiguous(), weight.t(), None, "none", [], "")
    elif need_x:
        dx = torch.mm(dh, weight)
    if need_weight:
        dweight = torch.mm(dh.t(), x)  # 1.1 to 1.7 times as fast as oneDNN's linear, which copies transposed operands
    return dx, dweight


def keeps(recorded: bool, activation, gate) -> bool:
    """Whether a backward needs the product itself."""
    return recorded and (activation is not None or gate is not None)


def activate(h: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return h
    if activation == "silu":
        return F.silu(h)
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def finish(h: Tensor, activation: str | None, gate: str | None) -> Tensor:
    """The activation of a product, or with a gate that of one half times the other half."""
    if gate is None:
        return activate(h, activation)
    first, second = h.chunk(2, -1)
    return activate(first, activation) * second if gate == "first" else first * activate(second, activation)
