#!/usr/bin/env python3
"""The rivals of the GPU benchmarks, for a machine without a network: Linux x86-64, Python 3.12, torch 2.11 for CUDA 13.

    python benchmarks/gpu_rivals.py prepare FOLDER [--only fa3 fa4 ...]   where there is a package registry
    python benchmarks/gpu_rivals.py install FOLDER SITE && . SITE/env.sh  where there is a GPU

`prepare` downloads wheels of fixed versions, no source and no dependency that is not named here. Of large wheels it
keeps what is needed, repacked with xz. It prints what was found and why the rest was not, and exits with 1 only if no
rival is complete.
FlashAttention 2, cuDNN, FlexAttention and padded SDPA are inside torch and need nothing.
"""

import argparse
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

PYTHON = "3.12"
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # pip matches manylinux tags exactly
# As large as the largest file, so that xz finds the similarity of the many variants of a kernel; takes 4.5 GB to pack.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 384 << 20}]


@dataclass(frozen=True)
class Wheel:
    """requirement: with its version; keep: the files wanted, all if empty; those are then packed with xz."""

    requirement: str
    keep: tuple[str, ...] = ()


RIVALS = {
    "fa4": [
        Wheel("flash-attn-4==4.0.0b10"),
        Wheel("nvidia-cutlass-dsl==4.4.2"),
        Wheel("nvidia-cutlass-dsl-libs-base==4.4.2", ("*",)),
        Wheel("quack-kernels==0.3.7"),
        Wheel("apache-tvm-ffi==0.1.9"),
        Wheel("torch-c-dlpack-ext==0.1.5"),
        Wheel("einops==0.8.2"),
    ],
    "fa3": [
        Wheel("xformers==0.0.34", ("xformers/flash_attn_3/*",)),
        Wheel("nvidia-cuda-runtime-cu12==12.9.79", ("*/libcudart.so*",)),  # that build is for CUDA 12
    ],
    "fa2": [Wheel("flash-attn==2.8.3")],  # the kernels inside torch are the same
    "flashinfer": [Wheel("flashinfer-python==0.5.3")],
    "cudnn-frontend": [Wheel("nvidia-cudnn-frontend==1.18.0")],
    "liger": [Wheel("liger-kernel==0.8.5")],
    "timm": [Wheel("timm==1.0.31")],
    "pytest": [
        Wheel("pytest==9.2.0"),
        Wheel("pytest-benchmark==5.3.1"),
        Wheel("py-cpuinfo==9.0.0"),
        Wheel("pluggy==1.7.0"),
        Wheel("iniconfig==2.3.1"),
        Wheel("pytest-xdist==3.8.0"),
        Wheel("execnet==2.1.2"),
        Wheel("expecttest==0.3.0"),
    ],
}
IMPORTS = {  # what shows, on the other machine, that a rival is there
    "fa4": "import flash_attn.cute",
    "fa3": "from revit_kernels.ops.attention.flash_versions import FA3; print(FA3.load().fwd)",
    "fa2": "import flash_attn.flash_attn_interface",
    "flashinfer": "import flashinfer",
    "cudnn-frontend": "import cudnn",
    "liger": "import liger_kernel",
    "timm": "import timm",
    "pytest": "import pytest, pytest_benchmark, xdist, expecttest",
}


def download(requirement: str, folder: Path) -> Path | str:
    """The wheel, or pip's reason."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--platform", "linux_x86_64"]
    for minor in GLIBC:
        command += ["--platform", f"manylinux_2_{minor}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--disable-pip-version-check", requirement]
    before = set(folder.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True)
    found = set(folder.glob("*.whl")) - before
    if done.returncode == 0 and found:
        return found.pop()
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    return errors[-1] if errors else f"pip exits with {done.returncode}"


def repack(wheel: Path, keep: tuple[str, ...], target: Path) -> None:
    """The files of a wheel that match, as a .tar.xz. Raises ValueError if there are none."""
    with zipfile.ZipFile(wheel) as source:
        files = [info for info in source.infolist() if not info.is_dir()]
        wanted = [info for info in files if any(fnmatch(info.filename, pattern) for pattern in keep)]
        if not wanted:
            raise ValueError(f"{wheel.name} holds nothing like {', '.join(keep)}")
        unfinished = target.with_suffix(".part")
        with lzma.open(unfinished, "wb", filters=XZ) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for info in wanted:
                entry = tarfile.TarInfo(info.filename)
                entry.size = info.file_size
                with source.open(info) as file:
                    tar.addfile(entry, file)
        unfinished.rename(target)


def fetch(wheel: Wheel, folder: Path) -> tuple[Path | None, str | None]:
    """The file in the folder, made now or before, or None and the reason."""
    stem = wheel.requirement.replace("==", "-").replace("-", "_")
    target = folder / f"{stem}.tar.xz"
    if wheel.keep and target.exists():
        return target, None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = download(wheel.requirement, Path(scratch))
        if isinstance(found, str):
            return None, found
        if not wheel.keep:
            return found.rename(folder / found.name), None
        try:
            repack(found, wheel.keep, target)
        except ValueError as error:
            return None, str(error)
    return target, None


def prepare(folder: Path, names: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.json"
    found = json.loads(manifest.read_text()) if manifest.exists() else {}
    for name in names:
        files, missing = [], []
        for wheel in RIVALS[name]:
            path, why = fetch(wheel, folder)
            if path:
                files.append(path.name)
                print(f"{name:14} {wheel.requirement:40} {path.stat().st_size / 1e6:7.1f} MB  {path.name}", flush=True)
            else:
                missing.append(f"{wheel.requirement}: {why}")
                print(f"{name:14} {wheel.requirement:40} not found: {why}", flush=True)
        found[name] = {"files": files, "missing": missing}
        manifest.write_text(json.dumps(found, indent=1) + "\n")
    complete = [name for name in names if not found[name]["missing"]]
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    print(f"complete: {', '.join(complete) or 'none'}; incomplete: {', '.join(set(names) - {*complete}) or 'none'}")
    print(f"{folder}: {size:.1f} MB")
    return 0 if complete else 1


def unpack(path: Path, site: Path) -> None:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(site)
    else:
        with tarfile.open(path, "r:xz") as tar:
            tar.extractall(site, filter="data")


def environment(site: Path) -> dict[str, list[str]]:
    """What PYTHONPATH and LD_LIBRARY_PATH need: .pth files count only in Python's own site-packages."""
    paths = [
        site,
        *(site / line.strip() for pth in sorted(site.glob("*.pth")) for line in pth.read_text().splitlines()),
    ]
    libraries = sorted({path.parent for path in site.rglob("libcudart.so*")})
    return {"PYTHONPATH": [str(p) for p in paths if p.is_dir()], "LD_LIBRARY_PATH": [str(p) for p in libraries]}


def install(folder: Path, site: Path) -> int:
    site.mkdir(parents=True, exist_ok=True)
    site = site.resolve()
    manifest = json.loads((folder / "manifest.json").read_text())
    for rival in manifest.values():
        for name in rival["files"]:
            if (folder / name).exists():
                unpack(folder / name, site)
    wanted = environment(site)
    lines = [f'export {name}="{":".join(paths)}${{{name}:+:${name}}}"' for name, paths in wanted.items() if paths]
    (site / "env.sh").write_text("\n".join(lines) + "\n")
    for name, rival in manifest.items():
        if rival["missing"]:
            print(f"{name:14} was not found: {'; '.join(rival['missing'])}")
            continue
        command = f". {site}/env.sh && {sys.executable} -c '{IMPORTS[name]}'"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
        print(
            f"{name:14} "
            + ("loads" if done.returncode == 0 else f"does not load: {done.stderr.strip().splitlines()[-1]}")
        )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("prepare", help="download and repack")
    step.add_argument("folder", type=Path)
    step.add_argument(
        "--only", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="RIVAL", help=", ".join(RIVALS)
    )
    step = steps.add_parser("install", help="unpack, and try what loads")
    step.add_argument("folder", type=Path)
    step.add_argument("site", type=Path)
    args = parser.parse_args()
    return prepare(args.folder, args.only) if args.step == "prepare" else install(args.folder, args.site)


if __name__ == "__main__":
    sys.exit(main())
