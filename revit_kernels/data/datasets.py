"""Sets of images with classes: folders, CSV lists, parquet, the known sets, torchvision's and Hugging Face's."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from revit_kernels.data.division import hold_out
from revit_kernels.data.images import SUFFIXES, ImageError, decode

Target = Callable[[tuple[int, int]], tuple[int, int]]
HELD_SPLITS = ("test", "val", "valid", "validation")


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

    def subset(self, indices) -> ImageSet:
        return Subset(self, np.asarray(indices, np.int64))

    def split(self, held_out: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """(rest, held out): `held_out` images, or that share of them, of every class alike."""
        rest, held = hold_out(self.targets, held_out, seed)
        return self.subset(rest), self.subset(held)

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

    def subset(self, indices) -> ImageSet:
        return Subset(self.whole, self.indices[np.asarray(indices, np.int64)])


class ArraySet(ImageSet):
    """Images of one size in memory. array: (images, height, width) or (images, height, width, 3) uint8"""

    def __init__(self, name, classes, targets, array: np.ndarray, keys: Sequence[str] | None = None):
        self.array = array
        keys = [f"{name}/{i:05d}" for i in range(len(array))] if keys is None else keys
        super().__init__(name, classes, targets, keys)

    def pixels(self, index: int) -> np.ndarray:
        image = self.array[index]
        return np.repeat(image[:, :, None], 3, 2) if image.ndim == 2 else image


class EncodedSet(ImageSet):
    """Encoded images, decoded when they are asked for.

    sources: for each image a path, or the bytes of the file, or a callable that gives a Pillow image
    target:  as of data.images.decode: lets a large JPEG be decoded smaller
    """

    def __init__(self, name, classes, targets, keys, sources: Sequence, target: Target | None = None):
        super().__init__(name, classes, targets, keys)
        self.sources, self.target = sources, target

    def pixels(self, index: int) -> np.ndarray:
        source = self.sources[index]
        try:
            if isinstance(source, bytes):
                source = io.BytesIO(source)
            return decode(source, self.target).pixels
        except ImageError as error:
            raise ValueError(f"{self.keys[index]} cannot be used: {error}") from None


# ---------------------------------------------------------------------- opening


def open_set(source: str, split: str = "train", *, root=None) -> ImageSet:
    """The images that `source` names.

    source: a known set (see data.sets); a folder with a folder per class, or with train/ and test/ or val/ above them;
            a .csv with the columns path, label and perhaps split; a .parquet, with "#image_column=...,label_column=..."
            behind it where the columns are not found; "torchvision:NAME" or "hf:NAME"
    split:  "train", "test" or "all" where the source knows splits
    root:   the folder of the known sets' files; $REVIT_DATA, or data/, if not given

    Raises ValueError, in one sentence, for a source that is none, an empty one, and a split that it does not have.
    """
    from revit_kernels.data import sets

    if source in sets.KNOWN:
        return sets.open_known(source, split, root)
    kind, colon, name = source.partition(":")
    if colon and kind in ("torchvision", "hf"):
        return (_torchvision if kind == "torchvision" else _hugging_face)(name, split, root)
    path, _, options = source.partition("#")
    path = Path(path)
    if path.is_dir():
        return _folder(path, split)
    if path.suffix.lower() == ".csv":
        return _csv(path, split)
    if path.suffix.lower() == ".parquet":
        return parquet_set(path, split, **dict(part.split("=", 1) for part in options.split(",") if "=" in part))
    raise ValueError(
        f"there is no set of images {source!r}: name {', '.join(sets.KNOWN)}, a folder of classes, a .csv, a .parquet, "
        "torchvision:NAME or hf:NAME"
    )


def numbered(labels: Sequence) -> tuple[list[str], np.ndarray]:
    """(class names, targets) of one label per image; whole numbers keep their order, names are sorted."""
    try:
        names = sorted(set(labels), key=int)
    except (TypeError, ValueError):
        names = sorted(set(map(str, labels)))
        labels = list(map(str, labels))
    number = {name: i for i, name in enumerate(names)}
    return [str(name) for name in names], np.array([number[label] for label in labels], np.int64)


def _class_folders(path: Path) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise ValueError(f"the folder {path} cannot be read: {error.strerror}") from None


def _folder(path: Path, split: str) -> ImageSet:
    names = {p.name for p in _class_folders(path)}
    has_splits = "train" in names and any(name in names for name in HELD_SPLITS)
    parts = {"": path}
    if has_splits:
        held = next(name for name in (split, *HELD_SPLITS) if name in names and name != "train")
        known = {"train": ["train"], "test": [held], held: [held], "all": ["train", held]}
        if split not in known:
            raise ValueError(f"{path} has no split {split!r}, but {', '.join(known)}")
        parts = {f"{part}/": path / part for part in known[split]}
        classes = {p.name for p in _class_folders(path / "train")}
        if extra := {p.name for p in _class_folders(path / held)} ^ classes:
            raise ValueError(f"train/ and {held}/ of {path} have not the same classes: {', '.join(sorted(extra)[:4])}")
    keys, labels, sources = [], [], []
    for prefix, folder in parts.items():
        for part in _class_folders(folder):
            files = (p for p in sorted(part.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file())
            for file in files:
                keys.append(prefix + file.relative_to(folder).as_posix())
                labels.append(part.name)
                sources.append(str(file))
    if len(set(labels)) < 2:
        found = f"only the class {labels[0]!r}" if labels else "no folders of images"
        raise ValueError(f"{path} has {found}: there must be a folder for each class, with its images in it")
    classes, targets = sorted(set(labels)), None
    targets = np.searchsorted(classes, labels)
    return EncodedSet(f"{path.name}/{split}" if has_splits else path.name, classes, targets, keys, sources)


def _csv(path: Path, split: str) -> ImageSet:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"path", "label"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{path} has no column {' and no column '.join(sorted(missing))}")
            rows = list(reader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    classes, _ = numbered([row["label"] for row in rows]) if rows else ([], None)
    if rows and rows[0].get("split") is not None:
        rows = _of_split(rows, split, path)
    elif split not in ("train", "test", "all"):
        raise ValueError(f"{path} has no split {split!r}: it has no column split")
    number = {name: i for i, name in enumerate(classes)}
    sources = [str(path.parent / row["path"]) for row in rows]
    keys, targets = [row["path"] for row in rows], [number[row["label"]] for row in rows]
    return EncodedSet(path.stem, classes, targets, keys, sources)


def _of_split(rows: list[dict], split: str, path: Path) -> list[dict]:
    if split == "all":
        return rows
    found = {row["split"] for row in rows}
    wanted = next((name for name in ((split, *HELD_SPLITS) if split == "test" else (split,)) if name in found), None)
    if wanted is None:
        raise ValueError(f"{path} has no split {split!r}, but {', '.join(sorted(found))}")
    return [row for row in rows if row["split"] == wanted]


IMAGE_COLUMNS = ("image", "image_data", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "target", "class")


def parquet_set(
    path: Path,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column=None,
    name=None,
) -> ImageSet:
    """The images of a parquet file: bytes, or Hugging Face's struct of bytes and path, with a label a row."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None

    def column(given, known, what):
        found = given if given in table.column_names else next((n for n in known if n in table.column_names), None)
        if found is None or (given and found != given):
            raise ValueError(f"{path} has no column of {what}: its columns are {', '.join(table.column_names)}")
        return table[found].to_pylist()

    images = column(image_column, IMAGE_COLUMNS, "images")
    labels = column(label_column, LABEL_COLUMNS, "labels")
    splits = column(split_column, ("split",), "splits") if split_column or "split" in table.column_names else None
    classes, targets = numbered(labels) if labels else ([], np.empty(0))
    rows = range(len(images))
    if splits is not None:
        rows = [row["row"] for row in _of_split([{"split": s, "row": i} for i, s in enumerate(splits)], split, path)]
    sources = [images[i]["bytes"] if isinstance(images[i], dict) else images[i] for i in rows]
    keys = [f"{name or path.stem}/{i:06d}" for i in rows]
    return EncodedSet(f"{name or path.stem}/{split}", classes, targets[list(rows)], keys, sources)


class _PillowSet(ImageSet):
    """Images that another library gives as Pillow's. item: index -> Pillow image"""

    def __init__(self, name, classes, targets, item: Callable):
        super().__init__(name, classes, targets, [f"{name}/{i:06d}" for i in range(len(targets))])
        self.item = item

    def pixels(self, index: int) -> np.ndarray:
        return np.asarray(self.item(index).convert("RGB"))


def _torchvision(name: str, split: str, root) -> ImageSet:
    try:
        from torchvision import datasets
    except Exception as error:
        raise ValueError(f"torchvision:{name} needs a torchvision that fits this torch: {error}") from None
    cls = getattr(datasets, name, None)
    if cls is None:
        raise ValueError(f"torchvision has no data set {name!r}")
    folder, errors = str(root or "data"), []
    for options in ({"train": split == "train"}, {"split": split}):
        try:
            found = cls(folder, download=False, **options)
            break
        except TypeError as error:
            errors.append(error)
        except RuntimeError as error:
            raise ValueError(f"torchvision:{name} is not in {folder}: {error}") from None
    else:
        raise ValueError(f"torchvision:{name} cannot be opened: {errors[-1]}")
    targets = getattr(found, "targets", None)
    targets = getattr(found, "_labels", None) if targets is None else targets
    if targets is None:
        targets = [found[i][1] for i in range(len(found))]
    classes = getattr(found, "classes", None) or sorted({str(int(t)) for t in targets}, key=int)
    return _PillowSet(f"torchvision:{name}/{split}", classes, np.asarray(targets), lambda i: found[i][0])


def _hugging_face(name: str, split: str, root) -> ImageSet:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name} needs Hugging Face's datasets: pip install datasets") from None
    found = datasets.load_dataset(name, split=split, cache_dir=root)
    columns = found.column_names
    image = next((c for c in IMAGE_COLUMNS if c in columns), None)
    label = next((c for c in LABEL_COLUMNS if c in columns), None)
    if image is None or label is None:
        raise ValueError(f"hf:{name} has no columns of images and labels among {', '.join(columns)}")
    targets = found[label]
    classes = getattr(found.features[label], "names", None)
    if classes is None:
        classes, targets = numbered(targets)
    return _PillowSet(f"hf:{name}/{split}", classes, targets, lambda i: found[i][image])


# ---------------------------------------------------------------------- reading


def read_batches(
    images: ImageSet, indices: Sequence[int] | None = None, batch: int = 64, *, workers: int = 2, ahead: int = 2
) -> Iterator[tuple[list[int], torch.Tensor | list[torch.Tensor]]]:
    """(indices, pixels) in order: one tensor (images, height, width, 3) where all have one size, else a list of them.

    indices: which images; all if not given
    workers: threads that decode; `ahead` batches wait at most
    """
    indices = list(range(len(images)) if indices is None else map(int, indices))
    groups = [indices[i : i + batch] for i in range(0, len(indices), batch)]

    def read(index: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(images.pixels(index)))

    waiting: deque = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for group in groups + [None] * ahead:
            if group is not None:
                waiting.append((group, [pool.submit(read, index) for index in group]))
            if waiting and (group is None or len(waiting) > ahead):
                members, futures = waiting.popleft()
                pixels = [future.result() for future in futures]
                same = all(p.shape == pixels[0].shape for p in pixels)
                yield members, torch.stack(pixels) if same else pixels
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
