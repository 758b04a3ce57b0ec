"""What measured policies come to beside one another: at equal speed, and in sentences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from revit_kernels.evaluation.evaluate import Evaluation, Measured

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
    """What could serve: the policies without the lots and lengths that they are compared with, and the oracle."""
    return [one for one in e.policies if one.name not in ("oracle", "random", "fixed")]


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


def _fastest_static(e: Evaluation, allowed: float) -> str:
    within = [one for one in e.static[1:] if one.lost(e.full)[0] <= allowed]
    if not within:
        return "No shorter length alone stays within that."
    best = max(within, key=lambda one: one.speed(e.full))
    h, w = e.menu[best.policy.row]
    lost = _points(*best.lost(e.full), "lost", "gained")
    return f"Of the lengths alone, {h}x{w} stays within that, at {best.speed(e.full):.2f}x and {lost}."


def verdict(e: Evaluation, allowed: float = ALLOWED) -> list[str]:
    """What the numbers come to, in sentences, whichever way they fall.

    allowed: the loss of accuracy against full length up to which the fastest policy is the best, as a share
    """
    full, ones = e.full, candidates(e)
    if not ones:
        return ["Only the lengths alone were measured, no policy."]
    within = [one for one in ones if one.lost(full)[0] <= allowed]
    best = max(within, key=lambda one: one.speed(full)) if within else min(ones, key=lambda one: one.lost(full)[0])
    name = f"{best.name} at a budget of {best.budget}" if best.budget else best.name
    numbers = f"{best.speed(full):.2f}x the images per second of full length, "
    numbers += _points(*best.lost(full), "lost", "gained")
    limit = f"{100 * allowed:g} points"
    if within:
        first = (
            f"With at most {limit} lost, the best of {len(ones)} pairs of policy and budget is {name}: **{numbers}**."
        )
    else:
        first = (
            f"None of {len(ones)} pairs of policy and budget stays within {limit} of full length; nearest is {name}: "
        )
        first += f"{numbers}."
    lines = [f"{first} {_fastest_static(e, allowed)}"]
    lines.append(_placed(against_static(e, best), "the lengths alone and mixes of two of them"))
    return [*lines, _placed(against_random(e, best), "random lengths")] if e.random else lines
