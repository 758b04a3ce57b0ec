"""What every op promises, whatever it computes: one test for each promise, over all ops and backends.

That an op gives the same bits twice is part of `contract.check`.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from contract import DEVICE, every_backend, every_dtype, must_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from revit_kernels import ops
from revit_kernels.ops.attention import Rotary
from revit_kernels.ops.linear.products import rows_are_independent
from revit_kernels.packing import Packing

LENGTHS = (9, 0, 70, 4)  # tokens of images 0 to 3
GRIDS = ((2, 2), (1, 1), (3, 2), (2, 1))  # of the same images, for the ops that are told grids: a prefix token more
FRAMES = (3, 2, 5, 2)  # of the same images, as clips: the rows of each frame, the first of which takes no part
DIM, ROWS = 40, 3  # channels, and rows of the menu


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(images, tail: int, dtype, salt: int, *shape: int) -> Tensor:
    """The images' own numbers one after another, then a tail of NaN."""
    parts = [numbers(100 * salt + i, LENGTHS[i], *shape) for i in images]
    return torch.cat([*parts, torch.full((tail, *shape), torch.nan)]).to(DEVICE, dtype)


def shared(dtype, salt: int, *shape: int) -> Tensor:
    return (numbers(1000 + salt, *shape) * shape[-1] ** -0.5).to(DEVICE, dtype)


def boundaries(images) -> Tensor:
    return torch.tensor([0, *(LENGTHS[i] for i in images)]).cumsum(0).to(DEVICE, torch.int32)


def menu_rows(images, tail: int) -> Tensor:
    rows = [row for i in images for row in [i % ROWS] * LENGTHS[i]]
    return torch.tensor(rows + [-1] * tail, dtype=torch.int32, device=DEVICE)


def attention(images, tail, dtype, rotary=False):
    inputs = {name: packed(images, tail, dtype, salt, 2, DIM) for salt, name in enumerate("qkv")}
    inputs |= {"cu_seqlens": boundaries(images), "max_seqlen": max(LENGTHS)}
    if rotary:
        angles = numbers(7, ROWS, DIM // 2).to(DEVICE)
        inputs["rotary"] = Rotary(angles.cos(), angles.sin(), menu_rows(images, tail), False)
    return inputs


def block(images, tail, dtype, every_part=False):
    fields, salts = {}, count()

    def linear(name, out, inputs):
        fields[name], fields[f"{name}_bias"] = shared(dtype, next(salts), out, inputs), shared(dtype, next(salts), out)

    def norm(name, size):
        fields[name] = 1 + shared(dtype, next(salts), ROWS, size)
        fields[f"{name}_bias"] = shared(dtype, next(salts), ROWS, size)

    norm("norm1", DIM), linear("qkv", 3 * DIM, DIM), linear("proj", DIM, DIM)
    norm("norm2", DIM), linear("fc1", 2 * DIM, DIM), linear("fc2", DIM, 2 * DIM)
    fields["gamma1"] = fields["gamma2"] = shared(dtype, next(salts), DIM)
    x, row, options = packed(images, tail, dtype, 0, DIM), menu_rows(images, tail), {}
    if every_part:
        norm("q_norm", DIM // 2), norm("k_norm", DIM // 2), norm("attended_norm", DIM)
        linear("fc1_x", 2 * DIM, DIM), norm("hidden_norm", 2 * DIM)
        angles = numbers(7, ROWS, 2, DIM // 4).to(DEVICE)
        options = {"activation": "silu", "rotary": Rotary(angles.cos(), angles.sin(), row, True)}
    weights = ops.BlockWeights(**fields)
    return {"x": x, "cu_seqlens": boundaries(images), "weights": weights, "heads": 2, "row": row, **options}


def layer_norm(images, tail, dtype, whole=True):
    inputs = {"x": packed(images, tail, dtype, 0, DIM), "weight": shared(dtype, 0, ROWS, DIM)}
    inputs["row"] = menu_rows(images, tail)
    if not whole:
        return inputs | {"bias": None, "rms": True}
    return inputs | {"bias": shared(dtype, 1, ROWS, DIM), "branch": packed(images, tail, dtype, 1, DIM),
                     "gamma": shared(dtype, 2, DIM)}  # fmt: skip


def linear(images, tail, dtype, **options):
    weight, bias = shared(dtype, 0, 2 * DIM, DIM), shared(dtype, 1, 2 * DIM)
    return {"x": packed(images, tail, dtype, 0, DIM), "weight": weight, "bias": bias} | options


def patch_embed(images, tail, dtype):
    sizes = [(GRIDS[i][0] * 4 + i, GRIDS[i][1] * 4) for i in images]
    pixels = [(numbers(i, 3, *size) * 255).abs().to(torch.uint8).to(DEVICE) for i, size in zip(images, sizes)]
    grids = [GRIDS[i] for i in images]
    capacity = sum(1 + h * w for h, w in grids) + tail
    packing = Packing.from_grids(grids, 1, menu=GRIDS, capacity=capacity, device=DEVICE)
    cells = sum(h * w for h, w in GRIDS)
    return {
        "images": pixels,
        "weight": shared(dtype, 0, DIM, 3, 4, 4),
        "bias": shared(dtype, 1, DIM),
        "packing": packing,
        "pos": shared(dtype, 2, cells, DIM),
        "prefix": shared(dtype, 3, 1, DIM),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
    }


def pool(images, tail, dtype, kind):
    return {"x": packed(images, tail, dtype, 0, DIM), "cu_seqlens": boundaries(images), "kind": kind}


def pos_embed(images, tail, dtype):
    return {"table": shared(dtype, 0, 5, 6, DIM), "grids": [GRIDS[i] for i in images]}


def temporal_attention(images, tail, dtype):
    frames = torch.tensor([FRAMES[i] for i in images], dtype=torch.int32, device=DEVICE)
    inputs = {name: packed(images, tail, dtype, salt, 2, DIM) for salt, name in enumerate("qkv")}
    return inputs | {"cu_seqlens": boundaries(images), "frames": frames, "max_frames": max(FRAMES)}


class Subject(NamedTuple):
    """One op as these tests see it.

    make: the arguments for these images and a tail, in a dtype
    rows: rows of each image in the outputs
    token: the arguments that have a row for each token
    whole: the vendor's products, which backends of these names rest on, add up a row by the number of all rows
    linear: a gradient is the same whatever the inputs are
    """

    op: Callable
    make: Callable
    rows: tuple[int, ...] = LENGTHS
    token: tuple[str, ...] = ("x",)
    whole: tuple[str, ...] = ()
    trained: bool = True
    tail: bool = True
    linear: bool = False


def with_options(make, **options):
    return lambda images, tail, dtype: make(images, tail, dtype, **options)


TOKENS = tuple(1 + h * w for h, w in GRIDS)
CELLS = tuple(h * w for h, w in GRIDS)
INTERPRETER = ("triton",) if DEVICE == "cpu" else ()  # NumPy multiplies: a row's bits depend on its place in the tile
SUBJECTS = {
    "attention": Subject(ops.attention, attention, token=("q", "k", "v"), whole=("reference",)),
    "attention-rotary": Subject(
        ops.attention, with_options(attention, rotary=True), token=("q", "k", "v"), whole=("reference",)
    ),
    "block": Subject(ops.block, block, whole=("reference",), trained=False),
    "block-every part": Subject(ops.block, with_options(block, every_part=True), whole=("reference",), trained=False),
    "layer_norm": Subject(ops.layer_norm, layer_norm, token=("x", "branch")),
    "layer_norm-rms": Subject(ops.layer_norm, with_options(layer_norm, whole=False)),
    "linear": Subject(ops.linear, linear, whole=("reference", *INTERPRETER), tail=False),
    "linear-gated": Subject(
        ops.linear,
        with_options(linear, activation="silu", gate="first"),
        whole=("reference", *INTERPRETER),
        tail=False,
    ),
    "patch_embed": Subject(ops.patch_embed, patch_embed, TOKENS, (), ("reference", *INTERPRETER), linear=True),
    "pool-avg": Subject(ops.pool, with_options(pool, kind="avg"), (1,) * 4, linear=True),
    "pool-max": Subject(ops.pool, with_options(pool, kind="max"), (1,) * 4),
    "pos_embed": Subject(ops.pos_embed, pos_embed, CELLS, (), tail=False, linear=True),
    "temporal_attention": Subject(
        ops.temporal_attention, temporal_attention, token=("q", "k", "v"), whole=("reference",)
    ),
}
every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=list(SUBJECTS))
every_way = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])


def results(subject: Subject, images, backend=None, dtype=torch.float32, tail=0, training=False, op=None):
    """(each image's rows, what lies behind them) of the outputs and, in training, of each argument's gradient."""
    if training and not subject.trained:
        pytest.skip("the op is for inference")
    inputs = subject.make(images, tail, dtype)
    leaves = {}
    if training:
        leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    try:
        with torch.set_grad_enabled(training):
            outputs = (op or subject.op)(**inputs, **({} if backend is None else {"backend": backend}))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            rows = [subject.rows[i] for i in images]

            def seed(out):
                waves = [torch.cos(torch.arange(n * out[0].numel() if n else 0) + 0.5) for n in rows]
                seed = torch.cat([*waves, torch.full((out.numel() - sum(map(len, waves)),), torch.nan)])
                return seed.view_as(out).to(out)

            grads = torch.autograd.grad(outputs, list(leaves.values()), [seed(o) for o in outputs]) if leaves else ()
    except NotImplementedError as refused:
        for_inference = training and "is for inference" in str(refused)
        assert not must_run(backend, refused) or for_inference, f"refused where it always ran: {refused}"
        pytest.skip(str(refused))
    own = [LENGTHS[i] for i in images]
    found = {f"output {i}": (out.detach(), rows) for i, out in enumerate(outputs)}
    found |= {f"grad of {k}": (g, own if k in subject.token else None) for k, g in zip(leaves, grads)}
    apart = {}
    for name, (tensor, lengths) in found.items():
        if lengths is None:
            apart[name] = ([tensor], tensor[:0])
        else:
            *parts, rest = tensor.split([*lengths, len(tensor) - sum(lengths)])
            apart[name] = (parts, rest)
    return apart


@every_backend
@every_dtype
@every_way
@every_subject
def test_an_image_has_the_same_bits_in_any_company(subject, training, dtype, backend):
    if backend in subject.whole or (backend == "vendor" and (DEVICE != "cpu" or not rows_are_independent())):
        pytest.skip(f"{backend}: the vendor's matrix products add by the number of rows")
    together = results(subject, (0, 1, 2, 3), backend, dtype, training=training)
    slow = backend == "triton" and DEVICE == "cpu"
    for images in ((3, 2, 0, 1), (2, 3), (0,), (1,), (2,))[: 1 if slow else 5]:
        here = results(subject, images, backend, dtype, training=training)
        for name, (parts, _) in here.items():
            if len(together[name][0]) == 4:
                for i, part in zip(images, parts):
                    assert torch.equal(part, together[name][0][i]), f"{name} of image {i} in {images}"


@every_backend
@every_dtype
@every_way
@every_subject
def test_the_tail_is_zeros_and_its_nan_reaches_nothing(subject, training, dtype, backend):
    if not subject.tail:
        pytest.skip("the op knows no tail")
    expected = results(subject, (0, 1, 2), backend, dtype, training=training)
    actual = results(subject, (0, 1, 2), backend, dtype, tail=5, training=training)
    for name, (parts, rest) in actual.items():
        assert not rest.any(), f"the tail of {name}"
        for part, other in zip(parts, expected[name][0]):
            assert torch.isfinite(part).all(), name
            assert backend in ("reference", *subject.whole) or torch.equal(part, other), name


class Calls(TorchDispatchMode):
    """Keeps the calls of our registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "revit_kernels":
            self.calls.append((function, tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))))
        return function(*args, **kwargs or {})


@every_way
@every_subject
def test_registration(subject, training):
    with Calls() as seen:
        results(subject, (0, 2), training=training)
    names = {function.name().split("::")[1].split("_")[-1] for function, _ in seen.calls}
    assert {"forward"} | ({"backward"} if training else set()) <= names
    for function, (args, kwargs) in seen.calls:
        torch.library.opcheck(function, args, kwargs)


@every_way
@every_subject
def test_it_compiles_whole(subject, training):
    torch.compiler.reset()
    # An op is opaque to the compiler: what Inductor makes of the rest is tested with whole models.
    compiled = torch.compile(subject.op, fullgraph=True, dynamic=True, backend="aot_eager")
    for images in ((0, 2), (3, 0, 1)):
        eager = results(subject, images, training=training)
        whole = results(subject, images, training=training, op=compiled)
        for name, (parts, _) in eager.items():
            torch.testing.assert_close(whole[name][0], parts, msg=name)


@every_subject
def test_second_derivatives_are_refused_by_name(subject):
    """Also of what nothing but the op's own inputs depends on, where torch would leave them out without a word."""
    if not subject.trained:
        pytest.skip("the op is for inference")
    inputs = subject.make((0, 2), 0, torch.float32)
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    for power in (1, 2):
        outputs = subject.op(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((out if power == 1 else out**power).sum() for out in outputs)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        if power == 1 and subject.linear:
            assert not any(grad.requires_grad for grad in grads)  # they are constants
            continue
        with pytest.raises(RuntimeError, match=f"^{subject.op.__name__} has no second derivatives"):
            torch.autograd.grad(sum(grad.sum() for grad in grads), leaves, allow_unused=True)


@every_subject
def test_a_named_backend_never_falls_back(subject):
    """No backend but the reference takes float64."""
    for backend in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match=rf"^{subject.op.__name__}: {backend}: [^;]+$"):
            subject.op(**subject.make((0, 2), 0, torch.float64), backend=backend)


def test_every_op_is_here():
    folders = {path.parent.name for path in Path(ops.__file__).parent.glob("*/reference.py")}
    assert folders == {name.split("-")[0] for name in SUBJECTS}
