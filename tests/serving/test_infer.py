"""`revit infer` as its user sees it: records, exit status, what is left on disk. A stand-in answers for the model."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import broken_files, noise

from revit_kernels import cli, dispatch
from revit_kernels.data.images import Decoded, decode
from revit_kernels.serving import loading
from revit_kernels.serving import prepare as preparing
from revit_kernels.serving.infer import GridRule, Totals, bottleneck, measured
from revit_kernels.serving.records import WRITERS, Answer, Columns, check_output


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"a.jpg": (640, 480), "b.png": (100, 100), "c.webp": (333, 500)}.items():
        noise(size).save(folder / name)
    return folder


def revit(*arguments):
    return cli.main(["infer", "--model", "stand_in", *map(str, arguments)])


def close(ours, expected):
    """Alike but for a few roundings of fp32."""
    expected = np.asarray(expected)
    assert np.abs(np.asarray(ours) - expected).max() <= 4 * np.finfo(np.float32).eps * np.abs(expected).max()


def lines(capsys):
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_records_on_standard_output(model, photos, capsys):
    assert revit(photos, "--top", 2) == 0
    records, err = lines(capsys)
    assert [Path(r["path"]).name for r in records] == ["a.jpg", "b.png", "c.webp"]
    assert [(r["width"], r["height"], tuple(r["grid"]), r["tokens"]) for r in records] == [
        (640, 480, (12, 16), 192),
        (100, 100, (6, 6), 36),
        (333, 500, (17, 11), 187),
    ]
    for record in records:
        colour = torch.from_numpy(decode(record["path"], GridRule((16, 16), 196).pixels).pixels).float().mean((0, 1))
        expected = torch.softmax(colour / 255, 0)
        assert [c["class"] for c in record["classes"]] == expected.argsort(descending=True).tolist()[:2]
        close(record["classes"][0]["probability"], expected.max())
    assert err.startswith("3 images in ") and "with 71% of the tokens of full length" in err


def test_a_folder_of_everything(model, tmp_path, capsys):
    folder = tmp_path / "all"
    folder.mkdir()
    broken_files(folder)
    (folder / "folder.jpg").rmdir()
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    noise((12000, 24)).resize((12000, 20)).save(folder / "panorama.png")
    noise((64, 48)).convert("CMYK").save(folder / "cmyk.jpg")
    assert revit(folder, folder / "gone.jpg", folder / "one.png") == 1
    records, err = lines(capsys)
    answers = {Path(r["path"]).name: r.get("grid") or r["error"] for r in records}
    assert len(records) == len(list(folder.iterdir())) + 2
    assert answers["one.png"] == [1, 1] and answers["panorama.png"] == [1, 196] and answers["cmyk.jpg"] == [3, 4]
    assert answers["gone.jpg"] == "there is no such file" and answers["empty.jpg"] == "the file is empty"
    assert sum("error" in r for r in records) == 7
    assert "revit: 7 of 11 images could not be answered" in err and "Traceback" not in err


def test_only_broken_images(model, tmp_path, capsys):
    broken_files(tmp_path)
    assert revit(tmp_path / "text.jpg", tmp_path / "empty.jpg") == 1
    records, _ = lines(capsys)
    assert len(records) == 2 and model.calls == []


def test_an_image_bomb_is_an_error_record(model, photos, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    assert revit(photos) == 1
    records, err = lines(capsys)
    assert "more than the limit of 200,000" in records[0]["error"] and "tokens" in records[1]
    assert "Warning" not in err


def test_batches_keep_to_the_budget(model, photos, capsys):
    assert revit(photos, photos, "--batch-tokens", 240) == 0
    records, _ = lines(capsys)
    assert model.calls == [[(12, 16), (6, 6)], [(17, 11)], [(12, 16), (6, 6)], [(17, 11)]]
    assert [r["path"] for r in records[:3]] == [r["path"] for r in records[3:]]


def test_listed_grids(model, photos, capsys):
    assert revit(photos, "--grids", "14x14,7x7", "--quiet") == 0
    records, err = lines(capsys)
    assert [r["tokens"] for r in records] == [196, 49, 196] and err == ""
    assert revit(photos, "--max-tokens", 50) == 0
    assert [r["grid"] for r in lines(capsys)[0]] == [[6, 8], [6, 6], [8, 6]]


def test_features(model, photos, capsys):
    assert revit(photos, "--features") == 0
    records, _ = lines(capsys)
    assert all(len(r["features"]) == 3 and "classes" not in r for r in records)


def test_labels(model, photos, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("röt\ngrün\nblau\n")
    (tmp_path / "names.json").write_text('{"0": "röt", "1": "grün", "2": "blau"}')
    for file in ("names.txt", "names.json"):
        assert revit(photos, "--labels", tmp_path / file) == 0
        best = lines(capsys)[0][0]["classes"]
        assert {(c["class"], c["label"]) for c in best} == {(0, "röt"), (1, "grün"), (2, "blau")}


# ---------------------------------------------------------------------- the bottleneck


def slowed(function, seconds):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def rates(err):
    """The closing line's two rates: what could be decoded, what the model could take."""
    one = r"Decoding was the bottleneck: ([\d,.]+) images/s could be decoded, the model could take ([\d,.]+)\.$"
    other = r"The model was the bottleneck: it could take ([\d,.]+) images/s, ([\d,.]+) could be decoded\.$"
    line = err.splitlines()[1]
    found = re.search(one, line) or re.search(other, line)
    numbers = [float(number.replace(",", "")) for number in found.groups()]
    return numbers if "Decoding was" in line else numbers[::-1]


def test_slow_decoding_is_the_bottleneck(model, photos, capsys, monkeypatch):
    monkeypatch.setattr(loading, "decode", slowed(loading.decode, 0.05))
    assert revit(*[photos] * 10, "--workers", 2, "--batch-tokens", 600) == 0
    err = lines(capsys)[1]
    decoded, answered = rates(err)
    assert "Decoding was the bottleneck" in err and decoded <= 2 / 0.05 < answered


def test_a_slow_model_is_the_bottleneck(model, photos, capsys):
    model.forward = slowed(model.forward, 0.2)
    assert revit(*[photos] * 6, "--workers", 2, "--batch-tokens", 600) == 0
    err = lines(capsys)[1]
    decoded, answered = rates(err)
    assert "The model was the bottleneck" in err and answered <= 3 / 0.2 < decoded


def test_one_batch_is_enough_to_tell(model, photos, capsys):
    model.forward = slowed(model.forward, 1.0)
    assert revit(photos) == 0
    err = lines(capsys)[1]
    assert "The model was the bottleneck: it could take " in err and rates(err)[1] <= 3


def test_nothing_answered_is_no_bottleneck(model, tmp_path, capsys):
    broken_files(tmp_path)
    assert revit(tmp_path / "text.jpg") == 1
    assert "bottleneck" not in lines(capsys)[1]
    assert bottleneck(Totals(decoded=100.0)) is None is bottleneck(Totals(answered=100.0))


def test_the_decoders_rarely_stand_still():
    assert [number for number in range(1, 1000) if measured(number)] == [1, 4, 16, 64, 256]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("features", [False, True])
def test_every_format_says_the_same(model, photos, tmp_path, capsys, features):
    (photos / "bröken.jpg").write_bytes(b"")
    flags = ["--features"] if features else ["--top", 2]
    for suffix in ("jsonl", "csv", "parquet", "npz"):
        assert revit(photos, "--quiet", *flags, "-o", tmp_path / f"out.{suffix}") == 1
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 4 and capsys.readouterr().out == ""
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    arrays = np.load(tmp_path / "out.npz")
    for i, record in enumerate(records):
        assert rows[i]["path"] == table[i]["path"] == arrays["paths"][i] == record["path"]
        if "error" in record:
            assert rows[i]["error"] == table[i]["error"] == arrays["errors"][i] == record["error"]
            assert rows[i]["tokens"] == "" and table[i]["tokens"] is None and arrays["tokens"][i] == 0
            assert np.isnan(arrays["features" if features else "probabilities"][i]).all()
            continue
        assert arrays["sizes"][i].tolist() == [record["height"], record["width"]]
        assert arrays["grids"][i].tolist() == [table[i]["rows"], table[i]["columns"]] == record["grid"]
        assert int(rows[i]["tokens"]) == table[i]["tokens"] == arrays["tokens"][i] == record["tokens"]
        if features:
            expected = np.float32(record["features"])
            assert np.float32(table[i]["features"]).tolist() == arrays["features"][i].tolist() == expected.tolist()
            assert [float(rows[i][f"feature_{j}"]) for j in range(3)] == record["features"]
        else:
            classes = [c["class"] for c in record["classes"]]
            assert table[i]["classes"] == [int(rows[i][f"class_{k}"]) for k in (1, 2)] == classes
            assert [float(rows[i][f"probability_{k}"]) for k in (1, 2)] == [c["probability"] for c in record["classes"]]
            assert np.argsort(-arrays["probabilities"][i], kind="stable")[:2].tolist() == classes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.jsonl", "out.npz", "out.parquet", "photos"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "npz"])
@pytest.mark.parametrize("error, status", [(RuntimeError("the GPU is on fire"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_dies_leaves_its_records_to_go_on_from(model, photos, tmp_path, capsys, suffix, error, status):
    (tmp_path / f"out.{suffix}").write_text("of before")
    answered, output = model.forward, ["--batch-tokens", 1, "-o", tmp_path / f"out.{suffix}"]

    def dies(images, **kwargs):
        if len(model.calls) == 2:
            raise error
        return answered(images, **kwargs)

    model.forward = dies
    assert revit(photos, *output) == status
    assert (tmp_path / f"out.{suffix}").read_text() == "of before"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"out.{suffix}", f"out.{suffix}.partial", "photos"]
    err = capsys.readouterr().err
    assert err.startswith("revit: records kept: 2; the same command with --resume goes on\n")
    assert err.count("\n") == 2
    assert revit(photos, *output) == 2
    assert "holds the records of an unfinished run: go on with --resume" in capsys.readouterr().err
    model.forward = answered
    before = len(model.calls)
    assert revit(photos, *output, "--resume") == 0 and len(model.calls) == before + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"out.{suffix}", "photos"]
    resumed = (tmp_path / f"out.{suffix}").read_bytes()
    assert revit(photos, *output) == 0 and (tmp_path / f"out.{suffix}").read_bytes() == resumed


def test_an_interrupt_from_outside(photos, tmp_path):
    """A real process, a real signal, while images are being answered."""
    script = """if True:
        import signal, sys, time
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup, or in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from stand_in import StandIn
        from revit_kernels import cli
        from revit_kernels.serving import prepare as preparing
        from revit_kernels.serving import loading
        model = StandIn()
        def slow(images, **kwargs):
            print("answering", flush=True)
            time.sleep(60)
        model.forward = slow
        preparing.load_model = lambda *args, **kwargs: model
        sys.exit(cli.main(sys.argv[1:]))
    """
    arguments = ["infer", str(photos), "--model", "m", "-o", str(tmp_path / "out.csv")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)):
        with subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        ) as process:
            assert process.stdout.readline() == "answering\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        assert process.returncode == status and "Traceback" not in err
        assert [p.name for p in tmp_path.iterdir()] == ["photos"]


# ---------------------------------------------------------------------- grids


def test_crop_takes_the_centre_of_the_grids_aspect():
    pixels = np.arange(40 * 100, dtype=np.uint8).reshape(40, 100, 1).repeat(3, 2)
    rule = GridRule((16, 16), 0, ((2, 2),))
    np.testing.assert_array_equal(rule.cut(Decoded(pixels, (40, 100))), pixels[:, 30:70])
    assert rule.pixels((40, 100)) == (32, 80)
    rule = GridRule((16, 16), 0, ((4, 1),))
    np.testing.assert_array_equal(rule.cut(Decoded(pixels, (400, 1000))), pixels[:, 45:55])  # decoded at a tenth
    squash = GridRule((16, 16), 0, ((2, 2),), crop=False)
    assert squash.cut(Decoded(pixels, (40, 100))) is pixels and squash.pixels((40, 100)) == (32, 32)
    thin = GridRule((16, 16), 0, ((14, 14),))
    assert thin.cut(Decoded(pixels[:1, :, :], (1, 100))).shape == (1, 1, 3)


# ---------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{empty}"], "there are no images in .*empty"),
        (["{photos}/*.tiff"], r"there is no file .*\*\.tiff, and none that matches"),
        (["@{photos}/none.txt"], "the list .* cannot be read"),
        (
            ["{photos}", "-o", "out.txt"],
            r"--output must end in .jsonl, .csv, .parquet, .npz, or in / for a folder",
        ),
        (["{photos}", "-o", "{photos}/no/out.csv"], "the folder of --output .* does not exist"),
        (["{photos}", "--grids", "14"], r"--grids: must be auto, or ROWSxCOLUMNS,\.\.\. such as 14x14,10x10, got '14'"),
        (["{photos}", "--grids", "0x2"], "must be auto"),
        (["{photos}", "--grids", "7x7", "--max-tokens", "9"], "--max-tokens goes with --grids auto"),
        (["{photos}", "--fit", "crop"], "--fit goes with a list of --grids"),
        (["{photos}", "--batch-tokens", "0"], "must be a whole number, at least 1, got '0'"),
        (["{photos}", "--method", "patch", "--compare"], "leave out --method patch"),
        (["{photos}", "--method", "patch", "--grids", "7x7", "--fit", "squash"], "with --method patch it keeps"),
        (["{photos}", "--features", "--labels", "x"], "with --features there are none"),
        (["{photos}", "--labels", "{photos}/none"], "--labels .* cannot be read: No such file"),
        (["{photos}", "--labels", "{two}"], "has 2 names, the model 3 classes"),
        (["{photos}", "--backend", "abacus"], "--backend must be one of cuda, .*, got 'abacus'"),
        (["{photos}", "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        (["{photos}", "--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["{photos}", "--device", "mps"], "--device must be cpu, cuda or cuda:N, got 'mps'"),
        (["{photos}", "--device", "cuda:99"], "--device cuda:99: "),
        (["{photos}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{photos}", "--mdel", "x"], "unrecognized arguments: --mdel x"),
    ],
)
def test_misuse_is_one_sentence_and_exit_2(model, photos, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").write_text("a\nb\n")
    places = {"photos": photos, "empty": tmp_path / "empty", "two": tmp_path / "two"}
    try:
        status = revit(*(a.format(**places) for a in arguments))
    except SystemExit as exit:  # argparse's way
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert re.search(message, captured.err) and "error:" in captured.err
    assert dispatch.requested_backend() == os.environ.get("REVIT_BACKEND")


def test_an_empty_folder_among_others_is_a_warning(model, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert revit(tmp_path / "empty", photos) == 0
    assert "warning: there are no images in" in lines(capsys)[1]


def test_what_cannot_be_found_among_others_is_told(model, photos, capsys, monkeypatch):
    assert revit(photos, "IMG[1].jpg") == 1
    records, err = lines(capsys)
    assert len(records) == 3 and "revit: there is no file IMG[1].jpg, and none that matches" in err
    (photos / "list.txt").write_text(f"{photos}/a.jpg\n{photos}/IMG[1].jpg\n")
    assert revit(photos / "list.txt") == 1
    records, _ = lines(capsys)
    assert len(records) == 2 and records[1]["error"] == "there is no such file"
    (photos / "locked").mkdir()
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert revit(photos, "-q") == 1
    records, err = lines(capsys)
    assert len(records) == 3 and "locked cannot be read: Permission denied" in err


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_one_sentence(model, photos, capsys, error):
    def dies(*args, **kwargs):
        raise error

    model.forward = dies
    assert revit(photos, "--batch-tokens", 300, "-q") == 1
    assert "ran out of memory: give fewer --batch-tokens than 300" in lines(capsys)[1]


def no_model_is_called(model):
    """A loader of the model, whose answers are all on the disk already."""

    def refuse(*args, **kwargs):
        raise AssertionError("an image is answered again")

    def load(*args, **kwargs):
        model.forward = refuse
        return model

    return load


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "npz"])
def test_a_full_disk_is_no_wrong_command(model, photos, tmp_path, capsys, monkeypatch, suffix):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WRITERS[f".{suffix}"], "write", full)
    assert revit(photos, "-q", "-o", tmp_path / f"out.{suffix}") == 1
    err = lines(capsys)[1]
    assert f"out.{suffix} could not be written: No space left on device" in err and err.count("\n") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"out.{suffix}.partial", "photos"]
    monkeypatch.undo()
    monkeypatch.setattr(preparing, "load_model", no_model_is_called(model))
    assert revit(photos, "-q", "-o", tmp_path / f"out.{suffix}", "--resume") == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_standard_output_on_a_full_disk(photos):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stand_in", "infer", "--model", "m", "-q", str(photos)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
    assert done.returncode == 1
    assert done.stderr == "revit: error: standard output could not be written: No space left on device\n"


def test_a_model_without_classes(model, photos, capsys):
    model.num_classes = 0
    assert revit(photos) == 2
    assert "has no classes: ask for --features" in capsys.readouterr().err


def test_parquet_without_pyarrow(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        check_output(str(tmp_path / "out.parquet"))


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("revit_kernels 0")
    assert cli.main([]) == 2
    with pytest.raises(SystemExit, match="0"):
        cli.main(["infer", "--help"])
    assert "revit infer photos/ --model" in capsys.readouterr().out


def test_the_reader_of_a_pipe_may_leave(photos):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    many = [str(photos)] * 300
    with subprocess.Popen(
        [sys.executable, "-m", "stand_in", "infer", "--model", "m", "-q", "--batch-tokens", "1", *many],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 141


def test_top_of_equal_probabilities_is_the_first():
    answer = Answer("a", (1, 1), (1, 1), probabilities=np.float32([0.25] * 4))
    assert [row["class"] for row in Columns(classes=4, top=2).best(answer)] == [0, 1]


# ---------------------------------------------------------------------- a real model


@pytest.fixture
def weights(tmp_path):
    """A tiny VarLenViT as a file that says what model it is."""
    from revit_kernels.models.checkpoints import save_checkpoint
    from revit_kernels.models.registry import create_model

    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", depth=2, embed_dim=64, num_heads=2, num_classes=7, img_size=112)
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint(model, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_real_model_answers_alike_in_any_company(weights, photos, tmp_path, capsys):
    arguments = ["infer", str(photos), "--model", str(weights), "--dtype", "float32", "--device", "cpu", "-q"]
    assert cli.main([*arguments, "-o", str(tmp_path / "packed.npz")]) == 0
    assert cli.main([*arguments, "-o", str(tmp_path / "alone.npz"), "--batch-tokens", "1"]) == 0
    packed, alone = (np.load(tmp_path / f"{name}.npz") for name in ("packed", "alone"))
    assert packed["grids"].tolist() == [[6, 8], [6, 6], [8, 6]]
    np.testing.assert_array_equal(packed["probabilities"], alone["probabilities"])
    close(packed["probabilities"].sum(1), np.ones(3))
    assert cli.main([*arguments, "--features", "-o", str(tmp_path / "features.npz")]) == 0
    assert np.load(tmp_path / "features.npz")["features"].shape == (3, 64)


@pytest.mark.parametrize("grids", [["--grids", "7x7,5x5,3x3"], []])
def test_compare(weights, photos, tmp_path, capsys, grids):
    arguments = ["infer", str(photos), "--model", str(weights), "--device", "cpu", "--compare", *grids]
    assert cli.main([*arguments, "-o", str(tmp_path / "out.csv")]) == 0
    table = capsys.readouterr().err.splitlines()[2:]
    assert table[0].startswith("3 decoded images to logits; padded and dense batches run by ")
    rows = {line[:27].strip(): line[27:].split() for line in table[2:]}
    assert rows.keys() == {"packed", "padded", "one dense batch per length"}
    tokens = {name: int(row[1].replace(",", "")) for name, row in rows.items()}
    lengths = [49, 49, 49] if grids else [48, 36, 48]
    assert tokens["packed"] == tokens["one dense batch per length"] == sum(lengths) + 3
    assert tokens["padded"] == 3 * max(lengths) + 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "vit_tiny_patch16_224"], "--model vit_tiny_patch16_224 needs weights: --checkpoint FILE"),
        (["--model", "vit_tiny_patch16"], "there is no model named 'vit_tiny_patch16'; the nearest are"),
        (["--model", "gone.safetensors"], "there is no checkpoint at gone.safetensors"),
        (["--model", "weights.pth"], "weights.pth does not say what model it is for: use --model NAME --checkpoint w"),
        (["--model", "vit_tiny_patch16_224", "--pretrained", "--untrained"], "the weights come from one place"),
        (["--model", "vit_base_patch16_224", "--checkpoint", "{weights}"], "does not fit the model"),
    ],
)
def test_weights_that_cannot_be_had(weights, photos, capsys, arguments, message):
    assert cli.main(["infer", str(photos), *(a.format(weights=weights) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_file_that_does_not_say_its_model(photos, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    assert cli.main(["infer", str(photos), "--model", str(tmp_path / "bare.safetensors")]) == 2
    assert "use --model NAME --checkpoint " in capsys.readouterr().err


def test_a_model_of_other_channels(photos, tmp_path, capsys):
    from revit_kernels.models.checkpoints import save_checkpoint
    from revit_kernels.models.registry import create_model

    save_checkpoint(create_model("vit_tiny_patch16_224", depth=1, in_chans=1), tmp_path / "grey.safetensors")
    assert cli.main(["infer", str(photos), "--model", str(tmp_path / "grey.safetensors")]) == 2
    err = capsys.readouterr().err
    assert "takes images of 1 channels; images are decoded to RGB" in err and err.count("\n") == 1


def test_the_patch_kernel_may_be_resized_instead(weights, tmp_path, capsys):
    from revit_kernels.models.registry import create_model

    folder = tmp_path / "tiles"
    folder.mkdir()
    for name, size in {"a.jpg": (224, 224), "b.png": (231, 230), "c.jpg": (112, 112)}.items():
        noise(size).save(folder / name)
    arguments = ["infer", str(folder), "--model", str(weights), "--dtype", "float32", "--device", "cpu", "-q"]
    assert cli.main([*arguments, "--grids", "7x7", "--method", "patch", "-o", str(tmp_path / "out.npz")]) == 1
    answers = np.load(tmp_path / "out.npz")
    message = "its 230 x 230 pixels are no whole multiple of the grid 7x7, as --method patch needs"
    assert answers["errors"].tolist() == ["", message, ""]
    model = create_model(str(weights)).eval()
    model.patch_method = "patch"
    for i, name in ((0, "a.jpg"), (2, "c.jpg")):
        pixels = torch.from_numpy(decode(str(folder / name)).pixels)
        with torch.inference_mode():
            expected = model([pixels], grids=[(7, 7)], channels_last=True)[0].softmax(-1)
        close(answers["probabilities"][i], expected)
