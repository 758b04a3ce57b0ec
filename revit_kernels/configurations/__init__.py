"""The tiles of every Triton kernel, by GPU architecture and shape: tables looked up, never a search while a model runs.

    tiles = configuration("attention", "forward", q.device, bits=16, head_dim=64, length=197)
    _forward_kernel[grid](..., **tiles)

An op with Triton kernels has a file `ops/<op>/tiles.py` with these names, which never imports Triton by itself:

    rule(kernel, **shape)        the tiles of any shape, as a dict: what runs where no table has a row
    SHAPES                       {kernel: [shape, ...]}: the rows that the tables list
    candidates(kernel, **shape)  the tiles that a tuner tries
    trial(kernel, device, **shape)  (step, arguments): a call of the backends' function `step` that launches the kernel
    listed(kernel, arch, **shape)   where tables differ in their rows: whether that of the architecture has this one

A shape is whole numbers by name. `length` and `rows` are matched by the nearest bucket, all others exactly.
See tables.py for the files, tuning.py for the tuner, machine_code.py for what the compiler makes of a row.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from revit_kernels.configurations.tables import Table, read, shipped

Tiles = dict[str, int]
INTERPRETED = 80  # whose table a CPU's interpreter uses
_forced: ContextVar[dict[tuple[str, str], Tiles] | None] = ContextVar("tiles that are tried", default=None)
_found: dict[tuple, Tiles] = {}


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(place: torch.device | int) -> int:
    """The compute capability without its point: 90 for sm_90. A number is taken as it is; the CPU counts as sm_80."""
    if isinstance(place, int):
        return place
    return _capability(place) if place.type == "cuda" else INTERPRETED


def rule(op: str, kernel: str, **shape: int) -> Tiles:
    """The tiles that the op's own rule gives, whatever the tables say."""
    return importlib.import_module(f"revit_kernels.ops.{op}.tiles").rule(kernel, **shape)


def configuration(op: str, kernel: str, place: torch.device | int, **shape: int) -> Tiles:
    """Tile constants, num_warps and num_stages for one kernel. Do not change the dict: it is kept.

    place: the device of the tensors, or an architecture as a number (90)
    shape: what the kernel's tiles depend on, whole numbers by name, always in the same order

    The first of these that has a row: the table that REVIT_CONFIGURATIONS names (a file, or a folder of sm_*.json),
    the user's own file if REVIT_TUNE=1 (a shape that it lacks is tuned at once, but never while a CUDA graph is
    captured), and the table shipped for the architecture, or for the nearest older one. Else the op's rule.

    Raises ValueError for a table that is broken, of a newer architecture, or without a constant that the kernel has.
    """
    forced = _forced.get()
    if forced is not None and (op, kernel) in forced:
        return forced[op, kernel]
    key = (op, kernel, place, *shape.items())
    found = _found.get(key)
    if found is None:
        found, keep = _look_up(op, kernel, place, shape)
        if keep:
            _found[key] = found
    return found


def _look_up(op, kernel, place, shape) -> tuple[Tiles, bool]:
    """The tiles, and whether they are what the next call would find too."""
    arch = architecture(place)
    usual = rule(op, kernel, **shape)
    path, tune = os.environ.get("REVIT_CONFIGURATIONS"), os.environ.get("REVIT_TUNE") == "1"
    tables = [_own(path, arch)] if path else []
    keep = True
    if tune and not any(table.find(op, kernel, shape) for table in tables):
        from revit_kernels.configurations import tuning  # imports what imports this

        tuned, keep = tuning.at_first_use(op, kernel, place, shape)
        if tuned is not None:
            return tuned, keep
    for table in (*tables, shipped(arch)):
        row = table and table.find(op, kernel, shape)
        if row:
            if row.tiles.keys() != usual.keys():
                raise ValueError(
                    f"{table.path}: {op}.{kernel} needs {', '.join(sorted(usual))}, got {', '.join(sorted(row.tiles))}"
                )
            return row.tiles, keep
    return usual, keep


def _own(path: str, arch: int) -> Table:
    """The table that the user named."""
    if os.path.isdir(path):
        table = shipped(arch, path)
        if table is None:
            raise ValueError(f"REVIT_CONFIGURATIONS: {path} has no sm_*.json for sm_{arch} or older")
        return table
    table = read(path)
    if table.architecture > arch:
        raise ValueError(f"REVIT_CONFIGURATIONS: {path} is for sm_{table.architecture}, not for sm_{arch}")
    return table


@contextmanager
def using(op: str, kernel: str, tiles: Tiles) -> Iterator[None]:
    """Within it the kernel runs with these tiles, in this thread."""
    token = _forced.set({**(_forced.get() or {}), (op, kernel): tiles})
    try:
        yield
    finally:
        _forced.reset(token)


def forget() -> None:
    """Look everything up anew: tables or the environment changed."""
    _found.clear()
    read.cache_clear()
    shipped.cache_clear()
