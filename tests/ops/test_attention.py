from itertools import pairwise

import pytest
import torch
from contract import DEVICE, assert_close, check, every_backend, every_dtype, require, run

from revit_kernels.ops.attention import attention, rotate, sample

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


@every_backend
@every_dtype
def test_an_image_is_the_same_alone_and_in_company(dtype, backend):
    if backend == "reference":
        pytest.skip("reference: its matrix products are the vendor's")
    lengths = [5, 70] if backend == "triton" and DEVICE == "cpu" else [50, 129, 17, 64, 7]
    inputs = make_inputs(lengths, dtype=dtype, dim=40)
    require("attention", backend, *(inputs[k] for k in ("q", "k", "v")))
    together = run(attention, inputs, backend)
    ends = inputs["cu_seqlens"].tolist()
    seed = torch.cos(torch.arange(inputs["q"].numel(), device=DEVICE) * 1.0).view(inputs["q"].shape).to(dtype)
    for first, last in pairwise(ends):
        q, k, v = (inputs[name][first:last].detach().clone().requires_grad_() for name in "qkv")
        alone = attention(q, k, v, boundaries([last - first]), 256, backend=backend)
        grads = torch.autograd.grad(alone, (q, k, v), seed[first:last])
        assert torch.equal(alone, together["output 0"][first:last])
        for name, grad in zip("qkv", grads):
            assert torch.equal(grad, together[f"grad of {name}"][first:last]), name


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


@pytest.mark.parametrize("rotate_half", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_rotary_is_timms(rotate_half, per_head):
    timm = pytest.importorskip("timm.layers.pos_embed_sincos")
    x = torch.randn(6, 2, 8)
    cos, sin = torch.randn(2, 6, 2, 8) if per_head else torch.randn(2, 6, 8)
    c, s = (cos, sin) if per_head else (cos[:, None], sin[:, None])
    assert torch.equal(rotate(x, cos, sin, rotate_half), timm.apply_rot_embed(x, s, c, half=rotate_half))


@pytest.mark.parametrize("rotate_half", [False, True])
def test_rotary(rotate_half):
    inputs = make_inputs([9, 20], dim=24)
    cos, sin = torch.randn(2, 29, 24, device=DEVICE)
    turned = {k: rotate(x, cos, sin, rotate_half) if k in "qk" else x for k, x in inputs.items()}
    assert torch.equal(attention(**inputs, rotary=(cos, sin, rotate_half)), attention(**turned))
    assert torch.equal(
        attention(**inputs, rotary=(cos, sin)),
        attention(**inputs, rotary=(cos, sin, False)),
    )


def test_nan_in_the_tail_does_not_reach_the_gradients_of_the_angles():
    inputs = make_inputs([4, 3], dim=8, tail=2)
    inputs["q"][7:] = float("nan")
    cos, sin = torch.randn(2, 9, 8, device=DEVICE).unbind(0)
    grads = torch.autograd.grad(
        attention(**inputs, rotary=(cos.requires_grad_(), sin.requires_grad_())).sum(), (cos, sin)
    )
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_registration():
    inputs = make_inputs([3, 5], dim=16)
    q, k, v, cu_seqlens, longest = inputs.values()
    arguments = (q, k, v, cu_seqlens, longest, cu_seqlens, longest, 0.25)
    torch.library.opcheck(torch.ops.revit_kernels.attention_forward.default, (*arguments, None))
    out, lse = torch.ops.revit_kernels.attention_forward(*arguments, None)
    arguments = (out, q, k, v, out, lse, *arguments[3:], None)
    torch.library.opcheck(torch.ops.revit_kernels.attention_backward.default, arguments)


def test_compiles_whole_with_gradients():
    def loss(q, k, v, cu_seqlens, longest):
        return attention(q, k, v, cu_seqlens, longest).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for lengths in ([3, 5], [7, 6, 2]):
        inputs = make_inputs(lengths, dim=16)
        arguments = (inputs["cu_seqlens"], inputs["max_seqlen"])
        tensors = [inputs[name].detach().requires_grad_() for name in "qkv"]
        expected = torch.autograd.grad(loss(*tensors, *arguments), tensors)
        actual = torch.autograd.grad(compiled(*tensors, *arguments), tensors)
        torch.testing.assert_close(actual, expected)


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
        (dict(scale=-1.0), "scale must be finite and not negative, got -1.0"),
        (dict(rotary=torch.zeros(2, 8, 16)), r"rotary must be \(cos, sin\)"),
        (dict(rotary=(torch.zeros(8, 8), torch.zeros(8, 8))), r"cos of rotary must be \(8, 16\)"),
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
    with pytest.raises(RuntimeError, match="cu_seqlens must not decrease and must stay within the 8 tokens"):
        attention(q, q, q, torch.tensor(ends, dtype=torch.int32), 5)


def test_a_named_backend_never_falls_back():
    q = torch.zeros(8, 1, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"cpu: .*"):
        attention(q, q, q, torch.tensor([0, 8], dtype=torch.int32), 8, backend="cpu")
