"""Files written whole or not at all, and JSON of strangers."""

import glob
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A file or folder that a process of this number writes under a temporary name.
TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.tmp", re.DOTALL)
ABANDONED = 3600  # seconds after which what a process that is gone has left is removed


def parse_json(text: str | bytes):
    """What the JSON says. Raises ValueError for any other text, and for what is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; the file written there takes its place on leaving without an exception.

    It is on disk by then, with the permissions of the file of before, or those of a new file. Where `path` is a link,
    the file that it leads to is replaced. What killed processes left under such names is removed.
    """
    path = Path(os.path.realpath(path))
    _clear(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # some writers make files of their own that only their owner can read
        _sync(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some file systems cannot do it for folders
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def workshop(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder in `folder`, removed on leaving: for files that then take their places by `put`.

    What killed processes have left of such folders of this name is removed.
    """
    _clear(folder / name)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of before that had this number
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Whether the folder does not exist, or holds nothing but temporary files that killed processes left."""
    return not folder.exists() or all(TEMPORARY.fullmatch(item.name) for item in folder.iterdir())


def put(file: Path, place: Path) -> None:
    """Rename a file once it is on disk."""
    _sync(file)
    os.replace(file, place)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = TEMPORARY.fullmatch(left.name)
        with suppress(OSError):
            if found is None or found[1] != path.name or _runs(int(found[2])):
                continue
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_whole(path: Path, write) -> None:
    """Let `write` write a file under a temporary name, which then takes its own: whole or not at all.

    Raises RuntimeError, in one sentence, where the disk is full or the folder cannot be written to; what was there
    before is then still there.
    """
    try:
        with whole(path) as temporary:
            write(temporary)
    except Exception as error:  # of the disk, but writers have exceptions of their own for it
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        kept = " (the file of before is unharmed)" if path.exists() else ""
        raise RuntimeError(f"{path} could not be written: {why}{kept}") from error
