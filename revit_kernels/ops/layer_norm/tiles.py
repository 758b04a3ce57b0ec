"""The rule for the tiles of the Triton kernels of layer_norm."""


def columns(dim: int) -> int:
    """A row's columns in a tile: all of them."""
    return 1 << (dim - 1).bit_length()


def rule(kernel: str, bits: int, dim: int) -> dict[str, int]:
    """Forward: about 16 numbers a thread at 4 warps, where the dim allows. Backward: a row, 8 numbers a thread."""
    if kernel == "forward":
        return {"BLOCK_TOKENS": max(1, min(16, 2048 // columns(dim))), "num_warps": 4}
    if kernel == "backward":
        return {"num_warps": min(8, max(1, columns(dim) // 256))}
    return {"BLOCK_PROGRAMS": 32, "BLOCK_DIM": 64, "num_warps": 4}
