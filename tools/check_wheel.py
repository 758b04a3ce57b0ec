"""Checks a wheel: its files, and that its libraries need no newer system than its tag says.

python tools/check_wheel.py dist/revit_kernels-0.1.0-py3-none-manylinux_2_28_x86_64.whl
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEWEST = {  # versions of symbols that manylinux_2_28 has
    "GLIBC": (2, 28),
    "GLIBCXX": (3, 4, 24),
    "CXXABI": (1, 3, 11),
    "GCC": (7, 0, 0),
}
FILES = (
    "revit_kernels/_cpu.so",
    "revit_kernels/py.typed",
    "revit_kernels/models/registry.json",
    "revit_kernels/models/shipped/fashion_mnist.safetensors",
    "revit_kernels/models/shipped/fashion_mnist_assigner.safetensors",
)
SYMBOL = re.compile(r"\*UND\*.*\((GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\)\s+(\S+)")


def too_new(library: Path, newest: dict[str, tuple[int, ...]] = NEWEST) -> list[str]:
    """The symbols of a library that a system with those versions lacks."""
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    found = []
    for name, version, symbol in SYMBOL.findall(listed):
        if tuple(map(int, version.split("."))) > newest[name]:
            found.append(f"{symbol} of {name}_{version}")
    return found


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel."""
    found = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += [f"{name} is missing" for name in FILES if name not in names]
        for name in names:
            if name.endswith(".so"):
                needed = too_new(Path(archive.extract(name, folder)))
                found += [f"{name} needs {symbol}" for symbol in needed if "manylinux_2_28" in wheel.name]
    return found


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        wrong = problems(Path(argument))
        size = Path(argument).stat().st_size / 1e6
        print("\n".join(wrong) or f"{argument}: {size:.1f} MB, as its tag says")
        if wrong:
            sys.exit(1)
