"""Gemma 4's vision blocks, with norms before and behind each branch, and what its linear layers and patches do."""

import math

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.modules.block import DropPath, Stream, drop_path, run_attention, take
from revit_kernels.modules.eva import AttentionRope, StreamingBlock
from revit_kernels.modules.layer_norm import RmsNorm, normalise
from revit_kernels.modules.linear import traced
from revit_kernels.modules.mlp import SwiGLU
from revit_kernels.modules.patch_embed import PatchEmbed
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.packing import Packing

BOUNDS = {"input_min": -math.inf, "input_max": math.inf, "output_min": -math.inf, "output_max": math.inf}


class ClippedLinear(nn.Linear):
    """A Linear without bias whose inputs and outputs are clamped to bounds that checkpoints bring; at first to none."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        for name, value in BOUNDS.items():
            self.register_buffer(name, torch.full((), value, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(self.input_min, self.input_max)
        product = (
            super().forward(x) if traced(x) else ops.linear(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        )
        return product.clamp(self.output_min, self.output_max)


class CentredPatchEmbed(PatchEmbed):
    """A patch projection of images with values from 0 to 1, which it takes from -1 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x - 1)

    def _prepared(self, images, mean, std) -> tuple:
        if mean is not None:  # of uint8 images
            return images, tuple(m + s / 2 for m, s in zip(mean, std)), tuple(s / 2 for s in std)
        return (2 * images - 1 if isinstance(images, Tensor) else [2 * image - 1 for image in images]), None, None


def _linear(clipped: bool, inputs: int, outputs: int, kwargs: dict) -> nn.Linear:
    return ClippedLinear(inputs, outputs, **kwargs) if clipped else nn.Linear(inputs, outputs, bias=False, **kwargs)


class SandwichAttention(AttentionRope):
    """Self-attention with norms of queries, keys and values, three projections and no scale. x as in Attention."""

    def __init__(self, dim, num_heads, *, num_kv_heads=None, clipped=False, eps=1e-6, device=None, dtype=None, **drops):
        kwargs = {"device": device, "dtype": dtype}
        options = {
            "qkv_bias": False,
            "qkv_fused": False,
            "num_prefix_tokens": 0,
            "rotate_half": True,
            **drops,
            **kwargs,
        }
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, **options)
        self.scale = 1.0
        widths = {"q_proj": num_heads, "k_proj": self.num_kv_heads, "v_proj": self.num_kv_heads, "proj": num_heads}
        for name, heads in widths.items():
            setattr(self, name, _linear(clipped, dim, heads * self.head_dim, kwargs))
        self.q_norm, self.k_norm = (RmsNorm(self.head_dim, eps, **kwargs) for _ in range(2))
        self.v_norm = RmsNorm(self.head_dim, eps, affine=False, **kwargs)

    def kernel_scale(self) -> float:
        return self.scale

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return q, k, self.v_norm(v)


class SandwichBlock(StreamingBlock):
    """Attention, then a gated MLP, each between two norms. x: (capacity, dim) with its packing, or dense without."""

    def __init__(
        self,
        dim,
        num_heads,
        hidden,
        *,
        num_kv_heads=None,
        clipped=False,
        eps=1e-6,
        act_layer=nn.GELU,
        attn_drop=0.0,
        proj_drop=0.0,
        drop_path=0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        options = {"num_kv_heads": num_kv_heads, "clipped": clipped, "eps": eps}
        self.norm1 = RmsNorm(dim, eps, **kwargs)
        self.attn = SandwichAttention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop, **options, **kwargs)
        self.norm2, self.norm3 = RmsNorm(dim, eps, **kwargs), RmsNorm(dim, eps, **kwargs)
        self.mlp = SwiGLU(dim, hidden, act_layer=act_layer, bias=False, **kwargs)
        if clipped:
            self.mlp.fc1_g, self.mlp.fc1_x = (ClippedLinear(dim, hidden, **kwargs) for _ in range(2))
            self.mlp.fc2 = ClippedLinear(hidden, dim, **kwargs)
        self.norm4 = RmsNorm(dim, eps, **kwargs)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def stream(self, stream: Stream, packing: Packing, *, rope: Rotary | None = None, **mask) -> Stream:
        x, branch, gamma = take(stream)
        y, x = normalise(self.norm1, x, packing, branch, gamma)
        branch, _ = normalise(self.norm2, run_attention(self.attn, y, packing, mask, rope), packing)
        y, x = normalise(self.norm3, x, packing, drop_path(self.drop_path, branch, packing))
        branch, _ = normalise(self.norm4, self.mlp(y), packing)
        return [x, drop_path(self.drop_path, branch, packing), None]
