"""What a source distribution and a wheel hold. Nothing is compiled."""

import subprocess
import sys
import tarfile
from pathlib import Path

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
