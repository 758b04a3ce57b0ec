"""`linear` on a CPU: a row's result does not depend on the other rows, and is of the weight as it is now."""

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, DTYPES

from revit_kernels.ops import linear

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="cuBLAS picks its algorithm by the number of rows")


@cpu_only
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    "shape", [(384, 1152), (1536, 384), (588, 384), (768, 768), (3072, 768), (192, 1000), (64, 7), (334, 128)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, shape, recorded):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape[1], shape[0]).to(dtype))
    bias = torch.randn(shape[1]).to(dtype)
    x = torch.randn(600, shape[0]).to(dtype)
    weight.requires_grad_(recorded)
    whole = linear(x, weight, bias)
    assert whole.requires_grad == recorded
    for rows in (1, 2, 3, 5, 8, 15, 16, 17, 31, 50, 64, 101, 197, 400):
        assert torch.equal(linear(x[100 : 100 + rows], weight, bias), whole[100 : 100 + rows]), f"{rows} rows"
    backwards = torch.arange(599, -1, -1)
    assert torch.equal(linear(x[backwards], weight, bias), whole[backwards])


@torch.no_grad()
def test_a_changed_weight_is_seen():
    weight = torch.nn.Parameter(torch.randn(8, 16, device=DEVICE))
    x = torch.randn(3, 16, device=DEVICE)
    for change in (
        lambda: weight.mul_(2),
        lambda: setattr(weight, "data", torch.randn(8, 16, device=DEVICE)),
        lambda: weight.data.fill_(3),
        lambda: weight.data[3, 5].add_(1),
        lambda: weight.data[2].neg_(),
    ):
        change()
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
