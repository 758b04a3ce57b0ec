"""TokenLengthAssigner: both kinds, training, calibration, files, and whose it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_revit import MENU, held_out, make_images, make_model, trained

from revit_kernels.models import checkpoints
from revit_kernels.models.assigner import KINDS, SHARE, TokenLengthAssigner, model_macs, vit_macs
from revit_kernels.training.assigner import LOSSES, AssignerRecipe, assigner_loss, quality, train_assigner

RECIPE = AssignerRecipe(epochs=3, folds=2)


@pytest.fixture(scope="module", params=KINDS)
def assigner(request):
    images, outcomes = held_out()
    return train_assigner(trained(), outcomes, images, request.param, RECIPE)


def test_logits_of_images_alone_and_in_company(assigner):
    x = torch.from_numpy(held_out()[0].array[:6])
    with torch.inference_mode():
        together = assigner(x, model=trained())
        assert together.shape == (6, 3) and together.dtype == torch.float32
        for i in range(6):
            torch.testing.assert_close(assigner(x[i : i + 1], model=trained())[0], together[i])


def test_file_keeps_it_and_what_budgets_are_solved_from(assigner, tmp_path):
    assigner.save(tmp_path / "assigner.safetensors")
    again = TokenLengthAssigner.load(tmp_path / "assigner.safetensors").require(trained())
    x = torch.from_numpy(held_out()[0].array[:6])
    with torch.inference_mode():
        assert torch.equal(again(x, model=trained()), assigner(x, model=trained()))
    assert again.kind == assigner.kind and again.temperature == assigner.temperature
    for name, value in vars(assigner.outcomes).items():
        other = getattr(again.outcomes, name)
        same = np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other
        assert same, name


def test_held_out_logits_are_of_assigners_that_have_not_seen_the_image(assigner):
    assert assigner.outcomes.assigner.shape == (len(assigner.outcomes), 3)
    with torch.inference_mode():
        fitted = assigner(torch.from_numpy(held_out()[0].array), model=trained()).numpy()
    assert not np.allclose(fitted, assigner.outcomes.assigner)
    assert set(quality(assigner)) >= {"accuracy", "calibration_error", "mean_tokens"}


def test_training_is_deterministic():
    images, outcomes = held_out()
    first, second = (train_assigner(trained(), outcomes, images, "pixels", RECIPE).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("balance", [False, True])
def test_losses_learn(loss, balance):
    images, outcomes = held_out()
    rng = np.random.default_rng(0)
    label = np.where(images.targets == 0, 2, rng.integers(0, 2, len(images)))  # flat images: the shortest length
    outcomes = replace(outcomes, label=label)
    recipe = AssignerRecipe(loss=loss, balance=balance, epochs=20, folds=2, lr=3e-3)
    found = train_assigner(trained(), outcomes, images, "features", recipe)
    choice = found.outcomes.assigner.argmax(1)
    assert ((choice == 2) == (label == 2)).mean() > 0.8


def test_loss_by_hand():
    logits, label = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([1])
    ordinal = assigner_loss(logits, label, MENU, AssignerRecipe(loss="ordinal"))
    # P(label <= 0) = 1/3, which is not so; P(label <= 1) = 2/3, which is
    torch.testing.assert_close(ordinal, -(torch.tensor(2 / 3).log() + torch.tensor(2 / 3).log()))
    cost = assigner_loss(logits, label, MENU, AssignerRecipe(loss="cost", excess=0.5))
    torch.testing.assert_close(cost, torch.tensor((0.5 * (16 - 9) / 16 + 0 + 1) / 3))


def test_budget_of_the_default_sizes():
    from revit_kernels import create_model

    deit = create_model("deit_small_patch16_224").make_resizable(((14, 14), (10, 10), (7, 7), (4, 4)))
    full = model_macs(deit, (14, 14))
    # 12 blocks of 12 dim^2 + 2 tokens dim for each of 197 tokens, and a patch embedding, by hand
    assert full == vit_macs(384, 12, 197, 768) == 12 * 197 * (12 * 384**2 + 2 * 197 * 384) + 768 * 384 * 197
    for kind in KINDS:
        assert TokenLengthAssigner.for_model(deit, kind).macs(deit) <= SHARE * full
    assert TokenLengthAssigner.for_model(deit, "features").depth == 2


def test_wrong_use(tmp_path):
    images, outcomes = held_out()
    with pytest.raises(ValueError, match="another model"):
        train_assigner(make_model(), outcomes, images)
    with pytest.raises(ValueError, match="does not have"):
        train_assigner(trained(), outcomes, make_images(50))
    with pytest.raises(ValueError, match="at least 20"):
        train_assigner(trained(), replace(outcomes, label=np.full(200, -1)), images)
    with pytest.raises(ValueError, match="loss must be"):
        AssignerRecipe(loss="hinge")
    with pytest.raises(ValueError, match="kind must be"):
        TokenLengthAssigner(MENU, "guess", embed_dim=32)
    with pytest.raises(ValueError, match="needs the model"):
        TokenLengthAssigner.for_model(trained())(torch.from_numpy(images.array[:2]))
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        TokenLengthAssigner.load(tmp_path / "broken.safetensors")
    checkpoints.save_checkpoint(trained(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no token-length assigner"):
        TokenLengthAssigner.load(tmp_path / "model.safetensors")


def test_belongs_to_its_model(assigner):
    with pytest.raises(ValueError, match="another model"):
        assigner.require(make_model())


def test_full_disk_keeps_the_file_of_before(assigner, tmp_path, monkeypatch):
    path = tmp_path / "assigner.safetensors"
    assigner.save(path)
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        assigner.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
