"""Tiles of the Triton kernels of pool: a rule for any dim, the shapes that tables list, what a tuner tries."""

from itertools import product

import torch

DIMS = (192, 384, 768, 1024, 1280)
SHAPES = {
    kernel: [{"bits": 16, "dim": dim} for dim in DIMS] + [{"bits": 32, "dim": 768}]
    for kernel in ("forward", "backward")
}


def rule(kernel: str, bits: int, dim: int, **_) -> dict[str, int]:
    """8 columns a thread: 16 bytes at once in 16-bit dtypes."""
    return {"BLOCK_TOKENS": 16, "BLOCK_DIM": 64, "num_warps": 4}


def candidates(kernel: str, bits: int, dim: int, **_) -> list[dict[str, int]]:
    """From 4 to 32 numbers a thread."""
    sizes = product((4, 8, 16, 32, 64), (32, 64, 128, 256), (1, 2, 4, 8))
    room = [(rows, cols, n) for rows, cols, n in sizes if 4 <= rows * cols / (32 * n) <= 32]
    return [{"BLOCK_TOKENS": rows, "BLOCK_DIM": cols, "num_warps": n} for rows, cols, n in room]


def trial(kernel: str, device: torch.device, bits: int, dim: int):
    """The mean and the largest of images of mixed lengths: what asks most of the kernels."""
    images = 256 if device.type == "cuda" else 3
    lengths = [(50, 101, 197, 1)[i % 4] for i in range(images)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    x = torch.randn(sum(lengths), dim, generator=generator, device=device).to(dtype)
    how = "avgmax", 1, True
    if kernel == "forward":
        return "forward", (x, bounds, *how)
    grad = torch.randn(images, dim, generator=generator, device=device).to(dtype)
    return "backward", (grad, x, bounds, sum(lengths), *how)
