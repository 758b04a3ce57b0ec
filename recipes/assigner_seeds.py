#!/usr/bin/env python3
"""What the assigner adds, over several trainings of it: measured speed and test accuracy, with spread.

    python recipes/assigner_seeds.py runs/fashion_mnist/model.safetensors --labels runs/fashion_mnist/labels.parquet

A minute a seed on 2 cores of a Zen 4 CPU, and two minutes for the measurement. Prices come from held-out images; the
test images are touched once, by all seeds together.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import torch

from revit_kernels.adaptive.costs import COUNTED, device_name, measure_costs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import Fixed
from revit_kernels.data.datasets import open_set
from revit_kernels.evaluation.comparison import at_equal_speed
from revit_kernels.evaluation.evaluate import NoBar
from revit_kernels.evaluation.measured import Bench
from revit_kernels.files import write_whole
from revit_kernels.models.registry import load_resizable
from revit_kernels.training.assigner import AssignerRecipe, train_assigner
from revit_kernels.training.labels import collect, fit_images

BUDGETS = ("1.5x", "2x", "2.5x")
ROUNDS, TIMED, BATCH = 3, 1500, 327


def measure(model, assigners, test, costs) -> list[dict]:
    """A row for each length alone, and for each policy, seed and budget."""
    engine = model.engine()
    rows = [("fixed", None, "", AdaptiveViT(engine, Fixed(row))) for row in range(len(model.menu))]
    for name in ("cascade", "assigner", "assigner+cascade"):
        for seed, assigner in enumerate(assigners[:1] if name == "cascade" else assigners):
            for budget in BUDGETS:
                adaptive = AdaptiveViT(engine, name, assigner=assigner, budget=budget, costs=costs)
                rows.append((name, seed, budget, adaptive))
    bench = Bench(model, test, collect(engine, test), BATCH, ROUNDS, TIMED, lambda **_: NoBar())
    found = bench.measure([(name, budget, adaptive) for name, _, budget, adaptive in rows], False)
    static = found[: len(model.menu)]
    points = [(1 / one.speed(static[0]), one.accuracy) for one in static]

    def alone(speed: float) -> float:
        """The accuracy of the lengths alone, or of a mix of two of them, at a speed."""
        return sum(share * points[i][1] for i, share in at_equal_speed(points, 1 / speed).items())

    return [
        {
            "policy": name,
            "seed": seed,
            "budget": budget,
            "accuracy": one.accuracy,
            "speed": one.speed(static[0]),
            "speed_range": one.spread(static[0]),
            "alone": alone(one.speed(static[0])),
            "alone_at_budget": alone(float(budget[:-1])) if budget else one.accuracy,
            "mix": one.mix(len(model.menu)),
        }
        for (name, seed, budget, _), one in zip(rows, found)
    ]


def _spread(values) -> str:
    values = 100 * np.array(values)
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def table(done: dict) -> str:
    """The Markdown of what was measured: means and standard deviations over the seeds."""
    rows, menu = done["rows"], [f"{h}x{w}" for h, w in done["menu"]]
    full = next(row["accuracy"] for row in rows if row["policy"] == "fixed")
    lengths = [row for row in rows if row["policy"] == "fixed"]
    lines = [
        "# The assigner, trained several times",
        "",
        f"{done['seeds']} assigners of one model, each with another seed, on {done['count']:,} test images of "
        f"{done['images']}; mean and standard deviation over the seeds. Speeds are measured, and count assigner, "
        f"repacking and launches. {done['about']}.",
        "",
        "Lengths alone: "
        + ", ".join(f"{g} {100 * row['accuracy']:.2f} % at {row['speed']:.2f}x" for g, row in zip(menu, lengths))
        + ".",
        "",
        "| policy | budget | accuracy, % | above full length, points | measured speed | above lengths alone there "
        "| above lengths alone at the budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("cascade", "assigner", "assigner+cascade"):
        for budget in BUDGETS:
            of = [row for row in rows if row["policy"] == name and row["budget"] == budget]
            speed = [row["speed"] for row in of]
            cells = [name, budget, _spread([row["accuracy"] for row in of])]
            cells += [_spread([row["accuracy"] - full for row in of])]
            cells += [f"{np.mean(speed):.2f}x ({min(speed):.2f} to {max(speed):.2f})"]
            cells += [_spread([row["accuracy"] - row[key] for row in of]) for key in ("alone", "alone_at_budget")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model")
    arguments.add_argument("--labels", required=True, help="of revit label --held-out --probabilities")
    arguments.add_argument("--data", default="fashion-mnist")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--trunk", default="scout")
    arguments.add_argument("--output", default="recipes/reports/ablation_assigner_fashion_mnist")
    args = arguments.parse_args()
    model, outcomes = load_resizable(args.model, None, None), Outcomes.load(args.labels)
    parameter = next(model.parameters())
    images, test = (fit_images(open_set(args.data, split), model) for split in ("train", "test"))
    assigners = []
    for seed in range(args.seeds):
        found = train_assigner(model, outcomes, images, args.trunk, AssignerRecipe(seed=seed))
        assigners.append(found.to(parameter.device, parameter.dtype))
    costs = assigners[0].costs_for(model)
    if costs.device == COUNTED:
        costs = measure_costs(model.engine(), assigners[0], rounds=25, batch=128)
    rows = measure(model, assigners, test, costs)
    about = f"{device_name(parameter.device)}, {torch.get_num_threads()} threads, {date.today().isoformat()}"
    done = {"rows": rows, "menu": model.menu, "seeds": args.seeds, "count": len(test), "images": test.name}
    done["about"] = about
    path = Path(args.output).with_suffix(".json")
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(done, indent=1)))
    path.with_suffix(".md").write_text(table(done))


if __name__ == "__main__":
    main()
