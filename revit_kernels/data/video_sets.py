"""Sets of videos with classes: folders, tables of paths, Kinetics' and Something-Something's annotations."""

from __future__ import annotations

import copy
import csv
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from revit_kernels.data import motion
from revit_kernels.data.datasets import folder_set
from revit_kernels.data.image_set import EncodedSet, ImageSet, numbered, pick_split
from revit_kernels.data.images import ImageError
from revit_kernels.data.tables import csv_set, options_of, rows_of
from revit_kernels.data.videos import SUFFIXES, Sampling, decode_clip
from revit_kernels.files import parse_json

TABLES = (".csv", ".txt", ".json")
OPTIONS = ("videos", "labels")  # behind the # of a table's name


class ClipSet(EncodedSet):
    """Videos that are decoded when they are asked for, (frames, height, width, 3) uint8 each.

    sources: for each video a path
    """

    def __init__(self, name, classes, targets, keys, sources: Sequence, sampling: Sampling):
        super().__init__(name, classes, targets, keys, sources)
        if sampling.views != 1:
            raise ValueError(f"a set has one clip of each video, got {sampling.views} views")
        self.sampling = sampling

    def pixels(self, index: int) -> np.ndarray:
        try:
            return decode_clip(self.sources[index], self.sampling, self.target).pixels[0]
        except ImageError as error:
            raise ValueError(f"{self.keys[index]} cannot be used: {error}") from None

    def sampled(self, sampling: Sampling) -> ClipSet:
        found = copy.copy(self)
        found.sampling = sampling
        return found


def open_clips(source: str, sampling: Sampling, split: str = "train", *, root=None) -> ImageSet:
    """The clips that `source` names: an ImageSet whose `pixels` are (frames, height, width, 3).

    source: "motion", see data.motion, or other clips of it as "motion#clips=2000,first=12000"; a folder with a folder
            of videos per class, or with train/, test/ or val/ above them; a .csv with the columns path, label and
            perhaps split; Kinetics' .csv (label, youtube_id, time_start, time_end, split); a list of "path number"
            lines, .csv or .txt, as SlowFast and VideoMAE read; or Something-Something's .json (id, template). Behind a
            "#": videos=FOLDER where the videos are not beside the table, labels=FILE of Something-Something's classes
            (default: something-something-v2-labels.json beside it)
    split, root: as of datasets.open_set

    Videos that Kinetics' list names and the folder lacks are left out, as the list outlives them.
    Raises ValueError, in one sentence, for a source that is none, an empty one, and a split that it does not have.
    """
    text, _, options = (source, "", "") if os.path.exists(source) else source.partition("#")
    if text == motion.NAME:
        numbers = {"clips": "0", "first": "0"} | options_of(source, options, ("clips", "first"))
        for name, text in numbers.items():
            if not text.isdecimal():
                raise ValueError(f"{source}: {name} must be a whole number, got {text!r}")
        return motion.open_motion(split, sampling.frames, root, int(numbers["clips"]) or None, int(numbers["first"]))
    path = Path(text)
    if path.is_dir():
        found = folder_set(path, split, SUFFIXES, "videos")
    elif path.suffix.lower() in TABLES and path.is_file():
        found = _table(path, split, options_of(source, options, OPTIONS))
    else:
        raise ValueError(
            f"there is no set of videos {source!r}: name {motion.NAME}, a folder of classes, a .csv or .txt list, or a "
            ".json of Something-Something"
        )
    return ClipSet(found.name, found.classes, found.targets, found.keys, found.sources, sampling)


def _table(path: Path, split: str, options: dict[str, str]) -> EncodedSet:
    folder = Path(options.get("videos", path.parent))
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} of the videos of {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix.lower() == ".json":
        return _something(path, text, split, folder, options.get("labels"))
    if "labels" in options:
        raise ValueError(f"labels= goes with a .json of Something-Something, not with {path}")
    head = text.partition("\n")[0].lower().replace('"', "").replace(" ", "").split(",")
    if {"label", "youtube_id", "time_start", "time_end"} <= set(head):
        return _kinetics(path, text, split, folder)
    if path.suffix.lower() == ".csv" and {"path", "label"} <= set(head):
        if "videos" in options:
            raise ValueError(f"the paths of {path} are read from its own folder: leave out videos=")
        return csv_set(path, split)
    return _numbered_list(path, text, split, folder)


def _kinetics(path: Path, text: str, split: str, folder: Path) -> EncodedSet:
    """The rows whose video is there, as ID_000001_000011.mp4 or ID.mp4, in the folder or in one named for its class."""
    rows = list(csv.DictReader(text.splitlines()))
    present = {}
    for root, _, files in os.walk(folder):
        present |= {Path(file).stem: os.path.join(root, file) for file in sorted(files) if _is_video(file)}
    found = []
    for number, row in enumerate(rows, 2):
        try:
            name = row["youtube_id"]
            span = f"{name}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        except (TypeError, ValueError):
            raise ValueError(f"line {number} of {path} has no whole times") from None
        if (file := present.get(span) or present.get(name)) is not None:
            found.append((span, row["label"], file, row.get("split") or None))
    if not found:
        raise ValueError(f"{folder} has none of the {len(rows):,} videos that {path} names, such as {span}.mp4")
    if len(found) < len(rows):
        warnings.warn(f"{folder} lacks {len(rows) - len(found):,} of the {len(rows):,} videos that {path} names")
    keys, labels, sources, splits = zip(*found)
    classes, targets = numbered(labels)
    chosen = rows_of(str(path), split, classes, targets, splits if all(splits) else None)
    return _chosen(f"{path.stem}/{split}", classes, targets, keys, sources, chosen)


def _something(path: Path, text: str, split: str, folder: Path, labels: str | None) -> EncodedSet:
    """The videos ID.webm of a list of {"id", "template"}, with the classes of the file of labels."""
    pick_split(str(path), split, [])
    file = Path(labels) if labels else path.with_name("something-something-v2-labels.json")
    try:
        rows, numbers = parse_json(text), parse_json(file.read_text(encoding="utf-8"))
        places = {name: int(number) for name, number in numbers.items()}
        found = [(str(row["id"]), places[re.sub(r"[\[\]]", "", row["template"])]) for row in rows]
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}: name it behind the # as labels=FILE") from None
    except KeyError as error:
        raise ValueError(f"{path} and {file} do not fit: there is no {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no list of Something-Something: {error}") from None
    if not found or sorted(places.values()) != list(range(len(places))):
        raise ValueError(f"{path} has no videos, or {file} does not number its classes from 0")
    keys, targets = zip(*found)
    sources = [str(folder / f"{key}.webm") for key in keys]
    classes = sorted(places, key=places.get)
    return _chosen(f"{path.stem}/{split}", classes, np.array(targets), keys, sources, range(len(keys)))


def _numbered_list(path: Path, text: str, split: str, folder: Path) -> EncodedSet:
    """Lines of a path and a class's number, apart by a space or a comma."""
    pick_split(str(path), split, [])
    keys, labels = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"(.+?)[\s,]+(\d+)", line.strip())
        if found is None:
            raise ValueError(f"line {number} of {path} is no path and number of a class: {line.strip()[:60]!r}")
        keys.append(found[1])
        labels.append(int(found[2]))
    if not keys:
        raise ValueError(f"{path} has no videos")
    classes = [str(number) for number in range(max(labels) + 1)]
    sources = [str(folder / key) for key in keys]
    return _chosen(f"{path.stem}/{split}", classes, np.array(labels), keys, sources, range(len(keys)))


def _chosen(name, classes, targets, keys, sources, chosen) -> EncodedSet:
    return EncodedSet(name, classes, targets[list(chosen)], [keys[i] for i in chosen], [sources[i] for i in chosen])


def _is_video(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in SUFFIXES
