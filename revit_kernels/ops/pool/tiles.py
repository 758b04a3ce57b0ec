"""The rule for the tiles of the Triton kernels of pool."""


def rule(kernel: str, bits: int, dim: int) -> dict[str, int]:
    """8 columns a thread: 16 bytes at once in 16-bit dtypes."""
    return {"BLOCK_TOKENS": 16, "BLOCK_DIM": 64, "num_warps": 4}
