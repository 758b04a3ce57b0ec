"""What a measurement changes: the file of a GPU, where it is read, and the tuner with a clock of the test's own."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from revit_kernels import measured
from revit_kernels.dispatch import BACKENDS
from revit_kernels.ops.attention.handover import order
from revit_kernels.ops.linear import choice

GPU, NAME = torch.device("cuda", 0), "NVIDIA H200 (MIG 1g.18gb)"
LAYER = {"bits": 16, "parts": 1, "loads": 3, "inputs": 768, "out": 3072}
POOL = {"BLOCK_TOKENS": 8, "BLOCK_DIM": 64, "num_warps": 4}
WIDE = {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 256, "BLOCK_INPUTS": 64, "TALL": 8, "num_warps": 8, "num_stages": 3}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Writes tables of a GPU that is not here, and forgets what was read before."""
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)

    def write(**tables):
        for table, rows in tables.items():
            measured.write(NAME, table, rows)
        measured.of.cache_clear()
        measured.tiles.cache_clear()

    write()
    yield write
    measured.of.cache_clear()
    measured.tiles.cache_clear()


def tuner():
    spec = importlib.util.spec_from_file_location("tune", Path(__file__).parents[2] / "benchmarks" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_nothing_was_measured_the_rules_hold(gpu):
    assert measured.of(GPU) == {} == measured.of(torch.device("cpu"))
    assert measured.tiles("linear", "forward", GPU, **LAYER) == measured.rule("linear", "forward", **LAYER)
    assert choice._lookup(GPU, "forward", torch.bfloat16, (3072, 768), "gelu", None) is None
    for step in ("forward", "backward"):
        assert order(step, GPU, 10**6)[0] == "cuda" and sorted(order(step, GPU, 10**6)) == sorted(BACKENDS)


def test_a_measured_row_replaces_the_rule(gpu):
    gpu(tiles={"linear.forward": [[LAYER, WIDE], [{"bits": 16, "inputs": 384}, WIDE | {"num_stages": 4}]]})
    assert measured.tiles("linear", "forward", GPU, **LAYER) == WIDE
    assert measured.tiles("linear", "forward", GPU, **LAYER | {"inputs": 384})["num_stages"] == 4
    other = LAYER | {"inputs": 1024}
    for device, shape in ((GPU, other), (torch.device("cpu"), LAYER)):
        assert measured.tiles("linear", "forward", device, **shape) == measured.rule("linear", "forward", **shape)
    gpu(tiles={"linear.forward": [[LAYER, POOL]]})
    with pytest.raises(ValueError, match=r"linear.forward needs tiles of BLOCK_COLUMNS, .* has \{'BLOCK_DIM"):
        measured.tiles("linear", "forward", GPU, **LAYER)


def test_measured_backends_come_first(gpu):
    gpu(
        attention={"forward": {"flash_attn": 577, "cudnn": 1025}, "backward": {}},
        linear={"forward bfloat16 768x3072 gelu": "vendor", "fp8 float16 4x8 gate-last": "triton"},
    )
    assert order("forward", GPU, 576)[0] == "cuda" == order("backward", GPU, 10**6)[0]
    assert order("forward", GPU, 577)[:2] == ("flash_attn", "cuda")
    assert order("forward", GPU, 1025)[:3] == ("flash_attn", "cudnn", "cuda")
    assert sorted(order("forward", GPU, 1025)) == sorted(BACKENDS)
    assert choice._lookup(GPU, "forward", torch.bfloat16, (3072, 768), "gelu", None)[0] == "vendor"
    assert choice._lookup(GPU, "fp8", torch.float16, (8, 4), None, "last")[0] == "triton"
    assert choice._lookup(GPU, "forward", torch.bfloat16, (768, 3072), None, None) is None


def test_a_file_is_written_whole_or_not_at_all(gpu, monkeypatch):
    gpu(linear={"a": "vendor"}, tiles={"pool.forward": []})
    file = measured.path(NAME)
    assert file.name == "NVIDIA_H200_MIG_1g_18gb_.json"
    assert json.loads(file.read_text()) == {"linear": {"a": "vendor"}, "tiles": {"pool.forward": []}}
    before = file.read_text()
    with pytest.raises(TypeError):
        measured.write(NAME, "linear", {"a": object()})
    assert file.read_text() == before


def test_no_file_holds_what_the_rule_says():
    root = Path(measured.__file__).parent
    assert '"measured/*.json"' in (root.parent.parent / "pyproject.toml").read_text()
    for file in root.glob("*.json"):
        for name, rows in json.loads(file.read_text()).get("tiles", {}).items():
            for shape, tiles in rows:
                usual = measured.rule(*name.split("."), **shape)
                assert tiles != usual and tiles.keys() == usual.keys(), f"{file.name}: {name} {shape}"


# ------------------------------------------------------------------ the tuner


@pytest.mark.skipif(torch.cuda.is_available(), reason="for where Triton is interpreted")
@pytest.mark.parametrize("fastest, margin", [(POOL, 1.5), (POOL, 1.01)], ids=["faster", "noise"])
def test_the_fastest_right_tiles_are_kept_if_they_beat_the_rule(monkeypatch, fastest, margin):
    pytest.importorskip("triton")
    from revit_kernels.ops.pool import triton as backend

    module, forward, now = tuner(), backend.forward, {}

    def unreliable(x, *args):
        now.update(measured.tiles("pool", "forward", x.device, bits=32, dim=48))
        if now["BLOCK_TOKENS"] == 4:
            raise RuntimeError("out of resources")
        return forward(x, *args) * (1.01 if now["BLOCK_TOKENS"] == 2 else 1)

    def clock(run, rounds=9):
        run()
        return 1.0 if now == fastest else 0.5 if now["BLOCK_TOKENS"] == 2 else margin

    monkeypatch.setattr(backend, "forward", unreliable)
    tried = [POOL | {"BLOCK_TOKENS": tokens} for tokens in (2, 4, 8, 32)]
    monkeypatch.setattr(module, "candidates", lambda kernel, usual: tried)
    arguments = torch.randn(9, 48), torch.tensor([0, 4, 9], dtype=torch.int32), "avg", 1, True
    found = list(module.tune("pool", "forward", arguments, clock=clock))
    kept = [("pool.forward", {"bits": 32, "dim": 48}, fastest, margin)]
    assert found == (kept if margin > 1 + module.MARGIN else [])
    assert list(module.tune("pool", "forward", arguments, ["pool.backward"], clock)) == []


def test_candidates_are_of_the_constants_of_the_rule():
    module = tuner()
    for name in ("linear.forward", "attention.forward", "attention.backward_kv", "layer_norm.forward"):
        shape = {"attention": {"bits": 16, "head_dim": 64}, "layer_norm": {"bits": 16, "dim": 768}}
        usual = measured.rule(*name.split("."), **shape.get(name.split(".")[0], {}))
        every = module.candidates(name, usual)
        assert every and usual not in every and all(tiles.keys() == usual.keys() for tiles in every)
    for change in ({}, {"num_stages": 4}, {"BLOCK_ROWS": 64}, {"BLOCK_ROWS": 256, "BLOCK_COLUMNS": 128}):
        assert WIDE | change in module.candidates("linear.forward", WIDE)
