"""TimeSformer in plain PyTorch, as a user would write it today: one dense batch of clips of one grid."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainTimeSformer(nn.Module):
    """Divided attention with the parameters of a VarLenTimeSformer, which it shares.

    x: (clips, channels, frames, height, width), of the model's own frame count
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @staticmethod
    def attend(attn: nn.Module, x: Tensor) -> Tensor:
        sequences, length, dim = x.shape
        q, k, v = attn.qkv(x).view(sequences, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return attn.proj(y.transpose(1, 2).reshape(sequences, length, dim))

    @cache  # noqa: B019 - a benchmark's models live as long as it does
    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, 1, patches, dim), interpolated once, not in every call."""
        table = self.model.pos_embed.detach()[:, 1:].unflatten(1, self.model.patch_embed.grid_size).permute(0, 3, 1, 2)
        if tuple(table.shape[2:]) != grid:
            table = F.interpolate(table.float(), size=grid, mode="bicubic", antialias=True).to(table.dtype)
        return table.flatten(2).transpose(1, 2)[:, None]

    def embed(self, x: Tensor) -> Tensor:
        """(clips, 1 + patches * frames, dim), the frame running fastest."""
        model, (clips, _, frames, *size) = self.model, x.shape
        y = model.patch_embed.proj(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        y = y.view(clips, frames, -1, model.embed_dim)
        y = y + self.positions(tuple(int(n) // p for n, p in zip(size, model.patch_embed.patch_size)))
        y = (y + model.time_embed[:, :, None]).transpose(1, 2).flatten(1, 2)
        return torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(clips, -1, -1), y], 1)

    def block(self, block: nn.Module, x: Tensor, clips: int, frames: int) -> Tensor:
        dim = x.shape[-1]
        first, patches = x[:, :1], x[:, 1:]
        own = patches.reshape(-1, frames, dim)
        time = block.temporal_fc(self.attend(block.temporal_attn, block.temporal_norm1(own)))
        patches = patches + time.view(patches.shape)
        space = patches.view(clips, -1, frames, dim).transpose(1, 2).reshape(clips * frames, -1, dim)
        copies = first.expand(-1, frames, -1).reshape(clips * frames, 1, dim)
        r = self.attend(block.attn, block.norm1(torch.cat([copies, space], 1)))
        first = first + r[:, 0].view(clips, frames, dim).mean(1, keepdim=True)
        r = r[:, 1:].view(clips, frames, -1, dim).transpose(1, 2).reshape(patches.shape)
        x = torch.cat([first, patches + r], 1)
        return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))

    def forward(self, x: Tensor) -> Tensor:
        clips, frames = x.shape[0], x.shape[2]
        y = self.embed(x)
        for block in self.model.blocks:
            y = self.block(block, y, clips, frames)
        return self.model.head(F.layer_norm(y[:, 0], y.shape[2:], self.model.norm.weight, self.model.norm.bias, 1e-6))
