"""The rule for the tiles of the Triton kernels of linear."""

NUMBERS, WORDS, TILES = 1, 2, 3  # what a load takes: a number, 16 bytes, or a tile by the hardware (TMA)


def power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << (number - 1).bit_length()


def rule(
    kernel: str, bits: int = 16, parts: int = 1, loads: int = WORDS, out: int = 1024, columns: int = 768, **_
) -> dict[str, int]:
    """The most that every epilogue gets along with on sm_80, sm_90 and sm_100 without spills: nothing is measured."""
    if kernel == "quantize":  # about 16 numbers a thread at 4 warps
        return {"BLOCK_ROWS": max(1, min(16, 2048 // power_of_two(columns))), "num_warps": 4}
    if kernel == "backward":
        return {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128, "num_warps": 8}
    if bits == 32:
        rows, across, inputs, warps, stages = 64, 32, 32, 8, 2
    elif bits == 8:  # a scale is of 128 inputs, and of 128 columns
        rows, across, inputs, warps, stages = 64 if parts == 2 else 128, 128, 128, 8, 2 if parts == 2 else 3
    elif parts == 2 and loads == NUMBERS:  # every number has an address of its own
        rows, across, inputs, warps, stages = 64, 64, 32, 8, 3
    elif parts == 2 or loads == NUMBERS or out <= 64:
        rows, across, inputs, warps, stages = 128, 64, 64 if loads == TILES else 32, 8, 3
    else:
        rows, across, inputs, warps, stages = 128, 128, 64 if loads == TILES else 32, 8, 3 if loads == TILES else 4
    tile = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": across, "BLOCK_INPUTS": inputs, "TALL": 8}
    return tile | {"num_warps": warps, "num_stages": stages}
