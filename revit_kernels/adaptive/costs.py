"""What an image costs at each length of the menu: measured on a device, or counted in multiply-accumulates."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from revit_kernels.adaptive import evidence
from revit_kernels.grids import Grid, grid_text
from revit_kernels.modules.lengths import check_menu, tokens_of

COUNTED = "multiply-accumulates"


@dataclass(frozen=True)
class Costs:
    """Seconds for one image, as `measure_costs` finds them; or in parts of a full-length pass, as `counted` does.

    menu:       the grids (rows, columns), longest first
    per_length: seconds at each row of the menu, in a packed batch of that length
    assigner:   seconds of the assigner, 0 without one
    repack:     seconds to pick an unsure image out of a batch and send it on to the next stage of a cascade
    launch:     seconds of a pass that do not depend on its images, shared out among those of a whole batch: part of
                `per_length`; a pass of few images, as the later ones of a cascade, takes as long to launch
    reused:     seconds saved by an image of the shortest length that goes on from the assigner's tokens
    device:     the device's name, see `device_name`; COUNTED for multiply-accumulates
    dtype:      the dtype of the model's weights, or what its engine quantizes to
    batch:      images of a batch
    """

    menu: tuple[Grid, ...]
    per_length: tuple[float, ...]
    assigner: float = 0.0
    repack: float = 0.0
    launch: float = 0.0
    reused: float = 0.0
    device: str = ""
    dtype: str = "float32"
    batch: int = 0

    def __post_init__(self):
        if len(self.menu) != len(self.per_length) or not self.menu:
            raise ValueError(f"costs need one time for each of the {len(self.menu)} grids, got {len(self.per_length)}")
        times = np.array([*self.per_length, self.assigner, self.repack, self.launch, self.reused], np.float64)
        if not (np.isfinite(times).all() and (times >= 0).all() and min(self.per_length) > 0):
            raise ValueError(f"costs must be finite, at least 0, and above 0 at each length, got {times.tolist()}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """The costs that `to_json` wrote. Raises ValueError for any other text."""
        try:
            found = json.loads(text)
            menu = check_menu(found.pop("menu"))
            return cls(menu, tuple(found.pop("per_length")), **found)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"this is no JSON of costs: {error}") from None

    def later_pass(self, share: float) -> float:
        """Seconds, an image of the batch, that a pass of this share of it takes beyond what `per_length` says."""
        return self.launch * (1 - share) if share > 0 else 0.0

    def changes(self, before: Costs) -> list[tuple[str, float, float]]:
        """(name, before, now), in parts of a full-length pass, of each length and of the assigner."""
        names = [grid_text(grid) for grid in self.menu] + ["assigner", "repacking"]
        now, then = ((*c.per_length, c.assigner, c.repack) for c in (self, before))
        return [(n, b / before.per_length[0], a / self.per_length[0]) for n, b, a in zip(names, then, now)]


def device_name(device: torch.device | str) -> str:
    """What the device is: the GPU's or the processor's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found:  # a cloud's "AMD EPYC" is any of several
        name += f" family {found['cpu family']} model {found['model']}"
    return name


def model_device(model) -> torch.device:
    return next(model.parameters()).device


def model_dtype(model) -> str:
    """What a model, or an engine of one, computes in."""
    return getattr(model, "quantize", None) or str(next(model.parameters()).dtype).removeprefix("torch.")


def model_macs(model, grid: Grid, blocks: int | None = None, kept: int | None = None) -> int:
    """Multiply-accumulates of one image at a grid, through all blocks or the first few; the head is not counted.

    kept: tokens of a clip that go through the blocks, prefix tokens counted; all, if not given
    """
    tokens = tokens_of(model, grid)
    linears = [m for block in model.blocks[:blocks] for m in block.modules() if isinstance(m, nn.Linear)]
    pairs = model.attention_pairs(grid) if kept is None else kept**2
    attention = 2 * model.embed_dim * pairs * len(model.blocks[:blocks])
    embedding = model.patch_embed.proj.weight[0].numel() * model.embed_dim * tokens
    return sum(m.weight.numel() for m in linears) * (tokens if kept is None else kept) + attention + embedding


def counted(model, assigner=None) -> Costs:
    """The costs where none were measured: multiply-accumulates, in parts of a full-length pass."""
    menu = check_resizable(model)
    full = model_macs(model, menu[0])
    per_length = tuple(model_macs(model, grid) / full for grid in menu)
    own, reused = (0.0, 0.0) if assigner is None else (n / full for n in (assigner.macs(model), assigner.reused(model)))
    return Costs(menu, per_length, own, reused=reused, device=COUNTED, dtype=model_dtype(model))


def check_resizable(model) -> tuple[Grid, ...]:
    """The model's menu. Raises ValueError for a model that was never made resizable."""
    if (menu := getattr(model, "menu", None)) is None:
        raise ValueError("the model knows one length only: make it resizable first, with model.make_resizable(menu)")
    return menu


def _round_robin(works: list[Callable[[], object]], rounds: int, warmup: int, device: torch.device) -> list[float]:
    """Median seconds of each work; all are timed in turn, so that drift hits all equally."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = np.zeros((rounds, len(works)))
    for turn in range(-warmup, rounds):
        for i, work in enumerate(works):
            wait()
            start = time.perf_counter()
            work()
            wait()
            if turn >= 0:
                seconds[turn, i] = time.perf_counter() - start
    return np.median(seconds, 0).tolist()


def _batch_of(images, model, batch: int, device: torch.device) -> Tensor | list[Tensor]:
    """The images on the device: those given, or noise of the size given."""
    if isinstance(images, Tensor) or (isinstance(images, list) and images and isinstance(images[0], Tensor)):
        return images.to(device) if isinstance(images, Tensor) else [image.to(device) for image in images]
    height, width = model.patch_embed.img_size if images is None else images
    generator = torch.Generator().manual_seed(0)
    frames = () if model.per_frame is None else (model.menu[0][0] * model.tubelet,)
    shape = (batch, *frames, height, width, model.in_chans)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def pick(images: Tensor | list[Tensor], indices: list[int]) -> Tensor | list[Tensor]:
    """The images of these indices, on the host known, out of a tensor or a list."""
    if isinstance(images, Tensor):
        return images.index_select(0, torch.tensor(indices, dtype=torch.long).to(images.device))
    return [images[i] for i in indices]


@torch.inference_mode()
def measure_costs(
    model,
    assigner=None,
    images: Tensor | list[Tensor] | tuple[int, int] | None = None,
    batch: int = 64,
    rounds: int = 5,
    warmup: int = 1,
) -> Costs:
    """Time the model at each length of its menu, and its assigner, on the device where they are.

    model:    a resizable VarLenViT
    assigner: a TokenLengthAssigner of the same menu
    images:   uint8 images (images, height, width, channels), clips (clips, frames, height, width, channels), or a list
              of them; or the (height, width) of noise; noise of the size that the model was made for, if not given
    batch:    images of a packed batch, where noise is used
    rounds:   how often each is timed; the median counts
    warmup:   rounds before those that count

    Returns Costs. Raises ValueError for a model that is not resizable, and for numbers below 1.
    """
    check_resizable(model)
    if batch < 1 or rounds < 1 or warmup < 0:
        raise ValueError(f"batch and rounds must be at least 1, warmup at least 0, got {batch}, {rounds} and {warmup}")
    device = model_device(model)
    images = _batch_of(images, model, batch, device)
    number = len(images)
    packings = [model.packing([grid] * number) for grid in model.menu]

    def at(packing):
        return lambda: model(images, packing=packing, channels_last=True)

    logits = model(images, packing=packings[-1], channels_last=True)
    columns = evidence.summary(logits)
    half = columns[:, 0].median()

    def repack():  # what AdaptiveViT does between two passes
        evidence.right(evidence.summary(logits), ((0.0, 1.0, 1.0, 1.0),) * len(model.menu))
        going = (columns[:, 0] <= half).cpu().nonzero()[:, 0].tolist()
        pick(images, going)

    works = {"repack": repack} | {row: at(packing) for row, packing in enumerate(packings)}
    one = model.packing([model.menu[-1]])
    works["alone"] = lambda: model(images[:1], packing=one, channels_last=True)
    if assigner is not None:
        works["assigner"] = lambda: assigner(images, model=model, channels_last=True)
        if assigner.trunk == "tokens":

            def reused():
                _, tokens, packing = assigner.with_tokens(images, model, channels_last=True)
                model.finish(model.run_blocks([tokens, None, None], packing, assigner.depth), packing)

            works["reused"] = reused
    seconds = dict(zip(works, _round_robin(list(works.values()), rounds, warmup, device)))
    saved = 0.0
    if "reused" in seconds:
        saved = max(0.0, seconds["assigner"] + seconds[len(packings) - 1] - seconds["reused"])
        saved = min(saved, seconds[len(packings) - 1] * (1 - 1e-3))  # noise must not make a length free
    # A batch at the shortest length holds its launch: on a busy machine one image alone may seem to take longer.
    least = seconds[len(packings) - 1] / number
    launch = min(max(0.0, seconds["alone"] - least) / number, least)
    return Costs(
        tuple(model.menu),
        tuple(seconds[row] / number for row in range(len(packings))),
        seconds.get("assigner", 0.0) / number,
        2 * seconds["repack"] / number,
        launch,
        saved / number,
        device_name(device),
        model_dtype(model),
        number,
    )
