"""Token-length labels: what a ReViT says of every image at every length, in one packed forward."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from revit_kernels.adaptive import evidence
from revit_kernels.adaptive.outcomes import Outcomes, label_of, name_of
from revit_kernels.data.datasets import ImageSet, read_batches
from revit_kernels.data.sets import save_arrays
from revit_kernels.devices import to_device
from revit_kernels.engines import engine_of
from revit_kernels.files import is_empty, write_whole
from revit_kernels.models.checkpoints import fingerprint
from revit_kernels.modules.lengths import tokens_of
from revit_kernels.training.distillation import packed_logits

SAID = {"predicted", "confidence", "margin", "entropy"}  # what every shard holds
SHARD = 1024  # images after which what was found is written, to go on from


@torch.inference_mode()
def _ask(
    model, images: ImageSet, members, batch_tokens: int, keep: bool, progress, assigner=None, against: str = "truth"
) -> dict[str, np.ndarray]:
    """The columns of some images, (images, lengths, ...) each."""
    device, layout = next(model.parameters()).device, (model.menu, model.num_prefix_tokens, model.per_frame)
    tokens = sum(tokens_of(model, grid) for grid in model.menu)
    found: dict[str, list[np.ndarray]] = {}
    for indices, pixels in read_batches(images, members, max(1, batch_tokens // tokens)):
        pixels = to_device(pixels, device)
        logits = packed_logits(model, pixels, *layout, channels_last=True).transpose(0, 1)
        columns = {"predicted": logits.argmax(-1).int()}  # logits: (images, lengths, classes)
        columns |= dict(zip(("confidence", "margin", "entropy"), evidence.summary(logits).unbind(-1)))
        if keep:
            columns["probabilities"] = logits.float().softmax(-1).half()
        if assigner is not None:
            rows = len(model.menu)
            columns["assigner"], posterior = assigner(pixels, model=model).tensor_split([rows], 1)
            columns["mixed"] = torch.stack([evidence.mixed(logits[:, row], posterior) for row in range(rows)], 1)
            truth = torch.from_numpy(np.asarray(images.targets)[indices]).to(device) if against == "truth" else None
            columns["alone"] = evidence.alone(posterior, logits[:, 0].argmax(-1) if truth is None else truth)
        for name, values in columns.items():
            found.setdefault(name, []).append(values.cpu().numpy())
        if progress is not None:
            progress(len(indices))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def collect(
    model,
    images: ImageSet,
    *,
    unsolved: str = "smallest",
    rule: str = "first_correct",
    against: str = "truth",
    probabilities: bool = False,
    assigner=None,
    batch_tokens: int = 16384,
    progress: Callable[[int], None] | None = None,
    partial: Path | None = None,
) -> Outcomes:
    """What the model says of the images at every length of its menu.

    model:         resizable, in eval mode
    unsolved, rule: as of `label_of`
    against:       "truth", or "full": right is what the longest length answers, whatever the truth
    probabilities: keep those of all classes
    assigner:      a TokenLengthAssigner of the model, to keep its answers too; not together with `partial`
    batch_tokens:  tokens of one packed batch, every length of an image counted
    progress:      called with the number of images just done
    partial:       a folder to keep what was found in until all is, and to go on from; what is there of another model
                   or of other images is dropped, with a warning

    Raises ValueError for a model that is not resizable, for one that has other classes than the images where these are
    the truth, and for a `partial` that holds something else.
    """
    if model.menu is None:
        raise ValueError("the model is not resizable: labels need a model with a menu of lengths")
    if against == "truth" and model.num_classes != len(images.classes):
        raise ValueError(f"the model has {model.num_classes} classes, {images.name} has {len(images.classes)}")
    if against not in ("truth", "full"):
        raise ValueError(f"against must be 'truth' or 'full', got {against!r}")
    label_of(np.zeros((0, 1), bool), unsolved, rule)
    mark, engine = fingerprint(model), engine_of(model)
    shards = [range(i, min(i + SHARD, len(images))) for i in range(0, len(images), SHARD)]
    if partial is not None:
        dtype = str(next(model.parameters()).dtype)
        settings = {"model": mark, "images": images.fingerprint(), "dtype": dtype, "shard": SHARD}
        _begin(partial, settings | {"probabilities": probabilities})
    parts = []
    for number, members in enumerate(shards):
        file = partial / f"{number:05d}.npz" if partial is not None else None
        part = _kept(file)
        if part is None:
            part = _ask(engine, images, members, batch_tokens, probabilities, progress, assigner, against)
            if file is not None:
                write_whole(file, lambda temporary, part=part: save_arrays(temporary, part))
        elif progress is not None:
            progress(len(members))
        parts.append(part)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    truth = images.targets[:, None] if against == "truth" else columns["predicted"][:, :1]
    correct = columns["predicted"] == truth
    about = {"images": images.name, "unsolved": unsolved, "rule": rule, "against": against}
    return Outcomes(
        menu=model.menu,
        keys=tuple(map(name_of, images.keys)),
        targets=np.asarray(images.targets),
        correct=correct,
        label=label_of(correct, unsolved, rule),
        fingerprint=mark,
        about=about,
        **columns,
    )


def _kept(path: Path | None) -> dict[str, np.ndarray] | None:
    """What `save_arrays` wrote; None where there is nothing, or nothing that can be read."""
    if path is None or not path.exists():
        return None
    try:
        with np.load(path) as kept:
            found = {name: kept[name] for name in kept.files}
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return None
    return found if SAID <= found.keys() else None


def _begin(folder: Path, settings: dict) -> None:
    """Make the folder of shards, or keep the one there is if it was begun with these settings."""
    told = folder / "settings.json"
    if not told.exists() and not is_empty(folder):
        raise ValueError(f"{folder} holds no labels that were begun: move it away, or give another folder")
    if told.exists():
        try:
            found = json.loads(told.read_bytes())
        except (ValueError, RecursionError):
            found = None
        found = found if isinstance(found, dict) else {}
        if found != settings:
            differ = sorted(name for name in settings if found.get(name) != settings[name])
            warnings.warn(f"the labels begun in {folder} are of another {' and '.join(differ)}: they begin anew")
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not told.exists():
        write_whole(told, lambda temporary: temporary.write_text(json.dumps(settings)))


def join(parts: list[Outcomes]) -> Outcomes:
    """The outcomes of several models, each of the images that it has not learnt from: k-fold labels.

    They are of no one model, so `require` can check but their menu: whom they serve is the caller's word. `about` has
    the folds' fingerprints. Raises ValueError where their menus differ, or an image is in two.
    """
    if len({part.menu for part in parts}) != 1:
        raise ValueError(f"the models of the folds have different menus: {sorted({part.menu for part in parts})}")
    keys = tuple(key for part in parts for key in part.keys)
    if len(set(keys)) != len(keys):
        raise ValueError("an image is in two folds")
    names = ("targets", "correct", "predicted", "confidence", "margin", "entropy", "label", "probabilities", "held_out")
    arrays = {
        name: None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])
        for name in names
    }
    about = parts[0].about | {"folds": [part.fingerprint for part in parts]}
    return Outcomes(menu=parts[0].menu, keys=keys, fingerprint="", about=about, **arrays)


def fit_images(images, model, by_class: bool = True):
    """The images with targets numbered as the model's classes are, and large JPEGs decoded no larger than it needs."""
    names = model.pretrained_cfg.get("label_names") if by_class else None
    if names and len(names) == model.num_classes:
        images = images.with_classes(names)
    longest = tuple(g * p for g, p in zip(model.menu[0][-2:], model.patch_embed.patch_size))
    return images.reduced(lambda size: longest)
