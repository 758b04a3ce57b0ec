"""Images inside other files: archives, tables and text give the pixels that files of their own give."""

import base64
import io
import tarfile
import zipfile

import numpy as np
import pytest
from test_images import noise

from revit_kernels.data.archives import encoded
from revit_kernels.data.datasets import open_set
from revit_kernels.data.images import ImageError, decode, find_images


def png(seed):
    data = io.BytesIO()
    noise((32, 24), seed).save(data, "PNG")
    return data.getvalue()


NAMES = ("a/000.png", "a/000.cls", "a/000.json", "b/001.PNG", "b/notes", "b/.002.png")


def make_tar(path):
    with tarfile.open(path, "w") as archive:
        for i, name in enumerate(NAMES):
            entry = tarfile.TarInfo(name)
            data = png(i)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        entry = tarfile.TarInfo("link.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)


def make_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, name in enumerate(NAMES):
            archive.writestr(name, png(i))
        archive.mkdir("empty")


@pytest.mark.parametrize("make, name", [(make_tar, "shard-000.tar"), (make_zip, "photos.ZIP")])
def test_archives(tmp_path, make, name):
    path = str(tmp_path / name)
    make(path)
    found = find_images([path])
    assert found.paths == [f"{path}/a/000.png", f"{path}/b/001.PNG"] and not found.problems
    assert found.left_out == {".cls": 1, ".json": 1, "without a suffix": 1, "hidden": 1}
    for member, i in reversed(list(zip(found.paths, (0, 3)))):
        np.testing.assert_array_equal(decode(member).pixels, np.asarray(noise((32, 24), i)))
    assert find_images([str(tmp_path / "*.*")]).paths == found.paths
    assert find_images([str(tmp_path)]).left_out == {f".{name[-3:].lower()} to be named outright": 1}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.tar", b"no archive at all", "x.tar cannot be read"),
        ("x.zip", b"PK no archive", "x.zip cannot be read"),
        ("x.parquet", b"PAR1 no table", "x.parquet cannot be read"),
        ("x.tar.gz", b"\x1f\x8b", "compressed as a whole"),
    ],
)
def test_damaged_archives_are_problems(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    paths, _, (problem,), _ = find_images([str(tmp_path / name), "other.png"])
    assert paths == ["other.png"] and message in problem and "\n" not in problem


def test_a_damaged_member_is_an_error_of_its_own(tmp_path):
    make_zip(tmp_path / "x.zip")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[60:90] = bytes(30)
    (tmp_path / "x.zip").write_bytes(data)
    first, second = find_images([str(tmp_path / "x.zip")]).paths
    with pytest.raises(ImageError):
        decode(first)
    assert decode(second).size == (24, 32)


def text_of(data):
    return base64.b64encode(data).decode()


KINDS = {
    "bytes": lambda data: data,
    "base64": text_of,
    "data URL": lambda data: f"data:image/png;base64,{text_of(data)}",
    "a dictionary": lambda data: {"bytes": data, "path": "a.png"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["image", "photo"])
def test_parquet(tmp_path, kind, column):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    path = str(tmp_path / "x.parquet")
    rows = [KINDS[kind](png(i)) for i in range(5)]
    table = pyarrow.table({"label": [0, 1, 0, 1, 0], column: rows})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    if column == "image":
        images = open_set(path)
        np.testing.assert_array_equal(images.pixels(3), np.asarray(noise((32, 24), 3)))
    elif kind in ("base64", "data URL"):  # words could be anything
        assert "no column of images: its columns are label, photo" in find_images([path]).problems[0]
        return
    paths = find_images([path]).paths
    assert paths == [f"{path}/{i:06d}" for i in range(5)]
    for i in (4, 0, 3, 1, 2):
        np.testing.assert_array_equal(decode(paths[i]).pixels, np.asarray(noise((32, 24), i)))


def test_paths_in_a_table_stay_paths(tmp_path):
    assert encoded("photos/a.png", tmp_path) == str(tmp_path / "photos" / "a.png")
    long = "photographs/of/the/year/before/last/in/the/mountains/and/by/the/sea/AAAA"
    (tmp_path / long).parent.mkdir(parents=True)
    (tmp_path / long).touch()
    assert encoded(long, tmp_path) == str(tmp_path / long)
    with pytest.raises(ValueError, match="base64 text is damaged"):
        encoded("data:image/png;base64,%%%", tmp_path)


def test_data_urls(tmp_path):
    (path,) = find_images([f"data:image/png;base64,{text_of(png(1))}"]).paths
    assert path.startswith("data:image/png;base64,") and path.endswith("...") and len(path) < 50
    np.testing.assert_array_equal(decode(path).pixels, np.asarray(noise((32, 24), 1)))
    for text in ("data:image/png,raw", "data:image/png;base64,%%%", "data:image/png;base64,"):
        with pytest.raises(ImageError, match=r"without base64|is damaged|is empty"):
            decode(find_images([text]).paths[0])
