"""Every Triton kernel compiles, without a GPU, for Ampere, Hopper and Blackwell, to the machine code it should."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from revit_kernels.configurations.tables import architectures, read, shipped
from revit_kernels.dispatch import OPS
from revit_kernels.ops.linear import tiles as linear_tiles

pytest.importorskip("triton", reason="this torch brings no Triton")
ARCHS = (80, 90, 100)
SHARED_AT_LEAST = 99 * 1024  # of a block, on the GPUs that use an older one's table: sm_86, sm_89, sm_120
TRITON = [op for op in OPS if find_spec(f"revit_kernels.ops.{op}.triton")]
# Kernels that memory bounds, and how many arrays of a row's width they read: each in 16 bytes a thread.
WIDE = {
    "layer_norm.forward": 5,
    "layer_norm.backward": 6,
    "layer_norm.reduce": 1,
    "pool.forward": 1,
    "pool.backward": 1,
}
# Kernels that the tensor cores bound, and the tile that must have the 64 rows of Hopper's and Blackwell's instruction.
PRODUCTS = {"attention.forward": "BLOCK_QUERIES", "attention.backward_q": "BLOCK_QUERIES"}
PRODUCTS |= {"attention.backward_kv": "BLOCK_KEYS", "patch_embed.forward": "BLOCK_TOKENS"}
PRODUCTS |= {"linear.forward": "BLOCK_ROWS"}


@pytest.fixture(scope="session")
def compiled(request):
    """What was compiled, by op and architecture: all that this session's tests ask for, on every core, at once."""
    wanted = [item.callspec.params for item in request.session.items if item.originalname == "test_offline"]
    pairs = [f"{params['op']}:{params['arch']}" for params in wanted]
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "REVIT_CONFIGURATIONS", "REVIT_TUNE")}
    env |= {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, here / "compile_triton.py", *pairs], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", TRITON)
def test_offline(op, arch, compiled):
    rows = [row for row in compiled if row["op"] == op and row["arch"] == arch]
    listed = [row.shape for name, table in shipped(arch).rows.items() if name.split(".")[0] == op for row in table]
    assert rows and [row["shape"] for row in rows if row["row"]] == listed
    for row in rows:
        name = f"{op}.{row['kernel']}"
        assert row["complaint"] is None, row
        if row["row"]:
            assert row["blocks"] >= row["designed"] >= 1, f"fewer blocks on a multiprocessor than designed: {row}"
            assert arch == 90 or row["shared"] <= SHARED_AT_LEAST, f"too much for the GPUs that borrow it: {row}"
            assert row["wide_loads"] >= WIDE.get(name, 0), f"loads are narrower than 16 bytes: {row}"
            tall = row["tiles"].get(PRODUCTS.get(name), 0) >= 64
            if arch >= 90 and tall and row["shape"]["bits"] in (8, 16):
                assert row["wgmma" if arch == 90 else "tcgen05"], f"not on this GPU's own tensor cores: {row}"
            if name == "linear.forward" and row["shape"].get("loads") == linear_tiles.TILES:
                assert row["tma"], f"no loads by the hardware's copy engine: {row}"


def test_every_architecture_has_a_table():
    assert tuple(architectures()) == ARCHS
    for arch in ARCHS:
        table = shipped(arch)
        assert table.architecture == arch and table.source
        assert table.text() == Path(table.path).read_text(), "written by the tuner, one row a line"
        assert read(table.path).rows.keys() >= WIDE.keys() | PRODUCTS.keys()


def test_the_static_roofline_is_of_these_tables():
    root = Path(__file__).parent.parent
    command = [sys.executable, root / "benchmarks" / "kernels.py"]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    path = root / "benchmarks" / "results" / "kernels.md"
    assert done.stdout == path.read_text(), "run: python benchmarks/kernels.py > benchmarks/results/kernels.md"
