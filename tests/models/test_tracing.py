"""What other tools make of a model: exported, traced, transformed, compiled, counted."""

import inspect
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from contract import DEVICE
from timm_pairs import assert_near, batch, make_timm, mixed, pair, small_kwargs
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from revit_kernels import VarLenViT, create_model, ops
from revit_kernels.models.resizable import _weights
from revit_kernels.ops.pos_embed.interpolation import MODES, matrix
from revit_kernels.packing import Packing

POOLS = ["token", "avg", "max", "avgmax"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit3", "deit_tiny_distilled_patch16_224"])
def test_per_sample_gradients(name):
    theirs, ours = pair(name)
    x, found = batch(theirs), []
    for model in (theirs, ours):
        parameters = {k: v.detach() for k, v in model.named_parameters()}

        def loss(parameters, image, model=model):
            return functional_call(model, parameters, (image[None],)).square().sum()

        per_sample = vmap(grad(loss), (None, 0))(parameters, x)
        whole = grad(lambda p, model=model: functional_call(model, p, (x,)).square().sum())(parameters)
        found.append((per_sample, whole))
    for theirs, ours in zip(*found):
        for key, expected in theirs.items():
            assert_near(key, ours[key], expected, scale=expected.abs().max().item())


@torch.no_grad()
def test_images_get_the_dtype_of_the_weights():
    _, ours = pair()
    x, ours = batch(ours), ours.double()
    assert_near("vmap", vmap(lambda image: ours(image[None])[0])(x), ours(x))


def test_transforms_refuse_a_list():
    _, ours = pair()
    images = mixed(ours)
    with pytest.raises(NotImplementedError, match="take a dense batch"):
        grad(lambda w: functional_call(ours, {"head.weight": w}, (images,)).sum())(ours.head.weight.detach())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit3", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_any_batch_and_size(name, strict):
    theirs, ours = pair(name, dynamic_img_size=True)
    h, w = theirs.patch_embed.patch_size
    rows, columns = torch.export.Dim("rows", min=2, max=16), torch.export.Dim("columns", min=2, max=16)
    shapes = {"x": {0: torch.export.Dim("images", min=1, max=64), 2: h * rows, 3: w * columns}}
    program = torch.export.export(ours, (batch(theirs),), dynamic_shapes=shapes, strict=strict)
    assert not [n for n in program.graph.nodes if "revit_kernels" in str(n.target)]
    for count, grid in ((3, theirs.patch_embed.grid_size), (1, (2, 7)), (2, (9, 3))):
        x = torch.randn(count, theirs.in_chans, grid[0] * h, grid[1] * w, device=DEVICE)
        assert_near(f"{count} images of {grid}", program.module()(x), theirs(x))


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_export_refuses_a_list(strict):
    _, ours = pair()
    refused = torch._dynamo.exc.Unsupported if strict else NotImplementedError
    for options in ({}, {"grids": [(2, 3)] * 2}, {"max_tokens": 9}):
        with pytest.raises(refused, match=r"torch.export.* take a dense batch"):
            torch.export.export(ours, (list(batch(ours)),), options, strict=strict)
    with pytest.raises(refused, match=r"torch.export.* take a dense batch"):
        torch.export.export(ours, (batch(ours),), {"grids": [(2, 3)] * 2}, strict=strict)


@torch.no_grad()
@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_export_of_rotary_positions(name):
    """Of any number of images of one size; sizes that vary are refused."""
    _, ours = pair(name)
    x, h = batch(ours), ours.patch_embed.patch_size[0]
    images = {0: torch.export.Dim("images", min=1, max=64)}
    program = torch.export.export(ours, (x,), dynamic_shapes={"x": images}, strict=False)
    assert_near("5 images", program.module()(batch(ours, 5)), ours(batch(ours, 5)))
    shapes = {"x": images | {2: h * torch.export.Dim("rows", min=2, max=16)}}
    for strict, error in ((False, NotImplementedError), (True, torch._dynamo.exc.Unsupported)):
        with pytest.raises(error, match="is traced and exported for images of one size"):
            torch.export.export(ours, (x,), dynamic_shapes=shapes, strict=strict)


@torch.no_grad()
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "the older exporter"])
def test_onnx(dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    openvino = pytest.importorskip("openvino")
    theirs, ours = pair(dynamic_img_size=True)
    theirs, ours, x, path = theirs.cpu(), ours.cpu(), batch(theirs).cpu(), str(tmp_path / "model.onnx")
    (h, w), sizes = theirs.patch_embed.patch_size, [theirs.patch_embed.grid_size]
    shapes = {"dynamic_axes": {"x": {0: "images"}}, "input_names": ["x"]}
    if dynamo:
        rows, columns = torch.export.Dim("rows", min=2, max=16), torch.export.Dim("columns", min=2, max=16)
        shapes = {"dynamic_shapes": {"x": {0: torch.export.Dim("images"), 2: h * rows, 3: w * columns}}}
        sizes += [(2, 7), (9, 3)]
    torch.onnx.export(ours, (x,), path, dynamo=dynamo, verbose=False, **shapes)
    session = runtime.InferenceSession(path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count, grid in zip((3, 1, 2), sizes):
        x = torch.randn(count, theirs.in_chans, grid[0] * h, grid[1] * w)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_near(f"{count} images of {grid}", torch.from_numpy(found), theirs(x))
        assert_near(f"{count} images of {grid} in OpenVINO", torch.from_numpy(compiled(x.numpy())[0]), theirs(x))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_interpolation_by_elementary_steps(mode, antialias):
    like = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    for source, target in product((1, 2, 3, 7), (1, 2, 5, 7, 29)):
        expected = torch.from_numpy(matrix(source, target, mode, antialias)).to(DEVICE)
        torch.testing.assert_close(_weights(source, target, mode, antialias, like), expected)


@torch.no_grad()
def test_torch_script(tmp_path):
    """Refused; a trace holds for any number of images of its size, wherever torch is, and for no other size."""
    theirs, ours = pair(dynamic_img_size=True)
    mlp = ours.blocks[0].mlp
    for part in (ours, torch.nn.Sequential(*ours.blocks), mlp, ours.patch_embed, torch.fx.symbolic_trace(ours)):
        with pytest.raises(NotImplementedError, match="TorchScript is deprecated"):
            torch.jit.script(part)
    x, (h, w) = batch(theirs, 3), theirs.patch_embed.img_size
    traced = torch.jit.trace(ours, batch(theirs))
    assert_near("traced", traced(x), theirs(x))
    assert_near("frozen", torch.jit.optimize_for_inference(torch.jit.freeze(traced.eval()))(x), theirs(x))
    for size in ((h // 2, w * 2), (h, w // 2), (1, w)):
        with pytest.raises(RuntimeError, match="don't multiply up to the size of dim"):
            traced(x.new_zeros(1, 3, *size))
    path, answers = tmp_path / "trace.pt", tmp_path / "answers.pt"
    traced.cpu().save(path)
    torch.save((x.cpu(), theirs(x).cpu()), answers)
    code = "x, y = torch.load(sys.argv[2]); torch.testing.assert_close(torch.jit.load(sys.argv[1])(x), y)"
    subprocess.run([sys.executable, "-c", f"import sys, torch; {code}", path, answers], check=True, timeout=300)


@pytest.mark.parametrize("how", ["trace", "export", "fx", "func"])
def test_an_engine_is_not_traced(how):
    _, ours = pair()
    x, engine = batch(ours), ours.engine()

    class Outer(torch.nn.Module):
        def forward(self, x):
            return engine(x)

    calls = {
        "trace": lambda: torch.jit.trace(Outer(), x),
        "export": lambda: torch.export.export(Outer(), (x,)),
        "fx": lambda: torch.fx.symbolic_trace(Outer()),
        "func": lambda: grad(lambda x: engine(x).sum())(x),
    }
    with pytest.raises(NotImplementedError, match="an engine is not traced, exported or transformed"):
        calls[how]()


def test_forward_mode_derivatives():
    theirs, ours = pair()
    for model in (theirs, ours):
        for block in model.blocks:
            block.attn.fused_attn = False  # PyTorch's fused attention has none on CPUs
    x, found = batch(theirs), []
    for model in (theirs, ours):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent)
    assert_near("along the image", found[1], found[0])


FX = {
    "vit_tiny_patch16_224": "attn.proj",
    "test_vit3": "attn.proj",
    "vit_pwee_patch16_reg1_gap_256": "in_proj",
    "vit_dpwee_patch16_reg1_gap_256": "in_proj",
    "vit_dwee_patch16_reg1_gap_256": "attn.proj",
}


@torch.no_grad()
@pytest.mark.parametrize("name, inside", FX.items(), ids=list(FX))
def test_torch_fx(name, inside):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    theirs, ours = (m.eval() for m in pair(name))
    nodes = [f"blocks.0.{inside}", "blocks.1", "norm"]
    found = [extraction.create_feature_extractor(m, nodes)(batch(theirs)) for m in (ours, theirs)]
    for node in nodes:
        assert_near(node, found[0][node], found[1][node])
    graph = torch.fx.symbolic_trace(ours)
    assert_near("answers", graph(batch(theirs)), theirs(batch(theirs)))
    for same in (graph, pickle.loads(pickle.dumps(graph)), torch.fx.symbolic_trace(graph)):
        assert torch.equal(same(batch(theirs)), graph(batch(theirs)))
        with pytest.raises(ValueError, match="takes a dense batch"):
            same(batch(theirs), grids=[(1, 1)] * 2)


@torch.no_grad()
@pytest.mark.parametrize("method", ["hook", "fx"])
def test_timms_attention_maps(method):
    from timm.utils.attention_extract import AttentionExtract

    theirs, ours = pair()
    for model in (theirs, ours):
        for block in model.blocks:
            block.attn.fused_attn = False
    x = batch(theirs)
    found, wanted = (AttentionExtract(m, method=method)(x) for m in (ours, theirs))
    assert len(wanted) == len(found) == 2
    for a, b in zip(found.values(), wanted.values()):
        assert_near("maps", a, b)


@torch.no_grad()
def test_attention_maps_of_each_image():
    theirs, ours = pair(dynamic_img_size=True)
    for block in theirs.blocks:
        block.attn.fused_attn = False
    images, wanted = mixed(theirs), []
    for block in theirs.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: wanted.append(out[0]))
    expected = torch.cat([theirs(image[None]) for image in images])
    ours = VarLenViT.from_timm(make_timm("vit_tiny_patch16_224", **small_kwargs("vit_tiny_patch16_224")))
    maps = ours.attention_maps(images)
    assert [len(of_block) for of_block in maps] == [len(images)] * 2
    for i in range(len(images)):
        for block, of_block in enumerate(maps):
            assert_near(f"image {i}, block {block}", of_block[i], wanted[2 * i + block])
    assert all(block.attn.fused_attn for block in ours.blocks)
    assert_near("afterwards", ours(images), expected)
    assert [len(m) for m in ours.attention_maps(batch(ours))] == [2, 2]


@torch.no_grad()
def test_attention_maps_beside_other_threads():
    """Each thread gets its own images' maps; the others' answers, and engines that watch the model, see nothing."""
    _, ours = pair(dynamic_img_size=True)
    images, engine = mixed(ours), ours.engine()
    answers, of_engine, maps = ours(images), engine(images), [ours.attention_maps([image]) for image in images]

    @torch.no_grad()
    def call(i):
        if i % 2:
            return torch.equal(ours(images), answers) and torch.equal(engine(images), of_engine)
        of_blocks, wanted = ours.attention_maps([images[i % 5]]), maps[i % 5]
        return all(len(seen) == 1 and torch.equal(seen[0], one[0]) for seen, one in zip(of_blocks, wanted))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(60)))


@torch.no_grad()
def test_no_attention_maps_of_compiled_blocks():
    _, ours = pair()
    ours.blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match="gives no attention maps"):
        ours.attention_maps(batch(ours))


@torch.no_grad()
def test_blocks_that_are_compiled_run_so():
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    theirs, ours = pair(dynamic_img_size=True)
    images = mixed(ours)
    for block in ours.blocks:
        block.compile(backend="eager")
    for name, call in (
        ("a dense batch", lambda: (ours(batch(ours)), theirs(batch(ours)))),
        ("a list", lambda: (ours(images), torch.cat([theirs(image[None]) for image in images]))),
    ):
        dynamo.reset()
        counters.clear()
        assert_near(name, *call())
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@torch.no_grad()
def test_compiled_lists_know_no_size():
    """One graph for the first sizes, one for all others."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    theirs, ours = pair(dynamic_img_size=True)
    dynamo.reset()
    counters.clear()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        sizes = torch.randint(20, 300, (3, 2), generator=generator).tolist()
        images = [torch.randn(3, *size, generator=generator).to(DEVICE) for size in sizes]
        assert_near(str(sizes), compiled(images), ours(images))
        assert_near(f"{sizes}, 6 patches", compiled(images, max_tokens=6), ours(images, max_tokens=6))
    assert counters["stats"]["unique_graphs"] <= 4  # of each limit two
    one = [torch.randn(3, 96, 96, device=DEVICE)]
    assert_near("one image", compiled(one), ours(one))
    assert_near("one image on its grid", compiled(one, grids=[(6, 6)]), theirs(one[0][None]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit3"])
def test_compiled_dense_batches_know_no_size(name, training):
    """A graph for the first size, others as the images, rows and columns are seen to vary, one for a single image."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    _, ours = pair(name, dynamic_img_size=True)
    dynamo.reset()
    counters.clear()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    h, w = ours.patch_embed.patch_size
    for count, rows, columns in (
        (2, 4, 6),
        (3, 4, 6),
        (3, 5, 6),
        (4, 7, 4),
        (5, 2, 3),
        (1, 4, 4),
        (6, 9, 9),
        (2, 9, 2),
    ):
        x = torch.randn(count, 3, h * rows, w * columns, device=DEVICE)
        with torch.set_grad_enabled(training):
            assert_near(str(tuple(x.shape)), compiled(x), ours(x))
    assert counters["stats"]["unique_graphs"] <= 5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit3"])
def test_flops_of_a_mixed_batch(name):
    """Those of the images one by one."""
    theirs, ours = pair(name, dynamic_img_size=True)
    images = mixed(theirs)

    def count(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_flop_counts()["Global"]

    for recording in (False, True):
        ours.requires_grad_(recording)  # torch's counter stumbles over views of parameters in no_grad
        with torch.set_grad_enabled(recording):
            together = count(lambda: ours(images))
            alone = [count(lambda image=image: ours([image])) for image in images]
        for op, flops in together.items():
            if ours.attn_pool is None or "revit_kernels" in str(op):  # the query of all images is projected once
                assert flops == sum(counts.get(op, 0) for counts in alone), op
    lengths = [ours.num_prefix_tokens + h * w for h, w in ours.forward_features(images).packing.grids]
    attention = {k: v for k, v in together.items() if "attention" in str(k) and "revit" in str(k)}
    blocks = 4 * ours.embed_dim * len(ours.blocks) * sum(n * n for n in lengths)
    skipped = 0 if ours.pool_include_prefix else ours.num_prefix_tokens
    pool = 4 * ours.embed_dim * sum(n - skipped for n in lengths) if ours.attn_pool is not None else 0
    assert sum(attention.values()) == blocks + pool


def test_flops_of_the_ops():
    q, cu_seqlens = torch.randn(12, 2, 16, device=DEVICE, requires_grad=True), torch.tensor([0, 3, 12], device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        ops.attention(q, q, q, cu_seqlens.int(), 9).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * (9 + 81) * 2 * 16
    weight, packing = torch.randn(8, 3, 4, 4, device=DEVICE), Packing.from_grids([(2, 3), (1, 1)], 1, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        ops.patch_embed([torch.randn(3, 9, 9, device=DEVICE)] * 2, weight, None, packing)
    assert counter.get_total_flops() == 2 * 7 * 8 * 48


@torch.no_grad()
def test_torchinfo():
    torchinfo = pytest.importorskip("torchinfo")
    theirs, ours = pair()
    found, wanted = (torchinfo.summary(m, input_data=batch(theirs), verbose=0) for m in (ours, theirs))
    assert found.total_params == wanted.total_params and found.total_mult_adds == wanted.total_mult_adds
    assert [i.output_size for i in found.summary_list] == [i.output_size for i in wanted.summary_list]


@torch.no_grad()
def test_a_global_hook_sees_every_module():
    from torch.nn.modules.module import register_module_forward_hook

    theirs, ours = pair(dynamic_img_size=True)
    x, images, seen = batch(theirs), mixed(theirs), []
    engine, expected = ours.engine(), [theirs(image[None]) for image in images]
    for call in (lambda: theirs(x), lambda: ours(x), lambda: engine(x), lambda: ours(images)):
        names = []
        handle = register_module_forward_hook(lambda module, *_, names=names: names.append(type(module).__name__))
        try:
            out = call()
        finally:
            handle.remove()
        seen.append(sorted(set(names)))
    assert_near("mixed", out, torch.cat(expected))
    assert [name.replace("VarLenViT", "VisionTransformer") for name in seen[1]] == seen[0]
    assert seen[2] == seen[1]
    assert set(seen[1]) - set(seen[3]) == {"PatchEmbed", "Sequential"} - set(seen[3])


@torch.no_grad()
def test_photographs_and_arrays():
    image = pytest.importorskip("PIL.Image")
    _, ours = pair()
    pixels = torch.randint(256, (70, 50, 3), dtype=torch.uint8)
    photograph, wanted = image.fromarray(pixels.numpy()), ours([pixels.permute(2, 0, 1).to(DEVICE)])
    assert torch.equal(ours([photograph]), wanted)
    assert torch.equal(ours([photograph.convert("RGBA")], channels_last=True), wanted)
    assert torch.equal(ours([pixels.numpy()], channels_last=True), wanted)
    assert torch.equal(ours(pixels.permute(2, 0, 1)[None].numpy(), grids=[(4, 3)]), ours([photograph], grids=[(4, 3)]))
    assert torch.equal(ours.engine()([photograph, photograph])[1:], ours.engine()([photograph]))


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit3", "vit_small_patch16_dinov3"])
def test_images_without_values(name, recording):
    _, ours = pair(name, **({} if "dino" in name else {"dynamic_img_size": True}))
    x, images, ours = batch(ours).to("meta"), [image.to("meta") for image in mixed(ours)], ours.to("meta")
    with torch.set_grad_enabled(recording):
        assert ours(x).shape == (2, 5) and ours(images).shape == (len(images), 5) and ours(images).is_meta
        assert ours(images, grids=[(1, 2)] * len(images)).requires_grad == recording


def test_nested_tensors_are_refused_by_name():
    _, ours = pair()
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.randn(3, 64, 64), torch.randn(2, 64, 64)], layout=layout)
        with pytest.raises(ValueError, match="a nested tensor is not taken"):
            ours(nested.to(DEVICE))


def test_numbers_of_numpy():
    model = create_model("vit_tiny_patch16_224", img_size=np.int64(64), patch_size=np.int64(8), depth=np.int64(2))
    assert model.patch_embed.grid_size == (8, 8) and type(model.patch_embed.patch_size[0]) is int
    assert len(model.forward_intermediates(torch.randn(1, 3, 64, 64), np.int64(1), intermediates_only=True)) == 1
    assert model([torch.randn(3, 64, 64)], grids=[(np.int64(2), np.int64(3))], max_tokens=None).shape == (1, 1000)
    assert model([torch.randn(3, 64, 64)], max_tokens=np.int64(5)).shape == (1, 1000)


@torch.no_grad()
def test_timms_arguments_of_create_model(monkeypatch):
    name, small = "vit_tiny_patch16_224", {"depth": 3, "img_size": 32}
    x = torch.randn(2, 3, 32, 32)
    features = create_model(name, features_only=True, out_indices=(0, 2), feature_cls="getter", **small)
    assert features.feature_info.channels() == [192, 192]
    assert [f.shape for f in features(x)] == [(2, 192, 2, 2)] * 2
    assert create_model(name, exportable=True, cache_dir="/nowhere", **small)(x).shape == (2, 1000)
    overlay = {"num_classes": 7, "mean": (0.1, 0.2, 0.3), "input_size": (3, 48, 48)}
    model = create_model(name, pretrained_cfg_overlay=overlay, depth=1)
    assert model.pretrained_cfg["mean"] == overlay["mean"] and model.head.out_features == 7
    assert model.patch_embed.img_size == (48, 48)
    model = create_model(name, False, overlay, None, no_jit=True, depth=1)
    assert model.pretrained_cfg["mean"] == overlay["mean"] and model.head.out_features == 7
    model = create_model(model_name=name, pretrained_cfg="augreg_in21k", depth=1)
    assert model.pretrained_cfg["tag"] == "augreg_in21k" and model.head.out_features == 21843
    with pytest.raises(ValueError, match=r"has a tag of its own: leave out pretrained_cfg='augreg_in21k'"):
        create_model(f"{name}.augreg_in21k_ft_in1k", pretrained_cfg="augreg_in21k")
    timm = pytest.importorskip("timm")
    names = list(inspect.signature(timm.create_model).parameters)[:-1]
    assert list(inspect.signature(create_model).parameters)[: len(names)] == names
    with pytest.raises(NotImplementedError, match="TorchScript is deprecated"):
        create_model(name, scriptable=True)
    monkeypatch.setitem(sys.modules, "timm.models._features", None)
    with pytest.raises(ValueError, match=r"use model\.forward_intermediates"):
        create_model(name, features_only=True, **small)
