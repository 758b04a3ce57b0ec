"""Random divisions of a set's images, stratified by class: what is held out, and folds."""

from __future__ import annotations

import numpy as np


def hold_out(targets: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held): sorted indices; every class gives the same share, as near as whole images allow.

    targets:  (images,) classes
    held_out: how many images, or which share of them if below 1

    Raises ValueError where nothing would be held out, or nothing left.
    """
    targets = np.asarray(targets)
    count = 0 if not np.isfinite(held_out) else round(held_out * len(targets)) if held_out < 1 else int(held_out)
    if not 0 < count < len(targets):
        raise ValueError(f"of {len(targets)} images, 1 to {len(targets) - 1} can be held out, got {held_out:g}")
    classes, sizes = np.unique(targets, return_counts=True)
    exact = sizes * (count / len(targets))
    taken = np.floor(exact).astype(int)
    for i in np.argsort(taken - exact, kind="stable")[: count - taken.sum()]:  # largest remainders first
        taken[i] += 1
    held = []
    for label, n in zip(classes, taken):
        members = np.flatnonzero(targets == label)
        held.append(np.random.default_rng([seed, int(label)]).permutation(members)[:n])
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(targets)), held), held


def folds(targets: np.ndarray, k: int, seed: int) -> np.ndarray:
    """(images,) the fold, from 0, of each image: every class is dealt out over the k folds in a seeded order, beginning
    where the class before it ended. Raises ValueError for more folds than images.
    """
    targets = np.asarray(targets)
    if k > len(targets):
        raise ValueError(f"{len(targets)} images cannot be divided into {k} folds")
    of_fold, dealt = np.empty(len(targets), np.int64), 0
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        of_fold[members[order]] = (np.arange(len(members)) + dealt) % k
        dealt += len(members)
    return of_fold
