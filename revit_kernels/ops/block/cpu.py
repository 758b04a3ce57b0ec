"""A whole block on CPUs: csrc/block.

Measured (2 cores of AMD Zen 4, AVX512-BF16, one thread, ViT-S/16, 8 images at 4 lengths): against the same block op by
op with oneDNN's products 1.1x in bf16 and in fp32; the products run at 97 % of what the multiply instruction can give.
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


def _made(
    norm1, bias1, norm2, bias2, qkv, qkv_bias, proj, proj_bias, gamma1, fc1, fc1_bias, fc2, fc2_bias, gamma2, kind
):
    """The norms' affines in fp32, a row per length, None where None was given; and the four products' weights."""
    parts = (qkv, qkv_bias, None), (proj, proj_bias, gamma1), (fc1, fc1_bias, None), (fc2, fc2_bias, gamma2)
    return (
        [None if t is None else _rows(t) for t in (norm1, bias1, norm2, bias2)],
        [_pack(w.detach().contiguous(), _floats(bias), _floats(gamma), kind) for w, bias, gamma in parts],
    )


_layouts = Layouts(_made, weight=4)


def _rows(t):
    return _floats(t).view(-1, t.shape[-1])


def _order(w):
    """The tensors as `_made` takes them: an affine per length is picked anew for each batch, and is not kept."""
    plain = w.norm1.ndim == w.norm2.ndim == 1
    norms = (w.norm1, w.norm1_bias, w.norm2, w.norm2_bias) if plain else (None,) * 4
    return *norms, w.qkv, w.qkv_bias, w.proj, w.proj_bias, w.gamma1, w.fc1, w.fc1_bias, w.fc2, w.fc2_bias, w.gamma2


def refusal(x, cu_seqlens, row, weights, heads, eps, scale, activation, kind):
    if x.device.type != "cpu":
        return f"needs CPU tensors, got one on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {x.dtype}"
    if weights.qkv.dtype != x.dtype:
        return f"needs weights of x's dtype, {x.dtype}, got {weights.qkv.dtype}"
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
    _layouts.trust(*_order(weights), how=(KINDS[kind or weights.qkv.dtype],))


def _read(w, kind):
    """What a block reads: its norms' affines and its packed weights."""
    tensors, how = _order(w), (KINDS[kind or w.qkv.dtype],)
    norms, packed = _layouts.get(*tensors, how=how) or _made(*tensors, *how)
    if norms[0] is None:
        norms = [_rows(t) for t in (w.norm1, w.norm1_bias, w.norm2, w.norm2_bias)]
    return *norms, *packed


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
