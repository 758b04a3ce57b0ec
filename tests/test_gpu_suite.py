"""What is left of the GPU benchmarks where there is no GPU: the suite's flow, its report, and the rivals' wheels."""

import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from revit_kernels import measured

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
    failures = [
        {"test": "tests/test_attention.py::test_contract[menu-torch.bfloat16-cuda]", "why": "misaligned | address"},
        {"test": "tests/test_attention.py::test_contract[long-torch.float16-cuda]", "why": "worker crashed"},
        {"test": "tests/test_vit.py::test_it", "why": "AssertionError"},
    ]
    (tmp_path / "failures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in failures))
    ceilings = {"device": "a GPU", "copy_gb_per_s": 4000.0, "matmul_tflop_per_s": {"bfloat16": 600.0}}
    (tmp_path / "ceilings.json").write_text(json.dumps(ceilings))
    return tmp_path


def test_report(folder, monkeypatch):
    import gpu_report

    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(folder), "--output", str(folder / "gpu")])
    assert gpu_report.main() == 1  # ncu was not run
    found, text = json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()
    assert len(found["duels"]) == 6 and [row["kernel"] for row in found["failures"]] == [
        "attention.cuda",
        "tests/test_vit.py",
    ]
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
        "| attention.cuda | 2 | test_contract[menu-torch.bfloat16-cuda] | misaligned / address |",
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

    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path), "--output", str(tmp_path / "gpu")])
    assert gpu_report.main() == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["duels"] == []


def test_hand_over_is_written_where_dispatch_reads_it(folder, tmp_path, monkeypatch):
    import gpu_report

    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    file = gpu_report.write_hand_over("a GPU", gpu_report.merge(folder)["hand_over"])
    assert file == tmp_path / "a_GPU.json"
    assert json.loads(file.read_text()) == {"attention": {"forward": {"flash_attn": 577}, "backward": {}}}


@pytest.fixture
def suite(tmp_path):
    """Runs a call of the suite with a stand-in for Python, in which each stage does what its name says."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *gpu_report.py*--ceilings*) echo measured ;;
  *gpu_report.py*) exec {sys.executable} "$@" ;;
  *native.load*) exit 1 ;;
  *setup.py*) echo "no compiler"; exit 3 ;;
  *gpu_smoke.py*--switch-off*) printf attention.cuda,pool.triton >"$4"; exit 1 ;;
  *bench_attention*) echo "without $REVIT_DISABLE" ;;
  *" tests/ops/test_attention.py "*) echo "5 passed" ;;
  *bench_pool*) echo "started"; exec sleep 30 ;;
  *) echo "done, with a tab:	here" ;;
esac
"""
    )
    python.chmod(0o755)
    (tmp_path / "bin").mkdir()  # so that no profiler of this machine is found
    tools = "bash sh sed setsid timeout grep tail tr cut mkdir rm sleep dirname realpath tar gzip cat"
    for tool in tools.split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def run(*arguments, **environment):
        env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "PATH": str(tmp_path / "bin")}
        done = subprocess.run(
            [shutil.which("bash"), SUITE, *arguments], capture_output=True, text=True, env=env | environment
        )
        report = tmp_path / "out" / f"{arguments[0]}.json" if arguments else tmp_path
        rows = json.loads(report.read_text())["stages"] if report.is_file() else []
        return done, {row["stage"]: row for row in rows}

    return run


CHECK = ["build", "table", "contracts_cuda", "memcheck", "racecheck", "synccheck", "initcheck", "racecheck_ampere"]
CHECK += ["contracts_others", "models"]
MEASURE = [
    "build",
    "smoke",
    "ceilings",
    "forward",
    "bench_attention",
    "bench_vit",
    "bench_captured",
    "bench_layer_norm",
]
MEASURE += ["bench_linear", "bench_patch_embed", "bench_pool", "bench_pos_embed", "ncu", "bench_vit_compiled"]


def test_a_stage_that_fails_stops_no_other(suite, tmp_path):
    done, found = suite("check")
    assert done.returncode == 1 and set(found) == set(CHECK)
    assert found["build"]["result"] == "exit 3" and found["build"]["last"] == "no compiler"
    assert found["contracts_cuda"]["result"] == "ok" and found["contracts_cuda"]["last"] == "5 passed"
    assert found["models"]["result"] == "ok" and found["models"]["last"] == "done, with a tab: here"
    for stage in ("memcheck", "racecheck", "synccheck", "initcheck", "racecheck_ampere"):
        assert found[stage]["result"] == "not run" and found[stage]["last"] == "there is no compute-sanitizer"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"check.md", "check.json", "check_logs.tar.gz"}
    assert done.stdout.endswith((tmp_path / "out" / "check.md").read_text())


def test_a_kernel_that_is_wrong_is_switched_off_and_the_rest_is_measured(suite):
    done, found = suite("measure", STAGES="smoke bench_attention bench_pool", TOTAL="8")
    assert done.returncode == 1 and found["smoke"]["result"] == "exit 1"
    assert found["bench_attention"] | {"seconds": 0} == {
        "stage": "bench_attention", "result": "ok", "seconds": 0, "limit": found["bench_attention"]["limit"],
        "last": "without attention.cuda,pool.triton",
    }  # fmt: skip
    assert found["bench_pool"]["result"] == "out of time" and int(found["bench_pool"]["limit"]) <= 8


@pytest.mark.parametrize("call, stages, most", [("check", CHECK, 150), ("measure", MEASURE, 400)])
def test_the_limits_of_a_call(suite, call, stages, most):
    done, _ = suite(call, "--list")
    limits = dict(re.findall(r"^(\w+) \((\d+) s\):", done.stdout, re.MULTILINE))
    assert done.returncode == 0 and f"{call}) total={most} ;;" in SUITE.read_text()
    assert set(limits) == set(stages)
    # Sanitizers run beside the others; libraries that were carried need no time to be built.
    alone = {stage: int(limit) for stage, limit in limits.items() if "check" not in stage and stage != "build"}
    assert sum(alone.values()) <= most, "the last stages would not be reached"


def test_every_op_of_a_gpu_is_checked(suite):
    done, _ = suite("check", "--list")
    stages = dict(re.findall(r"^(\w+) \(\d+ s\): (.*)", done.stdout, re.MULTILINE))
    folders = (ROOT / "revit_kernels" / "ops").iterdir()
    on_gpus = {path.name for path in folders if (path / "cuda.py").exists() or (path / "triton.py").exists()}
    cases = re.search(r"^CASES = \{(.*?)^\}", (ROOT / "benchmarks/gpu_smoke.py").read_text(), re.MULTILINE | re.DOTALL)[
        1
    ]
    assert {*re.findall(r'^    "(\w+)":', cases, re.MULTILINE), "linear"} == on_gpus
    for stage in ("contracts_cuda", "contracts_others"):
        assert set(re.findall(r"tests/ops/test_(\w+)\.py", stages[stage])) == on_gpus | {"promises"}
        assert "contract" not in stages[stage].partition(" -k ")[2], "LayerNorm's contract is called otherwise"
    cuda = {f"{name}.cuda" for name in on_gpus if (ROOT / f"revit_kernels/ops/{name}/cuda.py").exists()}
    assert cuda == set(re.findall(r"\w+\.cuda", stages["memcheck"]))


def test_another_call_is_refused(suite):
    done, _ = suite("all")
    assert done.returncode == 2 and "gpu_suite.sh check" in done.stderr


@pytest.mark.parametrize("call, stages", [("check", CHECK), ("measure", MEASURE)])
def test_tiny_without_an_install(call, stages, tmp_path):
    """From the files alone: no package is installed, nothing is built. `measure` has the libraries carried along."""
    root = tmp_path / "clone"
    left_out = shutil.ignore_patterns("__pycache__", *(["*.so"] if call == "check" else []))
    for name in ("revit_kernels", "benchmarks", "tests", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    python = tmp_path / "python"  # -S: what is installed in place, by a .pth file, is not found
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist's workers
    env |= {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "TOTAL": "900"}
    env |= {"PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", root / SUITE.relative_to(ROOT), call, "--tiny"], capture_output=True, env=env)
    found = json.loads((tmp_path / "out" / f"{call}.json").read_text())
    results = {row["stage"]: (row["result"], row["last"]) for row in found["stages"]}
    assert set(results) == set(stages)
    lacking = {name: row for name, row in results.items() if row[0] != "ok" and not row[1].startswith("there is no ")}
    assert not lacking, (lacking, done.stderr)
    assert len(list((tmp_path / "out").iterdir())) <= 6
    if call == "measure":
        assert {duel["bench"] for duel in found["duels"]} >= {"bench_attention", "bench_vit", "bench_pool"}
        assert [forward["images"] for forward in found["forwards"]] == [2]


@pytest.fixture
def guarded(tmp_path):
    """Runs a file of tests under the plugin, in two processes; gives its output and the failures it wrote."""

    def run(text):
        (tmp_path / "test_it.py").write_text(text)
        env = os.environ | {"REVIT_FAILURES": str(tmp_path / "failures.jsonl"), "REVIT_TEST_SECONDS": "3"}
        env |= {"PYTHONPATH": str(ROOT / "benchmarks")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_guard", "-p", "no:cacheprovider", "-n", "2"]
        done = subprocess.run(
            [*command, "test_it.py"], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120
        )
        rows = (tmp_path / "failures.jsonl").read_text().splitlines()
        return done.stdout, {row["test"].partition("::")[2]: row["why"] for row in map(json.loads, rows)}

    return run


def test_a_hanging_and_a_crashing_kernel_take_no_other_test_with_them(guarded):
    said, failures = guarded(
        """
import os, time, pytest
@pytest.mark.parametrize("i", range(20))
def test_right(i):
    pass
def test_hangs():
    time.sleep(60)
def test_crashes():
    os.abort()
def test_wrong():
    assert 1 == 2, "the kernel is wrong"
"""
    )
    assert "20 passed" in said, said
    assert set(failures) == {"test_hangs", "test_crashes", "test_wrong"}
    assert "crashed" in failures["test_hangs"] and "the kernel is wrong" in failures["test_wrong"]


def test_smoke_finds_a_wrong_kernel(tmp_path):
    """A stand-in for a kernel of pool, whose first answer is wrong in one number."""
    (tmp_path / "sitecustomize.py").write_text(
        """
import importlib, sys
if "pool.reference" in sys.orig_argv and "--each" not in sys.orig_argv:
    reference = importlib.import_module("revit_kernels.ops.pool.reference")
    right, calls = reference.forward, []
    def forward(*args):
        y = right(*args).clone()
        y[0, 0] += 0.1 * (not calls)
        calls.append(1)
        return y
    reference.forward = forward
"""
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    smoke = [sys.executable, str(ROOT / "benchmarks/gpu_smoke.py"), "--each", "--switch-off", str(tmp_path / "off")]
    done = subprocess.run([*smoke, "pool.reference", "pos_embed.reference"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and (tmp_path / "off").read_text() == "pool.reference", done.stdout + done.stderr
    assert "pool.reference is switched off: " in done.stdout and "exceeds" in done.stdout


def test_a_kernel_is_switched_off_by_name():
    code = "from revit_kernels.dispatch import refusal; print(refusal('pool', 'reference'))"
    env = os.environ | {"REVIT_DISABLE": "pool.reference, attention.cuda"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stdout.strip() == "switched off by REVIT_DISABLE"
    env["REVIT_DISABLE"] = "attn.cuda"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert "ValueError: REVIT_DISABLE must name op.backend" in done.stderr and "got 'attn.cuda'" in done.stderr


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
