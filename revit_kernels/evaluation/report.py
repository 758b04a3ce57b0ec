"""The report of an evaluation: Markdown, HTML, JSON and pictures in one folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from revit_kernels.adaptive.calibration import calibration_error, reliability
from revit_kernels.adaptive.policies import Own
from revit_kernels.evaluation import plots
from revit_kernels.evaluation.comparison import ALLOWED, Gap, against_random, against_static, verdict
from revit_kernels.evaluation.evaluate import Evaluation, Measured
from revit_kernels.evaluation.page import page
from revit_kernels.files import put, workshop
from revit_kernels.grids import grid_text
from revit_kernels.training.assigner import quality


def _grids(e: Evaluation) -> list[str]:
    return list(map(grid_text, e.menu))


def _name(e: Evaluation, one: Measured) -> str:
    return f"all at {_grids(e)[one.policy.row]}" if one.name == "fixed" else one.name


def _rows(head: list[str], rows: list[list[str]], names: int = 1) -> list[str]:
    """A Markdown table whose first columns are names; the others are numbers, and stand to the right."""
    align = ["---"] * names + ["---:"] * (len(head) - names)
    return ["| " + " | ".join(cells) + " |" for cells in (head, align, *rows)]


def _headline(e: Evaluation) -> list[str]:
    """A row for each configuration."""
    head = ["policy", "budget", "accuracy, %", "points lost", "images/s", "speed", "least to most", "MACs", "tokens"]
    alone = any(one.alone for one in e.policies)
    head += [f"answered at {' / '.join([*_grids(e), *(['by the assigner'] if alone else [])])}, %"]
    head += ["above lengths alone"]
    head += ["above random", "same mix at random, %"] if e.random else []
    rows = []
    for one in [*e.static, *e.policies]:
        lost, error = one.lost(e.full)
        cells = [_name(e, one), one.budget, f"{100 * one.accuracy:.2f} ± {100 * one.error:.2f}"]
        cells += ["" if one is e.full else f"{100 * lost:.2f} ± {100 * error:.2f}"]
        least, most = one.spread(e.full)
        cells += [f"{one.rate:,.1f}", f"**{one.speed(e.full):.2f}x**", f"{least:.2f} to {most:.2f}"]
        cells += [f"{one.macs / e.macs[0]:.3f}"]
        shares = [*one.mix(len(e.menu)), *([one.alone] if alone else [])]
        cells += [f"{one.tokens.mean():.1f}", " / ".join(f"{100 * share:.0f}" for share in shares)]
        bare = one.name in ("fixed", "random")
        cells += ["" if bare else _gap(against_static(e, one))]
        if e.random:
            cells += ["" if bare else _gap(against_random(e, one))]
            same = one.baseline
            cells += ["" if same is None else f"{100 * same.accuracy:.2f} at {same.speed(e.full):.2f}x"]
        rows.append(cells)
    return _rows(head, rows, 2)


def _gap(found: Gap | None) -> str:
    return "none as fast" if found is None else f"{100 * found.value:+.2f} ± {100 * found.error:.2f}"


def _legend(e: Evaluation) -> list[str]:
    """What the headline's columns are, and how the numbers were taken."""
    about = e.about
    timed = "all images" if about["timed"] == len(e.outcomes) else f"{about['timed']:,} of the images"
    times = "once" if about["rounds"] == 1 else f"{about['rounds']} times"
    speed = (
        "**speed**: from uint8 images in the device's memory to logits on the host. Decoding is not counted; the "
        "assigner, every pass of a cascade and the repacking between passes are. Everything ran "
        f"{times} over {timed}, in batches of {about['batch']}, all rows in turn, a few batches at a "
        "time; the speed is the median of a row's ratios to full length in one round, **least to most** their range."
    )
    accuracy = "**accuracy**: of all images, with its standard error"
    if about["timed"] != len(e.outcomes):
        accuracy += "; that of lengths alone, of random lengths and of the oracle is from the pass over every length"
    text = [
        f"{accuracy}. **points lost**: against full length, with the standard error of the difference image by image.",
        speed,
        "**MACs**: multiply-accumulates of an image against full length's: patch embedding, linear layers and "
        "attention of the blocks, for the tokens that were processed; the assigner's too. **tokens**: of all passes of "
        "an image, a mean; prefix tokens counted, the assigner's own not.",
        "**above lengths alone**: how many points more accurate the row is than the best single length, or random mix "
        "of two, at the same measured speed.",
    ]
    if e.random:
        text.append(
            "**above random**: the same against random lengths: the rows called random, which are the best mix of two "
            "at the budget, and the mix of lengths that each policy chose, given at random (last column)."
        )
    if any(one.name == "oracle" for one in e.policies):
        text.append("The oracle uses the true labels: it is an upper bound, not a policy.")
    return [f"- {sentence}" for sentence in text]


def _lengths(e: Evaluation) -> list[str]:
    head = ["length", "tokens", "right, %", "label of, %", "us an image", "of full length", "MACs", "ECE"]
    o, costs, rows = e.outcomes, e.costs, []
    for row, (grid, one) in enumerate(zip(e.menu, e.static)):
        ece = calibration_error(o.confidence[:, row], o.correct[:, row])
        cost = costs.per_length[row]
        cells = [grid_text(grid), f"{o.patches[row]}", f"{100 * one.accuracy:.2f} ± {100 * one.error:.2f}"]
        cells += [f"{100 * (o.label == row).mean():.1f}", f"{1e6 * cost:,.0f}", f"{cost / costs.per_length[0]:.3f}"]
        rows.append([*cells, f"{e.macs[row] / e.macs[0]:.3f}", f"{ece:.3f}"])
    found = f"Picking an unsure image out and sending it on takes {1e6 * costs.repack:,.1f} us, "
    found += f"a pass without images {1e6 * costs.launch * costs.batch:,.0f} us"
    if o.assigner is not None:
        found += f", the assigner {1e6 * costs.assigner:,.1f} us an image"
    kept = "kept in the assigner's file" if e.about["costs_kept"] else "measured in this run"
    lines = [*_rows(head, rows), "", f"{found}. Budgets were solved with these costs, {kept}."]
    dropped = int((o.label < 0).sum())
    return lines + (["", f"{dropped:,} images have no label."] if dropped else [])


def _groups(e: Evaluation) -> list[tuple[str, np.ndarray]]:
    """(name, images) of each label, and of what no length gets right."""
    o, solved = e.outcomes, e.outcomes.correct.any(1)
    groups = [(name, solved & (o.label == row)) for row, name in enumerate(_grids(e))]
    return [*groups, ("no length right", ~solved)]


def _by_label(e: Evaluation) -> list[str]:
    """Accuracy of every configuration on the images of each label."""
    groups = _groups(e)
    rows = []
    for one in [*e.static, *e.policies]:
        shares = [f"{100 * one.right[mask].mean():.1f}" if mask.any() else "" for _, mask in groups]
        rows.append([_name(e, one), one.budget, *shares])
    return _rows(["policy", "budget", *(f"{name} ({mask.sum():,})" for name, mask in groups)], rows, 2)


def _assigner(e: Evaluation) -> list[str]:
    """How well each decision is made: the areas under the ROC curves."""
    if e.outcomes.assigner is None:
        return []
    text = (
        "For each length, how well the assigner (before any pass), the pass's own confidence, and the confidence mixed "
        "with the assigner's class posterior tell right answers from wrong ones: the area under the ROC curve. The "
        f"assigner costs {100 * e.costs.assigner / e.costs.per_length[0]:.1f} % of a full-length pass, measured alone "
        f"({100 * e.assigner_macs / e.macs[0]:.1f} % of its multiply-accumulates)."
    )
    kinds = ("assigner", "confidence", "evidence", "calibration_error")
    rows = [
        [name, *("" if found[kind] is None else f"{found[kind]:.3f}" for kind in kinds)]
        for name, found in _told(e).items()
    ]
    head = ["length", "assigner", "confidence", "both", "assigner's calibration error"]
    return ["## Decisions", "", text, "", *_rows(head, rows), ""]


def _fixed(e: Evaluation) -> list[str]:
    grids = _grids(e)
    return [f"- **{name} {budget}**: came out as all at {grids[row]}" for name, budget, row in e.fixed]


def _calibration(e: Evaluation) -> list[str]:
    """How often what was claimed with a confidence held."""
    curves = [(name, reliability(p, right)) for name, p, right in e.calibration()]
    rows = []
    for number in range(len(curves[0][1])):
        cells = [
            f"{100 * share:.1f} ({n:,})" if n >= plots.SHOWN else f"({n:,})"
            for n, _, share in (c[number] for _, c in curves)
        ]
        rows.append([f"{number / 10:.1f} to {(number + 1) / 10:.1f}", *cells])
    errors = [f"{calibration_error(p, right):.3f}" for _, p, right in e.calibration()]
    rows.append(["ECE, 15 bins", *errors])
    return [
        "Of the images whose answer has a confidence in each bin, the share that is right, in %, and how many they "
        f"are; no share where they are fewer than {plots.SHOWN}.",
        "",
        *_rows(["confidence", *(name for name, _ in curves)], rows),
    ]


def _made(e: Evaluation, command: str) -> list[str]:
    about = e.about
    threads = f", {about['threads']} thread{'s' * (about['threads'] > 1)}" if about["threads"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"- On {about['device']}{threads}, {about['dtype']}, {about['date']}; {versions}.",
        f"- Images: {e.images}, {len(e.outcomes):,} in {len(e.classes)} classes, fingerprint `{about['images'][:16]}`.",
        f"- Model: `{e.outcomes.fingerprint[:16]}`; menu {', '.join(_grids(e))}.",
    ]
    if about["assigner"]:
        told = about["assigner_about"]
        source = f" It learnt from {told['from']}." if "from" in told else ""
        lines.append(f"- Assigner: `{about['assigner'][:16]}`, trunk {told['trunk']}.{source}")
    if e.held_out is not None:
        source = e.held_out.about.get("images", "another set")
        lines.append(
            f"- Budgets were solved from {len(e.held_out):,} images of {source}, none of them among the above."
        )
    return lines + ([f"- Command: `{command}`"] if command else [])


def markdown(e: Evaluation, pictures: list[tuple[str, str]], command: str = "") -> str:
    about = e.about
    lines = [
        f"# Adaptive token lengths on {e.images}",
        "",
        f"Each length of the menu {', '.join(_grids(e))} alone, and {len(e.policies)} ways to give each image its own, "
        f"measured on {len(e.outcomes):,} images of {len(e.classes)} classes, on {about['device']}.",
        "",
        *(f"- {sentence}" for sentence in verdict(e)),
        "",
        *_headline(e),
        "",
        *_legend(e),
        "",
    ]
    for file, what in pictures:
        lines += [f"![{what}]({file})", "", f"*{what}.*", ""]
    lines += ["## Lengths", "", *_lengths(e), "", "## Accuracy by label, %", "", *_by_label(e), "", *_assigner(e)]
    lines += ["## Calibration", "", *_calibration(e), "", "## Policies", ""]
    lines += [f"- **{f'{one.name} {one.budget}'.strip()}**: {one.policy.describe(e.menu)}" for one in e.policies]
    lines += _fixed(e)
    return "\n".join([*lines, "", "## How it was made", "", *_made(e, command)]) + "\n"


def _told(e: Evaluation) -> dict:
    """`quality` with None where there is no such number: a length is right on all images, or on none."""
    found = quality(e.outcomes)
    return {length: {k: None if np.isnan(v) else v for k, v in of.items()} for length, of in found.items()}


def as_json(e: Evaluation, command: str = "") -> dict:
    """Everything in the report, and the seconds of every round."""
    groups = _groups(e)

    def compared(found: Gap | None) -> dict | None:
        return None if found is None else {"above": found.value, "standard_error": found.error}

    def one(m: Measured) -> dict:
        lost, error = m.lost(e.full)
        found = {
            "policy": m.name,
            "budget": m.budget,
            "numbers": None if isinstance(m.policy, Own) else json.loads(m.policy.to_json()),
            "accuracy": m.accuracy,
            "standard_error": m.error,
            "lost": lost,
            "lost_standard_error": error,
            "images_per_second": m.rate,
            "speed": m.speed(e.full),
            "speed_range": m.spread(e.full),
            "seconds": m.seconds,
            "macs": m.macs,
            "tokens": float(m.tokens.mean()),
            "mix": m.mix(len(e.menu)),
            "answered_by_the_assigner": m.alone,
            "accuracy_by_label": [float(m.right[mask].mean()) if mask.any() else None for _, mask in groups],
        }
        if m.name in ("fixed", "random"):
            return found
        baseline = {} if m.baseline is None else {"same_mix_by_lot": one(m.baseline)}
        return (
            found
            | baseline
            | {
                "against_lengths_alone": compared(against_static(e, m)),
                "against_random": compared(against_random(e, m)),
            }
        )

    def calibrated(name: str, probability: np.ndarray, right: np.ndarray) -> dict:
        bins = [{"images": n, "confidence": p, "right": r} for n, p, r in reliability(probability, right) if n]
        return {"of": name, "ece": calibration_error(probability, right), "bins": bins}

    return {
        "images": e.images,
        "count": len(e.outcomes),
        "classes": list(e.classes),
        "menu": [list(grid) for grid in e.menu],
        "about": e.about,
        "command": command,
        "model": e.outcomes.fingerprint,
        "verdict": verdict(e),
        "allowed": ALLOWED,
        "held_out": None if e.held_out is None else {"images": len(e.held_out)} | e.held_out.about,
        "costs": json.loads(e.costs.to_json()),
        "macs": e.macs,
        "assigner_macs": e.assigner_macs,
        "accuracy_of_lengths": e.outcomes.correct.mean(0).tolist(),
        "labels": [float((e.outcomes.label == row).mean()) for row in range(len(e.menu))],
        "images_by_label": {name: int(mask.sum()) for name, mask in groups},
        "decisions": None if e.outcomes.assigner is None else _told(e),
        "fixed": [{"policy": name, "budget": budget, "row": row} for name, budget, row in e.fixed],
        "calibration": [calibrated(*curve) for curve in e.calibration()],
        "static": [one(m) for m in e.static],
        "policies": [one(m) for m in e.policies],
    }


def check_folder(folder) -> Path:
    """The folder, made if it is not there. Raises RuntimeError where no file can be written to it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with workshop(folder, "report"):
            return folder
    except OSError as error:
        raise _unwritten(folder, error) from error


def _unwritten(folder: Path, error: OSError) -> RuntimeError:
    return RuntimeError(f"the report could not be written to {folder}: {error.strerror or error}")


def write(e: Evaluation, images, folder, command: str = "") -> Path:
    """Write report.md, report.html (the same as one page), report.json and the pictures into the folder.

    images: the ImageSet that was evaluated, for the contact sheet

    Files of the same names are replaced when all are there. Returns the path of report.md. Raises RuntimeError where
    they cannot be written.
    """
    folder = check_folder(folder)
    try:
        with workshop(folder, "report") as inside:
            pictures = plots.draw(e, images, inside)
            numbers = json.dumps(as_json(e, command), indent=1, allow_nan=False)
            (inside / "report.json").write_text(numbers + "\n", encoding="utf-8")
            text = markdown(e, pictures, command)
            (inside / "report.md").write_text(text, encoding="utf-8")
            with tempfile.TemporaryDirectory(dir=inside) as drawn:
                plots.draw_svg(e, Path(drawn))
                shutil.copyfile(inside / "images.png", Path(drawn) / "images.png")
                todo = verdict(e)[0]
                rest = text.replace(f"- {todo}\n", "", 1)
                html = page(f"Token lengths on {e.images}", todo, rest, Path(drawn))
            (inside / "report.html").write_text(html, encoding="utf-8")
            for file in sorted(inside.iterdir()):
                put(file, folder / file.name)
            for name, *_ in plots.PLOTS:  # of an earlier report, where this one has no such plot
                if name not in dict(pictures):
                    (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritten(folder, error) from error
    return folder / "report.md"
