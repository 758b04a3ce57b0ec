"""The pictures of a report: accuracy against speed, mixes of lengths, calibration, the easiest and hardest images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from revit_kernels.adaptive.calibration import reliability
from revit_kernels.evaluation import contact_sheet
from revit_kernels.evaluation.comparison import at_equal_speed
from revit_kernels.evaluation.evaluate import Evaluation, Measured
from revit_kernels.grids import grid_text

COLOURS = {  # of Okabe and Ito: told apart by the colour-blind too
    "fixed": "#000000",
    "random": "#999999",
    "assigner": "#E69F00",
    "cascade": "#0072B2",
    "assigner+cascade": "#009E73",
    "scout+cascade": "#56B4E9",
    "oracle": "#CC79A7",
}
OTHERS = ("#D55E00", "#F0E442", "#999933")  # of configurations of the user's own
MARKERS = {
    "fixed": "o",
    "random": "x",
    "assigner": "s",
    "cascade": "^",
    "assigner+cascade": "D",
    "scout+cascade": "v",
    "oracle": "*",
}
SAID = {"fixed": "one length for all", "random": "random lengths", "oracle": "oracle (true labels)"}
IMAGES_SHEET = "The easiest and the hardest images, with the answer and the confidence at each length"
CLIPS_SHEET = (
    "Clips by the length that they needed, four frames each, with the answer and the confidence at each length"
)
SHOWN = 10  # images that a bin of the reliability diagram must hold
DPI = 110


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def available() -> bool:
    """Whether there is a matplotlib to plot with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _save(figure, path: Path) -> None:
    pyplot = _pyplot()
    with pyplot.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):  # text stays text
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)


def _of_lengths(rows: int) -> list:
    """A colour for each menu row, dark to light: also told apart in grey."""
    return [_pyplot().get_cmap("cividis")(0.02 + 0.86 * row / max(1, rows - 1)) for row in range(rows)]


def _frontier(e: Evaluation, cost: Callable[[Measured], float]) -> tuple[np.ndarray, np.ndarray]:
    """(cost, accuracy) of the lengths alone and the mixes of two of them, from the cheapest to full length."""
    points = [(cost(one), one.accuracy) for one in e.static]
    costs = np.linspace(min(c for c, _ in points), max(c for c, _ in points), 200)
    mixes = [at_equal_speed(points, c) for c in costs]
    return costs, np.array([sum(share * points[i][1] for i, share in mix.items()) for mix in mixes])


def _scatter(e: Evaluation, cost: Callable[[Measured], float], place: Callable, label: str):
    """Accuracy against what `place` makes of a cost."""
    figure, axes = _pyplot().subplots(figsize=(8, 5.5))
    costs, accuracy = _frontier(e, cost)
    axes.plot(place(costs), 100 * accuracy, color=COLOURS["fixed"], linewidth=1, label="random mix of two lengths")
    others, groups = iter(OTHERS * 10), {"fixed": e.static, "random": e.random}
    for one in e.policies:
        if one.name not in ("fixed", "random"):
            groups.setdefault(one.name, []).append(one)
    for name, of in groups.items():
        if not of:
            continue
        of = sorted(of, key=cost)
        axes.errorbar(
            [place(cost(one)) for one in of],
            [100 * one.accuracy for one in of],
            yerr=[100 * one.error for one in of],
            marker=MARKERS.get(name, "P"),
            markersize=10 if name == "oracle" else 6,
            color=COLOURS.get(name) or next(others),
            linestyle="none" if name in ("fixed", "random") else ":",
            linewidth=1,
            elinewidth=0.8,
            capsize=2,
            label=SAID.get(name, name),
        )
    for one, grid in zip(e.static, e.menu):
        at = (place(cost(one)), 100 * one.accuracy)
        axes.annotate(grid_text(grid), at, textcoords="offset points", xytext=(6, -13))
    axes.set_xlabel(label)
    axes.set_ylabel(f"accuracy on {e.images}, % (bars: standard error)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure, axes


def _speed(e: Evaluation, path: Path) -> None:
    rate = e.full.rate  # times the ratios of the rounds, which drift of the machine does not touch
    figure, axes = _scatter(
        e,
        lambda one: 1 / one.speed(e.full),
        lambda time: rate / time,
        f"images a second, measured on {e.about.get('device', 'this device')}",
    )
    axes.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate)).set_xlabel("times full length")
    _save(figure, path)


def _macs(e: Evaluation, path: Path) -> None:
    figure, _ = _scatter(e, lambda one: one.macs / 1e6, lambda macs: macs, "million multiply-accumulates of an image")
    _save(figure, path)


def _mixes(e: Evaluation, path: Path) -> None:
    ones = e.policies
    figure, axes = _pyplot().subplots(figsize=(8, 0.36 * len(ones) + 1.4))
    left = np.zeros(len(ones))
    for row, (grid, colour) in enumerate(zip(e.menu, _of_lengths(len(e.menu)))):
        share = np.array([100 * one.mix(len(e.menu))[row] for one in ones])
        axes.barh(range(len(ones)), share, left=left, color=colour, edgecolor="white", label=grid_text(grid))
        ink = "white" if sum(colour[:3]) < 1.5 else "black"
        for i in np.flatnonzero(share >= 6):
            axes.text(left[i] + share[i] / 2, i, f"{share[i]:.0f}", ha="center", va="center", color=ink, fontsize=9)
        left += share
    axes.set_yticks(range(len(ones)), [f"{one.name} {one.budget}".strip() for one in ones])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("images answered at each length, %")
    axes.legend(ncol=len(e.menu), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _save(figure, path)


def _reliability(e: Evaluation, path: Path) -> None:
    figure, (axes, below) = _pyplot().subplots(
        2, 1, figsize=(6, 7), sharex=True, gridspec_kw={"height_ratios": (3, 1), "hspace": 0.08}
    )
    curves = e.calibration()
    colours = [*_of_lengths(len(e.menu)), "#D55E00"]
    marks = [*("o^sDvPX<>" * 9)[: len(e.menu)], "*"]
    for (name, probability, right), colour, mark in zip(curves, colours, marks):
        bins = reliability(probability, right)
        kept = [(p, r) for n, p, r in bins if n >= SHOWN]
        style = {"color": colour, "marker": mark, "markersize": 6, "markeredgecolor": "#333333", "linewidth": 1.3}
        axes.plot([p for p, _ in kept], [100 * r for _, r in kept], label=name, **style)
        below.plot((np.arange(10) + 0.5) / 10, [100 * n / len(right) for n, _, _ in bins], **style)
    axes.plot([0, 1], [0, 100], color="#999999", linestyle=":", label="as claimed")
    axes.set_ylabel("right, %")
    below.set_ylabel("images, %")
    below.set_xlabel("confidence, in bins of 0.1")
    for one in (axes, below):
        one.grid(alpha=0.3)
        one.set_xlim(0, 1)
    axes.legend()
    _save(figure, path)


def draw(e: Evaluation, images, folder: Path) -> list[tuple[str, str]]:
    """Write the pictures; returns (file name, what it shows). Plots need matplotlib, the contact sheet does not.

    images: the ImageSet that was evaluated
    """
    drawn = {}
    for name, what, write in _plots(e):
        write(e, folder / name)
        drawn[name] = what
    contact_sheet.draw(e, images, folder / "images.png")
    clips = len(e.menu[0]) == 3
    drawn["images.png"] = CLIPS_SHEET if clips else IMAGES_SHEET
    return list(drawn.items())


def _plots(e: Evaluation) -> list:
    """Those of PLOTS that can be drawn."""
    return [plot for plot in PLOTS if plot[2] is not _mixes or e.policies] if available() else []


def draw_svg(e: Evaluation, folder: Path) -> None:
    """Write the plots as SVG."""
    for name, _, write in _plots(e):
        write(e, (folder / name).with_suffix(".svg"))


PLOTS = (
    ("accuracy_speed.png", "Accuracy against measured speed", _speed),
    ("accuracy_macs.png", "Accuracy against multiply-accumulates", _macs),
    ("mixes.png", "Lengths at which images were answered", _mixes),
    ("calibration.png", "Calibration at each length, and how many images claim each confidence", _reliability),
)
