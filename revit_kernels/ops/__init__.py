"""What is computed: one folder per op, one file per backend."""

from revit_kernels.ops.attention import attention

__all__ = ["attention"]
