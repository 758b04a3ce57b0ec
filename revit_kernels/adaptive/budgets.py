"""Budgets without retraining: the numbers of a policy, solved from held-out outcomes and the costs of each length."""

from __future__ import annotations

import itertools
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np

from revit_kernels.adaptive import evidence
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import (
    ALONE,
    ASSIGNED,
    POLICIES,
    Assign,
    AssignedCascade,
    Cascade,
    Fixed,
    Oracle,
    Policy,
    Random,
    ScoutCascade,
    Simulated,
)

PRICES, FINER = 201, 61  # that are tried of all at which a decision turns, and again about the best
MARGIN = 0.02  # of the cost that a price must leave free: prices come from few images, and answers serve others


@dataclass(frozen=True)
class Budget:
    """What a policy must keep to: exactly one of these.

    speed:    images a second, in multiples of full length's
    tokens:   mean tokens of an image, prefix tokens counted, all passes added up
    accuracy: on the held-out images, at the least cost
    loss:     points of accuracy below full length's, as a share (0.003 is 0.3 points), one standard error included: of
              all prices, the one that loses least on the held-out images does so by chance too

    An accuracy is that of the held-out images which a price was chosen on: on others expect less, by about one
    standard error.
    """

    speed: float | None = None
    tokens: float | None = None
    accuracy: float | None = None
    loss: float | None = None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"a budget is exactly one of speed, tokens, accuracy and loss, got {given}")
        ((name, value),) = given.items()
        if not np.isfinite(value) or (value < 0 if name == "loss" else value <= 0):
            raise ValueError(f"a budget's {name} must be finite and above 0 (a loss may be 0), got {value}")
        if name in ("accuracy", "loss") and value > 1:
            raise ValueError(f"a budget's {name} is at most 100 {'%' if name == 'accuracy' else 'points'}, got {self}")

    @classmethod
    def parse(cls, budget) -> Budget:
        """From "2.0x", "80 tokens", "95%", "full" or "full-0.3" (points), or a Budget. Raises ValueError otherwise."""
        if isinstance(budget, Budget):
            return budget
        text = str(budget).strip().lower().replace(" ", "")
        found = re.fullmatch(r"full(?:-([^-].*))?|(.+?)(x|tokens|%)", text)
        try:
            number = float(found[1] or found[2] or 0)
        except (TypeError, ValueError):  # no match; no number
            raise ValueError(
                f"a budget is written 2x, 80tokens, 95%, full or full-0.3 (points), got {budget!r}"
            ) from None
        name = {"x": "speed", "tokens": "tokens", "%": "accuracy", None: "loss"}[found[3]]
        return cls(**{name: number / 100 if name in ("accuracy", "loss") else number})

    def __str__(self) -> str:
        if self.speed is not None:
            return f"{self.speed:g}x"
        if self.tokens is not None:
            return f"{self.tokens:g} tokens"
        if self.accuracy is not None:
            return f"{100 * self.accuracy:g} %"
        return f"full-{100 * self.loss:g}" if self.loss else "full"


@dataclass(frozen=True)
class _Problem:
    outcomes: Outcomes
    costs: Costs
    budget: Budget
    prefix: int | list[int]

    def __post_init__(self):
        if tuple(self.costs.menu) != tuple(self.outcomes.menu):
            raise ValueError(f"the costs are of the menu {self.costs.menu}, the outcomes of {self.outcomes.menu}")

    @property
    def wanted(self) -> float | None:
        """The accuracy to reach at the least cost, or None where the cost is what is given."""
        if self.budget.accuracy is not None:
            return self.budget.accuracy
        return None if self.budget.loss is None else float(self.outcomes.correct[:, 0].mean()) - self.budget.loss

    @property
    def limit(self) -> float:
        """The most that an image may cost, in the unit of `cost`."""
        if self.budget.speed is not None:
            return self.costs.per_length[0] / self.budget.speed
        return self.budget.tokens if self.budget.tokens is not None else np.inf

    def cost(self, found: Simulated) -> float:
        return float((found.tokens if self.budget.tokens is not None else found.seconds).mean())

    def measure(self, policy: Policy) -> tuple[float, float]:
        """(accuracy, cost); under a budget of loss the accuracy is less one standard error of the loss."""
        found = policy.simulate(self.outcomes, self.costs, self.prefix)
        accuracy = float(found.right.mean())
        if self.budget.loss is not None:
            difference = self.outcomes.correct[:, 0].astype(float) - found.right
            accuracy -= float(difference.std() / np.sqrt(len(difference)))
        return accuracy, self.cost(found)

    def _order(self, found: tuple[float, float], margin: float = 0.0):
        accuracy, cost = found
        if self.wanted is None:
            over = cost > self.limit * (1 - margin) * (1 + 1e-9)
            return (over, cost if over else -accuracy, cost)
        short = accuracy < self.wanted
        return (short, -accuracy if short else cost, -accuracy)

    def meets(self, found: tuple[float, float]) -> bool:
        return not self._order(found)[0]

    def best(self, candidates, margin: float = 0.0) -> tuple[Policy, tuple[float, float]]:
        return min(candidates, key=lambda pair: self._order(pair[1], margin))


def fitted(outcomes: Outcomes) -> dict[str, Policy]:
    """Policies without a price yet, by name and first row: what their probabilities of being right are.

    outcomes: of images that neither the model nor the assigner has learnt from

    Solving a budget of these needs no fit. An assigner's file keeps them.
    """
    costs = (0.0,) * len(outcomes.menu)
    found = {}
    if outcomes.assigner is not None:
        found["assigner"] = Assign(0.0, costs)
    for first in range(1, len(outcomes.menu)):
        for kind in (Cascade, AssignedCascade):
            if kind is Cascade or outcomes.mixed is not None:
                known = kind(first, (), 0.0, costs)
                found[f"{kind.name} {first}"] = replace(
                    known, weights=evidence.fit(known.columns_of(outcomes), outcomes.correct)
                )
        if outcomes.alone is not None:
            alone = evidence.fit(ScoutCascade.columns_alone(outcomes), outcomes.right_alone[:, None])[0]
            weights = found[f"{AssignedCascade.name} {first}"].weights
            found[f"{ScoutCascade.name} {first}"] = ScoutCascade(first, weights, 0.0, costs, alone)
    return found


def solve(
    policy: str,
    outcomes: Outcomes,
    costs: Costs,
    budget="full",
    *,
    known: dict[str, Policy] | None = None,
    prefix: int | list[int] = 1,
) -> Policy:
    """The policy of this kind that meets the budget best on held-out outcomes.

    policy:   one of POLICIES
    outcomes: of images that neither the model nor the assigner has learnt from
    costs:    of each length, where the policy will serve
    budget:   see Budget.parse. With a cost given, accuracy is the largest that is found; with an accuracy, the cost is
              the least
    prefix:   prefix tokens of an image, or of an image at each length
    known:    what `fitted` gives of these outcomes, if that is known already

    What comes out as one length for all images is a `Fixed`. Where no such policy meets the budget, the nearest one is
    returned, with a warning that says what can be reached.
    """
    problem = _Problem(outcomes, costs, Budget.parse(budget), prefix)
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    if len(outcomes) == 0:
        raise ValueError("a budget is solved from held-out images, and these outcomes hold none")
    if policy in ASSIGNED and outcomes.assigner is None:
        raise ValueError(f"policy {policy!r} needs an assigner, with its answers for the held-out images")
    if policy == "oracle":
        return Oracle(len(outcomes.menu))
    found = [(one, problem.measure(one)) for one in map(Fixed, range(len(outcomes.menu)))]
    if policy == "random":
        found = _random(problem)
    elif policy != "fixed":
        known = fitted(outcomes) if known is None else known
        for name, one in known.items():
            if name.split()[0] == policy:
                found.append(_priced(problem, one))
    best = problem.best(found)
    if not problem.meets(best[1]):
        warnings.warn(_unreachable(policy, problem, best), stacklevel=2)
    return best[0]


def _priced(problem: _Problem, policy: Policy):
    """The policy at the price that meets the budget best, with what it comes to."""
    per, costs = problem.costs.per_length, problem.costs
    repack = costs.repack if isinstance(policy, Cascade) else 0.0
    policy = replace(policy, costs=tuple((c + repack) / per[0] for c in per))
    right, weighed = policy.probabilities(problem.outcomes).double().numpy(), np.array(policy.weighed())
    turns = _turns(right, weighed)

    def best(places):
        places = list(dict.fromkeys(places.astype(int).tolist()))
        measured = _at_prices(problem, policy, right, weighed, turns[places])
        return min(zip(places, measured), key=lambda pair: problem._order(pair[1], MARGIN))

    place, found = best(np.linspace(0, len(turns) - 1, PRICES))
    step = len(turns) / PRICES
    near = np.linspace(max(0, place - step), min(len(turns) - 1, place + step), FINER)
    place, _ = min([(place, found), best(near)], key=lambda pair: problem._order(pair[1], MARGIN))
    policy = replace(policy, price=float(turns[place]))
    return policy, problem.measure(policy)


def _at_prices(problem: _Problem, policy: Policy, right: np.ndarray, weighed: np.ndarray, prices: np.ndarray):
    """What `problem.measure` gives of the policy at each price, without simulating it image by image.

    right: (images, lengths) probabilities; weighed: (lengths,) by which a price is multiplied
    """
    correct, rows = problem.outcomes.correct.astype(np.float64), right.shape[1]
    lengths = (problem.outcomes.patches + np.array(problem.prefix)).astype(np.float64)
    costs, by_tokens, found = problem.costs, problem.budget.tokens is not None, []
    per = lengths if by_tokens else np.array(costs.per_length)
    full, every = correct[:, 0], np.arange(len(correct))
    reversed_right, reversed_weighed = right.T[::-1].copy(), weighed[::-1, None]  # of equals, the shorter is taken
    ahead = policy.ahead_of(problem.outcomes) if policy.answers_alone else None
    for price in prices:
        row = rows - 1 - (reversed_right - price * reversed_weighed).argmax(0)
        won, ran = correct[every, row], np.ones(len(row), bool)
        if ahead is not None:
            ran = (replace(policy, price=float(price)).started(*ahead) != ALONE).numpy()
            won = np.where(ran, won, problem.outcomes.right_alone)
        begun = float(ran.mean())
        share = np.bincount(row[ran], minlength=len(per)) / len(row)
        cost = float(share @ per)
        if policy.answers_alone and not by_tokens:
            cost += begun * costs.repack + costs.later_pass(begun)
        if policy.passes > 1:  # all begin at the first, and those that stay are not run again
            going = begun - share[policy.first]
            cost += going * per[policy.first]
            cost += 0.0 if by_tokens else going * costs.repack + costs.later_pass(going)
        if policy.uses_assigner and not by_tokens:
            reusing = share[-1] if policy.passes == 1 else begun * (policy.first == len(per) - 1)
            cost += costs.assigner - costs.reused * reusing
        accuracy = float(won.mean())
        if problem.budget.loss is not None:
            accuracy -= float((full - won).std() / np.sqrt(len(won)))
        found.append((accuracy, cost))
    return found


def _turns(right: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The prices, ascending, at which one length of an image becomes worth more than another, between
    0 and one above all of them.

    right: (images, lengths) probabilities; costs: (lengths,) by which a price is multiplied
    """
    found = [np.zeros(1)]
    for i, j in itertools.combinations(range(len(costs)), 2):
        if costs[i] > costs[j]:
            found.append((right[:, i] - right[:, j]) / (costs[i] - costs[j]))
    turns = np.unique(np.concatenate(found).clip(0))
    return np.append(turns * (1 + 1e-9), 2 * turns[-1] + 1)


def _unreachable(policy: str, problem: _Problem, found) -> str:
    accuracy, cost = found[1]
    if problem.wanted is not None:
        reach = f"{100 * accuracy:.2f} % is the most it reaches on the held-out images"
    elif problem.budget.speed is not None:
        reach = f"{problem.costs.per_length[0] / cost:.2f}x is the most it reaches"
    else:
        reach = f"{cost:.1f} tokens are the fewest it reaches"
    return f"the policy {policy!r} cannot meet the budget {problem.budget}: {reach}, and that is taken"


def _random(problem: _Problem):
    """Every length, and mixes of two of them, with what is expected of each."""
    rows = [(problem.measure(Fixed(row)), row) for row in range(len(problem.outcomes.menu))]
    found = [(Fixed(row), measured) for measured, row in rows]
    for (first, a), (second, b) in itertools.combinations(rows, 2):
        for share in np.linspace(0, 1, 101)[1:-1]:
            expected = tuple(float(share * x + (1 - share) * y) for x, y in zip(first, second))
            found.append((Random(_mix(len(rows), {a: share, b: 1 - share})), expected))
    return found


def _mix(rows: int, shares: dict[int, float]) -> tuple[float, ...]:
    return tuple(float(shares.get(row, 0.0)) for row in range(rows))
