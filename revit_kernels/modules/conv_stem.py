"""LV-ViT's convolutional stem, which sees beyond a patch: it runs before images are packed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels.modules.patch_embed import PatchEmbed, pair
from revit_kernels.packing import Packing


class ConvStem(PatchEmbed):
    """Three convolutions with batch norms at half the resolution, then a projection of patches.

    Arguments as of PatchEmbed; width: channels of the convolutions. Raises ValueError for an odd patch size.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, *, width=64, **options):
        super().__init__(img_size, patch_size, in_chans, embed_dim, **options)
        kwargs = {"device": options.get("device"), "dtype": options.get("dtype")}
        if any(size % 2 for size in self.patch_size):
            raise ValueError(f"the convolutional stem halves images: patch_size must be even, got {self.patch_size}")
        projection, norm = self._modules.pop("proj"), self._modules.pop("norm")
        for i, (inputs, size, stride) in enumerate([(in_chans, 7, 2), (width, 3, 1), (width, 3, 1)], 1):
            conv = nn.Conv2d(inputs, width, size, stride, size // 2, bias=False, **kwargs)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(width, **kwargs))
        half = tuple(size // 2 for size in self.patch_size)
        self.proj = nn.Conv2d(width, embed_dim, half, half, bias=projection.bias is not None, **kwargs)
        self.norm = norm

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Take another image size. Raises ValueError for another patch size: the stem has one."""
        if patch_size is not None and pair(patch_size) != self.patch_size:
            raise ValueError(f"a convolutional stem keeps its patch size, {self.patch_size}, got {patch_size}")
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(x)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = self.proj(x)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        elif str(self.output_fmt).endswith("NHWC"):
            x = x.permute(0, 2, 3, 1)
        return self.norm(x)

    def pack(
        self,
        images,
        packing: Packing,
        pos=None,
        prefix=None,
        *,
        mean=None,
        std=None,
        interpolation="bicubic",
        channels_last=False,
        **options,
    ) -> Tensor:
        """As of PatchEmbed. Images of one size go through together; in inference on a CPU each goes alone, so
        that it has the same bits in every batch. Raises ValueError for method "patch" and for grids not on the host.
        """
        if options.get("method", "resize") != "resize":
            raise ValueError(f"a convolutional stem resizes images, not its kernels: got method {options['method']!r}")
        if packing.grids is None:
            raise ValueError("a convolutional stem needs grids that the host knows")
        apart = packing.device.type == "cpu" and not self.training
        groups: dict[tuple, list[int]] = {}
        for i, (image, grid) in enumerate(zip(images, packing.grids)):
            groups.setdefault((grid, i if apart else tuple(image.shape)), []).append(i)
        starts, start = {}, 0
        for grid in packing.menu:
            starts[grid], start = start, start + grid[0] * grid[1]
        parts: list[Tensor] = [self.proj.weight[:0, 0, 0, 0]] * packing.images
        for (grid, _), members in groups.items():
            batch = torch.stack([images[i] for i in members])
            batch = batch.permute(0, 3, 1, 2) if channels_last else batch
            x = self._project(batch, grid, mean, std, interpolation)
            x = x if pos is None else x + pos[starts[grid] : starts[grid] + grid[0] * grid[1]]
            x = x if prefix is None else torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], 1)
            for i, part in zip(members, x):
                parts[i] = part
        used = torch.cat(parts) if parts else self.proj.weight.new_zeros(0, len(self.proj.weight))
        return F.pad(used, (0, 0, 0, packing.capacity - len(used)))
