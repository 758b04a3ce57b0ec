"""Evidence, costs and AdaptiveViT: online against offline, and no host in the loop."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_revit import MENU, held_out, labelled, make_model, trained
from torch.utils._python_dispatch import TorchDispatchMode

from revit_kernels.adaptive import evidence
from revit_kernels.adaptive.calibration import auc, calibration_error
from revit_kernels.adaptive.costs import COUNTED, Costs, counted, device_name, measure_costs, model_macs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes, label_of
from revit_kernels.adaptive.policies import ALONE, SERVED, Assign, AssignedCascade, Fixed, Oracle
from revit_kernels.models.registry import SHIPPED, SHIPPED_ASSIGNER
from revit_kernels.training.assigner import AssignerRecipe, train_assigner
from revit_kernels.training.labels import collect

COSTS = Costs(MENU, (1.0, 0.6, 0.3), assigner=0.02, repack=0.01, launch=0.005)
PRICED = (1.0, 0.6, 0.3)
WEIGHTS = ((0.9, 0.0, 0.0, 0.0), (0.4, 1.0, 0.0, 0.0), (-2.0, 4.0, 0.0, 0.0))  # a cascade's, of confidence alone


def synthetic(images=300, seed=0):
    """Outcomes in which longer lengths are right more often, and confidence and an assigner tell something."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(images)
    chance = np.stack([1 - 0.2 * difficulty, 1 - 0.5 * difficulty, 1 - 0.9 * difficulty], 1)
    correct = rng.random((images, 3)) < chance
    confidence = (0.6 * chance + 0.4 * rng.random((images, 3))).astype(np.float32)
    targets = rng.integers(0, 5, images)
    predicted = np.where(correct, targets[:, None], 5).astype(np.int32)
    logits = (np.log(chance / (1.01 - chance)) + rng.normal(size=(images, 3))).astype(np.float32)
    mixed = np.repeat(confidence[..., None], 4, 2) + 0.1 * rng.random((images, 3, 4)).astype(np.float32)
    keys, label = tuple(f"{i}" for i in range(images)), label_of(correct)
    says = (confidence, confidence, confidence)
    own = np.column_stack([confidence, rng.random(images) < chance[:, 2]]).astype(np.float32)
    return Outcomes(MENU, keys, targets, correct, predicted, *says, label, "", assigner=logits, mixed=mixed, alone=own)


@pytest.fixture(scope="module", params=("tokens 0", "tokens 1", "scout"))
def assigner(request):
    images, outcomes = labelled()
    trunk, *depth = request.param.split()
    return train_assigner(trained(), outcomes, images, trunk, AssignerRecipe(3, folds=2), depth=int(*depth or (0,)))


# ---------------------------------------------------------------------- evidence


def test_evidence_by_hand():
    logits, posterior = torch.randn(5, 4), torch.randn(5, 4)
    p, q = logits.softmax(-1), posterior.softmax(-1)
    top = p.sort(-1).values
    expected = torch.stack([top[:, 3], top[:, 3] - top[:, 2], -(p * p.log()).sum(-1)], 1)
    torch.testing.assert_close(evidence.summary(logits), expected)
    answer = p.argmax(-1)
    for column, share in enumerate(evidence.SHARES):
        both = p ** (1 - share) * q**share
        expected = (both / both.sum(-1, keepdim=True))[torch.arange(5), answer]
        torch.testing.assert_close(evidence.mixed(logits, posterior)[:, column], expected)
    expected = torch.stack([q[torch.arange(5), answer].log(), -(q * q.log()).sum(-1)], 1)
    torch.testing.assert_close(evidence.mixed(logits, posterior)[:, 2:], expected)


def test_regressions_find_the_probabilities():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(20000, 2)) * (1.0, 5.0) + (0.0, 3.0)
    true = ((0.5, 1.0, -0.3), (-1.0, 0.0, 0.2))
    p = evidence.right(torch.from_numpy(columns), true).numpy()
    found = evidence.fit(columns, rng.random(p.shape) < p)
    design = np.column_stack([np.ones(len(columns)), columns])
    for weights, wanted, probability in zip(np.array(found), true, p.astype(float).T):
        information = design.T @ (design * (probability * (1 - probability))[:, None])
        assert (np.abs(weights - wanted) < 5 * np.sqrt(np.diag(np.linalg.inv(information)))).all()
    one_sided = evidence.fit(columns[:50], np.ones((50, 1), bool))  # where nothing is wrong, no weight is infinite
    assert np.isfinite(one_sided).all() and evidence.right(torch.from_numpy(columns[:50]), one_sided).min() > 0.9


def test_an_image_is_judged_alike_in_any_batch():
    columns = torch.rand(37, 3)
    together = evidence.right(columns, WEIGHTS)
    assert all(torch.equal(evidence.right(columns[i : i + 1], WEIGHTS)[0], together[i]) for i in range(37))


def test_areas_under_curves():
    score, right = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1], bool)
    assert auc(score, right) == pytest.approx(3.5 / 4) and np.isnan(auc(score, np.ones(4, bool)))
    assert calibration_error(np.array([0.9, 0.9]), np.array([1, 0], bool)) == pytest.approx(0.4)


# ---------------------------------------------------------------------- online is offline


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("reuse", [True, False])
def test_online_decides_as_offline(name, reuse, assigner):
    """The same images: every decision, every token counted and every answer."""
    images, _ = held_out()
    model = trained()
    known = collect(model, images, assigner=assigner)
    budget = "1.4x" if name != "scout+cascade" else "4 tokens"  # for the scout to answer some images, and not all
    of = {"assigner": assigner, "outcomes": known, "budget": budget, "costs": COSTS, "reuse": reuse}
    if name == "scout+cascade" and assigner.trunk == "tokens":
        with pytest.raises(ValueError, match="trunk 'scout'"):
            AdaptiveViT(model, name, **of)
        return
    adaptive = AdaptiveViT(model, name, **of)
    found = adaptive.predict(torch.from_numpy(images.array), channels_last=True)
    offline = adaptive.policy.simulate(known, COSTS)
    assert np.array_equal(found.choice.numpy(), offline.row)
    assert np.array_equal(found.tokens.numpy(), offline.tokens)
    predicted = known.predicted[np.arange(200), offline.row]
    if name == "scout+cascade":
        alone = offline.row == ALONE
        assert 0 < alone.sum() < 200 and found.fits.all()
        posterior = assigner(torch.from_numpy(images.array), model=model)[:, len(MENU) :]
        predicted = np.where(alone, posterior.argmax(-1).numpy(), predicted)
    assert np.array_equal(found.logits.argmax(-1).numpy(), predicted)
    assert torch.equal(adaptive(torch.from_numpy(images.array), channels_last=True), found.logits) or name == "random"


POLICIES = {"one pass": Assign(0.3, PRICED), "two": AssignedCascade(2, ((0.4,) + (0.1,) * 10,) * 3, 0.0, PRICED)}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_reused_tokens_change_no_bit(assigner, policy):
    x = torch.from_numpy(held_out()[0].array)
    first, second = (
        AdaptiveViT(trained(), policy, assigner=assigner, reuse=reuse).predict(x, channels_last=True)
        for reuse in (True, False)
    )
    assert torch.equal(first.choice, second.choice) and torch.equal(first.logits, second.logits)


def test_lists_of_images_of_any_sizes(assigner):
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in ((16, 16), (31, 20), (9, 40), (64, 64))]
    adaptive = AdaptiveViT(trained(), POLICIES["two"], assigner=assigner)
    together = adaptive.predict(images, channels_last=True)
    for i, image in enumerate(images):
        alone = adaptive.predict([image], channels_last=True)
        assert torch.equal(alone.logits[0], together.logits[i]) and alone.tokens[0] == together.tokens[i]
    assert len(adaptive.predict([], channels_last=True).logits) == 0


class NoHost(TorchDispatchMode):
    """Refuses every op by which the host would learn a value of a tensor."""

    REFUSED = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        assert not name.startswith(self.REFUSED), f"{name} waits for the device"
        return func(*args, **kwargs or {})


def test_assigner_path_never_asks_the_device(assigner, monkeypatch):
    x = torch.from_numpy(held_out()[0].array[:32])
    adaptive = AdaptiveViT(trained(), Assign(0.3, PRICED), assigner=assigner)
    expected = adaptive.predict(x, channels_last=True)

    def refused(*args, **kwargs):
        raise AssertionError("the host asks for values of a tensor")

    with NoHost(), monkeypatch.context() as patched:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, refused)
        found = adaptive.predict(x, channels_last=True, device_choice=True)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.tokens, expected.tokens)
    assert found.fits.all()


def test_images_beyond_the_capacity_are_told():
    x = torch.from_numpy(held_out()[0].array[:8])
    adaptive = AdaptiveViT(trained(), Fixed(0), capacity=3 * 17)
    found = adaptive.predict(x, channels_last=True, device_choice=True)
    assert found.fits.tolist() == [True] * 3 + [False] * 5 and not found.logits[3:].any() and not found.tokens[3:].any()


def test_own_function_and_oracle():
    images, outcomes = held_out()
    x, labels = torch.from_numpy(images.array), torch.from_numpy(outcomes.label)
    oracle = AdaptiveViT(trained(), "oracle")
    found = oracle.predict(x, channels_last=True, labels=labels)
    right = found.logits.argmax(-1).numpy() == images.targets
    assert np.array_equal(right, outcomes.correct.any(1)) and isinstance(oracle.policy, Oracle)
    own = AdaptiveViT(trained(), lambda images: labels).predict(x, channels_last=True)
    assert torch.equal(own.logits, found.logits)
    with pytest.raises(ValueError, match="true labels"):
        oracle.predict(x, channels_last=True)
    with pytest.raises(ValueError, match="menu rows"):
        AdaptiveViT(trained(), lambda images: torch.zeros(3)).predict(x, channels_last=True)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("name", SERVED)
def test_quantized_engines_serve_every_policy(quantize, name, assigner):
    """An assigner knows its model by the parameters as trained, whatever the engine makes of them."""
    try:
        engine = trained().engine(quantize=quantize)
    except NotImplementedError as why:
        pytest.skip(str(why))
    if name == "scout+cascade" and assigner.trunk == "tokens":
        pytest.skip("a scout's policy")
    adaptive = AdaptiveViT(engine, name, assigner=assigner, budget="1.4x", costs=COSTS)
    x = torch.from_numpy(held_out()[0].array)
    found = adaptive.predict(x, channels_last=True)
    plain = AdaptiveViT(trained(), adaptive.policy, assigner=assigner).predict(x, channels_last=True)
    assert (found.logits.argmax(-1) == plain.logits.argmax(-1)).float().mean() > 0.9


# ---------------------------------------------------------------------- costs and wrong use


def test_costs_are_measured_and_kept(assigner):
    costs = measure_costs(trained(), assigner, batch=64, rounds=3)
    assert costs.menu == MENU and min(costs.per_length) > 0 and costs.assigner > 0 and costs.batch == 64
    assert costs.device == device_name("cpu") and Costs.from_json(costs.to_json()) == costs
    with pytest.raises(ValueError, match="no JSON of costs"):
        Costs.from_json("{}")
    slower = replace(costs, per_length=tuple(2 * c for c in costs.per_length))
    assert slower.changes(costs)[1] == ("3x3", *[costs.per_length[1] / costs.per_length[0]] * 2)


def test_costs_are_of_the_assigner_or_counted(assigner):
    """Never measured at the start: a budget then would be met otherwise every time."""
    before, assigner.costs = assigner.costs, []
    try:
        model = trained()
        found = AdaptiveViT(model, "assigner", assigner=assigner, budget="1.5x").costs
        full = model_macs(model, MENU[0])
        assert found.device == COUNTED and found == counted(model, assigner)
        assert found.per_length == tuple(model_macs(model, grid) / full for grid in MENU)
        assert found.assigner == assigner.macs(model) / full
        kept = replace(COSTS, device=device_name("cpu"))
        assert assigner.keep_costs(kept) is None and assigner.keep_costs(replace(kept, repack=0.5)) == kept
        assert AdaptiveViT(model, "assigner", assigner=assigner, budget="1.5x").costs.repack == 0.5
        assert AdaptiveViT(model.engine(quantize="fp8"), "assigner", assigner=assigner).costs.device == COUNTED
    finally:
        assigner.costs = before


def test_wrong_use(assigner):
    model, (_, outcomes) = trained(), held_out()
    cases = [
        (dict(policy="magic"), "policy must be one of"),
        (dict(policy="assigner", outcomes=outcomes), "needs an assigner"),
        (dict(policy="cascade"), "needs held-out outcomes"),
        (dict(policy=Assign()), "needs an assigner"),
        (dict(policy=3), "a Policy or a function"),
        (dict(policy="cascade", outcomes=outcomes, costs=replace(COSTS, device="another")), "measured on another"),
        (dict(policy=Oracle(2)), "a menu of 2 lengths"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            AdaptiveViT(model, **options)
    with pytest.warns(UserWarning, match="cannot meet the budget 50x"):
        AdaptiveViT(model, "cascade", outcomes=outcomes, costs=COSTS, budget="50x")
    other = make_model()
    with pytest.raises(ValueError, match="another model"):
        AdaptiveViT(other, "cascade", outcomes=outcomes, costs=COSTS)
    with pytest.raises(ValueError, match="another model"):
        AdaptiveViT(other, "assigner", assigner=assigner, costs=COSTS)
    other.menu = None
    with pytest.raises(ValueError, match="make it resizable first"):
        AdaptiveViT(other, Fixed(0))


def test_the_same_files_give_the_same_answers(assigner, tmp_path):
    from revit_kernels.adaptive.assigner import TokenLengthAssigner

    assigner.save(tmp_path / "assigner.safetensors")
    x, found = torch.from_numpy(held_out()[0].array), []
    for _ in range(3):
        again = TokenLengthAssigner.load(tmp_path / "assigner.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adaptive = AdaptiveViT(trained(), "assigner+cascade", assigner=again, budget="1.5x")
        found.append((adaptive.policy, adaptive.predict(x, channels_last=True).logits))
    assert all(policy == found[0][0] and torch.equal(logits, found[0][1]) for policy, logits in found)


def test_images_of_any_kind():
    """PIL images and arrays, as the model takes them."""
    adaptive = AdaptiveViT.from_files(SHIPPED, SHIPPED_ASSIGNER, policy="assigner+cascade", dtype="float32")
    arrays = [*np.random.default_rng(0).integers(0, 256, (8, 28, 28, 3), np.uint8)]
    expected = adaptive.predict([torch.from_numpy(array) for array in arrays], channels_last=True)
    for same in ([Image.fromarray(array) for array in arrays], arrays):
        answers = adaptive.predict(same, channels_last=True)
        assert torch.equal(answers.logits, expected.logits) and torch.equal(answers.tokens, expected.tokens)
        features, row, tokens = adaptive.features(same, channels_last=True)
        assert torch.equal(row, expected.choice) and features.shape == (8, 96) and (tokens > expected.tokens).all()
        with torch.no_grad():
            assert torch.equal(adaptive.model.head(features).argmax(-1), expected.logits.argmax(-1))
