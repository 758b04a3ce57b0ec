"""Every Triton kernel compiles, without a GPU, for Ampere, Hopper and Blackwell, to the machine code it should."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="this torch brings no Triton")

from revit_kernels.dispatch import OPS
from revit_kernels.measured import rule
from revit_kernels.ops.linear import tiles as linear_tiles

ARCHS = (80, 90, 100)
TRITON = [op for op in OPS if find_spec(f"revit_kernels.ops.{op}.triton")]
# Kernels that memory bounds, and how many arrays of a row's width they read: each in 16 bytes a thread.
WIDE = {
    "layer_norm.forward": 5,
    "layer_norm.backward": 6,
    "layer_norm.reduce": 1,
    "pool.forward": 1,
    "pool.backward": 1,
    "temporal_attention.forward": 3,
    "temporal_attention.backward": 9,
}
# Kernels that the tensor cores bound, and the tile that must have the 64 rows of Hopper's and Blackwell's instruction.
PRODUCTS = {"attention.forward": "BLOCK_QUERIES", "attention.backward_q": "BLOCK_QUERIES"}
PRODUCTS |= {"attention.backward_kv": "BLOCK_KEYS", "patch_embed.forward": "BLOCK_TOKENS"}
PRODUCTS |= {"linear.forward": "BLOCK_ROWS"}
# Every shape that the rules tell apart, by the names of its numbers.
DIMS = {"bits": (16, 32), "dim": range(48, 2049)}
LINEAR = {"bits": (8, 16, 32), "parts": (1, 2), "loads": (1, 2, 3), "out": (64, 128, 4096)}
SHAPES = {f"attention.{kernel}": {"bits": (16, 32), "head_dim": range(1, 129)} for kernel in ("forward", "backward_q")}
SHAPES |= {"attention.backward_kv": SHAPES["attention.forward"], "linear.forward": LINEAR}
SHAPES |= {f"attention.{step}_turned": SHAPES["attention.forward"] for step in ("forward", "backward_q", "backward_kv")}
SHAPES |= {f"layer_norm.{kernel}": DIMS for kernel in ("forward", "backward", "reduce")}
SHAPES |= {"linear.backward": {"parts": (1, 2)}, "linear.quantize": {"columns": range(128, 8193, 128)}}
SHAPES |= {f"patch_embed.{kernel}": DIMS for kernel in ("forward", "sums")}
SHAPES |= {"patch_embed.patchify": {"bits": (16, 32), "patch": (14, 16)}}
SHAPES |= {
    f"temporal_attention.{step}": {"bits": (16, 32), "head_dim": range(16, 257)} for step in ("forward", "backward")
}
SHAPES |= {"pool.forward": DIMS, "pool.backward": DIMS, "pos_embed.resample": DIMS}


def frozen(tiles):
    return tuple(sorted(tiles.items()))


@pytest.fixture(scope="session")
def compiled(request):
    """What was compiled, by op and architecture: all that this session's tests ask for, on every core, at once."""
    wanted = [item.callspec.params for item in request.session.items if item.originalname == "test_offline"]
    pairs = [f"{params['op']}:{params['arch']}" for params in wanted]
    here = Path(__file__).parents[1]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, here / "compile_triton.py", *pairs], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", TRITON)
def test_offline(op, arch, compiled):
    rows = [row for row in compiled if row["op"] == op and row["arch"] == arch]
    assert rows and (wrong := [row for row in rows if row["complaint"]]) == [], wrong
    for row in filter(lambda row: row["models"], rows):
        name = f"{op}.{row['kernel']}"
        assert row["wide_loads"] >= WIDE.get(name, 0), f"loads are narrower than 16 bytes: {row}"
        tall = row["tiles"].get(PRODUCTS.get(name), 0) >= 64
        if arch >= 90 and tall and row["shape"]["bits"] in (8, 16):
            assert row["wgmma" if arch == 90 else "tcgen05"], f"not on this GPU's own tensor cores: {row}"
        if name == "linear.forward" and row["shape"]["loads"] == linear_tiles.TILES:
            assert row["tma"], f"no loads by the hardware's copy engine: {row}"
    for name, numbers in SHAPES.items():
        if done := {frozen(row["tiles"]) for row in rows if f"{op}.{row['kernel']}" == name}:
            shapes = [dict(zip(numbers, one)) for one in product(*numbers.values())]
            shapes = [shape for shape in shapes if arch >= 90 or shape.get("bits") != 8]
            chosen = {frozen(rule(*name.split("."), **shape)) for shape in shapes}
            assert chosen <= done, f"{name}: the rule chooses what is not compiled here: {chosen - done}"
