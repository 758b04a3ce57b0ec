"""`revit info`, `models` and `completion`, and `python -m revit_kernels`: what tells about models and the machine."""

import re
import subprocess
import sys
from contextlib import suppress

import pytest
from tiny_revit import trained

from revit_kernels import cli, create_model
from revit_kernels.cli.completion import script, subcommands
from revit_kernels.models import hub, registry
from revit_kernels.models.checkpoints import save_checkpoint


def said(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_info_of_a_file_and_of_a_name(tmp_path, capsys):
    save_checkpoint(trained(), tmp_path / "model.safetensors")
    text = said(capsys, "info", tmp_path / "model.safetensors", "--device", "cpu", "--dtype", "float32")
    assert re.search(r"^menu +4x4 \(100%\), 3x3 \(\d+%\), 2x2 \(\d+%\)", text, re.MULTILINE)
    assert re.search(r"^classes +3: flat, stripes across, stripes down$", text, re.MULTILINE)
    assert re.search(r"^here +cpu, float32$", text, re.MULTILINE) and re.search(
        r"(cpu|reference): attention, block", text.splitlines()[-1]
    )
    text = said(capsys, "info", "vit_tiny_patch16_224", "--device", "cpu")
    model = create_model("vit_tiny_patch16_224")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text and "menu        none" in text
    assert "12 of width 192, 3 heads of 64" in text


def test_work_is_of_all_blocks(capsys):
    """One block stands for all: what is counted is nevertheless the whole model's."""
    from revit_kernels.adaptive.costs import model_macs

    text = said(capsys, "info", "vit_tiny_patch16_224", "--device", "cpu")
    macs = model_macs(create_model("vit_tiny_patch16_224"), (14, 14))
    assert f"work        {macs / 1e6:,.0f} million" in text


def test_models(capsys):
    assert said(capsys, "models", "vit_small_patch14_*").splitlines() == [
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
    ]
    assert "vit_small_patch14_dinov2.lvd142m" in said(capsys, "models", "patch14_dinov2", "--tags")
    assert said(capsys, "models", "vit_tiny_patch16_224", "-l").splitlines()[1].split()[1:4] == ["224", "16", "1,000"]
    assert cli.main(["models", "resnet50"]) == 2
    assert "no model's name has 'resnet50' in it" in capsys.readouterr().err


def completed(words):
    line = " ".join(f"'{word}'" for word in words)
    run = f"{script(cli.parser(), 'bash')}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _revit; "
    done = subprocess.run(["bash", "-c", run + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    return done.stdout.split()


def test_completion_in_bash():
    assert completed(["revit", "tr"]) == ["train", "train-assigner"]
    assert completed(["revit", "infer", "--dev"]) == ["--device"]
    assert completed(["revit", "infer", "--policy", "c"]) == ["cascade"]
    assert completed(["revit", "infer", "photos/"]) == []  # the shell completes files


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_names_every_option(shell):
    main, text = cli.parser(), None
    text = script(main, shell)
    for name, parser in subcommands(main).items():
        options = [option for action in parser._actions for option in action.option_strings]
        for option in options:
            assert option.lstrip("-") in text, f"{name} {option}"


def test_the_matrix_of_backends_goes_through_a_pipe():
    run = f"{sys.executable} -m revit_kernels | head -1"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
    assert done.stdout.startswith("revit_kernels ") and done.stderr == ""


# ---------------------------------------------------------------------- weights that are downloaded


def test_without_a_network_the_cache_is_asked_once(monkeypatch, tmp_path, capsys):
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("timm")
    monkeypatch.setattr(hub, "reachable", lambda endpoint: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"weights of vit_tiny_patch16_224.* are not in the cache and cannot be"):
        registry.create_model("vit_tiny_patch16_224", pretrained=True, cache_dir=str(tmp_path))
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_behind_a_proxy_is_taken_for_reachable(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", lambda: {})
    assert not hub.reachable("http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    assert hub.reachable("http://127.0.0.1:9")


@pytest.mark.parametrize(
    "line, said",
    [
        ("infer x.png --galery page.html", "unrecognized arguments: --galery page.html; did you mean --gallery?"),
        ("infer x.png --bugdet=2x", "did you mean --budget?"),
        ("infr x.png", "did you mean infer?"),
        ("infer x.png --policy assinger", "did you mean assigner?"),
        ("infer x.png --qqq", "unrecognized arguments: --qqq"),
        ("info {folder}", "the folder of that name has no model.safetensors"),
        ("info vit_smal", "the nearest are vit_small_patch"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_name(tmp_path, capsys, line, said):
    with suppress(SystemExit):  # argparse's way
        assert cli.main(line.format(folder=tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and ("--qqq" not in err or "mean" not in err)
