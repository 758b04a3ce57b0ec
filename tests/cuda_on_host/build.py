"""Compiles csrc/*/cuda.cu as C++ against cuda_on_host.h and prints the path of the library, for REVIT_CUDA_ON_HOST.

Objects and libraries stay in the machine's temporary folder, under a hash of all that went into them.
"""

import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
HEADER = Path(__file__).with_name("cuda_on_host.h")
HEADERS = [HEADER, *(Path(__file__).with_name(f"{name}_on_host.h") for name in ("checks", "hopper"))]
FLAGS = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
FLAGS += [f"-I{path}" for path in include_paths()]
# A vector of numbers is read as words of 32 bits, which is what GPUs do, but not what C++ lets its optimiser expect.
CXX = [os.environ.get("CXX", "g++"), *FLAGS, "-O1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Werror"]
CXX += ["-Wno-unknown-pragmas", "-include", str(HEADER)]
# Has the compiler call checks_on_host.h for every access to memory, and for a vector off its boundary.
CHECKS = ["-fsanitize=thread,alignment,bounds", "--param=tsan-instrument-func-entry-exit=0"]


def sources() -> dict[str, Path]:
    """The cuda.cu of each op that has one."""
    return {path.parent.name: path for path in sorted(ROOT.glob("csrc/*/cuda.cu"))}


def cached(name: str, command: list[str], contents: list[bytes]) -> Path:
    """The file `name` that the command writes to the path appended to it, from these contents."""
    key = hashlib.sha256(repr((command, torch.__version__, os.getuid())).encode() + b"\0".join(contents)).hexdigest()
    path = Path(tempfile.gettempdir(), f"revit_cuda_{key[:24]}", name)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{os.getpid()}_{name}")
        done = subprocess.run([*command, str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-5000:]}")
        partial.rename(path)
    return path


def contents(source: Path) -> list[bytes]:
    """All of this repository that the source may include, and itself."""
    shared = [*ROOT.glob("csrc/cuda/*.h"), ROOT / "csrc/pos_embed/interpolation.h"]
    headers = {*source.parent.glob("*.h"), *shared}
    return [path.read_bytes() for path in (source, *sorted(headers))]


def sanitizer() -> str:
    """LD_PRELOAD for the bounds of tensors to be known; empty where the compiler brings no address sanitizer."""
    names = ("libasan.so", "libstdc++.so")  # the first looks for the second, where exceptions are thrown, as it starts
    found = [
        subprocess.run([CXX[0], f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return " ".join(found) if all(os.path.isabs(path) for path in found) else ""


def build(checked: bool = False) -> Path:
    """The path of the library; raises RuntimeError with what the compiler said."""
    extra = CHECKS if checked else []

    def compiled(source):
        command = [*CXX, *extra, "-x", "c++", "-c", str(source), "-o"]
        return cached(f"{source.parent.name}.o", command, [*(path.read_bytes() for path in HEADERS), *contents(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources().values()))
    link = [
        CXX[0],
        "-shared",
        *map(str, objects),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch_cpu",
        "-o",
    ]
    return cached("cuda_on_host.so", link, [path.read_bytes() for path in objects])


def faults() -> Path:
    """The program of kernels with faults, built with checks."""
    folder = Path(__file__).parent
    headers = [*HEADERS, folder / "faults.h", *sorted(ROOT.glob("csrc/cuda/*.h"))]

    def compiled(name):
        source = folder / f"{name}.cpp"
        parts = [path.read_bytes() for path in (source, *headers)]
        return cached(f"{name}.o", [*CXX, *CHECKS, "-c", str(source), "-o"], parts)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, ("faults", "hopper_faults")))
    return cached("faults", [CXX[0], *map(str, objects), "-o"], [path.read_bytes() for path in objects])


if __name__ == "__main__":
    print(build())
