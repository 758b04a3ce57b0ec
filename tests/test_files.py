"""Files appear whole, with the permissions of new files, through links, and on disk before they take their name."""

import os
import stat
import subprocess
import sys
import time

import pytest

from revit_kernels.files import ABANDONED, put, whole, workshop, write_whole


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_a_new_file(tmp_path, umask, mode):
    def write(path):  # as writers do that make a private file of their own
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "new", write)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode
    (tmp_path / "new").chmod(0o640)
    write_whole(tmp_path / "new", write)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640  # of the file of before


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_text("of before")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "new").symlink_to(tmp_path / "disk" / "new")
    for name in ("link", "new"):
        write_whole(tmp_path / name, lambda path: path.write_text("now"))
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "now"
    assert sorted(os.listdir(tmp_path / "disk")) == ["new", "real"]


def test_it_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("sync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    write_whole(tmp_path / "x", lambda path: path.write_text("x"))
    assert done == ["sync", "replace", "sync"]


def test_what_killed_runs_left_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    long_ago = time.time() - ABANDONED - 60
    names = {
        f".x[1].csv.{gone.pid}.tmp": long_ago,  # the only one to go
        f".x[1].csv.{gone.pid + 1}0000000.tmp": time.time(),  # perhaps of another machine, which writes it now
        f".x[1].csv.{os.getppid()}.tmp": long_ago,
        f".y.csv.{gone.pid}.tmp": long_ago,
        ".x[1].csv.mine.tmp": long_ago,
    }
    for name, changed in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (changed, changed))
    with whole(tmp_path / "x[1].csv") as temporary:
        temporary.write_text("x")
    assert sorted(os.listdir(tmp_path)) == sorted([*list(names)[1:], "x[1].csv"])


def test_a_workshop_of_a_killed_process_is_cleared(tmp_path):
    old, young, others = (tmp_path / f".report.{number}.tmp" for number in (2**22 + 1, 2**22 + 2, "x"))
    for folder in (old, young, others):
        folder.mkdir()
        (folder / "picture.png").write_text("part")
    long_ago = time.time() - ABANDONED - 60
    os.utime(old, (long_ago, long_ago))
    with workshop(tmp_path, "report") as inside:
        assert not old.exists() and young.exists() and others.exists()
        (inside / "a").write_text("whole")
        put(inside / "a", tmp_path / "a")
    assert not inside.exists() and (tmp_path / "a").read_text() == "whole"
