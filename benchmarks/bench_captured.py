"""One forward at lengths that an assigner chose on the device: as a CUDA graph, against the same calls one by one.

`bench_captured` times it from the call to the answers, `bench_host` the host alone: how long the call takes to return,
with nothing queued before it.
"""

import time
import warnings

import pytest
import torch

from revit_kernels import Packing, TokenLengthAssigner, create_model
from revit_kernels.adaptive.policies import Assign
from revit_kernels.engines import CapturedEngine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MENU = ((14, 14), (10, 10), (7, 7), (4, 4))
MODELS = {"small": {"embed_dim": 384, "num_heads": 6}, "base": {"embed_dim": 768, "num_heads": 12}}
IMAGES = [1, 8] if DEVICE == "cpu" else [1, 8, 64, 256]
ROUNDS = 9 if DEVICE == "cpu" else 50

every_case = pytest.mark.parametrize("images", IMAGES)
every_model = pytest.mark.parametrize("name", MODELS)


class Case:
    def __init__(self, name, images):
        torch.manual_seed(0)
        model = create_model("vit_tiny_patch16_224", **MODELS[name]).make_resizable(MENU)
        self.model = model.to(DEVICE, torch.bfloat16).eval()
        assigner = TokenLengthAssigner.for_model(self.model).to(DEVICE, torch.bfloat16).eval()
        policy = Assign(0.3, (1.0, 0.6, 0.3, 0.1))
        self.images = torch.randint(0, 256, (images, 224, 224, 3), dtype=torch.uint8, device=DEVICE)

        def choose(x):
            return policy.decide(assigner(x, model=self.model))

        self.choose = choose
        with torch.no_grad():
            mix = torch.bincount(choose(self.images).long(), minlength=len(MENU)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the refusal is asked below
            self.captured = CapturedEngine(self.model, choose, images=images, mix=mix, channels_last=True)
        self.capacity = self.captured.budgets[-1]

    @torch.no_grad()
    def eager(self):
        packing = Packing.from_choice(self.choose(self.images), MENU, 1, capacity=self.capacity)
        return self.model(self.images, packing=packing, channels_last=True)

    def replay(self):
        return self.captured.answer(self.images).logits

    def require_graph(self):
        if self.captured.refusal:
            pytest.skip(self.captured.refusal)


@every_case
@every_model
def bench_captured(duel, name, images):
    case = Case(name, images)
    case.require_graph()
    torch.testing.assert_close(case.replay(), case.eager())
    duel(case.replay, case.eager, rounds=ROUNDS, rival="the same, launch by launch", dtype=torch.bfloat16, latency=True)


@every_case
@every_model
@pytest.mark.parametrize("way", ["eager", "captured"])
def bench_host(benchmark, way, name, images):
    """On a CPU the host is the device, and the eager time is all of the work."""
    case = Case(name, images)
    if way == "captured":
        case.require_graph()

    def idle():
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark._timer = time.perf_counter
    call = case.eager if way == "eager" else case.replay
    benchmark.pedantic(call, setup=idle, warmup_rounds=3, rounds=ROUNDS)
    benchmark.extra_info["device"] = DEVICE if DEVICE == "cpu" else torch.cuda.get_device_name()
