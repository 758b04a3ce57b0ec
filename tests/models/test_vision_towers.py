"""timm's NaFlexVit and the towers of language models: the same answers, from the model, by name and from a file."""

import copy

import pytest
import torch
from contract import DEVICE, same
from timm_pairs import WHOLE, assert_gradients_near, assert_near, gradients, liven

import revit_kernels
from revit_kernels.models.checkpoints import load_checkpoint, save_checkpoint
from revit_kernels.models.convert_timm import PROJECTORS, timm_state
from revit_kernels.models.registry import create_model, list_models, registry

timm = pytest.importorskip("timm")

LARGEST = 130_000_000
MODULES = ("naflexvit", "qwen3_vit", "deepseek_vit", "gemma4_vit")
NAMES = [name for name in list_models() if registry()["models"][name].get("module") in MODULES]
ONCE = [  # one name for each distinct computation, of which some are tried at full size
    *("naflexvit_base_patch16_gap", "naflexvit_base_patch16_par_gap", "naflexvit_base_patch16_parfac_gap"),
    *("naflexvit_base_patch16_siglip", "naflexvit_so150m2_patch16_reg1_map", "naflexvit_base_patch16_radio_v3"),
    *("naflexvit_large_patch16_radio_v3", "qwen3_vit_88m", "deepseek_vit_412m", "gemma4_vit_167m", "gemma4_vit_570m"),
]
GRIDS = [(3, 5), (18, 20), (6, 2), (1, 1), (16, 16)]


def entry(name):
    return registry()["models"][name]


def small(name):
    """Arguments that make an entry small without changing what it computes, for timm and for us."""
    if WHOLE and entry(name)["parameters"] <= LARGEST:
        return {"num_classes": 5}, {"num_classes": 5}
    both = {"depth": 2, "num_classes": 5}
    if not WHOLE:
        heads = entry(name)["kwargs"].get("num_heads", 12)
        dim = entry(name)["kwargs"].get("embed_dim", 768)
        both |= {"num_heads": 2, "embed_dim": 2 * dim // heads}
    if entry(name)["module"] != "gemma4_vit":
        return both, both
    hidden = entry(name)["kwargs"].get("intermediate_size", 3072) if WHOLE else 96
    return (
        both | {"position_embedding_size": 24, "intermediate_size": hidden},
        both | {"num_positions": 24, "intermediate_size": hidden},
    )


def pair(name):
    theirs = liven(timm.create_model(name, **small(name)[0])).to(DEVICE).eval()
    for key, value in theirs.named_buffers():
        if key.endswith(("put_min", "put_max")):  # bounds that do clip
            value.fill_(-1.5 if key.endswith("min") else 1.0)
        if key.endswith(("std_bias", "std_scale")):
            value.fill_(0.3)
    for key, p in theirs.named_parameters():
        if key.endswith("position_embedding_table"):
            p.data.normal_(std=0.2)
    return theirs, revit_kernels.from_timm(theirs)


def images_of(ours, grids=GRIDS):
    generator, (h, w) = torch.Generator().manual_seed(1), ours.patch_embed.patch_size
    return [torch.rand(3, rows * h, columns * w, generator=generator).to(DEVICE) for rows, columns in grids]


@pytest.mark.parametrize("name", NAMES if WHOLE else ONCE)
def test_answers_and_gradients(name):
    theirs, ours = pair(name)
    with torch.no_grad():
        x = torch.stack(images_of(ours, [(5, 4)] * 2))
        assert_near("dense", ours(x), theirs(x))
        assert_near("features", ours.forward_features(x), theirs.forward_features(x).reshape(2, -1, ours.embed_dim))
        made = create_model(name, **small(name)[1]).to(DEVICE).eval()
        made.load_state_dict(ours.state_dict(), strict=True)
        assert_near("by name", made(x), theirs(x))
    images = images_of(ours)
    actual, expected = ours(images, grids=GRIDS), torch.cat([theirs(image[None]) for image in images])
    assert_near("mixed", actual, expected)
    with torch.no_grad():
        for image, grid, row in zip(images, GRIDS, ours(images, grids=GRIDS)):
            same(ours([image], grids=[grid]), row[None])
    if not WHOLE:
        shared = {id(p) for p in ours.parameters()} & {id(p) for p in theirs.parameters()}
        assert len(shared) >= len(list(ours.parameters())) - (4 * len(ours.blocks) + 3)
        clipped = entry(name)["kwargs"].get(
            "use_clipped_linears"
        )  # in fp32 some values fall on the other side of a bound
        assert_gradients(theirs.double() if clipped else theirs, images)


@pytest.mark.parametrize("name", ONCE)
def test_state_of_ours_loads_into_timms(name):
    """Bit for bit, and nothing but what is a projector's is missing."""
    theirs, ours = pair(name)
    state = timm_state(ours)
    expected = {key: x for key, x in theirs.state_dict().items() if not PROJECTORS.match(key.removeprefix("encoder."))}
    assert state.keys() == expected.keys()
    for key, x in expected.items():
        assert torch.equal(state[key], x), key
    fresh = timm.create_model(name, **small(name)[0])
    loaded = fresh.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert all(PROJECTORS.match(key.removeprefix("encoder.")) for key in loaded.missing_keys)


def test_what_has_no_keys_of_timms_is_refused():
    model = create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=32, num_heads=1)
    with pytest.raises(ValueError, match="the model is resizable"):
        timm_state(model.make_resizable([(4, 4), (2, 2)]))
    with pytest.raises(ValueError, match="takes a VarLenViT, VarLenTower or VarLenGemma4, got VarLenEva"):
        timm_state(create_model("vit_tiny_patch16_dinov3_qkvb", depth=1))
    with pytest.raises(ValueError, match="no positions of prefix tokens"):
        timm_state(create_model("vit_tiny_patch16_224", depth=1))


def assert_gradients(theirs, images):
    """Of the parameters that both share."""
    ours, dtype = revit_kernels.from_timm(theirs), next(theirs.parameters()).dtype
    images = [image.to(dtype) for image in images]
    of_ours = gradients(ours, ours(images, grids=GRIDS))
    of_theirs = gradients(theirs, torch.cat([theirs(image[None]) for image in images]))
    names = {id(p): key for key, p in theirs.named_parameters()}
    paired = {key: names[id(p)] for key, p in ours.named_parameters() if id(p) in names}
    paired = {key: other for key, other in paired.items() if of_theirs[other] is not None}

    def exact():
        wide = copy.deepcopy(theirs).double()
        found = gradients(wide, torch.cat([wide(image[None].double()) for image in images]))
        return {key: found[other] for key, other in paired.items()}

    assert_gradients_near(
        {key: of_ours[key] for key in paired}, {key: of_theirs[other] for key, other in paired.items()}, exact
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["naflexvit_base_patch16_par_gap", "qwen3_vit_88m", "gemma4_vit_167m"])
def test_files_of_timm_and_of_ours(name, tmp_path):
    from safetensors.torch import save_file

    theirs, ours = pair(name)
    state = {key: x.contiguous() for key, x in theirs.state_dict().items()}
    save_file(state | {"encoder.merger.fc1.weight": torch.zeros(2)}, tmp_path / "timm.safetensors")
    made = create_model(name, **small(name)[1]).to(DEVICE).eval()
    load_checkpoint(made, tmp_path / "timm.safetensors")
    images = images_of(ours)
    assert torch.equal(made(images, grids=GRIDS), ours(images, grids=GRIDS))
    made.make_resizable([(8, 8), (4, 4)])
    save_checkpoint(made, tmp_path / "ours.safetensors")
    again = create_model(str(tmp_path / "ours.safetensors")).to(DEVICE).eval()
    assert type(again) is type(made) and again.menu == made.menu and again.pos_square == made.pos_square
    assert torch.equal(again(images, grids=[(4, 4)] * 5), made(images, grids=[(4, 4)] * 5))


@torch.no_grad()
def test_batches_of_naflex_loaders():
    """Patches, their coordinates and which are valid, as timm's collator gives them, against timm's own answer."""
    theirs, ours = pair("naflexvit_base_patch16_siglip")
    images, size = images_of(ours, [(3, 5), (6, 2), (1, 1), (4, 4)]), 20
    batch = {"patches": torch.zeros(4, size, 768), "patch_coord": torch.zeros(4, size, 2, dtype=torch.long)}
    batch["patch_valid"] = torch.zeros(4, size, dtype=torch.bool)
    for i, image in enumerate(images):
        cells = image.unflatten(1, (-1, 16)).unflatten(3, (-1, 16)).permute(1, 3, 2, 4, 0)  # rows, columns, h, w, c
        count = cells.shape[0] * cells.shape[1]
        batch["patches"][i, :count] = cells.reshape(count, -1).cpu()
        batch["patch_coord"][i, :count] = torch.cartesian_prod(*map(torch.arange, cells.shape[:2]))
        batch["patch_valid"][i, :count] = True
    batch = {key: x.to(DEVICE) for key, x in batch.items()}
    expected = theirs({key: x.clone() for key, x in batch.items()})
    assert_near("a dictionary", ours(batch), expected)
    assert_near("in five dimensions", ours(batch | {"patches": batch["patches"].unflatten(2, (16, 16, 3))}), expected)
    assert torch.equal(ours(batch), ours(images))
    with pytest.raises(ValueError, match="patch_valid must leave as many patches as the grids have"):
        ours(batch | {"patch_valid": batch["patch_valid"].index_fill(1, torch.tensor([0], device=DEVICE), False)})
    with pytest.raises(ValueError, match=r"patches must be \(images, patches, 768\), of 16x16 pixels"):
        ours(batch | {"patches": batch["patches"][..., :300]})
    with pytest.raises(ValueError, match="a dictionary of patches needs"):
        ours({"pixels": batch["patches"]})
    with pytest.raises(ValueError, match="says its own grids"):
        ours(batch, grids=[(1, 1)] * 4)


def test_made_resizable():
    """A step's gradients of every length are those of a plain loop."""
    _, ours = pair("gemma4_vit_167m")
    menu = [(6, 6), (3, 3), (2, 2)]
    ours.make_resizable(menu)
    assert sum("shorter_weight" in key for key in ours.state_dict()) == 2 * 6  # four norms a block, and of q and k
    images = images_of(ours, menu)
    together = ours(images, grids=menu)
    apart = torch.cat([ours([image], grids=[grid]) for image, grid in zip(images, menu)])
    expected = gradients(ours, apart)
    for key, grad in gradients(ours, together).items():
        if expected[key] is not None:
            assert_near(key, grad, expected[key], scale=expected[key].abs().max().item())


@torch.no_grad()
def test_pixels():
    _, ours = pair("gemma4_vit_167m")
    pixels = torch.randint(256, (3, 64, 48), dtype=torch.uint8, device=DEVICE)
    assert_near("from 0 to 255", ours([pixels]), ours([pixels / 255]))


def test_wrong_use():
    def refused(message, name, **kwargs):
        with torch.device("meta"):
            model = timm.create_model(name, depth=1, **kwargs)
        with pytest.raises(NotImplementedError, match=message):
            revit_kernels.from_timm(model)

    refused("encoder_pool='merge' projects merged tokens for a language model", "qwen3_vit_88m_merge")
    refused("encoder_pool='align' projects merged tokens", "deepseek_vit_412m_align")
    refused("encoder_pool='soft' projects merged tokens", "gemma4_vit_167m", encoder_pool="soft")
    refused("Gemma4VitClassifier, got Gemma4VitEncoder", "gemma4_vit_167m_enc")
    refused("must have its final_norm", "qwen3_vit_88m", final_norm=False)
    refused("make it with use_naflex=False", "eva02_tiny_patch14_224", use_naflex=True)
    for name, cls in (("swin_tiny_patch4_window7_224", "SwinTransformer"), ("hiera_tiny_224", "Hiera")):
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(NotImplementedError, match=f"from_timm takes timm's VisionTransformer, .*, got {cls}"):
            revit_kernels.from_timm(model)
    with pytest.raises(ValueError, match="positions for 10240 rows and columns, got 10241"):
        create_model("gemma4_vit_167m", depth=1).pos_axes(((1, 10241),))
