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
ROOT = Path(__file__).parents[1]
SYMBOL = re.compile(r"\*UND\*.*\((GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\)\s+(\S+)")


def too_new(library: Path, newest: dict[str, tuple[int, ...]] = NEWEST) -> list[str]:
    """The symbols of a library that a system with those versions lacks."""
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    found = []
    for name, version, symbol in SYMBOL.findall(listed):
        if tuple(map(int, version.split("."))) > newest[name]:
            found.append(f"{symbol} of {name}_{version}")
    return found


def wanted() -> set[str]:
    """The files that a wheel must hold: those of the package, its command, and the CPU library."""
    files = (path for path in (ROOT / "revit_kernels").rglob("*") if path.is_file())
    names = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".so", ".pyc")}
    return names | {"revit_command.py", "revit_kernels/_cpu.so"}


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel."""
    found = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += [f"{name} is missing" for name in sorted(wanted() - set(names))]
        others = {name for name in names if not name.startswith("revit_kernels")} - {"revit_command.py"}
        found += [f"{name} does not belong there" for name in sorted(others)]
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
