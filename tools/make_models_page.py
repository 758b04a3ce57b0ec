"""Writes the tables of docs/models.md from revit_kernels/models/registry.json: `python tools/make_models_page.py`."""

import re
from collections import defaultdict
from pathlib import Path

from revit_kernels.models.registry import registry

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARKS = "<!-- models:start -->", "<!-- models:end -->"
FAMILIES = {"VarLenViT": "VisionTransformer", "VarLenViTDistilled": "VisionTransformerDistilled", "VarLenEva": "Eva"}


def positions(entry: dict) -> str:
    """What says where a patch is: a table, rotation, both or nothing."""
    kwargs = entry["kwargs"]
    has_table = kwargs.get("pos_embed") not in ("", "none") and kwargs.get("use_abs_pos_emb", True)
    table = ["table"] if has_table else []
    return " and ".join(
        table + ([f"rotary, {kwargs.get('rope_type', 'cat')}"] if kwargs.get("use_rot_pos_emb") else [])
    )


def table() -> str:
    """A table for each of timm's classes, a line for each name."""
    families = defaultdict(list)
    for name, entry in registry()["models"].items():
        kwargs = entry["kwargs"]
        head_dim = kwargs.get("embed_dim", 768) // kwargs.get("num_heads", 12)
        size = kwargs.get("img_size", 224)
        size = "x".join(map(str, size)) if isinstance(size, list) else size
        millions = f"{entry['parameters'] / 1e6:.1f}"
        row = name, millions, size, kwargs.get("patch_size", 16), head_dim, positions(entry) or "none"
        families[entry.get("class", "VarLenViT")].append(f"| {' | '.join(map(str, row))} |")
    lines = []
    for cls, rows in sorted(families.items()):
        lines += [f"### {cls}: timm's {FAMILIES[cls]}", ""]
        lines += [
            "| name | parameters, M | image | patch | head_dim | positions |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(lines).strip()


def page(text: str) -> str:
    """The page with its tables made anew."""
    first, last = MARKS
    return re.sub(f"{first}.*{last}", lambda _: f"{first}\n{table()}\n{last}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
