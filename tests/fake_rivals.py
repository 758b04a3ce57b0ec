"""Stand-ins for FlashAttention 4, 3, 2, torch's own and cuDNN on the CPU: called exactly as the real ones, with the
answers of the reference, in their layouts, and with NaN wherever the real ones leave memory as it was.

Signatures: flash-attn-4 4.0.0b10 (wheel), flash_attn_3 as in xformers 0.0.34 (its _C.so) and flash-attention v2.8.3,
flash_attn 2.7.4 to 2.8.3, aten of the torch that runs.
"""

import contextlib
import sys
import types

import torch

from revit_kernels.ops.attention import reference
from revit_kernels.ops.attention.flash_versions import VERSIONS

FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None,"
    " Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None,"
    " Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,"
    " Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,"
    " Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,"
    " Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,"
    " int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False,"
    " Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0)"
    " -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None,"
    " Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,"
    " float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,"
    " float softcap=0., bool deterministic=False, int sm_margin=0)"
    " -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _check(tensors, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k):
    """What the real kernels require of tensors and boundaries."""
    for x in tensors:
        assert x.ndim == 3 and x.dtype in (torch.float16, torch.bfloat16) and x.shape[2] % 8 == 0
        assert x.stride(2) == 1 and x.data_ptr() % 16 == 0 and not any(s % 8 for s in x.stride()[:2])
    for ends, longest in ((cu_seqlens, max_seqlen), (cu_seqlens_k, max_seqlen_k)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and len(ends) > 1
        assert isinstance(longest, int) and longest >= int(ends.diff().max())


def _unwritten(x, rows):
    x[rows:] = float("nan")
    return x


def answer(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, reads_on, heads_first=True):
    """reads_on: whether NaN behind the last image reaches the images."""
    lengths = (cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    _check((q, k, v), *lengths)
    out, lse = reference.forward(q, k, v, *lengths, scale)
    if reads_on and v[cu_seqlens_k[-1] :].isnan().any():
        out[:] = float("nan")
    keyless = torch.repeat_interleave(cu_seqlens_k.diff() == 0, cu_seqlens.diff())
    lse[: len(keyless)][keyless] = float("inf")
    _unwritten(out, cu_seqlens[-1]), _unwritten(lse, cu_seqlens[-1])
    return out, lse.T.contiguous() if heads_first else lse[:, :, None].contiguous()


def gradients(
    grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, reads_on, heads_first=True
):
    lengths = (cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    _check((grad, q, k, v, out), *lengths)
    rows, heads = q.shape[:2]
    assert lse.is_contiguous() and lse.shape == ((heads, rows) if heads_first else (rows, heads, 1))
    lse = lse.T if heads_first else lse[:, :, 0]
    dq, dk, dv = reference.backward(grad, q, k, v, out, lse, *lengths, scale)
    ends = {"q": cu_seqlens[-1], "k": cu_seqlens_k[-1]}
    if reads_on and any(x[ends[n] :].isnan().any() for x, n in ((grad, "q"), (q, "q"), (k, "k"), (v, "k"))):
        dq[:] = float("nan")
    return _unwritten(dq, ends["q"]), _unwritten(dk, ends["k"]), _unwritten(dv, ends["k"])


def _fa4():
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, q_descale=None,
        k_descale=None, v_descale=None, gather_kv_indices=None,
    ):  # fmt: skip
        assert not causal and num_splits == 1 and return_lse
        return answer(q, k, v, cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k, softmax_scale, True)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None, dlse=None,
    ):  # fmt: skip
        assert not causal and deterministic
        lengths = (cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k)
        found = gradients(dout, q, k, v, out, lse, *lengths, softmax_scale, True)
        return tuple(into.copy_(x) for into, x in zip((dq, dk, dv), found))

    return {"flash_attn.cute": {}, "flash_attn.cute.interface": locals()}


def _fa2():
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert not causal and dropout_p == 0.0
        lengths = (cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k)
        return *answer(q, k, v, *lengths, softmax_scale, False), None, torch.empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert not causal and dropout_p == 0.0 and deterministic and softcap == 0.0 and alibi_slopes is None
        assert window_size_left == window_size_right == -1
        lengths = (cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k)
        for into, x in zip((dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse, *lengths, softmax_scale, False)):
            into.copy_(x)

    return {"flash_attn": {"__version__": "2.8.3"}, "flash_attn.flash_attn_interface": locals()}


def _fa3(library):
    def fwd(
        q, k, v, k_new=None, v_new=None, q_v=None, out=None, cu_q=None, cu_k=None, cu_new=None, used_q=None,
        used_k=None, max_q=None, max_k=None, page_table=None, index=None, leftpad=None, cos=None, sin=None,
        rotary=None, q_descale=None, k_descale=None, v_descale=None, scale=None, causal=False, left=-1, right=-1,
        chunk=0, softcap=0.0, interleaved=False, metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert num_splits == 1, "else how many there are depends on the number of images"
        assert not causal and used_q is None and used_k is None and left == right == -1
        out, lse = answer(q, k, v, cu_q, max_q, cu_k, max_k, scale, True)
        return out, lse, torch.empty(0), torch.empty(0)

    def bwd(
        dout, q, k, v, out, lse, dq=None, dk=None, dv=None, cu_q=None, cu_k=None, used_q=None, used_k=None, max_q=None,
        max_k=None, scale=None, causal=False, left=-1, right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert not causal and deterministic and used_q is None and used_k is None and left == right == -1
        found = gradients(dout, q, k, v, out, lse, cu_q, max_q, cu_k, max_k, scale, True)
        written = tuple(into.copy_(x) for into, x in zip((dq, dk, dv), found))
        return *written, *(torch.empty(0) for _ in range(5))

    library.define(FA3_FORWARD)
    library.define(FA3_BACKWARD)
    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
    return {"flash_attn_3": {}, "flash_attn_3._C": {}}


@contextlib.contextmanager
def warnings_only():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(True)


def _torch(library):
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **rest):
        assert dropout == 0 and not causal and not debug and not any(x is not None for x in rest.values())
        out, lse = answer(q, k, v, cu_q, max_q, cu_k, max_k, scale, False)
        return out, lse, torch.empty(2), torch.empty(2), torch.empty(0)

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused, *, scale, **rest):
        assert torch.are_deterministic_algorithms_enabled() and dropout == 0 and not causal
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "of which the real one only warns"
        with warnings_only():  # what torch does in the stand-in itself need not be deterministic
            return gradients(grad, q, k, v, out, lse, cu_q, max_q, cu_k, max_k, scale, False)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")


def _cudnn(library, heads_first):
    def forward(q, k, v, bias, cu_q, cu_k, max_q, max_k, lse, dropout=0.0, causal=False, debug=False, *, scale):
        assert bias is None and lse and dropout == 0 and not causal and not debug
        assert all(x.is_contiguous() for x in (q, k, v))
        out, lse = answer(q, k, v, cu_q, max_q, cu_k, max_k, scale, True, heads_first)
        return out, lse, cu_q, cu_k, max_q, max_k, torch.empty(2), torch.empty(2), torch.empty(0)

    def backward(grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale=None):
        assert bias is None and dropout == 0 and not causal
        assert all(x.is_contiguous() for x in (grad, q, k, v, out))
        return gradients(grad, q, k, v, out, lse, cu_q, max_q, cu_k, max_k, scale, True, heads_first)

    library.impl("_cudnn_attention_forward", forward, "CPU")
    library.impl("_cudnn_attention_backward", backward, "CPU")


@contextlib.contextmanager
def installed(*names, heads_first=False):
    """As if these rivals were here, and no other: of fa4, fa3, fa2, torch and cudnn."""
    modules, libraries = {}, []

    def library(*args):
        libraries.append(torch.library.Library(*args))
        return libraries[-1]

    if "fa2" in names or "fa4" in names:
        modules["flash_attn"] = {}
    modules |= (_fa2() if "fa2" in names else {}) | (_fa4() if "fa4" in names else {})
    modules |= _fa3(library("flash_attn_3", "DEF")) if "fa3" in names else {}
    if "torch" in names:
        _torch(library("aten", "IMPL"))
    if "cudnn" in names:
        _cudnn(library("aten", "IMPL"), heads_first)
    hidden = {name: None for name in ("flash_attn", "flash_attn_interface", "flash_attn_3", "flash_attn_3._C")}
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in hidden}
    for name in before:
        del sys.modules[name]
    sys.modules.update(hidden)  # None: an import of it fails as if it were not there
    for name, contents in modules.items():
        sys.modules[name] = module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
    try:
        for version in VERSIONS.values():
            version.load.cache_clear()
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in hidden]:
            del sys.modules[name]
        sys.modules.update(before)
        for lib in libraries:
            lib._destroy()
        for version in VERSIONS.values():
            version.load.cache_clear()
