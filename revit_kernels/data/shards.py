"""Sets of images in WebDataset's tar shards, each read where it lies when it is asked for: nothing is unpacked."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from revit_kernels.data.archives import Member
from revit_kernels.data.image_set import EncodedSet, numbered, pick_split
from revit_kernels.data.images import SUFFIXES
from revit_kernels.files import parse_json

LABELS = ("cls", "label", "txt", "json")  # of a sample's files, the first that is there says its class
LARGEST_LABEL = 1 << 20  # bytes


class _Places(Sequence):
    """Where each image lies: a Member that reads it. archive, offset, size: an array each, a number an image"""

    def __init__(self, archives: list[str], archive: np.ndarray, offset: np.ndarray, size: np.ndarray):
        self.archives, self.archive, self.offset, self.size = archives, archive, offset, size

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, index):
        def read() -> bytes:
            with open(self.archives[self.archive[index]], "rb") as file:
                file.seek(int(self.offset[index]))
                return file.read(int(self.size[index]))

        return Member("", read)


def shard_set(pattern: str, split: str) -> EncodedSet:
    """The images of tar shards: "shards/*.tar", "shards/{000..009}.tar" or one file.

    Files of one sample have one name up to the first dot, as WebDataset has it: an image, and its class in .cls,
    .label, .txt or .json (its "label", "cls" or "class"). Every header is read once, at the beginning. Raises
    ValueError where a shard cannot be read, or a sample has no class.
    """
    paths = [path for one in _braces(pattern) for path in (sorted(glob.glob(one)) or [one])]
    pick_split(pattern, split, [])
    labels, keys, places = [], [], []
    for number, path in enumerate(paths):
        try:
            with tarfile.open(path, "r:") as archive:
                for key, image, label in _samples(path, archive):
                    keys.append(key)
                    labels.append(label)
                    places.append((number, image.offset_data, image.size))
        except (OSError, tarfile.TarError) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise ValueError(f"the shard {path} cannot be read: {why}") from None
    if not places:
        raise ValueError(f"{pattern} has no images")
    classes, targets = numbered(labels)
    name = f"{Path(pattern).parent.name or 'shards'}/{split}"
    return EncodedSet(name, classes, targets, keys, _Places(paths, *np.array(places, np.int64).T))


def _samples(path: str, archive: tarfile.TarFile):
    """(key, the image's entry, its class) of each sample that has an image."""
    found: dict[str, tarfile.TarInfo | str] = {}
    key = None
    for entry in archive:
        archive.members = []
        if not entry.isreg():
            continue
        folder, _, base = entry.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if stem and (folder, stem) != key:
            if key is not None and "image" in found:
                yield _sample(path, key, found)
            key, found = (folder, stem), {}
        suffix = suffix.lower()
        if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
            found.setdefault("image", entry)
        elif suffix in LABELS and entry.size <= LARGEST_LABEL:
            found[suffix] = archive.extractfile(entry).read().decode("utf-8", "replace").strip()
    if key is not None and "image" in found:
        yield _sample(path, key, found)


def _sample(path: str, key: tuple[str, str], found: dict) -> tuple[str, tarfile.TarInfo, str]:
    name = "/".join(filter(None, (path, *key)))
    for suffix in LABELS:
        if suffix in found:
            label = found[suffix] if suffix != "json" else _label(found[suffix])
            if label not in (None, ""):
                return name, found["image"], str(label)
    raise ValueError(f"{name} has no class: neither a .cls, .label or .txt, nor a .json with a label")


def _label(text: str):
    try:
        said = parse_json(text)
    except ValueError:
        return None
    if not isinstance(said, dict):
        return said
    return next((said[name] for name in ("label", "cls", "class") if name in said), None)


def _braces(pattern: str) -> list[str]:
    """ "a{08..10}" as a08, a09, a10; a pattern without one as it is."""
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    first, dots, last = inside.partition("..")
    if not (opened and closed and dots and first.isdigit() and last.isdigit()):
        return [pattern]
    return [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
