"""A ViT on a CPU as it is served: traffic whose lengths change with every batch, one image at a time, and in int8.

Our weights are packed once (`model.engine()`), as the rivals' are when they are compiled; neither is timed.
"""

import copy
from itertools import cycle

import cpu_rivals as rivals
import numpy as np
import pytest
import torch
from bench_vit import DEVICE, MENU, MODELS, Case

from revit_kernels import VarLenViT

timm = pytest.importorskip("timm", reason="the rivals run timm's models: pip install revit_kernels[timm]")
if DEVICE != "cpu":
    pytest.skip("for CPUs", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
BATCHES, WARMUP = 200, 20  # of traffic
POOL = 64  # different images of each length
ONE = 8  # images that a call takes, one after another
ROUNDS = 15


def models(name: str, dtype: torch.dtype):
    """Our engine, and timm's model in float32, of the same weights."""
    torch.manual_seed(0)
    vit = timm.create_model(name, dynamic_img_size=True).eval().to(dtype).float()
    return VarLenViT.from_timm(copy.deepcopy(vit).to(dtype)).engine(), vit


def flops(model, grids) -> int:
    """Of the linears and attention, for the tokens that there are."""
    dim, tokens = model.embed_dim, [h * w + 1 for h, w in grids]
    block = 24 * dim * dim * sum(tokens) + 4 * dim * sum(n * n for n in tokens)
    return len(model.blocks) * block + 2 * 768 * dim * sum(h * w for h, w in grids)


def check(ours, theirs, dtype) -> None:
    a, b = ours.float(), theirs.float()
    assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps ** 0.5 * a.abs().max(), "it computes something else"


class Traffic:
    """Batches of images, each image's length drawn uniformly from the menu anew.

    batches: (grids, images, by length): images in the order drawn, and the same as one dense batch per length, longest
             first; order: where each of those is among the images drawn
    """

    def __init__(self, images: int, count: int, dtype: torch.dtype):
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        pool = {grid: torch.randn(POOL, 3, 16 * grid[0], 16 * grid[1]).to(dtype) for grid in MENU}
        wide = {grid: x.float() for grid, x in pool.items()}
        self.grids, self.images, self.by_length, self.order = [], [], [], []
        for _ in range(count):
            rows = rng.integers(0, len(MENU), images)
            starts = rng.integers(0, POOL - images, len(MENU))
            taken = {grid: iter(pool[grid][start:]) for grid, start in zip(MENU, starts)}
            self.grids.append([MENU[row] for row in rows])
            self.images.append([next(taken[grid]) for grid in self.grids[-1]])
            counts = np.bincount(rows, minlength=len(MENU))
            self.by_length.append([wide[g][s : s + n] for g, s, n in zip(MENU, starts, counts) if n])
            self.order.append(np.argsort(rows, kind="stable"))


def openvino_per_length(vit, dtype, sample):
    """A compiled model for each length, with a free number of images, or one image a request."""
    return rivals.openvino(vit, dtype, "batch", sample)


def openvino_dynamic(vit, dtype, sample):
    """One compiled model, with a free number and size of images; called once for each length of a batch."""
    return rivals.openvino(vit, dtype, "any", sample)


@pytest.mark.parametrize("rival", [openvino_per_length, openvino_dynamic], ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [8, 32])
@pytest.mark.parametrize("name", MODELS)
def bench_traffic(duel, name, images, dtype, rival):
    model, vit = models(name, dtype)
    traffic = Traffic(images, WARMUP + BATCHES, dtype)
    found = rival(vit, dtype, traffic.by_length[:8])
    calls = [found.prepare(batches) for batches in traffic.by_length]

    @torch.inference_mode()
    def answer(number):
        return model(traffic.images[number], grids=traffic.grids[number])

    check(answer(0)[traffic.order[0]], calls[0](), dtype)
    numbers, their_numbers = cycle(range(len(calls))), cycle(range(len(calls)))

    def ours():
        return answer(next(numbers))

    def theirs():
        return calls[next(their_numbers)]()

    theirs.settings = found.settings
    work = np.mean([flops(model, grids) for grids in traffic.grids[WARMUP:]])
    duel(ours, theirs, rounds=BATCHES, warmup=WARMUP, flops=work, rival=rival.__name__, series=True)


def openvino(vit, dtype, sample):
    return rivals.openvino(vit, dtype, "static", sample, in_turn=True)


ONE_AT_A_TIME = [openvino, rivals.onnxruntime, rivals.zentorch, rivals.eager, rivals.compiled]


@pytest.mark.parametrize("rival", ONE_AT_A_TIME, ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(7, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def bench_one_image(duel, name, grid, dtype, rival):
    model, vit = models(name, dtype)
    images = torch.randn(ONE, 3, 16 * grid[0], 16 * grid[1]).to(dtype)
    batches = list(images.float().split(1))
    found = rival(vit, dtype, [batches])
    theirs = found.prepare(batches)
    theirs.settings = found.settings

    @torch.inference_mode()
    def ours():
        return torch.cat([model(image) for image in images.split(1)])

    check(ours(), theirs(), dtype)
    duel(ours, theirs, rounds=ROUNDS, flops=flops(model, [grid] * ONE), rival=rival.__name__, per=ONE)


# ---------------------------------------------------------------------- int8


def quantized(model):
    try:
        return model.engine(quantize="int8")
    except NotImplementedError as why:
        pytest.skip(f"int8: {why}")


def ours_bf16(case):
    return torch.inference_mode()(case.ours)


def openvino_int8(case):
    """Quantized by NNCF, calibrated on 32 images of each length."""
    sizes = {tuple(batch.shape[2:]) for batch in case.batches}
    samples = {size: list(torch.randn(32, 1, 3, *size).numpy()) for size in sizes}
    batches = [batch.float() for batch in case.batches]
    found = rivals.openvino(case.float32(), torch.bfloat16, "static", [batches], samples)
    run = found.prepare(batches)
    run.settings = found.settings
    return run


def onnxruntime_int8(case):
    """Quantized dynamically."""
    batches = [batch.float() for batch in case.batches]
    found = rivals.onnxruntime(case.float32(), torch.float32, [batches], int8=True)
    run = found.prepare(batches)
    run.settings = found.settings
    return run


def error(found, exact) -> float:
    """The root of the mean squared error, against that of the answer itself."""
    return ((found.float() - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("rival", [ours_bf16, openvino_int8, onnxruntime_int8], ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("name", MODELS)
def bench_int8(duel, benchmark, name, rival):
    case = Case(name, 32, torch.bfloat16)
    model = quantized(VarLenViT.from_timm(copy.deepcopy(case.timm)))
    theirs = rival(case)

    @torch.inference_mode()
    def ours():
        return model(case.images, grids=case.grids)

    with torch.inference_mode():
        vit = case.float32()
        exact = torch.cat([vit(batch.float()) for batch in case.batches])
    errors = {"ours_error": error(ours(), exact), "rival_error": error(theirs(), exact)}
    assert max(errors.values()) < 1, f"it computes something else: {errors}"
    duel(ours, theirs, rounds=ROUNDS, flops=case.flops, rival=rival.__name__, dtype=torch.int8)
    benchmark.extra_info.update(errors)


@pytest.mark.parametrize("rival", [ours_bf16], ids=lambda rival: rival.__name__)
def bench_int8_shipped(duel, rival):
    """The model that comes with the package, on 256 images over its menu."""
    from revit_kernels import create_model
    from revit_kernels.models.registry import SHIPPED

    wide = create_model(str(SHIPPED)).eval().to(torch.bfloat16).engine()
    model = quantized(create_model(str(SHIPPED)).eval().to(torch.bfloat16))
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (256, 28, 28, 3), np.uint8))
    grids = [wide.menu[row] for row in rng.integers(0, len(wide.menu), len(images))]

    @torch.inference_mode()
    def run(model):
        return model(images, grids=grids, channels_last=True)

    dim, tokens = wide.embed_dim, [h * w + 1 for h, w in grids]
    work = len(wide.blocks) * (24 * dim * dim * sum(tokens) + 4 * dim * sum(n * n for n in tokens))
    duel(lambda: run(model), lambda: run(wide), rounds=ROUNDS, flops=work, rival=rival.__name__, dtype=torch.int8)
