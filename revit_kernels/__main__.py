"""`python -m revit_kernels`: which backend runs which op here, why the others do not, versions and devices."""

import importlib
import platform
import sys
from importlib import metadata

import torch

from revit_kernels import __version__
from revit_kernels.configurations import architecture
from revit_kernels.configurations.tables import shipped
from revit_kernels.dispatch import BACKENDS, OPS, refusal


def versions() -> list[str]:
    names = ("torch", "triton", "timm", "flash-attn", "numpy", "pillow")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return [f"revit_kernels {__version__}", f"python {platform.python_version()}", *found]


def devices() -> list[str]:
    cpu = f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [f"cuda:{i}: {torch.cuda.get_device_name(i)}, {tiles(i)}" for i in range(torch.cuda.device_count())]
    return [cpu, *gpus]


def tiles(gpu: int) -> str:
    """Which table of tiles the Triton kernels use there."""
    table = shipped(architecture(torch.device("cuda", gpu)))
    return f"tiles of sm_{table.architecture} ({table.source})" if table else "tiles by rule"


def table(device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """One line per op and backend: `runs` for the one that dispatch takes, `can`, or the reason why not."""
    lines = []
    for op in OPS:
        sample = importlib.import_module(f"revit_kernels.ops.{op}").sample(device, dtype)
        taken = False
        for backend in BACKENDS:
            why = refusal(op, backend, *sample)
            verdict = why if why else "can" if taken else "runs"
            taken = taken or not why
            lines.append(f"  {op:12} {backend:11} {verdict}")
    return lines


def main() -> None:
    print(", ".join(versions()))
    print("\n".join(devices()))
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for dtype in (torch.float32, torch.bfloat16):
            print(f"\nop x backend on {device}, {str(dtype).removeprefix('torch.')}:")
            print("\n".join(table(device, dtype)))


if __name__ == "__main__":
    sys.exit(main())
