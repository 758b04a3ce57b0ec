import sys

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, assert_close, check, every_backend, every_dtype, run

from revit_kernels import dispatch
from revit_kernels.ops import patch_embed, pos_embed, resize_patch_weight
from revit_kernels.packing import Packing

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.3)
U8, F32 = torch.uint8, torch.float32
CASES = {
    "no image": dict(sizes=[], grids=[]),
    "one image that fits": dict(sizes=[(12, 8)], grids=[(3, 2)]),
    "mixed, shrunk and enlarged": dict(
        sizes=[(12, 8), (21, 30), (5, 6), (1, 1)], grids=[(3, 2), (2, 2), (3, 2), (1, 2)]
    ),
    "one column of pixels": dict(sizes=[(23, 5), (9, 1), (2, 7)], grids=[(4, 1), (2, 1), (1, 1)], patch=(4, 1)),
    "a photograph shrunk far": dict(sizes=[(75, 90)], grids=[(1, 2)]),
    "prefix and tail": dict(sizes=[(8, 8), (9, 7)], grids=[(2, 2), (2, 1)], prefix=2, tail=3),
    "no prefix, odd dim": dict(sizes=[(8, 8), (9, 7)], grids=[(2, 2), (2, 1)], prefix=0, dim=13),
    "one channel": dict(sizes=[(8, 8), (9, 7)], grids=[(2, 2), (2, 1)], channels=1),
    "four channels": dict(sizes=[(8, 8), (9, 7)], grids=[(2, 2), (2, 1)], channels=4),
    "float images": dict(sizes=[(8, 8), (9, 7)], grids=[(2, 2), (2, 1)], images=None),
    "fp32 images": dict(sizes=[(8, 8), (9, 7)], grids=[(2, 2), (2, 1)], images=F32),
    "patch 14": dict(sizes=[(14, 28), (31, 20)], grids=[(1, 2), (1, 1)], patch=(14, 14), dim=24),
    "patch 16 x 8": dict(sizes=[(16, 16), (31, 20)], grids=[(1, 2), (1, 1)], patch=(16, 8), dim=24),
    "patch 32": dict(sizes=[(32, 32), (40, 31)], grids=[(1, 1), (1, 1)], patch=(32, 32), channels=1, dim=128),
    "patch 28, dim above a tile": dict(sizes=[(28, 56), (40, 31)], grids=[(1, 2), (1, 1)], patch=(28, 28), dim=200),
    "nothing but pixels": dict(sizes=[(8, 8), (9, 7)], grids=[(2, 2), (2, 1)], plain=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EXACT = [63, 64, 65, 127, 128, 129]  # tokens


def make_image(i, channels, size, dtype):
    generator = torch.Generator().manual_seed(i)
    pixels = torch.randint(0, 256, (channels, *size), generator=generator, dtype=U8)
    return (pixels if dtype == U8 else (pixels / 255).to(dtype)).to(DEVICE)


def make_inputs(sizes, grids, dtype=F32, patch=(4, 4), channels=3, dim=16, prefix=1, tail=0, images=U8, plain=False):
    torch.manual_seed(0)
    total = sum(prefix + h * w for h, w in grids)
    packing = Packing.from_grids(grids, prefix, capacity=total + tail, device=DEVICE)
    cells = sum(h * w for h, w in packing.menu)

    def random(*shape):
        return torch.randn(*shape).to(DEVICE, dtype)

    inputs = dict(
        images=[make_image(i, channels, size, images or dtype) for i, size in enumerate(sizes)],
        weight=random(dim, channels, *patch) / 8,
        bias=None if plain else random(dim),
        packing=packing,
        pos=None if plain else random(cells, dim),
        prefix=None if plain else random(prefix, dim),
    )
    return inputs if plain else inputs | dict(mean=MEAN[:channels], std=STD[:channels])


def call(inputs, backend, **change):
    try:
        return patch_embed(**(inputs | change), backend=backend)
    except NotImplementedError as refused:
        pytest.skip(str(refused))


def skip_rows_of_interpreter(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("triton: in the interpreter NumPy multiplies, and a row's bits depend on its place in the tile")


@every_backend
@every_dtype
@every_case
def test_contract(case, dtype, backend):
    check(patch_embed, make_inputs(**case, dtype=dtype), backend, constant=("images",))


@every_backend
def test_contract_of_bilinear(backend):
    inputs = make_inputs([(21, 30), (5, 6)], [(2, 2), (3, 1)]) | dict(interpolation="bilinear")
    check(patch_embed, inputs, backend, constant=("images",))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_contract_at_tile_edges(dtype):
    """Lengths around the tiles of a kernel, and one above 1024, in one packed batch."""
    grids = [(n - 1, 1) for n in EXACT] + [(1, 1), (32, 33)]
    inputs = make_inputs([(h * 4 + 1, 4 * w) for h, w in grids], grids, dtype, dim=24)
    check(patch_embed, inputs, None, constant=("images",))


@pytest.mark.parametrize("tokens", EXACT)
def test_contract_of_triton_at_tile_edges(tokens):
    inputs = make_inputs([((tokens - 1) * 2, 2)], [(tokens - 1, 1)], patch=(2, 2), channels=1, dim=8)
    inputs["weight"].requires_grad_(False)
    expected = patch_embed(**inputs, backend="reference")
    assert_close("output", call(inputs, "triton"), expected.double(), expected)


@every_backend
@pytest.mark.parametrize("grids", [[(3, 2)] * 2, [(2, 2), (1, 2)]], ids=["fit", "resized"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_and_strides(channels_last, grids, backend):
    """A batch, a list, channels last, a crop of a larger image: one result, bit for bit."""
    inputs = make_inputs([(12, 8), (12, 8)], grids)
    large = torch.zeros(2, 3, 20, 19, dtype=U8, device=DEVICE)
    large[:, :, 5:17, 3:11] = torch.stack(inputs["images"])
    expected = call(inputs, backend)
    for batch in (large[:, :, 5:17, 3:11], torch.stack(inputs["images"])):
        for layout in (batch, batch.contiguous(memory_format=torch.channels_last), batch.mT.contiguous().mT):
            layout = layout.permute(0, 2, 3, 1) if channels_last else layout
            for images in (layout, list(layout)):
                assert torch.equal(call(inputs, backend, images=images, channels_last=channels_last), expected)


@every_backend
def test_choice_made_on_the_device(backend):
    """No grid is known to the host, and the images that found no room are left out, NaN and all."""
    menu = [(3, 2), (2, 2), (1, 2)]
    inputs = make_inputs([(12, 8), (8, 8), (9, 9), (7, 5)], [(3, 2), (1, 2), (3, 2), (2, 2)], images=F32)
    fixed = Packing.from_grids([(3, 2), (1, 2)], 1, menu=menu, capacity=13, device=DEVICE)
    chosen = Packing.from_choice(torch.tensor([0, 2, 0, 1], device=DEVICE), menu, 1, capacity=13)
    inputs["images"][2].fill_(torch.nan)
    pos = torch.randn(12, 16, device=DEVICE)
    some = call(inputs, backend, images=inputs["images"][:2], packing=fixed, pos=pos)
    every = call(inputs, backend, packing=chosen, pos=pos)
    assert chosen.fits.tolist() == [True, True, False, False] and torch.equal(some, every)


@every_backend
def test_image_that_fits_is_not_interpolated(backend):
    """One infinite pixel is felt by its own patch alone."""
    inputs = make_inputs([(8, 8), (9, 9)], [(2, 2), (2, 2)], images=F32)
    inputs["images"][0][0, 3, 3] = torch.inf
    assert torch.isfinite(call(inputs, backend)).all(1).tolist() == [True, False] + [True] * 8


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_interpolate_and_conv(interpolation):
    """Output and gradients by the rule of the contract, with what users run in place of the reference."""
    sizes, grids = [(33, 50), (32, 32), (90, 75)], [(2, 3), (2, 2), (1, 1)]
    inputs = make_inputs(sizes, grids, patch=(16, 16), images=U8) | dict(interpolation=interpolation)

    def theirs(images, weight, bias, packing, pos, prefix, mean, std, interpolation, backend):
        rows = []
        for image, (h, w), (_, _, cell) in zip(images, packing.grids, packing.placement.tolist()):
            x = F.interpolate(image[None].to(weight.dtype), (h * 16, w * 16), mode=interpolation, antialias=True) / 255
            x = (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)
            rows += [prefix, F.conv2d(x, weight, bias, stride=16)[0].flatten(1).T + pos[cell : cell + h * w]]
        return torch.cat(rows)

    actual = run(patch_embed, inputs, None)
    rough, exact = run(theirs, inputs, None), run(theirs, inputs, None, torch.float64)
    for name in actual:
        assert_close(name, actual[name], exact[name], rough[name])


def test_equals_timm():
    layers = pytest.importorskip("timm.layers", reason="timm is missing")
    torch.manual_seed(0)
    module = layers.PatchEmbed(img_size=None, patch_size=14, embed_dim=32, dynamic_img_pad=False).to(DEVICE)
    table = torch.randn(1, 1 + 49, 32, device=DEVICE)
    images, grid = torch.randn(2, 3, 56, 42, device=DEVICE), (4, 3)

    def theirs(images, table, weight):
        tokens = F.conv2d(images, weight, module.proj.bias.to(weight), stride=14).flatten(2).mT
        position = layers.resample_abs_pos_embed(table, list(grid), [7, 7])
        return torch.cat([position[:, :1].expand(2, -1, -1), tokens + position[:, 1:]], 1).flatten(0, 1)

    packing = Packing.from_grids([grid] * 2, 1, device=DEVICE)
    pos = pos_embed(table[0, 1:].unflatten(0, (7, 7)), packing.menu)
    ours = patch_embed(images, module.proj.weight, module.proj.bias, packing, pos=pos, prefix=table[0, :1])
    rough = torch.cat([ours.new_zeros(2, 1, 32), module(images)], 1)[:, 1:]
    torch.testing.assert_close(rough, theirs(images, table * 0, module.proj.weight).unflatten(0, (2, 13))[:, 1:])
    exact = theirs(images.double(), table.double(), module.proj.weight.double())
    assert_close("tokens", ours, exact, theirs(images, table, module.proj.weight))


@pytest.mark.parametrize("size", [(8, 8), (24, 24), (16, 20), (10, 6)])
def test_resized_weight_equals_timm(size):
    layers = pytest.importorskip("timm.layers", reason="timm is missing")
    weight = torch.randn(5, 3, 16, 16, requires_grad=True)

    def ours(weight, backend):
        return resize_patch_weight(weight, size)

    def theirs(weight, backend):
        return layers.resample_patch_embed(weight, list(size)) if weight.dtype == F32 else ours(weight, backend)

    actual, exact = (run(ours, dict(weight=weight), None, dtype) for dtype in (None, torch.float64))
    rough = run(theirs, dict(weight=weight), None)
    for name in actual:
        assert_close(name, actual[name], exact[name], rough[name])
    assert resize_patch_weight(weight, (16, 16)) is weight


@pytest.mark.parametrize("size", [(2**40, 4), (4, 2**31), (0, 4), (4,)])
def test_patches_that_no_weight_can_have(size):
    with pytest.raises(ValueError, match="size must be"):
        resize_patch_weight(torch.zeros(2, 3, 8, 8), size)
    with pytest.raises(ValueError, match="the patch of weight must be"):
        resize_patch_weight(torch.zeros(2, 3, 1, 1).expand(2, 3, 2**40, 1), (4, 4))


@every_backend
def test_resized_patches(backend):
    """method="patch": what a weight resized by hand gives image by image, with gradients, in the packing's order."""
    skip_rows_of_interpreter(backend)
    sizes, grids = [(12, 8), (16, 16), (12, 16), (6, 8)], [(3, 2), (2, 2), (3, 4), (1, 2)]
    inputs = make_inputs(sizes, grids, tail=2)
    tensors = [inputs[name].requires_grad_() for name in ("weight", "bias", "pos", "prefix")]
    ours = call(inputs, backend, method="patch")
    rows = []
    for image, grid in zip(inputs["images"], grids):
        alone = Packing.from_grids([grid], 1, menu=inputs["packing"].menu, device=DEVICE)
        weight = resize_patch_weight(inputs["weight"], (image.shape[1] // grid[0], image.shape[2] // grid[1]))
        rows.append(call(inputs, backend, images=[image], packing=alone, weight=weight))
    theirs = torch.cat([*rows, ours.new_zeros(2, 16)])
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad)):
        torch.testing.assert_close(a, b)
    batch = torch.stack([inputs["images"][0]] * 2)
    both = Packing.from_grids([(3, 2), (6, 4)], 1, device=DEVICE)
    assert call(inputs, backend, images=batch, packing=both, pos=None, method="patch").shape == (32, 16)


def test_weight_changed_in_place():
    """The layout kept for a parameter is not used once the parameter has changed."""
    inputs = make_inputs([(8, 8)], [(2, 2)])
    inputs["weight"] = torch.nn.Parameter(inputs["weight"])
    with torch.no_grad():
        before = patch_embed(**inputs)
        inputs["weight"].mul_(2)
        after = patch_embed(**inputs)
        fresh = patch_embed(**inputs | dict(weight=inputs["weight"].clone()))
    assert torch.equal(after, fresh) and not torch.equal(before, after)


def image(*shape, dtype=U8):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


WRONG = [
    (dict(images=[image(2, 8, 8)] * 2), r"expected images of 3 channels, got 2 \(images\[0\]\)"),
    (dict(images=image(2, 4, 8, 8)), r"expected images of 3 channels, got 4"),
    (dict(images=[image(3, 8, 8)]), "images must be as many as the packing's 2, got 1"),
    (dict(images=image(3, 8, 8)), r"images must be \(images, channels, height, width\) or a list"),
    (dict(images=[image(8, 8)] * 2), r"images\[0\] must be \(channels, height, width\), got \(8, 8\)"),
    (dict(images=[image(3, 8, 8), image(3, 0, 8)]), r"images\[1\] is empty: \(3, 0, 8\)"),
    (dict(images=[image(3, 8, 8, dtype=torch.float64)] * 2), "must be of one of .*uint8.*float32.*got torch.float64"),
    (dict(images=[image(3, 8, 8), image(3, 8, 8, dtype=F32)]), "all be of one dtype"),
    (dict(images=[image(3, 8, 8, dtype=F32).requires_grad_()] * 2), "no gradient for images"),
    (dict(images=[torch.zeros(3, 8, 8, device="meta")] * 2), r"one device, got images\[0\] on meta"),
    (dict(weight=torch.zeros(16, 3, 4, device=DEVICE)), r"weight must be \(dim, channels, patch_h, patch_w\)"),
    (dict(bias=torch.zeros(3, device=DEVICE)), r"bias must be \(16,\), got \(3,\)"),
    (dict(pos=torch.zeros(7, 16, device=DEVICE)), r"pos must be \(6, 16\), got \(7, 16\)"),
    (dict(pos=torch.zeros(6, 16, device=DEVICE).double()), "pos must be of the weight's dtype"),
    (dict(prefix=torch.zeros(2, 16, device=DEVICE)), r"prefix must be \(1, 16\), got \(2, 16\)"),
    (dict(mean=(0.5,)), "mean must be 3 numbers, one per channel, got 1"),
    (dict(std=(0.5, 0.5)), "std must be 3 numbers, one per channel, got 2"),
    (dict(std=(0.5, 0.0, 0.5)), "std must not be 0"),
    (dict(interpolation="lanczos"), "interpolation must be one of"),
    (dict(method="crop"), "method must be 'resize' or 'patch', got 'crop'"),
    (dict(method="patch"), r"images\[1\] of \(9, 7\) cannot be cut into \(2, 1\) patches of one size"),
    (dict(weight=torch.zeros(16, 3, 4, 4, device="meta")), "one device, got weight on meta"),
]


@pytest.mark.parametrize("change, sentence", WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_wrong_use(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        patch_embed(**(make_inputs([(8, 8), (9, 7)], [(2, 2), (2, 1)]) | change))


def test_resized_patches_need_grids():
    inputs = make_inputs([(8, 8)], [(2, 2)])
    packing = Packing.from_choice(torch.tensor([0], device=DEVICE), [(2, 2)], 1, capacity=5)
    with pytest.raises(ValueError, match="needs a packing whose grids the host knows"):
        patch_embed(**inputs | dict(packing=packing, method="patch"))
    with pytest.raises(ValueError, match=r"size must be \(patch_h, patch_w\), each from 1 to 16384"):
        resize_patch_weight(inputs["weight"], (0, 3))


# ---------------------------------------------------------------------- on a CPU, at inference: in one sweep


cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="packed weights are for CPUs")


def lasting(inputs):
    """The same with weights that outlive the call, as a model's do."""
    made = {name: inputs[name] for name in ("weight", "bias")}
    return inputs | {k: v if v is None else torch.nn.Parameter(v, requires_grad=False) for k, v in made.items()}


@pytest.fixture
def sweeps(monkeypatch):
    """How often the op ran in one sweep."""
    backend = dispatch.load("patch_embed", "cpu")
    if isinstance(backend, str):
        pytest.skip(backend)
    count, embed = [], backend._embed
    monkeypatch.setattr(backend, "_embed", lambda *args: count.append(1) or embed(*args))
    return count


@cpu_only
@every_dtype
@every_case
def test_one_sweep(sweeps, case, dtype):
    inputs = make_inputs(**case, dtype=dtype)
    with torch.no_grad():
        actual = patch_embed(**lasting(inputs), backend="cpu")
        exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        if images := inputs["images"]:
            exact["images"] = [image if image.dtype == U8 else image.double() for image in images]
        assert_close(
            "output", actual, patch_embed(**exact, backend="reference"), patch_embed(**inputs, backend="reference")
        )
    assert len(sweeps) == 1


@cpu_only
@every_dtype
@pytest.mark.parametrize("patch", [(4, 4), (3, 7)], ids=str)  # (3, 7): padded, to a multiple of 4 numbers
def test_one_sweep_does_not_depend_on_company_nor_threads(sweeps, dtype, patch):
    sizes, grids = [(12, 8), (100, 90), (5, 6), (33, 44)], [(3, 2), (14, 11), (3, 2), (5, 9)]
    inputs = lasting(make_inputs(sizes, grids, dtype, patch, dim=50, tail=5))
    together = call(inputs, "cpu")
    assert (together[-5:] == 0).all()
    for i, (image, rows) in enumerate(zip(inputs["images"], inputs["packing"].split(together))):
        some = Packing.from_grids([grids[i]], 1, menu=inputs["packing"].menu)
        assert torch.equal(call(inputs, "cpu", images=[image], packing=some), rows)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(call(inputs, "cpu"), together)
    finally:
        torch.set_num_threads(threads)
    assert len(sweeps) == 8


@cpu_only
def test_one_sweep_sees_a_changed_weight(sweeps):
    inputs = lasting(make_inputs([(12, 8)], [(3, 2)]))
    for name in ("weight", "bias", "pos", "prefix"):
        before = call(inputs, "cpu")
        inputs[name].data.add_(1)
        fresh = lasting({k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()})
        after = call(inputs, "cpu")
        assert not torch.equal(after, before) and torch.equal(after, call(fresh, "cpu")), name


def test_a_list_is_checked_by_its_kinds(monkeypatch):
    """One image unlike the others is named however many there are; those that are alike are looked at once."""
    images = [torch.rand(3, 8, 8, device=DEVICE) for _ in range(40)]
    weight, packing = torch.rand(8, 3, 4, 4, device=DEVICE), Packing.from_grids([(2, 2)] * 40, device=DEVICE)
    for wrong, message in (
        (images[0][0], r"images\[30\] must be \(channels, height, width\), got \(8, 8\)"),
        (images[0][:2], r"expected images of 3 channels, got 2 \(images\[30\]\)"),
        (images[0][:, :0], r"images\[30\] is empty"),
        (images[0].double(), r"images\[30\] must be of one of .* got torch.float64"),
        (images[0].byte(), r"one dtype, got torch.float32 and torch.uint8 \(images\[30\]\)"),
        (images[0].clone().requires_grad_(), r"images\[30\] requires grad"),
        (images[0].to("meta"), r"one device, got images\[30\] on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_embed([*images[:30], wrong, *images[31:]], weight, None, packing)
    looked = []
    monkeypatch.setattr(sys.modules[patch_embed.__module__], "one_device", lambda **tensors: looked.append(tensors))
    patch_embed(images, weight, None, packing)
    assert len(looked) < 3, "every image was looked at"
