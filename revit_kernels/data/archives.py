"""Images inside other files: members of tar and zip archives, rows of parquet files, base64 text and data URLs."""

from __future__ import annotations

import base64
import binascii
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

IMAGE_COLUMNS = ("image", "image_data", "img", "jpg", "png")
ARCHIVES = (".tar", ".zip", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LARGEST = 1 << 30  # bytes of an encoded image
SHOWN = 40  # characters of a data URL


class Member(str):
    """An image inside another file: a name to be shown, as "shard.tar/a.png", and `read`, which gives its bytes.

    read: raises ValueError or OSError where it cannot
    """

    read: Callable[[], bytes]

    def __new__(cls, name: str, read: Callable[[], bytes]) -> Member:
        member = super().__new__(cls, name)
        member.read = read
        return member

    def __reduce__(self):
        return Member, (str(self), self.read)


class Archive(str):
    """The path of an archive that is not looked into yet."""


def is_archive(path: str) -> bool:
    return path.lower().endswith(ARCHIVES + COMPRESSED)


def members(path: str) -> Iterator[Member]:
    """The files in an archive, or the rows of a parquet file, in order; none is read yet.

    Raises ValueError, in one sentence with its name, for one that cannot be read.
    """
    lower = path.lower()
    try:
        if lower.endswith(COMPRESSED):
            raise ValueError("it is compressed as a whole, so that no image in it can be read alone: decompress it")
        kind = _tar if lower.endswith(".tar") else _zip if lower.endswith(".zip") else _parquet
        yield from kind(path)
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"the archive {path} cannot be read: {why}") from None


def _tar(path: str) -> Iterator[Member]:
    def reader(offset: int, size: int):
        def read() -> bytes:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(_checked(size))

        return read

    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            archive.members = []  # what it has seen of a large archive is of no use here
            if entry.isreg() and not entry.issparse():
                yield Member(f"{path}/{entry.name}", reader(entry.offset_data, entry.size))


def _zip(path: str) -> Iterator[Member]:
    archive = zipfile.ZipFile(path)

    def reader(entry: zipfile.ZipInfo):
        def read() -> bytes:
            _checked(entry.file_size)
            try:
                return archive.read(entry)
            except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(str(error)) from None

        return read

    for entry in archive.infolist():
        if not entry.is_dir():
            yield Member(f"{path}/{entry.filename}", reader(entry))


def _checked(size: int) -> int:
    if size > LARGEST:
        raise ValueError(f"it has {size:,} bytes, more than the limit of {LARGEST:,}")
    return size


class _Rows:
    """The column of images of a parquet file, by row group; the last that was read is kept."""

    def __init__(self, path: str):
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("reading .parquet needs pyarrow: pip install pyarrow") from None
        try:
            self.file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from None
        self.path, self.lock, self.kept = path, Lock(), (-1, [])
        schema = self.file.schema_arrow
        binary = [field.name for field in schema if "binary" in str(field.type)]
        known = [name for name in IMAGE_COLUMNS if name in schema.names] or binary
        if not known:
            raise ValueError(f"it has no column of images: its columns are {', '.join(schema.names)}")
        self.column = known[0]

    def read(self, group: int, row: int) -> bytes:
        with self.lock:
            if self.kept[0] != group:
                column = self.file.read_row_group(group, columns=[self.column])[self.column]
                self.kept = group, column.to_pylist()
            value = self.kept[1][row]
        found = encoded(value, Path(self.path).parent)
        if isinstance(found, str):
            with open(found, "rb") as file:
                return file.read(LARGEST)
        return found


def _parquet(path: str) -> Iterator[Member]:
    rows, number = _Rows(path), 0
    for group in range(rows.file.num_row_groups):
        for row in range(rows.file.metadata.row_group(group).num_rows):
            yield Member(f"{path}/{number:06d}", lambda group=group, row=row: rows.read(group, row))
            number += 1


# ---------------------------------------------------------------------- text


def data_url(text: str) -> Member:
    """The image in "data:image/png;base64,..."."""
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return Member(shown, lambda: _from_url(text))


def _from_url(text: str) -> bytes:
    head, comma, data = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("it is a data URL without base64")
    return _from_base64(data)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("its base64 text is damaged") from None


def encoded(value, folder: Path) -> bytes | str:
    """What a table's value says: the bytes of an image, or the path of its file, which is meant from the folder.

    value: bytes; text, which is a path, base64 or a data URL; or a dictionary of bytes and path, as Hugging Face's
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str):
        return value or b""
    if value[:5].lower() == "data:":
        return _from_url(value)
    path = str(folder / value) if len(value) < 4096 and "\0" not in value else ""
    if len(value) >= 64 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", value) and not os.path.lexists(path):
        return _from_base64(value)
    return path or b""
