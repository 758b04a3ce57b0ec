"""The definition of the op, in plain PyTorch: every other backend is tested against this file."""

import torch
import torch.nn.functional as F

from revit_kernels.ops.block import BlockWeights


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


def _norm(x, weight, bias, row, eps):
    y = F.layer_norm(x, x.shape[1:], eps=eps)
    if weight.ndim == 2:
        weight, bias = (t[row.clamp(0, len(t) - 1).long()] for t in (weight, bias))
    return (y * weight + bias).to(x.dtype)


def _attend(qkv, cu_seqlens, heads, scale):
    q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    y = torch.zeros_like(q)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        own = slice(start, end)
        scores = (q[:, own] @ k[:, own].transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
        y[:, own] = scores.softmax(-1).to(v.dtype) @ v[:, own]
    return y.transpose(0, 1).flatten(1)


def _activate(x, activation):
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def forward(x, cu_seqlens, row, *rest):
    *parameters, heads, eps1, eps2, scale, activation, kind = rest
    w = BlockWeights(*parameters)
    used = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    used[cu_seqlens[0] : cu_seqlens[-1]] = True
    x = x.masked_fill(~used, 0)
    dtype = x.dtype

    def linear(x, weight, bias):
        return _linear(x, weight, bias, kind).to(dtype)

    def add(x, branch, gamma):
        return x + (branch if gamma is None else branch * gamma)

    y = _norm(x, w.norm1, w.norm1_bias, row, eps1)
    y = _attend(linear(y, w.qkv, w.qkv_bias), cu_seqlens, heads, scale)
    x = add(x, linear(y, w.proj, w.proj_bias), w.gamma1).to(dtype)
    y = _norm(x, w.norm2, w.norm2_bias, row, eps2)
    y = _activate(linear(y, w.fc1, w.fc1_bias), activation)
    return add(x, linear(y, w.fc2, w.fc2_bias), w.gamma2).to(dtype).masked_fill(~used, 0)
