"""How well a probability of being right holds: calibration error, and the area under its ROC curve."""

from __future__ import annotations

import numpy as np


def calibration_error(probability: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error (Guo et al., arXiv:1706.04599): mean |probability - accuracy| over equal bins.

    probability: (images,) in 0 to 1
    correct:     (images,) bool
    bins:        how many equally wide bins; each counts by its images

    Raises ValueError where there is no image.
    """
    if len(probability) == 0:
        raise ValueError("a calibration error needs at least one image")
    probability = np.asarray(probability, np.float64)
    place = np.clip((probability * bins).astype(int), 0, bins - 1)
    gaps = np.bincount(place, probability - np.asarray(correct, np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(probability))


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
