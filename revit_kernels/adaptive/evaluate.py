"""Measures policies on test images: answers, and time from uint8 images in memory to logits, everything counted."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor

from revit_kernels.adaptive.costs import Costs, device_name, measure_costs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import Fixed, Oracle, Policy
from revit_kernels.data.datasets import ImageSet, read_batches
from revit_kernels.models.assigner import model_macs
from revit_kernels.modules.lengths import cells

BATCH_TOKENS = 16384  # of a batch, were all its images at full length


@dataclass
class Measured:
    """One configuration: its answers on all images, and its time on those that were timed.

    name, budget: what it is; `policy` with its numbers
    right, row:   (images,) whether the answer is right, and the menu row that gave it
    tokens:       (images,) of all passes, prefix tokens counted
    macs:         mean multiply-accumulates of an image, the assigner's counted
    seconds:      (rounds,) of all timed images
    timed:        how many they are
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

    def speed(self, full: Measured) -> float:
        """Images a second in multiples of full length's: the median of the rounds' ratios."""
        return float(np.median(np.array(full.seconds) / np.array(self.seconds)))

    def mix(self, rows: int) -> list[float]:
        return [float((self.row == row).mean()) for row in range(rows)]


@dataclass
class Evaluation:
    """Everything that a report says. `static` holds every length alone, the longest first."""

    menu: tuple
    static: list[Measured]
    policies: list[Measured]
    outcomes: Outcomes
    held_out: Outcomes | None
    costs: Costs
    full_macs: float
    assigner_macs: float
    temperature: float
    images: str
    classes: tuple[str, ...]
    about: dict

    @property
    def full(self) -> Measured:
        return self.static[0]


class Images:
    """The test images in memory, in batches; decoding is not what is measured."""

    def __init__(self, images: ImageSet, batch: int, progress: Callable | None = None):
        self.batches, self.count = [], len(images)
        for indices, pixels in read_batches(images, None, batch):
            self.batches.append((indices, pixels))
            if progress is not None:
                progress(len(indices))

    def to(self, device) -> Images:
        self.batches = [
            (i, p.to(device) if isinstance(p, Tensor) else [x.to(device) for x in p]) for i, p in self.batches
        ]
        return self


def run(adaptive: AdaptiveViT, batches, labels: np.ndarray | None = None):
    """(predicted, row, tokens) of all images of the batches, on the host: what a server would do with them."""
    parts = []
    for indices, pixels in batches:
        known = None if labels is None else torch.from_numpy(labels[indices])
        found = adaptive.predict(pixels, channels_last=True, labels=known)
        parts.append((found.logits.argmax(-1), found.choice, found.tokens))
    return tuple(torch.cat(column).cpu().numpy() for column in zip(*parts))


def macs_of(policy: Policy, outcomes: Outcomes, model, assigner) -> float:
    """Mean multiply-accumulates of an image under the policy, the passes of these outcomes counted."""
    per = np.array([model_macs(model, grid) for grid in outcomes.menu], float)
    total = sum(per[rows[rows >= 0]].sum() for rows in policy.rows_run(outcomes)) / len(outcomes)
    return total + (assigner.macs(model) if policy.uses_assigner() else 0)


def check_apart(held_out: Outcomes | None, images: ImageSet) -> None:
    """Raise ValueError where budgets would be solved from images that they are then measured on."""
    if held_out is None:
        return
    both = set(held_out.keys) & set(images.keys)
    if both:
        raise ValueError(
            f"{len(both)} of the test images are among those that budgets are solved from ({min(both)}, ...): evaluate "
            "on other images"
        )


def evaluate(
    model,
    images: ImageSet,
    *,
    assigner=None,
    held_out: Outcomes | None = None,
    policies=("random", "assigner", "cascade", "assigner+cascade", "oracle"),
    budgets=("1.5x", "2x", "3x", "full-0.3"),
    rounds: int = 3,
    timed: int = 2048,
    batch_tokens: int = BATCH_TOKENS,
    say: Callable[[str], None] | None = None,
    bar: Callable | None = None,
) -> Evaluation:
    """Every policy at every budget, and every length alone.

    model:    resizable, in eval mode; assigner: of it, or None
    held_out: outcomes to solve budgets from; the assigner's, if not given
    rounds:   how often each configuration is timed, all in turn, on the first `timed` images
    say:      called with a sentence where a policy cannot meet a budget and is left out
    bar:      makes a progress bar, like tqdm

    Raises ValueError where the test images are among those that budgets are solved from.
    """
    from revit_kernels.training.labels import collect

    held_out = assigner.outcomes if held_out is None and assigner is not None else held_out
    check_apart(held_out, images)
    if held_out is not None:
        held_out.require(model)
    bar = bar or (lambda **_: _NoBar())
    device, prefix = next(model.parameters()).device, model.num_prefix_tokens
    batch = max(1, batch_tokens // (prefix + cells(model.menu[0])))
    with bar(total=len(images), desc="every length", unit=" images") as progress:
        outcomes = collect(model, images, progress=progress.update)
    memory = Images(images, batch).to(device)
    sample = memory.batches[0][1][: min(batch, 256)]
    costs = measure_costs(model, assigner, sample, rounds=5)
    made = [("fixed", "", AdaptiveViT(model, Fixed(row))) for row in range(len(model.menu))]
    made += _policies(model, assigner, held_out, costs, policies, budgets, say or (lambda text: None))
    found = []
    with bar(total=len(made), desc="answers", unit=" runs") as progress:
        for name, budget, adaptive in made:
            predicted, row, tokens = run(adaptive, memory.batches, outcomes.label)
            right = predicted == outcomes.targets
            found.append(Measured(name, budget, adaptive.policy, right, row, tokens, 0.0))
            progress.update(1)
    if assigner is not None:
        outcomes = _with_assigner(outcomes, assigner, model, memory.batches)
    for one in found:
        one.macs = macs_of(one.policy, outcomes, model, assigner)
    _time(made, found, memory.batches, outcomes.label, rounds, timed, device, bar)
    return Evaluation(
        menu=model.menu,
        static=found[: len(model.menu)],
        policies=found[len(model.menu) :],
        outcomes=outcomes,
        held_out=held_out,
        costs=costs,
        full_macs=model_macs(model, model.menu[0]),
        assigner_macs=0.0 if assigner is None else assigner.macs(model),
        temperature=1.0 if assigner is None else float(assigner.temperature),
        images=images.name,
        classes=images.classes,
        about=_about(model, device, batch, rounds, found[0].timed),
    )


class _NoBar:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count=1):
        pass


def _policies(model, assigner, held_out, costs, policies, budgets, say):
    made = []
    for name in policies:
        if name == "oracle":
            made.append(("oracle", "", AdaptiveViT(model, Oracle())))
            continue
        if "assigner" in name and assigner is None:
            say(f"{name} is left out: there is no assigner")
            continue
        if held_out is None:
            say(f"{name} is left out: there are no held-out outcomes to solve its budgets from")
            continue
        for budget in budgets:
            try:
                adaptive = AdaptiveViT(model, name, assigner=assigner, outcomes=held_out, budget=budget, costs=costs)
            except ValueError as unreachable:
                say(str(unreachable))
                continue
            made.append((name, str(budget), adaptive))
    return made


@torch.inference_mode()
def _with_assigner(outcomes: Outcomes, assigner, model, batches) -> Outcomes:
    from dataclasses import replace

    parts = [assigner(pixels, model=model, channels_last=True).float().cpu() for _, pixels in batches]
    return replace(outcomes, assigner=torch.cat(parts).numpy())


def _time(made, found, batches, labels, rounds, timed, device, bar) -> None:
    """Seconds of every configuration on the first images, all in turn: drift of the machine then hits all alike."""
    some, count = [], 0
    for indices, pixels in batches:
        if count >= timed:
            break
        some.append((indices, pixels))
        count += len(indices)
    run(made[0][2], some[:1])
    with bar(total=rounds * len(made), desc="time", unit=" runs") as progress:
        for _ in range(rounds):
            for (_, _, adaptive), one in zip(made, found):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                run(adaptive, some, labels)
                one.seconds.append(time.perf_counter() - start)
                one.timed = count
                progress.update(1)


def _about(model, device, batch: int, rounds: int, timed: int) -> dict:
    versions = {"python": platform.python_version()}
    for package in ("revit_kernels", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": versions,
        "batch": batch,
        "rounds": rounds,
        "timed": timed,
    }


def at_equal_speed(points: list[tuple[float, float]], seconds: float) -> float | None:
    """The accuracy of the best mix of two (seconds, accuracy) points that takes so many seconds an image.

    Points that another beats in both do not count. None where every point is slower; the best of all where there is
    more time than any takes.
    """
    points = sorted(points)
    if not points or seconds < points[0][0]:
        return None
    best = max(accuracy for time, accuracy in points if time <= seconds)
    for i, (t0, a0) in enumerate(points):
        for t1, a1 in points[i + 1 :]:
            if t0 <= seconds <= t1 and t1 > t0:
                best = max(best, a0 + (a1 - a0) * (seconds - t0) / (t1 - t0))
    return best
