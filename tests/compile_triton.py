"""Compiles Triton kernels for GPUs that are not here and prints what the machine code needs, as JSON.

Run as `python tests/compile_triton.py OP:ARCH ...`, in a process of its own: with TRITON_INTERPRET set nothing would
compile. Of each op and architecture: the rows of the architecture's table, and what the op's triton.py lists in
`offline()`, either (kernel, shape, options of its `specification`) or a whole specification. An option `since` names
the oldest architecture that has the instructions.
"""

import importlib
import json
import multiprocessing
import os
import sys
from dataclasses import asdict

os.environ.pop("TRITON_INTERPRET", None)

from revit_kernels.configurations import configuration, machine_code, tables


def cases(op, arch):
    """Of each kernel to compile: its name, shape, tiles, what else its specification is told, and its row, if any."""
    table = tables.shipped(arch)
    own = table.rows.items() if table and table.architecture == arch else ()
    for name, rows in own:
        if name.split(".")[0] == op:
            yield from ((name.split(".")[1], row.shape, row.tiles, {}, row) for row in rows)
    for case in importlib.import_module(f"revit_kernels.ops.{op}.triton").offline():
        if isinstance(case, dict):
            yield case["kernel"].__name__, {}, {}, case, None
        else:
            kernel, shape, options = case
            keys = {key: value for key, value in shape.items() if key != "patch" or kernel == "patchify"}
            yield kernel, shape, configuration(op, kernel, arch, **keys), options, None


def described(op, arch):
    """(what is told of it, specification) of each kernel to compile."""
    for kernel, shape, tiles, options, row in cases(op, arch):
        options = dict(options)
        if options.pop("since", 0) <= arch:
            ours = "signature" in options
            spec = options if ours else machine_code.specification(op, kernel, tiles, **shape, **options)
            about = {"op": op, "kernel": kernel, "shape": shape, "tiles": tiles, "options": str(options)}
            about |= {"row": bool(row), "designed": row.blocks if row else None, "aligned": spec.get("aligned", True)}
            yield about, spec


SPECS = {}  # all that is compiled, once each: filled before the processes are forked


def compiled(key):
    code = machine_code.compiled(*SPECS[key])
    return key, asdict(code) | {"blocks": code.blocks, "complaint": code.complaint}


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
