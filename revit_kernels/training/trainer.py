"""Trains a ReViT: every step takes each image at several lengths of the menu, in one packed forward and backward."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from revit_kernels.grids import grid_text
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.vit import VarLenViT
from revit_kernels.training import sharded
from revit_kernels.training.distillation import Objective, packed_logits
from revit_kernels.training.labels import collect
from revit_kernels.training.loader import Augmented, Order, load, seed_of
from revit_kernels.training.optimiser import OPTIMISERS, learning_rate
from revit_kernels.training.run_folder import RunFolder

LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Recipe:
    """How a ReViT is trained.

    batch:        images of a step in each process; every one is seen at every length of the step
    accumulate:   parts that a step's images are taken in, to need less memory
    lengths:      lengths of a step: the longest, and others drawn anew for each step; 0: all of the menu
    teacher:      whose answers at the longest length teach the shorter ones: the model's own ("self"), or those of the
                  moving average of its weights ("average", which needs ema)
    optimiser:    "adamw", or "muon": Muon for the weights of the blocks' linear layers, AdamW for the rest
    warmup:       share of all steps in which the learning rate rises
    least_lr:     share of the learning rate at the last step
    layer_decay:  each layer's learning rate is so many times that of the layer above it
    clip:         the norm that gradients are clipped to, 0 for none
    ema:          decay of the moving average of the weights, 0 for none; at step n (1 + n) / (10 + n) where that is
                  less, so that the average of a short run is not that of its first steps
    autocast:     compute in bfloat16 where torch's autocast says so; weights stay float32
    """

    epochs: float = 10.0
    batch: int = 64
    accumulate: int = 1
    lengths: int = 0
    teacher: str = "self"
    optimiser: str = "adamw"
    lr: float = 1e-3
    least_lr: float = 0.01
    warmup: float = 0.05
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    clip: float = 1.0
    ema: float = 0.0
    autocast: bool = False
    seed: int = 0
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self):
        for name in ("epochs", "batch", "accumulate", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate, got {self.batch} and {self.accumulate}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")
        if self.lengths < 0 or self.lengths == 1:
            raise ValueError(
                f"lengths must be 0 (all) or at least 2, the longest and one that it teaches, got {self.lengths}"
            )
        if self.teacher not in ("self", "average"):
            raise ValueError(f'teacher must be "self" or "average", got {self.teacher!r}')
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {self.optimiser!r}")
        if self.teacher == "average" and not self.ema:
            raise ValueError("the average of the weights can teach only where one is kept: set ema")


class Trainer:
    """One run: a resizable model, its images, a recipe, and the folder that it is kept in.

    model:   a VarLenViT made resizable, on its device
    images:  Augmented training images
    folder:  a RunFolder (in every process the same; only the first writes)
    mix:     of augmentation.mixing, or None
    score:   called with a model, gives {"name": number, ...} for the log; run at the end of every epoch

    fsdp:    share weights, gradients and moments out among the processes; the state is then written by all of them, and
             any number of processes goes on from it

    With torch.distributed initialised, the gradients are averaged over the processes. Raises ValueError in the first
    step where it leaves a parameter without a gradient.
    """

    def __init__(
        self,
        model,
        images: Augmented,
        recipe: Recipe,
        folder: RunFolder | None = None,
        *,
        mix: Callable | None = None,
        score: Callable | None = None,
        workers: int = 0,
        fsdp: bool = False,
    ):
        if model.menu is None:
            raise ValueError("the model must be made resizable first")
        if fsdp and recipe.optimiser != "adamw":
            raise NotImplementedError("Muon needs whole matrices, and FSDP shares them out: take adamw")
        if fsdp and recipe.ema:
            raise NotImplementedError("an average of the weights is not kept with FSDP: leave out ema")
        if recipe.lengths > len(model.menu):
            raise ValueError(
                f"a step of {recipe.lengths} lengths needs as many in the menu, which has {len(model.menu)}"
            )
        self.model, self.images, self.recipe, self.folder = model, images, recipe, folder
        self.mix, self.score, self.workers = mix, score, workers
        self.device = next(model.parameters()).device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.sampled = 0 < recipe.lengths < len(model.menu)
        self.fsdp, self.forward, self.whole = fsdp, model, None
        if fsdp:
            self.whole = copy.deepcopy(model).cpu() if self.rank == 0 else None  # scored and written
            if self.world > 1:
                sharded.shard(model, recipe.autocast)
        elif self.world > 1:
            self.forward = DistributedDataParallel(model, find_unused_parameters=self.sampled)
        make = OPTIMISERS[recipe.optimiser]
        self.optimiser = make(model, recipe.lr, recipe.weight_decay, recipe.layer_decay)
        self.average = None
        if recipe.ema:
            self.average = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self.steps_an_epoch = Order(len(images), recipe.batch, recipe.seed, 0, self.rank, self.world).steps
        self.steps = max(1, round(recipe.epochs * self.steps_an_epoch))
        self.step = 0
        self.losses: Tensor | None = None  # each length's, added up over the steps since the log's last row
        self.logged = 0  # those steps
        self.checked = self.sampled  # that a step touches every parameter, as averaging over processes needs

    def _average(self, averaged, weights, count) -> None:
        """A step of the moving average, see Recipe.ema."""
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(averaged, weights, count)

    @property
    def best_weights(self) -> VarLenViT:
        """The model to use: the average of the weights where there is one; with FSDP, in the first process, the whole
        one as it was at the end of the last epoch."""
        if self.whole is not None:
            return self.whole
        return self.model if self.average is None else self.average.module

    # ------------------------------------------------------------------ one step

    def lengths_of(self, step: int) -> tuple[int, ...]:
        """The rows of the menu that a step takes, the longest first; the same in every process."""
        others = range(1, len(self.model.menu))
        if self.sampled:
            generator = np.random.default_rng((self.recipe.seed, step))
            others = sorted(generator.choice(others, self.recipe.lengths - 1, replace=False).tolist())
        return 0, *others

    def train_step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One update; returns (lengths of the menu,), each length's own loss over the images of all processes, NaN for
        those that the step left out.

        images: (batch, height, width, 3) uint8, or clips (batch, frames, height, width, 3)
        """
        recipe = self.recipe
        # Drop path, dropout and mixing draw from torch's generator: a step's draws depend on its number alone.
        torch.manual_seed(seed_of(recipe.seed, self.step, self.rank))
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        lr = learning_rate(
            self.step, self.steps, round(recipe.warmup * self.steps), recipe.lr, recipe.lr * recipe.least_lr
        )
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["scale"]
        losses, lengths = [], self.lengths_of(self.step)
        parts = list(zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate)))
        for i, (part, target) in enumerate(parts):
            last = i == len(parts) - 1
            wait = nullcontext() if last or self.world == 1 or self.fsdp else self.forward.no_sync()
            if self.fsdp and self.world > 1:
                self.model.set_requires_gradient_sync(last)
            with wait, torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.autocast):
                layout = self.model.menu, self.model.num_prefix_tokens, self.model.per_frame
                logits = packed_logits(self.forward, part, *layout, lengths, channels_last=True)
                loss, own = recipe.objective(logits, target, self._taught(part, layout))
                (loss / len(parts)).backward()
            losses.append(own)
        if self.world > 1 and not self.checked:
            self._check_gradients()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        mean = torch.stack(losses).mean(0) / self.world
        if self.world > 1:
            dist.all_reduce(mean)
        all_losses = mean.new_full((len(self.model.menu),), torch.nan)
        for length, loss in zip(lengths, mean):  # a list as index would be copied to the device, and waited for
            all_losses[length] = loss
        return all_losses

    @torch.no_grad()
    def _taught(self, images: Tensor, layout: tuple) -> Tensor | None:
        """The teacher's answers at the longest length, where it is not the model itself."""
        if self.recipe.teacher == "self":
            return None
        return packed_logits(self.average.module.eval(), images, *layout, (0,), channels_last=True)[0]

    # ------------------------------------------------------------------ the run

    def train(
        self,
        *,
        save_every: float = 300.0,
        tensorboard: bool = False,
        progress: Callable | None = None,
        epoch_done: Callable[[dict], None] | None = None,
        stop_after: int | None = None,
    ):
        """Train to the end, from the folder's state if it has one.

        save_every: seconds after which the state is written again; it always is at the end of an epoch
        progress:   called with the number of the step, of all steps, and what train_step returned
        epoch_done: called with the log's row of each epoch that ends
        stop_after: leave off after this step, as if the run had been killed then

        Raises RuntimeError where the loss is not finite any more; the folder keeps the state from before.
        """
        first = self.rank == 0 and self.folder is not None
        self._load()
        if first:
            lengths = list(map(grid_text, self.model.menu))
            names = [f"loss_{length}" for length in lengths] + [f"accuracy_{length}" for length in lengths]
            self.folder.begin_log(self.step, tensorboard, ["step", "epoch", "lr", "images_per_s", *names])
        saved = time.monotonic()
        self.model.train()
        stop = self.steps if stop_after is None else min(self.steps, stop_after)
        while self.step < stop:
            epoch, start = divmod(self.step, self.steps_an_epoch)
            order = Order(len(self.images), self.recipe.batch, self.recipe.seed, epoch, self.rank, self.world, start)
            began, end = time.monotonic(), min(self.steps, (epoch + 1) * self.steps_an_epoch)
            for images, targets in load(self.images, order, self.workers, pin=self.device.type == "cuda"):
                losses = self.train_step(*(t.to(self.device, non_blocking=True) for t in (images, targets)))
                if self.losses is None:
                    self.losses = torch.zeros_like(losses)
                for length in self.lengths_of(self.step - 1):
                    self.losses[length] += losses[length]
                if progress is not None:
                    progress(self.step, self.steps, losses)
                self.logged += 1
                if first and self.step % LOG_EVERY == 0 and self.step != end:
                    self.folder.log(self._row(epoch, began))
                    began = time.monotonic()
                if self.step == end:  # what ends the epoch is written in one: its scores, then the state
                    break
                if self._agreed(time.monotonic() - saved > save_every):
                    self._check_finite()
                    self._save()
                    saved = time.monotonic()
                if self.step >= stop:
                    return self.best_weights
            row = self._row(epoch, began)
            self._end_epoch(row, first)
            if epoch_done is not None:
                epoch_done(row)
            saved = time.monotonic()
        if first:
            self.folder.close()
        return self.best_weights

    def _row(self, epoch: int, began: float) -> dict:
        """A row of the log: losses are means since the row before."""
        self._check_finite()
        rate = self.logged * self.recipe.batch * self.world / (time.monotonic() - began)
        taken = [i for step in range(self.step - self.logged, self.step) for i in self.lengths_of(step)]
        losses = (self.losses.cpu() / torch.tensor(taken).bincount(minlength=len(self.losses))).tolist()
        self.losses, self.logged = None, 0
        row = {"step": self.step, "epoch": epoch + 1, "lr": self.optimiser.param_groups[-1]["lr"], "images_per_s": rate}
        return row | {f"loss_{grid_text(grid)}": loss for grid, loss in zip(self.model.menu, losses)}

    def _check_finite(self) -> None:
        """Raise RuntimeError where a loss since the log's last row was not finite."""
        if self.losses is not None and not bool(self.losses.isfinite().all()):
            lengths = [
                grid_text(grid) for grid, loss in zip(self.model.menu, self.losses.tolist()) if not isfinite(loss)
            ]
            kept = "" if self.folder is None else f"; {self.folder.path} keeps what was there before"
            raise RuntimeError(
                f"the training diverged by step {self.step:,}: the loss at {', '.join(lengths)} is not finite. Try a "
                f"smaller lr, a longer warmup or clip{kept}"
            )

    def _check_gradients(self) -> None:
        """Raise ValueError for parameters that a step does not touch: the processes would wait for one another."""
        without = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            names = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
            raise ValueError(f"a step touches {len(without)} parameters not at all ({names}): freeze them")
        self.checked = True

    def _agreed(self, due: bool) -> bool:
        """What the first process says, where all of them are to do it."""
        if not self.fsdp or self.world == 1:
            return due and self.rank == 0 and self.folder is not None
        said = torch.tensor([int(due and self.folder is not None)], device=self.device)
        dist.broadcast(said, 0)
        return bool(said)

    def _save(self) -> None:
        if self.fsdp:
            losses = None if self.losses is None else self.losses.tolist()
            numbers = {"step": self.step, "logged": self.logged, "losses": losses}
            sharded.save(self.folder.path, self.model, self.optimiser, numbers)
        elif self.rank == 0:
            self.folder.save_state(self.state())

    def _load(self) -> None:
        if self.folder is None:
            return
        if not self.fsdp:
            if (state := self.folder.state()) is not None:
                self.load_state(state)
        elif (numbers := sharded.load(self.folder.path, self.model, self.optimiser)) is not None:
            self.step, self.logged = numbers["step"], numbers["logged"]
            self.losses = None if numbers["losses"] is None else torch.tensor(numbers["losses"], device=self.device)

    def _end_epoch(self, row: dict, first: bool) -> None:
        if self.fsdp:
            weights = sharded.gather(self.model)
            if self.whole is not None:
                self.whole.load_state_dict(weights)
        if first and self.score is not None:
            weights = self.best_weights.to(self.device).eval()
            row |= self.score(weights)
            if self.fsdp:
                self.whole.cpu()
            self.model.train()
        if first:
            self.folder.log(row)
        if self.folder is not None:
            self._save()
        if first and hasattr(self.model, "created_from"):
            save_checkpoint(self.best_weights, self.folder.path / "model.safetensors")

    # ------------------------------------------------------------------ its state

    def state(self) -> dict:
        """Everything that the rest of the run depends on, but the settings and the images."""
        average = None if self.average is None else self.average.state_dict()
        model, optimiser = self.model.state_dict(), self.optimiser.state_dict()
        losses = None if self.losses is None else self.losses.cpu()
        return {
            "step": self.step,
            "losses": losses,
            "logged": self.logged,
            "model": model,
            "average": average,
            "optimiser": optimiser,
        }

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step = int(state["step"])
        self.logged = int(state["logged"])
        self.losses = None if state["losses"] is None else state["losses"].to(self.device)


def score_lengths(model, images, autocast: bool = False) -> dict[str, float]:
    """{"accuracy_7x7": ..., ...}: the share of images that the model recognises at each length, in one packed forward.

    model:  resizable, in eval mode
    images: a data.datasets.ImageSet
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        right = collect(model, images).correct.mean(0)
    return {f"accuracy_{grid_text(grid)}": float(share) for grid, share in zip(model.menu, right)}
