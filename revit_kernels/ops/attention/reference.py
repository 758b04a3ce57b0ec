"""The definition of the op, in plain PyTorch: every other backend is tested against this file.

Scores and the softmax are computed in fp32 (or float64); the weights, and in the backward pass the gradients of the
scores, are rounded to the dtype of the tensors before they are multiplied with them, as flash attention does. Queries
and keys that a rotary table turns are rounded likewise, once; their gradients are turned back before they are rounded.
"""

import torch

from revit_kernels.ops.attention.rotary import rotate


def refusal(step, args):
    return None


def _images(cu_seqlens, cu_seqlens_k):
    """The slices of query rows and of key rows of each image that has both."""
    q, k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:]):
        if q1 > q0 and k1 > k0:
            yield slice(q0, q1), slice(k0, k1)


def _turned(x, rows, cos, sin, row, half, back=False):
    return x if cos is None else rotate(x, cos, sin, row[rows], half, back=back)


def forward(
    q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, cos=None, sin=None, row=None, half=False
):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)  # (tokens, heads, head_dim)
    lse = torch.zeros(q.shape[:2], dtype=wide, device=q.device)  # (tokens, heads)
    for rows, keys in _images(cu_seqlens, cu_seqlens_k):
        qi, ki = (_turned(x[at], at, cos, sin, row, half).to(x.dtype).to(wide) for x, at in ((q, rows), (k, keys)))
        scores = torch.einsum("qhd,khd->hqk", qi, ki) * scale
        weights = torch.exp(scores - scores.amax(2, keepdim=True))
        mixed = torch.einsum("hqk,khd->qhd", weights.to(q.dtype).to(wide), v[keys].to(wide))
        out[rows] = (mixed / weights.sum(2).T[:, :, None]).to(q.dtype)
        lse[rows] = torch.logsumexp(scores, 2).T
    return out, lse


def backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens,
    max_seqlen,
    cu_seqlens_k,
    max_seqlen_k,
    scale,
    cos=None,
    sin=None,
    row=None,
    half=False,
):
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, keys in _images(cu_seqlens, cu_seqlens_k):
        qi, ki = (_turned(x[at], at, cos, sin, row, half).to(x.dtype).to(wide) for x, at in ((q, rows), (k, keys)))
        gi, vi = grad[rows].to(wide), v[keys].to(wide)
        weights = torch.exp(torch.einsum("qhd,khd->hqk", qi, ki) * scale - lse[rows].T[:, :, None])
        delta = (gi * out[rows].to(wide)).sum(2).T  # (heads, queries)
        slopes = weights * (torch.einsum("qhd,khd->hqk", gi, vi) - delta[:, :, None])  # gradients of the scores
        weights, slopes = (x.to(q.dtype).to(wide) for x in (weights, slopes))
        di, dj = torch.einsum("hqk,khd->qhd", slopes, ki) * scale, torch.einsum("hqk,qhd->khd", slopes, qi) * scale
        dq[rows] = _turned(di, rows, cos, sin, row, half, back=True).to(q.dtype)
        dk[keys] = _turned(dj, keys, cos, sin, row, half, back=True).to(q.dtype)
        dv[keys] = torch.einsum("hqk,qhd->khd", weights, gi).to(q.dtype)
    return dq, dk, dv
