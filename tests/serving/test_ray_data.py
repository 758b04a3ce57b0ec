"""Ray Data: the same records as one process writes, whatever the column, and whoever is killed."""

import io
import os
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import ray
from PIL import Image
from test_images import noise

from revit_kernels import cli
from revit_kernels.data.archives import Archive
from revit_kernels.serving.prepare import Settings
from revit_kernels.serving.ray_data import Predictor, Worker, units
from revit_kernels.serving.ray_start import connect

SIZES = ((64, 48), (200, 30), (28, 28), (90, 120), (33, 47))


def encoded(i, kind="PNG"):
    file = io.BytesIO()
    noise(SIZES[i % len(SIZES)], seed=i).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """4 tars of 25 images with labels beside them, one image broken; a folder of 5 images, and a parquet of 5."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(4):
        with tarfile.open(folder / f"shard-{s}.tar", "w") as archive:
            for i in range(25):
                for suffix, data in (("jpg", encoded(25 * s + i, "JPEG")), ("cls", b"1")):
                    data = b"broken" if (s, i, suffix) == (2, 3, "jpg") else data
                    member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (folder / "photos").mkdir()
    for i in range(5):
        (folder / "photos" / f"{i}.png").write_bytes(encoded(i))
    pyarrow.parquet.write_table(pa.table({"image": [encoded(i) for i in range(5)]}), folder / "table.parquet")
    return folder


def revit(sources, *options):
    return cli.main(["infer", *map(str, sources), "--dtype", "float32", "--device", "cpu", "-q", *map(str, options)])


def rows(path):
    files = sorted(Path(path).glob("part-*.parquet")) if Path(path).is_dir() else [path]
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory):
    """What one process writes."""
    output = tmp_path_factory.mktemp("expected") / "out.parquet"
    sources = [*sorted(shards.glob("*.tar")), shards / "photos", shards / "table.parquet"]
    assert revit(sources, "-o", output) == 1
    found = rows(output)
    assert len(found) == 110 and sum(row["error"] is not None for row in found) == 1
    return sources, found


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("options", [{}, {"grids": ((4, 4), (2, 2))}, {"features": True}])
def test_rows_in_rows_out(options):
    """Without Ray: the columns that come, of encoded images, structs, paths and arrays."""
    predictor = Predictor(dtype="float32", device="cpu", workers=2, **options)
    data = np.array([encoded(i) for i in range(6)] + [b"broken", b""], object)
    batch = {"bytes": data, "id": np.arange(8)}
    found = predictor(batch)
    assert "bytes" not in found and found["id"].tolist() == list(range(8)) and list(batch) == ["bytes", "id"]
    assert found["error"].tolist() == [None] * 6 + ["it is not an image, or of a format that is not supported"] + [
        "the file is empty"
    ]
    assert found["height"].tolist() == [SIZES[i % 5][1] for i in range(6)] + [0, 0]
    assert (found["tokens"] == found["rows"] * found["columns"]).all() and (found["tokens"][:6] > 0).all()
    name = "features" if options.get("features") else "probabilities"
    assert np.isfinite(found[name][:6]).all() and np.isnan(found[name][6:]).all()
    assert found[name].dtype == np.float32 and len(found[name]) == 8
    if name == "probabilities":
        assert found["classes"][6:].tolist() == [[-1] * 5] * 2 and found["labels"].shape == (8, 5)
        assert ("cost" in found) == (not options)  # the policy's, where nothing else says the length
    structs = np.array([{"bytes": one, "path": None} for one in data[:6]], object)
    pixels = np.empty(6, object)
    for i, one in enumerate(data[:6]):
        pixels[i] = np.asarray(Image.open(io.BytesIO(one)))
    for other in ({"image": structs}, {"image": pixels}, {"jpg": data[:6]}):
        np.testing.assert_array_equal(predictor(other)[name], found[name][:6])


def test_paths_pass_through(shards):
    paths = np.array([str(shards / "photos" / f"{i}.png") for i in range(5)] + ["gone.png"], object)
    found = Predictor(dtype="float32", device="cpu")({"path": paths})
    assert found["path"].tolist() == paths.tolist()
    assert found["error"].tolist() == [None] * 5 + ["there is no such file"]


def test_what_a_batch_must_have():
    predictor = Predictor(dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"no column of images \(bytes, image, .*\): its columns are a"):
        predictor({"a": np.arange(2)})
    with pytest.raises(ValueError, match="has no column named b: its columns are a"):
        Predictor("b", dtype="float32", device="cpu")({"a": np.arange(2)})
    data = np.array([encoded(0)], object)
    with pytest.raises(ValueError, match="has a column error already: give a prefix"):
        predictor({"bytes": data, "error": np.array([1])})
    prefixed = Predictor(dtype="float32", device="cpu", prefix="revit_")({"bytes": data, "error": np.array([1])})
    assert prefixed["error"].tolist() == [1] and prefixed["revit_error"].tolist() == [None]
    wrong = np.empty(1, object)
    wrong[0] = np.zeros((3, 8, 8), np.float32)
    assert "must be (height, width, 3) of uint8" in predictor({"image": wrong})["error"][0]


def test_map_batches(ray_here):
    table = pa.table({"bytes": [encoded(i) for i in range(40)], "id": list(range(40))})
    found = ray.data.from_arrow(table).map_batches(
        Predictor,
        fn_constructor_kwargs={"dtype": "float32", "device": "cpu"},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=16,
    )
    found = sorted(found.take_all(), key=lambda row: row["id"])
    alone = Predictor(dtype="float32", device="cpu")({"bytes": np.array(table["bytes"].to_pylist(), object)})
    for name in ("probabilities", "classes", "tokens"):
        np.testing.assert_array_equal(np.stack([row[name] for row in found]), alone[name])


# ---------------------------------------------------------------------- the command


def test_a_ray_that_does_not_start(monkeypatch):
    def fails(**options):
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(RuntimeError, match=r"^Ray does not start: The current node timed out during startup\.$"):
        connect("auto")


def test_pieces_of_work():
    paths = ["a", "b", "c", Archive("t.tar"), Archive("u.tar"), "d"]
    assert units(paths, 2) == [["a", "b"], ["c"], ["t.tar"], ["u.tar"], ["d"]]


def workers_of_ours():
    """The actors' processes that descend from this one."""
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or b"ray::MapWorker" not in (entry / "cmdline").read_bytes():
                continue
            ancestor = int(entry.name)
            while ancestor > 1 and ancestor != os.getpid():
                ancestor = int((Path("/proc") / str(ancestor) / "stat").read_text().rpartition(")")[2].split()[1])
            if ancestor == os.getpid():
                yield int(entry.name)
        except (OSError, ValueError):
            continue


def test_an_actor_killed_in_mid_run_loses_no_row(ray_here, expected, tmp_path):
    sources, single = expected
    killed, done = [], threading.Event()

    def kill():
        while not done.wait(0.01):  # a busy machine takes minutes to start an actor
            if list((tmp_path / "out").glob("part-*.parquet")):
                for process in workers_of_ours():
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                    return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        status = revit(sources, "-o", f"{tmp_path}/out/", "--batch-tokens", 64, "--ray")
    finally:
        done.set()
        thread.join()
    assert killed and status == 1  # an image is broken
    assert rows(tmp_path / "out") == single
    assert not list((tmp_path / "out").glob(".*")) + list((tmp_path / "out").glob("_*.tries"))


def test_what_is_written_is_not_done_again(ray_here, expected, tmp_path, capsys):
    sources, single = expected
    output = f"{tmp_path}/out/"
    assert revit(sources, "-o", output, "--ray") == 1
    assert rows(output) == single
    assert revit(sources, "-o", output, "--ray") == 2 and "holds a finished run" in capsys.readouterr().err
    assert revit(sources, "-o", output, "--ray", "--resume") == 0
    (tmp_path / "out" / "part-000002.parquet").unlink()
    settings = tmp_path / "out" / "_revit.json"
    settings.write_text(settings.read_text().replace('"finished": true', '"finished": false'))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    assert revit(sources[:3], "-o", output, "--ray", "--resume") == 2
    assert "other settings (ray)" in capsys.readouterr().err
    assert revit(sources, "-o", output, "--ray", "--resume", "--top", 2) == 2
    assert "other settings (top)" in capsys.readouterr().err
    assert revit(sources, "-o", output, "--ray", "--resume") == 1
    assert rows(output) == single
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    assert {name: after[name] for name in before} == before and len(after) == 6


def test_a_broken_archive_is_told_and_tried_again(ray_here, shards, tmp_path, capsys):
    (tmp_path / "bad.tar").write_bytes(b"no archive")
    sources, output = [shards / "photos", tmp_path / "bad.tar"], f"{tmp_path}/out/"
    assert revit(sources, "-o", output, "--ray") == 1
    assert "the archive" in capsys.readouterr().err and len(rows(output)) == 5
    (tmp_path / "bad.tar").write_bytes((shards / "shard-0.tar").read_bytes())
    assert revit(sources, "-o", output, "--ray", "--resume") == 0 and len(rows(output)) == 30


def test_a_piece_that_ends_its_actors_is_not_begun_for_ever(shards, tmp_path):
    worker = Worker(".", str(tmp_path), Settings(dtype="float32", device="cpu"), None, 8192, 1)

    piece = {"unit": np.array([7]), "paths": [[str(shards / "photos" / "0.png")]], "archive": [False]}
    answerer, worker.prepared = worker.prepared, None
    for _ in range(4):
        with pytest.raises(AttributeError):
            list(worker(piece))
    worker.prepared = answerer
    with pytest.raises(RuntimeError, match=r"the shard that begins with .*0\.png has ended its actor 4 times"):
        list(worker(piece))
    assert [path.name for path in tmp_path.iterdir()] == ["_part-000007.tries"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ray"], "--ray writes parquet shards to a folder"),
        (["-o", "out.csv", "--ray"], "--ray writes parquet shards to a folder"),
        (["-o", "out/", "--ray", "photos"], "--ray photos: an address is HOST:PORT"),
        (["-o", "out/", "--compare", "--ray"], "leave out --ray"),
        (["-o", "out/", "--model", "vit_tiny_patch16_224", "--untrained", "--ray"], "gives each actor other weights"),
    ],
)
def test_misuse(shards, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert revit([shards / "photos"], *options) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
