"""Trains a TokenLengthAssigner on what a model said of images at every length."""

from __future__ import annotations

import copy
import hashlib
import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels.adaptive import evidence
from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.calibration import auc, calibration_error
from revit_kernels.adaptive.costs import model_device
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.data.datasets import ImageSet, read_batches
from revit_kernels.data.division import folds
from revit_kernels.data.image_set import set_name
from revit_kernels.devices import to_device
from revit_kernels.engines import engine_of
from revit_kernels.files import write_whole
from revit_kernels.grids import grid_text
from revit_kernels.models.checkpoints import fingerprint
from revit_kernels.models.video import sampled
from revit_kernels.training.augmentation import augmentation
from revit_kernels.training.loader import seed_of, stretched

ALIKE = 4  # images that are cropped and mirrored alike: one by one takes longer than the step itself
TOO_GOOD = 0.5  # of the held-out images' errors: a model that makes fewer on its training images tells too little there


@dataclass(frozen=True)
class AssignerRecipe:
    """How an assigner is trained.

    classes: weight of the class head's losses, of the truth and of the full length's answer each
    warmup:  share of all steps in which the learning rate rises
    crop, flip: of a scout's images, as of `augmentation`; ALIKE images are changed alike
    folds:   parts of the held-out images, where an assigner learns from these: each part is answered by one that
             learnt from the others
    """

    epochs: int = 12
    batch: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.05
    classes: float = 0.5
    warmup: float = 0.3
    crop: str = "none"
    flip: bool = False
    folds: int = 5
    seed: int = 0

    def __post_init__(self):
        if self.folds < 2 or self.epochs < 1 or self.batch < 1:
            given = f"{self.folds}, {self.epochs} and {self.batch}"
            raise ValueError(f"folds must be at least 2, epochs and batch at least 1, got {given}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be above 0 and finite, got {self.lr:g}")


class Targets:
    """What an assigner learns of each image, on the CPU.

    right:  (images, lengths): half whether the answer is right, half the probability that the model gives the truth
    truth:  (images,) classes
    full:   (images, classes) probabilities at the longest length
    """

    def __init__(self, outcomes: Outcomes):
        if outcomes.probabilities is None:
            raise ValueError("an assigner learns from probabilities: write the labels with revit label --probabilities")
        self.truth = torch.from_numpy(np.asarray(outcomes.truth, np.int64))
        p = torch.from_numpy(outcomes.probabilities)
        self.full = p[:, 0].clone()
        given = p.gather(2, self.truth[:, None, None].expand(-1, p.shape[1], 1))[..., 0].float()
        self.right = 0.5 * torch.from_numpy(outcomes.correct).float() + 0.5 * given

    def fingerprint(self, keys) -> str:
        """The sha256 of the images' names and of what is learnt of them."""
        digest = hashlib.sha256("\0".join(keys).encode("utf-8", "backslashreplace"))
        for part in (self.truth, self.right, self.full):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    def loss(self, logits: Tensor, members: Tensor, classes: float) -> Tensor:
        """The mean loss. logits: (images, lengths + classes) of these members"""
        lengths, posterior = logits.tensor_split([self.right.shape[1]], 1)
        of_lengths = F.binary_cross_entropy_with_logits(lengths, self.right[members])
        truth = F.cross_entropy(posterior, self.truth[members])
        return of_lengths + classes * (truth + F.cross_entropy(posterior, self.full[members].float()))


@torch.inference_mode()
def _inputs(assigner: TokenLengthAssigner, model, images: ImageSet, progress) -> Tensor:
    """What the assigner sees of each image, on the CPU: uint8 pixels, or the model's tokens."""
    parts, device = [], next(model.parameters()).device
    size = [patch * rows for patch, rows in zip(assigner.patch, assigner.grid)]
    for indices, pixels in read_batches(images, None, 256):
        if assigner.trunk == "tokens":
            tokens = assigner.tokens(to_device(pixels, device), model)[0]
            parts.append(assigner.inputs(tokens).cpu().clone())
        elif isinstance(pixels, Tensor) and list(pixels.shape[1:3]) == size:
            parts.append(pixels.clone())
        else:
            clips = assigner.frames is not None
            frames = (image[sampled(len(image), assigner.frames)] if clips else image for image in pixels)
            parts.append(torch.stack([stretched(image, size, "bicubic") for image in frames]))
        if progress is not None:
            progress(len(indices))
    return torch.cat(parts)


class _Fit:
    """One training, epoch by epoch: what a step does depends on the seed and its number alone."""

    def __init__(self, assigner: TokenLengthAssigner, targets: Targets, inputs: Tensor, members, recipe, state=None):
        self.assigner, self.targets, self.inputs, self.recipe = assigner.normalise(), targets, inputs, recipe
        self.members, self.state = np.asarray(members), state
        self.steps = -(-len(self.members) // recipe.batch)
        self.optimiser = torch.optim.AdamW(assigner.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, recipe.lr, total_steps=recipe.epochs * self.steps, pct_start=recipe.warmup
        )
        size = tuple(patch * rows for patch, rows in zip(assigner.patch, assigner.grid))
        self.augment = augmentation(size, recipe.crop, recipe.flip)
        self.epoch = 0

    def _augmented(self, images: Tensor) -> Tensor:
        if self.augment is None:
            return images
        parts = images.movedim(-1, -3).split(1 if self.assigner.frames else ALIKE)
        return torch.cat([self.augment(part) for part in parts]).movedim(-3, -1).contiguous()

    def _parts(self) -> dict:
        return {"assigner": self.assigner, "optimiser": self.optimiser, "schedule": self.schedule}

    def resume(self, settings: dict) -> None:
        """Go on from the file of an earlier run of the same settings. Raises ValueError for one of others."""
        if self.state is None or not self.state.exists():
            return
        try:
            found = torch.load(self.state, map_location="cpu", weights_only=True)
            if found["settings"] != settings:
                raise ValueError(f"{self.state} is of a run with other settings: remove it to begin anew")
            for name, part in self._parts().items():
                part.load_state_dict(found[name])
            self.epoch = found["epoch"]
        except (KeyError, TypeError, RuntimeError, OSError, EOFError, pickle.UnpicklingError):
            raise ValueError(f"{self.state} cannot be read: remove it to begin anew") from None

    def run(self, settings: dict | None = None, progress=None) -> None:
        assigner, recipe = self.assigner, self.recipe
        while self.epoch < recipe.epochs:
            assigner.train()
            torch.manual_seed(seed_of(recipe.seed, self.epoch))
            order = torch.from_numpy(np.random.default_rng([recipe.seed, self.epoch]).permutation(self.members))
            for part in order.tensor_split(self.steps):
                x = self.inputs[part]
                x = assigner.patches(self._augmented(x)) if assigner.trunk == "scout" else x
                loss = self.targets.loss(assigner.head(x), part, recipe.classes)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                self.optimiser.step()
                self.schedule.step()
            if not torch.isfinite(loss):
                raise RuntimeError(f"the assigner's loss is not finite: give a smaller --lr than {recipe.lr:g}")
            self.epoch += 1
            if self.state is not None:
                kept = {name: part.state_dict() for name, part in self._parts().items()}
                kept |= {"epoch": self.epoch, "settings": settings}
                write_whole(self.state, lambda temporary, kept=kept: torch.save(kept, temporary))
            if progress is not None:
                progress(len(order))
        assigner.fold()
        with torch.no_grad():
            for weight in assigner.parameters():
                weight.copy_(weight.bfloat16())  # as its file holds them


@torch.random.fork_rng(devices=[])
def train_assigner(
    model,
    outcomes: Outcomes,
    images: ImageSet,
    trunk: str = "scout",
    recipe: AssignerRecipe | None = None,
    *,
    depth: int = 0,
    convolutions: int = 0,
    hidden: int | None = None,
    state: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenLengthAssigner:
    """An assigner for the model, calibrated on images that neither has learnt from.

    model:    resizable, in eval mode, or an engine of one; frozen
    outcomes: of `collect`, with probabilities and `held_out`: it learns from the images that the model learnt from, and
              budgets are solved from its answers for the others
    images:   with the outcomes' keys
    state:    a file that holds the state after every epoch, and from which a run goes on; removed at the end

    Where all outcomes are held out, or the model makes on its training images less than TOO_GOOD of the errors that it
    makes on held-out ones at the shortest length, the assigner learns from the held-out images: of `folds`, the answers
    for each part are of an assigner that has not seen it. `about` says which it was.
    Raises ValueError where outcomes, images and model do not belong together.
    """
    recipe, engine = recipe or AssignerRecipe(), engine_of(model)
    model = engine.model
    outcomes.require(model)
    if trunk != "scout" and (recipe.crop != "none" or recipe.flip):
        raise ValueError(f"crop and flip need the trunk 'scout', got {trunk!r}")
    learnt, apart = outcomes.apart()
    if len(apart) < 20:
        raise ValueError(f"an assigner needs at least 20 held-out images, got {len(apart)}")
    torch.manual_seed(recipe.seed)
    size = {"depth": depth, "convolutions": convolutions, "hidden": hidden, "side": max(usual_size(images))}
    assigner = TokenLengthAssigner.for_model(model, trunk, **size).float()
    about = {"recipe": asdict(recipe), "held_out": len(apart), "learnt": 0 if learnt is None else len(learnt)}
    if learnt is not None:
        errors = [float((~o.correct[:, -1]).mean()) for o in (learnt, apart)]
        about["errors"] = {"learnt": errors[0], "held_out": errors[1]}
        if errors[0] < TOO_GOOD * errors[1]:
            learnt = None
    of_fold = None if learnt is not None else folds(apart.targets, recipe.folds, recipe.seed)
    about["from"] = f"{recipe.folds} folds of held-out images" if learnt is None else "the model's training images"
    assigner.fingerprint = fingerprint(model)
    assigner.about = about
    source = apart if learnt is None else learnt
    targets, source_images = Targets(source), _of(source, images)
    inputs = _inputs(assigner.to(model_device(model)), engine, source_images, progress)
    assigner.cpu()
    settings = {"model": assigner.fingerprint, "labels": targets.fingerprint(source.keys)}
    settings |= {"recipe": asdict(recipe), "config": str(assigner.config)}
    start = copy.deepcopy(assigner)
    fit = _Fit(assigner, targets, inputs, np.arange(len(source)), recipe, state)
    fit.resume(settings)
    fit.run(settings, progress)
    served = TokenLengthAssigner(**assigner.config).to(model_device(model), engine.patch_embed.proj.weight.dtype).eval()

    def answers(o: Outcomes, assigner: TokenLengthAssigner) -> Outcomes:
        served.load_state_dict(assigner.state_dict())
        return _answered(served, engine, o, _of(o, images))

    if learnt is None:
        parts = []
        for fold in range(recipe.folds):
            other = copy.deepcopy(start)
            _Fit(other, targets, inputs, np.flatnonzero(of_fold != fold), recipe).run()
            parts.append((there := np.flatnonzero(of_fold == fold), answers(apart.take(there), other)))
        place = np.argsort(np.concatenate([there for there, _ in parts]), kind="stable")
        columns = {n: np.concatenate([getattr(o, n) for _, o in parts])[place] for n in ("assigner", "mixed", "alone")}
        apart = replace(apart, **columns)
    else:
        apart = answers(apart, assigner)
    assigner.calibrate(apart)
    if state is not None:
        state.unlink(missing_ok=True)
    return assigner.eval()


@torch.inference_mode()
def _answered(assigner: TokenLengthAssigner, engine, outcomes: Outcomes, images: ImageSet) -> Outcomes:
    """The outcomes with the assigner's answers."""
    lengths, device, logits = len(outcomes.menu), model_device(engine), []
    for _, pixels in read_batches(images, None, 256):
        logits.append(assigner(to_device(pixels, device), model=engine).cpu())
    right, posterior = torch.cat(logits).tensor_split([lengths], 1)
    log_p = torch.from_numpy(outcomes.probabilities).float().clamp_min(1e-8).log()  # half precision has zeros
    mixed = torch.stack([evidence.mixed(log_p[:, row], posterior) for row in range(lengths)], 1)
    alone = evidence.alone(posterior, torch.from_numpy(np.asarray(outcomes.truth, np.int64)))
    return replace(outcomes, assigner=right.numpy().copy(), mixed=mixed.numpy(), alone=alone.numpy())


def _of(outcomes: Outcomes, images: ImageSet) -> ImageSet:
    """The images of these outcomes, in their order."""
    place = {key: i for i, key in enumerate(images.keys)}
    missing = [key for key in outcomes.keys if key not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of the labels are of images that {images.name} does not have: {missing[0]}, ..."
        )
    found = images.subset([place[key] for key in outcomes.keys])
    if outcomes.about.get("against") != "full" and not np.array_equal(found.targets, outcomes.targets):
        raise ValueError(f"the labels have other classes for images of the same names than {images.name} has")
    if "images" in outcomes.about and set_name(outcomes.about["images"]) != set_name(images.name):
        warnings.warn(f"the labels are of {outcomes.about['images']}; {images.name} has images of the same names")
    return found


def usual_size(images: ImageSet) -> tuple[int, int]:
    """(height, width) of the image of median size, of nine that lie evenly among all."""
    sizes = [images.pixels(int(i)).shape[-3:-1] for i in np.linspace(0, len(images) - 1, 9)]
    return sorted(sizes, key=max)[4]


def quality(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Of each length, how well the assigner, and a pass's own confidence, tell right answers from wrong ones.

    Returns {"7x7": {"assigner": AUC, "confidence": AUC, "evidence": AUC, "calibration_error": of the assigner}, ...};
    "evidence" is the confidence mixed with the assigner's posterior.
    """
    found = {}
    for row, grid in enumerate(outcomes.menu):
        right, z = outcomes.correct[:, row], outcomes.assigner[:, row].astype(np.float64)
        found[grid_text(grid)] = {
            "assigner": auc(z, right),
            "confidence": auc(outcomes.confidence[:, row], right),
            "evidence": auc(outcomes.mixed[:, row, 0], right),
            "calibration_error": calibration_error(1 / (1 + np.exp(-z)), right),
        }
    return found
