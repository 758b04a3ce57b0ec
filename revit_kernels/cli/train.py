"""`revit train`: its arguments."""

import argparse

from revit_kernels.cli.arguments import add_device, add_images, count, grids

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
    train.add_argument("--checkpoint", metavar="FILE", help="weights of NAME to start from")
    train.add_argument("--pretrained", action="store_true", help="start from timm's weights, downloaded (needs timm)")
    train.add_argument("--model-args", type=model_args, default={}, metavar="NAME=VALUE,...", help="of the constructor")
    train.add_argument("--output", "-o", required=True, metavar="DIR", help="the folder of the run")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder, or begin it")

    data = train.add_argument_group("images")
    add_images(data)
    data.add_argument(
        "--held-out",
        type=float,
        default=0,
        metavar="N",
        help="images, or a share of them, kept apart: "
        "the scores of each epoch are theirs, and labels should be taken from them",
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

    lengths = train.add_argument_group("lengths")
    lengths.add_argument("--menu", type=grids, metavar="HxW,...", help="longest first (default: the model's own)")
    lengths.add_argument("--embedding", choices=("resize", "patch", "per_length"), default="resize")
    lengths.add_argument("--positions", choices=("interpolate", "per_length"), default="interpolate")
    lengths.add_argument("--norms", choices=("per_length", "shared"), default="per_length")
    lengths.add_argument(
        "--distillation",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of a shorter length's loss that is the divergence from the longest's answer (default: 0.5; 0: none)",
    )
    lengths.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of that divergence (default: 1)")

    recipe = train.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, default=10.0, metavar="N", help="may be a fraction (default: 10)")
    recipe.add_argument("--batch", type=count, default=64, metavar="N", help="images of a step in each process")
    recipe.add_argument("--accumulate", type=count, default=1, metavar="N", help="parts a batch is taken in")
    recipe.add_argument("--lr", type=float, default=1e-3)
    recipe.add_argument("--least-lr", type=float, default=0.01, metavar="SHARE", help="of --lr, at the end")
    recipe.add_argument("--warmup", type=float, default=0.05, metavar="SHARE", help="of all steps (default: 0.05)")
    recipe.add_argument("--weight-decay", type=float, default=0.05)
    recipe.add_argument("--layer-decay", type=float, default=1.0)
    recipe.add_argument("--drop-path", type=float, default=0.0)
    recipe.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    recipe.add_argument("--clip", type=float, default=1.0, help="norm of the gradients, 0 for any (default: 1)")
    recipe.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="average the weights")
    recipe.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast); weights stay float32")
    recipe.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward: less memory")
    recipe.add_argument("--seed", type=int, default=0)
    add_device(recipe)
    recipe.add_argument("--save-every", type=float, default=300, metavar="SECONDS", help="default: 300")
    recipe.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard (needs tensorboard)")
    recipe.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return train


def run(args) -> int:
    from revit_kernels.training.command import run

    return run(args)
