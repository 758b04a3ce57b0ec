"""The scripts of examples/ run, and say what they are there to say."""

import io
import re
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_revit import make_images

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def clothes(tmp_path):
    """Images in a folder per class, of several sizes, and an archive of them."""
    images = make_images(40)
    for i in range(len(images)):
        inside = tmp_path / "images" / images.classes[images.targets[i]].replace(" ", "-")
        inside.mkdir(exist_ok=True, parents=True)
        Image.fromarray(images.pixels(i)).resize((16 + i % 3 * 8, 16 + i % 5 * 8)).save(inside / f"{i}.png")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "images", "images")
    return tmp_path / "images"


def run(monkeypatch, capsys, folder, script, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    found = runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out, found


def test_every_example_is_listed_and_run():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert all(f'"{script}"' in Path(__file__).read_text() or script == "service.py" for script in scripts)


def test_drop_in_timm(monkeypatch, capsys, tmp_path):
    pytest.importorskip("timm")
    said, _ = run(monkeypatch, capsys, tmp_path, "drop_in_timm.py")
    assert float(re.search(r"from timm is ([\d.e+-]+)", said)[1]) < 1e-4 and "403 tokens in one packed batch" in said


def test_fine_tune(monkeypatch, capsys, clothes):
    said, _ = run(monkeypatch, capsys, clothes.parent, "fine_tune.py", clothes, "--epochs", 2, "--batch", 16)
    assert re.search(r"^epoch 2: loss \d\.\d+, right on [\d.]+% of 8 images held out$", said, re.MULTILINE)


def test_embed_archive(monkeypatch, capsys, clothes):
    said, _ = run(monkeypatch, capsys, clothes.parent, "embed_archive.py", clothes.with_suffix(".tar"))
    found = np.load(clothes.parent / "features.npz")
    assert found["features"].shape == (40, 192) and "images.tar/images/" in str(found["paths"][0])
    assert "features of 40 images" in said and said.count("is nearest to") == 3


def test_adaptive(monkeypatch, capsys, clothes):
    said, _ = run(monkeypatch, capsys, clothes.parent, "adaptive.py", clothes)
    assert [line.partition(":")[0] for line in said.splitlines()] == ["1.5x", "2x", "3x"]
    assert all(sum(map(int, re.findall(r"(\d+) at \dx\d", line))) == 40 for line in said.splitlines())


def test_lora(monkeypatch, capsys, tmp_path):
    pytest.importorskip("peft")
    said, _ = run(monkeypatch, capsys, tmp_path, "lora.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < losses[0] and "trainable%" in said


def test_export(monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnxscript")
    said, _ = run(monkeypatch, capsys, tmp_path, "export.py")
    assert float(re.search(r"difference is ([\d.e+-]+)", said)[1]) < 1e-4
    assert (tmp_path / "model.onnx").stat().st_size > 1_000_000


def test_attention_maps(monkeypatch, capsys, tmp_path):
    Image.new("RGB", (40, 28), "grey").save(tmp_path / "image.png")
    said, _ = run(monkeypatch, capsys, tmp_path, "attention_maps.py", "image.png")
    assert Image.open(tmp_path / "attention.png").size == (40, 28)
    assert [len(line) for line in said.splitlines()[:7]] == [14] * 7


def test_service(monkeypatch, capsys, clothes):
    pytest.importorskip("fastapi")
    client = pytest.importorskip("fastapi.testclient")
    _, found = run(monkeypatch, capsys, clothes.parent, "service.py")
    data = io.BytesIO()
    Image.new("RGB", (28, 28)).save(data, "PNG")
    with client.TestClient(found["app"]) as http:
        answer = http.post("/classify", content=data.getvalue())
        assert answer.status_code == 200 and answer.json()["label"] in found["LABELS"]
        assert http.post("/classify", content=b"nothing").status_code == 422
