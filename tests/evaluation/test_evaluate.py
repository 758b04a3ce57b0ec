"""`revit evaluate`: its arithmetic, its honesty, and one report from end to end."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_revit import MENU, held_out, labelled, make_images, trained

from revit_kernels import cli
from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.calibration import reliability
from revit_kernels.adaptive.costs import Costs, model_macs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.policies import Assign, AssignedCascade, Cascade, Fixed, Own, Random
from revit_kernels.evaluation import contact_sheet, plots, report
from revit_kernels.evaluation import evaluate as evaluation
from revit_kernels.evaluation import measured as measuring
from revit_kernels.evaluation.comparison import against_random, against_static, at_equal_speed, recommended, verdict
from revit_kernels.evaluation.evaluate import Evaluation, check_apart, choose, evaluate
from revit_kernels.evaluation.measured import Measured, macs_of, passes
from revit_kernels.evaluation.page import body
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.training.assigner import AssignerRecipe, train_assigner
from revit_kernels.training.labels import collect

TOKENS = np.array([17, 10, 5])  # of the lengths of MENU
CASCADE = Cascade(2, ((0.0,) * 4,) * 3, 0.5, (1.0, 0.6, 0.3))


def measured(name, right, seconds, policy=None, budget="", row=0):
    right = np.array(right, bool)
    rows = np.full(len(right), row)
    return Measured(name, budget, policy or Fixed(row), right, rows, TOKENS[rows], 1.0, list(seconds), 100)


def some(count, of=1000):
    return [1] * count + [0] * (of - count)


def test_errors_and_ratios():
    full = measured("fixed", some(80, 100), [2.0, 4.0, 2.0])
    other = measured("cascade", [1] * 70 + [0] * 20 + [1] * 10, [1.0, 1.0, 1.0])
    assert full.accuracy == 0.8 and full.error == pytest.approx(np.sqrt(0.8 * 0.2 / 100))
    lost, error = other.lost(full)
    # ten lost, ten won: nothing lost, but twenty images differ
    assert lost == 0 and error == pytest.approx(np.sqrt(20 / 100) / 10)
    # the median of the rounds' ratios, not the ratio of medians of rounds that drifted apart
    drifted = measured("cascade", some(80, 100), [1.0, 1.0, 4.0])
    assert other.speed(full) == 2.0 and full.rate == 50.0
    assert drifted.speed(full) == 2.0 and drifted.ratios(full).tolist() == [2.0, 4.0, 0.5]
    assert measured("x", some(80, 100), [1.0], row=2).mix(3) == [0.0, 0.0, 1.0]


def test_at_equal_speed():
    points = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (4.0, 0.95)]

    def accuracy(time):
        return sum(share * points[i][1] for i, share in at_equal_speed(points, time).items())

    assert accuracy(1.5) == pytest.approx(0.7)
    assert at_equal_speed(points, 2.0) == {1: 1.0}
    assert at_equal_speed(points, 3.0) == {1: 0.5, 3: 0.5}  # past the third, which a mix of its neighbours beats
    assert at_equal_speed(points, 9.0) == {3: 1.0}  # more time than any takes
    assert at_equal_speed(points, 0.5) is None and at_equal_speed([], 1.0) is None
    assert at_equal_speed([(1.0, 0.9), (2.0, 0.9)], 1.5) == {0: 1.0}  # what is slower and no better is not mixed in


def synthetic(right, seconds, random=900, **changes):
    static = [
        measured("fixed", some(n), [s] * 3, Fixed(i), row=i)
        for i, (n, s) in enumerate([(950, 4.0), (900, 2.0), (800, 1.0)])
    ]
    policies = [measured("cascade", some(right), [seconds] * 3, CASCADE, "2x")]
    if random is not None:
        policies.append(measured("random", some(random), [2.0] * 3, Random((0.0, 1.0, 0.0)), "2x", row=1))
    _, outcomes = held_out()
    outcomes = outcomes.take(np.arange(1000) % len(outcomes))
    about = {"device": "a machine", "threads": 2, "dtype": "float32", "date": "2026-01-01", "versions": {"torch": "2"}}
    about |= {"batch": 8, "rounds": 3, "timed": 100, "images": "0" * 64, "assigner": None, "costs_kept": False}
    given = {"held_out": None, "costs": Costs(MENU, (4.0, 2.0, 1.0)), "macs": [4.0, 2.0, 1.0], "assigner_macs": 0.0}
    given |= {"fixed": [], "images": "x", "classes": ("a", "b", "c"), "about": about}
    return Evaluation(MENU, static, policies, outcomes, **given | changes)


def test_gaps_are_paired():
    e = synthetic(949, 3.0)  # at three seconds: half of the images at each of the two longest lengths
    found = against_static(e, e.policies[0])
    mixed = 0.5 * e.static[0].right + 0.5 * e.static[1].right
    assert found.value == pytest.approx(0.949 - 0.925)
    assert found.error == pytest.approx((e.policies[0].right - mixed).std() / np.sqrt(1000))
    # random has one point, at two seconds: at three there is no better
    assert against_random(e, e.policies[0]).value == pytest.approx(0.049)
    assert against_static(synthetic(949, 0.5), synthetic(949, 0.5).policies[0]) is None


def test_verdict_either_way():
    """The first sentence says what to use, whichever way the numbers fall."""
    better = verdict(synthetic(949, 2.0))
    assert better[0].startswith("Use cascade at a budget of 2x: **2.00x (2.00 to 2.00 over 3 rounds) the images per")
    assert "0.10 ± 0.10 points lost**. Of 1 policies it is the fastest" in better[0]
    assert "it is 4.90 ± 0.68 points above the lengths alone and mixes of two of them." in better[1]
    assert "it is 4.90 ± 0.68 points above random lengths." in better[2]
    e = synthetic(949, 2.0)
    e.policies.append(measured("assigner", some(951), [2.5] * 3, Fixed(0), "1.6x"))
    assert "With nothing lost: assigner at a budget of 1.6x, 1.60x" in verdict(e)[0]
    assert "With nothing lost" not in better[0]
    own = measured("scout+cascade", some(950), [1.0] * 3, CASCADE, "4x", row=-1)
    e.policies.append(own)
    assert recommended(e) is not own and verdict(e)[0] in verdict(replace(e, policies=e.policies[:-1]))
    assert verdict(e)[-1] == (
        "Where the assigner may answer by itself (100 % of the images): scout+cascade at a budget of 4x, 4.00x "
        "(4.00 to 4.00 over 3 rounds) the images per second of full length, 0.00 ± 0.00 points lost."
    )
    worse = " ".join(verdict(synthetic(890, 2.0)))
    assert worse.startswith("Use full length, 4x4 for all images: no shorter length loses at most 0.3 points.")
    assert (
        "Adaptivity does not pay here with at most 0.3 points lost: the best of 1 policies is cascade at a budget of 2x"
        in worse
    )
    assert "6.00 ± 0.75 points lost." in worse and "1.00 ± 0.31 points below the lengths alone" in worse
    won = verdict(synthetic(960, 0.5))  # nothing is as fast to compare it with: that it pays is not known
    assert "Adaptivity does not pay" in won[0] and "nothing as fast to compare it with" in won[1]
    assert "random" not in " ".join(verdict(synthetic(949, 2.0, random=None)))
    alone = synthetic(949, 3.0)
    alone.static[1] = measured("fixed", some(948), [2.0] * 3, Fixed(1), row=1)
    assert recommended(alone) is alone.static[1]
    assert verdict(alone)[0].startswith("Use 3x3 for all images: **2.00x (2.00 to 2.00 over 3 rounds)")
    alone.policies = []
    assert verdict(alone)[1:] == ["Only the lengths alone were measured, no policy."]
    alone.fixed = [("cascade", "2x", 1)]
    assert verdict(alone)[1:] == ["Every policy came out as one length for all images, at every budget."]
    alone.policies = [measured("random", some(900), [2.0] * 3, Random((0.0, 0.5, 0.5)), "2x", row=1)]
    assert verdict(alone)[1:] == ["Of policies only random was measured."]


def test_a_mix_that_chance_explains_does_not_pay():
    one = synthetic(926, 3.0)  # 0.1 points above the mix of two lengths, with a standard error of 0.35
    assert recommended(one, allowed=0.03) is one.static[0]


def test_reports_of_synthetic_numbers():
    e = synthetic(949, 3.0)
    text = report.markdown(e, [], "a command")
    assert "| cascade | 2x | 94.90 ± 0.70 | 0.10 ± 0.10 | 33.3 | **1.33x** | 1.33 to 1.33 |" in text
    assert "+2.40 ± 0.35 | +4.90 ± 0.68 |  |" in text and "`a command`" in text and "a machine, 2 threads" in text
    assert text.index("| policy |") < text.index("**accuracy**: of all images")  # the headline comes first
    assert "above random" not in report.markdown(synthetic(949, 3.0, random=None), [])
    assert "none as fast" in report.markdown(synthetic(949, 0.5), [])
    own = synthetic(949, 3.0)
    own.policies[0].policy, own.policies[0].name = Own(lambda images: [0] * len(images)), "mine"
    own.fixed.append(("assigner", "3x", 2))
    text = report.markdown(own, [])
    assert "**mine 2x**: a function of the user's\n" in text and "**assigner 3x**: came out as all at 2x2" in text
    json.dumps(report.as_json(own), allow_nan=False)
    own.outcomes = replace(own.outcomes, correct=np.ones_like(own.outcomes.correct), assigner=own.outcomes.confidence)
    own.outcomes = replace(own.outcomes, mixed=np.zeros((1000, 3, 4), np.float32))
    assert report.as_json(own)["decisions"]["2x2"]["assigner"] is None and "nan" not in report.markdown(own, [])


def test_reliability():
    probability, right = np.array([0.05, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1], bool)
    found = reliability(probability, right)
    assert found[0] == (2, 0.05, 0.5) and found[9] == (2, pytest.approx(0.975), 1.0)
    assert len(found) == 10 and found[5][0] == 0 and np.isnan(found[5][1])


def test_passes_and_their_macs():
    row = np.array([2, 1, 0, 0, 1])
    assert passes(CASCADE, row, 3).astype(int).tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 0, 1], [0, 1, 1]]
    assert passes(Fixed(1), np.array([1]), 3).tolist() == [[False, True, False]]
    model, relative = trained(), (1.0, 0.5, 0.3)
    per = np.array([model_macs(model, grid) for grid in MENU])
    expected = (2 * per[0] + 2 * per[1] + 5 * per[2]) / 5
    assert macs_of(AdaptiveViT(model, CASCADE), row) == pytest.approx(expected)
    assigner = TokenLengthAssigner.for_model(model, "tokens", depth=1)
    begun = model_macs(model, MENU[-1], 1)  # which an image at the shortest length goes on from
    weights = ((0.0,) * 11,) * 3
    for policy, own, going in (
        (AssignedCascade(2, weights, 0.1, relative), expected, 5),
        (Assign(0.1, relative), (2 * per[0] + 2 * per[1] + per[2]) / 5, 1),
    ):
        reused = AdaptiveViT(model, policy, assigner=assigner)
        assert macs_of(reused, row) == pytest.approx(own - going * begun / 5 + assigner.macs(model))
        reused.reuse = False
        assert macs_of(reused, row) == pytest.approx(own + assigner.macs(model))


def test_budgets_are_not_solved_from_test_images():
    images, outcomes = held_out()
    with pytest.raises(ValueError, match="200 of the test images are among those that budgets are solved from"):
        evaluate(trained(), images, held_out=outcomes)
    check_apart(outcomes, make_images(9, name="other"), "")
    with pytest.raises(ValueError, match="2 of the test images are among those of x"):
        check_apart(outcomes.take([3, 7]), images, "of x")
    with pytest.warns(UserWarning, match="2 of the test images have the names of images of elsewhere of x"):
        check_apart(replace(outcomes.take([3, 7]), about={"images": "elsewhere"}), images, "of x")
    with pytest.raises(ValueError, match="none of the labels are of images that were held out"):
        evaluate(trained(), make_images(9, name="other"), held_out=outcomes.take(np.arange(0)))


def test_policies_that_cannot_be_had():
    _, outcomes = held_out()
    said = []
    assert choose(None, ["2x"], None, None, said.append) == ("fixed", "oracle")
    assert "cascade is left out: it needs held-out outcomes" in " ".join(said)
    assert choose(None, ["2x"], None, outcomes) == ("fixed", "random", "cascade", "oracle")
    for policies, assigner, known, message in (
        (["greedy"], None, outcomes, "a policy is one of fixed, random.*'greedy'"),
        (["assigner"], None, outcomes, "'assigner' needs an assigner"),
        (["cascade"], None, None, "'cascade' needs held-out outcomes"),
        (["assigner"], object(), outcomes, "needs held-out outcomes with the assigner's answers"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(policies, ["2x"], assigner, known)
    with pytest.raises(ValueError, match="a budget is written"):
        choose(None, ["quick"], None, outcomes)


def test_easy_and_hard_images():
    e = synthetic(949, 3.0)
    easy, hard = contact_sheet.easiest(e, 8), contact_sheet.hardest(e, 8)
    o = e.outcomes
    assert o.correct[easy, -1].all() and (np.diff(o.confidence[easy, -1]) <= 0).all()
    assert (~o.correct[hard, 1:].any(1)).all() and len(set(hard)) == len(hard)


def fast_costs(monkeypatch):
    """Costs of round numbers, so that which budgets can be met does not hang on the machine; each is timed briefly."""
    monkeypatch.setattr(measuring, "BRIEF", 0.0)
    monkeypatch.setattr(evaluation, "measure_costs", lambda *a, **k: Costs(MENU, (4.0, 2.0, 1.0), 0.05, 0.01))


def test_own_configurations_and_fewer_timed_images(monkeypatch):
    fast_costs(monkeypatch)
    model, test = trained(), make_images(60, seed=2, name="test")
    own = AdaptiveViT(model, lambda images: torch.full((len(images),), 1))
    found = evaluate(model, test, policies=(), configurations=[("mine", own)], timed=20, rounds=2)
    assert [one.name for one in found.policies] == ["mine"] and found.about["timed"] == 20
    assert (found.policies[0].right == found.static[1].right).all()
    assert found.policies[0].macs == found.static[1].macs == found.macs[1]
    assert all(len(one.seconds) == 2 and one.timed == 20 and len(one.right) == 60 for one in found.static)
    with pytest.raises(ValueError, match="'mine' is of another model"):
        evaluate(object(), test, configurations=[("mine", own)])
    with pytest.raises(ValueError, match="cannot be named 'random'"):
        evaluate(model, test, configurations=[("random", own)])
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        evaluate(model, test, rounds=0)


@pytest.mark.parametrize("batches, times", [(1, 3), (4, 1)])
def test_rounds_are_taken_in_turn(monkeypatch, batches, times):
    """A few batches of each configuration at a time; over few images several times, of which one counts."""
    test = make_images(40, seed=2, name="test")
    outcomes = collect(trained(), test)
    bench = measuring.Bench(trained(), test, outcomes, -(-40 // batches), 2, None, lambda **_: evaluation.NoBar())
    made = [("fixed", "", AdaptiveViT(trained(), Fixed(row))) for row in range(3)]
    found, turns = bench.measure(made, False), []
    assert all(len(one.seconds) == 2 for one in found)

    def clocked(adaptive, chunk):
        turns.append((adaptive.policy.row, len(chunk)))
        return 1.0 * len(chunk), measuring.run(adaptive, chunk, outcomes.label)

    monkeypatch.setattr(bench, "_clocked", clocked)
    monkeypatch.setattr(measuring, "BRIEF", 3.0 if batches == 1 else 2.0)
    found = bench.measure(made, False)
    size = times if batches == 1 else 2
    assert turns[1:] == [(row, size) for row in range(3)] * (len(turns) // 3)  # the first sets how many at a time
    assert [one.seconds for one in found] == [[batches, batches]] * 3
    assert all((one.right == outcomes.correct[:, row]).all() for row, one in enumerate(found))


def test_report_from_end_to_end(tmp_path, monkeypatch, capsys):
    fast_costs(monkeypatch)
    images, outcomes = labelled()
    flat = images.targets == 0  # let stripes need the longest length, or one length alone would win
    outcomes = replace(outcomes, correct=np.stack([np.ones(440, bool), flat, flat], 1))
    assigner = train_assigner(trained(), outcomes, images, "scout", AssignerRecipe(epochs=10, batch=32, folds=2))
    save_checkpoint(trained(), tmp_path / "model.safetensors")
    assigner.save(tmp_path / "assigner.safetensors")
    test = make_images(90, seed=2, name="test")
    monkeypatch.setattr("revit_kernels.cli.clips.open_set", lambda *args, **kwargs: test)
    command = ["evaluate", str(tmp_path / "model.safetensors"), "--assigner", str(tmp_path / "assigner.safetensors")]
    command += ["--data", "test", "--output", str(tmp_path / "report"), "--budgets", "1.5x,1.501x,99x", "--rounds", "2"]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("of an earlier run")
    assert cli.main([*command, "--dtype", "float32", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "cannot meet the budget 99x" in said.err and "the report is" in said.out
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    named = [f"{one['policy']} {one['budget']}" for one in found["policies"]]
    fixed = [f"{one['policy']} {one['budget']}" for one in found["fixed"]]
    numbers = [json.dumps(one["numbers"]) for one in found["policies"]]
    assert len(set(numbers)) == len(numbers), "the same policy stands twice"
    for policy in ("random", "assigner", "cascade", "assigner+cascade"):
        told = ", ".join(name for name in named + fixed if name.split()[0] == policy)
        assert all(budget in told for budget in ("1.5x", "1.501x", "99x"))
        assert f"{policy} 99x" in fixed
    assert named[-1] == "oracle "
    text = (tmp_path / "report" / "report.md").read_text()
    for title in ("## Lengths", "## Accuracy by label", "## Decisions", "## Calibration", "an upper bound"):
        assert title in text
    assert "images.png" in text and (tmp_path / "report" / "accuracy_speed.png").exists() == plots.available()
    page = (tmp_path / "report" / "report.html").read_text()
    todo = page[page.index('<p class="do">') :].partition("</p>")[0]
    assert page.index(todo) < page.index("<h1>") and "<b>" in todo
    assert page.count("data:image/svg+xml") == (4 if plots.available() else 0) and page.count("data:image/png") == 1
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page) and "<td>oracle</td>" in page and "**" not in page
    with Image.open(tmp_path / "report" / "images.png") as sheet:
        assert sheet.width > 6 * contact_sheet.SIDE
    assert not [p for p in (tmp_path / "report").iterdir() if p.name.startswith(".")]
    # what is reported is what the model says
    x = torch.from_numpy(test.array)
    with torch.inference_mode():
        right = (trained()(x, grids=[MENU[1]] * 90, channels_last=True).argmax(-1).cpu().numpy() == test.targets).mean()
    assert found["static"][1]["accuracy"] == pytest.approx(right)
    by_name = {f"{one['policy']} {one['budget']}": one for one in found["policies"]}
    oracle = by_name["oracle "]
    assert oracle["accuracy"] >= max(one["accuracy"] for one in found["static"]) and oracle["mix"] == found["labels"]
    assert found["static"][0]["speed"] == 1.0 and len(found["static"][0]["seconds"]) == 2
    # at random, the same lengths are given as often
    assert any("same_mix_by_lot" in one for one in found["policies"])
    for one in found["policies"]:
        if "same_mix_by_lot" in one:
            assert one["same_mix_by_lot"]["mix"] == pytest.approx(one["mix"])
            assert len(one["same_mix_by_lot"]["seconds"]) == 2
    assert "same_mix_by_lot" not in oracle
    assert set(found["decisions"]) == {"4x4", "3x3", "2x2"} and len(found["calibration"]) == 4
    assert len(found["about"]["assigner"]) == len(found["model"]) == 64


def test_without_matplotlib(tmp_path, monkeypatch):
    """The report then has no plots, and none of an earlier report stays beside it."""
    (tmp_path / "mixes.png").write_bytes(b"of an earlier run")
    monkeypatch.setattr(plots, "available", lambda: False)
    images, _ = held_out()
    report.write(synthetic(949, 3.0), images.subset(np.arange(1000) % len(images)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.png", "report.html", "report.json", "report.md"]


def test_wrong_use(tmp_path, monkeypatch, capsys):
    save_checkpoint(trained(), tmp_path / "model.safetensors")
    test = make_images(9, name="test")
    test.classes = ("a", "b")
    monkeypatch.setattr("revit_kernels.cli.clips.open_set", lambda *args, **kwargs: test)
    command = ["evaluate", str(tmp_path / "model.safetensors"), "--data", "test", "--output", str(tmp_path)]
    assert cli.main(command) == 2
    assert "has 3 classes, test has 2" in capsys.readouterr().err
    test.classes = trained().pretrained_cfg["label_names"]
    (tmp_path / "file").write_text("")
    assert cli.main([*command[:-1], str(tmp_path / "file")]) == 1
    assert "the report could not be written" in capsys.readouterr().err
    assert cli.main([*command, "--policies", "cascade"]) == 2
    assert "the policy 'cascade' needs held-out outcomes" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "gone.safetensors"), *command[2:]]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_a_page_of_what_a_report_writes(tmp_path):
    text = "# A & b\n\nSay **this** `x<y>`.\n\n- one\n- *two*\n\n| a | b |\n| --- | ---: |\n| c | 1 |\n\n"
    text += "![A plot](p.png)\n\n*A plot.*"
    (tmp_path / "p.svg").write_text("<svg/>")
    html = body(text, tmp_path)
    assert "<h1>A &amp; b</h1>" in html and "<p>Say <b>this</b> <code>x&lt;y&gt;</code>.</p>" in html
    assert "<ul><li>one</li><li><i>two</i></li></ul>" in html and '<td class="number">1</td>' in html
    assert html.count("A plot") == 2 and "data:image/svg+xml;base64,PHN2Zy8+" in html
