"""`revit infer` from end to end on 2,000 photographs in JPEG, 640 x 480: is decoding the bottleneck, or the model?

The photographs are crops of the real ones that `revit samples` gathers (out of REVIT_PHOTOGRAPHS, a folder, where that
is set), each encoded again. What a run says in its closing line is what is kept.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import commit, device_name, versions
from PIL import Image

COUNT = int(os.environ.get("REVIT_BENCH_IMAGES", 2000))
SIZE = (640, 480)
VIT_S = ["--model", "vit_small_patch14_dinov2", "--untrained", "--features"]  # its speed is not its weights'
CASES = {  # what is run, and at which length
    "shipped-3x3": ["--grids", "3x3"],
    "shipped-7x7": ["--grids", "7x7"],
    "vit_small_patch14-4x4": [*VIT_S, "--grids", "4x4"],
    "vit_small_patch14-16x16": [*VIT_S, "--grids", "16x16"],
}
NUMBER = r"([\d,.]*\d)"
LINE = re.compile(rf"{NUMBER} images in [\d.]+ s: {NUMBER} images/s,")
DECODING = re.compile(rf"Decoding was the bottleneck: {NUMBER} .*decoded, the model could take {NUMBER}\.")
MODEL = re.compile(rf"The model was the bottleneck: it could take {NUMBER} .*, {NUMBER} could be decoded\.")


def sources() -> list[Image.Image]:
    """The colour photographs that are large enough to be cut."""
    from revit_kernels.data.samples import gather_photographs

    given = os.environ.get("REVIT_PHOTOGRAPHS")
    if given:
        files = sorted(Path(given).iterdir())
    else:
        import tempfile

        folder = tempfile.mkdtemp(prefix="revit_photographs_")
        try:
            files = sorted(gather_photographs(Path(folder)))
        except ValueError as why:
            pytest.skip(f"the photographs cannot be downloaded: {why}")
    found = []
    for file in files:
        try:
            image = Image.open(file)
            if image.mode == "RGB" and min(image.size) >= 256:
                found.append(image.convert("RGB"))
        except OSError:
            continue
    if not found:
        pytest.skip(f"there are no photographs in {given}")
    return found


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of COUNT files: crops of between a quarter and all of a photograph, half of them mirrored."""
    folder, rng, images = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0), sources()
    for number in range(COUNT):
        image = images[rng.integers(len(images))]
        scale = min(image.width / SIZE[0], image.height / SIZE[1]) * rng.uniform(0.5, 1)
        width, height = SIZE[0] * scale, SIZE[1] * scale
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        cut = image.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        if rng.integers(2):
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cut.save(folder / f"{number:05}.jpg", quality=int(rng.integers(80, 96)))
    return folder


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("case", CASES)
def bench_infer(benchmark, request, photographs, tmp_path, case):
    """The median run, by images a second, of three."""
    command = [sys.executable, "-m", "revit_kernels.cli", "infer", str(photographs), *CASES[case]]
    command += ["--output", str(tmp_path / "answers.npz")]
    runs = []

    def run():
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        assert done.returncode == 0, done.stderr
        line = done.stderr.splitlines()[-1]
        count, rate = map(number, LINE.search(line).groups())
        assert count == COUNT
        decoding = DECODING.search(line)
        found = list(map(number, (decoding or MODEL.search(line)).groups()))
        decoded, answered = found if decoding else found[::-1]
        runs.append(
            {
                "infer": "decoding" if decoding else "the model",
                "images": COUNT,
                "images_per_second": rate,
                "decoded_per_second": decoded,
                "answered_per_second": answered,
                "process_seconds": seconds,
            }
        )

    benchmark.pedantic(run, rounds=min(3, request.config.getoption("--rounds") or 3))
    assert len(np.load(tmp_path / "answers.npz")["paths"]) == COUNT
    runs.sort(key=lambda row: row["images_per_second"])
    about = {"device": device_name(), "versions": versions(), "commit": commit(), "dtype": "the device's fastest"}
    benchmark.extra_info.update(about | runs[len(runs) // 2])
