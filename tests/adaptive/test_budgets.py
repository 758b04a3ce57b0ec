"""Budgets and policies: solvers against brute force, decisions by hand, and numbers that are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_adaptive import COSTS, PRICED, WEIGHTS, synthetic
from tiny_revit import MENU, held_out, trained

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.budgets import Budget, _at_prices, _Problem, fitted, solve
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.policies import (
    ALONE,
    SERVED,
    Assign,
    AssignedCascade,
    Cascade,
    Fixed,
    Policy,
    Random,
    ScoutCascade,
    Seen,
)


@pytest.mark.parametrize(
    "text, match",
    [(text, "must be finite and above 0") for text in ("0x", "-2x", "nanx", "infx", "0 tokens", "-5%")]
    + [("101%", "accuracy is at most 100 %, got 101 %"), ("full-101", "loss is at most 100 points, got full-101")]
    + [(text, "a budget is written") for text in ("", "2", "full+1", "full--1", "fast", "x")]
    + [(text, "a budget is written") for text in ("95", "1 e5 x tokens", "fullx")],
)
def test_budgets_that_no_policy_can_be_held_to(text, match):
    with pytest.raises(ValueError, match=match):
        Budget.parse(text)


@pytest.mark.parametrize(
    "given, match",
    [
        ({}, "exactly one of speed"),
        ({"speed": 2.0, "accuracy": 0.9}, "exactly one of speed"),
        ({"speed": 0.0}, "speed must be finite and above 0"),
        ({"loss": -0.1}, "loss must be finite"),
        ({"tokens": float("nan")}, "tokens must be finite"),
    ],
)
def test_budgets_are_one_number(given, match):
    with pytest.raises(ValueError, match=match):
        Budget(**given)


def test_outcomes_that_tell_nothing():
    with pytest.raises(ValueError, match="these outcomes hold none"):
        solve("cascade", synthetic().take(np.zeros(0, int)), COSTS, "1.2x")
    known = synthetic()
    names = ("correct", "confidence", "margin", "entropy", "assigner", "mixed")
    one = replace(known, menu=known.menu[:1], **{name: getattr(known, name)[:, :1] for name in names})
    for policy in ("assigner", "cascade", "assigner+cascade"):  # of one length there is no other to go on to
        assert solve(policy, one, Costs(known.menu[:1], (1.0,)), "1x") == Fixed(0)


@pytest.mark.parametrize(
    "policy, match",
    [
        (Fixed(3), "row must be of rows 0 to 2 of the menu, got 3"),
        (Fixed(-1), "row must be of rows 0 to 2"),
        (Random((0.5, 0.5)), "mix must be 3 shares"),
        (Random((0.5, 0.5, 0.0, 0.0)), "mix must be 3 shares"),
        (Random((1.5, -0.5, 0.0)), "none below 0"),
        (Random((0.0, 0.0, 0.0)), "not all 0"),
        (Assign(), "needs 3 costs"),
        (Cascade(9, WEIGHTS, 0.1, PRICED), "first must be of rows 0 to 2"),
        (Cascade(2, WEIGHTS[:2], 0.1, PRICED), "costs and weights for 3 lengths, got 3 and 2"),
        (AssignedCascade(2, WEIGHTS, 0.1, PRICED[:1]), "costs and weights for 3 lengths, got 1 and 3"),
    ],
)
def test_policies_of_another_menu(policy, match):
    model = trained()
    assigner = TokenLengthAssigner.for_model(model)
    with pytest.raises(ValueError, match=match):
        AdaptiveViT(model, policy, assigner=assigner)


@pytest.mark.parametrize("text", ["", "{}", '{"policy": "magic"}', '{"policy": "fixed", "length": 3}', "[1]"])
def test_text_that_is_no_policy(text):
    with pytest.raises(ValueError, match=r"no JSON of a policy|policy must be one of"):
        Policy.from_json(text)


def test_rows_of_an_own_function():
    images, outcomes = held_out()
    x = torch.from_numpy(images.array[:4])
    beyond = AdaptiveViT(trained(), lambda images: torch.full((len(images),), 5, device=x.device))
    with pytest.raises(ValueError, match="rows must be 0 to 2"):
        beyond.predict(x, channels_last=True, device_choice=False)
    found = beyond.predict(x, channels_last=True, device_choice=True)
    assert (found.choice == 2).all()  # nothing waits to refuse it: the row that was run is told
    oracle = AdaptiveViT(trained(), "oracle")
    told = [oracle.predict(x, channels_last=True, labels=kind(outcomes.label[:4])).choice.cpu() for kind in KINDS]
    assert all(torch.equal(told[0], choice) for choice in told)


KINDS = (torch.from_numpy, np.asarray, np.ndarray.tolist)


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


@pytest.mark.parametrize("name", SERVED)
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
