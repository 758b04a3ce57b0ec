"""What a measurement on a GPU changed: tiles of Triton kernels, and which backend is tried first.

`measured/<name of the GPU>.json`, where there is one, holds up to three tables. What equals the rule is not stored.

    "tiles":     {"linear.forward": [[{"inputs": 768, "out": 3072}, {"BLOCK_ROWS": 128, ...}], ...]}
                 written by benchmarks/tune.py; the first row whose shape agrees in all that it names
    "linear":    {"forward bfloat16 768x3072 gelu": "vendor"}
                 written by benchmarks/choose_linear.py; see ops/linear/choice.py
    "attention": {"forward": {"flash_attn": 2048}}
                 written by benchmarks/gpu_report.py --hand-over; see ops/attention/handover.py
"""

import importlib
import json
import re
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def path(gpu: str) -> Path:
    """The file of a kind of GPU, by the name that torch gives it."""
    return FOLDER / f"{re.sub('[^A-Za-z0-9]+', '_', gpu)}.json"


@cache
def of(device: torch.device) -> dict:
    """The tables of this GPU; none for a CPU, nor where there is no file."""
    file = path(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return json.loads(file.read_text()) if file and file.exists() else {}


def rule(op: str, kernel: str, **shape: int) -> dict[str, int]:
    """The tiles that the op's own rule gives."""
    return importlib.import_module(f"revit_kernels.ops.{op}.tiles").rule(kernel, **shape)


@cache
def tiles(op: str, kernel: str, device: torch.device, **shape: int) -> dict[str, int]:
    """Tile constants, num_warps and num_stages of a kernel, as measured, else by the rule. Do not change the dict.

    shape: what the tiles depend on, never a number of rows or a length: an image's bits would depend on its batch

    Raises ValueError for a measured row that lacks a constant.
    """
    usual = rule(op, kernel, **shape)
    for known, found in of(device).get("tiles", {}).get(f"{op}.{kernel}", ()):
        if known.items() <= shape.items():
            if found.keys() != usual.keys():
                raise ValueError(f"{op}.{kernel} needs tiles of {', '.join(sorted(usual))}, {known} has {found}")
            return found
    return usual


def write(gpu: str, table: str, rows: dict) -> Path:
    """Replace one table of a GPU's file: all of it, or nothing."""
    file = path(gpu)
    tables = json.loads(file.read_text()) if file.exists() else {}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(tables | {table: rows}, indent=1, sort_keys=True) + "\n")
    part.replace(file)
    return file
