"""A whole block on CPUs: csrc/block. Weights are packed in the call, or before by an engine (`pack`, `run`).

Measured by benchmarks/bench_block.py (2 cores of AMD Zen 4, AVX512-BF16) against the same ops one by one with oneDNN's
products: dim 384 1.2x to 1.7x, dim 768 1.1x to 1.2x in bf16; 1.1x to 1.25x, and 1.0x to 1.15x in fp32.
"""

import torch
from torch import Tensor

from revit_kernels import native
from revit_kernels.ops.block import ACTIVATIONS, BlockWeights
from revit_kernels.ops.linear.panels import KINDS, has_kernel, pack_weight

native.load("cpu")
_block = torch.ops.revit_kernels.block_cpu.default
_blocks = torch.ops.revit_kernels.blocks_cpu.default


def refusal(step, args):
    if args.x.device.type != "cpu":
        return f"needs CPU tensors, got one on {args.x.device}"
    if args.x.dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {args.x.dtype}"
    for name in ("norm1", "norm2", "qkv", "proj", "fc1", "fc2"):
        if (found := getattr(args, name).dtype) != args.x.dtype:
            return f"needs weights of x's dtype, {args.x.dtype}, got {name} of {found}"
    return unable((*args.proj.shape, args.fc1.shape[0]), args.kind)


def unable(widths, kind):
    """Why there is no kernel for these widths of activations, whatever x may be; None if there is one."""
    if any(width % 4 for width in widths):
        return "needs widths that are multiples of 4"
    if kind == "int8" and not has_kernel("int8"):
        return "int8 needs a CPU with AVX512-VNNI and AVX512-BF16"
    return None


def affine(*tensors: Tensor) -> list[Tensor]:
    """A norm's weight and bias as the kernel reads them: (lengths, dim) float32."""
    return [t.detach().float().contiguous().view(-1, t.shape[-1]) for t in tensors]


def pack(w: BlockWeights, kind: str | None) -> list[Tensor]:
    """The block's four products, packed for `run`."""
    kind = kind or w.qkv.dtype
    parts = (w.qkv, w.qkv_bias, None), (w.proj, w.proj_bias, w.gamma1), (w.fc1, w.fc1_bias, None)
    return [pack_weight(*part, kind) for part in (*parts, (w.fc2, w.fc2_bias, w.gamma2))]


def run(
    x, cu_seqlens, row, weights, widths, heads, eps1, eps2, scale, activation, kind, head=(), head_eps=0.0, classes=0
) -> Tensor:
    """Blocks one after the other, equal in all but their weights.

    weights: of each block norm1's and norm2's `affine`, then what `pack` gave: 8 tensors
    widths:  of x, of what is attended, and of the hidden layer
    head:    none; or the final norm's `affine` and the packed weight to `classes`: then (images, classes) come back,
             of each image's first token
    """
    _, width, hidden = widths
    return _blocks(
        x.contiguous(),
        cu_seqlens.contiguous(),
        row if row is None else row.contiguous(),
        weights,
        *(eps1, eps2, heads, width // heads, hidden, scale),
        *(ACTIVATIONS.index(activation), KINDS[kind or x.dtype]),
        *(head, head_eps, classes),
    )


def forward(x, cu_seqlens, row, *rest):
    *parameters, heads, eps1, eps2, scale, activation, kind = rest
    tensors = x, cu_seqlens, row, *parameters
    tensors = (t if t is None else t.detach().contiguous() for t in tensors)
    return _block(*tensors, eps1, eps2, heads, scale, ACTIVATIONS.index(activation), KINDS[kind or x.dtype])
