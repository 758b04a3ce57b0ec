"""REVIT_CPU_CAPABILITY holds back every kernel of every op, and each op satisfies its contract with every set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import must_run

from revit_kernels import native

CAPABILITIES = ["plain", "avx2", "avx512", "avx512_bf16"]
# Of each op's own tests on a CPU, those with every tail of a row. Not those that add up thousands of numbers: without
# FMA, sums in one order round more than the contract's reference does.
TESTS = {
    "attention": "cpu and (test_contract and (menu or empty or tile or 72 or odd) or test_the_tail)",
    "block": "cpu and (test_contract and not wide or test_parts_that and 90) or test_options or test_an_image",
    "layer_norm": "test_residual_and_norm and cpu",
    "patch_embed": "test_contract and cpu or one_sweep and not 32-torch",
    "pool": "test_contract and cpu",
    "pos_embed": "test_contract and cpu",
    "temporal_attention": "test_contract and cpu and (menu or odd or prefix)",
}
# Every kernel of csrc, on the smallest arguments it takes.
KERNELS = """
import torch
from revit_kernels import native
native.load("cpu")
ops = torch.ops.revit_kernels
ends, row, none = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32), None
x, q, lse, one = torch.ones(2, 4), torch.ones(2, 1, 4), torch.ones(2, 1), torch.ones(1, 4)
image, kernel, place = torch.ones(1, 5, 5), torch.ones(4, 1, 2, 2), torch.tensor([[2, 1, 0]], dtype=torch.int32)
norm, square = torch.ones(4), torch.ones(4, 4)
of_block = ([1e-6] * 6, False, 1, 4, 4, 0.5, 0, 0, none, none, none, False)
of_images = ([1.0], [0.0], True, False, 0, 2)
calls = {
    "attention_cpu": (q, q, q, ends, ends, 1.0),
    "attention_backward_cpu": (q, q, q, q, lse, ends, ends, 1.0),
    "block_cpu": (x, ends, none, [norm, torch.ones(12, 4), square, norm, square, square], [*range(6)], *of_block),
    "layer_norm_cpu": (x, none, none, none, none, none, 1e-6, False),
    "layer_norm_backward_cpu": (x, none, x, none, none, none, none, none, lse.view(-1), lse.view(-1), False),
    "pack_cpu": (torch.ones(4, 4), none, none, 0),
    "packs_cpu": (0,),
    "patchify_cpu": ([image], kernel, ends, place, *of_images),
    "patch_embed_cpu": ([image], kernel, torch.zeros(4096, dtype=torch.uint8), ends, place, none, none, *of_images),
    "place_cpu": (x, ends, place, x, none, 0),
    "patch_embed_sums_cpu": (x, ends, place, 0, 2),
    "pool_cpu": (x, ends, "max", 0, True),
    "pool_backward_cpu": (one, x, ends, 2, "max", 0, True),
    "pos_embed_cpu": (x.view(2, 1, 4), [3, 1], "bicubic", True, False, 0.0),
    "pos_embed_backward_cpu": (x, 1, 1, [2, 1], "bicubic", True, False, 0.0),
    "temporal_attention_cpu": (q, q, q, ends, row[:1] + 1, 0, 1.0),
    "temporal_attention_backward_cpu": (q, q, q, q, ends, row[:1] + 1, 0, 1.0),
}
names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("revit_kernels::")}
# The vendor's product; those that take only what pack_cpu gives; and those that compute nothing in floats.
others = {"patch_embed_weight_cpu", "blocks_cpu", "linear_cpu", "capability_cpu"}
print("not called:", *sorted({name for name in names if name.endswith("_cpu")} - set(calls) - others))
for name, args in calls.items():
    try:
        getattr(ops, name)(*args)
        print(name, "ran")
    except RuntimeError as error:
        print(name, "raised", error)
"""


def run(command, capability):
    env = os.environ | {"REVIT_CPU_CAPABILITY": capability, "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def best():
    """The best set of this machine's."""
    try:
        native.load("cpu")
    except ImportError as missing:
        assert not must_run("cpu")
        pytest.skip(str(missing))
    assert "REVIT_CPU_CAPABILITY" not in os.environ, "these tests set it themselves"
    return torch.ops.revit_kernels.capability_cpu()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", TESTS)
def test_every_op_with_every_instruction_set(op, capability, best):
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(best):
        pytest.skip(f"the best here is {best}, and what the op's own tests run on")
    file = Path(__file__).with_name(f"test_{op}.py")
    done = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", TESTS[op]], capability)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_process_is_held_back(capability, best):
    code = "import torch; from revit_kernels import native; native.load('cpu'); "
    done = run(["-c", code + "print(torch.ops.revit_kernels.capability_cpu())"], capability)
    expected = min(capability, best, key=CAPABILITIES.index)
    assert done.stdout.strip() == expected, done.stderr


def test_every_kernel_asks_which_instruction_set(best):
    """Where the one named does not exist, no kernel runs: so none has chosen without asking."""
    done = run(["-c", KERNELS], "sse9")
    first, *lines = done.stdout.splitlines()
    assert first == "not called:", "a kernel that this test does not know"
    message = "raised REVIT_CPU_CAPABILITY must be plain, avx2, avx512 or avx512_bf16, got sse9"
    assert [line for line in lines if message not in line] == [], done.stderr
