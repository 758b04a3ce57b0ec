import pytest
import torch
from contract import DEVICE

from revit_kernels import device_cache
from revit_kernels.device_cache import DeviceCache

device = torch.device(DEVICE)


def make(value):
    return lambda: [torch.tensor([value])]


def test_a_key_is_copied_once():
    cache = DeviceCache()
    (first,) = cache.get("a", device, make(1))
    (again,) = cache.get("a", device, make(2))
    assert first is again
    assert first.device.type == DEVICE and first.item() == 1


def test_the_key_used_longest_ago_goes():
    cache = DeviceCache(size=2)
    for key in "abac":
        cache.get(key, device, make(1))
    assert [cache.get(key, device, make(2))[0].item() for key in "ca"] == [1, 1]
    assert cache.get("b", device, make(2))[0].item() == 2


def test_what_a_capture_saw_stays(monkeypatch):
    kept = []
    monkeypatch.setattr(device_cache, "_CAPTURED", kept)
    cache = DeviceCache(size=1)
    before = cache.get("a", device, make(1))
    monkeypatch.setattr(device_cache, "_capturing", lambda _: True)
    assert cache.get("a", device, make(2)) is before
    assert kept == [before]
    cache.get("b", device, make(3))  # only recorded, so a call outside the capture must not find it
    monkeypatch.setattr(device_cache, "_capturing", lambda _: False)
    assert cache.get("b", device, make(4))[0].item() == 4


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_graph_replays_after_the_cache_moved_on():
    cache, graph = DeviceCache(size=1), torch.cuda.CUDAGraph()
    cache.get("a", device, make(1))
    with torch.cuda.graph(graph):
        total = cache.get("a", device, make(2))[0] + cache.get("b", device, make(3))[0]
    for value in range(4, 8):
        cache.get(value, device, make(value))
    graph.replay()
    assert total.item() == 4
