"""Decoding by threads ahead of the model, in order, with a limit on the bytes that wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

import torch

from revit_kernels.data.images import ImageError, decode
from revit_kernels.grids import Grid
from revit_kernels.serving.clips import ClipRule

AHEAD_BYTES = 512 << 20  # decoded images that may wait for the model


@dataclass
class Loaded:
    """An image ready for the model, or the reason why there is none."""

    path: str
    # (height, width, 3) uint8; of a clip (frames, height, width, 3), of several views (views, frames, ...)
    pixels: torch.Tensor | None = None
    size: tuple[int, int] | None = None
    grid: Grid | None = None
    error: str | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.pixels is None else self.pixels.numel()


class ByteLimit:
    """Keeps waiting decoded images within `limit` bytes; the image that the consumer waits for always fits."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held: dict[int, int] = {}
        self.awaited = -1
        self.closed = False
        self.changed = Condition()

    def hold(self, index: int, size: int) -> None:
        """Wait until an image of `size` bytes fits. Raises ImageError once the limit is closed."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.closed or index == self.awaited or sum(self.held.values()) + size <= self.limit
            )
            if self.closed:
                raise ImageError("the run has ended")
            self.held[index] = size

    def settle(self, index: int, size: int) -> None:
        """Set the bytes that the image really takes; 0 once it no longer waits."""
        with self.changed:
            self.held[index] = size
            if not size:
                del self.held[index]
            self.changed.notify_all()

    def wait_for(self, index: int) -> None:
        with self.changed:
            self.awaited = index
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Pace:
    """Measures the rate of decoding while the consumer is idle, and can pause decoding.

    Decoders and consumer may share cores, so the time of one says nothing about its rate alone. The consumer is idle
    while it waits for an image. An image that is decoded partly in that time counts by that part.
    """

    def __init__(self):
        self.changed = Condition()
        self.paused, self.decoding = False, 0
        self.waited, self.since = 0.0, None  # seconds of waiting that have ended, and when the present one began
        self.images = 0.0  # decoded while the consumer waited

    @property
    def images_per_second(self) -> float | None:
        """The rate of decoding while the consumer waited; None if it never did."""
        return self.images / self.waited if self.images and self.waited else None

    def _now(self) -> tuple[float, float]:
        """(the time, the seconds that the consumer has waited so far)."""
        now = time.perf_counter()
        return now, self.waited + (now - self.since if self.since is not None else 0.0)

    @contextmanager
    def waiting(self):
        """Around the consumer's wait for an image."""
        with self.changed:
            self.since = time.perf_counter()
        try:
            yield
        finally:
            with self.changed:
                self.waited, self.since = self._now()[1], None

    @contextmanager
    def pause(self):
        """A context without decoding; images that are being decoded are finished first."""
        try:
            with self.changed:
                self.paused = True
                self.changed.wait_for(lambda: not self.decoding)
            yield
        finally:
            with self.changed:
                self.paused = False
                self.changed.notify_all()

    def begin(self) -> tuple[float, float]:
        """Start or resume decoding an image, after a pause if there is one."""
        with self.changed:
            self.changed.wait_for(lambda: not self.paused)
            self.decoding += 1
            return self._now()

    def stop(self, begun: tuple[float, float]) -> tuple[float, float]:
        """Stop decoding an image: (the seconds since `begun`, how many of them the consumer waited)."""
        with self.changed:
            self.decoding -= 1
            self.changed.notify_all()
            return tuple(now - then for now, then in zip(self._now(), begun))

    def add(self, parts: list[tuple[float, float]]) -> None:
        """Count an image that was decoded in these parts, each from `stop`."""
        seconds, alone = map(sum, zip(*parts))
        with self.changed:
            self.images += alone / max(seconds, 1e-9)


def load(path: str, rule, hold=None) -> Loaded:
    """Decode one image or clip; an ImageError becomes its `error`. hold: as of `decode`"""
    try:
        if isinstance(rule, ClipRule):
            return Loaded(path, *rule.take(path, hold))
        decoded = decode(path, rule.pixels if rule.resize else None, hold)
        pixels, grid = rule.cut(decoded), rule.grid(decoded.size)
        rule.check(pixels.shape[:2], grid)
    except ImageError as error:
        return Loaded(path, error=str(error))
    if pixels is not decoded.pixels:
        pixels = pixels.copy()  # a view keeps the whole image in memory
    return Loaded(path, torch.from_numpy(pixels), decoded.size, grid)


def load_all(paths: Iterable[str], rule, workers: int, ahead: int, pace: Pace | None = None) -> Iterator[Loaded]:
    """Images in the order of `paths`, decoded by `workers` threads, at most `ahead` of them in advance.

    Images that wait or are being decoded take AHEAD_BYTES at most, or one image that is larger.
    pace: measures the threads, and can pause them
    """
    limit, pace = ByteLimit(AHEAD_BYTES), pace or Pace()
    numbered = enumerate(paths)
    waiting: deque[tuple[int, Future]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def work(index: int, path: str) -> Loaded:
        size, begun, parts = 0, pace.begin(), []

        def hold(size: int) -> None:  # waiting for room does not count as decoding
            nonlocal begun
            parts.append(pace.stop(begun))
            try:
                limit.hold(index, size)
            finally:
                begun = pace.begin()

        try:
            loaded = load(path, rule, hold)
            size = loaded.bytes
            return loaded
        finally:
            parts.append(pace.stop(begun))
            pace.add(parts)
            limit.settle(index, size)

    try:
        while True:
            while len(waiting) < ahead and (job := next(numbered, None)) is not None:
                waiting.append((job[0], pool.submit(work, *job)))
            if not waiting:
                return
            index, future = waiting.popleft()
            limit.wait_for(index)  # the pool begins images in order: this one is done, or a thread has it
            with pace.waiting():
                loaded = future.result()
            del future  # it keeps the image
            limit.settle(index, 0)
            yield loaded
            del loaded
    finally:
        limit.close()
        pool.shutdown(wait=False, cancel_futures=True)
