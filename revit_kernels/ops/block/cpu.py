"""A whole block on CPUs: csrc/block.

Measured by benchmarks/bench_block.py (2 cores of AMD Zen 4, AVX512-BF16) against the same ops one by one with oneDNN's
products: dim 384 1.2x to 1.5x, dim 768 1.1x to 1.2x in bf16; 1.16x to 1.35x, and 1.0x to 1.05x in fp32; with 32 images
at 94 to 96 % of the largest matrix product.
"""

import torch

from revit_kernels import native
from revit_kernels.layouts import Layouts
from revit_kernels.ops.block import ACTIVATIONS

native.load("cpu")
_forward = torch.ops.revit_kernels.blocks_cpu.default
_pack = torch.ops.revit_kernels.block_pack_cpu.default
_takes = torch.ops.revit_kernels.block_takes_cpu.default
KINDS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2}


def _floats(t):
    return None if t is None else t.detach().float().contiguous()


def _pack_all(qkv, qkv_bias, proj, proj_bias, gamma1, fc1, fc1_bias, fc2, fc2_bias, gamma2, kind):
    parts = (qkv, qkv_bias, None), (proj, proj_bias, gamma1), (fc1, fc1_bias, None), (fc2, fc2_bias, gamma2)
    return [_pack(w.detach().contiguous(), _floats(bias), _floats(gamma), kind) for w, bias, gamma in parts]


def _affines(*tensors):
    """The norms' weights and biases in fp32, a row per length."""
    return [_floats(t).view(-1, t.shape[-1]) for t in tensors]


_products = Layouts(_pack_all)
_norms = Layouts(_affines)  # apart: an affine per length is picked anew for each batch, and is not kept


def _of_products(w):
    return w.qkv, w.qkv_bias, w.proj, w.proj_bias, w.gamma1, w.fc1, w.fc1_bias, w.fc2, w.fc2_bias, w.gamma2


def _of_norms(w):
    return w.norm1, w.norm1_bias, w.norm2, w.norm2_bias


def refusal(x, cu_seqlens, row, weights, heads, eps, scale, activation, kind):
    if x.device.type != "cpu":
        return f"needs CPU tensors, got one on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {x.dtype}"
    for name in ("norm1", "norm2", "qkv", "proj", "fc1", "fc2"):
        if (found := getattr(weights, name).dtype) != x.dtype:
            return f"needs weights of x's dtype, {x.dtype}, got {name} of {found}"
    return unable((*weights.proj.shape, weights.fc1.shape[0]), kind)


def unable(widths, kind):
    """Why there is no kernel for these widths of activations, whatever x may be; None if there is one."""
    if any(width % 4 for width in widths):
        return "needs widths that are multiples of 4"
    if kind == "int8" and not _takes(KINDS["int8"]):
        return "int8 needs a CPU with AVX512-VNNI and AVX512-BF16"
    return None


def prepack(weights, kind=None) -> None:
    """Pack the weights now, and see no more whether they changed but by their versions."""
    _products.trust(*_of_products(weights), how=(KINDS[kind or weights.qkv.dtype],))
    _norms.trust(*_of_norms(weights))


def _read(w, kind):
    """What a block reads: its norms' affines and its packed weights."""
    products, norms, how = _of_products(w), _of_norms(w), (KINDS[kind or w.qkv.dtype],)
    # fp32 needs no copy, so none that might be stale.
    affines = (None if w.norm1.dtype == torch.float32 else _norms.get(*norms)) or _affines(*norms)
    return *affines, *(_products.get(*products, how=how) or _pack_all(*products, *how))


def forward_blocks(x, cu_seqlens, row, blocks, heads, eps, scale, activation, kind):
    """The blocks one after the other, alike in all but their weights. blocks: a BlockWeights each"""
    read = [_read(w, kind) for w in blocks]  # kept alive until they were read
    addresses = [[*(t.data_ptr() for t in tensors), len(tensors[0]), len(tensors[2])] for tensors in read]
    w = blocks[0]
    return _forward(
        x.contiguous(),
        cu_seqlens.contiguous(),
        row if row is None else row.contiguous(),
        torch.tensor(addresses, dtype=torch.int64),
        *(*eps, heads, w.proj.shape[1] // heads, w.fc1.shape[0], scale),
        *(ACTIVATIONS.index(activation), KINDS[kind or w.qkv.dtype]),
    )


def forward(x, cu_seqlens, row, w, heads, eps, scale, activation, kind):
    return forward_blocks(x, cu_seqlens, row, [w], heads, eps, scale, activation, kind)
