"""FlashAttention and cuDNN behind the contract of attention, without a GPU and without them: see fake_rivals."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_attention
import torch
from contract import DEVICE, check, require
from fake_rivals import installed
from torch.utils._python_dispatch import TorchDispatchMode

from revit_kernels import dispatch, measured, native
from revit_kernels.__main__ import flash_attention
from revit_kernels.ops.attention import attention, cudnn, flash_attn, flash_versions, sample, tail

FLASH = ["fa4", "fa3", "fa2", "torch"]
HALF = [torch.bfloat16, torch.float16]
CASES = {k: v for k, v in test_attention.CASES.items() if k != "odd dim"}

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the real ones run, in test_attention.py")
every_half = pytest.mark.parametrize("dtype", HALF, ids=str)


@pytest.fixture
def hopper(monkeypatch):
    """Tensors on the CPU pass for tensors on a GPU of compute capability 9.0."""
    monkeypatch.setattr(flash_attn, "_place", lambda x: None)
    monkeypatch.setattr(cudnn, "_place", lambda x: None)
    monkeypatch.setattr(native, "CUDA_ON_HOST", "a file")
    monkeypatch.setattr(native, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cudnn, "_backward_refusal", lambda *_: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    cudnn._heads_first.cache_clear()
    yield
    cudnn._heads_first.cache_clear()


@pytest.fixture(params=[*FLASH, "cudnn", "cudnn, heads first"])
def rival(request, hopper):
    """The backend under which each runs."""
    name = request.param
    with installed(name.split(",")[0], heads_first=name.endswith("first")):
        flash_attn.use(name if name in FLASH else None)
        yield "cudnn" if name not in FLASH else "flash_attn"
        flash_attn.use(None)


@every_half
@pytest.mark.parametrize("name", CASES)
def test_contract(rival, name, dtype):
    inputs = test_attention.make_inputs(**CASES[name], dtype=dtype)
    require("attention", rival, *inputs.values())
    check(attention, inputs, rival)


@every_half
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_the_tail_is_zeros_and_its_nan_reaches_nothing(rival, cross, dtype):
    test_attention.test_the_tail_is_zeros_and_its_nan_reaches_nothing(dtype, cross, rival)


def test_strided_views(rival):
    test_attention.test_strided_views(torch.bfloat16, rival)


def test_lse_is_that_of_the_op(rival):
    inputs = test_attention.make_inputs([9, 0, 20], [3, 5, 0], dtype=torch.bfloat16, tail=5)
    q, k, v, cu_seqlens, longest, cu_seqlens_k, longest_k = inputs.values()
    arguments = (q, k, v, cu_seqlens, longest, cu_seqlens_k, longest_k, 0.2, None, None, None, False)
    out, lse = torch.ops.revit_kernels.attention_forward(*arguments, rival)
    expected = torch.ops.revit_kernels.attention_forward(*arguments, "reference")
    assert lse.shape == (34, 2) and lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close((out, lse), expected)


def test_the_backward_takes_the_lse_of_another_backend(rival):
    inputs = test_attention.make_inputs([9, 0, 20], dtype=torch.bfloat16, tail=5)
    q, k, v, cu_seqlens, longest = inputs.values()
    arguments = (cu_seqlens, longest, cu_seqlens, longest, 0.2, None, None, None, False)
    out, lse = torch.ops.revit_kernels.attention_forward(q, k, v, *arguments, "reference")
    backward = torch.ops.revit_kernels.attention_backward
    torch.testing.assert_close(
        *(backward(torch.ones_like(out), q, k, v, out, lse, *arguments, name) for name in (rival, "reference"))
    )


def test_nothing_waits_for_the_device(rival):
    """No value of a tensor reaches the host, but within the stand-ins."""

    class Watch(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names = (*self.names, op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    x = torch.zeros(29, 2, 64, dtype=torch.bfloat16)
    ends = torch.tensor([0, 9, 20], dtype=torch.int32)
    with Watch() as watch:
        tail.zero_(x, ends, ends)
        tail.zero_(x, ends, ends.clone())
        tail.cleaned(x, ends)
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero"} & set(watch.names), watch.names


def test_tensors_of_torch_know_these_shapes():
    """The aten ops, as torch's own fake implementation answers to the same call."""
    q = torch.empty(10, 3, 2, 64, dtype=torch.bfloat16, device="meta").unbind(1)
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = flash_versions.Torch.forward(*q, ends, 7, ends, 7, 0.125)
    assert out.shape == (10, 2, 64) and lse.shape == (2, 10) and lse.dtype == torch.float32
    grads = flash_versions.Torch.backward(out, *q, out, lse, ends, 7, ends, 7, 0.125, deterministic=True)
    assert all(grad.shape == (10, 2, 64) for grad in grads)


def test_the_process_stays_as_deterministic_as_it_was(monkeypatch):
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    x = torch.empty(10, 2, 64, dtype=torch.bfloat16, device="meta")
    state = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    try:
        for enabled, warn_only in ((False, False), (True, True), (True, False)):
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            fill = torch.utils.deterministic.fill_uninitialized_memory
            flash_versions.Torch.backward(x, x, x, x, x, x, ends, 7, ends, 7, 0.1, deterministic=True)
            assert torch.are_deterministic_algorithms_enabled() == enabled
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
            assert torch.utils.deterministic.fill_uninitialized_memory == fill
    finally:
        torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def refusal(x, backend="flash_attn"):
    """Why the backend does not take q, k and v like x."""
    return dispatch.refusal("attention", backend, x, x, x, *sample()[3:])


@pytest.mark.parametrize(
    "here", [(), ("fa2",), ("torch", "fa2"), ("fa2", "fa3"), ("fa2", "fa3", "fa4", "torch")], ids=str
)
def test_the_newest_installed_is_taken(hopper, monkeypatch, here):
    x = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(flash_versions.Torch, "refusal", lambda *_: None if "torch" in here else "left out")
    with installed(*(name for name in here if name != "torch")):
        if here:
            assert flash_attn.version(x).name == next(name for name in FLASH if name in here)
            assert refusal(x) is None
        else:
            nowhere = "fa4: not installed; fa3: not installed; fa2: not installed; torch: left out"
            assert refusal(x) == nowhere
            with pytest.raises(NotImplementedError, match="no version of FlashAttention takes"):
                flash_attn.version(x)


@pytest.mark.parametrize(
    "capability, backward, expected",
    [
        ((8, 0), False, "fa4"),
        ((8, 0), True, "fa2"),
        ((9, 0), True, "fa4"),
        ((12, 0), False, "fa4"),
        ((12, 0), True, "fa2"),
    ],
)
def test_a_version_without_kernels_for_the_gpu_is_passed_over(hopper, monkeypatch, capability, backward, expected):
    monkeypatch.setattr(native, "_capability", lambda device: capability)
    with installed("fa4", "fa3", "fa2"):
        assert flash_attn.version(torch.zeros(4, 2, 64, dtype=torch.bfloat16), backward).name == expected


def test_a_version_that_was_named_never_falls_back(hopper):
    with installed("fa2"):
        flash_attn.use("fa3")
        try:
            assert refusal(torch.zeros(4, 2, 64, dtype=torch.bfloat16)) == "fa3: not installed"
        finally:
            flash_attn.use(None)
    with pytest.raises(ValueError, match="must be one of fa4, fa3, fa2, torch, got 'fa1'"):
        flash_attn.use("fa1")


def test_an_old_or_broken_install_says_so(hopper, monkeypatch):
    x = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    with installed("fa2"):
        sys.modules["flash_attn"].__version__ = "2.6.3"
        assert flash_versions.FA2.refusal(x, False) == "needs flash_attn 2.7, got 2.6.3"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    assert "was replaced by FA4" in flash_versions.Torch.refusal(x, False)


def test_the_command_says_which_version_runs_and_why_no_other(hopper, monkeypatch):
    x = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    versions = {"flash-attn-3": "3.0.0", "flash-attn": "2.8.3"}

    def version(name):
        if name in versions:
            return versions[name]
        raise flash_versions.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash_versions.metadata, "version", version)
    with installed("fa2", "fa3", "torch"):
        newer = "could, but FA3 (flash-attn-3 3.0.0) is newer: REVIT_FLASH_ATTN="
        assert flash_attention(x) == [
            "flash_attn, forward and backward: FA3 (flash-attn-3 3.0.0)",
            "  FA4: not installed",
            f"  FA2 (flash-attn 2.8.3): {newer}fa2",
            f"  torch's own FA2: {newer}torch",
        ]
        flash_attn.use("torch")
        try:
            assert flash_attention(x) == [
                "flash_attn, forward and backward: torch's own FA2",
                "  FA4: not installed",
                "  FA3 (flash-attn-3 3.0.0): REVIT_FLASH_ATTN=torch",
                "  FA2 (flash-attn 2.8.3): REVIT_FLASH_ATTN=torch",
            ]
        finally:
            flash_attn.use(None)


def test_the_command_tells_forward_from_backward_where_they_differ(hopper, monkeypatch):
    monkeypatch.setattr(native, "_capability", lambda device: (8, 0))
    x = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    with installed("fa4", "torch"):
        assert flash_attention(x) == [
            "flash_attn, forward: FA4",
            "  FA3: not installed",
            "  FA2: not installed",
            "  torch's own FA2: could, but FA4 is newer: REVIT_FLASH_ATTN=torch",
            "flash_attn, backward: torch's own FA2",
            "  FA4: has kernels for compute capability 9.x, 10.x, 11.x, got 8.0",
            "  FA3: not installed",
            "  FA2: not installed",
        ]
    monkeypatch.setattr(flash_versions.Torch, "refusal", lambda *_: "left out")
    with installed():
        assert flash_attention(x)[0] == "flash_attn, forward and backward: none"


@pytest.mark.parametrize("backend", ["flash_attn", "cudnn"])
def test_refusals(hopper, monkeypatch, backend):
    with installed("fa2", "torch"):
        for shape, dtype, why in (
            ((4, 2, 64), torch.float32, "no kernel for torch.float32"),
            ((4, 2, 27), torch.bfloat16, "head_dim must be a multiple of 8, at most"),
            ((4, 2, 264), torch.bfloat16, "head_dim must be a multiple of 8, at most"),
        ):
            x = torch.zeros(shape, dtype=dtype)
            assert why in refusal(x, backend)
        monkeypatch.setattr(native, "_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
        x = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
        assert "needs compute capability 8.0" in refusal(x, backend)


@pytest.mark.parametrize("backend", ["flash_attn", "cudnn"])
def test_a_tensor_on_the_cpu_is_refused(backend):
    assert dispatch.refusal("attention", backend, *sample()) == "needs a CUDA tensor"


@pytest.mark.parametrize(
    "version, longest, deterministic, why",
    [
        ((2, 11), 65, False, "writes out of bounds where an image is longer than head_dim"),
        ((2, 11), 64, False, None),
        ((2, 14), 500, False, None),
        ((2, 14), 500, True, "its backward is not deterministic"),
    ],
)
def test_the_backward_of_cudnn(monkeypatch, version, longest, deterministic, why):
    monkeypatch.setattr(cudnn, "_torch", lambda: version)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    found = cudnn._backward_refusal(torch.zeros(4, 2, 64), longest)
    assert found is None if why is None else why in found


def test_cudnn_refuses_what_its_offsets_cannot_reach(hopper):
    x = torch.empty(2**31 // 128, 2, 64, dtype=torch.bfloat16, device="meta")
    assert "must stay below 2^31" in refusal(x, "cudnn")
    assert refusal(x[1:], "cudnn") is None


def test_torch_takes_the_arguments_of_cudnn(monkeypatch):
    """As far as the kernel: there is none for the CPU."""
    monkeypatch.setattr(cudnn, "_heads_first", lambda device: True)
    q, k, v, ends, longest, *_ = sample(dtype=torch.bfloat16)
    lengths = (ends, longest, ends, longest, 0.1)
    for call in (
        lambda: cudnn.forward(q, k, v, *lengths),
        lambda: cudnn.backward(q, q, k, v, q, torch.zeros(q.shape[:2]), *lengths),
    ):
        with pytest.raises(
            NotImplementedError, match=r"Could not run 'aten::_cudnn_attention_\w+' with arguments from"
        ):
            call()


def test_a_measured_length_is_where_dispatch_changes(monkeypatch):
    monkeypatch.setattr(dispatch, "_requested", None)
    found = {"attention": {"forward": {"flash_attn": 20}, "backward": {"cudnn": 20}}}
    monkeypatch.setattr(measured, "of", lambda device: found)
    reference, called = dispatch.load("attention", "reference"), []

    def load(op, backend):
        def step(name):
            return lambda *args: called.append((backend, name)) or getattr(reference, name)(*args)

        return SimpleNamespace(refusal=lambda *_: None, forward=step("forward"), backward=step("backward"))

    monkeypatch.setattr(dispatch, "load", load)
    for longest, expected in ((19, ("cuda", "cuda")), (20, ("flash_attn", "cudnn"))):
        inputs = test_attention.make_inputs([9, longest])
        inputs["q"].requires_grad_()
        attention(**inputs).sum().backward()
        assert called == list(zip(expected, ("forward", "backward")))
        called.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (33, 12, 96), (64, 2, 1024)], ids=str)
def test_the_kernel_that_zeroes_the_tail(shape, dtype):
    pytest.importorskip("triton")
    from revit_kernels.ops.attention import tail_triton

    for end in {0, shape[0] // 2, shape[0] - 1, shape[0]}:
        x = torch.randn(shape).to(dtype)
        ends = torch.tensor([0, end // 2, end], dtype=torch.int32)
        expected = tail.zero_(x.clone(), ends, ends)
        assert torch.equal(expected[:end], x[:end]) and not expected[end:].any()
        tail_triton.launch(x, ends)
        assert torch.equal(x, expected)


def test_the_kernel_compiles_without_a_gpu():
    pytest.importorskip("triton")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from revit_kernels.ops.attention.tail_triton import offline
for spec in offline():
    signature = spec["signature"] | dict.fromkeys(spec["constexprs"], "constexpr")
    for arch in (80, 90, 100):
        source = ASTSource(spec["kernel"], signature, spec["constexprs"])
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]
        print(arch)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["80", "90", "100"] * 3
