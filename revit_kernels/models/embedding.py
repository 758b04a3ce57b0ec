"""Images to tokens: how many each image gets, its patches, their positions, and the prefix tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from revit_kernels.grids import native_grid
from revit_kernels.modules.patch_dropout import drop_patches
from revit_kernels.packing import Packing

_kept_native_grid = lru_cache(maxsize=16384)(native_grid)


def _is_list_of_images(x) -> bool:
    return (
        isinstance(x, list | tuple)
        and all(issubclass(kind, Tensor) for kind in set(map(type, x)))
        and not any(image.ndim != 3 for image in x)
    )


class Embedding:
    """Methods of VarLenViT."""

    def _inputs(self, x, grids, packing, max_tokens, channels_last) -> tuple[Tensor | list[Tensor], Packing, bool]:
        """The images, their packing, and whether the result is a dense batch, as timm gives it."""
        prefix, device = self.num_prefix_tokens, self._device()
        if isinstance(x, Tensor):
            if x.ndim != 4:
                raise ValueError(f"images must be a tensor (images, channels, height, width), got {tuple(x.shape)}")
            if grids is None and packing is None and max_tokens is None:
                channels = x.shape[3 if channels_last else 1]
                if channels != self.in_chans:
                    raise ValueError(f"expected images of {self.in_chans} channels, got {channels}")
                x = self.patch_embed.padded(x.permute(0, 3, 1, 2) if channels_last else x)
                size = x.shape[2:]
                x = x.permute(0, 2, 3, 1) if channels_last else x
                grid = tuple(s // p for s, p in zip(size, self.patch_embed.patch_size))
                return x, Packing.uniform(x.shape[0], grid, prefix, device=device), True
        elif not _is_list_of_images(x):
            raise ValueError("images must be a tensor, or a list of tensors (channels, height, width)")
        images = len(x)
        if packing is not None:
            if grids is not None:
                raise ValueError("give grids or packing, not both")
            if packing.prefix != prefix:
                raise ValueError(f"the packing has {packing.prefix} prefix tokens an image, the model {prefix}")
        elif grids is None:
            limit = self.patch_embed.num_patches if max_tokens is None else max_tokens
            at = slice(0, 2) if channels_last else slice(1, 3)
            # torch.compile would trace through the cache, and warns of that
            native = native_grid if torch.compiler.is_compiling() else _kept_native_grid
            grids = [native(tuple(image.shape[at]), self.patch_embed.patch_size, limit) for image in x]
        elif len(grids) != images:
            raise ValueError(f"grids must name one grid per image: {images} images, {len(grids)} grids")
        packing = packing or Packing.from_grids(grids, prefix, device=device)
        if packing.images != images:
            raise ValueError(f"the packing is of {packing.images} images, got {images}")
        return (list(x) if not isinstance(x, Tensor) else x), packing, False

    def _device(self) -> torch.device:
        plain = self.cls_token  # at hand, where there is one
        return (next(self.patch_embed.parameters()) if plain is None else plain).device

    def _positions(self, menu: tuple) -> tuple[Tensor | None, Tensor | None]:
        """Position rows for every cell of the menu's grids, and the prefix tokens with theirs added."""
        tokens = self.cls_token, self._parameters.get("dist_token"), self.reg_token
        parts = [token[0] for token in tokens if token is not None]
        prefix = torch.cat(parts) if parts else None
        if self.pos_embed is None:
            return None, prefix
        _, own = self._table()
        return self._position_rows(menu), prefix if own is None else prefix + own

    def _embed(
        self,
        images,
        packing: Packing,
        channels_last: bool,
        positions: tuple | None = None,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Packing]:
        """(capacity, dim): patches and prefix tokens with their positions; a packing with fewer in patch dropout.

        positions, packed: what `_positions` gives for the packing's menu, and the packed patch weight, from an engine
        """
        pos, prefix = self._positions(packing.menu) if positions is None else positions
        first = images if isinstance(images, Tensor) else images[0] if images else None
        statistics = {}
        if first is not None and first.dtype == torch.uint8:
            statistics = {name: self.pretrained_cfg[name] for name in ("mean", "std")}
            if any(len(values) != self.in_chans for values in statistics.values()):
                raise ValueError(
                    f"uint8 images need the {self.in_chans} channels' mean and std in pretrained_cfg, got {statistics}"
                )
        if self.menu is not None and self.resizable["embedding"] != "resize":
            x = self._embed_by_length(images, packing, pos, prefix, channels_last=channels_last, **statistics)
        else:
            options = {"channels_last": channels_last, "method": self.patch_method, "packed": packed}
            x = self.patch_embed.pack(images, packing, pos, prefix, **options, **statistics)
        if self.pos_embed is not None:
            x = self.pos_drop(x)
        if self.training and not isinstance(self.patch_drop, nn.Identity):
            x, packing = drop_patches(x, packing, self.patch_drop.prob)
        return x, packing

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's step of this name, on dense patches (images, patches, dim) or (images, rows, columns, dim)."""
        grid = tuple(x.shape[1:3]) if x.ndim == 4 else self.patch_embed.grid_size
        pos, prefix = self._positions((grid,))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x if pos is None else x + pos
        x = x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        return x if pos is None else self.pos_drop(x)
