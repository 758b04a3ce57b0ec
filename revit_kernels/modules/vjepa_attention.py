"""Attention of V-JEPA 2: queries and keys turned by the frame, row and column of their token."""

from typing import NamedTuple

import torch
from torch import Tensor

from revit_kernels.modules.attention import Attention, attend
from revit_kernels.modules.linear import linear
from revit_kernels.packing import Packing


class Turn(NamedTuple):
    """What multiplies each token's first channels, and their pairs' other halves: (capacity, channels) fp32 each.

    No rotation, so no Rotary: the two channels of a pair have angles of their own.
    """

    cos: Tensor
    sin: Tensor


def turned(x: Tensor, turn: Turn) -> Tensor:
    """x (capacity, heads, head_dim), whose pairs are neighbours, in its own dtype; computed in fp32."""
    channels = turn.cos.shape[1]
    own = x[..., :channels].to(torch.promote_types(x.dtype, torch.float32))
    first, second = own.unflatten(-1, (-1, 2)).unbind(-1)
    other = torch.stack([-second, first], -1).flatten(-2)
    own = own * turn.cos[:, None] + other * turn.sin[:, None]
    return torch.cat([own.to(x.dtype), x[..., channels:]], -1)


class TurnedAttention(Attention):
    """Multi-head self-attention over a clip. x: (capacity, dim) with its packing, and what turns its tokens."""

    def forward(self, x: Tensor, *, packing: Packing, turn: Turn | None = None) -> Tensor:
        q, k, v = self.project(x)
        if turn is not None:
            q, k = turned(q, turn), turned(k, turn)
        return self.proj_drop(linear(self.proj, attend(q, k, v, packing, self.kernel_scale()).flatten(1)))


def angles(menu: tuple[tuple[int, int, int], ...], head_dim: int, device: torch.device) -> Turn:
    """cos and sin of the cells of every grid (frames, rows, columns) of the menu, one grid after the other.

    Each axis has 2 * (head_dim // 3 // 2) channels; their frequencies stand in them twice, one list after the other,
    though neighbours are the pairs that turn: as in V-JEPA 2, whose weights have learnt so.
    """
    channels = 2 * (head_dim // 3 // 2)
    omega = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float32, device=device) / (channels / 2))
    parts = []
    for grid in menu:
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in grid), indexing="ij")
        turns = [(axis.flatten()[:, None] * omega).repeat(1, 2) for axis in axes]
        parts.append(torch.cat(turns, 1))
    table = torch.cat(parts) if parts else omega.new_empty(0, 3 * channels)
    return Turn(table.cos(), table.sin())
