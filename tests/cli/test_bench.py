"""`revit bench`: the duels of a model of the user's own, and its chart."""

import re
import xml.etree.ElementTree

import pytest
import torch
from tiny_revit import trained

from revit_kernels import cli, create_model
from revit_kernels.evaluation.speed import Duel, duels, mixed_images, rivals
from revit_kernels.evaluation.svg import bars
from revit_kernels.models.checkpoints import save_checkpoint

timm = pytest.importorskip("timm")


def test_bench_of_a_revit(tmp_path, capsys):
    save_checkpoint(trained(), tmp_path / "model.safetensors")
    arguments = ["bench", tmp_path / "model.safetensors", "--images", 6, "--rounds", 2, "-q", "--device", "cpu"]
    assert cli.main([str(a) for a in [*arguments, "--chart", tmp_path / "chart.svg"]]) == 0
    said = capsys.readouterr().out
    assert "6 images at 4x4, 3x3, 2x2" in said and f"against timm {timm.__version__}" in said
    rows = re.findall(r"^(one|padded).* ms +[\d,.]+ ms +[\d.]+x  [\d.]+ to [\d.]+$", said, re.MULTILINE)
    assert len(rows) == 3 and "the strongest rival" in said
    xml.etree.ElementTree.parse(tmp_path / "chart.svg")
    assert cli.main([str(a) for a in [*arguments, "--chart", tmp_path / "chart.png"]]) == 2
    assert cli.main(["bench", str(tmp_path / "model.safetensors"), "--images", "2"]) == 2
    assert "--images must be at least the number of grids, 3" in capsys.readouterr().err


def test_rivals_compute_the_same():
    """All but the padded one, whose positions are no image's own."""
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, img_size=64, dynamic_img_size=True).eval()
    model = create_model("vit_tiny_patch16_224", depth=2, num_classes=5, img_size=64).eval()
    model.load_state_dict(dense.state_dict())
    images, grids = mixed_images([(4, 4), (2, 2)], 5, (16, 16), 3, next(model.parameters()))
    assert grids == [(4, 4)] * 3 + [(2, 2)] * 2
    with torch.inference_mode():
        ours = model(images, grids=grids)
        found = rivals(dense, images, grids, (16, 16), 1)
        for name in ("one dense batch per length", "one image at a time"):
            torch.testing.assert_close(torch.cat(found[name]()), ours)
        assert found["padded to the longest, masked"]().shape == ours.shape


def test_duels_are_ordered_and_paired():
    calls = []
    slow = torch.ones(1 << 20)
    found = duels(
        lambda: calls.append("ours"),
        {"slow": lambda: [calls.append("slow"), slow.sin().sin()], "fast": lambda: calls.append("fast")},
        torch.device("cpu"),
        rounds=3,
    )
    assert [duel.rival for duel in found] == ["fast", "slow"] and found[1].ratio > found[0].ratio
    assert calls == ["ours", "slow"] * 5 + ["ours", "fast"] * 5
    assert all(isinstance(duel, Duel) and duel.low <= duel.ratio <= duel.high for duel in found)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_bars_mark_who_is_slower(theme):
    found = xml.etree.ElementTree.fromstring(bars("a < b", "c", [("x", 0.5), ("y", 2.0)], theme))
    rows = [part for part in found if part.tag.endswith("rect")]
    assert float(rows[1].get("width")) == pytest.approx(4 * float(rows[0].get("width")), rel=0.01)
    assert rows[0].get("fill") != rows[1].get("fill")
