"""Decoding ahead of the model: the order, the limit on what waits, and an end without threads that hang."""

import threading

import numpy as np
import pytest
from test_images import noise

from revit_kernels.data.images import Decoded, ImageError
from revit_kernels.serving import loading
from revit_kernels.serving.infer import GridRule
from revit_kernels.serving.loading import Pace, load_all

RULE = GridRule((16, 16), 196)


class Decoder:
    """Stands in for `decode`: images of 48 bytes (or `sizes` by path), and counts the bytes from the time they are held
    until the test has taken the image."""

    def __init__(self, sizes=None):
        self.sizes, self.lock = sizes or {}, threading.Lock()
        self.begun, self.bytes, self.most = 0, 0, 0

    def __call__(self, path, target=None, hold=None):
        size = self.sizes.get(path, 48)
        with self.lock:
            self.begun += 1
        hold(size)
        with self.lock:
            self.bytes += size
            self.most = max(self.most, self.bytes)
        if path == "broken":
            with self.lock:
                self.bytes -= size
            raise ImageError("it is broken")
        return Decoded(np.zeros((4, size // 12, 3), np.uint8), (4, size // 12))

    def take(self, loaded):
        with self.lock:
            self.bytes -= loaded.bytes


@pytest.fixture
def decoder(monkeypatch):
    decoder = Decoder()
    monkeypatch.setattr(loading, "decode", decoder)
    return decoder


def threads_end():
    threads = [t for t in threading.enumerate() if t.name.startswith("decode")]
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


def test_in_order_and_not_more_than_ahead(decoder):
    images = load_all(range(100), RULE, workers=3, ahead=8)
    assert [next(images).path for _ in range(10)] == list(range(10))
    assert decoder.begun <= 10 + 8
    images.close()
    assert threads_end() and decoder.begun <= 10 + 8


@pytest.mark.parametrize("workers", [1, 8])
def test_the_bytes_that_wait_are_bounded_from_the_first_image(decoder, monkeypatch, workers):
    monkeypatch.setattr(loading, "AHEAD_BYTES", 5 * 48)
    images = load_all(range(100), RULE, workers, ahead=100)
    order = []
    for loaded in images:
        order.append(loaded.path)
        if len(order) in (1, 50):
            threading.Event().wait(0.1)  # a model that takes its time: the threads decode what they may
        decoder.take(loaded)
    # Beyond the limit: the image that was awaited, and the one in the consumer's hands.
    assert order == list(range(100)) and decoder.most <= (5 + 2) * 48
    assert decoder.bytes == 0 and threads_end()


def test_an_image_larger_than_the_limit_passes_when_it_is_awaited(decoder, monkeypatch):
    decoder.sizes.update({3: 4800, 4: 4800, 17: 480})
    monkeypatch.setattr(loading, "AHEAD_BYTES", 100)
    order = []
    for loaded in load_all(range(20), RULE, workers=4, ahead=16):
        order.append((loaded.path, loaded.bytes))
        decoder.take(loaded)
    assert order == [(i, decoder.sizes.get(i, 48)) for i in range(20)]
    assert decoder.most <= 4800 + 4800 + 2 * 48


def test_broken_images_give_their_bytes_back(decoder, monkeypatch):
    monkeypatch.setattr(loading, "AHEAD_BYTES", 2 * 48)
    loaded = list(load_all(["broken", "a"] * 20, RULE, workers=3, ahead=40))
    assert [image.error for image in loaded] == ["it is broken", None] * 20


def test_threads_that_wait_end_with_the_run(decoder, monkeypatch):
    monkeypatch.setattr(loading, "AHEAD_BYTES", 48)
    images = load_all(range(100), RULE, workers=4, ahead=100)
    next(images)
    images.close()
    assert threads_end()
    failing = load_all(range(100), RULE, workers=4, ahead=100)
    next(failing)
    with pytest.raises(KeyboardInterrupt):
        failing.throw(KeyboardInterrupt())
    assert threads_end()


@pytest.mark.parametrize("limit", [1 << 20, 3 * 48])  # also with threads that wait for room
def test_a_pause_lets_nothing_be_decoded(decoder, monkeypatch, limit):
    monkeypatch.setattr(loading, "AHEAD_BYTES", limit)
    pace, order = Pace(), []
    for loaded in load_all(range(60), RULE, workers=4, ahead=16, pace=pace):
        order.append(loaded.path)
        if loaded.path % 5 == 0:
            with pace.pause():
                held = decoder.bytes
                threading.Event().wait(0.02)
                assert pace.decoding == 0 and decoder.bytes == held
        decoder.take(loaded)
    assert order == list(range(60)) and threads_end()


def test_a_run_that_dies_in_a_pause_ends(decoder):
    pace = Pace()
    images = load_all(range(100), RULE, workers=4, ahead=16, pace=pace)
    next(images)
    with pytest.raises(KeyboardInterrupt), pace.pause():
        raise KeyboardInterrupt
    images.close()
    assert threads_end()


def test_an_image_counts_by_the_part_of_it_that_was_decoded_alone(monkeypatch):
    now = 0.0
    monkeypatch.setattr(loading.time, "perf_counter", lambda: now)
    pace = Pace()
    assert pace.images_per_second is None
    begun = pace.begin()
    now = 2.0
    with pace.waiting():
        now = 4.0
        parts = [pace.stop(begun)]  # it stands still for room, which is not decoding
        now = 5.0
        begun = pace.begin()
        now = 6.0
    now = 8.0
    pace.add([*parts, pace.stop(begun)])
    # 7 seconds of decoding, 3 of them while the consumer waited, which took 4 seconds in all.
    assert pace.images_per_second == (3 / 7) / 4


def test_a_crop_does_not_keep_the_whole_image(tmp_path):
    noise((64, 640)).save(tmp_path / "tall.png")
    loaded = loading.load(str(tmp_path / "tall.png"), GridRule((16, 16), 0, ((4, 4),)))
    assert loaded.pixels.shape == (64, 64, 3)
    assert loaded.pixels.untyped_storage().nbytes() == loaded.bytes
