"""A whole block: the op against its definition."""

import pytest
import torch
from contract import DEVICE, assert_close, every_backend, require

from revit_kernels.ops.block import BlockWeights, block, sample

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


def make(lengths, dim, heads, hidden, dtype=torch.float32, affines=1, tail=3, gamma=True, bias=True):
    torch.manual_seed(0)

    def normal(*shape, scale=1.0, shift=0.0):
        return (torch.randn(shape) * scale + shift).to(DEVICE, dtype)

    def norm():
        shape = (affines, dim) if affines > 1 else (dim,)
        return normal(*shape, scale=0.2, shift=1), normal(*shape, scale=0.2)

    def linear(out, inputs):
        return normal(out, inputs, scale=inputs**-0.5), normal(out, scale=0.5) if bias else None

    def scale():
        return normal(dim, scale=0.3, shift=0.5) if gamma else None

    weights = BlockWeights(*norm(), *linear(3 * dim, dim), *linear(dim, dim), scale(), *norm(),
                           *linear(hidden, dim), *linear(dim, hidden), scale())  # fmt: skip
    ends = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    x = normal(int(ends[-1]) + tail, dim)
    x[int(ends[-1]) :] = float("nan")
    row = torch.full((len(x),), -1, dtype=torch.int32)
    for i, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist())):
        row[start:end] = i % affines
    return x, ends, weights, heads, row.to(DEVICE) if affines > 1 else None


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
    require("block", backend, x, ends, row, *weights, heads, 1e-6, 1e-6, 0.1, "gelu", None)
    check(x, ends, weights, heads, row, backend)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, activation):
    """An affine per length, no biases, no LayerScale, another scale and eps, and the other activations."""
    x, ends, weights, heads, row = make([17, 50, 5], 64, 2, 160, dtype, affines=3, gamma=False, bias=False)
    check(x, ends, weights, heads, row, None, activation=activation, scale=0.2, eps=(1e-3, 1e-5))


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


def require_int8(x, ends, row, weights, heads):
    from revit_kernels.dispatch import refusal

    if why := refusal("block", "cpu", x, ends, row, *weights, heads, 1e-6, 1e-6, 0.1, "gelu", "int8"):
        pytest.skip(why)


@cpu_only
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_is_the_same_alone_and_in_company(dtype, kind):
    lengths = [50, 197, 17, 5, 101]
    x, ends, weights, heads, row = make(lengths, 192, 3, 768, dtype)
    require("block", "cpu", x, ends, row, *weights, heads, 1e-6, 1e-6, 0.1, "gelu", None)
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
    for change, message in (
        ({"kind": "int3"}, "kind must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"heads": 3}, "proj must take heads"),
        ({"weights": weights._replace(fc1_bias=weights.fc1_bias[1:])}, r"fc1_bias must be \(64,\)"),
        ({"weights": weights._replace(norm1=weights.norm1[1:])}, r"norm1 must be \(32,\)"),
        ({"x": x[None]}, "x must be"),
        ({"cu_seqlens": ends.long()}, "cu_seqlens must be"),
        ({"row": ends}, "row must be"),
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
    x, ends, w, heads, _ = make([3, 5], 32, 2, 64, tail=0)
    tensors = [*backend.affine(w.norm1, w.norm1_bias, w.norm2, w.norm2_bias), *backend.pack(w, None)]

    def run(tensors):
        return backend.run(x, ends, None, tensors, (32, 32, 64), heads, 1e-6, 1e-6, 0.25, "gelu", None)

    want = run(tensors)
    assert torch.equal(run([t.clone() for t in tensors]), want)
    for i in range(8):
        for wrong in (tensors[i].reshape(-1)[1:], tensors[i].double(), tensors[i][..., :0]):
            with pytest.raises(ValueError, match="must be"):
                run([*tensors[:i], wrong, *tensors[i + 1 :]])
    with pytest.raises(ValueError, match="each block has 8"):
        run(tensors[:7])
