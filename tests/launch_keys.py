"""Prints, as JSON, under which keys Triton would compile the launches of batches that differ as traffic differs.

Run in a process of its own: with TRITON_INTERPRET set there are no keys. Nothing is compiled and nothing launched: the
kernels' outputs stay as they were allocated, on the CPU.
"""

import importlib
import itertools
import json
import os
from functools import cache

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from revit_kernels.ops.attention import tail_triton

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
TOKENS, IMAGES, AHEAD = (1, 16, 17, 160, 17_000), (1, 16, 17), (0, 1)  # ahead: numbers before those of the batch
HEADS, HEAD_DIM, DIM, PREFIX = 2, 64, 128, 1
MODULES = {
    name: importlib.import_module(f"revit_kernels.ops.{name}.triton")
    for name in ("attention", "layer_norm", "linear", "patch_embed", "pool", "pos_embed", "temporal_attention")
} | {"tail": tail_triton}
keys = {}  # by case and kernel, each key as a dict by argument


@cache
def binder(kernel):
    return create_function_from_signature(kernel.signature, kernel.params, BACKEND)


def record(kernel, *args, grid, warmup, **options):
    _, specialization, _ = binder(kernel)(*args, **options)
    key = {name: str(value) for name, value in zip(kernel.arg_names, specialization)}
    found = keys.setdefault(f"{case}: {name}.{kernel.__name__}", [])
    if key not in found:
        found.append(key)


JITFunction.run = record


def numbers(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def indices(*shape, ahead):
    """A view into a larger buffer, as where several tensors come to the device in one copy."""
    count = torch.Size(shape).numel()
    return torch.zeros(ahead + count, dtype=torch.int32)[ahead:].view(shape)


def attention(op, tokens, images, ahead):
    for tokens_k in TOKENS[:-1]:
        q, k, v = numbers(max(tokens, tokens_k), 3, HEADS, HEAD_DIM).unbind(1)
        q, k, v = q[:tokens], k[:tokens_k], v[:tokens_k]
        ends, ends_k = (indices(images + 1, ahead=ahead) for _ in range(2))
        lengths = (ends, 160, ends_k, 160, 0.125)
        out, lse = op.forward(q, k, v, *lengths)
        op.backward(out, q, k, v, out, lse, *lengths)


def attention_turned(op, tokens, images, ahead):
    q, k, v = numbers(tokens, 3, HEADS, HEAD_DIM).unbind(1)
    ends, row = indices(images + 1, ahead=ahead), indices(tokens, ahead=ahead)
    for positions in TOKENS:
        angles = numbers(positions, HEAD_DIM // 2, dtype=torch.float32)
        told = (ends, 160, ends, 160, 0.125, angles, angles, row, True)
        out, lse = op.forward(q, k, v, *told)
        op.backward(out, q, k, v, out, lse, *told)


def layer_norm(op, tokens, images, ahead):
    x, affine, row = numbers(tokens, DIM), numbers(3, DIM), indices(tokens, ahead=ahead)
    _, _, mean, rstd = op.forward(x, affine, affine, row, x, affine[0], 1e-6, False)
    op.backward(x, x, x, affine, affine, row, x, affine[0], mean, rstd, False)


def layer_norm_to_e4m3(op, tokens, images, ahead):
    x, affine, row = numbers(tokens, DIM), numbers(3, DIM), indices(tokens, ahead=ahead)
    op.fp8(x, affine, affine, row, x, affine[0], 1e-6, False)


def layer_norm_of_one_length(op, tokens, images, ahead):
    x, affine = numbers(tokens, DIM), numbers(1, DIM)
    _, _, mean, rstd = op.forward(x, affine, affine, None, None, None, 1e-6, False)
    op.backward(x, None, x, affine, affine, None, None, None, mean, rstd, False)


def linear(op, tokens, images, ahead, dtype=torch.bfloat16):
    x, weight, vector = (numbers(*shape, dtype=dtype) for shape in ((tokens, DIM), (2 * DIM, DIM), (2 * DIM,)))
    y, kept = op.forward(x, weight, vector, "gelu", "first", True)
    op.backward(y, x, weight, vector, kept, "gelu", "first", False, False)


def linear_without_tma(op, tokens, images, ahead):
    linear(op, tokens, images, ahead, torch.float32)


def linear_in_e4m3(op, tokens, images, ahead):
    x, scale = op.quantize(numbers(tokens, DIM), DIM)
    weight, of_weight = numbers(DIM, DIM, dtype=torch.float8_e4m3fn), numbers(DIM, dtype=torch.float32)
    op.fp8(x, scale, weight, of_weight, None, "gelu", None, torch.bfloat16, True)


def patch_embed(op, tokens, images, ahead, resize=False):
    ends, placement = indices(images + 1, ahead=ahead), indices(images, 3, ahead=ahead)
    image, weight, vector = indices(tokens, ahead=ahead), numbers(DIM, 3, 16, 16), numbers(1, DIM)
    pixels = numbers(ahead + images * 3 * 32 * 32, dtype=torch.uint8)[ahead:].view(images, 3, 32, 32)
    for batch in ([pixels], list(pixels)):
        places, rest = (ends, placement, image), (None, None, "bicubic", False, resize, PREFIX, resize)
        _, patches = op.forward(batch, weight, vector[0], *places, vector, vector, *rest)
    op.backward(numbers(tokens, DIM), patches, *places, PREFIX, 4)


def patch_embed_resized(op, tokens, images, ahead):
    patch_embed(op, tokens, images, ahead, True)


def pool(op, tokens, images, ahead):
    x, ends = numbers(tokens, DIM), indices(images + 1, ahead=ahead)
    y = op.forward(x, ends, "avgmax", PREFIX, False)
    op.backward(y, x, ends, tokens, "avgmax", PREFIX, False)


def pos_embed(op, tokens, images, ahead, backward=False):
    sizes, how = [min(tokens, 20), 9] * images, ("bicubic", True, False, 0.0)  # rows, columns, rows, ...
    if backward:
        op.backward(numbers(sizes[0] * 9 * images, DIM), 14, 14, sizes, *how)
    else:
        op.forward(numbers(14, 14, DIM), sizes, *how)


def pos_embed_backward(op, tokens, images, ahead):
    pos_embed(op, tokens, images, ahead, True)


def temporal_attention(op, tokens, images, ahead):
    q, k, v = numbers(tokens, 3, HEADS, HEAD_DIM).unbind(1)
    told = (indices(images + 1, ahead=ahead), indices(images, ahead=ahead), 8, PREFIX, 0.125)
    out, lse = op.forward(q, k, v, *told)
    op.backward(out, q, k, v, out, lse, *told)


def tail(op, tokens, images, ahead):
    op.launch(numbers(tokens, DIM), indices(images + 1, ahead=ahead))


CASES = {
    "attention": [attention, attention_turned],
    "layer_norm": [layer_norm, layer_norm_to_e4m3, layer_norm_of_one_length],
    "linear": [linear, linear_without_tma, linear_in_e4m3],
    "patch_embed": [patch_embed, patch_embed_resized],
    "temporal_attention": [temporal_attention],
    "pool": [pool],
    "pos_embed": [pos_embed, pos_embed_backward],
    "tail": [tail],
}


def arguments(kernel):
    """Of each argument that is no constant and no tensor, whether its value may be part of the key."""
    numbers = (p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr"))
    return {p.name: not p.do_not_specialize for p in numbers}


if __name__ == "__main__":
    for name, calls in CASES.items():
        for call in calls:
            case = call.__name__
            for batch in itertools.product(TOKENS, IMAGES, AHEAD):
                call(MODULES[name], *batch)
    kernels = {
        f"{name}.{kernel.__name__}": arguments(kernel)
        for name, module in MODULES.items()
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction) and kernel.__name__.endswith("_kernel")
    }
    print(json.dumps({"kernels": kernels, "keys": keys}))
