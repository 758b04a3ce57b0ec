"""Budgets without retraining: the numbers of a policy, solved from held-out outcomes and costs measured here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import (
    POLICIES,
    Assign,
    AssignedCascade,
    Cascade,
    Fixed,
    Oracle,
    Policy,
    Random,
    Simulated,
)

GRID = {2: 400, 3: 40, 4: 14}  # candidate thresholds of each stage, by the number of stages; fewer beyond
PRICES = 24


@dataclass(frozen=True)
class Budget:
    """What a policy must keep to: exactly one of these.

    speed:    images a second, in multiples of full length's
    tokens:   mean tokens of an image, prefix tokens counted, all passes added up
    accuracy: on the held-out images, at the least cost
    loss:     points of accuracy below full length's, as a share (0.003 is 0.3 points)

    An accuracy is that of the held-out images which thresholds were chosen on: on others expect less, by about one
    standard error of the difference.
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

    @classmethod
    def parse(cls, budget) -> Budget:
        """From "2.0x", "80 tokens", "95%", "full" or "full-0.3" (points), or a Budget. Raises ValueError otherwise."""
        if isinstance(budget, Budget):
            return budget
        text = str(budget).strip().lower().replace(" ", "")
        try:
            if text == "full" or text.startswith("full-"):
                return cls(loss=float(text.removeprefix("full").removeprefix("-") or 0) / 100)
            if text.endswith("x"):
                return cls(speed=float(text[:-1]))
            if text.endswith("tokens"):
                return cls(tokens=float(text.removesuffix("tokens")))
            if text.endswith("%"):
                return cls(accuracy=float(text[:-1]) / 100)
        except ValueError:
            pass
        raise ValueError(f"a budget is written 2.0x, 80tokens, 95%, full or full-0.3 (points), got {budget!r}")

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
    prefix: int

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
        """(accuracy, cost)"""
        found = policy.simulate(self.outcomes, self.costs, self.prefix)
        return float(found.right.mean()), self.cost(found)

    def better(self, first: tuple[float, float], second: tuple[float, float]) -> bool:
        """Whether one (accuracy, cost) meets the budget better than another."""
        return self._order(first) < self._order(second)

    def _order(self, found: tuple[float, float]):
        accuracy, cost = found
        if self.wanted is None:
            over = cost > self.limit * (1 + 1e-9)
            return (over, cost if over else -accuracy, cost)
        short = accuracy < self.wanted
        return (short, -accuracy if short else cost, -accuracy)

    def meets(self, found: tuple[float, float]) -> bool:
        return not self._order(found)[0]

    def best(self, candidates) -> tuple[Policy, tuple[float, float]]:
        return min(candidates, key=lambda pair: self._order(pair[1]))


def solve(
    policy: str,
    outcomes: Outcomes,
    costs: Costs,
    budget="full",
    *,
    temperature: float = 1.0,
    prefix: int = 1,
    seed: int = 0,
) -> Policy:
    """The policy of this kind that meets the budget best on held-out outcomes.

    policy:      one of POLICIES
    outcomes:    of images that neither the model nor the assigner has learnt from
    costs:       measured on the device that will serve
    budget:      see Budget.parse. With a cost given, accuracy is the largest that is found; with an accuracy, the cost
                 is the least
    temperature: of the assigner's logits

    A cascade of more stages is taken only where it wins by more than one standard error of the paired difference, or,
    at a given accuracy, where it is cheaper by more than 2 %: with many thresholds something always fits by chance.
    Raises ValueError where no such policy meets the budget, saying what can be reached.
    """
    problem = _Problem(outcomes, costs, Budget.parse(budget), prefix)
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    if len(outcomes) == 0:
        raise ValueError("a budget is solved from held-out images, and these outcomes hold none")
    if policy == "assigner+cascade" and len(outcomes.menu) < 2:
        raise ValueError("policy 'assigner+cascade' needs a menu of two lengths or more")
    if "assigner" in policy and outcomes.assigner is None:
        raise ValueError(f"policy {policy!r} needs an assigner, with its answers for the held-out images")
    relative = tuple(c / costs.per_length[0] for c in costs.per_length)
    if policy == "oracle":
        return Oracle()
    if policy == "fixed":
        found = problem.best((p, problem.measure(p)) for p in map(Fixed, range(len(outcomes.menu))))
    elif policy == "random":
        found = _random(problem, seed)
    elif policy == "assigner":
        found = _assigner(problem, temperature, relative)
    elif policy == "cascade":
        found = _cascade(problem)
    else:
        found = _assigned_cascade(problem, temperature, relative)
    if not problem.meets(found[1]):
        raise ValueError(_unreachable(policy, problem, found))
    return found[0]


def _unreachable(policy: str, problem: _Problem, found) -> str:
    accuracy, cost = found[1]
    if problem.wanted is not None:
        reach = f"{100 * accuracy:.2f} % is the most it reaches on the held-out images"
    elif problem.budget.speed is not None:
        reach = f"{problem.costs.per_length[0] / cost:.2f}x is the most it reaches"
    else:
        reach = f"{cost:.1f} tokens are the fewest it reaches"
    return f"the policy {policy!r} cannot meet the budget {problem.budget}: {reach}"


def _random(problem: _Problem, seed: int):
    """The mix of two lengths with the most accuracy at the cost, or the least cost at the accuracy."""
    rows = [(problem.measure(Fixed(row)), row) for row in range(len(problem.outcomes.menu))]
    found = [(Random(_mix(len(rows), {row: 1.0}), seed), measured) for measured, row in rows]
    for (first, a), (second, b) in itertools.combinations(rows, 2):
        for share in np.linspace(0, 1, 101)[1:-1]:
            expected = tuple(float(share * x + (1 - share) * y) for x, y in zip(first, second))
            found.append((Random(_mix(len(rows), {a: share, b: 1 - share}), seed), expected))
    return problem.best(found)


def _mix(rows: int, shares: dict[int, float]) -> tuple[float, ...]:
    return tuple(float(shares.get(row, 0.0)) for row in range(rows))


def _assigner(problem: _Problem, temperature: float, relative: tuple[float, ...]):
    """The price by bisection in its logarithm: the cost falls as it rises."""

    def at(price: float):
        policy = Assign(temperature, float(price), relative)
        return policy, problem.measure(policy)

    candidates = [at(0.0), *(at(price) for price in np.logspace(-5, 3, 65))]
    found = problem.best(candidates)
    low, high = found[0].price / 1.4, max(found[0].price, 1e-5) * 1.4
    return problem.best([found, *(at(price) for price in np.linspace(low, high, 65))])


def _quantiles(problem: _Problem, row: int, count: int) -> np.ndarray:
    """Thresholds that a rising share of the images is below: none, ..., all."""
    confidence = np.sort(problem.outcomes.confidence[:, row])
    places = np.linspace(0, len(confidence) - 1, count).astype(int)
    return np.unique(np.append(confidence[places], [0.0, 1.5])).astype(np.float64)


class _Passes:
    """Accuracy and cost of many cascades over the same outcomes, without simulating each from the start."""

    def __init__(self, problem: _Problem, start: np.ndarray | None = None):
        outcomes, costs = problem.outcomes, problem.costs
        self.problem, self.start = problem, start
        self.confidence = outcomes.confidence.astype(np.float32)
        self.correct = outcomes.correct
        self.count = len(outcomes)
        by_tokens = problem.budget.tokens is not None
        per = [problem.prefix + h * w for h, w in outcomes.menu] if by_tokens else costs.per_length
        self.per = np.array(per, np.float64)
        self.repack = 0.0 if by_tokens else costs.repack
        self.later_pass = (lambda share: 0.0) if by_tokens else costs.later_pass
        self.base = costs.assigner if start is not None and not by_tokens else 0.0

    def measure(self, stages: tuple[int, ...], thresholds: tuple[float, ...]) -> tuple[float, float]:
        here = np.full(self.count, True) if self.start is None else self.start == stages[0]
        right = cost = 0.0
        going = np.zeros(self.count, bool)
        passes = np.zeros(self.count, np.int8)  # of each image, after its first
        for stage, row in enumerate(stages):
            runs = here if stage == 0 else going if self.start is None else going | (self.start == row)
            cost += self.per[row] * runs.sum() + self.repack * going.sum()
            if stage == len(stages) - 1:
                right += self.correct[runs, row].sum()
                break
            unsure = runs & (self.confidence[:, row] < np.float32(thresholds[stage]))
            right += self.correct[runs & ~unsure, row].sum()
            going = unsure
            passes += going
        later = sum(self.later_pass((passes >= nth).mean()) for nth in range(1, len(stages)))
        return float(right / self.count), float(cost / self.count + self.base + later)


def _threshold_search(problem: _Problem, passes: _Passes, stages: tuple[int, ...]):
    """The best thresholds of these stages: a grid of quantiles, then finer ones about the best, stage by stage."""
    if len(stages) == 1:
        return (), passes.measure(stages, ())
    count = GRID.get(len(stages), 6)
    axes = [_quantiles(problem, row, count) for row in stages[:-1]]
    found = ((t, passes.measure(stages, t)) for t in itertools.product(*axes))
    thresholds, measured = problem.best(found)
    for _ in range(2):
        for stage, row in enumerate(stages[:-1]):
            fine = _quantiles(problem, row, 400)
            near = np.searchsorted(fine, thresholds[stage])
            for value in fine[max(0, near - 25) : near + 26]:
                trial = (*thresholds[:stage], float(value), *thresholds[stage + 1 :])
                now = passes.measure(stages, trial)
                if problem.better(now, measured):
                    thresholds, measured = trial, now
    return tuple(map(float, thresholds)), measured


def _stage_sets(rows: int, most: int = 4):
    """All ways to go from shorter to longer lengths: rows in descending order, that is ascending length."""
    for count in range(1, min(rows, most) + 1):
        yield from itertools.combinations(range(rows - 1, -1, -1), count)


def _cascade(problem: _Problem, start: np.ndarray | None = None):
    passes = _Passes(problem, start)
    by_count: dict[int, list] = {}
    for stages in _stage_sets(len(problem.outcomes.menu)):
        if start is not None and not set(np.unique(start)) <= set(stages):
            continue
        thresholds, measured = _threshold_search(problem, passes, stages)
        by_count.setdefault(len(stages), []).append((Cascade(stages, thresholds), measured))
    best = None
    for count in sorted(by_count):
        found = problem.best(by_count[count])
        if best is None or _worth_more_stages(problem, best, found, start):
            best = found
    return best


def _worth_more_stages(problem: _Problem, simple, found, start) -> bool:
    if not problem.better(found[1], simple[1]):
        return False
    if not problem.meets(simple[1]):
        return True
    if problem.wanted is not None:
        return found[1][1] < 0.98 * simple[1][1]
    first = np.full(len(problem.outcomes), -1)

    def right(policy):
        begin = np.full(len(first), policy.stages[0]) if start is None else start
        row = first.copy()
        for rows in policy.rows_from(begin, problem.outcomes):
            row = np.where(rows >= 0, rows, row)
        return problem.outcomes.correct[np.arange(len(first)), row].astype(float)

    difference = right(found[0]) - right(simple[0])
    return difference.mean() > difference.std() / np.sqrt(len(difference))


def _assigned_cascade(problem: _Problem, temperature: float, relative: tuple[float, ...]):
    """Prices on a grid; for each, where images begin is given, and the thresholds are solved."""
    found, seen = [], set()
    shortest = len(relative) - 1
    for price in np.logspace(-3, 1.5, PRICES):
        assign = Assign(temperature, float(price), relative)
        chosen = assign.rows_run(problem.outcomes)[0]
        for stages in _stage_sets(len(relative), 3):
            if stages[0] != shortest or len(stages) < 2:
                continue
            start_of = AssignedCascade(assign, Cascade(stages, (0.0,) * (len(stages) - 1)))
            table = np.array([next((s for s in stages if s <= row), stages[-1]) for row in range(len(relative))])
            start = table[chosen]
            mark = (stages, start.tobytes())
            if mark in seen:
                continue
            seen.add(mark)
            thresholds, measured = _threshold_search_coarse(problem, _Passes(problem, start), stages)
            found.append((AssignedCascade(start_of.assign, Cascade(stages, thresholds)), measured))
    policy, measured = problem.best(found)
    start = policy.rows_run(problem.outcomes)[0]
    thresholds, finer = _threshold_search(problem, _Passes(problem, start), policy.cascade.stages)
    if problem.better(finer, measured):
        policy, measured = AssignedCascade(policy.assign, Cascade(policy.cascade.stages, thresholds)), finer
    return policy, measured


def _threshold_search_coarse(problem: _Problem, passes: _Passes, stages: tuple[int, ...]):
    axes = [_quantiles(problem, row, 40 if len(stages) == 2 else 14) for row in stages[:-1]]
    found = problem.best((t, passes.measure(stages, t)) for t in itertools.product(*axes))
    return tuple(map(float, found[0])), found[1]
