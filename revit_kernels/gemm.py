"""The vendor's matrix product for packed tokens: what a row becomes does not depend on the rows beside it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

PACKED_ROWS = 1024  # the number of rows that a packed weight is laid out for; any other number runs too

_kept = WeakIdKeyDictionary()  # weight: (its version and address when it was packed, its packed layout)


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's inner product takes these: on a CPU it is up to twice F.linear in fp32, and equal in bf16."""
    return (
        not torch.compiler.is_compiling()  # the compiler chooses, and fuses, by itself
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(weight) in (Tensor, torch.nn.Parameter)
    )


def _state(weight: Tensor) -> tuple[int, int]:
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)


def prepack(weight: Tensor) -> bool:
    """Keep the weight in oneDNN's blocked layout beside the weight itself, for as long as the weight lives unchanged.

    Saves a pass over the weight in every `linear`, which is what a few tokens at a time cost most. A write to the
    weight is noticed and ends it, except one through `weight.data`: after such a write, prepack again.
    Returns whether this device and dtype have such a layout.
    """
    with torch.no_grad():
        if not _onednn(weight, weight):
            return False
        _kept[weight] = (_state(weight), _pack(weight))
    return True


def _layout(weight: Tensor) -> Tensor:
    """The weight as oneDNN is to have it. In fp32 packed anew if it is not kept so: left to itself oneDNN picks a
    layout by the number of rows, and with it another order of adding. In bf16 every layout gives the same bits."""
    kept = _kept.get(weight)
    if kept is not None:
        if kept[0] == _state(weight):
            return kept[1]
        del _kept[weight]
    return _pack(weight) if weight.dtype == torch.float32 else weight.detach()


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
    y = torch.ops.mkldnn._linear_pointwise(x.detach(), _layout(weight), bias, attribute, [], algorithm)
    return y[:rows]
