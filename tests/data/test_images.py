"""Finding and decoding: every mode, orientation and broken file that a folder of real photographs holds."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from revit_kernels.data import images
from revit_kernels.data.images import ORIENTATION, ImageError, decode, find_images, left_out_text, printable, show

RED, BLUE = (254, 0, 0), (0, 0, 254)


TURNED = {  # what a camera did to the image that is then marked so
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


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
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.tiff", "a.jp2", "a.avif"])
def test_orientation_in_every_format(tmp_path, name, orientation):
    """What is upright: the image itself, saved turned, with the EXIF tag that says so."""
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    upright, exif, seen = noise((64, 32)), Image.Exif(), []
    exif[ORIENTATION] = orientation
    turned = upright.transpose(TURNED[orientation]) if orientation > 1 else upright
    options = {"a.tiff": {"compression": "tiff_lzw"}, "a.jp2": {}}.get(name, {"lossless": True, "quality": 100})
    turned.save(tmp_path / name, exif=exif, **options)
    if name == "a.jp2":  # Pillow writes no EXIF into these
        upright = turned
    pixels, size = decode(str(tmp_path / name), lambda size: seen.append(size) or (2, 2))
    assert size == (upright.height, upright.width) and seen == [size]
    assert pixels.shape == (*size, 3)
    assert np.abs(pixels.astype(int) - np.asarray(upright).astype(int)).mean() < 4


def test_a_long_image_is_reduced_before_it_is_resized(tmp_path):
    """Memory goes with the target: every axis beyond LONG and 16 targets is averaged, in tiles."""
    stripes = np.zeros((3, 200_000, 3), np.uint8)
    stripes[:, 100_000:] = 200
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    pixels, size = decode(str(tmp_path / "wide.png"), lambda size: (16, 160))
    assert size == (3, 200_000) and pixels.shape == (3, -(-200_000 // (200_000 // 8192)), 3)
    middle = pixels.shape[1] // 2
    assert not pixels[:, : middle - 1].any() and (pixels[:, middle + 1 :] == 200).all()
    Image.fromarray(stripes.swapaxes(0, 1)).save(tmp_path / "tall.png")
    np.testing.assert_array_equal(
        decode(str(tmp_path / "tall.png"), lambda size: (160, 16)).pixels, pixels.swapaxes(0, 1)
    )
    assert decode(str(tmp_path / "wide.png"), lambda size: (16, 3136)).pixels.shape[1] >= 8 * 3136
    assert decode(str(tmp_path / "wide.png")).pixels.shape == stripes.shape


def test_tiles_join_to_the_image(tmp_path, monkeypatch):
    noise((96, 80)).convert("P").save(tmp_path / "a.png", transparency=3)
    whole = decode(str(tmp_path / "a.png")).pixels
    monkeypatch.setattr(images, "TILE", 200)
    np.testing.assert_array_equal(decode(str(tmp_path / "a.png")).pixels, whole)
    monkeypatch.setattr(images, "LONG", 4)
    reduced = decode(str(tmp_path / "a.png"), lambda size: (1, 1)).pixels
    with Image.open(tmp_path / "a.png") as image:
        white = Image.new("RGBA", image.size, "white")
        expected = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB").reduce((12, 10))
    np.testing.assert_array_equal(reduced, np.asarray(expected))


def test_transparent_values_of_16_bits_are_laid_on_white(tmp_path):
    grey = np.full((4, 4), 30_000, np.uint16)
    grey[:, 0] = 1234
    write_png(tmp_path / "grey.png", grey[..., None], 0, struct.pack(">H", 1234))
    colour = np.zeros((4, 4, 3), np.uint16)
    colour[:, 1:] = 257 * 100
    colour[:, 0] = 257 * 7, 257 * 8, 257 * 9
    write_png(tmp_path / "colour.png", colour, 2, struct.pack(">HHH", *colour[0, 0]))
    assert decode(str(tmp_path / "grey.png")).pixels[0, :2, 0].tolist() == [255, 117]
    assert decode(str(tmp_path / "colour.png")).pixels[0, :2].tolist() == [[255] * 3, [100] * 3]


def write_png(path, values, kind, transparent):
    """A PNG of 16 bits with a transparent value, which Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b""))


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.float32])
def test_numbers_of_no_known_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((2, 2), 200, dtype if dtype != np.int16 else np.int32)).save(tmp_path / "a.tif")
    if dtype == np.int16:  # the tag that says signed, over 16 bits
        Image.fromarray(np.full((2, 2), 200, np.uint16)).save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(ImageError, match="signs or 32 bits and no known range"):
        decode(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.eps"])
def test_no_format_is_read_that_could_start_a_program(tmp_path, name, monkeypatch):
    halves().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / name)
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ImageError, match="not an image, or of a format that is not supported"):
        decode(str(tmp_path / name))
    with Image.open(tmp_path / name) as opened, pytest.raises(ImageError, match="of the format EPS"):
        decode(opened)


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(halves()).save(tmp_path / "a.HEIC", quality=100)
    pixels, size = decode(str(tmp_path / "a.HEIC"))
    assert size == (16, 32) and np.abs(pixels[8, 4].astype(int) - RED).max() <= 6
    with open(tmp_path / "a.HEIC", "rb") as file:
        np.testing.assert_array_equal(decode(file).pixels, pixels)


def test_heic_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(images, "_readable", lambda: ("JPEG", "PNG"))
    with pytest.raises(ImageError, match="HEIC image, which needs pillow-heif: pip install pillow-heif"):
        decode(str(tmp_path / "a.heic"))
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x18ftypavif" + bytes(40))
    with pytest.raises(ImageError, match="AVIF needs Pillow"):
        decode(str(tmp_path / "a.avif"))


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
    others = {".txt": 1, "hidden": 1, "hidden folders": 1}
    assert find_images(["in"]) == (["in/a.png", "in/b.JPG", "in/sub/c.webp", "in/sub/deep/é ü.jpeg"], [], [], others)
    assert find_images(["in"], recursive=False) == (["in/a.png", "in/b.JPG"], [], [], {".txt": 1, "hidden": 1})


def test_order_duplicates_and_missing_files_are_kept(tree):
    given = ["nowhere.jpg", "in/sub/c.webp", "in/a.png", "in/a.png"]
    assert find_images(given) == (given, [], [], {})


def test_patterns(tree):
    assert find_images(["in/*.png"]) == (["in/a.png"], [], [], {})
    paths, empty, (problem,), _ = find_images(["in/**/*.webp", "in/*.tiff"])
    assert paths == ["in/sub/c.webp"] and empty == []
    assert problem == "there is no file in/*.tiff, and none that matches it as a pattern"
    (tree / "x[1].png").touch()
    assert find_images(["x[1].png"]) == (["x[1].png"], [], [], {})  # a file of that very name comes first


def test_lists(tree, monkeypatch):
    (tree / "list.txt").write_bytes(b"\xef\xbb\xbfin/a.png\r\n\n in/odd\nin/sub\n")
    expected = ["in/a.png", " in/odd", "in/sub/c.webp", "in/sub/deep/é ü.jpeg"]
    assert find_images(["list.txt"]) == find_images(["@list.txt"]) == (expected, [], [], {})
    (tree / "list.txt").write_text("in/IMG[1].jpg\nin/*.png\n")
    (tree / "in" / "IMG1.jpg").touch()
    assert find_images(["list.txt"]) == (["in/IMG[1].jpg", "in/*.png"], [], [], {})  # names, not patterns
    for name in ("@-", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/b.JPG\n")))
        assert find_images([name]) == (["in/b.JPG"], [], [], {})
        with pytest.raises(ValueError, match="standard input, from which - and @- read names of images"):
            find_images([name])
    with pytest.raises(ValueError, match=r"the list gone\.txt cannot be read: No such file"):
        find_images(["@gone.txt"])


def test_nothing_found_is_told(tree):
    (tree / "void").mkdir()
    assert find_images(["void"]) == ([], ["void"], [], {})


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
        {".txt": 1, "hidden": 1, "hidden folders": 1},
    )
    assert find_images(["in/sub"]) == ([], [], ["the folder in/sub cannot be read: Permission denied"], {})


def test_names_that_are_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    with open(name, "wb") as file:
        halves().save(file, "PNG")
    (path,), *_ = find_images([str(tmp_path)])
    assert decode(path).size == (16, 32)
    assert show(path).endswith(r"/\xff\xe9.png")
    show(path).encode()


def test_linked_folders_are_looked_into_once(tree):
    (tree / "disk").mkdir()
    (tree / "disk" / "far.png").touch()
    (tree / "in" / "linked").symlink_to(tree / "disk")
    (tree / "in" / "sub" / "loop").symlink_to(tree / "in")
    (tree / "disk" / "back").symlink_to(tree / "disk")
    (tree / "in" / "file.png").symlink_to(tree / "disk" / "far.png")
    found = find_images(["in"]).paths
    assert [path for path in found if "far" in path or "file" in path] == ["in/file.png", "in/linked/far.png"]
    assert len(found) == 4 + 2


def test_what_is_left_out_is_counted(tree):
    for name in ("x.PDF", "y.pdf", "README", "z.tar", "w.zip", ".DS_Store"):
        (tree / "in" / name).touch()
    left_out = find_images(["in"]).left_out
    assert left_out == {".pdf": 2, ".txt": 1, "without a suffix": 1, "hidden": 1, "hidden folders": 1} | {
        ".tar to be named outright": 1,
        ".zip to be named outright": 1,
    }
    assert left_out_text(left_out).startswith("8 files were not taken as images (2 .pdf, ")
    assert left_out_text(Counter({".txt": 1})) == "1 file was not taken as images (1 .txt)"
    assert left_out_text(Counter()) is None


def test_comments_in_a_list(tree):
    (tree / "#1.png").touch()
    (tree / "list.txt").write_text("# the good ones\nin/a.png\n#1.png\n#2.png\n")
    assert find_images(["list.txt"]).paths == ["in/a.png", "#1.png"]


def test_a_url_is_not_fetched(tree):
    for url in ("https://example.org/a.jpg?size=1", "s3://bucket/a.txt"):
        assert find_images([url]).paths == [url]
        with pytest.raises(ImageError, match="it is a URL, and URLs are not fetched"):
            decode(url)


def test_terminals_are_not_commanded():
    assert printable("a\x1b[31m\x9b2J\u202e\nü 東.png") == "a\\x1b[31m\\x9b2J\\u202e\nü 東.png"


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_one_row_or_column_that_is_turned(orientation, size):
    """NumPy calls such a view contiguous whatever its strides; torch takes no negative ones."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG", exif=exif)
    pixels = torch.from_numpy(decode(file).pixels)
    assert pixels.shape == (*size[:: 1 if orientation > 4 else -1], 3) and pixels.is_contiguous()
