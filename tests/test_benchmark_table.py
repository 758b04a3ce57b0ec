"""`pytest benchmarks`: what it measures without --all, and the table that it prints."""

import importlib.util
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VIT = "benchmarks/bench_vit.py::bench_vit[vit_small_patch16_224-32-torch.bfloat16-bucketed]"
POOL = "benchmarks/bench_pool.py::bench_forward[torch.bfloat16-384-padded-avg]"


@pytest.fixture(scope="module")
def summary():
    spec = importlib.util.spec_from_file_location("benchmarks_summary", BENCHMARKS / "summary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_selection_names_benchmarks_that_there_are(summary):
    for pattern in summary.DEFAULT:
        file, function = re.match(r"(\w+\.py)::(\w+)\[", pattern).groups()
        assert f"def {function}(" in (BENCHMARKS / file).read_text(), pattern


def test_the_selection(summary):
    assert summary.is_default(VIT) and summary.is_default(POOL)
    assert not summary.is_default(VIT.replace("small", "base")) and not summary.is_default(VIT.replace("bf", "f"))


@pytest.mark.parametrize("width", [80, 200])
def test_rows_of_the_table_are_aligned(summary, width):
    row = {"dtype": "bfloat16", "ours_ms": 12.345, "rival_ms": 1234.5, "speedup": 1.5, "percent_of_matmul": 61.2}
    rows = [(VIT, row | {"rival": "bucketed"}), (POOL, row | {"rival": "padded", "speedup": 0.5})]
    lines = summary.table(rows, lambda parameters, info: parameters, {"bucketed": "one dense batch per length"}, width)
    assert lines[-1].startswith("1 of 2 duels are won") and "one dense batch per length" in lines[1]
    assert (
        "whole ViT, mixed" in lines[1]
        and lines[2].startswith("pool:")
        and " 1,234  " in lines[1]
        and "61 %" in lines[1]
    )
    ends = [re.search(r"\d\.\d\dx", line).end() for line in lines[1:3]]
    assert ends[0] == ends[1] and (width < 200 or len(lines[1]) <= width)
