"""From what a model says of itself to the probability that it is right: isotonic regression, temperature, and ECE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revit_kernels.device_cache import DeviceCache

TILT = 1e-4  # share of the confidence itself in a calibrated probability: it orders images that isotonic blocks tie

_constants = DeviceCache(256)


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor on the device, copied once and without waiting for the device."""
    return _constants.get((values, dtype), device, lambda: [torch.tensor(values, dtype=dtype)])[0]


def pool_adjacent_violators(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Isotonic regression: the non-decreasing function of x with the least squared error to y.

    x: (points,) numbers, in any order; points of equal x are one point of their mean
    y: (points,) numbers, or booleans

    Returns the blocks on which the function is constant, in ascending order: (blocks,) mean x, value, and points, in
    float64.
    """
    distinct, place = np.unique(np.asarray(x, np.float64), return_inverse=True)
    weights = np.bincount(place, minlength=len(distinct)).astype(np.float64)
    sums = np.bincount(place, np.asarray(y, np.float64), minlength=len(distinct))
    blocks = []  # of [sum of x, sum of y, points]
    for value, total, weight in zip((distinct * weights).tolist(), sums.tolist(), weights.tolist()):
        block = [value, total, weight]
        while blocks and blocks[-1][1] * block[2] >= block[1] * blocks[-1][2]:
            block = [a + b for a, b in zip(blocks.pop(), block)]
        blocks.append(block)
    sums_x, sums_y, points = np.array(blocks, np.float64).reshape(-1, 3).T
    return sums_x / points, sums_y / points, points


@dataclass(frozen=True)
class Calibration:
    """A strictly increasing map from confidence to the probability of being right, linear between its knots.

    confidence:  (knots,) ascending, from 0 to 1
    probability: (knots,) ascending, what a confidence there is worth
    """

    confidence: tuple[float, ...] = (0.0, 1.0)
    probability: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self):
        knots = np.array([self.confidence, self.probability], np.float64) if self._even() else np.zeros((2, 0))
        if knots.shape[1] < 2 or not (np.diff(knots) > 0).all() or not ((knots >= 0) & (knots <= 1)).all():
            raise ValueError(
                "a calibration needs two knots or more, ascending in confidence and probability, in 0 to 1"
            )

    def _even(self) -> bool:
        return len(self.confidence) == len(self.probability)

    @classmethod
    def fit(cls, confidence: np.ndarray, correct: np.ndarray) -> Calibration:
        """Centred isotonic regression (Oron and Flournoy, 2017): each block's value at its mean confidence.

        confidence: (images,) in 0 to 1
        correct:    (images,) bool

        A small part (TILT) of the confidence itself is mixed in, so that no two confidences get one probability.
        Raises ValueError where there is no image.
        """
        if len(confidence) == 0:
            raise ValueError("a calibration needs at least one image")
        # before pooling: the softmax of float32 may round to above 1, and two blocks must not meet there
        x, y, _ = pool_adjacent_violators(np.clip(confidence, 0.0, 1.0), correct)
        if x[0] > 0:
            x, y = np.append(0.0, x), np.append(y[0], y)
        if x[-1] < 1:
            x, y = np.append(x, 1.0), np.append(y, y[-1])
        y = (1 - TILT) * y + TILT * x
        return cls(tuple(x.tolist()), tuple(y.tolist()))

    def __call__(self, confidence: Tensor) -> Tensor:
        """The probability of being right, float64 of the shape of `confidence`, without host synchronisation."""
        x = confidence.double().clamp(0, 1)
        knots = constant(self.confidence, torch.float64, x.device)
        values = constant(self.probability, torch.float64, x.device)
        right = torch.searchsorted(knots, x, right=True).clamp(1, len(self.confidence) - 1)
        left = right - 1
        slope = (values[right] - values[left]) / (knots[right] - knots[left])
        return values[left] + (x - knots[left]) * slope


def calibrate(outcomes) -> tuple[Calibration, ...]:
    """One calibration for each length of the menu, from held-out Outcomes."""
    return tuple(
        Calibration.fit(outcomes.confidence[:, row], outcomes.correct[:, row]) for row in range(len(outcomes.menu))
    )


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


def fit_temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """The temperature at which softmax(logits / temperature) gives the labels the highest likelihood.

    logits: (images, lengths)
    label:  (images,) row of the menu; images with a label below 0 do not count

    Returns a number from 0.05 to 20; 1 where no image has a label.
    """
    known = np.asarray(label) >= 0
    if not known.any():
        return 1.0
    z = np.asarray(logits, np.float64)[known]
    picked = np.asarray(label)[known][:, None]
    z = z - z.max(1, keepdims=True)

    def loss(log_scale: float) -> float:
        scaled = z * np.exp(log_scale)
        return float((np.log(np.exp(scaled).sum(1)) - np.take_along_axis(scaled, picked, 1)[:, 0]).mean())

    low, high = np.log(0.05), np.log(20.0)  # convex in the scale: unimodal in its logarithm
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(48):
        first, second = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, second) if loss(first) <= loss(second) else (first, high)
    return float(np.exp(-(low + high) / 2))
