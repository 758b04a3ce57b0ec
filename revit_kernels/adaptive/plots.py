"""The pictures of a report: accuracy against speed, mixes of lengths, calibration, the easiest and hardest images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from revit_kernels.adaptive.evaluate import Evaluation

COLOURS = {  # of Okabe and Ito: told apart by the colour-blind too
    "fixed": "#000000",
    "random": "#999999",
    "assigner": "#E69F00",
    "cascade": "#0072B2",
    "assigner+cascade": "#009E73",
    "oracle": "#CC79A7",
}
MARKERS = {"fixed": "o", "random": "x", "assigner": "s", "cascade": "^", "assigner+cascade": "D", "oracle": "*"}
LENGTHS = ("#08306b", "#2171b5", "#6baed6", "#c6dbef", "#f7fbff", "#fee391", "#fe9929")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    _pyplot().close(figure)


def _scatter(e: Evaluation, path: Path, x, label: str) -> None:
    figure, axes = _pyplot().subplots(figsize=(7.5, 5))
    names = ["fixed", *dict.fromkeys(one.name for one in e.policies)]
    for name in names:
        of = e.static if name == "fixed" else [one for one in e.policies if one.name == name]
        of = sorted(of, key=x)
        axes.errorbar(
            [x(one) for one in of],
            [100 * one.accuracy for one in of],
            yerr=[100 * one.error for one in of],
            marker=MARKERS.get(name, "o"),
            color=COLOURS.get(name, "#555555"),
            linestyle="-" if name == "fixed" else ":",
            linewidth=1,
            capsize=2,
            label={"fixed": "one length for all", "oracle": "oracle (asks the truth)"}.get(name, name),
        )
    for one, grid in zip(e.static, e.menu):
        axes.annotate(f"{grid[0]}x{grid[1]}", (x(one), 100 * one.accuracy), textcoords="offset points", xytext=(5, -11))
    axes.set_xlabel(label)
    axes.set_ylabel(f"accuracy on {e.images}, %")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _mixes(e: Evaluation, path: Path) -> None:
    pyplot = _pyplot()
    ones = [one for one in e.policies if one.name != "oracle"] + [one for one in e.policies if one.name == "oracle"]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.4 * len(ones) + 1.4))
    left = np.zeros(len(ones))
    for row, (h, w) in enumerate(e.menu):
        share = np.array([100 * one.mix(len(e.menu))[row] for one in ones])
        axes.barh(
            range(len(ones)),
            share,
            left=left,
            color=LENGTHS[row % len(LENGTHS)],
            edgecolor="#333333",
            linewidth=0.5,
            label=f"{h}x{w}",
        )
        left += share
    axes.set_yticks(range(len(ones)), [f"{one.name} {one.budget}".strip() for one in ones])
    axes.invert_yaxis()
    axes.set_xlabel("images answered at each length, %")
    axes.legend(ncol=len(e.menu), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _save(figure, path)


def _reliability(e: Evaluation, path: Path) -> None:
    figure, axes = _pyplot().subplots(figsize=(5.5, 5))
    edges = np.linspace(0, 1, 11)
    for row, (h, w) in enumerate(e.menu):
        confidence, correct = e.outcomes.confidence[:, row], e.outcomes.correct[:, row]
        place = np.clip(np.digitize(confidence, edges) - 1, 0, 9)
        kept = [b for b in range(10) if (place == b).sum() >= 20]
        axes.plot(
            [confidence[place == b].mean() for b in kept],
            [correct[place == b].mean() for b in kept],
            marker="o",
            markersize=4,
            color=LENGTHS[row % 4],
            label=f"{h}x{w}",
        )
    axes.plot([0, 1], [0, 1], color="#999999", linestyle=":")
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that is right")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _sheet(e: Evaluation, images, path: Path, each: int = 12, side: int = 112) -> None:
    """The easiest images (right at the shortest length, most surely) and the hardest, with what each length says."""
    o, last = e.outcomes, len(e.menu) - 1
    easy = np.lexsort((-o.confidence[:, last], ~o.correct[:, last]))[:each]
    needs = o.correct.sum(1)
    hard = np.lexsort((-o.confidence[:, last], o.correct[:, last], needs > 0))[: each // 2]
    longest = np.flatnonzero(o.correct[:, 0] & (o.label == 0))
    longest = longest[np.argsort(-o.confidence[longest, last], kind="stable")][: each - len(hard)]
    rows = [("easiest", easy), ("hardest", np.concatenate([longest, hard]))]
    text = 13 * (len(e.menu) + 1) + 6
    sheet = Image.new("RGB", (each // 2 * (side + 34) + 10, 2 * len(rows) * (side + text) + 44), "white")
    draw = ImageDraw.Draw(sheet)
    top = 4
    for name, members in rows:
        said = (
            "easiest: right at the shortest length"
            if name == "easiest"
            else "hardest: right only at the longest, or never"
        )
        draw.text((6, top), said, fill="black")
        top += 16
        for i, member in enumerate(members):
            x, y = 6 + i % (each // 2) * (side + 34), top + i // (each // 2) * (side + text)
            picture = Image.fromarray(images.pixels(int(member))).resize((side, side), Image.BICUBIC)
            sheet.paste(picture, (x, y))
            draw.text((x, y + side + 1), e.classes[o.targets[member]][:20], fill="black")
            for row, (h, w) in enumerate(e.menu):
                right = o.correct[member, row]
                draw.text(
                    (x, y + side + 1 + 13 * (row + 1)),
                    f"{h}x{w}: {e.classes[o.predicted[member, row]][:14]}",
                    fill="#006d5b" if right else "#a8321e",
                )
        top += 2 * (side + text) + 4
    sheet.save(path)


def draw(e: Evaluation, images, folder: Path) -> list[tuple[str, str]]:
    """Write the pictures; returns (file name, what it shows). Plots need matplotlib, the contact sheet does not."""
    drawn = []
    if available():
        _scatter(e, folder / "accuracy_speed.png", lambda one: one.rate, "images a second, measured")
        _scatter(e, folder / "accuracy_macs.png", lambda one: one.macs / 1e6, "million multiply-accumulates an image")
        drawn += [
            ("accuracy_speed.png", "Accuracy against measured speed"),
            ("accuracy_macs.png", "Accuracy against multiply-accumulates"),
        ]
        if e.policies:
            _mixes(e, folder / "mixes.png")
            drawn.append(("mixes.png", "Lengths that answered"))
        _reliability(e, folder / "calibration.png")
        drawn.append(("calibration.png", "Calibration at each length"))
    _sheet(e, images, folder / "images.png")
    drawn.append(("images.png", "The easiest and the hardest images: green is right, red is wrong"))
    return drawn
