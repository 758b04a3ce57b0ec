"""What is left of the GPU benchmarks where there is no GPU: the suite's flow, its report, and the rivals' wheels."""

import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def bench(name, speedup, quartiles, **info):
    info = {"dtype": "bfloat16", "ours_ms": 0.1, "rival_ms": 0.1 * speedup, "device": "a GPU", "commit": "abc"} | info
    info |= {"speedup": speedup, "speedup_quartiles": quartiles, "versions": {"torch": "2.11", "cuda": "13.0"}}
    info |= {"gb_per_s": 2000, "copy_ceiling_gb_per_s": 4000, "percent_of_copy": 50}
    info |= {"tflop_per_s": 300, "matmul_ceiling_tflop_per_s": 600, "percent_of_matmul": 50}
    return {"name": name, "extra_info": info}


def attention(step, tokens, backend, quartiles):
    name = f"bench_attention[{step}-{tokens}-torch.bfloat16-backend_{backend}]"
    return bench(name, sum(quartiles) / 2, quartiles, rival=f"backend_{backend}")


NCU = """==PROF== Connected
"ID","Kernel Name","Grid Size","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","%","ns","register/thread","%"
"0","forward_kernel<64>(const int *)","(1, 2, 3)","81.5","72,500.0","168","40.1"
"1","unmeasured","(1, 1, 1)","n/a","n/a","16","n/a"
"""


@pytest.fixture
def folder(tmp_path):
    rows = [
        attention("forward", 197, "flash_attn", [1.1, 1.3]),
        attention("forward", 577, "flash_attn", [0.8, 0.9]),
        attention("forward", 1025, "flash_attn", [0.7, 0.8]),
        attention("forward", 577, "cudnn", [0.8, 0.9]),
        attention("forward", 1025, "cudnn", [0.9, 1.1]),  # not faster in three quarters of the pairs
        bench("bench_attention[forward-mix-torch.bfloat16-fa3]", 1.2, [1.1, 1.3], rival="fa3", predicted_ms=0.07),
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "bench_attention.jsonl").write_text("".join(lines) + lines[0][:50])  # killed while it wrote
    (tmp_path / "bench_attention.log").write_text(
        "SKIPPED [3] benchmarks/bench_attention.py:170: fa4: not installed\nSKIPPED [2] a.py:1: fa4: not installed\n"
    )
    (tmp_path / "stages.tsv").write_text(
        "build\tok\t3\t90\tdone\nncu\tnot run\t0\t0\tthere is no ncu\nbuild\tok\t4\t90\ta|b\n"
    )
    (tmp_path / "ncu.csv").write_text(NCU)
    ceilings = {"device": "a GPU", "copy_gb_per_s": 4000.0, "matmul_tflop_per_s": {"bfloat16": 600.0}}
    (tmp_path / "ceilings.json").write_text(json.dumps(ceilings))
    return tmp_path


def test_report(folder, monkeypatch, capsys):
    import gpu_report

    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(folder)])
    assert gpu_report.main() == 0
    found, text = json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()
    assert "6 duels, 1 kernels" in capsys.readouterr().out
    assert found["hand_over"] == {
        "forward": {"flash_attn": 577, "cudnn": None},
        "backward": {"flash_attn": None, "cudnn": None},
    }
    first, *_, last = found["duels"]
    # 200 MB at 4000 GB/s, and 30 GFLOP at 600 TFLOP/s; the static one against 4300 GB/s and 790 TFLOP/s.
    assert first["bound_ms"] == pytest.approx(0.05) and first["predicted_ms"] == pytest.approx(200 / 4300, rel=1e-3)
    assert last["predicted_ms"] == 0.07
    assert found["kernels"] == [
        {"kernel": "forward_kernel<64>", "grid": "(1, 2, 3)", "us": 72.5, "percent_of_dram": 81.5}
        | {"percent_of_sm": 40.1, "registers": 168.0}
    ]
    assert [s["stage"] for s in found["stages"]] == ["build", "ncu"] and found["stages"][0]["seconds"] == "4"
    assert found["skipped"] == ["bench_attention: fa4: not installed (5)"]
    for line in (
        "| ncu | not run | 0 | 0 | there is no ncu |",
        "| build | ok | 4 | 90 | a/b |",
        "| attention | forward-mix-torch.bfloat16-fa3 | fa3 | 0.1 | 0.12 | **1.20** (1.10 to 1.30) | 0.05 | 0.07 "
        "| 2000 (50 %) | 300 (50 %) |",
        "| forward_kernel<64> | (1, 2, 3) | 72.5 | 82 | 40 | 168 |",
        "| forward | flash_attn | from 577 tokens |",
        "| forward | cudnn | never |",
        "| backward | cudnn | ? |",
    ):
        assert line in text, text


def test_a_report_of_nothing(tmp_path, monkeypatch):
    import gpu_report

    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path)])
    assert gpu_report.main() == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["duels"] == []


def test_hand_over_is_written_where_dispatch_reads_it(folder, tmp_path):
    import gpu_report

    copy = tmp_path / "handover.py"
    copy.write_text(gpu_report.HANDOVER.read_text())
    gpu_report.write_hand_over(gpu_report.merge(folder)["hand_over"], "a GPU, 2026-01-02", copy)
    written = {}
    exec(copy.read_text(), written)
    assert written["FASTER_FROM"]["forward"] == {"flash_attn": 577, "cudnn": None}
    assert written["MEASURED"] == "a GPU, 2026-01-02"
    assert written["order"]("forward", 577)[0] == "flash_attn" and written["order"]("forward", 576)[0] == "cuda"
    copy.write_text("nothing")
    with pytest.raises(ValueError, match="does not hold the figures to replace"):
        gpu_report.write_hand_over({"forward": {"flash_attn": 1}}, "", copy)


@pytest.fixture
def suite(tmp_path):
    """Runs the suite with a stand-in for Python, in which each stage does what its name says."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *gpu_report.py*--ceilings*) echo measured ;;
  *gpu_report.py*) exec {sys.executable} "$@" ;;
  *setup.py*) echo "no compiler"; exit 3 ;;
  *" tests/test_attention.py "*) echo "5 passed" ;;
  *bench_pool*) echo "started"; exec sleep 30 ;;
  *) echo "done, with a tab:	here" ;;
esac
"""
    )
    python.chmod(0o755)
    (tmp_path / "bin").mkdir()  # so that no profiler of this machine is found
    for tool in ("bash", "sh", "timeout", "grep", "tail", "tr", "cut", "mkdir", "rm", "sleep", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def run(*arguments, **environment):
        env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "PATH": str(tmp_path / "bin")}
        done = subprocess.run(
            [shutil.which("bash"), SUITE, *arguments], capture_output=True, text=True, env=env | environment
        )
        return done, tmp_path / "out"

    return run


def test_a_stage_that_fails_stops_no_other(suite):
    done, out = suite(TOTAL="5000")
    found = {stage["stage"]: stage for stage in json.loads((out / "gpu.json").read_text())["stages"]}
    assert done.returncode == 1 and len(found) == 17
    assert found["build"]["result"] == "exit 3" and found["build"]["last"] == "no compiler"
    assert found["tests"]["result"] == "ok" and found["tests"]["last"] == "5 passed"
    assert found["bench_pool"]["result"] == "out of time"
    assert found["more_tests"]["result"] == "ok" and found["more_tests"]["last"] == "done, with a tab: here"
    for stage in ("memcheck", "racecheck", "ncu"):
        assert found[stage]["result"] == "not run" and found[stage]["last"].startswith("there is no ")


def test_the_suite_ends_in_time(suite):
    done, out = suite("build", "tests", "bench_pool", TOTAL="6")
    found = {stage["stage"]: stage for stage in json.loads((out / "gpu.json").read_text())["stages"]}
    assert set(found) == {"build", "tests", "bench_pool"} and done.returncode == 1
    assert int(found["bench_pool"]["limit"]) <= 6 and found["bench_pool"]["result"] in ("out of time", "not run")


def test_the_limits_leave_room_for_a_gpu_machines_ten_minutes(suite):
    done, out = suite("--list")
    assert done.returncode == 0 and not out.exists()
    assert len(done.stdout.splitlines()) >= 14
    assert 'TOTAL="${TOTAL:-570}"' in SUITE.read_text()


def make_wheel(path, files):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


def test_wheels_are_packed_and_unpacked(tmp_path, monkeypatch, capsys):
    import gpu_rivals

    def download(requirement, folder):
        if requirement.startswith("absent"):
            return "No matching distribution found"
        path = folder / f"{requirement.replace('==', '-')}-py3-none-any.whl"
        files = {
            "one/": "",
            "one/lib/": "",
            "one/__init__.py": "",
            "one/lib/libcudart.so.12": "x",
            "one/big": "y",
            "two.pth": "two/packages\n",
        }
        make_wheel(path, files | {"two/packages/three.py": "", "import_me.py": "value = 1"})
        return path

    monkeypatch.setattr(gpu_rivals, "download", download)
    monkeypatch.setattr(gpu_rivals, "XZ", [{"id": lzma.FILTER_LZMA2, "preset": 0}])
    rivals = {
        "whole": [gpu_rivals.Wheel("whole==1")],
        "part": [gpu_rivals.Wheel("part==1", ("one/lib/*",))],
        "gone": [gpu_rivals.Wheel("whole==1"), gpu_rivals.Wheel("absent==1")],
        "wrong": [gpu_rivals.Wheel("wrong==1", ("elsewhere/*",))],
    }
    monkeypatch.setattr(gpu_rivals, "RIVALS", rivals)
    monkeypatch.setattr(
        gpu_rivals, "IMPORTS", {name: "import three, import_me" for name in rivals} | {"part": "import no"}
    )
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    assert gpu_rivals.prepare(wheels, list(rivals)) == 0
    text = capsys.readouterr().out
    assert "absent==1                                not found: No matching distribution found" in text
    assert "complete: whole, part; incomplete:" in text and "holds nothing like elsewhere/*" in text
    with tarfile.open(wheels / "part_1.tar.xz") as tar:
        assert tar.getnames() == ["one/lib/libcudart.so.12"]
    assert gpu_rivals.prepare(wheels, ["gone"]) == 1

    assert gpu_rivals.install(wheels, site) == 0
    text = capsys.readouterr().out
    assert "whole          loads" in text and "part           does not load: ModuleNotFoundError" in text
    assert "gone           was not found: absent==1: No matching distribution found" in text
    environment = (site / "env.sh").read_text()
    assert f'LD_LIBRARY_PATH="{site}/one/lib' in environment and f"{site}/two/packages" in environment


def test_pip_is_asked_for_wheels_of_the_other_machine(tmp_path, monkeypatch):
    import gpu_rivals

    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and "--only-binary=:all:" in command and "--no-deps" in command
        assert command[command.index("--python-version") + 1] == "3.12" and "manylinux_2_28_x86_64" in command
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: a\nERROR: first\nERROR: No matching distribution\n"
        )

    monkeypatch.setattr(gpu_rivals.subprocess, "run", pip)
    assert gpu_rivals.download("absent==1", tmp_path) == "No matching distribution"


def test_every_rival_is_pinned():
    import gpu_rivals

    assert set(gpu_rivals.IMPORTS) == set(gpu_rivals.RIVALS)
    assert all(wheel.requirement.count("==") == 1 for wheels in gpu_rivals.RIVALS.values() for wheel in wheels)


def test_a_safe_archive_is_all_that_is_unpacked(tmp_path):
    import gpu_rivals

    with tarfile.open(tmp_path / "bad.tar.xz", "w:xz") as tar:
        entry = tarfile.TarInfo("../outside")
        tar.addfile(entry, io.BytesIO())
    with pytest.raises(tarfile.FilterError):
        gpu_rivals.unpack(tmp_path / "bad.tar.xz", tmp_path / "site")
