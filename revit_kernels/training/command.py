"""What `revit train` does with its arguments."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from revit_kernels.data.division import folds
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.registry import create_model
from revit_kernels.modules.lengths import cells
from revit_kernels.training.augmentation import augmentation, mixing
from revit_kernels.training.distillation import Objective
from revit_kernels.training.loader import Augmented, Order
from revit_kernels.training.run_folder import RunFolder
from revit_kernels.training.trainer import Recipe, Trainer, score_lengths

UNSETTLED = ("output", "resume", "run", "command", "device", "workers", "quiet", "save_every", "tensorboard", "root")
SMALL = 64  # pixels: images of one size up to this side are trained on as they are


def run(args) -> int:
    """`revit train`; returns the exit status. Raises ValueError for what the user got wrong."""
    from revit_kernels.data.datasets import open_set
    from revit_kernels.serving.prepare import choose_device

    device = _distributed() or choose_device(args.device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    images = open_set(args.data, args.split, root=args.root)
    images, held = _divide(images, args.held_out, args.fold, args.seed)
    torch.manual_seed(args.seed)
    model = _model(args, images.classes).to(device)
    model.set_grad_checkpointing(args.checkpointing)
    size = _size(images, args.size, model)
    longest = tuple(g * p for g, p in zip(model.menu[0], model.patch_embed.patch_size))
    images, held = (x if x is None else x.reduced(lambda _: longest) for x in (images, held))
    augment = augmentation(size, args.crop, args.flip, args.rand, args.erase)
    recipe = Recipe(
        **{name: getattr(args, name) for name in ("epochs", "batch", "accumulate", "lr", "least_lr", "warmup")},
        **{name: getattr(args, name) for name in ("weight_decay", "layer_decay", "clip", "ema", "seed")},
        autocast=args.bf16,
        objective=Objective(args.distillation, args.temperature, args.smoothing),
    )
    world = dist.get_world_size() if dist.is_initialized() else 1
    Order(len(images), recipe.batch, recipe.seed, 0, rank, world)  # what cannot be trained leaves no folder behind
    settings = {k: v for k, v in vars(args).items() if k not in UNSETTLED}
    settings |= {"images": images.fingerprint(), "world": world}
    if rank:  # one process makes the folder, the others find it
        dist.barrier()
    folder = RunFolder(args.output, settings, args.resume or bool(rank))
    if dist.is_initialized() and not rank:
        dist.barrier()
    trainer = Trainer(
        model,
        Augmented(images, size, augment),
        recipe,
        folder,
        mix=mixing(len(images.classes), args.mixup, args.cutmix),
        score=(lambda weights: score_lengths(weights, held, autocast=args.bf16)) if held is not None else None,
        workers=args.workers,
    )
    with tqdm(unit=" steps", disable=True if args.quiet or rank else None, file=sys.stderr) as bar:
        best = trainer.train(save_every=args.save_every, tensorboard=args.tensorboard, progress=_progress(bar))
    if rank == 0:
        path = folder.path / "model.safetensors"
        save_checkpoint(best, path)
        print(f"revit: {trainer.steps:,} steps done; the model is {path}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _progress(bar):
    def show(step: int, steps: int, losses: torch.Tensor) -> None:
        bar.total = steps
        bar.update(step - bar.n)
        if not bar.disable and step % 10 == 0:  # reading the loss waits for the device
            bar.set_postfix_str(" ".join(f"{loss:.3f}" for loss in losses.tolist()), refresh=False)

    return show


def _distributed() -> torch.device | None:
    """The device of this process under torchrun; None without it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if not gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _divide(images, held_out: float, fold: str | None, seed: int):
    """(images to train on, images held out or None)."""
    if fold is None:
        return images.split(held_out if held_out < 1 else int(held_out), seed) if held_out else (images, None)
    try:
        i, k = (int(n) for n in fold.split("/"))
    except ValueError:
        i = k = 0
    if not 1 <= i <= k or k < 2:
        raise ValueError(f"--fold must be I/K such as 1/5, got {fold!r}")
    of_fold = folds(np.asarray(images.targets), k, seed)
    return images.subset(np.flatnonzero(of_fold != i - 1)), images.subset(np.flatnonzero(of_fold == i - 1))


def _model(args, classes: tuple[str, ...]):
    options = dict(args.model_args)
    if args.drop_path:
        options["drop_path_rate"] = args.drop_path
    if Path(args.model).suffix == ".safetensors":
        model = create_model(args.model, **options)
    else:
        model = create_model(args.model, pretrained=args.pretrained, **options)
        if args.checkpoint:
            model = _from_checkpoint(args, options)
    if model.num_classes != len(classes):
        model.reset_classifier(len(classes))
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": list(classes), "trained_on": args.data}
    if model.menu is None:
        if not args.menu:
            raise ValueError("--menu must name the lengths, such as 14x14,10x10,7x7: the model has none of its own")
        model.make_resizable(args.menu, args.embedding, args.positions, args.norms)
    elif args.menu and tuple(args.menu) != model.menu:
        own = ",".join(f"{h}x{w}" for h, w in model.menu)
        raise ValueError(f"{args.model} has the menu {own} already: leave out --menu")
    return model


def _from_checkpoint(args, options):
    """The name's model with the checkpoint's weights: without a head, which will be the new classes'."""
    return create_model(args.model, checkpoint_path=args.checkpoint, **options | {"num_classes": 0})


def _size(images, side: int | None, model) -> tuple[int, int]:
    """(height, width) of the images in training. Raises ValueError where the longest length has more patches than
    the images have pixels for."""
    first = np.asarray(images.pixels(0)).shape[:2]
    last = np.asarray(images.pixels(len(images) - 1)).shape[:2]
    longest = model.menu[0]
    if side is not None:
        size = (side, side)
    elif first == last and max(first) <= SMALL:
        size = tuple(first)
    else:
        size = tuple(g * p for g, p in zip(longest, model.patch_embed.patch_size))
    if longest[0] > size[0] or longest[1] > size[1]:
        raise ValueError(
            f"the menu's longest grid {longest[0]}x{longest[1]} has {cells(longest)} patches, more than an image of "
            f"{size[0]} x {size[1]} pixels can be cut into"
        )
    return size
