"""A ReViT in plain torch and timm, with none of this package's kernels: one length a pass, as dense batches."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LengthNorm(nn.Module):
    """An affine for each length of the menu; `row` says which is used."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        weights = [norm.weight, *norm.shorter_weight]
        biases = [norm.bias, *norm.shorter_bias]
        self.norms = nn.ModuleList(nn.LayerNorm(len(weight), norm.eps) for weight in weights)
        for own, weight, bias in zip(self.norms, weights, biases):
            own.load_state_dict({"weight": weight, "bias": bias})
        self.row = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[self.row](x)


class LengthEmbed(nn.Module):
    """A patch kernel for each length of the menu, in place of timm's PatchEmbed; `row` says which is used."""

    def __init__(self, embed: nn.Module):
        super().__init__()
        self.grid_size, self.row = embed.grid_size, 0
        weights = [embed.proj.weight, *embed.shorter_weight]
        self.convolutions = nn.ModuleList(nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], w.shape[2:]) for w in weights)
        for own, weight, bias in zip(self.convolutions, weights, [embed.proj.bias, *embed.shorter_bias]):
            own.load_state_dict({"weight": weight, "bias": bias})

    @property
    def proj(self) -> nn.Conv2d:
        return self.convolutions[self.row]

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.proj.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class PlainReViT(nn.Module):
    """A copy of a VarLenViT whose positions are interpolated and norms per length; either one patch kernel, for images
    that are resized, or a kernel per length.

    model: with `created_from`, as `create_model` makes it, made resizable
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        known = {"embedding": model.resizable["embedding"], "positions": "interpolate", "norms": "per_length"}
        if model.resizable != known or known["embedding"] == "patch":
            raise ValueError(f"there is no plain form of a model that is {model.resizable}")
        created = model.created_from
        kwargs = created["kwargs"] | {"num_classes": model.num_classes, "dynamic_img_size": True}
        self.vit = timm.create_model(created["name"].partition(".")[0], **kwargs)
        self.vit.load_state_dict({k: v for k, v in model.state_dict().items() if "shorter_" not in k})
        for i, block in enumerate(model.blocks):
            self.vit.blocks[i].norm1, self.vit.blocks[i].norm2 = LengthNorm(block.norm1), LengthNorm(block.norm2)
        self.vit.norm = LengthNorm(model.norm)
        self.menu, self.patch_sizes = model.menu, [model.patch_embed.patch_size] * len(model.menu)
        if known["embedding"] == "per_length":
            self.patch_sizes = model.patch_sizes()
            self.vit.patch_embed = LengthEmbed(model.patch_embed)
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1))

    def set_length(self, row: int) -> None:
        for module in self.modules():
            if isinstance(module, LengthNorm | LengthEmbed):
                module.row = row

    def prepare(self, images: Tensor, row: int) -> Tensor:
        """images: (images, height, width, 3) uint8 -> (images, 3, height, width), of the length's size, normalised"""
        x = images.permute(0, 3, 1, 2).float()
        size = tuple(n * p for n, p in zip(self.menu[row], self.patch_sizes[row]))
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        return (x - self.mean) / self.std

    def forward(self, images: Tensor, row: int) -> Tensor:
        self.set_length(row)
        return self.vit(self.prepare(images, row))
