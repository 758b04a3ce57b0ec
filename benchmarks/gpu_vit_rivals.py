"""What a user of a GPU would run instead of VarLenViT, for bench_vit.py: each takes its Case and gives a call."""

import pytest
import torch
import torch.nn.functional as F

from revit_kernels import Packing

CUDA = torch.cuda.is_available()


def graph_of(run):
    """The call as one CUDA graph: its inputs stay where they are."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()

    def replay():
        graph.replay()
        return answer

    return replay


def _needs_gpu(name):
    if not CUDA:
        pytest.skip(f"{name}: for GPUs")


def graphed(case):
    """timm, one dense batch for each length, all as one CUDA graph."""
    _needs_gpu("graphed")
    return graph_of(lambda: torch.cat([case.timm(batch) for batch in case.batches]))


def compiled(case):
    """timm compiled, one dense batch for each length, with CUDA graphs."""
    _needs_gpu("compiled")
    torch._dynamo.reset()
    model = torch.compile(case.timm, dynamic=False)
    return graph_of(lambda: torch.cat([model(batch) for batch in case.batches]))


def naflex_compiled(case):
    """timm's NaFlexVit compiled, padded, with its cheapest mask and position interpolation."""
    _needs_gpu("naflex_compiled")
    import timm
    from bench_vit import _naflex_weights, naflex_inputs

    torch._dynamo.reset()
    model = timm.create_model(case.name, use_naflex=True, use_key_only_attn_mask=True, pos_embed_use_grid_sample=True)
    model.load_state_dict(_naflex_weights(case.timm, model))
    model, inputs = torch.compile(model.eval().to("cuda", case.dtype), dynamic=False), naflex_inputs(case)
    return lambda: model(inputs)


def packed_varlen(case):
    """timm's layers on packed tokens, and torch's varlen_attn between them."""
    _needs_gpu("packed_varlen")
    if case.dtype == torch.float32:
        pytest.skip("packed_varlen: half precision only")
    from torch.nn.attention.varlen import varlen_attn

    vit, packing = case.timm, Packing.from_grids(case.grids, 1, device="cuda")
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    first = cu_seqlens[:-1].long()

    def run():
        x = case.model._embed(case.images, packing, False)[0]
        for block in vit.blocks:
            attn = block.attn
            q, k, v = (
                F.linear(block.norm1(x), attn.qkv.weight, attn.qkv.bias)
                .view(-1, 3, attn.num_heads, attn.head_dim)
                .unbind(1)
            )
            y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
            x = x + attn.proj(y.flatten(1))
            x = x + block.mlp(block.norm2(x))
        return vit.head(vit.norm(x)[first])

    return run


RIVALS = [graphed, compiled, naflex_compiled, packed_varlen]
GRAPHED = (graphed, compiled)  # met by a graph of ours
INEXACT = (naflex_compiled,)  # its grid_sample is another interpolation of the positions
