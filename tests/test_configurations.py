"""Tables of tiles: look-up, files, the tuner with a clock of the test's own, and the switches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from revit_kernels import configurations
from revit_kernels.configurations import configuration, tables, tuning, using
from revit_kernels.configurations.tables import Row, Table
from revit_kernels.ops.attention import tiles as attention_tiles

CPU = torch.device("cpu")
POOL = {"bits": 32, "dim": 48}
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="for where Triton is interpreted")


@pytest.fixture(autouse=True)
def anew(monkeypatch, tmp_path):
    monkeypatch.delenv("REVIT_CONFIGURATIONS", raising=False)
    monkeypatch.delenv("REVIT_TUNE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    configurations.forget()
    yield
    configurations.forget()


def pool_tiles(tokens):
    return {"BLOCK_TOKENS": tokens, "BLOCK_DIM": 64, "num_warps": 4}


def own(monkeypatch, path, shape=POOL, tiles=None, arch=80):
    table = Table(arch, "a test", {"pool.forward": [Row(shape, tiles or pool_tiles(8))]})
    table.write(path)
    monkeypatch.setenv("REVIT_CONFIGURATIONS", str(path))
    configurations.forget()


# ------------------------------------------------------------------ look-up


def test_the_nearest_bucket():
    rows = [Row({"dim": 8, "length": n}, {"BLOCK": n}) for n in (64, 256, 1024)] + [Row({"dim": 9}, {"BLOCK": 1})]
    table = Table(80, "static", {"op.kernel": rows})
    for length, bucket in ((1, 64), (64, 64), (127, 64), (129, 256), (500, 256), (513, 1024), (10**6, 1024)):
        assert table.find("op", "kernel", {"dim": 8, "length": length}).tiles == {"BLOCK": bucket}
    assert table.find("op", "kernel", {"dim": 9, "length": 5}).tiles == {"BLOCK": 1}
    assert table.find("op", "kernel", {"dim": 10, "length": 64}) is None
    assert table.find("op", "other", {"dim": 8, "length": 64}) is None


def test_a_row_with_the_bucket_or_with_more_keys_comes_first():
    rows = [Row({"dim": 8}, {"BLOCK": 1}), Row({"dim": 8, "length": 64}, {"BLOCK": 2}), Row({}, {"BLOCK": 3})]
    table = Table(80, "static", {"op.kernel": rows})
    assert table.find("op", "kernel", {"dim": 8, "length": 900}).tiles == {"BLOCK": 2}
    assert table.find("op", "kernel", {"dim": 7, "length": 900}).tiles == {"BLOCK": 3}


@pytest.mark.parametrize("arch, wanted", [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 100)])
def test_an_architecture_without_a_table_takes_the_nearest_older_one(arch, wanted):
    assert tables.shipped(arch).architecture == wanted


def test_where_nothing_is_known_the_rule_runs():
    assert tables.shipped(75) is None
    assert configuration("pool", "forward", 75, **POOL) == configurations.rule("pool", "forward", **POOL)
    odd = {"bits": 16, "head_dim": 27, "length": 50}
    assert configuration("attention", "forward", 90, **odd) == attention_tiles.rule("forward", **odd)


def test_a_number_of_rows_or_a_length_changes_no_shipped_tiles():
    """An image's bits must not depend on the batch that it is in."""
    for table in map(tables.shipped, tables.architectures()):
        assert not any({"length", "rows"} & row.shape.keys() for rows in table.rows.values() for row in rows)


def test_tiles_in_use_are_of_this_block_alone():
    usual = configuration("pool", "forward", CPU, **POOL)
    with using("pool", "forward", pool_tiles(4)):
        assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(4)
        assert configuration("pool", "backward", CPU, **POOL) == usual
    assert configuration("pool", "forward", CPU, **POOL) == usual


def test_the_tables_are_installed():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"configurations/*.json"' in text
    assert tables.architectures()


# ------------------------------------------------------------------ files


def test_ones_own_table(monkeypatch, tmp_path):
    own(monkeypatch, tmp_path / "mine.json")
    assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(8)
    shipped = configuration("pool", "forward", CPU, bits=16, dim=768)  # a row that it lacks
    assert shipped == tables.shipped(80).find("pool", "forward", {"bits": 16, "dim": 768}).tiles
    own(monkeypatch, tmp_path / "sm_80.json", tiles=pool_tiles(2))
    monkeypatch.setenv("REVIT_CONFIGURATIONS", str(tmp_path))
    assert configuration("pool", "forward", 90, **POOL) == pool_tiles(2)  # of a folder, the nearest older one
    with pytest.raises(ValueError, match="has no sm_"):
        configuration("pool", "forward", 75, **POOL)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[]", "is broken"),
        ('{"source": "static", "kernels": {}}', "'architecture' is missing"),
        ('{"architecture": "80", "source": "static", "kernels": {}}', "architecture must be a whole number"),
        ('{"architecture": 80, "source": "static", "kernels": {"pool.forward": [{"shape": {}}]}}', "tiles"),
        ('{"architecture": 80, "source": "x", "kernels": {"a.b": [{"shape": {}, "tiles": {"B": 0}}]}}', "at least 1"),
        ('{"architecture": 80, "source": "x", "kernels": {"a.b": [{"shape": {}, "tiles": {}, "no": 1}]}}', "'no'"),
    ],
)
def test_a_broken_table(monkeypatch, tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    monkeypatch.setenv("REVIT_CONFIGURATIONS", str(path))
    with pytest.raises(ValueError, match=message) as caught:
        configuration("pool", "forward", CPU, **POOL)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_that_is_not_there_or_of_a_newer_gpu_or_lacks_a_constant(monkeypatch, tmp_path):
    monkeypatch.setenv("REVIT_CONFIGURATIONS", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none.json cannot be read: No such file"):
        configuration("pool", "forward", CPU, **POOL)
    own(monkeypatch, tmp_path / "newer.json", arch=90)
    with pytest.raises(ValueError, match="is for sm_90, not for sm_80"):
        configuration("pool", "forward", CPU, **POOL)
    own(monkeypatch, tmp_path / "short.json", tiles={"BLOCK_DIM": 64})
    with pytest.raises(ValueError, match=r"pool.forward needs BLOCK_DIM, BLOCK_TOKENS, num_warps, got BLOCK_DIM"):
        configuration("pool", "forward", CPU, **POOL)


def test_a_table_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "deep" / "table.json"
    table = Table(90, "static", {}).with_row("pool", "forward", Row(POOL, pool_tiles(8), 3))
    table = table.with_row("pool", "forward", Row(POOL, pool_tiles(16), 4, "a GPU, today", 1.5))
    table.write(path)
    again = tables.read(str(path))
    assert again.rows == {"pool.forward": [Row(POOL, pool_tiles(16), 4, "a GPU, today", 1.5)]}
    assert json.loads(path.read_text())["architecture"] == 90
    before = path.read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tables.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        Table(80, "static", {}).write(path)
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


# ------------------------------------------------------------------ the tuner


class Clock:
    """The seconds of the tiles in use, from a function of them."""

    def __init__(self, op, kernel, shape, seconds):
        self.op, self.kernel, self.shape, self.seconds, self.calls = op, kernel, shape, seconds, 0

    def __call__(self, call, device):
        self.calls += 1
        return self.seconds(configuration(self.op, self.kernel, device, **self.shape))


def tune(op, kernel, shape, seconds, **options):
    pytest.importorskip("triton")
    clock = Clock(op, kernel, shape, seconds)
    return tuning.tune(op, kernel, CPU, shape, clock, None, **options), clock


@needs_interpreter
@pytest.mark.parametrize(
    "op, kernel, shape",
    [
        ("attention", "forward", {"bits": 16, "head_dim": 16, "length": 20}),
        ("attention", "backward_q", {"bits": 32, "head_dim": 16, "length": 20}),
        ("attention", "backward_kv", {"bits": 32, "head_dim": 16, "length": 20}),
        ("layer_norm", "forward", {"bits": 16, "dim": 256}),
        ("layer_norm", "backward", {"bits": 32, "dim": 256}),
        ("layer_norm", "reduce", {"bits": 32, "dim": 24}),
        ("patch_embed", "forward", {"bits": 32, "dim": 32}),
        ("patch_embed", "patchify", {"bits": 32, "patch": 16}),
        ("patch_embed", "sums", {"bits": 32, "dim": 32}),
        ("pool", "forward", POOL),
        ("pool", "backward", {"bits": 16, "dim": 48}),
        ("pos_embed", "resample", {"bits": 32, "dim": 64}),
    ],
    ids=str,
)
def test_candidates_are_right_and_the_fastest_is_taken(op, kernel, shape):
    every = tuning.tiled(op).candidates(kernel, **shape)
    usual = tuning.tiled(op).rule(kernel, **shape)
    assert every and all(tiles.keys() == usual.keys() for tiles in every)
    fastest = next(tiles for tiles in every if tiles != usual)
    row, clock = tune(op, kernel, shape, lambda tiles: 1.0 if tiles == fastest else 2.0, candidates=[usual, fastest])
    assert row.tiles == fastest and row.shape == shape and row.microseconds == 1e6 and clock.calls == 2


@needs_interpreter
def test_what_is_wrong_or_fails_is_not_taken(monkeypatch):
    pytest.importorskip("triton")
    from revit_kernels.ops.pool import triton as backend

    forward = backend.forward

    def unreliable(x, *args):
        rows = configuration("pool", "forward", x.device, bits=32, dim=48)["BLOCK_TOKENS"]
        if rows == 8:
            raise RuntimeError("out of resources")
        return forward(x, *args) * (1.01 if rows == 4 else 1)

    monkeypatch.setattr(backend, "forward", unreliable)
    seconds = {16: 3.0, 8: 1.0, 4: 1.5, 32: 2.0}
    row, _ = tune(
        "pool", "forward", POOL, lambda tiles: seconds[tiles["BLOCK_TOKENS"]], candidates=[*map(pool_tiles, (8, 4, 32))]
    )
    assert row.tiles == pool_tiles(32)
    monkeypatch.setattr(backend, "forward", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"pool.forward .* no candidate ran.*division by zero"):
        tune("pool", "forward", POOL, lambda _: 1.0, candidates=[])


@needs_interpreter
def test_what_the_compiler_complains_of_is_not_run(monkeypatch):
    pytest.importorskip("triton")
    asked = []

    def complain(op, kernel, tiles, shape, arch):
        asked.append(arch)
        return None if tiles["BLOCK_TOKENS"] == 16 else "spills"

    clock = Clock("pool", "forward", POOL, lambda tiles: 1.0)
    row = tuning.tune("pool", "forward", CPU, POOL, clock, complain, [pool_tiles(4)])
    assert row.tiles == pool_tiles(16) and asked == [80, 80] and clock.calls == 1


@needs_interpreter
def test_one_row_for_all_lengths(monkeypatch):
    monkeypatch.setattr(attention_tiles, "LENGTHS", (5, 20))
    shape = {"bits": 32, "head_dim": 16}
    row, clock = tune("attention", "forward", shape, lambda _: 1.0, candidates=[])
    assert row.shape == shape and clock.calls == 2


# ------------------------------------------------------------------ at first use


@pytest.fixture
def first_use(monkeypatch):
    """Kernels are tuned at first use, by a tuner that only says that it was asked."""
    asked = []

    def tuned(op, kernel, device, shape):
        asked.append((op, kernel, shape))
        return Row(shape, pool_tiles(32), microseconds=1.0)

    monkeypatch.setenv("REVIT_TUNE", "1")
    monkeypatch.setattr(tuning, "_tunable", lambda place: place == CPU)
    monkeypatch.setattr(tuning, "tune", tuned)
    return asked


def test_a_shape_is_tuned_once_and_kept(first_use):
    for _ in range(3):
        assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(32)
    configurations.forget()  # another process
    assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(32)
    configuration("pool", "forward", CPU, bits=16, dim=48)
    assert first_use == [("pool", "forward", POOL), ("pool", "forward", {"bits": 16, "dim": 48})]
    assert len(tables.read(str(tuning.cache_file(CPU))).rows["pool.forward"]) == 2


def test_a_length_is_no_part_of_what_is_kept(first_use):
    for length in (17, 50, 1025):
        configuration("pool", "forward", CPU, **POOL, length=length)
    assert first_use == [("pool", "forward", POOL)]


def test_without_the_switch_nothing_is_tuned(first_use, monkeypatch):
    monkeypatch.delenv("REVIT_TUNE")
    assert configuration("pool", "forward", CPU, **POOL) == configurations.rule("pool", "forward", **POOL)
    assert first_use == [] and not tuning.cache_file(CPU).exists()


def test_nothing_is_tuned_in_a_capture(first_use, monkeypatch):
    monkeypatch.setattr(tuning, "_capturing", lambda _: True)
    assert configuration("pool", "forward", CPU, **POOL) == configurations.rule("pool", "forward", **POOL)
    assert first_use == []
    monkeypatch.setattr(tuning, "_capturing", lambda _: False)
    assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(32)  # the capture's answer was not remembered


def test_what_a_trial_launches_is_not_tuned(first_use, monkeypatch):
    def tuned(op, kernel, device, shape):
        inner = configuration("pool", "backward", device, **POOL)
        assert inner == configurations.rule("pool", "backward", **POOL)
        return Row(shape, pool_tiles(32))

    monkeypatch.setattr(tuning, "tune", tuned)
    assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(32)


def test_ones_own_table_is_not_tuned(first_use, monkeypatch, tmp_path):
    own(monkeypatch, tmp_path / "mine.json")
    assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(8)
    assert first_use == []


def test_a_broken_cache_is_begun_anew(first_use):
    path = tuning.cache_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="is not JSON.*; it is begun anew"):
        assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(32)
    configurations.forget()
    assert tables.read(str(path)).find("pool", "forward", POOL).tiles == pool_tiles(32)


def test_what_was_kept_for_an_older_kernel_is_tuned_anew(first_use):
    Table(80, "a test", {"pool.forward": [Row(POOL, {"BLOCK": 8})]}).write(tuning.cache_file(CPU))
    assert configuration("pool", "forward", CPU, **POOL) == pool_tiles(32)
    assert first_use == [("pool", "forward", POOL)]


def test_a_failure_leaves_what_there_was(first_use, monkeypatch):
    def fail(*_):
        raise RuntimeError("no candidate ran")

    monkeypatch.setattr(tuning, "tune", fail)
    with pytest.warns(RuntimeWarning, match="stays as it is: no candidate ran"):
        assert configuration("pool", "forward", CPU, **POOL) == configurations.rule("pool", "forward", **POOL)


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    "arguments, message",
    [(["pool"], "there is no GPU here"), (["pol"], "there is no op 'pol'")],
)
def test_the_command_refuses_in_a_sentence(arguments, message):
    if torch.cuda.is_available() and arguments == ["pool"]:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "revit_kernels.configurations", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
