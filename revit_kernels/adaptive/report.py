"""The report of an evaluation: Markdown, JSON and pictures in one folder."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from revit_kernels.adaptive import plots
from revit_kernels.adaptive.calibration import calibration_error
from revit_kernels.adaptive.evaluate import Evaluation, Measured, at_equal_speed

ALLOWED = 0.003  # the loss of accuracy that the verdict allows, as a share


def _name(e: Evaluation, one: Measured) -> str:
    if one.name == "fixed":
        h, w = e.menu[one.policy.row]
        return f"all at {h}x{w}"
    return one.name


def verdict(e: Evaluation) -> list[str]:
    """What the numbers come to, in sentences; either way."""
    full = e.full
    real = [one for one in e.policies if one.name not in ("oracle", "random")]
    if not real:
        return ["No policy was evaluated beside the static lengths."]
    within = [one for one in real if one.lost(full)[0] <= ALLOWED]
    lines = []
    if within:
        best = max(within, key=lambda one: one.speed(full))
        lost, error = best.lost(full)
        lines.append(
            f"With at most {100 * ALLOWED:g} points lost, the best policy is {best.name} at a budget of {best.budget}: "
            f"**{best.speed(full):.2f}x the images a second of full length, {100 * lost:+.2f} points lost** "
            f"(standard error {100 * error:.2f})."
        )
    else:
        best = min(real, key=lambda one: one.lost(full)[0])
        lost, _ = best.lost(full)
        lines.append(
            f"No policy stays within {100 * ALLOWED:g} points of full length: the nearest, {best.name} at "
            f"{best.budget}, loses {100 * lost:.2f} at {best.speed(full):.2f}x."
        )
    seconds = 1 / best.rate
    for kind, points in (
        ("the static lengths and mixes of two of them", [(1 / one.rate, one.accuracy) for one in e.static]),
        ("random assignment", [(1 / one.rate, one.accuracy) for one in e.policies if one.name == "random"]),
    ):
        other = at_equal_speed(points, seconds) if points else None
        if other is None:
            lines.append(f"There is no point of {kind} as fast as it to compare with.")
        else:
            gap = 100 * (best.accuracy - other)
            lines.append(f"At its speed it is {abs(gap):.2f} points {'above' if gap > 0 else 'below'} {kind}.")
    return lines


def _table(e: Evaluation) -> list[str]:
    menu = " / ".join(f"{h}x{w}" for h, w in e.menu)
    lines = [
        f"| policy | budget | accuracy, % | points lost | images/s | speed | MACs | tokens | answered at {menu}, % | "
        "same mix by lot, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_length = e.outcomes.correct.mean(0)
    for one in [*e.static, *e.policies]:
        lost, error = one.lost(e.full)
        mix = one.mix(len(e.menu))
        cells = [_name(e, one), one.budget, f"{100 * one.accuracy:.2f} ± {100 * one.error:.2f}"]
        cells += ["" if one is e.full else f"{100 * lost:.2f} ± {100 * error:.2f}"]
        cells += [f"{one.rate:.1f}", f"**{one.speed(e.full):.2f}x**", f"{one.macs / e.full_macs:.3f}"]
        cells += [f"{one.tokens.mean():.1f}", " / ".join(f"{100 * share:.0f}" for share in mix)]
        cells += ["" if one.name in ("fixed", "random") else f"{100 * float(np.dot(mix, by_length)):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _lengths(e: Evaluation) -> list[str]:
    o = e.outcomes
    lines = [
        "| length | tokens | right, % | label of, % | us an image | relative cost | ECE |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, (h, w) in enumerate(e.menu):
        ece = calibration_error(o.confidence[:, row], o.correct[:, row])
        cost = e.costs.per_length[row]
        lines.append(
            f"| {h}x{w} | {h * w} | {100 * o.correct[:, row].mean():.2f} | {100 * (o.label == row).mean():.1f} | "
            f"{1e6 * cost:.0f} | {cost / e.costs.per_length[0]:.3f} | {ece:.3f} |"
        )
    return lines


def _by_label(e: Evaluation) -> list[str]:
    """Accuracy of every policy on the images of each label."""
    o = e.outcomes
    solved = o.correct.any(1)
    groups = [(f"{h}x{w}", solved & (o.label == row)) for row, (h, w) in enumerate(e.menu)]
    groups.append(("no length right", ~solved))
    lines = ["| policy | budget | " + " | ".join(f"{name} ({mask.sum():,})" for name, mask in groups) + " |"]
    lines.append("|---|---|" + "---|" * len(groups))
    for one in e.policies:
        cells = [f"{100 * one.right[mask].mean():.1f}" if mask.any() else "" for _, mask in groups]
        lines.append(f"| {one.name} | {one.budget} | " + " | ".join(cells) + " |")
    return lines


def _assigner(e: Evaluation) -> list[str]:
    o = e.outcomes
    if o.assigner is None:
        return []
    z = o.assigner / e.temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    choice = p.argmax(1)
    head = "| label | " + " | ".join(f"predicted {h}x{w}" for h, w in e.menu) + " |"
    lines = ["## The assigner", ""]
    lines += [
        f"It predicts the label of {100 * (choice == o.label).mean():.1f} % of the test images (always the commonest: "
        f"{100 * np.bincount(o.label[o.label >= 0]).max() / len(o):.1f} %), with an expected calibration error of "
        f"{calibration_error(p.max(1), choice == o.label):.3f}. It costs "
        f"{100 * e.costs.assigner / e.costs.per_length[0]:.1f} % of a full-length pass, measured "
        f"({100 * e.assigner_macs / e.full_macs:.1f} % of its multiply-accumulates).",
        "",
        head,
        "|---|" + "---|" * len(e.menu),
    ]
    for row, (h, w) in enumerate(e.menu):
        counts = [int(((o.label == row) & (choice == other)).sum()) for other in range(len(e.menu))]
        lines.append(f"| {h}x{w} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return [*lines, ""]


def markdown(e: Evaluation, pictures: list[tuple[str, str]], command: str = "") -> str:
    about = e.about
    threads = f", {about['threads']} threads" if about["threads"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# Adaptive token lengths on {e.images}",
        "",
        f"{len(e.outcomes):,} images, {len(e.classes)} classes. {about['device']}{threads}, {about['dtype']}; "
        f"{versions}; {about['date']}. Accuracy is of all images, with its standard error; points lost are against "
        "full length, with the standard error of the difference image by image. Speed is from uint8 images in memory "
        f"to logits, decoding not counted, assigner and repacking counted: the median of {about['rounds']} rounds over "
        f"{about['timed']:,} images in batches of {about['batch']}, all configurations in turn, each against full "
        "length in the same round.",
        "",
        *verdict(e),
        "",
        *_table(e),
        "",
        '"Same mix by lot" is what the same lengths, dealt out by lot, would get right. `random` is the best mix of '
        "two lengths at the budget. The oracle asks the truth.",
        "",
    ]
    for file, what in pictures:
        lines += [f"![{what}]({file})", "", f"*{what}.*", ""]
    lines += ["## Lengths", "", *_lengths(e), "", "## Accuracy by label", "", *_by_label(e), "", *_assigner(e)]
    lines += ["## Policies", ""]
    lines += [f"- **{one.name} {one.budget}**: {one.policy.describe(e.menu)}" for one in e.policies]
    lines += ["", "## How it was made", ""]
    held = f"{len(e.held_out):,} images of {e.held_out.about.get('images', 'another set')}" if e.held_out else "nothing"
    lines += [f"Budgets were solved from {held}, none of them among those above. Model {e.outcomes.fingerprint[:16]}."]
    lines += [f"`{command}`"] if command else []
    return "\n".join(lines) + "\n"


def as_json(e: Evaluation, command: str = "") -> dict:
    def one(m: Measured) -> dict:
        lost, error = m.lost(e.full)
        return {
            "policy": m.name,
            "budget": m.budget,
            "numbers": json.loads(m.policy.to_json()),
            "accuracy": m.accuracy,
            "standard_error": m.error,
            "lost": lost,
            "lost_standard_error": error,
            "images_per_second": m.rate,
            "speed": m.speed(e.full),
            "seconds": m.seconds,
            "macs": m.macs,
            "tokens": float(m.tokens.mean()),
            "mix": m.mix(len(e.menu)),
        }

    return {
        "images": e.images,
        "count": len(e.outcomes),
        "classes": list(e.classes),
        "menu": [list(grid) for grid in e.menu],
        "about": e.about,
        "command": command,
        "model": e.outcomes.fingerprint,
        "verdict": verdict(e),
        "costs": json.loads(e.costs.to_json()),
        "full_macs": e.full_macs,
        "assigner_macs": e.assigner_macs,
        "accuracy_of_lengths": e.outcomes.correct.mean(0).tolist(),
        "labels": [float((e.outcomes.label == row).mean()) for row in range(len(e.menu))],
        "static": [one(m) for m in e.static],
        "policies": [one(m) for m in e.policies],
    }


def write(e: Evaluation, images, folder, command: str = "") -> Path:
    """Write report.md, report.json and the pictures into the folder; files of the same names are replaced when all are
    there. Returns the path of report.md. Raises RuntimeError where they cannot be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            inside = Path(temporary)
            pictures = plots.draw(e, images, inside)
            (inside / "report.json").write_text(json.dumps(as_json(e, command), indent=1) + "\n")
            (inside / "report.md").write_text(markdown(e, pictures, command))
            for file in sorted(inside.iterdir()):
                os.replace(file, folder / file.name)
    except OSError as error:
        raise RuntimeError(f"the report could not be written to {folder}: {error.strerror or error}") from error
    return folder / "report.md"
