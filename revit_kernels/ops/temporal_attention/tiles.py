"""The rule for the tiles of the Triton kernels of temporal_attention."""


def rule(kernel: str, bits: int, head_dim: int) -> dict[str, int]:
    """16 numbers a thread of each tile, of which the backward has twice as many: 8."""
    columns = max(64, 1 << (head_dim - 1).bit_length())
    numbers = {"forward": 4096, "backward": 2048}[kernel]
    return {"BLOCK_TOKENS": numbers // columns, "BLOCK_DIM": columns, "num_warps": 8}
