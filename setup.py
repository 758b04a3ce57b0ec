"""Builds csrc/<op>/cpu.cpp into revit_kernels/_cpu.so and, where nvcc is found, csrc/<op>/cuda.cu into _cuda.so.

Both use only PyTorch's stable ABI: one build serves every torch >= 2.10, and needs no GPU nor a CUDA build of torch.
REVIT_CUDA_ARCHS ("80;90a" by default) names the GPUs to build for, oldest first: those newer than the last compile its
PTX as they load it. 90a is Hopper with the instructions that no other GPU has; newer ones get the PTX of 90. Empty
leaves the CUDA kernels out. REVIT_SANITIZE ("address,undefined") builds the CPU kernels with these sanitizers of GCC.
Without a C++ compiler the package still installs: its Triton and reference backends need none.
The libraries do not use Python's API, so a wheel is tagged py3-none-<platform>: one wheel serves every Python.
REVIT_PLATFORM ("manylinux_2_28_x86_64") names the platform; tools/wheel checks that it is true.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib import import_module
from importlib.util import find_spec

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Icsrc"]
# Instruction sets are chosen at run time, in the kernels. No -ffast-math: NaN in a packed tail must stay where it is.
CPU_FLAGS = [*FLAGS, "-fPIC", "-fopenmp-simd", "-Wall", "-Wno-unknown-pragmas"]
if sanitizers := os.environ.get("REVIT_SANITIZE"):
    CPU_FLAGS += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1", "-O1"]
    CPU_FLAGS += ["-include", "tests/thread_sanitizer.h"] if "thread" in sanitizers else []
ARCHS = [arch for arch in os.environ.get("REVIT_CUDA_ARCHS", "80;90a").split(";") if arch]
CUDA_FLAGS = [*FLAGS, "-DUSE_CUDA", "-Xcompiler=-fPIC", "--threads=0"]
CUDA_FLAGS += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
NEWEST = [arch.rstrip("af") for arch in ARCHS[-1:]]
CUDA_FLAGS += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in NEWEST]
CXX = os.environ.get("CXX", "g++")
PORTABLE = "csrc/portable"  # so that a library built here runs on the glibc of manylinux_2_28


class Build(build_ext):
    """Compiles the files of each library side by side, on all cores, and links them."""

    def build_extension(self, ext):
        from torch.utils.cpp_extension import include_paths, library_paths  # here: an sdist needs no torch

        compiler = ["nvcc", *CUDA_FLAGS] if ext.name.endswith("cuda") else [CXX, *CPU_FLAGS]
        output = self.get_ext_fullpath(ext.name)
        folder = os.path.join(self.build_temp, ext.name)
        for path in (os.path.dirname(output), folder):
            os.makedirs(path, exist_ok=True)
        objects = [os.path.join(folder, source.replace("/", "_") + ".o") for source in ext.sources]
        include = [f"-I{path}" for path in include_paths()]
        commands = [[*compiler, *include, "-c", source, "-o", to] for source, to in zip(ext.sources, objects)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.spawn, commands))
        torch = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
        hidden = f"{'-Xlinker ' if compiler[0] == 'nvcc' else '-Wl,'}--version-script={PORTABLE}.map".split()
        self.spawn([*compiler, "-shared", *objects, *torch, *hidden, "-o", output])

    def get_ext_filename(self, name):
        return f"{name.replace('.', '/')}.so"


def extension(device, sources, compiler):
    files = sorted(glob(sources))
    files.append(f"{PORTABLE}.cpp")
    headers = glob("csrc/*/*.h")
    if not shutil.which(compiler):
        return []
    # An nvcc too old for the code, or for the compiler beside it, costs the CUDA kernels (with a warning), no more.
    return [Extension(f"revit_kernels._{device}", files, depends=headers, optional=device == "cuda")]


def wheel_command():
    """bdist_wheel with our tag, where this setuptools (from 70.1 on) or an installed wheel has that command."""
    name = "setuptools.command.bdist_wheel"
    name = name if find_spec(name) else "wheel.bdist_wheel" if find_spec("wheel") else None
    if name is None:
        return {}

    class Wheel(import_module(name).bdist_wheel):
        def get_tag(self):
            return ("py3", "none", os.environ.get("REVIT_PLATFORM") or super().get_tag()[2])

    return {"bdist_wheel": Wheel}


cuda = extension("cuda", "csrc/*/cuda.cu", "nvcc") if ARCHS else []
setup(
    ext_modules=[*extension("cpu", "csrc/*/cpu.cpp", CXX), *cuda],
    cmdclass={"build_ext": Build, **wheel_command()},
)
