"""The GPU's way through this library where there is no GPU: tensors on `meta`, and kernels that only make results.

What a forward does then is all the host does on a GPU, but for what a launch itself takes and for pinned memory.
"""

import sys
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

from revit_kernels import dispatch, native
from revit_kernels.ops.linear import choice

OPS = {
    "attention": {
        "_forward": lambda q, k, v, *_: (v.new_empty(q.shape), v.new_empty(q.shape[:2], dtype=torch.float32))
    },
    "layer_norm": {"_forward": lambda x, weight, bias, row, branch, *_: _normalised(x, branch)},
    "patch_embed": {
        "_images": lambda *_: None,
        "_shared": lambda device: 228,
        "_forward": lambda images, table, weight, bias, cu_seqlens, placement, image, *_: (
            weight.new_empty(image.shape[0], weight.shape[0]),
            weight.new_empty(0, weight.shape[1]),
        ),
    },
    "pool": {"_forward": lambda x, cu_seqlens, *_: x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])},
    "pos_embed": {"_forward": lambda table, *arrays: table.new_empty(_cells(arrays[-1]), table.shape[2])},
}


def _normalised(x, branch):
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    return torch.empty_like(x), total, *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))


def _cells(sizes):
    return sum(h * w for h, w in zip(sizes[::2], sizes[1::2]))


def _linear(x, weight, bias=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_plain_autocast, _plain_casts = torch.autocast, torch.is_autocast_enabled


def _autocast(device, **options):
    return _plain_autocast("cuda" if device == "meta" else device, **options)


def _casts(device):
    return _plain_casts("cuda" if device == "meta" else device)


class _AnyOp:
    """torch.ops.revit_kernels, as if the CUDA library were loaded."""

    default = staticmethod(lambda *_: None)


@contextmanager
def stubbed():
    """Tensors on `meta` count as CUDA tensors of a Hopper, whose kernels make empty results. For inference."""
    modules = [f"revit_kernels.ops.{op}.cuda" for op in OPS]
    before = {name: sys.modules.pop(name, None) for name in modules}
    dispatch.load.cache_clear()
    names = ["attention_cuda", "attention_backward_cuda", "layer_norm_cuda", "layer_norm_backward_cuda", "pool_cuda"]
    names += ["pool_backward_cuda", "pos_embed_cuda", "pos_embed_backward_cuda", "patch_embed_cuda"]
    names += ["patch_embed_images_cuda", "patch_embed_sums_cuda"]
    patches = [mock.patch.object(torch.ops.revit_kernels, name, _AnyOp, create=True) for name in names]
    patches += [mock.patch.object(native, "load", lambda device: None)]
    patches += [mock.patch.object(native, "_capability", lambda device: (9, 0))]
    patches += [mock.patch.object(choice, "_lookup", lambda *_: choice.VENDOR_FIRST)]
    patches += [mock.patch.object(torch.Tensor, "is_cuda", True, create=True)]
    patches += [mock.patch.object(torch.Tensor, "is_meta", False, create=True)]
    patches += [mock.patch.object(F, "linear", _linear)]
    patches += [mock.patch.object(torch, "autocast", _autocast)]
    patches += [mock.patch.object(torch, "is_autocast_enabled", _casts)]
    try:
        for patch in patches:
            patch.start()
        for op, functions in OPS.items():
            module = dispatch.load(op, "cuda")
            if isinstance(module, str):
                raise RuntimeError(module)
            for name, function in functions.items():
                setattr(module, name, function)
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        dispatch.load.cache_clear()
