"""`python -m revit_kernels`: which backend runs which op here, why the others do not, versions and devices."""

import importlib
import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec

import torch

from revit_kernels import __version__, measured
from revit_kernels.dispatch import BACKENDS, OPS, refusal, requested_backend
from revit_kernels.ops.attention import flash_attn


def versions() -> list[str]:
    names = ("torch", "triton", "timm", "numpy", "pillow")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return [f"revit_kernels {__version__}", f"python {platform.python_version()}", *found]


def devices() -> list[str]:
    cpu = f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [cpu, *(f"{gpu}: {torch.cuda.get_device_name(gpu)}, measured: {tables(gpu)}" for gpu in gpus)]


def tables(gpu: torch.device) -> str:
    """Of which choices there are measurements for this kind of GPU."""
    return ", ".join(measured.of(gpu)) or "nothing, so tiles and backends are as the rules say"


def has(op: str, backend: str) -> bool:
    """Whether there is such a kernel, built or not."""
    return find_spec(f"revit_kernels.ops.{op}.{backend}") is not None


def verdicts(device: str, dtype: torch.dtype) -> dict[str, dict[str, str | None]]:
    """Why a backend does not take small tensors of this dtype, None if it does, by op and by each backend it has."""
    samples = {op: importlib.import_module(f"revit_kernels.ops.{op}").sample(device, dtype) for op in OPS}
    return {op: {b: refusal(op, b, *sample) for b in BACKENDS if has(op, b)} for op, sample in samples.items()}


def table(found: dict[str, dict[str, str | None]]) -> list[str]:
    """The verdicts, a line per op: `runs` for the backend that dispatch takes, `can`, `no`, or `-` for no such kernel.
    Then a line for each reason for a `no`."""
    lines = ["  " + f"{'':20}" + "".join(f"{name:12}" for name in BACKENDS).rstrip()]
    reasons = {}  # the ops, by reason and backend
    for op, verdict in found.items():
        first = next((backend for backend, why in verdict.items() if why is None), None)
        cells = ("-" if b not in verdict else "no" if verdict[b] else "runs" if b == first else "can" for b in BACKENDS)
        lines.append("  " + f"{op:20}" + "".join(f"{cell:12}" for cell in cells).rstrip())
        for backend, why in verdict.items():
            if why:
                reasons.setdefault(why, {}).setdefault(backend, []).append(op)
    for why, backends in reasons.items():
        names = []
        for backend, ops in backends.items():
            every = len(ops) == sum(bool(verdict.get(backend)) for verdict in found.values())
            names.append(backend if every else f"{backend} ({', '.join(ops)})")
        lines.append(f"  {', '.join(names)}: {why}")
    return lines


def flash_attention(x: torch.Tensor) -> list[str]:
    """Which FlashAttention the backend flash_attn runs on tensors like x; for each other a line: why it does not."""
    steps = {}  # by what is said of them
    for step in ("forward", "backward"):
        found = {version.title(): why for version, why in flash_attn.verdicts(x, step == "backward").items()}
        runs = next((name for name, why in found.items() if why is None), "none")
        steps.setdefault((runs, *(f"  {name}: {why}" for name, why in found.items() if why)), []).append(step)
    return [line for (runs, *rest), of in steps.items() for line in (f"flash_attn, {' and '.join(of)}: {runs}", *rest)]


def main() -> None:
    print(", ".join(versions()))
    print("\n".join(devices()))
    if requested := requested_backend():
        print(f"REVIT_BACKEND={requested}: that backend alone, whatever runs below")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        tables = {}  # the dtypes, by what is said of them
        for dtype in (torch.float32, torch.bfloat16):
            lines = "\n".join(table(verdicts(device, dtype)))
            tables.setdefault(lines, []).append(str(dtype).removeprefix("torch."))
        for lines, dtypes in tables.items():
            print(f"\n{device}, {' and '.join(dtypes)}:\n{lines}")
        if device == "cuda":
            print("\n" + "\n".join(flash_attention(torch.zeros(4, 2, 64, device=device, dtype=torch.bfloat16))))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone: what it wanted it has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
