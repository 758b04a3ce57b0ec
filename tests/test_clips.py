"""Which token belongs to which clip and frame."""

import pytest
import torch

from revit_kernels.clips import ClipPacking

GRIDS = [(2, 2, 3), (1, 4, 1), (3, 1, 1), (2, 2, 3)]


def test_frame_after_frame():
    packing = ClipPacking.from_grids(GRIDS, 1, capacity=50)
    lengths = [frames * (1 + h * w) for frames, h, w in GRIDS]
    assert packing.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert packing.menu == ((2, 2, 3), (1, 4, 1), (3, 1, 1)) and packing.grids == tuple(GRIDS)
    assert packing.frames.tolist() == [2, 1, 3, 2] and packing.cu_frames.tolist() == [0, 2, 3, 6, 8]
    assert packing.clip.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert packing.by_frame.grids == ((2, 3),) * 2 + ((4, 1),) + ((1, 1),) * 3 + ((2, 3),) * 2
    assert packing.by_frame.cu_seqlens.tolist() == [0, 7, 14, 19, 21, 23, 25, 32, 39]
    assert packing.prefix_rows.tolist() == packing.by_frame.cu_seqlens[:-1].tolist()
    assert packing.image.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * 11
    assert packing.max_seqlen == 14 and packing.max_frames == 3 and not packing.full
    # Positions: a table of (menu, frames, cells), in which frame 1 of the last clip begins at row 6.
    assert packing.by_frame.placement.tolist()[-1] == [2, 3, 6]
    assert [len(part) for part in packing.split(torch.zeros(50, 2))] == lengths
    patches, rows = packing.without_prefix()
    assert patches.cu_seqlens.tolist() == [0, 12, 16, 19, 31]
    assert set(rows.tolist()) == set(range(39)) - set(packing.prefix_rows.tolist())


def test_a_clip_as_one_sequence():
    packing = ClipPacking.from_grids(GRIDS, 2, per_frame=False, capacity=45)
    assert packing.cu_seqlens.tolist() == [0, 14, 20, 25, 39]
    assert packing.prefix_rows.tolist() == [0, 1, 14, 15, 20, 21, 25, 26]
    assert packing.patch_rows.tolist() == [i for i in range(39) if i not in packing.prefix_rows.tolist()]
    assert packing.by_frame.prefix == 0 and packing.by_frame.capacity == 31
    assert packing.without_prefix()[1].tolist() == packing.patch_rows.tolist()


@pytest.mark.parametrize("per_frame", [True, False])
def test_no_clip(per_frame):
    packing = ClipPacking.from_grids([], per_frame=per_frame)
    assert packing.clips == packing.capacity == packing.max_seqlen == packing.max_frames == 0


@pytest.mark.parametrize(
    "grids, options, message",
    [
        ([(2, 2)], {}, r"grids\[0\] must be \(frames, rows, columns\)"),
        ([[(2, 2), (1, 1)]], {}, "one grid for all frames of a clip"),
        ([(0, 2, 2)], {}, "at least"),
        ([(1, 2, 2)], {"menu": [(2, 2, 2)]}, "not on the menu"),
        ([(1, 2, 2)], {"capacity": 4}, "all 5 tokens"),
        ([(1, 2, 2)], {"prefix": -1}, "prefix must be at least 0"),
    ],
)
def test_wrong_use_says_so(grids, options, message):
    with pytest.raises(ValueError, match=message):
        ClipPacking.from_grids(grids, **options)
