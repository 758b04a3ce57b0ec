"""The definition of the op, in plain PyTorch: every other backend is tested against this file."""

import torch

from revit_kernels.ops.attention.rotary import rotate
from revit_kernels.ops.block import BlockWeights, Eps
from revit_kernels.ops.linear.products import activate


def refusal(*_):
    return None


def _steps(x):
    """x (rows, inputs) on 256 steps a row, from the least to the largest number, zero among them."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    inverse = torch.where(step > 0, 1 / step, 0)
    zero = (-low * inverse).round()
    return step * ((x * inverse + zero).round().clamp(0, 255) - zero)


def _linear(x, weight, bias, kind):
    x, weight = x.to(torch.promote_types(x.dtype, torch.float32)), weight.to(x.dtype)
    if kind == "int8":
        step = weight.abs().amax(1, keepdim=True).to(x.dtype) / 127
        weight = (torch.where(step > 0, weight / step, 0)).round() * step
        x = _steps(x)
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias


def _norm(x, weight, bias, row, eps, rms):
    """x (tokens, ..., dim), over its last dimension."""
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide if rms else wide - wide.mean(-1, keepdim=True)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight.ndim == 2:
        if row is None:
            raise ValueError("norms of several rows need a row for each token")
        at = row.clamp(0, len(weight) - 1).long()
        weight, bias = (None if t is None else t[at].view(-1, *[1] * (x.ndim - 2), t.shape[1]) for t in (weight, bias))
    return (y * weight if bias is None else y * weight + bias).to(x.dtype)


def _attend(q, k, v, cu_seqlens, scale):
    """q, k, v: (tokens, heads, head_dim)"""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    y = torch.zeros_like(q)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        own = slice(start, end)
        scores = (q[:, own] @ k[:, own].transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
        y[:, own] = scores.softmax(-1).to(v.dtype) @ v[:, own]
    return y.transpose(0, 1).flatten(1)


def _activate(x, activation):
    return x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else activate(x, activation)


def forward(x, cu_seqlens, row, *rest):
    w = BlockWeights(*rest[: len(BlockWeights._fields)])
    heads, eps, rms, scale, activation, cos, sin, rotary_row, half, kind = rest[len(w) :]
    used = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    used[cu_seqlens[0] : cu_seqlens[-1]] = True
    x = x.masked_fill(~used, 0)
    dtype, eps = x.dtype, Eps(*eps)

    def linear(x, name):
        return _linear(x, getattr(w, name), getattr(w, f"{name}_bias"), kind).to(dtype)

    def norm(x, name):
        return _norm(x, getattr(w, name), getattr(w, f"{name}_bias"), row, getattr(eps, name), rms)

    def add(x, branch, gamma):
        return (x + (branch if gamma is None else branch * gamma)).to(dtype)

    q, k, v = linear(norm(x, "norm1"), "qkv").unflatten(1, (3, heads, -1)).unbind(1)
    q, k = norm(q, "q_norm"), norm(k, "k_norm")
    if cos is not None:
        q, k = (rotate(t, cos, sin, rotary_row, half).to(dtype) for t in (q, k))
    y = norm(_attend(q, k, v, cu_seqlens, scale), "attended_norm")
    x = add(x, linear(y, "proj"), w.gamma1)
    y = norm(x, "norm2")
    hidden = _activate(linear(y, "fc1"), activation)
    hidden = hidden if w.fc1_x is None else hidden * linear(y, "fc1_x")
    return add(x, linear(norm(hidden, "hidden_norm"), "fc2"), w.gamma2).masked_fill(~used, 0)
