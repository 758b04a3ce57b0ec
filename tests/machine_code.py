"""What the compiler makes of a Triton kernel, for a GPU that need not be here: registers, memory, instructions.

`ops/<op>/triton.py` says what to compile: `specification(kernel, tiles, **shape)` as a model launches it, a dict of
kernel, signature, constexprs, num_warps and, where they are not Triton's defaults, num_stages. A launch tells the
compiler which arguments are multiples of 16, and so does a specification: every pointer is, unless its `aligned` is
False, and the integers that its `multiples` names. Of a kernel's `do_not_specialize`, the counts that differ from batch
to batch, a launch tells it nothing, nor may a specification.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

# Shared memory that one block may have. What is for sm_80 and sm_100 also runs on sm_86, sm_89 and sm_120, with less.
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 99 * 1024}


@dataclass(frozen=True)
class Code:
    """One compiled kernel. Memory in bytes: stack and local of a thread, shared of a block."""

    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    wgmma: int  # instructions, as PTX has them: of Hopper's tensor cores,
    tcgen05: int  # of Blackwell's,
    tma: int  # that load a tile by the hardware's copy engine,
    wide_loads: int  # and that load 16 bytes of global memory for each thread

    @property
    def complaint(self) -> str | None:
        """Why this is not to run, or None."""
        if self.stack or self.local:
            return f"spills: {self.stack} bytes of stack and {self.local} of local memory a thread"
        if self.shared > MOST_SHARED[self.arch]:
            return f"needs {self.shared} bytes of shared memory, there are {MOST_SHARED[self.arch]}"
        return None


def compiled(spec: dict, arch: int) -> Code:
    """Compile for sm_<arch>. Needs Triton, in a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, names = spec["signature"], spec["kernel"].arg_names
    pointers = [name for name, kind in signature.items() if kind.startswith("*") and spec.get("aligned", True)]
    pointers = [name for name in pointers if name not in spec["kernel"].do_not_specialize]
    multiples = [name for name in spec.get("multiples", ()) if name in signature]
    told = {*multiples, *(name for name, value in spec["constexprs"].items() if value is not None)}
    if told := told.intersection(spec["kernel"].do_not_specialize):
        raise ValueError(f"{spec['kernel'].__name__}: no launch knows {', '.join(sorted(told))}")
    alignment = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *multiples)}
    options = {k: spec[k] for k in ("num_warps", "num_stages") if k in spec}
    constants = {name: "constexpr" for name in spec["constexprs"]}
    source = ASTSource(spec["kernel"], signature | constants, spec["constexprs"], alignment)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    used = _usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    return Code(
        arch=arch,
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        shared=made.metadata.shared + used["SHARED"],
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor\S*shared\S*\.global", ptx)),
        wide_loads=len(re.findall(r"\bld\.global\S*\.v4\.b32|\bcp\.async\S* .*, 0x10", ptx)),
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack, static shared and local memory, as cuobjdump reads them from the machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
