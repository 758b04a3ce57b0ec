"""Engines of clips: the answers of their models, a clip's bit for bit the same in any company and on any threads."""

import copy

import pytest
import torch
from contract import DEVICE, assert_close, require
from test_instruction_sets import CAPABILITIES, best, run  # noqa: F401
from timm_pairs import liven

from revit_kernels import VarLenTimeSformer
from revit_kernels.models.timesformer import ATTENTION_TYPES
from revit_kernels.ops.block import sample

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="packed engines are for CPUs")
SMALL = dict(img_size=32, patch_size=8, num_classes=100, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_frames=4)
MENU = ((4, 4, 4), (4, 3, 3), (2, 2, 2))
# Of one frame, of one patch a frame, and more rows than a thread takes at a time; evenly shared by 2 threads, and not.
EVEN = [(4, 4, 4), (4, 4, 4), (5, 1, 1), (5, 1, 1)]
ODD = [(9, 4, 6), (1, 4, 4), (2, 2, 2), (4, 3, 3), (3, 1, 2)]


def made(dtype=torch.float32, menu=None, **kwargs):
    require("block", "cpu", *sample(DEVICE))
    model = liven(VarLenTimeSformer(**SMALL | kwargs)).to(dtype)
    return (model.make_resizable(menu) if menu else model).eval().requires_grad_(False)


def clips(grids, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, t, 8 * h, 8 * w, generator=generator).to(dtype) for t, h, w in grids]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("menu", [None, MENU], ids=["one affine", "an affine per length"])
@pytest.mark.parametrize("grids", [EVEN, ODD, MENU, MENU[2:]], ids=str)
def test_an_engine_answers_as_its_model_alone_and_together(threads, grids, menu, dtype):
    model = made(dtype, menu)
    if menu:
        for name, parameter in model.named_parameters():
            if "shorter" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    engine, given = model.engine(), clips(grids, dtype)
    assert engine.refusal is None
    answers = engine(given, grids=grids)
    exact = copy.deepcopy(model).double()([clip.double() for clip in given], grids=grids)
    assert_close("logits", answers, exact, model(given, grids=grids))
    for clip, grid, answer in zip(given, grids, answers):
        assert torch.equal(engine([clip], grids=[grid])[0], answer)


@pytest.mark.parametrize(
    "options",
    [{"norm_layer": "rmsnorm"}, {"act_layer": "silu", "qkv_bias": False}, {"num_frames": 7}]
    + [{"attention_type": name} for name in ATTENTION_TYPES],
    ids=str,
)
def test_every_kind_of_block(options):
    model, given = made(**options), clips(ODD, torch.float32)
    engine = model.engine()
    assert engine.refusal is None
    exact = copy.deepcopy(model).double()([clip.double() for clip in given])
    assert_close("logits", engine(given), exact, model(given))


def test_neighbours_and_the_tail_stay_out(threads):
    """NaN in a clip, and in rows of no clip, reaches no other; those rows come back as zeros."""
    model = made()
    engine, given = model.engine(), clips(ODD, torch.float32)
    packing = model.packing(ODD)
    long = type(packing).from_grids(ODD, packing.prefix, capacity=packing.capacity + 5)
    x = torch.full((long.capacity, 48), float("nan"))
    x[: packing.capacity] = engine.embed(given, packing)
    (expected, _, _) = engine.run_blocks([x[: packing.capacity], None, None], packing)
    packing.split(x)[1][0] = float("nan")
    (y, _, _) = engine.run_blocks([x, None, None], long)
    assert expected.isfinite().all() and not y[packing.capacity :].any()
    for i, (part, own) in enumerate(zip(packing.split(expected), packing.split(y))):
        assert own.isnan().all() if i == 1 else torch.equal(own, part)


def test_blocks_of_more_than_one_form_are_refused():
    model = made()
    model.blocks[1].temporal_norm1.eps = 1e-3
    assert model.engine().refusal == "blocks.1 is of another form than blocks.0"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_with_every_instruction_set(capability, best):  # noqa: F811
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(best):
        pytest.skip(f"the best here is {best}, and what the tests above run on")
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "alone and together and 2- or kind",
    ]
    done = run(command, capability)
    assert done.returncode == 0, done.stdout[-3000:]
