"""VideoMAE, ViViT and V-JEPA 2: transformers' outputs and gradients, mixed batches clip by clip, other sizes."""

import re

import pytest
import torch
from contract import DEVICE, same
from timm_pairs import assert_near, liven

import revit_kernels
from revit_kernels.models.hugging_face_video import our_state
from revit_kernels.models.video_vit import VarLenVideoViT
from revit_kernels.modules.vjepa_attention import angles

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2)
FRAMES = dict(image_size=32, num_frames=6)
CASES = {  # class, configuration, its arguments
    "VideoMAEModel": ("VideoMAEModel", "VideoMAEConfig", FRAMES | dict(patch_size=8, intermediate_size=100)),
    "VideoMAEForVideoClassification": (
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        FRAMES | dict(patch_size=8, intermediate_size=100, num_labels=5),
    ),
    "VideoMAE, first token": (
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        FRAMES | dict(patch_size=8, intermediate_size=100, num_labels=5, use_mean_pooling=False, qv_bias=False),
    ),
    "VivitModel": ("VivitModel", "VivitConfig", FRAMES | dict(tubelet_size=[3, 8, 8], intermediate_size=100)),
    "VivitForVideoClassification": (
        "VivitForVideoClassification",
        "VivitConfig",
        FRAMES | dict(tubelet_size=[2, 8, 8], intermediate_size=100, num_labels=5),
    ),
    "VJEPA2Model": ("VJEPA2Model", "VJEPA2Config", dict(crop_size=32, patch_size=8, frames_per_clip=6)),
    "VJEPA2Model, 20 channels a head": (
        "VJEPA2Model",
        "VJEPA2Config",
        dict(crop_size=32, patch_size=8, frames_per_clip=6, hidden_size=40, qkv_bias=False),
    ),
}
POSITIONS = {"sincos": {}, "learn": dict(class_token=True, global_pool="token"), "rope": {}}
every_case = pytest.mark.parametrize("name", CASES)
every_position = pytest.mark.parametrize("positions", POSITIONS)


def make(name):
    cls, config, kwargs = CASES[name]
    predictor = {"pred_hidden_size": 48, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    kwargs = SIZES | kwargs | (predictor if "VJEPA2" in cls else {})
    return liven(getattr(transformers, cls)(getattr(transformers, config)(**kwargs))).to(DEVICE).eval()


def theirs(model, x):
    """Its last hidden state, and its answer or None. x: (clips, channels, frames, height, width)"""
    x = x.transpose(1, 2)
    if type(model).__name__.startswith("VJEPA2"):
        return model(x, skip_predictor=True).last_hidden_state, None
    out, base = model(x), getattr(model, model.base_model_prefix, model)
    answer = next((out[key] for key in ("logits", "pooler_output") if out.get(key) is not None), None)
    return base(x).last_hidden_state, answer


def clips(sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator).to(DEVICE) for size in sizes]


@every_case
def test_is_transformers_model(name):
    model = make(name)
    ours = revit_kernels.from_transformers(model)
    assert isinstance(ours, VarLenVideoViT)
    x = torch.stack(clips([(6, 32, 32)] * 2))
    hidden, answer = theirs(model, x)
    assert_near("features", ours.forward_features(x), hidden)
    answer = hidden.mean(1) if answer is None else answer
    assert_near("answer", ours(x), answer)
    packed = ours.forward_features(list(x)[:1])
    assert_near("packed", packed.tokens, hidden[0])
    answer.sin().sum().backward()
    expected = our_state({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {re.sub(r"^pooler\.", "head.dense.", key): grad for key, grad in expected.items()}
    model.zero_grad()  # the parameters are shared
    ours.zero_grad()
    ours(x).sin().sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys() and len(found) > 20
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert_near(f"gradient of {name}", found[name], grad, scale)


def ours(positions, **kwargs):
    small = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=48, depth=2, num_heads=2, num_frames=8)
    return liven(VarLenVideoViT(**small | POSITIONS[positions] | kwargs, pos_embed=positions)).to(DEVICE).eval()


SIZES_OF_CLIPS = [(8, 32, 32), (4, 16, 24), (2, 8, 40), (12, 24, 24)]


@every_position
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_mixed_batch_is_its_clips_one_by_one(positions, dtype):
    model = ours(positions).to(dtype)
    mixed = clips(SIZES_OF_CLIPS)
    together = model(mixed)
    for order in ([2], [3, 1], [1, 2, 0, 3]):
        same(model([mixed[i] for i in order]), together[order])
    for i, clip in enumerate(mixed):
        same(model(clip[None]), together[i : i + 1])
    if dtype == torch.float32:
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert_near("under a global hook", model(mixed), together)
        handle.remove()
        engine = model.engine()
        assert (engine.refusal is None) == (positions != "rope")
        assert_near("engine", engine(mixed), together)


@every_position
def test_clips_without_values(positions):
    model, mixed = ours(positions).to("meta"), [clip.to("meta") for clip in clips(SIZES_OF_CLIPS)]
    answers = model(mixed)
    assert answers.is_meta and len(answers) == len(mixed)


@torch.no_grad()
def test_positions_of_another_size():
    model = ours("sincos")
    table = model._table()  # (4, 4, 4, dim)
    cells, _ = model._positions(((4, 4, 4), (8, 4, 4), (2, 2, 2)))
    same(cells[:64], table.flatten(0, 2))
    longer = cells[64:192].view(8, 16, -1)
    times = torch.nn.functional.interpolate(table.flatten(1).t()[None], size=8, mode="linear")
    assert_near("longer", longer.flatten(1), times[0].t())
    resized = ours("learn").make_resizable([(6, 3, 5), (2, 2, 2)])
    assert resized.pos_embed.shape == (1, 1 + 90, 48)
    same(resized._positions(((6, 3, 5),))[0], resized.pos_embed[0, 1:])


@every_position
@torch.no_grad()
def test_layouts(positions):
    model = ours(positions)
    pixels = torch.randint(256, (2, 8, 32, 24, 3), dtype=torch.uint8, device=DEVICE)
    logits = model(pixels, channels_last=True)
    channels_first = pixels.permute(0, 4, 1, 2, 3)
    same(model(channels_first), logits)
    assert_near("normalised", logits, model((channels_first / 255 - 0.5) / 0.5))
    same(model(list(pixels), grids=[(2, 4, 3)] * 2, channels_last=True), model(pixels[:, 1::2], channels_last=True))
    with pytest.raises(ValueError, match="multiple of 2, got 7"):
        model(pixels[:, :7], channels_last=True)


@every_position
@torch.no_grad()
def test_a_tensor_of_clips_is_a_list_of_them(positions):
    """Also of some clips fewer frames than of others."""
    model = ours(positions)
    pixels = torch.randint(256, (4, 8, 32, 32, 3), dtype=torch.uint8, device=DEVICE)
    for grids in ([(4, 4, 4)] * 4, [(2, 4, 4)] * 4, [(4, 4, 4), (1, 2, 3), (4, 3, 3), (2, 4, 4)]):
        logits = model(list(pixels), grids=grids, channels_last=True)
        same(model(pixels, grids=grids, channels_last=True), logits)
        same(model(pixels.permute(0, 4, 1, 2, 3), grids=grids), logits)
        same(model(pixels.permute(0, 4, 1, 2, 3).contiguous(), grids=grids), logits)


def test_angles_of_positions():
    turn = angles(((2, 1, 3), (1, 2, 1)), 24, torch.device("cpu"))
    assert turn.cos.shape == (8, 24)
    omega = 10000.0 ** -(torch.arange(4) / 4)
    last = torch.cat([torch.tensor([1.0]) * omega, 0 * omega, 2 * omega])  # frame 1, row 0, column 2
    assert_near("sin", turn.sin[5].view(3, 2, 4)[:, 0], last.view(3, 4).sin())
    assert_near("both halves", turn.sin[5].view(3, 2, 4)[:, 0], turn.sin[5].view(3, 2, 4)[:, 1])


def test_wrong_use_says_so():
    with pytest.raises(ValueError, match="pos_embed must be one of"):
        VarLenVideoViT(pos_embed="none")
    with pytest.raises(ValueError, match="class token needs"):
        VarLenVideoViT(class_token=True)
    with pytest.raises(ValueError, match="multiple of tubelet_size"):
        VarLenVideoViT(num_frames=7)
