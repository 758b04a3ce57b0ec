"""Rotary positions: the angles of the cells of every grid of a batch, as timm's rotary embeddings give them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from revit_kernels.device_cache import numbers
from revit_kernels.dispatch import without_autocast
from revit_kernels.grids import Grid
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.packing import Packing

KINDS = ("cat", "dinov3", "mixed", "mrope")


def rows(packing: Packing) -> Tensor:
    """(capacity,) int32: the row of each token in a table that lists the cells of all the menu's grids, in order.

    -1 for prefix tokens, and for rows of no image.
    """
    if len(packing.menu) == 1 and packing.full:  # by few ops, of which Inductor of torch 2.11 compiles all
        cell = torch.arange(-packing.prefix, packing.max_seqlen - packing.prefix, dtype=torch.int32)
        return cell.clamp(min=-1).to(packing.device).repeat(packing.images)
    image = packing.image.clamp(min=0).long()
    tokens = torch.arange(packing.capacity, dtype=torch.int32, device=packing.device)
    if not packing.images:
        return torch.full_like(tokens, -1)
    cell = tokens - packing.cu_seqlens[image] - packing.prefix
    return torch.where((packing.image < 0) | (cell < 0), -1, cell + packing.placement[image, 2])


class RotaryPositions(nn.Module):
    """The angles by which a Vision Transformer turns queries and keys, of every image's own grid.

    kind:        "cat": a frequency per band and axis, positions 0, 1, 2 ...; "dinov3": positions from -1 to 1 whatever
                 the grid; "mixed": learned frequencies of both axes for each block and head, in `freqs`; "mrope": one
                 list of frequencies, dealt to no axis, rows and columns in turn
    head_dim:    channels of a head
    temperature: the base of the frequencies
    indexing:    which axis comes first: "ij" rows, "xy" columns
    offset:      added to positions ("cat", "dinov3")
    reference:   the grid of the training images, to which positions are scaled ("cat"); None: they are not
    half:        whether channel c turns with c + head_dim / 2 instead of its neighbour
    section:     of "mrope", how many frequencies no axis, rows and columns have at most
    augment:     (shift, jitter, rescale) of coordinates in training, drawn once a call; None for none of one
    depth, num_heads: of "mixed"

    Computes in float32 and keeps no table. Raises ValueError for a kind or a head_dim that is none.
    """

    def __init__(
        self,
        kind: str,
        head_dim: int,
        *,
        temperature: float = 10000.0,
        indexing: str = "ij",
        offset: float = 0.0,
        reference: Grid | None = None,
        half: bool = False,
        section: tuple[int, int, int] = (8, 12, 12),
        augment: tuple[float | None, float | None, float | None] = (None, None, None),
        depth: int = 1,
        num_heads: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"the kind of rotary positions must be one of {KINDS}, got {kind!r}")
        multiple = 2 if kind == "mrope" else 4
        if head_dim % multiple:
            raise ValueError(
                f"rotary positions of kind {kind!r} need a head_dim that is a multiple of {multiple}, got {head_dim}"
            )
        if indexing not in ("ij", "xy") or (kind == "mrope" and indexing != "ij"):
            raise ValueError(f"indexing must be 'ij' or 'xy', and 'ij' for mrope, got {indexing!r}")
        if kind == "mixed" and half:
            raise ValueError("rotary positions of kind 'mixed' turn neighbours: half must be False")
        self.kind, self.head_dim, self.temperature, self.indexing = kind, head_dim, float(temperature), indexing
        self.offset, self.reference, self.half = float(offset), reference, half or kind == "mrope"
        self.section, self.augment = tuple(section), tuple(augment)
        self.freqs = None
        if kind == "mixed":
            self.freqs = nn.Parameter(torch.empty(2, depth, num_heads, head_dim // 2, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Frequencies of both axes at right angles to each other, turned at random for each block and head."""
        if self.freqs is None:
            return
        like = {"device": self.freqs.device, "dtype": torch.float32}
        sizes = self.temperature ** (-torch.arange(0, self.head_dim, 4, **like) / self.head_dim)
        angles = torch.rand(*self.freqs.shape[1:3], 1, **like) * 2 * math.pi
        angles = torch.stack([angles, angles + math.pi / 2], -2)  # (depth, heads, 2, 1)
        with torch.no_grad():
            self.freqs.copy_(torch.stack([sizes * angles.cos(), sizes * angles.sin()]).flatten(-2))

    def _coordinates(self, menu: tuple[Grid, ...], device: torch.device) -> Tensor:
        """(cells of all the grids, 2) float32: row and column, or column and row."""
        h, w = (numbers([grid[axis] for grid in menu], device, torch.int64) for axis in (0, 1))
        cells = sum(h * w for h, w in menu)
        if len(menu) == 1:  # without what ONNX's exporter does not know
            grid = torch.zeros(cells, dtype=torch.int64, device=device)
        else:
            grid = torch.repeat_interleave(torch.arange(len(menu), device=device), h * w, output_size=cells)
        first = (h * w).cumsum(0) - h * w
        size = torch.stack([h, w], 1).float()[grid]
        cell, columns = (torch.arange(cells, device=device) - first[grid]).float(), size[:, 1]
        row = ((cell + 0.5) / columns).floor()  # exact; Inductor of torch 2.11 fails at the integers' division
        at = torch.stack([row, cell - row * columns], 1)
        if self.kind == "dinov3":
            at = 2.0 * ((at + 0.5 + self.offset) / size) - 1.0
        elif self.kind == "cat":
            at = at + self.offset
            if self.reference is not None:
                at = at / size * numbers(self.reference, device, torch.float32)
        at = self._augmented(at.flip(1) if self.indexing == "xy" else at)
        return at

    def _augmented(self, at: Tensor) -> Tensor:
        if not self.training:
            return at
        shift, jitter, rescale = self.augment
        if shift is not None:
            at = at + at.new_empty(2).uniform_(-shift, shift)
        if jitter is not None:
            at = at * at.new_empty(2).uniform_(-math.log(jitter), math.log(jitter)).exp()
        if rescale is not None:
            at = at * at.new_empty(1).uniform_(-math.log(rescale), math.log(rescale)).exp()
        return at

    def angles(self, menu: tuple[Grid, ...], device: torch.device) -> Tensor:
        """(cells of all the grids, head_dim / 2) float32; of "mixed" (depth, cells, heads, head_dim / 2)."""
        at = self._coordinates(menu, device)
        if self.kind == "mixed":
            fx, fy = self.freqs.float()[:, :, None]  # (depth, 1, heads, head_dim / 2)
            return at[:, 0, None, None] * fx + at[:, 1, None, None] * fy
        if self.kind == "mrope":
            shares = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
            bands = 1.0 / (self.temperature**shares)
            channel, (_, of_rows, of_columns) = torch.arange(len(bands), device=device), self.section
            row, column = (channel % 3 == 1) & (channel < 3 * of_rows), (channel % 3 == 2) & (channel < 3 * of_columns)
            return torch.where(row, at[:, :1], torch.where(column, at[:, 1:], 0.0)) * bands
        count = self.head_dim // 4
        steps = torch.arange(count, device=device).float()
        if self.kind == "dinov3":
            periods = self.temperature ** (2.0 * steps / (self.head_dim // 2))
            return (2 * math.pi * at[:, :, None] / periods).flatten(1)
        return (at[:, :, None] * (1.0 / (self.temperature ** (steps / count)))).flatten(1)

    def tables(self, menu: tuple[Grid, ...], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Cos and sin of every cell of the menu's grids: a pair for each block ("mixed"), or one for all."""
        with without_autocast(device):
            angles = self.angles(menu, device)
            cos, sin = angles.cos(), angles.sin()
        return list(zip(cos.unbind(), sin.unbind())) if self.kind == "mixed" else [(cos, sin)]

    def of(self, tables: list[tuple[Tensor, Tensor]], packing: Packing) -> list[Rotary]:
        """What `tables` gave for the packing's menu, as `ops.attention` takes it."""
        row = rows(packing)
        return [Rotary(cos, sin, row, self.half) for cos, sin in tables]

    def forward(self, packing: Packing) -> list[Rotary]:
        """For each block its own angles ("mixed"), or those of all."""
        return self.of(self.tables(packing.menu, packing.device), packing)
