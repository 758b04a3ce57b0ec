"""What is known of an image before and after its first pass, and the probability that follows of being right."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from revit_kernels.device_cache import constant

SHARES = (0.5, 0.7)  # of the assigner's class posterior in the mixed confidences
RIDGE = 1.0  # of the logistic regressions, on standardised columns
STEPS = 30  # of Newton's method, at most


def summary(logits: Tensor) -> Tensor:
    """(images, 3) float32: confidence, margin and entropy of the softmax. logits: (images, ..., classes)"""
    p = logits.float().softmax(-1)
    top = p.topk(min(2, p.shape[-1]), -1).values
    margin = top[..., 0] - top[..., -1] if p.shape[-1] > 1 else top[..., 0]
    return torch.stack([top[..., 0], margin, -(p * p.clamp_min(1e-30).log()).sum(-1)], -1)


def mixed(logits: Tensor, posterior: Tensor) -> Tensor:
    """(images, 4) float32: what an assigner's class posterior adds to a pass's answer. Columns: the confidence mixed at
    each of SHARES, the log posterior of the answer, the posterior's entropy.

    logits:    (images, classes) of the pass
    posterior: (images, classes) logits of the assigner's class head

    A mixed confidence is softmax((1 - share) log p + share log q) at the pass's answer; with p of the pass, q of the
    assigner.
    """
    log_p, log_q = logits.float().log_softmax(-1), posterior.float().log_softmax(-1)
    answer = log_p.argmax(-1, keepdim=True)
    both = [((1 - share) * log_p + share * log_q).softmax(-1).gather(-1, answer).squeeze(-1) for share in SHARES]
    entropy = -(log_q.exp() * log_q.clamp_min(-100)).sum(-1)
    return torch.stack([*both, log_q.gather(-1, answer).squeeze(-1).clamp_min(-100), entropy], -1)


def alone(posterior: Tensor, truth: Tensor) -> Tensor:
    """(images, 4) float32: the `summary` of an assigner's class posterior, and 1 where its class is right.

    posterior: (images, classes) logits of the assigner's class head; truth: (images,) classes
    """
    return torch.cat([summary(posterior), (posterior.argmax(-1) == truth)[:, None].float()], 1)


def right(columns: Tensor, weights: tuple[tuple[float, ...], ...]) -> Tensor:
    """(images, lengths) float32: logistic regressions of the probability of being right.

    columns: (images, columns)
    weights: for each length the constant, then a number a column
    """
    table = constant(("evidence", weights), columns.device, lambda: torch.tensor(weights, dtype=torch.float64))
    # Neither a product of matrices nor a sum over an axis: an image's must not depend on how many images there are.
    total = table[:, 0].expand(len(columns), -1)
    for column, weight in zip(columns.double().unbind(1), table[:, 1:].unbind(1)):
        total = total + column[:, None] * weight
    return probability(total)


def probability(logits: Tensor) -> Tensor:
    """The sigmoid, float32: rounded from float64, whose last bit depends on an image's place in the batch."""
    return logits.double().sigmoid().float()


def fit(columns: np.ndarray, correct: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """The weights that `right` takes, by penalised maximum likelihood.

    columns: (images, columns)
    correct: (images, lengths) bool
    """
    x = np.asarray(columns, np.float64)
    mean, scale = x.mean(0), x.std(0) + 1e-9
    x = np.column_stack([np.ones(len(x)), (x - mean) / scale])
    penalty = np.diag([1e-6] + [RIDGE] * (x.shape[1] - 1))
    found = []
    for y in np.asarray(correct, np.float64).T:
        w = np.zeros(x.shape[1])
        for _ in range(STEPS):
            p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
            slope = (x * (p * (1 - p) + 1e-9)[:, None]).T @ x + penalty
            step = np.linalg.solve(slope, x.T @ (y - p) - penalty @ w)
            w = w + step
            if np.abs(step).max() < 1e-8:
                break
        own = w[1:] / scale
        found.append((float(w[0] - (own * mean).sum()), *map(float, own)))
    return tuple(found)
