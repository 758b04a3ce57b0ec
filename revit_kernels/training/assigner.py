"""Trains a TokenLengthAssigner on token-length labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.calibration import calibration_error, fit_temperature
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.data.datasets import ImageSet, read_batches
from revit_kernels.data.division import folds
from revit_kernels.models.checkpoints import fingerprint
from revit_kernels.modules.lengths import cells

LOSSES = ("cross_entropy", "ordinal", "cost")


@dataclass(frozen=True)
class AssignerRecipe:
    """How an assigner is trained.

    loss:    "cross_entropy" with the label; "ordinal": cross-entropy of every "is at least this length enough?";
             "cost": the expected price of the choice, 1 for too few tokens, `excess` times the share of tokens too many
    balance: weigh labels by how rare they are
    folds:   parts of the images, for each of which an assigner learns from the others: their logits are what budgets
             are solved from
    """

    loss: str = "cross_entropy"
    balance: bool = False
    excess: float = 0.25
    epochs: int = 30
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    folds: int = 5
    seed: int = 0

    @classmethod
    def for_kind(cls, kind: str, **given) -> AssignerRecipe:
        """The recipe of a kind of assigner: a micro network of its own takes longer than a head on kept features."""
        own = {"epochs": 10, "folds": 2} if kind == "pixels" else {}
        return cls(**own | {name: value for name, value in given.items() if value is not None})

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {self.loss!r}")
        if self.folds < 2 or self.epochs < 1:
            raise ValueError(f"folds must be at least 2 and epochs at least 1, got {self.folds} and {self.epochs}")


def assigner_loss(logits: Tensor, label: Tensor, menu, recipe: AssignerRecipe, weights: Tensor | None = None) -> Tensor:
    """The mean loss. logits: (images, lengths); label: (images,) rows of the menu; weights: (lengths,) or None"""
    share = torch.ones_like(logits[:, 0]) if weights is None else weights[label]
    if recipe.loss == "cross_entropy":
        each = F.cross_entropy(logits, label, reduction="none")
    elif recipe.loss == "ordinal":
        enough = logits.softmax(-1).cumsum(-1)[:, :-1].clamp(1e-6, 1 - 1e-6)  # P(label is row r or longer)
        rows = torch.arange(logits.shape[1] - 1, device=logits.device)
        each = F.binary_cross_entropy(enough, (label[:, None] <= rows).float(), reduction="none").sum(-1)
    else:
        tokens = torch.tensor([cells(grid) for grid in menu], dtype=torch.float32, device=logits.device)
        extra = recipe.excess * (tokens - tokens[label][:, None]) / tokens[0]
        price = torch.where(torch.arange(len(menu), device=logits.device) > label[:, None], 1.0, extra)
        each = (logits.softmax(-1) * price).sum(-1)
    return (share * each).sum() / share.sum()


def _fit(
    module: nn.Module, forward: Callable, label: Tensor, members: np.ndarray, menu, recipe: AssignerRecipe
) -> None:
    """Train until the epoch at which a tenth of the members, kept apart, was predicted best."""
    rng = np.random.default_rng(recipe.seed)
    torch.manual_seed(recipe.seed)
    order = rng.permutation(members)
    apart, rest = np.split(order, [max(1, len(order) // 10)])
    weights = None
    if recipe.balance:
        counts = torch.bincount(label[torch.from_numpy(rest)], minlength=len(menu)).float()
        weights = torch.where(counts > 0, len(rest) / (counts.clamp_min(1) * (counts > 0).sum()), 0.0)
    steps = recipe.epochs * -(-len(rest) // recipe.batch)
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=steps)
    best, kept = np.inf, None
    for _ in range(recipe.epochs):
        module.train()
        for part in np.array_split(rng.permutation(rest), -(-len(rest) // recipe.batch)):
            loss = assigner_loss(forward(part, True), label[torch.from_numpy(part)], menu, recipe, weights)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        module.eval()
        with torch.no_grad():
            now = assigner_loss(forward(apart, False), label[torch.from_numpy(apart)], menu, recipe, weights).item()
        if now < best:
            best, kept = now, {k: v.clone() for k, v in module.state_dict().items()}
    if kept is None:
        raise RuntimeError(f"the assigner's loss is not finite: give a smaller --lr than {recipe.lr:g}")
    module.load_state_dict(kept)


@torch.inference_mode()
def frozen_features(assigner: TokenLengthAssigner, model, images: ImageSet, batch: int, progress=None) -> Tensor:
    """(images, 2 * dim) float32 on the CPU: what the head sees of each image."""
    device, seen, parts = next(model.parameters()).device, [], []
    head = assigner.head
    assigner.head = lambda features: seen.append(features) or features
    try:
        for indices, pixels in read_batches(images, None, batch):
            pixels = pixels.to(device) if isinstance(pixels, Tensor) else [p.to(device) for p in pixels]
            assigner.with_tokens(pixels, model)
            parts.append(seen.pop().float().cpu())
            if progress is not None:
                progress(len(indices))
    finally:
        assigner.head = head
    return torch.cat(parts).clone()


def _pixels(images: ImageSet, size: tuple[int, int]) -> Tensor:
    """(images, height, width, 3) uint8, resized to the micro network's size."""
    parts = []
    for _, pixels in read_batches(images, None, 256):
        for image in pixels:
            planes = image.permute(2, 0, 1)[None].float()
            planes = F.interpolate(planes, size, mode="bicubic", antialias=True)
            parts.append(planes[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0))
    return torch.stack(parts)


def _augmented(pixels: Tensor) -> Tensor:
    """Half of the images mirrored, each shifted by up to a sixteenth of its height, its edges repeated."""
    count, height, width, _ = pixels.shape
    reach = max(1, height // 16)
    shift = torch.randint(-reach, reach + 1, (2, count, 1))
    rows = (torch.arange(height) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + shift[1]).clamp(0, width - 1)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return pixels[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.random.fork_rng(devices=[])
def train_assigner(
    model,
    outcomes: Outcomes,
    images: ImageSet,
    kind: str = "features",
    recipe: AssignerRecipe | None = None,
    *,
    depth: int | None = None,
    embed_dim: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenLengthAssigner:
    """An assigner for the model, from the labels of images that the model has not learnt from.

    model:    resizable, in eval mode; frozen
    outcomes: of `collect`, with labels
    images:   with the outcomes' keys

    Returns it calibrated, with `outcomes` that hold its logits for every labelled image, each from an assigner that
    had not learnt from that image. Raises ValueError where labels, images and model do not belong together.
    """
    recipe = recipe or AssignerRecipe.for_kind(kind)
    outcomes.require(model)
    outcomes, images = _together(outcomes, images)
    label = torch.from_numpy(outcomes.label)
    torch.manual_seed(recipe.seed)
    assigner = TokenLengthAssigner.for_model(model, kind, depth, embed_dim)
    start = {k: v.clone() for k, v in assigner.state_dict().items()}
    if kind == "features":
        assigner.to(next(model.parameters()).device)
        inputs = frozen_features(assigner, model, images, 256, progress)
        assigner.to("cpu")

        def forward(members, training):
            x = inputs[torch.from_numpy(members)]
            return assigner.head(F.dropout(x, 0.1, training))
    else:
        inputs = _pixels(images, assigner.vit.patch_embed.img_size)

        def forward(members, training):
            x = inputs[torch.from_numpy(members)]
            return assigner(_augmented(x) if training else x)

    of_fold = folds(outcomes.label, recipe.folds, recipe.seed)
    logits = np.zeros((len(outcomes), len(outcomes.menu)), np.float32)
    for fold in range(recipe.folds):
        assigner.load_state_dict(start)
        _fit(assigner, forward, label, np.flatnonzero(of_fold != fold), outcomes.menu, recipe)
        with torch.no_grad():
            logits[of_fold == fold] = forward(np.flatnonzero(of_fold == fold), False).numpy()
    assigner.load_state_dict(start)
    _fit(assigner, forward, label, np.arange(len(outcomes)), outcomes.menu, recipe)
    assigner.temperature.fill_(fit_temperature(logits, outcomes.label))
    assigner.fingerprint = fingerprint(model)
    assigner.outcomes = replace(outcomes, assigner=logits, probabilities=None, fingerprint=assigner.fingerprint)
    return assigner.eval()


def _together(outcomes: Outcomes, images: ImageSet) -> tuple[Outcomes, ImageSet]:
    """The labelled outcomes, and their images in the same order."""
    place = {key: i for i, key in enumerate(images.keys)}
    missing = [key for key in outcomes.keys if key not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of the labels are of images that {images.name} does not have: {missing[0]}, ..."
        )
    labelled = np.flatnonzero(outcomes.label >= 0)
    if len(labelled) < 20:
        raise ValueError(f"an assigner needs at least 20 labelled images, got {len(labelled)}")
    outcomes = outcomes.take(labelled)
    return outcomes, images.subset([place[key] for key in outcomes.keys])


def quality(assigner: TokenLengthAssigner) -> dict[str, float]:
    """How well it predicts the labels that it has not learnt from: accuracy, too short, and calibration error."""
    outcomes = assigner.outcomes
    temperature = float(assigner.temperature)

    def probabilities(t):
        z = outcomes.assigner / t
        z = np.exp(z - z.max(1, keepdims=True))
        return z / z.sum(1, keepdims=True)

    p = probabilities(temperature)
    choice, top = p.argmax(1), p.max(1)
    right = choice == outcomes.label
    lengths = np.array([cells(grid) for grid in outcomes.menu])
    before = probabilities(1.0)
    return {
        "accuracy": float(right.mean()),
        "commonest_label": float(np.bincount(outcomes.label).max() / len(outcomes)),
        "too_short": float((choice > outcomes.label).mean()),
        "mean_tokens": float(lengths[choice].mean()),
        "temperature": temperature,
        "calibration_error_before": calibration_error(before.max(1), before.argmax(1) == outcomes.label),
        "calibration_error": calibration_error(top, right),
    }
