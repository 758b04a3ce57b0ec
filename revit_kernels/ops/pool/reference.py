"""The definition of the op, in plain PyTorch: every other backend is tested against this file."""

import torch


def refusal(step, args):
    return None


def pooled_rows(cu_seqlens, kind, prefix, include_prefix):
    """First and last + 1 of the rows that each image pools."""
    starts, ends = cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
    if kind == "token":
        return [(start, min(start + 1, end)) for start, end in zip(starts, ends)]
    return [(start if include_prefix else min(start + prefix, end), end) for start, end in zip(starts, ends)]


def forward(x, cu_seqlens, kind, prefix, include_prefix):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], dtype=wide)
    for image, (start, end) in enumerate(pooled_rows(cu_seqlens, kind, prefix, include_prefix)):
        tokens = x[start:end].to(wide)
        if start == end:
            continue
        if kind == "token":
            y[image] = tokens[0]
        elif kind == "avg":
            y[image] = tokens.mean(0)
        elif kind == "max":
            y[image] = tokens.amax(0)
        else:
            y[image] = 0.5 * (tokens.amax(0) + tokens.mean(0))
    return y.to(x.dtype)


def backward(grad, x, cu_seqlens, tokens, kind, prefix, include_prefix):
    wide = torch.promote_types(grad.dtype, torch.float32)
    dx = grad.new_zeros(tokens, grad.shape[1], dtype=wide)
    for image, (start, end) in enumerate(pooled_rows(cu_seqlens, kind, prefix, include_prefix)):
        if start == end:
            continue
        own = grad[image].to(wide) * (0.5 if kind == "avgmax" else 1)
        if kind in ("token", "avg", "avgmax"):
            dx[start:end] += own / (end - start)
        if kind in ("max", "avgmax"):
            largest = x[start:end] == x[start:end].amax(0)
            dx[start:end] += largest * (own / largest.sum(0))
    return dx.to(grad.dtype)
