"""`revit train`: from its command line to a file that infers, resuming after a kill, and wrong use in one sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_revit import make_images

from revit_kernels import cli, create_model
from revit_kernels.data import datasets
from revit_kernels.models.checkpoints import save_checkpoint

ARGS = "img_size=16,patch_size=4,embed_dim=32,depth=2,num_heads=2"
TRAIN = [
    "vit_tiny_patch16_224",
    "--model-args",
    ARGS,
    "--menu",
    "4x4,2x2",
    "--batch",
    "16",
    "--quiet",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in a folder per class."""
    root, images = tmp_path_factory.mktemp("images"), make_images(96)
    for i in range(len(images)):
        inside = root / images.classes[images.targets[i]].replace(" ", "_")
        inside.mkdir(exist_ok=True)
        Image.fromarray(images.pixels(i)).save(inside / f"{i}.png")
    return root


def train(folder, output, *arguments, quiet=True):
    known = TRAIN if quiet else [argument for argument in TRAIN if argument != "--quiet"]
    return cli.main(["train", *known, "--data", str(folder), "--output", str(output), *map(str, arguments)])


def test_trains_and_infers(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--epochs", 2, "--held-out", 0.2, "--ema", 0.9, "--drop-path", 0.1) == 0
    model = create_model(str(tmp_path / "run" / "model.safetensors"))
    assert model.menu == ((4, 4), (2, 2)) and model.pretrained_cfg["label_names"][0] == "flat"
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert "version" not in settings and settings["epochs"] == 2
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,epoch,lr,images_per_s,loss_4x4,loss_2x2,accuracy_4x4") and len(log) == 3
    image = next(folder.rglob("*.png"))
    assert cli.main(["infer", str(image), "--model", str(tmp_path / "run" / "model.safetensors"), "-q"]) == 0
    # from there on, as a file, or as the folder of the run
    again = ["train", str(tmp_path / "run"), "--data", str(folder), "--epochs", "1", "--quiet"]
    assert cli.main([*again, "--output", str(tmp_path / "more"), "--batch", "16"]) == 0
    assert cli.main([*again, "--output", str(tmp_path / "other"), "--menu", "4x4,3x3"]) == 2
    assert "has the menu 4x4,2x2 already" in capsys.readouterr().err


def test_killed_process_resumes_to_the_same_weights(folder, tmp_path):
    """A real kill -9, whenever it comes."""
    command = [sys.executable, "-m", "revit_kernels.cli", "train", *TRAIN, "--data", str(folder), "--epochs", "12"]
    command += ["--save-every", "0", "--drop-path", "0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, env=env, capture_output=True)
    killed = [*command, "--output", str(tmp_path / "killed"), "--resume"]
    process = subprocess.Popen(killed, env=env, stderr=subprocess.PIPE)
    log, until = tmp_path / "killed" / "log.csv", time.monotonic() + 120
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < until, "it never wrote its log"
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(killed, check=True, env=env, capture_output=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_starts_from_a_checkpoint(folder, tmp_path, capsys):
    kwargs = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    plain = create_model("vit_tiny_patch16_224", **kwargs)
    save_checkpoint(plain, tmp_path / "plain.safetensors")
    arguments = ("--checkpoint", tmp_path / "plain.safetensors", "--epochs", 0.2, "--lr", 1e-9)
    assert train(folder, tmp_path / "run", *arguments) == 0
    trained = create_model(str(tmp_path / "run" / "model.safetensors"))
    assert (trained.blocks[0].attn.qkv.weight - plain.blocks[0].attn.qkv.weight).abs().max() < 1e-6
    file = str(tmp_path / "run" / "model.safetensors")
    assert cli.main(["train", file, "--checkpoint", file, "--data", str(folder), "--output", str(tmp_path / "r")]) == 2
    assert "holds its own weights: leave out pretrained and the checkpoint" in capsys.readouterr().err


def test_wrong_use(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    (tmp_path / "file").write_text("no folder")
    cases = [
        (tmp_path / "empty", [], "no folders of images"),
        (folder, ["--menu", "20x20,4x4", "--size", "16"], "400 patches, more than an image of 16 x 16 pixels"),
        (folder, ["--menu", "2x2,4x4"], "fewer and fewer patches"),
        (folder, ["--checkpoint", tmp_path / "broken.safetensors"], "cannot be read"),
        (folder, ["--batch", "500"], "give a smaller batch"),
        (folder, ["--held-out", "1000"], "can be held out"),
        (folder, ["--fold", "3/2"], "--fold must be I/K"),
        (folder, ["--output", tmp_path / "file"], "is not a folder"),
        (folder, ["--epochs", "0"], "epochs must be above 0"),
        (folder, ["--model-args", "nonsense=3"], "VarLenViT has no argument 'nonsense': it has img_size, patch_size"),
        (folder, ["--model-args", "pretrained=true"], "VarLenViT has no argument 'pretrained'"),
        (folder, ["--model-args", "depth=many"], "depth must be a whole number, got 'many'"),
        (folder, ["--model-args", "qkv_bias=3"], "qkv_bias must be true or false, got '3'"),
    ]
    for data, arguments, said in cases:
        assert train(data, tmp_path / "run", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert said in error and error.startswith("revit: error:") and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists(), f"{said}: a folder was left behind"
    assert cli.main(["train", "vit_tiny_patch16_224", "--data", str(folder), "--output", str(tmp_path / "r")]) == 2
    assert "--menu must name the lengths" in capsys.readouterr().err


def test_full_disk_while_training(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert train(folder, tmp_path / "run", "--epochs", 1) == 1
    assert "state.pt could not be written: No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "run" / "state.pt").exists()


def test_folds_leave_out_each_image_once(folder, tmp_path, monkeypatch):
    from revit_kernels.cli.train import _divide

    images = datasets.open_set(str(folder))
    parts = [_divide(images, 0, f"{i}/3", 0) for i in (1, 2, 3)]
    assert sorted(key for _, held in parts for key in held.keys) == sorted(images.keys)
    assert all(not set(rest.keys) & set(held.keys) for rest, held in parts)


def test_epochs_are_told_and_may_become_more(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--epochs", 1, "--held-out", 0.25, quiet=False) == 0
    first = capsys.readouterr().err
    assert re.search(r"^revit: epoch 1 of 1: 4x4 loss \d\.\d+, right on [\d.]+%; 2x2 loss", first, re.MULTILINE)
    again = ["--epochs", 2, "--held-out", 0.25, "--resume"]
    with pytest.warns(UserWarning, match="goes on to 2 epochs, begun as one of 1"):
        assert train(folder, tmp_path / "run", *again, quiet=False) == 0
    second = capsys.readouterr().err
    assert "epoch 2 of 2" in second and "epoch 1" not in second
    assert train(folder, tmp_path / "run", "--epochs", 1, "--held-out", 0.25, "--resume") == 2
    assert "other settings (epochs)" in capsys.readouterr().err


@pytest.mark.parametrize("has", [True, False])
def test_bf16_on_a_cpu_without_it_is_told(folder, tmp_path, monkeypatch, capsys, has):
    fastest = torch.bfloat16 if has else torch.float32
    monkeypatch.setattr("revit_kernels.cli.train.choose_dtype", lambda name, device: fastest)
    assert train(folder, tmp_path / "run", "--epochs", 0.2, "--bf16", quiet=False) == 0
    assert ("no bfloat16 instructions" in capsys.readouterr().err) is not has


def test_a_training_that_diverges_fails(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--epochs", 2, "--lr", 1e30, "--clip", 0, quiet=False) == 1
    error = capsys.readouterr().err
    assert "the training diverged by step" in error and "done" not in error
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_interrupt_names_resume(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("revit_kernels.training.trainer.Trainer.train_step", interrupt)
    assert train(folder, tmp_path / "run") == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err


def test_labels_of_images_that_were_learnt_from_are_told(folder, tmp_path, capsys):
    pytest.importorskip("pyarrow.parquet")
    assert train(folder, tmp_path / "run", "--epochs", 1, "--held-out", 0.25) == 0
    label = ["label", str(tmp_path / "run"), "--data", str(folder), "-q", "-o", str(tmp_path / "l.parquet")]
    capsys.readouterr()
    assert cli.main(label) == 0
    assert "trained on some of these images; give --held-out 0.25 --seed 0" in capsys.readouterr().err
    assert cli.main([*label, "--held-out", "0.25"]) == 0
    assert capsys.readouterr().err == ""
    assert train(folder, tmp_path / "all", "--epochs", 1) == 0
    assert cli.main(["label", str(tmp_path / "all"), *label[2:]]) == 0
    assert "trained on all of these images" in capsys.readouterr().err
