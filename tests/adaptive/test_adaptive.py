"""Policies, budgets and AdaptiveViT: solvers against brute force, online against offline, and no host in the loop."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_revit import MENU, held_out, labelled, make_model, trained
from torch.utils._python_dispatch import TorchDispatchMode

from revit_kernels.adaptive import evidence
from revit_kernels.adaptive.budgets import Budget, _at_prices, _Problem, fitted, solve
from revit_kernels.adaptive.calibration import auc, calibration_error
from revit_kernels.adaptive.costs import COUNTED, Costs, counted, device_name, measure_costs, model_macs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes, label_of
from revit_kernels.adaptive.policies import (
    ALONE,
    Assign,
    AssignedCascade,
    Cascade,
    Fixed,
    Oracle,
    Policy,
    Random,
    ScoutCascade,
    Seen,
)
from revit_kernels.models.registry import SHIPPED, SHIPPED_ASSIGNER
from revit_kernels.training.assigner import AssignerRecipe, train_assigner
from revit_kernels.training.labels import collect

COSTS = Costs(MENU, (1.0, 0.6, 0.3), assigner=0.02, repack=0.01, launch=0.005)
PRICED = (1.0, 0.6, 0.3)
SOLVED = ("fixed", "random", "assigner", "cascade", "assigner+cascade", "scout+cascade")
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


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2.0x", Budget(speed=2.0)),
        ("80 tokens", Budget(tokens=80.0)),
        ("95%", Budget(accuracy=0.95)),
        ("full", Budget(loss=0.0)),
        ("full-0.3", Budget(loss=0.3 / 100)),
    ],
)
def test_budgets_as_written(text, expected):
    assert Budget.parse(text) == expected and Budget.parse(expected) == expected


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("budget", ["1.2x", "1.6x", "2.2x", "12 tokens", "7 tokens", "full-1", "full-5", "70%"])
def test_solved_policies_keep_their_budget(name, budget):
    outcomes = synthetic()
    policy = solve(name, outcomes, COSTS, budget)
    problem = _Problem(outcomes, COSTS, Budget.parse(budget), 1)
    accuracy, cost = problem.measure(policy)
    if policy.name == "random":  # as expected, not as drawn
        assert problem.wanted is not None or cost <= problem.limit * 1.02
    else:
        assert problem.meets((accuracy, cost))
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("name", ["assigner", "cascade", "assigner+cascade"])
def test_a_loss_counts_one_standard_error(name):
    """Of many prices one loses nothing by chance: what it gains must be more than that."""
    outcomes = synthetic()
    found = solve(name, outcomes, COSTS, "full-10").simulate(outcomes, COSTS)
    lost = outcomes.correct[:, 0].astype(float) - found.right
    assert found.seconds.mean() < 1 and 0 < lost.std() / np.sqrt(len(lost)) <= 0.1 - lost.mean()


@pytest.mark.parametrize("name", ["assigner", "cascade", "assigner+cascade", "scout+cascade"])
@pytest.mark.parametrize("budget", ["1.3x", "1.8x", "2.4x"])
def test_prices_are_as_good_as_brute_force(name, budget):
    outcomes = synthetic(100)
    problem = _Problem(outcomes, COSTS, Budget.parse(budget), 1)
    best = max(problem.measure(Fixed(row))[0] for row in range(3) if problem.measure(Fixed(row))[1] <= problem.limit)
    for known in fitted(outcomes).values():
        if known.name == name:
            repack = COSTS.repack if known.passes > 1 else 0.0
            known = replace(known, costs=tuple(c + repack for c in COSTS.per_length))
            measured = [problem.measure(replace(known, price=float(p))) for p in np.linspace(0, 2, 2001)]
            best = max(best, *(accuracy for accuracy, cost in measured if cost <= 0.98 * problem.limit), best)
    assert problem.measure(solve(name, outcomes, COSTS, budget))[0] >= best - 1 / 100  # of one image in a hundred


def test_a_scout_answers_where_no_length_is_worth_more():
    """By the assigner lengths are right with 0.88, 0.73 and 0.5; after a first pass at 2x2 they cost 1.3, 0.9, 0.3."""
    for own, price, row in ((0.6, 0.0, 2), (0.7, 0.2, ALONE), (0.6, 0.2, 2), (0.9, 0.0, ALONE)):
        policy = ScoutCascade(2, WEIGHTS, price, PRICED, (np.log(own / (1 - own)), *[0.0] * 6))
        worth = np.array([0.88, 0.73, 0.5]) - price * np.array([1.3, 0.9, 0.3])
        assert (own >= worth.max()) == (row == ALONE)
        seen = Seen(range(1), torch.device("cpu"), torch.tensor([[2.0, 1.0, 0.0, 5.0, 3.0]]))
        assert policy.start(seen).tolist() == [row]


def test_what_a_scout_answers_costs_no_pass():
    outcomes = synthetic()
    policy = replace(fitted(outcomes)["scout+cascade 2"], price=0.4, costs=PRICED)
    found = policy.simulate(outcomes, COSTS)
    alone = found.row == ALONE
    assert 0 < alone.mean() < 1 and not found.tokens[alone].any() and found.tokens[~alone].all()
    assert np.array_equal(found.right[alone], outcomes.right_alone[alone])
    first, second = policy.rows_run(outcomes)
    begun, going = (first != ALONE).mean(), (second >= 0).mean()
    passes = COSTS.per_length[2] * begun + sum(COSTS.per_length[row] for row in second[second >= 0]) / len(outcomes)
    more = COSTS.repack * (begun + going) + COSTS.launch * ((1 - begun) + (1 - going))
    assert found.seconds.mean() == pytest.approx(COSTS.assigner + passes + more)


@pytest.mark.parametrize("budget", ["2x", "9 tokens", "full-1"])
def test_many_prices_are_measured_as_each_is(budget):
    outcomes, costs = synthetic(), replace(COSTS, reused=0.01)
    problem, prices = _Problem(outcomes, costs, Budget.parse(budget), 1), np.linspace(0, 1.5, 13)
    for policy in fitted(outcomes).values():
        policy = replace(policy, costs=PRICED)
        right = policy.probabilities(outcomes).double().numpy()
        found = _at_prices(problem, policy, right, np.array(policy.weighed()), prices)
        for price, measured in zip(prices, found):
            assert measured == pytest.approx(problem.measure(replace(policy, price=float(price))))


def test_a_second_pass_of_few_images_takes_as_long_to_launch():
    outcomes = synthetic()
    cascade = Cascade(2, WEIGHTS, 0.2, PRICED)
    first, second = cascade.rows_run(outcomes)
    share = (second >= 0).mean()
    assert (first == 2).all() and 0 < share < 1
    free = cascade.simulate(outcomes, replace(COSTS, launch=0.0)).seconds.mean()
    expected = free + COSTS.launch * (1 - share)
    assert cascade.simulate(outcomes, COSTS).seconds.mean() == pytest.approx(expected)
    nobody = Cascade(2, WEIGHTS, 100.0, PRICED)  # no second pass: nothing to launch
    assert nobody.simulate(outcomes, COSTS).seconds.mean() == pytest.approx(COSTS.per_length[2])


def test_reused_tokens_are_not_paid_twice():
    outcomes, costs = synthetic(), replace(COSTS, reused=0.015)
    policy = Assign(0.4, PRICED)
    shortest = (policy.rows_run(outcomes)[0] == 2).mean()
    before, after = (policy.simulate(outcomes, c).seconds.mean() for c in (COSTS, costs))
    assert before - after == pytest.approx(0.015 * shortest) and shortest > 0


def test_what_tells_nothing_comes_out_as_one_length():
    """An assigner and a confidence of noise: no policy beats a length alone, and none is paid for."""
    rng = np.random.default_rng(0)
    outcomes = synthetic()
    correct = np.repeat(rng.random((300, 1)) < 0.8, 3, 1)
    noise = rng.random((300, 3)).astype(np.float32)
    outcomes = replace(outcomes, correct=correct, confidence=noise, margin=noise, entropy=noise, assigner=noise)
    for name in ("assigner", "cascade"):
        assert solve(name, outcomes, COSTS, "1.0x") == Fixed(2)


def test_assigner_minds_its_price():
    outcomes = synthetic()
    tokens = [Assign(price, PRICED).simulate(outcomes, COSTS).tokens.mean() for price in (0, 0.2, 0.5, 1, 5)]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] == 5


def test_cascade_by_hand():
    """Confidence 0.2: staying is right with 0.23, 3x3 with 0.65 and 4x4 with 0.71, before their prices."""
    for price, row in ((0.0, 0), (0.2, 1), (1.0, -1)):
        columns = torch.tensor([[0.2, 0.0, 0.0]])
        cascade = Cascade(2, WEIGHTS, price, (1.0, 0.6, 0.3))
        p = [1 / (1 + np.exp(-(w[0] + 0.2 * w[1]))) for w in WEIGHTS]
        worth = [p[0] - price, p[1] - 0.6 * price, p[2]]
        assert np.argmax(worth) == (row if row >= 0 else 2) and cascade.next(columns).tolist() == [row]
    assert Cascade(1, WEIGHTS, 0.0, PRICED).next(torch.tensor([[1.0, 0.0, 0.0]])).tolist() == [-1]  # 3x3 is as good
    start = cascade.start(Seen(range(3), torch.device("cpu")))
    assert start.tolist() == [2, 2, 2] and start.dtype == torch.int32


def test_random_keeps_its_mix():
    rows = Random((0.25, 0.0, 0.75), seed=3).draw(1000)
    assert np.bincount(rows).tolist() == [250, 0, 750]
    assert not np.array_equal(rows, Random((0.25, 0.0, 0.75), seed=4).draw(1000))
    singly = np.concatenate([Random((0.25, 0.0, 0.75)).draw(1, turn) for turn in range(2000)])
    assert set(singly) == {0, 2} and abs((singly == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)


def test_what_cannot_be_met_gives_the_nearest_and_a_warning():
    outcomes = synthetic()
    with pytest.warns(UserWarning, match=r"budget 5x: 3\.33x is the most it reaches, and that is taken"):
        assert solve("cascade", outcomes, COSTS, "5x") == Fixed(2)
    with pytest.warns(UserWarning, match="% is the most it reaches"):
        assert solve("fixed", outcomes, COSTS, "99.9%") == Fixed(0)
    with pytest.warns(UserWarning, match="tokens are the fewest"):
        assert solve("assigner", outcomes, COSTS, "2 tokens") == Fixed(2)
    with pytest.raises(ValueError, match="policy must be one of"):
        solve("magic", outcomes, COSTS)
    with pytest.raises(ValueError, match="needs an assigner"):
        solve("assigner", replace(outcomes, assigner=None), COSTS)
    with pytest.raises(ValueError, match="the costs are of the menu"):
        solve("cascade", outcomes, Costs(MENU[:2], (1.0, 0.5)))


# ---------------------------------------------------------------------- online is offline


@pytest.mark.parametrize("name", SOLVED)
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
@pytest.mark.parametrize("name", SOLVED)
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
