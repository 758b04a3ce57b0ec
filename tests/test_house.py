"""The architecture: which part of the package may import which."""

import ast
from pathlib import Path

import pytest

import revit_kernels

ROOT = Path(revit_kernels.__file__).parent

# Each line may import the lines below it. Names on one line do not import each other.
ORDER = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("serving", "evaluation"),
    ("training",),
    ("adaptive",),
    ("engines",),
    ("models",),
    ("modules",),
    ("data",),
    ("ops",),
    ("measured",),
    ("clips",),
    ("dispatch", "packing"),
    ("native", "device_cache", "grids"),
    ("files", "devices"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
EXCEPTIONS = {("models.vit", "engines"), ("models.video", "engines")}  # model.engine()


def imported(path: Path):
    """The modules of the package that a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            if node.module == "revit_kernels":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("revit_kernels."):
                yield node.module.removeprefix("revit_kernels.")
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("revit_kernels.") for a in node.names if a.name.startswith("revit_kernels.")
            )


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    part = name.split(".")[0]
    upwards = [
        other
        for other in imported(path)
        if other.split(".")[0] != part
        and other != "__version__"
        and (name, other.split(".")[0]) not in EXCEPTIONS
        and LEVEL.get(other.split(".")[0], 0) <= LEVEL[part]
    ]
    assert not upwards, f"{name} imports {upwards}"


def test_ops_import_no_other_backend():
    """A backend stands alone: it knows its reference, and what its op shares."""
    for path in sorted((ROOT / "ops").glob("*/*.py")):
        backends = {"cpu", "cuda", "cudnn", "flash_attn", "triton", "vendor"} - {path.stem}
        if path.stem == "__init__":
            continue
        for other in imported(path):
            assert other.split(".")[-1] not in backends, f"{path} imports {other}"
