import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, assert_close, check, every_backend, every_dtype, require, run

from revit_kernels.ops import layer_norm
from revit_kernels.ops.layer_norm import sample

CASES = {
    "no image": dict(tokens=[], dim=64),
    "one image": dict(tokens=[5], dim=8),
    "lengths 0 and 1": dict(tokens=[0, 1, 5, 0], dim=100),
    "menu": dict(tokens=[10, 5, 17, 1], dim=384, tail=3),
    "lengths in turn": dict(tokens=[1, 2, 1, 3, 2, 1, 2, 1], dim=264),
    "tile edges": dict(tokens=[63, 64, 65], dim=20, tail=1),
    "tile edges, doubled": dict(tokens=[127, 128, 129], dim=16),
    "above 1024": dict(tokens=[1030], dim=12),
    "odd dim": dict(tokens=[3, 4], dim=77),
    "five columns": dict(tokens=[3], dim=5),
    "wide": dict(tokens=[2, 3], dim=1280),
    "widest": dict(tokens=[2, 1], dim=4096),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def make_inputs(tokens, dim, dtype, tail=0, lengths=3, seed=0):
    """Images in turn on each of the lengths' affines, then a tail of NaN that belongs to no image."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.repeat_interleave(torch.arange(len(tokens)) % lengths, torch.tensor(tokens, dtype=torch.long))
    total = sum(tokens)

    def packed():
        values = torch.randn(total, dim, generator=generator) + 0.5
        return torch.cat([values, torch.full((tail, dim), torch.nan)]).to(DEVICE, dtype)

    def parameter(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return {
        "x": packed(),
        "weight": parameter(lengths, dim),
        "bias": parameter(lengths, dim),
        "row": torch.cat([row, torch.full((tail,), -1)]).int().to(DEVICE),
        "branch": packed(),
        "gamma": parameter(dim),
    }


def interpreted(backend):
    return backend == "triton" and DEVICE == "cpu"


def require_rounding(backend):
    if interpreted(backend):
        pytest.skip("the interpreter cuts off where a GPU rounds to bf16")


def without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


@every_backend
@every_dtype
@cases
def test_residual_and_norm(case, dtype, backend):
    if interpreted(backend) and dtype != torch.float32 and sum(case["tokens"]) > 100:
        pytest.skip("the interpreter is slow, and no launch depends on the dtype")
    check(layer_norm, make_inputs(**case, dtype=dtype), backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("missing", [(), ("weight", "bias"), ("bias",), ("weight",), ("row",), ("gamma",)], ids=str)
def test_what_may_be_left_out(missing, rms, dtype, backend):
    inputs = make_inputs([4, 7, 2], 300, dtype, tail=0 if "row" in missing else 2)
    inputs |= {name: None for name in missing if name in ("weight", "bias")}
    check(layer_norm, without(inputs, *(n for n in missing if n not in ("weight", "bias"))) | {"rms": rms}, backend)
    if "gamma" not in missing:
        check(layer_norm, without(inputs, "branch", "gamma", *missing) | {"rms": rms}
              | {name: None for name in missing if name in ("weight", "bias")}, backend)  # fmt: skip


@every_backend
@pytest.mark.parametrize("half", [("branch",), ("x",), ("x", "branch")], ids=str)
def test_dtypes_may_differ(half, backend):
    """Under autocast the residual stream is fp32, the branch bf16; parameters are fp32 beside bf16 tokens."""
    inputs = make_inputs([4, 3], 40, torch.float32, tail=1)
    inputs |= {name: inputs[name].bfloat16() for name in half}
    if "x" in half:
        require_rounding(backend)
    check(layer_norm, inputs, backend)
    check(layer_norm, without(inputs, "gamma"), backend)
    y, total = layer_norm(**inputs)
    assert y.dtype == total.dtype == inputs["x"].dtype


@every_backend
@every_dtype
def test_memory_may_begin_anywhere(dtype, backend):
    inputs = make_inputs([6, 9, 1], 264, dtype)
    for name in ("x", "weight", "gamma"):
        room = inputs[name].new_empty(inputs[name].numel() + 1)
        inputs[name] = room[1:].view(inputs[name].shape).copy_(inputs[name])
    check(layer_norm, inputs, backend)


@every_dtype
def test_parameter_gradients_do_not_depend_on_the_number_of_threads(dtype):
    inputs, threads = make_inputs([300, 211], 40, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(layer_norm, inputs, None)
        torch.set_num_threads(3)
        three = run(layer_norm, inputs, None)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], three[name]) for name in one)


@every_backend
@pytest.mark.parametrize("only", [0, 1], ids=["y", "sum"])
def test_one_output_alone_may_be_used(only, backend):
    inputs = make_inputs([4, 3], 40, torch.float32, tail=1)
    check(lambda **kwargs: layer_norm(**kwargs)[only], inputs, backend)


@every_backend
@every_dtype
def test_sum_is_rounded_once(backend, dtype):
    if dtype != torch.float32:
        require_rounding(backend)
    inputs = make_inputs([9], 48, dtype)
    require("layer_norm", backend, *inputs.values())
    _, total = layer_norm(**inputs, backend=backend)
    exact = inputs["x"].double() + inputs["gamma"].double() * inputs["branch"].double()
    half_ulp = torch.finfo(dtype).eps / 2 * 2.0 ** torch.floor(torch.log2(exact.abs()))
    fp32 = torch.finfo(torch.float32).eps * (inputs["x"].abs() + exact.abs())
    assert ((total - exact).abs() <= half_ulp + fp32).all()


@every_backend
@every_dtype
def test_one_affine_is_torchs_layer_norm(backend, dtype):
    inputs = make_inputs([6, 2], 96, dtype)
    x, weight, bias = inputs["x"], inputs["weight"][0], inputs["bias"][0]
    require("layer_norm", backend, x, weight, bias, None, None, None, 1e-6, False)
    for row in (None, inputs["row"]):  # with one affine only the sign of row counts
        ours = layer_norm(x, weight, bias, row, backend=backend)
        exact = F.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-6)
        assert_close("output", ours, exact, F.layer_norm(x, (96,), weight, bias, 1e-6))


@every_backend
def test_rms_is_timms(backend):
    layers = pytest.importorskip("timm.layers")
    inputs = make_inputs([6, 2], 96, torch.float32)
    x, weight = inputs["x"], inputs["weight"][0]
    require("layer_norm", backend, x, weight, None, None, None, None, 1e-6, True)
    norm = layers.RmsNorm(96, eps=1e-5, device=DEVICE)
    norm.weight.data.copy_(weight)
    ours = layer_norm(x, weight, None, eps=1e-5, rms=True, backend=backend)
    with torch.no_grad():
        rough = norm(x)
        assert_close("output", ours, norm.double()(x.double()), rough)


@every_backend
def test_an_infinite_or_missing_number_spoils_its_own_token_only(backend):
    inputs = make_inputs([3, 3], 40, torch.bfloat16)
    require("layer_norm", backend, *inputs.values())
    inputs["x"][1, 7], inputs["x"][2, 0] = torch.nan, torch.inf
    y, total = layer_norm(**inputs, backend=backend)
    assert y[1].isnan().all() and total[1, 7].isnan() and total[2, 0].isinf()
    assert torch.isfinite(y[[0, 3, 4, 5]]).all()


def test_sample_is_what_forward_takes():
    y, *_ = torch.ops.revit_kernels.layer_norm_forward.default(*sample(DEVICE), None)
    assert y.shape == sample()[0].shape


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 3, 4)), r"x must be \(tokens, dim\) .* got \(2, 3, 4\)"),
        (dict(x=torch.zeros(8, 16, dtype=torch.int32)), r"x must be .* torch.int32"),
        (dict(x=torch.zeros(8, 0)), r"x must have at least one column"),
        (dict(weight=torch.zeros(3, 15)), r"weight must be \(lengths, 16\) or \(16,\), got \(3, 15\)"),
        (dict(bias=torch.zeros(2, 2, 16)), r"bias must be \(lengths, 16\)"),
        (dict(weight=torch.zeros(0, 16)), r"weight must have at least one row"),
        (dict(bias=torch.zeros(2, 16)), r"bias must have the shape of weight, \(3, 16\), got \(2, 16\)"),
        (dict(row=torch.zeros(7, dtype=torch.int32)), r"row must be \(8,\) of torch.int32, got \(7,\)"),
        (dict(row=torch.zeros(8, dtype=torch.int64)), r"row must be \(8,\) of torch.int32, got \(8,\) torch.int64"),
        (dict(branch=torch.zeros(8, 15)), r"branch must have the shape of x, \(8, 16\), got \(8, 15\)"),
        (dict(gamma=torch.zeros(15)), r"gamma must be \(16,\), got \(15,\)"),
        (dict(branch=None), r"gamma scales the branch: it needs one"),
        (dict(weight=torch.zeros(3, 16, device="meta")), r"all tensors must be on one device, got .*weight on meta"),
        (dict(backend="fast"), r"backend must be one of"),
    ],
)
def test_wrong_use_says_so(change, message):
    inputs = {k: v.cpu() for k, v in make_inputs([3, 5], 16, torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        layer_norm(**inputs | change)


@pytest.mark.parametrize("step", ["forward", "fp8"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=torch.zeros(3, 15)), r"weight must be \(lengths, 16\)"),
        (dict(weight=torch.zeros(16), bias=None), r"weight must be \(lengths, 16\), got \(16,\)"),
        (dict(weight=torch.zeros(3, 16, 1)), r"weight must be \(lengths, 16\)"),
        (dict(row=torch.zeros(7, dtype=torch.int32)), r"row must be \(8,\)"),
        (dict(row=torch.zeros(16, dtype=torch.int32)[::2]), r"row must be contiguous"),
        (dict(row=torch.empty(0, dtype=torch.int32)), r"row must be \(8,\)"),
        (dict(x=torch.zeros(1, 16).expand(8, 16)), r"x must be contiguous"),
        (dict(branch=torch.zeros(2, 16)), r"branch must have the shape of x"),
    ],
)
def test_the_torch_ops_refuse_what_does_not_fit(change, message, step):
    """By name, whichever backend would run: one in Triton reads where it is told to."""
    inputs = {k: v.cpu() for k, v in make_inputs([3, 5], 16, torch.float32).items()} | change
    op = getattr(torch.ops.revit_kernels, f"layer_norm_{step}")
    with pytest.raises(ValueError, match=message):
        op(**inputs, eps=1e-6, rms=False, backend=None)
