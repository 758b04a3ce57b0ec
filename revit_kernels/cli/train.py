"""`revit train`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from revit_kernels.cli.arguments import add_device, add_images, count, lengths, seed
from revit_kernels.cli.clips import add_clips, open_data
from revit_kernels.cli.progress import Progress
from revit_kernels.data.division import folds
from revit_kernels.devices import choose_device, choose_dtype
from revit_kernels.files import parse_json
from revit_kernels.grids import grid_text
from revit_kernels.models.arguments import check_arguments
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.registry import MODEL_FILE, class_of, create_model, model_file
from revit_kernels.modules.lengths import cells
from revit_kernels.modules.patch_embed import resize_mode
from revit_kernels.training.augmentation import augmentation, mixing
from revit_kernels.training.distillation import Objective
from revit_kernels.training.loader import Augmented, Order
from revit_kernels.training.optimiser import OPTIMISERS
from revit_kernels.training.run_folder import SETTINGS, RunFolder
from revit_kernels.training.trainer import Recipe, Trainer, score_lengths

INTERRUPTED = "interrupted: the same command with --resume goes on from the state that was saved last"
UNSETTLED = ("output", "resume", "run", "command", "device", "workers", "quiet", "save_every", "tensorboard", "root")
UNSETTLED += ("version",)  # the option of that name
SMALL = 64  # pixels: images of one size up to this side are trained on as they are

EXAMPLES = """\
examples:
  revit train vit_small_patch14_dinov2 --checkpoint dinov2.safetensors --data cifar10 --menu 7x7,5x5,4x4,3x3 \\
      --held-out 5000 --epochs 3 --lr 3e-4 --layer-decay 0.75 --crop pad --flip --bf16 --output runs/cifar10
  revit train vit_tiny_patch16_224 --model-args img_size=28,patch_size=4,embed_dim=96,depth=6,num_heads=3 \\
      --data fashion-mnist --menu 7x7,5x5,3x3 --output runs/fashion
  torchrun --nproc-per-node 8 -m revit_kernels.cli train deit_small_patch16_224 --pretrained --data imagenet/ \\
      --menu 14x14,10x10,7x7 --epochs 30 --batch 128 --crop resized --flip --rand 2,9 --mixup 0.8 --cutmix 1 --bf16 \\
      --output runs/deit_s

A run that was killed goes on with the same command and --resume, to bitwise the same weights (on one CPU).
With --resume, --epochs may be more than before: the learning rate then follows the longer schedule.
"""


def _pair(text: str) -> tuple[int, int]:
    try:
        first, second = (int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be OPERATIONS,MAGNITUDE such as 2,9, got {text!r}") from None
    return first, second


def model_args(text: str) -> dict:
    """{"embed_dim": 96, ...} of "embed_dim=96,..."; values are numbers, true, false, or words."""
    known = {"true": True, "false": False, "none": None}
    found = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise argparse.ArgumentTypeError(f"must be NAME=VALUE,..., got {text!r}")
        for read in (int, float, lambda v: known.get(v.lower(), v)):
            try:
                found[name] = read(value)
                break
            except ValueError:
                continue
    return found


def add(commands):
    train = commands.add_parser(
        "train",
        help="train a ReViT: one model that recognises images at every length of a menu",
        description="Trains a Vision Transformer on images at every length of a menu at once, in one packed forward\n"
        "and backward, the longest length teaching the shorter ones.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("model", metavar="NAME_OR_FILE", help="timm's name, or a .safetensors file")
    start = train.add_mutually_exclusive_group()
    start.add_argument("--checkpoint", metavar="FILE", help="weights of NAME to start from")
    start.add_argument("--pretrained", action="store_true", help="start from timm's weights, downloaded (needs timm)")
    train.add_argument("--model-args", type=model_args, default={}, metavar="NAME=VALUE,...", help="of the model")
    train.add_argument("--output", "-o", required=True, metavar="DIR", help="the folder of the run")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder, or begin it")

    data = train.add_argument_group("images")
    add_images(data)
    data.add_argument(
        "--held-out",
        type=float,
        default=0,
        metavar="N",
        help="images, or a share of them, that are not trained on: the scores of each epoch are theirs; "
        "give `revit label` the same number",
    )
    data.add_argument("--fold", metavar="I/K", help="leave out fold I of K instead (I from 1), for k-fold labels")
    data.add_argument(
        "--size",
        type=count,
        metavar="PIXELS",
        help="side of the images trained on (default: their own "
        "where they are small and of one size, else the longest length's)",
    )
    data.add_argument("--crop", choices=("none", "pad", "resized"), default="none", help="default: none")
    data.add_argument("--flip", action="store_true", help="mirror half of the images")
    data.add_argument("--rand", type=_pair, metavar="N,M", help="RandAugment: N operations of magnitude M")
    data.add_argument("--erase", type=float, default=0.0, metavar="P", help="random erasing")
    data.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA")
    data.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA")
    data.add_argument("--workers", type=int, default=0, help="processes that augment (default: none but this one)")

    add_clips(train)
    menu = train.add_argument_group("lengths")
    menu.add_argument(
        "--menu",
        type=lengths,
        metavar="HxW,...",
        help="longest first, of clips FRAMESxHxW,... (default: the model's own)",
    )
    menu.add_argument("--embedding", choices=("resize", "patch", "per_length"), default="resize")
    menu.add_argument("--positions", choices=("interpolate", "per_length"), default="interpolate")
    menu.add_argument("--norms", choices=("per_length", "shared"), default="per_length")
    menu.add_argument(
        "--distillation",
        type=float,
        default=0.5,
        metavar="WEIGHT",
        help="of the distillation loss at shorter lengths, from 0 to 1 (default: 0.5)",
    )
    menu.add_argument(
        "--teacher",
        choices=("self", "average"),
        default="self",
        help="what is distilled: the longest length of the model itself, or of the average of its weights that "
        "--ema keeps (default: self)",
    )
    menu.add_argument(
        "--lengths-per-step",
        type=count,
        default=0,
        metavar="N",
        help="the longest and N - 1 others, drawn anew for each step (default: all of the menu)",
    )
    menu.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the distillation (default: 1)")

    recipe = train.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, default=10.0, metavar="N", help="may be a fraction (default: 10)")
    recipe.add_argument("--batch", type=count, default=64, metavar="N", help="images of a step in each process")
    recipe.add_argument("--accumulate", type=count, default=1, metavar="N", help="parts that a batch is computed in")
    recipe.add_argument(
        "--optimiser",
        choices=tuple(OPTIMISERS),
        default="adamw",
        help="adamw, or muon for the weights of the blocks' linear layers and adamw for the rest (default: adamw)",
    )
    recipe.add_argument("--lr", type=float, default=1e-3)
    recipe.add_argument("--least-lr", type=float, default=0.01, metavar="SHARE", help="of --lr, at the end")
    recipe.add_argument("--warmup", type=float, default=0.05, metavar="SHARE", help="of all steps (default: 0.05)")
    recipe.add_argument("--weight-decay", type=float, default=0.05)
    recipe.add_argument("--layer-decay", type=float, default=1.0)
    recipe.add_argument("--drop-path", type=float, default=0.0)
    recipe.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    recipe.add_argument("--clip", type=float, default=1.0, help="norm of the gradients, 0 for any (default: 1)")
    recipe.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="of a moving average of weights")
    recipe.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast); weights stay float32")
    recipe.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward: less memory")
    recipe.add_argument("--seed", type=seed, default=0)
    recipe.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun: share weights, gradients and moments out among the processes (FSDP2); --resume then goes "
        "on with any number of processes that divides a step's images",
    )
    add_device(recipe)
    recipe.add_argument("--save-every", type=float, default=300, metavar="SECONDS", help="default: 300")
    recipe.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard (needs tensorboard)")
    recipe.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return train


def run(args) -> int:
    """`revit train`; returns the exit status. Raises ValueError for wrong arguments."""
    device = _distributed() or choose_device(args.device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    images = open_data(args, args.model, args.menu)
    images, held = _divide(images, args.held_out, args.fold, args.seed)
    torch.manual_seed(args.seed)
    model = _model(args, images.classes).to(device)
    model.set_grad_checkpointing(args.checkpointing)
    size = _size(images, args.size, model)
    longest = tuple(g * p for g, p in zip(model.menu[0][-2:], model.patch_embed.patch_size))
    images, held = (x if x is None else x.reduced(lambda _: longest) for x in (images, held))
    mode = resize_mode(model.pretrained_cfg)
    augment = augmentation(size, args.crop, args.flip, args.rand, args.erase, mode)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if args.fsdp:
        args.batch = _share(args, world)
    recipe = Recipe(
        **{name: getattr(args, name) for name in ("epochs", "batch", "accumulate", "lr", "least_lr", "warmup")},
        **{name: getattr(args, name) for name in ("weight_decay", "layer_decay", "clip", "ema", "seed")},
        lengths=args.lengths_per_step,
        teacher=args.teacher,
        optimiser=args.optimiser,
        autocast=args.bf16,
        objective=Objective(args.distillation, args.temperature, args.smoothing),
    )
    Order(len(images), recipe.batch, recipe.seed, 0, rank, world)  # raises before a folder is made
    settings = {k: v for k, v in vars(args).items() if k not in UNSETTLED}
    settings |= {"images": images.fingerprint(), "world": world}
    if args.fsdp:
        settings |= {"batch": args.batch * world, "world": "any"}
    if rank:  # rank 0 makes the folder
        dist.barrier()
    folder = RunFolder(args.output, settings, args.resume or bool(rank))
    if dist.is_initialized() and not rank:
        dist.barrier()
    trainer = Trainer(
        model,
        Augmented(images, size, augment, mode),
        recipe,
        folder,
        mix=mixing(len(images.classes), args.mixup, args.cutmix),
        score=(lambda weights: score_lengths(weights, held, autocast=args.bf16)) if held is not None else None,
        workers=args.workers,
        fsdp=args.fsdp,
    )
    with Progress(unit="steps", quiet=args.quiet or bool(rank)) as bar:
        if held is None and not bar.quiet:
            bar.say("revit: no images are held out, so no accuracy is shown: --held-out 0.1 keeps a tenth apart")
        if args.bf16 and choose_dtype(None, device) == torch.float32 and not bar.quiet:
            bar.say("revit: this CPU has no bfloat16 instructions: --bf16 is several times slower here than float32")
        best = trainer.train(
            save_every=args.save_every,
            tensorboard=args.tensorboard,
            progress=_progress(bar, model.menu),
            epoch_done=None if bar.quiet else lambda row: bar.say(f"revit: {epoch_text(row, recipe.epochs)}"),
        )
    if rank == 0:
        path = folder.path / MODEL_FILE
        save_checkpoint(best, path)
        print(f"revit: {trainer.steps:,} steps done; the model is {path}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _progress(bar: Progress, menu):
    def show(step: int, steps: int, losses: torch.Tensor) -> None:
        if not bar.n:
            bar.go_on_from(step - 1)
        bar.total = steps
        if not bar.quiet and step % 10 == 0:  # reading the loss waits for the device
            taken = [(grid, loss) for grid, loss in zip(menu, losses.tolist()) if loss == loss]
            bar.note = "loss " + ", ".join(f"{grid_text(grid)} {loss:.3f}" for grid, loss in taken)
        bar.update(step - bar.n)

    return show


def epoch_text(row: dict, epochs: float) -> str:
    """A row of the log in one line: each length's mean loss, and its accuracy on held-out images, if there are any."""
    lengths = [name.removeprefix("loss_") for name in row if name.startswith("loss_")]
    parts = []
    for length in lengths:
        right = row.get(f"accuracy_{length}")
        said = f"{length} loss {row[f'loss_{length}']:.3f}"
        parts.append(said if right is None else f"{said}, right on {right:.1%}")
    return f"epoch {row['epoch']} of {epochs:g}: {'; '.join(parts)}"


def _share(args, world: int) -> int:
    """The images of a step in each process. A resumed run keeps the images of its steps over all processes."""
    try:
        found = parse_json((Path(args.output) / SETTINGS).read_text()) if args.resume else None
    except (OSError, ValueError):  # no run yet, or RunFolder reports what is wrong
        found = None
    step = found.get("batch") if isinstance(found, dict) else None
    if type(step) is not int:
        return args.batch
    if step % world:
        raise ValueError(f"a step of this run takes {step} images, which {world} processes cannot share out evenly")
    return step // world


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
    if Path(model_file(args.model)).suffix != ".safetensors":
        check_arguments(class_of(args.model), options)
    if args.checkpoint:
        options["num_classes"] = 0  # without a head: that of the new classes takes its place
    model = create_model(args.model, args.pretrained, checkpoint_path=args.checkpoint, **options)
    if model.num_classes != len(classes):
        model.reset_classifier(len(classes))
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": list(classes), "trained_on": args.data}
    if args.stride:
        model.pretrained_cfg["stride"] = args.stride
    if model.menu is None:
        if not args.menu:
            raise ValueError("--menu must name the lengths, such as 14x14,10x10,7x7: the model has none of its own")
        model.make_resizable(args.menu, args.embedding, args.positions, args.norms)
    elif args.menu and tuple(args.menu) != model.menu:
        own = ",".join(map(grid_text, model.menu))
        raise ValueError(f"{args.model} has the menu {own} already: leave out --menu")
    return model


def _size(images, side: int | None, model) -> tuple[int, int]:
    """(height, width) of the images in training. Raises ValueError if the longest length has more patches than the
    images have pixels."""
    first = np.asarray(images.pixels(0)).shape[-3:-1]
    last = np.asarray(images.pixels(len(images) - 1)).shape[-3:-1]
    longest = model.menu[0][-2:]
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
