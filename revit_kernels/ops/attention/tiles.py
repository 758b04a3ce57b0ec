"""Tiles of the Triton kernels of attention: a rule for any head_dim, the shapes that tables list, what a tuner tries.

A table that tells lengths apart gives an image other bits where its batch's menu has another longest length: BLOCK_KEYS
of the forward orders its sums, and so do num_warps. The tables shipped do not.
"""

from itertools import product

import torch

HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 112, 128)
KERNELS = ("forward", "backward_q", "backward_kv")
SHAPES = {
    kernel: [{"bits": 16, "head_dim": dim} for dim in HEAD_DIMS] + [{"bits": 32, "head_dim": dim} for dim in (64, 128)]
    for kernel in KERNELS
}
LENGTHS = (64, 208, 576, 1024)  # that a tuner measures


def pieces(dim: int) -> tuple[int, int]:
    """The powers of two that cover head_dim: one, or a main one and a rest of at least 16 (what tl.dot takes)."""
    whole = max(16, 1 << (dim - 1).bit_length())
    main = whole // 2
    rest = max(16, 1 << (dim - main - 1).bit_length()) if dim > main else 0
    return (main, rest) if 16 <= main and 0 < rest < main else (whole, 0)


def aligned(dim: int, bits: int) -> bool:
    """Whether every row of every head starts on 16 bytes: the tiles depend on it, so it must not depend on strides."""
    return dim * bits % 128 == 0


def rule(kernel: str, bits: int, head_dim: int, **_) -> dict[str, int]:
    """What neither spills nor overflows shared memory on sm_80, sm_90 and sm_100."""
    main, rest = pieces(head_dim)
    if bits == 32:
        if main + rest > 128:
            tiles = 16, 16, 8, 1
        elif main == 128:
            tiles = {"forward": (32, 32, 8, 1), "backward_q": (16, 16, 8, 1), "backward_kv": (16, 32, 8, 1)}[kernel]
        else:
            tiles = (32, 32, 4, 1) if kernel == "forward" else (16, 32, 4, 1)
    elif main + rest > 128:
        tiles = 32, 32, 8 if kernel == "backward_kv" or not aligned(head_dim, bits) else 4, 1
    elif not aligned(head_dim, bits):  # every number has an address of its own
        queries = 64 if kernel == "forward" else 16 if kernel == "backward_kv" and rest else 32
        tiles = queries, 64 if kernel == "backward_kv" and main == 32 else 32, 8, 1
    elif kernel == "forward":
        tiles = 64, 32 if rest > 16 else 64, 8 if main == 128 > head_dim else 4, 2
    elif kernel == "backward_q":
        tiles = 64, 32, 4, 2
    elif rest > 16:
        tiles = 16, 64, 8, 2
    else:
        tiles = 32, 64, 8 if rest or main == 128 > head_dim else 4, 2
    return dict(zip(("BLOCK_QUERIES", "BLOCK_KEYS", "num_warps", "num_stages"), tiles))


def candidates(kernel: str, bits: int, head_dim: int, **_) -> list[dict[str, int]]:
    """Tiles whose operands and sums have room in registers; the compiler has the last word."""
    main, rest = pieces(head_dim)
    found = []
    for queries, keys, warps, stages in product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
        sums = queries if kernel != "backward_kv" else 2 * keys
        numbers = (sums * (main + rest) + 2 * queries * keys) / (32 * warps)  # fp32, of a thread
        loaded = (2 * keys if kernel != "backward_kv" else 2 * queries) * (main + rest) * bits // 8
        if numbers <= 160 and loaded * stages <= 160 * 1024 and queries * keys >= 512 * warps // 4:
            found.append({"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": warps, "num_stages": stages})
    return found


def trial(kernel: str, device: torch.device, bits: int, head_dim: int, length: int = 208):
    """Images of that length and, to be right about edges, a few shorter ones."""
    heads, images = (12, max(4, 32768 // length)) if device.type == "cuda" else (1, 2)
    lengths = [1, max(1, length // 2 + 1), *[length] * images]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    dtype = torch.float32 if bits == 32 else torch.bfloat16 if device.type == "cuda" else torch.float16
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(lengths), heads, head_dim, generator=generator, device=device).to(dtype) for _ in range(4)
    )
    where = bounds, length, bounds, length, head_dim**-0.5
    if kernel == "forward":
        return "forward", (q, k, v, *where)
    from revit_kernels.ops.attention import reference

    return "backward", (grad, q, k, v, *reference.forward(q, k, v, *where), *where)
