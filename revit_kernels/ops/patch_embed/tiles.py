"""Tiles of the Triton kernels of patch_embed: a rule for any shape, the shapes that tables list, what a tuner tries."""

from itertools import product

import torch

SHAPES = {
    "forward": [{"bits": 16, "dim": dim} for dim in (192, 384, 768, 1024)] + [{"bits": 32, "dim": 768}],
    "patchify": [{"bits": 16, "patch": 14}, {"bits": 16, "patch": 16}, {"bits": 32, "patch": 16}],
    "sums": [{"bits": 16, "dim": 768}, {"bits": 32, "dim": 768}],
}


def rule(kernel: str, bits: int, **shape) -> dict[str, int]:
    if kernel == "patchify":
        return {"BLOCK": 32, "num_warps": 8}
    if kernel == "sums":
        return {"BLOCK_IMAGES": 16, "BLOCK_DIM": min(1 << (shape["dim"] - 1).bit_length(), 128), "num_warps": 4}
    if bits == 32:
        return {"BLOCK_TOKENS": 64, "BLOCK_DIM": 64, "BLOCK_WIDTH": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_TOKENS": 128, "BLOCK_DIM": 64, "BLOCK_WIDTH": 32, "num_warps": 4, "num_stages": 3}


def candidates(kernel: str, bits: int, **shape) -> list[dict[str, int]]:
    if kernel == "patchify":
        return [{"BLOCK": block, "num_warps": n} for block, n in product((16, 32), (4, 8))]
    if kernel == "sums":
        sizes = product((8, 16, 32), (64, 128, 256), (2, 4))
        return [{"BLOCK_IMAGES": images, "BLOCK_DIM": cols, "num_warps": n} for images, cols, n in sizes]
    sizes = product((64, 128), (64, 128), (16, 32, 64), (4, 8), (2, 3, 4))
    room = [size for size in sizes if size[0] * size[1] / (32 * size[3]) <= (32 if bits == 32 else 128)]
    names = "BLOCK_TOKENS", "BLOCK_DIM", "BLOCK_WIDTH", "num_warps", "num_stages"
    return [dict(zip(names, size)) for size in room]


def trial(kernel: str, device: torch.device, bits: int, dim: int = 768, patch: int = 16):
    """uint8 images at the size of their grids; for `patchify` half as large again, so that they are resized."""
    from revit_kernels.packing import Packing

    if device.type == "cuda":
        images, side, channels = 256, 14, 3
    else:
        images, side, channels, dim = 2, 2, 1, min(dim, 64)
    dtype = torch.float32 if bits == 32 else torch.bfloat16 if device.type == "cuda" else torch.float16
    generator = torch.Generator(device).manual_seed(0)
    packing = Packing.from_grids([(side, side)] * images, 1, device=device)
    places = packing.cu_seqlens, packing.placement, packing.image
    cells = side * side

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    if kernel == "sums":
        rows = packing.capacity
        return "backward", (normal(rows, dim), normal(0, channels * patch * patch), *places, 1, cells)
    size = side * patch * 3 // 2 if kernel == "patchify" else side * patch
    pixels = torch.randint(256, (images, channels, size, size), generator=generator, device=device, dtype=torch.uint8)
    weight = normal(dim, channels, patch, patch, scale=0.02)
    affine = [0.5] * channels, [0.25] * channels
    how = "bicubic", False, kernel == "patchify", 1, False
    return "forward", ([pixels], weight, normal(dim), *places, normal(cells, dim), normal(1, dim), *affine, *how)
