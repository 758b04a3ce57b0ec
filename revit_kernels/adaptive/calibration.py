"""How well a probability of being right holds: calibration error, and the area under its ROC curve."""

from __future__ import annotations

import numpy as np


def reliability(probability: np.ndarray, correct: np.ndarray, bins: int = 10) -> list[tuple[int, float, float]]:
    """For each of equally wide bins: images, mean probability and share that is right (NaN where there is no image).

    probability: (images,) in 0 to 1
    correct:     (images,) bool
    """
    place = np.clip((np.asarray(probability, np.float64) * bins).astype(int), 0, bins - 1)
    found = []
    for number in range(bins):
        there = place == number
        means = (probability[there].mean(), correct[there].mean()) if there.any() else (np.nan, np.nan)
        found.append((int(there.sum()), float(means[0]), float(means[1])))
    return found


def calibration_error(probability: np.ndarray, correct: np.ndarray) -> float:
    """The expected calibration error (Guo et al., arXiv:1706.04599): mean |probability - accuracy| over 15 equal bins,
    each weighted by its images.

    probability: (images,) in 0 to 1
    correct:     (images,) bool

    Raises ValueError where there is no image.
    """
    if len(probability) == 0:
        raise ValueError("a calibration error needs at least one image")
    found = reliability(np.asarray(probability, np.float64), np.asarray(correct, bool), 15)
    return sum(n * abs(p - right) for n, p, right in found if n) / len(probability)


def auc(score: np.ndarray, correct: np.ndarray) -> float:
    """The probability that an image with a right answer has a higher score than one with a wrong answer; ties are half.

    score:   (images,)
    correct: (images,) bool

    Returns NaN where all answers are right, or all are wrong.
    """
    correct = np.asarray(correct, bool)
    ones, zeros = int(correct.sum()), int((~correct).sum())
    if not ones or not zeros:
        return float("nan")
    _, place, counts = np.unique(np.asarray(score), return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((rank[correct].sum() - ones * (ones + 1) / 2) / (ones * zeros))
