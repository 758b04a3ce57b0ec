"""Policies with their numbers filled in: which length, or lengths, each image is given.

The same functions decide offline, on held-out outcomes, and online, on the images that are served.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_kernels.adaptive.calibration import constant
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.outcomes import Outcomes

POLICIES = ("fixed", "random", "assigner", "cascade", "assigner+cascade", "oracle")


class Simulated(NamedTuple):
    """What a policy comes to, image by image: row of the answer, all tokens and seconds, and whether it is right."""

    row: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Policy:
    """A policy; its fields are all there is to it."""

    name: ClassVar[str] = ""

    def to_json(self) -> str:
        return json.dumps({"policy": self.name} | asdict(self))

    @staticmethod
    def from_json(text: str) -> Policy:
        """What `to_json` wrote. Raises ValueError for any other text."""
        try:
            found = json.loads(text)
            return _policy(found.pop("policy"), found)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no JSON of a policy: {error}") from None

    def rows_run(self, outcomes: Outcomes) -> list[np.ndarray]:
        """For each pass in turn, (images,) the menu row that each image runs at, -1 for none."""
        raise NotImplementedError

    def uses_assigner(self) -> bool:
        return False

    def require(self, menu) -> Policy:
        """Raise ValueError unless its numbers are of a menu of this many lengths."""
        return self

    def simulate(self, outcomes: Outcomes, costs: Costs, prefix: int = 1) -> Simulated:
        """What the policy comes to on outcomes that it was not solved from, or was."""
        lengths = np.array([prefix + h * w for h, w in outcomes.menu])
        per_length = np.array(costs.per_length)
        every = np.arange(len(outcomes))
        row = np.full(len(outcomes), -1)
        tokens, seconds = np.zeros(len(outcomes)), np.zeros(len(outcomes))
        for step, rows in enumerate(self.rows_run(outcomes)):
            runs = rows >= 0
            tokens[runs] += lengths[rows[runs]]
            seconds[runs] += per_length[rows[runs]] + (costs.repack if step else 0.0)
            row[runs] = rows[runs]
            if step:
                seconds += costs.later_pass(runs.mean())
        if self.uses_assigner():
            seconds += costs.assigner
        return Simulated(row, tokens, seconds, outcomes.correct[every, row])


@dataclass(frozen=True)
class Fixed(Policy):
    """Every image at one length. row: of the menu"""

    row: int = 0
    name: ClassVar[str] = "fixed"

    def rows_run(self, outcomes):
        return [np.full(len(outcomes), self.row)]

    def require(self, menu):
        _check_rows("row", (self.row,), menu)
        return self

    def describe(self, menu) -> str:
        return f"every image at {_grid(menu, self.row)}"


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

    def rows_run(self, outcomes):
        return [self.draw(len(outcomes))]

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

    def rows_run(self, outcomes):
        return [np.where(outcomes.label >= 0, outcomes.label, len(outcomes.menu) - 1)]

    def describe(self, menu) -> str:
        return "each image at its true label (not attainable: it asks the truth)"


@dataclass(frozen=True)
class Assign(Policy):
    """The length of the best "probability of being right, less price times cost", by an assigner's logits.

    temperature: of the logits' softmax, whose rows are the probabilities that each length is the label
    price:       of one full-length pass
    costs:       of each length, relative to the longest
    An image is right at a length with the probability that its label is that length or a shorter one.
    """

    temperature: float = 1.0
    price: float = 0.0
    costs: tuple[float, ...] = ()
    name: ClassVar[str] = "assigner"

    def decide(self, logits: Tensor) -> Tensor:
        """(images,) int32 rows of the menu, on the device of the logits (images, lengths), without waiting for it."""
        label = (logits.double() / self.temperature).softmax(-1)
        right = label.flip(-1).cumsum(-1).flip(-1)  # P(label row >= row): the label is this length or a shorter one
        price = constant(tuple(self.price * c for c in self.costs), torch.float64, logits.device)
        worth = right - price
        # of equally good lengths the shortest
        return (logits.shape[-1] - 1 - worth.flip(-1).argmax(-1)).int()

    def uses_assigner(self) -> bool:
        return True

    def rows_run(self, outcomes):
        return [self.decide(torch.from_numpy(_logits(outcomes))).numpy().astype(int)]

    def require(self, menu):
        if len(self.costs) != len(menu) or not self.temperature > 0:
            raise ValueError(
                f"an assigner's policy needs {len(menu)} costs and a temperature above 0, got {self.costs} and "
                f"{self.temperature}"
            )
        return self

    def describe(self, menu) -> str:
        return f"the assigner's choice at a price of {self.price:.3g} per full-length pass"


@dataclass(frozen=True)
class Cascade(Policy):
    """Shortest first; an image whose confidence is below the stage's threshold goes on to the next.

    stages:     rows of the menu, in turn
    thresholds: of every stage but the last
    """

    stages: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    name: ClassVar[str] = "cascade"

    def __post_init__(self):
        if not self.stages or len(self.thresholds) != len(self.stages) - 1:
            raise ValueError(f"a cascade of {len(self.stages)} stages needs a threshold for each but the last")

    def require(self, menu):
        _check_rows("stages", self.stages, menu)
        if any(a <= b for a, b in zip(self.stages, self.stages[1:])):
            raise ValueError(f"stages must be rows in descending order, the shortest length first, got {self.stages}")
        return self

    def goes_on(self, stage: int, confidence: Tensor) -> Tensor:
        """(images,) bool: which images the stage is unsure of. confidence: (images,) float32"""
        return confidence < self.thresholds[stage]

    def rows_run(self, outcomes):
        return self.rows_from(np.full(len(outcomes), self.stages[0]), outcomes)

    def rows_from(self, start: np.ndarray, outcomes: Outcomes) -> list[np.ndarray]:
        """The passes of images of which each begins at a row of its own, and joins the cascade there."""
        passes, current = [start], start
        for _ in range(len(self.stages)):
            following = np.full(len(outcomes), -1)
            for stage, row in enumerate(self.stages[:-1]):
                at = np.flatnonzero(current == row)
                confidence = torch.from_numpy(outcomes.confidence[at, row])
                unsure = at[self.goes_on(stage, confidence).numpy()]
                following[unsure] = self.stages[stage + 1]
            if (following < 0).all():
                break
            passes.append(following)
            current = following
        return passes

    def describe(self, menu) -> str:
        steps = [_grid(menu, self.stages[0])]
        steps += [f"{_grid(menu, row)} if below {t:.3f}" for row, t in zip(self.stages[1:], self.thresholds)]
        return ", then ".join(steps)


@dataclass(frozen=True)
class AssignedCascade(Policy):
    """The assigner picks where the cascade begins: at its first stage of that length or longer."""

    assign: Assign = Assign()
    cascade: Cascade = Cascade((0,))
    name: ClassVar[str] = "assigner+cascade"

    def decide(self, logits: Tensor) -> Tensor:
        """(images,) int32: the menu row of the stage that each image begins at."""
        chosen = self.assign.decide(logits)
        table = [
            next((s for s in self.cascade.stages if s <= row), self.cascade.stages[-1]) for row in range(self._rows())
        ]
        return constant(tuple(map(float, table)), torch.float64, logits.device)[chosen.long()].int()

    def _rows(self) -> int:
        return len(self.assign.costs)

    def require(self, menu):
        self.assign.require(menu)
        self.cascade.require(menu)
        return self

    def uses_assigner(self) -> bool:
        return True

    def rows_run(self, outcomes):
        start = self.decide(torch.from_numpy(_logits(outcomes))).numpy().astype(int)
        return self.cascade.rows_from(start, outcomes)

    def describe(self, menu) -> str:
        return f"{self.assign.describe(menu)}, as the start of: {self.cascade.describe(menu)}"


def _check_rows(name: str, rows, menu) -> None:
    if any(not 0 <= row < len(menu) for row in rows):
        raise ValueError(f"{name} must be of rows 0 to {len(menu) - 1} of the menu, got {tuple(rows)}")


def _grid(menu, row: int) -> str:
    return f"{menu[row][0]}x{menu[row][1]}"


def _logits(outcomes: Outcomes) -> np.ndarray:
    if outcomes.assigner is None:
        raise ValueError("these outcomes hold no logits of an assigner: take them from the assigner's file")
    return outcomes.assigner


def _policy(name: str, fields: dict) -> Policy:
    classes = {cls.name: cls for cls in (Fixed, Random, Oracle, Assign, Cascade, AssignedCascade)}
    if name not in classes:
        raise ValueError(f"policy must be one of {POLICIES}, got {name!r}")
    if name == "assigner+cascade":
        fields = {"assign": _policy("assigner", fields["assign"]), "cascade": _policy("cascade", fields["cascade"])}
    return classes[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
