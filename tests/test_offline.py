"""Every Triton kernel compiles, without a GPU, for Ampere, Hopper and Blackwell, and its machine code is clean."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from revit_kernels.dispatch import OPS

pytest.importorskip("triton", reason="this torch brings no Triton")
LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # shared memory that one block may have


@pytest.mark.parametrize("op", OPS)
def test_offline(op):
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(here.parent)}
    done = subprocess.run([sys.executable, here / "compile_triton.py", op], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert {row["arch"] for row in rows} == set(LIMIT)
    for row in rows:
        assert row["local"] == 0 and row["stack"] == 0, f"spills: {row}"
        assert row["dynamic_shared"] + row["shared"] <= LIMIT[row["arch"]], f"too much shared memory: {row}"
        if op == "attention" and row["kernel"] == "_forward_kernel" and row["arch"] == 90 and row["aligned"]:
            head_dim = re.search(r"'DIM': (\d+)", row["constexprs"])[1]
            if "*bf16" in row["signature"] and head_dim in ("64", "128"):
                assert row["wgmma"] > 0, f"not on Hopper's tensor cores: {row}"
