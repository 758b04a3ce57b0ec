#!/usr/bin/env python3
"""What each part of the method is worth: small ReViTs trained without one part each, several seeds, with spread.

    python recipes/ablation.py [--data fashion-mnist] [--output recipes/reports/ablation_fashion_mnist] [--seeds 3]

Half an hour on 2 cores of a Zen 4 CPU for Fashion-MNIST, ten minutes for scikit-learn's digits. Runs that are done are
kept, and not run again.
"""

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from revit_kernels import create_model
from revit_kernels.adaptive.costs import device_name
from revit_kernels.data.datasets import open_set
from revit_kernels.files import write_whole
from revit_kernels.training.distillation import Objective
from revit_kernels.training.labels import collect
from revit_kernels.training.loader import Augmented
from revit_kernels.training.trainer import Recipe, Trainer


@dataclass(frozen=True)
class Setting:
    """A set of images, and a model that learns it in minutes."""

    menu: tuple[tuple[int, int], ...]
    model: dict
    held_out: int
    recipe: Recipe
    about: str


SETTINGS = {
    "digits": Setting(
        menu=((4, 4), (3, 3), (2, 2)),
        model={"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 2},
        held_out=300,
        recipe=Recipe(epochs=30, batch=32, lr=2e-3, warmup=0.1),
        about="scikit-learn's digits",
    ),
    "fashion-mnist": Setting(
        menu=((7, 7), (5, 5), (4, 4), (3, 3)),
        model={"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2},
        held_out=5000,
        recipe=Recipe(epochs=2, batch=64, lr=2e-3, warmup=0.1, autocast=True),
        about="Fashion-MNIST",
    ),
}
VARIANTS = {  # name: arguments of make_resizable, weight of the distillation
    "an affine per length, distilled, images resized": ({}, 0.5),
    "one affine for all lengths": ({"norms": "shared"}, 0.5),
    "no distillation": ({}, 0.0),
    "embedding `patch`": ({"embedding": "patch"}, 0.5),
    "embedding `per_length`": ({"embedding": "per_length"}, 0.5),
}


def sets(name: str):
    """Images to train on, without those held out of them, and those to test on."""
    return open_set(name).split(SETTINGS[name].held_out, seed=0)[0], open_set(name, "test")


def train(setting: Setting, variant: str, seed: int, images):
    options, distillation = VARIANTS[variant]
    torch.manual_seed(seed)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **setting.model).make_resizable(
        setting.menu, **options
    )
    recipe = replace(setting.recipe, seed=seed, objective=Objective(distillation))
    size = setting.model["img_size"]
    return Trainer(model, Augmented(images, (size, size)), recipe).train().eval()


def run(name: str, variant: str, seed: int) -> list[float]:
    """Accuracy at each length."""
    torch.set_num_threads(1)
    setting, (images, test) = SETTINGS[name], sets(name)
    return collect(train(setting, variant, seed, images), test).correct.mean(0).tolist()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", default="fashion-mnist", choices=SETTINGS)
    arguments.add_argument("--output", help="recipes/reports/ablation_DATA")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    args = arguments.parse_args()
    output = args.output or f"recipes/reports/ablation_{args.data.replace('-', '_')}"
    path = Path(output).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(path.read_text()) if path.exists() else {"accuracy": {}}
    jobs = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    jobs = [(variant, seed) for variant, seed in jobs if str(seed) not in done["accuracy"].get(variant, {})]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, args.data, *job): job for job in jobs}
        for future in tqdm(as_completed(waiting), total=len(jobs), unit=" runs", disable=None):
            variant, seed = waiting[future]
            done["accuracy"].setdefault(variant, {})[str(seed)] = future.result()
            done["about"] = (  # where and when, as it was measured
                f"{device_name('cpu')}, torch {torch.__version__}, python {platform.python_version()}, "
                f"{date.today().isoformat()}"
            )
            write_whole(path, lambda temporary: temporary.write_text(json.dumps(done, indent=1)))
    path.with_suffix(".md").write_text(table(done, args.data))


def _spread(values) -> str:
    values = 100 * np.array(values)
    return f"{values.mean():.2f} ± {values.std(ddof=1) if len(values) > 1 else 0:.2f}"


def table(done: dict, data: str) -> str:
    """The Markdown of what was found: means and standard deviations over the seeds."""
    setting, seeds = SETTINGS[data], len(next(iter(done["accuracy"].values())))
    size, recipe, menu = setting.model, setting.recipe, [f"{h}x{w}" for h, w in setting.menu]
    lines = [
        "# What each part of the method is worth",
        "",
        f"A ReViT of {size['depth']} blocks of {size['embed_dim']} on {setting.about}, {recipe.epochs:g} times through "
        f"the images in batches of {recipe.batch}{' in bf16' if recipe.autocast else ''}, {setting.held_out:,} of them "
        f"held out, tested on the set's test images; mean and standard deviation over {seeds} seeds. "
        "The recipe is one of minutes on small images: it shows the order of things here, not elsewhere. "
        f"{done['about']}.",
        "",
        "| variant | " + " | ".join(f"accuracy at {grid}, %" for grid in menu) + " |",
        "|---|" + "---|" * len(menu),
    ]
    for variant in VARIANTS:
        columns = np.array(list(done["accuracy"][variant].values())).T
        lines.append(f"| {variant} | " + " | ".join(map(_spread, columns)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
