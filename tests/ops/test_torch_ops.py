"""The torch ops refuse by name what their public functions see to, whichever backend would run: one in Triton reads
where it is told to."""

import pytest
import torch
from campaign.op_arguments import CALLS, Making, torch_ops_of


class Whole(Making):
    """Two images and a tail, in fp32; all that may be left out is there."""

    def __init__(self, seed):
        super().__init__(seed)
        self.dtype, self.lengths, self.tail, self.tokens = torch.float32, [3, 5], 2, 10

    def maybe(self, value):
        return value


def cases() -> dict:
    """Of each torch op that the public functions run, forward and backward, the arguments that lack least."""
    found = {}
    for name in CALLS:
        if name in ("block", "resize_patch_weight"):  # the one is made of the others, the other has no op
            continue
        for op, args in [call for seed in range(20) for call in torch_ops_of(name, Whole(seed))]:
            lacking = sum(arg is None or (isinstance(arg, list) and not arg) for arg in args)
            if op not in found or lacking < found[op][0]:
                found[op] = lacking, args
    return {op: args for op, (_, args) in found.items()}


CASES = cases()
STEPS = ("attention", "layer_norm", "linear", "patch_embed", "pool", "pos_embed", "temporal_attention")


def test_every_step_is_here():
    assert {f"{name}_{step}" for name in STEPS for step in ("forward", "backward")} <= set(CASES)


def refused(op, args, match=None):
    with torch.no_grad(), pytest.raises(ValueError, match=match):
        getattr(torch.ops.revit_kernels, op)(*args)


@pytest.mark.parametrize("op", CASES)
def test_tensors_of_another_rank_or_dtype(op):
    args = CASES[op]
    getattr(torch.ops.revit_kernels, op)(*args)
    for at, tensor in enumerate(args):
        if isinstance(tensor, torch.Tensor):
            for wrong in (tensor[None], tensor.bool()):
                refused(op, [*args[:at], wrong, *args[at + 1 :]], "must")


def strided(x):
    """The same numbers, with another between any two."""
    return torch.stack([x, x], -1)[..., 0]


CHANGES = {
    "attention_forward": [
        ("q", strided),
        ("row", strided),
        ("cos", strided),
        ("sin", lambda x: x[:, :0]),
        ("row", None),
    ],
    "attention_backward": [("grad", strided), ("lse", strided), ("out", strided), ("lse", lambda x: x[1:])],
    "temporal_attention_forward": [("v", strided), ("frames", strided), ("prefix", -1), ("k", lambda x: x[1:])],
    "temporal_attention_backward": [("grad", strided), ("out", lambda x: x[1:]), ("lse", lambda x: x[:, :0])],
    "layer_norm_backward": [("mean", lambda x: x[1:]), ("dy", strided), ("branch", lambda x: x[1:]), ("gamma", None)],
    "linear_forward": [("weight", lambda x: x[:, 1:]), ("bias", lambda x: x[1:]), ("activation", "relu")],
    "linear_backward": [("dy", strided), ("dy", lambda x: x[1:]), ("weight", lambda x: x[1:])],
    "pool_forward": [("x", strided), ("kind", "mean"), ("prefix", -1)],
    "pool_backward": [("grad", strided), ("grad", lambda x: x[1:]), ("tokens", -1)],
    "pos_embed_forward": [("sizes", [1, 2, 3]), ("sizes", [0, 2]), ("interpolation", "area"), ("offset", -9.0)],
    "pos_embed_backward": [("rows", 0), ("sizes", [1, 1]), ("sizes", [-1, -1])],
    "patch_embed_forward": [
        ("images", lambda x: x[1:]),
        ("image", strided),
        ("pos", lambda x: x[:, 1:]),
        ("prefix_tokens", -1),
        ("mean", [0.5] * 9),
    ],
    "patch_embed_backward": [
        ("cells", -1),
        ("grad", lambda x: x[1:]),
        ("patches", lambda x: x[1:]),
        ("image", strided),
    ],
}


@pytest.mark.parametrize("op, name, value", [(op, *change) for op in CHANGES for change in CHANGES[op]])
def test_what_does_not_fit(op, name, value):
    args = CASES[op]
    at = [argument.name for argument in getattr(torch.ops.revit_kernels, op).default._schema.arguments].index(name)
    refused(op, [*args[:at], value(args[at]) if callable(value) else value, *args[at + 1 :]])


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_a_prefix_longer_than_any_image_in_triton(kind):
    """Beside a row, such a number overflows 64 bits."""
    pytest.importorskip("triton", reason="this torch brings no Triton")
    x, ends = torch.ones(8, 4), torch.tensor([0, 3, 8], dtype=torch.int32)
    told = (kind, 2**63 - 1, False, "triton")
    assert not torch.ops.revit_kernels.pool_forward(x, ends, *told).any()
    assert not torch.ops.revit_kernels.pool_backward(x[:2], x, ends, 8, *told).any()


def test_more_rows_than_there_are_in_triton():
    """max_seqlen is at least the longest image's: however much more, no more programs run."""
    pytest.importorskip("triton", reason="this torch brings no Triton")
    args = [*CASES["attention_forward"][:-1], "triton"]
    wanted = torch.ops.revit_kernels.attention_forward(*args)[0]
    args[4] = args[6] = 2**31 - 1
    assert torch.equal(torch.ops.revit_kernels.attention_forward(*args)[0], wanted)


def test_a_bias_that_is_one_number_in_triton():
    pytest.importorskip("triton", reason="this torch brings no Triton")
    args = [*CASES["patch_embed_forward"][:-1], "triton"]
    args[2] = args[2][:1].expand(len(args[2]))
    found = torch.ops.revit_kernels.patch_embed_forward(*args)[0]
    args[2] = args[2].contiguous()
    assert torch.equal(found, torch.ops.revit_kernels.patch_embed_forward(*args)[0])
