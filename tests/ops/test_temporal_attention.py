import pytest
import torch
from contract import DEVICE, check, every_backend, every_dtype, require, run

from revit_kernels.ops import temporal_attention
from revit_kernels.ops.temporal_attention import sample

# Of each clip, its frames and the rows of a frame, prefix included.
CASES = {
    "no clip": dict(clips=[], heads=2, dim=64),
    "one clip": dict(clips=[(8, 9)], heads=3, dim=64),
    "no frame, no patch, one of each": dict(clips=[(0, 0), (1, 1), (1, 2), (3, 1), (2, 2)], heads=2, dim=32, tail=3),
    "menu": dict(clips=[(8, 12), (8, 7), (4, 6), (16, 3)], heads=2, dim=64, tail=2),
    "odd frames": dict(clips=[(7, 9), (15, 4), (17, 3), (5, 6)], heads=1, dim=40, tail=1),
    "edges": dict(clips=[(n, 2) for n in (15, 16, 17, 33, 64)], heads=1, dim=16),
    "five frames, odd dim": dict(clips=[(5, 8)], heads=2, dim=7),
    "96 frames": dict(clips=[(96, 2), (2, 4)], heads=2, dim=64, tail=5),
    "wide": dict(clips=[(3, 4)], heads=1, dim=128),
    "no prefix": dict(clips=[(4, 6), (2, 3)], heads=2, dim=24, prefix=0),
    "prefix of 3": dict(clips=[(4, 6), (2, 3), (3, 4)], heads=2, dim=24, prefix=3),
}


def make_inputs(clips, heads, dim, dtype=torch.float32, tail=0, prefix=1, scale=None):
    """Clips, and NaN where nothing is to be read: in their prefix rows, and in a tail that belongs to no clip."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *(frames * rows for frames, rows in clips)]).cumsum(0)
    total = int(ends[-1])
    unread = torch.zeros(total + tail, dtype=torch.bool)
    unread[total:] = True
    for start, (frames, rows) in zip(ends.tolist(), clips):
        for frame in range(frames):
            unread[start + frame * rows : start + frame * rows + min(prefix, rows)] = True
    qkv = [torch.randn(total + tail, heads, dim, generator=generator) for _ in range(3)]
    qkv = [x.masked_fill(unread[:, None, None], torch.nan).to(DEVICE, dtype) for x in qkv]
    frames = torch.tensor([n for n, _ in clips], dtype=torch.int32, device=DEVICE)
    told = {
        "cu_seqlens": ends.to(DEVICE, torch.int32),
        "frames": frames,
        "max_frames": max([0, *(n for n, _ in clips)]),
    }
    return dict(zip("qkv", qkv)) | told | {"prefix": prefix} | ({} if scale is None else {"scale": scale})


def told(inputs):
    names = ("q", "k", "v", "cu_seqlens", "frames", "max_frames")
    return *(inputs[name] for name in names), inputs.get("prefix", 1), 0.125


@every_backend
@every_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_contract(case, dtype, backend):
    check(temporal_attention, make_inputs(**case, dtype=dtype), backend)


@every_backend
@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0])
def test_scale(scale, backend):
    check(temporal_attention, make_inputs([(6, 9), (3, 5)], 2, 32, scale=scale), backend)


@pytest.mark.parametrize("frames, rows", [(8, 10), (3, 4), (1, 5)])
def test_is_attention_of_each_position(frames, rows):
    inputs = make_inputs([(frames, rows)], 2, 16)
    y = temporal_attention(**inputs).view(frames, rows, 2, 16)
    assert not y[:, 0].any()
    q, k, v = (inputs[name].view(frames, rows, 2, 16)[:, 1:].permute(1, 2, 0, 3) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)
    torch.testing.assert_close(y[:, 1:], expected)


@every_backend
def test_views_of_a_fused_projection(backend):
    inputs = make_inputs([(4, 5), (2, 3)], 2, 32, tail=2)
    require("temporal_attention", backend, *told(inputs))
    fused = torch.stack([inputs[name] for name in "qkv"], 1).requires_grad_()  # (tokens, 3, heads, head_dim)
    whole = run(temporal_attention, inputs, backend)
    rest = {name: inputs[name] for name in ("cu_seqlens", "frames", "max_frames")}
    y = temporal_attention(*fused.unbind(1), **rest, backend=backend)
    assert torch.equal(y, whole["output 0"])
    seed = torch.cos(torch.arange(y.numel(), device=DEVICE) * 1.0).view_as(y)
    (grad,) = torch.autograd.grad(y, fused, seed)
    for i, name in enumerate("qkv"):
        assert torch.equal(grad[:, i], whole[f"grad of {name}"])


@every_backend
def test_nan_spoils_its_own_position_only(backend):
    inputs = make_inputs([(4, 5), (2, 6)], 2, 16)
    require("temporal_attention", backend, *told(inputs))
    inputs["v"][2] = torch.nan  # position 2 of the first clip
    y = temporal_attention(**inputs, backend=backend)
    spoiled = y.isnan().any(-1).any(-1)
    assert spoiled.nonzero().flatten().tolist() == [2, 7, 12, 17]


def test_sample_is_what_forward_takes():
    assert torch.ops.revit_kernels.temporal_attention_forward.default(*sample(DEVICE), None)[0].shape == (6, 2, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(23, 32)), r"q must be \(tokens, heads, head_dim\) .* got \(23, 32\)"),
        (dict(k=torch.zeros(22, 2, 16)), r"k must be .* got \(22, 2, 16\)"),
        (dict(v=torch.zeros(23, 2, 16, dtype=torch.float64)), r"one floating-point dtype"),
        (dict(cu_seqlens=torch.zeros(3)), r"cu_seqlens must be \(clips \+ 1,\) int32"),
        (dict(frames=torch.zeros(3, dtype=torch.int32)), r"frames must be \(clips,\) int32, got \(3,\)"),
        (dict(max_frames=-1), r"max_frames must be an integer, at least 0, got -1"),
        (dict(prefix=-1), r"prefix must be an integer, at least 0, got -1"),
        (dict(scale=-1.0), r"scale must be finite in float32 and not negative"),
        (dict(q=torch.zeros(23, 2, 16, device="meta")), r"all tensors must be on one device"),
        (dict(backend="fast"), r"backend must be one of"),
    ],
)
def test_wrong_use_says_so(change, message):
    inputs = make_inputs([(3, 5), (2, 4)], 2, 16)
    with pytest.raises(ValueError, match=message):
        temporal_attention(**{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} | change)
