"""Rotary position embedding of queries and keys: what it computes, and the gradients of its table."""

from typing import NamedTuple

import torch
from torch import Tensor

from revit_kernels.dispatch import one_device


class Rotary(NamedTuple):
    """Angles by which pairs of channels of q and k are turned: one row for each position, not for each token.

    cos:  (positions, pairs) float32, or (positions, heads, pairs) where each head has angles of its own
    sin:  like cos, of the same angles
    row:  (tokens,) int32: the row of cos and sin for each token; negative for a token that stays as it is
    half: which channels are pairs: (0, pairs), (1, pairs + 1), ...; or (0, 1), (2, 3), ... if False

    Channels from 2 * pairs on stay as they are.
    """

    cos: Tensor
    sin: Tensor
    row: Tensor
    half: bool = False


def check(rotary, q: Tensor, crossed: bool) -> None:
    """Raise ValueError where the table does not fit the queries. crossed: whether the keys are of other tokens"""
    if not isinstance(rotary, Rotary):
        raise ValueError(f"rotary must be a Rotary of cos, sin, row and half, got {type(rotary).__name__}")
    if crossed:
        raise ValueError("rotary needs queries and keys of the same tokens: leave out cu_seqlens_k")
    cos, sin, row, _ = rotary
    tokens, heads, dim = q.shape
    per_head = cos.ndim == 3 and cos.shape[1] == heads
    if not (cos.ndim == 2 or per_head) or not 1 <= cos.shape[-1] <= dim // 2:
        expected = f"(positions, pairs) or (positions, {heads}, pairs), with 1 to {dim // 2} pairs"
        raise ValueError(f"cos of rotary must be {expected}, got {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin of rotary must have the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"cos and sin of rotary must be float32, got {cos.dtype} and {sin.dtype}")
    if row.shape != (tokens,) or row.dtype != torch.int32:
        raise ValueError(f"row of rotary must be ({tokens},) int32, got {tuple(row.shape)} {row.dtype}")
    one_device(q=q, cos=cos, sin=sin, row=row)


def _halves(x: Tensor, pairs: int, half: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channel of each pair, (..., pairs) each."""
    return (
        (x[..., :pairs], x[..., pairs : 2 * pairs]) if half else (x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2])
    )


def _of_tokens(cos: Tensor, sin: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, heads or 1, pairs) each."""
    # Widened first: of a clamped int32, ONNX's exporter of torch 2.11 writes a graph that names what it lacks.
    stays, at = (row < 0).view(-1, *[1] * (cos.ndim - 1)), row.long().clamp(0, cos.shape[0] - 1)
    cos, sin = torch.where(stays, 1.0, cos[at]), torch.where(stays, 0.0, sin[at])
    return (cos, sin) if cos.ndim == 3 else (cos[:, None], sin[:, None])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, row: Tensor, half: bool, *, back: bool = False) -> Tensor:
    """x turned by its angles, or back by them; what is not turned stays. x: (tokens, heads, head_dim)

    Returns (tokens, heads, head_dim) in the wider dtype of x and cos, in which it is computed.
    """
    pairs = cos.shape[-1]
    cos, sin = _of_tokens(cos, sin, row)
    sin = -sin if back else sin
    first, second = _halves(x, pairs, half)
    turned = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat(turned, -1) if half else torch.stack(turned, -1).flatten(-2)
    return torch.cat([turned, x[..., 2 * pairs :].to(turned.dtype)], -1)


def table_gradients(inputs, grads, cos, sin, row, half: bool, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of cos and sin, from those of q and k, in the same order in every run.

    inputs, grads: q and k as they came, and their gradients; (tokens, heads, head_dim) each
    """
    pairs = cos.shape[-1]
    tokens = torch.arange(row.shape[0], device=row.device)
    row = torch.where(tokens < cu_seqlens[-1], row, -1)  # rows of no image may hold NaN
    stays = (row < 0)[:, None, None]
    dcos = dsin = 0
    for x, dx in zip(inputs, grads):
        x0, x1 = _halves(x.masked_fill(stays, 0).to(cos.dtype), pairs, half)
        g0, g1 = _halves(rotate(dx, cos, sin, row, half), pairs, half)  # the gradient of what was turned
        dcos, dsin = dcos + x0 * g0 + x1 * g1, dsin + x0 * g1 - x1 * g0
    if cos.ndim == 2:
        dcos, dsin = dcos.sum(1), dsin.sum(1)
    at = row.clamp(0, cos.shape[0] - 1).long()

    def added(x: Tensor) -> Tensor:  # of all tokens at one position, without atomics
        rows = torch.ops.aten.embedding_dense_backward(x.flatten(1), at, cos.shape[0], -1, False)
        return rows.view(cos.shape)

    return added(dcos), added(dsin)
