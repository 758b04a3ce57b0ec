"""Runs that end early and go on: by exceptions, by kill -9 anywhere, with a torn or damaged end, in every format."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from test_images import noise

from revit_kernels import cli
from revit_kernels.serving.journal import Journal
from revit_kernels.serving.records import Answer

SUFFIXES = ("jsonl", "csv", "parquet", "npz", "shards/")


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A WebDataset tar of 12 images, one of them broken, each with a label beside it."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        noise((64 + i, 48)).save(folder / f"{i:02d}.jpg")
        (folder / f"{i:02d}.cls").write_text(str(i))
    (folder / "05.jpg").write_bytes(b"broken")
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for path in sorted(folder.glob("??.*")):
            archive.add(path, path.name)
    return folder / "shard.tar"


def revit(*arguments):
    return cli.main(["infer", "--model", "stand_in", "--quiet", "--batch-tokens", "1", *map(str, arguments)])


def contents(output: Path):
    if not output.is_dir():
        return output.read_bytes()
    return pyarrow.parquet.read_table(output).to_pylist()


def answers():
    rng = np.random.default_rng(0)
    for i in range(5):
        if i == 2:
            yield Answer("bröken\n.jpg", error="it is not an image")
        else:
            yield Answer(f"{i}.jpg", (i, 7), (2, i), rng.random(9, np.float32), cost=0.5)


def test_answers_come_back(tmp_path):
    features = Answer("a", (1, 2), (3, 4), features=np.float32([1.5, np.pi]))
    journal = Journal(tmp_path / "j", {"a": 1})
    for answer in (*answers(), features):
        journal.write(answer)
    journal.close(remove=False)
    found = list(Journal(tmp_path / "j", {"a": 1}).answers())
    for ours, theirs in zip(found, (*answers(), features), strict=True):
        assert (ours.path, ours.size, ours.grid, ours.cost, ours.error) == (
            theirs.path,
            theirs.size,
            theirs.grid,
            theirs.cost,
            theirs.error,
        )
        for name in ("probabilities", "features"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_the_best_are_kept(tmp_path):
    equal = Answer("a", (1, 1), (1, 1), probabilities=np.float32([0, 0.5, 0.5, 0]))
    journal = Journal(tmp_path / "j", {}, keep=3)
    journal.write(equal)
    found = next(journal.answers()).probabilities
    assert np.argsort(-found, kind="stable")[:3].tolist() == [1, 2, 0] and found[[1, 2, 0]].tolist() == [0.5, 0.5, 0]


def test_wherever_the_file_ends_the_whole_answers_before_are_there(tmp_path):
    path = tmp_path / "j"
    journal, ends = Journal(path, {"a": 1}), []
    for answer in answers():
        journal.write(answer)
        ends.append(path.stat().st_size)
    journal.close(remove=False)
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        journal = Journal(path, {"a": 1})
        whole = sum(end <= size for end in ends)
        assert len(list(journal.answers())) == whole == journal.count
        journal.write(Answer("new", error="-"))
        assert [a.path for a in journal.answers()][whole:] == ["new"]
        journal.close(remove=True)


def test_a_damaged_answer_and_what_is_behind_it_is_not_there(tmp_path):
    path, count = tmp_path / "j", len(list(answers()))
    journal = Journal(path, {})
    for answer in answers():
        journal.write(answer)
    journal.close(remove=False)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(list(Journal(path, {}).answers())) == count - 1


def test_whose_it_is(tmp_path):
    journal = Journal(tmp_path / "j", {"grids": [1], "top": 5})
    with pytest.raises(ValueError, match="another process writes to"):
        Journal(tmp_path / "j", {"grids": [1], "top": 5})
    journal.close(remove=False)
    with pytest.raises(ValueError, match=r"is of a run with other settings \(grids\): it can only go on as it was"):
        Journal(tmp_path / "j", {"grids": [2], "top": 5})
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no unfinished run"):
        Journal(tmp_path / "other", {})
    assert (tmp_path / "other").read_bytes() == b"something else"


def begin(shard, output, number):
    """A process that answers images, and is ended by the signal when it has answered 7, or 7 once it has gone on."""
    script = f"""if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from stand_in import StandIn
        from revit_kernels import cli
        from revit_kernels.serving import prepare
        model = StandIn()
        forward = model.forward
        def dies(images, **kwargs):
            if len(model.calls) == 7:
                os.kill(os.getpid(), {int(number)})
            return forward(images, **kwargs)
        model.forward = dies
        prepare.load_model = lambda *args, **kwargs: model
        sys.exit(cli.main(sys.argv[1:]))
    """
    arguments = ["infer", str(shard), "--model", "m", "-q", "--batch-tokens", "1", "--shard-rows", "4", "--resume"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *arguments, "-o", str(output)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("suffix, number", [(s, signal.SIGKILL) for s in SUFFIXES] + [("csv", signal.SIGINT)])
def test_a_killed_run_goes_on(model, shard, tmp_path, suffix, number):
    output, expected = tmp_path / f"out.{suffix}", tmp_path / f"expected.{suffix}"
    given = str(output) + ("/" if suffix.endswith("/") else "")
    died = begin(shard, given, number)
    assert died.returncode == (-9 if number == signal.SIGKILL else 130), died.stderr
    if suffix == "shards/":
        assert sorted(p.name for p in output.iterdir()) == ["_part-00001.partial", "_revit.json", "part-00000.parquet"]
    else:
        assert [p.name for p in tmp_path.iterdir()] == [f"out.{suffix}.partial"]
    calls = len(model.calls)
    assert revit(shard, "-o", given, "--resume", "--shard-rows", 4) == 1  # an image is broken
    computed = len(model.calls) - calls
    assert 4 <= computed <= 6  # of the 11 images, 7 were begun: the last two of them may not have been written
    assert revit(shard, "-o", str(expected) + given[len(str(output)) :], "--shard-rows", 4) == 1
    assert contents(output) == contents(expected)
    assert not list(tmp_path.glob("**/*.partial")) + list(tmp_path.glob("**/.*"))
    calls = len(model.calls)
    assert revit(shard, "-o", given, "--resume") == 0 and len(model.calls) == calls


def test_killed_between_a_shards_name_and_its_journals_end(model, shard, tmp_path):
    assert begin(shard, f"{tmp_path}/out/", signal.SIGKILL).returncode == -9
    journal = tmp_path / "out" / "_part-00000.partial"
    journal.write_bytes(b"left over")
    assert revit(shard, "-o", tmp_path / "out", "--resume", "--shard-rows", 4) == 1
    rows = [pyarrow.parquet.read_table(p).num_rows for p in sorted((tmp_path / "out").glob("*.parquet"))]
    assert rows == [4, 4, 4] and not journal.exists()


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_killed_before_its_settings_had_their_name(model, shard, tmp_path, options):
    output = tmp_path / "out"
    output.mkdir()
    (output / "._revit.json.4711.tmp").write_text("{")
    assert revit(shard, "-o", f"{output}/", *options) == 1  # an image is broken
    assert len(list(output.glob("part-*.parquet"))) == 1


def test_what_it_cannot_go_on_with(model, shard, tmp_path, capsys):
    folder, output = f"{tmp_path}/out/", tmp_path / "out.csv"

    def refused(*arguments):
        assert revit(*arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert begin(shard, folder, signal.SIGKILL).returncode == begin(shard, output, signal.SIGKILL).returncode == -9
    assert "holds an unfinished run: go on with --resume" in refused(shard, "-o", folder, "--shard-rows", 4)
    assert "other settings (shard_rows)" in refused(shard, "-o", folder, "--resume", "--shard-rows", 5)
    assert "other settings (columns)" in refused(shard, "-o", output, "--resume", "--top", 1)
    assert "other settings (grids)" in refused(shard, "-o", output, "--resume", "--max-tokens", 50)
    model.weight.data += 1
    assert "other settings (weights)" in refused(shard, "-o", output, "--resume")
    model.weight.data -= 1
    photo = shard.parent / "00.jpg"
    assert "which is not image 1 any more" in refused(photo, "-o", output, "--resume")
    assert "records on standard output are not kept" in refused(photo, "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "is a folder that holds other things" in refused(shard, "-o", tmp_path / "other")
    assert revit(shard, "-o", folder, "--resume", "--shard-rows", 4) == 1
    capsys.readouterr()
    assert "holds a finished run" in refused(shard, "-o", folder, "--shard-rows", 4)


def test_a_run_without_records_leaves_no_trace(model, shard, tmp_path, capsys):
    def dies(*args, **kwargs):
        raise RuntimeError("the GPU is on fire")

    model.forward = dies
    for output in (tmp_path / "out.csv", f"{tmp_path}/out/"):
        assert revit(shard, "-o", output, "--resume") == 1
    assert list(tmp_path.iterdir()) == [] and "are kept" not in capsys.readouterr().err


def test_a_disk_that_fills_up_loses_no_record(model, shard, tmp_path, monkeypatch, capsys):
    """The write that does not fit is torn; what was written before is gone on from."""
    from revit_kernels.serving import journal

    written, write = [], journal._write_all

    def full(file, data):
        if len(written) == 5:
            write(file, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        written.append(data)
        write(file, data)

    monkeypatch.setattr(journal, "_write_all", full)
    assert revit(shard, "-o", tmp_path / "out.jsonl") == 1
    assert "could not be written: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(journal, "_write_all", write)
    calls = len(model.calls)
    assert revit(shard, "-o", tmp_path / "out.jsonl", "--resume") == 1 and len(model.calls) - calls == 7
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [Path(r["path"]).name for r in records] == [f"{i:02d}.jpg" for i in range(12)]


def test_a_list_on_standard_input(shard):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "stand_in", "infer", "--model", "m", "-q", "-"]
    done = subprocess.run(command, input=f"{shard}\n", capture_output=True, text=True, env=env)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 12


def test_a_record_costs_little(tmp_path):
    """A thousand records a second would be the limit of many models: the journal must be far from it."""
    journal = Journal(tmp_path / "j", {}, keep=5)
    answer = Answer("path/of/some/image.jpg", (480, 640), (12, 16), np.full(1000, 1e-3, np.float32))
    begun = time.process_time()
    for _ in range(1000):
        journal.write(answer)
    assert time.process_time() - begun < 1
