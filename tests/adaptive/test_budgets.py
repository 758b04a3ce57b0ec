"""Budgets and policies at their edges: numbers that cannot be meant are told in one sentence, before anything runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_adaptive import COSTS, PRICED, WEIGHTS, synthetic
from tiny_revit import held_out, trained

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.budgets import Budget, solve
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.policies import Assign, AssignedCascade, Cascade, Fixed, Policy, Random


@pytest.mark.parametrize(
    "text", ["", "fast", "2", "x", "full+1", "0x", "-2x", "nanx", "infx", "0 tokens", "-5%", "full--1"]
)
def test_texts_that_are_no_budget(text):
    with pytest.raises(ValueError, match="a budget is written"):
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
