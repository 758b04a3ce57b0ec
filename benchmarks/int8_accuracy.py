"""What int8 costs in accuracy: the shipped model on Fashion-MNIST's test images, at each of its lengths.

    python benchmarks/int8_accuracy.py [--limit N] [--root DIR]

Ours in bf16 and in int8, and OpenVINO in float32 and in int8 (NNCF's quantization after training, calibrated on
training images). Points lost are against ours in bf16, with the standard error of the difference image by image.
The rows go to this device's file in benchmarks/results; `python benchmarks/report.py` writes them into docs/.
"""

import argparse
import json
import time

import cpu_rivals as rivals
import numpy as np
import torch
from conftest import commit, device_name, versions
from plain_revit import PlainReViT
from report import results_file

from revit_kernels import create_model
from revit_kernels.data.datasets import open_set
from revit_kernels.models.registry import SHIPPED

BATCH = 250
CALIBRATION = 300  # training images at each length: NNCF's default


def read(split: str, limit: int | None, root):
    """(images, height, width, 3) uint8 and (images,) targets; equally many of every class if there is a limit."""
    images = open_set("fashion-mnist", split, root=root)
    if limit and limit < len(images):
        images = images.split(limit, 0)[1]
    pixels = np.stack([images.pixels(i) for i in range(len(images))])
    return torch.from_numpy(pixels), torch.from_numpy(np.asarray(images.targets))


@torch.inference_mode()
def ours(model, images, grid) -> torch.Tensor:
    """(images,) the class that is answered."""
    batches = images.split(BATCH)
    return torch.cat([model(batch, grids=[grid] * len(batch), channels_last=True).argmax(-1) for batch in batches])


def openvino(plain: PlainReViT, row: int, images, calibration=None) -> torch.Tensor:
    plain.set_length(row)
    prepared = [plain.prepare(batch, row) for batch in images.split(BATCH)]
    samples = None
    if calibration is not None:
        found = plain.prepare(calibration, row)
        samples = {tuple(found.shape[2:]): [image[None].numpy() for image in found]}
    converted = rivals.Converted(plain.vit, samples)
    rival = rivals.OpenVino(converted, rivals.Way("f32", "LATENCY", torch.get_num_threads(), "batch"))
    return torch.cat([rival.prepare([batch])().argmax(-1) for batch in prepared])


def measure(limit: int | None, root) -> list[dict]:
    """A row for each length and way."""
    images, targets = read("test", limit, root)
    calibration, _ = read("train", CALIBRATION, root)
    bf16 = create_model(str(SHIPPED)).eval().to(torch.bfloat16)
    plain = PlainReViT(create_model(str(SHIPPED))).eval()
    ways = {"ours, bf16": lambda row: ours(bf16, images, bf16.menu[row])}
    try:
        int8 = create_model(str(SHIPPED)).eval().to(torch.bfloat16).engine(quantize="int8")
        ways["ours, int8"] = lambda row: ours(int8, images, int8.menu[row])
    except NotImplementedError as why:
        print(f"ours has no int8 here: {why}")
    ways["OpenVINO, float32"] = lambda row: openvino(plain, row, images)
    ways["OpenVINO, int8 (NNCF)"] = lambda row: openvino(plain, row, images, calibration)
    rows = []
    for row, (h, w) in enumerate(bf16.menu):
        base = None
        for name, answer in ways.items():
            right = (answer(row) == targets).double()
            base = right if base is None else base
            lost = base - right
            rows.append(
                {
                    "length": f"{h}x{w}",
                    "way": name,
                    "images": len(right),
                    "accuracy": 100 * right.mean().item(),
                    "standard_error": 100 * right.std().item() / len(right) ** 0.5,
                    "lost": 100 * lost.mean().item(),
                    "lost_error": 100 * lost.std().item() / len(right) ** 0.5,
                }
            )
            print("{length:>5}  {way:<24} {accuracy:6.2f} ± {standard_error:.2f} %".format(**rows[-1]), end="")
            print("   points lost {lost:5.2f} ± {lost_error:.2f}".format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="only so many test images; then nothing is kept")
    parser.add_argument("--root", help="where the set lies (default: as `revit data` has it)")
    args = parser.parse_args()
    rows = measure(args.limit, args.root)
    if args.limit:
        return
    file = results_file(device_name())
    results = json.loads(file.read_text()) if file.exists() else {"device": device_name(), "rows": {}}
    about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "versions": versions()}
    results["int8_accuracy"] = about | {"rows": rows}
    file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
