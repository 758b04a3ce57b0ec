"""Tables of tiles as JSON files: sm_<architecture>.json, a row for each kernel and shape."""

import json
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

NEAREST = ("length", "rows")  # keys of a shape that a table lists in buckets
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """The tiles of one kernel at one shape.

    blocks:       programs that one multiprocessor is to hold at once: registers and shared memory must allow as many
    source:       where it is another than the table's
    microseconds: what the step that launches the kernel took in the tuner
    """

    shape: dict[str, int]
    tiles: dict[str, int]
    blocks: int | None = None
    source: str | None = None
    microseconds: float | None = None

    def as_json(self) -> dict:
        extra = {"blocks": self.blocks, "source": self.source, "microseconds": self.microseconds}
        return {"shape": self.shape, "tiles": self.tiles} | {k: v for k, v in extra.items() if v is not None}


@dataclass(frozen=True)
class Table:
    """The rows of one architecture.

    source: "static" where only the machine code was looked at, else the device that was measured, and the date
    """

    architecture: int
    source: str
    rows: dict[str, list[Row]] = field(default_factory=dict)  # by "op.kernel"
    path: str = "a table"

    def find(self, op: str, kernel: str, shape: dict[str, int]) -> Row | None:
        """The row of this shape: of those whose other keys are equal, that of the nearest bucket, by its logarithm.

        A key that a row leaves out fits any value, but a row that has it comes first.
        """
        best = None
        for row in self.rows.get(f"{op}.{kernel}", ()):
            if all(shape.get(name) == value for name, value in row.shape.items() if name not in NEAREST):
                off = sum(_distance(row.shape.get(name), shape[name]) for name in NEAREST if name in shape)
                rank = (-len(row.shape.keys() - set(NEAREST)), off)
                if best is None or rank < best[0]:
                    best = rank, row
        return best and best[1]

    def with_row(self, op: str, kernel: str, row: Row) -> "Table":
        """The table with this row in the place of that of the same shape."""
        name = f"{op}.{kernel}"
        others = [other for other in self.rows.get(name, ()) if other.shape != row.shape]
        return Table(self.architecture, self.source, self.rows | {name: [*others, row]}, self.path)

    def text(self) -> str:
        """The file: one row a line."""
        head = {"architecture": self.architecture, "source": self.source}
        lines = ["{", *(f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()), '  "kernels": {']
        kernels = []
        for name, rows in sorted(self.rows.items()):
            rows = sorted(rows, key=lambda row: [(k, v) for k, v in row.shape.items()])
            inner = ",\n".join(f"      {json.dumps(row.as_json())}" for row in rows)
            kernels.append(f"    {json.dumps(name)}: [\n{inner}\n    ]")
        return "\n".join([*lines, ",\n".join(kernels), "  }", "}", ""])

    def write(self, path: str | os.PathLike) -> None:
        """Write the file: all of it, or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(self.text())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def _distance(bucket: int | None, size: int) -> float:
    return math.inf if bucket is None else abs(math.log(max(size, 1) / max(bucket, 1)))


def _numbers(value, least: int) -> bool:
    return isinstance(value, dict) and all(type(n) is int and n >= least for n in value.values())


@cache
def read(path: str) -> Table:
    """The table in a file. Raises ValueError, in one sentence, for what is none."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"the table of configurations {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"the table of configurations {path} is not JSON: {error}") from None
    try:
        rows = {name: [Row(**row) for row in listed] for name, listed in data["kernels"].items()}
        table = Table(data["architecture"], data["source"], rows, str(path))
        every = [row for listed in rows.values() for row in listed]
        if type(table.architecture) is not int or not isinstance(table.source, str):
            raise TypeError("architecture must be a whole number and source a text")
        if not all(_numbers(row.shape, 0) and _numbers(row.tiles, 1) and row.tiles for row in every):
            raise TypeError("shapes must be whole numbers by name, at least 0, and tiles at least 1")
    except (AttributeError, KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"the table of configurations {path} is broken: {what}") from None
    return table


def architectures(folder: str | os.PathLike = FOLDER) -> list[int]:
    """The architectures that a folder has a table for, oldest first."""
    names = (re.fullmatch(r"sm_(\d+)\.json", path.name) for path in Path(folder).iterdir())
    return sorted(int(name[1]) for name in names if name)


@cache
def shipped(arch: int, folder: str | os.PathLike = FOLDER) -> Table | None:
    """The folder's table for the architecture or, where it has none, for the nearest older one."""
    older = [known for known in architectures(folder) if known <= arch]
    return read(str(Path(folder) / f"sm_{older[-1]}.json")) if older else None
