#!/usr/bin/env python3
"""What the assigner adds, over several trainings of it, or of it and its model: measured speed and test accuracy.

    python recipes/assigner_seeds.py runs/fashion_mnist/model.safetensors --labels runs/fashion_mnist/labels.parquet
    python recipes/assigner_seeds.py runs/seed?/model.safetensors --labels runs/seed?/labels.parquet

A minute a seed on 2 cores of a Zen 4 CPU, and two minutes for the measurement of a model. Prices come from held-out
images; the test images are touched once, by all seeds together.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import torch

from revit_kernels.adaptive.costs import device_name, measure_costs
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
POLICIES = ("cascade", "assigner", "assigner+cascade", "scout+cascade")
ROUNDS, TIMED, BATCH = 3, 1500, 327


def measure(model, assigners: dict, test, costs) -> list[dict]:
    """A row for each length alone, and for each policy, seed and budget. assigners: of seeds"""
    engine = model.engine()
    rows = [("fixed", None, "", AdaptiveViT(engine, Fixed(row))) for row in range(len(model.menu))]
    scout = all(assigner.trunk == "scout" for assigner in assigners.values())
    for name in (name for name in POLICIES if scout or name != "scout+cascade"):
        for seed, assigner in list(assigners.items())[: 1 if name == "cascade" else None]:
            for budget in BUDGETS:
                adaptive = AdaptiveViT(engine, name, assigner=assigner, budget=budget, costs=costs)
                rows.append((name, seed, budget, adaptive))
    bench = Bench(model, test, collect(engine, test), BATCH, ROUNDS, TIMED, lambda **_: NoBar())
    found = bench.measure([(name, budget, adaptive) for name, _, budget, adaptive in rows], False)
    static = found[: len(model.menu)]
    points = [(1 / one.speed(static[0]), one.accuracy) for one in static]

    def alone(speed: float) -> float | None:
        """The accuracy of the lengths alone, or of a mix of two of them, at a speed; None where none is as fast."""
        mix = at_equal_speed(points, 1 / speed)
        return None if mix is None else sum(share * points[i][1] for i, share in mix.items())

    return [
        {
            "policy": name,
            "seed": seed,
            "budget": budget,
            "accuracy": one.accuracy,
            "full": static[0].accuracy,
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
    lengths = [row for row in rows if row["policy"] == "fixed"]
    lengths = [lengths[i :: len(menu)] for i in range(len(menu))]
    what = "assigners of one model" if done["models"] == 1 else "models, each with an assigner of its own"
    lines = [
        f"# {'The assigner' if done['models'] == 1 else 'Model and assigner'}, trained several times",
        "",
        f"{done['seeds']} {what}, each with another seed, on {done['count']:,} test images of "
        f"{done['images']}; mean and standard deviation over the seeds. Speeds are measured, and count assigner, "
        f"repacking and launches. {done['about']}.",
        "",
        "Lengths alone: "
        + ", ".join(
            f"{g} {_spread([row['accuracy'] for row in of])} % at {np.mean([row['speed'] for row in of]):.2f}x"
            for g, of in zip(menu, lengths)
        )
        + ".",
        "",
        "| policy | budget | accuracy, % | above full length, points | measured speed | above lengths alone there "
        "| above lengths alone at the budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in POLICIES if any(row["policy"] == name for row in rows)):
        for budget in BUDGETS:
            of = [row for row in rows if row["policy"] == name and row["budget"] == budget]
            speed = [row["speed"] for row in of]
            cells = [name, budget, _spread([row["accuracy"] for row in of])]
            cells += [_spread([row["accuracy"] - row["full"] for row in of])]
            cells += [f"{np.mean(speed):.2f}x ({min(speed):.2f} to {max(speed):.2f})"]
            for key in ("alone", "alone_at_budget"):
                some = [row["accuracy"] - row[key] for row in of if row[key] is not None]
                cells.append(_spread(some) if len(some) == len(of) else "no length is as fast")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("models", nargs="+", metavar="MODEL", help="one, or one for each seed")
    arguments.add_argument("--labels", nargs="+", required=True, help="of each: revit label --held-out --probabilities")
    arguments.add_argument("--data", default="fashion-mnist")
    arguments.add_argument("--seeds", type=int, default=3, help="of the assigners of a single model")
    arguments.add_argument("--trunk", default="scout")
    arguments.add_argument("--trained", default="", metavar="HOW", help="how the models were trained, for the report")
    arguments.add_argument("--output", default="recipes/reports/ablation_assigner_fashion_mnist")
    args = arguments.parse_args()
    if len(args.models) != len(args.labels):
        arguments.error(f"{len(args.models)} models need as many --labels, got {len(args.labels)}")
    single, rows = len(args.models) == 1, []
    for i, (file, labels) in enumerate(zip(args.models, args.labels)):
        model, outcomes = load_resizable(file, None, None), Outcomes.load(labels)
        parameter = next(model.parameters())
        images, test = (fit_images(open_set(args.data, split), model) for split in ("train", "test"))
        assigners = {}
        for seed in range(args.seeds) if single else (i,):
            found = train_assigner(model, outcomes, images, args.trunk, AssignerRecipe(seed=seed))
            assigners[seed] = found.to(parameter.device, parameter.dtype)
        first = next(iter(assigners.values()))
        costs = measure_costs(model.engine(), first, rounds=25, batch=128)
        rows += measure(model, assigners, test, costs)
    about = f"{device_name(parameter.device)}, {torch.get_num_threads()} threads, {date.today().isoformat()}"
    about += f". {args.trained}" if args.trained else ""
    done = {"rows": rows, "menu": model.menu, "models": len(args.models), "count": len(test), "images": test.name}
    done |= {"seeds": args.seeds if single else len(args.models), "about": about}
    path = Path(args.output).with_suffix(".json")
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(done, indent=1)))
    path.with_suffix(".md").write_text(table(done))


if __name__ == "__main__":
    main()
