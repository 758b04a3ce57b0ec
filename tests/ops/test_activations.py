"""The activations of the CPU's products, far from zero and where they are not finite, against their definitions."""

import pytest
import torch
from contract import DEVICE, require
from test_instruction_sets import CAPABILITIES, best, run  # noqa: F401
from torch.nn import functional as F

from revit_kernels.ops.linear.panels import multiply, pack_weight
from revit_kernels.ops.pool import sample

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's kernels")
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
POLYNOMIAL = 8e-5  # what csrc/block/activation.h promises of bf16's GELU


def activated(x, name):
    weight = torch.eye(4, dtype=x.dtype)
    return multiply(x.reshape(-1, 4), pack_weight(weight, None, None, x.dtype), 4, name).flatten()


@cpu_only
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_and_far(dtype, name):
    require("pool", "cpu", *sample())
    near = torch.linspace(-12, 12, 4000)
    far = torch.logspace(1, 38, 400)
    x = torch.cat([near, far, -far]).to(dtype)
    exact = ACTIVATIONS[name](x.double())
    error = (activated(x, name).double() - exact).abs()
    allowed = 4 * torch.finfo(dtype).eps * exact.abs() + (POLYNOMIAL if dtype == torch.bfloat16 else 1e-6)
    assert (error <= allowed).all(), x[error > allowed][:8]


@cpu_only
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_so(dtype, name):
    require("pool", "cpu", *sample())
    for value in (torch.inf, -torch.inf, torch.nan):
        row = torch.zeros(4, 4, dtype=dtype)
        weight = torch.eye(4, dtype=dtype)
        weight[0, 0], row[:, 0] = 1e38, value
        found = multiply(row, pack_weight(weight, None, None, dtype), 4, name)[:, 0]
        assert (found == torch.inf).all() if value == torch.inf else not torch.isfinite(found).any()
        assert value != -torch.inf or not (found == torch.inf).any()


@cpu_only
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_with_every_instruction_set(capability, best):  # noqa: F811
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(best):
        pytest.skip(f"the best here is {best}, and what the tests above run on")
    done = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "near or finite"], capability)
    assert done.returncode == 0, done.stdout[-3000:]
