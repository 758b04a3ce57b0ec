"""`revit label`: its arguments."""

import argparse

from revit_kernels.cli.arguments import add_batch_tokens, add_device, add_dtype, add_images

EXAMPLES = """\
examples:
  revit label runs/cifar10/model.safetensors --data cifar10 --held-out 5000 --output labels.parquet
  revit label revit.safetensors --data photos/ --against full --unsolved drop --output labels.parquet
  revit label fold1.safetensors --fold-models fold2.safetensors fold3.safetensors --data photos/ --output labels.parquet

Labels from training images are overconfident: give --held-out N as to `revit train` to label only
those that were kept apart; or train K models with --fold I/K and name all of them in this order, and each labels its
own fold. Labels of folds are meant for a model trained on all the images, which nothing in them can be checked against.

A run that was killed goes on with the same command: what was found is kept beside the output until all of it is.
"""


def add(commands):
    label = commands.add_parser(
        "label",
        help="find the smallest length at which a ReViT recognises each image",
        description="Writes, for each image, what the model says at every length of its menu, and the token-length\n"
        "label: the smallest length that is right. All lengths run in one packed forward.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    label.add_argument("model", metavar="FILE", help="a .safetensors file of `revit train`")
    add_images(label)
    label.add_argument(
        "--held-out", type=float, default=0, metavar="N", help="label those that `revit train` kept apart"
    )
    label.add_argument("--seed", type=int, default=0, help="of --held-out and of the folds, as in training")
    label.add_argument(
        "--fold-models", nargs="+", default=[], metavar="FILE", help="models of the folds after the first"
    )
    label.add_argument("--output", "-o", required=True, metavar="FILE", help=".parquet; goes on where it was killed")
    label.add_argument(
        "--unsolved",
        choices=("smallest", "largest", "drop"),
        default="smallest",
        help="the label of an image that no length gets right (default: smallest)",
    )
    label.add_argument(
        "--rule",
        choices=("first_correct", "stable"),
        default="first_correct",
        help="stable: every longer length must be right too",
    )
    label.add_argument(
        "--against",
        choices=("truth", "full"),
        default="truth",
        help="full: right is what the longest length says; the truth is not needed",
    )
    label.add_argument("--probabilities", action="store_true", help="keep those of all classes")
    add_batch_tokens(label)
    add_device(label)
    add_dtype(label)
    label.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return label


def run(args) -> int:
    from revit_kernels.training.label_command import run

    return run(args)
