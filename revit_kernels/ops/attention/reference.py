"""The definition of the op, in plain PyTorch: every other backend is tested against this file.

Scores and the softmax are computed in fp32 (or float64); the weights, and in the backward pass the gradients of the
scores, are rounded to the dtype of the tensors before they are multiplied with them, as flash attention does.
"""

import torch


def refusal(step, args):
    return None


def _images(cu_seqlens, cu_seqlens_k):
    """The slices of query rows and of key rows of each image that has both."""
    q, k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:]):
        if q1 > q0 and k1 > k0:
            yield slice(q0, q1), slice(k0, k1)


def forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)  # (tokens, heads, head_dim)
    lse = torch.zeros(q.shape[:2], dtype=wide, device=q.device)  # (tokens, heads)
    for rows, keys in _images(cu_seqlens, cu_seqlens_k):
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(wide), k[keys].to(wide)) * scale
        weights = torch.exp(scores - scores.amax(2, keepdim=True))
        mixed = torch.einsum("hqk,khd->qhd", weights.to(q.dtype).to(wide), v[keys].to(wide))
        out[rows] = (mixed / weights.sum(2).T[:, :, None]).to(q.dtype)
        lse[rows] = torch.logsumexp(scores, 2).T
    return out, lse


def backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, keys in _images(cu_seqlens, cu_seqlens_k):
        qi, gi, ki, vi = q[rows].to(wide), grad[rows].to(wide), k[keys].to(wide), v[keys].to(wide)
        weights = torch.exp(torch.einsum("qhd,khd->hqk", qi, ki) * scale - lse[rows].T[:, :, None])
        delta = (gi * out[rows].to(wide)).sum(2).T  # (heads, queries)
        slopes = weights * (torch.einsum("qhd,khd->hqk", gi, vi) - delta[:, :, None])  # gradients of the scores
        weights, slopes = (x.to(q.dtype).to(wide) for x in (weights, slopes))
        dq[rows] = (torch.einsum("hqk,khd->qhd", slopes, ki) * scale).to(q.dtype)
        dk[keys] = (torch.einsum("hqk,qhd->khd", slopes, qi) * scale).to(q.dtype)
        dv[keys] = torch.einsum("hqk,qhd->khd", weights, gi).to(q.dtype)
    return dq, dk, dv
