"""The weights with which F.interpolate resizes along one axis."""

from functools import lru_cache

import numpy as np

MODES = ("bicubic", "bilinear")


def _filter(x, cubic, a):
    """Keys' cubic with parameter a, or a triangle."""
    x = np.abs(x)
    if not cubic:
        return np.maximum(1 - x, 0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@lru_cache(maxsize=4096)
def matrix(source, target, mode="bicubic", antialias=True, align_corners=False, offset=0.0) -> np.ndarray:
    """(target, source) float64: what each of `source` cells gives to each of `target` cells.

    offset: added to `target` in the scale only (DINOv2's interpolate_offset)
    """
    cubic = mode == "bicubic"
    i, j = np.arange(target)[:, None], np.arange(source)[None]
    if antialias:
        scale = source / (target + offset)
        weight = _filter((j + 0.5 - scale * (i + 0.5)) / max(scale, 1), cubic, -0.5)
        return weight / weight.sum(1, keepdims=True)
    if align_corners:
        at = i * ((source - 1) / max(target - 1, 1))
    else:
        at = source / (target + offset) * (i + 0.5) - 0.5
    at = at if cubic else np.maximum(at, 0)
    cells = np.floor(at).astype(np.int64) + (np.arange(-1, 3) if cubic else np.arange(2))  # (target, taps)
    weight = np.zeros((target, source))
    np.add.at(weight, (i, cells.clip(0, source - 1)), _filter(cells - at, cubic, -0.75))  # outside, the border repeats
    return weight
