"""`python -m revit_kernels.configurations`: measure the tables of tiles on this machine's GPU, or derive them."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from revit_kernels.configurations import architecture, machine_code
from revit_kernels.configurations.tables import FOLDER, Row, Table, read
from revit_kernels.configurations.tuning import complaint, kernels, tiled, tune
from revit_kernels.dispatch import OPS


def _begun(path: Path, arch: int, source: str) -> Table:
    return read(str(path)) if path.exists() else Table(arch, source, {}, str(path))


def measure(ops, path: Path | None, by_length: bool, device: torch.device) -> Path:
    """Tune every shape that the tables list, and write the table after each row, so that a stop loses one row."""
    arch = architecture(device)
    path = path or FOLDER / f"sm_{arch}.json"
    table = _begun(path, arch, "static")
    if table.architecture != arch:
        raise ValueError(f"{path} is for sm_{table.architecture}, {device} is sm_{arch}")
    for op, kernel, shape in kernels(ops, arch):
        lengths = getattr(tiled(op), "LENGTHS", ()) if by_length else ()
        for one in [shape | {"length": length} for length in lengths] or [shape]:
            row = tune(op, kernel, device, one)
            table = table.with_row(op, kernel, row)
            table.write(path)
            print(f"{op}.{kernel} {one}: {row.tiles}, {row.microseconds} us", flush=True)
    return path


def derive(ops, path: Path | None, arch: int) -> Path:
    """The table without a GPU: the tiles it has, else the rule's, with the blocks that the machine code allows.

    Raises ValueError for tiles that spill or do not fit.
    """
    path = path or FOLDER / f"sm_{arch}.json"
    table = _begun(path, arch, "static")
    for op, kernel, shape in kernels(ops, arch):
        known = table.find(op, kernel, shape)
        tiles = known.tiles if known and known.shape == shape else tiled(op).rule(kernel, **shape)
        if why := complaint(op, kernel, tiles, shape, arch):
            raise ValueError(f"sm_{arch} {op}.{kernel} {shape} {tiles}: {why}")
        blocks = machine_code.compiled(machine_code.specification(op, kernel, tiles, **shape), arch).blocks
        row = replace(known, blocks=blocks) if known and known.shape == shape else Row(shape, tiles, blocks)
        table = table.with_row(op, kernel, row)
    table.write(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m revit_kernels.configurations", description=__doc__)
    parser.add_argument(
        "ops", nargs="*", default=OPS, metavar="op", help=f"which ops: {', '.join(OPS)}; all by default"
    )
    parser.add_argument("--output", type=Path, help="a table's file; by default that of the architecture, in place")
    parser.add_argument(
        "--by-length", action="store_true",
        help="a row for each bucket of lengths: an image's bits then depend on the longest length beside it",
    )  # fmt: skip
    parser.add_argument("--static", type=int, metavar="ARCH", help="derive the table of sm_ARCH without a GPU")
    options = parser.parse_args()
    if unknown := [op for op in options.ops if op not in OPS]:
        parser.error(f"there is no op {unknown[0]!r}: they are {', '.join(OPS)}")
    if options.static is None and not torch.cuda.is_available():
        parser.error("there is no GPU here to measure on; --static ARCH derives a table without one")
    try:
        if options.static is not None:
            print(derive(options.ops, options.output, options.static))
        else:
            with torch.no_grad():
                device = torch.device("cuda", torch.cuda.current_device())
                print(measure(options.ops, options.output, options.by_length, device))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"revit_kernels.configurations: {error}")


if __name__ == "__main__":
    main()
