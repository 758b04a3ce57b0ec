"""Which cells a cell is made of, and their weights, for kernels that read them on the device.

The taps of a grid are made once for each shape of a table and kept on the host; a backend keeps those of a list of
grids on the device, for one launch. A list of known grids in a new order costs a copy, and no weight is made again.
"""

from functools import lru_cache

import numpy as np

from revit_kernels.ops.pos_embed.interpolation import matrix


def _bands(weights):
    """(bands, 2) first and count, and (bands, width) weights: of each row of the matrices, what is not zero."""
    rows = [row for weight in weights for row in weight]
    spans = [(int(used[0]), int(used[-1]) + 1) if len(used := np.flatnonzero(row)) else (0, 0) for row in rows]
    values = np.zeros((len(rows), max(end - first for first, end in spans)), np.float32)
    for value, row, (first, end) in zip(values, rows, spans):
        value[: end - first] = row[first:end]
    return np.array([(first, end - first) for first, end in spans], np.int32), values


@lru_cache(maxsize=1024)
def taps(backward, rows, columns, h, w, how):
    """The bands of one grid, as `plan` has them. Forward the grid is made of the table, backward the table of it."""
    pairs = (rows, h), (columns, w)
    weights = [np.eye(n) if (h, w) == (rows, columns) else matrix(n, m, *how) for n, m in pairs]
    return _bands([weight.T for weight in weights] if backward else weights)


def plan(backward, rows, columns, sizes, how):
    """The taps of at least one grid, as arrays for the device.

    Returns (grids, 4) int32: rows, columns, first cell and first band of each; (bands, 2) int32: the first cell of the
    input that has a share along an axis, and how many have; (bands, width) float32: their weights. A grid has one band
    for each row of what is made, then one for each column.
    """
    grids, bands, values, band, start = [], [], [], 0, 0
    for h, w in zip(sizes[::2], sizes[1::2]):
        spans, weight = taps(backward, rows, columns, h, w, how)
        grids.append((h, w, start, band))
        bands.append(spans)
        values.append(weight)
        band, start = band + len(spans), start + h * w
    width = max(weight.shape[1] for weight in values)
    values = [np.pad(weight, ((0, 0), (0, width - weight.shape[1]))) for weight in values]
    return np.array(grids, np.int32), np.concatenate(bands), np.concatenate(values)
