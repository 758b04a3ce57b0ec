"""Policies, assigners and costs of a model of clips."""

import pytest
import torch
from contract import DEVICE
from torch.utils.flop_counter import FlopCounterMode

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.costs import measure_costs, model_macs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.policies import Assign, Cascade, Fixed
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.registry import create_model
from revit_kernels.models.timesformer import ATTENTION_TYPES
from revit_kernels.modules.lengths import tokens_of

MENU = ((4, 4, 4), (4, 2, 2), (2, 2, 2))


def make(attention_type="divided_space_time"):
    """A TimeSformer, or by another name a model of tubelets."""
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    if attention_type in ATTENTION_TYPES:
        model = create_model("timesformer_tiny_patch16_224", **small, num_frames=4, attention_type=attention_type)
    else:
        model = create_model(attention_type, **small, num_frames=8)
    with torch.no_grad():
        for parameter in model.parameters():  # temporal attention begins behind zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE).make_resizable(MENU).eval()


def clips(count=7):
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, 256, (count, 6, 40, 40, 3), dtype=torch.uint8, generator=generator)
    return found.to(DEVICE)


TUBELETS = ("videomae_small_patch16_224", "vivit_base_patch16_224", "vjepa2_large_patch16_256")
every_type = pytest.mark.parametrize("attention_type", (*ATTENTION_TYPES, *TUBELETS))


@every_type
def test_a_policy_answers_as_the_model(attention_type):
    """Every clip's answer is that of the model at the length that it was given, with the tokens that this takes."""
    model, x = make(attention_type), clips()
    rows = [0, 2, 1, 2, 2, 0, 1]
    found = AdaptiveViT(model, lambda images: torch.tensor(rows)).predict(x, channels_last=True)
    assert found.choice.tolist() == rows
    assert found.tokens.tolist() == [tokens_of(model, MENU[row]) for row in rows]
    for i, row in enumerate(rows):
        with torch.inference_mode():
            alone = model([x[i]], grids=[MENU[row]], channels_last=True)
        torch.testing.assert_close(found.logits[i], alone[0])


def test_a_cascade_answers_as_the_model():
    model, x = make(), clips()
    policy = Cascade(2, ((0.0, 1.0, 1.0, 1.0),) * 3, 0.0, (1.0, 0.4, 0.2))
    found = AdaptiveViT(model, policy).predict(x, channels_last=True)
    spent = [tokens_of(model, grid) for grid in MENU]
    for i, row in enumerate(found.choice.tolist()):
        with torch.inference_mode():
            torch.testing.assert_close(found.logits[i], model([x[i]], grids=[MENU[row]], channels_last=True)[0])
        assert found.tokens[i] == spent[2] + (spent[row] if row < 2 else 0)


@every_type
@pytest.mark.parametrize("trunk, depth", [("scout", 0), ("tokens", 0), ("tokens", 1)])
def test_assigners(attention_type, trunk, depth, tmp_path):
    """Clips that stay at the shortest length go on from the assigner's tokens, and the file holds the assigner."""
    model, x = make(attention_type), clips()
    assigner = TokenLengthAssigner.for_model(model, trunk, depth=depth, hidden=16).to(DEVICE).eval()
    logits = assigner(x, model=model)
    assert logits.shape == (7, 3 + 5)
    split = torch.cat([assigner([clip], model=model) for clip in x])
    torch.testing.assert_close(split, logits)
    moved = assigner([clip.permute(3, 0, 1, 2) for clip in x], model=model, channels_last=False)
    torch.testing.assert_close(moved, logits)
    reused, anew = (
        AdaptiveViT(model, Assign(0.5, (1.0, 0.5, 0.2)), assigner=assigner, reuse=reuse).predict(x, channels_last=True)
        for reuse in (True, False)
    )
    torch.testing.assert_close(reused.logits, anew.logits)
    assigner.save(tmp_path / "a.safetensors")
    kept = TokenLengthAssigner.load(tmp_path / "a.safetensors").to(DEVICE)
    torch.testing.assert_close(kept(x, model=model), assigner.bfloat16().float()(x, model=model))


@pytest.mark.parametrize("attention_type", (*ATTENTION_TYPES, *TUBELETS[:2]))  # the counter's hooks know no rotation
def test_multiply_accumulates(attention_type):
    """Of the blocks, what is counted by hand is what torch counts."""
    model, x = make(attention_type), clips(1)
    for grid in MENU:
        packing = model.packing([grid])
        with torch.no_grad():
            tokens = model.embed(x, packing, channels_last=True)
            with FlopCounterMode(display=False) as counter:
                model.run_blocks([tokens, None, None], packing)
        assert model_macs(model, grid) - model_macs(model, grid, 0) == counter.get_total_flops() / 2


def test_costs():
    model = make()
    assigner = TokenLengthAssigner.for_model(model, hidden=16).to(DEVICE)
    costs = measure_costs(model, assigner, batch=2, rounds=1, warmup=0)
    assert costs.menu == MENU and min(costs.per_length) > 0 and costs.assigner > 0
    again = type(costs).from_json(costs.to_json())
    assert again == costs


def test_fixed_and_nothing():
    model = make()
    adaptive = AdaptiveViT(model, Fixed(1))
    assert adaptive.predict(clips(0), channels_last=True).logits.shape == (0, 5)
    assert adaptive.predict(clips(2), channels_last=True).choice.tolist() == [1, 1]


@every_type
def test_files(attention_type, tmp_path):
    """A file holds the model, its menu and its size."""
    model, x = make(attention_type), clips(2)
    save_checkpoint(model, tmp_path / "a.safetensors")
    again = create_model(tmp_path / "a.safetensors").to(DEVICE).eval()
    assert again.menu == MENU and again.num_frames == model.num_frames
    with torch.inference_mode():
        logits = (one(x, packing=one.packing([MENU[0], MENU[2]]), channels_last=True) for one in (model, again))
        torch.testing.assert_close(*logits)
    with pytest.warns(UserWarning, match="has 5 classes"):
        again = create_model(tmp_path / "a.safetensors", num_classes=3)
    assert again.head.out_features == 3
