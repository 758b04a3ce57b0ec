"""Keeps measured results in benchmarks/results/<device>.json and writes the tables and pictures of README.md and docs/.

    pytest benchmarks --all --benchmark-json=run.json && python benchmarks/report.py run.json

Rows of a benchmark that ran again replace the old ones; the others stay. Rows that lose are shown like the rest.
Without arguments only the tables and pictures are written.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import median

import charts

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROOT = HERE.parent
REPORTS = ROOT / "recipes" / "reports"  # of `revit evaluate`
LEAST_ROUNDS = 5  # of a duel whose row is kept
KEPT = ("rival", "speedup", "speedup_quartiles", "ours_ms", "rival_ms", "dtype", "gb_per_s", "percent_of_copy")
KEPT += ("tflop_per_s", "percent_of_matmul", "ours_peak_bytes", "rival_peak_bytes", "commit", "versions")
KEPT += ("settings", "ours_error", "rival_error")
INFER = ("infer", "images", "images_per_second", "decoded_per_second", "answered_per_second", "process_seconds")
HEADLINE = {  # the rows that README.md shows
    "device": "AMD EPYC family 25 model 17, 2 threads, AVX512-BF16",
    "bench": "bench_vit::bench_vit",
    "case": "ViT-S, 32",
    "dtype": "bfloat16",
}
BENCHES = {  # what docs/performance.md shows: file::function, and what it is
    "bench_vit::bench_vit": "A batch of 32 images, grids uniform over 4x4, 7x7, 10x10, 14x14",
    "bench_vit::bench_rotary": "The same batch, models with rotary positions",
    "bench_cpu::bench_traffic": "200 batches, each image's grid drawn from those four at random",
    "bench_cpu::bench_one_image": "One image at a time: milliseconds per image",
    "bench_cpu::bench_int8": "A batch of 32 images in int8; the peak is int8's",
    "bench_cpu::bench_int8_shipped": "The shipped model in int8, 256 images over its menu; the peak is int8's",
    "bench_vit::bench_vit_one_length": "ViT-S/16, all images at one length: packing saves nothing here",
    "bench_block::bench_block": "Four blocks at once, 32 images at those grids or one at 14x14",
    "bench_attention::bench_attention": "Attention alone, forward, 12 heads of 64",
    "bench_video::bench_video": "TimeSformer-S, 8 clips of 8 frames, grids 14x14, 10x10, 7x7",
    "bench_temporal_attention::bench_temporal_attention": "Temporal attention alone, forward, 8 clips, 6 heads of 64",
    "bench_patch_embed::bench_patch_embed_photographs": "Patch embedding of 32 uint8 photographs, each resized",
    "bench_training::bench_recipe": "A whole training step of a small model, 64 images at every length",
    "bench_training::bench_training": "A training step at every length of the menu, in one packed pass",
    "bench_loading::bench_loading": "Preparing the images of a training step in one process, against the step itself",
}
APART = ("bench_video::bench_video",)  # rivals of which a median would say nothing
MODELS = {"vit_small_patch16_224": "ViT/S", "vit_base_patch16_224": "ViT/B"}  # a slash, as dashes part parameters
MODELS |= {"vit_small_patch16_dinov3": "DINOv3/S", "eva02_small_patch14_224": "EVA/02/S"}
RIVALS = {
    "bucketed": "one dense batch per length",
    "loop": "one image at a time",
    "per_image": "one image at a time",
    "naflex": "NaFlexVit, padded",
    "naflex_fastest": "NaFlexVit, padded, its fastest mode",
    "openvino": "OpenVINO, a compiled model per length",
    "openvino_per_length": "OpenVINO, a compiled model per length",
    "openvino_dynamic": "OpenVINO, one model, dynamic shapes",
    "openvino_int8": "OpenVINO int8 (NNCF)",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_int8": "ONNX Runtime int8",
    "zentorch": "zentorch",
    "eager": "timm, eager",
    "compiled": "timm, torch.compile",
    "ours_bf16": "ours in bf16",
    "unrotated": "ours without rotation",
    "padded": "padded, with a mask",
    "longest": "every clip at the longest grid",
    "sdpa": "torch's SDPA, on rearranged tensors",
    "sdpa_rearranging": "torch's SDPA, and rearranging",
    "convolve": "F.conv2d",
    "unfold": "F.unfold and a product",
}


def results_file(device: str) -> Path:
    """Where the results of this device are kept."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / (re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json")


def check(path: Path) -> None:
    """Raise ValueError for a file whose rows are not to be kept, before any of them is."""
    for bench in json.loads(path.read_text())["benchmarks"]:
        if "speedup" in bench["extra_info"] and bench["stats"]["rounds"] < LEAST_ROUNDS:
            raise ValueError(
                f"{path}: {bench['name']} ran {bench['stats']['rounds']} rounds, which is noise: rows of at least "
                f"{LEAST_ROUNDS} are kept"
            )


def collect(path: Path) -> None:
    """Merge one pytest-benchmark file into the results of its device."""
    run = json.loads(path.read_text())
    for bench in run["benchmarks"]:
        info = bench["extra_info"]
        if "speedup" not in info and "infer" not in info:
            continue
        file = results_file(info["device"])
        results = json.loads(file.read_text()) if file.exists() else {"device": info["device"], "rows": {}}
        row = {key: info[key] for key in KEPT + INFER if key in info}
        row |= {"rounds": bench["stats"]["rounds"], "date": run["datetime"][:10]}
        name = bench["fullname"].rpartition("/")[2].replace(".py::", "::")
        results["rows"][name] = json.loads(json.dumps(row), parse_float=lambda x: float(f"{float(x):.4g}"))
        file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def _rows(results: dict, bench: str):
    for name, row in results["rows"].items():
        function, _, parameters = name.partition("[")
        if function == bench and "backward" not in parameters:
            yield parameters.rstrip("]"), row


def case(parameters: str, row: dict) -> str:
    """The parameters less what has a column of its own."""
    for taken in (row["rival"], f"torch.{row['dtype']}", "forward"):
        parameters = re.sub(rf"(^|-){re.escape(taken)}(?=-|$)", "", parameters)
    for name, short in MODELS.items():
        parameters = parameters.replace(name, short)
    return ", ".join(part.replace("/", "-") for part in parameters.strip("-").split("-"))


def infer_table(results: dict) -> list[str]:
    """What `revit infer` reports about its own speed, on photographs."""
    rows = sorted(_rows(results, "bench_infer::bench_infer"))
    if not rows:
        return []
    count = rows[0][1]["images"]
    lines = [
        f"#### `revit infer` on {count:,} photographs in JPEG, 640 x 480",
        "",
        "Images/s, and the rate of each part alone.",
        "",
        "| model and grid | end to end | decoding alone | the model alone | bottleneck |",
        "|---|---|---|---|---|",
    ]
    for case, row in rows:
        rates = (row[key] for key in ("images_per_second", "decoded_per_second", "answered_per_second"))
        cells = [case.replace("-", ", "), *(f"{rate:,.0f}" for rate in rates), row["infer"]]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def accuracy_table(results: dict) -> list[str]:
    """What int8 costs in accuracy, of benchmarks/int8_accuracy.py."""
    found = results.get("int8_accuracy")
    if not found:
        return []
    lines = [
        f"#### Accuracy in int8: the ReViT shipped on {found['date']}, {found['rows'][0]['images']:,} test images",
        "",
        "| grid | | accuracy, % | points lost against bf16 |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        lost = f"{row['lost']:.2f} ± {row['lost_error']:.2f}" if row["way"] != found["rows"][0]["way"] else ""
        cells = [row["length"], row["way"], f"{row['accuracy']:.2f} ± {row['standard_error']:.2f}", lost]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def settings(results: dict, bench: str) -> list[str]:
    """Which of its settings each rival does best with."""
    found = {}
    for parameters, row in _rows(results, bench):
        if "settings" in row:
            rival = RIVALS.get(row["rival"], row["rival"])
            found.setdefault((rival, row["settings"]), []).append(f"{case(parameters, row)} {row['dtype']}")
    by_rival = {}
    for (rival, text), cases in sorted(found.items()):
        by_rival.setdefault(rival, []).append(f"{text} ({'; '.join(sorted(cases))})")
    return [f"Best settings of {rival}: {'. '.join(texts)}." for rival, texts in by_rival.items()]


def table(results: dict, bench: str) -> list[str]:
    lines = [
        "| case | dtype | against | ours, ms | theirs, ms | ratio | of the peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for parameters, row in sorted(_rows(results, bench), key=lambda item: (item[0].split("-")[0], item[1]["dtype"])):
        share = row.get("percent_of_matmul", row.get("percent_of_copy"))
        cells = [case(parameters, row), row["dtype"], RIVALS.get(row["rival"], row["rival"])]
        cells += [*(f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" for ms in (row["ours_ms"], row["rival_ms"]))]
        cells += [f"**{row['speedup']:.2f}**"]
        lines.append("| " + " | ".join([*cells, f"{share:.0f} %" if share else ""]) + " |")
    return lines


def devices() -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def headline_rows() -> tuple[dict, list[dict]]:
    """(results of the device, its rows that README.md shows, the strongest rival first)."""
    (results,) = (found for found in devices() if found["device"] == HEADLINE["device"])
    rows = [
        row
        for parameters, row in _rows(results, HEADLINE["bench"])
        if (case(parameters, row), row["dtype"]) == (HEADLINE["case"], HEADLINE["dtype"])
    ]
    return results, sorted(rows, key=lambda row: row["speedup"])


def pictures() -> dict[str, str]:
    """The text of each picture of README.md, by its path from the root."""
    results, rows = headline_rows()
    named = [(RIVALS.get(row["rival"], row["rival"]), row["speedup"]) for row in rows]
    return charts.pictures(named, results["device"])


def headline() -> str:
    """What README.md says of one benchmark of one device, and of the shipped ReViT's report."""
    results, rows = headline_rows()
    dates = " and ".join(sorted({row["date"] for row in rows}))
    ratio = {row["rival"]: f"**{row['speedup']:.2f}x**" for row in rows}
    found = json.loads((REPORTS / "fashion_mnist" / "report.json").read_text())
    about, report = found["about"], "recipes/reports/fashion_mnist"
    worth = re.search(r"\*\*(.+?)\*\*", found["verdict"][0])[1]
    told = re.search(r"by itself \((.+?) of the images\): .+?, (\S+x) .*full length, (.+)\.", found["verdict"][-1])
    alone = f"; {told[2]}, {told[3]}, where its assigner may answer by itself ({told[1]} of them)" if told else ""
    lost = losing(results)
    lost = f"\nOn {results['device']} the library is slower than\n{lost}." if lost else ""
    device = f"{about['device']}, {about['threads']} threads, {about['dtype']}, {about['date']}"
    padded, dense, compiled = (ratio[rival] for rival in ("naflex", "bucketed", "openvino"))
    return f"""\
- **Images of mixed sizes in one batch**: {padded} as fast as padded batches, {dense} as fast as timm with a dense batch
  for each size, {compiled} as fast as OpenVINO with a compiled model for each.
- **A token length for each image**: the ReViT that comes with the package reaches {worth},
  on images of Fashion-MNIST{alone}.
- **Drop-in**: timm's names, weights, `state_dict` keys and methods; hooks, LoRA, FSDP, `torch.compile` go on working.

{picture("mixed_batches", "Speed of a mixed batch against rivals")}

Medians of paired runs of {dates}; [all rows](docs/performance.md).{lost}

{picture("accuracy_speed", "Accuracy against measured speed of lengths and policies")}

{found["count"]:,} test images of Fashion-MNIST, {device}; [report]({report}/report.md).
"""


def losing(results: dict) -> str:
    """The duels with somebody else's code that are lost by one part in a hundred or more, the worst first."""
    lost = []
    for bench, title in BENCHES.items():
        for parameters, row in _rows(results, bench):
            rival = RIVALS.get(row["rival"], row["rival"]).partition(",")[0]
            if row["speedup"] < 0.99 and not rival.startswith("ours"):
                what = title.partition(":")[0].partition(",")[0].lower()
                of = ", ".join(part for part in (case(parameters, row), row["dtype"]) if not part.isdigit())
                lost.append((row["speedup"], f"{rival} in {what} ({of}; **{row['speedup']:.2f}x**)"))
    return "; ".join(text for _, text in sorted(lost))


def picture(name: str, said: str, folder: str = charts.FOLDER) -> str:
    """The HTML of a picture for light and dark pages. folder: seen from the page"""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}_dark.svg">'
    return f'<picture>{dark}<img src="{folder}/{name}_light.svg" width="760" alt="{said}"></picture>'


def overview(results: dict) -> list[str]:
    """A line for each benchmark and dtype, of APART for each rival too: how many duels were won, and by how much."""
    lines = ["| what | dtype | duels | faster | ratio, median | least to most |", "|---|---|---|---|---|---|"]
    for bench, title in BENCHES.items():
        ratios = {}
        for _, row in _rows(results, bench):
            what = f"{title}, against {RIVALS.get(row['rival'], row['rival'])}" if bench in APART else title
            ratios.setdefault((what, row["dtype"]), []).append(row["speedup"])
        for (what, dtype), found in sorted(ratios.items()):
            won = sum(ratio >= 1 for ratio in found)
            spread = f"**{median(found):.2f}** | {min(found):.2f} to {max(found):.2f}"
            lines.append(f"| {what} | {dtype} | {len(found)} | {won} | {spread} |")
    return [*lines, ""]


def performance() -> str:
    """The tables of every device that has results: what docs/performance.md shows."""
    text = [picture("mixed_batches", "Speed of a mixed batch against rivals", charts.FOLDER.removeprefix("docs/")), ""]
    for results in sorted(
        devices(), key=lambda found: max(row["date"] for row in found["rows"].values()), reverse=True
    ):
        rows = list(results["rows"].values())
        versions = ", ".join(f"{k} {v}" for k, v in rows[-1]["versions"].items())
        dates = sorted({r["date"] for r in rows})
        text += [
            f"### {results['device']}",
            "",
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {versions}.",
            "",
            *overview(results),
        ]
        for bench, title in BENCHES.items():
            if any(True for _ in _rows(results, bench)):
                text += [f"#### {title}", "", *table(results, bench), ""]
                text += [line for setting in settings(results, bench) for line in (setting, "")]
        text += accuracy_table(results) + infer_table(results)
    return "\n".join(text)


def revit() -> str:
    """Each length alone and each policy at each budget, of every kept evaluation: what docs/revit.md shows."""
    text = []
    for file in sorted(REPORTS.glob("*/report.json")):
        found = json.loads(file.read_text())
        about, name = found["about"], file.parent.name
        text += [
            f"### {name}",
            "",
            f"[Report](../recipes/reports/{name}/report.md): {found['count']:,} images of {found['images']}, "
            f"{about['device']}, {about['threads']} threads, {about['dtype']}, {about['date']}.",
            "",
        ]
        text += [*found["verdict"], ""]
        text += ["| policy | budget | accuracy, % | points lost | images/s | speed |", "|---|---|---|---|---|---|"]
        for row in found["static"] + [row for row in found["policies"] if row["policy"] != "random"]:
            numbers = row["numbers"]
            fixed = row["policy"] == "fixed"
            length = "x".join(map(str, found["menu"][numbers["row"]])) if fixed else None
            cells = [f"all at {length}" if fixed else row["policy"], row["budget"]]
            cells += [f"{100 * row['accuracy']:.2f} ± {100 * row['standard_error']:.2f}", f"{100 * row['lost']:.2f}"]
            spread = " ({:.2f} to {:.2f})".format(*row["speed_range"]) if "speed_range" in row else ""
            cells += [f"{row['images_per_second']:.0f}", f"**{row['speed']:.2f}x**{spread}"]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    for ablation in sorted(REPORTS.glob("ablation_*.md")):
        title, *lines = ablation.read_text().splitlines()
        data = re.sub("ablation_|assigner_|models_|training_", "", ablation.stem).replace("_", " ")
        text += [f"##{title}: {data}", *lines, ""]
    return "\n".join(text).replace("\n## ", "\n#### ")


TABLES = {"README.md": ("headline", headline), "docs/performance.md": ("results", performance)}
TABLES |= {"docs/revit.md": ("revit", revit)}


def written(name: str) -> str:
    """The file as it should be: with its table, between <!-- X:start --> and <!-- X:end -->, made anew."""
    marker, make = TABLES[name]
    before, start, rest = (ROOT / name).read_text().partition(f"<!-- {marker}:start -->\n")
    _, end, after = rest.partition(f"<!-- {marker}:end -->")
    if not (start and end):
        raise ValueError(f"{name} needs the lines <!-- {marker}:start --> and <!-- {marker}:end -->")
    return f"{before}{start}{make()}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json", help="of pytest --benchmark-json")
    arguments = parser.parse_args()
    try:
        for path in arguments.runs:
            check(path)
        for path in arguments.runs:
            collect(path)
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error))
    for name in TABLES:
        (ROOT / name).write_text(written(name))
    for name, text in pictures().items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    main()
