"""Images of any sizes to packed tokens, with the weights in a Conv2d as timm keeps them."""

import math
from collections.abc import Mapping
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from revit_kernels import ops
from revit_kernels.device_cache import constant
from revit_kernels.dispatch import without_autocast
from revit_kernels.modules.linear import is_plain
from revit_kernels.modules.script import refuse_script
from revit_kernels.ops.patch_embed.reference import resized
from revit_kernels.ops.pos_embed.interpolation import MODES
from revit_kernels.packing import Packing


def pair(n) -> tuple[int, int]:
    return (int(n), int(n)) if isinstance(n, Integral) else tuple(n)


def resize_mode(cfg: Mapping) -> str:
    """How images are resized to their grids: what a pretrained_cfg's field `interpolation` says, else "bicubic".

    Raises ValueError for a mode that `ops.patch_embed` does not have.
    """
    mode = cfg.get("interpolation") or "bicubic"
    if mode not in MODES:
        raise ValueError(
            f"the model's pretrained_cfg has interpolation {mode!r}, and images are resized by one of {MODES} only: "
            "resize them to grid x patch before, or set pretrained_cfg['interpolation']"
        )
    return mode


def is_grid(grid, other: tuple[int, int]) -> bool:
    """Whether both are the same for certain: a tracer may know the numbers of `grid` by name only."""
    if any(isinstance(n, Proxy) for n in grid):
        return False
    if not torch.compiler.is_compiling():
        return tuple(grid) == tuple(other)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and loaded by then

    return all([statically_known_true(n == m) for n, m in zip(grid, other)])


def _statistics(mean: tuple, std: tuple, like: Tensor) -> tuple[Tensor, ...]:
    """Both as (channels, 1, 1)."""
    key = "statistics", mean, std, like.dtype
    return constant(key, like.device, lambda: torch.tensor([mean, std], dtype=like.dtype))[:, :, None, None].unbind()


class PatchEmbed(nn.Module):
    """One linear projection per patch.

    `forward` is timm's: a dense batch in, (images, patches, dim) out. `pack` is what VarLenViT calls.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        norm_layer=None,
        flatten=True,
        output_fmt=None,
        bias=True,
        strict_img_size=True,
        dynamic_img_pad=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.patch_size = pair(patch_size)
        self._set_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **kwargs)
        self.norm = norm_layer(embed_dim, **kwargs) if norm_layer else nn.Identity()

    def _set_img_size(self, img_size) -> None:
        if img_size is None:
            self.img_size = self.grid_size = self.num_patches = None
            return
        self.img_size = pair(img_size)
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size))
        self.num_patches = math.prod(self.grid_size)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Take another image size, another patch size, or both: the kernel is resized as FlexiViT resizes it."""
        patch_size = self.patch_size if patch_size is None else pair(patch_size)
        if patch_size != self.patch_size:
            old = self.proj
            weight = ops.resize_patch_weight(old.weight.detach(), patch_size)
            self.proj = nn.Conv2d(
                old.in_channels, old.out_channels, patch_size, patch_size, bias=old.bias is not None, device="meta"
            )
            self.proj.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
            self.proj.bias = old.bias
            self.proj.train(old.training)
            self.patch_size = patch_size
        self._set_img_size(img_size or self.img_size)

    def feat_ratio(self, as_scalar: bool = True):
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid (rows, columns) of an image of this size (height, width)."""
        (h, w), (ph, pw) = img_size, self.patch_size
        return (math.ceil(h / ph), math.ceil(w / pw)) if self.dynamic_img_pad else (h // ph, w // pw)

    def padded(self, x: Tensor) -> Tensor:
        """x (images, channels, height, width), with `dynamic_img_pad` filled up with zeros to whole patches.

        Raises ValueError where the size is no multiple of the patch's and may not be padded.
        """
        (h, w), (ph, pw) = x.shape[-2:], self.patch_size
        if self.dynamic_img_pad:
            return F.pad(x, (0, -w % pw, 0, -h % ph))
        if isinstance(x, Proxy):  # which has no values yet
            torch._assert(h % ph == 0, "the image's height must be a multiple of the patch's")
            torch._assert(w % pw == 0, "the image's width must be a multiple of the patch's")
        elif h % ph or w % pw:
            raise ValueError(f"the image size {(h, w)} must be a multiple of the patch size {self.patch_size}")
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(self.padded(x))
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        elif str(self.output_fmt).endswith("NHWC"):
            x = x.permute(0, 2, 3, 1)
        return self.norm(x)

    def pack(
        self,
        images: Tensor | list[Tensor],
        packing: Packing,
        pos: Tensor | None = None,
        prefix: Tensor | None = None,
        *,
        mean=None,
        std=None,
        interpolation: str = "bicubic",
        channels_last: bool = False,
        method: str = "resize",
        packed: Tensor | None = None,
    ) -> Tensor:
        """Images straight to packed tokens; arguments as in ops.patch_embed. Returns (capacity, dim)."""
        listed = [images] if isinstance(images, Tensor) else images
        conv = self.proj
        fused = (
            is_plain(conv, "Conv2d")
            and is_plain(self.norm, "Identity")
            and is_plain(self, "PatchEmbed", "CentredPatchEmbed")
            and conv.stride == conv.kernel_size == self.patch_size
            and not (torch.is_grad_enabled() and any(image.requires_grad for image in listed))
        )
        options = {"mean": mean, "std": std, "interpolation": interpolation, "channels_last": channels_last}
        how = {"pos": pos, "prefix": prefix, "method": method, "packed": packed}
        if fused:
            # Under autocast too in the weight's own dtype: it is a hundredth of the work, and starts the fp32 stream.
            with without_autocast(conv.weight.device):
                images, mean, std = self._prepared(images, mean, std)
                options |= {"mean": mean, "std": std}
                return ops.patch_embed(images, conv.weight, conv.bias, packing, **how, **options)
        if method != "resize":
            raise ValueError(f"method {method!r} needs a patch projection that is neither wrapped nor hooked")
        return self._pack_stepwise(images, packing, pos, prefix, **options)

    def _prepared(self, images, mean, std) -> tuple:
        """Images, and what uint8 ones are normalised with, as the projection takes them."""
        return images, mean, std

    def _pack_stepwise(self, images, packing, pos, prefix, mean, std, interpolation, channels_last) -> Tensor:
        """`pack` through the submodules' own forward, for a wrapped projection, a norm, or image gradients."""
        if packing.grids is None:
            raise ValueError("a wrapped patch projection needs grids that the host knows")
        starts, start = {}, 0
        for grid in packing.menu:
            starts[grid] = start
            start += grid[0] * grid[1]
        dense = isinstance(images, Tensor) and len(packing.menu) == 1
        batches = [images] if dense else [image[None] for image in images]
        parts = []
        for batch, grid in zip(batches, packing.grids):
            batch = batch.permute(0, 3, 1, 2) if channels_last else batch
            x = self._project(batch, grid, mean, std, interpolation)
            if pos is not None:
                x = x + pos[starts[grid] : starts[grid] + grid[0] * grid[1]]
            if prefix is not None:
                x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], 1)
            parts.append(x.flatten(0, 1))
        if not parts:
            parameter = next(self.parameters())
            return parameter.new_zeros(packing.capacity, len(parameter))
        x = torch.cat(parts)
        return F.pad(x, (0, 0, 0, packing.capacity - len(x)))

    def _project(self, batch: Tensor, grid, mean, std, interpolation: str) -> Tensor:
        """(images, channels, height, width) -> (images, cells, dim)."""
        x = batch / 255 if batch.dtype == torch.uint8 else batch
        size = tuple(g * p for g, p in zip(grid, self.patch_size))
        if tuple(x.shape[-2:]) != size:
            x = resized(x.float(), size, interpolation)
        if mean is not None:
            mean, std = _statistics(tuple(mean), tuple(std), x)
            x = (x - mean) / std
        x = self(x if batch.requires_grad else x.to(next(self.parameters()).dtype))
        return x.flatten(1, 2) if x.ndim == 4 and not self.flatten else x
