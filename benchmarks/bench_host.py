"""What the host does for a forward on a GPU: Python, checks, dispatch; with no GPU, every kernel leaving its work out.

    python benchmarks/bench_host.py [--repeats 200]

On a machine shared with others the long rows come out too long, because caches go cold; the short ones are right.

A kernel makes its empty results and no more (tests/stubbed.py), for us and for timm: linear layers, GELU, timm's
convolution, attention and LayerNorm, our ops behind their dispatch. Tensors lie on the CPU and say that they do not,
for `meta` takes 30 to 600 us an op. What is not in it: a launch itself (2 to 5 us each), the copies to a GPU, a Triton
launcher (fc1 goes to the vendor's product here), and the C++ ahead of a launch. The calls are those of ViT-S/16 in
bf16, on narrow tensors: ours of a list of images of 14 x 14, 10 x 10 and 7 x 7 patches in turn, timm's of a tensor of
one image, for it takes the host as long as one of hundreds. Times are minima, of the thread's own time, so that
others' load is out of them.
"""

import argparse
import ctypes
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from stubbed import stubbed  # noqa: E402
from torch import nn  # noqa: E402

MENU = [(14, 14), (10, 10), (7, 7)]


def best(call, repeats: int) -> float:
    """Microseconds."""
    call(), call()
    times = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        call()
        times.append(time.thread_time_ns() - start)
    return min(times) / 1e3


META = torch.device("meta")
_to = torch.Tensor.to


def _stays(self, *args, **options):
    return self if args and isinstance(args[0], torch.device) else _to(self, *args, **options)


@contextmanager
def nothing_computes():
    with (
        stubbed(),
        mock.patch.object(torch.Tensor, "device", META, create=True),
        mock.patch.object(torch.Tensor, "to", _stays),
        mock.patch.object(F, "gelu", lambda x, **_: x),
        mock.patch.object(F, "layer_norm", lambda x, *_, **__: torch.empty_like(x)),
        mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q)),
        mock.patch.object(nn.Conv2d, "_conv_forward", _convolved),
    ):
        yield


def _convolved(self, x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0], *(n // p for n, p in zip(x.shape[2:], self.kernel_size)))


@torch.no_grad()
def main(repeats: int) -> None:
    import timm

    from revit_kernels.models.vit import VarLenViT
    from revit_kernels.ops import attention, layer_norm
    from revit_kernels.packing import Packing

    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: memory stays with the process, as a GPU's does with torch's allocator.
    ctypes.CDLL(None).mallopt(-3, 1 << 25)
    ctypes.CDLL(None).mallopt(-1, 1 << 30)
    options = {"embed_dim": 48, "num_heads": 6, "dtype": torch.bfloat16}
    ours = VarLenViT(**options).eval()
    theirs = timm.models.vision_transformer.VisionTransformer(**options).eval()
    rows, batch = [], torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16)
    with nothing_computes():
        for count in (32, 256):
            grids = [MENU[i % len(MENU)] for i in range(count)]
            images = [torch.zeros(3, 16 * h, 16 * w, dtype=torch.uint8) for h, w in grids]
            packing = Packing.from_grids(grids, device=META)
            rows += [
                (f"ours, {count} images in a list", lambda images=images, grids=grids: ours(images, grids=grids)),
                (f"ours, {count}, the packing given", lambda images=images, p=packing: ours(images, packing=p)),
                (f"from_grids of {count}", lambda grids=grids: Packing.from_grids(grids, device=META)),
            ]
        x = torch.empty(packing.capacity, 48, dtype=torch.bfloat16)
        norm, q, ends, longest = ours.blocks[0].norm1, x.view(-1, 6, 8), packing.cu_seqlens, packing.max_seqlen
        rows += [
            ("layer_norm", lambda: layer_norm(x, norm.weight, norm.bias, branch=x)),
            ("attention", lambda: attention(q, q, q, ends, longest)),
            ("timm", lambda: theirs(batch)),
        ]
        rows = [(name, best(call, repeats)) for name, call in rows]
    for name, microseconds in rows:
        print(f"{name:36} {microseconds:9.1f} us")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    main(parser.parse_args().repeats)
