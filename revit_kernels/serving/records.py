"""Writes the records of `revit infer`: JSON lines, CSV, Parquet or NumPy; a file appears whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from revit_kernels.files import whole

SHARE = "share_of_full_pass"  # what Answer.cost is called in every format
# JSON allows these characters, but terminals may run them as commands, and readers may split lines at them.
UNSEEN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass
class Answer:
    """The result of one image.

    path:          in printable form
    size:          (height, width) in pixels; None if the file could not be decoded
    grid:          (rows, columns) of patches
    probabilities: (classes,) float32; None if features were asked for
    features:      (features,) float32; None if classes were asked for
    cost:          tokens of all passes over those of a full-length pass, if a policy chose the length
    error:         what is wrong with the file, or None
    frames:        frames of a clip that the model saw, in all views; None for an image
    tubelet:       frames that one token sees
    kept:          for run-length tokens, how many of them were kept, in all views
    """

    path: str
    size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    probabilities: np.ndarray | None = None
    features: np.ndarray | None = None
    cost: float | None = None
    error: str | None = None
    frames: int | None = None
    tubelet: int = 1
    kept: int | None = None

    @property
    def tokens(self) -> int:
        if self.kept is not None:
            return self.kept
        steps = 1 if self.frames is None else self.frames // self.tubelet
        return self.grid[0] * self.grid[1] * steps if self.grid else 0


@dataclass
class Columns:
    """The columns of a run's records.

    features: numbers of a feature vector; 0 for classes
    classes:  of the model; top: how many of them a record has; labels: their names
    adaptive: whether a policy chooses lengths, so that records have a cost
    frames:   whether records have frames: those of clips
    """

    features: int = 0
    classes: int = 0
    top: int = 0
    labels: list[str] | None = None
    adaptive: bool = False
    frames: bool = False

    def best(self, answer: Answer) -> list[dict]:
        """The most probable classes, best first; of equally probable ones, the first."""
        order = np.argsort(-answer.probabilities, kind="stable")[: self.top]
        return [
            {"class": int(i)}
            | ({"label": self.labels[i]} if self.labels else {})
            | {"probability": float(answer.probabilities[i])}
            for i in order
        ]


def short(value) -> float | None:
    """A float32 as the shortest decimal that reads back as the same float32; None for NaN, which JSON does not know."""
    return float(str(np.float32(value))) if np.isfinite(value) else None


class JsonLines:
    """One JSON object a line. To standard output if `path` is None, each line at once."""

    def __init__(self, path: Path | None, columns: Columns):
        self.columns = columns
        if path is None and sys.stdout is None:
            raise ValueError("standard output is closed: give --output FILE")
        self.file = sys.stdout.buffer if path is None else open(path, "wb")

    def write(self, answer: Answer) -> None:
        record = {"path": answer.path}
        if answer.error is not None:
            record["error"] = answer.error
        else:
            record |= {"width": answer.size[1], "height": answer.size[0]}
            record |= {"frames": answer.frames} if self.columns.frames else {}
            record |= {"grid": list(answer.grid), "tokens": answer.tokens}
            record |= {SHARE: round(answer.cost, 4)} if self.columns.adaptive else {}
            if answer.features is not None:
                record["features"] = [short(value) for value in answer.features]
            else:
                best = self.columns.best(answer)
                record["classes"] = [row | {"probability": short(row["probability"])} for row in best]
        text = UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False))
        self.file.write(text.encode() + b"\n")
        if self.file is sys.stdout.buffer:
            self.file.flush()

    def close(self) -> None:
        if self.file is not sys.stdout.buffer:
            self.file.close()

    discard = close


def _cell(text: str) -> str:
    """The text with an apostrophe before it if a spreadsheet would take it for a formula."""
    if text[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


class Csv:
    """One row an image; features or the best classes in numbered columns, empty where there is an error.

    A path or label that begins as a formula does (=, +, -, @) has an apostrophe before it.
    """

    def __init__(self, path: Path, columns: Columns):
        self.columns = columns
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file, lineterminator="\n")
        names = ["path", "width", "height", *(["frames"] if columns.frames else []), "rows", "columns", "tokens"]
        names += [SHARE] if columns.adaptive else []
        names += [f"feature_{i}" for i in range(columns.features)]
        fields = ("class", "label", "probability") if columns.labels else ("class", "probability")
        names += [f"{field}_{i + 1}" for i in range(columns.top) for field in fields]
        self.names = [*names, "error"]
        self.writer.writerow(self.names)

    def write(self, answer: Answer) -> None:
        if answer.error is not None:
            self.writer.writerow([_cell(answer.path), *[""] * (len(self.names) - 2), answer.error])
            return
        row = [_cell(answer.path), answer.size[1], answer.size[0]]
        row += [*([answer.frames] if self.columns.frames else []), *answer.grid, answer.tokens]
        row += [round(answer.cost, 4)] if self.columns.adaptive else []
        if answer.features is not None:
            row += [short(value) for value in answer.features]
        else:
            for best in self.columns.best(answer):
                label = [_cell(best["label"])] if self.columns.labels else []
                row += [best["class"], *label, short(best["probability"])]
        self.writer.writerow([*row, ""])

    def close(self) -> None:
        self.file.close()

    discard = close


class Parquet:
    """One row an image; the best classes, their labels and probabilities, or the features, as lists."""

    ROWS = 1024  # a row group

    @staticmethod
    def require():
        """pyarrow; raises ValueError where it is not installed."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ValueError(
                "writing .parquet needs pyarrow: pip install pyarrow, or write .jsonl, .csv or .npz"
            ) from None
        return pyarrow

    def __init__(self, path: Path, columns: Columns):
        pyarrow = self.require()
        self.pyarrow, self.columns, self.rows = pyarrow, columns, []
        fields = [("path", pyarrow.string())]
        names = ("width", "height", *(["frames"] if columns.frames else []), "rows", "columns", "tokens")
        fields += [(name, pyarrow.int32()) for name in names]
        fields += [(SHARE, pyarrow.float32())] if columns.adaptive else []
        if columns.features:
            fields.append(("features", pyarrow.list_(pyarrow.float32())))
        else:
            fields.append(("classes", pyarrow.list_(pyarrow.int32())))
            fields += [("labels", pyarrow.list_(pyarrow.string()))] if columns.labels else []
            fields.append(("probabilities", pyarrow.list_(pyarrow.float32())))
        fields.append(("error", pyarrow.string()))
        self.schema = pyarrow.schema(fields)
        self.writer = pyarrow.parquet.ParquetWriter(path, self.schema)

    def write(self, answer: Answer) -> None:
        row = {"path": answer.path, "error": answer.error}
        if answer.error is None:
            row |= {"height": answer.size[0], "width": answer.size[1]}
            row |= {"frames": answer.frames} if self.columns.frames else {}
            row |= {"rows": answer.grid[0], "columns": answer.grid[1], "tokens": answer.tokens}
            if self.columns.adaptive:
                row[SHARE] = answer.cost
            if answer.features is not None:
                row["features"] = answer.features
            else:
                best = self.columns.best(answer)
                row["classes"] = [b["class"] for b in best]
                row["probabilities"] = [b["probability"] for b in best]
                row["labels"] = [b.get("label") for b in best]
        self.rows.append(row)
        if len(self.rows) == self.ROWS:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(self.pyarrow.Table.from_pylist(self.rows, schema=self.schema))
            self.rows = []

    def close(self) -> None:
        self._flush()
        self.writer.close()

    def discard(self) -> None:
        self.writer.close()


class Npz:
    """Arrays paths, sizes (height, width), grids (rows, columns), tokens, errors ("" for none), and features, or
    probabilities of all classes (NaN for an image with an error), share_of_full_pass where a policy chose, and frames
    of clips. Needs no pickle to load."""

    def __init__(self, path: Path, columns: Columns):
        self.path, self.width = path, columns.features or columns.classes
        self.name = "features" if columns.features else "probabilities"
        self.adaptive, self.frames = columns.adaptive, columns.frames
        self.answers: list[Answer] = []
        # The wide array is kept on disk, in the output's folder: it may not fit in memory.
        self.body = tempfile.TemporaryFile(dir=path.parent)

    def write(self, answer: Answer) -> None:
        values = answer.features if answer.features is not None else answer.probabilities
        values = np.full(self.width, np.nan) if values is None else values
        self.body.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
        self.answers.append(replace(answer, probabilities=None, features=None))

    def close(self) -> None:
        answers = self.answers
        text = np.array if answers else lambda _: np.empty(0, "<U1")
        arrays = {
            "paths": text([a.path for a in answers]),
            "sizes": np.array([a.size or (0, 0) for a in answers], np.int32).reshape(-1, 2),
            "grids": np.array([a.grid or (0, 0) for a in answers], np.int32).reshape(-1, 2),
            "tokens": np.array([a.tokens for a in answers], np.int32),
            "errors": text([a.error or "" for a in answers]),
        }
        if self.frames:
            arrays["frames"] = np.array([a.frames or 0 for a in answers], np.int32)
        if self.adaptive:
            arrays[SHARE] = np.array([np.nan if a.cost is None else a.cost for a in answers], np.float32)
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            with archive.open(f"{self.name}.npy", "w", force_zip64=True) as member:
                shape = (len(answers), self.width)
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                self.body.seek(0)
                shutil.copyfileobj(self.body, member)
        self.body.close()

    def discard(self) -> None:
        self.body.close()


WRITERS = {".jsonl": JsonLines, ".csv": Csv, ".parquet": Parquet, ".npz": Npz}


def is_folder(path: str) -> bool:
    """Whether records go to a folder of parquet shards: an existing one, or a name that ends in /."""
    return os.path.isdir(path) or (path.endswith("/") and not os.path.exists(path.rstrip("/")))


def check_output(path: str | None) -> None:
    """Raise ValueError if records cannot be written to `path`; called before any work is done."""
    if path is None:
        return
    named, folder, path = path, is_folder(path), Path(path)
    if not folder and path.suffix.lower() not in WRITERS:
        raise ValueError(f"--output must end in {', '.join(WRITERS)}, or in / for a folder of shards, got {named!r}")
    if not folder and path.exists() and not path.is_file():
        raise ValueError(f"--output {path} is not a regular file")
    path = Path(os.path.realpath(path))  # the target of a link is written
    if not path.parent.is_dir():
        raise ValueError(f"the folder of --output {path} does not exist")
    if not os.access(path if path.is_dir() else path.parent, os.W_OK):
        raise ValueError(f"the folder of --output {path} cannot be written to")
    if folder or path.suffix.lower() == ".parquet":
        Parquet.require()


@contextmanager
def open_records(path: str | None, columns: Columns):
    """A context manager that gives a writer of records; the file gets its name if the block does not raise.

    path: a file of a format in WRITERS, or None for JSON lines on standard output
    """
    if path is None:
        yield JsonLines(None, columns)
        return
    with whole(Path(path)) as temporary:
        writer = WRITERS[Path(path).suffix.lower()](temporary, columns)
        try:
            yield writer
        except BaseException:
            writer.discard()
            raise
        writer.close()
