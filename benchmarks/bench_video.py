"""TimeSformer on clips of several grids as one packed batch, against what a user would run instead.

Our weights are packed once (`model.engine()`) on a CPU, as OpenVINO's are when it compiles; neither is timed.
"""

import cpu_rivals as rivals
import pytest
import torch
from plain_timesformer import PlainTimeSformer

from revit_kernels import VarLenTimeSformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FRAMES, SIDES = 8, [14, 14, 14, 10, 10, 10, 7, 7]
MODELS = {"TimeSformer-S": dict(embed_dim=384, num_heads=6), "TimeSformer-B": dict(embed_dim=768, num_heads=12)}


class Case:
    def __init__(self, name, dtype):
        torch.manual_seed(0)
        self.model = VarLenTimeSformer(**MODELS[name], num_classes=400, num_frames=FRAMES).eval()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.to(dtype))
        self.wide = PlainTimeSformer(self.model)
        self.ours_model = VarLenTimeSformer(**MODELS[name], num_classes=400, num_frames=FRAMES, weight_init="skip")
        self.ours_model.load_state_dict(self.model.state_dict())
        self.ours_model = self.ours_model.to(DEVICE, dtype).eval()
        self.dtype = dtype
        shapes = [(3, FRAMES, 16 * n, 16 * n) for n in SIDES]
        self.clips = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
        members = {n: [clip for clip, side in zip(self.clips, SIDES) if side == n] for n in dict.fromkeys(SIDES)}
        self.batches = [torch.stack(clips) for clips in members.values()]
        dim, lengths = self.model.embed_dim, [n * n + 1 for n in SIDES]
        block = FRAMES * sum(34 * dim * dim * n + 4 * dim * n * (n + FRAMES) for n in lengths)
        self.flops = len(self.model.blocks) * block


def bucketed(case):
    """The plain model, one dense batch for each grid."""
    plain = PlainTimeSformer(case.ours_model)
    return lambda: torch.cat([plain(batch) for batch in case.batches])


def longest(case):
    """The plain model, every clip at the longest grid: as many tokens as padding computes."""
    plain, clips = PlainTimeSformer(case.ours_model), case.clips[0][None].expand(len(SIDES), -1, -1, -1, -1)
    return lambda: plain(clips)


class Converted:
    """OpenVINO's form of the plain model, for clips of each shape."""

    def __init__(self, model):
        self.ov = pytest.importorskip("openvino", reason="openvino: pip install revit_kernels[bench]")
        self.model, self.core, self.kept = model, self.ov.Core(), {}

    def __call__(self, shape, shapes):
        if shape not in self.kept:
            with torch.no_grad():
                example = torch.zeros(shape)
                self.model.positions(tuple(n // 16 for n in shape[3:]))  # a constant of the trace
                self.kept[shape] = self.ov.convert_model(self.model, example_input=example, input=[list(shape)])
        return shape, self.kept[shape]


def openvino(case):
    """One compiled model for each grid, at the settings that take the least time."""
    if DEVICE != "cpu":
        pytest.skip("for CPUs")
    converted, batches = Converted(case.wide), [batch.float() for batch in case.batches]
    ways = rivals.openvino_ways(rivals.PRECISIONS[case.dtype], "static")
    found = rivals.fastest({str(way): lambda way=way: rivals.OpenVino(converted, way) for way in ways}, [batches], 1)
    run = found.prepare(batches)
    run.settings = found.settings
    return run


@pytest.mark.parametrize("rival", [bucketed, openvino, longest], ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["TimeSformer-S"])
def bench_video(duel, name, dtype, rival):
    case = Case(name, dtype)
    engine = case.ours_model.engine() if DEVICE == "cpu" else case.ours_model
    theirs = torch.inference_mode()(rival(case))

    @torch.inference_mode()
    def ours():
        return engine(case.clips)

    if rival is not longest:
        a, b = ours().float(), theirs().float()
        assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps ** 0.5 * a.abs().max(), "it computes something else"
    duel(ours, theirs, rounds=7, warmup=1, flops=case.flops, rival=rival.__name__)
