#!/usr/bin/env python3
"""Every Triton kernel at every shape of the tables: what bounds it, and how many programs a multiprocessor holds.

    python benchmarks/kernels.py > benchmarks/results/kernels.md

Counted from shapes and read from revit_kernels/configurations, where tests/test_offline.py proves the numbers of
programs on the machine code. Needs no GPU; nothing here is measured but the two ceilings of roofline.py.
"""

from roofline import COPY, HEADS, IMAGES, PRODUCT, SINGLE, Work, attention, layer_norm, layer_norm_backward, up

from revit_kernels.configurations.tables import FOLDER, architectures, read

LENGTH, DIM = 197, HEADS * 64
TOKENS = IMAGES * LENGTH
PRODUCTS = {8: 2 * PRODUCT, 16: PRODUCT, 32: 67e12}  # e4m3 twice bf16; fp32 in full precision: an H200's datasheet


def _attention(bytes_a_number, head_dim, tensors, numbers, products):
    """tensors read and written, numbers of a row and head beside them, and products."""
    heads = max(1, DIM // head_dim)
    rows, pairs = TOKENS * heads, IMAGES * heads
    moved = rows * (tensors * head_dim * bytes_a_number + numbers * SINGLE)
    useful, issued = (2 * products * pairs * head_dim * n**2 for n in (LENGTH, up(LENGTH, 16)))
    return Work(moved, useful, issued)


def _linear(half, inputs, out, parts=1, **_):
    product = 2 * TOKENS * inputs * out
    return Work(half * (TOKENS * inputs + inputs * out) + 2 * TOKENS * out / parts, product, product)


def _patch(half, dim):
    product = 2 * IMAGES * 196 * 768 * dim
    return Work(IMAGES * 196 * 768 + half * (768 * dim + IMAGES * 196 * dim), product, product)


# Of 256 images of 197 tokens; the first argument: bytes of a number.
WORK = {
    "attention.forward": lambda half, head_dim: _attention(half, head_dim, 4, 1, 2),
    "attention.backward_q": lambda half, head_dim: _attention(half, head_dim, 6, 2, 3),
    "attention.backward_kv": lambda half, head_dim: _attention(half, head_dim, 6, 2, 4),
    "layer_norm.forward": lambda half, dim: Work(layer_norm(TOKENS, dim).bytes * half / 2),
    "layer_norm.backward": lambda half, dim: Work(layer_norm_backward(TOKENS, dim).bytes * half / 2),
    "layer_norm.reduce": lambda half, dim: Work(1024 * 3 * dim * SINGLE),
    "linear.forward": _linear,
    "patch_embed.forward": _patch,
    "patch_embed.patchify": lambda half, patch: Work(IMAGES * 196 * 768 * (1 + half)),
    "patch_embed.sums": lambda half, dim: Work(IMAGES * 196 * dim * half),
    "pool.forward": lambda half, dim: Work(TOKENS * dim * half),
    "pool.backward": lambda half, dim: Work(TOKENS * dim * half * 2),
    "pos_embed.resample": lambda half, dim: Work((14 * 14 + 10 * 10 + 7 * 7) * dim * half),
}
assert _attention(2, 64, 4, 1, 2).bytes == attention(LENGTH).bytes


def rows():
    tables = {arch: read(str(FOLDER / f"sm_{arch}.json")) for arch in architectures()}
    names = sorted({name for table in tables.values() for name in table.rows})
    for name in names:
        shapes = []
        for table in tables.values():
            shapes += [row.shape for row in table.rows.get(name, ()) if row.shape not in shapes]
        for shape in shapes:
            own = [next((r for r in t.rows.get(name, ()) if r.shape == shape), None) for t in tables.values()]
            sizes = {key: value for key, value in shape.items() if key != "bits"}
            work = WORK[name](shape.get("bits", 16) // 8, **sizes) if name in WORK else None
            yield name, shape, own, work


def table() -> str:
    archs = [f"sm_{arch}" for arch in architectures()]
    lines = [
        "# The Triton kernels at every shape of their tables",
        "",
        f"By benchmarks/kernels.py, for {IMAGES} images of {LENGTH} tokens, against {COPY / 1e12:.1f} TB/s and "
        f"{PRODUCT / 1e12:.0f} TFLOP/s in bf16 (an H200's). Programs: what one multiprocessor holds at once, by "
        "architecture; tests/test_offline.py holds the machine code to them. **Predictions, none of them measured.**",
        "",
        f"| kernel | shape | MB | GFLOP | bound by | at best, us | programs {', '.join(archs)} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape, own, work in rows():
        cells = ["", "", "", ""]
        if work:
            memory, tensor = work.bytes / COPY, work.issued / PRODUCTS[shape.get("bits", 16)]
            bound = "memory" if memory >= tensor else "products"
            flops = f"{work.flops / 1e9:.1f}" if work.flops else ""
            cells = [f"{work.bytes / 1e6:.0f}", flops, bound, f"{1e6 * max(memory, tensor):.1f}"]
        blocks = ", ".join(str(row.blocks) if row else "-" for row in own)
        shown = " ".join(f"{key}={value}" for key, value in shape.items())
        lines.append("| " + " | ".join([name, shown, *cells, blocks]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
