"""Decoding videos: frames that are chosen by their times, to (views, frames, height, width, 3) of uint8."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from revit_kernels.data.archives import Member
from revit_kernels.data.images import ImageError, check_file, decode, read_member

SUFFIXES = frozenset(".mp4 .m4v .mov .webm .mkv .avi .gif .mpg .mpeg .m2ts .mts .wmv .flv .ogv .3gp".split())
# By FFmpeg's names. No others are tried, whatever a file is called: playlists would open other files.
FORMATS = "mov,matroska,webm,avi,gif,mpeg,mpegts,asf,flv,ogg"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
SAME = 1e-6  # seconds: a frame that begins so soon after a time is on the screen at it
FAR = 1.0  # seconds: a frame that is further ahead is looked for from the keyframe before it
BROKEN = 0.1  # share of a video's packets that may be undecodable
ENDS_EARLY = 0.1  # share of its length that a video may be shorter than it says


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are decoded.

    frames: of a clip
    stride: frames of the video from one to the next, at its mean rate; None: they are spread over the whole video
    views:  clips of a video, spread over it
    """

    frames: int
    stride: float | None = None
    views: int = 1

    def __post_init__(self):
        if self.frames < 1 or self.views < 1 or (self.stride is not None and not self.stride > 0):
            given = f"{self.frames}, {self.views} and {self.stride}"
            raise ValueError(f"frames and views must be at least 1, and a stride above 0, got {given}")

    def times(self, duration: float, rate: float) -> np.ndarray:
        """(views, frames) seconds from the beginning of the video. rate: mean frames a second

        Without a stride the video is cut into `frames` equal parts, and each view takes another place in every part;
        one view takes the middles. With a stride, clips begin at equal distances from the first place to the last; one
        clip is the middle. What lies beyond the end of a short video is its last frame.
        """
        view, frame = np.arange(self.views)[:, None], np.arange(self.frames)[None]
        if self.stride is None:
            return (frame + (view + 0.5) / self.views) * duration / self.frames
        room = max(0.0, duration * rate - 1 - (self.frames - 1) * self.stride)
        first = np.floor(room * (view / (self.views - 1) if self.views > 1 else np.full((1, 1), 0.5)))
        return np.minimum((first + frame * self.stride + 0.5) / rate, duration)


class Clip(NamedTuple):
    """What was decoded.

    pixels: (views, frames, height, width, 3) uint8, upright
    size:   (height, width) of the video's picture, before any reduction
    times:  (views, frames) seconds that were asked for
    """

    pixels: np.ndarray
    size: tuple[int, int]
    times: np.ndarray


def decode_clip(
    path: str | BinaryIO,
    sampling: Sampling,
    target: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    hold: Callable[[int], None] | None = None,
) -> Clip:
    """Frames of a video file.

    path:   of the file; or a Member of an archive; or a file object, open for reading bytes
    target: from the picture's (height, width) to the (height, width) it will be resized to: frames are then reduced
            while they are decoded, to no less than twice that
    hold:   called with the bytes that the pixels will take, before any is decoded; it may wait, or raise ImageError

    A frame is the one that is on the screen at its time, so a variable rate changes nothing. Frames that are far apart
    are looked for from keyframes, and only the frames of the clip are kept. Rotated videos are turned upright, pixels
    that are no squares made square, transparent ones laid on white. Raises ImageError for whatever is wrong.
    """
    av = _av()
    try:
        if isinstance(path, Member):
            path = io.BytesIO(read_member(path))
        if isinstance(path, str | os.PathLike):
            check_file(path)
        with _Video(av, path) as video:
            return video.clip(sampling, target, hold)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("there is no such file") from None
    except PermissionError:
        raise ImageError("permission denied") from None
    except MemoryError:
        raise ImageError("there is not enough memory to decode it") from None
    except (av.error.FFmpegError, OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise ImageError(f"the video is damaged: {why}") from error


def still_clip(path, sampling: Sampling, target=None, hold=None) -> Clip:
    """An image as a clip in which nothing moves. Arguments and errors are those of `decode_clip`."""
    found = decode(path, target, hold)
    times = np.zeros((sampling.views, sampling.frames))
    return Clip(np.broadcast_to(found.pixels, (*times.shape, *found.pixels.shape)), found.size, times)


def _av():
    try:
        import av
    except ImportError:
        raise ImageError("decoding videos needs PyAV: pip install av") from None
    return av


class _Video:
    """An open file, and where its decoder is: `now` is on the screen, `after` comes next; None at either end."""

    def __init__(self, av, path):
        self.av, self.opened = av, []
        self.source = path if isinstance(path, str | os.PathLike) else path.read()
        self.container, self.stream = self._open()
        self.probe = None  # a second reading, which finds keyframes without disturbing the decoder
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        tick = self.stream.time_base
        self.tick = float(tick) if tick else 1 / self.rate
        self.own = (self.stream.duration or 0) * self.tick  # seconds that the stream says it lasts, 0 for none
        self.start = self.stream.start_time or 0
        self.seekable = True
        self.packets = self.broken = 0
        self._begin()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for container in self.opened:
            container.close()

    def _open(self):
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        try:
            container = self.av.open(source, container_options=OPTIONS)
        except self.av.error.InvalidDataError:
            raise ImageError(_unreadable(self.source)) from None
        self.opened.append(container)
        covers = self.av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers and s.codec_context is not None]
        if not streams:
            what = "only sound" if container.streams.audio else "nothing that can be decoded"
            raise ImageError(f"it has no video, {what}")
        streams[0].codec_context.thread_count = 1  # files are decoded in parallel, not the frames of one
        return container, streams[0]

    # ------------------------------------------------------------------ where the decoder is

    def _begin(self) -> None:
        self.frames = self._decoded()
        self.now, self.after = None, next(self.frames, None)

    def _decoded(self) -> Iterator[tuple[float, object]]:
        """(time, frame) from where the container is; a frame without a time follows the one before.

        A packet that cannot be decoded is passed over, as players do. Raises ImageError where they are many.
        """
        time = 0.0
        for packet in self.container.demux(self.stream):
            self.packets += 1
            try:
                frames = packet.decode()
            except self.av.error.InvalidDataError:
                self.broken += 1
                if self.broken > 2 + BROKEN * self.packets:
                    raise ImageError("the video is damaged: many of its frames cannot be decoded") from None
                continue
            for frame in frames:
                pts = frame.pts if frame.pts is not None else frame.dts
                time = time + 1 / self.rate if pts is None else (pts - self.start) * self.tick
                yield time, frame

    def _seek(self, time: float) -> None:
        """To the last keyframe before `time`, where that is ahead of the decoder."""
        if self.probe is None:
            self.probe = self._open()
        container, stream = self.probe
        ticks = self.start + int(time / self.tick)
        try:
            container.seek(ticks, stream=stream)
            packet = next(container.demux(stream))
        except (self.av.error.FFmpegError, StopIteration):
            self.seekable = False
            return
        found = packet.pts if packet.pts is not None else packet.dts
        if found is None or (found - self.start) * self.tick <= (self.after or self.now)[0]:
            return
        self.container.seek(ticks, stream=self.stream)
        self._begin()
        if self.after is None or self.after[0] > time:  # some files' indices lead too far
            self.seekable = False
            self.container, self.stream = self._open()
            self._begin()

    def frame_at(self, time: float):
        """The frame on the screen at `time`, in the order of times. Raises ImageError where the video ends before."""
        if self.seekable and self.after is not None and time - self.after[0] > FAR:
            self._seek(time)
        while self.after is not None and (self.now is None or self.after[0] <= time + SAME):
            self.now, self.after = self.after, next(self.frames, None)
        if self.now is None:
            raise ImageError("no frame of it can be decoded")
        # A file says how long its sound is, too.
        if self.after is None and (self.own > 0 or not self.container.streams.audio):
            shown, frame = self.now
            end = shown + max(1 / self.rate, (getattr(frame, "duration", None) or 0) * self.tick)
            if time > end + ENDS_EARLY * self.duration:
                raise ImageError(f"it is cut off: it ends after {end:.1f} of {self.duration:.1f} s")
        return self.now[1]

    @property
    def duration(self) -> float:
        """Seconds: of the stream, or of the file, or found by reading the file without decoding it."""
        if self.own > 0:
            return self.own
        if self.container.duration:
            return self.container.duration / self.av.time_base
        container, stream = self._open()
        for packet in container.demux(stream):
            if (pts := packet.pts if packet.pts is not None else packet.dts) is not None:
                self.own = max(self.own, (pts - self.start + (packet.duration or 0)) * self.tick)
        return self.own

    # ------------------------------------------------------------------ pixels

    def clip(self, sampling: Sampling, target, hold) -> Clip:
        if self.after is None:
            raise ImageError("no frame of it can be decoded")
        times = sampling.times(max(self.duration, 1 / self.rate), self.rate)
        size, kept, turns = self._sizes(self.after[1], target)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size[0] * size[1] > limit:
            raise ImageError(f"its frames have {size[1]} x {size[0]} pixels, more than the limit of {limit:,}")
        upright = kept[:: -1 if turns % 2 else 1]
        if hold is not None:
            hold(3 * upright[0] * upright[1] * times.size)
        pixels = np.empty((times.size, *upright, 3), np.uint8)
        last = None
        for place in np.argsort(times, axis=None, kind="stable"):
            frame = self.frame_at(times.flat[place])
            if frame is not last:  # of a slow video, one frame may be several of the clip's
                last, found = frame, np.rot90(_rgb(frame, kept), turns)
            pixels[place] = found
        return Clip(pixels.reshape(*times.shape, *upright, 3), size, times)

    def _sizes(self, frame, target) -> tuple[tuple[int, int], tuple[int, int], int]:
        """The upright (height, width), the (height, width) that frames are decoded to, and their quarter turns."""
        ratio = self.stream.sample_aspect_ratio or 1
        height, width = frame.height, max(1, round(frame.width * ratio))
        turns = round(frame.rotation / 90) % 4
        size = (height, width)[:: -1 if turns % 2 else 1]
        if target is None:
            return size, (height, width), turns
        wanted = target(size)[:: -1 if turns % 2 else 1]
        scale = max(1.0, min(height / (2 * wanted[0]), width / (2 * wanted[1])))
        return size, (max(1, round(height / scale)), max(1, round(width / scale))), turns


def _rgb(frame, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8"""
    clear = any(part.is_alpha for part in frame.format.components) or frame.format.name == "pal8"
    options = {"height": size[0], "width": size[1], "interpolation": "AREA"}
    found = frame.to_ndarray(format="rgba" if clear else "rgb24", **options)
    if not clear:
        return found
    share = found[..., 3:].astype(np.uint16)
    return ((found[..., :3] * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def _unreadable(source) -> str:
    """What is wrong with a file, by path or bytes, that FFmpeg knows no format of."""
    start = source[:12]
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            start = file.read(12)
    if start[4:8] == b"ftyp":
        return "it is an MP4 without its index: it was cut off, or never finished"
    if start.startswith((b"\x1a\x45\xdf\xa3", b"GIF8")) or (start[:4], start[8:]) == (b"RIFF", b"AVI "):
        return "the video is damaged, or was cut off near its beginning"
    return "it is not a video, or of a format that is not supported"
