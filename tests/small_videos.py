"""Small video files for tests."""

from fractions import Fraction

import av
import numpy as np

CODECS = {".mp4": "mpeg4", ".mov": "mpeg4", ".avi": "mpeg4", ".mkv": "mpeg4", ".webm": "libvpx", ".gif": "gif"}


def grey(level: int, size=(48, 64)) -> np.ndarray:
    return np.full((*size, 3), level, np.uint8)


def numbered(number: int, size=(48, 64)) -> np.ndarray:
    """A frame with its number in eight stripes, white for a bit that is set."""
    stripes = np.array([number >> bit & 1 for bit in range(8)], np.uint8) * 200 + 30
    return np.ascontiguousarray(np.broadcast_to(stripes.repeat(size[1] // 8)[None, :, None], (*size, 3)))


def numbers_of(pixels) -> list[int]:
    """The numbers of frames (..., height, width, 3)."""
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    stripes = frames.reshape(len(frames), frames.shape[1], 8, -1, 3).mean((1, 3, 4)) > 128
    return (stripes @ (1 << np.arange(8))).tolist()


def write_video(path, frames, rate=10, *, times=None, rotation=None, gop=12, codec=None, sound=False, options=None):
    """Write frames (height, width, 3) uint8 as a video of this rate, or at these times in seconds."""
    suffix = "." + str(path).rsplit(".", 1)[1]
    with av.open(str(path), "w", options=options or {}) as file:
        stream, heard = None, file.add_stream("aac", rate=8000, layout="mono") if sound else None
        for i, frame in enumerate(frames):
            if stream is None:
                stream = file.add_stream(codec or CODECS[suffix], rate=rate)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "rgb8" if suffix == ".gif" else "yuv420p"
                stream.codec_context.gop_size = gop
                if suffix != ".gif":
                    stream.bit_rate = 400_000
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
                if rotation is not None:
                    stream.set_display_rotation(rotation)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = round(1000 * times[i]), Fraction(1, 1000)
            file.mux(stream.encode(picture))
        if stream is not None:
            file.mux(stream.encode())
        if sound:
            write_sound(file, heard)
    return path


def write_sound(file, stream=None) -> None:
    """Two and a half seconds of silence."""
    stream = stream or file.add_stream("aac", rate=8000, layout="mono")
    for i in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 1024 * i
        file.mux(stream.encode(frame))
    file.mux(stream.encode())
