"""Compiles Triton kernels for GPUs that are not here and prints what the machine code needs, as JSON.

Run as `python tests/compile_triton.py OP:ARCH ...`, in a process of its own: with TRITON_INTERPRET set nothing would
compile.
"""

import importlib
import json
import multiprocessing
import os
import sys
from dataclasses import asdict

os.environ.pop("TRITON_INTERPRET", None)

import machine_code
import triton.language as tl

from revit_kernels.measured import rule
from revit_kernels.ops.linear.tiles import NUMBERS, TILES, WORDS

# Of each op (kernel, shape, what else its `specification` is told). An option `since` names the oldest architecture
# that has the instructions. With no option: a model's shape in bf16 or fp32, of which test_offline.py asks more.


def attention():
    dims = (32, 48, 64, 72, 80, 88, 96, 104, 112, 128, 27, 36, 100)
    for step in ("forward", "backward_q", "backward_kv"):
        yield from ((step, {"bits": 16, "head_dim": dim}, {}) for dim in dims)
        yield from ((step, {"bits": 32, "head_dim": dim}, {}) for dim in (64, 128))
        yield from ((step, {"bits": 16, "head_dim": dim}, {"dtype": "fp16"}) for dim in (64, 128))
        yield step, {"bits": 16, "head_dim": 64}, {"ones": ("heads",)}  # Triton makes a constant of a 1
        for dim, pairs in ((32, 16), (64, 32), (72, 36), (80, 40), (88, 44), (96, 16), (128, 64), (27, 13), (100, 50)):
            for half in (False, True):
                options = {"pairs": pairs, "half": half}
                yield f"{step}_turned", {"bits": 16, "head_dim": dim}, options
                if dim in (64, 128):
                    yield f"{step}_turned", {"bits": 32, "head_dim": dim}, options


def layer_norm():
    branchless = ("row", "branch", "gamma", "dsum")
    cases = [({"bits": 16, "dim": dim}, {}) for dim in (192, 384, 768, 1024, 1152, 1280)]
    cases += [({"bits": 32, "dim": 768}, options) for options in ({}, {"missing": (), "ones": ()})]
    cases += [({"bits": 32, "dim": 768}, {"missing": (), "ones": (), "branch": "bf16"})]
    cases += [
        ({"bits": 16, "dim": 768}, options)
        for options in (
            {"missing": (), "ones": (), "dtype": "fp16"},
            {"missing": ("bias",), "ones": (), "affine": "fp32", "rms": True},
            {"missing": ("weight", *branchless)},
            {"missing": branchless, "ones": (), "is_aligned": False},
        )
    ]
    for dim in (1, 96):
        ones = ("lengths", "dim", "slots")[: 3 if dim == 1 else 1]
        cases.append(({"bits": 16, "dim": dim}, {"missing": ("weight", "bias"), "ones": ones}))
    for shape, options in cases:
        yield from ((kernel, shape, options) for kernel in ("forward", "backward", "reduce"))
    for dim, missing in ((768, ()), (1280, ("row", "branch", "gamma"))):  # e4m3 came with sm_89
        yield "forward", {"bits": 16, "dim": dim}, {"quantized": True, "missing": missing, "ones": (), "since": 90}


def linear():
    whole = {"missing": ()}
    layer = {"inputs": 768, "out": 3072}
    shapes = [{"bits": 16, "parts": parts, "loads": loads, **layer} for parts in (1, 2) for loads in (WORDS, TILES)]
    for shape in shapes:
        hopper = {"since": 90} if shape["loads"] == TILES else {}
        yield "forward", shape, hopper
        yield "forward", shape | {"out": 64}, hopper
    for shape in (*shapes, *(shape | {"bits": 32} for shape in shapes[::2])):
        for activation in ("gelu", "gelu_tanh", "silu"):
            yield "forward", shape, whole | {"activation": activation}
        yield "forward", shape, {"activation": None, "missing": ("kept", "bias")}
    yield "forward", shapes[1], whole | {"dtype": "fp16"}
    yield from (("forward", shape | {"loads": NUMBERS}, whole) for shape in shapes[::2])
    e4m3 = {"since": 90, "missing": ("kept",)}
    for parts in (1, 2):
        for loads in (WORDS, TILES):
            shape = {"bits": 8, "parts": parts, "loads": loads, **layer}
            yield "forward", shape, {"since": 90}
            yield "forward", shape, e4m3 | {"quantized": True}
            yield "forward", shape, e4m3 | {"quantized": True, "grouped": True, "activation": "silu"}
            yield "forward", shape, e4m3 | {"grouped": True, "activation": None}
        for activation in ("gelu", "gelu_tanh", "silu"):
            yield "backward", {"parts": parts}, {"activation": activation, "missing": ()}
    for columns in (128, 256, 512, 768, 4096):
        yield from (("quantize", {"columns": columns}, {"bits": bits, "since": 90}) for bits in (16, 32))


def patch_embed():
    patchify = [(16, 14, {}), (16, 16, {}), (32, 16, {})]
    patchify += [
        (16, 16, {"cubic": False, "ones": ("prefix", "channels")}),
        (16, 14, {"dtype": "fp16"}),
        (32, 32, {"pixel": tl.float32, "ones": ()}),
        (32, 16, {"pixel": tl.float32, "ones": (), "cubic": False}),
    ]
    yield from (("patchify", {"bits": bits, "patch": patch}, options) for bits, patch, options in patchify)
    nothing = {"has": (False, False, False)}
    forward = [(16, {}), (32, {}), (16, {"ones": ()} | nothing), (16, {"patch": 14, "fused": False})]
    forward += [
        (16, {"fused": False, "has": (True, True, False), "ones": ()}),
        (16, {"fused": False, "has": (True, False, True), "ones": ("dim", "prefix")}),
        (16, {"ones": (), "is_aligned": False}),
        (16, {"patch": 14, "dtype": "fp16", "pixel": tl.float16}),
        (32, {"pixel": tl.float32, "ones": ()} | nothing),
        (32, {"patch": 14, "fused": False, "pixel": tl.float32}),
    ]
    yield from (("forward", {"bits": bits, "dim": 768}, options) for bits, options in forward)
    yield from (("sums", {"bits": bits, "dim": dim}, {}) for bits, dim in ((16, 768), (32, 768), (32, 64)))
    yield "sums", {"bits": 16, "dim": 768}, {"ones": ("prefix", "dim")}


def pool():
    cases = [(16, {}), (32, {})]
    cases += [(bits, {"kind": kind, "ones": ("prefix",)}) for bits in (16, 32) for kind in ("token", "avg", "max")]
    cases += [(16, {"dtype": "fp16"}), (16, {"is_aligned": False}), (16, {"ones": ("dim", "stride", "prefix")})]
    for bits, options in cases:
        yield from ((kernel, {"bits": bits, "dim": 768}, options) for kernel in ("forward", "backward"))


def pos_embed():
    for bits, dim, options in (
        (16, 768, {}),
        (32, 768, {}),
        (32, 64, {}),
        (32, 768, {"backward": True}),
        (16, 768, {"backward": True}),
        (32, 768, {"is_aligned": False}),
        (16, 768, {"dtype": "fp16"}),
        (32, 1, {"ones": ("dim",)}),  # Triton makes a constant of a 1
    ):
        yield "resample", {"bits": bits, "dim": dim}, options


def temporal_attention():
    half = {"bits": 16, "head_dim": 64}
    cases = [({"bits": 16, "head_dim": dim}, {}) for dim in (64, 128, 256)] + [({"bits": 32, "head_dim": 64}, {})]
    cases += [(half, {"dtype": "fp16"}), (half, {"is_aligned": False, "ones": ("heads", "prefix")})]
    yield from ((step, shape, options) for shape, options in cases for step in ("forward", "backward"))


CASES = {
    made.__name__: made for made in (attention, layer_norm, linear, patch_embed, pool, pos_embed, temporal_attention)
}
SPECS = {}  # all that is compiled, once each: filled before the processes are forked


def described(op, arch):
    """(what is told of it, specification) of each kernel to compile."""
    specification = importlib.import_module(f"revit_kernels.ops.{op}.triton").specification
    for kernel, shape, options in CASES[op]():
        options = dict(options)
        if options.pop("since", 80) <= arch:
            tiles = rule(op, kernel, **shape)
            about = {"op": op, "arch": arch, "kernel": kernel, "shape": shape, "tiles": tiles, "options": str(options)}
            yield about | {"models": not options}, specification(kernel, tiles, **shape | options)


def compiled(key):
    code = machine_code.compiled(*SPECS[key])
    return key, asdict(code) | {"complaint": code.complaint}


def main(pairs):
    rows = []
    for pair in pairs:
        op, arch = pair.split(":")
        for about, spec in described(op, int(arch)):
            key = str((arch, spec["kernel"].fn.__module__, spec["kernel"].__name__, sorted(spec.items(), key=str)))
            SPECS[key] = spec, int(arch)
            rows.append((about, key))
    order = sorted(SPECS, key=lambda key: ("linear" in key) + 2 * ("attention" in key), reverse=True)  # longest first
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        codes = dict(pool.imap_unordered(compiled, order))
    print(json.dumps([about | codes[key] for about, key in rows]))


if __name__ == "__main__":
    main(sys.argv[1:])
