"""Writes the tables of docs/models.md: `python tools/make_models_page.py`.

From revit_kernels/models/registry.json, and from benchmarks/parity.json, which tools/measure_parity.py writes.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch

from revit_kernels.models.registry import class_of, constructor_kwargs, registry
from revit_kernels.modules import whole_block

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
PARITY = ROOT / "benchmarks" / "parity.json"
MARKS = "<!-- models:start -->", "<!-- models:end -->"
FAMILIES = {  # by class, and by the module of timm's where it is none of its three of plain models
    ("VarLenViT", None): "timm's VisionTransformer",
    ("VarLenViTDistilled", None): "timm's VisionTransformerDistilled",
    ("VarLenEva", None): "timm's Eva",
    ("VarLenViT", "naflexvit"): "timm's NaFlexVit",
    ("VarLenTower", "qwen3_vit"): "timm's Qwen3VitClassifier",
    ("VarLenTower", "deepseek_vit"): "timm's DeepseekVitClassifier",
    ("VarLenGemma4", "gemma4_vit"): "timm's Gemma4VitClassifier",
    ("VarLenLVViT", "lvvit"): "LV-ViT",
}


def positions(name: str, entry: dict) -> str:
    """What says where a patch is: a table, rows and columns, rotation, or several."""
    kwargs = entry["kwargs"]
    rotary = kwargs.get("use_rot_pos_emb") or entry.get("class") in ("VarLenTower", "VarLenGemma4")
    has_table = kwargs.get("pos_embed") not in ("", "none", "factorized") and kwargs.get("use_abs_pos_emb", True)
    axes = kwargs.get("pos_embed") == "factorized" or entry.get("class") == "VarLenGemma4"
    table = ["rows and columns"] if axes else ["table"] if has_table else []
    return " and ".join(table + ([f"rotary, {kwargs.get('rope_type', 'cat')}"] if rotary else [])) or "none"


def fused(name: str) -> str:
    """Whether a block is one call on a CPU at inference, or a call for each op."""
    kwargs = constructor_kwargs(name)
    few = {"num_kv_heads": kwargs["num_kv_heads"][:1]} if isinstance(kwargs.get("num_kv_heads"), list) else {}
    with torch.device("meta"):
        block = class_of(name)(**kwargs | {"depth": 1, "weight_init": "skip"} | few).blocks[0]
    plain = type(block).__name__ in ("Block", "EvaBlock") and whole_block.structure(block.eval()) is None
    return "one call" if plain else "op by op"


def table() -> str:
    """A table for each family, a line for each name."""
    families, parity = defaultdict(list), json.loads(PARITY.read_text())
    for name, entry in registry()["models"].items():
        if entry.get("module") == "clips":  # docs/video.md lists them
            continue
        kwargs = entry["kwargs"]
        head_dim = kwargs.get("embed_dim", 768) // kwargs.get("num_heads", 12)
        size = kwargs.get("img_size", 224)
        size = "x".join(map(str, size)) if isinstance(size, list) else size
        millions = f"{entry['parameters'] / 1e6:.1f}"
        near = f"{parity[name]:.0e}".replace("e-0", "e-") if name in parity else ""
        row = name, millions, size, kwargs.get("patch_size", 16), head_dim, positions(name, entry), fused(name), near
        families[entry.get("class", "VarLenViT"), entry.get("module")].append(f"| {' | '.join(map(str, row))} |")
    lines = []
    for family, rows in sorted(families.items(), key=lambda item: list(FAMILIES).index(item[0])):
        lines += [f"### {family[0]}: {FAMILIES[family]}", ""]
        lines += ["| name | parameters, M | image | patch | head_dim | positions | block | parity |"]
        lines += ["|---|---|---|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines).strip()


def page(text: str) -> str:
    """The page with its tables made anew."""
    first, last = MARKS
    return re.sub(f"{first}.*{last}", lambda _: f"{first}\n{table()}\n{last}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
