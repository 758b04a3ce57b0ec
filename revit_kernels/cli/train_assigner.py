"""`revit train-assigner`."""

import sys
from pathlib import Path

from tqdm import tqdm

from revit_kernels.adaptive.costs import measure_costs
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.cli.arguments import add_device, add_dtype, add_images, count
from revit_kernels.data.datasets import open_set
from revit_kernels.models.registry import load_resizable
from revit_kernels.training.assigner import AssignerRecipe, quality, train_assigner
from revit_kernels.training.labels import fit_images


def add(commands):
    train = commands.add_parser(
        "train-assigner",
        help="train the network that picks each image's length",
        description="Trains a token-length assigner on the labels of `revit label`, and keeps with it what budgets are "
        "solved from: its answers for images that it has not learnt from.",
    )
    train.add_argument("model", metavar="FILE", help="the ReViT that the labels were taken from")
    train.add_argument("--labels", required=True, metavar="FILE", help=".parquet of `revit label`")
    add_images(train, help="the images that were labelled")
    train.add_argument("--output", "-o", required=True, metavar="FILE", help=".safetensors")
    train.add_argument(
        "--kind",
        choices=("features", "pixels"),
        default="features",
        help="features: the ReViT's first blocks at the shortest length (default); pixels: a micro network of its own",
    )
    train.add_argument("--loss", choices=("cross_entropy", "ordinal", "cost"), default="cross_entropy")
    train.add_argument("--balance", action="store_true", help="weigh labels by how rare they are")
    train.add_argument("--depth", type=count, metavar="N", help="blocks (default: as many as 2 %% of a pass allow)")
    train.add_argument("--dim", type=count, metavar="N", help="width of the micro network")
    train.add_argument("--epochs", type=count, metavar="N", help="default: 30, or 10 for pixels")
    train.add_argument("--batch", type=count, default=256, metavar="N")
    train.add_argument("--lr", type=float, default=1e-3)
    train.add_argument(
        "--folds", type=count, metavar="K", help="for answers on images not learnt from (default: 5, or 2)"
    )
    train.add_argument("--seed", type=int, default=0)
    add_device(train)
    add_dtype(train)
    train.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return train


def run(args) -> int:
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"--output must end in .safetensors, got {args.output}")
    if not output.resolve().parent.is_dir():
        raise ValueError(f"the folder of --output {output} does not exist")
    outcomes = Outcomes.load(args.labels)
    model = load_resizable(args.model, args.device, args.dtype)
    images = fit_images(open_set(args.data, args.split, root=args.root), model)
    names = ("loss", "balance", "epochs", "batch", "lr", "folds", "seed")
    recipe = AssignerRecipe.for_kind(args.kind, **{name: getattr(args, name) for name in names})
    with tqdm(total=len(outcomes), unit=" images", disable=True if args.quiet else None, file=sys.stderr) as bar:
        assigner = train_assigner(
            model, outcomes, images, args.kind, recipe, depth=args.depth, embed_dim=args.dim, progress=bar.update
        )
    assigner.save(output)
    if not args.quiet:
        parameter = next(model.parameters())
        served = assigner.to(parameter.device, parameter.dtype)
        costs = measure_costs(model, served, tuple(images.pixels(0).shape[:2]), rounds=5)
        share = costs.assigner / costs.per_length[0]
        found = quality(assigner)
        before, after = found["calibration_error_before"], found["calibration_error"]
        print(
            f"revit: labels predicted {found['accuracy']:.1%} (always the commonest: {found['commonest_label']:.1%}), "
            f"too short {found['too_short']:.1%}, {found['mean_tokens']:.1f} tokens on average, "
            f"calibration error {before:.3f} before and {after:.3f} after",
            file=sys.stderr,
        )
        print(f"revit: it costs {share:.1%} of a full-length pass, measured on {costs.device}", file=sys.stderr)
    return 0
