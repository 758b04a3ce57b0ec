"""Arguments that several commands take, and their types."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from contextlib import suppress

from revit_kernels.adaptive.policies import SERVED


def count(text: str) -> int:
    try:
        number = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return number


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text!r}")
    return int(text)


def refuse_overwriting(option: str, output: str | os.PathLike | None, inputs: Iterable[str | None]) -> None:
    """Raise ValueError if the output is one of the inputs, also by another name of the same file."""
    if output is None or not os.path.exists(output):
        return
    written = os.stat(output)
    for path in inputs:
        with suppress(OSError, ValueError):  # not a file
            if path is not None and os.path.samestat(os.stat(path), written):
                break
    else:
        return
    raise ValueError(f"{option} {output} is an input: it would be overwritten")


def lengths(text: str):
    """The grids in "14x14,10x10", or of clips in "8x14x14,4x7x7"."""
    found = _numbers(text)
    if {len(grid) for grid in found} not in ({2}, {3}):
        what = "ROWSxCOLUMNS,... such as 14x14,10x10, or of clips FRAMESxROWSxCOLUMNS,... such as 8x14x14,4x7x7"
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return found


def _numbers(text: str) -> tuple[tuple[int, ...], ...]:
    """The numbers in "14x14,10x10"; empty unless all are above 0."""
    try:
        found = tuple(tuple(int(n) for n in grid.lower().split("x")) for grid in text.split(","))
    except ValueError:
        return ()
    return found if min(map(min, found)) > 0 else ()


def grids(text: str):
    """None for "auto", else the grids in "14x14,10x10"."""
    if text == "auto":
        return None
    found = _numbers(text)
    if {len(grid) for grid in found} != {2}:
        raise argparse.ArgumentTypeError(f"must be auto, or ROWSxCOLUMNS,... such as 14x14,10x10, got {text!r}")
    return found


OF_IMAGES = "a known set, a folder of classes, .csv, .parquet, shards/*.tar, torchvision:NAME or hf:NAME"


def add_images(parser, split: str = "train", help: str = OF_IMAGES) -> None:
    """--data, --split and --root: a set of images, as data.datasets.open_set takes them."""
    parser.add_argument("--data", required=True, metavar="SET", help=help)
    parser.add_argument("--split", default=split, help=f"default: {split}")
    where = "where the known sets' files lie (default: $REVIT_DATA, or data/)"
    parser.add_argument("--root", metavar="DIR", help=where)


def add_weights(parser, of: str) -> None:
    """--checkpoint, --pretrained, --untrained, --device, --dtype, --quantize. of: the argument with the model's name"""
    parser.add_argument("--checkpoint", "--weights", metavar="FILE", help=f"the weights of {of}")
    parser.add_argument("--pretrained", action="store_true", help="timm's own weights, downloaded (needs timm)")
    parser.add_argument("--untrained", action="store_true", help="random weights: for timing only")
    add_device(parser)
    add_dtype(parser)
    add_quantize(parser)


def add_quantize(parser) -> None:
    parser.add_argument(
        "--quantize",
        choices=("int8", "fp8"),
        help="fewer bits for the blocks' weights and activations: int8 on a CPU, fp8 on a GPU",
    )


def add_grids(parser) -> None:
    """--grids, --max-tokens and --fit: how many tokens an image gets without a policy."""
    parser.add_argument(
        "--grids",
        type=grids,
        default="auto",
        metavar="auto|HxW,...",
        help="auto: each image keeps its aspect, small ones get fewer tokens (default); a list: each image gets the "
        "largest of these grids that does not enlarge it",
    )
    help = "most tokens of an image with --grids auto (default: the model's)"
    parser.add_argument("--max-tokens", type=count, metavar="N", help=help)
    help = "with a list of --grids: cut out the centre (default), or stretch the whole image"
    parser.add_argument("--fit", choices=("crop", "squash"), help=help)


def add_policy(parser) -> None:
    """--policy, --assigner, --outcomes and --budget: how many tokens an image of a ReViT gets."""
    parser.add_argument(
        "--policy",
        choices=SERVED,
        help="what gives each image its length (default: assigner+cascade with an assigner, cascade with --outcomes)",
    )
    parser.add_argument("--assigner", metavar="FILE", help="of `revit train-assigner`")
    parser.add_argument("--outcomes", metavar="FILE", help="held-out labels of `revit label`, to solve budgets from")
    parser.add_argument(
        "--budget",
        help="2x (speed), 80tokens, 95%% (accuracy), full-0.3 (points below full length), or full: the cheapest that "
        "loses nothing (default)",
    )


def add_device(parser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")


def add_dtype(parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the fastest the device computes in (bfloat16 where it has instructions for it)",
    )


def add_batch_tokens(parser, default: int = 16384) -> None:
    help = f"tokens of one packed batch (default: {default})"
    parser.add_argument("--batch-tokens", type=count, default=default, metavar="N", help=help)
