"""Run-length tokens: a plain Transformer of the kept tokens alone, what is kept, and where there are none."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, same
from timm_pairs import assert_near, liven

import revit_kernels
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.policies import Policy, RunLength
from revit_kernels.clips import ClipPacking
from revit_kernels.models.run_length import differences
from revit_kernels.models.timesformer import ATTENTION_TYPES, VarLenTimeSformer
from revit_kernels.models.video_vit import VarLenVideoViT
from revit_kernels.modules.vjepa_attention import Turn, angles, turned

KINDS = {"sincos": {}, "learn": dict(class_token=True, global_pool="token"), "rope": {}, "joint_space_time": {}}
every_kind = pytest.mark.parametrize("kind", KINDS)
THRESHOLD = 0.2  # of normalised pixels
STEPS = 4
GRIDS = [(4, 4, 4), (2, 3, 2), (1, 4, 4), (3, 2, 4)]  # of the mixed batch


def make(kind, **kwargs):
    small = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=48, depth=2, num_heads=2) | kwargs
    if kind in ATTENTION_TYPES:
        model = VarLenTimeSformer(**small, attention_type=kind, num_frames=STEPS)
    else:
        model = VarLenVideoViT(**small, **KINDS[kind], pos_embed=kind, num_frames=2 * STEPS)
    return liven(model).to(DEVICE).eval()


def clip(tubelet, grid, seed=0):
    """A uint8 clip in which about half of all patches change from one step to the next, some of them by little."""
    rng, (steps, rows, columns) = np.random.default_rng(seed), grid
    change = rng.integers(0, 3, (steps, rows, columns))  # not at all, by little, altogether
    frames = rng.integers(0, 200, (1, rows * 8, columns * 8, 3)).repeat(steps, 0)
    mask = change.repeat(8, 1).repeat(8, 2)[..., None]
    frames = np.where(mask == 1, frames + np.arange(steps)[:, None, None, None], frames)
    frames = np.where(mask == 2, rng.integers(0, 200, frames.shape), frames)
    return torch.from_numpy(np.uint8(frames).repeat(tubelet, 0)).to(DEVICE)


def changed(x, tubelet, grid, threshold):
    """(tokens,) bool, one place at a time. x: (frames, height, width, channels), normalised, of the model's size"""
    steps, rows, columns = grid
    cells = np.asarray(x.cpu(), np.float64).reshape(steps, tubelet, rows, 8, columns, 8, 3)
    found = np.ones((steps, rows, columns), bool)
    for step, row, column in np.ndindex(steps - 1, rows, columns):
        before, after = (cells[step + i, :, row, :, column] for i in (0, 1))
        found[step + 1, row, column] = np.abs(after - before).mean() > threshold
    return torch.from_numpy(found.reshape(-1)).to(DEVICE)


def plain(model, tokens, kept, grid):
    """(kept, dim): the blocks and the final norm of these tokens alone, in plain PyTorch. tokens: with the prefix"""
    prefix = model.num_prefix_tokens
    rows = torch.cat([torch.arange(prefix, device=DEVICE), prefix + kept.nonzero()[:, 0]])
    x, heads = tokens[rows], model.blocks[0].attn.num_heads
    rope = getattr(model, "positions", None) == "rope"
    turn = Turn(*(t[rows] for t in angles((grid,), 48 // heads, DEVICE))) if rope else None
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, -1).unbind(1)
        q, k = (q, k) if turn is None else (turned(q, turn), turned(k, turn))
        y = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1)
        x = x + block.attn.proj(y.flatten(1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return model.norm(x)


@every_kind
@pytest.mark.parametrize("engine", [False, True], ids=["model", "engine"])
@torch.no_grad()
def test_is_the_model_of_the_kept_tokens(kind, engine):
    model = make(kind)
    x = [clip(model.tubelet, grid, i) for i, grid in enumerate(GRIDS)]
    served = model.engine() if engine else model
    features = served.features if engine else model.forward_features
    found = features(x, grids=GRIDS, channels_last=True, run_length=THRESHOLD)
    logits = served(x, grids=GRIDS, channels_last=True, run_length=THRESHOLD)
    assert_near("logits", logits, model.forward_head(found))
    for i, (part, grid) in enumerate(zip(found.split(), GRIDS)):
        kept = changed((x[i] / 255 - 0.5) / 0.5, model.tubelet, grid, THRESHOLD)
        assert 0 < kept.float().mean() < 1 or grid[0] == 1
        tokens = model.embed([x[i]], model.packing([grid]), channels_last=True)
        assert_near(f"clip {i}", part, plain(model, tokens, kept, grid))
        same(served([x[i]], grids=[grid], channels_last=True, run_length=THRESHOLD)[0], logits[i])


@every_kind
@pytest.mark.parametrize("per_length", [False, True], ids=["one affine", "an affine per length"])
@torch.no_grad()
def test_below_zero_nothing_is_left_out(kind, per_length):
    model = make(kind)
    if per_length:
        liven(model.make_resizable(GRIDS[:1] + GRIDS[3:] + GRIDS[2:3]))
    grids = [GRIDS[0], GRIDS[2], GRIDS[3]]
    x = [clip(model.tubelet, grid) for grid in grids]
    for one in (model, model.engine()):
        features = one.features if one is not model else one.forward_features
        same(one(x, grids=grids, channels_last=True, run_length=-1.0), one(x, grids=grids, channels_last=True))
        found, all_tokens = (features(x, grids=grids, channels_last=True, run_length=t) for t in (-1.0, None))
        same(found.tokens, all_tokens.tokens)
        assert found.packing.lengths == tuple(map(len, all_tokens.split()))
    dense = torch.stack([clip(model.tubelet, GRIDS[0], i) for i in range(2)])
    same(model(dense, channels_last=True, run_length=-1.0), model(dense, channels_last=True))


@every_kind
@torch.no_grad()
def test_a_clip_in_which_nothing_moves_keeps_one_token_a_place(kind):
    model = make(kind)
    still = clip(1, (1, 4, 4)).expand(STEPS * model.tubelet, -1, -1, -1)
    moving = clip(model.tubelet, GRIDS[0])
    for threshold in (0.0, 10.0):
        found = model.forward_features([still, moving], channels_last=True, run_length=threshold)
        assert found.packing.lengths[0] == model.num_prefix_tokens + 16
        assert found.packing.rows[: model.num_prefix_tokens + 16].tolist() == list(range(model.num_prefix_tokens + 16))
        assert (found.packing.lengths[1] > found.packing.lengths[0]) == (threshold == 0)
    if kind == "rope":  # positions of the first step are those of a clip of one step
        alone = model([still[: model.tubelet]], channels_last=True)
        same(model([still], channels_last=True, run_length=0.0), alone)


@every_kind
@torch.no_grad()
def test_pixels_are_compared_as_the_model_sees_them(kind):
    """Resized and normalised; of floating-point clips, as they come."""
    model = make(kind)
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.6), "interpolation": "bilinear"}
    pixels = clip(model.tubelet, (4, 6, 7))  # 48 by 56 pixels, to 32 by 32
    frames = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (32, 32), mode="bilinear", antialias=True) / 255
    seen = ((frames.permute(0, 2, 3, 1) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.2, 0.3, 0.6])).to(DEVICE)
    kept = changed(seen, model.tubelet, GRIDS[0], 0.22)
    assert 0.3 < kept.float().mean() < 0.9
    rows = model.num_prefix_tokens + kept.nonzero()[:, 0]
    for x, options in (
        ([pixels], {"channels_last": True}),
        ([pixels.permute(3, 0, 1, 2)], {}),
        (seen.permute(3, 0, 1, 2)[None].float(), {}),
        (seen[None].float(), {"channels_last": True}),
    ):
        found = model.forward_features(x, grids=GRIDS[:1], run_length=0.22, **options).packing
        assert found.rows[model.num_prefix_tokens :].tolist() == rows.tolist()


@every_kind
def test_gradients_are_those_of_the_kept_tokens(kind):
    model = make(kind)
    grid = GRIDS[0]
    x = clip(model.tubelet, grid)
    model([x], grids=[grid], channels_last=True, run_length=THRESHOLD).sin().sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    kept = changed((x / 255 - 0.5) / 0.5, model.tubelet, grid, THRESHOLD)
    tokens = plain(model, model.embed([x], model.packing([grid]), channels_last=True), kept, grid)
    pooled = tokens[0] if model.global_pool == "token" else tokens.mean(0)
    model.head(model.fc_norm(pooled)).sin().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scale = max(grad.abs().max().item() for grad in expected.values())
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert_near(name, actual[name], grad, scale)


@torch.no_grad()
def test_is_transformers_videomae_of_the_unmasked_tokens():
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=8,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=100,
    )
    theirs = liven(transformers.VideoMAEModel(config)).to(DEVICE).eval()
    ours = revit_kernels.from_transformers(theirs)
    x = (clip(2, GRIDS[0]) / 255 - 0.5) / 0.5
    kept = changed(x, 2, GRIDS[0], THRESHOLD)
    expected = theirs(x.permute(0, 3, 1, 2)[None], bool_masked_pos=~kept[None]).last_hidden_state[0]
    found = ours.forward_features([x.permute(3, 0, 1, 2)], run_length=THRESHOLD)
    assert_near("features", found.tokens, expected)


def test_no_clips():
    model = make("sincos")
    found = model.forward_features([], run_length=0.1)
    assert found.tokens.shape == (0, 48) and found.split() == () and model([], run_length=0.1).shape == (0, 5)


@every_kind
def test_a_policy(kind):
    """The answers of full length without the repeated tokens, and how many were left."""
    model = make(kind).make_resizable([GRIDS[0], GRIDS[2]])
    x = torch.stack([clip(model.tubelet, GRIDS[0], i) for i in range(3)])
    policy = Policy.from_json(RunLength(THRESHOLD).to_json())
    assert policy == RunLength(THRESHOLD, 0) and "4x4x4" in policy.describe(model.menu)
    adaptive = AdaptiveViT(model, policy)
    found = adaptive.predict(x, channels_last=True)
    with torch.inference_mode():
        packed = model.forward_features(x, channels_last=True, run_length=THRESHOLD)
        assert_near("logits", found.logits, model.forward_head(packed))
    assert found.tokens.tolist() == list(packed.packing.lengths) and found.choice.tolist() == [0, 0, 0]
    assert found.rows == sum(packed.packing.lengths) < 3 * (64 + model.num_prefix_tokens)
    features, row, tokens = adaptive.features(x, channels_last=True)
    assert features.shape == (3, 48) and tokens.tolist() == found.tokens.tolist() and row.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["divided_space_time", "space_only"])
def test_attention_within_frames_has_none(kind):
    model = make(kind)
    x = [clip(1, GRIDS[0])]
    for one in (model, model.engine()):
        with pytest.raises(ValueError, match="run_length needs attention over whole clips: this VarLenTimeSformer"):
            one(x, channels_last=True, run_length=0.1)
    with pytest.raises(ValueError, match="one sequence"):
        ClipPacking.from_grids(GRIDS).keep(torch.ones(1, dtype=torch.bool))


def test_wrong_use_says_so():
    model, x = make("sincos"), [clip(2, GRIDS[0])]
    with pytest.raises(ValueError, match="run_length must be a number, got NaN"):
        model(x, channels_last=True, run_length=float("nan"))
    with pytest.raises(ValueError, match=r"patches must be \(64,\) bool"):
        model.packing(GRIDS[:1]).keep(torch.ones(64))
    with pytest.raises(ValueError, match="run-length tokens are of models of clips"):
        RunLength(0.1).require(((4, 4), (2, 2)))
    with pytest.raises(ValueError, match="rows 0 to 0"):
        RunLength(0.1, 1).require(GRIDS[:1])


def test_nan_is_no_repetition():
    frames = torch.zeros(2, 3, 8, 8)
    frames[1, 0, 0, 0] = float("nan")
    apart = differences(frames, [(2, 1, 1)], (8, 8), None, "bicubic")
    assert (~(apart <= 100)).tolist() == [True, True]
