"""The vendor's matrix product for packed tokens: what a row becomes does not depend on the rows beside it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

PACKED_ROWS = 1024  # the number of rows that a packed weight is laid out for; any other number runs too

_packed = WeakIdKeyDictionary()  # parameter: ((version, address), its packed layout)


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's inner product takes these: on a CPU it is up to twice F.linear in fp32, and equal in bf16."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(weight) in (Tensor, torch.nn.Parameter)
    )


def _pack(weight: Tensor) -> Tensor:
    """The weight in oneDNN's blocked layout, kept until the weight changes or goes away."""
    version = weight._version if not weight.is_inference() else 0
    key = weight if isinstance(weight, torch.nn.Parameter) else None  # a temporary is not worth keeping
    if key is not None and (kept := _packed.get(key)) and kept[0] == (version, weight.data_ptr()):
        return kept[1]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
    if key is not None:
        _packed[key] = ((version, weight.data_ptr()), packed)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """x @ weight.T + bias, then the activation.

    x:      (rows, in)
    weight: (out, in)
    bias:   (out,) or None
    activation: None, "gelu" (erf) or "gelu_tanh"

    Returns (rows, out) in the dtype of x, accumulated in fp32 by the vendor's library (oneDNN, cuBLASLt).
    """
    if not _onednn(x, weight):
        y = F.linear(x, weight, bias)
        return y if activation is None else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    rows = x.shape[0]
    if rows == 1:  # one row alone would take oneDNN's matrix-vector path, which adds in another order
        x = x.expand(2, -1).contiguous()
    attribute, algorithm = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}[activation]
    bias = None if bias is None else bias.detach().to(x.dtype)
    y = torch.ops.mkldnn._linear_pointwise(x.detach(), _pack(weight), bias, attribute, [], algorithm)
    return y[:rows]
