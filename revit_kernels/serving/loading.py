"""Images decoded ahead of the model by threads, in order, within a limit on the bytes that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Condition

import torch

from revit_kernels.data.images import ImageError, decode
from revit_kernels.grids import Grid

AHEAD_BYTES = 512 << 20  # decoded images that may wait for the model


@dataclass
class Loaded:
    """An image ready for the model, or the reason why there is none."""

    path: str
    pixels: torch.Tensor | None = None  # (height, width, 3) uint8
    size: tuple[int, int] | None = None
    grid: Grid | None = None
    error: str | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.pixels is None else self.pixels.numel()


class ByteLimit:
    """Keeps the decoded images that wait, by their index, within `limit` bytes; the one that is awaited always fits."""

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
        """What the image takes after all; 0 once it no longer waits."""
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


def load(path: str, rule, hold=None) -> Loaded:
    """Decode one image; whatever is wrong with it becomes its error. hold: see `decode`."""
    try:
        decoded = decode(path, rule.pixels if rule.resize else None, hold)
        pixels, grid = rule.cut(decoded), rule.grid(decoded.size)
        rule.check(pixels.shape[:2], grid)
    except ImageError as error:
        return Loaded(path, error=str(error))
    if pixels is not decoded.pixels:
        pixels = pixels.copy()  # a view would keep the whole image in memory
    return Loaded(path, torch.from_numpy(pixels), decoded.size, grid)


def load_all(paths: Iterable[str], rule, workers: int, ahead: int) -> Iterator[Loaded]:
    """Images in the order of `paths`, decoded by `workers` threads, at most `ahead` of them before they are asked for.

    Images that are being decoded or wait take AHEAD_BYTES at most, and the one that is asked for if it is larger.
    """
    limit = ByteLimit(AHEAD_BYTES)
    numbered = enumerate(paths)
    waiting: deque[tuple[int, Future]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def work(index: int, path: str) -> Loaded:
        size = 0
        try:
            loaded = load(path, rule, partial(limit.hold, index))
            size = loaded.bytes
            return loaded
        finally:
            limit.settle(index, size)

    try:
        while True:
            while len(waiting) < ahead and (job := next(numbered, None)) is not None:
                waiting.append((job[0], pool.submit(work, *job)))
            if not waiting:
                return
            index, future = waiting.popleft()
            limit.wait_for(index)  # the pool begins images in order: this one is done, or a thread has it
            loaded = future.result()
            del future  # it would keep the image
            limit.settle(index, 0)
            yield loaded
            del loaded
    finally:
        limit.close()
        pool.shutdown(wait=False, cancel_futures=True)
