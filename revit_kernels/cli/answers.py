"""The outputs of `revit infer`: an aligned table on a terminal, JSON lines to pipes and files, a gallery."""

from __future__ import annotations

import shutil
import sys
import unicodedata

from revit_kernels.cli.progress import Progress
from revit_kernels.data.images import show
from revit_kernels.grids import grid_text
from revit_kernels.serving.records import Answer, Columns, short

WIDEST = 24  # columns for the name of a class
LEAST = 16  # columns for the name of a file, however narrow the terminal


def cells(text: str) -> int:
    """The columns that the text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int, end: bool = False) -> str:
    """The text padded or cut to `width` columns. end: keep its end and cut its front"""
    if cells(text) > width:
        while text and cells(text) > width - 1:
            text = text[1:] if end else text[:-1]
        text = f"…{text}" if end else f"{text}…"
    return text + " " * (width - cells(text))


def common_folder(paths: list[str]) -> str:
    """The folder that all paths begin with, with its slash; "" if there is none."""
    first, last = min(paths, default=""), max(paths, default="")
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), 0)
    return first[: first.rfind("/", 0, same) + 1]


class Rows:
    """Writes a line for each image to standard output: file, class, probability, grid, share of a full pass.

    paths: all images, for the width of the first column
    full:  patches of a full-length pass
    """

    def __init__(self, columns: Columns, paths: list[str], full: int):
        self.columns, self.full = columns, full
        shown = [show(path) for path in paths]
        self.folder = common_folder(shown)
        width = shutil.get_terminal_size((80, 24)).columns
        labels = [columns.labels[i] for i in range(columns.classes)] if columns.labels else []
        self.named = max((cells(label) for label in labels), default=len("class"))
        self.named = 30 if columns.features else max(5, min(WIDEST, self.named, width // 3))
        longest = max((cells(path[len(self.folder) :]) for path in shown), default=0)
        rest = width - self.named - (0 if columns.features else 8) - 9 - 17 - 3
        self.file = max(LEAST, min(longest, rest))
        self.begun = False

    def _line(self, file: str, found: str, probability: str, grid: str, share: str) -> str:
        middle = "" if self.columns.features else f"{probability:>8}"
        return f"{fit(file, self.file, end=True)}  {fit(found, self.named)}{middle}{grid:>9}{share:>17}".rstrip()

    def _head(self) -> list[str]:
        what = f"first of {self.columns.features:,} features" if self.columns.features else "class"
        where = [f"in {self.folder}"] if self.folder else []
        return [*where, self._line("file", what, "prob.", "grid", "of a full pass")]

    def row(self, answer: Answer) -> str:
        """The line of one answer."""
        file = answer.path[len(self.folder) :]
        if answer.error is not None:
            return f"{fit(file, self.file, end=True)}  no answer: {answer.error}"
        share = answer.tokens / self.full if answer.cost is None else answer.cost
        grid = answer.grid if answer.frames is None else (answer.frames, *answer.grid)
        ends = "assigner" if 0 in grid else grid_text(grid), f"{100 * share:.0f} %"
        if answer.features is not None:
            return self._line(file, " ".join(f"{value:+.3f}" for value in answer.features[:4]), "", *ends)
        (best,) = self.columns.best(answer)[:1]
        label = best.get("label", str(best["class"]))
        return self._line(file, label, f"{100 * short(best['probability']):.1f} %", *ends)

    def write(self, answer: Answer) -> None:
        lines = ([] if self.begun else self._head()) + [self.row(answer)]
        self.begun = True
        sys.stdout.write("\n".join(lines) + "\n")


class Answers:
    """Writes answers as a table on a terminal, else to `records`, and to the gallery if there is one.

    records: a writer of serving.records or a run of serving.journal
    paths:   all images
    full:    patches of a full-length pass
    """

    def __init__(self, records, output, columns, paths, full: int, progress: Progress, as_json: bool, gallery=None):
        first = Rows(columns, paths, full) if on_terminal(output, as_json) else records
        self.writers, self.progress = [first, *([gallery] if gallery else [])], progress

    def write(self, answer: Answer) -> None:
        self.progress.clear()
        for writer in self.writers:
            writer.write(answer)


def on_terminal(output: str | None, as_json: bool) -> bool:
    """Whether a person reads the answers."""
    return output is None and not as_json and sys.stdout is not None and sys.stdout.isatty()


def through_a_pipe(output: str | None) -> bool:
    """Whether the records go to a pipe, whose reader may write to the same terminal."""
    return output is None and sys.stdout is not None and not sys.stdout.isatty()
