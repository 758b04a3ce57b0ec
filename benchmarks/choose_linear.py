#!/usr/bin/env python3
"""Makes ops/linear/measured.json, which says what backend runs a linear layer, from the duels of bench_linear.py.

    pytest benchmarks/bench_linear.py -k "triton or vendor" --benchmark-json=linear.json
    python benchmarks/choose_linear.py linear.json

Of the GPUs that the file is of, what was known of the shapes measured is replaced; all else stays.
"""

import argparse
import json
from pathlib import Path

from revit_kernels.ops.linear import choice

TABLE = Path(choice.__file__).with_name("measured.json")


def winners(benchmarks: list[dict]) -> dict[str, dict[str, list]]:
    """{GPU: {shape: [[most rows, backend], ...]}} of Triton's duels with the vendor; between two sizes, half way."""
    measured: dict[str, dict[str, dict[int, str]]] = {}
    for one in benchmarks:
        row = one["extra_info"]
        if "shape_key" in row and row.get("rival") == "vendor":
            shapes = measured.setdefault(row["device"], {}).setdefault(row["shape_key"], {})
            shapes[row["rows"]] = "triton" if row["speedup"] > 1 else "vendor"
    found = {}
    for device, shapes in measured.items():
        found[device] = {}
        for key, by_rows in sorted(shapes.items()):
            sizes, steps = sorted(by_rows), []
            for size, larger in zip(sizes, [*sizes[1:], None]):
                most = None if larger is None else (size + larger) // 2
                if steps and steps[-1][1] == by_rows[size]:
                    steps.pop()
                steps.append([most, by_rows[size]])
            found[device][key] = steps
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--output", type=Path, default=TABLE)
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    for file in args.files:
        for device, shapes in winners(json.loads(file.read_text())["benchmarks"]).items():
            known[device] = known.get(device, {}) | shapes
    partial = args.output.with_suffix(".partial")
    partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    partial.replace(args.output)
    print(f"{args.output}: {', '.join(f'{len(shapes)} shapes of {device}' for device, shapes in known.items())}")


if __name__ == "__main__":
    main()
