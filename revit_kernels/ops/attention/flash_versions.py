"""How each FlashAttention is called for packed tokens: 4 (CuTe), 3 (Hopper), 2, and the 2 inside torch.

All take q, k, v (tokens, heads, head_dim), strided, and give out (tokens, heads, head_dim) and lse (heads, tokens) in
fp32. None writes rows beyond cu_seqlens[-1]. What each needs of those rows is its `ignores_tail`.
"""

import contextlib
import importlib
import importlib.util
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from revit_kernels import native


def _importable(name: str):
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name == name or name.startswith(f"{error.name}.")
        return "not installed" if missing else f"{name} cannot be imported: {error}"
    except Exception as error:  # a broken install must not break the other backends, whatever it raises
        return f"{name} cannot be imported: {type(error).__name__}: {error}"


def _head_dim(x: Tensor, most: int) -> str | None:
    if x.shape[2] % 8 or x.shape[2] > most:
        return f"head_dim must be a multiple of 8, at most {most}, got {x.shape[2]}"
    return None


def _arch(x: Tensor, majors: tuple[int, ...]) -> str | None:
    major, minor = native._capability(x.device)
    if major not in majors:
        return f"has kernels for compute capability {', '.join(f'{n}.x' for n in majors)}, got {major}.{minor}"
    return None


def _titled(name: str, package: str) -> str:
    try:
        return f"{name} ({package} {metadata.version(package)})"
    except metadata.PackageNotFoundError:
        return name


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)


class FA4:
    """flash_attn.cute, written for Hopper and Blackwell; signatures of flash-attn-4 4.0.0b10."""

    name = "fa4"
    ignores_tail = False  # its tiles read on into the next rows, where the weight 0 times NaN is NaN

    @staticmethod
    def title() -> str:
        return _titled("FA4", "flash-attn-4")

    @staticmethod
    @cache
    def load():
        return _importable("flash_attn.cute.interface")

    @classmethod
    def refusal(cls, x: Tensor, backward: bool) -> str | None:
        if isinstance(cls.load(), str):
            return cls.load()
        # On 12.x its backward is not deterministic, on 8.x there is none.
        why = _arch(x, (9, 10, 11) if backward else (8, 9, 10, 11, 12))
        return why or _head_dim(x, 256 if native._capability(x.device)[0] == 9 else 128)

    @classmethod
    def forward(cls, q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale):
        out, lse, *_ = cls.load()._flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=scale,
            num_splits=1,
            return_lse=True,
        )
        return out, lse

    @classmethod
    def backward(
        cls, grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, deterministic
    ):
        dq, dk, dv = _like(q, k, v)
        cls.load()._flash_attn_bwd(
            q,
            k,
            v,
            out,
            grad,
            lse,
            softmax_scale=scale,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen_k,
            deterministic=deterministic,
            dq=dq,
            dk=dk,
            dv=dv,
        )
        return dq, dk, dv


class FA3:
    """torch.ops.flash_attn_3, for Hopper, of the package flash_attn_3 or as xformers 0.0.34 carries it."""

    name = "fa3"
    ignores_tail = False  # as of FA4; reported as Dao-AILab/flash-attention#1745
    modules = ("flash_attn_3._C", "flash_attn_interface")

    @classmethod
    def title(cls) -> str:
        if isinstance(cls.load(), str):
            return "FA3"
        own = any(sys.modules.get(name) for name in cls.modules)
        return _titled("FA3", "flash-attn-3" if own else "xformers")

    @staticmethod
    @cache
    def load():
        reasons = []
        for name in FA3.modules:
            module = _importable(name)
            if not isinstance(module, str) and hasattr(torch.ops.flash_attn_3, "fwd"):
                return torch.ops.flash_attn_3
            if isinstance(module, str) and module != "not installed":
                reasons.append(module)
        spec = importlib.util.find_spec("xformers")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in Path(folder, "flash_attn_3").glob("_C*.so"):
                try:
                    torch.ops.load_library(path)
                    return torch.ops.flash_attn_3
                except OSError as error:
                    reasons.append(f"xformers' cannot be loaded: {error.__cause__ or error}")
        return "; ".join(reasons) or "not installed"

    @classmethod
    def refusal(cls, x: Tensor, backward: bool) -> str | None:
        if isinstance(cls.load(), str):
            return cls.load()
        return _arch(x, (9,)) or _head_dim(x, 256)

    @classmethod
    def forward(cls, q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale):
        out, lse, *_ = cls.load().fwd(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=scale,
            num_splits=1,  # its own choice depends on how many images there are
        )
        return out, lse

    @classmethod
    def backward(
        cls, grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, deterministic
    ):
        dq, dk, dv = _like(q, k, v)
        cls.load().bwd(
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=scale,
            deterministic=deterministic,
        )
        return dq, dk, dv


class FA2:
    """flash_attn, from Ampere on; signatures of 2.7.0 to 2.8.3."""

    name = "fa2"
    ignores_tail = True

    @staticmethod
    def title() -> str:
        return _titled("FA2", "flash-attn")

    @staticmethod
    @cache
    def load():
        module = _importable("flash_attn.flash_attn_interface")
        if isinstance(module, str):
            return module
        version = importlib.import_module("flash_attn").__version__
        if tuple(int(n) for n in version.split(".")[:2]) < (2, 7):
            return f"needs flash_attn 2.7, got {version}"
        return module

    @classmethod
    def refusal(cls, x: Tensor, backward: bool) -> str | None:
        return cls.load() if isinstance(cls.load(), str) else _head_dim(x, 256)

    @classmethod
    def forward(cls, q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale):
        out, lse, *_ = cls.load()._flash_attn_varlen_forward(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens_k,
            max_seqlen,
            max_seqlen_k,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
        )
        return out, lse

    @classmethod
    def backward(
        cls, grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, deterministic
    ):
        dq, dk, dv = _like(q, k, v)
        cls.load()._flash_attn_varlen_backward(
            *(grad, q, k, v, out, lse, dq, dk, dv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=deterministic,
        )
        return dq, dk, dv


@contextlib.contextmanager
def _deterministic(wanted: bool):
    """torch's own takes its word from the whole process: only there can it be asked for. Of "warn only" it warns, and
    stays as it is."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if (was and not warned) == wanted:
        yield
        return
    try:
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(wanted)
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Torch:
    """The FlashAttention 2 inside torch, which torch.nn.attention.varlen calls; schemas of torch 2.11."""

    name = "torch"
    ignores_tail = True

    @staticmethod
    def title() -> str:
        return "torch's own FA2"

    @staticmethod
    @cache
    def load():
        if torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash attention"
        return torch.ops.aten

    @classmethod
    def refusal(cls, x: Tensor, backward: bool) -> str | None:
        if isinstance(cls.load(), str):
            return cls.load()
        from torch.nn import attention

        replaced = getattr(attention, "current_flash_attention_impl", lambda: None)()
        if replaced:
            return f"torch's flash attention was replaced by {replaced}: name that with REVIT_FLASH_ATTN"
        return _head_dim(x, 256)

    @classmethod
    def forward(cls, q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale):
        lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=scale)
        return out, lse

    @classmethod
    def backward(
        cls, grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, deterministic
    ):
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
        lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        with _deterministic(deterministic):
            return torch.ops.aten._flash_attention_backward(
                grad, q, k, v, out, lse, *lengths, 0.0, False, seed, seed, scale=scale
            )


VERSIONS = {version.name: version for version in (FA4, FA3, FA2, Torch)}  # newest first
