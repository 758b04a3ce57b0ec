"""The vendor's matrix product for packed tokens; on a CPU, what a row becomes does not depend on the rows beside it."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_ROWS = 1024  # the number of rows that a packed weight is laid out for; any other number runs too


@cache
def _has_bf16() -> bool:
    """Whether oneDNN takes bf16 here: without AVX512 or AVX-NE-CONVERT it does not."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's inner product takes these: on a CPU it is up to twice F.linear in fp32, and equal in bf16."""
    return (
        not torch.compiler.is_compiling()  # the compiler chooses, and fuses, by itself
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _has_bf16()))
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(weight) in (Tensor, torch.nn.Parameter)
    )


def _layout(weight: Tensor) -> Tensor:
    """The weight as oneDNN is to have it.

    One layout whatever the number of rows: left to itself oneDNN picks one by that number, and in fp32 with it another
    order of adding. In bf16 every layout gives the same bits.
    """
    weight = weight.detach()
    if weight.dtype != torch.float32:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """x @ weight.T + bias, then the activation, by oneDNN. Nothing is recorded for a backward."""
    rows = x.shape[0]
    if rows == 1:  # one row alone would take oneDNN's matrix-vector path, which adds in another order
        x = x.expand(2, -1).contiguous()
    attribute, algorithm = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}[activation]
    bias = None if bias is None else bias.detach().to(x.dtype)
    y = torch.ops.mkldnn._linear_pointwise(x.detach(), _layout(weight), bias, attribute, [], algorithm)
    return y[:rows]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dx = _product(grad.contiguous(), weight.t().contiguous(), None) if wanted[0] else None
        dweight = None
        if wanted[1] and len(x):
            dweight = _product(grad.t().contiguous(), x.t().contiguous(), None)
        elif wanted[1]:
            dweight = torch.zeros_like(weight)
        dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wanted[2] else None
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """x @ weight.T + bias, then the activation.

    x:      (rows, in)
    weight: (out, in)
    bias:   (out,) or None
    activation: None, "gelu" (erf) or "gelu_tanh"

    Returns (rows, out) in the dtype of x, accumulated in fp32 by the vendor's library (oneDNN, cuBLASLt). On a CPU a
    row's bits do not depend on the other rows; cuBLASLt picks its algorithm by their number, and gives no such promise.
    """
    vendor = _onednn(x, weight)
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if vendor and not records:
        return _product(x, weight, bias, activation)
    y = _Linear.apply(x, weight, bias) if vendor else F.linear(x, weight, bias)
    return y if activation is None else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
