"""Types: every public argument and result is annotated, and pyright accepts what README.md and docs/ show to users."""

import inspect
import json
import subprocess
import sys

import pytest
from test_docs import PAGES, blocks, name

import revit_kernels
from revit_kernels import engines, ops

PUBLIC = {n: getattr(revit_kernels, n) for n in revit_kernels.__all__ if n != "ops"}
PUBLIC |= {f"ops.{n}": getattr(ops, n) for n in ops.__all__}
PUBLIC |= {f"engines.{n}": getattr(engines, n) for n in engines.__all__}


def functions(public):
    """The public functions of a public name: itself, or the methods that a class of ours has or inherits from ours."""
    if not inspect.isclass(public):
        return [public]
    ours = [c for c in public.__mro__ if c.__module__.startswith("revit_kernels")]
    members = [getattr(m, "__func__", m) for c in ours for n, m in vars(c).items() if n[0] != "_" or n == "__call__"]
    return [public.__init__, *members]


@pytest.mark.parametrize("public", PUBLIC)
def test_public_arguments_and_results_are_annotated(public):
    for function in filter(inspect.isfunction, functions(PUBLIC[public])):
        found = inspect.signature(function)
        bare = [p.name for p in found.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]
        if function.__name__ != "__init__" and found.return_annotation is found.empty:
            bare.append("its result")
        assert not bare, f"{function.__qualname__} has no type for {', '.join(bare)}"


def test_pyright_accepts_the_code_of_the_documentation(tmp_path):
    for page in PAGES:
        code = "\n".join(code for _, code in blocks(page.read_text(), "python"))
        (tmp_path / f"{page.stem}.py").write_text(code)
    config = {"typeCheckingMode": "basic", "include": ["."], "extraPaths": [str(PAGES[0].parent)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    result = subprocess.run([*command, "--outputjson"], capture_output=True, text=True)
    try:
        report = json.loads(result.stdout)
    except json.JSONDecodeError:
        pytest.skip(f"pyright does not start: {result.stderr[-300:]}")
    assert report["summary"]["filesAnalyzed"] == len(PAGES), [name(page) for page in PAGES]
    errors = [d for d in report["generalDiagnostics"] if d["severity"] == "error"]
    assert not errors, "\n".join(f"{d['file']}:{d['range']['start']['line'] + 1} {d['message']}" for d in errors)
