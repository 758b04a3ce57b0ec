"""Images of many callers in packed batches: one queue, first in, first out, by a budget of tokens."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.data.archives import Member
from revit_kernels.data.images import upright_size
from revit_kernels.grids import Grid, native_grid
from revit_kernels.serving.infer import NOT_FINITE, GridRule, answer, full_length
from revit_kernels.serving.loading import AHEAD_BYTES, ByteLimit, Loaded, load

KINDS = ("classes", "features", "lengths")


class Busy(RuntimeError):
    """The queue is full."""


@dataclass
class Reply:
    """The answer for one image, or the reason why there is none.

    values: (classes,) probabilities or (features,), float32; None where there is an error
    size:   (height, width) of the image, in pixels
    grid:   (rows, columns) of the pass that answered
    tokens: of all passes, prefix tokens included
    error:  why there is no answer
    others: for the kind "lengths", a Reply at each length, longest first
    """

    values: np.ndarray | None = None
    size: tuple[int, int] | None = None
    grid: Grid | None = None
    tokens: int = 0
    error: str | None = None
    others: list[Reply] = field(default_factory=list)


@dataclass
class Stats:
    """Totals since the start.

    full:     tokens that the images would have had at full length
    capacity: tokens that the batches had room for
    busy:     seconds in which the model computed
    waited:   seconds that images waited for their batches, summed
    waiting, waiting_tokens: in the queue now
    """

    images: int = 0
    errors: int = 0
    tokens: int = 0
    full: int = 0
    batches: int = 0
    capacity: int = 0
    busy: float = 0.0
    waited: float = 0.0
    waiting: int = 0
    waiting_tokens: int = 0


@dataclass
class _Entry:
    number: int
    kind: str
    tokens: int
    size: int  # bytes as they came
    loaded: Future
    reply: Future
    came: float = field(default_factory=time.perf_counter)


class Batcher:
    """Answers images from many threads in packed batches, on one thread of its own.

    prepared:       a serving.prepare.Prepared
    batch_tokens:   most tokens of a batch, prefix tokens included; an image with more is a batch of its own
    workers:        threads that decode
    waiting_tokens: most tokens in the queue; `submit` raises Busy beyond it
    waiting_bytes:  most bytes of encoded images in the queue; `submit` raises Busy beyond it

    A batch takes images in the order in which they arrived, and ends before the first one that does not fit or is not
    decoded yet: an image waits only for those before it. The model never waits for a batch to fill.
    Raises ValueError for batch_tokens below 1, NotImplementedError for a model of clips.
    """

    def __init__(
        self,
        prepared,
        *,
        batch_tokens: int = 8192,
        workers: int = 4,
        waiting_tokens: int = 1 << 20,
        waiting_bytes: int = 256 << 20,
    ):
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if not isinstance(prepared.rule, GridRule):
            raise NotImplementedError("a model of clips is not served over HTTP: use `revit infer`")
        self.prepared, self.batch_tokens = prepared, batch_tokens
        self.waiting_tokens, self.waiting_bytes = waiting_tokens, waiting_bytes
        self.device = next(prepared.model.parameters()).device
        self.prefix = prepared.model.num_prefix_tokens
        self.full = self.prefix + full_length(prepared.model)
        self.plain = GridRule(prepared.model.patch_embed.patch_size, full_length(prepared.model))
        if not isinstance(prepared.answerer, AdaptiveViT):
            self.plain = prepared.rule
        self.limit, self.stats = ByteLimit(AHEAD_BYTES), Stats()
        self.entries: deque[_Entry] = deque()
        self.tokens, self.bytes, self.submitted, self.closed = 0, 0, 0, False
        self.changed = threading.Condition()
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self.thread.start()

    # ------------------------------------------------------------------ callers

    def rule_of(self, kind: str) -> GridRule:
        return self.prepared.rule if kind == "classes" else self.plain

    def lengths(self, size: tuple[int, int]) -> list[Grid]:
        """The grids that the kind "lengths" answers at, longest first."""
        if self.prepared.model.menu is not None:
            return list(self.prepared.model.menu)
        longest, patch = self.plain.grid(size), self.prepared.model.patch_embed.patch_size
        parts = [native_grid(size, patch, max(1, longest[0] * longest[1] // k)) for k in (2, 4)]
        return list(dict.fromkeys([longest, *parts]))

    def submit(self, data: bytes, kind: str = "classes") -> Future:
        """A Future of the image's Reply. An image whose Future is cancelled before its turn is not computed.

        data: the encoded image; kind: one of KINDS

        Raises ImageError if the header cannot be read, Busy if the queue is full, RuntimeError after `close`.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        size = upright_size(data)
        if kind == "lengths":
            tokens = sum(self.prefix + h * w for h, w in self.lengths(size))
        else:
            h, w = self.rule_of(kind).grid(size)
            tokens = self.prefix + h * w
        with self.changed:
            if self.closed:
                raise RuntimeError("the service is shutting down")
            over = self.tokens + tokens > self.waiting_tokens or self.bytes + len(data) > self.waiting_bytes
            if over and self.entries:
                raise Busy(f"{len(self.entries)} images wait already: try again later")
            number = self.submitted
            self.submitted += 1
            self.tokens, self.bytes = self.tokens + tokens, self.bytes + len(data)
            loaded = self.pool.submit(self._load, number, data, kind)
            entry = _Entry(number, kind, tokens, len(data), loaded, Future())
            self.entries.append(entry)
            loaded.add_done_callback(self._notify)
            self.changed.notify_all()
        return entry.reply

    def warm_up(self) -> None:
        """Answer an image of each kind at full length, so that no request waits for compilation or graph capture; the
        statistics then start from zero."""
        file, (h, w) = io.BytesIO(), self.prepared.model.patch_embed.img_size
        Image.new("RGB", (w, h), "gray").save(file, "PNG")
        kinds = KINDS if self.prepared.columns.classes else ("features",)
        for reply in [self.submit(file.getvalue(), kind) for kind in kinds]:
            reply.result()
        with self.changed:
            self.stats = Stats()

    def _notify(self, _) -> None:
        with self.changed:
            self.changed.notify_all()

    def _load(self, number: int, data: bytes, kind: str) -> Loaded:
        size = 0
        try:
            loaded = load(Member("", lambda: data), self.rule_of(kind), lambda size: self.limit.hold(number, size))
            size = loaded.bytes
            return loaded
        finally:
            self.limit.settle(number, size)

    def close(self, drain: float = 30.0) -> None:
        """Accept no more images and answer the queue for at most `drain` seconds; what is left gets a RuntimeError."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join(drain)
        with self.changed:
            left = list(self.entries)
            self.entries.clear()
            self.changed.notify_all()
        self.limit.close()
        for entry in left:
            if not entry.reply.done():
                entry.reply.set_exception(RuntimeError("the service is shutting down"))
        self.pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ the thread

    def _work(self) -> None:
        while (batch := self.take()) is not None:
            begun = time.perf_counter()
            try:
                replies = self._replies(batch)
            except Exception as error:  # only this batch fails
                for entry, _ in batch:
                    entry.reply.set_exception(RuntimeError(f"the model failed: {error}"))
                continue
            finally:
                for entry, _ in batch:
                    self.limit.settle(entry.number, 0)
            self._count(batch, replies, begun)
            for (entry, _), reply in zip(batch, replies):
                entry.reply.set_result(reply)

    def full_with(self, images: int, tokens: int, more: int) -> bool:
        """Whether a batch of this many images and tokens has no room for an image of `more` tokens."""
        return tokens + more > self.batch_tokens

    def take(self) -> list[tuple[_Entry, Loaded]] | None:
        """The next batch; None after `close`, once the queue is empty."""
        batch: list[tuple[_Entry, Loaded]] = []
        tokens = 0
        with self.changed:
            while True:
                while not self.entries and not batch:
                    if self.closed:
                        return None
                    self.changed.wait()
                if not self.entries:
                    return batch
                head = self.entries[0]
                if batch and self.full_with(len(batch), tokens, head.tokens):
                    return batch
                if not head.loaded.done():
                    if batch:
                        return batch
                    self.limit.wait_for(head.number)
                    self.changed.wait()
                    continue
                self.entries.popleft()
                self.tokens, self.bytes = self.tokens - head.tokens, self.bytes - head.size
                if head.reply.set_running_or_notify_cancel():
                    batch.append((head, head.loaded.result()))
                    tokens += head.tokens
                else:
                    self.limit.settle(head.number, 0)

    def _count(self, batch, replies: list[Reply], begun: float) -> None:
        stats, good = self.stats, [reply for reply in replies if reply.error is None]
        tokens = sum(reply.tokens for reply in good)
        with self.changed:
            self.stats = replace(
                stats,
                images=stats.images + len(good),
                errors=stats.errors + len(replies) - len(good),
                tokens=stats.tokens + tokens,
                full=stats.full + self.full * sum(max(1, len(reply.others)) for reply in good),
                batches=stats.batches + 1,
                capacity=stats.capacity + max(self.batch_tokens, tokens),
                busy=stats.busy + time.perf_counter() - begun,
                waited=stats.waited + sum(begun - entry.came for entry, _ in batch),
            )

    def totals(self) -> Stats:
        with self.changed:
            return replace(self.stats, waiting=len(self.entries), waiting_tokens=self.tokens)

    @torch.inference_mode()
    def _replies(self, batch: list[tuple[_Entry, Loaded]]) -> list[Reply]:
        replies = [Reply(error=loaded.error) for _, loaded in batch]
        for kind in KINDS:
            chosen = [i for i, (entry, loaded) in enumerate(batch) if entry.kind == kind and loaded.error is None]
            if not chosen:
                continue
            images = [batch[i][1] for i in chosen]
            for i, reply in zip(chosen, self.answer(kind, images), strict=True):
                replies[i] = reply
        return replies

    def answer(self, kind: str, images: list[Loaded]) -> list[Reply]:
        """Replies to images without errors, in one packed batch."""
        if kind == "lengths":
            return self._at_lengths(images)
        plain = kind == "features" or not isinstance(self.prepared.answerer, AdaptiveViT)
        model = self.prepared.model if plain else self.prepared.answerer
        found = answer(model, images, self.device, kind == "features")
        values = found.values.cpu().numpy()
        if found.row is None:
            grids = [loaded.grid for loaded in images]
            tokens = [self.prefix + h * w for h, w in grids]
        else:
            grids, tokens = [model.menu[row] for row in found.row.tolist()], found.tokens.tolist()
        return [_reply(*each) for each in zip(values, images, grids, tokens)]

    def _at_lengths(self, images: list[Loaded]) -> list[Reply]:
        grids = [self.lengths(loaded.size) for loaded in images]
        pixels = [loaded.pixels.to(self.device) for loaded, own in zip(images, grids) for _ in own]
        flat = [grid for own in grids for grid in own]
        logits = self.prepared.model(pixels, grids=flat, channels_last=True)
        values, at, replies = logits.float().softmax(-1).cpu().numpy(), 0, []
        for loaded, own in zip(images, grids):
            costs = [self.prefix + h * w for h, w in own]
            each = [_reply(v, loaded, g, c) for v, g, c in zip(values[at : at + len(own)], own, costs)]
            at += len(own)
            replies.append(replace(each[0], tokens=sum(costs), others=each))
        return replies


def _reply(values: np.ndarray, loaded: Loaded, grid: Grid, tokens: int) -> Reply:
    if not np.isfinite(values).all():
        return Reply(error=NOT_FINITE)
    return Reply(values, loaded.size, grid, int(tokens))
