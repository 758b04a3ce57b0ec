"""What is computed: one folder per op, one file per backend."""

from revit_kernels.ops.pos_embed import pos_embed

__all__ = ["pos_embed"]
