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
HEADERS = [HEADER, Path(__file__).with_name("hopper_on_host.h")]
FLAGS = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
FLAGS += [f"-I{path}" for path in include_paths()]
# A vector of numbers is read as words of 32 bits, which is what GPUs do, but not what C++ lets its optimiser expect.
CXX = [os.environ.get("CXX", "g++"), *FLAGS, "-O1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Werror"]
CXX += ["-Wno-unknown-pragmas", "-include", str(HEADER)]
# Sees accesses out of bounds in global and shared memory; not on the stack, of which a fiber has one of its own.
SANITIZE = ["-g", "-fsanitize=address", "--param=asan-stack=0", "-D_GLIBCXX_SANITIZE_VECTOR"]


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
    """LD_PRELOAD for a library that is built to sanitize; empty where the compiler brings no sanitizer."""
    names = ("libasan.so", "libstdc++.so")  # the first looks for the second, where exceptions are thrown, as it starts
    found = [
        subprocess.run([CXX[0], f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return " ".join(found) if all(os.path.isabs(path) for path in found) else ""


def build(sanitize: bool = False) -> Path:
    """The path of the library; raises RuntimeError with what the compiler said."""
    extra = SANITIZE if sanitize else []

    def compiled(source):
        command = [*CXX, *extra, "-x", "c++", "-c", str(source), "-o"]
        return cached(f"{source.parent.name}.o", command, [*(path.read_bytes() for path in HEADERS), *contents(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources().values()))
    link = [
        CXX[0],
        *extra,
        "-shared",
        *map(str, objects),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch_cpu",
        "-o",
    ]
    return cached("cuda_on_host.so", link, [path.read_bytes() for path in objects])


if __name__ == "__main__":
    print(build())
