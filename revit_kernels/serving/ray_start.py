"""Ray, connected to without leaving it this process's signals."""

import logging
import signal
import threading

import ray


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one here, unless Ray is connected; Python's signal handlers stay.

    Ray's own handler of SIGTERM aborts the process after 3 seconds, even while it shuts down. Raises RuntimeError if
    Ray does not start.
    """
    if ray.is_initialized():
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, ValueError, RuntimeError):
        raise
    except Exception as error:  # Ray raises it if one of its processes does not start in time
        raise RuntimeError(f"Ray does not start: {' '.join(str(error).split())}") from error
    keep(before)


def keep(handlers: dict) -> None:
    """Set Python's signal handlers again; does nothing outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)
