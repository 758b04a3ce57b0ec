#!/usr/bin/env python3
"""What each part of the method is worth, and each way of training it: small ReViTs, each with one thing changed,
several seeds, with spread.

    python recipes/ablation.py [--of parts|training] [--data fashion-mnist] [--output FILE] [--seeds 3] [--float32]

The parts take half an hour on 2 cores of a Zen 4 CPU for Fashion-MNIST, ten minutes for scikit-learn's digits;
the ways of training an hour and a half a seed on one core. Runs that are done are kept, and not run again.
"""

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from revit_kernels import create_model
from revit_kernels.adaptive.costs import device_name
from revit_kernels.cli.arguments import count
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


@dataclass(frozen=True)
class Variant:
    """Where a training differs from the setting's own."""

    resizable: dict = field(default_factory=dict)  # arguments of make_resizable
    objective: Objective = field(default_factory=Objective)
    recipe: dict = field(default_factory=dict)
    times: float = 1.0  # the setting's epochs


VARIANTS = {
    "parts": {  # of the method
        "an affine per length, distilled, images resized": Variant(),
        "one affine for all lengths": Variant({"norms": "shared"}),
        "no distillation": Variant(objective=Objective(0.0)),
        "embedding `patch`": Variant({"embedding": "patch"}),
        "embedding `per_length`": Variant({"embedding": "per_length"}),
    },
    "training": {  # how it is trained: what else is done with the same model
        "every length in a step, half distilled": Variant(),
        "twice as long": Variant(times=2),
        "the longest and one other in a step, as many images": Variant(recipe={"lengths": 2}),
        "the longest and one other in a step, 1.4 times the images": Variant(recipe={"lengths": 2}, times=1.4),
        "distillation 0.9": Variant(objective=Objective(0.9)),
        "distillation 0.9 at temperature 2": Variant(objective=Objective(0.9, 2.0)),
        "Muon for the blocks' weights": Variant(recipe={"optimiser": "muon"}),
        "weights averaged": Variant(recipe={"ema": 0.99}),
        "weights averaged, and their average teaches": Variant(recipe={"ema": 0.99, "teacher": "average"}),
    },
}


def sets(name: str):
    """Images to train on, without those held out of them, and those to test on."""
    return open_set(name).split(SETTINGS[name].held_out, seed=0)[0], open_set(name, "test")


def train(setting: Setting, variant: Variant, seed: int, images, float32: bool = False):
    torch.manual_seed(seed)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **setting.model).make_resizable(
        setting.menu, **variant.resizable
    )
    epochs = variant.times * setting.recipe.epochs
    recipe = replace(setting.recipe, seed=seed, epochs=epochs, objective=variant.objective, **variant.recipe)
    if float32:
        recipe = replace(recipe, autocast=False)
    size = setting.model["img_size"]
    return Trainer(model, Augmented(images, (size, size)), recipe).train().eval()


def run(name: str, what: str, variant: str, seed: int, float32: bool = False) -> list[float]:
    """Accuracy at each length."""
    torch.set_num_threads(1)
    setting, (images, test) = SETTINGS[name], sets(name)
    return collect(train(setting, VARIANTS[what][variant], seed, images, float32), test).correct.mean(0).tolist()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", default="fashion-mnist", choices=SETTINGS)
    arguments.add_argument("--of", default="parts", choices=VARIANTS, help="the method's parts, or its training")
    arguments.add_argument("--output", help="recipes/reports/ablation_DATA, of the training ablation_training_DATA")
    arguments.add_argument("--seeds", type=count, default=3)
    arguments.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    arguments.add_argument("--float32", action="store_true", help="several times faster where a CPU has no bf16")
    args = arguments.parse_args()
    kind = "" if args.of == "parts" else f"{args.of}_"
    output = args.output or f"recipes/reports/ablation_{kind}{args.data.replace('-', '_')}"
    path = Path(output).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(path.read_text()) if path.exists() else {"accuracy": {}, "about": {}}
    if args.float32 and not SETTINGS[args.data].recipe.autocast:
        arguments.error(f"--float32 is of sets that are trained in bf16, {args.data} is not")
    jobs = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS[args.of]]
    jobs = [(variant, seed) for variant, seed in jobs if str(seed) not in done["accuracy"].get(variant, {})]
    begun = {seed for found in done["accuracy"].values() for seed in found}
    for seed in sorted(begun & {str(seed) for _, seed in jobs}):
        if (seed in done.get("float32", [])) != args.float32:
            arguments.error(
                f"seed {seed} was begun in {'bf16' if args.float32 else 'float32'}: a seed has one precision"
            )
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, args.data, args.of, *job, args.float32): job for job in jobs}
        for future in tqdm(as_completed(waiting), total=len(jobs), unit=" runs", disable=None):
            variant, seed = waiting[future]
            done["accuracy"].setdefault(variant, {})[str(seed)] = future.result()
            if args.float32:
                done["float32"] = sorted({*done.get("float32", []), str(seed)})
            done["about"][str(seed)] = (  # where and when, as its last run was measured
                f"{device_name('cpu')}, torch {torch.__version__}, python {platform.python_version()}, "
                f"{date.today().isoformat()}"
            )
            write_whole(path, lambda temporary: temporary.write_text(json.dumps(done, indent=1)))
    path.with_suffix(".md").write_text(table(done, args.data, args.of))


def _spread(values) -> str:
    values = 100 * np.array(values)
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def _seeds(seeds: list[str]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {' and '.join(seeds)}"


def table(done: dict, data: str, what: str) -> str:
    """The Markdown of what was found: means and standard deviations over the seeds that every variant ran with."""
    setting, accuracy = SETTINGS[data], [done["accuracy"].get(variant, {}) for variant in VARIANTS[what]]
    seeds = sorted(set.intersection(*map(set, accuracy)))
    spread = f"mean and standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed: no spread"
    precision = " in bf16" if setting.recipe.autocast else ""
    if float32 := [seed for seed in seeds if seed in done.get("float32", [])]:
        precision += f" ({_seeds(float32)}: float32)"
    places = {about: [seed for seed in seeds if done["about"][seed] == about] for about in done["about"].values()}
    places = [about if len(own) == len(seeds) else f"{about}: {_seeds(own)}" for about, own in places.items() if own]
    size, recipe, menu = setting.model, setting.recipe, [f"{h}x{w}" for h, w in setting.menu]
    lines = [
        "# What each part of the method is worth" if what == "parts" else "# What each way of training is worth",
        "",
        f"A ReViT of {size['depth']} blocks of {size['embed_dim']} on {setting.about}, {recipe.epochs:g} times through "
        f"the images in batches of {recipe.batch}{precision}, {setting.held_out:,} of them "
        f"held out, tested on the set's test images; {spread}. "
        "The recipe is one of minutes on small images: it shows the order of things here, not elsewhere. "
        f"{'; '.join(places)}.",
        "",
        "| variant | " + " | ".join(f"accuracy at {grid}, %" for grid in menu) + " |",
        "|---|" + "---|" * len(menu),
    ]
    for variant, found in zip(VARIANTS[what], accuracy):
        columns = np.array([found[seed] for seed in seeds]).T
        lines.append(f"| {variant} | " + " | ".join(map(_spread, columns)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
