"""What is computed: one folder per op, one file per backend."""

from revit_kernels.ops.attention import attention
from revit_kernels.ops.layer_norm import layer_norm
from revit_kernels.ops.patch_embed import patch_embed, resize_patch_weight
from revit_kernels.ops.pool import pool
from revit_kernels.ops.pos_embed import pos_embed

__all__ = ["attention", "layer_norm", "patch_embed", "pool", "pos_embed", "resize_patch_weight"]
