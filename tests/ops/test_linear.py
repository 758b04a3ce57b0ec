import copy
import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, assert_close, check, every_dtype, require
from torch import nn

from revit_kernels import VarLenViT, dispatch, modules
from revit_kernels.dispatch import choose
from revit_kernels.models.quantize import fp8
from revit_kernels.modules.fp8 import Fp8Linear
from revit_kernels.modules.linear import linear_gated, linear_then
from revit_kernels.ops import layer_norm, layer_norm_fp8, linear, linear_fp8
from revit_kernels.ops.linear import ACTIVATIONS, GATES, choice, sample
from revit_kernels.ops.linear.fp8 import E4M3, Quantized, quantize
from revit_kernels.ops.linear.products import rows_are_independent

SHAPES = {  # rows, in, out
    "no row": (0, 16, 8),
    "one row": (1, 24, 16),
    "few": (5, 24, 34),
    "odd": (7, 27, 30),
    "one input": (9, 1, 6),
    "tile edges": (129, 64, 128),
    "beyond tile edges": (65, 65, 130),
    "several tiles": (140, 96, 300),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
backends = pytest.mark.parametrize("backend", choice.VENDOR_FIRST)
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
gates = pytest.mark.parametrize("gate", GATES, ids=str)


def make_inputs(rows, inputs, out, dtype, gate=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return {"x": random(rows, inputs), "weight": random(out, inputs) / inputs**0.5, "bias": random(out)}


def without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


def interpreted(backend):
    return backend == "triton" and DEVICE == "cpu"


# ------------------------------------------------------------------ the contract


@backends
@every_dtype
@shapes
def test_everything_at_once(shape, dtype, backend):
    check(linear, make_inputs(*shape, dtype) | {"activation": "gelu"}, backend)


@backends
@every_dtype
@activations
@gates
def test_activations_and_gates(activation, gate, dtype, backend):
    inputs = make_inputs(20, 40, 70, dtype, gate) | {"activation": activation, "gate": gate}
    check(linear, inputs, backend)


@backends
@every_dtype
@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
def test_without_a_bias(activation, dtype, backend):
    check(linear, without(make_inputs(9, 32, 48, dtype), "bias") | {"activation": activation}, backend)


@backends
@every_dtype
def test_rows_may_be_apart(dtype, backend):
    inputs = make_inputs(9, 40, 24, dtype)
    wide = torch.cat([inputs["x"], torch.full_like(inputs["x"], torch.nan)], 1)
    views = {"x": wide[:, :40], "weight": inputs["weight"].t().contiguous().t()}
    require("linear", backend, *inputs.values(), "silu", None, False)
    for name, view in views.items():
        y = linear(**inputs | {name: view}, activation="silu", backend=backend)
        assert_close(name, y, linear(**inputs, activation="silu", backend="reference"), y)
        check(linear, inputs | {name: view, "activation": "silu"}, backend)


@backends
@every_dtype
@gates
def test_memory_may_begin_anywhere(gate, dtype, backend):
    inputs = make_inputs(6, 48, 32, dtype, gate) | {"activation": "silu", "gate": gate}
    for name in ("x", "weight", "bias"):
        room = inputs[name].new_empty(inputs[name].numel() + 1)
        inputs[name] = room[1:].view(inputs[name].shape).copy_(inputs[name])
    check(linear, inputs, backend)


@every_dtype
@pytest.mark.parametrize("backend", ["triton", "vendor"])
def test_a_row_does_not_depend_on_its_company(backend, dtype):
    if backend == "vendor" and (DEVICE != "cpu" or not rows_are_independent()):
        pytest.skip("the vendor picks its algorithm by the number of rows")
    if interpreted(backend):
        pytest.skip("triton: in the interpreter NumPy multiplies, and a row's bits depend on its place in the tile")
    inputs = make_inputs(150, 72, 96, dtype)
    require("linear", backend, *inputs.values(), "gelu", None, False)

    def some(start, end):
        return linear(**inputs | {"x": inputs["x"][start:end]}, activation="gelu", backend=backend)

    whole = some(0, 150)
    for start, end in ((0, 1), (17, 18), (3, 140), (128, 150)):
        assert torch.equal(some(start, end), whole[start:end]), (start, end)


@backends
def test_rows_of_nan_spoil_none_but_themselves(backend):
    inputs = make_inputs(70, 32, 48, torch.float32)
    require("linear", backend, *inputs.values(), "gelu", None, False)
    inputs["x"][3] = torch.nan
    y = linear(**inputs, activation="gelu", backend=backend)
    assert y[3].isnan().all() and torch.isfinite(y[torch.arange(70) != 3]).all()


@backends
def test_it_is_torchs_linear_and_gelu(backend):
    inputs = make_inputs(12, 32, 48, torch.float32)
    x, weight, bias = inputs.values()
    require("linear", backend, *inputs.values(), "gelu", None, False)
    for activation, function in (
        (None, lambda h: h),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda h: F.gelu(h, approximate="tanh")),
        ("silu", F.silu),
    ):
        ours = linear(**inputs, activation=activation, backend=backend)
        exact = function(F.linear(x.double(), weight.double(), bias.double()))
        assert_close(str(activation), ours, exact, function(F.linear(x, weight, bias)))


@backends
@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("weight", "bias"), ("bias", "x")], ids=str)
def test_gradients_that_nobody_wants_are_left_out(frozen, backend):
    check(linear, make_inputs(9, 32, 48, torch.float32) | {"activation": "gelu"}, backend, constant=frozen)


# ------------------------------------------------------------------ registration, compiler, errors


@gates
@pytest.mark.parametrize("keep", [False, True])
def test_registration(keep, gate):
    inputs = make_inputs(6, 16, 24, torch.float32, gate)
    args = (*inputs.values(), "gelu", gate, keep)
    torch.library.opcheck(torch.ops.revit_kernels.linear_forward.default, (*args, None))
    plain = (inputs["x"], inputs["weight"], None, None, gate, keep, None)
    torch.library.opcheck(torch.ops.revit_kernels.linear_forward.default, plain)
    if keep:
        y, kept = torch.ops.revit_kernels.linear_forward.default(*args, None)
        x, weight, bias = inputs.values()
        for needs in ((True, True), (False, True), (True, False)):
            backward = (y, x, weight, bias, kept, "gelu", gate, *needs, None)
            torch.library.opcheck(torch.ops.revit_kernels.linear_backward.default, backward)


def test_sample_is_what_forward_takes():
    y, _ = torch.ops.revit_kernels.linear_forward.default(*sample(DEVICE), None)
    assert y.shape == (2, 2)


def test_autocast_casts():
    inputs = make_inputs(6, 16, 24, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear(inputs["x"], inputs["weight"], inputs["bias"], activation="gelu")
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(x=torch.zeros(6, 15)),
            r"x and weight must be \(rows, in\) and \(out, in\), got \(6, 15\) and \(24, 16\)",
        ),
        (dict(x=torch.zeros(2, 3, 16)), r"x and weight must be"),
        (dict(x=torch.zeros(6, 16, dtype=torch.float16)), r"of one floating-point dtype, got torch.float16 and"),
        (dict(weight=torch.zeros(0, 16)), r"weight must have at least one number"),
        (dict(bias=torch.zeros(23)), r"bias must be \(24,\) .*got \(23,\)"),
        (dict(bias=torch.zeros(24, dtype=torch.int64)), r"bias must be \(24,\) of a floating-point dtype, .*int64"),
        (dict(activation="relu"), r"activation must be one of .* got 'relu'"),
        (dict(gate="both"), r"gate must be one of .* got 'both'"),
        (dict(weight=torch.zeros(3, 16), bias=None, gate="last"), r"out must be even, got 3"),
        (dict(bias=torch.zeros(24, device="meta")), r"all tensors must be on one device, got .*bias on meta"),
        (dict(backend="fast"), r"backend must be one of"),
    ],
)
def test_wrong_use_says_so(change, message):
    inputs = {k: v.cpu() for k, v in make_inputs(6, 16, 24, torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        linear(**inputs | change)


# ------------------------------------------------------------------ which backend runs


def test_the_arithmetic_favours_epilogues_of_short_products():
    assert choice.favours_epilogue(384, 2, "gelu", None) and not choice.favours_epilogue(768, 2, "gelu", None)
    assert not choice.favours_epilogue(16, 2, None, None)
    assert choice.saved_bytes(2, "gelu", None) == 4 and choice.saved_bytes(2, "silu", "first") == 6


def test_duels_make_the_table():
    key = choice.shape_key("forward", torch.bfloat16, (3072, 768), "gelu", None)
    assert key == "forward bfloat16 768x3072 gelu"
    path = Path(__file__).parents[2] / "benchmarks" / "choose_linear.py"
    spec = importlib.util.spec_from_file_location("choose_linear", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def duel(key, speedup, rival="vendor"):
        return {"extra_info": {"device": "GPU", "shape_key": key, "speedup": speedup, "rival": rival}}

    duels = [duel("a", 0.9), duel("a", 1.2), duel("b", 0.8), duel("b", 1.1), duel("b", 5, "bf16"), {"extra_info": {}}]
    assert module.winners(duels) == {"GPU": {"a": "triton", "b": "vendor"}}


def test_on_a_cpu_our_product_runs_at_inference_and_the_vendors_in_training():
    *args, _ = (t.cpu() if torch.is_tensor(t) else t for t in sample())

    def chosen(recorded):
        return choose("linear", None, *args, recorded, order=choice.forward_order(*args, recorded)).__name__

    assert chosen(False).endswith(".cpu") or isinstance(dispatch.load("linear", "cpu"), str)
    assert chosen(True).endswith(".vendor" if rows_are_independent() else ".cpu")


def test_a_backend_forced_for_all_ops_is_passed_over_where_an_op_has_none_such(monkeypatch):
    monkeypatch.setattr(dispatch, "_requested", "cpu")
    x = torch.ones(2, 8)
    assert torch.equal(linear(x, x), torch.full((2, 2), 8.0))
    monkeypatch.setattr(dispatch, "_requested", "reference")
    assert choose("linear", None, *sample(), order=choice.VENDOR_FIRST).__name__.endswith("reference")
    monkeypatch.setattr(dispatch, "_requested", "fast")
    with pytest.raises(ValueError, match="backend must be one of"):
        linear(x, x)


# ------------------------------------------------------------------ modules


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.Sigmoid])
def test_gated_modules_on_any_device(act, gate_last):
    torch.manual_seed(0)
    mlp = modules.GluMlp(32, 48, act_layer=act, gate_last=gate_last, device=DEVICE)
    x = torch.randn(2, 5, 32, device=DEVICE)
    first, second = F.linear(x, mlp.fc1.weight, mlp.fc1.bias).chunk(2, -1)
    gated = first * mlp.act(second) if gate_last else mlp.act(first) * second
    torch.testing.assert_close(mlp(x), F.linear(gated, mlp.fc2.weight, mlp.fc2.bias))
    which = "last" if gate_last else "first"
    torch.testing.assert_close(linear_gated(mlp.fc1, mlp.act, x, which), gated)
    seen = []
    mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(linear_gated(mlp.fc1, mlp.act, x, which), gated)
    assert seen


def test_the_way_of_a_gpu_gives_what_a_cpus_does(monkeypatch):
    """The modules call the op on CUDA tensors only: here they are told that these are some."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 48, device=DEVICE), torch.randn(4, 5, 32, device=DEVICE)
    usual = [linear_then(layer, act, x) for act in (nn.GELU(), nn.GELU("tanh"), nn.SiLU())]
    usual.append(linear_gated(layer, nn.SiLU(), x, "first"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type == DEVICE))
    monkeypatch.setattr(choice, "_lookup", lambda *_: None)
    called = []
    real = torch.ops.revit_kernels.linear_forward.default
    module = importlib.import_module("revit_kernels.ops.linear")
    monkeypatch.setattr(module, "_forward", lambda *a: called.append(a[3:5]) or real(*a[:-1], "reference"))
    with torch.no_grad():
        ours = [linear_then(layer, act, x) for act in (nn.GELU(), nn.GELU("tanh"), nn.SiLU())]
        ours.append(linear_gated(layer, nn.SiLU(), x, "first"))
    assert called == [("gelu", None), ("gelu_tanh", None), ("silu", None), ("silu", "first")]
    for one, other in zip(ours, usual):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------ e4m3


def make_quantized(rows, inputs, out, group=None, gate=None, dtype=torch.float32):
    tensors = make_inputs(rows, inputs, out, dtype, gate)
    tensors["x"] = quantize(tensors["x"], group, "reference")
    tensors["weight"] = quantize(tensors["weight"], None, "reference")
    return tensors


def exactly(inputs, activation, gate):
    """What the quantized numbers stand for, through `linear` in float64."""
    wide = {k: v.dequantize(torch.float64) if isinstance(v, Quantized) else v.double() for k, v in inputs.items()}
    return linear(**wide, activation=activation, gate=gate, backend="reference")


def attempt(call):
    """The call's result; skips where the backend refuses."""
    try:
        return call()
    except NotImplementedError as refused:
        pytest.skip(str(refused))


@backends
@every_dtype
@pytest.mark.parametrize("group", [None, 16, 128], ids=str)
def test_quantized_rows_are_within_half_a_step(group, dtype, backend):
    x = torch.randn(37, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[3] *= 1e-4
    x[5] = 0
    q = attempt(lambda: quantize(x, group, backend))
    assert q.values.dtype == E4M3 and q.scale.shape == (37, 256 // (group or 256)) and q.dtype == dtype
    step = torch.maximum(x.double().abs() * 2**-3, q.scale.double().repeat_interleave(group or 256, 1) * 2**-9)
    assert ((q.dequantize(torch.float64) - x.double()).abs() <= 0.505 * step).all()
    assert not q.values[5].float().any() and (q.scale[5] == 1).all()
    largest = q.values.float().abs().view(37, -1, group or 256).amax(2)
    assert ((largest == 448) | (largest == 0)).all()


@backends
@every_dtype
@activations
@gates
@pytest.mark.parametrize("group", [None, 128], ids=str)
def test_product_in_e4m3(group, gate, activation, dtype, backend):
    inputs = make_quantized(20, 256, 96, group, gate, dtype)
    for names in ((), ("bias",)):
        some = without(inputs, *names)
        whole = some | {"activation": activation, "gate": gate}
        y = attempt(lambda whole=whole: linear_fp8(**whole, backend=backend))
        rough = linear_fp8(**whole, backend="reference")
        assert_close("output", y, exactly(some, activation, gate), rough)


@backends
@gates
@pytest.mark.parametrize("group", [None, 128], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_the_result_may_be_e4m3(rows, group, gate, backend):
    inputs = make_quantized(rows, 128, 512, group, gate)
    form = {"activation": "gelu", "gate": gate}
    y = attempt(lambda: linear_fp8(**inputs, **form, quantized=True, backend=backend))
    columns = 256 if gate else 512
    assert y.values.shape == (rows, columns) and y.values.dtype == E4M3 and y.scale.shape == (rows, columns // 128)
    rough = linear_fp8(**inputs, **form, quantized=True, backend="reference")
    exact = exactly(inputs, "gelu", gate)
    assert torch.isfinite(y.scale).all()
    if rows:
        largest = exact.unflatten(1, (-1, 128)).abs().amax(2) / 448
        assert_close("scale", y.scale, largest, rough.scale)
        error, usual = ((q.dequantize(torch.float64) - exact).square().mean().sqrt() for q in (y, rough))
        assert error <= 1.01 * usual, f"{error} against {usual}"


@backends
@every_dtype
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("branch", [False, True], ids=["alone", "branch"])
def test_layer_norm_quantizes(branch, rms, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    x, other, weight, bias = (
        torch.randn(*s, generator=generator).to(DEVICE, dtype) for s in ((9, 48), (9, 48), (3, 48), (3, 48))
    )
    row = torch.tensor([0, 0, 1, 1, 1, 2, 2, -1, -1], dtype=torch.int32, device=DEVICE)
    x[7:] = torch.nan
    options = {"branch": other, "gamma": weight[0]} if branch else {}
    values, scale, total = attempt(lambda: layer_norm_fp8(x, weight, bias, row, rms=rms, backend=backend, **options))
    usual = layer_norm(x, weight, bias, row, rms=rms, backend=backend if backend != "reference" else None, **options)
    y, sum = usual if branch else (usual, x)
    assert values.dtype == E4M3 and scale.shape == (9, 1) and scale.dtype == torch.float32
    assert torch.equal(total.nan_to_num(), sum.nan_to_num()) or not interpreted(backend)
    assert not values[7:].float().any()
    error = (values.float() * scale - y.float()).abs()
    y = y.float().abs()
    assert (error <= 1.01 * (y * 2**-4 + scale * 2**-10) + y * torch.finfo(dtype).eps).all()


def test_e4m3_registration():
    inputs = make_quantized(4, 128, 256)
    x, weight, bias = inputs.values()
    rows = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    op = torch.ops.revit_kernels
    tests = ("test_faketensor", "test_autograd_registration")  # test_schema multiplies e4m3, which torch cannot
    torch.library.opcheck(op.linear_quantize.default, (rows, 128, None), test_utils=tests)
    scales = (x.values, x.scale, weight.values, weight.scale[:, 0].clone())
    for quantized in (False, True):
        args = (*scales, bias, "gelu", None, torch.float32, quantized, None)
        torch.library.opcheck(op.linear_fp8.default, args, test_utils=tests)
    norm = (rows, bias[None], None, None, rows, bias, 1e-6, False, None)
    torch.library.opcheck(op.layer_norm_fp8.default, norm, test_utils=tests)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(x=Quantized(torch.zeros(4, 256), torch.ones(4, 1))),
            r"x must be of torch.float8_e4m3fn, got torch.float32",
        ),
        (dict(x=Quantized(torch.zeros(4, 256).to(E4M3), torch.ones(4, 3))), r"scale of x must be \(4, 1\) or \(4, 2\)"),
        (
            dict(weight=Quantized(torch.zeros(8, 256).to(E4M3), torch.ones(8, 2))),
            r"scale of weight must be \(8, 1\), got",
        ),
        (dict(quantized=True), r"a quantized result has a scale every 128 columns, got 8 columns"),
    ],
)
def test_wrong_use_of_e4m3_says_so(change, message):
    x, weight = (Quantized(torch.zeros(n, 256).to(E4M3), torch.ones(n, 1)) for n in (4, 8))
    with pytest.raises(ValueError, match=message):
        linear_fp8(**{"x": x, "weight": weight} | change)
    with pytest.raises(ValueError, match="multiple of the group"):
        quantize(torch.zeros(3, 100), 64)
    with pytest.raises(ValueError, match="multiple of the group"):
        torch.ops.revit_kernels.linear_quantize(torch.zeros(3, 8, device="meta"), 0, None)


# ------------------------------------------------------------------ whole models


def make_model(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    return VarLenViT(**sizes | options).to(DEVICE).eval()


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize(
    "options", [{}, {"mlp_layer": modules.GluMlp}, {"block_fn": modules.ParallelScalingBlock}], ids=str
)
def test_a_quantized_model_answers_alike(options):
    model = make_model(**options)
    with torch.no_grad():
        usual = model(images())
        assert fp8(model) is model
        ours = model(images())
        mixed = model(images(), grids=[(4, 4), (2, 2), (3, 4)])
    assert ours.dtype == usual.dtype and torch.isfinite(mixed).all()
    assert (ours - usual).norm() <= 0.1 * usual.norm()
    assert not torch.equal(ours, usual)


def test_which_layers_are_quantized():
    model = fp8(make_model())
    names = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"blocks.{i}.{part}" for i in range(2) for part in parts}
    assert type(model.head) is nn.Linear and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="in fp8 already"):
        fp8(model)


def test_a_quantized_model_is_moved_copied_and_stored():
    model = fp8(make_model())
    with torch.no_grad():
        usual = model(images())
        half = copy.deepcopy(model).bfloat16()
        assert half.blocks[0].mlp.fc1.weight.dtype == E4M3 and half.blocks[0].mlp.fc1.scale.dtype == torch.float32
        assert half.blocks[0].mlp.fc1.bias.dtype == torch.bfloat16
        assert half(images().bfloat16()).dtype == torch.bfloat16
        other = fp8(make_model())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images()), usual)
    inner = half.blocks[0].norm1.__dict__["quantizes_for"][0][0]
    assert inner is half.blocks[0].attn


def test_activations_go_from_kernel_to_kernel_in_e4m3(monkeypatch):
    model = fp8(make_model())
    seen = []
    real = Fp8Linear.forward
    monkeypatch.setattr(
        Fp8Linear, "forward", lambda self, x, *a, **k: seen.append(isinstance(x, Quantized)) or real(self, x, *a, **k)
    )
    with torch.no_grad():
        model(images())
    assert seen == [True, False, True, True] * 2  # qkv, proj, fc1, fc2


def test_a_hooked_layer_sees_numbers_not_their_bits():
    model = fp8(make_model())
    seen = []
    for layer in (model.blocks[0].mlp.fc1, model.blocks[0].attn, model.blocks[1].mlp.fc2, model.blocks[1].norm1):
        layer.register_forward_hook(lambda module, args, out: seen.extend([*args, out]))
    with torch.no_grad():
        model(images())
    assert seen and all(isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in seen)


def test_a_quantized_model_is_for_inference_only():
    model = fp8(make_model())
    x = images().requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradients"):
        model(x)
    model(images())  # gradients may be recorded, where nothing needs one


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match="nothing to quantize"):
        fp8(make_model(embed_dim=36, num_heads=2, mlp_ratio=1.0))


def test_gpus_without_e4m3_are_refused(monkeypatch):
    model = make_model()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), requires_grad_=lambda mode: None)
    monkeypatch.setattr(model, "parameters", lambda: iter([on_gpu]))
    with pytest.raises(NotImplementedError, match=r"needs a GPU of compute capability 8.9 .* cuda:0 has 8.0"):
        fp8(model)
