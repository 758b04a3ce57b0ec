"""The queue of a service: batches within the budget in the order of arrival, nobody starves, memory is bounded."""

import io
import threading
from concurrent.futures import wait

import numpy as np
import pytest
from PIL import Image
from stand_in import StandIn
from test_images import noise

from revit_kernels.data.images import ImageError, upright_size
from revit_kernels.serving.batcher import Batcher, Busy, Stats
from revit_kernels.serving.infer import GridRule
from revit_kernels.serving.prepare import Prepared, Settings, prepare
from revit_kernels.serving.records import Columns


def encoded(size, kind="PNG", **options):
    file = io.BytesIO()
    noise(size).save(file, kind, **options)
    return file.getvalue()


class Slow(StandIn):
    """Answers when it is let to, and remembers its batches."""

    menu = None

    def __init__(self):
        super().__init__()
        self.may = threading.Semaphore(0)

    def forward(self, images, grids, channels_last):
        self.may.acquire()
        return super().forward(images, grids, channels_last)

    def features(self, images, **options):
        return self.forward_features(images, **options)


def prepared(model):
    return Prepared(model, model, GridRule((16, 16), 196), Columns(classes=3, top=3), False)


@pytest.fixture
def batcher():
    made = Batcher(prepared(Slow()), batch_tokens=250, workers=2)
    yield made
    for _ in range(100):
        made.prepared.model.may.release()
    made.close()


def submit_behind(batcher, *sizes):
    """Submitted while the model answers a first image: decoded, they wait. Returns all replies."""
    first = batcher.submit(encoded((16, 16)))
    while not batcher.thread_waits(0):
        pass
    replies = [batcher.submit(encoded(size)) for size in sizes]
    wait([entry.loaded for entry in batcher.entries])
    return [first, *replies]


@pytest.fixture(autouse=True)
def thread_waits(monkeypatch):
    monkeypatch.setattr(Batcher, "thread_waits", lambda self, n: len(self.entries) == n, raising=False)


def test_first_in_first_out_within_the_budget(batcher):
    sizes = [(80, 80), (224, 224), (80, 80), (1000, 1000), (16, 16), (16, 16)]  # 26, 197, 26, 197, 2, 2 tokens
    replies = submit_behind(batcher, *sizes)
    for _ in range(10):
        batcher.prepared.model.may.release()
    grids = [reply.result(30).grid for reply in replies]
    assert grids == [(1, 1), (5, 5), (14, 14), (5, 5), (14, 14), (1, 1), (1, 1)]
    assert batcher.prepared.model.calls == [[(1, 1)], [(5, 5), (14, 14), (5, 5)], [(14, 14), (1, 1), (1, 1)]]
    stats = batcher.totals()
    assert (stats.images, stats.batches, stats.errors, stats.waiting) == (7, 3, 0, 0)
    assert stats.tokens == 2 + 26 + 197 + 26 + 197 + 2 + 2 and stats.full == 7 * 197


def test_an_image_above_the_budget_is_alone_and_in_its_turn():
    batcher = Batcher(prepared(Slow()), batch_tokens=100, workers=2)
    replies = submit_behind(batcher, (80, 80), (224, 224), *[(80, 80)] * 5)
    for _ in range(10):
        batcher.prepared.model.may.release()
    assert all(reply.result(30).error is None for reply in replies)
    assert [len(call) for call in batcher.prepared.model.calls] == [1, 1, 1, 3, 2]
    assert batcher.prepared.model.calls[2] == [(14, 14)]
    batcher.close()


def test_what_is_broken_harms_nobody_else(batcher):
    whole = encoded((64, 64), "JPEG")
    with pytest.raises(ImageError, match="it is not an image"):
        batcher.submit(b"broken")
    with pytest.raises(ImageError, match="the file is empty"):
        batcher.submit(b"")
    with pytest.raises(ValueError, match="kind must be one of"):
        batcher.submit(whole, "poem")
    replies = [batcher.submit(whole), batcher.submit(encoded((64, 64))[:-200]), batcher.submit(whole)]
    for _ in range(10):
        batcher.prepared.model.may.release()
    errors = [reply.result(30).error for reply in replies]
    assert errors[0] is errors[2] is None and "cannot be decoded" in errors[1]


def test_a_model_that_fails_fails_one_batch(batcher):
    model = batcher.prepared.model

    def dies(*args, **kwargs):
        raise RuntimeError("the GPU is on fire")

    forward, model.forward = model.forward, dies
    with pytest.raises(RuntimeError, match="the model failed: the GPU is on fire"):
        batcher.submit(encoded((16, 16))).result(30)
    model.forward = forward
    model.may.release()
    assert batcher.submit(encoded((16, 16))).result(30).error is None


@pytest.mark.parametrize("limit", [{"waiting_tokens": 60}, {"waiting_bytes": 5 * len(encoded((80, 80))) // 2}], ids=str)
def test_a_full_queue_takes_no_more(limit):
    batcher = Batcher(prepared(Slow()), batch_tokens=250, **limit)
    replies = submit_behind(batcher, (80, 80), (80, 80))
    with pytest.raises(Busy, match="2 images wait already: try again later"):
        batcher.submit(encoded((80, 80)))
    for _ in range(10):
        batcher.prepared.model.may.release()
    wait(replies)
    large = batcher.submit(encoded((224, 224)))  # above what may wait, but nothing does
    assert large.result(30).error is None
    batcher.close()


def test_cancelled_before_its_turn_it_is_not_answered(batcher):
    replies = submit_behind(batcher, (80, 80), (64, 64), (80, 80))
    assert replies[2].cancel()
    for _ in range(10):
        batcher.prepared.model.may.release()
    replies[3].result(30)
    assert batcher.prepared.model.calls == [[(1, 1)], [(5, 5), (5, 5)]] and not batcher.limit.held


def test_closing_answers_what_waits():
    batcher = Batcher(prepared(Slow()), batch_tokens=20)
    replies = submit_behind(batcher, (80, 80), (80, 80))
    for _ in range(3):
        batcher.prepared.model.may.release()
    batcher.close()
    assert all(reply.result(0).error is None for reply in replies)
    with pytest.raises(RuntimeError, match="the service is shutting down"):
        batcher.submit(encoded((80, 80)))
    late = Batcher(prepared(Slow()), batch_tokens=20)
    replies = submit_behind(late, (80, 80))
    late.close(drain=0.1)
    with pytest.raises(RuntimeError, match="the service is shutting down"):
        replies[1].result(0)
    late.prepared.model.may.release()


def test_answers_are_bit_for_bit_those_of_the_command():
    """Of the shipped ReViT, by its policy; features; and at every length."""
    made = prepare(Settings(dtype="float32", device="cpu"))
    batcher = Batcher(made, batch_tokens=64, workers=2)
    images = [encoded(size) for size in ((28, 28), (60, 40), (200, 300), (30, 90))]
    replies = [batcher.submit(data) for data in images * 4]
    for i, reply in enumerate(replies):
        alone = batcher.submit(images[i % 4]).result(60)
        found = reply.result(60)
        np.testing.assert_array_equal(found.values, alone.values)
        assert (found.grid, found.tokens) == (alone.grid, alone.tokens) and found.grid in made.model.menu
    every = batcher.submit(images[1], "lengths").result(60)
    assert [one.grid for one in every.others] == list(made.model.menu)
    assert every.tokens == sum(one.tokens for one in every.others)
    assert batcher.submit(images[0], "features").result(60).values.shape == (made.model.num_features,)
    batcher.close()


def test_warm_up_counts_for_nothing():
    batcher = Batcher(prepare(Settings(dtype="float32", device="cpu")), workers=1)
    calls, answer = [], batcher.answer
    batcher.answer = lambda kind, images: calls.append(kind) or answer(kind, images)
    batcher.warm_up()
    assert set(calls) == {"classes", "features", "lengths"} and batcher.totals() == Stats()
    batcher.submit(encoded((60, 40))).result(60)
    stats = batcher.totals()
    assert (stats.images, stats.batches) == (1, 1) and stats.waited > 0 and stats.busy > 0
    batcher.close()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_size_is_in_the_header(kind):
    assert upright_size(encoded((64, 48), kind)) == (48, 64)


def test_the_size_of_what_lies_on_its_side(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert upright_size(encoded((64, 48), "JPEG", exif=exif)) == (64, 48)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ImageError, match="more than the limit of 3,000"):
        upright_size(encoded((64, 48)))
