"""`revit infer`: its arguments."""

import argparse

from revit_kernels.cli.arguments import add_batch_tokens, add_device, add_dtype, count, grids

EXAMPLES = """\
examples:
  revit infer clothes/
  revit infer photos/ --model revit.safetensors --assigner assigner.safetensors --budget 2x
  revit infer photos/ --model deit_small_patch16_224 --pretrained
  revit infer photos/ more.jpg "scans/*.png" @list.txt --model weights.safetensors --output answers.csv
  revit infer photos/ --model vit_small_patch14_dinov2 --checkpoint dinov2.safetensors --features --output features.npz
  revit infer photos/ --model deit_small_patch16_224 --pretrained --grids 14x14,10x10,7x7 --compare
  revit infer tiles/ --model flexivit_small --pretrained --grids 8x8 --method patch

A PATH is an image, a folder, a pattern such as "photos/**/*.jpg", or a list (@FILE or a .txt file, a path a line, no
patterns; "@-" reads standard input). An image that is missing or broken becomes a record with its error; the others
are unharmed.

exit status: 0 all images answered, 1 some could not be, or the run failed, 2 the command was wrong, 130 interrupted
"""


def add(commands):
    infer = commands.add_parser(
        "infer",
        help="classify images, or extract their features",
        description="Decodes images, packs them by a budget of tokens without padding, runs a Vision Transformer on\n"
        "them, and writes one record each, in the order given.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    infer.add_argument("paths", nargs="+", metavar="PATH", help="images, folders, patterns, lists")
    infer.add_argument("--no-recursive", dest="recursive", action="store_false", help="leave out folders of a folder")

    model = infer.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME_OR_FILE",
        help="timm's name, or a .safetensors file (default: the small ReViT that comes with the package, which tells "
        "ten kinds of clothes apart)",
    )
    model.add_argument("--checkpoint", "--weights", metavar="FILE", help="the weights of --model NAME")
    model.add_argument("--pretrained", action="store_true", help="timm's own weights, downloaded (needs timm)")
    model.add_argument("--untrained", action="store_true", help="random weights: for timing only")
    add_device(model)
    add_dtype(model)
    model.add_argument(
        "--quantize",
        choices=("int8", "fp8"),
        help="fewer bits for the blocks' weights and activations: int8 on a CPU, fp8 on a GPU",
    )
    model.add_argument("--backend", help="run every op on this backend, or fail (python -m revit_kernels lists them)")

    tokens = infer.add_argument_group("tokens")
    tokens.add_argument(
        "--grids",
        type=grids,
        default="auto",
        metavar="auto|HxW,...",
        help="auto: each image keeps its aspect, small ones get fewer tokens (default); a list: each image gets the "
        "largest of these grids that does not enlarge it",
    )
    tokens.add_argument(
        "--max-tokens",
        type=count,
        metavar="N",
        help="most tokens of an image with --grids auto (default: the model's)",
    )
    tokens.add_argument(
        "--fit",
        choices=("crop", "squash"),
        help="with a list of --grids: cut out the centre (default), or stretch the whole image",
    )
    tokens.add_argument(
        "--method",
        choices=("resize", "patch"),
        default="resize",
        help="what fits an image to its grid: the image is resized (default), or the patch kernel is, as in FlexiViT; "
        "the image's size must then be a whole multiple of the grid",
    )
    add_batch_tokens(tokens, 8192)

    adaptive = infer.add_argument_group("lengths chosen by a policy (of a ReViT)")
    adaptive.add_argument(
        "--policy",
        choices=("fixed", "random", "assigner", "cascade", "assigner+cascade"),
        help="who gives each image its length (default: the cascade, where --assigner or --outcomes is given)",
    )
    adaptive.add_argument("--assigner", metavar="FILE", help="of `revit train-assigner`")
    adaptive.add_argument("--outcomes", metavar="FILE", help="held-out labels of `revit label`, to solve budgets from")
    adaptive.add_argument(
        "--budget",
        help="2x (speed), 80tokens, 95%% (accuracy), full-0.3 (points below full length), or full: the cheapest that "
        "loses nothing (default)",
    )

    output = infer.add_argument_group("output")
    output.add_argument(
        "--output", "-o", metavar="FILE", help=".jsonl, .csv, .parquet or .npz (default: JSON lines on standard output)"
    )
    output.add_argument("--features", action="store_true", help="write features instead of classes")
    output.add_argument("--top", type=count, metavar="K", default=5, help="classes per image (default: 5)")
    output.add_argument("--labels", metavar="FILE", help="class names, one a line, or .json")
    output.add_argument("--compare", action="store_true", help="also time the first images padded, and per length")
    output.add_argument(
        "--workers", type=count, metavar="N", help="threads that decode (default: one per core, 16 at most)"
    )
    output.add_argument("--quiet", "-q", action="store_true", help="no progress, no closing line")
    return infer


def run(args) -> int:
    from revit_kernels.serving.command import run

    return run(args)
