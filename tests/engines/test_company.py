"""An image's answer is bit for bit the same alone and in any company: in fp32, bf16 and int8, prepared and not, of a
plain model and of a ReViT, on grids of its menu and beside them, with every instruction set."""

import pytest
import torch
from contract import DEVICE, require
from test_engines import MENU, batch, made
from test_instruction_sets import CAPABILITIES, best, run  # noqa: F401

from revit_kernels.ops.block import sample
from revit_kernels.ops.linear.panels import has_kernel

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="packed engines are for CPUs")
GRIDS = [(4, 4), (2, 3), (3, 5), (1, 1), (4, 4), (5, 2)]  # the third and the last are on no menu


@cpu_only
@pytest.mark.parametrize("kind", ["model", "engine", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("menu", [None, MENU], ids=["plain", "revit"])
def test_alone_and_together(menu, dtype, kind):
    require("block", "cpu", *sample(DEVICE))
    if kind == "int8" and not has_kernel("int8"):
        pytest.skip("int8 needs AVX512-VNNI and AVX512-BF16")
    model = made(dtype, menu)
    answers = model if kind == "model" else model.engine(quantize="int8" if kind == "int8" else None)
    images = batch(GRIDS, dtype)
    with torch.inference_mode():
        alone = [answers([image], grids=[grid]) for image, grid in zip(images, GRIDS)]
        for order in (range(6), (5, 0, 2, 1), (0, 1), (0, 2), (4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 5, 5)):
            together = answers([images[i] for i in order], grids=[GRIDS[i] for i in order])
            for i, row in zip(order, together):
                assert torch.equal(row, alone[i][0]), f"image {i} of {tuple(order)}"


@cpu_only
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_with_every_instruction_set(capability, best):  # noqa: F811
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(best):
        pytest.skip(f"the best here is {best}, and what the tests above run on")
    done = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "alone"], capability)
    assert done.returncode == 0, done.stdout[-3000:]
