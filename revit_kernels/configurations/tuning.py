"""The tuner: runs every candidate of a kernel on a GPU, drops what is wrong, and keeps what is fastest."""

import importlib
import math
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import torch

from revit_kernels import configurations
from revit_kernels.configurations import machine_code
from revit_kernels.configurations.tables import NEAREST, Row, Table, read
from revit_kernels.dispatch import OPS, load

Clock = Callable[[Callable[[], object], torch.device], float]  # seconds of a call
ROUNDS = 20
_busy: ContextVar[bool] = ContextVar("a kernel is being tuned", default=False)
_lock = Lock()


def tiled(op: str):
    """The module of the op's tiles, or None if its kernels have none."""
    name = f"revit_kernels.ops.{op}.tiles"
    return importlib.import_module(name) if find_spec(name) else None


def kernels(ops=OPS, arch: int | None = None) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(op, kernel, shape) of every row that a table lists, or that of one architecture does."""
    for op in ops:
        if module := tiled(op):
            listed = getattr(module, "listed", None) if arch else None
            for kernel, shapes in module.SHAPES.items():
                yield from ((op, kernel, shape) for shape in shapes if not listed or listed(kernel, arch, **shape))


def events(call: Callable[[], object], device: torch.device) -> float:
    """The median of the seconds that the device takes for a call, its second-level cache cleared before each."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device=device)
    times = []
    for _ in range(ROUNDS + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in times[3:])


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _outputs(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _as_right(actual, rough, exact, eps: float) -> bool:
    """Whether the error against float64 is at most twice that of the reference in the same dtype, plus rounding.

    eps: of the arguments; statistics in fp32 are of numbers that were rounded to their dtype
    """
    for ours, theirs, truth in zip(_outputs(actual), _outputs(rough), _outputs(exact)):
        if ours.numel():
            rounding = eps * truth.abs().max()
            allowed = 2 * ((theirs - truth).abs().max() + rounding)
            if not (ours - truth).abs().max() <= allowed:
                return False
    return True


def complaint(op: str, kernel: str, tiles: dict[str, int], shape: dict[str, int], arch: int) -> str | None:
    """Why the compiler's result for the tiles is not to run: spills, too much shared memory, no code at all."""
    arch = max((known for known in machine_code.SHARED if known <= arch), default=min(machine_code.SHARED))
    try:
        spec = machine_code.specification(op, kernel, tiles, **shape)
        return machine_code.compiled(spec, arch).complaint
    except Exception as error:  # whatever a compiler raises for tiles it cannot take
        return f"does not compile: {' '.join(str(error).split())[:120]}"


def tune(
    op: str,
    kernel: str,
    device: torch.device,
    shape: dict[str, int],
    clock: Clock = events,
    complain: Callable[..., str | None] | None = complaint,
    candidates: list[dict[str, int]] | None = None,
) -> Row:
    """The row of the fastest tiles for a shape, those of today among the candidates.

    A shape without a length that its op's LENGTHS ask for is measured at each of them, and the tiles with the least
    mean of the logarithms of the time are taken.

    complain: why tiles are not to be tried (None: try all); clock: seconds of a call on a device

    Raises RuntimeError where no candidate runs and is right.
    """
    module, arch = tiled(op), configurations.architecture(device)
    lengths = getattr(module, "LENGTHS", ()) if "length" not in shape else ()
    shapes = [shape | {"length": length} for length in lengths] or [shape]
    backends = load(op, "triton"), load(op, "reference")
    trials = []
    for one in shapes:
        step, arguments = module.trial(kernel, device, **one)
        ours, reference = (getattr(backend, step) for backend in backends)
        exact = reference(*map(_wide, arguments))
        trials.append((ours, arguments, reference(*arguments), exact))
    tries = [module.rule(kernel, **shape), *(module.candidates(kernel, **shape) if candidates is None else candidates)]
    tries = [tiles for i, tiles in enumerate(tries) if tiles not in tries[:i]]
    best, reasons = None, []
    for tiles in tries:
        why = complain and complain(op, kernel, tiles, shape, arch)
        if not why:
            try:
                with configurations.using(op, kernel, tiles):
                    why, times = _timed(trials, device, clock)
            except Exception as error:  # what a launch raises for too large a tile differs from Triton to Triton
                why = " ".join(str(error).split())[:120]
        if why:
            reasons.append(f"{tiles}: {why}")
            continue
        score = statistics.mean(math.log(seconds) for seconds in times)
        if best is None or score < best[0]:
            best = score, Row(shape, tiles, source=_source(device), microseconds=round(1e6 * math.exp(score), 2))
    if best is None:
        raise RuntimeError(f"{op}.{kernel} at {shape}: no candidate ran; the last of {len(reasons)}: {reasons[-1]}")
    return best[1]


def _timed(trials, device, clock) -> tuple[str | None, list[float]]:
    """Why the tiles in use are wrong, if they are, and their seconds for each trial."""
    times = []
    for ours, arguments, rough, exact in trials:
        floats = [x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if not _as_right(ours(*arguments), rough, exact, max(torch.finfo(dtype).eps for dtype in floats)):
            return "wrong results", []
        times.append(clock(partial(ours, *arguments), device))
    return None, times


def _source(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return f"{name}, {date.today().isoformat()}"


# ------------------------------------------------------------------ at first use


def cache_file(device: torch.device) -> Path:
    """The user's own table for this kind of GPU: where REVIT_TUNE=1 keeps what it found."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Path(root) / "revit_kernels" / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"


def _cached(device: torch.device) -> Table:
    path, arch = cache_file(device), configurations.architecture(device)
    empty = Table(arch, "measured at first use", {}, str(path))
    if not path.exists():
        return empty
    try:
        return read(str(path))
    except ValueError as error:
        warnings.warn(f"{error}; it is begun anew", RuntimeWarning, stacklevel=2)
        return empty


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tunable(place) -> bool:
    return isinstance(place, torch.device) and place.type == "cuda"


def at_first_use(op: str, kernel: str, place, shape: dict[str, int]) -> tuple[dict[str, int] | None, bool]:
    """The tiles tuned for this shape, now or before, and whether to remember them (None: that there are none).

    Nothing is tuned while a CUDA graph is captured (what is timed would be recorded), nor while something else is.
    A length is no part of what is kept: see the tiles of attention.
    """
    if not _tunable(place):
        return None, True
    shape = {name: value for name, value in shape.items() if name not in NEAREST}
    row = _cached(place).find(op, kernel, shape)
    constants = configurations.rule(op, kernel, **shape).keys()  # an older kernel had others
    if row is not None and row.tiles.keys() == constants:
        return row.tiles, True
    if _capturing(place) or _busy.get() or not _lock.acquire(blocking=False):
        return None, False
    token = _busy.set(True)
    try:
        with torch.no_grad(), torch.cuda.device(place) if place.type == "cuda" else nullcontext():
            row = tune(op, kernel, place, shape)
        read.cache_clear()  # another process may have added rows meanwhile
        _cached(place).with_row(op, kernel, row).write(cache_file(place))
        read.cache_clear()
    except (RuntimeError, OSError) as error:
        warnings.warn(f"{op}.{kernel} at {shape} stays as it is: {error}", RuntimeWarning, stacklevel=2)
        return None, True
    finally:
        _busy.reset(token)
        _lock.release()
    return row.tiles, True
