"""Weights packed as the CPU kernels' matrix product reads them: csrc/linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels import native

KINDS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", None, "silu")  # of the epilogue, as csrc/cpu/packed.h counts them


def has_kernel(kind) -> bool:
    """Whether this CPU has a product for weights of this kind, one of KINDS."""
    native.load("cpu")
    return torch.ops.revit_kernels.packs_cpu.default(KINDS[kind])


def pack_weight(weight: Tensor, bias: Tensor | None, gamma: Tensor | None, kind) -> Tensor:
    """A weight (out, in) with what is added to and multiplied with its product, (out,) each.

    Returns bytes for this CPU and this instruction set alone to read. Errors if there is no kernel for the kind.
    """
    bias, gamma = (None if t is None else t.detach().float().contiguous() for t in (bias, gamma))
    return torch.ops.revit_kernels.pack_cpu.default(_padded(weight.detach()), bias, gamma, KINDS[kind])


def multiply(x: Tensor, packed: Tensor, out: int, activation: str | None = None) -> Tensor:
    """activation(x @ weight.T + bias), (rows, out): a row's bits do not depend on the rows beside it.

    x: (rows, in) float32 or bfloat16; packed: of `pack_weight`, the weight (out, in) of the same dtype
    """
    return torch.ops.revit_kernels.linear_cpu.default(_padded(x), packed, out, ACTIVATIONS.index(activation))


def _padded(rows: Tensor) -> Tensor:
    """With zeros behind each row, to the multiple of 4 numbers that the kernel multiplies at a time."""
    return F.pad(rows, (0, -rows.shape[1] % 4)) if rows.shape[1] % 4 else rows.contiguous()
