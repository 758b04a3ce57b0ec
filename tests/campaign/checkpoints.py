"""Checkpoints whose headers, shapes, menus, numbers and pickles somebody changed; and pickles that would run code."""

import io
import json
import os
import pickle
import random
import socket
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from revit_kernels import create_model
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.serving.prepare import load_model

from .images import changed

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
VALUES = [None, True, False, -1, 0, 1, 3, 2.5, 1 << 24, 1 << 31, 1 << 70, 1e300, float("nan"), float("inf"), "", "x"]
VALUES += [
    [],
    {},
    [[]],
    [1],
    [2, 2],
    [[4, 4]],
    [[4, 4], [4, 4]],
    [[1 << 30, 1]],
    ["a"],
    {"a": {}},
    "vit_base_patch16_224",
]
VALUES += ["layernorm", "../../etc/passwd", "http://127.0.0.1:9/x", "torch.nn.Linear", "cuda", "F32", "F4", "I64"]
REFUSALS = (ValueError, NotImplementedError, MemoryError)
MADE = {}


def prepare():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = MADE["folder"] = tempfile.TemporaryDirectory(prefix="revit_campaign_")
    torch.manual_seed(0)
    model = create_model(NAME, **SMALL).make_resizable(((4, 4), (2, 2))).eval()
    MADE["path"] = Path(folder.name)
    save_checkpoint(model, MADE["path"] / "base.safetensors")
    MADE["safetensors"] = (MADE["path"] / "base.safetensors").read_bytes()
    plain = create_model(NAME, **SMALL).eval()
    MADE["state"] = plain.state_dict()
    MADE["image"] = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        MADE["answer"], MADE["plain"] = model(MADE["image"]), plain(MADE["image"])
    for bytes_of_state, name in ((_pth, "pth"), (_npz, "npz")):
        MADE[name] = bytes_of_state(MADE["state"])

    def connect(*_):
        raise AssertionError("a file made the library contact a server")

    socket.socket.connect = connect


def _pth(tree, **options):
    to = io.BytesIO()
    torch.save(tree, to, **options)
    return to.getvalue()


def _npz(state):
    to = io.BytesIO()
    np.savez(to, **{key: value.numpy() for key, value in state.items()})
    return to.getvalue()


class Evil:
    """Whose pickle would leave a file behind."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def evil(r, trace: str):
    text = f"open({trace!r}, 'w').close()"
    return r.choice(
        [
            Evil(os.system, f"touch {trace}"),
            Evil(exec, text),
            Evil(eval, text),
            Evil(os.mkdir, trace),
            Evil(torch.load, trace),
            Evil(getattr, Evil(__import__, "os"), "system"),
            Evil(torch.save, {"x": 1}, trace),
            Evil(np.save, trace, np.zeros(1)),
        ]
    )


def another(r, value):
    """A JSON value with something in it replaced, gone or added."""
    if isinstance(value, dict) and value and r.random() < 0.85:
        key = r.choice(list(value))
        kind = r.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return value | {r.choice(("pretrained", "checkpoint_path", "depth", "device", "x")): r.choice(VALUES)}
        if isinstance(value[key], str) and value[key][:1] in "{[":  # JSON in JSON: what the file says of its model
            try:
                return value | {key: json.dumps(another(r, json.loads(value[key])))}
            except ValueError:
                pass
        return value | {key: another(r, value[key])}
    if isinstance(value, list) and value and r.random() < 0.6:
        at = r.randrange(len(value))
        return [*value[:at], another(r, value[at]), *value[at + 1 :]]
    return r.choice(VALUES)


def other_header(r, data: bytes) -> bytes:
    """The safetensors file with other words in its header."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for _ in range(r.choice((1, 1, 2))):
        key = "__metadata__" if r.random() < 0.5 else r.choice(list(header))
        if isinstance(header.get(key), dict):
            header[key] = another(r, header[key])
        else:
            header = another(r, header)
            if not isinstance(header, dict):
                break
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    length = len(text) if r.random() < 0.95 else r.choice((0, 1, size, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + text + data[8 + size :]


def other_numbers(r, data: bytes) -> bytes:
    """The file with numbers of one tensor that are not finite."""
    size = struct.unpack("<Q", data[:8])[0]
    at = 8 + size + 4 * r.randrange((len(data) - 8 - size) // 4)
    return data[:at] + struct.pack("<f", r.choice((float("nan"), float("inf"), 3e38))) + data[at + 4 :]


def _loaded(suffix, path):
    if suffix == "safetensors":
        return load_model(str(path), device=torch.device("cpu"), dtype=torch.float32)
    return create_model(NAME, checkpoint_path=str(path), **SMALL).eval()


def attempt(seed: int) -> str:
    r = random.Random(seed)
    suffix = r.choice(("safetensors", "safetensors", "safetensors", "pth", "npz"))
    data, trace = MADE[suffix], str(MADE["path"] / "trace")
    kind = r.randrange(8)
    if kind == 0:
        pass
    elif kind < 3:
        data = changed(r, data)
    elif kind == 3 and suffix == "safetensors":  # in the first bytes, where the header is
        data = changed(r, data[:4000]) + data[4000:]
    elif suffix == "safetensors":
        data = other_numbers(r, data) if kind == 4 else other_header(r, data)
    elif suffix == "npz":
        state = {"x": np.array([evil(r, trace)], object)} | {k: v.numpy() for k, v in MADE["state"].items()}
        to = io.BytesIO()
        np.savez(to, **state)
        data = to.getvalue()
    else:
        state = dict(MADE["state"])
        state[r.choice((*list(state), "x", "y.z"))] = evil(r, trace)
        tree = r.choice((state, {"state_dict": state}, {"model": state, "args": evil(r, trace)}, [evil(r, trace)]))
        data = _pth(tree, _use_new_zipfile_serialization=r.random() < 0.6)
        if r.random() < 0.2:
            data = pickle.dumps(tree)
        if r.random() < 0.3:
            data = changed(r, data)
    path = MADE["path"] / f"{r.choice(('a', 'b'))}.{suffix}"
    path.write_bytes(data)
    try:
        model = _loaded(suffix, path)
        with torch.inference_mode():
            found = model(MADE["image"][:, :, : model.patch_embed.img_size[0], : model.patch_embed.img_size[1]])
        word = "loaded"
    except REFUSALS as error:
        assert kind or not str(error), f"a file that is whole is refused: {error}"
        assert str(error).strip(), f"{type(error).__name__} without a word"
        word = "refused"
    finally:
        path.unlink()
    assert not os.path.lexists(trace), "code in a file was run"
    if kind == 0:
        assert torch.equal(found, MADE["answer" if suffix == "safetensors" else "plain"]), "other answers"
    return word
