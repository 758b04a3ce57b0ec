"""In which order the backends of attention are tried: ours first, unless another measured faster from a length on.

Measured on an H200 (2026-11-28), forward, 256 images of 12 heads of 64, bf16, as CUDA graphs: `cuda` takes 31, 40, 143,
752, 2291 us at 17, 50, 197, 577, 1025 tokens, torch's FlashAttention 2 takes 78, 90, 247, 1202, 3592. A GPU on which
another is faster has that length in the table "attention" of `revit_kernels/measured`, as bench_attention.py measures
it: as the backend runs, with its copies and its zeroed tail.
"""

import math

import torch

from revit_kernels import measured
from revit_kernels.dispatch import BACKENDS

RIVALS = ("flash_attn", "cudnn")
# Of FA2 the gradient of q depends on how many images there are (see flash_attn.py): where ours can do it, they do.
ORDER = {
    "forward": BACKENDS,
    "backward": (*(name for name in BACKENDS if name not in (*RIVALS, "reference")), *RIVALS, "reference"),
}


def order(step: str, device: torch.device, longest: int) -> tuple[str, ...]:
    """The backends in the order in which to try them for images of at most `longest` tokens."""
    faster_from = measured.of(device).get("attention", {}).get(step)
    if not faster_from:
        return ORDER[step]
    first = tuple(name for name in RIVALS if longest >= faster_from.get(name, math.inf))
    return (*first, *(name for name in ORDER[step] if name not in first))
