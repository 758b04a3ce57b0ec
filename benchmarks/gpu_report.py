#!/usr/bin/env python3
"""One JSON and one Markdown table of what a call of benchmarks/gpu_suite.sh found.

    python benchmarks/gpu_report.py FOLDER --output NAME   merge what the stages left there into NAME.json and NAME.md
    python benchmarks/gpu_report.py FOLDER --ceilings      measure this GPU's copy and matrix product first
    python benchmarks/gpu_report.py NAME.json --hand-over  write into revit_kernels/measured from which length
                                                           on a rival's attention was faster

Exit status 1 if a stage failed, ran out of time or was not run.

Beside every time stand two others: what it would be if only the bytes and operations counted and this machine's own
ceilings, measured in the same run, were reached; and the prediction of benchmarks/roofline.py, made before any run.
"""

import argparse
import csv
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import roofline

from revit_kernels import measured
from revit_kernels.dispatch import BACKENDS, OPS
from revit_kernels.ops.attention.handover import RIVALS

HERE = Path(__file__).parent
HALF = ("bfloat16", "float16")


def measure_ceilings(folder: Path) -> None:
    import conftest
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    found = {
        "device": conftest.device_name(),
        "copy_gb_per_s": conftest.copy_ceiling() / 1e9,
        "matmul_tflop_per_s": {name: conftest.matmul_ceiling(dtype) / 1e12 for name, dtype in dtypes.items()},
        "versions": conftest.versions(),
        "commit": conftest.commit(),
    }
    (folder / "ceilings.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"copy {found['copy_gb_per_s']:.0f} GB/s, product {found['matmul_tflop_per_s']['bfloat16']:.0f} TFLOP/s in bf16"
    )


def _json(path: Path):
    """What the file holds; None where a stage was stopped before it wrote it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> list:
    """The lines that hold JSON: a process that was killed may have cut one short."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def stages(folder: Path) -> list[dict]:
    try:
        lines = (folder / "stages.tsv").read_text().splitlines()
    except OSError:
        return []
    rows = [dict(zip(("stage", "result", "seconds", "limit", "last"), line.split("\t"))) for line in lines]
    return list({row["stage"]: row for row in rows}.values())  # one that ran again replaces what it said before


def skipped(folder: Path) -> list[str]:
    """The reasons for which benchmarks did not run, each once."""
    reasons = {}
    for log in sorted(folder.glob("bench_*.log")):
        for count, why in re.findall(
            r"^SKIPPED \[(\d+)\] \S+?:\d+: (.*)$", log.read_text(errors="replace"), re.MULTILINE
        ):
            reasons[log.stem, why] = reasons.get((log.stem, why), 0) + int(count)
    return [f"{bench}: {why} ({count})" for (bench, why), count in reasons.items()]


def kernel_of(test: str) -> str:
    """`op.backend` of a test's name, as REVIT_DISABLE takes it; its file where it is of no single kernel."""
    file, _, rest = test.partition("::")
    op = Path(file).stem.removeprefix("test_")
    backends = [part for part in re.split(r"[\[\]-]", rest) if part in BACKENDS]
    return f"{op}.{backends[-1]}" if op in OPS and backends else file


def failures(folder: Path) -> list[dict]:
    """Which kernels failed which of their tests, and why, the most tests first."""
    found = {}
    for row in _json_lines(folder / "failures.jsonl"):
        found.setdefault(kernel_of(row["test"]), []).append(row)
    rows = [{"kernel": kernel, "count": len(tests), "tests": tests} for kernel, tests in found.items()]
    return sorted(rows, key=lambda row: -row["count"])


def duel(bench: dict, name: str, ceilings: dict) -> dict:
    """One row: what was measured, the bound by this run's ceilings, and the prediction."""
    info = bench["extra_info"]
    seconds = info["ours_ms"] / 1e3
    moved, flops = info.get("gb_per_s", 0) * 1e9 * seconds, info.get("tflop_per_s", 0) * 1e12 * seconds
    moved, issued = info.get("work", (moved, flops))
    copy = info.get("copy_ceiling_gb_per_s") or ceilings.get("copy_gb_per_s")
    product = info.get("matmul_ceiling_tflop_per_s") or ceilings.get("matmul_tflop_per_s", {}).get(info["dtype"])
    work = roofline.Work(moved, flops, issued)
    row = {"bench": name, "case": bench["name"].partition("[")[2].rstrip("]"), "step": bench["name"].partition("[")[0]}
    kept = ("dtype", "rival", "ours_ms", "rival_ms", "speedup", "speedup_quartiles", "gb_per_s", "percent_of_copy")
    kept += ("tflop_per_s", "percent_of_matmul", "ours_peak_bytes", "rival_peak_bytes")
    row |= {key: info[key] for key in kept if key in info}
    if (moved == 0 or copy) and (issued == 0 or product) and moved + issued > 0:
        row["bound_ms"] = 1e3 * work.at((copy or 1) * 1e9, (product or 1) * 1e12)
    if "predicted_ms" in info:
        row["predicted_ms"] = info["predicted_ms"]
    elif info["dtype"] in HALF and "cuda" in info.get("versions", {}) and moved + issued > 0:
        row["predicted_ms"] = 1e3 * work.seconds
    return row


def rows_of(folder: Path) -> list[tuple[str, dict]]:
    """The rows that each benchmark wrote as it went, and the benchmark's name; a last line cut off is left out."""
    return [(path.stem, row) for path in sorted(folder.glob("bench_*.jsonl")) for row in _json_lines(path)]


def kernels(folder: Path) -> list[dict]:
    """ncu's measurements of each launch: its CSV, in which a row of units follows the names."""
    try:
        lines = [line for line in (folder / "ncu.csv").read_text().splitlines() if not line.startswith("==")]
    except OSError:
        return []
    rows = list(csv.DictReader(lines))
    if not rows:
        return []
    units, launches = rows[0], rows[1:]
    wanted = {
        "us": "gpu__time_duration.sum",
        "percent_of_dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "percent_of_sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "registers": "launch__registers_per_thread",
    }
    scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
    found = []
    for launch in launches:
        try:
            row = {key: float(launch[column].replace(",", "")) for key, column in wanted.items()}
        except (KeyError, ValueError):
            continue  # a launch that ncu could not measure
        row["us"] *= scale.get(units[wanted["us"]], 1)
        found.append(
            {"kernel": launch["Kernel Name"].partition("(")[0][:80], "grid": launch.get("Grid Size", "")} | row
        )
    return found


def backend_ratios(rows: list[dict], step: str, backend: str) -> dict[int, float]:
    """By tokens, the ratio below which three quarters of the pairs were."""
    found = {}
    for row in rows:
        kind, _, rest = row["case"].partition("-")
        tokens = rest.partition("-")[0]
        if row["bench"] == "bench_attention" and kind == step and tokens.isdigit() and row["dtype"] in HALF:
            if row["rival"] == f"backend_{backend}":
                found[int(tokens)] = row["speedup_quartiles"][1]
    return found


def hand_over(rows: list[dict]) -> dict:
    """By step and backend, the least number of tokens from which on it was faster at every length measured.

    Faster: three quarters of the pairs were. None where that never was, or nothing was measured.
    """
    found = {}
    for step in ("forward", "backward"):
        found[step] = {}
        for backend in RIVALS:
            ratios, faster = backend_ratios(rows, step, backend), None
            for tokens in sorted(ratios, reverse=True):
                if ratios[tokens] >= 1:
                    break
                faster = tokens
            found[step][backend] = faster
    return found


def write_hand_over(gpu: str, found: dict) -> Path:
    """Write the lengths where dispatch reads them: those that there are."""
    faster = {step: {name: n for name, n in figures.items() if n is not None} for step, figures in found.items()}
    return measured.write(gpu, "attention", faster)


def merge(folder: Path) -> dict:
    ceilings = _json(folder / "ceilings.json") or {}
    rows = rows_of(folder)
    about = next((row["extra_info"] for _, row in rows), ceilings)
    found = [duel(row, name, ceilings) for name, row in rows]
    return {
        "device": about.get("device", "unknown"),
        "date": datetime.fromtimestamp(folder.stat().st_mtime, timezone.utc).date().isoformat(),
        "commit": about.get("commit"),
        "versions": about.get("versions", {}),
        "ceilings": {key: ceilings[key] for key in ("copy_gb_per_s", "matmul_tflop_per_s") if key in ceilings},
        "stages": stages(folder),
        "failures": failures(folder),
        "duels": found,
        "forwards": _json(folder / "forward.json") or [],
        "skipped": skipped(folder),
        "kernels": kernels(folder),
        "hand_over": hand_over(found),
    }


def _ms(value) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: list[str], rows: list[list]) -> list[str]:
    cells = [[str(cell).replace("|", "/") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _duel_row(row: dict) -> list:
    low, high = row["speedup_quartiles"]
    copy = f"{row['gb_per_s']:.0f} ({row['percent_of_copy']:.0f} %)" if "gb_per_s" in row else ""
    product = f"{row['tflop_per_s']:.3g} ({row['percent_of_matmul']:.0f} %)" if "tflop_per_s" in row else ""
    times = [_ms(row.get(key)) for key in ("ours_ms", "rival_ms")]
    limits = [_ms(row.get(key)) for key in ("bound_ms", "predicted_ms")]
    ratio = f"**{row['speedup']:.2f}** ({low:.2f} to {high:.2f})"
    return [row["step"].removeprefix("bench_"), row["case"], row["rival"], *times, ratio, *limits, copy, product]


def markdown(found: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"# {found['device']}", "", f"{found['date']}, commit {found['commit']}; {versions}.", ""]
    if found["ceilings"]:
        products = found["ceilings"]["matmul_tflop_per_s"].items()
        lines += [
            f"Ceilings measured in this run: copy {found['ceilings']['copy_gb_per_s']:.0f} GB/s; matrix product "
            + ", ".join(f"{value:.0f} TFLOP/s in {name}" for name, value in products)
            + f". Predictions are against {roofline.COPY / 1e9:.0f} GB/s and {roofline.PRODUCT / 1e12:.0f} TFLOP/s.",
            "",
        ]
    rows = [[s["stage"], s["result"], s["seconds"], s["limit"], s["last"]] for s in found["stages"]]
    lines += ["## Stages", "", *_table(["stage", "result", "s", "limit", "last line"], rows), ""]
    if found["failures"]:
        lines += ["## Failures", "", "A kernel is switched off by its name: `REVIT_DISABLE=attention.cuda,...`.", ""]
        rows = [
            [
                failed["kernel"],
                failed["count"],
                failed["tests"][0]["test"].partition("::")[2],
                failed["tests"][0]["why"],
            ]
            for failed in found["failures"]
        ]
        lines += [*_table(["kernel", "tests", "the first", "why"], rows), ""]
    for forward in found["forwards"]:
        lines += [f"## A forward: {forward['model']}, {forward['images']} images, bfloat16", ""]
        rows = [
            [whose, *(_ms(forward[whose].get(key)) for key in ("host_ms", "eager_ms", "graph_ms"))]
            + [_ms(forward[whose]["kernels"][-1]["us"] / 1e3), forward[whose]["kernels"][-1]["launches"]]
            for whose in ("ours", "timm")
        ]
        head = ["", "host, ms", "eager, ms", "graph, ms", "kernels, ms", "launches"]
        lines += [*_table(head, rows), ""]
        rows = [[k["kernel"], f"{k['us']:.1f}", k["launches"]] for k in forward["ours"]["kernels"][:-1]]
        lines += [*_table(["our kernels", "us", "launches"], rows), ""]
    if not found["duels"]:
        return "\n".join(lines)
    head = [
        "bench",
        "case",
        "against",
        "ours, ms",
        "theirs, ms",
        "ratio (quartiles)",
        "bound here, ms",
        "predicted, ms",
    ]
    head += ["GB/s (of the copy)", "TFLOP/s (of the product)"]
    lines += ["## Duels", "", "A ratio above 1: ours is faster.", ""]
    lines += [*_table(head, [_duel_row(row) for row in found["duels"]]), ""]
    lines += [f"- {why}" for why in found["skipped"]] + [""]
    rows = [
        [k["kernel"], k["grid"], f"{k['us']:.1f}", f"{k['percent_of_dram']:.0f}", f"{k['percent_of_sm']:.0f}"]
        + [f"{k['registers']:.0f}"]
        for k in found["kernels"]
    ]
    lines += [
        "## Kernels, by ncu",
        "",
        *_table(["kernel", "grid", "us", "% of DRAM", "% of SM", "registers"], rows),
        "",
    ]
    rows = [
        [
            step,
            name,
            f"from {tokens} tokens" if tokens else "never" if backend_ratios(found["duels"], step, name) else "?",
        ]
        for step, figures in found["hand_over"].items()
        for name, tokens in figures.items()
    ]
    lines += [
        "## Where a rival's attention was faster",
        "",
        *_table(["step", "backend", "faster (?: not measured)"], rows),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder, or a report's JSON")
    parser.add_argument("--output", type=Path, metavar="NAME")
    parser.add_argument("--ceilings", action="store_true", help="measure this machine's copy and matrix product")
    parser.add_argument("--hand-over", action="store_true", help="write the lengths into revit_kernels")
    args = parser.parse_args()
    if args.ceilings:
        measure_ceilings(args.source)
        return 0
    if args.hand_over:
        found = json.loads(args.source.read_text())
        print(write_hand_over(found["device"], found["hand_over"]))
        return 0
    found = merge(args.source)
    rounded = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.4g}"))
    for kind, text in (("json", json.dumps(rounded, indent=1) + "\n"), ("md", markdown(found))):
        unfinished = args.output.with_name(f"{args.output.name}.part")
        unfinished.write_text(text)
        unfinished.rename(args.output.with_name(f"{args.output.name}.{kind}"))
    return int(any(stage["result"] != "ok" for stage in found["stages"]))


if __name__ == "__main__":
    sys.exit(main())
