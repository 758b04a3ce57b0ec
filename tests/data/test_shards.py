"""Training sets in tar shards: what is read where, and what is refused."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from revit_kernels.data.datasets import open_set


def write(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, data in samples:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def image(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 6, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "s-00.tar", [("0.png", image(10)), ("0.cls", b"7\n"), ("1.cls", b"12"), ("1.png", image(20))])
    more = json.dumps({"label": 7}).encode()
    write(tmp_path / "s-01.tar", [("a/2.png", image(30)), ("a/2.json", more), ("a/3.json", b"{}"), ("a/4.txt", b"x")])
    return tmp_path


def test_samples_of_all_shards_in_order(shards):
    for source in (f"{shards}/*.tar", f"{shards}/s-{{00..01}}.tar"):
        images = open_set(source)
        assert len(images) == 3 and images.classes == ("7", "12") and images.targets.tolist() == [0, 1, 0]
        assert [int(images.pixels(i)[0, 0, 0]) for i in (2, 0, 1)] == [30, 10, 20]
        assert images.keys[2] == f"{shards}/s-01.tar/a/2"
    again = pickle.loads(pickle.dumps(images))  # as a loader's processes are given it
    np.testing.assert_array_equal(again.pixels(1), images.pixels(1))
    rest, held = images.split(1)
    assert len(rest) + len(held) == 3


def test_what_is_refused(shards):
    with pytest.raises(ValueError, match=r"the shard .*gone\.tar cannot be read: No such file"):
        open_set(f"{shards}/gone.tar")
    (shards / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"the shard .*bad\.tar cannot be read"):
        open_set(f"{shards}/bad.tar")
    write(shards / "none.tar", [("0.txt", b"a")])
    with pytest.raises(ValueError, match=r"none\.tar has no images"):
        open_set(f"{shards}/none.tar")
    write(shards / "bare.tar", [("0.png", image(1)), ("0.json", b"{}")])
    with pytest.raises(ValueError, match=r"bare\.tar/0 has no class"):
        open_set(f"{shards}/bare.tar")
    with pytest.raises(ValueError, match="has no splits"):
        open_set(f"{shards}/s-00.tar", "test")
    write(shards / "torn.tar", [("0.png", image(1)[:40]), ("0.cls", b"1")])
    with pytest.raises(ValueError, match=r"torn\.tar/0 cannot be used: "):
        open_set(f"{shards}/torn.tar").pixels(0)
