"""`revit train-assigner`."""

import copy
import sys
from pathlib import Path

from revit_kernels.adaptive.costs import measure_costs
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.cli.arguments import add_device, add_dtype, add_images, count, refuse_overwriting, seed
from revit_kernels.cli.clips import add_clips, open_data
from revit_kernels.cli.progress import Progress
from revit_kernels.models.registry import load_resizable
from revit_kernels.training.assigner import AssignerRecipe, quality, train_assigner, usual_size
from revit_kernels.training.labels import fit_images

INTERRUPTED = "interrupted: the same command with --resume goes on"


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
        "--trunk",
        choices=("scout", "tokens"),
        default="scout",
        help="scout: patches of the image itself (default); tokens: the ReViT's at the shortest length, which is not "
        "computed twice",
    )
    train.add_argument(
        "--depth",
        type=int,
        default=0,
        metavar="N",
        help="of --trunk tokens: blocks of the model that run before it (default: 0)",
    )
    train.add_argument(
        "--convolutions", type=int, default=0, metavar="N", help="3 x 3 convolutions of a scout, 0 to 8 (default: 0)"
    )
    train.add_argument(
        "--hidden", type=count, metavar="N", help="width (default: what 2 %% of a pass allow, with convolutions 2.5 %%)"
    )
    train.add_argument(
        "--crop", choices=("none", "pad", "resized"), default="none", help="random crops of a scout's images"
    )
    train.add_argument("--flip", action="store_true", help="mirror half of a scout's images")
    train.add_argument("--epochs", type=count, default=12, metavar="N", help="default: 12")
    train.add_argument("--batch", type=count, default=256, metavar="N")
    train.add_argument("--lr", type=float, default=2e-3)
    train.add_argument(
        "--folds",
        type=count,
        default=5,
        metavar="K",
        help="of cross-validation, where it learns from held-out images alone",
    )
    train.add_argument("--seed", type=seed, default=0)
    train.add_argument("--resume", action="store_true", help="go on where a run with this --output was killed")
    add_clips(train)
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
    refuse_overwriting("--output", output, [args.model, args.labels, args.data])
    outcomes = Outcomes.load(args.labels)
    model = load_resizable(args.model, args.device, args.dtype)
    images = fit_images(open_data(args, args.model), model, outcomes.about.get("against") != "full")
    chosen = {"crop": args.crop, "flip": args.flip, "folds": args.folds, "seed": args.seed}
    recipe = AssignerRecipe(args.epochs, args.batch, args.lr, **chosen)
    state = output.with_name(f".{output.name}.state")
    if not args.resume:
        state.unlink(missing_ok=True)
    with Progress(quiet=args.quiet) as bar:
        options = {"depth": args.depth, "convolutions": args.convolutions, "hidden": args.hidden}
        options |= {"state": state, "progress": bar.update}
        assigner = train_assigner(model, outcomes, images, args.trunk, recipe, **options)
    parameter, engine = next(model.parameters()), model.engine()
    served = copy.deepcopy(assigner).to(parameter.device, parameter.dtype)
    costs = measure_costs(engine, served, usual_size(images), rounds=9)
    assigner.keep_costs(costs)
    assigner.save(output)
    if not args.quiet:
        lines = [f"it learnt from {assigner.about['from']}; of {len(assigner.outcomes):,} held-out images it can tell"]
        for length, found in quality(assigner.outcomes).items():
            lines.append(
                f"whether {length} is right with AUC {found['assigner']:.3f} (the pass {found['confidence']:.3f}, "
                f"both {found['evidence']:.3f}), calibration error {found['calibration_error']:.3f}"
            )
        share = costs.assigner / costs.per_length[0]
        lines.append(f"it costs {share:.1%} of a full-length pass, measured on {costs.device}")
        print("\n".join(f"revit: {line}" for line in lines), file=sys.stderr)
    return 0
