"""Where a model runs its blocks whole, and the head with them; and where it steps aside."""

import copy

import pytest
import torch
from contract import DEVICE, assert_close, require
from torch import nn

from revit_kernels import VarLenViT, ops
from revit_kernels.modules import whole_block
from revit_kernels.ops.block import sample
from revit_kernels.packing import Packing

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
    monkeypatch.setattr(whole_block, "run", lambda blocks, *args: count.extend(blocks) or run(blocks, *args))
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
@pytest.mark.parametrize("prepacked", [False, True])
def test_a_changed_weight_is_seen(runs, prepacked):
    m = model(torch.float32)
    if prepacked:
        assert m.prepack() == 9
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "blocks.0.norm2.weight", "blocks.1.ls1.gamma"):
        before = answers(m, torch.float32)
        m.get_parameter(name).add_(0.3)
        after = answers(m, torch.float32)
        assert not torch.equal(before, after), name
        fresh = answers(model_like(m, torch.float32), torch.float32)  # packed from the weights as they are now
        assert torch.equal(after, fresh), name
    half = model_like(m, torch.bfloat16)
    assert answers(half).dtype == torch.bfloat16
    assert runs


@cpu_only
def test_weights_are_packed_once_whatever_lengths_come(runs, monkeypatch):
    """An affine per length is another tensor for every menu: the products' weights must not be packed anew for it."""
    m = model(torch.bfloat16).make_resizable(((4, 4), (2, 3), (1, 1))).requires_grad_(False)
    m.prepack()
    monkeypatch.setattr(whole_block.load("block", "cpu"), "panels", lambda *_: pytest.fail("packed anew"))
    for grids in ([(4, 4)], [(2, 3)], [(4, 4), (1, 1)], [(1, 1)], [(3, 3)], [(4, 4)]):
        m([torch.randn(3, 16 * h, 16 * w).bfloat16() for h, w in grids], grids=grids)
    assert len(runs) == 12


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


@cpu_only
def test_a_model_quantised_to_int8(runs):
    m = model(torch.bfloat16, depth=3)
    plain = answers(m).float()
    if not ops.block or whole_block.load("block", "cpu").unable((64, 64, 64), "int8"):
        with pytest.raises(NotImplementedError, match="AVX512"):
            m.quantise("int8")
        return
    m.quantise("int8").prepack()
    runs.clear()
    quantised = answers(m).float()
    assert len(runs) == 3
    assert not torch.equal(quantised, plain)
    assert (quantised - plain).abs().max() <= 0.1 * plain.abs().max()
    m.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"int8.*fc1"):
        answers(m)
    with pytest.raises(ValueError, match="quantised to int8 already"):
        m.quantise("int8")


def test_int8_needs_blocks_that_run_whole():
    m = model(torch.float32, qk_norm=True)
    with pytest.raises(NotImplementedError, match=r"q_norm|AVX512|CPU"):
        m.quantise("int8")


# ---------------------------------------------------------------------- blocks and head in one call


@pytest.fixture
def answered(monkeypatch):
    """Whether each call of the kernel gave answers, not tokens."""
    require("block", "cpu", *sample(DEVICE))
    backend, seen = whole_block.load("block", "cpu"), []
    forward = backend._forward
    monkeypatch.setattr(backend, "_forward", lambda *args: seen.append(args[-2] is not None) or forward(*args))
    return seen


MENU = ((4, 4), (2, 3), (1, 1))


def prepared(dtype=torch.bfloat16, menu=None, **kwargs):
    m = model(dtype, **kwargs)
    if menu:
        m.make_resizable(menu)
        for name, parameter in m.named_parameters():
            if "shorter" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    m.requires_grad_(False).prepack()
    return m


def batch(grids, dtype):
    torch.manual_seed(2)
    return [torch.randn(3, 16 * h, 16 * w).to(DEVICE, dtype) for h, w in grids]


def apart(m, images, grids):
    return m.forward_head(m.forward_features(images, grids=grids))


@cpu_only
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("menu", [None, MENU], ids=["one affine", "an affine per length"])
@pytest.mark.parametrize(
    "grids", [[(4, 4)], [(1, 1)], [(2, 3), (4, 4), (1, 1), (2, 3)], [(4, 4), (2, 3)], [(1, 1), (2, 3)]], ids=str
)
def test_answers_in_one_call(answered, menu, dtype, grids):
    m, images = prepared(dtype, menu), batch(grids, dtype)
    at_once = m(images, grids=grids)
    assert answered == [True]
    exact = apart(model_like(m, torch.float64), [image.double() for image in images], grids)
    assert_close("logits", at_once, exact, apart(m, images, grids))
    assert answered[1:] == [False]
    alone = torch.cat([m([image], grids=[grid]) for image, grid in zip(images, grids)])
    assert torch.equal(alone, at_once)
    if len(grids) == 1:
        assert torch.equal(m(images[0][None]), at_once)  # a dense batch


@cpu_only
@torch.no_grad()
def test_a_grid_beside_the_menu_is_answered_step_by_step(answered):
    m, grids = prepared(torch.float32, MENU), [(3, 3), (4, 4)]
    images = batch(grids, torch.float32)
    m(images, grids=grids)
    assert not any(answered)


@cpu_only
@torch.no_grad()
def test_images_without_tokens_are_answered_with_zeros(answered):
    m, packing = prepared(torch.float32), Packing.from_choice(torch.tensor([0, -1, 1, 0]), MENU, 1, capacity=30)
    images = torch.rand(4, 3, 64, 64)
    logits = m(images, packing=packing)
    assert answered == [True]
    assert (logits[[1, 3]] == 0).all() and logits[[0, 2]].abs().min() > 0  # the last found no room
    assert torch.equal(logits[:1], m(images[:1], grids=[(4, 4)]))


@cpu_only
@torch.no_grad()
@pytest.mark.parametrize("menu", [None, MENU], ids=["one affine", "an affine per length"])
def test_what_is_written_to_prepacked_weights_is_seen(answered, menu):
    m, grids = prepared(torch.float32, menu), [(4, 4), (1, 1)]
    images = batch(grids, torch.float32)
    names = ["head.weight", "head.bias", "norm.weight", "blocks.1.norm2.bias", "blocks.0.mlp.fc1.weight", "pos_embed"]
    names += [
        "cls_token",
        "patch_embed.proj.weight",
        *(["norm.shorter_weight", "blocks.0.norm1.shorter_bias"] if menu else []),
    ]
    for name in names:
        before = m(images, grids=grids)
        m.get_parameter(name).add_(0.3)
        after = m(images, grids=grids)
        assert not torch.equal(before, after), name
        assert_close(name, after, apart(model_like(m, torch.float64), [i.double() for i in images], grids),
                     apart(m, images, grids))  # fmt: skip
        m.prepack()
        assert torch.equal(m(images, grids=grids), after), name
    assert any(answered)


def hook(module):
    module.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def overridden(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


@cpu_only
@torch.no_grad()
@pytest.mark.parametrize("where", ["head", "head_drop", "norm", "fc_norm", "blocks.1", "blocks.0.attn.q_norm"])
@pytest.mark.parametrize("how", [hook, pre_hook, overridden])
def test_nothing_that_was_hooked_since_is_passed_over(answered, where, how):
    m, images = prepared(torch.float32), torch.randn(2, 3, 64, 64)
    before = m(images)
    assert answered == [True]
    with torch.no_grad():
        how(m.get_submodule(where))
    if where == "blocks.1" and how is overridden:
        pytest.skip("the blocks' own forward takes a packing beside x")
    assert not torch.allclose(m(images), before), "passed over"
    assert not any(answered[1:])


@cpu_only
@torch.no_grad()
def test_nothing_that_was_exchanged_since_is_passed_over(answered):
    m, images = prepared(torch.float32), torch.randn(2, 3, 64, 64)

    def changed(change):
        before = m(images)
        answered.clear()
        change()
        return not torch.allclose(m(images), before)

    assert changed(lambda: setattr(m, "head", nn.Linear(64, 7)))
    assert changed(lambda: setattr(m.blocks[1].mlp, "act", nn.ReLU())) and not any(answered)
    m.blocks[1].mlp.act = nn.GELU()
    m.prepack()
    assert changed(lambda: setattr(m.norm, "eps", 1.0))
    assert changed(lambda: setattr(m.blocks[0].attn, "scale", 1.0))
    assert changed(lambda: setattr(m.blocks[0].ls1, "gamma", nn.Parameter(torch.ones(64), requires_grad=False)))
    assert changed(lambda: m.reset_classifier(7))
    m.head_drop = nn.Dropout(0.5)
    assert changed(lambda: m.head_drop.train()) and not any(answered)  # as for Monte Carlo dropout
    m.head_drop.eval()
    m.blocks[1].attn.proj_drop = nn.Dropout(0.5)
    assert changed(lambda: m.blocks[1].attn.proj_drop.train()) and not any(answered)


@cpu_only
@torch.no_grad()
def test_a_copy_of_a_model_that_ran_begins_anew(answered, tmp_path):
    m, images = prepared(torch.float32), torch.randn(2, 3, 64, 64)
    want = m(images)
    torch.save(m, tmp_path / "model.pt")
    for other in (copy.deepcopy(m), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(images), want)
        other.blocks[0].mlp.fc1.weight.mul_(2)
        assert not torch.allclose(other(images), want)
    assert torch.equal(m(images), want)
