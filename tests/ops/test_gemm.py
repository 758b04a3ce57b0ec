"""The vendor's matrix product, as we call it: right, and a row's result does not depend on the other rows."""

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, DTYPES, assert_close

from revit_kernels.gemm import linear

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="cuBLAS picks its algorithm by the number of rows")


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, activation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(37, 100), torch.randn(24, 100) / 10, torch.randn(24)
    x, weight, bias = (t.to(DEVICE, dtype) for t in (x, weight, bias))

    def plain(x, weight, bias):
        y = F.linear(x, weight, bias)
        return y if activation is None else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")

    exact = plain(x.double(), weight.double(), bias.double())
    assert_close("linear", linear(x, weight, bias, activation), exact, plain(x, weight, bias))
    exact = plain(x.double(), weight.double(), None)
    assert_close("no bias", linear(x, weight, None, activation), exact, plain(x, weight, None))
    assert linear(x[:0], weight, bias, activation).shape == (0, 24)


@cpu_only
@torch.no_grad()
@pytest.mark.parametrize("shape", [(384, 1152), (1536, 384), (588, 384), (768, 768), (3072, 768), (192, 1000), (64, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape[1], shape[0]).to(dtype))
    bias = torch.randn(shape[1]).to(dtype)
    x = torch.randn(600, shape[0]).to(dtype)
    whole = linear(x, weight, bias)
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


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, rows, activation):
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 100), torch.randn(24, 100) / 10, torch.randn(24)]
    inputs = [t.to(DEVICE, dtype).requires_grad_() for t in inputs]

    def gradients(call, dtype):
        copies = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = call(*copies)
        return torch.autograd.grad((y * torch.cos(torch.arange(y.numel(), device=DEVICE)).view_as(y)).sum(), copies)

    def plain(x, weight, bias):
        y = F.linear(x, weight, bias)
        return y if activation is None else F.gelu(y)

    exact, rough = gradients(plain, torch.float64), gradients(plain, dtype)
    actual = gradients(lambda *t: linear(*t, activation), dtype)
    for name, a, e, r in zip(("x", "weight", "bias"), actual, exact, rough):
        assert_close(f"grad of {name}", a, e, r)
