"""TokenLengthAssigner: both kinds, training, calibration, files, and whose it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_revit import MENU, held_out, make_images, make_model, trained

from revit_kernels import cli
from revit_kernels.adaptive.assigner import KINDS, METADATA, SHARE, TokenLengthAssigner, model_macs, vit_macs
from revit_kernels.models import checkpoints
from revit_kernels.training.assigner import LOSSES, AssignerRecipe, assigner_loss, quality, train_assigner
from revit_kernels.training.assigner import _augmented as augmented
from revit_kernels.training.labels import join

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


def test_labels_of_folds_become_those_of_the_model_they_serve():
    images, outcomes = held_out()
    joined = join([outcomes.take(np.arange(0, 200, 2)), outcomes.take(np.arange(1, 200, 2))])
    with pytest.warns(UserWarning, match="of models of folds"):
        found = train_assigner(trained(), joined, images, "features", RECIPE)
    assert found.outcomes.fingerprint == found.fingerprint == outcomes.fingerprint
    with pytest.raises(ValueError, match="another model"):
        found.outcomes.require(make_model())


def test_augmentation_mirrors_and_shifts():
    edge = 8
    pixels = torch.arange(edge).repeat(64, edge, 1)[..., None].repeat(1, 1, 1, 3).to(torch.uint8)  # each its column
    torch.manual_seed(0)
    found = augmented(pixels)[:, 0, :, 0].long()
    shifted = [[min(max(c + s, 0), edge - 1) for c in range(edge)] for s in (-1, 0, 1)]
    assert {tuple(row) for row in found.tolist()} == {tuple(row[::turn]) for row in shifted for turn in (1, -1)}


def test_training_leaves_the_random_numbers_of_others():
    images, outcomes = held_out()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_assigner(trained(), outcomes, images, "pixels", RECIPE)
    assert torch.equal(torch.rand(3), expected)


def test_budget_of_the_default_sizes():
    from revit_kernels import create_model

    deit = create_model("deit_small_patch16_224").make_resizable(((14, 14), (10, 10), (7, 7), (4, 4)))
    full = model_macs(deit, (14, 14))
    # 12 blocks of 12 dim^2 + 2 tokens dim for each of 197 tokens, and a patch embedding, by hand
    assert full == vit_macs(384, 12, 197, 768) == 12 * 197 * (12 * 384**2 + 2 * 197 * 384) + 768 * 384 * 197
    for kind in KINDS:
        assert TokenLengthAssigner.for_model(deit, kind).macs(deit) <= SHARE * full
    assert TokenLengthAssigner.for_model(deit, "features").depth == 2


@pytest.mark.parametrize("name, products", [("vit_small_patch16_224", 2), ("vit_giant_patch14_dinov2", 3)])
def test_work_of_blocks_by_hand(name, products):
    from revit_kernels import create_model

    small = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 0}
    model, tokens = create_model(name, **small), 16 + 1
    hidden = model.blocks[0].mlp.fc2.in_features  # one product out; one in, or the two of SwiGLU
    block = tokens * (4 * 96 * 96 + products * hidden * 96) + 2 * 96 * tokens * tokens
    assert model_macs(model, (4, 4)) == 2 * block + tokens * 96 * 3 * 16 * 16


def test_loss_that_is_not_finite():
    images, outcomes = held_out()
    with pytest.raises(RuntimeError, match="smaller --lr"):
        train_assigner(trained(), outcomes, images, "features", replace(RECIPE, lr=float("inf")))


@pytest.mark.parametrize("damage", ["json", "tensor", "config", "outcomes"])
def test_files_that_lack_something(assigner, tmp_path, damage):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "assigner.safetensors"
    assigner.save(path)
    with safe_open(path, "pt") as file:
        head, tensors = file.metadata()[METADATA], {key: file.get_tensor(key) for key in file.keys()}
    if damage == "json":
        head = head[:-5]
    elif damage == "config":
        head = head.replace('"depth"', '"height"')
    else:
        tensors.pop("outcomes.correct" if damage == "outcomes" else "temperature")
    save_file(tensors, path, {METADATA: head})
    with pytest.raises(ValueError, match="is no whole assigner") as caught:
        TokenLengthAssigner.load(path)
    assert "\n" not in str(caught.value)


def test_command(tmp_path, monkeypatch, capsys):
    from revit_kernels.data import datasets

    images, outcomes = held_out()
    checkpoints.save_checkpoint(trained(), tmp_path / "revit.safetensors")
    outcomes.save(tmp_path / "labels.parquet")
    monkeypatch.setattr(datasets, "open_set", lambda *args, **kwargs: images)
    model, labels, output = (str(tmp_path / name) for name in ("revit.safetensors", "labels.parquet", "a.safetensors"))
    command = ["train-assigner", model, "--labels", labels, "--data", "held", "--dtype", "float32"]
    command += ["--epochs", "2", "--folds", "2"]
    assert cli.main([*command, "--output", output]) == 0
    told = capsys.readouterr().err
    assert "tokens on average" in told and "of a full-length pass, measured on" in told
    TokenLengthAssigner.load(output).require(trained())
    for wrong, match in (
        (str(tmp_path / "a.pt"), "must end in"),
        (str(tmp_path / "no" / "a.safetensors"), "not exist"),
    ):
        monkeypatch.setattr(datasets, "open_set", lambda *args, **kwargs: pytest.fail("work was done for nothing"))
        assert cli.main([*command, "--output", wrong]) == 2
        assert match in capsys.readouterr().err


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
