"""CapturedEngine: graphs, budgets and overflow; no host on the path, and how much is launched on it.

Without a GPU a recorder stands in for torch.cuda's graphs: what was dispatched while capturing runs again at a replay,
on the tensors of then. So whatever a capture would bake in shows here too.
"""

import warnings
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from contract import DEVICE, same
from test_adaptive import NoHost, synthetic
from tiny_revit import MENU, make_images, make_model
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from revit_kernels import create_model
from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.captured import captured_engine
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.policies import Assign, Cascade, Fixed, Random
from revit_kernels.engines import CapturedEngine, StaleEngine, captured
from revit_kernels.engines.captured import ladder
from revit_kernels.packing import Packing

LENGTHS = (17, 10, 5)
EVEN = (1, 1, 1)


# ---------------------------------------------------------------------- torch.cuda's graphs, on a CPU


class Recorder(TorchDispatchMode):
    """Keeps every op with its arguments and results, and runs them all again, results into the same tensors."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def run(self):
        for func, args, kwargs, out in self.ops:
            for kept, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(func(*args, **kwargs))):
                # a weight in oneDNN's layout is the same at every replay
                if isinstance(kept, torch.Tensor) and not kept.is_mkldnn and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Stream:
    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class FakeCuda:
    """What captured.py asks of torch.cuda. `log`: replays, and waits of the host, in order."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(captured, "WARMUP", 1)
        self.log, self.stream, self.pools, self.captures, fake = [], Stream(), set(), 0, self

        class Graph:
            def replay(self):
                fake.log.append("replay")
                self.recorder.run()

        class Event:
            def record(self, stream):
                fake.log.append("record")

            def synchronize(self):
                fake.log.append("wait")

        def graph(graph, pool=None, stream=None):
            fake.captures += 1
            fake.pools.add(pool)
            graph.recorder = Recorder()
            return graph.recorder

        monkeypatch.setattr(captured, "_on_cuda", lambda device: True)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: fake.log.append("set_stream"))
        for name in ("stream", "device"):
            monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())


@pytest.fixture
def cuda(monkeypatch):
    """The fake where there is no GPU; on one, the tests run on torch's own graphs."""
    return FakeCuda(monkeypatch) if DEVICE == "cpu" else None


def capture(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph there must be
        made = CapturedEngine(*args, **{"channels_last": True} | kwargs)
    assert made.refusal is None and set(made._graphs) == set(made.budgets)
    return made


def capture_adaptive(adaptive, **options):
    made = captured_engine(adaptive, **{"channels_last": True} | options)
    assert made.refusal is None
    return made


def eager(*args, **kwargs):
    if DEVICE == "cuda":  # where there can be graphs, nobody is warned
        return eager_quietly(*args, **kwargs)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        return CapturedEngine(*args, **{"channels_last": True} | kwargs)


def eager_quietly(*args, make=CapturedEngine, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make(*args, **{"channels_last": True} | kwargs)
    made._graphs.clear()
    return made


@cache
def tiny():
    """A model whose lengths differ in every affine; do not change it."""
    model = make_model().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@cache
def pictures():
    return torch.from_numpy(make_images(200, seed=1).array).to(DEVICE)


def images(count, start=0):
    return pictures()[start : start + count]


def rows_of(count, seed=0):
    return torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_pixel(x):
    """A choice that every image makes for itself, on the device."""
    return x[:, 0, 0, 0].int() % 3


@torch.no_grad()
def expected(model, x, rows):
    return model(x, grids=[MENU[row] for row in rows], channels_last=True)


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize("fewest, most", [(1, 1), (1, 100), (5, 136), (17, 17), (17, 64 * 197)])
@pytest.mark.parametrize("waste", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_ladder_bounds_the_waste_with_the_fewest_budgets(fewest, most, waste):
    budgets = ladder(fewest, most, waste)
    assert list(budgets) == sorted(set(budgets)) and budgets[-1] == most
    tokens = torch.arange(fewest, most + 1)
    taken = torch.tensor(budgets)[torch.searchsorted(torch.tensor(budgets), tokens)]
    assert ((taken - tokens).double() / taken <= waste + 1e-12).all()
    for i in range(len(budgets) - 1):  # without this one, the first tokens that it held would waste more
        first = budgets[i - 1] + 1 if i else fewest
        assert (budgets[i + 1] - first) / budgets[i + 1] > waste


@pytest.mark.parametrize("waste", [0.1, 0.4])
def test_realised_waste_is_bounded_and_told(waste):
    model = tiny()
    made = eager(model, images=8, waste=waste)
    rows, tokens = 0, 0
    for seed in range(12):
        count = 1 + seed % 8
        chosen = rows_of(count, seed)
        answers = made.answer(images(count), chosen)
        assert answers.rows in made.budgets and answers.tokens.tolist() == [LENGTHS[row] for row in chosen]
        assert answers.waste.item() == pytest.approx(1 - sum(answers.tokens.tolist()) / answers.rows)
        assert answers.waste.item() <= waste and answers.fits.all()
        rows, tokens = rows + answers.rows, tokens + answers.tokens.sum().item()
    assert made.waste == pytest.approx(1 - tokens / rows) and made.waste <= waste
    made.model = model
    with pytest.warns(RuntimeWarning) if DEVICE == "cpu" else nullcontext():
        made.refresh()
    assert made.waste == 0


def test_rows_told_are_rows_computed(monkeypatch):
    made, capacities, build = eager_quietly(tiny(), images=8), [], Packing.from_choice

    def spied(*args, capacity):
        capacities.append(capacity)
        return build(*args, capacity=capacity)

    monkeypatch.setattr(Packing, "from_choice", spied)
    for rows in ([2], [0, 1], [0] * 8):
        assert made.answer(images(len(rows)), rows).rows == capacities.pop() < sum(LENGTHS[row] for row in rows) * 4 / 3
        assert not capacities


def test_room_for_what_the_mix_gives():
    made = eager(tiny(), by_pixel, images=64, mix=(0.25, 0.25, 0.5), margin=2)
    mean, variance = 9.25, 0.25 * 7.75**2 + 0.25 * 0.75**2 + 0.5 * 4.25**2
    assert made.expected(64) == pytest.approx(64 * mean + 2 * 8 * variance**0.5, abs=1)
    assert made.expected(1) == 17 and made.expected(2) <= 34 and made.budgets[-1] == made.expected(64)
    assert eager(tiny(), by_pixel, images=8).budgets[-1] == 8 * 17  # without a mix, the worst case


# ---------------------------------------------------------------------- graphs


def test_one_graph_a_budget_answers_as_the_model_does(cuda):
    """Replayed for batches of other sizes and lengths, some of the same total: nothing of the first is baked in."""
    model = tiny()
    made = capture(model, images=8)
    for seed in range(10):
        count = 1 + seed % 8
        x, rows = images(count, 8 * seed), rows_of(count, seed)
        answers = made.answer(x, torch.tensor(rows))
        same(answers.logits, expected(model, x, rows))
        assert answers.choice.tolist() == rows
    first, second = made.answer(images(2), [0, 2]), made.answer(images(2), [2, 0])
    assert first.rows == second.rows
    same(first.logits[0], expected(model, images(1), [0])[0])  # not overwritten by the second replay
    same(second.logits, expected(model, images(2), [2, 0]))
    if cuda:
        assert cuda.captures == len(made.budgets) and len(cuda.pools) == 1 and cuda.log.count("replay") == 12


def test_what_does_not_fit_the_largest_budget_goes_to_the_next_graph(cuda):
    model = tiny()
    x, rows = images(30), rows_of(30)
    made = capture(model, images=8, budgets=[64, 20, 32])
    assert made.budgets == (20, 32, 64)
    answers = made.answer(x, rows)
    same(answers.logits, expected(model, x, rows))
    assert answers.fits.all() and answers.rows >= 64 * 3 and made._rows == answers.rows
    assert len(made.answer(x[:0], []).logits) == 0


def test_slots_without_an_image_and_the_tail_are_never_read(cuda):
    """NaN in every slot's pixels but those of the batch's images, whatever the graph made of them before."""
    model = tiny()
    for choose in (None, lambda x: (x[:, 0, 0, 0] * 0).nan_to_num().int()):
        made = capture(model, choose, images=8, dtype=torch.float32)
        made._images.fill_(torch.nan)
        x = torch.randn(3, 16, 16, 3, device=DEVICE)
        answers = made.answer(x, [0, 0, 0] if choose is None else None)
        same(answers.logits, expected(model, x, [0, 0, 0]))
        assert made._tokens.tolist() == [17] * 3 + [0] * 5 and not made._logits[3:].any()


def test_slots_without_an_image_take_no_room(cuda):
    """Where the device chooses too, for fewer images after more, and where there is room left."""
    made = capture(tiny(), by_pixel, images=8)
    for count in (8, 3, 5, 1):
        answers = made.answer(images(count))
        assert answers.rows >= 17 * count and answers.fits.all()
        assert made._tokens[:count].tolist() == answers.tokens.tolist() and not made._tokens[count:].any()


@pytest.mark.parametrize("stale", ["raise", "refresh"])
def test_weights_written_in_place_are_seen_and_others_after_refresh(cuda, stale):
    model = make_model()
    made = capture(model, images=4, stale=stale)
    x, rows = images(4), [0, 1, 2, 2]
    before = made.answer(x, rows).logits
    with torch.no_grad():
        model.head.bias.add_(1)
    same(made.answer(x, rows).logits, expected(model, x, rows))
    assert {p.data_ptr() for p in model.parameters()} <= {t.data_ptr() for t in made._held}
    model.head.weight = torch.nn.Parameter(model.head.weight.detach() * 2)
    if stale == "raise":
        for call in (lambda: made(x), lambda: made.answer(x, rows)):
            with pytest.raises(StaleEngine, match="changed since its engine was made"):
                call()
        made.refresh()
    same(made.answer(x, rows).logits, expected(model, x, rows))
    assert not torch.equal(made.answer(x, rows).logits, before)


def test_another_assigner_makes_the_engine_stale(cuda):
    model = make_model()
    assigner = TokenLengthAssigner.for_model(model).to(DEVICE).eval()
    adaptive = AdaptiveViT(model, Assign(1.0, (1.0, 0.6, 0.3)), assigner=assigner).eval()
    made = capture_adaptive(adaptive, images=4)
    made.answer(images(4))
    assigner.fc3.weight = torch.nn.Parameter(assigner.fc3.weight.detach() * 2)
    with pytest.raises(StaleEngine, match="changed since its engine was made"):
        made.answer(images(4))


@pytest.mark.parametrize("channels_last", [True, False])
def test_an_engine_gives_what_its_model_gives(cuda, channels_last):
    model = tiny()
    x = images(6) if channels_last else images(6).permute(0, 3, 1, 2).contiguous()
    made = model.engine(images=4, channels_last=channels_last)
    grids = [MENU[row] for row in rows_of(6)]
    packing = Packing.from_grids(grids, model.num_prefix_tokens, menu=MENU, device=DEVICE)
    how = {"channels_last": channels_last}
    same(made(x, grids=grids), model(x, grids=grids, **how))
    same(made(x, packing=packing), model(x, grids=grids, **how))
    same(made(x), model(x, **how))
    same(made.features(x), model.forward_features(x, **how))
    same(made.features(x, grids=grids).tokens, model.forward_features(x, grids=grids, **how).tokens)
    with pytest.raises(ValueError, match=r"grids must be of the menu .*, got \(3, 1\)"):
        made(x, grids=[(3, 1)] * 6)
    on_device = Packing.from_choice(torch.zeros(6, dtype=torch.int32, device=DEVICE), MENU, 1, capacity=200)
    with pytest.raises(ValueError, match="whose grids the host knows"):
        made(x, packing=on_device)
    with pytest.raises(ValueError, match="leave out quantize='int8' or images"):
        model.engine(quantize="int8", images=4)
    with pytest.raises(ValueError, match="stale must be one of"):
        model.engine(images=4, stale="ignore")


def test_another_stream_waits_for_the_last(cuda):
    made = capture(tiny(), images=2)
    x, rows = images(2), [0, 2]
    made.answer(x, rows)
    if cuda:
        first, cuda.stream = cuda.stream, Stream()
        made.answer(x, rows)
        made.answer(x, rows)
        assert cuda.stream.waited_for == [first]
    else:
        with torch.cuda.stream(torch.cuda.Stream()):
            answers = made.answer(x, rows)
        torch.cuda.synchronize()
        same(answers.logits, expected(tiny(), x, rows))


def test_autocast_and_inference_mode_stay_outside(cuda):
    model = tiny()
    with torch.inference_mode():
        made = capture(model, images=4)
        inside = made.answer(images(3), [0, 1, 2]).logits
    with torch.autocast(DEVICE, torch.bfloat16):
        outside = made.answer(images(3), [0, 1, 2]).logits
        made._graphs.clear()
        same(made.answer(images(3), [0, 1, 2]).logits, outside)
    same(outside, expected(model, images(3), [0, 1, 2]))
    assert torch.equal(inside, outside) and outside.dtype == torch.float32


# ---------------------------------------------------------------------- refusals


def test_eager_is_the_same_with_a_reason():
    model = tiny()
    if DEVICE == "cpu":
        made = eager(model, images=8)
        assert made.refusal == "CUDA graphs need a CUDA device, the model is on cpu"
    else:
        made = CapturedEngine(model, images=8, channels_last=True)
        made._graphs.clear()
    x, rows = images(20), rows_of(20)
    same(made.answer(x, rows).logits, expected(model, x, rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said, once
        made.answer(x, rows)


@pytest.mark.parametrize("where", ["model", "block", "choose"])
def test_hooks_are_called_so_there_is_no_graph(where, cuda):
    model, calls = make_model(), []
    assigner = TokenLengthAssigner.for_model(model).to(DEVICE).eval()
    adaptive = AdaptiveViT(model, Assign(0.3, (1.0, 0.6, 0.3)), assigner=assigner).eval()
    roots = {"model": model, "block": model.blocks[1], "choose": assigner}
    handle = roots[where].register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.warns(RuntimeWarning, match="hooks, and a graph calls none"):
            made = captured_engine(adaptive, images=4, channels_last=True, mix=EVEN)
        assert "hooks" in made.refusal and ("blocks.1" in made.refusal) == (where == "block")
        calls.clear()
        made.answer(images(4))
        assert calls
    finally:
        handle.remove()
    made.refresh()
    assert made.refusal is None


def test_training_mode_is_refused(cuda):
    model = make_model()
    model.blocks[0].mlp.train()
    made = eager(model, images=2)
    assert made.refusal == "VarLenViT.blocks.0.mlp is in training mode"
    with torch.enable_grad():
        assert not made.answer(images(2), [0, 1]).logits.requires_grad


def test_a_failed_capture_says_why_and_runs_eagerly(cuda, monkeypatch):
    def fails(self, *args):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(captured, "WARMUP", 0)
    model = tiny()
    monkeypatch.setattr(CapturedEngine, "_step", fails)
    made = eager(model, images=4)
    monkeypatch.undo()
    assert made.refusal == "the capture failed: operation not permitted when stream is capturing"
    assert made._graphs == {} and (cuda is None or cuda.log == ["set_stream"])
    if DEVICE == "cpu":
        same(made.answer(images(4), [0, 1, 2, 0]).logits, expected(model, images(4), [0, 1, 2, 0]))


def test_what_the_model_cannot_do_is_no_refusal(cuda):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = create_model("vit_tiny_patch16_224", **small).to(DEVICE).make_resizable(MENU, embedding="patch").eval()
    with pytest.raises(ValueError, match="needs grids that the host knows"):
        CapturedEngine(model)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):  # then nothing is fused
        with pytest.raises(ValueError, match="needs grids that the host knows"):
            CapturedEngine(tiny())
    plain = create_model("vit_tiny_patch16_224", **small).to(DEVICE).eval()
    made = capture(plain, images=3, menu=MENU)
    same(made.answer(images(3), [0, 2, 1]).logits, expected(plain, images(3), [0, 2, 1]))
    assert capture(plain, images=2).menu == ((4, 4),)
    plain.global_pool = ""
    with pytest.raises(ValueError, match="must pool its tokens"):
        CapturedEngine(plain)


# ---------------------------------------------------------------------- a choice on the device


def test_images_beyond_the_budget_are_told(cuda):
    model = tiny()
    made = capture(model, lambda x: torch.zeros(len(x), dtype=torch.int32, device=x.device), images=8, budgets=[40])
    answers = made.answer(images(8))
    assert answers.fits.tolist() == [True] * 2 + [False] * 6 and not answers.logits[2:].any()
    same(answers.logits[:2], expected(model, images(2), [0, 0]))
    answers = made.answer(images(20))  # three replays
    assert answers.fits.sum() == 6 and answers.rows == 120
    assert made.waste == pytest.approx(1 - 8 * 17 / 160)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("mix, margin", [(EVEN, 2.0), ((0, 0, 1), 0.0), (None, 0.0)], ids=["fair", "tight", "worst"])
def test_every_image_is_answered_by_the_next_graphs(cuda, mix, margin, ahead):
    model = tiny()
    made = capture(model, by_pixel, images=8, mix=mix, margin=margin)
    sizes = [3, 20, 0, 1, 1, 8, 30]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = list(made.answers((images(n, start) for n, start in zip(sizes, starts)), ahead=ahead))
    assert [len(answers.logits) for answers in found] == sizes
    for n, start, answers in zip(sizes, starts, found):
        rows = by_pixel(images(n, start)).tolist()
        assert answers.choice.tolist() == rows and answers.tokens.tolist() == [LENGTHS[row] for row in rows]
        same(answers.logits, expected(model, images(n, start), rows) if n else answers.logits)
    assert sum(answers.rows for answers in found) == pytest.approx(made._rows)
    if mix is None:  # nothing can overflow, so all slots of every replay but the last are used well
        assert made._rows == pytest.approx(sum(sizes) // 8 * 8 * 17 + made.budgets[-1], abs=8 * 17)
    assert list(made.answers([])) == []


def test_the_host_looks_only_when_the_next_graph_is_queued():
    if DEVICE != "cpu":
        pytest.skip("the order of the calls is seen in the recorder")
    with pytest.MonkeyPatch.context() as patched:
        cuda = FakeCuda(patched)
        made = capture(tiny(), by_pixel, images=8)
        cuda.log.clear()
        taken = []

        def source():
            for i in range(4):
                taken.append(i)
                yield images(8, 8 * i)

        found = made.answers(source(), ahead=2)
        assert taken == []
        next(found)
        assert taken == [0, 1, 2] and cuda.log == ["replay", "record"] * 3 + ["wait"]
        next(found)
        assert taken == [0, 1, 2, 3] and cuda.log == ["replay", "record"] * 3 + ["wait", "replay", "record", "wait"]
        assert len(list(found)) == 2 and cuda.log.count("wait") == 4


@pytest.fixture(params=("tokens", "scout"))
def adaptive(request):
    assigner = TokenLengthAssigner.for_model(tiny(), request.param).to(DEVICE).eval()
    assigner.outcomes = synthetic(200)
    return AdaptiveViT(tiny(), Assign(0.4, (1.0, 0.6, 0.3)), assigner=assigner).eval()


def test_the_assigner_is_in_the_graph(adaptive, cuda):
    made = capture_adaptive(adaptive, images=16)
    wanted = adaptive.predict(images(50), channels_last=True)
    (found,) = made.answers([images(50)])
    assert torch.equal(found.choice, wanted.choice) and torch.equal(found.tokens, wanted.tokens)
    same(found.logits, wanted.logits)


def test_policies_of_one_pass(cuda):
    fixed = AdaptiveViT(tiny(), Fixed(1))
    made = capture_adaptive(fixed, images=8)
    assert made.expected(8) == 80 and made.budgets[-1] == 80  # its mix is known
    same(made.answer(images(8)).logits, fixed.predict(images(8), channels_last=True).logits)
    own = capture_adaptive(AdaptiveViT(tiny(), by_pixel), images=8, mix=EVEN)
    assert torch.equal(own.answer(images(5)).choice, by_pixel(images(5)).long())
    for policy in (Cascade(2, ((0.0,) * 4,) * 3, 0.1, (1.0, 0.6, 0.3)), Random(EVEN)):
        with pytest.raises(ValueError, match="asks the host"):
            captured_engine(AdaptiveViT(tiny(), policy))


# ---------------------------------------------------------------------- no host, and few launches


class Launches(TorchDispatchMode):
    """Counts the ops that do work: not views, nor allocations. On a GPU each is a launch, or a few."""

    FREE = (
        "aten::empty",
        "aten::new_empty",
        "aten::detach",
        "aten::_unsafe_view",
        "aten::lift_fresh",
        "revit_kernels::fingerprint",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        returned = [r.alias_info for r in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in returned)
        if not views and not func.name().startswith(self.FREE):
            self.names.append(func.name())
        return out


def launches(call):
    with torch.no_grad():
        call()  # what is kept from call to call is made
        with Launches() as counted:
            call()
    return counted.names


def deep(depth, norms="per_length"):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    model = create_model("vit_tiny_patch16_224", depth=depth, **small).to(DEVICE).make_resizable(MENU, norms=norms)
    return model.eval()


def test_seven_launches_a_block():
    """LayerNorm with the residual add, qkv, attention, projection, LayerNorm, fc1 with GELU, fc2.

    On a GPU, where cuBLASLt's epilogue is not called, GELU may be one more.
    """
    packing = Packing.from_choice(torch.tensor([0, 1, 2, 2], device=DEVICE), MENU, capacity=40)
    x = images(4)

    def count(**kwargs):
        model = deep(**kwargs)
        return len(launches(lambda: model(x, packing=packing, channels_last=True)))

    menu_affines = 2 * 2  # put together from the lengths' own: weight and bias of both norms
    for norms, more in (("shared", 0), ("per_length", menu_affines)):
        two, three, four = (count(depth=n, norms=norms) for n in (2, 3, 4))
        assert three - two == four - three <= 7 + more + (DEVICE == "cuda")


def test_launches_do_not_grow_with_images_or_grids():
    """So neither does the host's time for a forward."""
    plain = create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    plain = plain.to(DEVICE).eval()

    def forward(model, grids):
        packing = Packing.from_grids(grids, 1, device=DEVICE)
        return lambda: model(images(len(grids)), packing=packing, channels_last=True)

    base = launches(forward(plain, [(4, 4), (3, 2)]))
    for grids in ([(4, 4), (3, 2)] * 40, [(h, w) for h in (1, 2, 3, 4) for w in (1, 2, 3, 4)]):
        assert launches(forward(plain, grids)) == base
    for choose in (None, by_pixel):
        small, large = (eager_quietly(deep(2), choose, images=n, mix=EVEN) for n in (2, 50))
        few, many = ([0, 1], rows_of(50)) if choose is None else (None, None)
        assert launches(partial(small.answer, images(2), few)) == launches(partial(large.answer, images(50), many))


def test_a_call_launches_no_more_than_its_copies(cuda):
    """Whatever the model: images and choice in, answers out. The graph is one more."""

    class Quiet:
        def replay(self):
            pass

    for depth in (1, 3):
        made = capture(deep(depth), images=8)
        made._graphs = dict.fromkeys(made.budgets, Quiet())
        assert launches(lambda made=made: made.answer(images(8), rows_of(8))).count("aten::copy_") <= 5
        made = capture(deep(depth), by_pixel, images=8)
        made._graphs = dict.fromkeys(made.budgets, Quiet())
        x = images(8)
        assert launches(lambda made=made, x=x: made.answer(x)) == ["aten::copy_"] * 4


class NoDevice(NoHost):
    """Refuses also what indexes by a mask, and copies from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, "an index by a mask waits for the device"
        target = (kwargs or {}).get("device")
        assert DEVICE == "cpu" or name != "_to_copy" or target is None or target.type != "cpu", "a copy to the host"
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_from_the_images_to_the_logits_nothing_asks_the_device(adaptive, monkeypatch):
    x = images(16)
    known = eager_quietly(tiny(), images=16)
    chosen = eager_quietly(adaptive, make=captured_engine, images=16)
    wanted = chosen.answer(x)
    known.answer(x, rows_of(16))

    def refused(*args, **kwargs):
        raise AssertionError("the host asks for values of a tensor")

    with NoDevice(), monkeypatch.context() as patched:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, refused)
        patched.setattr(known, "_known", lambda choice, images: choice)
        found = chosen.answer(x), known.answer(x, rows := [0, 1, 2, 2] * 4)
    assert torch.equal(found[0].logits, wanted.logits) and found[1].choice.tolist() == rows


# ---------------------------------------------------------------------- wrong use


def test_wrong_use_says_so():
    cases = [
        (dict(images=0), "images must be at least 1, got 0"),
        (dict(waste=0), "waste must be a share between 0 and 1, got 0"),
        (dict(waste=1.0), "waste must be a share"),
        (dict(budgets=[16]), "the largest budget must hold the longest image's 17 tokens"),
        (dict(budgets=[]), "the largest budget must hold"),
        (dict(budgets=[16, 30], choose=by_pixel), "every budget must hold the longest image's 17 tokens"),
        (dict(mix=(1, 2)), "mix must be 3 shares"),
        (dict(mix=(0, 0, 0)), "mix must be 3 shares"),
        (dict(margin=-1), "margin at least 0"),
        (dict(choose=lambda x: x.float()), r"choose must give \(64,\) menu rows"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            CapturedEngine(tiny(), **options)
    made, chooses = eager_quietly(tiny(), images=4), eager_quietly(tiny(), by_pixel, images=4)
    calls = [
        (
            lambda: made.answer(images(2).float(), [0, 1]),
            r"images must be \(images, 16, 16, 3\) torch.uint8, got .*float32",
        ),
        (lambda: made.answer(images(2)[:, :8], [0, 1]), r"got \(2, 8, 16, 3\)"),
        (lambda: made.answer(images(2)), "choice must be 2 rows"),
        (lambda: made.answer(images(2), [0, 3]), "0 to 2 of the menu, got"),
        (lambda: made.answer(images(2), [0, -1]), "0 to 2 of the menu"),
        (lambda: made.answer(images(2), [0]), "choice must be 2 rows"),
        (lambda: made.answer(images(2), torch.zeros(2, dtype=torch.int64, device="meta")), "known to the host"),
        (lambda: chooses.answer(images(2), [0, 1]), "give no choice"),
        (lambda: list(made.answers([])), "chosen on the device"),
        (lambda: list(chooses.answers([], ahead=-1)), "ahead must be at least 0"),
    ]
    for call, match in calls:
        with pytest.raises(ValueError, match=match):
            call()
