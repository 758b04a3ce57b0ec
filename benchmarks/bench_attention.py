"""Attention within each image against what a user would run instead: one packed batch, many ways.

Rivals fa2, fa3, fa4, varlen and cudnn are the kernels alone, at their fastest (a backward that is not deterministic,
the tail as it was). backend_flash_attn and backend_cudnn are what `attention` runs where it hands over to them.
"""

from functools import cache, partial

import pytest
import roofline
import torch
import torch.nn.functional as F

from revit_kernels.dispatch import refusal
from revit_kernels.ops.attention import attention, cudnn, flash_versions, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD_DIM = 12, 64
if DEVICE == "cuda":
    IMAGES = 256
    LENGTHS = {str(n): [n] * IMAGES for n in (50, 101, 197, 257, 577, 1025)}
else:
    LENGTHS = {str(n): [n] * max(1, 1576 // n) for n in (17, 50, 101, 197, 257, 577)}
LENGTHS["mix"] = [17, 50, 101, 197] * (64 if DEVICE == "cuda" else 8)


def make_inputs(lengths, dtype, gradients):
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, HEADS, HEAD_DIM, device=DEVICE, dtype=dtype, requires_grad=gradients)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    return qkv, cu_seqlens


def loop(qkv, cu_seqlens, lengths):
    """One call for each image."""
    return torch.cat([dense(image[None])[0] for image in qkv.split(lengths)])


def dense(qkv):
    """(images, length, 3, heads, head_dim) -> (images, length, heads, head_dim)"""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def bucketed(qkv, cu_seqlens, lengths):
    """One dense batch for each length, of images that already lie together."""
    images = dict.fromkeys(sorted(lengths))
    batches = qkv.split([n * lengths.count(n) for n in images])
    return torch.cat([dense(x.unflatten(0, (-1, n))).flatten(0, 1) for x, n in zip(batches, images)])


def padded(qkv, cu_seqlens, lengths):
    """One batch padded to the longest image, with a mask."""
    at = torch.arange(max(lengths), device=DEVICE) + cu_seqlens[:-1, None]
    inside = at < cu_seqlens[1:, None]
    q, k, v = qkv[at.clamp(max=qkv.shape[0] - 1)].permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None, :])
    return y.transpose(1, 2)[inside]


def nested(qkv, cu_seqlens, lengths):
    """A nested tensor with the jagged layout."""
    q, k, v = (torch.nested.nested_tensor_from_jagged(x, cu_seqlens.long()).transpose(1, 2) for x in qkv.unbind(1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


class Kernel(torch.autograd.Function):
    """A library's forward and backward, and nothing around them."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, longest, library):
        lengths = (cu_seqlens, longest, cu_seqlens, longest, HEAD_DIM**-0.5)
        out, lse = library.forward(q, k, v, *lengths)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.library, ctx.lengths = library, lengths
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = ctx.library.backward(grad, *ctx.saved_tensors, *ctx.lengths, deterministic=False)
        return *grads, None, None, None


class CuDNN:
    """aten's cuDNN ops. On strided views where this torch gets those right, else on copies."""

    @staticmethod
    def forward(q, k, v, cu_seqlens, longest, _, longest_k, scale):
        q, k, v = (x if CuDNN.takes_strides() else x.contiguous() for x in (q, k, v))
        lengths = (cu_seqlens, cu_seqlens, longest, longest_k)
        return cudnn._forward(q, k, v, None, *lengths, True, 0.0, False, False, scale=scale)[:2]

    @staticmethod
    def backward(grad, q, k, v, out, lse, cu_seqlens, longest, _, longest_k, scale, deterministic):
        q, k, v = (x.contiguous() for x in (q, k, v))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = (cu_seqlens, cu_seqlens, longest, longest_k)
        return cudnn._backward(grad, q, k, v, out, lse, seed, seed, None, *lengths, 0.0, False, scale=scale)

    @staticmethod
    @cache
    def takes_strides():
        qkv, cu_seqlens = make_inputs([40, 64], torch.bfloat16, False)
        lengths = (None, cu_seqlens, cu_seqlens, 64, 64, True, 0.0, False, False)
        views = cudnn._forward(*qkv.unbind(1), *lengths)[0]
        return torch.equal(views, cudnn._forward(*(x.contiguous() for x in qkv.unbind(1)), *lengths)[0])


def kernel(library, qkv, cu_seqlens, lengths):
    return Kernel.apply(*qkv.unbind(1), cu_seqlens, max(lengths), library)


def backend(name, qkv, cu_seqlens, lengths):
    return attention(*qkv.unbind(1), cu_seqlens, max(lengths), backend=name)


RIVALS = {f.__name__: f for f in (bucketed, loop, padded, nested)}
RIVALS["varlen"] = partial(kernel, flash_versions.Torch)
RIVALS |= {name: partial(kernel, flash_versions.VERSIONS[name]) for name in ("fa2", "fa3", "fa4")}
RIVALS["cudnn"] = partial(kernel, CuDNN)
RIVALS |= {f"backend_{name}": partial(backend, name) for name in ("flash_attn", "cudnn")}


def reason(name, step, qkv, cu_seqlens, lengths):
    """Why a rival cannot run here, or None."""
    q, k, v = qkv.detach().unbind(1)
    tensors = (q, k, v) if step == "forward" else (q, q, k, v, q, torch.empty(q.shape[:2]))  # grad ... out, lse
    arguments = (*tensors, cu_seqlens, max(lengths), cu_seqlens, max(lengths), 1.0)
    if name == "nested" and DEVICE == "cpu":
        return "its attention asks the CUDA driver for its kernels"
    if name.startswith("backend_"):
        return refusal("attention", name.removeprefix("backend_"), *arguments, step=step)
    if name == "cudnn":
        return refusal("attention", "cudnn", *arguments, step=step)
    version = flash_versions.VERSIONS.get("torch" if name == "varlen" else name)
    if version is None:
        return None
    if DEVICE == "cpu" or q.dtype == torch.float32:
        return "CUDA tensors of half precision only"
    return version.refusal(q, step == "backward")


@cache
def our_backend(dtype):
    """Of a GPU our own: `attention` may hand over to a rival. None, as dispatch chooses, on the CPU."""
    if DEVICE == "cpu":
        return None
    return "triton" if refusal("attention", "cuda", *sample(DEVICE, dtype)) else "cuda"


def ours(qkv, cu_seqlens, lengths):
    return attention(*qkv.unbind(1), cu_seqlens, max(lengths), backend=our_backend(qkv.dtype))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_attention(duel, benchmark, step, length, dtype, rival):
    lengths = sorted(LENGTHS[length])
    inputs = (*make_inputs(lengths, dtype, step == "backward"), lengths)
    if why := reason(rival, step, *inputs):
        pytest.skip(f"{rival}: {why}")
    theirs = partial(RIVALS[rival], *inputs)
    mine, his = ours(*inputs), theirs()
    torch.testing.assert_close(mine, his, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)
    moved = inputs[0].numel() * inputs[0].element_size() * 4 // 3
    flops = sum(4 * n * n * HEAD_DIM * HEADS for n in lengths)
    rule = roofline.attention if step == "forward" else roofline.attention_backward
    work = sum((rule(n, lengths.count(n), HEADS, HEAD_DIM) for n in set(lengths)), roofline.Work(0))
    if step == "forward":
        with torch.no_grad():
            duel(partial(ours, *inputs), theirs, bytes=moved, flops=flops, rival=rival, rounds=20)
    else:
        seed = torch.randn_like(mine)

        def gradient(y):
            return lambda: torch.autograd.grad(y, inputs[0], seed, retain_graph=True)

        duel(gradient(mine), gradient(his), bytes=moved * 2, flops=flops * 5 // 2, rival=rival, rounds=20)
    if dtype != torch.float32 and DEVICE == "cuda":
        benchmark.extra_info |= {"predicted_ms": work.seconds * 1e3, "work": [work.bytes, work.issued]}
