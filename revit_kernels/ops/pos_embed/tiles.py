"""The rule for the tiles of the Triton kernel of pos_embed."""


def rule(kernel: str, bits: int, dim: int) -> dict[str, int]:
    return {"BLOCK_TAPS": 16, "BLOCK_DIM": min(1 << (dim - 1).bit_length(), 128), "num_warps": 4}
