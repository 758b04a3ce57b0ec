"""The rule for the tiles of the Triton kernels of patch_embed."""


def rule(kernel: str, bits: int, dim: int = 0, patch: int = 0) -> dict[str, int]:
    """forward and sums are of a dim, patchify of a patch."""
    if kernel == "patchify":
        return {"BLOCK": 32, "num_warps": 8}
    if kernel == "sums":
        return {"BLOCK_IMAGES": 16, "BLOCK_DIM": min(1 << (dim - 1).bit_length(), 128), "num_warps": 4}
    if bits == 32:
        return {"BLOCK_TOKENS": 64, "BLOCK_DIM": 64, "BLOCK_WIDTH": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_TOKENS": 128, "BLOCK_DIM": 64, "BLOCK_WIDTH": 32, "num_warps": 4, "num_stages": 3}
