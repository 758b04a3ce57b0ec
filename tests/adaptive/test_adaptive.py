"""Policies, budgets and AdaptiveViT: solvers against brute force, online against offline, and no host in the loop."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_revit import MENU, held_out, make_model, trained
from torch.utils._python_dispatch import TorchDispatchMode

from revit_kernels.adaptive.budgets import Budget, _Passes, _Problem, solve
from revit_kernels.adaptive.calibration import Calibration, calibration_error, fit_temperature, pool_adjacent_violators
from revit_kernels.adaptive.costs import Costs, device_name, measure_costs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes, label_of
from revit_kernels.adaptive.policies import Assign, AssignedCascade, Cascade, Fixed, Oracle, Policy, Random
from revit_kernels.training.assigner import AssignerRecipe, train_assigner

COSTS = Costs(MENU, (1.0, 0.6, 0.3), assigner=0.02, repack=0.01, launch=0.005)
SOLVED = ("fixed", "random", "assigner", "cascade", "assigner+cascade")


def synthetic(images=300, seed=0):
    """Outcomes in which longer lengths are right more often, and confidence tells something."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(images)
    chance = np.stack([1 - 0.2 * difficulty, 1 - 0.5 * difficulty, 1 - 0.9 * difficulty], 1)
    correct = rng.random((images, 3)) < chance
    confidence = (0.6 * chance + 0.4 * rng.random((images, 3))).astype(np.float32)
    targets = rng.integers(0, 5, images)
    predicted = np.where(correct, targets[:, None], 5).astype(np.int32)
    logits = (np.eye(3)[label_of(correct)] * 1.5 + rng.normal(size=(images, 3))).astype(np.float32)
    keys = tuple(f"{i}" for i in range(images))
    return Outcomes(
        MENU,
        keys,
        targets,
        correct,
        predicted,
        confidence,
        confidence,
        confidence,
        label_of(correct),
        "",
        assigner=logits,
    )


@pytest.fixture(scope="module", params=("features", "pixels"))
def assigner(request):
    images, outcomes = held_out()
    return train_assigner(trained(), outcomes, images, request.param, AssignerRecipe(epochs=3, folds=2))


# ---------------------------------------------------------------------- calibration


def test_isotonic_regression_is_the_best_monotone_fit():
    rng = np.random.default_rng(0)
    x, y = rng.random(8), rng.random(8)
    _, values, points = pool_adjacent_violators(x, y)
    fit = np.repeat(values, points.astype(int))
    error = ((fit - y[np.argsort(x)]) ** 2).sum()
    assert (np.diff(values) >= 0).all()
    for _ in range(2000):
        other = np.sort(fit + rng.normal(size=8) * 0.05)
        assert ((other - y[np.argsort(x)]) ** 2).sum() >= error - 1e-12


def test_calibration_tells_probabilities():
    rng = np.random.default_rng(0)
    confidence = rng.random(4000)
    correct = rng.random(4000) < confidence**2
    fitted = Calibration.fit(confidence[:2000], correct[:2000])
    told = fitted(torch.from_numpy(confidence[2000:])).numpy()
    assert calibration_error(told, correct[2000:]) < calibration_error(confidence[2000:], correct[2000:]) / 2


def test_temperature_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3))
    p = np.exp(logits / 2.0)
    label = np.array([rng.choice(3, p=row / row.sum()) for row in p])
    assert fit_temperature(logits, label) == pytest.approx(2.0, rel=0.1)
    assert fit_temperature(logits, np.full(4000, -1)) == 1.0


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


@pytest.mark.parametrize("text", ["", "fast", "2", "x", "full+1"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="a budget is written"):
        Budget.parse(text)


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("budget", ["1.2x", "1.6x", "2.2x", "12 tokens", "7 tokens", "full-1", "full-5", "70%"])
def test_solved_policies_keep_their_budget(name, budget):
    outcomes = synthetic()
    policy = solve(name, outcomes, COSTS, budget)
    problem = _Problem(outcomes, COSTS, Budget.parse(budget), 1)
    accuracy, cost = problem.measure(policy)
    if name == "random":  # by lot: as expected, not as drawn
        assert problem.wanted is not None or cost <= problem.limit * 1.02
    else:
        assert problem.meets((accuracy, cost))
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("budget", ["1.3x", "1.8x", "2.4x"])
def test_two_stage_cascades_equal_brute_force(budget):
    outcomes = synthetic(60)
    problem = _Problem(outcomes, COSTS, Budget.parse(budget), 1)
    best = 0.0
    for count in (1, 2):
        for stages in itertools.combinations((2, 1, 0), count):
            thresholds = [()] if count == 1 else [(t,) for t in [0.0, *outcomes.confidence[:, stages[0]], 2.0]]
            for t in thresholds:
                accuracy, cost = problem.measure(Cascade(stages, tuple(map(float, t))))
                best = max(best, accuracy) if cost <= problem.limit else best
    found = problem.measure(solve("cascade", outcomes, COSTS, budget))
    assert found[0] >= best  # three stages may win further


@pytest.mark.parametrize("by_tokens", [False, True])
def test_quick_measure_equals_simulation(by_tokens):
    outcomes, rng = synthetic(), np.random.default_rng(1)
    problem = _Problem(outcomes, COSTS, Budget(tokens=10.0) if by_tokens else Budget(speed=2.0), 1)
    for stages in [(2,), (2, 0), (1, 0), (2, 1, 0)]:
        thresholds = tuple(rng.uniform(0.3, 0.9, len(stages) - 1))
        quick = _Passes(problem).measure(stages, thresholds)
        assert quick == pytest.approx(problem.measure(Cascade(stages, thresholds)))
        if stages[0] == 2 and len(stages) > 1:
            policy = AssignedCascade(Assign(1.0, 0.7, (1.0, 0.6, 0.3)), Cascade(stages, thresholds))
            start = policy.rows_run(outcomes)[0]
            assert _Passes(problem, start).measure(stages, thresholds) == pytest.approx(problem.measure(policy))


def test_a_later_pass_of_few_images_takes_as_long_to_launch():
    outcomes = synthetic()
    cascade = Cascade((2, 1, 0), (0.6, 0.5))
    shares = [(rows >= 0).mean() for rows in cascade.rows_run(outcomes)]
    assert 0 < shares[2] < shares[1] < 1
    free = cascade.simulate(outcomes, replace(COSTS, launch=0.0)).seconds.mean()
    expected = free + COSTS.launch * ((1 - shares[1]) + (1 - shares[2]))
    assert cascade.simulate(outcomes, COSTS).seconds.mean() == pytest.approx(expected)
    nobody = Cascade((2, 1), (0.0,))  # no second pass: nothing to launch
    assert nobody.simulate(outcomes, COSTS).seconds.mean() == pytest.approx(COSTS.per_length[2])


def test_more_stages_only_where_they_are_worth_it():
    """Confidence that tells nothing: a threshold that fits by chance must not win."""
    rng = np.random.default_rng(0)
    outcomes = synthetic()
    correct = np.repeat(rng.random((300, 1)) < 0.8, 3, 1)
    outcomes = replace(outcomes, correct=correct, confidence=rng.random((300, 3)).astype(np.float32))
    assert solve("cascade", outcomes, COSTS, "1.0x").stages == (2,)


def test_assigner_minds_its_price():
    outcomes = synthetic()
    tokens = [
        Assign(1.0, price, (1.0, 0.6, 0.3)).simulate(outcomes, COSTS).tokens.mean() for price in (0, 0.2, 0.5, 1, 5)
    ]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] == 5
    free = Assign(1.0, 0.0, (1.0, 0.6, 0.3)).simulate(outcomes, COSTS)
    assert (free.row == 0).all()  # for nothing, the longest is never worse


def test_random_keeps_its_mix():
    rows = Random((0.25, 0.0, 0.75), seed=3).draw(1000)
    assert np.bincount(rows).tolist() == [250, 0, 750]
    assert not np.array_equal(rows, Random((0.25, 0.0, 0.75), seed=4).draw(1000))
    singly = np.concatenate([Random((0.25, 0.0, 0.75)).draw(1, turn) for turn in range(2000)])
    assert set(singly) == {0, 2} and abs((singly == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)


def test_what_cannot_be_met_is_said():
    outcomes = synthetic()
    with pytest.raises(ValueError, match=r"3\.33x is the most it reaches"):
        solve("fixed", outcomes, COSTS, "5x")
    with pytest.raises(ValueError, match="% is the most it reaches"):
        solve("fixed", outcomes, COSTS, "99.9%")
    with pytest.raises(ValueError, match="tokens are the fewest"):
        solve("cascade", outcomes, COSTS, "2 tokens")
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
    images, outcomes = held_out()
    model = trained()
    with torch.inference_mode():
        logits = assigner(torch.from_numpy(images.array), model=model).numpy()
    known = replace(outcomes, assigner=logits)
    adaptive = AdaptiveViT(model, name, assigner=assigner, outcomes=known, budget="1.4x", costs=COSTS, reuse=reuse)
    found = adaptive.predict(torch.from_numpy(images.array), channels_last=True)
    offline = adaptive.policy.simulate(known, COSTS)
    assert np.array_equal(found.choice.numpy(), offline.row)
    assert np.array_equal(found.tokens.numpy(), offline.tokens)
    predicted = known.predicted[np.arange(200), offline.row]
    assert np.array_equal(found.logits.argmax(-1).numpy(), predicted)
    assert torch.equal(adaptive(torch.from_numpy(images.array), channels_last=True), found.logits) or name == "random"


def test_reused_tokens_change_no_bit(assigner):
    x = torch.from_numpy(held_out()[0].array)
    policy = Assign(float(assigner.temperature), 0.8, (1.0, 0.6, 0.3))
    first, second = (
        AdaptiveViT(trained(), policy, assigner=assigner, reuse=reuse).predict(x, channels_last=True)
        for reuse in (True, False)
    )
    assert torch.equal(first.choice, second.choice) and torch.equal(first.logits, second.logits)


def test_lists_of_images_of_any_sizes(assigner):
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in ((16, 16), (31, 20), (9, 40), (64, 64))]
    policy = AssignedCascade(Assign(1.0, 0.3, (1.0, 0.6, 0.3)), Cascade((2, 0), (0.9,)))
    adaptive = AdaptiveViT(trained(), policy, assigner=assigner)
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
    policy = Assign(float(assigner.temperature), 0.8, (1.0, 0.6, 0.3))
    adaptive = AdaptiveViT(trained(), policy, assigner=assigner)
    expected = adaptive.predict(x, channels_last=True)

    def refused(*args, **kwargs):
        raise AssertionError("the host asks for values of a tensor")

    with NoHost(), monkeypatch.context() as patched:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, refused)
        found = adaptive.predict(x, channels_last=True, device_choice=True)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.tokens, expected.tokens)
    assert found.fits.all()


def test_images_beyond_the_capacity_are_told(assigner):
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


# ---------------------------------------------------------------------- costs and wrong use


def test_costs_are_measured_and_kept():
    costs = measure_costs(trained(), batch=64, rounds=3)
    assert costs.menu == MENU and costs.per_length[0] > costs.per_length[2] > 0
    assert costs.device == device_name("cpu") and Costs.from_json(costs.to_json()) == costs
    with pytest.raises(ValueError, match="no JSON of costs"):
        Costs.from_json("{}")


def test_wrong_use(assigner):
    model, (_, outcomes) = trained(), held_out()
    cases = [
        (dict(policy="magic"), "policy must be one of"),
        (dict(policy="assigner", outcomes=outcomes), "needs an assigner"),
        (dict(policy="cascade"), "needs held-out outcomes"),
        (dict(policy=Assign()), "needs an assigner"),
        (dict(policy=3), "a Policy or a function"),
        (dict(policy="cascade", outcomes=outcomes, costs=replace(COSTS, device="another")), "measured on another"),
        (dict(policy="cascade", outcomes=outcomes, costs=COSTS, budget="50x"), "cannot meet the budget"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            AdaptiveViT(model, **options)
    other = make_model()
    with pytest.raises(ValueError, match="another model"):
        AdaptiveViT(other, "cascade", outcomes=outcomes, costs=COSTS)
    with pytest.raises(ValueError, match="another model"):
        AdaptiveViT(other, "assigner", assigner=assigner, costs=COSTS)
    other.menu = None
    with pytest.raises(ValueError, match="make it resizable first"):
        AdaptiveViT(other, Fixed(0))
