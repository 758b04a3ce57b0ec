"""What importing the package does, and what `python -m revit_kernels` says."""

import subprocess
import sys

from revit_kernels.dispatch import BACKENDS, OPS


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_import_is_light():
    """Neither Triton nor a compiled library is loaded by an import: a broken one must not break `import`."""
    code = """
import sys, revit_kernels
libraries = [line for line in open("/proc/self/maps") if "revit_kernels/_c" in line]
print([name for name in sys.modules if name.split(".")[0] in ("triton", "timm")], libraries)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []"


def test_public_names():
    import revit_kernels

    assert len(revit_kernels.__all__) <= 15
    assert all(hasattr(revit_kernels, name) for name in revit_kernels.__all__)


def test_table():
    done = run("-m", "revit_kernels")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and "threads" in done.stdout
    for op in OPS:
        for backend in BACKENDS:
            assert any(line.split()[:2] == [op, backend] for line in done.stdout.splitlines()), (op, backend)
        assert any(line.split()[0] == op and line.split()[2] == "runs" for line in done.stdout.splitlines() if line)
