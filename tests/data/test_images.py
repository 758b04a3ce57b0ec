"""Finding and decoding: every mode, orientation and broken file that a folder of real photographs holds."""

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from revit_kernels.data.images import ORIENTATION, ImageError, decode, find_images, show

RED, BLUE = (254, 0, 0), (0, 0, 254)


def halves(size=(32, 16), mode="RGB"):
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def noise(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.gif", "a.tif", "a.jpg", "a.ppm"])
def test_formats(tmp_path, name):
    halves().save(tmp_path / name, lossless=True, quality=95)
    pixels, size = decode(str(tmp_path / name))
    assert size == (16, 32) and pixels.shape == (16, 32, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[8, 4].astype(int) - RED).max() <= 6 and np.abs(pixels[8, 28].astype(int) - BLUE).max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes(tmp_path, mode):
    image = halves(mode=mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path, quality=95)
    with Image.open(path) as saved:
        assert saved.mode == mode or mode == "YCbCr"
        np.testing.assert_array_equal(decode(str(path)).pixels, np.asarray(saved.convert("RGB")))


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535, 100]], np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        assert decode(str(tmp_path / name)).pixels[0, :, 0].tolist() == [0, 1, 128, 255, 0], name


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    assert decode(str(tmp_path / "a.png")).pixels[0].tolist() == [[255, 0, 0], [255] * 3, [127] * 3]
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("la.png", "p.png"):
        assert decode(str(tmp_path / name)).pixels.tolist() == [[[255] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("target", [None, (2, 2)])
def test_orientation(tmp_path, orientation, target):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = noise((64, 32))
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = []
    pixels, size = decode(str(tmp_path / "a.jpg"), target and (lambda size: seen.append(size) or target))
    with Image.open(tmp_path / "a.jpg") as saved:
        if target:
            saved.draft(None, (8, 4))
        expected = np.asarray(ImageOps.exif_transpose(saved))
    np.testing.assert_array_equal(pixels, expected)
    assert size == ((32, 64) if orientation < 5 else (64, 32)) and seen in ([], [size])


@pytest.mark.parametrize(
    "target, shape", [((100, 200), (200, 400)), ((101, 200), (400, 800)), ((1, 1), (50, 100)), ((999, 1), (400, 800))]
)
def test_reduced_decoding_keeps_twice_the_target(tmp_path, target, shape):
    noise((800, 400)).save(tmp_path / "a.jpg")
    pixels, size = decode(str(tmp_path / "a.jpg"), lambda size: target)
    assert pixels.shape[:2] == shape and size == (400, 800)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_bytes_are_told_before_they_are_taken(tmp_path, name):
    noise((800, 400)).save(tmp_path / name)
    held = []
    pixels = decode(str(tmp_path / name), lambda size: (50, 100), held.append).pixels
    assert held == [pixels.nbytes] and pixels.shape[0] == (100 if name == "a.jpg" else 400)


def broken_files(folder):
    whole = io.BytesIO()
    noise((64, 64)).save(whole, "JPEG")
    png = io.BytesIO()
    noise((64, 64)).save(png, "PNG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "truncated.png").write_bytes(png.getvalue()[: len(png.getvalue()) // 2])
    (folder / "header.png").write_bytes(png.getvalue()[:20])
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(folder / "float.tif")


@pytest.mark.parametrize(
    "name, message",
    [
        ("truncated.jpg", "cannot be decoded: .*truncated"),
        ("truncated.png", "cannot be decoded: "),
        ("header.png", "not an image|cannot be decoded"),
        ("text.jpg", "it is not an image, or of a format that is not supported"),
        ("empty.jpg", "the file is empty"),
        ("folder.jpg", "it is a folder"),
        ("missing.jpg", "there is no such file"),
        ("float.tif", "32 bits and no known range"),
        ("a\0b.jpg", "cannot be decoded: .*null"),
    ],
)
def test_broken_files(tmp_path, name, message):
    broken_files(tmp_path)
    with pytest.raises(ImageError, match=message):
        decode(str(tmp_path / name))


@pytest.mark.parametrize("limit, message", [(4095, "64 x 64 pixels, more than the limit of 4,095"), (1000, "twice")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs(tmp_path, monkeypatch, limit, message):
    noise((64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=message):
        decode(str(tmp_path / "a.png"))


def test_a_pipe_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        decode(str(tmp_path / "pipe.jpg"))


# ---------------------------------------------------------------------- finding


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "sub/c.webp", ".cache/d.png", "sub/deep/é ü.jpeg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders(tree):
    assert find_images(["in"]) == (["in/a.png", "in/b.JPG", "in/sub/c.webp", "in/sub/deep/é ü.jpeg"], [], [])
    assert find_images(["in"], recursive=False) == (["in/a.png", "in/b.JPG"], [], [])


def test_order_duplicates_and_missing_files_are_kept(tree):
    given = ["nowhere.jpg", "in/sub/c.webp", "in/a.png", "in/a.png"]
    assert find_images(given) == (given, [], [])


def test_patterns(tree):
    assert find_images(["in/*.png"]) == (["in/a.png"], [], [])
    paths, empty, (problem,) = find_images(["in/**/*.webp", "in/*.tiff"])
    assert paths == ["in/sub/c.webp"] and empty == []
    assert problem == "there is no file in/*.tiff, and none that matches it as a pattern"
    (tree / "x[1].png").touch()
    assert find_images(["x[1].png"]) == (["x[1].png"], [], [])  # a file of that very name comes first


def test_lists(tree, monkeypatch):
    (tree / "list.txt").write_bytes(b"\xef\xbb\xbfin/a.png\r\n\n in/odd\nin/sub\n")
    expected = ["in/a.png", " in/odd", "in/sub/c.webp", "in/sub/deep/é ü.jpeg"]
    assert find_images(["list.txt"]) == find_images(["@list.txt"]) == (expected, [], [])
    (tree / "list.txt").write_text("in/IMG[1].jpg\nin/*.png\n")
    (tree / "in" / "IMG1.jpg").touch()
    assert find_images(["list.txt"]) == (["in/IMG[1].jpg", "in/*.png"], [], [])  # names, not patterns
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/b.JPG\n")))
    assert find_images(["@-"]) == (["in/b.JPG"], [], [])
    with pytest.raises(ValueError, match=r"the list gone\.txt cannot be read: No such file"):
        find_images(["@gone.txt"])


def test_nothing_found_is_told(tree):
    (tree / "void").mkdir()
    assert find_images(["void"]) == ([], ["void"], [])


def test_a_folder_that_cannot_be_read_is_told(tree, monkeypatch):
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert find_images(["in"]) == (
        ["in/a.png", "in/b.JPG"],
        [],
        ["the folder in/sub cannot be read: Permission denied"],
    )
    assert find_images(["in/sub"]) == ([], [], ["the folder in/sub cannot be read: Permission denied"])


def test_names_that_are_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    with open(name, "wb") as file:
        halves().save(file, "PNG")
    (path,), *_ = find_images([str(tmp_path)])
    assert decode(path).size == (16, 32)
    assert show(path).endswith(r"/\xff\xe9.png")
    show(path).encode()
