"""What the C++ kernels refuse by themselves, whoever calls them: what does not fit in size, dtype or stride."""

import pytest
import torch
from campaign.op_arguments import CALLS, KERNELS, TORCH_OPS, Making, prepare, torch_ops_of
from contract import require

from revit_kernels.ops.pool import sample

prepare()
require_cpu = pytest.mark.usefixtures("built")
pytestmark = require_cpu


@pytest.fixture
def built():
    require("pool", "cpu", *sample())


class Fixed(Making):
    """Two images and no tail; all that may be left out is there."""

    def __init__(self):
        super().__init__(3)
        self.dtype, self.lengths, self.tail, self.tokens = torch.float32, [3, 5], 0, 8

    def maybe(self, value):
        return value


def call(name, args):
    return getattr(torch.ops.revit_kernels, name)(*args)


def arguments(name):
    schema = getattr(torch.ops.revit_kernels, name).default._schema
    return [argument.name for argument in schema.arguments], KERNELS[name](Fixed())


def test_all_kernels_are_here():
    names = [schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()]
    kernels = {name for space, _, name in names if space == "revit_kernels" and name.endswith("_cpu")} - {
        "packs_cpu",
        "capability_cpu",
    }
    assert kernels == set(KERNELS)


def test_all_torch_ops_are_reached():
    """Those that the public functions run, in training too, and those that no public function names."""
    every = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("revit_kernels::")}
    every = {name.partition("::")[2] for name in every if not name.endswith("_cuda")} - {"capability_cpu"}
    found = {*KERNELS, *TORCH_OPS}
    for name in CALLS:
        found |= {torch_op for seed in range(20) for torch_op, _ in torch_ops_of(name, Making(seed))}
    assert found == every


@pytest.mark.parametrize("name", KERNELS)
def test_boundaries(name):
    names, args = arguments(name)
    call(name, args)
    for at in [i for i, own in enumerate(names) if own.startswith("cu_seqlens")]:
        good = args[at].tolist()
        for wrong in (
            [good[0], good[-1], *good[2:-1], good[1]],
            [-1, *good[1:]],
            [*good[:-1], 2**31 - 1],
            [*good[:-1], -(2**31)],
            [good[0], good[1] + 2**30, *good[2:]],
        ):
            args[at] = torch.tensor(wrong, dtype=torch.int32)
            with pytest.raises(ValueError, match=names[at]):
                call(name, args)
        for wrong in (
            torch.tensor(good),
            torch.tensor([good]).int(),
            torch.tensor([good, good]).t().contiguous().int()[:, 0],
        ):
            args[at] = wrong
            with pytest.raises(ValueError, match=names[at]):
                call(name, args)
        args[at] = torch.tensor(good, dtype=torch.int32)


@pytest.mark.parametrize("name", KERNELS)
def test_tensors_of_other_sizes_dtypes_and_strides(name):
    names, args = arguments(name)
    for at, (own, tensor) in enumerate(zip(names, list(args))):
        if not isinstance(tensor, torch.Tensor) or not tensor.numel() or own.startswith("cu_seqlens"):
            continue
        wrong = [tensor.double() if tensor.is_floating_point() else tensor.long(), tensor.flatten()[1:]]
        if tensor.ndim == 2 and not own.startswith(("q", "k", "v", "x", "patches")):
            wrong += [tensor[None], tensor.t().contiguous().t()] if min(tensor.shape) > 1 else [tensor[None]]
        for other in wrong:
            args[at] = other
            with pytest.raises(ValueError):
                call(name, args)
        args[at] = tensor


def change(name, **changes):
    names, args = arguments(name)
    for key, value in changes.items():
        args[names.index(key)] = value(args[names.index(key)]) if callable(value) else value
    return call(name, args)


@pytest.mark.parametrize("prefix", [8, 2**31, 2**63 - 1])
def test_a_prefix_longer_than_any_image(prefix):
    assert not change("pool_cpu", prefix=prefix, kind="avg", include_prefix=False).any()
    assert not change("pool_backward_cpu", prefix=prefix, kind="avgmax", include_prefix=False).any()


@pytest.mark.parametrize(
    "name, changes",
    {
        "an empty hidden layer": ("block_cpu", dict(hidden=0)),
        "another hidden layer": ("block_cpu", dict(hidden=3)),
        "a weight too few": ("block_cpu", dict(weights=lambda w: w[:-1])),
        "a field that is none": ("block_cpu", dict(fields=lambda f: [*f[:-1], 99])),
        "a field that must be": ("block_cpu", dict(fields=lambda f: [9, *f[1:]])),
        "no head": ("block_cpu", dict(heads=0)),
        "an eps too few": ("block_cpu", dict(eps=[1e-6] * 5)),
        "norms of unequal rows": ("block_cpu", dict(weights=lambda w: [w[0].repeat(2, 1), *w[1:]])),
        "angles without a row": ("blocks_cpu", dict(frames=None, time=[], cos=[torch.ones(5, 2)])),
        "an activation that is none": ("block_cpu", dict(activation=3)),
        "weights of another kind": ("block_cpu", dict(kind=1)),
        "hidden": ("blocks_cpu", dict(hidden=2**62)),
        "width": ("blocks_cpu", dict(width=2**62)),
        "classes": ("blocks_cpu", dict(classes=2**62)),
        "frames that do not share a clip's tokens": ("blocks_cpu", dict(frames=torch.tensor([2, 5]).int())),
        "no frames": ("blocks_cpu", dict(frames=torch.tensor([3, 0]).int())),
        "frames of another clip": ("blocks_cpu", dict(frames=torch.tensor([3]).int())),
        "frames of no time": ("blocks_cpu", dict(time=[])),
        "time without frames": ("blocks_cpu", dict(frames=None)),
        "a weight of time too few": ("blocks_cpu", dict(time=lambda t: [*t[:-1], torch.zeros(8).byte()])),
        "angles of clips": (
            "blocks_cpu",
            dict(cos=[torch.ones(5, 2)], sin=[torch.ones(5, 2)], rotary_row=torch.zeros(8).int()),
        ),
        "weight and bias": ("layer_norm_cpu", dict(weight=lambda w: w.repeat(2, 1))),
        "an affine without rows": ("layer_norm_cpu", dict(weight=lambda w: w[:0], bias=lambda b: b[:0])),
        "a negative prefix": ("pool_cpu", dict(prefix=-1)),
        "a kind of pooling": ("pool_cpu", dict(kind="mean")),
        "a grid of no rows": ("pos_embed_cpu", dict(sizes=[0, 3])),
        "an odd number of sizes": ("pos_embed_cpu", dict(sizes=[2, 2, 3])),
        "more cells than an int32 counts": ("pos_embed_cpu", dict(sizes=[2**16, 2**16])),
        "an offset of all but a cell": ("pos_embed_cpu", dict(sizes=[1, 5], offset=-1 + 1e-12)),
        "an offset below the grid": ("pos_embed_cpu", dict(sizes=[1, 5], offset=-2.0)),
        "an offset of NaN": ("pos_embed_cpu", dict(sizes=[1, 5], offset=float("nan"))),
        "placements of other grids": ("place_cpu", dict(placement=lambda p: p + 1)),
        "a prefix that is too long": ("patchify_cpu", dict(prefix=2**62)),
        "scales": ("patchify_cpu", dict(scale=[0.5])),
        "out": ("linear_cpu", dict(out=2**62)),
        "queries of no channels": ("attention_cpu", dict(q=torch.empty(8, 1, 0))),
        "keys of other heads": ("attention_cpu", dict(k=lambda k: k.repeat(1, 2, 1))),
    }.values(),
)  # fmt: skip
def test_refused(name, changes):
    with pytest.raises(ValueError):
        change(name, **changes)


def test_an_image_of_more_rows_than_an_int32_counts():
    pixels = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 2**31, 1)  # takes one byte
    cu_seqlens, placement = torch.tensor([0, 1]).int(), torch.tensor([[1, 1, 0]]).int()
    weight = torch.zeros(4, 1, 2, 2)
    with pytest.raises(ValueError, match="pixels high and wide"):
        call("patchify_cpu", [[pixels], weight, cu_seqlens, placement, [1.0], [0.0], True, False, 0, 1])


def test_images_of_other_channels_or_dtypes_beside_the_first():
    for other in (torch.zeros(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.float16), torch.zeros(8, 8)):
        _, args = arguments("patchify_cpu")
        args[0] = [*args[0][:-1], other]
        with pytest.raises(ValueError):
            call("patchify_cpu", args)
