"""`revit evaluate`."""

import argparse
import shlex
import sys
from functools import partial

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import POLICIES, RunLength
from revit_kernels.cli.arguments import add_batch_tokens, add_device, add_dtype, add_images, count
from revit_kernels.cli.clips import add_clips, open_data
from revit_kernels.cli.progress import Progress
from revit_kernels.evaluation import plots, report
from revit_kernels.evaluation.evaluate import evaluate
from revit_kernels.models.registry import load_resizable
from revit_kernels.training.labels import fit_images


def _words(text: str) -> list[str]:
    """The words between commas, each once."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise argparse.ArgumentTypeError("must name at least one")
    return words


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers between commas, got {text!r}") from None


def add(commands):
    evaluate = commands.add_parser(
        "evaluate",
        help="report what a ReViT and its policies are worth, in accuracy and measured speed",
        description="Measures every length alone, and every policy at every budget, on the same images and machine, "
        "and writes a report: report.html (one page), report.md, report.json and pictures.",
    )
    evaluate.add_argument("model", metavar="FILE", help="a .safetensors file of `revit train`")
    evaluate.add_argument("--assigner", metavar="FILE", help="of `revit train-assigner`")
    evaluate.add_argument(
        "--labels", metavar="FILE", help="held-out labels to solve budgets from, instead of the assigner's"
    )
    add_images(evaluate, "test")
    evaluate.add_argument("--limit", type=count, metavar="N", help="only so many images, equally many of each class")
    evaluate.add_argument("--output", "-o", required=True, metavar="DIR", help="where the report goes")
    evaluate.add_argument(
        "--policies",
        type=_words,
        metavar="NAME,...",
        help=f"of {', '.join(POLICIES)} (default: all that apply, but scout+cascade)",
    )
    evaluate.add_argument(
        "--budgets",
        type=_words,
        default=["1.5x", "2x", "2.5x", "3x", "full-0.2"],
        metavar="BUDGET,...",
        help="2x (speed), 80tokens, 95%% (accuracy), full-0.3 (points below full length), full; "
        "default: 1.5x,2x,2.5x,3x,full-0.2",
    )
    evaluate.add_argument(
        "--run-length",
        type=_numbers,
        default=[],
        metavar="T,...",
        help="also without the tokens of clips that repeat the ones before them, at each of these thresholds; see "
        "`revit infer --run-length`",
    )
    evaluate.add_argument("--rounds", type=count, default=3, metavar="N", help="times each is timed (default: 3)")
    evaluate.add_argument(
        "--timed", type=count, metavar="N", help="images that are timed, equally many of each class (default: all)"
    )
    add_clips(evaluate)
    add_batch_tokens(evaluate)
    add_device(evaluate)
    add_dtype(evaluate)
    evaluate.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return evaluate


def run(args) -> int:
    images = open_data(args, args.model)
    if args.limit and args.limit < len(images):
        images = images.split(args.limit, 0)[1]
    model = load_resizable(args.model, args.device, args.dtype)
    if model.num_classes != len(images.classes):
        raise ValueError(f"{args.model} has {model.num_classes} classes, {images.name} has {len(images.classes)}")
    images = fit_images(images, model)
    assigner, parameter = None, next(model.parameters())
    if args.assigner:
        assigner = TokenLengthAssigner.load(args.assigner).to(parameter.device, parameter.dtype).require(model)
    held_out = Outcomes.load(args.labels).apart()[1] if args.labels else None

    def say(text: str) -> None:
        print(f"revit: {text}", file=sys.stderr)

    if not plots.available():
        say("the report has no plots: pip install matplotlib")
    report.check_folder(args.output)  # before hours of measuring
    found = evaluate(
        model,
        images,
        assigner=assigner,
        held_out=held_out,
        policies=args.policies,
        budgets=args.budgets,
        configurations=[(f"run-length {t:g}", AdaptiveViT(model, RunLength(t))) for t in args.run_length],
        rounds=args.rounds,
        timed=args.timed,
        batch_tokens=args.batch_tokens,
        say=say,
        bar=partial(Progress, quiet=args.quiet),
    )
    path = report.write(found, images, args.output, " ".join(["revit", *map(shlex.quote, sys.argv[1:])]))
    print("\n".join(report.verdict(found)).replace("**", ""))
    print(f"the report is {path.with_suffix('.html')}, and {path.name} beside it")
    return 0
