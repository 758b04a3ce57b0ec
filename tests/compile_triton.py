"""Compiles every Triton kernel of one op for GPUs that are not here and prints what the machine code needs, as JSON.

Run as `python tests/compile_triton.py OP`, in a process of its own: with TRITON_INTERPRET set nothing would compile.
An op's triton.py lists its kernels in `offline()`: dicts of kernel, signature, constexprs and, if not Triton's
defaults, num_warps and num_stages. A launch tells the compiler which arguments are multiples of 16, and so does a dict:
every pointer is, unless its `aligned` is False, and the integers that its `multiples` names.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

ARCHS = (80, 90, 100)


def resources(cubin):
    """Registers, stack, shared and local memory per kernel, as cuobjdump reads them from the machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def alignment(spec):
    """`attrs` of ASTSource, as a launch makes them."""
    signature, multiples = spec["signature"], spec.get("multiples", ())
    pointers = [name for name, kind in signature.items() if kind.startswith("*") and spec.get("aligned", True)]
    names = spec["kernel"].arg_names
    multiples = [name for name in multiples if name in signature]
    return {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *multiples)}


def compile_op(op):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"revit_kernels.ops.{op}.triton")
    for spec in module.offline():
        options = {k: spec[k] for k in ("num_warps", "num_stages") if k in spec}
        signature = spec["signature"] | {name: "constexpr" for name in spec["constexprs"]}
        for arch in ARCHS:
            source = ASTSource(spec["kernel"], signature, spec["constexprs"], alignment(spec))
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            row = {"kernel": spec["kernel"].__name__, "arch": arch, "constexprs": str(spec["constexprs"])}
            row |= {"aligned": spec.get("aligned", True), "signature": str(spec["signature"])}
            row |= resources(compiled.asm["cubin"]) | {"dynamic_shared": compiled.metadata.shared}
            row["wgmma"] = compiled.asm["ptx"].count("wgmma.mma_async")
            yield row


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    print(json.dumps(list(compile_op(sys.argv[1]))))
