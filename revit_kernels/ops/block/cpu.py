"""A whole block on CPUs: csrc/block.

Measured by benchmarks/bench_block.py (2 cores of AMD Zen 4, AVX512-BF16) against the same ops one by one with oneDNN's
products: dim 384 1.2x to 1.7x, dim 768 1.1x to 1.2x in bf16; 1.1x to 1.25x, and 1.0x to 1.15x in fp32.
"""

import torch

from revit_kernels import native
from revit_kernels.layouts import KINDS, Layouts, panels
from revit_kernels.ops.block import ACTIVATIONS

native.load("cpu")
_forward = torch.ops.revit_kernels.blocks_cpu.default
_packs = torch.ops.revit_kernels.packs_cpu.default


def _floats(t):
    return None if t is None else t.detach().float().contiguous()


def _pack_all(qkv, qkv_bias, proj, proj_bias, gamma1, fc1, fc1_bias, fc2, fc2_bias, gamma2, kind):
    parts = (qkv, qkv_bias, None), (proj, proj_bias, gamma1), (fc1, fc1_bias, None), (fc2, fc2_bias, gamma2)
    return [panels(*part, kind) for part in parts]


def _affines(*tensors):
    """The norms' weights and biases in fp32, a row per length."""
    return [_floats(t).view(-1, t.shape[-1]) for t in tensors]


_products = Layouts(_pack_all)
heads = Layouts(lambda weight, bias: panels(weight, bias, None, weight.dtype))
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
    if kind == "int8" and not _packs(KINDS["int8"]):
        return "int8 needs a CPU with AVX512-VNNI and AVX512-BF16"
    return None


def prepack(weights, kind=None) -> None:
    """Pack the weights now, and see no more whether they changed but by their versions."""
    _products.trust(*_of_products(weights), how=(kind or weights.qkv.dtype,))
    _norms.trust(*_of_norms(weights))


def _read(w, kind):
    """What a block reads: its norms' affines and its packed weights."""
    products, norms, how = _of_products(w), _of_norms(w), (kind or w.qkv.dtype,)
    # fp32 needs no copy, so none that might be stale.
    affines = (None if w.norm1.dtype == torch.float32 else _norms.get(*norms)) or _affines(*norms)
    return *affines, *(_products.get(*products, how=how) or _pack_all(*products, *how))


def _addresses(read) -> torch.Tensor:
    """(blocks, 10) int64, as the kernel takes them. read: what `_read` gives, of each block"""
    table = [[*(t.data_ptr() for t in tensors), len(tensors[0]), len(tensors[2])] for tensors in read]
    return torch.tensor(table, dtype=torch.int64)


def trusted(w, kind):
    """The products' weights as they were packed on trust, if they were, and nobody wrote to them since."""
    return _products.trusted(*_of_products(w), how=(kind or w.qkv.dtype,))


def addresses(read, first):
    """For `forward_trusted`, of blocks whose affines begin with this row, where they have one for each length.

    read: of each block, its norms' weights and biases, (dim,) or (lengths, dim), and what `trusted` gave
    """
    tables = [([_floats(t).view(-1, t.shape[-1]) for t in affines], products) for affines, products in read]
    made = _addresses([(*(t[min(first, len(t) - 1) :] for t in affines), *products) for affines, products in tables])
    made.read = tables  # alive as long as their addresses
    return made


def head_addresses(affine, packed, classes, first) -> torch.Tensor:
    """Of the final norm and the head, for `forward_trusted`. affine: the norm's weight and bias; packed: by `panels`"""
    affine = [_floats(t).view(-1, t.shape[-1]) for t in affine]
    of_first = [t[min(first, len(t) - 1) :] for t in affine]
    made = torch.tensor([*(t.data_ptr() for t in of_first), len(of_first[0]), packed.data_ptr(), classes])
    made.read = affine, packed
    return made


def forward_trusted(
    x, cu_seqlens, addresses, row, widths, heads, eps, scale, activation, kind, head=None, head_eps=0.0
):
    """`forward_blocks` of what `addresses` gave. widths: of the tokens, of what is attended, and hidden

    head: what `head_addresses` gave: then (images, classes) come back, of each image's first token
    """
    _, width, hidden = widths
    return _forward(
        x.contiguous(),
        cu_seqlens.contiguous(),
        row if row is None else row.contiguous(),
        addresses,
        *(*eps, heads, width // heads, hidden, scale),
        *(ACTIVATIONS.index(activation), KINDS[kind or x.dtype]),
        *(head, head_eps),
    )


def forward_blocks(x, cu_seqlens, row, blocks, heads, eps, scale, activation, kind):
    """The blocks one after the other, alike in all but their weights. blocks: a BlockWeights each"""
    w, read = blocks[0], [_read(w, kind) for w in blocks]  # kept alive until they were read
    widths = (*w.proj.shape, w.fc1.shape[0])
    return forward_trusted(x, cu_seqlens, _addresses(read), row, widths, heads, eps, scale, activation, kind)


def forward(x, cu_seqlens, row, w, heads, eps, scale, activation, kind):
    return forward_blocks(x, cu_seqlens, row, [w], heads, eps, scale, activation, kind)
