"""What a file says of its model is checked before it is believed: nothing is built, fetched or opened for it."""

import json
import random
import time
import urllib.request

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from revit_kernels.models.checkpoints import METADATA, description, save_checkpoint
from revit_kernels.models.registry import create_model

VALUES = [None, True, -1, 0, 1, 1.5, 1 << 31, 1 << 70, float("nan"), "", "x", "../other.safetensors", [], {}, [[]]]
VALUES += [
    [0, 0],
    [1 << 40, 1],
    ["a"],
    {"name": 1},
    {"name": "layernorm", "eps": []},
    [[4, 4], [5, 5]],
    [[1 << 20] * 2],
]
EXTRA = {"pretrained": True, "checkpoint_path": "/etc/passwd", "device": "cuda:99", "nonsense": 3, "depth": 1 << 31}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A ReViT's file, and what it says of it."""
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = create_model("vit_tiny_patch16_224", qkv_bias=True, norm_layer="layernorm", **small)
    model.make_resizable([(4, 4), (2, 2)])
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": ["a", "b", "c"], "trained_on": "nothing"}
    path = tmp_path_factory.mktemp("file") / "m.safetensors"
    save_checkpoint(model, path)
    return path, description(path)


def rewritten(file, path, text):
    save_file(load_file(file[0]), path, {"format": "pt", METADATA: text})
    return str(path)


def places(found, here=()):
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        yield (*here, key)
        if isinstance(value, dict | list):
            yield from places(value, (*here, key))


@pytest.mark.parametrize("seed", range(150))
def test_a_changed_description_is_refused_or_harmless(file, tmp_path, seed, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("something was fetched"))
    chance, found = random.Random(seed), json.loads(json.dumps(file[1]))
    place = chance.choice(list(places(found)))
    owner = found
    for key in place[:-1]:
        owner = owner[key]
    kind = chance.choice(("replace", "replace", "delete", "add"))
    if kind == "replace":
        owner[place[-1]] = chance.choice(VALUES)
    elif kind == "delete":
        del owner[place[-1]]
    else:
        name = chance.choice(list(EXTRA))
        found["kwargs"][name] = EXTRA[name]
    path, begun = rewritten(file, tmp_path / "m.safetensors", json.dumps(found)), time.monotonic()
    try:
        model = create_model(path)
    except (ValueError, NotImplementedError) as error:
        assert "\n" not in str(error) and "m.safetensors" in str(error), (place, error)
    else:
        kept, own = load_file(path), model.state_dict()
        assert own.keys() == kept.keys() and all(own[key].shape == kept[key].shape for key in own)
        try:
            model([torch.zeros(16, 16, 3, dtype=torch.uint8)], channels_last=True)
        except ValueError:  # of statistics that are not of its channels
            assert place[0] == "cfg"
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("name, value", EXTRA.items())
def test_no_argument_has_something_opened_or_fetched(file, tmp_path, name, value):
    found = json.loads(json.dumps(file[1]))
    found["kwargs"][name] = value
    path = rewritten(file, tmp_path / "m.safetensors", json.dumps(found))
    with pytest.raises(ValueError, match=rf"does not describe a model: .*{name}"):
        create_model(path)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 10_000, '{"name": "vit_tiny_patch16_224"}', "\\ud800"])
def test_no_description_at_all(file, tmp_path, text):
    path = rewritten(file, tmp_path / "m.safetensors", text)
    with pytest.raises(ValueError, match=r"does not describe a model|does not say what model"):
        create_model(path)


def test_sizes_are_compared_before_anything_is_made(file, tmp_path, monkeypatch):
    found = json.loads(json.dumps(file[1]))
    found["kwargs"] |= {"embed_dim": 1 << 20, "num_heads": 1}
    path = rewritten(file, tmp_path / "m.safetensors", json.dumps(found))
    with pytest.raises(ValueError, match=r"does not hold the model that it describes: they differ in blocks\.0"):
        create_model(path)  # a matrix of that width has four terabytes
    with safe_open(path, "pt") as opened:
        assert METADATA in opened.metadata()
