"""A list of images at their own sizes as two ops: torch.compile then knows no size, and compiles no size anew."""

import torch
from torch import Tensor

from revit_kernels.grids import native_grid
from revit_kernels.ops.patch_embed import patch_embed
from revit_kernels.ops.pos_embed import pos_embed
from revit_kernels.packing import Packing

_LIMITS = "SymInt[] patch_size, SymInt max_tokens, SymInt prefix_tokens, bool channels_last"


def _packing(images, patch_size, max_tokens, prefix_tokens, channels_last) -> Packing:
    at = slice(0, 2) if channels_last else slice(1, 3)
    grids = [native_grid(tuple(image.shape[at]), tuple(patch_size), max_tokens) for image in images]
    return Packing.from_grids(grids, prefix_tokens, device=images[0].device)


def _places(images, *limits):
    """Boundaries, each token's image, and a tensor of as many rows as the longest image has patches."""
    packing = _packing(images, *limits)
    longest = torch.empty(packing.max_seqlen - packing.prefix, dtype=torch.int8, device=packing.device)
    return packing.cu_seqlens.clone(), packing.image.clone(), longest


def _fake_places(images, *limits):
    context, numbers = torch.library.get_ctx(), images[0].new_empty((), dtype=torch.int32)
    tokens, longest = context.new_dynamic_size(), context.new_dynamic_size()
    return numbers.new_empty(len(images) + 1), numbers.new_empty(tokens), numbers.new_empty(longest, dtype=torch.int8)


def _embed(images, weight, bias, table, prefix, image, mean, std, resize, interpolation, antialias, *limits):
    packing = _packing(images, *limits)
    how = {"interpolation": interpolation, "antialias": antialias}
    pos = None if table is None else pos_embed(table, packing.menu, **how)
    options = {"mean": mean, "std": std, "interpolation": resize, "channels_last": limits[-1]}
    return patch_embed(images, weight, bias, packing, pos=pos, prefix=prefix, **options)


for _name, _schema, _run, _fake in (
    ("patch_embed_places", f"(Tensor[] images, {_LIMITS}) -> (Tensor, Tensor, Tensor)", _places, _fake_places),
    (
        "patch_embed_listed",
        "(Tensor[] images, Tensor weight, Tensor? bias, Tensor? table, Tensor? prefix, Tensor image, float[]? mean, "
        f"float[]? std, str resize, str interpolation, bool antialias, {_LIMITS}) -> Tensor",
        _embed,
        lambda images, weight, bias, table, prefix, image, *_: weight.new_empty(image.shape[0], weight.shape[0]),
    ),
):
    torch.library.define(f"revit_kernels::{_name}", _schema)
    torch.library.register_fake(f"revit_kernels::{_name}", _fake)
    torch.library.impl(f"revit_kernels::{_name}", "CompositeExplicitAutograd", _run)


def embed_listed(images: list[Tensor], weight, bias, table, prefix, statistics: dict, how: tuple, limits: tuple):
    """The packed tokens (tokens, dim), with positions, of images at their own sizes, and their packing.

    table:      (rows, columns, dim) positions, or None
    prefix:     (prefix tokens, dim) or None
    statistics: mean and std of uint8 images, else nothing
    how:        how images are resized; interpolation and antialias of the positions
    limits:     patch size, most tokens, prefix tokens of an image, and whether images are channels_last

    The packing has no grids that the host knows. Nothing is recorded for a backward.
    """
    cu_seqlens, image, longest = torch.ops.revit_kernels.patch_embed_places(images, *limits)
    mean, std = ([float(n) for n in statistics[name]] if statistics else None for name in ("mean", "std"))
    tokens = torch.ops.revit_kernels.patch_embed_listed(
        images, weight, bias, table, prefix, image, mean, std, *how, *limits
    )
    zeros = torch.zeros_like(image)
    known = ((longest.shape[0], 1),), limits[2], image.shape[0], None, False
    return tokens, Packing(cu_seqlens, cu_seqlens.new_zeros(len(images)), image, zeros, zeros, *known)
