"""A list of images at their own sizes as two ops: torch.compile then knows no size, and compiles no size anew."""

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.grids import native_grid
from revit_kernels.modules.layer_norm import normalise
from revit_kernels.modules.linear import is_plain, takes_packing, traced
from revit_kernels.modules.patch_embed import resize_mode
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
    pos = None if table is None else ops.pos_embed(table, packing.menu, **how)
    options = {"mean": mean, "std": std, "interpolation": resize, "channels_last": limits[-1]}
    return ops.patch_embed(images, weight, bias, packing, pos=pos, prefix=prefix, **options)


for _name, _schema, _run, _fake in (
    ("listed_places", f"(Tensor[] images, {_LIMITS}) -> (Tensor, Tensor, Tensor)", _places, _fake_places),
    (
        "listed_embed",
        "(Tensor[] images, Tensor weight, Tensor? bias, Tensor? table, Tensor? prefix, Tensor image, float[]? mean, "
        f"float[]? std, str resize, str interpolation, bool antialias, {_LIMITS}) -> Tensor",
        _embed,
        lambda images, weight, bias, table, prefix, image, *_: weight.new_empty(image.shape[0], weight.shape[0]),
    ),
):
    torch.library.define(f"revit_kernels::{_name}", _schema)
    torch.library.register_fake(f"revit_kernels::{_name}", _fake)
    torch.library.impl(f"revit_kernels::{_name}", "CompositeExplicitAutograd", _run)


def _embedded(images: list[Tensor], weight, bias, table, prefix, statistics: dict, how: tuple, limits: tuple):
    """The packed tokens (tokens, dim), with positions, of images at their own sizes, and their packing.

    table:      (rows, columns, dim) positions, or None
    prefix:     (prefix tokens, dim) or None
    statistics: mean and std of uint8 images, else nothing
    how:        how images are resized; interpolation and antialias of the positions
    limits:     patch size, most tokens, prefix tokens of an image, and whether images are channels_last

    The packing has no grids that the host knows. Nothing is recorded for a backward.
    """
    cu_seqlens, image, longest = torch.ops.revit_kernels.listed_places(images, *limits)
    mean, std = ([float(n) for n in statistics[name]] if statistics else None for name in ("mean", "std"))
    tokens = torch.ops.revit_kernels.listed_embed(images, weight, bias, table, prefix, image, mean, std, *how, *limits)
    zeros = torch.zeros_like(image)
    known = ((longest.shape[0], 1),), limits[2], image.shape[0], None, False
    return tokens, Packing(cu_seqlens, cu_seqlens.new_zeros(len(images)), image, zeros, zeros, *known)


def takes(model, x) -> bool:
    """Whether `answers` gives what a VarLenViT says of x, given without grids: nothing that it calls sees sizes."""
    if not torch.compiler.is_compiling() or traced(x) or torch.is_grad_enabled() or not isinstance(x, list | tuple):
        return False
    embed = model.patch_embed
    return (
        len(x) > 0
        and model.menu is model.attn_pool is model.pos_axes is None
        and not (model.pos_align_corners or model.pos_square)
        and getattr(model, "rope", None) is None  # which turns by the sizes
        and model.global_pool != ""
        and model.patch_method == "resize"
        and model._own("_pos_embed", "pool", "forward_head")
        and is_plain(embed, "PatchEmbed")
        and is_plain(embed.norm, "Identity")
        and is_plain(embed.proj, "Conv2d")
        and isinstance(model.patch_drop, nn.Identity)
        and not model.training
        and all([takes_packing(block) for block in model.blocks])
    )


def answers(model, images, max_tokens: int | None, channels_last: bool) -> Tensor:
    """`model(images)` of what `takes` allows."""
    embed, limit = model.patch_embed, model.patch_embed.num_patches if max_tokens is None else max_tokens
    table, own = (None, None) if model.pos_embed is None else model._table()
    x, packing = _embedded(
        list(images),
        embed.proj.weight,
        embed.proj.bias,
        table,
        model._prefix(own),
        model._statistics() if images[0].dtype == torch.uint8 else {},
        (resize_mode(model.pretrained_cfg), model.pos_interpolation, model.pos_antialias),
        (list(embed.patch_size), limit, model.num_prefix_tokens, channels_last),
    )
    x = x if model.pos_embed is None else model.pos_drop(x)
    x = normalise(model.norm_pre, x, packing)[0]
    return model.finish(model.run_blocks([x, None, None], packing), packing)
