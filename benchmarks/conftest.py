"""What every benchmark shares: a clock on the device, this machine's own ceilings, and the duel with a rival."""

import json
import os
import platform
import shutil
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median, quantiles

import pytest
import report
import summary
import torch

from revit_kernels.adaptive.costs import device_name as model_name
from revit_kernels.ops import linear

CUDA = torch.cuda.is_available()
TINY = bool(os.environ.get("REVIT_BENCH_TINY"))  # to see that all of it runs: the ceilings mean nothing then
DEVICE = "cuda" if CUDA else "cpu"
PACKAGES = ("torch", "triton", "timm", "openvino", "nncf", "onnxruntime", "zentorch", "flash_attn", "numpy")


ROWS = pytest.StashKey[list]()  # (nodeid, extra_info) of each duel


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every benchmark, not the selection of minutes; takes hours")
    parser.addoption("--rounds", type=int, help="at most so many rounds of every duel: to see that all of them run")


def pytest_configure(config):
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # its own table has no rivals


def pytest_collection_modifyitems(config, items):
    """Where folders alone were named, and no -k: the selection, unless --all is given."""
    whole = all(Path(argument).is_dir() for argument in config.args)
    if config.getoption("--all") or config.option.keyword or not whole:
        return
    kept = [item for item in items if "benchmarks/" not in item.nodeid or summary.is_default(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.section(f"{device_name()}: ours against what a user would run instead")
        width = shutil.get_terminal_size((120, 24)).columns
        for line in summary.table(rows, report.case, report.RIVALS, width):
            terminalreporter.line(line)


class Tick:
    """A moment on the device's own timeline. Only the subtraction waits for the device."""

    def __init__(self):
        if CUDA:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.seconds = time.perf_counter()

    def __sub__(self, start):
        if CUDA:
            self.event.synchronize()
            return start.event.elapsed_time(self.event) / 1e3
        return self.seconds - start.seconds


def _seconds(call) -> float:
    start = Tick()
    call()
    return Tick() - start


def _best(call, rounds=7) -> float:
    call()
    return min(_seconds(call) for _ in range(rounds))


@cache
def copy_ceiling() -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    source = torch.ones((1 << 31 if CUDA else 1 << (20 if TINY else 28)) // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source))


@cache
def matmul_ceiling(dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product, by the fastest library there is."""
    size = 8192 if CUDA else 128 if TINY else 2048
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, (size, size), dtype=dtype, device=DEVICE) for _ in range(2))
        return 2 * size**3 / _best(lambda: torch._int_mm(a, b), rounds=15)
    a = torch.randn(size, size, device=DEVICE).to(dtype)
    b = torch.nn.Parameter(torch.randn(size, size, device=DEVICE).to(dtype), requires_grad=False)
    return 2 * size**3 / min(_best(call, rounds=15) for call in (lambda: a @ b, lambda: linear(a, b)))


@cache
def device_name() -> str:
    name = model_name(DEVICE)
    if CUDA:
        return name
    bf16 = torch.cpu._is_avx512_bf16_supported()
    instructions = "AVX512-BF16" if bf16 else torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {instructions}"


@cache
def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if CUDA:
        found["cuda"] = torch.version.cuda
    return found


def peak_memory(call) -> int:
    """The most bytes that one call holds at a time of torch's allocator, beyond what was held before."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture
def duel(benchmark, request):
    """Times `ours` in turn with `theirs`, so that drift of clocks or load affects both equally.

    duel(ours, theirs, rounds=30, warmup=None, bytes=None, flops=None, rival=None, dtype=None, latency=False,
         series=False, per=1)

    warmup:  rounds before those; by default a fifth as many, and 3 at least
    bytes:   what one call of `ours` moves at least
    flops:   what one call of `ours` computes
    rival:   what `theirs` is; by default the benchmark's parameter `rival`
    dtype:   whose matrix product is the ceiling; by default the benchmark's parameter `dtype`, else fp32
    latency: on a GPU, count the host's time to launch too; by default kernels are queued before the clock starts
    series:  every call is another piece of one task, which both get in the same order: the ratio is of the sums, and
             the times are means
    per:     what one call does so many times; times are then of one of them (bytes and flops are still of the call)

    `theirs.settings`, where the rival has some, says which settings it does best with.
    """
    benchmark._timer = Tick
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})

    def run(
        ours,
        theirs,
        rounds=30,
        warmup=None,
        bytes=None,
        flops=None,
        rival=None,
        dtype=None,
        latency=False,
        series=False,
        per=1,
    ):
        rounds = min(rounds, request.config.getoption("--rounds") or rounds)
        dtype = dtype or parameters.get("dtype", torch.float32)
        theirs_seconds = []

        def wait():
            if CUDA and not latency:
                torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host runs ahead

        def setup():
            wait()
            theirs_seconds.append(_seconds(theirs))
            wait()

        warmup = max(3, rounds // 5) if warmup is None else min(warmup, rounds)
        benchmark.pedantic(ours, setup=setup, warmup_rounds=warmup, rounds=rounds)
        if benchmark.disabled:
            return
        seconds = list(benchmark.stats.stats.data)
        theirs_seconds = theirs_seconds[-len(seconds) :]
        ratios = [theirs / ours for theirs, ours in zip(theirs_seconds, seconds)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        middle = mean if series else median
        once, theirs_once = middle(seconds), middle(theirs_seconds)
        row = {
            "rival": rival or parameters.get("rival", "rival"),
            "speedup": theirs_once / once if series else median(ratios),
            "speedup_quartiles": [low, high],
            "ours_ms": once / per * 1e3,
            "rival_ms": theirs_once / per * 1e3,
            "dtype": str(dtype).removeprefix("torch."),
            "ours_peak_bytes": peak_memory(ours),
            "rival_peak_bytes": peak_memory(theirs),
            "device": device_name(),
            "versions": versions(),
            "commit": commit(),
        }
        if hasattr(theirs, "settings"):
            row["settings"] = theirs.settings
        if bytes:
            row["gb_per_s"] = bytes / once / 1e9
            row["copy_ceiling_gb_per_s"] = copy_ceiling() / 1e9
            row["percent_of_copy"] = 100 * row["gb_per_s"] / row["copy_ceiling_gb_per_s"]
        if flops:
            row["tflop_per_s"] = flops / once / 1e12
            row["matmul_ceiling_tflop_per_s"] = matmul_ceiling(dtype) / 1e12
            row["percent_of_matmul"] = 100 * row["tflop_per_s"] / row["matmul_ceiling_tflop_per_s"]
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append((request.node.nodeid, row))

    yield run
    if (rows := os.environ.get("REVIT_BENCH_ROWS")) and "speedup" in benchmark.extra_info:
        with open(rows, "a") as file:  # at once: a run that is killed keeps what it has measured
            file.write(json.dumps({"name": request.node.name, "extra_info": benchmark.extra_info}) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks):
    """A benchmark that was interrupted has no times, and would cost the others theirs."""
    benchmarks[:] = [bench for bench in benchmarks if bench.stats.data]
