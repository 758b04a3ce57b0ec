"""From which length on another library's attention measured faster than the CUDA kernels, and so is tried before them.

Measured by benchmarks/bench_attention.py on a GPU, as the backend runs (with its copies and its zeroed tail), and
written here by `benchmarks/gpu_report.py RESULTS --hand-over`. None: not measured yet, or not faster at any length
measured; what is ours then stays first.
"""

from revit_kernels.dispatch import BACKENDS

FASTER_FROM = {  # tokens of the longest image
    "forward": {"flash_attn": None, "cudnn": None},
    "backward": {"flash_attn": None, "cudnn": None},
}
MEASURED = None  # the GPU, and the date

# Of FA2 the gradient of q depends on how many images there are (see flash_attn.py): where ours can do it, they do.
_rivals = tuple(FASTER_FROM["backward"])
_ORDER = {
    "forward": BACKENDS,
    "backward": (*(b for b in BACKENDS if b not in (*_rivals, "reference")), *_rivals, "reference"),
}


def order(step: str, longest: int) -> tuple[str, ...]:
    """The backends in the order in which to try them for images of at most `longest` tokens."""
    first = tuple(name for name, start in FASTER_FROM[step].items() if start is not None and longest >= start)
    return (*first, *(name for name in _ORDER[step] if name not in first))
