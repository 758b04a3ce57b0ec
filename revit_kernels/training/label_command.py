"""What `revit label` does with its arguments."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from revit_kernels.data.datasets import open_set
from revit_kernels.data.division import folds
from revit_kernels.models.registry import create_model
from revit_kernels.serving.prepare import choose_device, choose_dtype
from revit_kernels.training.labels import collect, join


def load_resizable(path: str, device_name: str | None, dtype: str | None):
    """A ReViT from its file, in eval mode. Raises ValueError for a file of another kind of model."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file of a ReViT: train one with `revit train`")
    device = choose_device(device_name)
    model = create_model(path)
    if model.menu is None:
        raise ValueError(f"{path} knows one length only: make it a ReViT with `revit train {path} --menu ...`")
    return model.to(device, choose_dtype(dtype, device)).eval()


def fit_images(images, model, by_class: bool = True):
    """The images with targets numbered as the model's classes are, and large JPEGs decoded no larger than it needs."""
    names = model.pretrained_cfg.get("label_names") if by_class else None
    if names and len(names) == model.num_classes:
        images = images.with_classes(names)
    longest = tuple(g * p for g, p in zip(model.menu[0], model.patch_embed.patch_size))
    return images.reduced(lambda size: longest)


def run(args) -> int:
    """`revit label`; returns the exit status."""
    output = Path(args.output)
    if output.suffix != ".parquet":
        raise ValueError(f"--output must end in .parquet, got {args.output}")
    if not output.resolve().parent.is_dir():
        raise ValueError(f"the folder of --output {output} does not exist")
    images = open_set(args.data, args.split, root=args.root)
    files = [args.model, *args.fold_models]
    parts = [images]
    if len(files) > 1:
        if args.held_out:
            raise ValueError("--held-out and --fold-models are two ways to keep images apart: give one")
        of_fold = folds(images.targets, len(files), args.seed)
        parts = [images.subset(np.flatnonzero(of_fold == fold)) for fold in range(len(files))]
    elif args.held_out:
        parts = [images.split(args.held_out, args.seed)[1]]
    options = {name: getattr(args, name) for name in ("unsolved", "rule", "against", "probabilities", "batch_tokens")}
    found = []
    folders = [output.with_name(f".{output.name}.partial{number}") for number in range(len(files))]
    with tqdm(total=sum(map(len, parts)), unit=" images", disable=True if args.quiet else None, file=sys.stderr) as bar:
        for file, part, folder in zip(files, parts, folders):
            model = load_resizable(file, args.device, args.dtype)
            found.append(
                collect(
                    model,
                    fit_images(part, model, args.against == "truth"),
                    progress=bar.update,
                    partial=folder,
                    **options,
                )
            )
    outcomes = found[0] if len(found) == 1 else join(found)
    outcomes.save(output)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    if not args.quiet:
        print("\n".join(summary(outcomes)), file=sys.stderr)
    return 0


def summary(outcomes) -> list[str]:
    """A line per length: how many images it recognises, and how many have it as their label."""
    lines = []
    for row, (h, w) in enumerate(outcomes.menu):
        share, labels = outcomes.correct[:, row].mean(), (outcomes.label == row).mean()
        lines.append(f"revit: {h}x{w} is right on {share:.2%}, and the label of {labels:.2%}")
    dropped = int((outcomes.label < 0).sum())
    return lines + ([f"revit: {dropped:,} images that no length gets right have no label"] if dropped else [])
