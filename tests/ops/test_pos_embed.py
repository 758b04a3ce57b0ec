import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, assert_close, check, every_backend, every_dtype, require, run

from revit_kernels.ops import pos_embed
from revit_kernels.ops.pos_embed.taps import taps

HOW = [
    dict(interpolation="bicubic", antialias=True),
    dict(interpolation="bicubic", antialias=False),
    dict(interpolation="bicubic", antialias=False, align_corners=True),
    dict(interpolation="bilinear", antialias=True),
    dict(interpolation="bilinear", antialias=False),
    dict(interpolation="bilinear", antialias=False, align_corners=True),
]
every_how = pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
CASES = {
    "menu": dict(table=(7, 7), grids=[(7, 7), (5, 5), (3, 3)], dim=40),
    "odd dim, not square": dict(table=(7, 5), grids=[(3, 6), (7, 5), (1, 1), (9, 5)], dim=131),
    "one cell": dict(table=(1, 1), grids=[(1, 1), (3, 2)], dim=256),
    "no grid": dict(table=(3, 4), grids=[], dim=8),
    "the same grid twice": dict(table=(4, 4), grids=[(2, 3), (2, 3)], dim=1),
    "long rows": dict(table=(1, 36), grids=[(1, 40), (1, 3)], dim=4),
    "wide": dict(table=(3, 3), grids=[(2, 2), (4, 3)], dim=800),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_inputs(table, grids, dim, dtype=torch.float32):
    torch.manual_seed(0)
    return dict(table=torch.randn(*table, dim).to(DEVICE, dtype), grids=grids)


def interpolated(table, grids, how):
    """What timm and SigLIP2 do, one grid after the other, in the dtype of the table."""
    flags = dict(antialias=how["antialias"], align_corners=how.get("align_corners", False))
    nchw = table.permute(2, 0, 1)[None]
    parts = [F.interpolate(nchw, grid, mode=how["interpolation"], **flags)[0] for grid in grids]
    return torch.cat([part.flatten(1).T for part in parts])


@every_backend
@every_dtype
@every_case
def test_contract(case, dtype, backend):
    check(pos_embed, make_inputs(**case, dtype=dtype), backend)


def test_contract_above_1024_cells():
    check(pos_embed, make_inputs((14, 14), [(33, 32), (14, 14)], 70), None)


@every_backend
@every_how
def test_contract_of_every_interpolation(how, backend):
    check(pos_embed, make_inputs((7, 6), [(9, 5), (3, 3), (7, 6)], 24) | how, backend)


@every_backend
def test_contract_of_an_offset(backend):
    inputs = make_inputs((7, 7), [(9, 5), (3, 7), (7, 7)], 24)
    check(pos_embed, inputs | dict(antialias=False, offset=0.1), backend)
    check(pos_embed, inputs | dict(antialias=True, offset=0.1), backend)


@every_how
def test_equals_interpolate(how):
    """Output and gradient, by the rule of the contract with F.interpolate in place of the reference."""
    grids = [(10, 10), (7, 9), (4, 4), (1, 1), (20, 17)]
    table = make_inputs((14, 13), grids, 32)["table"]

    def theirs(table, backend):
        return interpolated(table, grids, how)

    def ours(table, backend):
        return pos_embed(table, grids, **how)

    actual = run(ours, dict(table=table), None)
    rough, exact = run(theirs, dict(table=table), None), run(theirs, dict(table=table), None, torch.float64)
    for name in actual:
        assert_close(name, actual[name], exact[name], rough[name])


def test_equals_dinov2_offset():
    table = make_inputs((7, 7), [], 16)["table"].double()
    for grid in [(9, 9), (5, 6)]:
        scale = tuple((n + 0.1) / 7 for n in grid)
        nchw = table.permute(2, 0, 1)[None]
        theirs = F.interpolate(nchw, scale_factor=scale, mode="bicubic", antialias=False)
        ours = pos_embed(table, [grid], antialias=False, offset=0.1)
        torch.testing.assert_close(ours, theirs[0].flatten(1).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_timm(dtype):
    resample = pytest.importorskip("timm.layers.pos_embed", reason="timm is missing").resample_abs_pos_embed
    table = make_inputs((14, 14), [], 48, dtype)["table"]
    for grid in [(14, 14), (10, 10), (7, 9), (24, 24)]:
        theirs = resample(table.flatten(0, 1)[None], list(grid), [14, 14], num_prefix_tokens=0)[0]
        exact = interpolated(table.double(), [grid], HOW[0])
        assert_close(str(grid), pos_embed(table, [grid]), exact, theirs)


@every_backend
def test_own_grid_is_untouched(backend):
    """Even where an interpolation would spread a NaN to its neighbours."""
    inputs = make_inputs((5, 6), [(3, 3), (5, 6)], 8)
    inputs["table"][0, 0] = torch.nan
    try:
        output = pos_embed(**inputs, backend=backend)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    assert torch.equal(output[9:].nan_to_num(7.0), inputs["table"].flatten(0, 1).nan_to_num(7.0))


@every_backend
def test_strided_table_and_gradient(backend):
    """A table cut out of timm's pos_embed parameter, and a gradient that is expanded."""
    whole = torch.randn(8, 1 + 12, device=DEVICE).T[None]  # (1, 13, 8), not contiguous
    table = whole[0, 1:].unflatten(0, (3, 4)).detach().requires_grad_()
    try:
        y = pos_embed(table, [(2, 2)], backend=backend)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    (strided,) = torch.autograd.grad(y.sum(), table)
    plain = table.detach().contiguous().requires_grad_()
    z = pos_embed(plain, [(2, 2)], backend=backend)
    (dense,) = torch.autograd.grad(z, plain, torch.ones_like(z))
    assert torch.equal(y, z) and torch.equal(strided, dense)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(table=torch.ones(3, 4)), r"table must be \(rows, columns, dim\) and floating-point, got \(3, 4\)"),
        (dict(table=torch.ones(3, 4, 5, dtype=torch.long)), "floating-point, got .* torch.int64"),
        (dict(table=torch.ones(0, 4, 5)), r"table must be .*got \(0, 4, 5\)"),
        (dict(grids=[(2, 2), (0, 3)]), r"grids\[1\] must be \(rows, columns\), each at least 1, got \(0, 3\)"),
        (dict(grids=[(2, 2, 2)]), r"grids\[0\] must be \(rows, columns\), each at least 1, got \(2, 2, 2\)"),
        (dict(interpolation="nearest"), "interpolation must be one of .*got 'nearest'"),
        (dict(align_corners=True), "align_corners excludes antialias"),
        (dict(offset=float("nan")), "offset must be finite and leave every grid above 0, got nan"),
        (dict(offset=-4.0), "offset must be finite and leave every grid above 0"),
    ],
)
def test_wrong_use(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        pos_embed(**(make_inputs((3, 4), [(2, 2)], 8) | change))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_taps_are_made_once_for_a_table_and_a_grid(backend):
    table, other = (make_inputs((side, 5), [], 8)["table"].requires_grad_() for side in (4, 6))
    require("pos_embed", backend, table, [2, 2], "bicubic", True, False, 0.0)
    taps.cache_clear()
    with torch.no_grad():
        for grids in ([(3, 3), (2, 2)], [(2, 2), (3, 3)], [(3, 3)], [(2, 2), (2, 2), (3, 3)]):
            pos_embed(table, grids, backend=backend)
            assert taps.cache_info().misses == 2
        expected = pos_embed(table, [(2, 2), (3, 3)], backend=backend)
        assert torch.equal(pos_embed(table, [(3, 3), (2, 2)], backend=backend), expected.roll(-4, 0))
        pos_embed(other, [(3, 3)], backend=backend)
        assert taps.cache_info().misses == 3
    for grids in ([(3, 3), (2, 2)], [(2, 2), (3, 3)]):
        pos_embed(table, grids, backend=backend).sum().backward()
        assert taps.cache_info().misses == 5  # those of a gradient are the transpose
