"""What `revit infer` does with its arguments."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager

import torch
from PIL import Image
from tqdm import tqdm

from revit_kernels import dispatch
from revit_kernels.data.images import find_images, show
from revit_kernels.serving.adapt import SHIPPED, make_adaptive
from revit_kernels.serving.compare import Sample, compare, table
from revit_kernels.serving.infer import GridRule, Totals, full_length, infer
from revit_kernels.serving.prepare import choose_device, choose_dtype, load_model, make_engine, read_labels
from revit_kernels.serving.records import Columns, check_output, open_records

LISTED = 10  # how many broken images are named on standard error; the records name them all


def run(args) -> int:
    """`revit infer`; returns the exit status.

    Raises ValueError for what the user got wrong, RuntimeError for a run that failed.
    """
    check_output(args.output)
    _check_options(args)
    paths, empty, problems = find_images(args.paths, args.recursive)
    if not paths:
        none = [f"there are no images in {', '.join(show(path) for path in empty)}"] if empty else []
        raise ValueError("; ".join(problems + none) or "no images")
    for path in empty:
        _say(f"revit: warning: there are no images in {show(path)}")
    with dispatch.use_backend(args.backend), warnings.catch_warnings():
        # Our own check makes an error record of an image bomb; Pillow's other warnings would break the progress bar.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module="PIL")
        device = choose_device(args.device)
        with _out_of_memory(device, args.batch_tokens):
            totals = _answer(args, paths, device)
    for problem in problems:
        _say(f"revit: {problem}")
    return max(_report(totals), 1 if problems else 0)


def _answer(args, paths: list[str], device: torch.device) -> Totals:
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
    adaptive = make_adaptive(args, model)
    columns = _columns(args, model, adaptive is not None)
    rule = GridRule(
        model.patch_embed.patch_size,
        args.max_tokens or full_length(model),
        args.grids if adaptive is None else (model.menu[0],),
        crop=args.fit != "squash",
        resize=args.method == "resize",
    )
    sample = Sample() if args.compare else None
    bar = tqdm(total=len(paths), unit=" images", disable=True if args.quiet else None, file=sys.stderr)
    with bar, _written(args.output), open_records(args.output, columns) as writer:
        totals = infer(
            adaptive or model,
            paths,
            rule,
            writer,
            features=args.features,
            batch_tokens=args.batch_tokens,
            workers=args.workers or min(16, _cores()),
            progress=bar.update,
            keep=sample.keep if sample else None,
        )
    if not args.quiet:
        _say(closing_line(totals, full_length(adaptive or model)))
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
def _written(output: str | None):
    try:
        yield
    except BrokenPipeError:  # no failure: the reader has what it wanted
        raise
    except OSError as error:  # of an image it would be a record
        name = f"--output {output}" if output else "standard output"
        raise RuntimeError(f"{name} could not be written: {error.strerror or error}") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_options(args) -> None:
    if args.grids and args.max_tokens:
        raise ValueError("--max-tokens goes with --grids auto; a list of grids says the tokens itself")
    if args.policy and (args.grids or args.max_tokens or args.features or args.compare or args.method == "patch"):
        raise ValueError(
            "--policy gives each image a length of the model's menu: it does not go with --grids, --max-tokens, "
            "--features, --compare or --method patch"
        )
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


def _columns(args, model, adaptive: bool) -> Columns:
    if args.features:
        return Columns(features=model.num_features)
    if model.num_classes < 1:
        raise ValueError(f"{args.model} has no classes: ask for --features")
    return Columns(
        classes=model.num_classes,
        top=min(args.top, model.num_classes),
        labels=read_labels(args.labels, model),
        adaptive=adaptive,
    )


def closing_line(totals: Totals, length: int) -> str:
    """What the run came to, in one line."""
    seconds = max(totals.seconds, 1e-9)
    line = f"{_images(totals.images)} in {totals.seconds:.1f} s: {totals.images / seconds:,.1f} images/s"
    line += f", {totals.tokens / seconds:,.0f} tokens/s"
    if totals.full:
        share = totals.tokens / totals.full - 1
        change = "saved" if share <= 0 else "added"
        line += f", {abs(share):.0%} of tokens {change} against {length} an image"
    return f"{line}. {found}" if (found := bottleneck(totals)) else line


def bottleneck(totals: Totals) -> str | None:
    """Whether decoding or the model was the slower, each measured while the other stood still; None where either was
    not measured."""
    if totals.decoded is None or totals.answered is None:
        return None
    decoded, answered = (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}" for rate in (totals.decoded, totals.answered))
    if totals.decoded < totals.answered:
        return f"Decoding was the bottleneck: {decoded} images/s could be decoded, the model could take {answered}."
    return f"The model was the bottleneck: it could take {answered} images/s, {decoded} could be decoded."


def _report(totals: Totals) -> int:
    if not totals.errors:
        return 0
    for path, error in totals.errors[:LISTED]:
        _say(f"revit: {show(path)}: {error}")
    more = len(totals.errors) - LISTED
    if more > 0:
        _say(f"revit: and {more:,} more, each with its error in its record")
    _say(f"revit: {len(totals.errors):,} of {_images(totals.images)} could not be answered")
    return 1
