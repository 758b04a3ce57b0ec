"""Torch ops in Triton's interpreter, with arguments of wrong sizes, strides, types and ranges.

What a GPU is trusted with (docs/security.md) stays: numbers in tensors of integers, as many rows as they speak of, and
what is said of the images they place: `resize` (whether one does not fit) and `prefix_tokens`.
"""

import conftest  # noqa: F401  sets the interpreter up, before Triton is imported
import numpy as np
import torch

from . import op_arguments
from .op_arguments import CALLS, Making, torch_ops_of
from .ops import NO_MEMORY, PRIVATE, mutate

OPS = [name for name in CALLS if name not in ("block", "resize_patch_weight")]  # these have no kernel in Triton


def prepare():
    np.seterr(all="ignore")  # of numbers without a logarithm, say: the interpreter's numbers are NumPy's
    op_arguments.prepare()


def _trusted(old, new):
    """The new value, or the old one where the new one differs in what is trusted."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return new
    fewer = old.ndim and new.ndim == old.ndim and new.shape[0] < old.shape[0] and new.shape[1:] == old.shape[1:]
    other_numbers = not old.is_floating_point() and (new.shape, new.dtype) == (old.shape, old.dtype)
    return old if fewer or other_numbers else new


def attempt(seed: int) -> str:
    m = Making(seed)
    r = m.random
    m.dtype = torch.float32  # the interpreter multiplies the bits of bf16
    torch.set_num_threads(1)
    name, args = r.choice(torch_ops_of(r.choice(OPS), m))
    op = getattr(torch.ops.revit_kernels, name)
    names = [argument.name for argument in op.default._schema.arguments]
    args[-1] = "triton"
    if "resize" in names:
        args[names.index("resize")] = True
    changes = r.choice((0, 1, 1, 1, 2, 3))
    for _ in range(changes):
        at = r.randrange(len(args) - 1)
        if names[at] not in ("resize", "prefix_tokens"):
            args[at] = _trusted(args[at], mutate(r, args[at]))
    try:
        with torch.no_grad():
            op(*args)
        return f"{name} answered"
    except PRIVATE as refused:
        no_memory = isinstance(refused, MemoryError) or any(said in str(refused) for said in NO_MEMORY)
        if not changes and not isinstance(refused, NotImplementedError):
            raise AssertionError(f"{name} refused arguments that fit: {refused}") from refused
        if not str(refused).strip() and not no_memory:
            raise AssertionError(f"{name} was refused with {type(refused).__name__} and no word") from refused
        return f"{name} refused"
