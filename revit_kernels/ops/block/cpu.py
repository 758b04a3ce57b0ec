"""A whole block on CPUs: csrc/block. Weights are packed in the call, or before by an engine (`pack`, `run`).

Measured by benchmarks/bench_block.py (2 cores of AMD Zen 4, AVX512-BF16) against the same ops one by one with oneDNN's
products: dim 384 1.2x to 1.7x, dim 768 1.1x to 1.2x in bf16; 1.1x to 1.25x, and 1.0x to 1.15x in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels import native
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.ops.block import NORMS, PRODUCTS, BlockWeights, Form
from revit_kernels.ops.linear.panels import ACTIVATIONS, KINDS, has_kernel, pack_weight

native.load("cpu")
_block = torch.ops.revit_kernels.block_cpu.default
_blocks = torch.ops.revit_kernels.blocks_cpu.default


class Time(NamedTuple):
    """What blocks of divided attention do before the rest: across frames, which leaves the classes as they are.

    frames:     (clips,) int32: how many each clip has; its tokens are [class copy, patches] of each, one after another
    weights:    of each block the `affine` of its norm, and packed the products to queries, keys and values, and behind
                attention
    eps, scale: of its norm, and of its attention
    """

    frames: Tensor
    weights: list[Tensor]
    eps: float
    scale: float


def refusal(step, args):
    if why := native.cpu_refusal(args.x):
        return why
    for name in (*NORMS, *PRODUCTS):
        if (weight := getattr(args, name)) is not None and weight.dtype != args.x.dtype:
            return f"needs weights of x's dtype, {args.x.dtype}, got {name} of {weight.dtype}"
    if args.cos is not None and args.cos.dtype != torch.float32:
        return f"a rotary table must be of float32, got {args.cos.dtype}"
    return unable(args.proj.shape, args.kind)


def unable(widths, kind):
    """Why there is no kernel for these widths, of x and of what is attended; None if there is one."""
    if any(width % 4 for width in widths):
        return f"needs widths that are multiples of 4, got {tuple(widths)}"
    if kind == "int8" and not has_kernel("int8"):
        return "int8 needs a CPU with AVX512-VNNI and AVX512-BF16"
    return None


def affine(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """A norm's weight and bias as the kernel reads them: (lengths, dim) float32."""
    pair = weight, torch.zeros_like(weight) if bias is None else bias
    return [t.detach().float().contiguous().view(-1, t.shape[-1]) for t in pair]


def padded(w: BlockWeights) -> BlockWeights:
    """With zeros beyond a hidden layer that is no multiple of 4: the kernel multiplies 4 numbers at a time."""
    if not (beyond := -w.fc1.shape[0] % 4):
        return w
    fields = {"fc2": F.pad(w.fc2, (0, beyond))}
    for name, at in (("fc1", (0, 0, 0, beyond)), ("fc1_x", (0, 0, 0, beyond)), ("fc1_bias", (0, beyond))):
        fields[name] = None if getattr(w, name) is None else F.pad(getattr(w, name), at)
    fields["fc1_x_bias"] = None if w.fc1_x_bias is None else F.pad(w.fc1_x_bias, (0, beyond))
    return w._replace(**fields)


def pack(w: BlockWeights, kind: str | None) -> BlockWeights:
    """The weights as `run` takes them: norms as their `affine`, products packed, with what belongs to them."""
    w, kind, packed = padded(w), kind or w.qkv.dtype, dict.fromkeys(BlockWeights._fields)
    for norm in NORMS:
        if (weight := getattr(w, norm)) is not None:
            packed[norm], packed[f"{norm}_bias"] = affine(weight, getattr(w, f"{norm}_bias"))
    for product, gamma in zip(PRODUCTS, (None, w.gamma1, None, None, w.gamma2)):
        if (weight := getattr(w, product)) is not None:
            packed[product] = pack_weight(weight, getattr(w, f"{product}_bias"), gamma, kind)
    return BlockWeights(**packed)


def listed(weights: list[BlockWeights]) -> tuple[list[Tensor], list[int]]:
    """The tensors of blocks of one form one after the other, and which fields of BlockWeights they are."""
    fields = [i for i, t in enumerate(weights[0]) if t is not None]
    return [w[i] for w in weights for i in fields], fields


def run(
    x: Tensor,
    cu_seqlens: Tensor,
    row: Tensor | None,
    weights: list[Tensor],
    fields: list[int],
    form: Form,
    kind: str | None,
    rotary: list[Rotary] = (),
    head=(),
    head_eps: float = 0.0,
    classes: int = 0,
    time: Time | None = None,
) -> Tensor:
    """Blocks one after the other, equal in all but their weights.

    weights, fields: `listed`, of what `pack` gave for each block
    rotary:          none; one for all blocks, or one for each, of the same rows
    head:            none; or the final norm's `affine` and the packed weight to `classes`: then (images, classes) come
                     back, of each image's first token
    time:            of blocks of divided attention, whose images are clips: see `Time`
    """
    _, width, hidden = form.widths
    cos, sin, rotary_row, half = [], [], None, False
    if rotary:
        cos, sin, rotary_row, half = [r.cos for r in rotary], [r.sin for r in rotary], rotary[0].row, rotary[0].half
    return _blocks(
        *(x.contiguous(), cu_seqlens.contiguous(), row if row is None else row.contiguous()),
        *(weights, fields, form.eps, form.rms, form.heads, width, hidden, form.scale),
        *(ACTIVATIONS.index(form.activation), KINDS[kind or x.dtype]),
        *(cos, sin, rotary_row, half),
        *(head, head_eps, classes),
        *((None, [], 0.0, 0.0) if time is None else time),
    )


def forward(x, cu_seqlens, row, *rest):
    parameters, rest = BlockWeights(*rest[: len(BlockWeights._fields)]), rest[len(BlockWeights._fields) :]
    heads, eps, rms, scale, activation, cos, sin, rotary_row, half, kind = rest
    x, cu_seqlens, row, cos, sin, rotary_row = (
        t if t is None else t.detach().contiguous() for t in (x, cu_seqlens, row, cos, sin, rotary_row)
    )
    weights, fields = listed([padded(parameters)])
    weights = [t.detach().contiguous() for t in weights]
    widths = (parameters.proj.shape[1], parameters.fc1.shape[0])
    how = (eps, rms, heads, *widths, scale, ACTIVATIONS.index(activation), KINDS[kind or x.dtype])
    return _block(x, cu_seqlens, row, weights, fields, *how, cos, sin, rotary_row, half)
