"""Records kept on disk as they come, so that a run that was interrupted or killed can resume, in every format."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import numpy as np

from revit_kernels.data.images import show
from revit_kernels.files import is_empty, write_whole
from revit_kernels.serving.records import Answer, Columns, JsonLines, Parquet, is_folder, open_records

MAGIC = b"revit journal 1\n"
FRAME = struct.Struct("<II")  # bytes of what follows, and their CRC-32
SYNC_EVERY = 5.0  # seconds after which what was written is on the disk itself
SHARD_ROWS = 50_000
PARTIAL = ".partial"
SETTINGS = "_revit.json"  # readers of parquet folders leave out names that begin with _


class Journal:
    """An append-only file of answers; a checksum tells one that was not written completely.

    path:  created if it does not exist
    begin: JSON at the start of the file that identifies its run
    keep:  how many of the best classes of an answer are kept; 0 for all

    Raises ValueError if the file belongs to another run, or another process writes to it.
    """

    def __init__(self, path: Path, begin: dict, keep: int = 0):
        self.path, self.keep = path, keep
        self.file = open(path, "a+b", buffering=0)
        try:
            _lock(self.file, path)
            self._begin(json.loads(json.dumps(begin)))
        except BaseException:
            self.file.close()
            raise
        self.count, self.synced = 0, time.monotonic()

    def _begin(self, begin: dict) -> None:
        self.file.seek(0)
        start = self.file.read(len(MAGIC))
        if start and not MAGIC.startswith(start):
            raise ValueError(f"{self.path} is no unfinished run of `revit infer`")
        found = next(_frames(self.file), None) if start == MAGIC else None
        if found is None:
            self.file.truncate(0)
            _write_all(self.file, MAGIC + _frame(json.dumps(begin).encode()))
        else:
            _require_equal(self.path, json.loads(found[1]), begin)

    def answers(self) -> Iterator[Answer]:
        """The answers in the file, in order. After the last, an incomplete one is cut off."""
        self.file.seek(len(MAGIC))
        frames = _frames(self.file)
        end, _ = next(frames)
        self.count = 0
        for end, body in frames:  # noqa: B007
            self.count += 1
            yield _answer_of(body)
        self.file.truncate(end)

    def write(self, answer: Answer) -> None:
        _write_all(self.file, _frame(_body_of(answer, self.keep)))
        self.count += 1
        if time.monotonic() - self.synced > SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def close(self, remove: bool) -> None:
        if remove:
            self.path.unlink(missing_ok=True)
        self.file.close()


def _lock(file, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process writes to {path}") from None
    except OSError:  # a file system without locks
        pass


def _require_equal(path: Path, found: dict, settings: dict) -> None:
    names = {k for k in found.keys() | settings.keys() if found.get(k) != settings.get(k)} - {"finished"}
    if names:
        which = ", ".join(sorted(names))
        raise ValueError(f"{path} is of a run with other settings ({which}): it can only go on as it was")


def _frame(body: bytes) -> bytes:
    return FRAME.pack(len(body), zlib.crc32(body)) + body


def _frames(file) -> Iterator[tuple[int, bytes]]:
    """(end, body) of each frame from the file's position on, up to the first incomplete one."""
    at, whole = file.tell(), os.fstat(file.fileno()).st_size
    reader = open(os.dup(file.fileno()), "rb", buffering=1 << 20)
    with reader:
        reader.seek(at)
        while len(head := reader.read(FRAME.size)) == FRAME.size:
            size, checksum = FRAME.unpack(head)
            if size > whole - at - FRAME.size:  # not written whole, or no size at all: up to 4 GiB
                return
            body = reader.read(size)
            if len(body) < size or zlib.crc32(body) != checksum:
                return
            at += FRAME.size + size
            yield at, body


def _write_all(file, data: bytes) -> None:
    view = memoryview(data)
    while len(view):  # a disk that fills up takes a part
        view = view[file.write(view) :]


def _body_of(answer: Answer, keep: int) -> bytes:
    """The length of a JSON text, the text (plain fields, and what the arrays are), then the bytes of each array."""
    plain, arrays = {}, []
    for field in fields(answer):
        value = getattr(answer, field.name)
        if not isinstance(value, np.ndarray):
            plain[field.name] = value
        elif field.name == "probabilities" and keep:
            best = np.argsort(-value, kind="stable")[:keep].astype("<i4")
            arrays += [("best", best), ("probabilities", value[best].astype("<f4"))]
            plain["classes"] = len(value)
        else:
            arrays.append((field.name, value.astype("<f4")))
    plain["arrays"] = [(name, array.dtype.str, len(array)) for name, array in arrays]
    text = json.dumps(plain).encode()
    return struct.pack("<I", len(text)) + text + b"".join(array.tobytes() for _, array in arrays)


def _answer_of(body: bytes) -> Answer:
    size = struct.unpack_from("<I", body)[0]
    plain = json.loads(body[4 : 4 + size])
    at = 4 + size
    found = {}
    for name, kind, count in plain.pop("arrays"):
        found[name] = np.frombuffer(body, kind, count, at)
        at += found[name].nbytes
    if "best" in found:  # the other classes get -1, so that the best stay the best
        whole = np.full(plain.pop("classes"), -1, np.float32)
        whole[found.pop("best")] = found["probabilities"]
        found["probabilities"] = whole
    return Answer(**{name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}, **found)


# ---------------------------------------------------------------------- an output


class Stream:
    """Records that go to standard output; they are not kept, so such a run cannot resume."""

    def __init__(self, columns: Columns):
        self.writer = JsonLines(None, columns)
        self.write, self.done, self.kept, self.errors = self.writer.write, 0, 0, []


class Run:
    """The records of one run: kept in a journal, then written as one file, or as parquet shards in a folder.

    done:   records that the interrupted run had written
    kept:   records on disk
    errors: (path, error) of the errors among the first `done` records
    """

    def __init__(self, output: str, columns: Columns, begin: dict, paths: Sequence[str], shard_rows: int):
        self.output, self.folder = Path(os.path.realpath(output)), is_folder(output)
        self.columns, self.begin, self.rows = columns, begin, shard_rows
        self.keep = 0 if self.output.suffix.lower() == ".npz" else columns.top
        self.done, self.errors, self.shard = 0, [], 0
        self.lock, self.made = None, False
        if self.folder:
            self._open_folder(paths)
        self.journal = self._open_journal()
        for answer in self.journal.answers():
            self._seen(answer.path, answer.error, paths)
        self.kept = self.done

    def _open_folder(self, paths: Sequence[str]) -> None:
        self.made = not self.output.exists()
        self.output.mkdir(exist_ok=True)
        self.lock = open_settings(self.output, self.begin | {"shard_rows": self.rows})
        while (shard := self._shard()).exists():
            self._partial().unlink(missing_ok=True)  # killed between the shard's name and the journal's end
            table = Parquet.require().parquet.read_table(shard, columns=["path", "error"])
            for path, error in zip(table["path"].to_pylist(), table["error"].to_pylist()):
                self._seen(path, error, paths)
            self.shard += 1

    def _seen(self, path: str, error: str | None, paths: Sequence[str]) -> None:
        if self.done >= len(paths) or show(paths[self.done]) != path:
            raise ValueError(
                f"record {self.done + 1:,} of the unfinished {self.output} is of {path}, which is not image "
                f"{self.done + 1:,} any more: it can only go on with the same images"
            )
        self.done += 1
        if error is not None:
            self.errors.append((path, error))

    def _shard(self) -> Path:
        return self.output / f"part-{self.shard:05d}.parquet" if self.folder else self.output

    def _partial(self) -> Path:
        return self.output / f"_part-{self.shard:05d}.partial" if self.folder else partial_of(self.output)

    def _open_journal(self) -> Journal:
        return Journal(self._partial(), self.begin, self.keep)

    def write(self, answer: Answer) -> None:
        self.journal.write(answer)
        self.kept += 1
        if self.folder and self.journal.count >= self.rows:
            self._write_shard()
            self.shard += 1
            self.journal = self._open_journal()

    def _write_shard(self) -> None:
        with open_records(str(self._shard()), self.columns) as writer:
            for answer in self.journal.answers():
                writer.write(answer)
        self.journal.close(remove=True)

    def finish(self) -> None:
        if not self.folder or self.journal.count or not self.shard:
            self._write_shard()
        else:
            self.journal.close(remove=True)
        if self.folder:
            finish_settings(self.output)
            self.lock.close()

    def leave(self) -> None:
        """Close without finishing, and keep the records for a later run."""
        if not self.journal.file.closed:
            with suppress(OSError):  # report the first error, even if the disk is gone
                if self.journal.count:
                    self.journal.sync()
            self.journal.close(remove=not self.journal.count)
        if self.folder:
            if not self.kept:
                (self.output / SETTINGS).unlink(missing_ok=True)
                if self.made:
                    self.output.rmdir()
            self.lock.close()


def partial_of(output: Path) -> Path:
    """The file that keeps the records of an unfinished run."""
    return output.with_name(output.name + PARTIAL)


def open_settings(folder: Path, settings: dict):
    """The settings file of a folder of shards, opened and locked; created if it does not exist.

    Raises ValueError if it belongs to a run with other settings, or another process writes to the folder.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if not path.exists():
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))
    file = open(path)
    try:
        _lock(file, folder)
        _require_equal(folder, read_settings(path), settings)
    except BaseException:
        file.close()
        raise
    return file


def read_settings(path: Path) -> dict:
    """The settings of a run. Raises ValueError if the file has none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings of a run of `revit infer`")
    return found


def finish_settings(folder: Path) -> None:
    """Mark the run of a folder as finished."""
    path = folder / SETTINGS
    settings = read_settings(path) | {"finished": True}
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))


def is_finished(output: str) -> bool:
    """Whether the output exists and is complete. Raises ValueError for a folder with other contents."""
    path = Path(os.path.realpath(output))
    if not is_folder(output):
        return path.exists() and not partial_of(path).exists()
    if is_empty(path):
        return False
    try:
        return read_settings(path / SETTINGS).get("finished", False)
    except (OSError, ValueError):
        raise ValueError(f"--output {output} is a folder that holds other things than a run of `revit infer`") from None


def check_begin(output: str, resume: bool) -> None:
    """Raise ValueError if a new run would overwrite an unfinished one, or a folder of shards."""
    path = Path(os.path.realpath(output))
    if resume:
        return
    if is_folder(output):
        if not is_empty(path):
            state = "a finished run" if is_finished(output) else "an unfinished run: go on with --resume"
            raise ValueError(f"--output {output} holds {state}, or give another folder")
    elif partial_of(path).exists():
        raise ValueError(
            f"{partial_of(path)} holds the records of an unfinished run: go on with --resume, or remove it"
        )


@contextmanager
def open_run(
    output: str | None,
    columns: Columns,
    settings: dict,
    paths: Sequence[str],
    shard_rows: int = SHARD_ROWS,
    tell: Callable[[int], None] | None = None,
):
    """A context manager that gives a Run, or a Stream if `output` is None.

    After the block the output is complete. If the block raises, its records are kept in OUTPUT.partial or in the folder
    for a later run; a run without records leaves nothing.

    output:     a file of a format in records.WRITERS, or a folder for parquet shards
    settings:   what decides the records of a run, as JSON
    paths:      all images; pass `infer` those from `done` on
    shard_rows: records of a shard
    tell:       called with the number of records kept, if the run ends early

    Raises ValueError if the records kept are of other settings or other images.
    """
    if output is None:
        yield Stream(columns)
        return
    run = Run(output, columns, settings, paths, shard_rows)
    try:
        yield run
        run.finish()
    except BaseException:
        run.leave()
        if run.kept and tell is not None:
            tell(run.kept)
        raise


def run_settings(prepared) -> dict:
    """What decides the records of a run with this serving.prepare.Prepared."""
    columns = prepared.columns
    return {
        "weights": prepared.fingerprint,
        "quantize": prepared.model.quantize if hasattr(prepared.model, "quantize") else None,
        "grids": repr(prepared.rule),
        "columns": [columns.features, columns.classes, columns.top, columns.labels, columns.adaptive],
    }
