"""A module computes with what its parameters are now, however they were written; an engine says when it does not."""

import copy

import pytest
import torch
from contract import DEVICE
from torch import nn

from revit_kernels import VarLenViT
from revit_kernels.engines import StaleEngine

PLACES = ("blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.0.mlp.fc1", "blocks.1.norm1", "", "head")


def made(dtype):
    torch.manual_seed(0)
    options = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
    model = VarLenViT(**options).to(DEVICE, dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def by_optimizer(cls, **options):
    def edit(model, owner, name):
        parameter = getattr(owner, name)
        parameter.grad = torch.randn_like(parameter)
        cls([parameter], lr=0.1, **options).step()

    return edit


def by_numpy(model, owner, name):
    parameter = getattr(owner, name).detach()
    bits = parameter.view(torch.int32 if parameter.dtype == torch.float32 else torch.int16).numpy()
    bits ^= torch.iinfo(torch.int32 if parameter.dtype == torch.float32 else torch.int16).min  # the sign


def by_average(model, owner, name):
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average([getattr(owner, name)], [torch.randn_like(getattr(owner, name))], 0)


def by_state(assign):
    def edit(model, owner, name):
        state = copy.deepcopy(model.state_dict())
        key = next(k for k, p in model.named_parameters() if p is getattr(owner, name))
        state[key] = state[key] * 1.5
        model.load_state_dict(state, assign=assign)

    return edit


def through_another_dtype(model, owner, name):
    dtype = getattr(owner, name).dtype
    model.double()
    getattr(owner, name).data.mul_(1.5)
    model.to(dtype)


SILENT = {
    "through .data": lambda model, owner, name: getattr(owner, name).data.mul_(1.5),
    "through NumPy": by_numpy,
    "AdamW fused, without train()": by_optimizer(torch.optim.AdamW, fused=True),
}
SEEN = {
    "copy_": lambda model, owner, name: getattr(owner, name).copy_(torch.randn_like(getattr(owner, name))),
    "in place": lambda model, owner, name: getattr(owner, name).mul_(1.5),
    "other memory": lambda model, owner, name: setattr(getattr(owner, name), "data", getattr(owner, name) * 1.5),
    "another parameter": lambda model, owner, name: setattr(
        owner, name, nn.Parameter(getattr(owner, name) * 1.5, requires_grad=False)
    ),
    "SGD foreach": by_optimizer(torch.optim.SGD, foreach=True),
    "AdamW fused": lambda model, *where: (
        model.train(),
        by_optimizer(torch.optim.AdamW, fused=True)(model, *where),
        model.eval(),
    ),
    "Adam one by one": by_optimizer(torch.optim.Adam, foreach=False),
    "an average": by_average,
    "load_state_dict": by_state(False),
    "load_state_dict, assigned": by_state(True),
    "another dtype and back": through_another_dtype,
}


ATTRIBUTES = {
    "eps": lambda model: setattr(model.blocks[1].norm2, "eps", 0.3),
    "heads": lambda model: [setattr(block.attn, *pair) for block in model.blocks for pair in HEADS],
    "an activation's": lambda model: setattr(model.blocks[0].mlp.act, "approximate", "tanh"),
    "pooling": lambda model: setattr(model, "global_pool", "avg"),
}
HEADS = (("num_heads", 4), ("head_dim", 16), ("scale", 0.25))


@torch.no_grad()
@pytest.mark.parametrize("edit", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_an_attribute_that_changed_is_seen(edit):
    model, x = made(torch.float32), torch.randn(2, 3, 64, 64).to(DEVICE)
    strict, lenient, before = model.engine(), model.engine(stale="refresh"), model(x)
    edit(model)
    assert not torch.equal(model(x), before)
    assert torch.equal(lenient(x), copy.deepcopy(model).engine()(x))
    if strict.refusal is None:
        with pytest.raises(StaleEngine):
            strict(x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("edit", [*SILENT, *SEEN])
def test_an_edit_is_seen(edit, place, dtype):
    if edit == "through NumPy" and DEVICE != "cpu":
        pytest.skip("NumPy sees tensors on the CPU alone")
    model, x = made(dtype), torch.randn(2, 3, 64, 64).to(DEVICE, dtype)
    strict, lenient = model.engine(), model.engine(stale="refresh")
    before, engine_before = model(x), strict(x)
    assert torch.equal(lenient(x), engine_before)
    owner, name = model.get_submodule(place), "weight" if place else "pos_embed"
    (SILENT | SEEN)[edit](model, owner, name)
    fresh = made(dtype)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    wanted = fresh(x)
    assert not torch.equal(wanted, before)
    assert torch.equal(model(x), wanted)
    if strict.refusal is None:  # a snapshot
        if edit in SILENT:
            assert torch.equal(strict(x), engine_before)
            lenient.refresh()
        else:
            with pytest.raises(StaleEngine, match=r"engine.refresh\(\)"):
                strict(x)
        strict.refresh()
    for engine in (strict, lenient):
        assert torch.equal(engine(x), fresh.engine()(x))
