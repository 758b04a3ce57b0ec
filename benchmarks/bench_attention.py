"""Attention within each image against what a user would run instead: one packed batch, many ways."""

import pytest
import torch
import torch.nn.functional as F

from revit_kernels.ops.attention import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD_DIM = 12, 64
TOKENS = 65536 if DEVICE == "cuda" else 1576
LENGTHS = {str(n): [n] * max(1, TOKENS // n) for n in (17, 50, 101, 197, 257, 577)}
LENGTHS["mix"] = [17, 50, 101, 197] * (8 if DEVICE == "cpu" else 128)


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


def varlen(qkv, cu_seqlens, lengths):
    """FlashAttention-2 inside torch."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(lengths)
    return varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest)


RIVALS = [bucketed, loop, padded, nested, varlen]


def ours(qkv, cu_seqlens, lengths):
    return attention(*qkv.unbind(1), cu_seqlens, max(lengths))


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_attention(duel, step, length, dtype, rival):
    if rival is varlen and (DEVICE == "cpu" or dtype == torch.float32):
        pytest.skip("varlen_attn: CUDA tensors of half precision only")
    if rival is nested and DEVICE == "cpu":
        pytest.skip("nested: its attention asks the CUDA driver for its kernels")
    lengths = sorted(LENGTHS[length])
    inputs = (*make_inputs(lengths, dtype, step == "backward"), lengths)
    mine, his = ours(*inputs), rival(*inputs)
    torch.testing.assert_close(mine, his, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)
    moved = inputs[0].numel() * inputs[0].element_size() * 4 // 3
    flops = sum(4 * n * n * HEAD_DIM * HEADS for n in lengths)
    if step == "forward":
        with torch.no_grad():
            duel(
                lambda: ours(*inputs), lambda: rival(*inputs), bytes=moved, flops=flops, rival=rival.__name__, rounds=20
            )
        return
    seed = torch.randn_like(mine)

    def gradient(y):
        return lambda: torch.autograd.grad(y, inputs[0], seed, retain_graph=True)

    moved, flops = moved * 2, flops * 5 // 2
    duel(gradient(mine), gradient(his), bytes=moved, flops=flops, rival=rival.__name__, rounds=20)
