"""What measured policies come to beside one another: at equal speed, and in sentences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from revit_kernels.evaluation.evaluate import Evaluation, Measured
from revit_kernels.grids import grid_text

ALLOWED = 0.003  # the loss of accuracy that the verdict allows, as a share


class Gap(NamedTuple):
    """How much more accurate one is than others at its speed, as a share, and the standard error of that."""

    value: float
    error: float


def at_equal_speed(points: list[tuple[float, float]], time: float) -> dict[int, float] | None:
    """The best of these (time, accuracy) points, or mix of two of them, that takes no more time.

    points: in any order; a mix of two has their accuracies and times in proportion
    time:   of an image, in the points' unit

    Returns the share of each point in it, by index; None where every point takes more time.
    """
    within = [i for i, (t, _) in enumerate(points) if t <= time]
    if not within:
        return None
    first = max(within, key=lambda i: (points[i][1], -points[i][0]))
    best, shares = points[first][1], {first: 1.0}
    for i in within:
        for j, (t, accuracy) in enumerate(points):
            if t <= time:
                continue
            share = (time - points[i][0]) / (t - points[i][0])
            mixed = points[i][1] + share * (accuracy - points[i][1])
            if mixed > best:
                best, shares = mixed, {i: 1 - share, j: share}
    return shares


def gap(e: Evaluation, one: Measured, others: list[Measured]) -> Gap | None:
    """How far `one` is above the best mix of two of the others at its measured speed; None where none is as fast.

    The standard error is of the difference image by image.
    """
    times = [1 / other.speed(e.full) for other in others]
    shares = at_equal_speed([(t, other.accuracy) for t, other in zip(times, others)], 1 / one.speed(e.full))
    if shares is None:
        return None
    difference = one.right - sum(share * others[i].right.astype(float) for i, share in shares.items())
    return Gap(float(difference.mean()), float(difference.std() / np.sqrt(len(difference))))


def against_static(e: Evaluation, one: Measured) -> Gap | None:
    return gap(e, one, e.static)


def against_random(e: Evaluation, one: Measured) -> Gap | None:
    return gap(e, one, e.random)


def candidates(e: Evaluation) -> list[Measured]:
    """What could serve with the model's own answers: the policies without their baselines (random lengths, lengths
    alone) and without the oracle."""
    return [one for one in e.policies if one.name not in ("oracle", "random", "fixed") and not one.alone]


def _points(share: float, error: float, more: str, less: str) -> str:
    """0.12 ± 0.10 points lost"""
    return f"{100 * abs(share):.2f} ± {100 * error:.2f} points {more if share >= 0 else less}"


def _placed(found: Gap | None, what: str) -> str:
    if found is None:
        return f"There is nothing as fast to compare it with among {what}."
    start = "At equal measured speed it is"
    if found.value == 0 and found.error == 0:
        return f"{start} level with {what}, image by image."
    doubt = "" if abs(found.value) > 2 * found.error else ", which is not significant (< 2 SE)"
    return f"{start} {_points(found.value, found.error, 'above', 'below')} {what}{doubt}."


def _speed(e: Evaluation, one: Measured) -> str:
    least, most = one.spread(e.full)
    rounds = f" ({least:.2f} to {most:.2f} over {len(one.seconds)} rounds)" if len(one.seconds) > 1 else ""
    return f"{one.speed(e.full):.2f}x{rounds} the images per second of full length, " + _points(
        *one.lost(e.full), "lost", "gained"
    )


def _named(e: Evaluation, one: Measured) -> str:
    if one.name == "fixed":
        return f"{grid_text(e.menu[one.policy.row])} for all images"
    return f"{one.name} at a budget of {one.budget}" if one.budget else one.name


def pays(e: Evaluation, one: Measured) -> bool:
    """Whether it is more accurate, by more than two standard errors, than lengths alone and mixes at its speed."""
    found = against_static(e, one)
    return found is not None and found.value > 2 * found.error


def recommended(e: Evaluation, allowed: float = ALLOWED) -> Measured:
    """What to use: the fastest policy that pays and loses no more than is allowed; else the fastest length alone.

    Where a length alone loses no more and is faster, it is the one to use.
    """
    within = [one for one in candidates(e) if one.lost(e.full)[0] <= allowed and pays(e, one)]
    alone = [one for one in e.static if one.lost(e.full)[0] <= allowed]
    return max([*within, *alone], key=lambda one: one.speed(e.full))


def verdict(e: Evaluation) -> list[str]:
    """What to do and what the numbers show, in sentences: the best is the fastest that loses at most ALLOWED."""
    alone = [one for one in e.policies if one.alone and one.lost(e.full)[0] <= ALLOWED]
    if not alone:
        return _of_the_model(e)
    best = max(alone, key=lambda one: one.speed(e.full))
    said = f"Where the assigner may answer by itself ({100 * best.alone:.0f} % of the images): {_named(e, best)}, "
    return [*_of_the_model(e), f"{said}{_speed(e, best)}."]


def _of_the_model(e: Evaluation) -> list[str]:
    """The verdict on policies whose answers are all the model's."""
    ones, limit = candidates(e), f"{100 * ALLOWED:g} points"
    best = recommended(e)
    if best.name == "fixed":
        lines = [f"Use {_named(e, best)}: **{_speed(e, best)}**."] if best is not e.full else []
        if not ones:
            alike = "Every policy came out as one length for all images, at every budget."
            alike = alike if e.fixed else "Only the lengths alone were measured, no policy."
            others = dict.fromkeys(one.name for one in e.policies if one.name not in ("oracle", "fixed"))
            return lines + [f"Of policies only {' and '.join(others)} was measured." if others else alike]
        lines = lines or [f"Use full length, {_named(e, best)}: no shorter length loses at most {limit}."]
        other = min(ones, key=lambda one: max(one.lost(e.full)[0], ALLOWED) - one.speed(e.full) / 1e6)
        lines[0] += (
            f" Adaptivity does not pay here with at most {limit} lost: the best of {len(ones)} policies is "
            f"{_named(e, other)}, {_speed(e, other)}."
        )
        lines.append(_placed(against_static(e, other), "the lengths alone and mixes of two of them"))
        return lines
    lines = [
        f"Use {_named(e, best)}: **{_speed(e, best)}**. Of {len(ones)} policies it is the fastest that loses at most "
        f"{limit} and is more accurate than lengths alone."
    ]
    lossless = recommended(e, 0.0)
    if lossless is not best and lossless is not e.full:
        lines[0] += f" With nothing lost: {_named(e, lossless)}, {_speed(e, lossless)}."
    lines.append(_placed(against_static(e, best), "the lengths alone and mixes of two of them"))
    return [*lines, _placed(against_random(e, best), "random lengths")] if e.random else lines
