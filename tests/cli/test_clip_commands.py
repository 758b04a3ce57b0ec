"""The whole pipeline on videos: train, label, train-assigner, evaluate, infer, with a TimeSformer of seconds."""

import argparse
import contextlib
import csv
import io
import json
import re
import resource

import av
import numpy as np
import pytest
import small_videos
import torch
from PIL import Image
from small_videos import write_video
from timm_pairs import assert_near

from revit_kernels.cli import main
from revit_kernels.cli.clips import open_data
from revit_kernels.data.videos import Sampling, decode_clip
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.registry import create_model
from revit_kernels.models.video_weights import inflated

MENU = "4x4x4,4x2x2,2x2x2"
SMALL = "img_size=16,patch_size=4,embed_dim=32,depth=2,num_heads=2"


def ramp(name: str, number: int, frames: int = 8, size: int = 32) -> list[np.ndarray]:
    """Noise that gets brighter, or darker, from one frame to the next."""
    rng = np.random.default_rng(number)
    level = rng.integers(100, 150) + (18 if name == "brighter" else -18) * (np.arange(frames) - (frames - 1) / 2)
    noise = rng.integers(-30, 30, (size, size, 3))
    return [np.uint8(np.clip(noise + one, 0, 255)) for one in level]


def run(*arguments) -> tuple[int, list[dict], str]:
    """(status, records, standard error)"""
    out, said = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        status = main([str(argument) for argument in arguments])
    out.flush()
    lines = out.buffer.getvalue().decode().splitlines()
    return status, [json.loads(line) for line in lines if line.startswith("{")], said.getvalue()


def done(*arguments) -> list[dict]:
    status, records, said = run(*arguments)
    assert status == 0, said
    return records


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of clips, folder of the run with model, labels, assigner and report)"""
    root = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 30), ("test", 16)):
        for name in ("brighter", "darker"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                frames = ramp(name, i + (1000 if split == "test" else 0))
                write_video(root / split / name / f"{i}.mp4", frames)
    folder = root / "run"
    options = ["--quiet", "--device", "cpu"]
    done(
        *("train", "timesformer_tiny_patch16_224", "--model-args", SMALL, "--menu", MENU, "--data", root),
        *("--held-out", 0.4, "--epochs", 16, "--batch", 8, "--lr", 3e-3, "--output", folder, *options),
    )
    model = folder / "model.safetensors"
    where = ["--data", root, *options]
    labels, assigner = folder / "labels.parquet", folder / "assigner.safetensors"
    done("label", model, "--held-out", 0.4, "--probabilities", "--output", labels, *where)
    done("train-assigner", model, "--labels", labels, "--epochs", 2, "--output", assigner, *where)
    budgets = ["--budgets", "1.5x", "--rounds", 1, "--timed", 8]
    done("evaluate", model, "--assigner", assigner, *budgets, "--output", folder / "report", *where)
    return root, folder


def test_learns(trained):
    _, folder = trained
    with open(folder / "log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["accuracy_4x4x4"]) > 0.75


def test_report(trained):
    _, folder = trained
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["menu"] == [[4, 4, 4], [4, 2, 2], [2, 2, 2]] and report["count"] == 32
    assert report["macs"][0] > 2 * report["macs"][1] > 2 * report["macs"][2]
    text = (folder / "report" / "report.md").read_text()
    assert "| 4x4x4 | 64 |" in text and "| 2x2x2 | 8 |" in text
    assert Image.open(folder / "report" / "images.png").size[0] > 500


def test_infer_is_the_model(trained):
    """A record's answer is the model's for the frames that were decoded."""
    root, folder = trained
    records = done("infer", root / "test" / "darker", "--model", folder, "--quiet", "--dtype", "float32")
    assert [record["frames"] for record in records] == [4] * 16
    assert all(record["grid"] == [4, 4] and record["tokens"] == 64 for record in records)
    right = [record["classes"][0]["label"] == "darker" for record in records]
    model = create_model(folder / "model.safetensors").eval()
    for record in records[:3]:
        clip = torch.from_numpy(decode_clip(record["path"], Sampling(4)).pixels[0])
        with torch.inference_mode():
            logits = model([clip], grids=[(4, 4)], channels_last=True)
        best = record["classes"][0]
        assert logits.argmax() == best["class"]
        assert float(logits.softmax(-1).max()) == pytest.approx(best["probability"], abs=1e-5)
    assert np.mean(right) > 0.75


def test_policy_views_and_tables(trained, tmp_path):
    root, folder = trained
    assigner = ["--model", folder, "--assigner", folder / "assigner.safetensors", "--quiet"]
    for record in done("infer", root / "test" / "darker", *assigner, "--budget", "1.5x"):
        assert record["frames"] in (2, 4) and 0 < record["share_of_full_pass"] <= 2
    path = root / "test" / "darker" / "0.mp4"
    (several,) = done("infer", path, "--model", folder, "--quiet", "--clips", 2, "--stride", 1)
    assert several["frames"] == 8 and several["tokens"] == 128
    (crops,) = done("infer", path, "--model", folder, "--quiet", "--clips", "2x3", "--grids", "4x4")
    assert crops["frames"] == 24
    table = tmp_path / "a.csv"
    done("infer", path, "--model", folder, "--quiet", "--output", table, "--frames", 2)
    (row,) = csv.DictReader(table.open())
    assert (row["frames"], row["rows"], row["tokens"]) == ("2", "4", "32")
    for name in ("a.parquet", "a.npz"):
        done("infer", path, "--model", folder, "--quiet", "--output", tmp_path / name)
    assert np.load(tmp_path / "a.npz")["frames"].tolist() == [4]
    done("infer", path, "--model", folder, "--quiet", "--gallery", tmp_path / "a.html")


def test_a_folder_of_everything(trained, tmp_path):
    """Right answers or one sentence each, and memory that does not grow with the hour."""
    _, folder = trained
    clips = tmp_path / "everything"
    clips.mkdir()
    for suffix in (".mp4", ".webm", ".avi", ".gif", ".mkv"):
        write_video(clips / f"darker{suffix}", ramp("darker", 3))
    data = (clips / "darker.mp4").read_bytes()
    (clips / "cut.mp4").write_bytes(data[: len(data) // 2])
    with av.open(str(clips / "sound.mp4"), "w") as file:
        small_videos.write_sound(file)
    (clips / "text.mp4").write_text("no video\n" * 20)
    write_video(clips / "two.mp4", ramp("darker", 4, frames=2))
    write_video(clips / "portrait.mp4", [frame[:32] for frame in ramp("darker", 5, size=64)], rotation=-90)
    hour = (np.full((16, 16, 3), 40 + i % 7 * 20, np.uint8) for i in range(3600))
    write_video(clips / "hour.mp4", hour, rate=1, gop=30)
    Image.fromarray(ramp("darker", 6)[0]).save(clips / "picture.png")
    (clips / "notes.md").write_text("not a video")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, records, said = run("infer", clips, "--model", folder, "--workers", 2)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert status == 1 and grown < 200_000  # kilobytes
    found = {record["path"].rsplit("/", 1)[1]: record for record in records}
    assert re.search(r"^12 videos in .*: [\d.,]+ videos/s", said, re.M)
    assert "3 of 12 videos could not be answered" in said
    assert len(found) == 12 and "1 file was not taken as videos or images (1 .md)" in said
    errors = {name: record["error"] for name, record in found.items() if "error" in record}
    assert errors == {
        "cut.mp4": "it is an MP4 without its index: it was cut off, or never finished",
        "sound.mp4": "it has no video, only sound",
        "text.mp4": "it is not a video, or of a format that is not supported",
    }
    assert all(record["frames"] == 4 for name, record in found.items() if name not in errors)
    assert (found["portrait.mp4"]["width"], found["portrait.mp4"]["height"]) == (32, 64)
    for name in (*(f"darker{suffix}" for suffix in (".mp4", ".webm", ".avi", ".gif", ".mkv")), "portrait.mp4"):
        assert found[name]["classes"][0]["label"] == "darker"


@pytest.mark.parametrize(
    "options, why",
    [
        (["--frames", "0"], "must be a whole number"),
        (["--stride", "-1"], "must be a number of frames above 0"),
        (["--clips", "2x2"], "1 or 3 crops"),
        (["--clips", "2x3"], "three crops need a list of --grids"),
        (["--compare"], "--compare is for models of images"),
        (["--method", "patch"], "--method patch is for models of images"),
        (["--quantize", "int8"], "--quantize int8"),
    ],
)
def test_refuses(trained, options, why):
    root, folder = trained
    try:
        status, _, said = run("infer", root / "test" / "darker", "--model", folder, "--quiet", *options)
    except SystemExit as error:
        assert error.code == 2
        return
    assert status == 2 and why in said


def test_run_length_tokens(trained, tmp_path):
    """A clip in which nothing moves keeps a token a place; the records, the closing line and the report say so."""
    root, folder = trained
    model = create_model("videomae_small_patch16_224", num_classes=2, tubelet_size=1, **_small()).eval()
    save_checkpoint(model.make_resizable([(4, 4, 4), (2, 2, 2)]), tmp_path / "a.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    write_video(tmp_path / "noise.avi", list(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)))
    command = ["infer", tmp_path / "still.png", tmp_path / "noise.avi", "--model", tmp_path / "a.safetensors"]
    for more, views in ((["--run-length", 0.05], 1), (["--run-length", 0.05, "--clips", 2, "--features"], 2)):
        status, (still, noise), said = run(*command, *more)
        assert status == 0 and (still["tokens"], noise["tokens"]) == (16 * views, 64 * views)
        assert (still["grid"], still["frames"]) == ([4, 4], 4 * views) and "with 62% of the tokens" in said
        assert "no policy" not in said
    (all_tokens,) = done(*command[:2], *command[3:], "--quiet", "--run-length", -1)
    assert all_tokens == done(*command[:2], *command[3:], "--quiet")[0] and all_tokens["tokens"] == 64
    for name, why in ((folder, "attends within frames"), (None, "--run-length is of videos")):
        status, _, said = run(
            "infer", tmp_path / "still.png", "--run-length", 0.1, *(["--model", name] if name else [])
        )
        assert status == 2 and why in said
    status, _, said = run(*command, "--run-length", 0.1, "--policy", "fixed")
    assert status == 2 and "--run-length is a policy by itself" in said
    options = ["--run-length=-1,9", "--policies", "oracle", "--rounds", 1, "--quiet", "--device", "cpu"]
    done("evaluate", tmp_path / "a.safetensors", "--data", root, *options, "--output", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {one["policy"]: one for one in report["policies"]}
    assert found["run-length -1"]["tokens"] == 64 and found["run-length 9"]["tokens"] == 16
    assert found["run-length -1"]["accuracy"] == report["static"][0]["accuracy"]
    assert found["run-length 9"]["macs"] < 0.3 * found["run-length -1"]["macs"] == 0.3 * report["macs"][0]


def _small() -> dict:
    return {"num_frames": 4} | {key: int(n) for key, n in (pair.split("=") for pair in SMALL.split(","))}


def test_info(trained, capsys):
    _, folder = trained
    assert main(["info", str(folder), "--device", "cpu", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert "clips of 4 frames of 16 x 16 pixels, patches of 1 x 4 x 4" in text
    assert "4x4x4 = 64 patches at most, and 1 prefix token a frame" in text and "4x2x2 (" in text
    assert main(["info", "videomae_small_patch16_224", "--device", "cpu"]) == 0
    assert "8x14x14 = 1568 patches" in capsys.readouterr().out


def test_images_refuse_frames(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    status, _, said = run("infer", tmp_path / "a.png", "--frames", 4)
    assert status == 2 and "--frames is of videos" in said
    arguments = ["train", "vit_tiny_patch16_224", "--menu", "4x14x14", "--data", "digits", "--output", tmp_path / "run"]
    status, _, said = run(*arguments)
    assert status == 2 and "a menu of grids (rows, columns)" in said


@pytest.mark.parametrize(
    "options, menu, frames",
    [({}, [(4, 2, 2)], 8), ({"tubelet_size": 4}, [(4, 2, 2)], 16), ({"num_frames": 6}, None, 6), ({}, None, 16)],
)
def test_a_model_of_tubelets_is_shown_all_its_frames(tmp_path, options, menu, frames):
    for name in ("brighter", "darker"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "0.mp4", ramp(name, 0, frames=16))
    asked = argparse.Namespace(data=str(tmp_path), split="all", root=None, frames=None, stride=None, model_args=options)
    pixels = open_data(asked, "videomae_small_patch16_224", menu).pixels(0)
    assert len(pixels) == frames and len(np.unique(pixels.mean((1, 2, 3)))) == frames


def test_inflated_is_the_image_model():
    """Of equal frames, a TimeSformer begun from image weights gives what the image model gives of one."""
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    image_model = create_model("vit_tiny_patch16_224", **small, init_values=0.3).eval()
    model = create_model("timesformer_tiny_patch16_224", **small, num_frames=3).eval()
    model.load_state_dict(inflated(image_model.state_dict(), model, "file"))
    image = torch.randn(2, 3, 32, 32)
    clips = image[:, :, None].expand(-1, -1, 3, -1, -1)
    with torch.inference_mode():
        assert_near("equal frames", model(clips), image_model(image))
