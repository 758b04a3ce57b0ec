"""Eight threads that ask one engine, or one plain module, at once: the bits of one thread.

A thread gives way every 10 us. The engines and modules live on from case to case.
"""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from revit_kernels.ops.linear.panels import has_kernel

MADE = {}
THREADS, CALLS = 8, 250  # of each thread, in a case
GRIDS = (((4, 4),), ((2, 2),), ((3, 3), (4, 4), (2, 2), (3, 3)), ((4, 4), (2, 3)), ((2, 2), (5, 1)), ((4, 4),) * 3)


def _made(dtype=torch.float32, quantize=None, engine=True):
    from tiny_revit import make_model

    model = make_model(depth=2).to(dtype).requires_grad_(False)
    return (model.engine(quantize=quantize) if engine else model), dtype


SUBJECTS = {
    "engine": lambda: _made(),
    "module": lambda: _made(engine=False),
    "engine int8": lambda: _made(quantize="int8"),
    "module bf16": lambda: _made(torch.bfloat16, engine=False),
}


def prepare():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.setswitchinterval(1e-5)
    if not has_kernel("int8"):
        del SUBJECTS["engine int8"]
    for name, make in SUBJECTS.items():
        subject, dtype = make()
        batches = [([torch.randn(3, 4 * h, 4 * w).to(dtype) for h, w in grids], grids) for grids in GRIDS]
        with torch.inference_mode():
            wanted = [subject(images, grids=grids) for images, grids in batches]
        subject = make()[0]  # nothing is kept yet: threads meet where it is made
        MADE[name] = subject, batches, wanted


def attempt(seed: int) -> str:
    name = list(SUBJECTS)[seed % len(SUBJECTS)]
    subject, batches, wanted = MADE[name]

    def ask(order):
        wrong = 0
        with torch.inference_mode():
            for at in order:
                images, grids = batches[at]
                wrong += not torch.equal(subject(images, grids=grids), wanted[at])
        return wrong

    r = random.Random(seed)
    orders = [r.choices(range(len(GRIDS)), k=CALLS) for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        wrong = sum(pool.map(ask, orders))
    assert not wrong, f"{wrong} of {THREADS * CALLS} answers have other bits"
    return name
