"""The rule for the tiles of the Triton kernels of temporal_attention."""


def rule(kernel: str, bits: int, head_dim: int) -> dict[str, int]:
    """As many rows as keep a thread's share of a frame's rows in registers."""
    columns = max(16, 1 << (head_dim - 1).bit_length())
    rows = {"forward": 4096, "backward": 4096}[kernel] // columns
    return {"BLOCK_TOKENS": max(16, rows), "BLOCK_DIM": columns, "num_warps": 8}
