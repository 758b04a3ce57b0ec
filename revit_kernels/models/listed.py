"""A model's answers to a list of images at their own sizes under torch.compile, which then knows no size."""

import torch
from torch import Tensor, nn

from revit_kernels.modules.layer_norm import normalise
from revit_kernels.modules.linear import is_plain, takes_packing, traced
from revit_kernels.modules.patch_embed import resize_mode
from revit_kernels.ops.patch_embed.listed import embed_listed


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
    x, packing = embed_listed(
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
