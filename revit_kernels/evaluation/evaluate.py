"""Measures policies on test images: answers, and time from uint8 images in memory to logits, everything counted."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from revit_kernels.adaptive.budgets import Budget
from revit_kernels.adaptive.costs import COUNTED, Costs, device_name, measure_costs, model_macs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import ASSIGNED, POLICIES, Fixed, Oracle, ScoutCascade
from revit_kernels.data.datasets import ImageSet
from revit_kernels.data.image_set import set_name
from revit_kernels.engines import engine_of
from revit_kernels.evaluation.measured import Bench, Measured
from revit_kernels.grids import grid_text
from revit_kernels.modules.lengths import tokens_of
from revit_kernels.training.labels import collect

BATCH_TOKENS = 16384  # of a batch, were all its images at full length
BUDGETS = ("1.5x", "2x", "3x", "full-0.3")


@dataclass
class Evaluation:
    """Everything that a report says.

    static: every length alone, the longest first; macs: of each
    fixed:  (policy, budget, menu row) of each policy that came out as one length for all images
    """

    menu: tuple
    static: list[Measured]
    policies: list[Measured]
    outcomes: Outcomes
    held_out: Outcomes | None
    costs: Costs
    macs: list[float]
    assigner_macs: float
    fixed: list[tuple[str, str, int]]
    images: str
    classes: tuple[str, ...]
    about: dict

    @property
    def full(self) -> Measured:
        return self.static[0]

    @property
    def random(self) -> list[Measured]:
        """All that was measured of random lengths: at budgets, and in the mixes of policies."""
        baselines = [one.baseline for one in self.policies if one.baseline is not None]
        return [one for one in self.policies if one.name == "random"] + baselines

    def calibration(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(name, probability, right), (images,) each, of every length, and of the assigner for the shortest one."""
        o = self.outcomes
        found = [(grid_text(g), o.confidence[:, row], o.correct[:, row]) for row, g in enumerate(self.menu)]
        if o.assigner is not None:
            told = 1 / (1 + np.exp(-o.assigner[:, -1].astype(np.float64)))
            found.append((f"assigner of {grid_text(self.menu[-1])}", told, o.correct[:, -1]))
        return found


def check_apart(outcomes: Outcomes | None, images: ImageSet, use: str) -> None:
    """Raise ValueError where some of the images are among those of the outcomes. use: what these are for

    Images of the same names in sets of different names are a warning: they may be others.
    """
    both = set(outcomes.keys) & set(images.keys) if outcomes is not None else ()
    if not both:
        return
    source = outcomes.about.get("images", images.name)
    if set_name(source) == set_name(images.name):
        raise ValueError(f"{len(both)} of the test images are among those {use} ({min(both)}, ...): take others")
    warnings.warn(
        f"{len(both)} of the test images have the names of images of {source} {use} ({min(both)}, ...): "
        "if they are the same pictures, take others"
    )


def choose(policies: Sequence[str] | None, budgets, assigner, held_out: Outcomes | None, say=None) -> tuple[str, ...]:
    """The policies to measure: those named, or all that are possible and whose answers are all the model's; `say` is
    told which are left out.

    Raises ValueError for a policy or budget that is none, and for a policy named that lacks an assigner or outcomes.
    """
    for budget in budgets:
        Budget.parse(budget)
    lacking = {}
    for name in POLICIES:
        if name in ASSIGNED and assigner is None:
            lacking[name] = "an assigner"
        elif name in ASSIGNED and held_out is not None and held_out.assigner is None:
            lacking[name] = "held-out outcomes with the assigner's answers: those in the assigner's file have them"
        elif name == ScoutCascade.name and assigner.trunk != "scout":
            lacking[name] = "an assigner of the trunk 'scout'"
        elif name not in ("fixed", "oracle") and held_out is None:
            lacking[name] = "held-out outcomes to solve its budgets from: an assigner's, or labels"
    if policies is None:
        wanted = [name for name in POLICIES if name != ScoutCascade.name]
        for name in wanted if say else ():
            if name in lacking:
                say(f"{name} is left out: it needs {lacking[name]}")
        return tuple(name for name in wanted if name not in lacking)
    for name in policies:
        if name not in POLICIES:
            raise ValueError(f"a policy is one of {', '.join(POLICIES)}, got {name!r}")
        if name in lacking:
            raise ValueError(f"the policy {name!r} needs {lacking[name]}")
    return tuple(policies)


class NoBar:
    """What stands in for a progress bar."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count=1):
        pass


def evaluate(
    model,
    images: ImageSet,
    *,
    assigner=None,
    held_out: Outcomes | None = None,
    policies: Sequence[str] | None = None,
    budgets: Sequence[str] = BUDGETS,
    configurations: Sequence[tuple[str, AdaptiveViT]] = (),
    rounds: int = 3,
    timed: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    say: Callable[[str], None] | None = None,
    bar: Callable | None = None,
) -> Evaluation:
    """Every length alone, every policy at every budget, and random lengths in the mix that each policy gave.

    model:     resizable, in eval mode; assigner: of it, or None
    held_out:  outcomes to solve budgets from; the assigner's, if not given
    policies:  of adaptive.policies.POLICIES; all that are possible, if not given. "random" draws lengths: the best mix
               of two at each budget, and the mix that each other policy gave
    configurations: (name, AdaptiveViT) of the same model, to measure as well
    rounds:    how often each configuration is timed, all in turn
    timed:     on how many of the images, stratified by class; on all, if not given
    say:       called with a sentence where a policy cannot meet a budget, and the nearest is measured
    bar:       makes a progress bar, like tqdm

    Raises ValueError where the test images are among those that budgets are solved from, and for what `choose` does.
    """
    held_out = assigner.outcomes if held_out is None and assigner is not None else held_out
    check_apart(held_out, images, "that budgets are solved from")
    check_apart(None if assigner is None else assigner.outcomes, images, "that the assigner was calibrated on")
    if held_out is not None:
        held_out.require(model)
        if not len(held_out):
            raise ValueError("none of the labels are of images that were held out: budgets cannot be solved from them")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for name, adaptive in configurations:
        if adaptive.model is not model:
            raise ValueError(f"the configuration {name!r} is of another model than the one that is evaluated")
        if name in ("fixed", "random", "oracle"):
            raise ValueError(f"a configuration cannot be named {name!r}: that is what it is compared with")
    say = say or (lambda text: None)
    engine = engine_of(model)
    chosen = choose(policies, budgets, assigner, held_out, say)
    bar = bar or (lambda **_: NoBar())
    batch = max(1, batch_tokens // tokens_of(model, model.menu[0]))
    with bar(total=len(images), desc="every length", unit=" images") as progress:
        outcomes = collect(engine, images, assigner=assigner, progress=progress.update)
    bench = Bench(model, images, outcomes, batch, rounds, timed, bar)
    sample = bench.batches[0][1][: min(batch, 256)]
    costs = None if assigner is None else assigner.costs_for(engine)
    kept = costs is not None and costs.device != COUNTED
    if not kept:
        costs = measure_costs(engine, assigner, sample, rounds=9)
    made = [("fixed", "", AdaptiveViT(engine, Fixed(row))) for row in range(len(model.menu))]
    solved, fixed = _policies(engine, assigner, held_out, costs, chosen, budgets, say)
    made += [*solved, *((name, "", adaptive) for name, adaptive in configurations)]
    found = bench.measure(made, "random" in chosen)
    return Evaluation(
        menu=model.menu,
        static=found[: len(model.menu)],
        policies=found[len(model.menu) :],
        outcomes=outcomes,
        held_out=held_out,
        costs=costs,
        macs=[float(model_macs(model, grid)) for grid in model.menu],
        assigner_macs=0.0 if assigner is None else float(assigner.macs(model)),
        fixed=fixed,
        images=images.name,
        classes=images.classes,
        about=_about(model, assigner, images, batch, rounds, bench.timed) | {"costs_kept": kept},
    )


def _policies(model, assigner, held_out, costs, policies, budgets, say):
    """(name, budgets, AdaptiveViT) of each policy once, and (name, budget, menu row) of those that are one length."""
    made, fixed = {}, []
    for name in policies:
        if name == "oracle":
            made[name] = (name, [], AdaptiveViT(model, Oracle(len(model.menu))))
        if name in ("oracle", "fixed"):  # every length alone is measured anyway
            continue
        outcomes = None if assigner is not None and held_out is assigner.outcomes else held_out
        for budget in budgets:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", UserWarning)
                adaptive = AdaptiveViT(model, name, assigner=assigner, outcomes=outcomes, budget=budget, costs=costs)
            for warning in told:
                say(str(warning.message))
            if isinstance(adaptive.policy, Fixed):
                fixed.append((name, str(budget), adaptive.policy.row))
            else:
                made.setdefault(adaptive.policy.to_json(), (name, [], adaptive))[1].append(str(budget))
    return [(name, ", ".join(of), adaptive) for name, of, adaptive in made.values()], fixed


def _weights(module) -> str:
    """The sha256 of a module's weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _about(model, assigner, images: ImageSet, batch: int, rounds: int, timed: int) -> dict:
    parameter = next(model.parameters())
    versions = {"python": platform.python_version()}
    for package in ("revit_kernels", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "device": device_name(parameter.device),
        "threads": torch.get_num_threads() if parameter.device.type == "cpu" else None,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": versions,
        "batch": batch,
        "rounds": rounds,
        "timed": timed,
        "images": images.fingerprint(),
        "assigner": None if assigner is None else _weights(assigner),
        "assigner_about": None if assigner is None else {"trunk": assigner.trunk} | assigner.about,
    }
