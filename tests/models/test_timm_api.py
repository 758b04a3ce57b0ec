"""Acceptance: timm's methods and attributes, on ours, and what timm's own conversion to mixed sizes gets wrong."""

import copy
import pickle

import pytest
import torch
from timm_pairs import GRIDS, assert_near, batch, make_timm, mixed, pair, seeds, small_kwargs

from revit_kernels import PackedTokens, Packing
from revit_kernels.models.registry import create_model
from revit_kernels.models.vit import VarLenViT

ODD = {  # configurations that timm's NaFlex conversion refuses or computes wrongly
    "registers with positions": dict(reg_tokens=3, no_embed_class=False),
    "max pooling with fc_norm": dict(global_pool="max", fc_norm=True),
    "prr": dict(global_pool="prr"),
    "average of every token": dict(global_pool="avg", pool_include_prefix=True),
    "avgmax": dict(global_pool="avgmax"),
    "no positions": dict(pos_embed="none"),
    "no pooling": dict(global_pool="", fc_norm=False),
}


def assert_alike(name, actual, expected):
    """The same structure of lists, tuples and dicts, with near tensors in it."""
    if isinstance(expected, torch.Tensor):
        assert_near(name, actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_alike(f"{name}[{key}]", actual[key], value)
    else:
        assert len(actual) == len(expected), name
        for i, value in enumerate(expected):
            assert_alike(f"{name}[{i}]", actual[i], value)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", ODD.values(), ids=ODD.keys())
def test_what_naflex_gets_wrong(kwargs):
    theirs, ours = pair(dynamic_img_size=True, **kwargs)
    assert_near("dense", ours(batch(theirs)), theirs(batch(theirs)))
    images = mixed(theirs)
    expected = [theirs(image[None]) for image in images]
    actual = ours(images)
    if isinstance(actual, PackedTokens):
        for part, whole in zip(actual.split(), expected):
            assert_near("mixed", part[None], whole)
    else:
        assert_near("mixed", actual, torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 1},
        {"indices": [0, -1]},
        {"norm": True},
        {"return_prefix_tokens": True},
        {"output_fmt": "NLC"},
        {"intermediates_only": True},
        {"stop_early": True, "indices": [0]},
        {"output_dict": True},
        {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True},
        {"is_causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_rpn_224"])
def test_forward_intermediates(name, options):
    theirs, ours = pair(name)
    x = batch(theirs)
    assert_alike(str(options), ours.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options))


@torch.no_grad()
def test_intermediates_of_a_mixed_batch():
    theirs, ours = pair(dynamic_img_size=True)
    images = mixed(theirs)
    _, blocks = ours.forward_intermediates(images, return_prefix_tokens=True)
    for i, image in enumerate(images):
        _, expected = theirs.forward_intermediates(image[None], return_prefix_tokens=True)
        for (patches, prefix), (their_patches, their_prefix) in zip(blocks, expected):
            assert_near("patches", patches[i][None], their_patches)
            assert_near("prefix", prefix[i][None], their_prefix)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"n": 2}, {"n": [0]}, {"reshape": True}, {"return_prefix_tokens": True, "norm": True}], ids=str
)
def test_get_intermediate_layers(options):
    theirs, ours = pair()
    x = batch(theirs)
    assert_alike(str(options), ours.get_intermediate_layers(x, **options), theirs.get_intermediate_layers(x, **options))


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"indices": [0]}, {"indices": 1, "prune_norm": True}, {"indices": [0], "prune_head": False}], ids=str
)
def test_prune_intermediate_layers(options):
    theirs, _ = pair()
    ours = VarLenViT.from_timm(copy.deepcopy(theirs))
    assert ours.prune_intermediate_layers(**options) == theirs.prune_intermediate_layers(**options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_near(str(options), ours(batch(theirs)), theirs(batch(theirs)))


@torch.no_grad()
@pytest.mark.parametrize(
    "size", [dict(img_size=(96, 48)), dict(img_size=64, patch_size=8), dict(patch_size=(8, 16))], ids=str
)
@pytest.mark.parametrize("kwargs", [{}, dict(no_embed_class=True, reg_tokens=2)], ids=str)
def test_set_input_size(size, kwargs):
    theirs, _ = pair(**kwargs)
    ours = VarLenViT.from_timm(copy.deepcopy(theirs))
    theirs.set_input_size(**size)
    ours.set_input_size(**size)
    assert ours.patch_embed.grid_size == theirs.patch_embed.grid_size
    assert_near("pos_embed", ours.pos_embed, theirs.pos_embed)
    assert_near("patch kernel", ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    assert_near("output", ours(batch(theirs)), theirs(batch(theirs)))


@torch.no_grad()
@pytest.mark.parametrize(
    "name, pools",
    [
        ("vit_tiny_patch16_224", [None, "avg", "max", ""]),
        ("test_vit3", [None, "avg", "map"]),
        ("vit_medium_patch16_gap_240", [None, "avgmax"]),
        ("deit_tiny_distilled_patch16_224", [None, "token"]),
    ],
)
def test_reset_classifier(name, pools):
    for classes, pool in [(4, pool) for pool in pools] + [(0, pools[-1])]:
        theirs, _ = pair(name)
        ours = VarLenViT.from_timm(copy.deepcopy(theirs))
        theirs.reset_classifier(classes, pool)
        ours.reset_classifier(classes, pool)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert ours.num_classes == theirs.num_classes and ours.global_pool == theirs.global_pool
        assert_near(f"{classes} {pool}", ours(batch(theirs)), theirs(batch(theirs)))


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "test_vit3", "vit_medium_patch16_gap_240", "deit_tiny_distilled_patch16_224"]
)
def test_head_and_pool(name):
    theirs, ours = pair(name)
    features = theirs.forward_features(batch(theirs))
    assert_near("forward_head", ours.forward_head(features), theirs.forward_head(features))
    assert_near(
        "pre_logits", ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True)
    )
    for pool in (None, "avg", "avgmax", "max", "") + (("token",) if theirs.has_class_token else ()):
        assert_near(f"pool {pool}", ours.pool(features, pool), theirs.pool(features, pool))


ATTRIBUTES = """
num_classes in_chans global_pool num_features head_hidden_size embed_dim num_prefix_tokens num_reg_tokens
has_class_token no_embed_class pool_include_prefix dynamic_img_size grad_checkpointing feature_info
""".split()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit3", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("made", [False, True], ids=["from_timm", "create_model"])
def test_attributes(name, made):
    theirs, ours = pair(name)
    ours = create_model(name, **small_kwargs(name)) if made else ours
    for attribute in ATTRIBUTES:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("img_size", "grid_size", "num_patches", "patch_size", "strict_img_size", "dynamic_img_pad"):
        assert getattr(ours.patch_embed, attribute) == getattr(theirs.patch_embed, attribute), attribute
    assert ours.patch_embed.feat_ratio() == theirs.patch_embed.feat_ratio()
    assert ours.patch_embed.dynamic_feat_size((64, 48)) == theirs.patch_embed.dynamic_feat_size((64, 48))
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for mine, other in zip(ours.named_modules(), theirs.named_modules()):
        assert isinstance(mine[1], torch.nn.Linear) == isinstance(other[1], torch.nn.Linear), mine[0]
        assert isinstance(mine[1], torch.nn.LayerNorm) == isinstance(other[1], torch.nn.LayerNorm), mine[0]
    heads = ours.get_classifier()
    assert heads is ours.head or heads == (ours.head, ours.head_dist)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit3", "vit_dwee_patch16_reg1_gap_256"])
def test_a_batch_of_no_images(name):
    theirs, ours = pair(name)
    x, one = batch(theirs, 0), batch(theirs, 1)
    for found in (ours(x), ours.engine()(x)):
        assert_near("answers", found, theirs(one)[:0])
    for found, wanted in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(one)[1]):
        assert_near("intermediates", found, wanted[:0])


@torch.no_grad()
def test_masks():
    theirs, ours = pair()
    x = batch(theirs)
    length = theirs.patch_embed.num_patches + 1
    mask = torch.rand(2, 1, length, length, device=x.device) > 0.3
    mask[..., 0] = True
    assert_near("bool", ours(x, attn_mask=mask), theirs(x, attn_mask=mask))
    added = torch.randn(2, 1, length, length, device=x.device)
    assert_near("float", ours(x, attn_mask=added), theirs(x, attn_mask=added))
    assert_near("causal", ours(x, is_causal=True), theirs(x, is_causal=True))


def test_gradient_checkpointing_and_training_mode():
    theirs, ours = pair()
    x = batch(theirs)
    plain = torch.autograd.grad((ours(x) * seeds(ours(x))).sum(), ours.blocks[0].attn.qkv.weight)[0]
    ours.set_grad_checkpointing()
    assert ours.grad_checkpointing
    for images in (x, mixed(ours)):
        out = ours(images)
        (again,) = torch.autograd.grad((out * seeds(out)).sum(), ours.blocks[0].attn.qkv.weight)
        if images is x:
            assert_near("checkpointed", again, plain, scale=plain.abs().max().item())
    distilled = VarLenViT.from_timm(
        make_timm("deit_tiny_distilled_patch16_224", **small_kwargs("deit_tiny_distilled_patch16_224"))
    )
    distilled.set_distilled_training()
    assert [h.shape for h in distilled.train()(mixed(distilled))] == [(5, 5), (5, 5)]


@torch.no_grad()
def test_copies_and_sharing():
    theirs, ours = pair()
    images = mixed(theirs)
    expected = ours(images)
    assert torch.equal(copy.deepcopy(ours)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(images), expected)
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters()))
    assert VarLenViT.from_timm(ours) is ours


@torch.no_grad()
@pytest.mark.parametrize(
    "where",
    [
        "blocks.0",
        "blocks.1.attn",
        "blocks.0.attn.qkv",
        "blocks.1.norm1",
        "blocks.0.mlp.fc1",
        "norm",
        "patch_embed",
        "head",
    ],
)
def test_hooks_fire_and_change_the_output(where):
    theirs, _ = pair()
    ours = VarLenViT.from_timm(copy.deepcopy(theirs))  # leaf modules are shared otherwise, and hooks with them
    x, seen = batch(theirs), []
    before = ours(x)
    for model in (theirs, ours):
        model.get_submodule(where).register_forward_hook(lambda m, args, out: (seen.append(out.shape), out * 1.5)[1])
    expected, actual = theirs(x), ours(x)
    assert len(seen) == 2 and seen[0].numel() == seen[1].numel()
    assert_near(where, actual, expected)
    assert not torch.allclose(actual, before)
    seen.clear()
    ours(mixed(ours))
    assert seen


def test_lora():
    peft = pytest.importorskip("peft")
    theirs, ours = pair()
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(theirs), config)
    ours = peft.get_peft_model(ours, config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = batch(ours.base_model.model)
    assert_near("LoRA", ours.eval()(x), theirs.eval()(x))
    out = ours(mixed(ours.base_model.model))
    out.sum().backward()
    assert all(p.grad is not None for n, p in ours.named_parameters() if "lora_" in n)


@torch.no_grad()
def test_company_does_not_matter():
    _, ours = pair()
    images = mixed(ours)
    together = ours(images)
    assert torch.equal(ours(images[::-1]).flip(0), together)
    assert torch.equal(ours(images[1:4]), together[1:4])
    assert torch.equal(ours(images + images), together.repeat(2, 1))
    if together.device.type == "cpu":
        assert torch.equal(torch.cat([ours([image]) for image in images]), together)


@torch.no_grad()
def test_tail_and_packing_of_the_device():
    """Room to spare changes nothing, however many images the device gives tokens."""
    _, ours = pair()
    images = mixed(ours)
    exact = ours(images, grids=GRIDS)
    spare = Packing.from_grids(GRIDS, ours.num_prefix_tokens, capacity=200, device=exact.device)
    assert torch.equal(ours(images, packing=spare), exact) or exact.device.type == "cuda"
    menu = [(6, 2), (5, 4), (3, 5), (1, 1)]
    choice = torch.tensor([menu.index(grid) for grid in GRIDS], device=exact.device)
    chosen = Packing.from_choice(choice, menu, ours.num_prefix_tokens, capacity=200)
    assert_near("chosen on the device", ours(images, packing=chosen), exact)
    features = ours.forward_features(images, packing=chosen).tokens
    assert not features[int(chosen.cu_seqlens[-1]) :].any() and torch.isfinite(features).all()


def test_compile_whole_graph():
    theirs, ours = pair(dynamic_img_size=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    images = mixed(theirs)
    expected = torch.cat([theirs(image[None]) for image in images])
    out = compiled(images, grids=GRIDS)
    assert_near("mixed", out, expected)
    (grad,) = torch.autograd.grad((out * seeds(out)).sum(), ours.pos_embed)
    (wanted,) = torch.autograd.grad((expected * seeds(expected)).sum(), theirs.pos_embed)
    assert_near("gradient", grad, wanted, scale=wanted.abs().max().item())
    assert_near("dense", compiled(batch(theirs)), theirs(batch(theirs)))


@torch.no_grad()
def test_export():
    theirs, ours = pair()
    x = batch(theirs)
    images = torch.export.Dim("images", min=1, max=64)
    program = torch.export.export(ours, (x,), dynamic_shapes={"x": {0: images}}, strict=False)
    assert_near("exported", program.module()(batch(theirs, 3)), theirs(batch(theirs, 3)))


def test_layer_decay_groups():
    """timm's optimiser factory takes our model as it takes its own."""
    from timm.optim import param_groups_layer_decay

    theirs, ours = pair()
    names = [{id(p): n for n, p in model.named_parameters()} for model in (theirs, ours)]
    groups = [param_groups_layer_decay(model, 0.05, layer_decay=0.7) for model in (theirs, ours)]
    plain = [
        [({n[id(p)] for p in g["params"]}, g["lr_scale"], g["weight_decay"]) for g in gs]
        for gs, n in zip(groups, names)
    ]
    assert plain[0] == plain[1]
