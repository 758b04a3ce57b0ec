"""Ray, connected to without leaving it this process's signals."""

import logging
import signal
import threading

import ray


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one here, unless that was done; Python's signal handlers stay.

    Ray's own, of SIGTERM, has the process aborted 3 seconds later, whatever it has still to put in order. Raises
    RuntimeError where Ray does not start.
    """
    if ray.is_initialized():
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, ValueError, RuntimeError):
        raise
    except Exception as error:  # Ray raises it where a process of its does not start in time
        raise RuntimeError(f"Ray does not start: {' '.join(str(error).split())}") from error
    keep(before)


def keep(handlers: dict) -> None:
    """Set Python's handlers of signals again; without a word where this is not the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # None: not of Python's
                signal.signal(number, handler)
