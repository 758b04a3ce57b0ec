"""The ops with parameters, in timm's module tree: real nn.Linear and norm submodules, fused when they are called."""

from revit_kernels.modules.attention import Attention, DiffAttention
from revit_kernels.modules.block import (
    Block,
    DiffParallelScalingBlock,
    DropPath,
    LayerScale,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from revit_kernels.modules.eva import AttentionRope, EvaAttention, EvaBlock, EvaBlockPostNorm
from revit_kernels.modules.layer_norm import LayerNorm, RmsNorm
from revit_kernels.modules.mlp import GluMlp, Mlp, QuickGELU, SwiGLU
from revit_kernels.modules.patch_embed import PatchEmbed
from revit_kernels.modules.pool import AttentionPoolLatent, AttentionPoolPrr

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "AttentionPoolPrr",
    "AttentionRope",
    "Block",
    "DiffAttention",
    "DiffParallelScalingBlock",
    "DropPath",
    "EvaAttention",
    "EvaBlock",
    "EvaBlockPostNorm",
    "GluMlp",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "ParallelScalingBlock",
    "ParallelThingsBlock",
    "PatchEmbed",
    "QuickGELU",
    "ResPostBlock",
    "RmsNorm",
    "SwiGLU",
]
