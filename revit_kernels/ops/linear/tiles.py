"""Tiles of the Triton kernels of linear: a rule for any shape, the shapes that tables list, what a tuner tries."""

import torch

LAYERS = [(dim, out * dim) for dim in (384, 768, 1024) for out in (1, 3, 4)] + [(1536, 384), (3072, 768), (4096, 1024)]
GATED = [(1024, 5472), (1536, 8192)]  # inputs, and outputs of both halves
NUMBERS, WORDS, TILES = 1, 2, 3  # what a load takes: a number, 16 bytes, or a tile by the hardware (TMA)
FORMS = [
    (16, 1, WORDS, LAYERS),
    (16, 1, TILES, LAYERS),
    (16, 2, WORDS, GATED),
    (16, 2, TILES, GATED),
    (8, 1, TILES, LAYERS),
]
SHAPES = {
    "forward": [
        {"bits": bits, "parts": parts, "loads": loads, "inputs": inputs, "out": out}
        for bits, parts, loads, layers in FORMS
        for inputs, out in layers
    ],
    "backward": [{"parts": parts} for parts in (1, 2)],  # of the product: two where one gates the other
}


def listed(kernel: str, arch: int, loads: int = WORDS, **_) -> bool:
    """Whether the table of an architecture lists the shape: the hardware's tile loads came with Hopper."""
    return kernel != "forward" or (loads == TILES) == (arch >= 90)


def power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << (number - 1).bit_length()


def rule(
    kernel: str, bits: int = 16, parts: int = 1, loads: int = WORDS, out: int = 1024, columns: int = 768, **_
) -> dict[str, int]:
    """The most that every epilogue gets along with on sm_80, sm_90 and sm_100 without spills: nothing is measured."""
    if kernel == "quantise":  # about 16 numbers a thread at 4 warps
        return {"BLOCK_ROWS": max(1, min(16, 2048 // power_of_two(columns))), "num_warps": 4}
    if kernel == "backward":
        return {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128, "num_warps": 8}
    if bits == 32:
        rows, across, inputs, warps, stages = 64, 32, 32, 8, 2
    elif bits == 8:  # a scale is of 128 inputs, and of 128 columns
        rows, across, inputs, warps, stages = 64 if parts == 2 else 128, 128, 128, 8, 2 if parts == 2 else 3
    elif parts == 2 or loads == NUMBERS or out <= 64:
        rows, across, inputs, warps, stages = 128, 64, 64 if loads == TILES else 32, 8, 3
    else:
        rows, across, inputs, warps, stages = 128, 128, 64 if loads == TILES else 32, 8, 3 if loads == TILES else 4
    tile = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": across, "BLOCK_INPUTS": inputs, "TALL": 8}
    return tile | {"num_warps": warps, "num_stages": stages}


def candidates(kernel: str, bits: int = 16, **_) -> list[dict[str, int]]:
    if kernel == "backward":
        return [
            {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": across, "num_warps": n}
            for rows in (8, 16, 32)
            for across in (64, 128, 256)
            for n in (4, 8)
        ]
    rows, across = (64, 128), (128,) if bits == 8 else (64, 128, 256)
    inputs = {8: (128,), 16: (32, 64), 32: (16, 32)}[bits]
    return [
        {"BLOCK_ROWS": r, "BLOCK_COLUMNS": a, "BLOCK_INPUTS": i, "TALL": 8, "num_warps": n, "num_stages": stages}
        for r in rows
        for a in across
        for i in inputs
        for n in (4, 8)
        for stages in (3, 4)
    ]


def trial(
    kernel: str,
    device: torch.device,
    bits: int = 16,
    parts: int = 1,
    inputs: int = 768,
    out: int = 3072,
    **_,
):
    """A GELU, or a gate of SiLU, on as many rows as a large batch has."""
    rows = 32768 if device.type == "cuda" else 37
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, weight, bias = normal(rows, inputs), normal(out, inputs) / inputs**0.5, normal(out)
    form = ("silu", "first") if parts == 2 else ("gelu", None)
    if kernel == "backward":
        dy, kept = normal(rows, out // 2 if parts == 2 else out), normal(rows, out)
        return "backward", (dy, x, weight, bias, None, kept, *form, False, False)
    if bits == 8:
        from revit_kernels.ops.linear import reference

        (x, x_scale), (weight, scale) = reference.quantise(x, inputs), reference.quantise(weight, inputs)
        return "fp8", (x, x_scale, weight, scale[:, 0].contiguous(), bias, None, None, *form, torch.bfloat16, False)
    return "forward", (x, weight, bias, None, None, *form, False)
