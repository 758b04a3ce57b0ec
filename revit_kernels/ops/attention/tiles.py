"""The rule for the tiles of the Triton kernels of attention: of any head_dim, never of a length."""


def pieces(dim: int, turned: bool = False) -> tuple[int, int]:
    """The powers of two that cover head_dim: one, or a main one and a rest of at least 16 (what tl.dot takes).

    turned: whether a rotary table turns the rows: then one, as pairs of channels would lie in two pieces
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    main = whole // 2
    rest = max(16, 1 << (dim - main - 1).bit_length()) if dim > main else 0
    return (main, rest) if 16 <= main and 0 < rest < main and not turned else (whole, 0)


def aligned(dim: int, bits: int) -> bool:
    """Whether every row of every head starts on 16 bytes: the tiles depend on it, so it must not depend on strides."""
    return dim * bits % 128 == 0


def rule(kernel: str, bits: int, head_dim: int) -> dict[str, int]:
    """What neither spills nor overflows shared memory on sm_80, sm_90 and sm_100.

    kernel: forward, backward_q or backward_kv, with "_turned" behind it where a rotary table turns queries and keys

    Beyond head_dim 128, which no model has, the backward pass may spill.
    """
    main, rest = pieces(head_dim)
    if kernel.endswith("_turned"):
        step, wide = kernel.removesuffix("_turned"), main + rest > 64
        if bits == 32:
            narrow = (32, 32, 8, 1) if step == "forward" else (16, 32, 8, 1)
            tiles = (16, 16, 8, 2 if step == "forward" else 1) if wide else narrow
        elif not aligned(head_dim, bits) or main + rest > 128:
            tiles = 16, 32, 8, 1
        else:
            tiles = (16, 32, 8, 1) if step == "backward_kv" else (32 if wide else 64, 32, 8, 2)
    elif bits == 32:
        if main + rest > 128:
            tiles = 16, 16, 8, 1
        elif main == 128:
            tiles = {"forward": (32, 32, 8, 1), "backward_q": (16, 16, 8, 1), "backward_kv": (16, 32, 8, 1)}[kernel]
        else:
            tiles = (32, 32, 4, 1) if kernel == "forward" else (16, 32, 4, 1)
    elif main + rest > 128:
        tiles = 32, 32, 8 if kernel == "backward_kv" or not aligned(head_dim, bits) else 4, 1
    elif not aligned(head_dim, bits):  # every number has an address of its own
        queries = 64 if kernel == "forward" else 16 if kernel == "backward_kv" and rest else 32
        tiles = queries, 64 if kernel == "backward_kv" and main == 32 else 32, 8, 1
    elif kernel == "forward":
        tiles = 64, 32 if rest > 16 else 64, 8 if main == 128 > head_dim else 4, 2
    elif kernel == "backward_q":
        tiles = 64, 32, 4, 2
    elif rest > 16:
        tiles = 16, 64, 8, 2
    else:
        tiles = 32, 64, 8 if rest or main == 128 > head_dim else 4, 2
    return dict(zip(("BLOCK_QUERIES", "BLOCK_KEYS", "num_warps", "num_stages"), tiles))
