"""What a source distribution and a wheel hold. Nothing is compiled."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import revit_kernels

ROOT = Path(__file__).parent.parent
TAG = """
import setuptools  # brings distutils, which Python 3.12 does not have
import distutils.core
wheel = distutils.core.run_setup("setup.py", stop_after="init").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
print(*wheel.get_tag())
"""


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_wheel_serves_every_python():
    """The libraries use torch's stable ABI and nothing of Python's, so no Python version belongs into the tag."""
    python, abi, platform = run("-c", TAG).splitlines()[-1].split()
    assert (python, abi) == ("py3", "none") and platform.startswith("linux_")


def test_an_sdist_holds_what_it_takes_to_build(tmp_path):
    run("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    name = f"revit_kernels-{revit_kernels.__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        held = {file.removeprefix(f"{name}/") for file in archive.getnames()}
    wanted = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*")}
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "revit_kernels/py.typed"}
    wanted |= {str(file.relative_to(ROOT)) for file in (ROOT / "revit_kernels").rglob("*.py")}
    assert not wanted - held
    assert not {file for file in held if file.endswith(".so")}


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "tools" / "check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_library_runs_on_the_system_that_its_wheel_names(check):
    """What is built on a newer system needs nothing that manylinux_2_28 lacks."""
    library = ROOT / "revit_kernels" / "_cpu.so"
    if not library.exists() or not shutil.which("objdump"):
        pytest.skip("no library, or no objdump")
    assert check.too_new(library) == []
    assert check.too_new(library, dict.fromkeys(check.NEWEST, (0,)))  # it does find some


def test_a_wheel_that_holds_too_little_or_too_much_is_refused(check, tmp_path):
    path = tmp_path / "revit_kernels-0-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("revit_kernels/py.typed", "")
        archive.writestr("csrc/pool/cpu.cpp", "")
    found = check.problems(path)
    assert "revit_kernels/_cpu.so is missing" in found and "csrc/pool/cpu.cpp does not belong there" in found
    assert "revit_kernels/serving/page.html is missing" in found and "revit_kernels/py.typed is missing" not in found
