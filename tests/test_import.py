"""What importing the package does, and what `python -m revit_kernels` says."""

import subprocess
import sys

from revit_kernels.__main__ import table
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
    lines = done.stdout.splitlines()
    assert any(line.split() == list(BACKENDS) for line in lines)
    for op in OPS:
        rows = [line.split()[1:] for line in lines if line.split()[:1] == [op]]
        assert rows and all(len(row) == len(BACKENDS) and row.count("runs") == 1 for row in rows), (op, rows)
    assert "there is no" not in done.stdout


def test_a_table_says_each_reason_once():
    everywhere = "needs a CUDA tensor, got one on cpu"
    found = {
        "attention": {"cuda": "not built", "cudnn": everywhere, "triton": everywhere, "reference": None},
        "linear": {"vendor": None, "triton": everywhere, "reference": None},
        "pool": {"cuda": "not built", "triton": "no kernel for torch.float64", "reference": None},
    }
    assert [line.split() for line in table(found)[:4]] == [
        list(BACKENDS),
        ["attention", "no", "-", "no", "-", "-", "no", "runs"],
        ["linear", "-", "-", "-", "-", "runs", "no", "can"],
        ["pool", "no", "-", "-", "-", "-", "no", "runs"],
    ]
    assert table(found)[4:] == [
        "  cuda: not built",
        f"  cudnn, triton (attention, linear): {everywhere}",
        "  triton (pool): no kernel for torch.float64",
    ]
