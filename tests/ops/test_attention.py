import pytest
import torch
from contract import DEVICE, assert_close, check, every_backend, every_dtype, require, run
from stubbed import stubbed

from revit_kernels import dispatch
from revit_kernels.dispatch import load, refusal
from revit_kernels.ops.attention import Rotary, attention, sample
from revit_kernels.ops.attention.rotary import rotate

CASES = {
    "no image": dict(lengths=[]),
    "no token": dict(lengths=[0, 0]),
    "one image": dict(lengths=[7]),
    "lengths 0 and 1": dict(lengths=[0, 1, 5, 0]),
    "tile edges": dict(lengths=[63, 64, 65], heads=1, dim=16),
    "double tile edges": dict(lengths=[127, 128, 129], heads=1, dim=8),
    "menu": dict(lengths=[50, 17, 101, 26], heads=3, dim=64),
    "long": dict(lengths=[1030, 3], heads=1, dim=8),
    "dim 72": dict(lengths=[19], dim=72),
    "dim 80": dict(lengths=[33], dim=80),
    "dim 88": dict(lengths=[33], dim=88),
    "dim 96": dict(lengths=[33], dim=96),
    "dim 104": dict(lengths=[33], dim=104),
    "dim 128": dict(lengths=[70], dim=128),
    "odd dim": dict(lengths=[18, 5], dim=27),
    "cross": dict(lengths=[1, 1, 1], lengths_k=[5, 70, 1], dim=32),
    "cross, empty on either side": dict(lengths=[2, 0, 9], lengths_k=[0, 6, 20], dim=32),
}
# Lengths, and pairs of channels turned of each head: all, some, or a number that no vector and no tile divides.
TURNED = {
    "no image": dict(lengths=[], pairs=32),
    "lengths 0 and 1": dict(lengths=[0, 1, 5, 0], pairs=32),
    "tile edges": dict(lengths=[63, 64, 65], heads=1, dim=16, pairs=8),
    "double tile edges": dict(lengths=[127, 128, 129], heads=1, dim=16, pairs=8),
    "menu": dict(lengths=[50, 17, 101, 26], heads=3, dim=64, pairs=32),
    "dim 80": dict(lengths=[33], dim=80, pairs=40),
    "dim 96, one axis of three": dict(lengths=[33], dim=96, pairs=16),
    "dim 128": dict(lengths=[70], dim=128, pairs=64),
    "partly": dict(lengths=[19, 7], dim=72, pairs=24),
    "odd dim": dict(lengths=[18, 5], dim=27, pairs=13),
    "one pair": dict(lengths=[9], dim=8, pairs=1),
}
SMALL_TURNED = ("lengths 0 and 1", "tile edges", "partly", "odd dim")
SMALL = ("no image", "one image", "lengths 0 and 1", "tile edges", "dim 72", "odd dim", "cross, empty on either side")


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def make_inputs(lengths, lengths_k=None, heads=2, dim=64, dtype=torch.float32, tail=0):
    """q, k and v are views of one fused buffer, unless the keys are others than the queries."""
    torch.manual_seed(0)
    tokens = sum(lengths) + tail
    q, k, v = torch.randn(tokens, 3, heads, dim).to(DEVICE, dtype).unbind(1)
    inputs = dict(q=q, k=k, v=v, cu_seqlens=boundaries(lengths), max_seqlen=max(lengths, default=0))
    if lengths_k is not None:
        k, v = torch.randn(sum(lengths_k) + tail, 2, heads, dim).to(DEVICE, dtype).unbind(1)
        inputs |= dict(k=k, v=v, cu_seqlens_k=boundaries(lengths_k), max_seqlen_k=max(lengths_k, default=0))
    return inputs


def refused_when_slow(backend, name):
    if backend == "triton" and DEVICE == "cpu" and name not in SMALL:
        pytest.skip("triton: the interpreter is slow: run on a GPU")


@every_backend
@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_contract(name, dtype, backend):
    refused_when_slow(backend, name)
    check(attention, make_inputs(**CASES[name], dtype=dtype), backend)


@pytest.mark.skipif(DEVICE == "cuda", reason="every_dtype has it on a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["lengths 0 and 1", "dim 72"])
def test_half_precision_in_the_interpreter(name, backend):
    check(attention, make_inputs(**CASES[name], dtype=torch.float16), backend)


@every_dtype
def test_thread_count_changes_nothing_on_the_cpu(dtype):
    inputs = make_inputs([50, 129, 17, 300], dtype=dtype)
    require("attention", "cpu", *(inputs[k] for k in ("q", "k", "v")))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(attention, inputs, "cpu")
        torch.set_num_threads(3)
        three = run(attention, inputs, "cpu")
    finally:
        torch.set_num_threads(threads)
    for name in one:
        assert torch.equal(one[name], three[name]), name


@every_backend
@every_dtype
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_the_tail_is_zeros_and_its_nan_reaches_nothing(dtype, cross, backend):
    inputs = make_inputs([9, 0, 20], [3, 5, 0] if cross else None, dtype=dtype, dim=24, tail=5)
    require("attention", backend, *(inputs[k] for k in ("q", "k", "v")))
    tokens, keys = 29, 8 if cross else 29
    for name, end in (("q", tokens), ("k", keys), ("v", keys)):
        inputs[name][end:] = float("nan")
        inputs[name] = inputs[name].detach().requires_grad_()
    out = attention(**inputs, backend=backend)
    seed = torch.ones_like(out)
    seed[tokens:] = float("nan")
    grads = torch.autograd.grad(out, [inputs[name] for name in "qkv"], seed)
    for x, end in zip((out, *grads), (tokens, tokens, keys, keys)):
        assert torch.isfinite(x).all()
        assert not x[end:].any()
    whole = {name: x.detach()[: tokens if name == "q" else keys] if name in "qkv" else x for name, x in inputs.items()}
    assert torch.equal(attention(**whole, backend=backend), out[:tokens])


@every_backend
def test_rows_that_no_softmax_would_forgive(backend):
    """Scores far from zero, negative and positive, and a scale of zero."""
    inputs = make_inputs([6, 17], dim=16)
    require("attention", backend, *(inputs[k] for k in ("q", "k", "v")))
    inputs["q"] = inputs["q"] * 300 - 100
    exact = run(attention, inputs, "reference", torch.float64)["output 0"]
    rough = run(attention, inputs, "reference")["output 0"]
    assert_close("output", run(attention, inputs, backend)["output 0"], exact, rough)
    mean = attention(**inputs, scale=0, backend=backend)[:6]
    torch.testing.assert_close(mean, inputs["v"][:6].mean(0, keepdim=True).expand_as(mean))


@every_backend
def test_nan_within_an_image_stays_in_it_and_is_not_hidden(backend):
    inputs = make_inputs([6, 17], dim=16)
    require("attention", backend, *(inputs[k] for k in ("q", "k", "v")))
    inputs["k"][2] = float("nan")
    out = attention(**inputs, backend=backend)
    assert out[:6].isnan().all() and out[6:].isfinite().all()


@every_backend
@every_dtype
def test_strided_views(dtype, backend):
    if backend == "reference":
        pytest.skip("reference: its matrix products are the vendor's")
    inputs = make_inputs([9, 20], dtype=dtype, dim=24)
    require("attention", backend, *(inputs[k] for k in ("q", "k", "v")))
    packed = {k: x.contiguous() if k in "qkv" else x for k, x in inputs.items()}
    expected = run(attention, packed, backend)
    odd = {k: torch.nn.functional.pad(x, (1, 2, 1, 0))[:, 1:, 1:-2] if k in "qkv" else x for k, x in inputs.items()}
    turned = {k: x.mT.contiguous().mT if k in "qkv" else x for k, x in inputs.items()}  # head_dim not contiguous
    flat = {
        k: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape) if k in "qkv" else x
        for k, x in packed.items()
    }
    for views in (inputs, odd, turned, flat):  # flat: contiguous, but not on 16 bytes
        out = attention(**views, backend=backend)
        assert torch.equal(out, expected["output 0"]) and out.is_contiguous()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_boundaries_outside_the_tensors_reach_nothing_there(cross, backend):
    """What lies around q, k and v in memory does not change the result of wrong boundaries."""
    inputs = make_inputs([5, 4], [5, 4] if cross else None, dim=16, dtype=torch.float16)
    require("attention", backend, *(inputs[k] for k in ("q", "k", "v")))
    wide = {name: torch.nn.functional.pad(inputs[name], (0, 0, 0, 0, 40, 40), value=float("nan")) for name in "qkv"}
    wrong = inputs | {name: x[40:-40] for name, x in wide.items()} | {"max_seqlen": 64}
    right = inputs | {"max_seqlen": 64}
    for name in [name for name in inputs if name.startswith("cu_seqlens")]:
        wrong[name] = torch.tensor([-3, 5, 40], dtype=torch.int32, device=DEVICE)
    if cross:
        wrong["max_seqlen_k"] = right["max_seqlen_k"] = 64
    right, wrong = run(attention, right, backend), run(attention, wrong, backend)
    for name in right:
        assert torch.equal(right[name], wrong[name]), name


def turned(q, k, v, cu_seqlens, max_seqlen, cos, sin, row, half, backend=None):
    """The op with the tensors of its rotary table as arguments of their own."""
    return attention(q, k, v, cu_seqlens, max_seqlen, rotary=Rotary(cos, sin, row, half), backend=backend)


def make_turned(lengths, pairs, half, per_head=False, dtype=torch.float32, tail=0, prefix=1, **kwargs):
    """Inputs of `turned`: the first token of each image stays, the others have a few positions, some of them alike."""
    inputs = make_inputs(lengths, dtype=dtype, tail=tail, **kwargs)
    tokens, heads = inputs["q"].shape[:2]
    angles = 3 * torch.randn(23, heads, pairs) if per_head else 3 * torch.randn(23, pairs)
    row = torch.randint(23, (tokens,), dtype=torch.int32).to(DEVICE)
    row[inputs["cu_seqlens"][:-1][inputs["cu_seqlens"].diff() > 0].long()] = -1
    return inputs | dict(cos=angles.cos().to(DEVICE), sin=angles.sin().to(DEVICE), row=row, half=half)


every_pairing = pytest.mark.parametrize("half", [False, True], ids=["neighbours", "halves"])
every_table = pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per head"])


@every_backend
@every_dtype
@every_pairing
@pytest.mark.parametrize("name", TURNED)
def test_contract_turned(name, half, dtype, backend):
    if backend == "triton" and DEVICE == "cpu" and name not in SMALL_TURNED:
        pytest.skip("triton: the interpreter is slow: run on a GPU")
    inputs = make_turned(**TURNED[name], half=half, per_head=name in ("menu", "odd dim"), dtype=dtype)
    check(turned, inputs, backend)


@pytest.mark.skipif(DEVICE == "cuda", reason="every_dtype has it on a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@every_pairing
def test_half_precision_turned_in_the_interpreter(half, backend):
    check(turned, make_turned([19, 7], 24, half, dim=72, dtype=torch.float16), backend)


@every_pairing
@every_table
def test_what_turning_is(half, per_head):
    """Against complex numbers, and its gradients, those of the angles too, against autograd's."""
    inputs = make_turned([9, 0, 20], 12, half, per_head, dtype=torch.float64, dim=32)
    cos, sin, row = inputs["cos"].double(), inputs["sin"].double(), inputs["row"]
    angles = torch.atan2(sin, cos).requires_grad_()

    def plainly(x):
        part = x[..., :24].unflatten(-1, (2, 12)).mT if half else x[..., :24].unflatten(-1, (12, 2))
        per_token = angles[row.clamp(min=0).long()].masked_fill((row < 0).view(-1, *[1] * (angles.ndim - 1)), 0)
        per_token = per_token if per_head else per_token[:, None]
        y = torch.view_as_real(
            torch.view_as_complex(part.contiguous()) * torch.polar(torch.ones_like(per_token), per_token)
        )
        return torch.cat([y.mT.flatten(-2) if half else y.flatten(-2), x[..., 24:]], -1)

    tensors = [inputs[name].detach().requires_grad_() for name in "qkv"]
    lengths = inputs["cu_seqlens"], inputs["max_seqlen"]
    expected = attention(*map(plainly, tensors[:2]), tensors[2], *lengths)
    actual = turned(*tensors, *lengths, angles.cos(), angles.sin(), row, half)
    torch.testing.assert_close(actual, expected)
    results = [torch.autograd.grad(y.square().sum(), [*tensors, angles]) for y in (actual, expected)]
    torch.testing.assert_close(*results)
    back = rotate(rotate(tensors[0], cos, sin, row, half), cos, sin, row, half, back=True)
    torch.testing.assert_close(back, tensors[0])


@every_pairing
@every_table
def test_turning_is_timms(half, per_head):
    timm = pytest.importorskip("timm.layers.pos_embed_sincos")
    x, angles = torch.randn(6, 2, 8), torch.randn(6, 2, 4) if per_head else torch.randn(6, 1, 4)
    cos, sin = (torch.cat([t, t], -1) if half else t.repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))
    table = angles if per_head else angles[:, 0]
    y = rotate(x, table.cos(), table.sin(), torch.arange(6, dtype=torch.int32), half)
    assert torch.equal(y, timm.apply_rot_embed(x, sin, cos, half=half))


@every_backend
@every_dtype
def test_nan_in_the_tail_reaches_nothing_turned(dtype, backend):
    inputs = make_turned([9, 0, 20], 12, False, dtype=dtype, dim=24, tail=5)
    told = (inputs["cos"], inputs["sin"], inputs["row"], False)
    require("attention", backend, *(inputs[k] for k in ("q", "k", "v")), *[None] * 5, *told)
    for name in "qkv":
        inputs[name][29:] = float("nan")
    tensors = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "cos", "sin")]
    named = inputs | dict(zip(("q", "k", "v", "cos", "sin"), tensors))
    out = turned(**named, backend=backend)
    seed = torch.ones_like(out)
    seed[29:] = float("nan")
    for x in (out, *torch.autograd.grad(out, tensors, seed)):
        assert torch.isfinite(x).all()
    assert not out[29:].any()


@pytest.mark.parametrize("backend", ["flash_attn", "cudnn"])
def test_others_backends_do_not_turn(backend):
    inputs = make_turned([4], 4, False, dim=8)
    told = (inputs["cos"], inputs["sin"], inputs["row"], False)
    why = refusal("attention", backend, *(inputs[k] for k in ("q", "k", "v")), *[None] * 5, *told)
    assert "rotary" in why or isinstance(load("attention", backend), str)


ANGLES = torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(8, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(8, 32)), r"q must be \(tokens, heads, head_dim\), got \(8, 32\)"),
        (dict(k=torch.zeros(8, 2, 8)), r"k must be \(tokens, 2, 16\), got \(8, 2, 8\)"),
        (dict(k=torch.zeros(9, 2, 16)), "k must have the 8 tokens of q unless cu_seqlens_k is given, got 9"),
        (dict(v=torch.zeros(9, 2, 16)), r"v must have the shape of k, \(8, 2, 16\), got \(9, 2, 16\)"),
        (dict(v=torch.zeros(8, 2, 16, dtype=torch.float64)), "q, k and v must have one floating-point dtype"),
        (dict(cu_seqlens=torch.tensor([0, 8])), r"cu_seqlens must be \(images \+ 1,\) int32, got \(2,\) torch.int64"),
        (dict(cu_seqlens_k=boundaries([8])), "cu_seqlens_k and max_seqlen_k must be given together"),
        (dict(cu_seqlens_k=boundaries([8]), max_seqlen_k=8), "cu_seqlens_k must have the 3 boundaries of cu_seqlens"),
        (dict(max_seqlen=5.0), "max_seqlen must be an integer, at least 0, got 5.0"),
        (dict(scale=-1.0), "scale must be finite in float32 and not negative, got -1.0"),
        (dict(scale=1e300), "scale must be finite in float32 and not negative, got 1e\\+300"),
        (dict(rotary=ANGLES), "rotary must be a Rotary of cos, sin, row and half, got tuple"),
        (dict(rotary=Rotary(torch.zeros(3, 9), *ANGLES[1:])), r"cos .*, with 1 to 8 pairs, got \(3, 9\)"),
        (dict(rotary=Rotary(torch.zeros(3, 3, 8), *ANGLES[1:])), r"\(positions, 2, pairs\), .* got \(3, 3, 8\)"),
        (dict(rotary=Rotary(ANGLES[0], torch.zeros(3, 7), ANGLES[2])), r"sin .* shape of cos, \(3, 8\), got \(3, 7\)"),
        (dict(rotary=Rotary(ANGLES[0].half(), *ANGLES[1:])), "must be float32, got torch.float16"),
        (dict(rotary=Rotary(*ANGLES[:2], torch.zeros(8))), r"row of rotary must be \(8,\) int32, got \(8,\) torch.f"),
        (
            dict(rotary=Rotary(*ANGLES), cu_seqlens_k=boundaries([3, 5]), max_seqlen_k=5),
            "rotary needs queries and keys of the same tokens",
        ),
        (dict(k=torch.zeros(8, 2, 16, device="meta")), "all tensors must be on one device"),
        (dict(backend="tpu"), "backend must be one of"),
    ],
    ids=str,
)
def test_wrong_use(change, message):
    tensors = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in make_inputs([3, 5], dim=16).items()}
    with pytest.raises(ValueError, match=message):
        attention(**tensors | change)


@pytest.mark.parametrize("ends", [[0, 5, 3], [0, 5, 9], [-1, 5, 8]], ids=str)
def test_boundaries_outside_the_buffer_are_an_error_on_the_cpu(ends):
    require("attention", "cpu", *sample())
    q = torch.zeros(8, 1, 8)
    with pytest.raises(ValueError, match="cu_seqlens must not decrease and must stay within the 8 tokens"):
        attention(q, q, q, torch.tensor(ends, dtype=torch.int32), 5)


def test_positions_outside_the_table_are_an_error_on_the_cpu():
    require("attention", "cpu", *sample())
    q, row = torch.zeros(8, 1, 8), torch.full((8,), 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="row of rotary must stay within the 3 positions, got 3"):
        turned(q, q, q, boundaries([8]).cpu(), 8, torch.ones(3, 4), torch.zeros(3, 4), row, False)


def test_gradients_of_wide_rotated_heads_run_on_triton_or_are_refused_by_name():
    """On a GPU the CUDA kernels have none above a head_dim of 96: a caller who named them is told so."""
    with stubbed():
        for dim, backend in ((96, "cuda"), (128, "triton")):
            q, table = torch.empty(8, 2, dim, device="meta").bfloat16(), torch.empty(8, dim // 2, device="meta")
            lengths = (torch.empty(2, dtype=torch.int32, device="meta"), 8) * 2
            args = (q, q, q, q, q, torch.empty(8, 2, device="meta"), *lengths, 1.0, table, table, None, False)
            chosen = dispatch.choose("attention", None, *args, step="backward")
            assert chosen.__name__ == f"revit_kernels.ops.attention.{backend}"
        with pytest.raises(NotImplementedError, match=r"^attention: cuda: gradients of what .* 96, got 128$"):
            dispatch.choose("attention", "cuda", *args, step="backward")
