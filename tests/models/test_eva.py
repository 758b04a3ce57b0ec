"""Models with rotary positions, beside what test_timm_zoo.py compares with timm."""

import copy

import pytest
import torch
from contract import DEVICE, assert_close, same
from timm_pairs import WHOLE, assert_near, batch, gradients, liven, make_timm, mixed, pair
from torch import func

import revit_kernels
from revit_kernels.engines import StaleEngine
from revit_kernels.models import adopt
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.eva import VarLenEva
from revit_kernels.models.registry import create_model
from revit_kernels.models.rotary import RotaryPositions, rows
from revit_kernels.packing import Packing

timm = pytest.importorskip("timm")
sincos = pytest.importorskip("timm.layers.pos_embed_sincos")

MENU = ((7, 5), (4, 8), (3, 3), (1, 6), (1, 1))
SMALL = dict(img_size=(80, 64), patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=5, use_rot_pos_emb=True)
NAMES = ["eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_rope_mixed_224"]
OPTIONS = {  # what an Eva may be beside the entries of timm's eva.py
    "cat in halves": dict(rope_rotate_half=True),
    "cat, offset and scaled": dict(rope_grid_offset=1.0, ref_feat_shape=(6, 9), rope_grid_indexing="xy"),
    "dinov3, neighbours": dict(rope_type="dinov3", rope_temperature=100, rope_grid_offset=0.25),
    "mrope": dict(rope_type="mrope"),
    "mrope, sections": dict(rope_type="mrope", rope_mrope_section=(4, 9, 5)),
    "mixed without a class": dict(rope_type="mixed", rope_temperature=10, class_token=False),
    "post-norm": dict(use_post_norm=True, scale_attn_inner=True, swiglu_mlp=True, scale_mlp=True),
    "apart": dict(qkv_fused=False, scale_attn_inner=True),
    "norms of q and k": dict(qk_norm=True, attn_type="rope", num_reg_tokens=2, no_embed_class=True),
    "grouped": dict(qkv_fused=False, attn_type="rope", num_kv_heads=1, qkv_bias=False),
    "no rotation": dict(use_rot_pos_emb=False, swiglu_mlp=True, swiglu_align_to=64, global_pool="avgmax"),
}


def timms(kind, head_dim=24, depth=2, num_heads=3, **kwargs):
    """timm's rotary embedding of this kind."""
    dim = head_dim * num_heads
    return sincos.create_rope_embed(
        kind, dim=dim, num_heads=num_heads, **({"depth": depth} if kind == "mixed" else {}), **kwargs
    )


@pytest.mark.parametrize(
    "kind, options",
    [
        ("cat", dict(in_pixels=False)),
        ("cat", dict(in_pixels=False, temperature=100.0, grid_indexing="xy", ref_feat_shape=(16, 12), grid_offset=1.0)),
        ("cat", dict(in_pixels=False, rotate_half=True)),
        ("dinov3", dict(temperature=100.0, rotate_half=True)),
        ("dinov3", dict(rotate_half=False, grid_indexing="xy", grid_offset=0.25)),
        ("mixed", dict(temperature=10.0)),
        ("mixed", dict(grid_indexing="ij")),
        ("mrope", {}),
        ("mrope", dict(mrope_section=(2, 4, 3), temperature=50.0)),
    ],
    ids=str,
)
def test_angles_of_every_grid_are_timms_at_that_grid(kind, options):
    theirs = timms(kind, **options)
    ours = adopt._adopt_rope(theirs)
    packing = Packing.from_grids(MENU, 2, menu=MENU)
    tables = ours(packing)
    starts = [0, *torch.tensor([h * w for h, w in MENU]).cumsum(0).tolist()]
    for grid, first, last in zip(MENU, starts, starts[1:]):
        sin, cos = theirs.get_embed(grid).chunk(2, -1)  # (cells, head_dim), or (depth, heads, cells, head_dim)
        every = slice(None, 12) if ours.half else slice(None, None, 2)
        for block, table in enumerate(tables):
            c, s = (t[block].transpose(0, 1) if kind == "mixed" else t for t in (cos, sin))
            torch.testing.assert_close(table.cos[first:last], c[..., every])
            torch.testing.assert_close(table.sin[first:last], s[..., every])


def test_rows_of_a_packing():
    packing = Packing.from_grids([(1, 2), (2, 2), (1, 2)], 1, menu=[(2, 2), (1, 2)], capacity=13)
    assert rows(packing).tolist() == [-1, 4, 5, -1, 0, 1, 2, 3, -1, 4, 5, -1, -1]
    on_device = Packing.from_choice(torch.tensor([1, 0, 1]), [(2, 2), (1, 2)], 1, capacity=13)
    assert torch.equal(rows(on_device), rows(packing))
    assert rows(Packing.from_grids([], 1, capacity=3)).tolist() == [-1] * 3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_that_no_entry_has(options):
    theirs = liven(timm.models.eva.Eva(**SMALL | options, dynamic_img_size=True)).to(DEVICE).eval()
    ours = VarLenEva.from_timm(theirs)
    assert_near("dense", ours(batch(theirs)), theirs(batch(theirs)))
    images = mixed(theirs)
    assert_near("mixed", ours(images), torch.cat([theirs(image[None]) for image in images]))
    made = VarLenEva(**SMALL | options, weight_init="skip").to(DEVICE).eval()
    made.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(made.state_dict(), strict=True)
    assert_near("made", made(batch(theirs)), theirs(batch(theirs)))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_answers_the_same_in_any_batch(name, dtype):
    _, ours = pair(name)
    ours, images = ours.to(dtype), [image.to(dtype) for image in mixed(ours)]
    together = ours(images)
    for i, image in enumerate(images):
        same(ours([image])[0], together[i])
    same(ours(images[::-1]), together.flip(0))


def test_training_draws_coordinates_as_timm_does():
    """One draw of each kind a call, in timm's order; none in eval."""
    options = dict(rope_type="dinov3", rope_shift_coords=0.3, rope_jitter_coords=1.2, rope_rescale_coords=2.0)
    theirs = liven(timm.models.eva.Eva(**SMALL | options, dynamic_img_size=True)).to(DEVICE)
    ours = VarLenEva.from_timm(theirs)

    def answer(model, training):
        torch.manual_seed(3)
        return model.train(training)(batch(theirs))

    drawn = answer(ours, True)
    assert_near("training", drawn, answer(theirs, True))
    assert_near("eval", answer(ours, False), answer(theirs, False))
    assert (drawn - answer(ours, False)).abs().max() > 1e-2


def test_grad_checkpointing_changes_nothing():
    _, ours = pair("vit_small_patch16_rope_mixed_224")
    images = mixed(ours)
    plain = gradients(ours, ours(images))
    ours.set_grad_checkpointing()
    for name, grad in gradients(ours, ours(images)).items():
        assert torch.equal(grad, plain[name]), name


def test_made_resizable_it_trains_at_every_length():
    """A step's loss and gradients are those of a plain loop over its images, each at each length."""
    menu = [(5, 4), (3, 3), (2, 2)]
    theirs = make_timm("vit_small_patch16_dinov3", depth=2, img_size=(80, 64), num_classes=5)
    model = VarLenEva.from_timm(theirs).make_resizable(menu).train()
    assert sum("shorter_weight" in name for name in model.state_dict()) == 5  # two norms a block, and the last
    images = batch(theirs, 2)
    at_all = [image for image in images for _ in menu]
    together = model(at_all, grids=menu * 2)
    apart = torch.cat([model([image], grids=[grid]) for image, grid in zip(at_all, menu * 2)])
    assert_near("answers", together, apart)
    expected = gradients(model, apart)
    for name, grad in gradients(model, together).items():
        scale = expected[name].abs().max().item()
        assert_near(name, grad, expected[name], scale=scale)


@torch.no_grad()
@pytest.mark.parametrize("given", [True, False], ids=["grids", "no grids"])
def test_a_list_is_compiled_as_one_graph(given):
    _, ours = pair("vit_tiny_patch16_dinov3_qkvb")
    run = torch.compile(ours, fullgraph=True, backend="eager")
    for grids in ([(3, 5), (6, 2)], [(2, 2), (5, 4)]):
        options = {"grids": grids} if given else {}
        assert_near("list", run(mixed(ours, grids), **options), ours(mixed(ours, grids), **options))
    torch._dynamo.reset()


@pytest.mark.skipif(WHOLE, reason="its sizes are those of the small model")
@torch.no_grad()
def test_features_masks_and_engines():
    theirs, ours = pair("vit_small_patch16_dinov3", dynamic_img_size=True)
    x = batch(theirs)
    for expected, actual in zip(theirs.forward_intermediates(x, 2)[1], ours.forward_intermediates(x, 2)[1]):
        assert_near("intermediates", actual, expected)
    mask = torch.zeros(25, 25, device=DEVICE)
    mask[:, 7] = -torch.inf
    assert_near("mask", ours(x, mask), theirs(x, mask))
    images = mixed(theirs)
    engine = ours.engine()
    assert torch.equal(engine(images), ours(images))
    stream = ours.run_blocks([ours.embed(images, packing := packing_of(ours, images)), None, None], packing, 0, 1)
    same(ours.finish(ours.run_blocks(stream, packing, 1), packing), ours(images))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_engine_runs_every_option(options, dtype):
    """In one call on a CPU, but for post-norm blocks; in parts and at lengths of a menu as well."""
    ours = liven(VarLenEva(**SMALL | options)).to(DEVICE, dtype).eval()
    images = [image.to(dtype) for image in mixed(ours)]
    if options.get("global_pool") != "avgmax":
        ours.make_resizable([(5, 4), (2, 3)])
    engine = ours.engine()
    assert engine.refusal is None or "use_post_norm" in options or DEVICE != "cpu"
    wanted = ours(images)
    exact = copy.deepcopy(ours).double()([image.double() for image in images])
    assert_close("answers", engine(images), exact, wanted)
    alone = torch.cat([engine([image]) for image in images])
    same(alone, engine(images))
    packing = packing_of(ours, images)
    stream = engine.run_blocks([engine.embed(images, packing), None, None], packing, 0, 1)
    same(engine.finish(engine.run_blocks(stream, packing, 1), packing), engine(images))


@torch.no_grad()
@pytest.mark.skipif(DEVICE != "cpu", reason="packed engines are for CPUs")
def test_an_engine_keeps_tables_until_it_is_refreshed():
    _, ours = pair("vit_small_patch16_rope_mixed_224", dynamic_img_size=True)
    images, made = mixed(ours), []
    engine = ours.engine()
    tables = RotaryPositions.tables
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RotaryPositions, "tables", lambda *args: made.append(args[1]) or tables(*args))
        before = engine(images)
        assert torch.equal(engine(images), before) and len(made) == 1
        engine([images[0]])
        assert len(made) == 2
        engine.refresh()
        engine(images)
        assert len(made) == 3
        ours.rope.freqs.mul_(1.5)
        with pytest.raises(StaleEngine):
            engine(images)
        engine.refresh()
        assert not torch.equal(engine(images), before) and torch.equal(engine(images), ours(images))


@torch.no_grad()
@pytest.mark.skipif(DEVICE != "cpu", reason="packed engines are for CPUs")
@pytest.mark.parametrize("name", [*NAMES, "eva02_base_patch14_224", "vit_base_patch16_sapiens2"])
def test_int8(name):
    ours = pair(name, dynamic_img_size=True)[1].to(torch.bfloat16)
    images = [image.to(torch.bfloat16) for image in mixed(ours)]
    try:
        engine = ours.engine(quantize="int8")
    except NotImplementedError as why:
        assert "AVX512" in str(why)
        pytest.skip(str(why))
    plain, answers = ours(images).float(), engine(images).float()
    assert not torch.equal(answers, plain) and (answers - plain).norm() <= 0.1 * plain.norm()
    assert torch.equal(engine(images[:1]), engine(images)[:1])


def packing_of(model, images):
    size = model.patch_embed.patch_size[0]
    grids = [tuple(n // size for n in image.shape[1:]) for image in images]
    return Packing.from_grids(grids, model.num_prefix_tokens, device=DEVICE)


def test_from_timm_by_its_public_name():
    theirs = make_timm("vit_tiny_patch16_dinov3_qkvb", depth=1)
    ours = revit_kernels.from_timm(theirs)
    assert isinstance(ours, VarLenEva) and ours.blocks[0].attn.qkv is theirs.blocks[0].attn.qkv
    assert ours.no_weight_decay() >= {"cls_token", "reg_token"}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(rope_type="base"), ValueError, r"kind of rotary positions must be one of \('cat', 'dinov3'"),
        (dict(num_heads=64), ValueError, "need a head_dim that is a multiple of 4, got 2"),
        (dict(embed_dim=66), ValueError, "need a head_dim that is a multiple of 4, got 33"),
        (dict(rope_type="mixed", rope_rotate_half=True), ValueError, "half must be False"),
        (dict(rope_type="mrope", rope_grid_indexing="xy"), ValueError, "'ij' for mrope, got 'xy'"),
        (dict(patch_drop_rate=0.5), NotImplementedError, "patch_drop_rate beside rotary positions"),
        (dict(attn_type="none"), ValueError, r"attn_type must be one of \['eva', 'rope'\]"),
        (dict(num_kv_heads=1), ValueError, "num_kv_heads below num_heads needs"),
        (dict(num_kv_heads=(1, 2, 2)), ValueError, "one number for each of 2 blocks, got 3"),
        (dict(use_post_norm=True, qk_norm=True), ValueError, "use_post_norm goes with neither"),
        (dict(global_pool="prr"), ValueError, "global_pool must be one of"),
        (dict(weight_init="jax"), ValueError, "weight_init must be '' or 'skip'"),
    ],
    ids=str,
)
def test_wrong_use(change, error, message):
    with pytest.raises(error, match=message):
        VarLenEva(**SMALL | change)


def test_blocks_of_others_are_refused_beside_rotary_positions():
    ours = VarLenEva(**SMALL).eval()
    ours.blocks[1] = torch.nn.TransformerEncoderLayer(128, 2, 128)
    with pytest.raises(ValueError, match="need the model's own blocks, got TransformerEncoderLayer"):
        ours(torch.zeros(1, 3, 80, 64))
    theirs = sincos.RotaryEmbeddingCat(24, in_pixels=True)
    with pytest.raises(NotImplementedError, match="RotaryEmbeddingCat normalizes its positions"):
        adopt._adopt_rope(theirs)


def test_saved_and_read_again(tmp_path):
    made = liven(create_model("vit_small_patch16_dinov3", depth=2, num_classes=5))
    made.make_resizable([(5, 4), (2, 2)])
    save_checkpoint(made, tmp_path / "eva.safetensors")
    again = create_model(str(tmp_path / "eva.safetensors"))
    assert isinstance(again, VarLenEva) and again.menu == made.menu
    for key, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(name, backend):
    if backend == "inductor" and name != NAMES[0]:
        pytest.skip("one model shows it: compiling takes long")
    _, ours = pair(name, dynamic_img_size=True)
    x, compiled = batch(ours), torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), ours(x))


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "eva02_base_patch16_clip_224"])
def test_export_of_any_batch_of_one_size(name):
    theirs, ours = pair(name, dynamic_img_size=True)
    program = torch.export.export(ours, (batch(theirs),), dynamic_shapes={"x": {0: torch.export.Dim("images")}})
    assert not [n for n in program.graph.nodes if "revit_kernels" in str(n.target)]
    for count in (1, 3):
        assert_near("exported", program.module()(batch(theirs, count)), theirs(batch(theirs, count)))
    with pytest.raises(NotImplementedError, match="a model with rotary positions, is traced and exported for images"):
        torch.fx.symbolic_trace(ours)


@torch.no_grad()
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "the older exporter"])
def test_onnx(dynamo, tmp_path):
    """By the newer exporter for any number of images."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    theirs, ours = (model.cpu() for model in pair(NAMES[1], dynamic_img_size=True))
    x, path = batch(theirs).cpu(), str(tmp_path / "model.onnx")
    shapes = {"dynamic_shapes": {"x": {0: torch.export.Dim("images")}}} if dynamo else {}
    torch.onnx.export(ours, (x,), path, dynamo=dynamo, verbose=False, input_names=["x"], **shapes)
    session = runtime.InferenceSession(path)
    for images in (x, x.flip(0), *([x[:1], x.repeat(2, 1, 1, 1)] if dynamo else [])):
        (found,) = session.run(None, {"x": images.numpy()})
        assert_near("ONNX", torch.from_numpy(found), theirs(images))


def test_gradients_per_sample():
    theirs, ours = pair(NAMES[1])
    parameters = {k: v.detach() for k, v in ours.named_parameters()}

    def loss(parameters, image):
        return func.functional_call(ours, parameters, (image[None],)).square().sum()

    found = func.vmap(func.grad(loss), (None, 0))(parameters, batch(theirs))
    for i, image in enumerate(batch(theirs)):
        expected = torch.autograd.grad(theirs(image[None]).square().sum(), list(theirs.parameters()))
        for (name, _), wanted in zip(theirs.named_parameters(), expected):
            assert_near(name, found[name][i], wanted, scale=wanted.abs().max().item())


@torch.no_grad()
def test_grids_chosen_on_the_device():
    _, ours = pair("vit_small_patch16_dinov3")
    menu, size = [(5, 4), (2, 3)], ours.patch_embed.patch_size[0]
    choice = torch.tensor([1, 0, -1, 1], device=DEVICE)
    images = [torch.randn(3, size * h, size * w, device=DEVICE) for h, w in [menu[max(c, 0)] for c in choice.tolist()]]
    packing = Packing.from_choice(choice, menu, ours.num_prefix_tokens, capacity=70)
    answers = ours(images, packing=packing)
    assert not answers[2].any()
    same(answers[[0, 1, 3]], ours([images[i] for i in (0, 1, 3)], grids=[menu[i] for i in (1, 0, 1)]))
