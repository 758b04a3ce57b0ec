#!/usr/bin/env python3
"""Times candidate tiles of the Triton kernels on this GPU, and keeps those that beat the rule by more than noise.

    python benchmarks/tune.py linear.forward attention.forward      by default all, which takes long

Candidates that do not compile, do not fit or give other results than the rule's tiles are passed over. The fastest of
the others meets the rule's in turn, and is kept where three quarters of the pairs are faster by MARGIN. Rows are
printed, and written to revit_kernels/measured as soon as they are found.
"""

import sys
from functools import partial
from itertools import product
from statistics import median, quantiles
from unittest import mock

import conftest
import torch

from revit_kernels import measured
from revit_kernels.dispatch import load

MARGIN, ROUNDS = 0.02, 30
IMAGES, LENGTH = 256, 197
NAMES = ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_INPUTS", "num_warps", "num_stages")
LINEAR = (
    *((*tile, 8, stages) for tile in ((128, 256, 64), (256, 128, 64), (64, 256, 64)) for stages in (3, 4)),
    *((64, 256, 64, 4, stages) for stages in (3, 4)),
    *((128, 128, 64, warps, 4) for warps in (4, 8)),
    *((128, 128, 128, 8, 2), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 32, 8, 5)),
)
VALUES = {  # of the other kernels: all that differ from the rule in one or two of these
    **dict.fromkeys(("BLOCK_QUERIES", "BLOCK_KEYS"), (16, 32, 64, 128)),
    **{"BLOCK_TOKENS": (1, 2, 4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8), "num_stages": (1, 2, 3)},
}


def candidates(kernel: str, usual: dict) -> list[dict]:
    if kernel == "linear.forward":
        return [usual | dict(zip(NAMES, values)) for values in LINEAR]
    found = (dict(zip(usual, values)) for values in product(*(VALUES.get(name, (usual[name],)) for name in usual)))
    return [tiles for tiles in found if 1 <= sum(tiles[name] != usual[name] for name in usual) <= 2]


def calls(device: torch.device):
    """(op, step, arguments) in the shapes of ViT-S, ViT-B and ViT-L."""

    def normal(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    ends = torch.arange(IMAGES + 1, dtype=torch.int32, device=device) * LENGTH
    for dim in (384, 768, 1024):
        x, weight, bias = normal(IMAGES * LENGTH, dim), normal(4 * dim, dim) / dim**0.5, normal(4 * dim)
        yield "linear", "forward", (x, weight, bias, "gelu", None, False)
        yield "linear", "forward", (x, weight[:dim], bias[:dim], None, None, False)
        yield "layer_norm", "forward", (x, bias[None, :dim], bias[None, :dim], None, x, bias[:dim], 1e-6, False)
    for head_dim in (64, 80):
        q, k, v = normal(IMAGES * LENGTH, 3, 12, head_dim).unbind(1)
        where = (ends, LENGTH, ends, LENGTH, head_dim**-0.5)
        yield "attention", "forward", (q, k, v, *where)
        yield "attention", "backward", (v, q, k, v, *load("attention", "triton").forward(q, k, v, *where), *where)


class Tried:
    """In the place of `measured.tiles`: what is tried, else the rule's; and the shapes that were asked for."""

    def __init__(self):
        self.tiles, self.shapes = {}, {}

    def __call__(self, op, kernel, device, **shape):
        self.shapes[f"{op}.{kernel}"] = shape
        return self.tiles.get(f"{op}.{kernel}") or measured.rule(op, kernel, **shape)


def seconds(run, rounds: int = 9) -> float:
    """The median time of a call on the device, the host running ahead of it."""
    torch.cuda._sleep(1_000_000)
    times = [(conftest.Tick(), run(), conftest.Tick()) for _ in range(rounds)]
    return median(end - start for start, _, end in times)


def agree(ours, right) -> bool:
    """Whether no number is off by more than four roundings of the largest."""
    pairs = zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (ours, right)))
    return all(not a.numel() or (a - b).abs().max() <= 4 * torch.finfo(b.dtype).eps * b.abs().max() for a, b in pairs)


def tune(op: str, step: str, arguments: tuple, wanted=(), clock=seconds):
    """(kernel, shape, tiles, ratio) of each kernel that the call launches and that ran faster by other tiles."""
    tried, run = Tried(), partial(getattr(load(op, "triton"), step), *arguments)
    with mock.patch.object(measured, "tiles", tried):
        right = run()
        for kernel, shape in dict(tried.shapes).items():
            usual, times = measured.rule(op, kernel.split(".")[1], **shape), []
            for tiles in candidates(kernel, usual) if not wanted or kernel in wanted else ():
                tried.tiles = {kernel: tiles}
                try:
                    if agree(run(), right):
                        times.append((clock(run), tiles))
                except Exception as error:  # what compilers and launches raise for tiles that do not fit differs
                    print(f"{kernel} {tiles}: {str(error)[:100]!r}", flush=True)
            if times:
                best, ratios = min(times, key=lambda row: row[0])[1], []
                for _ in range(ROUNDS):
                    tried.tiles = {}
                    rule = clock(run, 1)
                    tried.tiles = {kernel: best}
                    ratios.append(rule / clock(run, 1))
                if quantiles(ratios, n=4)[0] > 1 + MARGIN:
                    yield kernel, shape, best, median(ratios)
            tried.tiles = {}


def main(wanted: list[str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    rows = dict(measured.of(device).get("tiles", {}))
    with torch.no_grad():
        for op, step, arguments in calls(device):
            if not wanted or any(kernel.startswith(f"{op}.{step}") for kernel in wanted):
                for kernel, shape, tiles, ratio in tune(op, step, arguments, wanted):
                    print(f"{kernel} {shape}: {tiles} is {ratio:.2f} times as fast as the rule's", flush=True)
                    rows[kernel] = [row for row in rows.get(kernel, ()) if row[0] != shape] + [[shape, tiles]]
                    measured.write(torch.cuda.get_device_name(device), "tiles", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
