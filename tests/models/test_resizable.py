"""make_resizable: a VarLenViT that knows a menu of lengths, its affines, embeddings, positions and files."""

import copy
import itertools

import pytest
import torch
from contract import DEVICE, same

from revit_kernels import Packing, VarLenViT, create_model
from revit_kernels.models.checkpoints import fingerprint, load_checkpoint, save_checkpoint
from revit_kernels.models.resizable import EMBEDDINGS, NORMS, POSITIONS
from revit_kernels.modules.layer_norm import LengthLayerNorm
from revit_kernels.modules.lengths import cells, weights

MENU = ((6, 6), (4, 4), (3, 2))
SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def make(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return create_model(name, **SMALL | kwargs).to(DEVICE).eval()


def liven(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def images(count=6, size=48):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator).to(DEVICE)


MIXED = [MENU[i] for i in (2, 0, 1, 1, 2, 0)]


@pytest.mark.parametrize("embedding, positions, norms", list(itertools.product(EMBEDDINGS, POSITIONS, NORMS)))
def test_mixed_batch_equals_one_length_at_a_time(embedding, positions, norms):
    model = liven(make().make_resizable(MENU, embedding, positions, norms))
    x = images()
    with torch.inference_mode():
        together = model(x, grids=MIXED)
        for i, grid in enumerate(MIXED):
            same(model(x[i : i + 1], grids=[grid])[0], together[i])


@pytest.mark.parametrize("embedding", ["resize", "per_length"])
def test_starts_as_the_plain_model(embedding):
    plain = liven(make())
    x = images()
    with torch.inference_mode():
        expected = plain(x, grids=[MENU[0]] * 6), plain(x, grids=MIXED)
        model = plain.make_resizable(MENU, embedding, positions="per_length")
        assert torch.equal(model(x, grids=[MENU[0]] * 6), expected[0])
        if embedding == "resize":
            assert torch.equal(model(x, grids=MIXED), expected[1])


def test_every_length_has_its_affine():
    model = liven(make().make_resizable(MENU))
    x = images()
    with torch.inference_mode():
        before = [model(x, grids=[grid] * 6) for grid in MENU]
        for name, p in model.named_parameters():
            if name.endswith("shorter_weight"):
                p[1] *= 1.5
        after = [model(x, grids=[grid] * 6) for grid in MENU]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


def test_lengths_between_are_interpolated():
    assert weights(36, MENU) == [1, 0, 0] and weights(400, MENU) == [1, 0, 0] and weights(1, MENU) == [0, 0, 1]
    half = weights(24, ((48, 1), (12, 1)))
    assert half == pytest.approx([0.5, 0.5])  # the geometric mean lies half-way
    model = liven(make().make_resizable(MENU))
    norm = model.blocks[0].norm1
    weight, _ = norm.affine(Packing.from_grids([(5, 5), (6, 6)], 1, device=DEVICE))
    share = torch.tensor(weights(25, MENU), device=DEVICE)
    table = torch.cat([norm.weight[None], norm.shorter_weight])
    torch.testing.assert_close(weight, torch.stack([norm.weight, share @ table]))


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "init_values": 0.5}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "map"}),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm", "pre_norm": True}),
        ("vit_tiny_patch16_224", {"block_fn": "ParallelScalingBlock", "qk_norm": True}),
        ("vit_tiny_patch16_224", {"block_fn": "ParallelThingsBlock"}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_other_architectures(name, kwargs):
    model = liven(make(name, **kwargs).make_resizable(MENU))
    assert any(key.endswith("shorter_weight") for key in model.state_dict())
    x = images()
    together = model(x, grids=MIXED)
    for i, grid in enumerate(MIXED):
        torch.testing.assert_close(model(x[i : i + 1], grids=[grid])[0], together[i])
    together.sum().backward()
    unused = [k for k, p in model.named_parameters() if p.grad is None]
    assert not unused, unused


def test_device_built_packing_agrees():
    model = liven(make().make_resizable(MENU))
    x = images()
    choice = torch.tensor([MENU.index(grid) for grid in MIXED], dtype=torch.int32, device=DEVICE)
    packing = Packing.from_choice(choice, MENU, 1, capacity=6 * 37)
    with torch.inference_mode():
        assert torch.equal(model(x, packing=packing), model(x, grids=MIXED))
        tokens = model.embed(x, packing)
        stream = model.run_blocks([tokens, None, None], packing, 0, 1)
        stream = model.run_blocks(stream, packing, 1)
        assert torch.equal(model.finish(stream, packing), model(x, grids=MIXED))


def test_hooked_norm_keeps_its_lengths():
    model = liven(make().make_resizable(MENU))
    x, seen = images(), []
    with torch.inference_mode():
        expected = model(x, grids=MIXED)
        model.blocks[1].norm1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        torch.testing.assert_close(model(x, grids=MIXED), expected)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "embedding, positions, norms",
    [
        ("resize", "interpolate", "per_length"),
        ("patch", "interpolate", "shared"),
        ("per_length", "per_length", "per_length"),
    ],
)
def test_file_keeps_the_menu(tmp_path, embedding, positions, norms):
    model = liven(make().make_resizable(MENU, embedding, positions, norms))
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": list("abcde"), "mean": (0.1, 0.2, 0.3)}
    save_checkpoint(model, tmp_path / "revit.safetensors")
    again = create_model(str(tmp_path / "revit.safetensors")).to(DEVICE).eval()
    assert again.menu == MENU and again.resizable == model.resizable
    assert again.pretrained_cfg["label_names"] == list("abcde")
    assert fingerprint(again) == fingerprint(model) == fingerprint(again.to(torch.bfloat16))
    model.to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(model(images(), grids=MIXED), again(images(), grids=MIXED))


def test_fingerprint_tells_models_apart():
    model = liven(make().make_resizable(MENU))
    before = fingerprint(model)
    with torch.no_grad():
        model.blocks[0].norm1.shorter_weight[0, 0] += 0.1
    assert fingerprint(model) != before
    assert fingerprint(make().make_resizable(MENU)) != fingerprint(make().make_resizable(MENU[:2]))


@pytest.mark.parametrize("embedding, positions", [("resize", "interpolate"), ("per_length", "per_length")])
def test_plain_checkpoint_starts_every_length(tmp_path, embedding, positions):
    plain = liven(make())
    save_checkpoint(plain, tmp_path / "plain.safetensors")
    model = make().make_resizable(MENU, embedding, positions)
    load_checkpoint(model, tmp_path / "plain.safetensors")
    expected = plain.make_resizable(MENU, embedding, positions)
    other = make().make_resizable(MENU, embedding, positions)
    state = {k: v for k, v in expected.state_dict().items() if "shorter" not in k}
    other.load_state_dict(state)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(other.state_dict()[key], value), key


def test_full_length_of_a_revit_is_a_plain_model():
    model = liven(make().make_resizable(MENU))
    plain = make()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "shorter" not in k})
    with torch.inference_mode():
        assert torch.equal(plain(images()), model(images()))


def test_compiles_whole():
    model = liven(make().make_resizable(MENU))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        packing = Packing.from_grids(MIXED, 1, device=DEVICE)
        torch.testing.assert_close(compiled(images(), packing=packing), model(images(), packing=packing))


@pytest.mark.parametrize(
    "menu, options, match",
    [
        ((), {}, "must list grids"),
        (((2, 2), (4, 4)), {}, "fewer and fewer"),
        (((4, 4), (2, 8)), {}, "fewer and fewer"),
        (MENU, {"embedding": "crop"}, "embedding must be one of"),
        (MENU, {"norms": "none"}, "norms must be one of"),
    ],
)
def test_wrong_use(menu, options, match):
    with pytest.raises(ValueError, match=match):
        make().make_resizable(menu, **options)


def test_only_once():
    with pytest.raises(ValueError, match="resizable already"):
        make().make_resizable(MENU).make_resizable(MENU)


def test_own_kernels_need_host_grids():
    model = make().make_resizable(MENU, "patch")
    packing = Packing.from_choice(torch.zeros(6, dtype=torch.int32, device=DEVICE), MENU, 1, capacity=300)
    with pytest.raises(ValueError, match="grids that the host knows"):
        model(images(), packing=packing)


def test_longest_length_sets_the_input_size():
    model = VarLenViT(**SMALL).make_resizable(((10, 10), (4, 4)))
    assert model.patch_embed.grid_size == (10, 10) and model.patch_sizes() == [(8, 8), (20, 20)]
    assert isinstance(model.blocks[0].norm1, LengthLayerNorm) and cells(model.menu[0]) == 100


def _cats(model, x):
    """How many concatenations a forward launches, once the positions of its grids are kept."""
    with torch.inference_mode():
        model(x, grids=MIXED)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile, torch.inference_mode():
        model(x, grids=MIXED)
    return sum(event.name == "aten::cat" for event in profile.events())


def test_affines_are_read_without_a_copy(tmp_path):
    """Wherever a model's parameters come from: the affines of all lengths lie in one piece of memory."""
    x, plain = images(), _cats(liven(make()), images())
    model = liven(make().make_resizable(MENU))
    torch.save(model, tmp_path / "model.pt")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    copies = {
        "itself": model,
        "a copy": copy.deepcopy(model),
        "unpickled": torch.load(tmp_path / "model.pt", weights_only=False),
        "moved": copy.deepcopy(model).to(torch.float64).to(torch.float32),
    }
    assigned = make().make_resizable(MENU)
    assigned.load_state_dict(state, assign=True)
    with torch.inference_mode():
        expected = model(x, grids=MIXED)
        for name, other in (copies | {"assigned": assigned}).items():
            assert torch.equal(other(x, grids=MIXED), expected), name
            assert other.state_dict().keys() == state.keys()
    for name, other in (copies | {"assigned": assigned}).items():
        assert _cats(other, x) == plain, name


def test_a_written_affine_is_seen_and_new_memory_too():
    model, x = liven(make().make_resizable(MENU)), images()
    norm = model.blocks[0].norm1
    longest, shorter = norm.weight.detach().clone(), norm.shorter_weight.detach().clone()
    with torch.inference_mode():
        before = model(x, grids=MIXED)
    with torch.no_grad():
        norm.shorter_weight[1] += 1
    norm.weight.data.add_(1)  # no version tells of this one
    with torch.inference_mode():
        written = model(x, grids=MIXED)
    assert not torch.equal(written, before)
    norm.shorter_weight.data = norm.shorter_weight.data.clone()  # apart: put together anew in every call
    with torch.inference_mode():
        assert torch.equal(model(x, grids=MIXED), written)
    with torch.no_grad():
        norm.shorter_weight.copy_(shorter)
    norm.weight.data.copy_(longest)
    with torch.inference_mode():
        assert torch.equal(model(x, grids=MIXED), before)


def test_affines_of_all_lengths_get_their_gradients():
    model = liven(make().make_resizable(MENU))
    model(images(), grids=MIXED).sum().backward()
    norm = model.blocks[0].norm1
    assert norm.weight.grad.shape == norm.weight.shape and norm.weight.grad.abs().sum() > 0
    assert (norm.shorter_weight.grad.abs().sum(1) > 0).all()
