"""Acceptance: every entry of timm's vision_transformer.py, deit.py and eva.py gives timm's answers, dense and mixed.

Entries that differ only in depth, image size or number of classes are the same computation and tried once.
"""

import copy
import json

import pytest
import torch
from contract import assert_close
from timm_pairs import (
    GRIDS,
    WHOLE,
    assert_gradients_near,
    assert_near,
    batch,
    gradients,
    make_timm,
    mixed,
    pair,
    small_kwargs,
)

from revit_kernels.models.registry import create_model, registry
from revit_kernels.models.vit import VarLenViT


def architectures():
    """One name for each distinct computation."""
    entries = {name: entry for name, entry in registry()["models"].items() if "module" not in entry}
    if WHOLE:
        return sorted(name for name, entry in entries.items() if entry["parameters"] <= 130_000_000)
    names = {}
    for name, entry in entries.items():
        kwargs = {k: v for k, v in entry["kwargs"].items() if k not in ("depth", "img_size", "dynamic_img_size")}
        kwargs |= {k: v for k, v in small_kwargs(name).items() if k in ("num_heads", "embed_dim", "num_kv_heads")}
        names.setdefault(json.dumps([kwargs, entry.get("class")], sort_keys=True), name)
    return sorted(names.values())


@pytest.fixture(scope="module", params=architectures())
def models(request):
    """An entry's name, timm's model of it and ours that shares its parameters."""
    return request.param, *pair(request.param, dynamic_img_size=True)


@torch.no_grad()
def test_dense(models):
    name, theirs, ours = models
    x = batch(theirs)
    expected = theirs(x)
    assert_near(name, ours(x), expected)
    assert_near(f"{name} features", ours.forward_features(x), theirs.forward_features(x))
    made = create_model(name, weight_init="skip", **small_kwargs(name)).to(x.device).eval()
    made.load_state_dict(theirs.state_dict(), strict=True)
    assert_near(f"create_model({name})", made(x), expected)
    theirs.load_state_dict(made.state_dict(), strict=True)


def test_mixed_with_gradients(models):
    name, theirs, ours = models
    images = mixed(theirs)
    expected = torch.cat([theirs(image[None]) for image in images])
    actual = ours(images)
    assert_near(name, actual, expected)

    def exact():
        wide = copy.deepcopy(theirs).double()
        return gradients(wide, torch.cat([wide(image[None].double()) for image in images]))

    assert_gradients_near(gradients(ours, actual), gradients(theirs, expected), exact)


@torch.no_grad()
def test_bfloat16(models):
    """The error against fp64 is at most twice timm's own in bfloat16, plus rounding."""
    name, theirs, _ = models
    x = batch(theirs)
    exact = copy.deepcopy(theirs).double()(x.double())
    rough = copy.deepcopy(theirs).bfloat16()
    assert_close(name, VarLenViT.from_timm(rough)(x.bfloat16()), exact, rough(x.bfloat16()))


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "test_vit3",
        "vit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_tiny_patch16_dinov3_qkvb",
        "vit_small_patch16_rope_mixed_224",
    ],
)
def test_whole(name):
    """At full depth and size."""
    theirs = make_timm(name, dynamic_img_size=True)
    ours = VarLenViT.from_timm(theirs)
    x = batch(theirs)
    assert_near(name, ours(x), theirs(x))
    grids = [(14, 14), (7, 7), (4, 10)]
    images = mixed(theirs, grids)
    assert_near(name, ours(images, grids=grids), torch.cat([theirs(image[None]) for image in images]))


@torch.no_grad()
@pytest.mark.parametrize("grids", [GRIDS, [(5, 4)] * 3, []], ids=["mixed", "equal", "none"])
def test_grids_can_be_told(grids):
    theirs, ours = pair(dynamic_img_size=True)
    images = mixed(theirs, grids)
    expected = torch.cat([theirs(image[None]) for image in images]) if images else torch.zeros(0, 5)
    assert_near("listed", ours(images, grids=grids), expected)
