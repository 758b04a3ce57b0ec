import itertools
import math
import random

import pytest

from revit_kernels.grids import largest_grid, native_grid

P = (16, 16)


@pytest.mark.parametrize(
    "size, max_tokens, grid",
    [
        ((224, 224), 196, (14, 14)),
        ((1000, 1000), 196, (14, 14)),
        ((1000, 1000), 210, (14, 14)),  # not (14, 15): of two as near, the one of the right aspect
        ((480, 640), 196, (12, 16)),
        ((333, 500), 196, (11, 17)),
        ((500, 333), 196, (17, 11)),
        ((20, 12000), 196, (1, 196)),
        ((12000, 20), 196, (196, 1)),
        ((1, 1), 196, (1, 1)),
        ((8, 40), 196, (1, 3)),
        ((100, 100), 196, (6, 6)),
        ((32, 33), 196, (2, 2)),
        ((4000, 3000), 1, (1, 1)),
    ],
)
def test_native_grid(size, max_tokens, grid):
    assert native_grid(size, P, max_tokens) == grid


def test_native_grid_is_legal_and_the_nearest():
    draw = random.Random(0)
    for _ in range(300):
        size = tuple(int(2 ** draw.uniform(0, 14)) for _ in range(2))
        patch = draw.choice([(16, 16), (14, 14), (8, 16)])
        limit = draw.choice([1, 2, 5, 49, 196])
        own = [s / p for s, p in zip(size, patch)]
        scale = min(1, math.sqrt(limit / math.prod(own)))
        most = [math.ceil(n) for n in own]
        legal = [
            (h, w)
            for h, w in itertools.product(range(1, min(most[0], limit) + 1), range(1, min(most[1], limit) + 1))
            if h * w <= limit
        ]

        def off(grid, own=own, scale=scale):
            return max(abs(math.log(n / (o * scale))) for n, o in zip(grid, own))

        grid = native_grid(size, patch, limit)
        assert grid in legal, (size, patch, limit)
        assert off(grid) <= min(map(off, legal)) + 1e-6, (size, patch, limit, grid)


MENU = [(14, 14), (10, 10), (7, 7)]


@pytest.mark.parametrize(
    "size, grids, grid",
    [
        ((1000, 1000), MENU, (14, 14)),
        ((224, 224), MENU, (14, 14)),
        ((224, 208), MENU, (10, 10)),
        ((1000, 150), MENU, (10, 10)),
        ((5, 5), MENU, (7, 7)),
        ((5, 5), [(14, 14)], (14, 14)),
        ((1000, 500), [(10, 20), (20, 10)], (20, 10)),
        ((500, 1000), [(20, 10), (10, 20)], (10, 20)),
    ],
)
def test_largest_grid(size, grids, grid):
    assert largest_grid(size, P, grids) == grid


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: native_grid((0, 5), P, 196), "at least 1 x 1 pixels, got 0 x 5"),
        (lambda: native_grid((5, 5), P, 0), "max_tokens must be at least 1, got 0"),
        (lambda: native_grid((5, 5), (0, 16), 196), "a patch must have at least 1 x 1 pixels, got 0 x 16"),
        (lambda: largest_grid((5, 0), P, MENU), "at least 1 x 1 pixels, got 5 x 0"),
        (lambda: largest_grid((5, 5), P, []), "grids must name at least one grid"),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(ValueError, match=message):
        call()
