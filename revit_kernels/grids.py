"""Which grid of patches an image gets from its size alone."""

import math
from collections.abc import Sequence

Grid = tuple[int, int]


def grid_text(grid) -> str:
    """A grid (rows, columns), or a clip's (frames, rows, columns), as text: "14x14", "8x14x14"."""
    return "x".join(map(str, grid))


def _check_size(size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise ValueError(f"an image must have at least 1 x 1 pixels, got {size[0]} x {size[1]}")
    if min(patch_size) < 1:
        raise ValueError(f"a patch must have at least 1 x 1 pixels, got {' x '.join(map(str, patch_size))}")


def native_grid(size: tuple[int, int], patch_size: tuple[int, int], max_tokens: int) -> Grid:
    """The grid (rows, columns) of at most `max_tokens` patches that is nearest the image's own.

    size:       (height, width) of the image, in pixels
    patch_size: (height, width) of a patch
    max_tokens: the most patches that the image may have

    The image's own grid is its size in patches, scaled down to `max_tokens` if it has more. Nearest is the grid whose
    rows and columns are both off by the smallest factor; among equals, the one of the nearest aspect. No image is
    enlarged: it has at most as many rows and columns as it has pixels for, rounded up.

    Raises ValueError for an image or a patch without pixels, and for max_tokens below 1.
    """
    _check_size(size, patch_size)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    own = [pixels / patch for pixels, patch in zip(size, patch_size)]
    most = [math.ceil(n) for n in own]
    scale = min(1, math.sqrt(max_tokens / (own[0] * own[1])))
    rows, columns = (n * scale for n in own)

    def around(n: float, limit: int):
        return {max(1, min(limit, round_(n))) for round_ in (math.floor, math.ceil)}

    def distance(grid: Grid) -> tuple[float, float, int]:
        h, w = math.log(grid[0] / rows), math.log(grid[1] / columns)
        # Rounded, so that two grids equally far in theory are not told apart by the last bit.
        return round(max(abs(h), abs(w)), 9), round(abs(h - w), 9), -grid[0] * grid[1]

    # Where both cannot be rounded up within the limit, one is, and the other takes what is left.
    legal = [(h, w) for h in around(rows, most[0]) for w in around(columns, min(most[1], max(1, max_tokens // h)))]
    legal += [(h, w) for w in around(columns, most[1]) for h in around(rows, min(most[0], max(1, max_tokens // w)))]
    legal = [(h, w) for h, w in legal if h * w <= max_tokens]
    return sorted(legal, key=lambda grid: (*distance(grid), grid))[0]  # torch.compile traces no min with a key


def largest_grid(size: tuple[int, int], patch_size: tuple[int, int], grids: Sequence[Grid]) -> Grid:
    """The grid of most patches that does not enlarge the image; the smallest of all where every grid would.

    size:       (height, width) of the image, in pixels
    patch_size: (height, width) of a patch
    grids:      (rows, columns) to choose from; of several with as many patches, the one of the nearest aspect

    Raises ValueError for an image or a patch without pixels, and for an empty list.
    """
    _check_size(size, patch_size)
    if not grids:
        raise ValueError("grids must name at least one grid")
    most = [math.ceil(pixels / patch) for pixels, patch in zip(size, patch_size)]
    aspect = (size[0] / patch_size[0]) / (size[1] / patch_size[1])

    def distortion(grid: Grid) -> float:
        return abs(math.log(grid[0] / grid[1] / aspect))

    fitting = [grid for grid in grids if grid[0] <= most[0] and grid[1] <= most[1]]
    if fitting:
        return min(fitting, key=lambda grid: (-grid[0] * grid[1], distortion(grid), grid))
    return min(grids, key=lambda grid: (grid[0] * grid[1], distortion(grid), grid))
