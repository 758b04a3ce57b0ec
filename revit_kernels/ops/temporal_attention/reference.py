"""The definition of the op, in plain PyTorch: every other backend is tested against this file.

Scores and the softmax are computed in fp32 (or float64). The weights, and in the backward pass the gradients of the
scores, are rounded to the dtype of the tensors before they are multiplied with them, as flash attention does.
"""

import torch


def refusal(step, args):
    return None


def _sequences(cu_seqlens, frames, prefix):
    """Of each clip, (positions, frames) int64: the rows of every sequence."""
    for start, end, count in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), frames.tolist()):
        stride = (end - start) // count if count > 0 else 0
        if stride > prefix:
            first = torch.arange(start + prefix, start + stride, device=cu_seqlens.device)
            yield first[:, None] + stride * torch.arange(count, device=cu_seqlens.device)


def forward(q, k, v, cu_seqlens, frames, max_frames, prefix, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)  # (tokens, heads, head_dim)
    lse = torch.zeros(q.shape[:2], dtype=wide, device=q.device)  # (tokens, heads)
    for rows in _sequences(cu_seqlens, frames, prefix):
        qi, ki, vi = (x[rows].to(wide) for x in (q, k, v))  # (positions, frames, heads, head_dim)
        scores = torch.einsum("pqhd,pkhd->phqk", qi, ki) * scale
        weights = torch.exp(scores - scores.amax(3, keepdim=True))
        mixed = torch.einsum("phqk,pkhd->pqhd", weights.to(q.dtype).to(wide), vi)
        out[rows] = (mixed / weights.sum(3).transpose(1, 2)[..., None]).to(q.dtype)
        lse[rows] = torch.logsumexp(scores, 3).transpose(1, 2)
    return out, lse


def backward(grad, q, k, v, out, lse, cu_seqlens, frames, max_frames, prefix, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _sequences(cu_seqlens, frames, prefix):
        gi, qi, ki, vi, oi = (x[rows].to(wide) for x in (grad, q, k, v, out))
        weights = torch.exp(torch.einsum("pqhd,pkhd->phqk", qi, ki) * scale - lse[rows].transpose(1, 2)[..., None])
        delta = (gi * oi).sum(3).transpose(1, 2)  # (positions, heads, frames)
        slopes = weights * (torch.einsum("pqhd,pkhd->phqk", gi, vi) - delta[..., None])  # gradients of the scores
        weights, slopes = (x.to(q.dtype).to(wide) for x in (weights, slopes))
        dq[rows] = (torch.einsum("phqk,pkhd->pqhd", slopes, ki) * scale).to(q.dtype)
        dk[rows] = (torch.einsum("phqk,pqhd->pkhd", slopes, qi) * scale).to(q.dtype)
        dv[rows] = torch.einsum("phqk,pqhd->pkhd", weights, gi).to(q.dtype)
    return dq, dk, dv
