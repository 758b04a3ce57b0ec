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
from revit_kernels.cli import hints
from revit_kernels.cli.answers import Answers, on_terminal, through_a_pipe
from revit_kernels.cli.arguments import (
    add_batch_tokens,
    add_grids,
    add_policy,
    add_weights,
    count,
    refuse_overwriting,
)
from revit_kernels.cli.clips import add_clips, takes_clips
from revit_kernels.cli.gallery import check_gallery, gallery_of
from revit_kernels.cli.progress import Progress
from revit_kernels.data.images import SUFFIXES as IMAGES
from revit_kernels.data.images import find_images, left_out_text, printable, show
from revit_kernels.devices import choose_device
from revit_kernels.serving.clips import SUFFIXES
from revit_kernels.serving.compare import Sample, compare, table
from revit_kernels.serving.infer import Totals, closing_line, counted, full_length, infer
from revit_kernels.serving.journal import SHARD_ROWS, check_begin, is_finished, open_run, run_settings
from revit_kernels.serving.prepare import Prepared, Settings, prepare
from revit_kernels.serving.records import check_output, is_folder

LISTED = 10  # broken images that standard error lists; the records have them all

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
"photos/**/*.jpg", a data URL, or a list (@FILE or a .txt file, a path a line, no patterns, # begins a comment; "-"
reads one from standard input). With a model of clips it is a video (mp4, webm, mkv, avi, mov, GIF, ...), or an image,
which is a clip in which nothing moves. What is missing or broken becomes a record with its error; the others are
unharmed.

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
    add_weights(model, "--model NAME")
    model.add_argument("--backend", help="run every op on this backend, or fail (python -m revit_kernels lists them)")

    tokens = infer.add_argument_group("tokens")
    add_grids(tokens)
    tokens.add_argument(
        "--method",
        choices=("resize", "patch"),
        default="resize",
        help="what fits an image to its grid: the image is resized (default), or the patch kernel is, as in FlexiViT; "
        "the image's size must then be a whole multiple of the grid",
    )
    add_batch_tokens(tokens, 8192)
    add_clips(infer, several=True)

    add_policy(infer.add_argument_group("lengths chosen by a policy (of a ReViT)"))

    output = infer.add_argument_group("output")
    output.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help=".jsonl, .csv, .parquet or .npz, or a folder (ending in /) for parquet shards (default: a table on a "
        "terminal, JSON lines to a pipe)",
    )
    output.add_argument("--json", action="store_true", help="JSON lines on a terminal too")
    output.add_argument(
        "--gallery", metavar="FILE", help="also write an .html page: each image as it was read, its class and its cost"
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was interrupted or killed: its records are kept in FILE.partial, or in the folder",
    )
    output.add_argument(
        "--shard-rows",
        type=count,
        metavar="N",
        default=SHARD_ROWS,
        help=f"records of a shard, with a folder (default: {SHARD_ROWS})",
    )
    cluster = infer.add_argument_group("on a cluster")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster (default: the one that this machine belongs to, or this machine); each archive, and "
        "each 1,000 paths, become a shard; --resume does what has no shard yet",
    )
    cluster.add_argument(
        "--actors", type=count, metavar="N", help="default: one for each GPU, or for each --actor-cpus"
    )
    cluster.add_argument("--actor-cpus", type=count, default=1, metavar="N", help="CPUs of an actor (default: 1)")

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

    Raises ValueError for wrong arguments, RuntimeError for a run that failed.
    """
    check_output(args.output)
    check_gallery(args.gallery)
    _check_options(args)
    if args.output:
        check_begin(args.output, args.resume)
        if args.resume and is_finished(args.output):
            _say(f"revit: {args.output} is finished: there is nothing to go on with")
            return 0
    settings = Settings.of(args)
    clips = _takes_clips(args)
    suffixes, what = (SUFFIXES, "videos or images") if clips else (IMAGES, "images")
    paths, empty, problems, left_out = find_images(args.paths, args.recursive, suffixes, inside=args.ray is None)
    read = [args.model, args.checkpoint, args.labels, args.assigner, args.outcomes]
    read += [path.removeprefix("@") for path in args.paths] + paths
    refuse_overwriting("--output", args.output, read)
    refuse_overwriting("--gallery", args.gallery, read)
    others = left_out_text(left_out, what)
    if not paths:
        none = [f"there are no {what} in {', '.join(show(path) for path in empty)}"] if empty else []
        raise ValueError("; ".join(problems + none + ([others] if others else [])) or f"no {what}")
    for path in empty:
        _say(f"revit: warning: there are no {what} in {show(path)}")
    if args.ray is not None:
        return _on_cluster(args, settings, paths, problems, left_out)
    with dispatch.use_backend(args.backend), warnings.catch_warnings():
        # Decompression bombs become error records; Pillow's other warnings would break the progress bar.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module="PIL")
        device = choose_device(args.device)
        with _out_of_memory(device, args.batch_tokens):
            totals = _answer(args, settings, paths, others)
    for problem in problems:
        _say(f"revit: {problem}")
    return max(_report(totals), 1 if problems else 0)


def _answer(args, settings: Settings, paths: list[str], others: str | None) -> Totals:
    prepared = _prepared(settings, args.compare)
    model = prepared.answerer
    for hint in [] if args.quiet else hints.hints(args, prepared):
        _say(f"revit: warning: {hint}")
    sample, gallery = Sample() if args.compare else None, gallery_of(args.gallery, prepared)
    run = open_run(args.output, prepared.columns, run_settings(prepared), paths, args.shard_rows, _kept)
    with _written(args.output), run as run:
        if run.done:
            _say(f"revit: records kept from the interrupted run: {run.done:,}")
        full, lines = full_length(prepared.model), through_a_pipe(args.output)
        with Progress(len(paths), done=run.done, quiet=args.quiet, lines=lines) as bar:
            totals = infer(
                model,
                paths[run.done :],
                prepared.rule,
                Answers(run, args.output, prepared.columns, paths, full, bar, args.json, gallery),
                features=args.features,
                batch_tokens=args.batch_tokens,
                workers=args.workers or min(16, _cores()),
                progress=bar.update,
                keep=_each([kept.keep for kept in (sample, gallery) if kept]),
            )
    if gallery is not None:
        with _written(args.gallery, "--gallery"):
            gallery.save(totals, args.model or "The ReViT that comes with the package")
    if not args.quiet and totals.images > len(totals.errors):
        _say(("\n" if on_terminal(args.output, args.json) else "") + closing_line(totals, others))
    if sample is not None and sample.pixels:
        _say(table(*compare(prepared.model, sample, args.batch_tokens), images=len(sample.pixels)))
    totals.errors[:0] = run.errors
    totals.images += run.done
    return totals


def _on_cluster(args, settings: Settings, paths: list[str], problems: list[str], left_out) -> int:
    try:
        from revit_kernels.serving.ray_data import Cluster
    except ImportError as error:
        raise ValueError(f"--ray needs Ray: pip install 'ray[data,serve]' pyarrow ({error})") from None
    cluster = Cluster(
        paths,
        os.path.realpath(args.output),
        settings,
        address=args.ray or None,
        backend=args.backend,
        batch_tokens=args.batch_tokens,
        workers=args.workers,
        actors=args.actors or 0,
        cpus=args.actor_cpus,
    )
    if cluster.done:
        _say(f"revit: {cluster.done:,} of {cluster.all:,} shards were written before")
    totals = Totals()
    with Progress(quiet=args.quiet) as bar:
        for number, part in enumerate(cluster.run(), cluster.done + 1):
            totals.kind = part.kind if part.images else totals.kind
            for name in ("images", "tokens", "full", "errors"):
                setattr(totals, name, getattr(totals, name) + getattr(part, name))
            totals.seconds = part.seconds
            bar.note = f"shard {number:,} of {cluster.all:,}"
            bar.update(part.images)
    if not args.quiet and totals.images:
        _say(closing_line(totals, left_out_text(left_out + cluster.left_out)))
    for problem in problems + cluster.problems:
        _say(f"revit: {problem}")
    return max(_report(totals), 1 if problems or cluster.problems else 0)


def _kept(count: int) -> None:
    _say(f"revit: records kept: {count:,}; the same command with --resume goes on")


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
    except BrokenPipeError:  # not a failure: the reader has what it wanted
        raise
    except OSError as error:  # of the output: an image's error becomes a record
        name = f"{option} {output}" if output else "standard output"
        raise RuntimeError(f"{name} could not be written: {error.strerror or error}") from error


def _each(functions: list):
    """A function that calls each of these; None for none."""

    def call(*arguments):
        for function in functions:
            function(*arguments)

    return call if functions else None


def _say(text: str) -> None:
    with suppress(OSError):  # standard error is closed; the records matter more
        print(printable(text), file=sys.stderr, flush=True)


def _takes_clips(args) -> bool:
    """Whether the model takes clips. Raises ValueError for options that such a model does not support."""
    try:
        clips = args.model is not None and takes_clips(args.model)
    except ValueError:  # reported where the model is loaded
        return False
    if clips and (args.compare or args.ray is not None):
        raise ValueError(f"{'--compare' if args.compare else '--ray'} is for models of images, and {args.model} is not")
    return clips


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_options(args) -> None:
    if args.compare and args.policy:
        raise ValueError("--policy gives each image a length of the model's menu: it does not go with --compare")
    if args.json and args.output:
        raise ValueError("--json is for standard output: leave it out, or name an --output that ends in .jsonl")
    if args.compare and args.method == "patch":
        raise ValueError("--compare times images that are resized: leave out --method patch")
    if args.ray is not None:
        _check_ray(args)
    if args.resume and not args.output:
        raise ValueError("--resume goes on with an --output: records on standard output are not kept")
    if args.backend and args.backend not in dispatch.BACKENDS:
        raise ValueError(f"--backend must be one of {', '.join(dispatch.BACKENDS)}, got {args.backend!r}")


def _check_ray(args) -> None:
    if args.ray and args.ray not in ("auto", "local") and ":" not in args.ray:
        raise ValueError(f"--ray {args.ray}: an address is HOST:PORT, ray://HOST:PORT or auto; --ray alone goes last")
    if args.compare or args.gallery or args.json:
        raise ValueError("--compare, --gallery and --json are for one machine: leave out --ray")
    if not args.output or not is_folder(args.output):
        raise ValueError("--ray writes parquet shards to a folder: give --output FOLDER/, on a disk that all nodes see")


def _prepared(settings: Settings, plain: bool) -> Prepared:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        prepared = prepare(settings, plain)
    for warning in told:
        _say(f"revit: warning: {warning.message}")
    return prepared


def _report(totals: Totals) -> int:
    if not totals.errors:
        return 0
    for path, error in totals.errors[:LISTED]:
        _say(f"revit: {show(path)}: {error}")
    more = len(totals.errors) - LISTED
    if more > 0:
        _say(f"revit: and {more:,} more, each with its error in its record")
    _say(f"revit: {len(totals.errors):,} of {counted(totals)} could not be answered")
    return 1
