"""`revit label`."""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from revit_kernels.adaptive.outcomes import name_of
from revit_kernels.cli.arguments import add_batch_tokens, add_device, add_dtype, add_images, refuse_overwriting, seed
from revit_kernels.cli.clips import add_clips, open_data
from revit_kernels.cli.progress import Progress
from revit_kernels.data.division import folds
from revit_kernels.files import parse_json
from revit_kernels.grids import grid_text
from revit_kernels.models.registry import load_resizable, model_file
from revit_kernels.training.labels import collect, fit_images, join
from revit_kernels.training.run_folder import SETTINGS

INTERRUPTED = "interrupted: the same command goes on from what was found"

EXAMPLES = """\
examples:
  revit label run/model.safetensors --data cifar10 --held-out 5000 --probabilities --output labels.parquet
  revit label revit.safetensors --data photos/ --against full --unsolved drop --output labels.parquet
  revit label fold1.safetensors --fold-models fold2.safetensors fold3.safetensors --data photos/ --output labels.parquet

Labels from training images are overconfident: give --held-out N as to `revit train` to mark those that were kept
apart, from which budgets are solved; or train K models with --fold I/K and name all of them in this order, and each
labels its own fold. Labels of folds are meant for a model trained on all the images, which cannot be checked.

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
        "--held-out", type=float, default=0, metavar="N", help="mark those that `revit train` kept apart"
    )
    label.add_argument("--seed", type=seed, default=0, help="of --held-out and of the folds, as in training")
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
    label.add_argument("--probabilities", action="store_true", help="keep those of all classes: an assigner needs them")
    add_clips(label)
    add_batch_tokens(label)
    add_device(label)
    add_dtype(label)
    label.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return label


def run(args) -> int:
    """`revit label`; returns the exit status."""
    output = Path(args.output)
    if output.suffix != ".parquet":
        raise ValueError(f"--output must end in .parquet, got {args.output}")
    if not output.resolve().parent.is_dir():
        raise ValueError(f"the folder of --output {output} does not exist")
    refuse_overwriting("--output", output, [args.model, *args.fold_models, args.data])
    images = open_data(args, args.model)
    files = [args.model, *args.fold_models]
    parts = [images]
    if len(files) > 1:
        if args.held_out:
            raise ValueError("--held-out and --fold-models are two ways to keep images apart: give one")
        check_folds(files, args.seed)
        of_fold = folds(images.targets, len(files), args.seed)
        parts = [images.subset(np.flatnonzero(of_fold == fold)) for fold in range(len(files))]
    elif args.held_out:
        apart = set(images.split(args.held_out, args.seed)[1].keys)
    options = {name: getattr(args, name) for name in ("unsolved", "rule", "against", "probabilities", "batch_tokens")}
    found = []
    folders = [output.with_name(f".{output.name}.partial{number}") for number in range(len(files))]
    if warning := learnt(args):
        print(f"revit: warning: {warning}", file=sys.stderr)
    with Progress(sum(map(len, parts)), quiet=args.quiet) as bar:
        for file, part, folder in zip(files, parts, folders):
            model = load_resizable(file, args.device, args.dtype)
            found.append(
                collect(
                    model,
                    fit_images(part, model, args.against == "truth"),
                    progress=bar.update,
                    partial=folder,
                    **options,
                )
            )
    outcomes = found[0] if len(found) == 1 else join(found)
    if args.held_out:
        names = {name_of(key) for key in apart}
        outcomes = replace(outcomes, held_out=np.array([key in names for key in outcomes.keys], bool))
    outcomes.save(output)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    if not args.quiet:
        print("\n".join(summary(outcomes)), file=sys.stderr)
    return 0


def check_folds(files: list[str], seed: int) -> None:
    """Raise ValueError for a model whose run's folder shows that it left out another fold than it is to label."""
    for number, file in enumerate(files, 1):
        try:
            run = parse_json((Path(model_file(file)).parent / SETTINGS).read_text())
            found = run["fold"], run["seed"]
        except (OSError, ValueError, KeyError, TypeError):  # not the folder of a run
            continue
        if found != (f"{number}/{len(files)}", seed):
            left = "no fold" if found[0] is None else f"fold {found[0]}"
            raise ValueError(
                f"model {number} of {len(files)} must have left out fold {number}/{len(files)} with --seed {seed}, but "
                f"{file} left out {left} with --seed {found[1]}"
            )


def learnt(args) -> str | None:
    """A warning that the model was trained on these images, as its run's folder shows; None if it was not."""
    path = Path(model_file(args.model)).parent / SETTINGS
    try:
        run = parse_json(path.read_text())
        same = run["split"] == args.split and _place(run["data"]) == _place(args.data)
        held, fold, seed = float(run["held_out"] or 0), run["fold"], run["seed"]
    except (OSError, ValueError, KeyError, TypeError):  # not the folder of a run
        return None
    if not same or (fold and args.fold_models):
        return None
    begin = "labels from training images are overconfident: the model was trained on"
    if fold:
        return f"{begin} all of these images but fold {fold}: name the models of the other folds with --fold-models"
    if not held:
        return f"{begin} all of these images. Keep some apart with `revit train --held-out`, or train --fold models"
    if (args.held_out, args.seed) != (held, seed):
        return f"{begin} some of these images; give --held-out {held:g} --seed {seed}, as its training did"
    return None


def _place(data: str) -> str:
    return str(Path(data).resolve()) if Path(data).exists() else data


def summary(outcomes) -> list[str]:
    """A line for each length: the share of held-out images that it gets right, and whose label it is."""
    (learnt, outcomes), lines = outcomes.apart(), []
    if learnt is not None:
        lines.append(f"revit: of {len(outcomes):,} held-out images, {len(learnt):,} others are labelled too:")
    for row, grid in enumerate(outcomes.menu):
        share, labels = outcomes.correct[:, row].mean(), (outcomes.label == row).mean()
        lines.append(f"revit: {grid_text(grid)} is right on {share:.2%} of them, and is the label of {labels:.2%}")
    dropped = int((outcomes.label < 0).sum())
    return lines + ([f"revit: {dropped:,} images that no length gets right have no label"] if dropped else [])
