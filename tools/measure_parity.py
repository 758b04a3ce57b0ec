"""Writes benchmarks/parity.json: how far every name's answers are from timm's in float32 on this CPU.

Run as `python tools/measure_parity.py [PATTERN ...]`, half an hour for all. Models of up to 130 million parameters are
measured whole, larger ones two blocks deep. The number is the largest difference over a dense batch and a mixed one,
image by image, relative to the largest value where that exceeds one.
"""

import json
import sys
from pathlib import Path

import timm
import torch

import revit_kernels
from revit_kernels.models.registry import NOT_TIMMS, registry

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parity.json"
LARGEST = 130_000_000
GRIDS = [(3, 5), (7, 4), (1, 1), (10, 10)]


def liven(model: torch.nn.Module) -> None:
    """Give every parameter values of its own, also those that start at zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if p.ndim > 1 and p.shape[0] > 1:
                p.copy_(noise * p.shape[1:].numel() ** -0.5)
            else:
                p.copy_(noise * 0.2 + (1 if name.endswith("weight") else 0))


@torch.inference_mode()
def difference(name: str) -> float:
    entry = registry()["models"][name]
    kwargs = {"num_classes": 10} | ({} if entry["parameters"] <= LARGEST else {"depth": 2})
    if entry["kwargs"].get("num_kv_heads") and "depth" in kwargs:
        heads = entry["kwargs"]["num_heads"]
        kwargs["num_kv_heads"] = [heads, heads // 2]
    if "module" not in entry:
        kwargs["dynamic_img_size"] = True
    theirs = timm.create_model(name, **kwargs).eval()
    liven(theirs)
    ours = revit_kernels.from_timm(theirs)
    h, w = ours.patch_embed.patch_size
    images = [torch.rand(3, rows * h, columns * w) for rows, columns in GRIDS]
    whole = "module" not in entry and "depth" not in kwargs
    x = torch.rand(2, 3, *(theirs.patch_embed.img_size if whole else (14 * h, 14 * w)))
    pairs = [(ours(x), theirs(x))]
    pairs.append((ours(images, grids=GRIDS), torch.cat([theirs(image[None]) for image in images])))
    return max(((a - b).abs().max() / max(1.0, b.abs().max())).item() for a, b in pairs)


def main() -> None:
    names = {name for pattern in sys.argv[1:] or [""] for name in revit_kernels.list_models(pattern)}
    found = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for name in sorted(names, key=lambda name: registry()["models"][name]["parameters"]):
        if registry()["models"][name].get("module") not in NOT_TIMMS:
            found[name] = float(f"{difference(name):.1e}")
            OUTPUT.write_text(json.dumps(dict(sorted(found.items())), indent=0) + "\n")


if __name__ == "__main__":
    main()
