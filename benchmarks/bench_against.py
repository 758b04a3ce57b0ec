#!/usr/bin/env python3
"""Duels of this checkout against another commit, on a CPU: ViT-S and ViT-B, as engines, as modules, and in training.

    python benchmarks/bench_against.py COMMIT [--rounds 15] [--models vit_small_patch16_224] [--output FILE.json]

The other commit is checked out and built beside this one. Each side runs in a process of its own; they take turns,
call by call, so that drift of the machine hits both. Prints the median and the quartiles of theirs / ours: above 1, we
are faster. A commit from before engines is timed prepacked.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
MENU = [(4, 4), (7, 7), (10, 10), (14, 14)]
WORKER = """
import json, sys, time
import torch
from revit_kernels import create_model
torch.manual_seed(0)
menu, calls = [tuple(g) for g in json.loads(sys.argv[1])], {}
def ready(name, dtype, quantize):
    model = create_model(name).eval().requires_grad_(False).to(getattr(torch, dtype))
    if hasattr(model, "engine"):
        return model, model.engine(quantize=quantize)
    packed = create_model(name).eval().requires_grad_(False).to(getattr(torch, dtype))
    packed.load_state_dict(model.state_dict())
    if quantize:
        packed.quantise(quantize)  # as it was called then
    packed.prepack()
    return model, packed
def made(name, dtype, quantize, images, way):
    key = name, dtype, quantize
    if way == "training":  # leaves another model behind
        key = *key, way
    if key not in calls:
        calls.clear()
        calls[key] = ready(name, dtype, quantize)
    grids = [menu[i * len(menu) // images] for i in range(images)] if images > 1 else [menu[-1]]
    x = [torch.randn(3, 16 * h, 16 * w).to(getattr(torch, dtype)) for h, w in grids]
    if way == "training":
        model = calls[key][0].train().requires_grad_(True)
        def step():
            model.zero_grad()
            with torch.enable_grad():
                model(x, grids=grids).float().square().mean().backward()
        return step
    run = calls[key][way == "engine"]
    return lambda: run(x, grids=grids)
call = None
for line in sys.stdin:
    order = json.loads(line)
    with torch.inference_mode(False), torch.no_grad():
        if order["do"] == "make":
            try:
                call = made(*order["case"])
                call()
                answer = "ready"
            except (NotImplementedError, ValueError) as why:
                answer = str(why)
        else:
            start = time.perf_counter()
            call()
            answer = time.perf_counter() - start
    print(json.dumps(answer), flush=True)
"""


class Side:
    def __init__(self, root: Path):
        env = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-c", WORKER, json.dumps(MENU)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=root
        )

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def checkout(commit: str, root: Path) -> Path:
    """The commit, built, in this folder."""
    subprocess.run(["git", "worktree", "add", "--detach", str(root), commit], cwd=ROOT, check=True, capture_output=True)
    env = os.environ | {"REVIT_CUDA_ARCHS": ""}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=root, env=env, check=True, capture_output=True)
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--images", nargs="+", type=int, default=[32, 8, 1])
    parser.add_argument("--ways", nargs="+", default=["engine", "module", "training"])
    parser.add_argument("--keep", type=Path, help="a folder for the other commit's checkout, used again where it is")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = args.keep or Path(folder) / "theirs"
        if not root.exists():
            checkout(args.commit, root)
        try:
            ours, theirs = Side(ROOT), Side(root)
            for name in args.models:
                for kind in args.dtypes:
                    dtype, quantize = ("bfloat16", "int8") if kind == "int8" else (kind, None)
                    for way in [way for way in args.ways if way == "engine" or quantize is None]:
                        for images in args.images:
                            case = (name, dtype, quantize, images, way)
                            said = [side.ask(do="make", case=case) for side in (ours, theirs)]
                            if said != ["ready", "ready"]:
                                print(f"{name} {kind} {way} {images}: {said}", flush=True)
                                continue
                            pairs = [(ours.ask(do="time"), theirs.ask(do="time")) for _ in range(args.rounds)]
                            ratios = [b / a for a, b in pairs]
                            low, _, high = quantiles(ratios, n=4)
                            row = {"model": name, "dtype": kind, "way": way, "images": images}
                            row |= {"ratio": median(ratios), "quartiles": [low, high]}
                            row |= {"ours_ms": 1e3 * median(a for a, _ in pairs)}
                            rows.append(row | {"theirs_ms": 1e3 * median(b for _, b in pairs)})
                            print(
                                f"{name} {kind:8} {way} {images:2} images: {rows[-1]['ours_ms']:.1f} ms, "
                                f"{row['ratio']:.3f}x ({low:.3f} to {high:.3f})",
                                flush=True,
                            )
        finally:
            if not args.keep:
                subprocess.run(["git", "worktree", "remove", "--force", str(root)], cwd=ROOT, capture_output=True)
    if args.output:
        args.output.write_text(json.dumps({"against": args.commit, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
