"""What importing the package does, and what `python -m revit_kernels` says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import revit_kernels
from revit_kernels.__main__ import table
from revit_kernels.dispatch import BACKENDS, OPS


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_import_is_light():
    """Neither Triton nor a compiled library is loaded by an import: a broken one must not break `import`.

    The ops are registered, and no model is imported.
    """
    code = """
import sys, revit_kernels, torch
libraries = [line for line in open("/proc/self/maps") if "revit_kernels/_c" in line]
unwanted = ("triton", "timm", "transformers", "revit_kernels.models", "revit_kernels.adaptive", "revit_kernels.engines")
print([name for name in sys.modules if name.startswith(unwanted)], libraries)
names = lambda: {name for name in torch._C._dispatch_get_all_op_names() if "revit" in name}
registered = names()
from revit_kernels import *
from revit_kernels import engines, training, serving
print(names() - registered, len(registered) > 15)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] []", "set() True"]


def test_a_command_imports_nothing_of_the_others():
    """Nor does a model's file SymPy or torch.distributed: both take longer than the answer of the main command."""
    code = """
import sys
from revit_kernels import cli, create_model
from revit_kernels.models.registry import SHIPPED
before = set(sys.modules)
cli.parser("infer")
create_model(SHIPPED)
unwanted = ("sympy", "torch.distributed.", "revit_kernels.training.trainer", "revit_kernels.cli.train")
print([name for name in set(sys.modules) - before if name.startswith(unwanted)])
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]"]


def test_public_names():
    assert len(revit_kernels.__all__) <= 15
    assert set(revit_kernels.__all__) <= set(dir(revit_kernels))
    tree = ast.parse(Path(revit_kernels.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert {name: f"revit_kernels.{module}" for name, module in revit_kernels._MODULE_OF.items()} == seen
    with pytest.raises(AttributeError, match="VarLenVit"):
        revit_kernels.VarLenVit  # noqa: B018


def test_any_public_name_may_be_the_first():
    """No order of imports leads into a circle."""
    code = """
import os, revit_kernels
for name in revit_kernels._MODULE_OF:
    if not os.fork():
        os._exit(getattr(revit_kernels, name).__name__ != name)
    assert os.wait()[1] == 0, name
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


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
    everywhere = "needs a CUDA tensor"
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
