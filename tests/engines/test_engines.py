"""Engines: the answers of their models, faster; snapshots that say when they are old."""

import copy
import multiprocessing
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from contract import DEVICE, assert_close, require
from test_whole_block import DTYPES, model, model_like
from torch import nn

from revit_kernels import VarLenTimeSformer
from revit_kernels.dispatch import load
from revit_kernels.engines import Engine, StaleEngine, engine_of
from revit_kernels.ops.block import sample
from revit_kernels.packing import Packing

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="packed engines are for CPUs")
MENU = ((4, 4), (2, 3), (1, 1))
GRIDS = [[(4, 4)], [(1, 1)], [(2, 3), (4, 4), (1, 1), (2, 3)], [(4, 4), (2, 3)], [(1, 1), (2, 3)], [(3, 3), (4, 4)]]


def made(dtype=torch.float32, menu=None, **options):
    m = model(dtype, **options)
    if menu:
        m.make_resizable(menu)
        for name, parameter in m.named_parameters():
            if "shorter" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return m.eval().requires_grad_(False)


def batch(grids, dtype=torch.float32):
    torch.manual_seed(2)
    return [torch.randn(3, 16 * h, 16 * w).to(DEVICE, dtype) for h, w in grids]


@pytest.fixture
def calls(monkeypatch):
    """Of each call of the block's kernel, whether it gave answers, not tokens."""
    require("block", "cpu", *sample(DEVICE))
    backend, seen = load("block", "cpu"), []
    forward = backend._blocks
    monkeypatch.setattr(backend, "_blocks", lambda *args: seen.append(bool(args[-7])) or forward(*args))
    return seen


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("menu", [None, MENU], ids=["one affine", "an affine per length"])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_an_engine_answers_as_its_model(calls, menu, dtype, grids):
    m, images = made(dtype, menu), batch(grids, dtype)
    engine = m.engine()
    assert engine.refusal is None
    answers = engine(images, grids=grids)
    assert calls == [True]
    exact = model_like(m, torch.float64)([image.double() for image in images], grids=grids)
    assert_close("logits", answers, exact, m(images, grids=grids))
    assert torch.equal(engine.features(images, grids=grids).tokens, m.forward_features(images, grids=grids).tokens)
    alone = torch.cat([engine([image], grids=[grid]) for image, grid in zip(images, grids)])
    assert torch.equal(alone, answers)
    if len(grids) == 1:
        dense = images[0][None]
        assert torch.equal(engine(dense), answers)
        assert torch.equal(engine.features(dense), m.forward_features(dense))


@pytest.mark.parametrize(
    "options",
    [{"global_pool": "avg"}, {"global_pool": ""}, {"global_pool": "map"}, {"num_classes": 0}, {"qk_norm": True}]
    + [{"pre_norm": True}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]
    + [{"norm_layer": "rmsnorm", "scale_mlp_norm": True}, {"mlp_layer": "GluMlp", "act_layer": "silu"}]
    + [{"mlp_layer": "SwiGLU", "act_layer": "silu", "scale_attn_norm": True, "block_fn": "Block"}],
    ids=str,
)
def test_every_kind_of_head_and_block(options):
    m = made(**options)
    engine, grids = m.engine(), [(4, 4), (1, 1)]
    for images, where in ((torch.randn(2, 3, 64, 64, device=DEVICE), {}), (batch(grids), {"grids": grids})):
        wanted, found = m(images, **where), engine(images, **where)
        for a, b in zip(
            found if isinstance(found, tuple) else (found,), wanted if isinstance(wanted, tuple) else (wanted,)
        ):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 7)), nn.Identity()], ids=str)
def test_a_head_that_is_no_linear(head):
    m = made()
    m.head = head.eval().requires_grad_(False).to(DEVICE)
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    torch.testing.assert_close(m.engine()(images), m(images))


def test_a_dropout_that_stays_in_training_mode_drops():
    m = made(drop_rate=0.5)
    m.head_drop.train()
    engine, images = m.engine(), torch.randn(2, 3, 64, 64, device=DEVICE)
    assert not torch.equal(engine(images), engine(images))


@cpu_only
def test_images_without_tokens_are_answered_with_zeros(calls):
    engine, packing = made().engine(), Packing.from_choice(torch.tensor([0, -1, 1, 0]), MENU, 1, capacity=30)
    images = torch.rand(4, 3, 64, 64)
    logits = engine(images, packing=packing)
    assert calls == [True]
    assert (logits[[1, 3]] == 0).all() and logits[[0, 2]].abs().min() > 0  # the last found no room
    assert torch.equal(logits[:1], engine(images[:1], grids=[(4, 4)]))


# ---------------------------------------------------------------------- snapshots


def _fused_step(m):
    m.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1, fused=True)
    m(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    m.requires_grad_(False)


CHANGES = {
    "in place": lambda m: m.head.weight.add_(0.3),
    "positions": lambda m: m.pos_embed.add_(0.3),
    "a block's bias": lambda m: m.blocks[1].mlp.fc1.bias.add_(0.3),
    "exchanged": lambda m: setattr(m, "head", nn.Linear(64, 7).requires_grad_(False)),
    "other memory": lambda m: setattr(m.blocks[0].norm1.weight, "data", torch.rand(64)),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
    "trained in between": lambda m: (m.train(), m.blocks[0].mlp.fc1.weight.data.mul_(2), m.eval()),
    "a fused optimizer": _fused_step,
    "another dtype and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
}


@cpu_only
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_raised_or_refreshed(change):
    m, images = made(), torch.randn(2, 3, 64, 64)
    strict, lenient = m.engine(), m.engine(stale="refresh")
    before = strict(images)
    assert torch.equal(lenient(images), before)
    change(m)
    m.eval()
    with pytest.raises(StaleEngine, match=r"engine.refresh\(\)"):
        strict(images)
    torch.testing.assert_close(lenient(images), m(images))
    strict.refresh()
    assert torch.equal(strict(images), lenient(images)) and not torch.equal(strict(images), before)


@cpu_only
def test_an_engine_is_a_snapshot():
    """What raises no version goes unnoticed, as the docstring says, and none of it is taken until a refresh."""
    m, images = made(), torch.randn(2, 3, 64, 64)
    engine = m.engine()
    before = engine(images)
    for parameter in m.parameters():
        parameter.data.mul_(1.1)
    assert torch.equal(engine(images), before)
    engine.refresh()
    torch.testing.assert_close(engine(images), m(images))


@cpu_only
def test_peft_merges_into_the_model_at_once_and_into_an_engine_after_a_refresh():
    peft = pytest.importorskip("peft")
    m, images = made().requires_grad_(True), torch.randn(2, 3, 64, 64)
    before, of_before = m(images), m.engine()
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(m, config).eval()
    assert "Linear" in m.engine().refusal  # the adapters run as they are
    with torch.no_grad():
        wanted = adapted(images)
        torch.testing.assert_close(m.engine()(images), wanted)
        merged = adapted.merge_and_unload()
        engine = m.engine(stale="refresh")
        torch.testing.assert_close(merged(images), wanted)
        torch.testing.assert_close(engine(images), merged(images))
    with pytest.raises(StaleEngine):
        of_before(images)
    assert not torch.allclose(wanted, before)


def test_a_model_in_training_mode_runs_as_it_is():
    m, images = made(), torch.randn(2, 3, 64, 64, device=DEVICE)
    engine = m.train().engine(stale="refresh")
    assert engine.refusal
    m.eval()
    torch.testing.assert_close(engine(images), m(images))
    assert DEVICE == "cuda" or engine.refusal is None


# ---------------------------------------------------------------------- threads and processes


@cpu_only
def test_eight_threads_on_one_engine_give_the_bits_of_one():
    m = made(menu=MENU)
    engine, batches = m.engine(), [(batch(grids), grids) for grids in GRIDS]
    wanted = [engine(images, grids=grids) for images, grids in batches]
    fresh = m.engine()  # nothing is kept yet: threads meet where it is made
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: fresh(batches[i % 6][0], grids=batches[i % 6][1]), range(96)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(answers, wanted[i % 6]) for i, answers in enumerate(found))


def of_clips():
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    return VarLenTimeSformer(**small, num_frames=2).eval(), torch.randn(2, 3, 2, 16, 16)


@cpu_only
@pytest.mark.parametrize("name", ["engine.PackedBlocks", "clips.PackedClipBlocks"])
def test_a_write_while_weights_are_packed_is_seen(name, monkeypatch):
    """A weight that is reloaded from A to B and back to A, with B packed in between, would stay wrong for good."""
    m, images = of_clips() if "Clip" in name else (made(), batch([(4, 4)]))
    weight = m.blocks[0].mlp.fc1.weight
    a, b = weight.detach().clone(), torch.randn(weight.shape)
    module, _, name = f"revit_kernels.engines.{name}".rpartition(".")
    wanted, packed = m.engine()(images), getattr(sys.modules[module], name)

    def reloaded(*args):
        weight.data.copy_(a)
        with torch.no_grad():
            weight.copy_(b)
        found = packed(*args)
        with torch.no_grad():
            weight.copy_(a)
        return found

    monkeypatch.setattr(sys.modules[module], name, reloaded)
    engine = m.engine()
    refreshed = m.engine(stale="refresh")
    monkeypatch.setattr(sys.modules[module], name, packed)
    with pytest.raises(StaleEngine):
        engine(images)
    assert torch.equal(refreshed(images), wanted)


@cpu_only
def test_a_model_that_changes_dtype_while_others_infer():
    """Engines answer as they were made; the model itself answers or refuses, and is whole afterwards."""
    m, images = made(), batch([(4, 4), (2, 3)])
    grids, engine = [(4, 4), (2, 3)], copy.deepcopy(m).engine()
    wanted, stop = engine(images, grids=grids), []

    def infer(_):
        while not stop:
            assert torch.equal(engine(images, grids=grids), wanted)
            with suppress(ValueError, NotImplementedError, RuntimeError):  # its weights were of two dtypes
                m(images, grids=grids)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(infer, i) for i in range(4)]
            try:
                for _ in range(40):
                    m.to(torch.bfloat16), m.to(torch.float32)
            finally:
                stop.append(True)
            for future in running:
                future.result()
    finally:
        sys.setswitchinterval(interval)
    fresh = copy.deepcopy(m)
    assert torch.equal(m(images, grids=grids), fresh(images, grids=grids))
    assert torch.equal(m.engine()(images, grids=grids), m(images, grids=grids))


def _answer(engine, images, queue):
    torch.set_num_threads(1)
    queue.put(engine(images).numpy())


@cpu_only
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_answer(method):
    m, images = made(), torch.randn(2, 3, 64, 64)
    engine = m.engine()
    wanted = engine(images)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_answer, args=(engine, images, queue))
    process.start()
    assert (torch.from_numpy(queue.get(timeout=120)) == wanted).all()
    process.join(60)


def test_copies_and_pickles():
    m, images = made(), torch.randn(2, 3, 64, 64, device=DEVICE)
    engine = m.engine()
    wanted = engine(images)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine)), copy.deepcopy(m).engine()):
        assert torch.equal(other(images), wanted)
        other.model.blocks[0].mlp.fc1.weight.mul_(2)
    assert torch.equal(engine(images), wanted) and engine_of(engine) is engine
    assert engine_of(m).stale == "refresh" and engine.menu is None and engine.num_classes == 7


# ---------------------------------------------------------------------- fewer bits


@cpu_only
def test_int8():
    m = made(torch.bfloat16, depth=3)
    images = batch([(4, 4), (1, 1)], torch.bfloat16)
    if load("block", "cpu").unable((64, 64, 64), "int8"):
        with pytest.raises(NotImplementedError, match="AVX512"):
            m.engine(quantize="int8")
        return
    plain, engine = m(images).float(), m.engine(quantize="int8")
    assert not torch.equal(engine(images).float(), plain)
    assert (engine(images).float() - plain).abs().max() <= 0.1 * plain.abs().max()
    assert torch.equal(m(images).float(), plain)  # the model is as it was


def test_what_cannot_be_quantized_says_so():
    with pytest.raises(NotImplementedError, match=r"int8.*(ResPostBlock|AVX512|CPU)"):
        made(block_fn="ResPostBlock").engine(quantize="int8")
    with pytest.raises(ValueError, match=r"quantize must be one of .*got 'int3'"):
        made().engine(quantize="int3")
    with pytest.raises(ValueError, match=r"stale must be one of .*got 'never'"):
        made().engine(stale="never")


def test_fp8_leaves_the_model_as_it_was():
    m, images = made(), torch.randn(2, 3, 64, 64, device=DEVICE)
    plain = m(images)
    before = {key: value.clone() for key, value in m.state_dict().items()}
    engine = Engine(m, quantize="fp8")
    answers = engine(images)
    assert not torch.equal(answers, plain) and (answers - plain).norm() <= 0.1 * plain.norm()
    assert all(torch.equal(value, before[key]) for key, value in m.state_dict().items())
    assert torch.equal(m(images), plain)
