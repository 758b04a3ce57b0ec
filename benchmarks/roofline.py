#!/usr/bin/env python3
"""What each GPU kernel would take if only memory or only the tensor cores mattered: what a measurement has to meet.

    python benchmarks/roofline.py > benchmarks/results/roofline.md

Counted from shapes, not measured. Bytes are those that must come from or go to device memory once; operations are
counted twice: the useful ones, and those that the CUDA kernels' tiles of 16 rows issue. On Hopper mma.sync, which these
kernels use, reaches only part of the rate that wgmma does: where the tensor cores bound, expect less.
"""

from dataclasses import dataclass

COPY, PRODUCT = 4.3e12, 790e12  # an H200's measured copy in bytes/s, and product in bf16 in FLOP/s
IMAGES, HEADS, HEAD_DIM = 256, 12, 64
LENGTHS = (17, 50, 101, 197, 257, 577, 1025)
HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Work:
    """Of one launch: bytes moved, useful operations, and operations issued."""

    bytes: float
    flops: float = 0.0
    issued: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.issued + other.issued)

    def at(self, copy: float, product: float) -> float:
        """Seconds on a GPU that copies so many bytes/s and computes so many FLOP/s."""
        return max(self.bytes / copy, self.issued / product)

    @property
    def seconds(self) -> float:
        return self.at(COPY, PRODUCT)

    @property
    def bound(self) -> str:
        return "memory" if self.bytes / COPY >= self.issued / PRODUCT else "tensor cores"


def up(n: int, to: int) -> int:
    return -(-n // to) * to


def attention(length: int, images=IMAGES, heads=HEADS, head_dim=HEAD_DIM) -> Work:
    """q, k, v read and y written once, and lse; two products."""
    rows, pairs = images * length, images * heads
    moved = 4 * rows * heads * head_dim * HALF + rows * heads * SINGLE
    product = 2 * pairs * head_dim
    return Work(moved, 2 * product * length**2, 2 * product * up(length, 16) ** 2)


def attention_backward(length: int, images=IMAGES, heads=HEADS, head_dim=HEAD_DIM) -> Work:
    """grad, q, k, v, y and lse read for dq, then grad, q, k, v, lse and delta for dk and dv: seven products, since both
    kernels compute the weights and the gradients of the scores."""
    rows, pairs = images * length, images * heads
    moved = (5 + 4 + 3) * rows * heads * head_dim * HALF + 4 * rows * heads * SINGLE
    product = 2 * pairs * head_dim
    return Work(moved, 5 * product * length**2, 7 * product * up(length, 16) ** 2)


def layer_norm(tokens: int, dim: int) -> Work:
    """x and the branch read, the sum and y written, in bf16; two statistics."""
    return Work(4 * tokens * dim * HALF + 2 * tokens * SINGLE)


def layer_norm_backward(tokens: int, dim: int) -> Work:
    """dy, dsum, the sum and the branch read, dx and dbranch written."""
    return Work(6 * tokens * dim * HALF + 2 * tokens * SINGLE)


def patch_embed(patches: int, patch: int, dim: int) -> Work:
    """uint8 pixels read once at their own size, the weight once, tokens written."""
    inputs = 3 * patch * patch
    product = 2 * patches * inputs * dim
    return Work(patches * inputs + inputs * dim * HALF + patches * dim * HALF, product, product)


def pos_embed(tokens: int, dim: int) -> Work:
    """The table read from cache, a row written for each token."""
    return Work(tokens * dim * HALF)


def linear(rows: int, inputs: int, out: int) -> Work:
    """x and the weight read, the result written."""
    product = 2 * rows * inputs * out
    return Work((rows * inputs + inputs * out + rows * out) * HALF, product, product)


def alone(rows: int, columns: int, steps: int) -> Work:
    """What runs behind a product: so many passes over its result."""
    return Work(steps * rows * columns * HALF)


def rows():
    shape = f"{IMAGES} images, {HEADS} heads of {HEAD_DIM}"
    for length in LENGTHS:
        yield f"attention, {length} tokens, {shape}", attention(length)
    for length in LENGTHS:
        yield f"attention backward, {length} tokens, {shape}", attention_backward(length)
    for dim in (384, 768, 1024, 1280):
        tokens = IMAGES * 197
        yield f"layer_norm with a branch, {tokens:,} tokens of {dim}", layer_norm(tokens, dim)
        yield f"layer_norm backward, {tokens:,} tokens of {dim}", layer_norm_backward(tokens, dim)
    for dim in (384, 768, 1024):
        tokens = IMAGES * 197
        yield f"linear with GELU, {tokens:,} tokens, {dim} to {4 * dim}", linear(tokens, dim, 4 * dim)
        yield f"  GELU of its own behind it, {tokens:,} tokens of {4 * dim}", alone(tokens, 4 * dim, 2)
        yield f"linear, {tokens:,} tokens, {dim} to {dim}", linear(tokens, dim, dim)
        yield f"linear, {tokens:,} tokens, {4 * dim} to {dim}", linear(tokens, 4 * dim, dim)
    for dim in (384, 768):
        patches = IMAGES * 196
        yield f"patch_embed, {patches:,} patches of 16x16 to {dim}", patch_embed(patches, 16, dim)
        yield f"pos_embed, {patches:,} tokens of {dim}", pos_embed(patches, dim)


def table() -> str:
    lines = [
        "# What the GPU kernels would take at best",
        "",
        f"Counted from shapes by benchmarks/roofline.py against {COPY / 1e12:.1f} TB/s and {PRODUCT / 1e12:.0f} "
        "TFLOP/s in bf16 (an H200's). **Predictions, none of them measured.**",
        "",
        "| kernel | MB | useful GFLOP | issued | bound by | at best, us | useful TFLOP/s then |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, work in rows():
        useful = f"{work.flops / 1e9:.1f}" if work.flops else ""
        issued = f"{work.issued / work.flops:.2f}x" if work.flops else ""
        rate = f"{work.flops / work.seconds / 1e12:.0f}" if work.flops else ""
        cells = [name, f"{work.bytes / 1e6:.0f}", useful, issued, work.bound, f"{work.seconds * 1e6:.0f}", rate]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
