"""VarLenViT beyond what timm can do: mixed batches, packings made on the device, training, and wrong use."""

import pytest
import torch
from contract import DEVICE

from revit_kernels import PackedTokens, Packing, VarLenViT

GRIDS = [(2, 3), (4, 4), (1, 1), (3, 2)]


def make(**kwargs):
    torch.manual_seed(0)
    options = dict(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=2, num_classes=7, init_values=0.3)
    model = VarLenViT(**(options | kwargs)).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(grids=GRIDS, patch=16, channels=3):
    torch.manual_seed(1)
    return [torch.randn(channels, h * patch, w * patch, device=DEVICE) for h, w in grids]


@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_is_the_same_in_any_company(dtype, recording):
    torch.set_grad_enabled(recording)
    try:
        check_company(dtype)
    finally:
        torch.set_grad_enabled(True)


def check_company(dtype):
    model = make().to(dtype)
    batch = images()
    together = model(batch)
    for i, image in enumerate(batch):
        if DEVICE == "cpu":
            assert torch.equal(model([image])[0], together[i]), f"image {i} alone"
    backwards = model(batch[::-1])
    assert torch.equal(backwards.flip(0), together)
    tokens = model.forward_features(batch).split()
    for part, alone in zip(tokens, (model.forward_features([image]).tokens for image in batch)):
        if DEVICE == "cpu":
            assert torch.equal(part, alone)


@torch.no_grad()
def test_a_packing_made_on_the_device():
    model = make()
    menu = [(4, 4), (2, 2)]
    x = torch.randn(3, 3, 64, 64, device=DEVICE)
    choice = torch.tensor([1, 0, 1], device=DEVICE)
    chosen = model(x, packing=Packing.from_choice(choice, menu, model.num_prefix_tokens, capacity=40))
    listed = model(x, grids=[menu[i] for i in choice.tolist()])
    torch.testing.assert_close(chosen, listed)
    assert torch.equal(chosen, listed) or DEVICE == "cuda"


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_images_without_room_get_zeros(distilled):
    from revit_kernels.models.distilled import VarLenViTDistilled

    options = dict(img_size=64, embed_dim=64, depth=1, num_heads=2, num_classes=7)
    model = (VarLenViTDistilled if distilled else VarLenViT)(**options).to(DEVICE).eval()
    x = torch.randn(3, 3, 64, 64, device=DEVICE)
    choice = torch.tensor([1, 0, 0], dtype=torch.uint8, device=DEVICE)
    menu, prefix = [(4, 4), (2, 2)], model.num_prefix_tokens
    capacity = 20 + 2 * prefix
    out = model(x, packing=Packing.from_choice(choice, menu, prefix, capacity=capacity))
    torch.testing.assert_close(out[:2], model(x[:2], grids=[(2, 2), (4, 4)]))
    assert out[2].count_nonzero() == 0


@torch.no_grad()
def test_nan_beyond_the_last_token_reaches_nothing():
    model = make()
    packing = Packing.from_grids(GRIDS, model.num_prefix_tokens, capacity=64, device=DEVICE)
    exact = model(images(), grids=GRIDS)
    features = model.forward_features(images(), packing=packing)
    assert features.tokens.shape[0] == 64
    assert features.tokens[packing.cu_seqlens[-1] :].count_nonzero() == 0
    spoiled = features.tokens.clone()
    spoiled[packing.cu_seqlens[-1] :] = float("nan")
    torch.testing.assert_close(model.forward_head(PackedTokens(spoiled, packing)), exact)


@torch.no_grad()
def test_native_aspect_under_a_token_limit():
    model = make()
    sizes = [(100, 37), (16, 16), (1, 1), (1200, 20)]
    batch = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, device=DEVICE) for size in sizes]
    packing = model.forward_features(batch, max_tokens=9).packing
    assert all(h * w <= 9 for h, w in packing.grids)
    assert packing.grids[1] == (1, 1) and packing.grids[3][1] == 1
    assert model(batch, max_tokens=9).shape == (4, 7)
    rows = [image.permute(1, 2, 0).contiguous() for image in batch]
    assert torch.equal(model(rows, max_tokens=9, channels_last=True), model(batch, max_tokens=9))


@torch.no_grad()
def test_uint8_is_normalised_by_the_models_own_statistics():
    model = make()
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    pixels = torch.randint(0, 256, (2, 3, 64, 32), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(model.pretrained_cfg[k], device=DEVICE).view(3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(model(pixels), model((pixels / 255 - mean) / std))


@pytest.mark.parametrize("kwargs", [dict(patch_drop_rate=0.5), dict(drop_path_rate=0.5), dict(attn_drop_rate=0.3)])
def test_training_options_on_a_mixed_batch(kwargs):
    model = make(**kwargs).train()
    out = model(images())
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    plain = make()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images()), plain(images()))


def test_drop_path_leaves_out_whole_images():
    from revit_kernels.modules import DropPath
    from revit_kernels.modules.block import drop_path

    packing = Packing.from_grids(GRIDS * 20, 1, device=DEVICE)
    kept = drop_path(DropPath(0.5).train(), torch.ones(packing.capacity, 3, device=DEVICE), packing)
    per_image = [part.unique().tolist() for part in packing.split(kept)]
    assert all(len(values) == 1 for values in per_image)
    assert {values[0] for values in per_image} == {0.0, 2.0}


@pytest.mark.parametrize("capacity", [None, 50])
def test_patch_dropout_keeps_prefix_tokens_and_order(capacity):
    from revit_kernels.modules.patch_dropout import drop_patches

    packing = Packing.from_grids(GRIDS, 2, capacity=capacity, device=DEVICE)
    rows = torch.arange(packing.capacity, device=DEVICE, dtype=torch.float32)[:, None]
    kept, shorter = drop_patches(rows, packing, 0.5)
    assert [h * w for h, w in shorter.grids] == [3, 8, 1, 3]
    for before, after in zip(packing.split(rows), shorter.split(kept)):
        assert torch.equal(after[:2], before[:2])
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())
        assert len(after.unique()) == len(after)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast(qk_norm):
    """Under autocast the answers are as near the exact ones as timm's way of computing them would be."""
    model = make(qk_norm=qk_norm, global_pool="map")
    exact = model.double()([image.double() for image in images()])
    model.float()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rough = model(images())
        rough.float().square().sum().backward()
    assert (rough - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@torch.no_grad()
def test_many_tokens_give_the_same_as_few():
    """The MLP takes a large batch in parts where nothing is recorded."""
    model = make()
    batch = images([(4, 4)] * 140)
    together = model(batch)
    torch.testing.assert_close(together, torch.cat([model(batch[:70]), model(batch[70:])]))
    assert torch.equal(together[:70], model(batch[:70])) or DEVICE == "cuda"


@torch.no_grad()
def test_hooks_on_the_stack_of_blocks():
    model, seen = make(), []
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    expected = model(x)
    model.blocks.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(model(x), expected)
    assert seen == [(2, 17, 64)]
    with pytest.raises(ValueError, match="hooks on `blocks` as a whole"):
        model(images())


@torch.no_grad()
def test_an_attention_of_somebody_else_is_called_by_length():
    class Theirs(torch.nn.Module):
        def __init__(self, ours):
            super().__init__()
            self.ours = ours

        def forward(self, x, attn_mask=None, is_causal=False):
            assert x.ndim == 3
            return self.ours(x)

    model = make()
    expected = model(images())
    for block in model.blocks:
        block.attn = Theirs(block.attn)
    torch.testing.assert_close(model(images()), expected)


def test_image_gradients_step_aside_to_plain_torch():
    model = make()
    x = torch.randn(2, 3, 64, 64, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0
    torch.testing.assert_close(model(x), model(x.detach()))


def four_channels():
    model = make(in_chans=4)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(torch.randn(1, 2, 64, 64, device=DEVICE)), "expected images of 3 channels, got 2"),
        (lambda m: m([torch.randn(2, 64, 64, device=DEVICE)]), "3 channels, got 2"),
        (lambda m: m(torch.randn(1, 3, 60, 64, device=DEVICE)), r"\(60, 64\) must be a multiple of the patch size"),
        (lambda m: m(images(), grids=[(2, 2)]), "4 images, 1 grids"),
        (lambda m: m(images([(2, 2)]), grids=[(0, 0)]), r"grids\[0\] must be at least \(1, 1\), got \(0, 0\)"),
        (lambda m: m(images([(2, 2)]), grids=[(-1, 2)]), r"grids\[0\] must be at least \(1, 1\), got \(-1, 2\)"),
        (lambda m: m([image.double() for image in images()]), "float64"),
        (lambda m: m(torch.randn(3, 64, 64, device=DEVICE)), r"must be a tensor \(images, channels, height, width\)"),
        (lambda m: m(["photo.jpg"]), "a list of tensors"),
        (lambda m: m(images(), packing=Packing.from_grids(GRIDS, 0)), "0 prefix tokens an image, the model 1"),
        (lambda m: m(images(), packing=Packing.from_grids(GRIDS[:2], 1)), "the packing is of 2 images, got 4"),
        (lambda m: m([torch.randn(3, 64, 64, device="meta")]), "one device|on another device|meta"),
        (lambda m: m(images(), is_causal=True), "need a dense batch"),
        (lambda m: m([torch.zeros(3, 0, 5, device=DEVICE)]), "at least 1 x 1 pixels"),
        (lambda m: m(images(), max_tokens=-1), "max_tokens must be at least 1"),
        (lambda m: m(images(), max_tokens=0), "max_tokens must be at least 1"),
        (lambda m: m(images([(2, 2)]), grids=[(2.5, 2)]), "must be a pair"),
        (lambda m: m(torch.randn(1, 60, 64, 3, device=DEVICE), channels_last=True), "multiple of the patch size"),
        (
            lambda m: four_channels()(torch.zeros(1, 4, 64, 64, dtype=torch.uint8, device=DEVICE)),
            "the 4 channels' mean",
        ),
        (lambda m: VarLenViT(global_pool="best"), "global_pool must be one of"),
        (lambda m: VarLenViT(norm_layer="batchnorm"), "norm_layer must be one of"),
        (lambda m: VarLenViT(class_token=False), "needs the class token"),
        (lambda m: VarLenViT.from_timm(torch.nn.Linear(2, 2)), "got Linear"),
    ],
)
def test_wrong_use_gets_one_clear_sentence(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        call(make())
    assert len(str(caught.value).splitlines()) == 1


def test_exports_with_any_number_of_images():
    model = make()
    x = torch.randn(3, 3, 64, 64, device=DEVICE)
    images_dim = torch.export.Dim("images", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: images_dim}}).module()
    other = torch.randn(5, 3, 64, 64, device=DEVICE)
    torch.testing.assert_close(exported(other), model(other))


def test_compiles_whole_on_a_mixed_batch():
    model = make()
    compiled = torch.compile(model, fullgraph=True)
    packing = Packing.from_grids(GRIDS, model.num_prefix_tokens, device=DEVICE)
    torch.testing.assert_close(compiled(images(), packing=packing), model(images(), packing=packing))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(images(), packing=packing).square().sum(), parameters)
    actual = torch.autograd.grad(compiled(images(), packing=packing).square().sum(), parameters)
    for name, a, e in zip(dict(model.named_parameters()), actual, expected):
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")


def test_sharded_by_fsdp():
    """One process is enough to swap every parameter for a sharded one and back around each forward."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make()
    expected = model(images())
    expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        out = model(images())
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        for (name, parameter), grad in zip(model.named_parameters(), expected_grads):
            torch.testing.assert_close(
                parameter.grad.full_tensor(), grad, msg=lambda text, name=name: f"{name}: {text}"
            )
        with torch.no_grad():
            torch.testing.assert_close(model(images()), expected)
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_a_captured_graph_follows_other_boundaries():
    """One graph, replayed for other choices, some of the same total: nothing of the first is baked in."""
    model = make()
    menu, capacity = [(4, 4), (2, 2)], 64
    x = torch.randn(4, 3, 64, 64, device=DEVICE)
    choice = torch.zeros(4, dtype=torch.int32, device=DEVICE)

    def run():
        return model(x, packing=Packing.from_choice(choice, menu, model.num_prefix_tokens, capacity=capacity))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    choice.copy_(torch.tensor([0, 1, 0, 1]))
    with torch.cuda.graph(graph):
        out = run()
    for chosen in ([0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]):
        choice.copy_(torch.tensor(chosen))
        graph.replay()
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out, run())


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU runs beside its host")
@torch.no_grad()
def test_the_host_never_waits_for_the_device():
    model = make()
    x = torch.randn(4, 3, 64, 64, device=DEVICE)
    choice = torch.tensor([0, 1, 0, 1], device=DEVICE)

    def run():
        return model(x, packing=Packing.from_choice(choice, [(4, 4), (2, 2)], model.num_prefix_tokens, capacity=64))

    run()  # compiles the kernels, and copies the menu
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
