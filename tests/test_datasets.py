"""Sets of images: folders, lists, parquet, the known sets' checks, and what is said of those that are none."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from revit_kernels import cli
from revit_kernels.data import sets
from revit_kernels.data.datasets import ArraySet, open_set, read_batches


def picture(value, size=(8, 6)):
    return Image.new("RGB", size, (value, 0, 255 - value))


def encoded(value):
    data = io.BytesIO()
    picture(value).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name / "deep").mkdir(parents=True)
            for i in range(count):
                inside = tmp_path / part / name / ("deep" if i % 2 else ".")
                picture(10 * i + (100 if name == "dog" else 0)).save(inside / f"{i}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_folders(folder):
    train, test = open_set(str(folder)), open_set(str(folder), "test")
    assert (len(train), len(test), len(open_set(str(folder), "all"))) == (8, 4, 12)
    assert train.classes == ("cat", "dog") and train.targets.tolist() == [0] * 4 + [1] * 4
    assert train.keys[0] == "train/cat/0.png" and "train/cat/deep/1.png" in train.keys
    assert train.pixels(0).shape == (6, 8, 3) and train.pixels(4)[0, 0].tolist() == [100, 0, 155]
    assert len(open_set(str(folder / "train"))) == 8  # one level only: no splits
    with pytest.raises(ValueError, match="has no split 'val'"):
        open_set(str(folder), "val")


def test_folders_that_are_none(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folders of images"):
        open_set(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="only the class 'cat'"):
        (tmp_path / "one" / "cat").mkdir(parents=True)
        picture(1).save(tmp_path / "one" / "cat" / "1.png")
        open_set(str(tmp_path / "one"))
    (folder / "test" / "mouse").mkdir()
    with pytest.raises(ValueError, match="not the same classes: mouse"):
        open_set(str(folder))
    with pytest.raises(ValueError, match="there is no set of images 'nowhere'"):
        open_set("nowhere")


def test_broken_image_is_named(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"train/cat/0\.png cannot be used: it is not an image"):
        open_set(str(folder)).pixels(0)


def test_lists(folder):
    path = folder / "list.csv"
    path.write_text("path,label,split\ntrain/cat/0.png,10,train\ntrain/dog/0.png,9,train\ntest/dog/0.png,9,val\n")
    train = open_set(str(path))
    assert train.classes == ("9", "10") and train.targets.tolist() == [1, 0] and train.pixels(1)[0, 0, 0] == 100
    assert len(open_set(str(path), "test")) == 1 and len(open_set(str(path), "all")) == 3
    path.write_text("file,class\na,b\n")
    with pytest.raises(ValueError, match="no column label and no column path"):
        open_set(str(path))
    path.write_text("path,label\n")
    with pytest.raises(ValueError, match="no images"):
        open_set(str(path))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "set.parquet"
    rows = [{"bytes": encoded(v), "path": None} for v in (0, 50, 100)]
    pq.write_table(pyarrow.table({"image": rows, "label": [3, 1, 3]}), path)
    found = open_set(str(path))
    assert found.classes == ("1", "3") and found.targets.tolist() == [1, 0, 1] and found.pixels(1)[0, 0, 0] == 50
    pq.write_table(pyarrow.table({"pic": [encoded(7)] * 2, "kind": ["b", "a"]}), path)
    found = open_set(f"{path}#image_column=pic,label_column=kind")
    assert found.classes == ("a", "b") and found.pixels(0)[0, 0, 0] == 7
    with pytest.raises(ValueError, match="no column of images: its columns are pic, kind"):
        open_set(str(path))
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        open_set(str(path))


def test_other_libraries_sets(monkeypatch):
    class Found:
        column_names = ("image", "label")
        features = {"label": types.SimpleNamespace(names=["no", "yes"])}

        def __getitem__(self, key):
            return [1, 0] if key == "label" else {"image": picture(9)}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: Found()))
    found = open_set("hf:somebody/things", "test")
    assert found.classes == ("no", "yes") and found.targets.tolist() == [1, 0] and found.pixels(0)[0, 0, 0] == 9


def test_torchvision_sets(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="no data set 'Nothing'"):
        open_set("torchvision:Nothing")
    with pytest.raises(ValueError, match="is not in"):
        open_set("torchvision:CIFAR10", root=tmp_path)


def test_parts():
    images = ArraySet("fake", "ab", np.repeat([0, 1], 10), np.arange(20, dtype=np.uint8)[:, None, None].repeat(4, 1))
    rest, held = images.split(0.2, seed=1)
    assert len(held) == 4 and np.bincount(held.targets).tolist() == [2, 2]
    assert not set(rest.keys) & set(held.keys) and held.subset([1]).keys[0] == held.keys[1]
    assert held.pixels(0).shape == (4, 1, 3) and held.pixels(0)[0, 0, 0] == images.keys.index(held.keys[0])
    assert images.fingerprint() == images.subset(range(20)).fingerprint() != rest.fingerprint()


def test_batches(folder):
    images = open_set(str(folder))
    read = list(read_batches(images, None, 3, workers=2))
    assert [indices for indices, _ in read] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert read[0][1].shape == (3, 6, 8, 3) and (read[1][1][1].numpy() == images.pixels(4)).all()
    picture(1, (5, 5)).save(folder / "train" / "cat" / "0.png")
    assert [p.shape for p in next(read_batches(images, [0, 1], 2))[1]] == [(5, 5, 3), (6, 8, 3)]


# ---------------------------------------------------------------------- known sets


def test_digits():
    pytest.importorskip("sklearn")
    train, test = open_set("digits"), open_set("digits", "test")
    assert (len(train), len(test)) == (1297, 500) and train.pixels(0).shape == (8, 8, 3)
    assert not set(train.keys) & set(test.keys) and train.pixels(0).max() == 255
    with pytest.raises(ValueError, match="no split 'val'"):
        open_set("digits", "val")


@pytest.mark.parametrize("name", sets.ARCHIVES)
def test_missing_and_wrong_files(name, tmp_path):
    with pytest.raises(ValueError, match=f"get it with `revit data {name} --root"):
        open_set(name, root=tmp_path)
    (tmp_path / sets.ARCHIVES[name].file.replace("*", "1")).write_bytes(b"another file")
    with pytest.raises(ValueError, match="expected " + sets.ARCHIVES[name].sha256):
        open_set(name, root=tmp_path)


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


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sets.ARCHIVES, "cifar10", sets.Archive("none-*.tgz", "0", ("no-such-client", "pack")))
    assert cli.main(["data", "cifar10", "--root", str(tmp_path)]) == 2
    assert "comes through no-such-client, which is not installed here" in capsys.readouterr().err


def test_debian_package_is_read(tmp_path):
    import gzip
    import tarfile

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as tar:
        for name, array in (
            ("t10k-images-idx3-ubyte.gz", np.arange(32, dtype=np.uint8).reshape(2, 4, 4)),
            ("t10k-labels-idx1-ubyte.gz", np.array([7, 1], np.uint8)),
        ):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            data = gzip.compress(head + array.tobytes())
            info = tarfile.TarInfo(f"./usr/share/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def member(name, data):
        return f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)

    path = tmp_path / "dataset-fashion-mnist_1.deb"
    path.write_bytes(b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("data.tar.xz", inner.getvalue()))
    with sets._deb_members(path) as archive:
        members = {m.name.rpartition("/")[2]: m for m in archive.getmembers()}
        read = sets._idx(archive.extractfile(members["t10k-images-idx3-ubyte.gz"]).read())
    assert read.shape == (2, 4, 4) and read.ravel().tolist() == list(range(32))
