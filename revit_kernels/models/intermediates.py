"""What is inside the model: the tokens after chosen blocks, as timm extracts them, and attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from revit_kernels.grids import Grid
from revit_kernels.models.embedding import Images
from revit_kernels.modules.attention import Maps, mask_of, recording
from revit_kernels.modules.layer_norm import normalise
from revit_kernels.modules.linear import takes_packing
from revit_kernels.packing import PackedTokens, Packing


def take_indices(count: int, indices) -> tuple[list[int], int]:
    """Block numbers to take of `count`, and the largest: the last n for an int, all for None, else those listed."""
    if indices is None:
        indices = count
    if isinstance(indices, Integral):
        if not 0 < indices <= count:
            raise ValueError(f"indices must be between 1 and {count} blocks, got {indices}")
        taken = list(range(count - indices, count))
    else:
        taken = [count + i if i < 0 else i for i in indices]
        for index in taken:
            if not 0 <= index < count:
                raise ValueError(f"indices must be within {count} blocks, got {index}")
    return taken, max(taken)


class Intermediates:
    """The methods of VarLenViT that give intermediate features and attention maps."""

    def forward_intermediates(
        self,
        x: Images,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grids: Sequence[Grid] | None = None,
        packing: Packing | None = None,
        max_tokens: int | None = None,
        channels_last: bool = False,
    ) -> Any:
        """The tokens after chosen blocks, as timm gives them: a list, (features, list), or a dict.

        For a dense batch each entry is (images, dim, rows, columns), or (images, patches, dim) with output_fmt "NLC";
        for a mixed one it is a tuple with one such tensor, without the images' dimension, per image.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = take_indices(len(self.blocks), indices)
        images, packing, dense = self._inputs(x, grids, packing, max_tokens, channels_last)
        mask = mask_of(attn_mask, is_causal)
        patches, prefixes = [], []
        grid = None
        if dense and output_fmt == "NCHW":
            height, width = (1, 2) if channels_last is True else (2, 3)
            grid = self.patch_embed.dynamic_feat_size((images.shape[height], images.shape[width]))

        def visit(i, tokens, packing):
            if i in taken:
                tokens = normalise(self.norm, tokens, packing)[0] if norm else tokens
                patch, prefix = self._apart(tokens, packing, dense, output_fmt == "NCHW", grid)
                patches.append(patch)
                prefixes.append(prefix)

        depth = last + 1 if stop_early else None
        features, packing = self._features(images, packing, dense, channels_last, mask, visit, depth)
        features = features if dense else PackedTokens(features, packing)
        has_prefix = bool(self.num_prefix_tokens) and return_prefix_tokens
        if output_dict:
            result = {"image_intermediates": patches}
            if has_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else result | {"image_features": features}
        if has_prefix:
            patches = list(zip(patches, prefixes))
        return patches if intermediates_only else (features, patches)

    def _apart(self, tokens, packing, dense: bool, maps: bool, grid):
        """Patches and prefix tokens apart; patches as maps (dim, rows, columns) if asked."""
        prefix = self.num_prefix_tokens
        if dense:
            patches = tokens[:, prefix:]
            if maps:
                patches = patches.reshape(patches.shape[0], *grid, patches.shape[2]).permute(0, 3, 1, 2).contiguous()
            return patches, tokens[:, :prefix]
        parts = packing.split(tokens)
        patches = tuple(part[prefix:] for part in parts)
        if maps:
            grids = packing.grids
            patches = tuple(p.unflatten(0, g).permute(2, 0, 1).contiguous() for p, g in zip(patches, grids))
        return patches, tuple(part[:prefix] for part in parts)

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """DINO's interface to `forward_intermediates`."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
            **inputs,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for, and the norm and head if told so."""
        taken, last = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return taken

    @torch.no_grad()
    def attention_maps(
        self,
        x: Images,
        *,
        grids: Sequence[Grid] | None = None,
        packing: Packing | None = None,
        max_tokens: int | None = None,
        channels_last: bool = False,
    ) -> list[tuple[Tensor, ...]]:
        """The attention maps of every block: for each, a tuple with (heads, length, length) for each image.

        Arguments as of `forward`. These are what the blocks' `attn.attn_drop` sees where `attn.fused_attn` is False,
        as with timm; a hook on it sees (images, heads, length, length) of a dense batch, and each image of a mixed one.
        Other threads may call the model. Raises ValueError where a block has no attention of ours, or is compiled.
        """
        attentions = [m for m in self.blocks.modules() if isinstance(m, Maps)]
        if not attentions or not all(takes_packing(m) for m in attentions):
            raise ValueError("the model's blocks have no attention that can give its maps")
        with recording(attentions) as maps:
            self(x, grids=grids, packing=packing, max_tokens=max_tokens, channels_last=channels_last)
        if len(x) and not all(maps.values()):
            raise ValueError("a block that is compiled, or another module in its place, gives no attention maps")
        return [tuple(seen) for seen in maps.values()]
