"""What is computed: one folder per op, one file per backend."""

from revit_kernels.ops.patch_embed import patch_embed, resize_patch_weight
from revit_kernels.ops.pos_embed import pos_embed

__all__ = ["patch_embed", "pos_embed", "resize_patch_weight"]
