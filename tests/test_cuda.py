"""The CUDA kernels where there is no GPU: run on the CPU, thread by thread, and compiled by nvcc for GPUs not here."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_on_host.build import CXX, FLAGS, ROOT, build, cached, contents, sanitizer, sources

from revit_kernels import native

OPS = list(sources())
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}  # memory that one block may have, by architecture
# What alone a test of a backend may be skipped for.
EXCUSES = {op: "could not import" for op in OPS}
EXCUSES["attention"] += r"|no kernel for torch.float32|head_dim must be a multiple of 8, at most 128, got 27"
needs_compiler = pytest.mark.skipif(not shutil.which(CXX[0]), reason=f"there is no {CXX[0]}")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")


@pytest.fixture(scope="session")
def on_host():
    """The environment in which the backend "cuda" runs on CPU tensors, and no GPU is seen."""
    # One thread: the tensors are small, and threads that wait for one another are slow on a busy machine.
    return os.environ | {"REVIT_CUDA_ON_HOST": str(build()), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_contract(ops, select, env):
    """Run the tests of backend "cuda" that are selected; returns how many passed, and why others were skipped."""
    files = [f"tests/test_{op}.py" for op in ops]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", select, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", done.stdout, re.MULTILINE)
    return int(re.search(r"(\d+) passed", done.stdout)[1]), skipped


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_contract(op, on_host):
    passed, skipped = run_contract([op], "cuda", on_host)
    assert passed >= 20 and not [why for why in skipped if not re.search(EXCUSES[op], why)], (passed, skipped)


@needs_compiler
def test_contract_with_the_last_thread_first(on_host):
    select = "cuda and (menu or edges or above or company or tail)"
    run_contract(OPS, select, on_host | {"REVIT_CUDA_ORDER": "reverse"})


@needs_compiler
def test_memory_out_of_bounds_is_left_alone(on_host, tmp_path):
    if not sanitizer():
        pytest.skip(f"{CXX[0]} brings no address sanitizer")
    env = on_host | {"REVIT_CUDA_ON_HOST": str(build(sanitize=True)), "LD_PRELOAD": sanitizer()}
    env |= {"ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:log_path={tmp_path / 'seen'}"}
    try:
        run_contract(OPS, "cuda and not torch.float16 and (one or odd or five or wide or turn or left or apart)", env)
    except AssertionError as error:
        seen = "".join(path.read_text() for path in tmp_path.glob("seen*"))
        raise AssertionError(seen[:4000] or str(error)) from error


@needs_compiler
def test_a_tensor_on_the_cpu_is_refused(on_host):
    code = f"""
import importlib, os, torch
from revit_kernels.dispatch import refusal
samples = {{op: importlib.import_module("revit_kernels.ops." + op).sample("cpu", torch.bfloat16) for op in {OPS}}}
print([refusal(op, "cuda", *sample) for op, sample in samples.items()])
del os.environ["REVIT_CUDA_ON_HOST"]
print([refusal(op, "cuda", *sample) for op, sample in samples.items()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=on_host, cwd=ROOT)
    taken, refused = [None] * len(OPS), ["needs a CUDA tensor, got one on cpu"] * len(OPS)
    assert done.stdout == f"{taken}\n{refused}\n", done.stdout + done.stderr[-2000:]


def resources(cubin):
    """Registers, stack, static shared and local memory of each kernel, as cuobjdump reads them."""
    tool = shutil.which("cuobjdump")
    if not tool:
        pytest.importorskip("triton", reason="there is no cuobjdump, beside nvcc or in Triton")
        from triton import knobs

        tool = knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s+(.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage)} for name, usage in kernels}


@needs_nvcc
def test_the_library_was_built():
    """An install only warns where nvcc fails."""
    assert Path(native.__file__).with_name("_cuda.so").exists(), "install again, and see what nvcc says"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)])
def test_an_old_gpu_is_refused(monkeypatch, capability):
    class OnGpu(torch.Tensor):
        is_cuda, device = True, "cuda:0"

    monkeypatch.setattr(native, "_capability", lambda device: capability)
    why = "needs compute capability 8.0, cuda:0 has 7.5" if capability < (8, 0) else None
    assert native.gpu_refusal((torch.float32,), None, torch.zeros(1).as_subclass(OnGpu)) == why


@needs_nvcc
@pytest.mark.parametrize("op", OPS)
def test_machine_code(op):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in SHARED if f"sm_{arch}" in known]
    if not archs:
        pytest.skip(f"this nvcc knows no GPU of {list(SHARED)}")
    source = sources()[op]

    def compiled(arch):
        command = ["nvcc", *FLAGS, "-O3", "-DUSE_CUDA", "-cubin", f"-arch=sm_{arch}", str(source), "-o"]
        return cached(f"{op}_{arch}.cubin", command, contents(source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = dict(zip(archs, pool.map(compiled, archs)))
    for arch, cubin in cubins.items():
        kernels = resources(cubin)
        assert kernels
        for name, usage in kernels.items():
            assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"spills on sm_{arch}: {name} {usage}"
            assert usage["SHARED"] <= SHARED[arch], f"too much shared memory on sm_{arch}: {name} {usage}"
