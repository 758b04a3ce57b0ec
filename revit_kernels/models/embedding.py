"""Images to tokens: how many each image gets, its patches, their positions, and the prefix tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.fx import Proxy

from revit_kernels.grids import native_grid
from revit_kernels.models.naflex_inputs import images_of
from revit_kernels.modules.attention import fitting
from revit_kernels.modules.layer_norm import normalise
from revit_kernels.modules.linear import is_known, is_plain, takes_packing, traced
from revit_kernels.modules.patch_dropout import drop_patches
from revit_kernels.modules.patch_embed import PatchEmbed, is_grid, resize_mode
from revit_kernels.modules.script import refuse_script
from revit_kernels.ops.pos_embed.interpolation import MODES
from revit_kernels.packing import Packing

# What a model takes: a batch of one size, images of any sizes, or images cut into patches (`naflex_inputs.images_of`).
Images = Tensor | np.ndarray | Sequence[Tensor | np.ndarray | Image] | Mapping[str, Tensor]

_kept_native_grid = lru_cache(maxsize=16384)(native_grid)


def _is_list_of_images(x) -> bool:
    return (
        isinstance(x, list | tuple)
        and all(issubclass(kind, Tensor) for kind in set(map(type, x)))
        and not any(image.ndim != 3 for image in x)
    )


def _as_tensor(image, channels: int, channels_last: bool, device: torch.device) -> Tensor:
    """A PIL image, in the colours that the model takes, or a NumPy array, which is laid out as a tensor would be."""
    if isinstance(image, Tensor):
        return image
    if isinstance(image, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(image)).to(device)
    if hasattr(image, "convert") and channels in (1, 3):
        pixels = torch.from_numpy(np.array(image.convert("RGB" if channels == 3 else "L"))).to(device)
        pixels = pixels if channels == 3 else pixels[..., None]
        return pixels if channels_last else pixels.permute(2, 0, 1)
    raise ValueError(
        "images must be a tensor, or a list of tensors (channels, height, width), PIL images or NumPy arrays, got "
        f"{type(image).__name__}"
    )


def as_tensors(images, channels: int, channels_last: bool, device: torch.device):
    """The images of a list as tensors, see `_as_tensor`; a tensor of images as it is."""
    if isinstance(images, list | tuple):
        return [_as_tensor(image, channels, channels_last, device) for image in images]
    return _as_tensor(images, channels, channels_last, device)


def _only_dense(x, grids, packing, max_tokens, channels_last):
    """x, in a torch.fx graph, where nothing else may be given."""
    if isinstance(x, Proxy):  # of the model, or of a graph that is traced again
        for node in x.tracer.graph.find_nodes(op="placeholder"):
            node.type = None  # TorchScript, which is refused below, would be at a loss for types before it comes here
        return x.tracer.create_proxy("call_function", _only_dense, (x, grids, packing, max_tokens, channels_last), {})
    if grids is not None or packing is not None or max_tokens is not None or channels_last:
        raise ValueError("a torch.fx graph of the model takes a dense batch (images, channels, height, width) alone")
    return x


_only_dense.__prepare_scriptable__ = refuse_script  # of a graph, which TorchScript compiles function by function


class Embedding:
    """Methods of VarLenViT."""

    def _own(self, *names: str) -> bool:
        """Whether these methods are ours: overridden neither in a class of somebody's nor on the instance."""
        own = self.__dict__
        if any(name in own for name in names):
            return False
        functions = [getattr(type(self), name) for name in names]
        return all([(getattr(f, "__module__", None) or "").startswith("revit_kernels.") for f in functions])

    def _inputs(self, x, grids, packing, max_tokens, channels_last) -> tuple[Tensor | list[Tensor], Packing, bool]:
        """The images, their packing, and whether the result is a dense batch, as timm gives it."""
        if isinstance(x, Mapping):
            if grids is not None or packing is not None or channels_last:
                raise ValueError(
                    "a dictionary of patches says its own grids: leave out grids, packing and channels_last"
                )
            x, grids = images_of(x, self.patch_embed.patch_size, self.in_chans)
        if isinstance(x, Proxy):
            x = _only_dense(x, grids, packing, max_tokens, channels_last)
            grids = packing = max_tokens = None
        dense = grids is None and packing is None and max_tokens is None
        compiled = torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag
        if traced(x) and not compiled and (isinstance(x, list | tuple) or not dense):
            raise NotImplementedError(
                "torch.export, torch.fx, torch.func's transforms and TorchScript's tracing take a dense batch: a "
                "tensor of images of one size, without grids"
            )
        if traced(x) and dense and not isinstance(x, list | tuple):
            return x, self._traced_packing(x, channels_last), True
        prefix, device = self.num_prefix_tokens, self._device()
        if isinstance(x, np.ndarray):
            x = _as_tensor(x, self.in_chans, channels_last, device)
        elif isinstance(x, list | tuple) and not _is_list_of_images(x):
            x = [_as_tensor(image, self.in_chans, channels_last, device) for image in x]
        if isinstance(x, Tensor):
            if x.is_nested:
                raise ValueError("a nested tensor is not taken: give its images as a list, model(list(x.unbind()))")
            if x.ndim != 4:
                raise ValueError(f"images must be a tensor (images, channels, height, width), got {tuple(x.shape)}")
            if dense:
                channels = x.shape[3 if channels_last else 1]
                if channels != self.in_chans:
                    raise ValueError(f"expected images of {self.in_chans} channels, got {channels}")
                if not self._embeds():
                    return x, None, True
                x = self.patch_embed.padded(x.permute(0, 3, 1, 2) if channels_last else x)
                size = x.shape[2:]
                x = x.permute(0, 2, 3, 1) if channels_last else x
                grid = tuple(s // p for s, p in zip(size, self.patch_embed.patch_size))
                return x, Packing.uniform(x.shape[0], grid, prefix, device=device), True
        elif not _is_list_of_images(x):
            found = sorted({str(tuple(image.shape)) for image in x}) if isinstance(x, list) else type(x).__name__
            raise ValueError(f"images must be a tensor, or a list of tensors (channels, height, width), got {found}")
        self._check_mixed()
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

    def _embeds(self) -> bool:
        """Whether the patch embedding is ours, and tells the grid of an image."""
        return isinstance(self.patch_embed, PatchEmbed) and takes_packing(self.patch_embed)

    def _check_mixed(self) -> None:
        """Raise ValueError where somebody's code embeds images that only a dense batch can hand to it."""
        if not self._own("_pos_embed"):
            who = "_pos_embed, which was overridden,"
        elif not self._embeds():
            who = f"patch_embed, a {type(self.patch_embed).__name__},"
        elif not (isinstance(self.patch_drop, nn.Identity) or is_plain(self.patch_drop, "PatchDropout")):
            who = f"patch_drop, a {type(self.patch_drop).__name__} that is replaced or hooked,"
        else:
            return
        raise ValueError(f"{who} needs a dense batch: images of one size as a tensor, without grids")

    def _traced_packing(self, x, channels_last: bool) -> Packing | None:
        """What norms with an affine per length, and rotary positions, are told of a dense batch that is traced; None
        for other models."""
        if self.menu is None and getattr(self, "rope", None) is None:
            return None
        sizes = None if isinstance(x, Proxy) else x.shape[1:3] if channels_last else x.shape[2:]
        if sizes is not None and torch.jit.is_tracing():  # whose numbers are tensors: a trace is of one size
            sizes = tuple(map(int, sizes))
        compiled = torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag  # anew for each size
        if sizes is None or not (compiled or is_known(*sizes)):
            raise NotImplementedError(
                "a ReViT, or a model with rotary positions, is traced and exported for images of one size, known when "
                "it is"
            )
        if self.menu and self.resizable["embedding"] != "resize" and not torch.compiler.is_compiling():
            raise NotImplementedError("a ReViT with a patch kernel for each length cannot be traced or transformed")
        grid = self.patch_embed.dynamic_feat_size(tuple(sizes))
        return Packing.uniform(x.shape[0], grid, self.num_prefix_tokens, device=self._device())

    def _device(self) -> torch.device:
        plain = self.cls_token  # needs no search
        return (next(self.patch_embed.parameters()) if plain is None else plain).device

    def _positions(self, menu: tuple) -> tuple[Tensor | None, Tensor | None]:
        """Position rows for every cell of the menu's grids, and the prefix tokens with theirs added."""
        if self.pos_axes is not None:
            return self.pos_axes(menu, self.pos_square), self._prefix(None)
        if self.pos_embed is None:
            return None, self._prefix(None)
        return self._position_rows(menu), self._prefix(self._table()[1])

    def _prefix(self, own: Tensor | None) -> Tensor | None:
        """The prefix tokens, with positions of their own where there are some."""
        tokens = self.cls_token, getattr(self, "dist_token", None), self.reg_token
        parts = [token[0] for token in tokens if token is not None]
        prefix = torch.cat(parts) if parts else None
        return prefix if own is None else prefix + own

    def _tokens(
        self,
        images,
        packing: Packing | None,
        dense: bool,
        channels_last: bool,
        positions: tuple | None = None,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Packing | None]:
        """The tokens before the first block, (images, length, dim) of a dense batch, else (capacity, dim).

        positions, packed: what `_positions` gives for the packing's menu, and the packed patch weight, from an engine

        With them their packing, which has fewer in patch dropout; None for those of a plain model that is traced.
        """
        if dense and self._embeds_in_steps(images):
            x = self._embed_in_steps(images, channels_last)
        else:
            x = self._embed(images, packing, channels_last, positions, packed)
            x = x.view(packing.images, packing.max_seqlen, x.shape[-1]) if dense else x
            x = x if self.pos_embed is None and self.pos_axes is None else self.pos_drop(x)
        if dense or isinstance(self.patch_drop, nn.Identity):
            x = self.patch_drop(x)
        elif self.patch_drop.training and self.patch_drop.prob:
            x, packing = drop_patches(x, packing, self.patch_drop.prob)
        packing = fitting(packing, x)
        x = normalise(self.norm_pre, x, packing)[0]
        return x, fitting(packing, x)

    def _embeds_in_steps(self, images) -> bool:
        """Whether a dense batch goes through timm's steps: somebody's code is one of them, or they are traced."""
        if self.menu is not None and self.resizable["embedding"] != "resize":
            self._check_mixed()
            return False
        return traced(images) or not self._embeds() or not self._own("_pos_embed")

    def _embed_in_steps(self, x, channels_last: bool):
        """(images, length, dim) of a dense batch, by the submodules and `_pos_embed`, as timm calls them."""
        if not isinstance(x, Proxy):
            x = x.permute(0, 3, 1, 2) if channels_last else x
        if not isinstance(x, Proxy) and x.dtype == torch.uint8:
            mean, std = (torch.tensor(self._statistics()[name], device=x.device) for name in ("mean", "std"))
            x = ((x / 255 - mean[:, None, None]) / std[:, None, None]).to(self._dtype())
        if not self._embeds() or isinstance(x, Proxy):
            return self._pos_embed(self.patch_embed(x))
        size = tuple(x.shape[2:])
        if torch.jit.is_tracing():  # whose numbers are tensors: a trace is of one size
            size = tuple(map(int, size))
            if not torch.onnx.is_in_onnx_export():  # an error in a trace that is given another
                x = x.unflatten(3, size[1:]).unflatten(2, size[:1])
        grid = self.patch_embed.dynamic_feat_size(size)
        x = self.patch_embed(x.to(self._dtype()) if x.dtype == torch.float32 else x)
        if x.ndim == 3 and not is_grid(grid, self.patch_embed.grid_size):
            x = x.unflatten(1, grid)  # which timm's own model takes no images of
        return self._pos_embed(x)

    def _statistics(self) -> dict:
        """mean and std, a number for each channel."""
        statistics = {name: self.pretrained_cfg[name] for name in ("mean", "std")}
        if any(len(values) != self.in_chans for values in statistics.values()):
            raise ValueError(
                f"uint8 images need the {self.in_chans} channels' mean and std in pretrained_cfg, got {statistics}"
            )
        return statistics

    def _dtype(self) -> torch.dtype:
        return next(self.patch_embed.parameters()).dtype

    def _embed(self, images, packing: Packing, channels_last: bool, positions, packed) -> Tensor:
        """(capacity, dim): patches and prefix tokens with their positions."""
        pos, prefix = self._positions(packing.menu) if positions is None else positions
        first = images if isinstance(images, Tensor) else images[0] if images else None
        options = self._statistics() if first is not None and first.dtype == torch.uint8 else {}
        options["channels_last"] = channels_last
        if self.menu is not None and self.resizable["embedding"] != "resize":
            options["interpolation"] = resize_mode(self.pretrained_cfg)
            return self._embed_by_length(images, packing, pos, prefix, **options)
        if self.patch_method == "resize":
            options["interpolation"] = self._resize_mode(images, packing, channels_last)
        return self.patch_embed.pack(images, packing, pos, prefix, method=self.patch_method, packed=packed, **options)

    def _resize_mode(self, images, packing: Packing, channels_last: bool) -> str:
        """The interpolation of pretrained_cfg, with which images are resized to their grids.

        Raises ValueError for a mode that there is not, unless all images have their grid's size.
        """
        if self.pretrained_cfg.get("interpolation", "bicubic") not in MODES and packing.grids is not None:
            at = slice(-3, -1) if channels_last else slice(-2, None)
            sizes = [images.shape[at]] * packing.images if isinstance(images, Tensor) else [x.shape[at] for x in images]
            p, q = self.patch_embed.patch_size
            if all(tuple(size) == (p * h, q * w) for size, (h, w) in zip(sizes, packing.grids)):
                return "bicubic"
        return resize_mode(self.pretrained_cfg)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's step of this name, on dense patches (images, patches, dim) or (images, rows, columns, dim)."""
        flat = getattr(self.patch_embed, "flatten", True) if isinstance(x, Proxy) else x.ndim == 3
        if flat:  # of the table's own grid
            skip = 0 if self.no_embed_class else self.num_prefix_tokens
            pos = None if self.pos_embed is None else self.pos_embed[0, skip:]
            pos = pos if self.pos_axes is None else self._positions((tuple(self.patch_embed.grid_size),))[0]
            prefix = self._prefix(self.pos_embed[0, :skip] if skip and pos is not None else None)
        else:
            grid = x.shape[1], x.shape[2]
            pos, prefix = self._positions((tuple(map(int, grid)) if torch.jit.is_tracing() else grid,))
            x = x.flatten(1, 2)
        x = x if pos is None else x + pos
        x = x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        return x if pos is None else self.pos_drop(x)
