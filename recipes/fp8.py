#!/usr/bin/env python3
"""What fp8 costs in accuracy: a ReViT on test images at each of its lengths, as it is and quantized to e4m3.

    python recipes/fp8.py [FILE.safetensors] [--data NAME] [--root DIR] [--dtype float32] [--output FOLDER]

Without a file, the model that the package ships, on Fashion-MNIST. On a CPU the e4m3 numbers are multiplied in fp32:
the rounding is that of a GPU, the speed is not. Writes fp8_<data>.md and .json.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from revit_kernels import create_model
from revit_kernels.adaptive.costs import device_name
from revit_kernels.data.datasets import open_set, read_batches
from revit_kernels.models.registry import SHIPPED
from revit_kernels.training.labels import fit_images

BATCH = 250


@torch.inference_mode()
def answers(model, images, grid) -> torch.Tensor:
    """(images, classes) logits at one length."""
    device = next(model.parameters()).device
    found = []
    for indices, pixels in read_batches(images, np.arange(len(images)), BATCH):
        pixels = pixels.to(device) if isinstance(pixels, torch.Tensor) else [image.to(device) for image in pixels]
        found.append(model(pixels, grids=[grid] * len(indices), channels_last=True).float().cpu())
    return torch.cat(found)


def compare(usual: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor) -> dict:
    """Accuracies in percent; the standard error of what is lost is that of the difference image by image."""
    right, still = (usual.argmax(-1) == targets).double(), (ours.argmax(-1) == targets).double()
    lost = right - still
    return {
        "accuracy": 100 * right.mean().item(),
        "fp8": 100 * still.mean().item(),
        "lost": 100 * lost.mean().item(),
        "lost_error": 100 * lost.std().item() / len(lost) ** 0.5,
        "same_answer": 100 * (usual.argmax(-1) == ours.argmax(-1)).double().mean().item(),
        "logits_off": ((ours - usual).norm() / usual.norm()).item(),
    }


def report(found: dict) -> str:
    about = found["about"]
    lines = [
        "# What fp8 costs in accuracy",
        "",
        f"{about['images']:,} images of {about['data']}, {about['model']} in {about['dtype']}, {about['device']}, "
        f"torch {about['torch']}, {about['date']}. {about['how']} Points lost are against the same model unquantized, "
        "with the standard error of the difference image by image. Written by recipes/fp8.py.",
        "",
        f"| length | {about['dtype']}, % right | fp8, % right | points lost | same answer | logits off by |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = "{length} | {accuracy:.2f} | {fp8:.2f} | {lost:.2f} ± {lost_error:.2f} | {same_answer:.2f} %"
        lines.append(f"| {cells.format(**row)} | {100 * row['logits_off']:.1f} % |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED), metavar="FILE")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--root")
    parser.add_argument("--limit", type=int, help="only so many images, equally many of every class")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", default=str(Path(__file__).with_name("reports")))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usual = create_model(args.model).eval().to(device, getattr(torch, args.dtype))
    ours = usual.engine(quantize="fp8")
    images = open_set(args.data, "test", root=args.root)
    if args.limit and args.limit < len(images):
        images = images.split(args.limit, 0)[1]
    images = fit_images(images, usual)
    targets = torch.from_numpy(np.asarray(images.targets))
    rows = []
    for grid in usual.menu:
        row = compare(answers(usual, images, grid), answers(ours, images, grid), targets)
        rows.append({"length": "{}x{}".format(*grid)} | row)
        print(rows[-1], flush=True)
    about = {
        "model": "the shipped model" if args.model == str(SHIPPED) else Path(args.model).name,
        "data": f"{args.data}/test",
        "images": len(images),
        "dtype": args.dtype,
        "device": f"{device_name(device)}, {torch.get_num_threads()} threads",
        "torch": metadata.version("torch"),
        "date": time.strftime("%Y-%m-%d"),
        "how": "e4m3 by the tensor cores." if device.type == "cuda" else "e4m3 emulated: rounded, multiplied in fp32.",
    }
    found = {"about": about, "rows": rows}
    path = Path(args.output) / f"fp8_{args.data.replace('-', '_')}"
    for suffix, text in ((".json", json.dumps(found, indent=1) + "\n"), (".md", report(found))):
        partial = path.with_suffix(f".partial{suffix}")
        partial.write_text(text)
        partial.replace(path.with_suffix(suffix))


if __name__ == "__main__":
    main()
