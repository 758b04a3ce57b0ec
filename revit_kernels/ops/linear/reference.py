"""The definition of the op, in plain PyTorch: every other backend is tested against this file."""

import math

import torch

from revit_kernels.ops.e4m3 import E4M3, E4M3_MAX
from revit_kernels.ops.linear.products import keeps


def refusal(step, args):
    return None


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _activate(h, activation):
    if activation is None:
        return h
    if activation == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    if activation == "gelu_tanh":
        return h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h * torch.sigmoid(h)


def _slope(h, activation):
    """The activation's derivative at h."""
    if activation is None:
        return torch.ones_like(h)
    if activation == "gelu":
        density = torch.exp(-h * h / 2) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * density
    if activation == "gelu_tanh":
        factor = math.sqrt(2 / math.pi)
        tanh = torch.tanh(factor * (h + 0.044715 * h**3))
        return 0.5 * (1 + tanh) + h * 0.5 * (1 - tanh * tanh) * factor * (1 + 3 * 0.044715 * h * h)
    s = torch.sigmoid(h)
    return s * (1 + h * (1 - s))


def _finish(h, activation, gate):
    if gate is None:
        return _activate(h, activation)
    first, second = h.chunk(2, -1)
    return _activate(first, activation) * second if gate == "first" else first * _activate(second, activation)


def forward(x, weight, bias, activation, gate, recorded):
    wide = _wide(x.dtype)
    h = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        h = h + bias.to(wide)
    y = _finish(h, activation, gate).to(x.dtype)
    return y, h.to(x.dtype) if keeps(recorded, activation, gate) else x.new_empty(0)


def backward(dy, x, weight, bias, kept, activation, gate, need_x, need_weight):
    wide = _wide(x.dtype)
    none = x.new_empty(0)
    dy, kept = dy.to(wide), kept.to(wide)
    if gate is not None:
        first, second = kept.chunk(2, -1)
        if gate == "first":
            parts = dy * second * _slope(first, activation), dy * _activate(first, activation)
        else:
            parts = dy * _activate(second, activation), dy * first * _slope(second, activation)
        dh = torch.cat(parts, -1)
    else:
        dh = dy if activation is None else dy * _slope(kept, activation)
    dx = (dh @ weight.to(wide)).to(x.dtype) if need_x else none
    dweight = (dh.T @ x.to(wide)).to(weight.dtype) if need_weight else none
    return dx, dweight, none if bias is None else dh.sum(0).to(bias.dtype)


def quantize(x, group):
    grouped = x.to(_wide(x.dtype)).unflatten(1, (-1, group))
    scale = grouped.abs().amax(2) / E4M3_MAX
    scale = torch.where(scale == 0, 1, scale)
    values = (grouped / scale[:, :, None]).flatten(1)
    return values.to(E4M3), scale.float()


def fp8(x, x_scale, weight, weight_scale, bias, activation, gate, dtype, quantized):
    wide = _wide(dtype)
    values = x.to(wide).unflatten(1, (x_scale.shape[1], -1)) * x_scale.to(wide)[:, :, None]
    h = values.flatten(1) @ (weight.to(wide) * weight_scale.to(wide)[:, None]).T
    if bias is not None:
        h = h + bias.to(wide)
    y = _finish(h, activation, gate)
    return quantize(y, 128) if quantized else (y.to(dtype), x_scale.new_empty(0))
