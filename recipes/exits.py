#!/usr/bin/env python3
"""Whether an exit inside a pass pays more than a shorter length: auxiliary heads after each block of a frozen ReViT.

    python recipes/exits.py runs/fashion_mnist/model.safetensors --data fashion-mnist --held-out 5000

A head is a LayerNorm and a linear layer on the class token and the mean of the patches, distilled from the full length
and the truth. Costs are shares of the full-length pass in multiply-accumulates; an image that goes on after an exit
pays for the rest of its pass alone, one that is given a longer length for that whole pass. Thresholds come from
held-out images. Half an hour on a core of a Zen 4 CPU that others use too.

On the shipped model an exit after block 4 or 5 of the shortest length gains 0.3 points at a quarter of the full cost,
0.2 at a third, each two standard errors, and nothing from half of it on (reports/exits_fashion_mnist.md): a cascade has
no such stage. On ReViT-S (CIFAR-10) an exit never gains (reports/exits_cifar10.md).
"""

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels.adaptive.calibration import auc
from revit_kernels.adaptive.costs import device_name, model_macs
from revit_kernels.data.datasets import open_set
from revit_kernels.files import write_whole
from revit_kernels.models.registry import load_resizable
from revit_kernels.training.labels import fit_images

COSTS = (0.25, 0.35, 0.5, 0.7)  # shares of the full-length pass at which designs are compared


@torch.inference_mode()
def features(model, images, grid, batch: int = 500) -> tuple[list[Tensor], Tensor]:
    """For each block but the last (images, 2 dim): class token and mean patch; and the model's logits."""
    blocks = len(model.blocks)
    found, logits = [[] for _ in range(blocks - 1)], []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images.gather(range(start, min(start + batch, len(images)))))
        tokens, maps = model.forward_intermediates(
            pixels, blocks, return_prefix_tokens=True, output_fmt="NLC", grids=[grid] * len(pixels), channels_last=True
        )
        logits.append(model.forward_head(tokens).float())
        for kept, (patches, prefix) in zip(found, maps):
            kept.append(torch.stack([torch.cat([c[0], p.mean(0)]) for p, c in zip(patches, prefix)]).half())
    return [torch.cat(kept) for kept in found], torch.cat(logits)


def train_head(x: Tensor, targets: Tensor, teacher: Tensor, seed: int, epochs: int, batch: int = 512) -> nn.Module:
    torch.manual_seed(seed)
    head = nn.Sequential(nn.LayerNorm(x.shape[1]), nn.Linear(x.shape[1], teacher.shape[1]))
    optimiser = torch.optim.AdamW(head.parameters(), 3e-3, weight_decay=0.01)
    if len(x) < batch:
        raise ValueError(f"a head needs at least {batch} images, got {len(x)}")
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for step in range(steps):
        if step % (len(x) // batch) == 0:
            order = torch.randperm(len(x))
        rows = order[step % (len(x) // batch) * batch :][:batch]
        y = head(x[rows].float())
        loss = 0.5 * F.cross_entropy(y, targets[rows]) + 0.5 * F.cross_entropy(y, teacher[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return head


class Stage:
    """Answers of held-out and test images where a pass ends or may end: probabilities and their cost."""

    def __init__(self, name: str, held_out: Tensor, test: Tensor, cost: float):
        self.name, self.cost = name, cost
        self.probabilities = [held_out.numpy(), test.numpy()]
        self.confidence = [p.max(1) for p in self.probabilities]


def two_stages(first: Stage, second: Stage, rest: float, targets, limit: float) -> tuple[float, np.ndarray] | None:
    """Held-out accuracy and which test images are right, where the least confident go on until the cost is `limit`."""
    share = (limit - first.cost) / rest
    if not 0 <= share <= 1:
        return None
    threshold = np.quantile(first.confidence[0], share)
    right = []
    for i, truth in enumerate(targets):
        on = first.confidence[i] < threshold
        answer = np.where(on, second.probabilities[i].argmax(1), first.probabilities[i].argmax(1))
        right.append(answer == truth)
    return float(right[0].mean()), right[1]


def compare(exits: dict, ends: list[Stage], whole: list[float], targets, limit: float) -> dict:
    """At a cost: the best pair of passes and the best exit with what follows, both chosen on held-out images."""
    passes, inside = [], []
    for j, longer in enumerate(ends):
        passes += [
            (f"{a.name}, then {longer.name}", two_stages(a, longer, whole[j], targets, limit)) for a in ends[j + 1 :]
        ]
    for (row, _), stage in exits.items():
        inside.append(
            (f"{stage.name}, then the rest", two_stages(stage, ends[row], whole[row] - stage.cost, targets, limit))
        )
        for j in range(row):
            inside.append((f"{stage.name}, then {ends[j].name}", two_stages(stage, ends[j], whole[j], targets, limit)))
    best = [
        max((c for c in found if c[1] is not None), key=lambda c: c[1][0], default=None) for found in (passes, inside)
    ]
    if None in best:
        return {"cost": limit}
    (name, (_, right)), (exit_name, (_, exit_right)) = best
    gain = exit_right.astype(float) - right
    return {"cost": limit, "passes": name, "accuracy": float(right.mean()), "exit": exit_name,
            "exit_accuracy": float(exit_right.mean()), "gain": float(gain.mean()),
            "error": float(gain.std() / len(gain) ** 0.5)}  # fmt: skip


def study(model, parts, epochs: int, seeds: int) -> dict:
    """parts: training, held-out and test images"""
    full = model_macs(model, model.menu[0])
    whole = [model_macs(model, grid) / full for grid in model.menu]
    targets = [torch.as_tensor(np.asarray(part.targets)) for part in parts]
    known = [targets[1].numpy(), targets[2].numpy()]
    rows, ends, exits, teacher = [], [], [{} for _ in range(seeds)], None
    for row, grid in enumerate(model.menu):
        (x, logits), (held_x, held_logits), (test_x, test_logits) = (features(model, part, grid) for part in parts)
        teacher = logits.softmax(1) if teacher is None else teacher
        name = f"{grid[0]}x{grid[1]}"
        ends.append(Stage(name, held_logits.softmax(1), test_logits.softmax(1), whole[row]))
        for k in range(len(x)):
            cost = model_macs(model, grid, k + 1) / full
            found = []
            for seed in range(seeds):
                head = train_head(x[k], targets[0], teacher, seed, epochs)
                with torch.inference_mode():
                    answers = [head(part[k].float()).softmax(1) for part in (held_x, test_x)]
                stage = exits[seed][row, k] = Stage(f"{name} block {k + 1}", *answers, cost)
                right = stage.probabilities[1].argmax(1) == known[1]
                found.append((right.mean(), auc(stage.confidence[1], right)))
            accuracy, area = np.array(found).T
            rows.append({"grid": name, "blocks": k + 1, "cost": cost, "accuracy": list(accuracy), "auc": list(area)})
        right = ends[-1].probabilities[1].argmax(1) == known[1]
        area = auc(ends[-1].confidence[1], right)
        rows.append({"grid": name, "blocks": len(x) + 1, "cost": whole[row], "accuracy": [right.mean()], "auc": [area]})
    duels = [[compare(exits[seed], ends, whole, known, limit) for limit in COSTS] for seed in range(seeds)]
    return {"rows": rows, "duels": duels, "epochs": epochs, "seeds": seeds, "test_images": len(parts[2])}


def _spread(values, digits: int) -> str:
    values = np.asarray(values)
    return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def table(done: dict) -> str:
    """The Markdown of a study."""
    lines = [
        "# Exits inside a pass",
        "",
        f"Auxiliary heads on the frozen blocks of {done['model']}, {done['test_images']:,} test images of "
        f"{done['images']}, mean and standard deviation over {done['seeds']} trainings of the heads. Costs are "
        f"counted. {done['about']}.",
        "",
        "| length | after block | cost | accuracy, % | AUC of its confidence |",
        "|---|---|---|---|---|",
    ]
    for row in done["rows"]:
        accuracy, area = _spread(100 * np.array(row["accuracy"]), 2), _spread(row["auc"], 3)
        lines.append(f"| {row['grid']} | {row['blocks']} | {row['cost']:.3f} | {accuracy} | {area} |")
    lines += [
        "",
        "At equal cost, two stages each, pairs and thresholds chosen on held-out images; points gained by the exit, "
        "and its paired standard error over test images:",
        "",
        "| cost | best two passes | accuracy, % | best exit | accuracy, % | gain | standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for of in zip(*done["duels"]):
        of = [one for one in of if "gain" in one]
        if of:
            accuracy, with_exit, gain = (
                _spread([100 * one[k] for one in of], 2) for k in ("accuracy", "exit_accuracy", "gain")
            )
            names = "; ".join(sorted({one["exit"] for one in of}))
            error = 100 * np.mean([one["error"] for one in of])
            lines.append(
                f"| {of[0]['cost']} | {of[0]['passes']} | {accuracy} | {names} | {with_exit} | {gain} | {error:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model")
    arguments.add_argument("--data", default="fashion-mnist")
    arguments.add_argument("--held-out", type=int, default=5000)
    arguments.add_argument("--images", type=int, help="to train the heads on (default: all that are not held out)")
    arguments.add_argument("--dtype", default="float32", help="of the model, as of revit evaluate")
    arguments.add_argument("--epochs", type=int, default=12)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--output", default="recipes/reports/exits_fashion_mnist")
    args = arguments.parse_args()
    model = load_resizable(args.model, None, args.dtype)
    images, test = (fit_images(open_set(args.data, split), model) for split in ("train", "test"))
    train, held_out = images.split(args.held_out, seed=0)
    if args.images and args.images < len(train):
        train = train.split(args.images, seed=0)[1]
    done = study(model, (train, held_out, test), args.epochs, args.seeds)
    device = device_name(next(model.parameters()).device)
    about = f"The heads saw {len(train):,} images. {device}, {torch.get_num_threads()} threads, {args.dtype}, "
    about += date.today().isoformat()
    done |= {"model": Path(args.model).stem, "images": test.name, "about": about}
    path = Path(args.output).with_suffix(".json")
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(done, indent=1)))
    path.with_suffix(".md").write_text(table(done))


if __name__ == "__main__":
    main()
