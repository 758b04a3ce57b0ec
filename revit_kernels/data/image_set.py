"""ImageSet: images with classes, by number, whether their pixels lie in memory or are decoded when asked for."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np

from revit_kernels.data.class_names import match_classes
from revit_kernels.data.division import hold_out
from revit_kernels.data.images import ImageError, decode

Target = Callable[[tuple[int, int]], tuple[int, int]]
SPLITS = {"training": "train", "testing": "test", "valid": "val", "validation": "val"}  # other names of a split


class ImageSet:
    """Images with classes, by index.

    name:    as it can be shown, such as "cifar10/test"
    classes: their names
    targets: (images,) int64
    keys:    a name for each image that stays the same
    """

    def __init__(self, name: str, classes: Sequence[str], targets, keys: Sequence[str]):
        self.name = name
        self.classes = tuple(str(label) for label in classes)
        self.targets = np.asarray(targets, np.int64)
        self.keys = keys
        if not len(self.targets):
            raise ValueError(f"{name} has no images")

    def __len__(self) -> int:
        return len(self.targets)

    def pixels(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8. Raises ValueError, with the image's key, where it cannot be decoded."""
        raise NotImplementedError

    def gather(self, indices) -> np.ndarray | None:
        """(indices, height, width, 3) uint8 of several images at once, where they lie in memory; else None."""
        return None

    def subset(self, indices) -> ImageSet:
        return Subset(self, np.asarray(indices, np.int64))

    def split(self, held_out: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """(rest, held out): `held_out` images, or that share of them, stratified by class."""
        rest, held = hold_out(self.targets, held_out, seed)
        return self.subset(rest), self.subset(held)

    def reduced(self, target: Target) -> ImageSet:
        """The same images, of which large JPEGs are decoded smaller. target: see images.decode"""
        return self

    def with_classes(self, classes: Sequence[str]) -> ImageSet:
        """The same images with targets that number `classes`, such as the ones that a model was trained on.

        Names are matched as by `match_classes`. Raises ValueError for an image of another class, and for a name that
        could be several.
        """
        present = np.unique(self.targets)
        try:
            matched = match_classes(self.classes, classes, present)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        places = np.full(len(self.classes), -1)
        for i, place in zip(present, matched):
            if place is None:
                names = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
                raise ValueError(f"{self.name} has the class {self.classes[i]!r}, which is none of {names}")
            places[i] = place
        found = copy.copy(self)
        found.targets, found.classes = places[self.targets], tuple(classes)
        return found

    def fingerprint(self) -> str:
        """The sha256 of keys, classes and targets."""
        digest = hashlib.sha256("\0".join(self.classes).encode() + b"\1")
        digest.update("\0".join(self.keys).encode("utf-8", "surrogateescape"))
        digest.update(self.targets.tobytes())
        return digest.hexdigest()


class Subset(ImageSet):
    """Some images of another set."""

    def __init__(self, whole: ImageSet, indices: np.ndarray):
        self.whole, self.indices = whole, indices
        super().__init__(whole.name, whole.classes, whole.targets[indices], [whole.keys[i] for i in indices])

    def pixels(self, index: int) -> np.ndarray:
        return self.whole.pixels(int(self.indices[index]))

    def gather(self, indices) -> np.ndarray | None:
        return self.whole.gather(self.indices[indices])

    def reduced(self, target: Target) -> ImageSet:
        found = copy.copy(self)
        found.whole = self.whole.reduced(target)
        return found


class ArraySet(ImageSet):
    """Images of one size in memory. array: (images, height, width) or (images, height, width, 3) uint8"""

    def __init__(self, name, classes, targets, array: np.ndarray, keys: Sequence[str] | None = None):
        self.array = array
        keys = [f"{name}/{i:05d}" for i in range(len(array))] if keys is None else keys
        super().__init__(name, classes, targets, keys)

    def pixels(self, index: int) -> np.ndarray:
        image = self.array[index]
        return np.repeat(image[:, :, None], 3, 2) if image.ndim == 2 else image

    def gather(self, indices) -> np.ndarray:
        found = self.array[np.asarray(indices, np.int64)]
        return np.repeat(found[..., None], 3, 3) if found.ndim == 3 else found


class EncodedSet(ImageSet):
    """Encoded images, decoded when they are asked for.

    sources: for each image a path, or the bytes of the file, or a Pillow image
    """

    def __init__(self, name, classes, targets, keys, sources: Sequence):
        super().__init__(name, classes, targets, keys)
        self.sources, self.target = sources, None

    def pixels(self, index: int) -> np.ndarray:
        try:
            source = self.sources[index]
            if isinstance(source, bytes):
                source = io.BytesIO(source)
            return decode(source, self.target).pixels
        except ImageError as error:
            raise ValueError(f"{self.keys[index]} cannot be used: {error}") from None

    def reduced(self, target: Target) -> ImageSet:
        found = copy.copy(self)
        found.target = target
        return found


def numbered(labels: Sequence) -> tuple[list[str], np.ndarray]:
    """(class names, targets) of one label per image; whole numbers keep their order, names are sorted."""
    try:
        names = sorted(set(labels), key=lambda label: (int(label), str(label)))
    except (TypeError, ValueError):
        names = sorted(set(map(str, labels)))
        labels = list(map(str, labels))
    number = {name: i for i, name in enumerate(names)}
    return [str(name) for name in names], np.array([number[label] for label in labels], np.int64)


def set_name(name: str) -> str:
    """The name of a set without its split."""
    return name.partition("/")[0]


def plain_split(split: str) -> str:
    """train, val or test for their other names."""
    return SPLITS.get(split.lower(), split.lower())


def pick_split(name: str, split: str, known: Sequence[str]) -> list[str]:
    """The splits of `known` that are meant: all for "all"; for "test" the validation split where there is no other.

    Raises ValueError for one that is not there.
    """
    if split == "all":
        return list(known)
    if not known:
        if split != "train":
            raise ValueError(f"{name} has no splits: ask for the split 'all' (--split all)")
        return []
    plain = {plain_split(one): one for one in known}
    wanted = plain_split(split)
    if wanted == "test" and "test" not in plain:
        wanted = "val"
    if wanted not in plain:
        raise ValueError(f"{name} has no split {split!r}, but {', '.join(known)} and all")
    return [plain[wanted]]


def check_classes(name: str, classes_of: dict[str, set[str]]) -> None:
    """Raise ValueError for a class that only one of several splits has. classes_of: the classes of each split"""
    for one in sorted(set().union(*classes_of.values())) if len(classes_of) > 1 else ():
        where = [split for split, classes in classes_of.items() if one in classes]
        if len(where) == 1:
            raise ValueError(f"the class {one!r} of {name} is only in its split {where[0]!r}")
