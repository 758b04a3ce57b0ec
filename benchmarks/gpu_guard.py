"""A pytest plugin for tests of GPU kernels (-p gpu_guard): no kernel that hangs or crashes takes other tests with it.

A test that takes longer than REVIT_TEST_SECONDS (40) ends its process, and so does one after which the device answers
nothing but errors: pytest-xdist then starts another process for the tests that are left. Every failure is written to
the file that REVIT_FAILURES names as soon as it happens, a line of JSON each.
"""

import faulthandler
import json
import os
import re
import sys

import pytest
import torch

SECONDS = float(os.environ.get("REVIT_TEST_SECONDS", 40))


def _device_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart(nodeid):
    if _is_worker:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    if _is_worker:
        faulthandler.cancel_dump_traceback_later()
        if torch.cuda.is_initialized() and _device_is_lost():
            os._exit(1)


_is_worker = False


def pytest_configure(config):
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def reason(text: str) -> str:
    """The line of a traceback that says most: the last that is marked as the error."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = lines or [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0] if lines else "")[:300]


def pytest_runtest_logreport(report):
    path = os.environ.get("REVIT_FAILURES")
    if path and report.failed and not _is_worker:
        with open(path, "a") as file:
            file.write(json.dumps({"test": report.nodeid, "why": reason(str(report.longrepr))}) + "\n")
