import pytest
import torch
from contract import DEVICE, assert_close, check, every_backend, every_dtype, require, run

from revit_kernels.ops import pool
from revit_kernels.ops.pool import KINDS, sample

CASES = {
    "no image": dict(tokens=[], dim=64),
    "one image": dict(tokens=[5], dim=8),
    "lengths 0, 1 and 2": dict(tokens=[0, 1, 2, 0], dim=100),
    "menu": dict(tokens=[50, 17, 101, 5], dim=96, tail=3),
    "tile edges": dict(tokens=[63, 64, 65, 127, 128, 129], dim=20, tail=1),
    "above 1024": dict(tokens=[1030], dim=7),
    "wide": dict(tokens=[2, 3], dim=1280),
    "one column": dict(tokens=[3], dim=1),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def cumulated(tokens):
    ends = torch.tensor([0, *tokens]).cumsum(0)
    return ends.to(DEVICE, torch.int32)


def make_inputs(tokens, dim, dtype, tail=0):
    """Images with some equal numbers, so that maxima tie, then a tail of NaN that belongs to no image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(tokens), dim, generator=generator)
    x[::3] = (x[::3] * 2).round() / 2
    x = torch.cat([x, torch.full((tail, dim), torch.nan)])
    return {"x": x.to(DEVICE, dtype), "cu_seqlens": cumulated(tokens)}


@every_backend
@every_dtype
@every_kind
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_contract(case, kind, dtype, backend):
    check(pool, make_inputs(**case, dtype=dtype) | {"kind": kind}, backend)


@every_backend
@every_kind
@pytest.mark.parametrize("prefix, include_prefix", [(0, False), (5, False), (5, True), (70, False)])
def test_prefix(prefix, include_prefix, kind, backend):
    inputs = make_inputs([70, 5, 6, 3], 24, torch.float32, tail=2)
    check(pool, inputs | {"kind": kind, "prefix": prefix, "include_prefix": include_prefix}, backend)


@every_backend
@every_kind
def test_is_timms(kind, backend):
    layers = pytest.importorskip("timm.layers")
    inputs = make_inputs([20, 9], 24, torch.float32)
    require("pool", backend, *inputs.values())
    for include_prefix in (False, True):
        ours = pool(**inputs, kind=kind, prefix=2, include_prefix=include_prefix, backend=backend)
        for i, image in enumerate(inputs["x"].split([20, 9])):
            theirs, exact = (layers.global_pool_nlc(x[None], kind, 2, include_prefix) for x in (image, image.double()))
            assert_close(kind, ours[i][None], exact, theirs)


@every_backend
@every_kind
def test_rows_may_lie_apart(kind, backend):
    inputs = make_inputs([9, 4], 40, torch.float32)
    require("pool", backend, *inputs.values())
    apart = torch.full((13, 100), torch.nan, device=DEVICE)
    apart[:, 30:70] = inputs["x"]
    leaf = apart.requires_grad_()
    strided = pool(leaf[:, 30:70], inputs["cu_seqlens"], kind, backend=backend)
    whole = run(pool, inputs | {"kind": kind}, backend)
    assert torch.equal(strided, whole["output 0"])
    seed = torch.cos(torch.arange(strided.numel(), device=DEVICE) * 1.0).view_as(strided)
    (grad,) = torch.autograd.grad(strided, leaf, seed)
    assert torch.equal(grad[:, 30:70], whole["grad of x"]) and not grad[:, :30].any() and not grad[:, 70:].any()
    columns = pool(inputs["x"].t().contiguous().t(), inputs["cu_seqlens"], kind, backend=backend)
    assert torch.equal(columns, whole["output 0"])


@every_backend
@every_kind
def test_nan_spoils_its_own_image_only(kind, backend):
    inputs = make_inputs([9, 40, 9], 24, torch.float32)
    require("pool", backend, *inputs.values())
    inputs["x"][9, 3] = inputs["x"][30, 4] = torch.nan  # a first token, and one further on
    y = pool(**inputs, kind=kind, include_prefix=True, backend=backend)
    assert torch.isfinite(y[[0, 2]]).all() and torch.isfinite(y[1, 5:]).all()
    assert y[1, 3].isnan() and (kind == "token" or y[1, 4].isnan())


def test_sample_is_what_forward_takes():
    assert torch.ops.revit_kernels.pool_forward.default(*sample(DEVICE), None).shape == (1, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(8)), r"x must be \(tokens, dim\) .* got \(8,\)"),
        (dict(x=torch.zeros(8, 16, dtype=torch.int32)), r"x must be .* torch.int32"),
        (
            dict(cu_seqlens=torch.zeros(3)),
            r"cu_seqlens must be \(images \+ 1,\) of torch.int32, got \(3,\) torch.float32",
        ),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), r"cu_seqlens must be .* got \(0,\)"),
        (dict(kind="mean"), r"kind must be one of .* got 'mean'"),
        (dict(prefix=-1), r"prefix must be at least 0, got -1"),
        (dict(x=torch.zeros(8, 16, device="meta")), r"all tensors must be on one device, got x on meta"),
        (dict(backend="fast"), r"backend must be one of"),
    ],
)
def test_wrong_use_says_so(change, message):
    inputs = {k: v.cpu() for k, v in make_inputs([3, 5], 16, torch.float32).items()} | {"kind": "avg"}
    with pytest.raises(ValueError, match=message):
        pool(**inputs | change)
