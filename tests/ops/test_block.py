"""A whole block: the op against its definition."""

import pytest
import torch
from contract import DEVICE, assert_close, every_backend, require

from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.ops.block import BlockWeights, Eps, Form, block, sample

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="the whole block is for CPUs")
# (lengths, dim, heads, hidden): row tiles and panels with and without a rest, and the shapes of the zoo
CASES = {
    "empty": ([], 32, 2, 64),
    "one token": ([1], 32, 2, 64),
    "menu": ([197, 101, 50, 17, 50, 17], 384, 6, 1536),
    "tile edges": ([8, 7, 9, 1, 0, 63], 192, 3, 768),
    "odd widths": ([5, 31, 2], 20, 1, 52),
    "wide": ([33, 12], 768, 12, 3072),
    "long": ([700], 64, 1, 256),
}
DTYPES = [torch.float32, torch.bfloat16]
HOW = (list(Eps()), False, 0.1, "gelu", None, None, None, False, None)
# what a block may have beside a plain one's parts: make's, the op's, and the rotary's
PARTS = {
    "rotated": ({}, {}, {"pairs": 16}),
    "rotated in halves, in part, each head otherwise": ({}, {}, {"pairs": 13, "heads": 2, "half": True}),
    "norms of q and k": ({"qk_norm": True}, {"eps": Eps(q_norm=1e-2, k_norm=1e-3)}, {"pairs": 16}),
    "gated": ({"gate": True}, {"activation": "silu"}, None),
    "norms inside": ({"gate": True, "hidden_norm": True, "attended_norm": True}, {"activation": "silu"}, {"pairs": 8}),
    "a norm of the hidden layer": ({"hidden_norm": True}, {}, None),
    "RmsNorms": ({"qk_norm": True, "hidden_norm": True, "attended_norm": True, "bias": False}, {"rms": True}, None),
}
PARTS = pytest.mark.parametrize("parts, options, angles", PARTS.values(), ids=PARTS)


def make(lengths, dim, heads, hidden, dtype=torch.float32, affines=1, tail=3, gamma=True, bias=True, **parts):
    """parts: `qk_norm`, `attended_norm`, `gate`, `hidden_norm`: whether there are any"""
    torch.manual_seed(0)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    fields = {}

    def normal(*shape, scale=1.0, shift=0.0):
        return (torch.randn(shape) * scale + shift).to(DEVICE, dtype)

    def norm(name, size, wanted=True):
        shape = (affines, size) if affines > 1 else (size,)
        if wanted:
            fields[name], fields[f"{name}_bias"] = normal(*shape, scale=0.2, shift=1), normal(*shape, scale=0.2)

    def linear(name, out, inputs):
        fields[name] = normal(out, inputs, scale=inputs**-0.5)
        fields[f"{name}_bias"] = normal(out, scale=0.5) if bias else None

    norm("norm1", dim), linear("qkv", 3 * dim, dim), linear("proj", dim, dim)
    norm("norm2", dim), linear("fc1", hidden, dim), linear("fc2", dim, hidden)
    for name in ("gamma1", "gamma2"):
        fields[name] = normal(dim, scale=0.3, shift=0.5) if gamma else None
    norm("q_norm", dim // heads, parts.get("qk_norm")), norm("k_norm", dim // heads, parts.get("qk_norm"))
    norm("attended_norm", dim, parts.get("attended_norm")), norm("hidden_norm", hidden, parts.get("hidden_norm"))
    if parts.get("gate"):
        linear("fc1_x", hidden, dim)
    x = normal(int(ends[-1]) + tail, dim)
    x[int(ends[-1]) :] = float("nan")
    row = torch.full((len(x),), -1, dtype=torch.int32)
    for i, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist())):
        row[start:end] = i % affines
    return x, ends, BlockWeights(**fields), heads, row.to(DEVICE) if affines > 1 else None


def make_rotary(x, ends, pairs, heads=None, half=False, positions=40):
    """Angles of which each token but the first of an image has one; of no image: rows that may be anything."""
    angles = torch.randn(positions, *([heads] if heads else []), pairs, device=x.device) * 3
    row = (torch.arange(len(x), dtype=torch.int32, device=x.device) * 7) % positions
    row[ends[:-1].long().clamp(max=len(x) - 1)] = -1
    return Rotary(angles.cos(), angles.sin(), row, half)


def cast(weights, dtype):
    return BlockWeights(*(None if t is None else t.to(dtype) for t in weights))


def check(x, ends, weights, heads, row, backend, **options):
    args = {"row": row, **options}
    try:
        actual = block(x, ends, weights, heads, **args, backend=backend)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    exact = block(x.double(), ends, cast(weights, torch.float64), heads, **args, backend="reference")
    assert_close("block", actual, exact, block(x, ends, weights, heads, **args, backend="reference"))
    assert torch.equal(actual, block(x, ends, weights, heads, **args, backend=backend)), "differs from run to run"
    assert not actual[int(ends[-1]) :].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_contract(backend, dtype, case):
    x, ends, weights, heads, row = make(*CASES[case], dtype=dtype)
    require("block", backend, x, ends, row, *weights, heads, *HOW)
    check(x, ends, weights, heads, row, backend)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, activation):
    """An affine per length, no biases, no LayerScale, another scale and eps, and the other activations."""
    x, ends, weights, heads, row = make([17, 50, 5], 64, 2, 160, dtype, affines=3, gamma=False, bias=False)
    check(x, ends, weights, heads, row, None, activation=activation, scale=0.2, eps=Eps(norm1=1e-3, norm2=1e-5))


@pytest.mark.parametrize("affines", [1, 2])
@pytest.mark.parametrize("lengths, hidden", [([17, 50, 5], 160), ([3], 90), ([70, 33] * 8, 162)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@PARTS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parts_that_a_block_may_have(backend, parts, options, angles, dtype, lengths, hidden, affines):
    """With few rows and with many, and hidden layers that are no multiple of 4."""
    x, ends, weights, heads, row = make(lengths, 64, 2, hidden, dtype, affines, **parts)
    rotary = None if angles is None else make_rotary(x, ends, **angles)
    require("block", backend, x, ends, row, *weights, heads, *HOW)
    check(x, ends, weights, heads, row, backend, rotary=rotary, **options)


@cpu_only
@pytest.mark.parametrize("case", ["menu", "tile edges", "odd widths", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8(dtype, case):
    """What is quantized is the reference's: a step may fall the other way here and there, no more.

    In bf16 more of them do: the definition rounds what the kernel quantizes from fp32.
    """
    x, ends, weights, heads, row = make(*CASES[case], dtype=dtype)
    require_int8(x, ends, row, weights, heads)
    used = slice(0, int(ends[-1]))
    actual = block(x, ends, weights, heads, kind="int8", backend="cpu")[used].double()
    rough = block(x, ends, weights, heads, kind="int8", backend="reference")[used].double()
    exact = block(x.double(), ends, cast(weights, torch.float64), heads, backend="reference")[used]
    assert not torch.isnan(actual).any()
    assert (actual - exact).norm() <= 1.05 * (rough - exact).norm(), "quantized worse than the definition"
    if dtype == torch.float32:
        assert (actual - rough).norm() <= 0.5 * (rough - exact).norm(), "quantized otherwise than the definition"


@cpu_only
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", *BlockWeights._fields])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_what_is_not_finite_is_kept(kind, name, value):
    """A number that is not finite reaches all that the definition lets it reach, quantized or not."""
    every = {part: True for part in ("qk_norm", "attended_norm", "gate", "hidden_norm")}
    x, ends, weights, heads, row = make([5, 3], 32, 2, 64, tail=0, **every)
    require("block", "cpu", *sample())
    if kind:
        require_int8(x, ends, row, weights, heads)
    tensor = x if name == "x" else getattr(weights, name)
    if tensor is None:
        pytest.skip("there is no such part")
    tensor.view(-1)[tensor.numel() // 2] = value
    actual, exact = (block(x, ends, weights, heads, kind=kind, backend=b) for b in ("cpu", "reference"))
    assert torch.equal(actual.isfinite(), exact.isfinite())
    assert not exact.isfinite().all()


def require_int8(x, ends, row, weights, heads):
    from revit_kernels.dispatch import refusal

    if why := refusal("block", "cpu", x, ends, row, *weights, heads, *HOW[:-1], "int8"):
        pytest.skip(why)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@PARTS
def test_int8_parts(parts, options, angles, dtype):
    x, ends, weights, heads, row = make([50, 17, 50], 64, 2, 160, dtype, **parts)
    require_int8(x, ends, row, weights, heads)
    options = options | {"rotary": None if angles is None else make_rotary(x, ends, **angles)}
    used = slice(0, int(ends[-1]))
    actual = block(x, ends, weights, heads, kind="int8", backend="cpu", **options)[used].double()
    rough = block(x, ends, weights, heads, kind="int8", backend="reference", **options)[used].double()
    exact = block(x.double(), ends, cast(weights, torch.float64), heads, backend="reference", **options)[used]
    assert (actual - exact).norm() <= 1.1 * (rough - exact).norm(), "quantized worse than the definition"


@cpu_only
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@PARTS
def test_parts_are_the_same_alone_and_in_company(parts, options, angles, dtype, kind):
    x, ends, weights, heads, row = make([50, 97, 1, 5, 31], 64, 2, 90, dtype, **parts)
    if kind:
        require_int8(x, ends, row, weights, heads)
    rotary = None if angles is None else make_rotary(x, ends, **angles)
    options = options | {"kind": kind, "backend": "cpu"}
    together = block(x, ends, weights, heads, rotary=rotary, **options)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        own = torch.tensor([0, end - start], dtype=torch.int32)
        rotary_of = None if rotary is None else rotary._replace(row=rotary.row[start:end].clone())
        alone = block(x[start:end].clone(), own, weights, heads, rotary=rotary_of, **options)
        assert torch.equal(alone, together[start:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 20):
            torch.set_num_threads(count)
            assert torch.equal(block(x, ends, weights, heads, rotary=rotary, **options), together), count
    finally:
        torch.set_num_threads(threads)


@cpu_only
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_is_the_same_alone_and_in_company(dtype, kind):
    lengths = [50, 197, 17, 5, 101]
    x, ends, weights, heads, row = make(lengths, 192, 3, 768, dtype)
    require("block", "cpu", x, ends, row, *weights, heads, *HOW)
    if kind:
        require_int8(x, ends, row, weights, heads)
    together = block(x, ends, weights, heads, kind=kind, backend="cpu")
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        own = torch.tensor([0, end - start], dtype=torch.int32)
        alone = block(x[start:end].clone(), own, weights, heads, kind=kind, backend="cpu")
        assert torch.equal(alone, together[start:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7, 20):  # 7 and 20: more threads than images, than rows for each, than panels
            torch.set_num_threads(count)
            assert torch.equal(block(x, ends, weights, heads, kind=kind, backend="cpu"), together), count
    finally:
        torch.set_num_threads(threads)


def test_errors():
    x, ends, weights, heads, _ = make([3], 32, 2, 64)
    rotary = make_rotary(x, ends, 8)
    for change, message in (
        ({"kind": "int3"}, "kind must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"heads": 3}, "proj must take heads"),
        ({"eps": (1e-6, 1e-6)}, "eps must be an Eps of 6 numbers"),
        ({"weights": weights._replace(fc1_bias=weights.fc1_bias[1:])}, r"fc1_bias must be \(64,\)"),
        ({"weights": weights._replace(norm1=weights.norm1[1:])}, r"norm1 must be \(32,\)"),
        ({"weights": weights._replace(q_norm=weights.norm1)}, r"q_norm must be \(16,\)"),
        ({"weights": weights._replace(norm2_bias=weights.norm2[1:])}, r"norm2_bias must be \(32,\) as norm2"),
        ({"weights": weights._replace(hidden_norm_bias=weights.fc1_bias)}, "hidden_norm_bias needs hidden_norm"),
        ({"weights": weights._replace(fc1_x=weights.fc2)}, r"fc1_x must be \(64, 32\)"),
        ({"weights": weights._replace(proj=weights.proj[0])}, r"proj must be \(outputs, inputs\)"),
        ({"x": x[None]}, "x must be"),
        ({"cu_seqlens": ends.long()}, "cu_seqlens must be"),
        ({"row": ends}, "row must be"),
        ({"rotary": rotary._replace(row=rotary.row[1:])}, "row of rotary must be"),
        ({"rotary": rotary._replace(sin=rotary.sin[1:])}, "sin of rotary must have the shape of cos"),
    ):
        with pytest.raises(ValueError, match=message):
            block(**({"x": x, "cu_seqlens": ends, "weights": weights, "heads": heads} | change))


def test_boundaries_beyond_the_tokens():
    require("block", "cpu", *sample())
    x, _, weights, heads, _ = make([3], 32, 2, 64, tail=0)
    for ends in ([0, 4], [-1, 2], [0, 3, 2, 3]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            block(x, torch.tensor(ends, dtype=torch.int32), weights, heads, backend="cpu")


@cpu_only
def test_tensors_that_do_not_fit_are_errors_not_crashes():
    """The kernel checks what it is given: a copy of any argument serves as well, another size is refused."""
    require("block", "cpu", *sample())
    from revit_kernels.dispatch import load

    backend = load("block", "cpu")
    x, ends, w, heads, _ = make([3, 5], 32, 2, 64, tail=0, gate=True, qk_norm=True)
    rotary = make_rotary(x, ends, 8)
    tensors, fields = backend.listed([backend.pack(w, None)])
    form = Form((32, 32, 64), heads, Eps(), False, 0.25, "silu")

    def run(tensors, fields=fields, rotary=rotary):
        return backend.run(x, ends, None, tensors, fields, form, None, [rotary])

    want = run(tensors)
    assert torch.equal(want, block(x, ends, w, heads, scale=0.25, activation="silu", rotary=rotary, backend="cpu"))
    assert torch.equal(run([t.clone() for t in tensors]), want)
    for i, tensor in enumerate(tensors):
        for wrong in (tensor.reshape(-1)[1:], tensor.double(), tensor[..., :0]):
            with pytest.raises(ValueError, match="must be"):
                run([*tensors[:i], wrong, *tensors[i + 1 :]])
    with pytest.raises(ValueError, match=f"each block has {len(tensors)}"):
        run(tensors[:7])
    with pytest.raises(ValueError, match="a block needs field 0"):
        run(tensors[1:], fields[1:])
    for wrong in (rotary._replace(row=rotary.row + 40), rotary._replace(cos=rotary.cos.double())):
        with pytest.raises(ValueError, match=r"row of rotary must stay|a table of rotary must be"):
            run(tensors, rotary=wrong)
