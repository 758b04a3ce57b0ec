#!/usr/bin/env python3
"""Small cases of each kernel, forward and backward, against float64 on the CPU: for a sanitizer, and before timing.

python benchmarks/gpu_smoke.py attention.cuda layer_norm.cuda ...    in this process; exit status 1 if one is wrong
python benchmarks/gpu_smoke.py --each --switch-off FILE attention.cuda ...
    each in a process of its own, side by side. Those that are wrong, crash or do not end in time are written to
    FILE as REVIT_DISABLE takes them; exit status 1 if there are any. A refusal is no fault.
"""

import argparse
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 40
CASES = {
    "attention": [("menu", {}), ("dim 80", {}), ("dim 128", {}), ("cross, empty on either side", {}), ("long", {})],
    "layer_norm": [("menu", {}), ("lengths in turn", {}), ("odd dim", {}), ("wide", {})],
    "patch_embed": [("mixed, shrunk and enlarged", {}), ("prefix and tail", {}), ("patch 14", {})],
    "pool": [("menu", {"kind": kind}) for kind in ("avg", "max", "avgmax")],
    "pos_embed": [("menu", {}), ("odd dim, not square", {})],
    "temporal_attention": [("menu", {}), ("odd frames", {}), ("wide", {})],
}
LINEAR = [("several tiles", {"activation": "gelu"}), ("tile edges", {"activation": None})]


def cases(op: str):
    """(name, function, inputs on the tests' device, names of inputs without gradients) of each case."""
    import torch

    from revit_kernels import ops

    test = importlib.import_module(f"test_{op}")
    half = torch.bfloat16 if test.DEVICE == "cuda" else torch.float32
    if op == "linear":
        for name, options in LINEAR:
            yield name, ops.linear, test.make_inputs(*test.SHAPES[name], half) | options, ()
        return
    for name, options in CASES[op]:
        extra = {} if op == "pos_embed" else {"dtype": half}
        inputs = test.make_inputs(**test.CASES[name], **extra)
        yield name, getattr(ops, op), inputs | options, ("images",) if op == "patch_embed" else ()


def on_cpu(value):
    import torch

    from revit_kernels import Packing

    if isinstance(value, list):
        return [on_cpu(v) for v in value]
    if isinstance(value, Packing):
        return Packing.from_grids(value.host_grids, value.prefix, capacity=value.capacity)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def wrong(kernel: str, forward: bool = False) -> str | None:
    """What is wrong with the kernel `op.backend`, or None. forward: leave its backward out."""
    import torch
    from contract import assert_close, run

    op, backend = kernel.split(".")
    for name, function, inputs, constant in cases(op):
        constant = tuple(inputs) if forward else constant
        try:
            actual = run(function, inputs, backend, constant=constant)
        except NotImplementedError as refused:
            print(f"{kernel}: {name}: {refused}")
            continue
        host = {key: on_cpu(value) for key, value in inputs.items()}
        rough = run(function, host, "reference", constant=constant)
        exact = run(function, host, "reference", torch.float64, constant=constant)
        for key in actual:
            try:
                assert_close(f"{name}: {key}", actual[key].cpu(), exact[key], rough[key])
            except AssertionError as error:
                return str(error)
        print(f"{kernel}: {name}: right")
    return None


def in_a_process(kernel: str) -> str | None:
    command = [sys.executable, __file__, kernel]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"did not end within {SECONDS} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"exit {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="OP.BACKEND")
    parser.add_argument("--each", action="store_true", help="a process for each")
    parser.add_argument("--forward", action="store_true", help="leave the backward out")
    parser.add_argument("--switch-off", type=Path, metavar="FILE", help="where to write those that are wrong")
    args = parser.parse_args()
    if args.each:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip(args.kernels, pool.map(in_a_process, args.kernels)))
    else:
        found = {kernel: wrong(kernel, args.forward) for kernel in args.kernels}
    faults = {kernel: why for kernel, why in found.items() if why}
    for kernel, why in faults.items():
        print(f"{kernel} is switched off: {why}" if args.switch_off else f"{kernel} is wrong: {why}")
    if args.switch_off:
        args.switch_off.write_text(",".join(faults))
    if not faults:
        print(f"{len(found)} kernels: none is wrong")
    return 1 if faults else 0


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    sys.path[:0] = [str(root), str(root / "tests"), str(root / "tests" / "ops")]
    sys.exit(main())
