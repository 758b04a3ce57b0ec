#!/usr/bin/env python3
"""Where the time of a forward goes on a GPU: on the host, on the device, in which kernels; ours beside timm's.

    python benchmarks/gpu_forward.py FILE.json [--tiny]

Batches of bench_vit: a quarter of the images at each length of the menu, bfloat16. timm runs one dense batch a length.
"""

import argparse
import json
import time
from pathlib import Path

import bench_vit
import torch
from gpu_vit_rivals import graph_of
from torch.profiler import ProfilerActivity, profile

from revit_kernels import Packing

CUDA = torch.cuda.is_available()
ROUNDS = 1 if bench_vit.TINY else 20
CASES = [(images, name) for images in (32, 256) for name in bench_vit.MODELS]


def wait():
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(call) -> tuple[float, float]:
    """Of the host alone, until the call returns, and until the device is done too; the least of several rounds."""
    host, whole = [], []
    for _ in range(ROUNDS + 1):
        wait()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        wait()
        whole.append(time.perf_counter() - start)
    return min(host[1:]) * 1e3, min(whole[1:]) * 1e3


def kernels(call) -> list[dict]:
    """The 12 that took longest, with microseconds and launches in one call; the last row is of all."""
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as seen:
        call()
        wait()
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
    rows = [{"kernel": row.key[:90], "us": getattr(row, key), "launches": row.count} for row in rows]
    total = {"kernel": "all", "us": sum(row["us"] for row in rows), "launches": sum(row["launches"] for row in rows)}
    return [*rows[:12], total]


@torch.inference_mode()
def forward(name: str, images: int) -> dict:
    case = bench_vit.Case(name, images, torch.bfloat16)
    packing = Packing.from_grids(case.grids, 1, device=bench_vit.DEVICE)
    calls = {"ours": case.ours, "timm": bench_vit.bucketed(case)}
    found = {"model": name, "images": images}
    for whose, call in calls.items():
        host, whole = milliseconds(call)
        row = {"host_ms": host, "eager_ms": whole, "kernels": kernels(call)}
        if CUDA:  # a graph's grids do not change
            fixed = call if whose == "timm" else lambda: case.model(case.images, packing=packing)
            row["graph_ms"] = milliseconds(graph_of(fixed))[1]
        found[whose] = row
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="one small case")
    args = parser.parse_args()
    found = []
    for images, name in [(2, bench_vit.MODELS[0])] if args.tiny else CASES:
        found.append(forward(name, images))
        args.output.write_text(json.dumps(found, indent=1) + "\n")  # at once: a run that is killed keeps what it has
        times = [
            f"{whose} {found[-1][whose].get('graph_ms', found[-1][whose]['eager_ms']):.3g} ms"
            for whose in ("ours", "timm")
        ]
        print(f"{name}, {images} images: {', '.join(times)}")


if __name__ == "__main__":
    main()
