"""An extension of griffe: arguments in a docstring, a line "name: text" each, become a list on the page."""

from __future__ import annotations

import re

import griffe

ARGUMENT = re.compile(r"^(?P<names>\*{0,2}[A-Za-z_]\w*(?:, \w+)*):\s+(?P<text>\S.*)$")


def listed(text: str) -> str:
    """The docstring as Markdown. Lines that go on with an argument are indented."""
    lines, found = [], False
    for line in text.splitlines():
        argument = ARGUMENT.match(line)
        if argument:
            lines += ([] if found else [""]) + [f"- `{argument['names']}`: {argument['text']}"]
        elif found and line.startswith("  "):
            lines.append(f"  {line.strip()}")
            continue
        else:
            lines += [""] * found + [line]
        found = bool(argument)
    return "\n".join(lines)


class Arguments(griffe.Extension):
    """Applies `listed` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
