"""Sets of images of torchvision and of Hugging Face's datasets, where those are installed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np

from revit_kernels.data.image_set import EncodedSet, ImageSet, numbered, pick_split
from revit_kernels.data.images import ImageError
from revit_kernels.data.tables import COLUMN_OPTIONS, IMAGE_COLUMNS, LABEL_COLUMNS, options_of


class Items:
    """The images of another library's sets, one after the other. image: the item's part that is the image"""

    def __init__(self, sets: Sequence, image: int | str):
        self.sets, self.image = sets, image
        self.ends = np.cumsum([len(one) for one in sets])

    def __getitem__(self, index: int):
        number = int(np.searchsorted(self.ends, index, "right"))
        one = self.sets[number]
        try:
            found = one[int(index) - (int(self.ends[number]) - len(one))][self.image]
        except Exception as error:  # whatever a library makes of a file that is damaged
            raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error
        if isinstance(found, dict):  # Hugging Face's, not yet decoded
            return found["bytes"] or found["path"]
        return found


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---------------------------------------------------------------------- torchvision


def torchvision_set(name: str, split: str, root: str, download: bool = False) -> ImageSet:
    """The set of torchvision.datasets of that name, whose files are in `root`, or are downloaded there.

    Raises ValueError where torchvision is not installed, or the set is none of images with classes, or not there.
    """
    try:
        from torchvision import datasets
    except Exception as error:  # one built for another torch fails with errors of its own
        raise ValueError(f"torchvision:{name} needs a torchvision that fits this torch: {_why(error)}") from None
    cls = getattr(datasets, name, None)
    if not inspect.isclass(cls):
        raise ValueError(f"torchvision has no data set {name!r}")
    takes = inspect.signature(cls).parameters
    given = {"root": root} if "root" in takes else {}
    given |= {"download": download} if "download" in takes else {}
    parts = [split] if split != "all" else ["train", "test"]
    if not {"train", "split"} & takes.keys():
        parts = pick_split(f"torchvision:{name}", split, []) or ["all"]
    found = []
    for part in parts:
        choices = [{}] if part == "all" else [{"train": part == "train"}] if "train" in takes else [{"split": part}]
        if "split" in choices[0] and part == "test":
            choices += [{"split": "val"}, {"split": "valid"}]
        found.append(_first(cls, given, choices, f"torchvision:{name}", root))
    targets = [_targets(one) for one in found]
    if any(one.ndim != 1 or one.dtype.kind not in "iu" for one in targets):
        raise ValueError(f"torchvision:{name} is no set of images with one class each")
    classes, numbers = numbered(np.concatenate(targets).tolist())
    names = getattr(found[0], "classes", None)
    if isinstance(names, Sequence) and len(names) > max(map(int, classes)):
        classes, numbers = [str(one) for one in names], np.concatenate(targets)
    keys = [f"torchvision:{name}/{part}/{i:06d}" for part, one in zip(parts, found) for i in range(len(one))]
    return EncodedSet(f"torchvision:{name}/{split}", classes, numbers, keys, Items(found, 0))


def _first(cls, given: dict, choices: list[dict], name: str, root: str):
    """The set opened with the first of `choices` that it has."""
    unknown = []
    for choice in choices:
        try:
            return cls(**given, **choice)
        except ValueError as error:  # torchvision's for a split that there is not
            unknown.append(_why(error))
        except TypeError as error:
            raise ValueError(f"{name} cannot be opened like this: {_why(error)}") from None
        except (RuntimeError, OSError, ImportError) as error:
            how = f"get it with `revit data {name} --root {root}`"
            raise ValueError(f"{name} is not in {root} ({_why(error).rstrip('.')}): {how}") from None
    raise ValueError(f"{name} cannot be opened: {unknown[0]}")


def _targets(found) -> np.ndarray:
    for attribute in ("targets", "labels", "_labels", "y"):
        if (targets := getattr(found, attribute, None)) is not None:
            return np.asarray(targets)
    for attribute in ("samples", "_samples", "imgs"):
        if isinstance(samples := getattr(found, attribute, None), list) and samples:
            return np.asarray([label for *_, label in samples])
    return np.asarray([found[i][1] for i in range(len(found))])


# ---------------------------------------------------------------------- Hugging Face


def hugging_face_set(source: str, split: str, root: str | None) -> ImageSet:
    """A set of the Hugging Face hub, or a folder of one, as NAME or NAME#config=...,image_column=...,label_column=...

    Raises ValueError where `datasets` is not installed, the set cannot be loaded, or its columns are not found.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{source} needs Hugging Face's datasets: pip install datasets") from None
    name, _, text = source.partition("#")
    options = options_of(f"hf:{source}", text, ("config", *COLUMN_OPTIONS[:2]))
    wanted = [split, *(("validation", "valid", "val") if split == "test" else ())]
    found, unknown = None, []
    for part in wanted:
        try:
            found = datasets.load_dataset(name, options.get("config"), split=part, cache_dir=root)
            break
        except ValueError as error:  # for a split that there is not, among others
            unknown.append(_why(error))
        except Exception as error:  # of the network, of the hub, of the files
            raise ValueError(f"hf:{name} cannot be loaded: {_why(error)}") from None
    if found is None:
        raise ValueError(f"hf:{name} cannot be loaded: {unknown[0]}")
    columns = found.column_names
    image = next((c for c in (options.get("image_column"), *IMAGE_COLUMNS) if c in columns), None)
    label = next((c for c in (options.get("label_column"), *LABEL_COLUMNS) if c in columns), None)
    if image is None or label is None:
        raise ValueError(f"hf:{name} has no columns of images and labels among {', '.join(columns)}")
    targets = list(found[label])
    classes = getattr(found.features[label], "names", None)
    if classes is None:
        classes, targets = numbered(targets)
    images = found.select_columns([image])
    if isinstance(found.features[image], datasets.Image):
        images = images.cast_column(image, datasets.Image(decode=False))
    keys = [f"hf:{name}/{split}/{i:06d}" for i in range(len(found))]
    return EncodedSet(f"hf:{name}/{split}", classes, targets, keys, Items([images], image))
