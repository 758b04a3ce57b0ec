"""Runs cases in a process of their own, so that a crash, a hang and memory are seen, and belong to a seed."""

import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

SECONDS = 60.0  # that one case may take
MEMORY = 2.0  # GiB
STARTING = 300.0  # seconds to import what a kind needs
NOTE_EVERY = 20.0  # seconds between two lines on how far it is


@dataclass
class Result:
    kind: str
    seed: int
    counts: Counter = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)  # seed, what happened
    memory: float = 0.0  # GiB, the most of any process
    seconds: float = 0.0

    def summary(self) -> str:
        cases = self.counts.total()
        found = ", ".join(f"{count:,} {word}" for word, count in sorted(self.counts.items()))
        end = f"{len(self.failures)} failures, at most {self.memory:.2f} GiB, {self.seconds:.0f} s"
        return f"{self.kind}: {cases:,} cases from seed {self.seed} on: {found}; {end}"


def repeat(kind: str, seed: int) -> str:
    return f"python -m tests.campaign {kind} --count 1 --seed {seed}"


def campaign(
    kind, count, seed, seconds=SECONDS, memory=MEMORY, say: Callable = lambda _: None, package=f"{__package__}."
) -> Result:
    """Attempt `count` cases, from `seed` on. say: told of every failure, and now and then how far it is"""
    result, start, noted = Result(kind, seed), time.monotonic(), time.monotonic()
    context = multiprocessing.get_context("spawn")
    at = seed
    while at < seed + count:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(package + kind, at, seed + count - at, memory, sending), daemon=True
        )
        process.start()
        sending.close()
        patience, ended = STARTING, False
        while not ended:
            try:
                if not _answers(receiving, patience):
                    process.kill()
                    result.failures.append((at, f"no answer in {patience:g} s"))
                    break
                message = receiving.recv()
            except EOFError:
                process.join()
                result.failures.append((at, f"the process ended with status {process.exitcode}"))
                break
            patience = seconds
            if message is None:  # what the kind needs is imported
                continue
            case, word, why, peak = message
            result.memory = max(result.memory, peak)
            if why:
                result.failures.append((case, why))
                say(f"{repeat(kind, case)}: {why}")
            else:
                result.counts[word] += 1
            at = case + 1
            ended = at == seed + count or peak > memory
            if time.monotonic() - noted > NOTE_EVERY:
                noted, result.seconds = time.monotonic(), time.monotonic() - start
                say(f"{result.counts.total():,} cases, {len(result.failures)} failures, {result.seconds:.0f} s")
        else:
            process.join()
            continue
        say(f"{repeat(kind, at)}: {result.failures[-1][1]}")
        process.join()
        at += 1
    result.seconds = time.monotonic() - start
    return result


def _answers(receiving, seconds: float) -> bool:
    """Whether there is one within so long, not counted while this process itself is stopped."""
    steps = max(1, round(seconds))
    return any(receiving.poll(seconds / steps) for _ in range(steps))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _work(kind, seed, count, memory, sending):
    sys.path.append(str(Path(__file__).parents[1]))  # what the tests share
    os.environ.pop("TRITON_INTERPRET", None)  # an aid for tests, which trusts what it is given
    module = import_module(kind)
    if hasattr(module, "prepare"):
        module.prepare()
    if not re.search("lib[at]san", os.environ.get("LD_PRELOAD", "")):  # these sanitizers map terabytes
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        limit = mapped + int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sending.send(None)
    for case in range(seed, seed + count):
        word, why = "", ""
        try:
            word = module.attempt(case)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(sys.exc_info()[2])[-2:]
            where = ", ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames)
            why = f"{' '.join(''.join(traceback.format_exception_only(error)).split())[:800]} ({where})"
        peak = _peak()
        if not why and peak > memory:
            why = f"{peak:.2f} GiB of memory"
        sending.send((case, word, why, peak))
        if peak > memory:  # a peak never falls: the next case begins anew
            return
