"""The rule of a drop-in: whatever timm calls in a forward may be hooked, replaced or overridden, and is then called."""

import copy
import types

import pytest
import torch
from timm_pairs import assert_near, make_timm
from torch import nn

from revit_kernels.models.vit import VarLenViT

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 5}
EVERYTHING = {"init_values": 0.3, "drop_path_rate": 0.1, "qk_norm": True, "scale_attn_norm": True, "pre_norm": True}
EVERYTHING |= {"scale_mlp_norm": True, "reg_tokens": 2, "patch_drop_rate": 0.25, "global_pool": "avg", "drop_rate": 0.1}
CONFIGURATIONS = {
    "plain": {},
    "every layer there is": EVERYTHING,
    "registers without positions": {"reg_tokens": 1, "no_embed_class": True, "dynamic_img_size": True},
    "map": {"global_pool": "map", "class_token": False},
    "prr": {"global_pool": "prr"},
    "no positions, no head": {"pos_embed": "none", "num_classes": 0},
    "differential": {"attn_layer": "diff"},
    "scaling blocks": {"block_fn": "ParallelScalingBlock", "qk_norm": True, "init_values": 0.3},
    "differential scaling blocks": {"block_fn": "DiffParallelScalingBlock"},
    "blocks of parallel things": {"block_fn": "ParallelThingsBlock", "init_values": 0.3},
    "post-norm blocks": {"block_fn": "ResPostBlock"},
    "SwiGLU": {"mlp_layer": "SwiGLU"},
    "packed SwiGLU": {"mlp_layer": "SwiGLUPacked"},
    "distilled": {},
}


def theirs_and_ours(configuration, maps=False):
    """timm's model and ours, each with modules and parameters of its own. maps: with timm's fused_attn = False"""
    from timm.models import vision_transformer

    options = SMALL | CONFIGURATIONS[configuration]
    for name in ("block_fn", "mlp_layer"):
        if name in options:
            options[name] = getattr(vision_transformer, options[name])
    entry = "deit_tiny_distilled_patch16_224" if configuration == "distilled" else "vit_tiny_patch16_224"
    theirs = make_timm(entry, **options)
    for module in theirs.modules():
        if maps and hasattr(module, "fused_attn"):
            module.fused_attn = False
    return theirs, VarLenViT.from_timm(copy.deepcopy(theirs))


def images(model):
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32, device=model.pos_embed.device if model.pos_embed is not None else None)


def called_modules(model):
    """The names of the submodules that a forward calls."""
    names, handles = [], []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(lambda *_, name=name: names.append(name)))
    with torch.no_grad():
        model(images(model))
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(names))


def called_methods(model):
    """The names of the model's own methods that a forward calls."""
    names = []
    watched = copy.deepcopy(model)
    for name in set(dir(type(model))) - set(dir(nn.Module)) | {"forward"}:
        if isinstance(getattr(type(model), name), types.FunctionType):
            bound = getattr(watched, name)
            watched.__dict__[name] = lambda *a, bound=bound, name=name, **k: (names.append(name), bound(*a, **k))[1]
    with torch.no_grad():
        watched(images(model))
    return sorted(set(names))


def scaled(value, by=1.25):
    return tuple(v * by for v in value) if isinstance(value, tuple) else value * by


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return scaled(self.inner(*args, **kwargs))


def hook(model, name, seen):
    def after(module, args, out):
        seen.append(out.shape)
        return scaled(out)

    model.get_submodule(name).register_forward_hook(after)


def pre_hook(model, name, seen):
    def before(module, args):
        seen.append(args[0].shape)
        return (scaled(args[0]), *args[1:])

    model.get_submodule(name).register_forward_pre_hook(before)


def replace(model, name, seen):
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, Wrapped(model.get_submodule(name)))


def override_forward(model, name, seen):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))


def subclass(model, name, seen):
    module = model.get_submodule(name)
    cls = type(module)

    def forward(self, *args, **kwargs):
        return scaled(cls.forward(self, *args, **kwargs))

    module.__class__ = type("Own", (cls,), {"forward": forward, "__module__": "somewhere.else"})


def no_packing(model, name, seen):
    """A forward that takes what timm's does, and nothing else."""
    module = model.get_submodule(name)
    forward = module.forward
    if name.split(".")[-1] in ("attn", *"0123456789") and "blocks" in name:
        module.forward = lambda x, attn_mask=None, is_causal=False: scaled(forward(x))
    else:
        module.forward = lambda x: scaled(forward(x))


EDITS = {f.__name__: f for f in (hook, pre_hook, replace, override_forward, subclass, no_packing)}


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_module_of_somebodys_own_is_called(configuration, edit):
    """Each module that timm calls, in turn: the answers, and the shapes that a hook sees, are timm's.

    With maps (timm's fused_attn = False) what sees them is tried too.
    """
    for maps in (False, True):
        theirs, ours = theirs_and_ours(configuration, maps)
        x, names = images(theirs), [n for n in called_modules(theirs) if not n.startswith("blocks.1.")]
        plain = theirs(x)
        for name in [n for n in names if n.endswith("attn_drop")] if maps else names:
            a, b, shapes = copy.deepcopy(theirs), copy.deepcopy(ours), ([], [])
            before = b.engine(stale="refresh")
            for model, seen in zip((a, b), shapes):
                edit(model, name, seen)
            try:
                expected = a(x)
            except AttributeError:  # timm's own asks the module for more than a forward
                assert edit is replace
                continue
            assert_near(f"{name}, the model", b(x), expected)
            assert shapes[0] == shapes[1], f"{name}: a hook saw {shapes[1]}, timm's {shapes[0]}"
            assert_near(f"{name}, an engine", b.engine()(x), expected)
            assert_near(f"{name}, an engine of before", before(x), expected)
            if not isinstance(a.get_submodule(name), nn.Identity) or edit is replace:
                assert name.endswith("attn.norm") or not torch.equal(expected, plain), f"{name}: proves nothing"


@torch.no_grad()
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("configuration", ["plain", "map", "prr", "differential", "differential scaling blocks"])
def test_a_scale_set_by_hand(configuration, maps):
    """timm's fused attention does not look at it."""
    theirs, ours = theirs_and_ours(configuration, maps)
    for model in (theirs, ours):
        for module in model.modules():
            if hasattr(module, "scale"):
                module.scale *= 3
    x = images(theirs)
    expected = theirs(x)
    assert torch.equal(expected, theirs_and_ours(configuration)[0](x)) != maps
    for name, found in (("the model", ours(x)), ("an engine", ours.engine()(x)), ("a list", ours(list(x)))):
        assert_near(name, found, expected)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_backward_hooks_see_timms_gradients(configuration):
    theirs, ours = theirs_and_ours(configuration)
    x = images(theirs)
    for name in called_modules(theirs):
        seen = []
        for model in (theirs, ours):
            grads = []
            handle = model.get_submodule(name).register_full_backward_hook(
                lambda module, before, after, grads=grads: grads.extend(after)
            )
            model.zero_grad()
            out = model(x)
            (out * torch.cos(torch.arange(out.numel(), device=x.device)).view_as(out)).sum().backward()
            handle.remove()
            seen.append(grads)
        assert len(seen[0]) == len(seen[1]) > 0, name
        for expected, actual in zip(*seen):
            assert_near(name, actual, expected)


def on_the_instance(model, name, change):
    setattr(model, name, types.MethodType(change(getattr(type(model), name)), model))
    return model


def in_a_subclass(model, name, change):
    cls = type(model)
    model.__class__ = type("Own", (cls,), {name: change(getattr(cls, name)), "__module__": "somewhere.else"})
    return model


def scaled_method(original):
    def method(self, *args, **kwargs):
        return scaled(original(self, *args, **kwargs))

    return method


@torch.no_grad()
@pytest.mark.parametrize("how", [on_the_instance, in_a_subclass])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_method_of_somebodys_own_is_called(configuration, how):
    theirs, ours = theirs_and_ours(configuration)
    x, names = images(theirs), called_methods(theirs)
    assert {"_pos_embed", "forward", "forward_features", "forward_head"} <= set(names)
    for name in names:
        a, b = (how(copy.deepcopy(model), name, scaled_method) for model in (theirs, ours))
        before = how(copy.deepcopy(ours), name, scaled_method).engine()
        expected = a(x)
        assert_near(f"{name}, the model", b(x), expected)
        assert_near(f"{name}, an engine", before(x), expected)
        assert not torch.equal(expected, theirs(x)), name
        for method in ("forward_features", "forward_intermediates"):
            for found, wanted in zip(getattr(b, method)(x)[-1:], getattr(a, method)(x)[-1:]):
                for i, j in zip(found, wanted):
                    assert_near(f"{name}, {method}", i, j)
