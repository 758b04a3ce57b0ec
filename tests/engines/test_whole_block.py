"""Where a model runs its blocks whole, and where it steps aside."""

import copy

import pytest
import torch
from contract import DEVICE, assert_close, require
from torch import nn

from revit_kernels import VarLenViT
from revit_kernels.modules import whole_block
from revit_kernels.ops.block import sample

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="the whole block is for CPUs")
DTYPES = [torch.float32, torch.bfloat16]


def model(dtype=torch.bfloat16, **kwargs):
    torch.manual_seed(0)
    options = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7, "init_values": 0.1}
    return VarLenViT(**options | kwargs).to(DEVICE, dtype).eval().requires_grad_(False)


def answers(m, dtype=torch.bfloat16):
    torch.manual_seed(1)
    images = [torch.randn(3, 16 * h, 16 * w).to(DEVICE, dtype) for h, w in ((4, 4), (2, 3), (1, 1))]
    return m(images)


@pytest.fixture
def runs(monkeypatch):
    """How often a block ran whole."""
    require("block", "cpu", *sample(DEVICE))
    count, run = [], whole_block.run
    monkeypatch.setattr(whole_block, "run", lambda block, *args: count.append(block) or run(block, *args))
    return count


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("menu", [None, ((4, 4), (2, 3), (1, 1))])
def test_a_model_is_the_same_whole_and_op_by_op(runs, monkeypatch, menu, dtype):
    m = model(dtype)
    if menu:
        m.make_resizable(menu)
        for name, parameter in m.named_parameters():
            if "shorter" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    whole = answers(m, dtype)
    assert len(runs) == 2
    exact = answers(model_like(m, torch.float64), torch.float64)
    monkeypatch.setattr(whole_block, "refusal", lambda *_: "for the test")
    assert_close("logits", whole, exact, answers(m, dtype))


def model_like(m, dtype):
    return copy.deepcopy(m).to(dtype)


@cpu_only
@pytest.mark.parametrize("how", ["training", "gradients", "hook", "wrapped", "autocast", "mask"])
def test_it_steps_aside(runs, how):
    m = model(torch.float32)
    x = torch.randn(2, 3, 64, 64)
    want, exact, got = m(x), model_like(m, torch.float64)(x.double()), None
    runs.clear()
    if how == "training":
        got = m.train()(x)
    elif how == "gradients":
        got = m.requires_grad_(True)(x)
        assert got.requires_grad
    elif how == "hook":
        seen = []
        m.blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
        m.blocks[1].attn.proj.register_forward_pre_hook(lambda *_: seen.append(1))
        got = m(x)
        assert len(seen) == 2
    elif how == "wrapped":

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        doubled = model_like(m, torch.float64)
        for b, twin in zip(m.blocks, doubled.blocks):
            b.attn.qkv.__class__ = Doubled
            twin.attn.qkv.weight.mul_(2), twin.attn.qkv.bias.mul_(2)
        got, exact = m(x), doubled(x.double())
        want = model_like(doubled, torch.float32)(x)
        runs.clear()
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            m(x)
    else:
        m(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    assert not runs
    if got is not None:
        assert_close("logits", got.detach(), exact, want)
    assert whole_block.structure(m.blocks[0]) is None or how in ("hook", "wrapped")


@cpu_only
def test_a_changed_weight_is_seen(runs):
    """However it was written to: nothing that was made of a weight outlives a call."""
    m = model(torch.float32)
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "blocks.0.norm2.weight", "blocks.1.ls1.gamma"):
        parameter = m.get_parameter(name)
        for write in (
            lambda p=parameter: p.add_(0.3),
            lambda p=parameter: p.data.mul_(1.5),
            lambda p=parameter: p.detach().numpy()[..., 0].__iadd__(0.2),
            lambda p=parameter: p.data[1].neg_(),
        ):
            before = answers(m, torch.float32)
            write()
            after = answers(m, torch.float32)
            assert not torch.equal(before, after), name
            assert torch.equal(after, answers(model_like(m, torch.float32), torch.float32)), name
    half = model_like(m, torch.bfloat16)
    assert answers(half).dtype == torch.bfloat16
    assert runs


@cpu_only
def test_weights_that_are_not_what_the_kernel_reads(runs):
    m = model(torch.float32)
    x = torch.randn(2, 3, 64, 64)
    want, exact = m(x), model_like(m, torch.float64)(x.double())

    class Wrapped(torch.Tensor):
        pass

    twin = model_like(m, torch.float32)
    m.blocks[0].mlp.fc2.weight = nn.Parameter(m.blocks[0].mlp.fc2.weight.as_subclass(Wrapped), requires_grad=False)
    m.blocks[1].attn.proj.to(torch.bfloat16)
    runs.clear()
    assert "Wrapped" in whole_block.refusal(m.blocks[0], want)
    assert "bfloat16" in whole_block.refusal(m.blocks[1], want)
    m.blocks[1].attn.proj.to(torch.float32)
    m.blocks[1].attn.proj.load_state_dict(twin.blocks[1].attn.proj.state_dict())
    assert_close("logits", torch.Tensor(m(x)), exact, want)
    assert runs[-1:] == [m.blocks[1]]
