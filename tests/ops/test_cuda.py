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
from cuda_on_host.build import CXX, FLAGS, ROOT, build, cached, contents, faults, sanitizer, sources

from revit_kernels import native

OPS = list(sources())
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}  # memory that one block may have, by architecture
# What alone a test of a backend may be skipped for.
EXCUSES = {op: "could not import" for op in OPS}
EXCUSES["attention"] += r"|no kernel for torch.float32|head_dim must be a multiple of 8, at most 128, got 27"
EXCUSES["attention"] += "|turns halves must be of a multiple of 8 pairs|turns need a head_dim of at most 96"
needs_compiler = pytest.mark.skipif(not shutil.which(CXX[0]), reason=f"there is no {CXX[0]}")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")


@pytest.fixture(scope="session")
def on_host():
    """The environment in which the backend "cuda" runs on CPU tensors, and no GPU is seen."""
    # One thread: the tensors are small, and threads that wait for one another are slow on a busy machine.
    return os.environ | {"REVIT_CUDA_ON_HOST": str(build()), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_contract(ops, select, env):
    """Run the tests of backend "cuda" that are selected; returns how many passed, and why others were skipped."""
    files = [f"tests/ops/test_{op}.py" for op in ops]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", select, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", done.stdout, re.MULTILINE)
    return int(re.search(r"(\d+) passed", done.stdout)[1]), skipped


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_contract(op, on_host):
    # What a block may have on the least of the GPUs on which the op does not refuse.
    on_host = on_host | {"REVIT_CUDA_ON_HOST_SHARED": "163" if op == "patch_embed" else "99"}
    passed, skipped = run_contract([op], "cuda", on_host)
    assert passed >= 20 and not [why for why in skipped if not re.search(EXCUSES[op], why)], (passed, skipped)


@needs_compiler
def test_contract_with_the_last_thread_first(on_host):
    select = "cuda and (menu or edges or above or company or tail)"
    run_contract(OPS, select, on_host | {"REVIT_CUDA_ORDER": "reverse"})


@pytest.fixture
def checking(tmp_path):
    """What the environment needs for the bounds of tensors to be known to a build with checks."""
    said = f"log_path={tmp_path / 'seen'}"  # of the address sanitizer, to which fibers are news
    return {"LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:{said}"}


@needs_compiler
@pytest.mark.parametrize("hopper", [False, True])
def test_nothing_is_done_that_a_gpu_would_punish(hopper, on_host, checking):
    env = on_host | checking | {"REVIT_CUDA_ON_HOST": str(build(checked=True))}
    if hopper:
        env |= {"REVIT_CUDA_ON_HOST_HOPPER": "1"}
        run_contract(["attention"], "cuda and bfloat16 and (menu or edges or 72 or company or tail)", env)
    else:
        run_contract(OPS, "cuda and not torch.float16 and (one or odd or five or wide or turn or left or apart)", env)


@needs_compiler
@pytest.mark.parametrize("order", ["", "reverse"])
def test_contract_on_hopper(order, on_host):
    env = on_host | {"REVIT_CUDA_ON_HOST_HOPPER": "1", "REVIT_CUDA_ORDER": order}
    select = "cuda and (float16 or not float) and " + (
        "(menu or edges or 72 or company or tail)" if order else "not none"
    )
    passed, skipped = run_contract(["attention"], select, env)
    assert passed >= 10 and not [why for why in skipped if not re.search(EXCUSES["attention"], why)], (passed, skipped)


# Beside the contract's images: more tiles than warpgroups while the keys stay, and keys that stream past several tiles.
HOPPER = """
import sys
import torch
from revit_kernels.ops.attention import attention
head_dim, heads, *lengths = map(int, sys.argv[1:])
torch.manual_seed(0)
q, k, v = torch.randn(sum(lengths), 3, heads, head_dim).bfloat16().unbind(1)
def run(backend, lengths, *qkv):
    return attention(*qkv, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), backend=backend)
out, exact = run("cuda", lengths, q, k, v), run("reference", lengths, q.double(), k.double(), v.double())
rough = (run("reference", lengths, q, k, v) - exact).abs().max()
assert (out - exact).abs().max() <= 2 * rough, ((out - exact).abs().max(), rough)
for i, length in enumerate(lengths):
    rows = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
    assert torch.equal(run("cuda", [length], q[rows], k[rows], v[rows]), out[rows]), length
"""


@needs_compiler
@pytest.mark.parametrize(
    "shape", ["64 5 300 17 64 197 50", "64 2 780 3", "80 4 257 33 600", "96 4 7 460", "128 4 330 200 65"]
)
def test_tiles_on_hopper(shape, on_host):
    env = on_host | {"REVIT_CUDA_ON_HOST_HOPPER": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HOPPER, *shape.split()], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]


SHARED_RACE = "use one address in shared memory, one of them writes, and no barrier is between"
GLOBAL_RACE = SHARED_RACE.replace("shared", "global")
BLOCKS_RACE = "two blocks use one address in global memory, and one of them writes"
NEVER_WRITTEN = "shared memory is read that nobody has written"
TOO_EARLY = "shared memory is read before a copy to it was waited for"
UNFENCED = "shared memory that was written without fence.proxy.async goes to a copy or a product"
LEFT = "a thread has left before a __syncthreads of its block"
FOR_EVER = "threads wait for one another for ever: "
AT_BARRIER = FOR_EVER + "128 at a barrier in shared memory"
RUNNING = "registers of a product are used before it was waited for"
OFF_BOUNDARY = r"an address off the boundary of what is read or written there, faults.cpp:\d+"
# Each kernel of tests/cuda_on_host/*faults.cpp that goes wrong, and what has to be said of it.
FAULTS = {
    # Barriers of a block and of a warp
    "no __syncthreads": SHARED_RACE,
    "no __syncthreads before shared memory is used again": SHARED_RACE,
    "no __syncthreads between writes": SHARED_RACE,
    "static shared memory without a barrier": SHARED_RACE,
    "global memory without a barrier": GLOBAL_RACE,
    "no __syncwarp": SHARED_RACE,
    "__syncwarp across warps": SHARED_RACE,
    "a shuffle as a barrier": SHARED_RACE,
    "a barrier in divergent code": r"threads of a block meet at __syncthreads of lines \d+ and \d+",
    "a barrier in a loop of different lengths": LEFT,
    "a barrier that some leave before": LEFT,
    "a shuffle that some lanes leave before": FOR_EVER + "16 at __shfl_sync",
    "a ballot that some lanes do not come to": "lanes of a warp meet at __(ballot_sync|syncwarp) and at __",
    "a mask of half a warp": "a warp's mask that does not name all its lanes is not known here",
    # Bounds
    "a read past a tensor's end": "a read outside of every tensor",
    "a read of a negative index": "a read outside of every tensor",
    "a write past a tensor's end": "a write outside of every tensor",
    "a vector across a tensor's end": "a read outside of every tensor",
    "cp.async past a tensor's end": "a read outside of every tensor",
    "a write past the dynamic shared memory": "a write outside of the dynamic shared memory of the launch",
    "an index past a static shared array": "index 32 outside of an array, faults.cpp",
    # Addresses
    "a vector off 16 bytes": OFF_BOUNDARY,
    "a vector off 8 bytes": OFF_BOUNDARY,
    "cp.async from off 16 bytes": "cp.async from or to an address off 16 bytes",
    "cp.async to off 16 bytes": "cp.async from or to an address off 16 bytes",
    "ldmatrix from off 16 bytes": "ldmatrix from an address off 16 bytes",
    # Copies, and memory that holds nothing
    "cp.async that is not waited for": TOO_EARLY,
    "cp.async waited for by another thread": SHARED_RACE,
    "cp.async over what is still read": SHARED_RACE,
    "cp.async that outlives its thread": "a thread ended with copies that nobody waited for",
    "shared memory that nobody has written": NEVER_WRITTEN,
    "shared memory that another block has written": NEVER_WRITTEN,
    # Blocks, launches
    "two blocks that write one address": BLOCKS_RACE,
    "a block that reads what another writes": BLOCKS_RACE,
    "more than 1024 threads": "more than 1024 threads in a block",
    "more than 48 KiB without the attribute": "more dynamic shared memory than the kernel was allowed",
    "more shared memory than sm_80 has": "more shared memory than a block may have",
    "more shared memory than sm_86 has": "more shared memory than a block may have",
    "more shared memory than sm_90 has": "more shared memory than a block may have",
    "a grid too large in y": "a grid too large in y or z",
    # Hopper's barriers
    "a barrier that nobody initialised": "a barrier in shared memory that was not initialised",
    "a barrier not fenced as it begins": "a copy to a barrier that was not fenced as it began",
    "a barrier used at once": f"{SHARED_RACE}|a barrier in shared memory that was not initialised",
    "a phase that never completes": AT_BARRIER,
    "a phase that is complete too early": f"{SHARED_RACE}|{TOO_EARLY}|{AT_BARRIER}",
    "no arrival at a barrier": AT_BARRIER,
    "more bytes expected than come": AT_BARRIER,
    "fewer bytes expected than come": "more bytes come to a barrier than its phase expects",
    # Copies of boxes
    "no wait for a copy": f"{SHARED_RACE}|{TOO_EARLY}",
    "a copy that outlives its block": "a block ended with copies of boxes that nobody waited for",
    "a box off 128 bytes": "a box goes to an address off 128 bytes",
    "a box off its swizzled rows": "a box goes to an address off its pattern of swizzled rows",
    "a box outside of shared memory": "a box goes outside shared memory",
    "a box from outside of the tensor": "a copy of a box outside of every tensor",
    "a box over what is still read": f"{SHARED_RACE}|{TOO_EARLY}",
    "a map from off 16 bytes": "an address off 16 bytes",
    "a map with a stride off 16 bytes": "a stride off 16 bytes",
    "a map with rows longer than their swizzle": "rows of a box longer than their swizzle",
    "a map with 128 columns": "rows of a box longer than their swizzle",
    "a map with 257 rows": "a box of more than 256 rows or columns",
    "a map with rows off 16 bytes": "rows of a box off 16 bytes",
    # Products
    "no proxy fence after zeros": "a product after a store to shared memory without fence.proxy.async",
    "no proxy fence after a plain store": UNFENCED,
    "no warpgroup barrier after zeros": SHARED_RACE,
    "no warpgroup barrier in one warp": "warpgroup meets at (bar.sync|wgmma) and at ",
    "no wgmma.fence": "a product without wgmma.fence since the last wait",
    "registers written after wgmma.fence": "registers of a product are written between wgmma.fence and the product",
    "an operand's registers written while it runs": RUNNING,
    "sums read before the wait": RUNNING,
    "sums of a group that was not committed": RUNNING,
    "an operand overwritten while it runs": SHARED_RACE,
    "a product that outlives its thread": "a thread ended with products that nobody waited for",
    "a product of three warps": FOR_EVER + "96 at wgmma",
    "a descriptor of each warp's own": "threads of a warpgroup have different descriptors",
    "a descriptor off its swizzled rows": "an operand that does not begin with its pattern of swizzled rows",
    "a descriptor of another swizzle": "wrong",
    "a descriptor past the end of shared memory": "a product reads outside shared memory",
}


@needs_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_what_a_gpu_would_punish_shows_on_the_host(name, checking):
    if "outside of every tensor" in FAULTS[name] and not sanitizer():
        pytest.skip(f"{CXX[0]} brings no address sanitizer")
    for order in ("", "reverse"):
        env = os.environ | checking | {"REVIT_CUDA_ORDER": order}
        done = subprocess.run([faults(), name], capture_output=True, text=True, env=env, check=True)
        control, fault = done.stdout.splitlines()
        assert control == "right"
        assert re.search(FAULTS[name], fault), fault


@needs_compiler
def test_every_fault_is_tried():
    done = subprocess.run([faults()], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(FAULTS)


@needs_compiler
def test_a_tensor_on_the_cpu_is_refused(on_host):
    code = f"""
import importlib, torch
from revit_kernels import native
from revit_kernels.dispatch import refusal
samples = {{op: importlib.import_module("revit_kernels.ops." + op).sample("cpu", torch.bfloat16) for op in {OPS}}}
print([refusal(op, "cuda", *sample) for op, sample in samples.items()])
native.CUDA_ON_HOST = None
print([refusal(op, "cuda", *sample) for op, sample in samples.items()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=on_host, cwd=ROOT)
    taken, refused = [None] * len(OPS), ["needs a CUDA tensor"] * len(OPS)
    assert done.stdout == f"{taken}\n{refused}\n", done.stdout + done.stderr[-2000:]


def cuobjdump():
    """The path of the tool."""
    if tool := shutil.which("cuobjdump"):
        return tool
    pytest.importorskip("triton", reason="there is no cuobjdump, beside nvcc or in Triton")
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


def resources(cubin):
    """Registers, stack, static shared and local memory of each kernel, as cuobjdump reads them."""
    text = subprocess.run([cuobjdump(), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
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


@needs_nvcc
def test_machine_code_for_hopper():
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if int(re.search(r"release (\d+)", version)[1]) < 12:
        pytest.skip("this nvcc does not know sm_90a")
    source = sources()["attention"]
    command = ["nvcc", *FLAGS, "-O3", "-DUSE_CUDA", "-cubin", "-arch=sm_90a", str(source), "-o"]
    cubin = cached("attention_90a.cubin", command, contents(source))
    kernels = {name: usage for name, usage in resources(cubin).items() if "hopper_kernel" in name}
    assert len(kernels) == 8  # head_dim 64, 80, 96 and 128, in two dtypes
    for name, usage in resources(cubin).items():
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"spills: {name} {usage}"
    for name, usage in kernels.items():
        threads = 640 if "Li64E" in name else 512
        assert usage["REG"] == 65536 // threads // 8 * 8, f"not the registers that are dealt out again: {name} {usage}"
        assert usage["SHARED"] <= 2048, f"more than is kept for it beside the ring: {name} {usage}"
        text = subprocess.run([cuobjdump(), "-sass", "-fun", name, cubin], capture_output=True, text=True).stdout
        code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", text, re.MULTILINE)
        products = [line for line in code if "HGMMA" in line]
        starts = [line for line in code if "WARPGROUP.ARRIVE" in line]
        for instruction in ("UTMALDG.3D", "SYNCS.PHASECHK", "USETMAXREG", "WARPGROUP.DEPBAR"):
            assert any(instruction in line for line in code), f"no {instruction}: {name}"
        # Five kinds of a block of keys, scores and sums of each: products that wait for one another would be more.
        assert len(starts) == 10 and sum("gsb0" in line for line in products) == 10 and len(products) > 30, name
