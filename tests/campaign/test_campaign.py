"""A short part of the campaign; `python -m tests.campaign` is the long one."""

import importlib.util
import os

import pytest
import torch

from .runner import campaign, repeat

CASES = {"images": 1500, "checkpoints": 60, "files": 150, "ops": 1500, "videos": 60, "threads": 4, "kills": 4}
CASES["interpreted"] = 150
NEEDS = {"videos": "av", "files": "pyarrow", "kills": "pyarrow", "interpreted": "triton"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
@pytest.mark.parametrize("kind", CASES)
def test_campaign(kind):
    if kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"needs {NEEDS[kind]}")
    result = campaign(kind, CASES[kind], seed=0)
    assert not result.failures, "\n".join(f"{repeat(kind, seed)}: {why}" for seed, why in result.failures)
    assert result.counts.total() == CASES[kind]


@pytest.mark.parametrize(
    "what, why",
    [("raise KeyError('x')", "KeyError"), ("os._exit(3)", "status 3"), ("time.sleep(9)", "no answer in 0.5 s")],
)
def test_what_a_case_does_is_seen(what, why, tmp_path, monkeypatch):
    """One case fails; those before it and behind it are counted."""
    text = f"import os, time\ndef attempt(seed):\n    if seed == 12:\n        {what}\n    return 'fine'\n"
    (tmp_path / "wrong.py").write_text(text)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = campaign("wrong", 5, seed=10, seconds=0.5, package="")
    assert [seed for seed, _ in result.failures] == [12] and why in result.failures[0][1]
    assert result.counts == {"fine": 4}
