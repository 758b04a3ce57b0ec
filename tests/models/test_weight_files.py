"""Files of weights: every kind is read as data, and nothing in a file is run."""

import argparse
import collections
import datetime
import decimal
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import CLIP, TINY, assert_same, clip_keys, tiny

from revit_kernels.models.checkpoints import load_checkpoint, read_checkpoint
from revit_kernels.models.registry import create_model


class Config:
    """As omegaconf's and argparse's: an object with a state, which calls a function of ours when it is unpickled."""

    def __init__(self, **values):
        self.__dict__ |= values

    def __setstate__(self, state):
        raise AssertionError("a class of the file was imported")


class Settings(dict):
    """As Lightning's hyperparameters: a dictionary of a class of its own, with attributes."""


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_objects_beside_the_weights_are_not_made(tmp_path, old):
    settings = Settings(lr=0.1)
    settings.frozen = True
    beside = {
        "scalar": np.float64(0.9),
        "array": np.arange(3),
        "path": pathlib.Path("runs"),
        "time": datetime.datetime(2024, 1, 1),
        "args": argparse.Namespace(lr=0.1),
        "config": Config(model={"name": "vit"}, sizes=[1, 2]),
        "hyper_parameters": settings,
        "counts": collections.defaultdict(list, a=[1]),
        "queue": collections.deque([1, 2]),
        "dtype": torch.bfloat16,
        "decimal": decimal.Decimal("0.1"),
        "enum": pytest.ExitCode.OK,
        "set": {1, 2},
    }
    source = tiny()
    torch.save(
        {**beside, "state_dict": source.state_dict()}, tmp_path / "w.pth", _use_new_zipfile_serialization=not old
    )
    assert_same(create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.pth", **TINY), source)
    torch.save({"net": Config(weight=torch.ones(2)), "epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError) as caught:
        read_checkpoint(tmp_path / "none.pth")
    assert "holds no weights but net (an object of test_weight_files.Config), epoch (int)" in str(caught.value)


def test_a_pickled_module_gives_its_weights(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", **TINY)
    torch.save({"model": torch.nn.parallel.DataParallel(theirs)}, tmp_path / "w.pth")
    ours = create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.pth", **TINY)
    assert_same(ours, theirs)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    state = tiny().state_dict()
    torch.save(state | {"norm.weight": state["norm.weight"].to(torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"of integers or another dtype than floats: norm\.weight"):
        load_checkpoint(tiny(), tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_openais_file_is_read_as_data(tmp_path):
    """A TorchScript program, of which the tensors are taken and nothing is run."""
    name, kwargs = CLIP
    source = tiny(name, **kwargs)
    with torch.no_grad():
        source.head.bias.zero_()

    class Whole(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            return x

    whole = Whole()
    for key, x in clip_keys(source).items():
        *path, leaf = key.split(".")
        module = whole
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(x.clone()))
    torch.jit.save(torch.jit.trace(whole, torch.zeros(1)), tmp_path / "ViT-B-32.pt")
    read = read_checkpoint(tmp_path / "ViT-B-32.pt")
    assert read.keys() == whole.state_dict().keys()
    assert_same(create_model(name, checkpoint_path=tmp_path / "ViT-B-32.pt", **TINY | kwargs), source)


@pytest.mark.parametrize("folder", [False, True], ids=["index", "folder"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind, folder):
    source = tiny()
    items = list(source.state_dict().items())
    names = [f"model-{i:05d}-of-00003.{kind}" for i in (1, 2, 3)]
    places = {}
    for i, name in enumerate(names):
        part = dict(items[i::3])
        places |= dict.fromkeys(part, name)
        save_file(part, tmp_path / name) if kind == "safetensors" else torch.save(part, tmp_path / name)
    index = tmp_path / f"{'model' if kind == 'safetensors' else 'pytorch_model'}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    where = tmp_path if folder else index
    assert_same(create_model("vit_tiny_patch16_224", checkpoint_path=where, **TINY), source)

    def refused(message, change):
        index.write_text(json.dumps({"weight_map": places | change}))
        with pytest.raises(ValueError, match=message):
            read_checkpoint(where)

    refused("names '../secret.bin', which is no file of weights beside it", {"x": "../secret.bin"})
    refused("its files lack x", {"x": names[0]})
    refused("there is no checkpoint at .*missing", {"x": f"missing.{kind}"})
    index.write_text("[]")
    with pytest.raises(ValueError, match="it is no index of files of weights"):
        read_checkpoint(where)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.pth", None, "there is no checkpoint at"),
        ("w.h5", b"x", "is none of .safetensors"),
        ("w.pth", b"not a checkpoint", r"w\.pth cannot be read"),
        ("w.npz", b"PK not a zip", r"w\.npz cannot be read"),
        ("w.safetensors", b"x" * 40, r"w\.safetensors cannot be read"),
        ("w.bin", b"\n<!doctype html><html>", r"w\.bin cannot be read: it is a page of a web site"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tiny(), tmp_path / name)


def test_the_first_bytes_say_what_a_file_is(tmp_path):
    source = tiny()
    torch.save(source.state_dict(), tmp_path / "w.safetensors")
    save_file(source.state_dict(), tmp_path / "w.bin")
    for name in ("w.safetensors", "w.bin"):
        assert_same(create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / name, **TINY), source)


def test_a_tuple_of_the_weights_and_more(tmp_path):
    source = tiny()
    torch.save((source.state_dict(), 3), tmp_path / "w.pth")
    assert_same(create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.pth", **TINY), source)


def test_weights_in_e4m3(tmp_path):
    rounded = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in tiny().state_dict().items()}
    torch.save(rounded, tmp_path / "w.pth")
    target = create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.pth", **TINY)
    for key, value in target.state_dict().items():
        assert torch.equal(value, rounded[key].float()), key


def test_a_folder_of_torch_distributed_is_refused_by_name(tmp_path):
    distributed = pytest.importorskip("torch.distributed.checkpoint")
    distributed.save(tiny().state_dict(), checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="make a file of it with its format_utils"):
        load_checkpoint(tiny(), tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_file_is_not_run(tmp_path, protocol):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    class Worse:
        """Would change a class of PyTorch's for the rest of the process."""

        def __reduce__(self):
            return torch._utils._rebuild_parameter, (None, False, {}), {"marked": True}

    torch.save({"state_dict": Evil()}, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"holds no weights but state_dict .an object of posix.mkdir"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save({"x": Worse(), "evil": Evil(), "weight": torch.ones(2)}, tmp_path / "w.pth", pickle_protocol=protocol)
    try:
        assert list(read_checkpoint(tmp_path / "w.pth")) == ["weight"]
    except ValueError:  # a state for what takes none
        pass
    assert not (tmp_path / "made").exists() and not hasattr(torch._utils._rebuild_parameter, "marked")


def test_programs_and_archives_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "program.pt")
    with pytest.raises(ValueError, match="it holds no weights"):
        read_checkpoint(tmp_path / "program.pt")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "program.pt")
    with pytest.raises(ValueError, match="it is a tar archive"):
        read_checkpoint(tmp_path / "x.tar")
    (tmp_path / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="pointer of Git LFS"):
        read_checkpoint(tmp_path / "lfs.bin")
