"""TokenLengthAssigner: both trunks, training and going on with it, files, and whose it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_revit import MENU, held_out, labelled, make_images, make_model, trained
from torch import nn

from revit_kernels import cli
from revit_kernels.adaptive.assigner import METADATA, SHARE, TokenLengthAssigner
from revit_kernels.adaptive.costs import Costs, model_macs
from revit_kernels.data.datasets import ArraySet
from revit_kernels.models import checkpoints
from revit_kernels.training import assigner as training
from revit_kernels.training.assigner import AssignerRecipe, Targets, quality, train_assigner, usual_size
from revit_kernels.training.labels import collect, join

RECIPE = AssignerRecipe(epochs=3, folds=2)
WAYS = {"scout": {}, "scout of convolutions": {"convolutions": 3}, "tokens": {"trunk": "tokens"}}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def assigner(request):
    images, outcomes = labelled()
    return train_assigner(trained(), outcomes, images, recipe=RECIPE, **request.param)


def test_logits_of_images_alone_and_in_company(assigner):
    x = torch.from_numpy(held_out()[0].array[:6])
    with torch.inference_mode():
        together = assigner(x, model=trained())
        assert together.shape == (6, 3 + 3) and together.dtype == torch.float32
        for i in range(6):
            torch.testing.assert_close(assigner(x[i : i + 1], model=trained())[0], together[i])
        listed = assigner(list(x), model=trained())
        torch.testing.assert_close(listed, together)


def test_file_keeps_it_and_what_budgets_are_solved_from(assigner, tmp_path):
    costs = Costs(MENU, (1.0, 0.6, 0.3), device="a machine")
    assigner.keep_costs(costs)
    assigner.save(tmp_path / "assigner.safetensors")
    again = TokenLengthAssigner.load(tmp_path / "assigner.safetensors").require(trained())
    x = torch.from_numpy(held_out()[0].array[:6])
    with torch.inference_mode():
        assert torch.equal(again(x, model=trained()), assigner(x, model=trained()))
    assert again.config == assigner.config and again.about == assigner.about
    assert again.fitted == assigner.fitted and again.costs == assigner.costs and costs in again.costs
    for name, value in vars(assigner.outcomes).items():
        other = getattr(again.outcomes, name)
        same = np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other
        assert same, name


def test_it_learns_from_the_models_images_and_is_calibrated_on_others(assigner):
    _, outcomes = labelled()
    assert assigner.outcomes.keys == outcomes.keys[240:] and assigner.outcomes.held_out is None
    assert assigner.outcomes.assigner.shape == (200, 3) and assigner.outcomes.mixed.shape == (200, 3, 4)
    assert assigner.about["learnt"] == 240 and assigner.about["held_out"] == 200
    assert set(quality(assigner.outcomes)["2x2"]) == {"assigner", "confidence", "evidence", "calibration_error"}


@pytest.mark.parametrize("wrong, source", [(0, "2 folds of held-out images"), (100, "the model's training images")])
def test_training_outcomes_that_are_too_good_are_not_learnt_from(wrong, source, monkeypatch):
    """The model's errors on its own images, at the shortest length, against those on held-out ones."""
    images, outcomes = labelled()
    correct = outcomes.correct.copy()
    correct[:240] = True
    correct[:wrong, -1] = False
    correct[240:, -1] = np.arange(200) % 2  # half of the held-out images
    seen, inputs = [], training._inputs
    monkeypatch.setattr(training, "_inputs", lambda a, m, i, p: seen.append(len(i)) or inputs(a, m, i, p))
    found = train_assigner(trained(), replace(outcomes, correct=correct), images, "scout", RECIPE)
    assert found.about["from"] == source and seen == [200 if wrong == 0 else 240]


def test_answers_of_folds_are_of_assigners_that_have_not_seen_the_image():
    images, outcomes = labelled()
    apart = outcomes.apart()[1]
    found = train_assigner(trained(), apart, images, "scout", AssignerRecipe(epochs=10, batch=32, folds=2))
    with torch.inference_mode():
        own = found(torch.from_numpy(images.array[240:]), model=trained())[:, :3].numpy()
    assert not np.allclose(own, found.outcomes.assigner)
    assert found.about["from"] == "2 folds of held-out images"


@every_way
def test_training_is_deterministic_and_goes_on_where_it_was_killed(options, tmp_path, monkeypatch):
    images, outcomes = labelled()
    recipe = replace(RECIPE, crop="pad", flip=True) if "convolutions" in options else RECIPE
    arguments = {"recipe": recipe} | options
    whole = train_assigner(trained(), outcomes, images, **arguments).state_dict()
    state = tmp_path / "state"

    class Killed(Exception):
        pass

    def kill(done):
        if state.exists() and torch.load(state)["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train_assigner(trained(), outcomes, images, **arguments, state=state, progress=kill)
    with pytest.raises(ValueError, match="of a run with other settings"):
        train_assigner(trained(), outcomes, images, **arguments | {"recipe": replace(recipe, lr=1e-3)}, state=state)
    other = replace(outcomes, correct=~outcomes.correct)
    other.correct[240:] = outcomes.correct[240:]  # images of the same number and names, of which it learns otherwise
    with pytest.raises(ValueError, match="of a run with other settings"):
        train_assigner(trained(), other, images, **arguments, state=state)
    epochs = []
    found = train_assigner(trained(), outcomes, images, **arguments, state=state, progress=epochs.append)
    assert epochs[-1] == 240 and sum(epochs) == 240 + 240  # the inputs, and the last epoch
    assert all(torch.equal(whole[k], found.state_dict()[k]) for k in whole) and not state.exists()
    for damaged in (b"half", b"\x80\x02cos\nsystem\nq\x00.", b"\x80\x02]q\x00."):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read"):
            train_assigner(trained(), outcomes, images, **arguments, state=state)


def test_loss_by_hand():
    _, outcomes = labelled()
    outcomes = outcomes.take([0, 1])
    targets, logits = Targets(outcomes), torch.randn(2, 6)
    p = torch.from_numpy(outcomes.probabilities).float()
    expected = []
    for i in range(2):
        truth = int(outcomes.targets[i])
        wanted = [0.5 * float(outcomes.correct[i, row]) + 0.5 * float(p[i, row, truth]) for row in range(3)]
        log_q = logits[i, 3:].log_softmax(-1)
        lengths = F.binary_cross_entropy_with_logits(logits[i, :3], torch.tensor(wanted))
        expected.append(lengths - 0.5 * log_q[truth] - 0.5 * (p[i, 0] * log_q).sum())
    torch.testing.assert_close(targets.loss(logits, torch.tensor([0, 1]), 0.5), torch.stack(expected).mean())
    full = Targets(replace(outcomes, about={"against": "full"}))
    assert full.truth.tolist() == outcomes.predicted[:, 0].tolist()


@every_way
def test_it_learns(options):
    images, outcomes = labelled()
    flat = images.targets == 0
    correct = np.stack([np.ones(440, bool), flat, flat], 1)  # stripes need the longest length
    recipe = AssignerRecipe(epochs=20, batch=32, folds=2)
    found = train_assigner(trained(), replace(outcomes, correct=correct), images, recipe=recipe, **options)
    assert quality(found.outcomes)["2x2"]["assigner"] > 0.9


def test_labels_of_folds_become_those_of_the_model_they_serve():
    images, outcomes = labelled()
    outcomes = outcomes.apart()[1]
    joined = join([outcomes.take(np.arange(0, 200, 2)), outcomes.take(np.arange(1, 200, 2))])
    with pytest.warns(UserWarning, match="of models of folds"):
        found = train_assigner(trained(), joined, images, "scout", RECIPE)
    assert found.outcomes.fingerprint == found.fingerprint == outcomes.fingerprint
    with pytest.raises(ValueError, match="another model"):
        found.outcomes.require(make_model())


def test_training_leaves_the_random_numbers_of_others():
    images, outcomes = labelled()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_assigner(trained(), outcomes, images, "scout", RECIPE)
    assert torch.equal(torch.rand(3), expected)


@every_way
def test_budget_of_the_default_sizes(options):
    from revit_kernels import create_model

    deit = create_model("deit_small_patch16_224").make_resizable(((14, 14), (10, 10), (7, 7), (4, 4)))
    full = model_macs(deit, (14, 14))
    # 12 blocks of 12 dim^2 + 2 tokens dim for each of 197 tokens, and a patch embedding, by hand
    assert full == 12 * 197 * (12 * 384**2 + 2 * 197 * 384) + 768 * 384 * 197
    assigner = TokenLengthAssigner.for_model(deit, **options)
    assert assigner.macs(deit) <= SHARE * full and assigner.fc1.out_features == 256
    small = TokenLengthAssigner.for_model(deit, **options, share=1e-6)  # where nothing costs so little: the smallest
    assert small.fc1.out_features == 32 and small.macs(deit) < assigner.macs(deit)
    given = TokenLengthAssigner.for_model(deit, **options, hidden=96)
    assert given.fc1.out_features == 96


def test_work_of_both_trunks_by_hand():
    model = make_model()  # 16 pixels, 2x2 patches of 4 pixels at the shortest length, 3 blocks of 32
    scout = TokenLengthAssigner(MENU, classes=3, hidden=64, width=16, grid=(4, 4), patch=(4, 4))
    dense = 64 * 64 + 64 * 6
    assert scout.macs(model) == 16 * 48 * 16 + 16 * 16 * 64 + dense and scout.reused(model) == 0
    size = {"hidden": 64, "width": 16, "grid": (5, 4), "patch": (4, 4)}
    convolved = TokenLengthAssigner(MENU, classes=3, convolutions=3, **size)  # the second leaves 3 rows of 5, and 2
    assert convolved.macs(model) == 20 * (48 + 9 * 16) * 16 + 6 * 9 * (16 + 32) * 32 + 6 * 32 * 64 + dense
    assert convolved(torch.zeros(3, 9, 9, 3, dtype=torch.uint8)).shape == (3, 6)
    tokens = TokenLengthAssigner(MENU, "tokens", classes=3, hidden=64, width=0, dim=32)
    assert tokens.reused(model) == 5 * 48 * 32  # the class token is counted as it was
    assert tokens.macs(model) == tokens.reused(model) + 4 * 32 * 64 + dense
    deeper = TokenLengthAssigner(MENU, "tokens", classes=3, hidden=64, width=8, dim=32, depth=2)
    assert deeper.reused(model) == model_macs(model, (2, 2), 2)
    assert deeper.macs(model) == deeper.reused(model) + 4 * 32 * 8 + 5 * 8 * 64 + dense


def test_batch_norms_are_folded_into_their_convolutions():
    torch.manual_seed(0)
    scout = TokenLengthAssigner(MENU, classes=3, convolutions=5, width=8, grid=(5, 4), patch=(4, 4)).normalise()
    x, before = torch.randint(0, 256, (4, 20, 16, 3), dtype=torch.uint8), set(scout.state_dict())
    for norm in (m for m in scout.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    with torch.no_grad():
        scout(x)  # in training mode: running means and variances are of these images
        expected = scout.eval()(x)
        found = scout.fold()(x)
    torch.testing.assert_close(found, expected)
    assert any("norm" in name for name in before) and not any("norm" in name for name in scout.state_dict())


@pytest.mark.parametrize("name, products", [("vit_small_patch16_224", 2), ("vit_giant_patch14_dinov2", 3)])
def test_work_of_blocks_by_hand(name, products):
    from revit_kernels import create_model

    small = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 0}
    model, tokens = create_model(name, **small), 16 + 1
    hidden = model.blocks[0].mlp.fc2.in_features  # one product out; one in, or the two of SwiGLU
    block = tokens * (4 * 96 * 96 + products * hidden * 96) + 2 * 96 * tokens * tokens
    assert model_macs(model, (4, 4)) == 2 * block + tokens * 96 * 3 * 16 * 16


def test_loss_that_is_not_finite():
    images, outcomes = labelled()
    with pytest.raises(RuntimeError, match="smaller --lr"):
        train_assigner(trained(), outcomes, images, "scout", replace(RECIPE, lr=1e30))


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
        tensors.pop("outcomes.correct" if damage == "outcomes" else "fc1.weight")
    save_file(tensors, path, {METADATA: head})
    with pytest.raises(ValueError, match="is no whole assigner") as caught:
        TokenLengthAssigner.load(path)
    assert "\n" not in str(caught.value)


def test_commands(tmp_path, monkeypatch, capsys):
    """`revit train-assigner`, then `revit costs` with what it wrote."""
    images, outcomes = labelled()
    checkpoints.save_checkpoint(trained(), tmp_path / "revit.safetensors")
    outcomes.save(tmp_path / "labels.parquet")
    monkeypatch.setattr("revit_kernels.cli.clips.open_set", lambda *args, **kwargs: images)
    model, labels, output = (str(tmp_path / name) for name in ("revit.safetensors", "labels.parquet", "a.safetensors"))
    command = ["train-assigner", model, "--labels", labels, "--data", "held", "--dtype", "float32", "--epochs", "2"]
    command += ["--convolutions", "2", "--crop", "pad", "--flip"]
    assert cli.main([*command, "--output", output]) == 0
    told = capsys.readouterr().err
    assert "whether 2x2 is right with AUC" in told and "of a full-length pass, measured on" in told
    first = TokenLengthAssigner.load(output).require(trained())
    assert len(first.costs) == 1 and not list(tmp_path.glob(".*state"))
    costs = ["costs", model, "--assigner", output, "--dtype", "float32", "--batch", "8", "--rounds", "2"]
    assert cli.main([*costs, "--dry-run"]) == 0
    assert "3x3: " in capsys.readouterr().out and TokenLengthAssigner.load(output).costs == first.costs
    assert cli.main(costs) == 0
    told = capsys.readouterr()
    assert " before" in told.out and "kept in" in told.err
    again = TokenLengthAssigner.load(output)
    assert len(again.costs) == 1 and again.costs[0].batch == 8 and again.fitted == first.fitted
    for wrong, match in (
        (str(tmp_path / "a.pt"), "must end in"),
        (str(tmp_path / "no" / "a.safetensors"), "not exist"),
    ):
        done = "revit_kernels.cli.clips.open_set"
        monkeypatch.setattr(done, lambda *args, **kwargs: pytest.fail("work was done for nothing"))
        assert cli.main([*command, "--output", wrong]) == 2
        assert match in capsys.readouterr().err


def test_wrong_use(tmp_path):
    images, outcomes = labelled()
    with pytest.raises(ValueError, match="another model"):
        train_assigner(make_model(), outcomes, images)
    with pytest.raises(ValueError, match="does not have"):
        train_assigner(trained(), outcomes, make_images(50, name="others"))
    with pytest.raises(ValueError, match="at least 20 held-out images, got 0"):
        train_assigner(trained(), replace(outcomes, held_out=np.zeros(440, bool)), images)
    with pytest.raises(ValueError, match="revit label --probabilities"):
        train_assigner(trained(), replace(outcomes, probabilities=None), images)
    with pytest.raises(ValueError, match="crop and flip need the trunk 'scout'"):
        train_assigner(trained(), outcomes, images, "tokens", replace(RECIPE, flip=True))
    for wrong, match in (
        ({"trunk": "tokens", "convolutions": 1}, "convolutions need the trunk 'scout'"),
        ({"convolutions": -1}, "convolutions must be 0 to 8, got -1"),
        ({"depth": 1}, "depth needs the trunk 'tokens', got 1 with the trunk 'scout'"),
        ({"trunk": "tokens", "depth": 4}, "depth must be 0 to 3, got 4"),
        ({"hidden": 100_000}, "hidden must be 1 to 16384, got 100000"),
    ):
        with pytest.raises(ValueError, match=match):
            TokenLengthAssigner.for_model(trained(), **wrong)
    with pytest.raises(ValueError, match="lr must be above 0 and finite, got nan"):
        replace(RECIPE, lr=float("nan"))
    with pytest.raises(ValueError, match="other classes for images of the same names"):
        train_assigner(trained(), replace(outcomes, targets=(outcomes.targets + 1) % 3), images)
    with pytest.raises(ValueError, match="200 images cannot be divided into 201 folds"):
        train_assigner(trained(), outcomes.apart()[1], images, recipe=replace(RECIPE, folds=201))
    with pytest.warns(UserWarning, match="the labels are of tiny; held has images of the same names"):
        train_assigner(trained(), replace(outcomes, about={"images": "tiny"}), images, recipe=replace(RECIPE, epochs=1))
    with pytest.raises(ValueError, match="crop must be one of"):
        train_assigner(trained(), outcomes, images, recipe=replace(RECIPE, crop="all"))
    with pytest.raises(ValueError, match="trunk must be"):
        TokenLengthAssigner(MENU, "guess", classes=3)
    with pytest.raises(ValueError, match="needs the model"):
        TokenLengthAssigner.for_model(trained(), "tokens")(torch.from_numpy(images.array[:2]))
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        TokenLengthAssigner.load(tmp_path / "broken.safetensors")
    checkpoints.save_checkpoint(trained(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no token-length assigner"):
        TokenLengthAssigner.load(tmp_path / "model.safetensors")


def test_labels_of_what_the_full_length_says_need_no_classes(tmp_path, monkeypatch):
    """Images of other classes, labelled against the longest length, train an assigner."""
    images, _ = labelled()
    others = ArraySet("others", ("x", "y"), images.targets % 2, images.array)
    outcomes = replace(collect(trained(), others, against="full", probabilities=True), held_out=np.arange(440) >= 240)
    outcomes.save(tmp_path / "labels.parquet")
    checkpoints.save_checkpoint(trained(), tmp_path / "revit.safetensors")
    monkeypatch.setattr("revit_kernels.cli.clips.open_set", lambda *args, **kwargs: others)
    model, labels, output = (str(tmp_path / name) for name in ("revit.safetensors", "labels.parquet", "a.safetensors"))
    command = ["train-assigner", model, "--labels", labels, "--data", "others", "--dtype", "float32", "--epochs", "1"]
    assert cli.main([*command, "--output", output]) == 0
    assert TokenLengthAssigner.load(output).outcomes.about["against"] == "full"


def test_one_small_image_does_not_decide_what_it_sees():
    images = make_images(9)
    pixels = images.pixels
    images.pixels = lambda index: pixels(index)[:3, :5] if index == 0 else pixels(index)
    assert usual_size(images) == (16, 16)


def test_answers_beyond_half_precision_are_refused(assigner):
    huge = replace(assigner.outcomes, mixed=np.full_like(assigner.outcomes.mixed, 1e5))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="not finite in float16: give a smaller lr"):
        assigner.calibrate(huge)


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
