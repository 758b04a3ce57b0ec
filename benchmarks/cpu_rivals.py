"""What VarLenViT is measured against on a CPU: OpenVINO, ONNX Runtime, zentorch and torch, each at its best settings.

A rival takes timm's model in float32 and has one method, `prepare`: from dense batches (images, 3, height, width) in
float32, each of one length, to a call that gives their logits one under the other. `prepare` is not timed.
"""

import copy
import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

Batches = list[Tensor]
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def fastest(ways: dict[str, Callable[[], object]], sample: list[Batches], rounds: int = 3):
    """The rival of the way that takes the least time for the sample; its `settings` is the way's name."""
    found, least = None, float("inf")
    for name, make in ways.items():
        rival = make()
        calls = [rival.prepare(batches) for batches in sample]
        seconds = []
        for _ in range(rounds + 1):  # the first warms up
            start = time.perf_counter()
            for call in calls:
                call()
            seconds.append(time.perf_counter() - start)
        if min(seconds[1:]) < least:
            found, least = rival, min(seconds[1:])
            found.settings = name
    return found


# ---------------------------------------------------------------------- OpenVINO


class AnyLength(nn.Module):
    """timm's model for images of any size, their positions given: interpolated once, not in every call."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor, positions: Tensor) -> Tensor:
        """images: (images, 3, height, width); positions: (1, tokens, dim)"""
        vit = self.vit
        x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x], 1) + positions
        for block in vit.blocks:
            x = block(x)
        return vit.head(vit.norm(x)[:, 0])

    @cache  # noqa: B019 - a benchmark's models live as long as it does
    def positions(self, height: int, width: int) -> np.ndarray:
        from timm.layers import resample_abs_pos_embed

        vit, (p, q) = self.vit, self.vit.patch_embed.patch_size
        grid = (height // p, width // q)
        table = vit.pos_embed.detach()
        return resample_abs_pos_embed(table, grid, vit.patch_embed.grid_size, vit.num_prefix_tokens).numpy()


class OneLength(AnyLength):
    """The same with the positions of one size of image."""

    def __init__(self, vit: nn.Module, size: tuple[int, int]):
        super().__init__(vit)
        self.register_buffer("own", torch.from_numpy(self.positions(*size)))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images, self.own)


def of_size(vit: nn.Module, size: tuple[int, int]) -> nn.Module:
    """timm's model with rotary positions for images of one size, with its tables of angles made once."""
    import timm
    from timm.layers import resample_abs_pos_embed

    model = timm.create_model(vit.pretrained_cfg["architecture"], img_size=size, num_classes=vit.num_classes).eval()
    state, grids = vit.state_dict(), (model.patch_embed.grid_size, vit.patch_embed.grid_size)
    if vit.pos_embed is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], *grids, prefix)
    model.load_state_dict(state)
    return model


class Way(NamedTuple):
    """How OpenVINO runs.

    precision: of INFERENCE_PRECISION_HINT
    hint:      of PERFORMANCE_HINT
    threads:   of INFERENCE_NUM_THREADS
    shapes:    "static", a model for every shape; "batch", a model for every length with a free number of images;
               "any", one model with a free number and size of images. (Padding all images of a batch to the longest,
               with a mask, took 2.0 to 2.2 times "any"'s time for two images each at 17, 50, 101 and 197 tokens.)
    images:    "together", a length's images in one request; "halved", in a request for each thread; "apart"
    """

    precision: str
    hint: str = "LATENCY"
    threads: int = 1
    shapes: str = "static"
    images: str = "together"

    @property
    def in_turn(self) -> bool:
        return self.hint == "LATENCY" and self.images == "together"

    def __str__(self):
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.precision}, {self.hint.lower()}, {threads}, {self.shapes} shapes, images {self.images}"


class Converted:
    """OpenVINO's form of timm's model, converted once for every shape; quantized to int8 by NNCF with `calibration`.

    calibration: arrays (1, 3, height, width) by (height, width)
    """

    def __init__(self, vit: nn.Module, calibration: dict | None = None):
        self.ov = pytest.importorskip("openvino", reason="openvino: pip install revit_kernels[bench]")
        self.vit, self.any, self.calibration, self.kept = vit, AnyLength(vit), calibration, {}
        self.core = self.ov.Core()

    def __call__(self, shape: tuple[int, ...], shapes: str):
        """The name under which it is kept, and the model."""
        key = {"static": shape, "batch": (-1, *shape[1:]), "any": (-1, 3, -1, -1)}[shapes]
        if key not in self.kept:
            if shapes == "static":
                _, free = self(shape, "batch")
                found = free.clone()
                found.reshape(shape)
            elif shapes == "batch":
                one_size = of_size if getattr(self.vit, "rope", None) else OneLength
                found = self._convert(one_size(self.vit, shape[2:]), (torch.zeros(2, *shape[1:]),), [key])
                if self.calibration is not None:
                    found = self._quantized(found, self.calibration[shape[2:]])
            else:
                example = torch.zeros(2, *shape[1:]), torch.from_numpy(self.any.positions(*shape[2:]))
                found = self._convert(self.any, example, [key, (1, -1, self.vit.embed_dim)])
            self.kept[key] = found
        return key, self.kept[key]

    def _convert(self, model: nn.Module, example: tuple[Tensor, ...], shapes: list[tuple[int, ...]]):
        with torch.no_grad():
            return self.ov.convert_model(model, example_input=example, input=[self.ov.PartialShape(s) for s in shapes])

    @staticmethod
    def _quantized(model, samples: list[np.ndarray]):
        nncf = pytest.importorskip("nncf", reason="nncf: pip install revit_kernels[bench]")
        transformer = nncf.ModelType.TRANSFORMER
        return nncf.quantize(model, nncf.Dataset(samples), model_type=transformer, subset_size=len(samples))


class OpenVino:
    """OpenVINO in one way. Requests that may run at once are started together."""

    def __init__(self, converted: Converted, way: Way):
        self.converted, self.way = converted, way
        self.compiled, self.requests = {}, defaultdict(list)

    def _request(self, shape: tuple[int, ...], number: int):
        key, model = self.converted(shape, self.way.shapes)
        if key not in self.compiled:
            options = {
                "INFERENCE_PRECISION_HINT": self.way.precision,
                "PERFORMANCE_HINT": self.way.hint,
                "INFERENCE_NUM_THREADS": self.way.threads,
            }
            if self.way.images != "together":
                options["NUM_STREAMS"] = self.way.threads
            self.compiled[key] = self.converted.core.compile_model(model, "CPU", options)
        while len(self.requests[key]) <= number:
            self.requests[key].append(self.compiled[key].create_infer_request())
        return key, self.requests[key][number]

    def prepare(self, batches: Batches):
        parts = {"together": 1, "halved": self.way.threads}
        pieces = [
            piece for batch in batches for piece in batch.chunk(parts.get(self.way.images, len(batch))) if len(batch)
        ]
        used, jobs = defaultdict(int), []
        for piece in pieces:
            key, request = self._request(tuple(piece.shape), 0)
            if not self.way.in_turn:
                key, request = self._request(tuple(piece.shape), used[key])
            used[key] += 1
            inputs = [piece.numpy()]
            if self.way.shapes == "any":
                inputs.append(self.converted.any.positions(*piece.shape[2:]))
            jobs.append((request, inputs))

        def in_turn():
            return torch.cat(
                [torch.from_numpy(request.infer(inputs, share_inputs=True)[0]) for request, inputs in jobs]
            )

        def at_once():
            for request, inputs in jobs:
                request.start_async(inputs, share_inputs=True)
            for request, _ in jobs:
                request.wait()
            return torch.cat([torch.from_numpy(request.get_output_tensor(0).data.copy()) for request, _ in jobs])

        return in_turn if self.way.in_turn else at_once


def openvino_ways(precision: str, shapes: str) -> list[Way]:
    """What is tried. All lengths in turn on all threads, or several requests at once on a thread each."""
    threads = torch.get_num_threads()
    ways = [Way(precision, "LATENCY", threads, shapes)]
    if threads > 1:
        ways += [
            Way(precision, "THROUGHPUT", threads, shapes),
            Way(precision, "THROUGHPUT", threads, shapes, "halved"),
        ]
    if shapes == "batch":
        ways += [Way(precision, "THROUGHPUT", threads, "static", "apart")]
    return ways


def openvino(vit: nn.Module, dtype: torch.dtype, shapes: str, sample: list[Batches], calibration=None, in_turn=False):
    """OpenVINO at the settings that take the least time for the sample.

    in_turn: a request begins when the one before is done, as for images that come one at a time
    int8 (with `calibration`) computes what is not quantized in bf16 where the processor has it.
    """
    converted = Converted(vit, calibration)
    ways = openvino_ways(PRECISIONS[dtype], shapes)
    ways = [way for way in ways if way.in_turn] if in_turn else ways
    if dtype == torch.bfloat16 and shapes == "static":
        ways.append(ways[0]._replace(precision="f32"))
    return fastest({str(way): lambda way=way: OpenVino(converted, way) for way in ways}, sample)


# ---------------------------------------------------------------------- ONNX Runtime


class OnnxRuntime:
    """ONNX Runtime, a session for each size of image.

    fused: with its own optimiser's attention, GELU and LayerNorm for a ViT
    int8:  weights and activations, quantized dynamically
    """

    def __init__(self, vit: nn.Module, threads: int, fused: bool, int8: bool = False):
        self.ort = pytest.importorskip("onnxruntime", reason="onnxruntime: pip install revit_kernels[bench]")
        self.vit, self.threads, self.fused, self.int8 = vit, threads, fused, int8
        self.sessions = {}

    def _session(self, size: tuple[int, int]):
        if size not in self.sessions:
            options = self.ort.SessionOptions()
            options.intra_op_num_threads = self.threads
            # Else its threads go on spinning, and take the cores from whoever runs in turn with it.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            self.sessions[size] = self.ort.InferenceSession(
                onnx_model(self.vit, size, self.fused, self.int8), options, providers=["CPUExecutionProvider"]
            )
        return self.sessions[size]

    def prepare(self, batches: Batches):
        jobs = [(self._session(tuple(batch.shape[2:])), batch.numpy()) for batch in batches if len(batch)]

        def run():
            return torch.cat([torch.from_numpy(session.run(None, {"images": x})[0]) for session, x in jobs])

        return run


def onnx_model(vit: nn.Module, size: tuple[int, int], fused: bool, int8: bool) -> bytes:
    """The model as an ONNX file for any number of images of one size."""
    file = io.BytesIO()
    free = {0: "images"}
    torch.onnx.export(
        OneLength(vit, size),
        (torch.zeros(2, 3, *size),),
        file,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": free, "logits": free},
        dynamo=False,
        opset_version=18,
    )
    if not fused and not int8:
        return file.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder, "model.onnx"), Path(folder, "other.onnx")
        path.write_bytes(file.getvalue())
        if fused:
            from onnxruntime.transformers.optimizer import optimize_model

            heads, dim = vit.blocks[0].attn.num_heads, vit.embed_dim
            optimize_model(str(path), "vit", heads, dim).save_model_to_file(str(other))
            path, other = other, path
        if int8:
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(path, other, per_channel=True, extra_options={"DefaultTensorType": 1})  # float
            path = other
        return path.read_bytes()


def onnxruntime(vit: nn.Module, dtype: torch.dtype, sample: list[Batches], int8: bool = False):
    """ONNX Runtime at the settings that take the least time for the sample. Skips bf16."""
    if dtype != torch.float32 and not int8:
        pytest.skip("onnxruntime: its CPU provider has no bf16 matrix product")
    ways = {}
    for fused in (False, True):
        for threads in sorted({1, torch.get_num_threads()}):
            name = f"{'fused' if fused else 'as exported'}, {'1 thread' if threads == 1 else f'{threads} threads'}"
            ways[name] = lambda fused=fused, threads=threads: OnnxRuntime(vit, threads, fused, int8)
    return fastest(ways, sample)


# ---------------------------------------------------------------------- torch


class Torch:
    """timm's model in torch.

    compiled: None for eager; a backend of torch.compile, with static shapes
    freezing: then with the weights packed for oneDNN or ZenDNN, as they will not change
    """

    def __init__(
        self,
        vit: nn.Module,
        dtype: torch.dtype,
        compiled: str | None = None,
        freezing: bool = False,
        channels_last: bool = False,
    ):
        self.dtype = dtype
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = vit.to(dtype, memory_format=self.format)
        self.freezing = nullcontext
        if compiled:
            import torch._inductor.config as inductor

            torch._dynamo.reset()
            self.model = torch.compile(self.model, backend=compiled, dynamic=False)
            self.freezing = lambda: inductor.patch(freezing=freezing)

    def prepare(self, batches: Batches):
        inputs = [batch.to(self.dtype, memory_format=self.format) for batch in batches if len(batch)]

        def run():
            with torch.inference_mode():
                return torch.cat([self.model(x) for x in inputs])

        with self.freezing(), torch.inference_mode():  # it compiles here
            run()
        return run


def eager(vit: nn.Module, dtype: torch.dtype, sample: list[Batches]):
    """timm as it comes, or with channels last."""
    ways = {"contiguous": lambda: Torch(vit, dtype), "channels last": lambda: Torch(vit, dtype, channels_last=True)}
    return fastest(ways, sample)


def _compiled(vit: nn.Module, dtype: torch.dtype, sample: list[Batches], backend: str):
    ways = {
        "frozen weights": lambda: Torch(copy.deepcopy(vit), dtype, backend, freezing=True),
        "weights not frozen": lambda: Torch(copy.deepcopy(vit), dtype, backend),
    }
    return fastest(ways, sample)


def compiled(vit: nn.Module, dtype: torch.dtype, sample: list[Batches]):
    """torch.compile."""
    return _compiled(vit, dtype, sample, "inductor")


def zentorch(vit: nn.Module, dtype: torch.dtype, sample: list[Batches]):
    """AMD's plugin for torch.compile, of the version made for this torch."""
    pytest.importorskip("zentorch", reason="zentorch: pip install revit_kernels[bench]", exc_type=ImportError)
    return _compiled(vit, dtype, sample, "zentorch")
