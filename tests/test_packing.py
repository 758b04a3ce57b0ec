import numpy as np
import pytest
import torch
from contract import DEVICE
from host_traffic import HostTraffic

from revit_kernels.packing import Packing

MENU = [(4, 4), (3, 2), (1, 1)]


def test_from_grids():
    packing = Packing.from_grids([(1, 1), (3, 2), (1, 1)], prefix=1, capacity=14, device=DEVICE)
    assert packing.cu_seqlens.tolist() == [0, 2, 9, 11]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.menu == ((3, 2), (1, 1))
    assert packing.length_index.tolist() == [1, 0, 1]
    assert packing.image.tolist() == [0, 0] + [1] * 7 + [2, 2] + [-1] * 3
    assert packing.row.tolist() == [1, 1] + [0] * 7 + [1, 1] + [-1] * 3
    assert packing.placement.tolist() == [[1, 1, 6], [3, 2, 0], [1, 1, 6]]
    assert packing.max_seqlen == 7
    assert packing.first_row.tolist() == [0] * 11 + [-1] * 3
    assert not packing.full
    assert packing.fits.all()


def test_both_builders_agree():
    choice = torch.tensor([2, 0, 1, 1], device=DEVICE)
    device_built = Packing.from_choice(choice, MENU, prefix=2, capacity=64)
    host_built = Packing.from_grids([MENU[i] for i in choice.tolist()], prefix=2, menu=MENU, capacity=64, device=DEVICE)
    for name in ("cu_seqlens", "length_index", "image", "row", "placement"):
        assert torch.equal(getattr(device_built, name), getattr(host_built, name)), name
    assert device_built.max_seqlen == host_built.max_seqlen


def test_images_that_do_not_fit_get_no_tokens():
    packing = Packing.from_choice(torch.tensor([1, 0, 2], device=DEVICE), MENU, prefix=1, capacity=10)
    assert packing.cu_seqlens.tolist() == [0, 7, 7, 7]
    assert packing.fits.tolist() == [True, False, False]
    assert packing.image.tolist() == [0] * 7 + [-1] * 3


def test_slots_without_an_image_get_no_tokens():
    """Anywhere among the images, and within the capacity they leave room for the others."""
    packing = Packing.from_choice(torch.tensor([-1, 1, -5, 2, -1], device=DEVICE), MENU, prefix=1, capacity=10)
    assert packing.cu_seqlens.tolist() == [0, 0, 7, 7, 9, 9]
    assert packing.fits.tolist() == [False, True, False, True, False]
    assert packing.image.tolist() == [1] * 7 + [3] * 2 + [-1]
    assert packing.row.tolist() == [1] * 7 + [2] * 2 + [-1]
    assert packing.length_index.tolist() == [0, 1, 0, 2, 0]  # of the menu, so that no kernel reads beyond it
    empty = Packing.from_choice(torch.full((3,), -1, device=DEVICE), MENU, capacity=2)
    assert empty.cu_seqlens.tolist() == [0] * 4 and empty.image.tolist() == [-1] * 2


def test_one_copy_brings_all_there_is():
    """`meta` stands for a device apart; what comes of the copy begins where vectors of a kernel may."""
    with HostTraffic() as traffic:
        packing = Packing.from_grids([(5, 1), (3, 2), (5, 1)], capacity=20, device="meta")
        assert packing.placement.device.type == packing.first_row.device.type == "meta"
    assert [kind for kind, _ in traffic.seen] == ["up"], traffic.seen
    with HostTraffic() as traffic:
        Packing.uniform(3, (5, 1), device="meta")
    assert not traffic.seen
    for device in {"cpu", DEVICE}:
        packing = Packing.from_grids([(5, 1), (3, 2), (5, 1)], capacity=20, device=device)
        views = (packing.cu_seqlens, packing.length_index, packing.image, packing.row, packing.first_row)
        assert not any(view.data_ptr() % 64 for view in (*views, packing.placement))
        assert all(view.is_contiguous() and view.dtype == torch.int32 for view in (*views, packing.placement))


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU runs beside its host")
def test_the_host_does_not_wait_for_the_copy():
    Packing.from_grids(MENU, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packings = [Packing.from_grids([grid] * 200, device=DEVICE) for grid in MENU * 20]
        uniform = [Packing.uniform(200, grid, device=f"{DEVICE}:0") for grid in MENU * 2]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for packing, grid in zip(packings + uniform, MENU * 22):  # none was written over while its copy was on its way
        lengths = packing.cu_seqlens.diff()
        assert lengths.unique().tolist() == [1 + grid[0] * grid[1]] and packing.image[-1] == 199


def test_grids_may_be_any_pairs():
    """Objects of their own, the same object often, lists, and numbers of NumPy."""
    one = (3, 2)
    expected = Packing.from_grids([(3, 2), (3, 2), (1, 1)])
    for grids in ([one, one, (1, 1)], [[3, 2], (3, 2), [1, 1]], np.array([[3, 2], [3, 2], [1, 1]])):
        packing = Packing.from_grids(grids)
        assert packing.grids == expected.grids and all(type(grid) is tuple for grid in packing.grids)
        assert torch.equal(packing.row, expected.row) and packing.menu == expected.menu
    with pytest.raises(ValueError, match=r"grids\[1\] must be a pair"):
        Packing.from_grids([(7, 7), (7.0, 7)])


def test_uniform_is_a_dense_batch():
    uniform = Packing.uniform(3, (2, 3), prefix=2, device=DEVICE)
    listed = Packing.from_grids([(2, 3)] * 3, prefix=2, device=DEVICE)
    for name in ("cu_seqlens", "length_index", "image", "row", "placement"):
        assert torch.equal(getattr(uniform, name), getattr(listed, name)), name
        assert getattr(uniform, name).dtype == getattr(listed, name).dtype, name
    assert uniform.grids == listed.grids and uniform.capacity == listed.capacity and uniform.first_row is None


def test_no_image():
    packing = Packing.from_grids([], prefix=1)
    assert packing.cu_seqlens.tolist() == [0] and packing.capacity == 0 and packing.max_seqlen == 1
    assert packing.split(torch.zeros(0, 4)) == ()
    assert Packing.from_choice(torch.zeros(0, dtype=torch.long), MENU, capacity=3).image.tolist() == [-1] * 3


def test_without_prefix_and_split():
    packing = Packing.from_grids([(2, 1), (1, 3)], prefix=2, device=DEVICE)
    patches, rows = packing.without_prefix()
    assert rows.tolist() == [2, 3, 6, 7, 8]
    assert patches.cu_seqlens.tolist() == [0, 2, 5] and patches.prefix == 0
    assert [len(part) for part in packing.split(torch.zeros(9, 4))] == [4, 5]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Packing.from_grids([(0, 3)]), r"grids\[0\] must be at least \(1, 1\), got \(0, 3\)"),
        (lambda: Packing.from_grids([(-1, 3)]), r"grids\[0\] must be at least"),
        (lambda: Packing.from_grids([7]), r"grids\[0\] must be a pair"),
        (lambda: Packing.from_grids([(2, 2)], menu=[(3, 3)]), r"not on the menu"),
        (lambda: Packing.from_grids([(2, 2)], capacity=4), r"capacity must hold all 5 tokens"),
        (lambda: Packing.from_grids([(2, 2)], prefix=-1), r"prefix must be at least 0"),
        (lambda: Packing.from_choice(torch.zeros(2), MENU, capacity=9), r"choice must be \(images,\) of an integer"),
        (lambda: Packing.from_choice(torch.zeros(2, dtype=torch.int32), [], capacity=9), r"menu must name"),
    ],
)
def test_wrong_use_says_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_compiles_and_is_a_pytree():
    packing = Packing.from_grids([(2, 1), (1, 3)])
    compiled = torch.compile(lambda p, x: x * p.row[:, None], fullgraph=True, backend="eager")
    assert torch.equal(compiled(packing, torch.ones(7, 1))[:, 0], packing.row.float())
    leaves, spec = torch.utils._pytree.tree_flatten(packing)
    assert len(leaves) == 5 and torch.utils._pytree.tree_unflatten(leaves, spec).menu == packing.menu


def test_choosing_on_the_device_never_reads_it_back():
    """Under fake tensors, which hold no values, anything that reads one raises."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        packing = Packing.from_choice(torch.zeros(5, dtype=torch.int32), MENU, capacity=40)
        assert packing.row.shape == (40,) and packing.placement.shape == (5, 3)
