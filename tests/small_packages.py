"""Packages of known sets, made small: of a few images, with checksums to match."""

import gzip
import hashlib
import io
import json
import tarfile

import numpy as np
from PIL import Image

from revit_kernels.data import sets


def cifar10_package(monkeypatch, count=10):
    """(package, images, labels) of a CIFAR-10 of `count` images a page, taken for the real one from then on."""
    monkeypatch.setattr(sets, "PAGE_IMAGES", count)
    draw = np.random.default_rng(0)
    content, images, labels = {}, {}, {}
    for part, names in sets.PAGES.items():
        images[part] = draw.integers(0, 256, (count * len(names), 32, 32, 3), np.uint8)
        labels[part] = draw.integers(0, 10, count * len(names))
        for i, name in enumerate(names):
            data = io.BytesIO()
            Image.fromarray(images[part][i * count :][:count].reshape(count, 1024, 3)).save(data, "PNG")
            content[f"package/{name}"] = data.getvalue()
        content[f"package/{part}_lables.json"] = json.dumps(labels[part].tolist()).encode()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, member in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            archive.addfile(info, io.BytesIO(member))
    data = data.getvalue()
    archive = sets.ARCHIVES["cifar10"]._replace(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    monkeypatch.setitem(sets.ARCHIVES, "cifar10", archive)
    return data, images, labels


def fashion_files(monkeypatch):
    """(packed files, arrays) of a small Fashion-MNIST, taken for the real one from then on."""
    draw, content, whole = np.random.default_rng(0), {}, {}
    for name in sets.IDX_SHA256:
        count = 40 if name.startswith("train") else 20
        array = draw.integers(0, 256, (count, 28, 28), np.uint8) if "images" in name else np.arange(count) % 10
        array = array.astype(np.uint8)
        raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
        content[f"{name}.gz"], whole[name] = gzip.compress(raw), array
        monkeypatch.setitem(sets.IDX_SHA256, name, hashlib.sha256(raw).hexdigest())
    return content, whole


def debian_package(content, compression="xz"):
    """A .deb that holds these files."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode=f"w:{compression}") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def member(name, data):
        return f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)

    inner = member(f"data.tar.{compression}", inner.getvalue())
    return b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("control.tar.xz", b"odd") + inner
