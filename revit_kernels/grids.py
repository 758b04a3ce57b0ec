"""Which grid an image gets when nobody chose one: its own aspect, under a limit of tokens."""

import math


def native_grid(size: tuple[int, int], patch_size: tuple[int, int], max_tokens: int) -> tuple[int, int]:
    """The grid (rows, columns) of most tokens, at most `max_tokens`, whose aspect is nearest the image's.

    size:       (height, width) of the image, in pixels
    patch_size: (height, width) of a patch
    max_tokens: the most patches that the image may have

    No image is enlarged: it has at most as many patches a side as it has pixels for, rounded up.
    """
    (height, width), (ph, pw) = size, patch_size
    if height < 1 or width < 1:
        raise ValueError(f"an image must have at least 1 x 1 pixels, got {height} x {width}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    rows, columns = math.ceil(height / ph), math.ceil(width / pw)
    if rows * columns <= max_tokens:
        return rows, columns
    scale = math.sqrt(max_tokens / ((height / ph) * (width / pw)))
    rows = min(max(1, math.floor(height / ph * scale)), max_tokens, rows)
    columns = min(max(1, math.floor(width / pw * scale)), max_tokens // rows, columns)
    return rows, columns
