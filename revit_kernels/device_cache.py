"""What the host computes for the kernels, on the device: copied without waiting, and kept for captured CUDA graphs."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import accumulate
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_CAPTURED = []  # what a captured graph reads whenever it is replayed: a graph may live as long as the process
_LINE = 16  # int32 numbers in 64 bytes, on which every view of a shared buffer starts: kernels load rows as vectors


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def watched() -> bool:
    """Whether tensors may have no values, or somebody follows what becomes of them: then nothing is kept."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def to_device(arrays: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of CPU tensors on `device`. The copy is queued on the current stream: the host does not wait for it."""
    if device.type == "cpu":
        return arrays
    if device.type != "cuda":
        return [array.to(device) for array in arrays]
    arrays = [array.pin_memory() for array in arrays]
    copies = [array.to(device, non_blocking=True) for array in arrays]
    if _capturing(device):  # a replay reads the host's memory again, and writes the device's
        _CAPTURED.append((arrays, copies))
    return copies


def numbers(values, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """torch.tensor(values, dtype=dtype, device=device), for which the host does not wait."""
    if device.type == "cpu" or watched():
        return torch.tensor(values, dtype=dtype, device=device)
    return to_device([torch.tensor(values, dtype=dtype, device="cpu")], device)[0]


def host_buffer(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor on the CPU to fill and hand to `to_device`; pinned where that is to copy to a GPU.

    It may be let go of at once: torch's allocator gives pinned memory out again only when the copy is done.
    """
    return torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def copied_at_once(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as int32 tensors on `device`, in one copy: views of one buffer, each from a multiple of 64 bytes."""
    starts = list(accumulate([-(-array.size // _LINE) * _LINE for array in arrays], initial=0))
    buffer = host_buffer(starts[-1], dtype=torch.int32, device=device)
    host = buffer.numpy()
    for start, array in zip(starts, arrays):
        host[start : start + array.size] = array.reshape(-1)
    (buffer,) = to_device([buffer], device)
    views = [buffer[start : start + array.size] for start, array in zip(starts, arrays)]
    return [view if array.ndim == 1 else view.view(array.shape) for view, array in zip(views, arrays)]


class DeviceCache:
    """The tensors of the `size` keys used last."""

    def __init__(self, size: int = 64):
        self.size = size
        self._entries = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors of `key` on `device`: those of an earlier call, or what `make()` returns (on the CPU), copied.

        While a CUDA graph is captured nothing is added (a copy that is recorded has not happened yet), and what is
        returned stays allocated for good.
        """
        key = (key, device)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
        if entry is None:
            tensors, capturing = to_device(make(), device), _capturing(device)
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            if not capturing:
                with self._lock:
                    self._entries[key] = tensors, stream, stream and stream.record_event()
                    if len(self._entries) > self.size:
                        self._entries.popitem(last=False)
            return tensors
        tensors, stream, copied = entry
        if _capturing(device):
            _CAPTURED.append(tensors)
        elif stream is not None and (current := torch.cuda.current_stream(device)) != stream:
            current.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(current)
        return tensors


_constants = DeviceCache(2048)  # menus of native aspects are many


def constant(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What `make()` returns (on the CPU), on `device`: made and copied once for a key, which must say all of it."""
    if watched():
        return make().to(device)
    with torch.inference_mode(False):  # else what is kept could not be saved for a backward
        return _constants.get(key, device, lambda: [make()])[0]
