"""One configuration measured on images in memory: its answers, its multiply-accumulates, and its time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from revit_kernels.adaptive.costs import model_macs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import Fixed, Oracle, Policy, Random
from revit_kernels.data.datasets import ImageSet, read_batches
from revit_kernels.data.division import hold_out
from revit_kernels.devices import to_device
from revit_kernels.modules.lengths import tokens_of

BRIEF = 0.25  # seconds that full length takes each time that it is timed, at least


@dataclass
class Measured:
    """One configuration: its answers on all images, and its time on those that were timed.

    name, budget: what it is; `policy` with its numbers, or the user's own function
    right, row:   (images,) whether the answer is right, and the menu row that gave it, -1 for the assigner
    tokens:       (images,) of all passes, prefix tokens counted, the assigner's own not
    macs:         mean multiply-accumulates of an image, the assigner's counted
    seconds:      (rounds,) of all timed images
    timed:        how many they are
    baseline:     the same mix of lengths at random, where that was measured
    """

    name: str
    budget: str
    policy: Policy
    right: np.ndarray
    row: np.ndarray
    tokens: np.ndarray
    macs: float
    seconds: list[float] = field(default_factory=list)
    timed: int = 0
    baseline: Measured | None = None

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def error(self) -> float:
        """The standard error of the accuracy."""
        return float(np.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right)))

    @property
    def rate(self) -> float:
        """Images a second: of the median round."""
        return self.timed / float(np.median(self.seconds))

    def lost(self, full: Measured) -> tuple[float, float]:
        """Accuracy lost against full length, and the standard error of that difference, image by image."""
        difference = full.right.astype(float) - self.right
        return float(difference.mean()), float(difference.std() / np.sqrt(len(difference)))

    def ratios(self, full: Measured) -> np.ndarray:
        """(rounds,) images a second in multiples of full length's of the same round."""
        return np.array(full.seconds) / np.array(self.seconds)

    def speed(self, full: Measured) -> float:
        """Images a second in multiples of full length's: the median of the rounds' ratios."""
        return float(np.median(self.ratios(full)))

    def spread(self, full: Measured) -> tuple[float, float]:
        """The least and the largest of the rounds' ratios."""
        ratios = self.ratios(full)
        return float(ratios.min()), float(ratios.max())

    @property
    def alone(self) -> float:
        """The share of images that the assigner answered by itself."""
        return float((self.row < 0).mean())

    def mix(self, rows: int) -> list[float]:
        """The share of images that were answered at each length."""
        return [float((self.row == row).mean()) for row in range(rows)]


def run(adaptive: AdaptiveViT, batches, labels: np.ndarray | None = None):
    """(predicted, row, tokens) of all images of the batches, on the host; -1 is predicted where there was no room."""
    parts = []
    for indices, pixels in batches:
        known = None if labels is None else torch.from_numpy(labels[indices])
        found = adaptive.predict(pixels, channels_last=True, labels=known)
        parts.append((found.logits.argmax(-1), found.choice, found.tokens, found.fits))
    predicted, row, tokens, fits = (torch.cat(column).cpu().numpy() for column in zip(*parts))
    return np.where(fits, predicted, -1), row, tokens


def passes(policy: Policy, row: np.ndarray, lengths: int) -> np.ndarray:
    """(images, lengths) bool: the menu rows that each image went through. row: (images,) of the answer"""
    ran = np.zeros((len(row), lengths), bool)
    ran[np.arange(len(row)), row] = True
    if policy.passes > 1:
        ran[:, policy.first] = True
    ran[row < 0] = False  # the assigner answered
    return ran


def macs_of(adaptive: AdaptiveViT, row: np.ndarray, tokens: np.ndarray | None = None) -> float:
    """Mean multiply-accumulates of an image: of its passes, and of the assigner; reused tokens count once.

    row, tokens: (images,) of the answer; tokens, of all passes, are asked for run-length tokens alone
    """
    model, assigner, policy = adaptive.model, adaptive.assigner, adaptive.policy
    if policy.run_length is not None:
        return float(model_macs(model, model.menu[policy.row], kept=tokens.astype(float)).mean())
    ran = passes(policy, row, len(model.menu))
    total = float((ran @ np.array([model_macs(model, grid) for grid in model.menu], float)).mean())
    if not policy.uses_assigner:
        return total
    if adaptive.reuse and (policy.passes > 1 or next(model.parameters()).device.type == "cpu"):
        total -= float(ran[:, -1].mean()) * assigner.reused(model)
    return total + assigner.macs(model)


class Bench:
    """The test images in memory, in batches, and the clock; decoding is not what is measured."""

    def __init__(self, model, images: ImageSet, outcomes: Outcomes, batch: int, rounds: int, timed, bar):
        self.device = next(model.parameters()).device
        self.outcomes, self.rounds, self.bar = outcomes, rounds, bar
        self.lengths = np.array([tokens_of(model, grid) for grid in model.menu])
        with bar(total=len(images), desc="decoding", unit=" images") as progress:
            self.batches = self._read(images, None, batch, progress.update)
            self.some, self.timed = self.batches, len(images)
            if timed is not None and timed < len(images):
                self.timed = timed
                self.some = self._read(images, hold_out(images.targets, timed, 0)[1], batch, lambda count: None)

    def _read(self, images, indices, batch, progress) -> list:
        batches = []
        for members, pixels in read_batches(images, indices, batch):
            batches.append((members, to_device(pixels, self.device)))
            progress(len(members))
        return batches

    def _clocked(self, adaptive: AdaptiveViT, batches):
        """(seconds, what `run` returns)"""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        answers = run(adaptive, batches, self.outcomes.label)
        return time.perf_counter() - start, answers

    def measure(self, made, baselines: bool) -> list[Measured]:
        """Each (name, budget, AdaptiveViT); with `baselines` also, for each policy, random lengths in its mix."""
        rows, made = len(self.outcomes.menu), list(made)
        found = self._answers(made)
        timed = list(zip(found, (adaptive for _, _, adaptive in made)))
        policies = [one for one in found if one.name not in ("random", "oracle", "fixed") and not one.alone]
        like = policies if baselines else []
        engine = made[0][2].engine
        more = [("random", "", AdaptiveViT(engine, Random(tuple(one.mix(rows))))) for one in like]
        for one, baseline, (_, _, adaptive) in zip(like, self._answers(more), more):
            one.baseline = baseline
            timed.append((baseline, adaptive))
        self._time(timed)
        return found

    def _answers(self, made) -> list[Measured]:
        """The answers on all images; of one pass an image, they are known."""
        found = []
        with self.bar(total=len(made), desc="answers", unit=" runs") as progress:
            for name, budget, adaptive in made:
                members, pixels = self.some[0]
                run(adaptive, [(members[:64], pixels[:64])], self.outcomes.label)  # what is made once is made now
                one_pass = isinstance(adaptive.policy, Fixed | Random | Oracle)
                answers = self._told(adaptive.policy) if one_pass else run(adaptive, self.batches, self.outcomes.label)
                found.append(self._measured(name, budget, adaptive, answers))
                progress.update(1)
        return found

    def _measured(self, name: str, budget: str, adaptive: AdaptiveViT, answers) -> Measured:
        predicted, row, tokens = answers
        right, macs = predicted == self.outcomes.targets, macs_of(adaptive, row, tokens)
        return Measured(name, budget, adaptive.policy, right, row, tokens, macs, [], self.timed)

    def _time(self, timed: list[tuple[Measured, AdaptiveViT]]) -> None:
        """Every round, all in turn, a few batches each time: drift of the machine then hits all equally.

        Where all images are timed, the answers of the first round are those that count.
        """
        each = self._clocked(timed[0][1], self.some[:1])[0]
        step = max(1, math.ceil(BRIEF / each))
        times = max(1, math.ceil(BRIEF / (each * len(self.some))))  # over a few images, several times
        chunks = [self.some[i : i + step] for i in range(0, len(self.some), step)]
        with self.bar(total=self.rounds * len(chunks) * len(timed), desc="time", unit=" runs") as progress:
            for number in range(self.rounds):
                answers = [[] for _ in timed]
                for one, _ in timed:
                    one.seconds.append(0.0)
                for chunk in chunks:
                    for (one, adaptive), said in zip(timed, answers):
                        elapsed, found = self._clocked(adaptive, chunk * times)
                        one.seconds[-1] += elapsed / times
                        said.append(tuple(column[: sum(len(members) for members, _ in chunk)] for column in found))
                        progress.update(1)
                if number == 0 and self.some is self.batches:
                    for (one, adaptive), said in zip(timed, answers):
                        columns = tuple(np.concatenate(column) for column in zip(*said))
                        new = self._measured(one.name, one.budget, adaptive, columns)
                        one.right, one.row, one.tokens, one.macs = new.right, new.row, new.tokens, new.macs

    def _told(self, policy: Policy):
        """What `run` returns, out of what the model has said at every length: of one pass an image."""
        row = policy.rows_run(self.outcomes)[0].astype(int)
        return self.outcomes.predicted[np.arange(len(row)), row], row, self.lengths[row]
