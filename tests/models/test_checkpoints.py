"""Weights from files: every layout gives the same model, and a file that does not fit changes nothing."""

import argparse
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from revit_kernels.models.checkpoints import load_checkpoint, read_checkpoint, resample_positions, save_checkpoint
from revit_kernels.models.quantize import fp8
from revit_kernels.models.registry import create_model

TINY = {"depth": 2, "img_size": 64, "num_classes": 10}


def tiny(name="vit_tiny_patch16_224", **kwargs):
    """A small model none of whose parameters is zero."""
    model = create_model(name, **TINY | kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def to_flax(state, heads, start="", new=False, stacked=False):
    """A timm state_dict in Google's layout, as the files of vision_transformer and big_vision (new) have it."""
    attention, mlp, second = (0, 0, 1) if new else (1, 3, 2)
    out = {}

    def linear(name, weight, bias):
        out[f"{name}/kernel"], out[f"{name}/bias"] = weight.T, bias

    def norm(name, module):
        out[f"{name}/scale"], out[f"{name}/bias"] = state[f"{module}.weight"], state[f"{module}.bias"]

    def attend(name, parts, module):
        for part, weight, bias in parts:
            out[f"{name}/{part}/kernel"] = weight.T.unflatten(1, (heads, -1))
            out[f"{name}/{part}/bias"] = bias.unflatten(0, (heads, -1))
        out[f"{name}/out/kernel"] = state[f"{module}.weight"].T.unflatten(0, (heads, -1))
        out[f"{name}/out/bias"] = state[f"{module}.bias"]

    def feed_forward(name, module):
        for i in (0, 1):
            linear(f"{name}/Dense_{i}", state[f"{module}.fc{i + 1}.weight"], state[f"{module}.fc{i + 1}.bias"])

    out["embedding/kernel"] = state["patch_embed.proj.weight"].permute(2, 3, 1, 0)
    out["embedding/bias"] = state["patch_embed.proj.bias"]
    out["pos_embedding" if new else "Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    if "cls_token" in state:
        out["cls"] = state["cls_token"]
    for i in range(TINY["depth"]):
        name, block = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        weight, bias = state[f"{block}.attn.qkv.weight"].chunk(3), state[f"{block}.attn.qkv.bias"].chunk(3)
        parts = list(zip(("query", "key", "value"), weight, bias))
        attend(f"{name}/MultiHeadDotProductAttention_{attention}", parts, f"{block}.attn.proj")
        norm(f"{name}/LayerNorm_0", f"{block}.norm1")
        norm(f"{name}/LayerNorm_{second}", f"{block}.norm2")
        feed_forward(f"{name}/MlpBlock_{mlp}", f"{block}.mlp")
    norm("Transformer/encoder_norm", "norm")
    if "head.weight" in state:
        linear("head", state["head.weight"], state["head.bias"])
    if "attn_pool.latent" in state:
        weight, bias = state["attn_pool.kv.weight"].chunk(2), state["attn_pool.kv.bias"].chunk(2)
        parts = [("query", state["attn_pool.q.weight"], state["attn_pool.q.bias"])]
        parts += list(zip(("key", "value"), weight, bias))
        attend("MAPHead_0/MultiHeadDotProductAttention_0", parts, "attn_pool.proj")
        out["MAPHead_0/probe"] = state["attn_pool.latent"]
        norm("MAPHead_0/LayerNorm_0", "attn_pool.norm")
        feed_forward("MAPHead_0/MlpBlock_0", "attn_pool.mlp")
    if stacked:
        rest = {
            k.removeprefix("Transformer/encoderblock_0/") for k in out if k.startswith("Transformer/encoderblock_0/")
        }
        for key in rest:
            layers = [out.pop(f"Transformer/encoderblock_{i}/{key}") for i in range(TINY["depth"])]
            out[f"Transformer/encoderblock/{key}"] = torch.stack(layers)
    return {start + key: value.numpy() for key, value in out.items()}


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_pytorch_files(tmp_path, wrap, prefix):
    source = tiny()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    state = {wrap: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)} if wrap else state
    torch.save(state, tmp_path / "weights.pth")
    target = create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "weights.pth", **TINY)
    assert_same(target, source)


def within(keys, *parts):
    return {".".join([*parts, key]): value for key, value in keys.items()}


def every_block(state, part):
    return {re.sub(r"^blocks\.(\d+)", rf"blocks.\1.{part}", key): value for key, value in state.items()}


WRAPPED = {
    "DDP around compile": lambda s: within(s, "module", "_orig_mod"),
    "compile around DDP": lambda s: within(s, "_orig_mod", "module"),
    "FSDP, unit by unit": lambda s: within(every_block(s, "_fsdp_wrapped_module"), "_fsdp_wrapped_module"),
    "checkpointed blocks": lambda s: every_block(s, "_checkpoint_wrapped_module"),
    "blocks compiled in FSDP": lambda s: every_block(s, "_fsdp_wrapped_module._orig_mod"),
    "Lightning": lambda s: {"state_dict": within(s, "model", "_orig_mod"), "epoch": 1},
    "a net in a model": lambda s: {"model": within(s, "net", "backbone") | {"net.queue": torch.zeros(3)}},
    "an encoder beside a decoder": lambda s: within(s, "encoder") | {"decoder.weight": torch.zeros(2)},
    "an averaged model": lambda s: within(s, "module") | {"n_averaged": torch.tensor(3)},
    "dictionaries in dictionaries": lambda s: {"run": {"net": {"module": within(s, "module")}}, "optimizer": {"m": s}},
    "a teacher and its student": lambda s: {"model": within(s, "teacher") | within(zeros(s), "student")},
    "a teacher's dictionary": lambda s: {"student": zeros(s), "teacher": within(s, "module", "backbone")},
    "averaged weights first": lambda s: {"model": zeros(s), "ema": within(s, "module")},
    "float16": lambda s: {key: value.half() for key, value in s.items()},
    "bfloat16": lambda s: {key: value.bfloat16() for key, value in s.items()},
}


def zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wrappers_add_to_keys(tmp_path, name):
    source = tiny()
    wrapped = WRAPPED[name](source.state_dict())
    torch.save(wrapped, tmp_path / "w.ckpt")
    if name in ("float16", "bfloat16"):
        source.to(getattr(torch, name)).float()
    assert_same(create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.ckpt", **TINY), source)
    if all(isinstance(value, torch.Tensor) for value in wrapped.values()):
        save_file(wrapped, tmp_path / "w.safetensors")
        assert_same(create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.safetensors", **TINY), source)


def test_a_prefix_says_which_of_several_models(tmp_path):
    source = tiny()
    state = source.state_dict()
    torch.save({"model": within(zeros(state), "left") | within(state, "right", "module")}, tmp_path / "w.pth")
    target = create_model("vit_tiny_patch16_224", **TINY)
    with pytest.raises(ValueError, match=r"holds several models, under left\., right\.: name one, as prefix='left\.'"):
        load_checkpoint(target, tmp_path / "w.pth")
    for prefix in ("right.", "right.module.", "model.right.module."):
        load_checkpoint(target, tmp_path / "w.pth", prefix=prefix)
        assert_same(target, source)
    with pytest.raises(ValueError, match=r"no key begins with 'middle\.'; keys begin with .*left"):
        load_checkpoint(target, tmp_path / "w.pth", prefix="middle.")
    torch.save({"teacher": state, "student": within(zeros(state), "backbone")}, tmp_path / "dino.pth")
    target.load_pretrained(str(tmp_path / "dino.pth"), prefix="student.backbone.")
    assert not target.norm.weight.any()


def test_resampled_positions_are_said_once(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="positions of .*w.pth were resampled from 4x4 to 6x8 patches") as said:
        create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.pth", **TINY | {"img_size": (96, 128)})
    assert len(said) == 1


def test_safetensors_and_npz_with_timms_keys(tmp_path):
    source = tiny()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "weights.npz", **{k: v.numpy() for k, v in source.state_dict().items()})
    for name in ("weights.safetensors", "weights.npz"):
        target = tiny("vit_tiny_patch16_224")
        with torch.no_grad():
            target.head.weight.zero_()
        load_checkpoint(target, tmp_path / name)
        assert_same(target, source)


@pytest.mark.parametrize(
    "name, layout",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"start": "opt/target/"}),
        ("vit_tiny_patch16_224", {"start": "params/", "new": True}),
        ("vit_tiny_patch16_224", {"start": "params/img/", "new": True, "stacked": True}),
        ("test_vit3", {"start": "params/img/", "new": True}),
    ],
    ids=str,
)
def test_googles_layout(tmp_path, name, layout):
    kwargs = {"init_values": 0, "reg_tokens": 0} if name == "test_vit3" else {}
    source = tiny(name, **kwargs)
    heads = source.blocks[0].attn.num_heads
    np.savez(tmp_path / "weights.npz", **to_flax(source.state_dict(), heads, **layout))
    target = create_model(name, checkpoint_path=tmp_path / "weights.npz", **TINY | kwargs)
    assert_same(target, source)


def test_googles_layout_is_read_as_timm_reads_it(tmp_path):
    timm = pytest.importorskip("timm")
    np.savez(tmp_path / "weights.npz", **to_flax(tiny().state_dict(), 3))
    theirs = timm.create_model("vit_tiny_patch16_224", **TINY)
    theirs.load_pretrained(str(tmp_path / "weights.npz"))
    assert_same(create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "weights.npz", **TINY), theirs)


def test_bfloat16_arrays(tmp_path):
    """numpy has no bfloat16: jax saves it as two bytes of nothing in particular."""
    value = torch.randn(3, 4).bfloat16()
    np.savez(tmp_path / "x.npz", x=value.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_checkpoint(tmp_path / "x.npz")["x"], value)


def test_layouts_of_facebook_need_no_timm(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    source = tiny("vit_small_patch14_dinov2", img_size=56)
    state = source.state_dict() | {"mask_token": torch.zeros(1, 384), "decoder_embed.weight": torch.zeros(3)}
    state = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}
    torch.save({"model": state}, tmp_path / "weights.pth")
    kwargs = TINY | {"img_size": 56}
    assert_same(create_model("vit_small_patch14_dinov2", checkpoint_path=tmp_path / "weights.pth", **kwargs), source)


CLIP = "vit_base_patch32_clip_quickgelu_224", {"depth": 1, "num_classes": 512}


def clip_keys(source):
    """The state_dict of a whole CLIP with this vision tower, in its authors' layout."""
    renames = [("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("blocks.", "transformer.resblocks.")]
    renames += [(".norm1", ".ln_1"), (".norm2", ".ln_2"), (".mlp.fc1", ".mlp.c_fc"), (".mlp.fc2", ".mlp.c_proj")]
    renames += [(".attn.qkv.", ".attn.in_proj_"), (".attn.proj", ".attn.out_proj"), ("cls_token", "class_embedding")]
    renames += [("pos_embed", "positional_embedding"), ("head.weight", "proj")]
    state = {"logit_scale": torch.ones(()), "positional_embedding": torch.zeros(7, 4), "ln_final.weight": torch.ones(4)}
    state["transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(12, 4)
    for key, value in source.state_dict().items():
        if key.startswith("norm."):
            key = key.replace("norm.", "ln_post.")
        for old, new in renames:
            key = key.replace(old, new)
        if key in ("class_embedding", "positional_embedding"):
            value = value.flatten(0, -2).squeeze(0)
        state[f"visual.{key}"] = value.T.contiguous() if key == "proj" else value
    state.pop("visual.head.bias")
    return state


@pytest.mark.parametrize("which", ["open_clip", "vision tower", "wrapped", "half"])
def test_clip_in_its_authors_layout(tmp_path, monkeypatch, which):
    """Without timm."""
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    name, kwargs = CLIP
    source = tiny(name, **kwargs)
    with torch.no_grad():
        source.head.bias.zero_()  # CLIP's projection has none
    source = source.half() if which == "half" else source
    state = clip_keys(source)
    if which == "vision tower":
        state = {key.removeprefix("visual."): x for key, x in state.items() if key.startswith("visual.")}
    if which == "wrapped":
        state = {"epoch": 1, "state_dict": {f"module.{key}": x for key, x in state.items()}}
    torch.save(state, tmp_path / "clip.pt")
    target = create_model(name, checkpoint_path=tmp_path / "clip.pt", **TINY | kwargs)
    assert_same(target, source.float())
    with pytest.warns(UserWarning, match="the head of .* has 512 classes: the model's of 7 begins anew"):
        create_model(name, checkpoint_path=tmp_path / "clip.pt", **TINY | kwargs | {"num_classes": 7})


def test_a_modified_resnet_is_refused(tmp_path):
    state = {"visual.conv1.weight": torch.zeros(1), "visual.layer1.0.conv1.weight": torch.zeros(1)}
    torch.save(state | {"visual.attnpool.c_proj.weight": torch.zeros(1)}, tmp_path / "RN50.pt")
    with pytest.raises(ValueError, match=r"RN50\.pt holds a convolutional network, which is no plain Vision"):
        load_checkpoint(tiny(), tmp_path / "RN50.pt")


def test_foreign_layouts_go_through_timm(tmp_path, monkeypatch):
    """AIMv2, whose keys are built here from timm's."""
    pytest.importorskip("timm")
    name, kwargs = "aimv2_large_patch14_224", {"depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 0}
    source = create_model(name, **kwargs)
    renames = [(".norm1", ".norm_1"), (".norm2", ".norm_2"), ("mlp.fc1_g", "mlp.fc1"), ("mlp.fc1_x", "mlp.fc3")]
    renames += [("patch_embed.", "preprocessor.patchifier."), ("pos_embed", "preprocessor.pos_embed")]
    state = {}
    for key, value in source.state_dict().items():
        key = key.replace("norm.", "post_trunk_norm.") if key.startswith("norm.") else key
        for new, old in renames:
            key = key.replace(new, old)
        state[f"trunk.{key}" if key.startswith(("blocks.", "post_trunk")) else key] = value
    torch.save(state, tmp_path / "aim.pt")
    target = create_model(name, **kwargs)
    load_checkpoint(target, tmp_path / "aim.pt")
    assert_same(target, source)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    monkeypatch.setitem(__import__("sys").modules, "timm.models.vision_transformer", None)
    with pytest.raises(ValueError, match=r"missing: .*unexpected: preprocessor\."):
        load_checkpoint(target, tmp_path / "aim.pt")


def test_a_checkpoint_of_another_family(tmp_path):
    """One sentence, and nothing is changed."""
    target = tiny()
    before = {key: x.clone() for key, x in target.state_dict().items()}
    for holds, state in {
        "a model of EVA's kind": create_model("vit_tiny_patch16_dinov3_qkvb", depth=1).state_dict(),
        "a convolutional network": {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(3)},
        "a Swin Transformer": {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(169, 3)},
    }.items():
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=f"other.safetensors holds {holds}") as error:
            load_checkpoint(target, tmp_path / "other.safetensors")
        assert "\n" not in str(error.value), holds
    for key, x in target.state_dict().items():
        assert torch.equal(x, before[key])


@pytest.mark.parametrize("prefix, no_embed_class", [(1, False), (5, False), (5, True)])
def test_positions_of_another_grid(tmp_path, prefix, no_embed_class):
    kwargs = {"reg_tokens": prefix - 1, "no_embed_class": no_embed_class}
    source = tiny(**kwargs)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    target = create_model(
        "vit_tiny_patch16_224", checkpoint_path=tmp_path / "weights.pth", **TINY | kwargs | {"img_size": (96, 128)}
    )
    rows = 0 if no_embed_class else prefix
    assert torch.equal(target.pos_embed, resample_positions(source.pos_embed, rows, (4, 4), (6, 8)))
    assert torch.equal(target.pos_embed[:, :rows], source.pos_embed[:, :rows])
    timm = pytest.importorskip("timm")
    expected = timm.layers.resample_abs_pos_embed(source.pos_embed, (6, 8), (4, 4), num_prefix_tokens=rows)
    assert torch.equal(target.pos_embed, expected)


def test_a_grid_that_is_not_square_is_told_by_the_file(tmp_path):
    source = tiny(img_size=(96, 128))
    save_checkpoint(source, tmp_path / "weights.safetensors")
    target = create_model(str(tmp_path / "weights.safetensors"), img_size=(128, 96))
    assert torch.equal(target.pos_embed, resample_positions(source.pos_embed, 1, (6, 8), (8, 6)))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 49, 192\) where the model has \(1, 17, 192\)"):
        create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "weights.pth", **TINY)


def test_heads(tmp_path):
    source = tiny()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    load = {"checkpoint_path": tmp_path / "weights.pth"}
    seven = create_model("vit_tiny_patch16_224", **TINY | {"num_classes": 7})
    with pytest.raises(ValueError, match=r"head.weight is \(10, 192\) where the model has \(7, 192\).*new_head=True"):
        load_checkpoint(seven, tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"weights.pth has 10 classes: the model's of 7 begins anew"):
        asked = create_model("vit_tiny_patch16_224", **load, **TINY | {"num_classes": 7})
    assert torch.equal(asked.norm.weight, source.norm.weight) and asked.head.weight.shape == (7, 192)
    with pytest.raises(ValueError, match="does not fit"):  # nobody asked for another number of classes
        create_model("vit_tiny_patch16_224", **load, depth=2, img_size=64)
    save_checkpoint(source, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="begins anew"):
        assert create_model(str(tmp_path / "m.safetensors"), num_classes=3).head.weight.shape == (3, 192)
    headless = create_model("vit_tiny_patch16_224", **load, **TINY | {"num_classes": 0})
    assert torch.equal(headless.norm.weight, source.norm.weight)


def test_what_does_not_fit_is_said_at_once_and_changes_nothing(tmp_path):
    source, target = tiny(), tiny(embed_dim=96, num_heads=3)
    torch.save(
        {k: v for k, v in source.state_dict().items() if "fc2" not in k} | {"extra": torch.zeros(1)}, tmp_path / "w.pth"
    )
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(target, tmp_path / "w.pth")
    text = str(caught.value)
    assert "\n" not in text and "w.pth does not fit the model: " in text
    assert "cls_token is (1, 1, 192) where the model has (1, 1, 96)" in text and " more; missing: " in text
    assert "missing: blocks.0.mlp.fc2.weight, blocks.0.mlp.fc2.bias" in text and "unexpected: extra" in text
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    with pytest.raises(ValueError, match="where the model has"):
        load_checkpoint(target, tmp_path / "w.pth", strict=False)


def test_strict_off_lets_keys_differ(tmp_path):
    source = tiny()
    torch.save(
        {k: v for k, v in source.state_dict().items() if k != "norm.bias"} | {"extra": torch.zeros(1)},
        tmp_path / "w.pth",
    )
    target = create_model("vit_tiny_patch16_224", **TINY)
    result = load_checkpoint(target, tmp_path / "w.pth", strict=False)
    assert result.missing_keys == ["norm.bias"] and result.unexpected_keys == ["extra"]
    assert torch.equal(target.norm.weight, source.norm.weight)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k", "deit_tiny_distilled_patch16_224", "test_vit3"])
def test_save_and_rebuild(tmp_path, name):
    model = tiny(name)
    model.reset_classifier(4)
    model.set_input_size(img_size=(96, 64))
    model.bfloat16()
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = create_model(str(tmp_path / "m.safetensors"))
    assert type(again) is type(model) and again.pretrained_cfg == model.pretrained_cfg
    assert_same(again, model)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    headless = create_model(str(tmp_path / "m.safetensors"), num_classes=0)
    assert isinstance(headless.head, torch.nn.Identity)


def test_saving_refuses_what_it_cannot_describe(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    model = tiny()
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_checkpoint(model, tmp_path / "m.pth")
    model.blocks[0].mlp.fc1 = torch.nn.Linear(192, 5)
    with pytest.raises(ValueError, match=r"no longer what .* makes: blocks\.0\.mlp\.fc1\.bias"):
        save_checkpoint(model, path)
    del model.created_from
    with pytest.raises(ValueError, match="not made by create_model"):
        save_checkpoint(model, path)
    with pytest.raises(ValueError, match="cannot be written down"):
        save_checkpoint(tiny(act_layer=torch.nn.GELU), path)
    for quantized in (tiny().engine(), fp8(tiny())):
        with pytest.raises(ValueError, match=r"Engine is no model: save its model|the model is quantized"):
            save_checkpoint(quantized, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RuntimeError, match="could not be written: disk full"):
        save_checkpoint(tiny(), path)
    assert os.listdir(tmp_path) == []


def test_a_file_without_a_description_says_so(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not say what model it is for"):
        create_model(str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match="holds its own weights"):
        create_model(str(tmp_path / "m.safetensors"), pretrained=True)
