#!/usr/bin/env python3
"""Writes into revit_kernels/measured which backend runs a linear layer fastest, from the duels of bench_linear.py.

    pytest benchmarks/bench_linear.py -k "triton or vendor" --benchmark-json=linear.json
    python benchmarks/choose_linear.py linear.json

Of the GPUs that the file is of, what was known of the shapes measured is replaced; all else stays.
"""

import json
import sys
from pathlib import Path
from statistics import geometric_mean

from revit_kernels import measured


def winners(benchmarks: list[dict]) -> dict[str, dict[str, str]]:
    """{GPU: {shape: backend}} of Triton's duels with the vendor: by the mean ratio over all numbers of rows."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for one in benchmarks:
        row = one["extra_info"]
        if "shape_key" in row and row.get("rival") == "vendor":
            ratios.setdefault(row["device"], {}).setdefault(row["shape_key"], []).append(row["speedup"])
    return {
        gpu: {key: "triton" if geometric_mean(found) > 1 else "vendor" for key, found in shapes.items()}
        for gpu, shapes in ratios.items()
    }


def main() -> None:
    for name in sys.argv[1:]:
        for gpu, shapes in winners(json.loads(Path(name).read_text())["benchmarks"]).items():
            known = json.loads(measured.path(gpu).read_text()) if measured.path(gpu).exists() else {}
            file = measured.write(gpu, "linear", known.get("linear", {}) | shapes)
            print(f"{file}: {len(shapes)} shapes of {gpu}")


if __name__ == "__main__":
    main()
