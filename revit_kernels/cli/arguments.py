"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    try:
        number = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return number


def grids(text: str):
    """None for "auto", else the grids in "14x14,10x10"."""
    if text == "auto":
        return None
    try:
        found = tuple(tuple(int(n) for n in grid.lower().split("x")) for grid in text.split(","))
    except ValueError:
        found = ()
    if not found or any(len(grid) != 2 or min(grid) < 1 for grid in found):
        raise argparse.ArgumentTypeError(f"must be auto, or ROWSxCOLUMNS,... such as 14x14,10x10, got {text!r}")
    return found
