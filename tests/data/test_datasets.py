"""Sets of images: folders, lists, parquet, other libraries' sets, and what is said of those that are none."""

import io
import json
import os
import sys
import types

import numpy as np
import pytest
from PIL import Image

from revit_kernels import cli
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
    with pytest.raises(ValueError, match="has no split 'val', but test, train and all"):
        open_set(str(folder), "val")
    with pytest.raises(ValueError, match="has no splits: ask for the split 'all'"):
        open_set(str(folder / "train"), "test")
    (folder / "test").rename(folder / "valid")
    test = open_set(str(folder), "test")
    assert len(test) == 4 and test.keys == open_set(str(folder), "val").keys and test.keys[0] == "valid/cat/0.png"


def test_what_is_hidden_is_left_out(folder):
    (folder / "train" / "cat" / "._1.png").write_bytes(b"what a Mac leaves behind")
    (folder / "train" / ".thumbnails").mkdir()
    assert len(open_set(str(folder))) == 8


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("lesson", "test/first"):
        (tmp_path / name).mkdir(parents=True)
        picture(1).save(tmp_path / name / "1.png")
    assert open_set(str(tmp_path)).classes == ("lesson", "test")


def test_a_class_without_images(folder):
    for file in (folder / "test" / "cat").rglob("*.png"):
        file.unlink()
    assert len(open_set(str(folder))) == 8
    with pytest.raises(ValueError, match="has no images in its folder test/cat/"):
        open_set(str(folder), "test")


def test_folders_that_are_none(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folders of images"):
        open_set(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="only the class 'cat'"):
        (tmp_path / "one" / "cat").mkdir(parents=True)
        picture(1).save(tmp_path / "one" / "cat" / "1.png")
        open_set(str(tmp_path / "one"))
    (folder / "test" / "mouse").mkdir()
    with pytest.raises(ValueError, match=r"the class 'mouse' of .* is only in its split 'test'"):
        open_set(str(folder))
    with pytest.raises(ValueError, match="there is no set of images 'nowhere'"):
        open_set("nowhere")


def test_broken_image_is_named(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"train/cat/0\.png cannot be used: it is not an image"):
        open_set(str(folder)).pixels(0)


def test_lists(folder):
    path = folder / "list.csv"
    path.write_text(
        "path,label,split\ntrain/cat/0.png,10,train\ntrain/dog/0.png,9,train\ntest/dog/0.png,9,val\n"
        "test/cat/0.png,10,val\n"
    )
    train = open_set(str(path))
    assert train.classes == ("9", "10") and train.targets.tolist() == [1, 0] and train.pixels(1)[0, 0, 0] == 100
    assert len(open_set(str(path), "test")) == 2 and len(open_set(str(path), "all")) == 4
    path.write_text("file,class\na,b\n")
    with pytest.raises(ValueError, match="no column label and no column path"):
        open_set(str(path))
    path.write_text("path,label\n")
    with pytest.raises(ValueError, match="no images"):
        open_set(str(path))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"path,label\na.png,1\nb.png,\n", "line 3 of .* has no label"),
        (b"path,label\na.png\n", "line 2 of .* has no label"),
        (b"path,label\na.png,1\na.png,2\n", "names a.png twice"),
        (b"path,label,split\na.png,1,train\nb.png,2,train\nc.png,1,test\n", "class '2' of .* is only in .* 'train'"),
        (b"path,label\n\xff.png,1\n", "is no CSV file in UTF-8"),
        (b"", "no column label and no column path"),
    ],
)
def test_lists_that_are_wrong(tmp_path, text, message):
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_set(str(tmp_path / "list.csv"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\ngone.png,1\n")
    with pytest.raises(ValueError, match=r"gone.png cannot be used: there is no such file"):
        open_set(str(tmp_path / "list.csv")).pixels(0)


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
    with pytest.raises(ValueError, match="no column of images: its columns are pic, kind"):
        open_set(f"{path}#image_column=picture")
    with pytest.raises(ValueError, match=r"behind the # may stand image_column=.*, got 'images'"):
        open_set(f"{path}#images=pic")
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        open_set(str(path))


def test_parquet_of_hugging_face(tmp_path):
    """Names of classes that the file's metadata has, paths in place of bytes, splits in a column."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    picture(30).save(tmp_path / "outside.png")
    rows = [{"bytes": encoded(10), "path": "1.png"}, {"bytes": None, "path": "outside.png"}] * 2
    features = {"info": {"features": {"label": {"names": ["no", "maybe", "yes"], "_type": "ClassLabel"}}}}
    table = pyarrow.table(
        {"image": rows, "label": [2, 0, 0, 2], "split": ["train", "train", "validation", "validation"]}
    )
    path = tmp_path / "set.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    train, test = open_set(str(path)), open_set(str(path), "test")
    assert train.classes == test.classes == ("no", "maybe", "yes") and train.targets.tolist() == [2, 0]
    assert train.pixels(1)[0, 0, 0] == 30 and test.keys == ["set/000002", "set/000003"]
    pq.write_table(pyarrow.table({"image": [b"", None], "label": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"the column image of .* has rows without a value"):
        open_set(str(path))
    pq.write_table(pyarrow.table({"image": [b"", b"?"], "label": [1, 2]}), path)
    with pytest.raises(ValueError, match="set/000000 cannot be used: it is not an image"):
        open_set(str(path)).pixels(0)


class Rows:
    """As much of Hugging Face's Dataset as is used."""

    def __init__(self, decoded):
        self.features = {"image": HuggingImage(), "label": types.SimpleNamespace(names=["no", "yes"])}
        self.column_names = list(self.features)
        self.decoded = decoded

    def __len__(self):
        return 2

    def select_columns(self, names):
        return self

    def cast_column(self, name, feature):
        return Rows(decoded=feature.decode)

    def __getitem__(self, key):
        if key == "label":
            return [1, 0]
        return {"image": picture(9) if self.decoded else {"bytes": encoded(8), "path": None}}


class HuggingImage:
    def __init__(self, decode=True):
        self.decode = decode


def test_hugging_face_sets(monkeypatch):
    asked = []

    def load_dataset(name, config, split, cache_dir):
        asked.append((name, config, split))
        if split == "test":
            raise ValueError("Unknown split 'test'.")
        if name == "nobody/nothing":
            raise FileNotFoundError("it is not on the hub")
        return Rows(decoded=True)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, Image=HuggingImage))
    found = open_set("hf:somebody/things#config=small", "test")
    assert asked == [("somebody/things", "small", "test"), ("somebody/things", "small", "validation")]
    assert found.classes == ("no", "yes") and found.targets.tolist() == [1, 0] and found.pixels(0)[0, 0, 0] == 8
    with pytest.raises(ValueError, match="hf:nobody/nothing cannot be loaded: it is not on the hub"):
        open_set("hf:nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs Hugging Face's datasets: pip install datasets"):
        open_set("hf:somebody/things")


class Theirs:
    """A set of torchvision's: grey images, two of them, in the split that is asked for."""

    classes = ["no", "yes"]

    def __init__(self, root, download=False):
        if not download and not os.path.exists(f"{root}/theirs"):
            raise RuntimeError("Dataset not found.")
        os.makedirs(f"{root}/theirs", exist_ok=True)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return picture(40 * index).convert("L"), index


class OfTrain(Theirs):
    def __init__(self, root, train=True, download=False):
        super().__init__(root, download)
        self.targets = [0, 1] if train else [1, 1]


class OfSplit(Theirs):
    def __init__(self, root, split="train", download=False):
        super().__init__(root, download)
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value {split!r} for argument split.")
        self._samples = [("a.png", 0), ("b.png", 1 if split == "train" else 0)]


def test_torchvision_sets(tmp_path, monkeypatch, capsys):
    fake = types.SimpleNamespace(Theirs=Theirs, OfTrain=OfTrain, OfSplit=OfSplit)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=fake))
    with pytest.raises(ValueError, match="no data set 'Nothing'"):
        open_set("torchvision:Nothing")
    with pytest.raises(
        ValueError, match=r"is not in .*Dataset not found\): get it with `revit data torchvision:OfTrain"
    ):
        open_set("torchvision:OfTrain", root=tmp_path)
    assert cli.main(["data", "torchvision:OfTrain", "--root", str(tmp_path)]) == 0
    assert "2 images to train on" in capsys.readouterr().out
    monkeypatch.setenv("REVIT_DATA", str(tmp_path))
    found = open_set("torchvision:OfTrain", "all")
    assert found.classes == ("no", "yes") and found.targets.tolist() == [0, 1, 1, 1]
    assert found.pixels(3).shape == (6, 8, 3) and len(set(found.keys)) == 4
    test = open_set("torchvision:OfTrain", "test")
    assert test.targets.tolist() == [1, 1] and test.keys == found.keys[2:]
    assert open_set("torchvision:OfSplit", "test").targets.tolist() == [0, 0]  # its val
    assert open_set("torchvision:Theirs").targets.tolist() == [0, 1]
    with pytest.raises(ValueError, match="has no splits"):
        open_set("torchvision:Theirs", "test")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match="needs a torchvision"):
        open_set("torchvision:OfTrain")


def test_parts():
    images = ArraySet("fake", "ab", np.repeat([0, 1], 10), np.arange(20, dtype=np.uint8)[:, None, None].repeat(4, 1))
    rest, held = images.split(0.2, seed=1)
    assert len(held) == 4 and np.bincount(held.targets).tolist() == [2, 2]
    assert not set(rest.keys) & set(held.keys) and held.subset([1]).keys[0] == held.keys[1]
    assert held.pixels(0).shape == (4, 1, 3) and held.pixels(0)[0, 0, 0] == images.keys.index(held.keys[0])
    assert images.fingerprint() == images.subset(range(20)).fingerprint() != rest.fingerprint()
    np.testing.assert_array_equal(held.subset([2, 0]).gather([1, 0]), [held.pixels(0), held.pixels(2)])


def test_classes_in_another_order():
    images = ArraySet("fake", ["ankle-boot", "bag", "t-shirt-top"], [2, 0, 2], np.zeros((3, 1, 1), np.uint8))
    known = ("T-shirt/top", "Bag", "Ankle boot", "Coat")
    found = images.subset([0, 1]).with_classes(known)
    assert found.targets.tolist() == [0, 2] and found.classes == known and images.targets.tolist() == [2, 0, 2]
    assert images.with_classes(known[:1] + known[2:]).targets.tolist() == [0, 1, 0]  # no image is a bag
    with pytest.raises(ValueError, match="fake has the class 'ankle-boot', which is none of T-shirt/top, Bag"):
        images.with_classes(known[:2])


def test_large_photographs_are_decoded_smaller(folder):
    picture(5, (800, 400)).save(folder / "train" / "cat" / "0.jpg")
    images = open_set(str(folder))
    index = images.keys.index("train/cat/0.jpg")
    part = images.subset([index])
    assert part.pixels(0).shape == (400, 800, 3)
    assert part.reduced(lambda size: (50, 100)).pixels(0).shape == (100, 200, 3)
    assert images.reduced(lambda size: (50, 100)).pixels(index).shape == (100, 200, 3)
    assert part.pixels(0).shape == (400, 800, 3)


def test_batches(folder):
    images = open_set(str(folder))
    read = list(read_batches(images, None, 3, workers=2))
    assert [indices for indices, _ in read] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert read[0][1].shape == (3, 6, 8, 3) and (read[1][1][1].numpy() == images.pixels(4)).all()
    picture(1, (5, 5)).save(folder / "train" / "cat" / "0.png")
    assert [p.shape for p in next(read_batches(images, [0, 1], 2))[1]] == [(5, 5, 3), (6, 8, 3)]
