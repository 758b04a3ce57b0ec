"""Sets of images that a table lists: a CSV of paths, or a parquet file that holds the images themselves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from revit_kernels.data.archives import IMAGE_COLUMNS, encoded
from revit_kernels.data.image_set import EncodedSet, ImageSet, check_classes, numbered, pick_split
from revit_kernels.files import parse_json

LABEL_COLUMNS = ("label", "labels", "target", "class")
COLUMN_OPTIONS = ("image_column", "label_column", "split_column")


def options_of(source: str, text: str, known: Sequence[str] = COLUMN_OPTIONS) -> dict[str, str]:
    """What stands behind the # of a source, as "name=value,name=value"."""
    parts = [part.partition("=") for part in text.split(",") if part]
    if wrong := [name for name, _, value in parts if name not in known or not value]:
        raise ValueError(f"{source}: behind the # may stand {'=..., '.join(known)}=..., got {wrong[0]!r}")
    return {name: value for name, _, value in parts}


def rows_of(
    name: str, split: str, classes: Sequence[str], targets: np.ndarray, splits: Sequence[str] | None
) -> np.ndarray:
    """The rows of a split, of rows that each say theirs in `splits`, if they do.

    Raises ValueError for a split that there is not, and for a class that only one split has.
    """
    if splits is None:
        pick_split(name, split, [])
        return np.arange(len(targets))
    splits = np.array(splits, object)
    known = sorted(set(splits))
    check_classes(name, {one: {classes[i] for i in np.unique(targets[splits == one])} for one in known})
    return np.flatnonzero(np.isin(splits, pick_split(name, split, known)))


def csv_set(path: Path, split: str) -> EncodedSet:
    """The images that a CSV lists: columns path (from the CSV's folder) and label, and split if it has some.

    Raises ValueError where it cannot be read, lacks a column or a value, or names an image twice.
    """
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            if missing := {"path", "label"} - set(columns):
                raise ValueError(f"{path} has no column {' and no column '.join(sorted(missing))}")
            wanted = [name for name in ("path", "label", "split") if name in columns]
            for row in reader:
                if empty := [name for name in wanted if not row[name]]:
                    raise ValueError(f"line {reader.line_num} of {path} has no {empty[0]}")
                rows.append(row)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no images")
    keys = [row["path"] for row in rows]
    if len(set(keys)) < len(keys):
        seen = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise ValueError(f"{path} names {twice} twice")
    classes, targets = numbered([row["label"] for row in rows])
    splits = [row["split"] for row in rows] if "split" in columns else None
    chosen = rows_of(str(path), split, classes, targets, splits)
    sources = [str(path.parent / keys[i]) for i in chosen]
    return EncodedSet(f"{path.stem}/{split}", classes, targets[chosen], [keys[i] for i in chosen], sources)


def parquet_set(
    path: Path,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
) -> ImageSet:
    """The images of a parquet file: bytes, base64, data URLs, paths, or Hugging Face's struct, with a label a row.

    The encoded images are held in memory. Raises ValueError where it cannot be read, or a column is not found.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: pip install pyarrow") from None

    def column(given: str | None, known: Sequence[str], what: str) -> str:
        for name in (given,) if given else known:
            if name in schema.names:
                return name
        raise ValueError(f"{path} has no column of {what}: its columns are {', '.join(schema.names)}")

    try:
        schema = pyarrow.parquet.read_schema(path)
        image = column(image_column, IMAGE_COLUMNS, "images")
        label = column(label_column, LABEL_COLUMNS, "labels")
        has_splits = split_column or "split" in schema.names
        part = column(split_column, ("split",), "splits") if has_splits else None
        wanted = list(dict.fromkeys(name for name in (image, label, part) if name))
        table = pyarrow.parquet.read_table(path, columns=wanted)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not table.num_rows:
        raise ValueError(f"{path} has no images")
    for name in wanted:
        if table[name].null_count:
            raise ValueError(f"the column {name} of {path} has rows without a value")
    labels = table[label].to_pylist()
    classes, targets = numbered(labels)
    names = _class_names(schema, label)
    if names and all(isinstance(one, int) and 0 <= one < len(names) for one in labels):
        classes, targets = names, np.array(labels, np.int64)
    splits = list(map(str, table[part].to_pylist())) if part else None
    chosen = rows_of(str(path), split, classes, targets, splits)
    try:
        sources = [encoded(one, path.parent) for one in table[image].take(chosen).to_pylist()]
    except ValueError as error:
        raise ValueError(f"the column {image} of {path} has an image that cannot be read: {error}") from None
    keys = [f"{path.stem}/{i:06d}" for i in chosen]
    return EncodedSet(f"{path.stem}/{split}", classes, targets[chosen], keys, sources)


def _class_names(schema, label: str) -> list[str] | None:
    """The names of the classes, where Hugging Face's datasets wrote the file."""
    try:
        features = parse_json(schema.metadata[b"huggingface"])["info"]["features"]
        return list(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
