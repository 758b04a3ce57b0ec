"""Opening sets of images by name: folders, CSV lists, parquet, the known sets, torchvision's and Hugging Face's."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from revit_kernels.data import hubs, sets
from revit_kernels.data.image_set import ArraySet, EncodedSet, ImageSet, check_classes, pick_split, plain_split
from revit_kernels.data.images import SUFFIXES, find_images, left_out_text, show
from revit_kernels.data.shards import shard_set
from revit_kernels.data.tables import csv_set, options_of, parquet_set

__all__ = ["ArraySet", "EncodedSet", "ImageSet", "open_set", "read_batches"]

SPLIT_FOLDERS = ("train", "test", "val")  # by their plain names
AHEAD = 2  # batches that are decoded before they are asked for


def open_set(source: str, split: str = "train", *, root=None) -> ImageSet:
    """The images that `source` names.

    source: a known set (see data.sets); a folder with a folder per class, or with train/, test/ or val/ above them;
            a .csv with the columns path, label and perhaps split; a .parquet, with "#image_column=...,label_column=..."
            behind it where the columns are not found; WebDataset's shards, as "shards/*.tar"; "torchvision:NAME" or
            "hf:NAME"
    split:  "train", "test" or "all"; "val" of a set that has both. A validation split alone is also "test"; a set
            without splits is "train" and "all"
    root:   the folder of the known sets' files; $REVIT_DATA, or data/, if not given

    Raises ValueError, in one sentence, for a source that is none, an empty one, a split that it does not have, and a
    class that only one split has.
    """
    if source in sets.KNOWN:
        return sets.open_known(source, split, root)
    kind, colon, name = source.partition(":")
    if colon and kind == "torchvision":
        return hubs.torchvision_set(name, split, str(sets.data_root(root)))
    if colon and kind == "hf":
        return hubs.hugging_face_set(name, split, root and str(root))
    text, _, options = (source, "", "") if os.path.exists(source) else source.partition("#")
    path = Path(text)
    if path.is_dir():
        return folder_set(path, split)
    if path.suffix.lower() == ".csv":
        return csv_set(path, split)
    if path.suffix.lower() == ".parquet":
        return parquet_set(path, split, **options_of(source, options))
    if path.suffix.lower() == ".tar":
        return shard_set(text, split)
    raise ValueError(
        f"there is no set of images {source!r}: name {', '.join(sets.KNOWN)}, a folder of classes, a .csv, a .parquet, "
        "tar shards (shards/*.tar), torchvision:NAME or hf:NAME"
    )


# ---------------------------------------------------------------------- folders


def _folders(path: Path) -> dict[str, Path]:
    """The folders in a folder, by name; hidden ones are left out."""
    try:
        return {show(p.name): p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    except OSError as error:
        raise ValueError(f"the folder {path} cannot be read: {error.strerror}") from None


def folder_set(path: Path, split: str, suffixes=SUFFIXES, what: str = "images") -> EncodedSet:
    """The images of a folder that has one for each class, or such folders named train, test or val.

    suffixes: of the files that are taken, which are called `what`
    """
    folders = _folders(path)
    parts = {name: _folders(p) for name, p in folders.items() if plain_split(name) in SPLIT_FOLDERS}
    parts = {name: inner for name, inner in parts.items() if inner}
    if "train" not in map(plain_split, parts) and len(parts) < len(folders):
        parts = {}  # classes, one of which has such a name
    check_classes(str(path), {name: set(inner) for name, inner in parts.items()})
    chosen = pick_split(str(path), split, sorted(parts))
    classes = sorted(set().union(*parts.values())) if parts else sorted(folders)
    keys, targets, sources, left_out = [], [], [], Counter()
    for inner in [parts[name] for name in chosen] or [folders]:
        for name, folder in inner.items():
            files, _, problems, others = find_images([str(folder)], suffixes=suffixes)
            left_out += others
            if problems:
                raise ValueError(problems[0])
            if not files:
                raise ValueError(f"{path} has no {what} in its folder {folder.relative_to(path)}/: it is no class")
            keys += [show(Path(file).relative_to(path).as_posix()) for file in files]
            targets += [classes.index(name)] * len(files)
            sources += files
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else f"no folders of {what}"
        raise ValueError(f"{path} has {found}: there must be a folder for each class, with its {what} in it")
    if left_out:
        warnings.warn(f"{path}: {left_out_text(left_out, what)}")
    name = path.resolve().name
    return EncodedSet(f"{name}/{split}" if parts else name, classes, targets, keys, sources)


# ---------------------------------------------------------------------- reading


def read_batches(
    images: ImageSet, indices: Sequence[int] | None = None, batch: int = 64, *, workers: int = 2
) -> Iterator[tuple[list[int], torch.Tensor | list[torch.Tensor]]]:
    """(indices, pixels) in order: one tensor (images, height, width, 3) where all have one size, else a list of them.

    indices: which images; all if not given
    workers: threads that decode; AHEAD batches wait at most
    """
    indices = list(range(len(images)) if indices is None else map(int, indices))
    groups = [indices[i : i + batch] for i in range(0, len(indices), batch)]

    def read(index: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(images.pixels(index)))

    waiting: deque[tuple[list[int], list[Future]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for group in groups + [None] * AHEAD:
            if group is not None:
                if (whole := images.gather(group)) is not None:
                    yield group, torch.from_numpy(whole)
                    continue
                waiting.append((group, [pool.submit(read, index) for index in group]))
            if waiting and (group is None or len(waiting) > AHEAD):
                members, futures = waiting.popleft()
                pixels = [future.result() for future in futures]
                same = all(p.shape == pixels[0].shape for p in pixels)
                yield members, torch.stack(pixels) if same else pixels
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
