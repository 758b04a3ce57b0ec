"""What is computed: one folder per op, one file per backend."""

from revit_kernels.ops import flops as flops  # registers what FlopCounterMode counts
from revit_kernels.ops.attention import attention
from revit_kernels.ops.block import BlockWeights, block
from revit_kernels.ops.layer_norm import layer_norm, layer_norm_fp8
from revit_kernels.ops.linear import linear
from revit_kernels.ops.linear.fp8 import linear_fp8
from revit_kernels.ops.patch_embed import listed as listed  # registers the ops of compiled lists of images
from revit_kernels.ops.patch_embed import patch_embed, resize_patch_weight
from revit_kernels.ops.pool import pool
from revit_kernels.ops.pos_embed import pos_embed
from revit_kernels.ops.temporal_attention import temporal_attention

__all__ = [
    "BlockWeights",
    "attention",
    "block",
    "layer_norm",
    "layer_norm_fp8",
    "linear",
    "linear_fp8",
    "patch_embed",
    "pool",
    "pos_embed",
    "resize_patch_weight",
    "temporal_attention",
]
