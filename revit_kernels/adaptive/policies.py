"""Policies with their numbers filled in: which length, or lengths, each image is given.

`start` gives every image its first length, `next` sends some on to a second. The same functions decide offline, on
held-out outcomes, and online, on the images that are served.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_kernels.adaptive import evidence
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.device_cache import constant
from revit_kernels.files import parse_json
from revit_kernels.grids import grid_text

SERVED = ("fixed", "random", "assigner", "cascade", "assigner+cascade", "scout+cascade")
POLICIES = (*SERVED, "oracle")  # which asks for true labels
ASSIGNED = ("assigner", "assigner+cascade", "scout+cascade")  # those that need an assigner
ALONE = -1  # in place of a menu row: the assigner has answered, and the model not seen the image


class Seen(NamedTuple):
    """What there is to decide by before the first pass.

    images:   of the batch: a tensor or a list
    device:   where the rows are wanted
    assigned: (images, lengths + classes) logits of the assigner, for a policy that uses one
    labels:   (images,) true menu rows, where they are known
    turn:     how many batches there were before
    """

    images: object
    device: torch.device
    assigned: Tensor | None = None
    labels: Tensor | None = None
    turn: int = 0


class Simulated(NamedTuple):
    """What a policy comes to, image by image: row of the answer or ALONE, all tokens and seconds, and whether it is
    right."""

    row: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Policy:
    """A policy; its fields are all there is to it.

    uses_assigner: whether `start` or `next` reads an assigner's logits
    passes:        an image goes through at most so many
    answers_alone: whether `start` may give ALONE, for an image that is the assigner's to answer
    run_length:    which tokens of a clip are left out, as ClipModel takes it; None: none
    """

    name: ClassVar[str] = ""
    uses_assigner: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    answers_alone: ClassVar[bool] = False
    run_length: ClassVar[float | None] = None

    def start(self, seen: Seen) -> Tensor:
        """(images,) int32 menu rows of the first pass, or ALONE, on seen.device, without waiting for it."""
        raise NotImplementedError

    def next(self, columns: Tensor) -> Tensor:
        """(images,) int32: the menu row of a second pass, -1 for none; on the columns' device, without waiting for it.

        columns: (images, columns) that `columns` gives of the first pass
        """
        raise NotImplementedError

    def columns(self, logits: Tensor, assigned: Tensor | None) -> Tensor:
        """(images, columns) that `next` decides by. logits: (images, classes) of the first pass"""
        raise NotImplementedError

    def to_json(self) -> str:
        return json.dumps({"policy": self.name} | asdict(self))

    @staticmethod
    def from_json(text: str) -> Policy:
        """What `to_json` wrote. Raises ValueError for any other text."""
        try:
            found = parse_json(text)
            kinds = Fixed, RunLength, Random, Oracle, Assign, Cascade, AssignedCascade, ScoutCascade
            classes = {cls.name: cls for cls in kinds}
            name = found.pop("policy")
            if name not in classes:
                raise ValueError(f"policy must be one of {POLICIES}, got {name!r}")
            return classes[name](**{key: _tuples(value) for key, value in found.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no JSON of a policy: {error}") from None

    def require(self, menu) -> Policy:
        """Raise ValueError unless its numbers are of a menu of this many lengths."""
        return self

    def probabilities(self, outcomes: Outcomes) -> Tensor | None:
        """(images, lengths) of being right, which a price is weighed against; None for a policy without a price."""
        return None

    def rows_run(self, outcomes: Outcomes) -> list[np.ndarray]:
        """For each pass in turn, (images,) the menu row that each image runs at, -1 for none."""
        labels = torch.from_numpy(outcomes.label)
        return [self.start(Seen(range(len(outcomes)), torch.device("cpu"), None, labels)).numpy().astype(int)]

    def simulate(self, outcomes: Outcomes, costs: Costs, prefix: int | list[int] = 1) -> Simulated:
        """What the policy comes to on outcomes that it was not solved from, or was.

        prefix: prefix tokens of an image, or of an image at each length
        """
        lengths = outcomes.patches + np.array(prefix)
        per_length = np.array(costs.per_length)
        every = np.arange(len(outcomes))
        row = np.full(len(outcomes), -1)
        tokens, seconds = np.zeros(len(outcomes)), np.zeros(len(outcomes))
        for step, rows in enumerate(self.rows_run(outcomes)):
            runs, partial = rows >= 0, bool(step or self.answers_alone)
            tokens[runs] += lengths[rows[runs]]
            seconds[runs] += per_length[rows[runs]] + (costs.repack if partial else 0.0)
            row[runs] = rows[runs]
            if partial:
                seconds += costs.later_pass(runs.mean())
            if self.uses_assigner and not step:
                seconds += costs.assigner - costs.reused * (rows == len(lengths) - 1)
        right = outcomes.correct[every, row]
        if self.answers_alone:
            right = np.where(row == ALONE, outcomes.right_alone, right)
        return Simulated(row, tokens, seconds, right)


@dataclass(frozen=True)
class Fixed(Policy):
    """Every image at one length. row: of the menu"""

    row: int = 0
    name: ClassVar[str] = "fixed"

    def start(self, seen):
        return torch.full((len(seen.images),), self.row, dtype=torch.int32, device=seen.device)

    def require(self, menu):
        _check_rows("row", self.row, menu)
        return self

    def describe(self, menu) -> str:
        return f"every image at {_grid(menu, self.row)}"


@dataclass(frozen=True)
class RunLength(Policy):
    """Every clip at one length, without the tokens that repeat the ones before them (arXiv:2411.05222).

    run_length: the largest difference of a repetition, as ClipModel takes it; row: of the menu
    """

    run_length: float = 0.0
    row: int = 0
    name: ClassVar[str] = "run-length"

    start = Fixed.start

    def require(self, menu):
        _check_rows("row", self.row, menu)
        if len(menu[0]) != 3:
            raise ValueError(f"run-length tokens are of models of clips, this one's menu is {menu}")
        return self

    def describe(self, menu) -> str:
        return f"every clip at {_grid(menu, self.row)}, without tokens within {self.run_length:g} of the ones before"


@dataclass(frozen=True)
class Random(Policy):
    """Random baseline: random lengths in a fixed mix. mix: share of each menu row"""

    mix: tuple[float, ...] = ()
    seed: int = 0
    name: ClassVar[str] = "random"

    def draw(self, images: int, turn: int = 0) -> np.ndarray:
        """(images,) rows in random order; exactly the mix, up to whole images."""
        rng = np.random.default_rng([self.seed, turn])
        # A random offset, so that small batches have the mix on average.
        places = (np.arange(images) + rng.random()) / images * sum(self.mix)
        rows = np.searchsorted(np.cumsum(self.mix), places, side="right").clip(max=len(self.mix) - 1)
        return rng.permutation(rows)

    def start(self, seen):
        return torch.from_numpy(self.draw(len(seen.images), seen.turn).astype(np.int32)).to(seen.device)

    def require(self, menu):
        if len(self.mix) != len(menu) or not (min(self.mix) >= 0 and 0 < sum(self.mix) < np.inf):
            raise ValueError(f"mix must be {len(menu)} shares, none below 0 and not all 0, got {self.mix}")
        return self

    def describe(self, menu) -> str:
        shares = ", ".join(f"{_grid(menu, i)} {share:.0%}" for i, share in enumerate(self.mix) if share)
        return f"at random: {shares}"


@dataclass(frozen=True)
class Oracle(Policy):
    """Each image at its true label: what no policy can reach, for it asks the truth."""

    name: ClassVar[str] = "oracle"
    lengths: int = 0

    def start(self, seen):
        if seen.labels is None:
            raise ValueError("the oracle needs the images' true labels: it is for evaluation only")
        labels = torch.as_tensor(seen.labels, device=seen.device)
        return torch.where(labels >= 0, labels, self.lengths - 1).int()

    def require(self, menu):
        if self.lengths != len(menu):
            raise ValueError(f"the oracle is of a menu of {self.lengths} lengths, the model's has {len(menu)}")
        return self

    def describe(self, menu) -> str:
        return "each image at its true label (not attainable: it asks the truth)"


@dataclass(frozen=True)
class Own(Policy):
    """A function of the user's, from the images to (images,) menu rows."""

    choose: Callable = None
    name: ClassVar[str] = "own"

    def start(self, seen):
        rows, count = torch.as_tensor(self.choose(seen.images), device=seen.device), len(seen.images)
        if rows.shape != (count,) or rows.is_floating_point():
            raise ValueError(f"the policy must give ({count},) menu rows, got {tuple(rows.shape)} {rows.dtype}")
        return rows

    def to_json(self) -> str:
        raise ValueError("a function has no JSON")

    def describe(self, menu) -> str:
        return "a function of the user's"


@dataclass(frozen=True)
class Assign(Policy):
    """The length of the largest "probability of being right, less price times cost", by an assigner's logits.

    price: of one full-length pass
    costs: of each length, relative to the longest
    """

    price: float = 0.0
    costs: tuple[float, ...] = ()
    name: ClassVar[str] = "assigner"
    uses_assigner: ClassVar[bool] = True

    def decide(self, assigned: Tensor) -> Tensor:
        """(images,) int32 rows of the menu, on the device of assigned (images, lengths + classes), without waiting."""
        return _best(evidence.probability(assigned[:, : len(self.costs)]), self.price, self.costs)

    def start(self, seen):
        return self.decide(seen.assigned)

    def weighed(self) -> tuple[float, ...]:
        """For each column of `probabilities`, the cost that the price is multiplied by."""
        return self.costs

    def probabilities(self, outcomes):
        return evidence.probability(torch.from_numpy(_kept(outcomes, "assigner")))

    def rows_run(self, outcomes):
        return [_best(self.probabilities(outcomes), self.price, self.costs).numpy().astype(int)]

    def require(self, menu):
        if len(self.costs) != len(menu):
            raise ValueError(f"an assigner's policy needs {len(menu)} costs, got {self.costs}")
        return self

    def describe(self, menu) -> str:
        return f"the assigner's choice at a price of {self.price:.3g} per full-length pass"


@dataclass(frozen=True)
class Cascade(Policy):
    """One length for all; then an image stays, or goes on to the longer length that is worth its price.

    first:   menu row of the first pass
    weights: for each length the numbers of `evidence.right`, for the probability that its answer is right
    price:   of one full-length pass
    costs:   of a second pass at each length, relative to one of the longest
    An image goes where "probability of being right, less price times cost" is largest; staying costs nothing.
    """

    first: int = 0
    weights: tuple[tuple[float, ...], ...] = ()
    price: float = 0.0
    costs: tuple[float, ...] = ()
    name: ClassVar[str] = "cascade"
    passes: ClassVar[int] = 2

    def start(self, seen):
        return torch.full((len(seen.images),), self.first, dtype=torch.int32, device=seen.device)

    def next(self, columns):
        return self._next(evidence.right(columns, self.weights[: self.first + 1]))

    def _next(self, right: Tensor) -> Tensor:
        """right: (images, longer lengths and the first)"""
        best = _best(right, self.price, self.weighed())
        return torch.where(best == self.first, -1, best)

    def weighed(self) -> tuple[float, ...]:
        """For each column of `probabilities`, the cost that the price is multiplied by."""
        return (*self.costs[: self.first], 0.0)

    def probabilities(self, outcomes):
        return evidence.right(torch.from_numpy(self.columns_of(outcomes)), self.weights[: self.first + 1])

    def rows_run(self, outcomes):
        following = self._next(self.probabilities(outcomes)).numpy().astype(int)
        return [np.full(len(outcomes), self.first), following]

    def columns(self, logits, assigned):
        return evidence.summary(logits)

    def columns_of(self, outcomes: Outcomes) -> np.ndarray:
        """What `columns` gives, of outcomes."""
        return np.stack([getattr(outcomes, name)[:, self.first] for name in ("confidence", "margin", "entropy")], 1)

    def require(self, menu):
        _check_rows("first", self.first, menu)
        if len(self.costs) != len(menu) or len(self.weights) != len(menu):
            raise ValueError(
                f"a cascade needs costs and weights for {len(menu)} lengths, got {len(self.costs)} and "
                f"{len(self.weights)}"
            )
        return self

    def describe(self, menu) -> str:
        longer = " or ".join(_grid(menu, row) for row in range(self.first))
        return f"{_grid(menu, self.first)}, then {longer} where worth a price of {self.price:.3g} per full-length pass"


@dataclass(frozen=True)
class AssignedCascade(Cascade):
    """A cascade that also weighs what the assigner says: of the lengths, and of the answer (`evidence.mixed`)."""

    name: ClassVar[str] = "assigner+cascade"
    uses_assigner: ClassVar[bool] = True

    def columns(self, logits, assigned):
        lengths = len(self.costs)
        mixed = evidence.mixed(logits, assigned[:, lengths:])
        return torch.cat([evidence.summary(logits), mixed, assigned[:, :lengths].float()], 1)

    def columns_of(self, outcomes):
        mixed = _kept(outcomes, "mixed")[:, self.first]
        return np.concatenate([super().columns_of(outcomes), mixed, _kept(outcomes, "assigner")], 1)

    def describe(self, menu) -> str:
        return f"{super().describe(menu)}, with the assigner as evidence"


@dataclass(frozen=True)
class ScoutCascade(AssignedCascade):
    """An assigner's cascade whose assigner may answer by itself, before the first pass: the model then never sees the
    image.

    alone: numbers of `evidence.right`, for the probability that the assigner's class is right

    The assigner answers where that probability is at least "probability of being right, less price times cost" of
    every length, by its own logits; a length beyond the first costs both passes.
    """

    alone: tuple[float, ...] = ()
    name: ClassVar[str] = "scout+cascade"
    answers_alone: ClassVar[bool] = True

    def start(self, seen):
        lengths = len(self.costs)
        columns = torch.cat([evidence.summary(seen.assigned[:, lengths:]), seen.assigned[:, :lengths].float()], 1)
        return self.started(*self.ahead(columns))

    def ahead(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(images,) probability that the assigner is right, and (images, lengths) that each length is.

        columns: (images, 3 + lengths), the summary of the assigner's posterior and its logits of the lengths
        """
        return evidence.right(columns, (self.alone,))[:, 0], evidence.probability(columns[:, 3:])

    def started(self, alone: Tensor, lengths: Tensor) -> Tensor:
        """(images,) int32, ALONE or the first row, of what `ahead` gives."""
        through = tuple(
            self.costs[self.first] + (cost if row < self.first else 0.0) for row, cost in enumerate(self.costs)
        )
        worth = (lengths - _constant(tuple(self.price * cost for cost in through), lengths.device))[:, : self.first + 1]
        return torch.where(alone >= worth.amax(-1), ALONE, self.first).int()

    def ahead_of(self, outcomes: Outcomes) -> tuple[Tensor, Tensor]:
        """What `ahead` gives, of outcomes."""
        return self.ahead(torch.from_numpy(self.columns_alone(outcomes)))

    @staticmethod
    def columns_alone(outcomes: Outcomes) -> np.ndarray:
        """(images, 3 + lengths) that the probability of `alone` follows from."""
        return np.concatenate([_kept(outcomes, "alone")[:, :3], _kept(outcomes, "assigner")], 1)

    def rows_run(self, outcomes):
        begun = self.started(*self.ahead_of(outcomes)).numpy().astype(int)
        following = self._next(self.probabilities(outcomes)).numpy().astype(int)
        return [begun, np.where(begun == ALONE, -1, following)]

    def describe(self, menu) -> str:
        return f"the assigner's own answer where sure; else {super().describe(menu)}"


def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return constant(("policy", values), device, lambda: torch.tensor(values, dtype=torch.float64))


def _best(right: Tensor, price: float, costs: tuple[float, ...]) -> Tensor:
    """(images,) int32: the row of the largest "right, less price times cost"; of equally good ones the shortest."""
    worth = right - _constant(tuple(price * cost for cost in costs), right.device)
    return (len(costs) - 1 - worth.flip(-1).argmax(-1)).int()


def _check_rows(name: str, row: int, menu) -> None:
    if not 0 <= row < len(menu):
        raise ValueError(f"{name} must be of rows 0 to {len(menu) - 1} of the menu, got {row}")


def _grid(menu, row: int) -> str:
    return grid_text(menu[row])


def _kept(outcomes: Outcomes, name: str) -> np.ndarray:
    if (found := getattr(outcomes, name)) is None:
        raise ValueError("these outcomes hold nothing of an assigner: take them from the assigner's file")
    return found


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
