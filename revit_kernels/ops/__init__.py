"""What is computed: one folder per op, one file per backend."""

from revit_kernels.ops.layer_norm import layer_norm
from revit_kernels.ops.pool import pool

__all__ = ["layer_norm", "pool"]
