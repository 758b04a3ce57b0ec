"""What a forward on a GPU sends to it and waits for, counted where there is none."""

from functools import partial

import pytest
import torch
from contract import DEVICE
from host_traffic import HostTraffic
from stubbed import stubbed

from revit_kernels.models.vit import VarLenViT
from revit_kernels.packing import Packing

MENU = [(4, 4), (3, 2), (2, 2)]


def make(device, **options):
    torch.manual_seed(0)
    shape = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VarLenViT(**shape | options, device=device, dtype=torch.bfloat16).eval()


def photographs(device, dtype=torch.float32):
    return [torch.zeros(3, h, w, dtype=dtype, device=device) for h, w in ((64, 64), (50, 30), (32, 32), (200, 90))]


def batch(device, dtype=torch.float32):
    return torch.zeros(4, 3, 64, 64, dtype=dtype, device=device)


# How many copies, what the model is like, its images, and how it is called. A packing is one copy, where the host makes
# it; where the images of a list lie is another.
U8, GRIDS = torch.uint8, {"grids": [*MENU, (3, 2)]}
FORWARDS = {
    "a list": (2, {}, photographs, {}),
    "a list, max_tokens": (2, {}, photographs, {"max_tokens": 9}),
    "a list of uint8": (2, {}, partial(photographs, dtype=U8), {}),
    "a list, grids": (2, {}, photographs, GRIDS),
    "a tensor": (0, {}, batch, {}),
    "a tensor, grids": (1, {}, batch, GRIDS),
    "a tensor of uint8": (0, {}, partial(batch, dtype=U8), {}),
    "a tensor, chosen on the device": (0, {}, batch, {"capacity": 64}),
    "a list, chosen on the device": (1, {}, photographs, {"capacity": 64}),
    "averaged": (2, {"global_pool": "avg"}, photographs, {}),
    "pooled by attention": (3, {"global_pool": "map"}, photographs, {}),  # the packing without prefix tokens too
}


def prepare(name, device):
    """The forward of that name, on the device."""
    _, options, images, how = FORWARDS[name]
    model, images, choice = make(device, **options), images(device), torch.zeros(4, dtype=torch.int32, device=device)
    if "capacity" not in how:
        return lambda: model(images, **how)
    return lambda: model(images, packing=Packing.from_choice(choice, MENU, **how))


@pytest.mark.parametrize("name", FORWARDS)
@torch.no_grad()
def test_a_forward_sends_no_more_than_it_must(name):
    with stubbed():
        run = prepare(name, "meta")
        run()  # what is kept, is kept
        with HostTraffic() as traffic:
            run()
    assert [kind for kind, _ in traffic.seen] == ["up"] * FORWARDS[name][0], traffic.seen


@torch.no_grad()
def test_a_wrapped_projection_sends_mean_and_std_once():
    with stubbed():
        model = make("meta")
        model.patch_embed.proj.register_forward_hook(lambda *_: None)
        images = photographs("meta", torch.uint8)
        model(images)
        with HostTraffic() as traffic:
            model(images)
    assert [kind for kind, _ in traffic.seen] == ["up"], traffic.seen


@pytest.mark.parametrize("embedding, copies", [("patch", 7), ("per_length", 7)])
@torch.no_grad()
def test_a_kernel_for_each_length_sends_two_copies_a_length(embedding, copies):
    """The packing, a packing and a table for each of three lengths; images in the order of lengths need no more."""
    with stubbed():
        model = make("meta").make_resizable(MENU, embedding=embedding)
        images = [torch.zeros(3, 64, 64, device="meta") for _ in range(6)]
        grids = [grid for grid in MENU for _ in range(2)]
        model(images, grids=grids)
        with HostTraffic() as traffic:
            model(images, grids=grids)
    assert [kind for kind, _ in traffic.seen] == ["up"] * copies, traffic.seen


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU runs beside its host")
@pytest.mark.parametrize("name", FORWARDS)
@torch.no_grad()
def test_the_host_never_waits(name):
    run = prepare(name, DEVICE)
    expected = run()  # compiles the kernels, and copies what is kept
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual, expected)
