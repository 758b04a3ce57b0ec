"""The `revit` command: a module per subcommand, each with `add` (its arguments) and `run` (which imports the work).

INTERRUPTED, where a module has it, is what an interrupted command prints: how to resume it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
import warnings
from contextlib import suppress
from importlib import import_module

COMMANDS = (
    "infer",
    "serve",
    "train",
    "label",
    "train_assigner",
    "costs",
    "evaluate",
    "bench",
    "data",
    "samples",
    "models",
    "info",
    "completion",
)  # modules here, in the order of --help


class _Parser(argparse.ArgumentParser):
    """Reports an error as one sentence, with the nearest known name, instead of the usage."""

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # here, where the command's options are known
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message):
        given, known = re.search(r"unrecognized arguments: (-[^ =]+)", message), self._option_string_actions
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            given, known = choice, re.findall(r"[^\s',]+", choice[2])
        near = difflib.get_close_matches(given[1], known, n=1) if given else []
        message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, _clean(f"{self.prog}: error: {message}") + "\n")


def parser(command: str = "") -> argparse.ArgumentParser:
    """The whole parser; or one that knows the command alone, and imports nothing of the others."""
    main = _Parser(prog="revit", description="Vision Transformers on images of different token lengths, packed.")
    main.add_argument("--version", action="store_true", help="print the version and exit")
    commands = main.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    chosen = command.replace("-", "_")
    for name in (chosen,) if chosen in COMMANDS else COMMANDS:
        module = import_module(f"revit_kernels.cli.{name}")
        module.add(commands).set_defaults(run=module.run)
    return main


def _version() -> str:
    from revit_kernels import __version__

    return f"revit_kernels {__version__}"


def _terminate(number, frame):
    sys.exit(128 + number)  # an exception, so that temporary files are removed


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Errors are one sentence on standard error."""
    _open_streams()
    previous, formatwarning = _catch(), warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"revit: warning: {_clean(message)}\n"
    args = None
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = parser(*argv[:1]).parse_args(argv)
        if args.version:
            print(_version())
            return 0
        if args.command is None:
            parser().print_help()
            return 2
        return args.run(args)
    except KeyboardInterrupt:
        module = sys.modules.get(getattr(getattr(args, "run", None), "__module__", ""))
        _say(f"revit: {getattr(module, 'INTERRUPTED', 'interrupted')}")
        return 130
    except BrokenPipeError:  # the reader of the pipe has what it wanted
        _forget_output()
        return 141
    except (ValueError, NotImplementedError, ImportError) as error:
        return _error(error, 2)
    except (OSError, RuntimeError) as error:
        return _error(error, 1)
    except MemoryError:
        return _error("out of memory", 1)
    finally:
        warnings.formatwarning = formatwarning
        for number, handler in previous.items():
            signal.signal(number, handler)


def _open_streams() -> None:
    """Open /dev/null for each closed standard stream, so that no other file gets its descriptor.

    sys.stdout stays None: the writers of records report it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def _catch() -> dict:
    """Turn signals that end the process into exceptions; returns the previous handlers."""
    previous = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
            try:
                previous[number] = signal.signal(number, _terminate)
            except ValueError:  # not the main thread
                break
    return previous


def _clean(message) -> str:
    """The message in one line, without control characters."""
    text = " ".join(str(message).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _say(text: str) -> None:
    with suppress(OSError):  # whoever read it has gone
        print(text, file=sys.stderr, flush=True)


def _error(error: Exception | str, status: int) -> int:
    _say(f"revit: error: {_clean(error)}")
    if sys.stdout is not None and sys.stdout is sys.__stdout__:
        try:
            sys.stdout.flush()
        except OSError:  # on a full disk: it would be tried again at exit
            _forget_output()
    return status


def _forget_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
