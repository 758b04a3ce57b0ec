"""The matrix product for packed tokens: ours at inference on a CPU, the vendor's in training and on GPUs."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels import native
from revit_kernels.dispatch import PLAIN
from revit_kernels.panels import KINDS, multiply, pack_weight

PACKED_ROWS = 1024  # the number of rows that oneDNN lays a weight out for; any other number runs too


@cache
def _has_bf16() -> bool:
    """Whether oneDNN takes bf16 here: without AVX512 or AVX-NE-CONVERT it does not."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _rows_are_independent() -> bool:
    """Whether oneDNN, told the layout of a weight, gives a row the same bits whatever rows stand beside it.

    So it was found to be with AVX512, and not to be with AVX2 alone.
    """
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


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


@cache
def _built() -> bool:
    try:
        native.load("cpu")
    except (ImportError, OSError):
        return False
    return True


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our own product takes these, at inference."""
    return (
        not torch.compiler.is_compiling()  # the compiler chooses, and fuses, by itself
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in KINDS
        and weight.shape[1] % 4 == 0
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and all(type(t) in PLAIN for t in (x, weight, bias) if t is not None)
        and _built()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN. Nothing is recorded for a backward."""
    rows = x.shape[0]
    if rows == 1:  # one row alone would take oneDNN's matrix-vector path, which adds in another order
        x = x.expand(2, -1).contiguous()
    weight, bias = weight.detach(), None if bias is None else bias.detach().to(x.dtype)
    if x.dtype == torch.float32:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
    return torch.ops.mkldnn._linear_pointwise(x.detach(), weight, bias, "none", [], "")[:rows]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if not _rows_are_independent() and _ours(x, weight, bias):
            return multiply(x.detach(), pack_weight(weight, bias, None, x.dtype), len(weight))
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

    Returns (rows, out) in the dtype of x, accumulated in fp32: at inference on a CPU by csrc/gemm, in training there
    and on GPUs by the vendor's library (oneDNN, cuBLASLt). On a CPU a row's bits do not depend on the other rows;
    cuBLASLt picks its algorithm by their number, and gives no such promise.
    """
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if not records and _ours(x, weight, bias):
        packed = pack_weight(weight, bias, None, x.dtype)
        return multiply(x.detach(), packed, len(weight), activation)
    y = _Linear.apply(x, weight, bias) if records and _onednn(x, weight) else F.linear(x, weight, bias)
    return y if activation is None else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
