"""Finding image files, and decoding them: any format, mode and orientation to (height, width, 3) of uint8."""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .tga .avif .jp2".split()
)
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
STRIP = 128  # rows


class ImageError(ValueError):
    """A file from which no image can be decoded; the message says why, without naming the file."""


class Decoded(NamedTuple):
    """pixels: (height, width, 3) uint8, upright. size: (height, width) of the file's image, before any reduction."""

    pixels: np.ndarray
    size: tuple[int, int]


# ---------------------------------------------------------------------- finding


class Found(NamedTuple):
    """paths:    image files, in the order of the arguments
    empty:    folders without image files
    problems: a sentence for each pattern that matches nothing, and for each folder that cannot be read
    """

    paths: list[str]
    empty: list[str]
    problems: list[str]


def find_images(arguments: Sequence[str], recursive: bool = True) -> Found:
    """The image files that the arguments name.

    arguments: files; folders (their image files, sorted by name; hidden ones are left out); patterns such as
               "photos/**/*.jpg"; and lists, as @FILE or a .txt file: a file or folder a line ("@-": standard input)
    recursive: also look into the folders of a folder

    A file named outright is taken whatever its name, and whether or not it exists: decoding it says what is wrong.
    A line of a list is never a pattern: the names of files have brackets. Raises ValueError for a list that cannot be
    read.
    """
    found = Found([], [], [])
    for argument, is_line in _expand_lists(arguments):
        if os.path.isdir(argument):
            before = len(found.paths), len(found.problems)
            found.paths.extend(_walk(argument, recursive, found.problems))
            if before == (len(found.paths), len(found.problems)):
                found.empty.append(argument)
        elif is_line or os.path.lexists(argument) or not glob.has_magic(argument):
            found.paths.append(argument)
        else:
            images = sorted(path for path in glob.glob(argument, recursive=True) if not os.path.isdir(path))
            found.paths.extend(images)
            if not images:
                found.problems.append(f"there is no file {show(argument)}, and none that matches it as a pattern")
    return found


def _expand_lists(arguments: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each argument, or the lines of the list that it is; and whether it is a line."""
    for argument in arguments:
        is_list = argument.startswith("@") and not os.path.lexists(argument)
        if is_list or (argument.lower().endswith(".txt") and not os.path.isdir(argument)):
            yield from ((line, True) for line in _read_list(argument[1:] if is_list else argument))
        else:
            yield argument, False


def _read_list(path: str) -> list[str]:
    """The lines of a list. Names are bytes to the system: what is no UTF-8 is kept as it is."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the list {show(path)} cannot be read: {error.strerror}") from None
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def _walk(folder: str, recursive: bool, problems: list[str]) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        problems.append(f"the folder {show(error.filename)} cannot be read: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(root, name)


def show(path: str) -> str:
    """The path as text that can be written anywhere: bytes that are no UTF-8 appear as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------- decoding


def decode(
    path: str | BinaryIO | Image.Image,
    target: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    hold: Callable[[int], None] | None = None,
) -> Decoded:
    """The image in a file, upright and as RGB.

    path:   of the file; or a file object, open for reading bytes; or the image as Pillow opened it
    target: from the image's (height, width) to the (height, width) it will be resized to. A JPEG may then be decoded
            at half, a quarter or an eighth of its size, but never at less than twice the target: an antialiased resize
            from there is still right.
    hold:   called with the bytes that the pixels will take, before any is decoded; it may wait, or raise ImageError

    Transparent pixels are laid on white, 16 bits are reduced to 8, of an animation the first frame is taken.
    Raises ImageError for whatever is wrong with the file.
    """
    try:
        if isinstance(path, Image.Image):
            return _decode(path, target, hold)
        if isinstance(path, str | os.PathLike):
            _check_file(os.stat(path))
        with Image.open(path) as image:
            return _decode(image, target, hold)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("it is not an image, or of a format that is not supported") from None
    except Image.DecompressionBombError:
        raise ImageError(f"the image has more than twice the limit of {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise ImageError("there is no such file") from None
    except PermissionError:
        raise ImageError("permission denied") from None
    except MemoryError:
        raise ImageError("there is not enough memory to decode it") from None
    except Exception as error:  # Pillow's plugins raise what their parsers happen to raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the image cannot be decoded: {why}") from error


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
    if status.st_size == 0:
        raise ImageError("the file is empty")


def _decode(image: Image.Image, target, hold) -> Decoded:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"the image has {image.width} x {image.height} pixels, more than the limit of {limit:,}")
    orientation = _orientation(image)
    sideways = orientation in SIDEWAYS
    size = (image.width, image.height) if sideways else (image.height, image.width)
    if target is not None:
        height, width = target(size)
        image.draft(None, (2 * height, 2 * width) if sideways else (2 * width, 2 * height))  # no-op but for JPEG
    if hold is not None:
        hold(3 * image.width * image.height)
    image.load()
    rgb = _to_rgb(image)
    if orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    return Decoded(_array(rgb), size)


def _array(rgb: Image.Image) -> np.ndarray:
    """The pixels, copied in strips: all at once, Pillow would hold two more copies of them."""
    pixels = np.empty((rgb.height, rgb.width, 3), np.uint8)
    for top in range(0, rgb.height, STRIP):
        bottom = min(top + STRIP, rgb.height)
        pixels[top:bottom] = rgb.crop((0, top, rgb.width, bottom))
    return pixels


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _reduce(np.asarray(image)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError("its pixels have 32 bits and no known range: convert it to 8 or 16 bits")
        return _reduce(values).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reduce(values: np.ndarray) -> Image.Image:
    """8 bits of 16, rounded."""
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
