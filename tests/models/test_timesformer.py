"""TimeSformer: transformers' outputs at its own size, a plain reference at others, mixed batches clip by clip."""

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, same
from timm_pairs import assert_near, liven

import revit_kernels
from revit_kernels.clips import ClipPacking
from revit_kernels.models.timesformer import ATTENTION_TYPES, VarLenTimeSformer
from revit_kernels.models.vit import VarLenViT

SMALL = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2, num_frames=4)
CLIPS = [(4, 32, 32), (7, 16, 24), (1, 8, 40), (2, 32, 16)]  # frames, height, width
every_type = pytest.mark.parametrize("attention_type", ATTENTION_TYPES)


def make(attention_type="divided_space_time", **kwargs):
    return liven(VarLenTimeSformer(**SMALL | kwargs, attention_type=attention_type)).to(DEVICE).eval()


def clips(sizes=CLIPS, channels=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(channels, *size, generator=generator).to(DEVICE) for size in sizes]


def attend(attn, x):
    """Plain attention of (sequences, length, dim)."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * attn.scale).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


def mlp(block, x):
    return block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def plain(model, clip, features=False):
    """The definition, as its authors wrote it down: one clip, patches with the frame running fastest."""
    frames = F.conv2d(clip.transpose(0, 1), model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    grid, (t, dim) = frames.shape[2:], frames.shape[:2]
    how = {"mode": "nearest"} if model.pos_interpolation == "nearest" else {"mode": "bicubic", "antialias": True}
    table = model.pos_embed[:, 1:].view(1, *model.patch_embed.grid_size, dim).permute(0, 3, 1, 2)
    x = frames + (table if tuple(table.shape[2:]) == tuple(grid) else F.interpolate(table, size=grid, **how))
    x = x.flatten(2).mT  # (frames, patches, dim)
    first = model.cls_token[0] + model.pos_embed[0, :1]
    if model.time_embed is not None:
        how = {"mode": "nearest"} if model.pos_interpolation == "nearest" else {"mode": "linear"}
        times = model.time_embed
        x = x + (times if times.shape[1] == t else F.interpolate(times.mT, size=t, **how).mT)[0][:, None]
    if model.attention_type == "divided_space_time":
        for block in model.blocks:
            own = x.transpose(0, 1)  # (patches, frames, dim)
            x = x + block.temporal_fc(attend(block.temporal_attn, block.temporal_norm1(own))).transpose(0, 1)
            r = attend(block.attn, block.norm1(torch.cat([first.expand(t, 1, dim), x], 1)))
            first, x = first + r[:, 0].mean(0, keepdim=True), x + r[:, 1:]
            first, x = first + mlp(block, first), x + mlp(block, x)
        tokens = torch.cat([first, x.transpose(0, 1).flatten(0, 1)])
    else:
        joint = model.attention_type == "joint_space_time"
        x = torch.cat([first, x.flatten(0, 1)])[None] if joint else torch.cat([first.expand(t, 1, dim), x], 1)
        for block in model.blocks:
            x = x + attend(block.attn, block.norm1(x))
            x = x + mlp(block, x)
        tokens = x.mean(0)
        if joint:
            tokens = torch.cat([tokens[:1], tokens[1:].unflatten(0, (t, -1)).transpose(0, 1).flatten(0, 1)])
    tokens = model.norm(tokens)
    return tokens if features else model.head(tokens[0])


def transformers_model(attention_type, cls="TimesformerForVideoClassification"):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=100,
        attention_type=attention_type,
        num_labels=5,
    )
    return liven(getattr(transformers, cls)(config)).to(DEVICE).eval()


@every_type
def test_is_transformers_model(attention_type):
    theirs = transformers_model(attention_type)
    ours = revit_kernels.from_transformers(theirs)
    assert isinstance(ours, VarLenTimeSformer) and ours.pos_interpolation == "nearest"
    x = torch.stack(clips([(4, 32, 32)] * 2))
    own = theirs.timesformer
    if attention_type == "space_only":  # theirs leaves the frames apart where its authors average them
        hidden = own.encoder(own.embeddings(x.transpose(1, 2))).last_hidden_state.unflatten(0, (2, 4)).mean(1)
        hidden = own.layernorm(hidden)
        logits = theirs.classifier(hidden[:, 0])
    else:
        out = theirs(x.transpose(1, 2), output_hidden_states=False)
        hidden, logits = own(x.transpose(1, 2)).last_hidden_state, out.logits
    assert_near("features", ours.forward_features(x), hidden)
    assert_near("logits", ours(x), logits)
    logits.sin().sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for p in theirs.parameters():  # which ours shares
        p.grad = None
    ours(x).sin().sum().backward()
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name, p in theirs.named_parameters():
        assert_near(name, p.grad, expected[name], scale)


def test_a_bare_model_of_transformers():
    theirs = transformers_model("divided_space_time", "TimesformerModel")
    x = torch.stack(clips([(4, 32, 32)] * 2))
    assert_near("class token", revit_kernels.from_transformers(theirs)(x), theirs(x.transpose(1, 2))[0][:, 0])


@every_type
@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_is_the_plain_model_at_every_size(attention_type, interpolation):
    model = make(attention_type)
    model.pos_interpolation = interpolation
    mixed = clips()
    expected = [plain(model, clip) for clip in mixed]
    for i, logits in enumerate(model(mixed)):
        assert_near(f"clip {i}", logits, expected[i])
        alone = model.forward_features(mixed[i][None])[0]
        assert_near(f"features of clip {i}", alone, plain(model, mixed[i], features=True))


@every_type
def test_gradients(attention_type):
    model = make(attention_type)
    mixed = clips()
    torch.stack([plain(model, clip) for clip in mixed]).sin().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(mixed).sin().sum().backward()
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name, p in model.named_parameters():
        assert_near(name, p.grad, expected[name], scale)
    model.zero_grad()
    model.set_grad_checkpointing()
    model(mixed).sin().sum().backward()
    for name, p in model.named_parameters():
        assert_near(name, p.grad, expected[name], scale)


@every_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_clip_does_not_depend_on_its_company(attention_type, dtype):
    model = make(attention_type).to(dtype)
    mixed = clips()
    together = model(mixed)
    for order in ([2], [0], [3, 1], [1, 2, 0, 3]):
        same(model([mixed[i] for i in order]), together[order])
    packing = ClipPacking.from_grids(
        [(n, h // 8, w // 8) for n, h, w in CLIPS], 1, per_frame=model.per_frame, capacity=300, device=DEVICE
    )
    same(model(mixed, packing=packing), together)


@every_type
@torch.no_grad()
def test_layouts_and_grids(attention_type):
    model = make(attention_type)
    pixels = torch.randint(256, (2, 6, 24, 40, 3), dtype=torch.uint8, device=DEVICE)
    channels_first = pixels.permute(0, 4, 1, 2, 3)
    logits = model(pixels, channels_last=True)
    same(model(channels_first), logits)
    same(model(list(pixels), grids=[(3, 5)] * 2, channels_last=True), logits)
    if DEVICE == "cpu":
        same(model([clip.numpy() for clip in pixels], grids=[(3, 5)] * 2, channels_last=True), logits)
    floats = (channels_first / 255 - 0.5) / 0.5
    assert_near("normalised", logits, model(floats))
    # Fewer frames are the middles of equal parts: of 6, 3 are those at 1, 3 and 5.
    same(model(pixels, grids=[(3, 3, 5)] * 2, channels_last=True), model(pixels[:, 1::2], channels_last=True))
    assert model([]).shape == (0, 5)


def test_inflated_image_weights():
    image = liven(VarLenViT(32, 8, embed_dim=48, depth=3, num_heads=4, num_classes=5)).to(DEVICE).eval()
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    for attention_type in ("divided_space_time", "space_only"):
        model = VarLenTimeSformer.from_image_model(image, num_frames=6, attention_type=attention_type).eval()
        assert_near("still frames", model(x[:, :, None].expand(-1, -1, 6, -1, -1)), image(x))
    block = VarLenTimeSformer.from_image_model(image).blocks[1]
    assert torch.equal(block.temporal_attn.qkv.weight, image.blocks[1].attn.qkv.weight)
    assert torch.equal(block.temporal_norm1.weight, image.blocks[1].norm1.weight)
    with pytest.raises(NotImplementedError, match="class token"):
        VarLenTimeSformer.from_image_model(
            VarLenViT(32, 8, class_token=False, global_pool="avg", embed_dim=48, depth=1)
        )
    with pytest.raises(NotImplementedError, match="no place for"):
        VarLenTimeSformer.from_image_model(VarLenViT(32, 8, reg_tokens=2, embed_dim=48, depth=1, num_heads=4))


@every_type
def test_checkpoints_by_layout(attention_type, tmp_path):
    model, path = make(attention_type), tmp_path / "model.pth"
    x = torch.stack(clips([(4, 32, 32)]))
    torch.save({"model_state": {f"model.{k}": v for k, v in model.state_dict().items()}}, path)
    loaded = VarLenTimeSformer(**SMALL, attention_type=attention_type).to(DEVICE).eval()
    loaded.load_pretrained(path)
    same(loaded(x), model(x))
    theirs = transformers_model(attention_type)
    torch.save(theirs.state_dict(), path)
    loaded = VarLenTimeSformer(**SMALL | dict(mlp_ratio=100.5 / 48), attention_type=attention_type).to(DEVICE).eval()
    loaded.load_pretrained(path)
    same(loaded(x), revit_kernels.from_transformers(theirs)(x))
    with pytest.raises(ValueError, match="where the model has"):
        VarLenTimeSformer(**SMALL | dict(img_size=40), attention_type=attention_type).load_pretrained(path)


MENU = [(4, 4, 4), (4, 3, 3), (2, 3, 3)]


@every_type
@torch.no_grad()
def test_resizable(attention_type):
    model = make(attention_type)
    mixed = clips([(4, 32, 32), (4, 24, 24), (4, 24, 24)])
    before = model(mixed, grids=MENU)
    plain_state = model.state_dict()
    model.make_resizable(MENU)
    same(model(mixed, grids=MENU), before)
    names = [name for name, _ in model.named_parameters() if "shorter_" in name]
    norms = 3 if attention_type == "divided_space_time" else 2
    assert len(names) == 2 * (3 * norms + 1)
    for name, p in model.named_parameters():
        if name.endswith("shorter_bias"):
            p[1] += 1
    changed = model(mixed, grids=MENU)
    same(changed[:2], before[:2])
    assert not torch.equal(changed[2], before[2])
    model.load_state_dict(plain_state)
    same(model(mixed, grids=MENU), before)
    assert model.no_weight_decay() >= {"time_embed", *names}
    with pytest.raises(ValueError, match="resizable already"):
        model.make_resizable(MENU)


def test_resizable_takes_another_size():
    model = make().make_resizable([(6, 5, 3), (3, 2, 2)])
    assert model.time_embed.shape == (1, 6, 48) and model.pos_embed.shape == (1, 16, 48)
    assert model(clips([(6, 40, 24)])[0][None]).shape == (1, 5)


def test_training_drops_whole_branches():
    model = make(drop_path_rate=0.9, proj_drop_rate=0.1, pos_drop_rate=0.1, drop_rate=0.1).train()
    model(clips()).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_clips_without_values():
    answers = make().to("meta")([clip.to("meta") for clip in clips()])
    assert answers.is_meta and len(answers) == len(CLIPS)


@torch.no_grad()
def test_engine_and_hooks():
    model = make()
    mixed = clips()
    expected = model(mixed)
    engine = model.engine()
    assert_near("engine", engine(mixed), expected)
    packing = model.packing([(n, h // 8, w // 8) for n, h, w in CLIPS])
    stream = engine.run_blocks([engine.embed(mixed, packing), None, None], packing, 0, 1)
    assert_near("in parts", engine.finish(engine.run_blocks(stream, packing, 1), packing), expected)
    features = engine.features(mixed)
    assert_near("features", engine.forward_head(features), expected)
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_near("hooked", model(mixed), expected)
    assert len(seen) == 1
    handle.remove()
    model.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed since"):
        engine(mixed)
    engine.refresh()
    assert_near("refreshed", engine(mixed), model(mixed))


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(2, 3, 32, 32), {}, r"must be a tensor of \(channels, frames, height, width\)"),
        (torch.zeros(1, 3, 4, 33, 32), {}, "multiple of the patch size"),
        (torch.zeros(1, 4, 4, 32, 32), {}, "expected clips of 3 channels"),
        ([[torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)]], {}, "frames of one size"),
        ([torch.zeros(3, 2, 32, 32)], {"grids": [[(4, 4), (2, 2)]]}, "one grid for all frames of a clip"),
        ([torch.zeros(3, 2, 32, 32)], {"grids": []}, "1 clips, 0 grids"),
        ([torch.zeros(3, 0, 32, 32)], {}, "is empty"),
        ([torch.zeros(3, 2, 8, 8)], {"packing": ClipPacking.from_grids([(2, 1, 1)], 0)}, "as model.packing"),
    ],
)
def test_wrong_use_says_so(x, options, message):
    with pytest.raises(ValueError, match=message):
        VarLenTimeSformer(**SMALL)(x, **options)
