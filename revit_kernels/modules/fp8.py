"""Linear layers in e4m3 for inference: see ops/linear/fp8.py for where the numbers are quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_kernels.ops.e4m3 import GROUP
from revit_kernels.ops.linear.fp8 import Quantized, linear_fp8, quantize


class Fp8Linear(nn.Module):
    """A Linear whose weight is e4m3 with a scale per output, and whose inputs are quantized per row as they come.

    weight: (out, in) float8_e4m3fn
    scale:  (out, 1) float32
    """

    def __init__(self, weight: Quantized, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.values)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, module: nn.Linear) -> Fp8Linear:
        bias = None if module.bias is None else module.bias.detach()
        return cls(quantize(module.weight.detach()), bias).train(module.training)

    def _apply(self, fn, recurse=True):
        """Behind .to(dtype), .half() and the like: values and scales are bits, not numbers, to change the dtype of."""
        values, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        self.weight, self.scale = values.to(self.weight.device), scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor | Quantized, activation: str | None = None, quantized: bool = False):
        """activation(x @ weight.T + bias). x: (..., in), perhaps quantized already

        quantized: whether the result is, with a scale for every 128 columns of a row
        """
        if not isinstance(x, Quantized):
            if torch.is_grad_enabled() and x.requires_grad:
                raise NotImplementedError("a model quantized to fp8 gives no gradients: call it in torch.no_grad()")
            rows = quantize(x.reshape(-1, x.shape[-1]))._replace(dtype=product_dtype(x))
        else:
            rows = x._replace(values=x.values.reshape(-1, x.shape[-1]))
        weight = Quantized(self.weight, self.scale)
        y = linear_fp8(rows, weight, self.bias, activation=activation, quantized=quantized)
        shape = (*x.shape[:-1], self.out_features)
        return y._replace(values=y.values.view(shape)) if quantized else y.view(shape)

    @property
    def quantizes_groups(self) -> bool:
        """Whether its result can have a scale for every 128 columns."""
        return self.out_features % GROUP == 0


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a Linear gives for x: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def fits(module: nn.Linear) -> bool:
    """Whether the tensor cores take the layer in e4m3: multiples of 16 both ways."""
    return module.in_features % 16 == 0 and module.out_features % 16 == 0
