"""The `revit` command from its first moment: an interrupt while its libraries are imported is one line, too."""

import atexit
import gc
import os
import signal


def _interrupted(number, frame):
    os.write(2, b"revit: interrupted\n")
    os._exit(130)  # at once: nothing has begun, or all is done


def _catch(handler) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a job in the background
        signal.signal(signal.SIGINT, handler)


def main() -> int:
    """Run the command; returns its exit status."""
    _catch(_interrupted)
    atexit.register(_catch, signal.SIG_IGN)  # last of all: Python drops handlers before it ends, but keeps this one
    from revit_kernels import cli

    try:
        try:
            _catch(signal.default_int_handler)
            return cli.main()
        finally:  # after --help, too, which ends by SystemExit
            _catch(_interrupted)
            gc.freeze()  # or Python looks through all of torch's objects once more as it exits, which takes a second
    except KeyboardInterrupt:  # a second one, while the first was told of
        _interrupted(None, None)
