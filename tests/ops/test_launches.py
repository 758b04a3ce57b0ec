"""One compilation of a Triton kernel serves all batches: what differs as traffic differs is not compiled into it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="this torch brings no Triton")
# Numbers of a model, not of a batch: the compiler may know whether they are 1, or multiples of 16.
OF_A_MODEL = {"heads", "scale", "dim", "eps", "lengths", "slots", "columns", "inputs", "group", "prefix", "channels"}
OF_A_MODEL |= {"x", "weight", "stride", "x_row", "weight_row", "angle_row", "angle_head"}  # x, weight: matrices by TMA
OF_A_MODEL |= {f"{name}_{step}" for name in ("grad", "q", "k", "v") for step in ("token", "head")}


@pytest.fixture(scope="module")
def launches():
    here = Path(__file__).parents[1]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(here.parent)}
    done = subprocess.run([sys.executable, here / "launch_keys.py"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_number_of_a_batch_is_named_as_one(launches):
    for kernel, numbers in launches["kernels"].items():
        of_a_batch = {name for name, in_key in numbers.items() if not in_key}
        assert of_a_batch == numbers.keys() - OF_A_MODEL, f"{kernel}: name all in do_not_specialize, and no other"


def test_a_kernel_is_compiled_once_for_all_batches(launches):
    assert {launch.split(": ")[1] for launch in launches["keys"]} == launches["kernels"].keys()
    for launch, keys in launches["keys"].items():
        differing = {name: {key[name] for key in keys} for name in keys[0] if len({key[name] for key in keys}) > 1}
        assert len(keys) == 1, f"{launch} is compiled {len(keys)} times, for {differing}"


def test_what_is_compiled_offline_knows_no_number_of_a_batch():
    code = """
import machine_code
from revit_kernels.ops.pool.triton import specification
spec = specification("backward", {"BLOCK_TOKENS": 16, "BLOCK_DIM": 128, "num_warps": 4})
for told in ({"multiples": ("tokens",)}, {"constexprs": spec["constexprs"] | {"images": 1}}):
    try:
        machine_code.compiled(spec | told, 90)
    except ValueError as error:
        print(error)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "_backward_kernel: no launch knows tokens\n_backward_kernel: no launch knows images\n"
