"""Preparation of inference: the model with weights, its policy, its grids and its class names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.data.class_names import read_class_names
from revit_kernels.devices import choose_device, choose_dtype
from revit_kernels.grids import Grid
from revit_kernels.models.checkpoints import description
from revit_kernels.models.registry import SHIPPED, SHIPPED_ASSIGNER, create_model, model_file, resolve
from revit_kernels.modules.lengths import cells
from revit_kernels.serving.clips import ClipRule, sampling
from revit_kernels.serving.infer import GridRule
from revit_kernels.serving.records import Columns

MOST_TOKENS = 16  # times the model's own; attention costs the square of it
WEIGHTS = (".pth", ".pt", ".bin", ".npz")  # files of weights that do not say what model they are for


@dataclass(frozen=True)
class Settings:
    """The settings that decide an image's record, named like the options of `revit infer`.

    model:      timm's name, a .safetensors file, or the folder of a run; None for the ReViT that comes with the package
    checkpoint, pretrained, untrained: where the weights of a name come from
    grids:      the grids to choose from; None where each image keeps its own aspect, within max_tokens patches
    fit:        "crop" or "squash", with grids
    policy:     of adaptive.policies.SERVED; None for the one that the files allow, or none
    assigner, outcomes: files
    budget:     see adaptive.budgets.Budget
    features:   features instead of classes
    top:        classes of a record
    labels:     a file of class names
    frames:     of a clip, for videos
    stride:     frames of the video from one frame of the clip to the next; "uniform" spreads them over the video
    clips:      (views, crops): clips of a video whose answers are averaged
    run_length: leave out repeated tokens of clips, as ClipModel does

    Raises ValueError for settings that exclude each other.
    """

    model: str | None = None
    checkpoint: str | None = None
    pretrained: bool = False
    untrained: bool = False
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    method: str = "resize"
    grids: tuple[Grid, ...] | None = None
    max_tokens: int | None = None
    fit: str | None = None
    policy: str | None = None
    assigner: str | None = None
    outcomes: str | None = None
    budget: str | None = None
    features: bool = False
    top: int = 5
    labels: str | None = None
    frames: int | None = None
    stride: str | None = None
    clips: tuple[int, int] | None = None
    run_length: float | None = None

    @classmethod
    def of(cls, namespace) -> Settings:
        """From an object with these attributes, such as parsed arguments."""
        return cls(**{field.name: getattr(namespace, field.name) for field in fields(cls)})

    def __post_init__(self):
        if self.grids and self.max_tokens:
            raise ValueError("--max-tokens goes with --grids auto; a list of grids says the tokens itself")
        if self.policy and (self.grids or self.max_tokens or self.method == "patch"):
            raise ValueError(
                "--policy gives each image a length of the model's menu: it does not go with --grids, --max-tokens or "
                "--method patch"
            )
        if (self.checkpoint or self.pretrained or self.untrained) and not self.model:
            raise ValueError("--checkpoint, --pretrained and --untrained are of a --model: name one")
        if self.fit and self.model and not self.grids and not self.policy:
            raise ValueError(
                "--fit goes with a list of --grids; with --grids auto the whole image is used, unstretched"
            )
        if self.method == "patch" and self.fit == "squash":
            raise ValueError("--fit squash stretches the image; with --method patch it keeps its size")
        if self.run_length is not None and (self.policy or self.assigner or self.outcomes or self.budget):
            raise ValueError("--run-length is a policy by itself: it goes with no --policy, and nothing of one")
        if self.features and self.labels:
            raise ValueError("--labels names classes; with --features there are none")


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for inference.

    answerer: the engine, or an AdaptiveViT around it
    model:    the engine
    rule:     which grid each image gets
    columns:  what a record holds
    features: features instead of classes
    """

    answerer: object
    model: object
    rule: GridRule | ClipRule
    columns: Columns
    features: bool

    @property
    def fingerprint(self) -> str:
        """The sha256 of all weights that decide an answer."""
        digest = hashlib.sha256()
        modules = [self.model.model if hasattr(self.model, "model") else self.model]
        if isinstance(self.answerer, AdaptiveViT):
            modules.append(self.answerer.assigner)
            digest.update(repr(self.answerer.policy).encode())
        for module in modules:
            for name, tensor in module.state_dict().items() if module is not None else ():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def prepare(settings: Settings, always_plain: bool = False) -> Prepared:
    """Load what the settings name. always_plain: use no policy unless the settings name one

    Raises ValueError for files, devices and policies that are not available; warns if a budget cannot be met.
    """
    name, device = settings.model or str(SHIPPED), choose_device(settings.device)
    model = load_model(
        name,
        checkpoint=settings.checkpoint,
        pretrained=settings.pretrained,
        untrained=settings.untrained,
        device=device,
        dtype=choose_dtype(settings.dtype, device),
    )
    model.patch_method = settings.method
    model = make_engine(model, settings.quantize)
    _check_tokens(settings, cells(model.patch_embed.grid_size))
    adaptive = _adaptive(settings, model, always_plain)
    rule = GridRule(
        model.patch_embed.patch_size,
        settings.max_tokens or cells(model.patch_embed.grid_size),
        settings.grids if adaptive is None else (model.menu[0][-2:],),
        crop=settings.fit != "squash",
        resize=settings.method == "resize",
    )
    rule = _of_clips(settings, name, model, rule)
    return Prepared(adaptive or model, model, rule, _columns(settings, model, adaptive is not None), settings.features)


def _of_clips(settings: Settings, name: str, model, rule: GridRule) -> GridRule | ClipRule:
    """A ClipRule for a model of clips, else `rule`. Raises ValueError for options that the model does not take."""
    options = {"--frames": settings.frames, "--stride": settings.stride, "--clips": settings.clips}
    options |= {"--run-length": settings.run_length}
    if model.per_frame is None:
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"{option} is of videos, and {name} is a model of images")
        return rule
    if settings.method == "patch":
        raise ValueError("--method patch is for models of images")
    if settings.run_length is not None and model.per_frame:
        raise ValueError(f"--run-length needs attention over whole clips, and {name} attends within frames")
    views, crops = settings.clips or (1, 1)
    own = settings.frames or model.num_frames * model.tubelet, settings.stride or model.pretrained_cfg.get("stride")
    return ClipRule(sampling(*own, views), rule, crops, model.tubelet, settings.run_length)


def _check_tokens(settings: Settings, full: int) -> None:
    asked = max((h * w for h, w in settings.grids or ()), default=settings.max_tokens or 0)
    if asked > MOST_TOKENS * full:
        name = "--grids" if settings.grids else "--max-tokens"
        raise ValueError(
            f"{name} asks for {asked:,} patches of an image, {asked / full:,.0f} times the {full:,} that the model was "
            f"made for: {MOST_TOKENS} times are the most"
        )


def _columns(settings: Settings, model, adaptive: bool) -> Columns:
    if settings.features:
        frames = model.per_frame is not None
        return Columns(features=model.num_features, adaptive=adaptive, frames=frames)
    if model.num_classes < 1:
        raise ValueError(f"{settings.model} has no classes: ask for --features")
    return Columns(
        classes=model.num_classes,
        top=min(settings.top, model.num_classes),
        labels=read_labels(settings.labels, model),
        adaptive=adaptive,
        frames=model.per_frame is not None,
    )


def _adaptive(settings: Settings, model, always_plain: bool) -> AdaptiveViT | None:
    """The model with the policy of the settings; None if each image's size decides its length.

    The default is a cascade if the model is a ReViT with held-out outcomes, unless grids, max_tokens or method exclude
    it. Raises ValueError for a policy that these settings do not allow.
    """
    otherwise = settings.grids or settings.max_tokens or settings.method == "patch"
    otherwise = otherwise or always_plain
    file = settings.assigner or (SHIPPED_ASSIGNER if not settings.model else None)
    known = file is not None or settings.outcomes
    if not settings.policy and (otherwise or not known or model.menu is None):
        if settings.assigner or settings.outcomes or settings.budget:
            raise ValueError("--assigner, --outcomes and --budget go with a --policy and a ReViT")
        return None
    if model.menu is None:
        raise ValueError(f"--policy {settings.policy} needs a ReViT: {settings.model} knows one length only")
    parameter = next(model.parameters())
    assigner = None
    if file is not None:
        assigner = TokenLengthAssigner.load(file).to(parameter.device, parameter.dtype)
    outcomes = Outcomes.load(settings.outcomes) if settings.outcomes else None
    policy = settings.policy or ("cascade" if assigner is None or outcomes is not None else "assigner+cascade")
    if policy == "oracle":
        raise ValueError("--policy oracle asks the truth: it is for `revit evaluate`")
    budget = "full" if settings.budget is None else settings.budget
    return AdaptiveViT(model, policy, assigner=assigner, outcomes=outcomes, budget=budget).eval()


def load_model(
    name: str,
    *,
    checkpoint: str | None = None,
    pretrained: bool = False,
    untrained: bool = False,
    device: torch.device,
    dtype: torch.dtype,
):
    """The model with its weights, in eval mode, on the device.

    name:       of timm, or a .safetensors file that says what model it is for, or the folder of a run
    checkpoint: weights for that name, or `pretrained`: timm's own, or `untrained`: random ones

    Raises ValueError for missing or unfitting weights, and for a model whose images are not RGB.
    """
    name = model_file(name)
    is_file = Path(name).suffix == ".safetensors"
    sources = sum((bool(checkpoint), pretrained, untrained, is_file))
    if sources > 1:
        raise ValueError("the weights come from one place: --checkpoint, --pretrained, --untrained or a --model file")
    if Path(name).suffix.lower() in WEIGHTS or (is_file and description(name) is None):
        raise ValueError(f"{name} does not say what model it is for: use --model NAME --checkpoint {name}")
    if not sources:
        resolve(name)  # report a wrong name before missing weights
        raise ValueError(
            f"--model {name} needs weights: --checkpoint FILE, --pretrained (timm's, downloaded), or --untrained "
            "(random, for timing only)"
        )
    model = create_model(name, pretrained=pretrained, checkpoint_path=checkpoint)
    channels = model.patch_embed.proj.in_channels
    if channels != 3:
        raise ValueError(f"--model {name} takes images of {channels} channels; images are decoded to RGB, which has 3")
    return model.to(device, dtype).eval()


def make_engine(model, quantize: str | None):
    """The model's engine. Raises ValueError if it cannot be quantized this way."""
    try:
        return model.engine(quantize=quantize)
    except NotImplementedError as why:
        raise ValueError(f"--quantize {quantize}: {why}") from None


def read_labels(path: str | None, model) -> list[str] | None:
    """The names of the model's classes: from a file, see `read_class_names`, or the model's own.

    Raises ValueError for a file that cannot be read, or whose number of names is not the number of classes.
    """
    if path is None:
        names = model.pretrained_cfg.get("label_names")
        return [str(name) for name in names] if names and len(names) == model.num_classes else None
    try:
        return read_class_names(path, model.num_classes)
    except ValueError as error:
        raise ValueError(f"--labels {path} {error}") from None
