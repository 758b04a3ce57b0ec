"""Gathering photographs and weights, without the network: what is read out of packages, what is said of failure."""

import json
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_packages import debian_package, fashion_files

from revit_kernels import cli
from revit_kernels.data import samples, sets
from revit_kernels.data.datasets import open_set
from revit_kernels.data.onnx_weights import read_onnx


def layers():
    """Names and shapes of a ViT-S/14's tensors, as the ONNX file has them."""
    draw = np.random.default_rng(0)
    wide, tall = (384, 1536), (1536, 384)
    vectors = {"norm1.weight": 384, "norm1.bias": 384, "norm2.weight": 384, "norm2.bias": 384}
    vectors |= {f"attention.attention.{name}.bias": 384 for name in ("query", "key", "value")}
    vectors |= {"attention.output.dense.bias": 384, "mlp.fc1.bias": 1536, "mlp.fc2.bias": 384}
    vectors |= {"layer_scale1.lambda1": 384, "layer_scale2.lambda1": 384}
    matrices = {f"attention/attention/{name}": (384, 384) for name in ("query", "key", "value")}
    matrices |= {"attention/output/dense": (384, 384), "mlp/fc1": wide, "mlp/fc2": tall}
    shapes = {
        "backbone.embeddings.cls_token": (1, 1, 384),
        "backbone.embeddings.patch_embeddings.projection.weight": (384, 3, 14, 14),
        "backbone.embeddings.patch_embeddings.projection.bias": (384,),
        "backbone.layernorm.weight": (384,),
        "backbone.layernorm.bias": (384,),
        "onnx::Concat_1": (1, 1, 384),
        "onnx::Reshape_2": (1, 1369, 384),
    }
    shapes |= {f"backbone.encoder.layer.{i}.{name}": (n,) for i in range(12) for name, n in vectors.items()}
    initialisers = {name: draw.random(shape, np.float32) for name, shape in shapes.items()}
    nodes = {
        f"/backbone/encoder/layer.{i}/{name}/MatMul": np.full(shape, i, np.float32)
        for i in range(12)
        for name, shape in matrices.items()
    }
    return initialisers, nodes


def test_weights_get_timms_names_and_shapes():
    initialisers, matrices = layers()
    state = samples.timm_state(initialisers, matrices)
    assert len(state) == 6 + 12 * 14
    assert state["pos_embed"].shape == (1, 1370, 384) and state["blocks.11.attn.qkv.weight"].shape == (1152, 384)
    assert state["blocks.3.mlp.fc1.weight"].shape == (1536, 384) and (state["blocks.3.mlp.fc1.weight"] == 3).all()
    query = initialisers["backbone.encoder.layer.5.attention.attention.query.bias"]
    np.testing.assert_array_equal(state["blocks.5.attn.qkv.bias"][:384], query)


def test_onnx_reader_agrees_with_onnx():
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    arrays = {"w": draw.random((3, 4), np.float32), "b": draw.random(300, np.float32), "scalar": np.float32(2)}
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    tensors.append(numpy_helper.from_array(np.arange(5), "integers"))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="/m"), helper.make_node("Add", ["y", "b"], ["z"])]
    nodes.append(helper.make_node("MatMul", ["z", "z"], ["out"], name="/of_no_weight"))
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, None)] for name in ("x", "out")]
    model = helper.make_model(helper.make_graph(nodes, "graph", *ends, tensors))
    initialisers, matrices = read_onnx(onnx.ModelProto.SerializeToString(model))
    assert initialisers.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(initialisers[name], array)
    assert matrices.keys() == {"/m"}
    np.testing.assert_array_equal(matrices["/m"], arrays["w"])


def fake_pip(folder, monkeypatch, members):
    """A pip that puts a wheel of these members where it was told to."""

    def run(command, **kwargs):
        package, version = command[-1].split("==")
        target = next(a.removeprefix("--dest=") for a in command if a.startswith("--dest="))
        with zipfile.ZipFile(f"{target}/{package.replace('-', '_')}-{version}-any.whl", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)


def test_a_wheel_of_another_checksum_is_refused(tmp_path, monkeypatch, capsys):
    fake_pip(tmp_path, monkeypatch, {"skimage/data/a.png": b"?"})
    assert cli.main(["samples", str(tmp_path / "out"), "--no-fashion"]) == 2
    assert "has the checksum" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.*"))


def test_pip_that_fails_is_quoted(tmp_path, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: a\nERROR: No matching distribution found for x\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert cli.main(["samples", str(tmp_path), "--no-fashion"]) == 2
    assert "scikit-image==0.26.0 could not be downloaded: No matching distribution" in capsys.readouterr().err


def test_gather(tmp_path, monkeypatch, capsys):
    members = {"skimage/data/a.png": b"1", "skimage/data/a.txt": b"2", "sklearn/datasets/images/b.jpg": b"3"}
    fake_pip(tmp_path, monkeypatch, members)
    real = samples.hashlib.sha256
    wanted = {w.sha256: w for w in (*samples.PHOTOGRAPHS, samples.WEIGHTS)}
    answers = iter(wanted)
    monkeypatch.setattr(samples.hashlib, "sha256", lambda data: SimpleNamespace(hexdigest=lambda: next(answers)))
    monkeypatch.setattr(samples, "WEIGHTS_MEMBER", "skimage/data/a.txt")
    monkeypatch.setattr(samples, "read_onnx", lambda data: layers())
    assert cli.main(["samples", str(tmp_path / "out"), "--no-fashion"]) == 0
    monkeypatch.setattr(samples.hashlib, "sha256", real)
    photographs = sorted(p.name for p in (tmp_path / "out" / "photographs").iterdir())
    assert photographs == ["a.png", "b.jpg"] and "2 images in" in capsys.readouterr().out
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "vit_small_patch14_dinov2.safetensors", "np") as file:
        assert json.loads(file.metadata()["revit_kernels"])["name"] == "vit_small_patch14_dinov2"
        assert "blocks.0.ls1.gamma" in file.keys()


@pytest.fixture
def only_fashion(tmp_path, monkeypatch):
    """No other samples, and a Fashion-MNIST of 20 test images; returns its files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REVIT_DATA", raising=False)
    monkeypatch.setattr(sets, "IDX_FOLDERS", ("",))
    monkeypatch.setattr(samples, "gather_photographs", lambda folder: [])
    return fashion_files(monkeypatch)


@pytest.mark.parametrize("place", ["data", "package"])
def test_fashion(tmp_path, monkeypatch, capsys, only_fashion, place):
    content, whole = only_fashion
    deb = debian_package(content)
    if place == "data":  # where `revit data` put it
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "dataset-fashion-mnist_1.deb").write_bytes(deb)
        monkeypatch.setattr(sets, "fetch", None)
    else:

        def gather(name, root):
            (samples.Path(root) / "dataset-fashion-mnist_1.deb").write_bytes(deb)

        monkeypatch.setattr(sets, "fetch", gather)
    assert cli.main(["samples", "out", "--no-weights"]) == 0
    assert "20 photographs of clothes in out/fashion; now try" in capsys.readouterr().out
    found = open_set("out/fashion", "all").with_classes(sets.FASHION)
    assert len(found) == 20 and found.keys[0] == "ankle-boot/00009.png"
    for key, target in zip(found.keys, found.targets.tolist()):
        number = int(samples.Path(key).stem)
        assert target == number % 10
        with Image.open(tmp_path / "out" / "fashion" / key) as image:
            np.testing.assert_array_equal(np.asarray(image), whole["t10k-images-idx3-ubyte"][number])


def test_without_fashion(monkeypatch, capsys, only_fashion):
    archive = sets.ARCHIVES["fashion-mnist"]._replace(get=("no-such-client",))
    monkeypatch.setitem(sets.ARCHIVES, "fashion-mnist", archive)
    assert cli.main(["samples", "out", "--no-weights"]) == 0
    captured = capsys.readouterr()
    assert "0 images in out/photographs" in captured.out
    assert "no photographs of clothes: fashion-mnist comes through no-such-client, which is not" in captured.err
    assert cli.main(["samples", "out", "--no-weights", "--no-fashion"]) == 0
    assert "clothes" not in capsys.readouterr().err
