"""Finding image files, and decoding them: any format, mode and orientation to (height, width, 3) of uint8."""

from __future__ import annotations

import glob
import io
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from revit_kernels.data.archives import Archive, Member, data_url, is_archive, members

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .tga .avif .jp2 .heic .heif .hif".split()
)
# By Pillow's names. No others are tried, whatever a file is called: some would start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "TGA")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # orientation: what makes (height, width, 3) upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
SIDEWAYS = (5, 6, 7, 8)
TILE = 1 << 20  # pixels that are converted at a time
LONG = 8192  # pixels: an axis up to this long is decoded as it is, whatever its target
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
LISTED = 5  # kinds of files that are left out


class ImageError(ValueError):
    """A file from which no image can be decoded; the message says why, without naming the file."""


class Decoded(NamedTuple):
    """pixels: (height, width, 3) uint8, upright. size: (height, width) of the file's image, before any reduction."""

    pixels: np.ndarray
    size: tuple[int, int]


# ---------------------------------------------------------------------- finding


class Found(NamedTuple):
    """paths:    images, in the order of the arguments
    empty:    folders without images
    problems: a sentence for each pattern that matches nothing, and for each folder and archive that cannot be read
    left_out: how many files in folders and archives are not taken as images, by what they are
    """

    paths: list[str]
    empty: list[str]
    problems: list[str]
    left_out: Counter[str]


def find_images(
    arguments: Sequence[str], recursive: bool = True, suffixes: frozenset[str] = SUFFIXES, inside: bool = True
) -> Found:
    """The images that the arguments name.

    arguments: files; folders (their image files, sorted by name; hidden ones are left out; folders that are linked in
               are looked into, each once); archives (.tar, .zip; of a .parquet, its column of images); patterns such as
               "photos/**/*.jpg"; data URLs; and lists, as @FILE or a .txt file: one of these a line ("@-": standard
               input, as "-" does), where a line that begins with # is a comment unless there is such a file
    recursive: also look into the folders of a folder
    suffixes:  of files that are taken out of folders and archives
    inside:    also look into archives; else each is there as an Archive

    A file named outright is taken whatever its name, and whether or not it exists: decoding it says what is wrong.
    A line of a list is never a pattern: the names of files have brackets. Archives in a folder are left out: name them.
    Raises ValueError for a list that cannot be read.
    """
    found = Found([], [], [], Counter())
    for argument, is_line in _expand_lists(arguments):
        if argument[:5].lower() == "data:" and not os.path.lexists(argument):
            found.paths.append(data_url(argument))
        elif os.path.isdir(argument):
            before = len(found.paths), len(found.problems)
            found.paths.extend(_walk(argument, recursive, found, suffixes))
            if before == (len(found.paths), len(found.problems)):
                found.empty.append(argument)
        elif is_line or os.path.lexists(argument) or URL.match(argument) or not glob.has_magic(argument):
            _take(argument, found, suffixes, inside)
        else:
            images = sorted(path for path in glob.glob(argument, recursive=True) if not os.path.isdir(path))
            for path in images:
                _take(path, found, suffixes, inside)
            if not images:
                found.problems.append(f"there is no file {show(argument)}, and none that matches it as a pattern")
    return found


def _take(path: str, found: Found, suffixes: frozenset[str], inside: bool) -> None:
    """A file named outright: an image, or an archive of some."""
    if not is_archive(path) or not os.path.isfile(path):
        found.paths.append(path)
        return
    if not inside:
        found.paths.append(Archive(path))
        return
    before = len(found.paths)
    try:
        for member in members(path):
            if path.lower().endswith(".parquet") or _is_image(member, found.left_out, suffixes):
                found.paths.append(member)
    except ValueError as error:
        found.problems.append(show(str(error)))
    else:
        if before == len(found.paths):
            found.problems.append(f"there are no images in {show(path)}")


def _is_image(path: str, left_out: Counter[str], suffixes: frozenset[str]) -> bool:
    """Whether a file in a folder or an archive is taken; if not, it is counted by its suffix."""
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in suffixes and not name.startswith("."):
        return True
    if suffix in suffixes:
        left_out["hidden"] += 1
    elif is_archive(name):
        left_out[f"{suffix} to be named outright"] += 1
    elif not name.startswith("."):
        left_out[suffix or "without a suffix"] += 1
    return False


def left_out_text(left_out: Counter[str], what: str = "images") -> str | None:
    """One clause that says which files were not taken as images, and how many; None if none. what: instead of images"""
    if not left_out:
        return None
    kinds = ", ".join(f"{count:,} {show(kind)}" for kind, count in left_out.most_common(LISTED))
    others = left_out.total() - sum(count for _, count in left_out.most_common(LISTED))
    kinds += f", {others:,} others" if others else ""
    files = "1 file was" if left_out.total() == 1 else f"{left_out.total():,} files were"
    return f"{files} not taken as {what} ({kinds})"


def _expand_lists(arguments: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each argument, or the lines of the list that it is; and whether it is a line."""
    for argument in arguments:
        is_list = (argument.startswith("@") or argument == "-") and not os.path.lexists(argument)
        if is_list or (argument.lower().endswith(".txt") and not os.path.isdir(argument) and not URL.match(argument)):
            yield from ((line, True) for line in _read_list(argument.removeprefix("@") if is_list else argument))
        else:
            yield argument, False


def _read_list(path: str) -> list[str]:
    """The lines of a list. Names are bytes to the system: what is no UTF-8 is kept as it is."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the list {show(path)} cannot be read: {error.strerror}") from None
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    lines = [line.removesuffix("\r") for line in lines if line.strip()]
    if path == "-" and not lines:
        raise ValueError("standard input, from which - and @- read names of images, one a line, is empty")
    return [line for line in lines if not line.startswith("#") or os.path.lexists(line)]


def _walk(folder: str, recursive: bool, found: Found, suffixes: frozenset[str]) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        found.problems.append(f"the folder {show(error.filename)} cannot be read: {error.strerror}")

    entered = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        inside, folders[:] = sorted(folders), []
        for name in inside if recursive else []:
            real = os.path.realpath(os.path.join(root, name))
            if name.startswith("."):
                found.left_out["hidden folders"] += 1
            elif real not in entered:  # a link may lead back to where it lies
                entered.add(real)
                folders.append(name)
        for name in sorted(files):
            if _is_image(name, found.left_out, suffixes):
                yield os.path.join(root, name)


def show(path: str) -> str:
    """The path as text that can be written anywhere: bytes that are no UTF-8 appear as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """The text with whatever a terminal could take for a command, or would not show, as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------------- decoding


def decode(
    path: str | BinaryIO | Image.Image,
    target: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    hold: Callable[[int], None] | None = None,
) -> Decoded:
    """The image in a file, upright and as RGB.

    path:   of the file; or a Member of an archive; or a file object, open for reading bytes; or the image as Pillow
            opened it
    target: from the image's (height, width) to the (height, width) it will be resized to. A JPEG may then be decoded
            at half, a quarter or an eighth of its size, but never at less than twice the target: an antialiased resize
            from there is still right.
    hold:   called with the bytes that the pixels will take, before any is decoded; it may wait, or raise ImageError

    Transparent pixels are laid on white, 16 bits are reduced to 8, of an animation the first frame is taken. An axis
    that is longer than LONG and than 16 times its target is reduced by averages to no less than 8 times the target.
    Only the formats in FORMATS are read, whatever the file's name. Raises ImageError for whatever is wrong with it.
    """
    with _told():
        if isinstance(path, Image.Image):
            return _decode(path, target, hold)
        if isinstance(path, Member):
            path = io.BytesIO(read_member(path))
        if isinstance(path, str | os.PathLike):
            check_file(path)
        with _opened(path) as image:
            return _decode(image, target, hold)


@contextmanager
def _told():
    """Whatever is wrong with a file inside becomes an ImageError that says what."""
    try:
        yield
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


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, upright, from its header. Raises ImageError where it is none, or too large.

    A PNG may say behind its pixels that it lies on its side: it is taken as it lies.
    """
    if not data:
        raise ImageError("the file is empty")
    with _told(), _opened(io.BytesIO(data)) as image:
        _check_pixels(image)
        sideways = image.format in ("JPEG", "MPO") and _orientation(image) in SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def _check_pixels(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"the image has {image.width} x {image.height} pixels, more than the limit of {limit:,}")


def read_member(member: Member) -> bytes:
    """The file's bytes. Raises ImageError where it cannot be read, or is empty."""
    try:
        data = member.read()
    except ValueError as error:
        raise ImageError(str(error)) from None
    if not data:
        raise ImageError("the file is empty")
    return data


@cache
def _readable() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(file) -> Image.Image:
    """The file as Pillow opens it; HEIC by pillow-heif, and where it or AVIF cannot be read, an ImageError says so."""
    try:
        return Image.open(file, formats=_readable())
    except UnidentifiedImageError:
        start = _start(file)
        if start[4:8] != b"ftyp":
            raise
        brand = start[8:12]
        if brand in (b"avif", b"avis"):
            raise ImageError("it is an AVIF image, or damaged: AVIF needs Pillow 11.3 or newer") from None
        if brand not in HEIC:
            raise
        try:
            import pillow_heif
        except ImportError:
            raise ImageError("it is a HEIC image, which needs pillow-heif: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        return Image.open(file, formats=("HEIF",))


def _start(file) -> bytes:
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return opened.read(12)
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    return start


def check_file(path: str) -> None:
    """Raise ImageError for a URL, a folder, an empty file and what is no regular file; OSError for a missing one."""
    if URL.match(os.fspath(path)) and not os.path.lexists(path):
        raise ImageError("it is a URL, and URLs are not fetched: download it first")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
    if status.st_size == 0:
        raise ImageError("the file is empty")


def _decode(image: Image.Image, target, hold) -> Decoded:
    if image.format is not None and image.format not in (*FORMATS, "MPO"):
        raise ImageError(f"it is of the format {image.format}, which is not supported")
    _check_pixels(image)
    has_16_bits = ";16" in str([tile[3] for tile in getattr(image, "tile", ())])

    def measure() -> tuple[int, tuple[int, int], tuple[int, int]]:
        """The orientation, the upright (height, width), and the target's as the image lies."""
        orientation = _orientation(image)
        lie = slice(None, None, -1 if orientation in SIDEWAYS else 1)
        size = (image.height, image.width)[lie]
        return orientation, size, size[lie] if target is None else tuple(target(size))[lie]

    def load() -> None:
        if hold is not None:
            hold(3 * image.width * image.height)
        image.load()

    if image.format in ("JPEG", "MPO"):
        orientation, size, wanted = measure()
        if target is not None:
            image.draft(None, (2 * wanted[1], 2 * wanted[0]))
        load()
    else:  # of a TIFF, Pillow turns the pixels when it decodes them; a PNG may have its EXIF block behind them
        load()
        orientation, size, wanted = measure()
    if has_16_bits and isinstance(clear := image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)  # as Pillow reduced the pixels
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ImageError("its pixels have signs or 32 bits and no known range: convert it to 8 or 16 bits")
    pixels = _pixels(image, *(max(1, now // max(8 * to, LONG)) for now, to in zip((image.height, image.width), wanted)))
    if orientation in UPRIGHT:  # a copy: of one row or column, NumPy calls a turned view contiguous, and torch does not
        pixels = UPRIGHT[orientation](pixels).copy()
    return Decoded(pixels, size)


def _pixels(image: Image.Image, down: int, across: int) -> np.ndarray:
    """The pixels, every `down` rows and `across` columns averaged to one.

    A tile at a time: all at once, Pillow would hold several more copies of them.
    """
    pixels = np.empty((-(-image.height // down), -(-image.width // across), 3), np.uint8)
    columns = max(1, min(TILE, image.width) // across) * across
    rows = max(1, TILE // columns // down) * down
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            tile = _to_rgb(image.crop((left, top, min(left + columns, image.width), min(top + rows, image.height))))
            tile = np.asarray(tile if down == across == 1 else tile.reduce((across, down)))
            y, x = top // down, left // across
            pixels[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return pixels


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ImageError("its pixels have more than 16 bits and no known range: convert it to 8 or 16 bits")
        reduced = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):
            reduced[values == clear] = 255
        return Image.fromarray(reduced).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
