"""`revit infer`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from contextlib import contextmanager, suppress

import torch
from PIL import Image

from revit_kernels import dispatch
from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.cli import hints
from revit_kernels.cli.answers import on_terminal, open_answers, through_a_pipe
from revit_kernels.cli.arguments import add_batch_tokens, add_device, add_dtype, count, grids
from revit_kernels.cli.gallery import Gallery, check_gallery
from revit_kernels.cli.progress import Progress
from revit_kernels.data.images import find_images, left_out_text, printable, show
from revit_kernels.devices import choose_device, choose_dtype
from revit_kernels.models.registry import SHIPPED, SHIPPED_ASSIGNER
from revit_kernels.serving.compare import Sample, compare, table
from revit_kernels.serving.infer import GridRule, Totals, closing_line, full_length, images_text, infer
from revit_kernels.serving.prepare import load_model, make_engine, read_labels
from revit_kernels.serving.records import Columns, check_output

LISTED = 10  # how many broken images are named on standard error; the records name them all

EXAMPLES = """\
examples:
  revit infer clothes/
  revit infer photos/ --model revit.safetensors --assigner assigner.safetensors --budget 2x
  revit infer photos/ --model deit_small_patch16_224 --pretrained
  revit infer photos/ more.jpg "scans/*.png" @list.txt --model weights.safetensors --output answers.csv
  revit infer photos/ --model vit_small_patch14_dinov2 --checkpoint dinov2.safetensors --features --output features.npz
  revit infer photos/ --model deit_small_patch16_224 --pretrained --grids 14x14,10x10,7x7 --compare
  revit infer tiles/ --model flexivit_small --pretrained --grids 8x8 --method patch

A PATH is an image, a folder, an archive (.tar, .zip, a .parquet with a column of images), a pattern such as
"photos/**/*.jpg", a data URL, or a list (@FILE or a .txt file, a path a line, no patterns, # begins a comment; "@-"
reads standard input). An image that is missing or broken becomes a record with its error; the others are unharmed.

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
        help="timm's name, a .safetensors file, or the folder of a run (default: the small ReViT that comes with the "
        "package, which tells ten kinds of clothes apart)",
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
        help="who gives each image its length (default: assigner+cascade with an assigner, cascade with --outcomes)",
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
        "--output",
        "-o",
        metavar="FILE",
        help=".jsonl, .csv, .parquet or .npz (default: a table on a terminal, JSON lines to a pipe)",
    )
    output.add_argument("--json", action="store_true", help="JSON lines on a terminal too")
    output.add_argument(
        "--gallery", metavar="FILE", help="also write an .html page: each image as it was read, its class and its cost"
    )
    output.add_argument("--features", action="store_true", help="write features instead of classes")
    output.add_argument("--top", type=count, metavar="K", default=5, help="classes per image (default: 5)")
    output.add_argument("--labels", metavar="FILE", help="class names: one a line, .json or .csv")
    output.add_argument("--compare", action="store_true", help="also time the first images padded, and per length")
    output.add_argument(
        "--workers", type=count, metavar="N", help="threads that decode (default: one per core, 16 at most)"
    )
    output.add_argument("--quiet", "-q", action="store_true", help="no progress, no closing line")
    return infer


def run(args) -> int:
    """`revit infer`; returns the exit status.

    Raises ValueError for what the user got wrong, RuntimeError for a run that failed.
    """
    check_output(args.output)
    check_gallery(args.gallery)
    _check_options(args)
    paths, empty, problems, left_out = find_images(args.paths, args.recursive)
    _check_overwritten(args, paths)
    others = left_out_text(left_out)
    if not paths:
        none = [f"there are no images in {', '.join(show(path) for path in empty)}"] if empty else []
        raise ValueError("; ".join(problems + none + ([others] if others else [])) or "no images")
    for path in empty:
        _say(f"revit: warning: there are no images in {show(path)}")
    with dispatch.use_backend(args.backend), warnings.catch_warnings():
        # Our own check makes an error record of an image bomb; Pillow's other warnings would break the progress bar.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module="PIL")
        device = choose_device(args.device)
        with _out_of_memory(device, args.batch_tokens):
            totals = _answer(args, paths, device, others)
    for problem in problems:
        _say(f"revit: {problem}")
    return max(_report(totals), 1 if problems else 0)


def _answer(args, paths: list[str], device: torch.device, others: str | None) -> Totals:
    name = args.model or str(SHIPPED)
    model = load_model(
        name,
        checkpoint=args.checkpoint,
        pretrained=args.pretrained,
        untrained=args.untrained,
        device=device,
        dtype=choose_dtype(args.dtype, device),
    )
    model.patch_method = args.method
    model = make_engine(model, args.quantize)
    hints.check_tokens(args.grids, args.max_tokens, full_length(model))
    adaptive = _adaptive(args, model)
    if not args.quiet:
        for warning in _warnings(args, model, adaptive):
            _say(f"revit: warning: {warning}")
    columns = _columns(args, model, adaptive is not None)
    rule = GridRule(
        model.patch_embed.patch_size,
        args.max_tokens or full_length(model),
        args.grids if adaptive is None else (model.menu[0],),
        crop=args.fit != "squash",
        resize=args.method == "resize",
    )
    sample = Sample() if args.compare else None
    gallery, keep = _gallery(args, adaptive or model, columns), None
    if sample or gallery:
        keep = _each([kept.keep for kept in (sample, gallery) if kept])
    bar = Progress(len(paths), quiet=args.quiet, lines=through_a_pipe(args.output))
    answers = open_answers(args.output, columns, paths, full_length(model), bar, args.json, gallery)
    with bar, _written(args.output), answers as writer:
        totals = infer(
            adaptive or model,
            paths,
            rule,
            writer,
            features=args.features,
            batch_tokens=args.batch_tokens,
            workers=args.workers or min(16, _cores()),
            progress=bar.update,
            keep=keep,
        )
    if gallery is not None:
        with _written(args.gallery, "--gallery"):
            gallery.save(totals, args.model or "The ReViT that comes with the package")
    if not args.quiet:
        _say(("\n" if on_terminal(args.output, args.json) else "") + closing_line(totals, others))
    if sample is not None and sample.pixels:
        _say(table(*compare(model, sample, args.batch_tokens), images=len(sample.pixels)))
    return totals


@contextmanager
def _out_of_memory(device: torch.device, batch_tokens: int):
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on the CPU only the text tells
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    except MemoryError:
        pass
    else:
        return
    raise RuntimeError(f"{device} ran out of memory: give fewer --batch-tokens than {batch_tokens}, or a smaller model")


@contextmanager
def _written(output: str | None, option: str = "--output"):
    try:
        yield
    except BrokenPipeError:  # no failure: the reader has what it wanted
        raise
    except OSError as error:  # of an image it would be a record
        name = f"{option} {output}" if output else "standard output"
        raise RuntimeError(f"{name} could not be written: {error.strerror or error}") from error


def _gallery(args, model, columns: Columns) -> Gallery | None:
    if args.gallery is None:
        return None
    plain = model.model if isinstance(model, AdaptiveViT) else model
    prefix = plain.num_prefix_tokens
    return Gallery(args.gallery, columns, prefix, prefix + full_length(plain), plain.patch_embed.patch_size)


def _each(functions: list):
    def call(*arguments):
        for function in functions:
            function(*arguments)

    return call


def _say(text: str) -> None:
    with suppress(OSError):  # whoever read it has gone; the records are what counts
        print(printable(text), file=sys.stderr, flush=True)


def _check_overwritten(args, paths: list[str]) -> None:
    """Raise ValueError where the output would take the place of an input."""
    if args.output is None or not os.path.exists(args.output):
        return
    suffix = os.path.splitext(os.path.realpath(args.output))[1].lower()
    for path in [*(path.removeprefix("@") for path in args.paths), *paths]:
        real = os.path.realpath(path)
        if real.lower().endswith(suffix) and os.path.exists(real) and os.path.samefile(real, args.output):
            raise ValueError(f"--output {args.output} is an input: it would be overwritten")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_options(args) -> None:
    if args.grids and args.max_tokens:
        raise ValueError("--max-tokens goes with --grids auto; a list of grids says the tokens itself")
    if args.policy and (others := _leaves_no_policy(args)):
        raise ValueError(
            f"--policy gives each image a length of the model's menu: it does not go with {' or '.join(others)}"
        )
    if args.json and args.output:
        raise ValueError("--json is for standard output: leave it out, or name an --output that ends in .jsonl")
    if (args.checkpoint or args.pretrained or args.untrained) and not args.model:
        raise ValueError("--checkpoint, --pretrained and --untrained are of a --model: name one")
    if args.fit and args.model and not args.grids and not args.policy:
        raise ValueError("--fit goes with a list of --grids; with --grids auto the whole image is used, unstretched")
    if args.method == "patch" and args.compare:
        raise ValueError("--compare times images that are resized: leave out --method patch")
    if args.method == "patch" and args.fit == "squash":
        raise ValueError("--fit squash stretches the image; with --method patch it keeps its size")
    if args.features and args.labels:
        raise ValueError("--labels names classes; with --features there are none")
    if args.backend and args.backend not in dispatch.BACKENDS:
        raise ValueError(f"--backend must be one of {', '.join(dispatch.BACKENDS)}, got {args.backend!r}")


def _warnings(args, model, adaptive: AdaptiveViT | None) -> list[str]:
    menu = getattr(model, "menu", None)
    found = hints.lengths(args.grids, args.max_tokens, menu, full_length(model))
    if adaptive is None:
        known = bool(args.assigner or args.outcomes or not args.model)
        found += [why for why in [hints.no_policy(menu, known, _leaves_no_policy(args))] if why]
    return found


def _leaves_no_policy(args) -> list[str]:
    """The options that decide the lengths without a policy."""
    given = {"--grids": args.grids, "--max-tokens": args.max_tokens, "--compare": args.compare}
    return [name for name, value in given.items() if value] + (["--method patch"] if args.method == "patch" else [])


def _columns(args, model, adaptive: bool) -> Columns:
    if args.features:
        return Columns(features=model.num_features, adaptive=adaptive)
    if model.num_classes < 1:
        raise ValueError(f"{args.model} has no classes: ask for --features")
    return Columns(
        classes=model.num_classes,
        top=min(args.top, model.num_classes),
        labels=read_labels(args.labels, model),
        adaptive=adaptive,
    )


def _report(totals: Totals) -> int:
    if not totals.errors:
        return 0
    for path, error in totals.errors[:LISTED]:
        _say(f"revit: {show(path)}: {error}")
    more = len(totals.errors) - LISTED
    if more > 0:
        _say(f"revit: and {more:,} more, each with its error in its record")
    _say(f"revit: {len(totals.errors):,} of {images_text(totals.images)} could not be answered")
    return 1


def _adaptive(args, model) -> AdaptiveViT | None:
    """The model with the policy that the arguments ask for; None where each image's size decides its length.

    Without --policy: a cascade, where the model is a ReViT and held-out answers of it are known, unless --grids,
    --max-tokens, --compare or --method say otherwise.
    Raises ValueError where a policy is asked for that cannot be had.
    """
    otherwise = _leaves_no_policy(args)
    file = args.assigner or (SHIPPED_ASSIGNER if not args.model else None)
    known = file is not None or args.outcomes
    if not args.policy and (otherwise or not known or model.menu is None):
        if args.assigner or args.outcomes or args.budget:
            raise ValueError("--assigner, --outcomes and --budget go with a --policy and a ReViT")
        return None
    if model.menu is None:
        raise ValueError(f"--policy {args.policy} needs a ReViT: {args.model} knows one length only")
    parameter = next(model.parameters())
    assigner = None
    if file is not None:
        assigner = TokenLengthAssigner.load(file).to(parameter.device, parameter.dtype)
    outcomes = Outcomes.load(args.outcomes) if args.outcomes else None
    policy = args.policy or ("cascade" if assigner is None or outcomes is not None else "assigner+cascade")
    if policy == "oracle":
        raise ValueError("--policy oracle asks the truth: it is for `revit evaluate`")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        adaptive = AdaptiveViT(model, policy, assigner=assigner, outcomes=outcomes, budget=args.budget or "full").eval()
    for warning in told:
        _say(f"revit: warning: {warning.message}")
    return adaptive
