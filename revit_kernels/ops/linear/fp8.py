"""Linear layers on e4m3 numbers, for inference: rows quantized as they come, the weight once, per output.

A number is its e4m3 value times a scale. Where a whole row is known (LayerNorm, `quantize`) it has one scale. A
GELU's result is wide and spread over many blocks of a product, none of which sees a whole row: there every 128 columns
of a row have a scale of their own, taken from the block that holds them, and the next product applies it every 128
inputs. The other way, a bf16 result, the rows' maxima, and a pass to divide by them, reads and writes the widest tensor
of the network twice more, which costs more than e4m3 saves; and finer scales are more accurate.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from revit_kernels.dispatch import register
from revit_kernels.ops.e4m3 import E4M3, GROUP
from revit_kernels.ops.linear import check, choice


class Quantized(NamedTuple):
    """Numbers in e4m3, of which each stands for itself times its scale.

    values: (..., columns) float8_e4m3fn
    scale:  (rows, groups) float32, of the columns of a row in as many equal groups
    dtype:  of the numbers that these stand in for, and of a product with them
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def numel(self) -> int:
        return self.values.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        rows = self.values.reshape(-1, self.scale.shape[1], self.shape[-1] // self.scale.shape[1]).to(wide)
        return (rows * self.scale.to(wide)[:, :, None]).to(dtype).view(self.shape)


def _check_group(x, group) -> None:
    if x.ndim != 2 or not x.is_floating_point() or not x.shape[1]:
        raise ValueError(f"x must be (rows, columns) of a floating-point dtype, got {tuple(x.shape)} {x.dtype}")
    if group < 1 or x.shape[1] % group:
        raise ValueError(f"the columns must be a multiple of the group, got x {tuple(x.shape)} and {group}")


def _fake_quantize(x, group, backend):
    _check_group(x, group)
    return torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[0], x.shape[1] // group, dtype=torch.float32)


def _fake_fp8(x, x_scale, weight, weight_scale, bias, activation, gate, dtype, quantized, backend):
    rows, columns = x.shape[0], weight.shape[0] // (2 if gate else 1)
    if quantized:
        return x.new_empty(rows, columns), x_scale.new_empty(rows, columns // GROUP)
    return x.new_empty(rows, columns, dtype=dtype), x_scale.new_empty(0)


_quantize = register(
    "linear",
    "quantize",
    "(Tensor x, int group, str? backend) -> (Tensor, Tensor)",
    _fake_quantize,
    check=lambda args: _check_group(*args),
)
_fp8 = register(
    "linear",
    "fp8",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation, str? gate,"
    " ScalarType dtype, bool quantized, str? backend) -> (Tensor, Tensor)",
    _fake_fp8,
    lambda args: choice.fp8_order(*args),
    check=lambda args: _check_fp8(*args[:3], args.weight_scale.unsqueeze(-1), *args[4:7], args.quantized),
)


def _check_fp8(x, x_scale, weight, weight_scale, bias, activation, gate, quantized) -> None:
    check(x, weight, bias, activation, gate)
    for name, values, scale, groups in (
        ("x", x, x_scale, {1, x.shape[1] / GROUP}),
        ("weight", weight, weight_scale, {1}),
    ):
        rows = values.shape[0]
        if values.dtype != E4M3:
            raise ValueError(f"{name} must be of {E4M3}, got {values.dtype}")
        if scale.ndim != 2 or scale.shape[0] != rows or scale.shape[1] not in groups:
            wanted = " or ".join(f"({rows}, {int(g)})" for g in sorted(groups) if g == int(g))
            raise ValueError(f"the scale of {name} must be {wanted}, got {tuple(scale.shape)}")
        if scale.dtype != torch.float32:
            raise ValueError(f"the scale of {name} must be of torch.float32, got {scale.dtype}")
        if not scale.is_contiguous():
            raise ValueError(f"the scale of {name} must be contiguous, got strides {scale.stride()}")
    columns = weight.shape[0] // (2 if gate else 1)
    if quantized and columns % GROUP:
        raise ValueError(f"a quantized result has a scale every {GROUP} columns, got {columns} columns")


def quantize(x: Tensor, group: int | None = None, backend: str | None = None) -> Quantized:
    """x (rows, columns) in e4m3, with a scale for each row, or for every `group` columns of it.

    A scale brings the largest number among its own to 448, e4m3's largest; it is 1 where all are zero.
    Raises ValueError where x is no such matrix, or its columns no multiple of the group.
    """
    group = x.shape[-1] if group is None and x.ndim else group
    _check_group(x, group)
    return Quantized(*_quantize(x, group, backend), x.dtype)


def linear_fp8(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: str | None = None,
    quantized: bool = False,
    backend: str | None = None,
) -> Tensor | Quantized:
    """`linear` of quantized numbers: no gradients.

    x:      values (rows, in), with one scale a row, or one for every 128 inputs of it
    weight: values (out, in), with one scale a row, which is an output
    quantized: give the result in e4m3 with a scale for every 128 columns of a row, in place of the dtype of x
    Other arguments are those of `linear`.

    Returns (rows, columns), accumulated in fp32 (on Hopper, whose tensor cores keep about 14 bits of an e4m3 sum: exact
    only between the groups of 128 inputs). Raises ValueError for a wrong shape or dtype, NotImplementedError where no
    backend takes the arguments.
    """
    _check_fp8(x.values, x.scale, weight.values, weight.scale, bias, activation, gate, quantized)
    args = (x.values, x.scale, weight.values, weight.scale[:, 0], bias, activation, gate, x.dtype, quantized)
    y, scale = _fp8(*args, backend)
    return Quantized(y, scale, x.dtype) if quantized else y
