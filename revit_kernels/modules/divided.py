"""Blocks of divided space-time attention (Bertasius et al., TimeSformer, arXiv:2102.05095)."""

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.clips import ClipPacking
from revit_kernels.modules.attention import Attention
from revit_kernels.modules.block import Block, Stream, drop_path, run_attention, scaled, take
from revit_kernels.modules.layer_norm import LayerNorm, normalise
from revit_kernels.modules.linear import linear


class TemporalAttention(Attention):
    """Multi-head self-attention over the frames of a clip, at each position of its grid by itself.

    x: (capacity, dim) with a ClipPacking whose frames have prefix tokens of their own, which take no part.
    """

    def forward(self, x: Tensor, *, packing: ClipPacking) -> Tensor:
        q, k, v = self.project(x)
        y = ops.temporal_attention(
            q, k, v, packing.cu_seqlens, packing.frames, packing.max_frames, prefix=packing.prefix, scale=self.scale
        )
        return self.proj_drop(linear(self.proj, y.flatten(1)))


def average_class(branch: Tensor, clips: ClipPacking) -> Tensor:
    """What the block adds, (capacity, dim), with the mean of a clip's class tokens in the place of each of them."""
    mean = ops.pool(branch[clips.prefix_rows], clips.cu_frames, "avg", include_prefix=True)  # (clips, dim)
    return branch.index_copy(0, clips.prefix_rows, mean[clips.clip])


class DividedBlock(Block):
    """Attention over time, attention over space, then the MLP, each behind a norm and added to the stream.

    x: (capacity, dim) with a ClipPacking of one class token a frame. A clip's class tokens are copies of one: time
    leaves them alone, and each frame's attention to its copy is averaged.
    """

    def __init__(self, dim, num_heads, *, drop_path=0.0, norm_layer=LayerNorm, device=None, dtype=None, **kwargs):
        """Arguments as of Block."""
        kwargs |= {"norm_layer": norm_layer, "device": device, "dtype": dtype}
        super().__init__(dim, num_heads, drop_path=drop_path, **kwargs)
        like = {"device": device, "dtype": dtype}
        self.temporal_norm1 = norm_layer(dim, **like)
        options = {"qkv_bias": kwargs.get("qkv_bias", False), "proj_drop": kwargs.get("proj_drop", 0.0)}
        self.temporal_attn = TemporalAttention(dim, num_heads, proj_bias=True, **options, **like)
        self.temporal_fc = nn.Linear(dim, dim, **like)

    def forward(self, x: Tensor, *, packing: ClipPacking) -> Tensor:
        x, branch, gamma = self.stream([x, None, None], packing)
        return x + branch if gamma is None else x + gamma * branch

    def stream(self, stream: Stream, packing: ClipPacking) -> Stream:
        x, branch, gamma = take(stream)
        y, x = normalise(self.temporal_norm1, x, packing, branch, gamma)
        branch = drop_path(self.drop_path1, self.temporal_attn(y, packing=packing), packing)
        branch = linear(self.temporal_fc, branch).index_fill(0, packing.prefix_rows, 0)
        y, x = normalise(self.norm1, x, packing, branch)
        frames = packing.by_frame
        branch, gamma = scaled(self.ls1, self.drop_path1, run_attention(self.attn, y, frames, {}), frames)
        branch = average_class(branch, packing)
        y, x = normalise(self.norm2, x, packing, branch, gamma)
        branch = None
        return [x, *scaled(self.ls2, self.drop_path2, self.mlp(y), packing)]

    def reset_temporal(self) -> None:
        """Start time from space: a copy of the spatial attention and its norm, behind a projection of zeros."""
        with torch.no_grad():
            pairs = ((self.temporal_attn, self.attn), (self.temporal_norm1, self.norm1))
            for own, other in pairs:
                own.load_state_dict(other.state_dict())
            nn.init.zeros_(self.temporal_fc.weight)
            nn.init.zeros_(self.temporal_fc.bias)
