"""Progress of a command: a bar with rate and time left on a terminal, elsewhere an occasional line."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from tqdm import tqdm

from revit_kernels.serving.infer import clock

FIRST, EVERY = 10.0, 30.0  # seconds to the first line, and between lines


class _Bar(tqdm):
    monitor_interval = 0  # without tqdm's thread, `update` knows when the bar is drawn


class Progress:
    """Progress on standard error; nothing if `quiet`.

    total: how many steps there are; None while unknown
    unit:  plural noun for a step
    desc:  what is being done
    done:  steps that an earlier run has done
    lines: write lines on a terminal too, because another process writes to it

    Use `say`, or `clear` before other output, so that text does not run into the bar.
    """

    def __init__(
        self,
        total: int | None = None,
        unit: str = "images",
        desc: str = "",
        done: int = 0,
        quiet: bool = False,
        lines: bool = False,
    ):
        self.total, self.unit, self.desc, self.quiet, self.n, self.done = total, unit.strip(), desc, quiet, done, done
        self.began = self.reported = time.monotonic()
        self.wait, self.note, self._bar, self._drawn = FIRST, "", None, False
        if not quiet and not lines and sys.stderr.isatty():
            # The delay keeps the bar from flashing in a short run.
            how = {"initial": done, "file": sys.stderr, "dynamic_ncols": True, "leave": False, "delay": 0.5}
            self._bar = _Bar(total=total, desc=desc or None, unit=f" {self.unit}", **how)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def go_on_from(self, done: int) -> None:
        """Set how many steps an earlier run has done."""
        self.n = self.done = done
        if self._bar is not None:
            self._bar.n = self._bar.initial = done

    def update(self, count: int = 1) -> None:
        self.n += count
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(self.note, refresh=False)
            self._drawn = bool(self._bar.update(count)) or self._drawn
        elif not self.quiet and time.monotonic() - self.reported >= self.wait:
            self.reported, self.wait = time.monotonic(), EVERY
            self.say(self.line())

    def line(self) -> str:
        """The progress in one line."""
        rate = (self.n - self.done) / max(time.monotonic() - self.began, 1e-9)
        known = self.total is not None and self.total >= self.n
        parts = [f"{self.n:,} of {self.total:,} {self.unit}" if known else f"{self.n:,} {self.unit}"]
        parts += [f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second"]
        if known and rate:
            parts.append(f"{clock((self.total - self.n) / rate)} left")
        return (
            f"revit: {f'{self.desc}: ' if self.desc else ''}{', '.join(parts)}{f'; {self.note}' if self.note else ''}"
        )

    def say(self, text: str) -> None:
        """Print a line on standard error, above the bar."""
        self.clear()
        with suppress(OSError):  # standard error is closed
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the bar before other output; the next update may draw it again."""
        if self._drawn:
            self._bar.clear()
            self._drawn = False

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
