"""Tiles of the Triton kernel of pos_embed: a rule for any dim, the shapes that tables list, what a tuner tries."""

from itertools import product

import torch

SHAPES = {"resample": [{"bits": bits, "dim": dim} for bits, dim in ((16, 768), (32, 192), (32, 384), (32, 768))]}


def rule(kernel: str, bits: int, dim: int, **_) -> dict[str, int]:
    return {"BLOCK_TAPS": 16, "BLOCK_DIM": min(1 << (dim - 1).bit_length(), 128), "num_warps": 4}


def candidates(kernel: str, bits: int, dim: int, **_) -> list[dict[str, int]]:
    widest = 1 << (dim - 1).bit_length()
    sizes = product((4, 8, 16), (64, 128, 256, 512), (1, 2, 4))
    room = [(taps, cols, n) for taps, cols, n in sizes if cols <= widest and taps * cols >= 64 * n]
    return [{"BLOCK_TAPS": taps, "BLOCK_DIM": cols, "num_warps": n} for taps, cols, n in room]


def trial(kernel: str, device: torch.device, bits: int, dim: int):
    """A menu of four grids, smaller and larger than the table, and the table's own."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    side, menu = (14, [16, 16, 14, 14, 10, 10, 7, 7]) if device.type == "cuda" else (3, [4, 2, 3, 3])
    table = torch.randn(side, side, dim, generator=generator, device=device).to(dtype)
    return "forward", (table, menu, "bicubic", True, False, 0.0)
