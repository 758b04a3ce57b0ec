"""What `pytest benchmarks` measures without --all, and the table that it prints."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

# About a duel for each op, the whole model against its strongest rivals, int8, and a training step: minutes on 2 cores.
DEFAULT = (
    "bench_vit.py::bench_vit[vit_small*-32-torch.bfloat16-bucketed]",
    "bench_vit.py::bench_vit[vit_small*-32-torch.bfloat16-naflex_fastest]",
    "bench_vit.py::bench_vit[vit_small*-32-torch.bfloat16-openvino]",
    "bench_vit.py::bench_vit[vit_small*-32-torch.bfloat16-zentorch]",
    "bench_vit.py::bench_vit[vit_small*-32-torch.bfloat16-packed_varlen]",
    "bench_vit.py::bench_vit_one_length[torch.bfloat16-32-(14, 14)]",
    "bench_cpu.py::bench_one_image[vit_small*-(14, 14)-torch.bfloat16-eager]",
    "bench_cpu.py::bench_int8_shipped[*",
    "bench_block.py::bench_block[torch.bfloat16-384-32]",
    "bench_attention.py::bench_attention[forward-mix-torch.bfloat16-*",
    "bench_layer_norm.py::bench_residual_forward[torch.bfloat16-2920-384-add + F.layer_norm]",
    "bench_linear.py::bench_forward[torch.bfloat16-*F.linear and the rest]",
    "bench_patch_embed.py::bench_patch_embed_photographs[*-torch.bfloat16]",
    "bench_pool.py::bench_forward[*bfloat16-384-*-avg]",
    "bench_pos_embed.py::bench_pos_embed[forward-14-torch.bfloat16]",
    "bench_training.py::bench_recipe[64-torch.bfloat16]",
)
NAMES = {  # of columns of a row: benchmark, parameters, rival, milliseconds, ratio and share
    "vit": "whole ViT, mixed",
    "vit_one_length": "whole ViT, one length",
    "one_image": "one image",
    "int8": "whole ViT, int8",
    "int8_shipped": "shipped ReViT, int8",
    "block": "four blocks",
    "recipe": "training step",
}

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def is_default(nodeid: str) -> bool:
    """Whether this benchmark is measured without --all."""
    name = nodeid.rpartition("/")[2]
    # A [ in a pattern would begin a set of characters.
    return any(fnmatchcase(name.replace("[", "<"), pattern.replace("[", "<")) for pattern in DEFAULT)


def called(nodeid: str) -> str:
    """What is measured, in words: the name of the benchmark, or its file's where many files have that name."""
    file, _, function = nodeid.rpartition("/")[2].partition("[")[0].partition(".py::bench_")
    if function.startswith(("forward", "residual", "backward", "triton")):
        function = function.removesuffix("_forward").removeprefix("forward")
        return f"{file.removeprefix('bench_')}{', ' if function else ''}{function}".replace("_", " ")
    return NAMES.get(function, function.replace("_", " "))


def table(rows: list[tuple[str, dict]], case, rivals: dict[str, str], width: int) -> list[str]:
    """Lines for the terminal, one for each duel: (nodeid, extra_info) in `rows`, in the order measured.

    case:   of report.py: the parameters less what has a column of its own
    rivals: how they are called
    """
    lines = []
    for nodeid, info in rows:
        parameters = re.search(r"\[(.*)\]$", nodeid)
        told = case(parameters[1], info) if parameters else ""
        share = info.get("percent_of_matmul", info.get("percent_of_copy"))
        lines.append(
            (
                f"{called(nodeid)}: {told}" if told else called(nodeid),
                DTYPES.get(info["dtype"], info["dtype"]),
                rivals.get(info["rival"], info["rival"]),
                *(f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}" for ms in (info["ours_ms"], info["rival_ms"])),
                f"{info['speedup']:.2f}x",
                f"{share:.0f} %" if share else "",
            )
        )
    head = ("what", "dtype", "against", "ours, ms", "theirs, ms", "as fast", "of the peak")
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    spare = sum(widths) + 2 * (len(widths) - 1) - width
    widths[0] = max(24, widths[0] - max(0, spare))
    found = []
    for line in (head, *lines):
        first = line[0] if len(line[0]) <= widths[0] else f"{line[0][: widths[0] - 1]}…"
        names = [first.ljust(widths[0]), line[1].ljust(widths[1]), line[2].ljust(widths[2])]
        found.append("  ".join(names + [cell.rjust(size) for cell, size in zip(line[3:], widths[3:])]).rstrip())
    faster = sum(info["speedup"] >= 1 for _, info in rows)
    return [*found, "", f"{faster} of {len(rows)} duels are won; the peak is this machine's own, measured in this run."]
