"""How far a command is: a bar with rate and time left on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from tqdm import tqdm

from revit_kernels.serving.infer import clock

FIRST, EVERY = 10.0, 30.0  # seconds to the first line, and between lines


class _Bar(tqdm):
    monitor_interval = 0  # no thread draws it: it is known when there is one to clear


class Progress:
    """Progress on standard error; nothing if `quiet`.

    total: what there is to do, None if that is not known yet
    unit:  of what is counted, a plural
    desc:  what is being done
    done:  what was done before
    lines: write whole lines on a terminal too: something else writes to it that knows nothing of a bar

    `say` and `clear` keep other text off the bar.
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
            # A bar that is drawn at once would flash on a run that takes no time.
            how = {"initial": done, "file": sys.stderr, "dynamic_ncols": True, "leave": False, "delay": 0.5}
            self._bar = _Bar(total=total, desc=desc or None, unit=f" {self.unit}", **how)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def go_on_from(self, done: int) -> None:
        """So much was done before."""
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
        """How far it is, in one line."""
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
        """A line of text on standard error, above the bar."""
        self.clear()
        with suppress(OSError):  # whoever read it has gone
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar off the terminal, before something else is written there; the next update may draw it again."""
        if self._drawn:
            self._bar.clear()
            self._drawn = False

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
