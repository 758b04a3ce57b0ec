"""Image files: of every format, mode and orientation, changed, cut, spliced, and with sizes that are lies."""

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

from revit_kernels.data.images import ORIENTATION, UPRIGHT
from revit_kernels.serving.infer import GridRule
from revit_kernels.serving.loading import load

FORMATS = {  # modes that each is written in; the first are without loss
    "PNG": ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"),
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "L", "RGBA", "CMYK", "1", "I;16", "P", "F", "I"),
    "GIF": ("P", "L"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG": ("RGB", "L", "CMYK"),
}
EXACT = {("PNG", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"), ("PNG", "L"), ("TIFF", "L"), ("BMP", "L")}
RULES = [
    GridRule((4, 4), 64),
    GridRule((16, 16), 196),
    GridRule((4, 4), 64, grids=((4, 4), (3, 3), (2, 2))),
    GridRule((4, 4), 64, grids=((4, 4), (2, 3)), crop=False),
    GridRule((4, 4), 64, resize=False),
]
LONG = 1 << 20


def written(r):
    """(bytes, format, mode, the pixels as they are shown, the orientation)"""
    name = r.choice(list(FORMATS))
    mode = r.choice(FORMATS[name])
    height, width = r.choice((1, 2, 7, 16, 33, 64)), r.choice((1, 3, 8, 17, 40, 90))
    rng = np.random.default_rng(r.randrange(2**32))
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
    elif mode in ("F", "I"):
        image = Image.fromarray(pixels[..., 0].astype(np.float32 if mode == "F" else np.int32))
    else:
        image = Image.fromarray(pixels).convert(mode)
    if mode == "L":
        pixels = np.asarray(image)[..., None].repeat(3, -1)
    orientation = r.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9)) if name in ("PNG", "TIFF", "WEBP", "JPEG") else 1
    options = {}
    if name == "TIFF":
        orientation = max(1, orientation % 9)  # libtiff writes no others
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
        pixels = UPRIGHT.get(orientation, lambda found: found)(pixels)
    if name == "TIFF":
        options["compression"] = r.choice((None, "tiff_lzw", "tiff_deflate", "packbits")) if mode != "F" else None
    if name == "PNG" and mode in ("L", "RGB", "P") and r.random() < 0.2:
        options["transparency"] = (1, 2, 3) if mode == "RGB" else 5
    if name == "JPEG":
        options |= {"progressive": r.random() < 0.5, "quality": r.choice((5, 50, 95))}
    if name == "GIF" and r.random() < 0.4:
        options |= {"save_all": True, "append_images": [image] * 3}
    to = io.BytesIO()
    image.save(to, name, **options)
    return to.getvalue(), name, mode, None if "transparency" in options else pixels


def with_size(data: bytes, name: str, width: int, height: int) -> bytes:
    """The file with another width and height in its header."""
    data = bytearray(data)
    if name == "PNG":
        data[16:24] = struct.pack(">II", width % 2**32, height % 2**32)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif name == "BMP":
        data[18:26] = struct.pack("<ii", width % 2**31, height % 2**31)
    elif name == "GIF":
        data[6:10] = struct.pack("<HH", width % 65536, height % 65536)
    elif name == "JPEG":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data[at + 5 : at + 9] = struct.pack(">HH", height % 65536, width % 65536)
    elif name == "TIFF":
        for tag, value in ((256, width), (257, height)):
            at = data.find(struct.pack("<H", tag))
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value % 2**32)
    elif name == "WEBP":
        at = data.find(b"VP8 ")
        if at > 0:
            data[at + 14 : at + 18] = struct.pack("<HH", width % 16384, height % 16384)
    return bytes(data)


def bomb(r):
    """A PNG of few bytes and many pixels, of one row or column, or of more than are allowed."""
    sizes = (
        (LONG, 1),
        (1, LONG),
        (30_000_000, 1),
        (1, 20_000_000),
        (8000, 8000),
        (100_000, 100_000),
        (2**31 - 1, 2**31 - 1),
    )
    width, height = r.choice(sizes)
    mode = r.choice((0, 2, 6))  # grey, RGB, RGBA
    row = 1 + width * {0: 1, 2: 3, 6: 4}[mode]
    content = zlib.compress(b"\0" * min(row * height, 40 << 20), 1)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def changed(r, data: bytes) -> bytes:
    """Bytes with some of them other, gone, twice, or at another place."""
    for _ in range(r.choice((1, 1, 2, 4))):
        if not data:
            return data
        kind, at = r.randrange(7), r.randrange(min(len(data), r.choice((64, 1 << 30))))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + bytes([r.randrange(256)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]
        elif kind == 3:
            data = (
                data[:at]
                + r.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
                + data[at + 4 :]
            )
        elif kind == 4:
            data = data[:at] + data[at + r.randrange(1, 40) :]
        elif kind == 5:
            data = data[:at] + data[max(0, at - r.randrange(1, 200)) : at] * r.choice((1, 1, 30)) + data[at:]
        else:
            data = data[:at] + r.randbytes(r.randrange(1, 40)) + data[at:]
    return data


def attempt(seed: int) -> str:
    r = random.Random(seed)
    chance = r.random()
    rule, pixels, exact = r.choice(RULES), None, False
    if chance < 0.002:
        data = bomb(r)
    else:
        data, name, mode, pixels = written(r)
        exact = chance < 0.1
        if chance > 0.85:
            sizes = (0, 1, 2, 17, 5000, 65535, LONG, 2**31 - 1, 2**32 - 1)
            data = with_size(data, name, r.choice(sizes), r.choice(sizes))
        if chance > 0.1 and (chance < 0.85 or r.random() < 0.3):
            data = changed(r, data)
    found = load(io.BytesIO(data), rule)
    if found.error is not None:
        assert found.error and "\n" not in found.error and found.pixels is None, found.error
        assert not exact or mode in ("F", "I") or not rule.resize, f"an image that is whole is refused: {found.error}"
        return "refused"
    shape = tuple(found.pixels.shape)
    assert str(found.pixels.dtype) == "torch.uint8" and len(shape) == 3 and shape[2] == 3 and min(shape) > 0, shape
    assert found.grid[0] >= 1 and found.grid[1] >= 1 and min(found.size) >= 1, (found.grid, found.size)
    if exact and (name, mode) in EXACT and pixels is not None:
        assert found.size == pixels.shape[:2], f"{name} {mode} has {found.size}, should be {pixels.shape[:2]}"
        if rule.grids is None or not rule.crop:
            assert np.array_equal(found.pixels.numpy(), pixels), f"{name} {mode} has other pixels"
    return "answered"
