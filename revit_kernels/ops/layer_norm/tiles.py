"""Tiles of the Triton kernels of layer_norm: a rule for any dim, the shapes that tables list, what a tuner tries."""

import torch

DIMS = (192, 384, 768, 1024, 1152, 1280)
SHAPES = {
    kernel: [{"bits": 16, "dim": dim} for dim in DIMS] + [{"bits": 32, "dim": 768}]
    for kernel in ("forward", "backward", "reduce")
}


def columns(dim: int) -> int:
    """A row's columns in a tile: all of them."""
    return 1 << (dim - 1).bit_length()


def rule(kernel: str, bits: int, dim: int, **_) -> dict[str, int]:
    """Forward: about 16 numbers a thread at 4 warps, where the dim allows. Backward: a row, 8 numbers a thread."""
    if kernel == "forward":
        return {"BLOCK_TOKENS": max(1, min(16, 2048 // columns(dim))), "num_warps": 4}
    if kernel == "backward":
        return {"num_warps": min(8, max(1, columns(dim) // 256))}
    return {"BLOCK_PROGRAMS": 32, "BLOCK_DIM": 64, "num_warps": 4}


def candidates(kernel: str, bits: int, dim: int, **_) -> list[dict[str, int]]:
    """From 4 to 64 numbers a thread."""
    warps = (1, 2, 4, 8)
    if kernel == "forward":
        sizes = [(tokens, n) for tokens in (1, 2, 4, 8, 16) for n in warps]
        room = [(tokens, n) for tokens, n in sizes if 4 <= tokens * columns(dim) / (32 * n) <= 64]
        return [{"BLOCK_TOKENS": tokens, "num_warps": n} for tokens, n in room]
    if kernel == "backward":
        return [{"num_warps": n} for n in warps if 4 <= columns(dim) / (32 * n) <= 64]
    sizes = [(programs, block) for programs in (16, 32, 64) for block in (32, 64, 128)]
    return [{"BLOCK_PROGRAMS": programs, "BLOCK_DIM": block, "num_warps": 4} for programs, block in sizes]


def trial(kernel: str, device: torch.device, bits: int, dim: int):
    """A residual add, LayerScale and four affines, as a block of a resizable model calls it."""
    tokens, lengths = (32768 if device.type == "cuda" else 37), 4
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    row = (torch.arange(tokens, device=device) * lengths // tokens).to(torch.int32)
    x, branch, weight, bias, gamma = (
        normal(tokens, dim),
        normal(tokens, dim),
        *(normal(lengths, dim) for _ in "wb"),
        normal(dim),
    )
    if kernel == "forward":
        return "forward", (x, weight, bias, row, branch, gamma, 1e-6, False)
    from revit_kernels.ops.layer_norm import reference

    _, total, mean, rstd = reference.forward(x, weight, bias, row, branch, gamma, 1e-6, False)
    dy, dsum = normal(tokens, dim), normal(tokens, dim)
    return "backward", (dy, dsum, total, weight, bias, row, branch, gamma, mean, rstd, False)
