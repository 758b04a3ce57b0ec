"""What a file or a command may say of a model: the constructor's arguments, their types and ranges."""

from __future__ import annotations

import difflib
import inspect
import math

from torch import nn

LARGEST = 1 << 24  # of any number of pixels, features, tokens or classes
DEEPEST = 1024  # blocks: each takes time to make, whatever its size
LENGTHS = 256  # grids of a menu
DTYPES = ("float64", "float32", "bfloat16", "float16")
PLACES = ("device", "dtype")  # arguments that say where a model is, not what it is


def _whole(value) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _pair(value) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_whole(n) and n for n in value)


def _several(value) -> bool:
    return isinstance(value, list | tuple) and all(map(_whole, value))


def _number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST


def _scalar(value) -> bool:
    return value is None or isinstance(value, str | bool) or _number(value)


def _layer(value) -> bool:
    """A layer by name, or {"name": ..., option: ...}."""
    if isinstance(value, dict):
        return isinstance(value.get("name"), str) and all(map(_scalar, value.values()))
    return isinstance(value, str)


KINDS = {  # by the annotation in the constructor
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("a word", lambda value: isinstance(value, str)),
    "int | tuple[int, int]": ("a whole number or two", lambda value: (_whole(value) and value > 0) or _pair(value)),
    "int | tuple[int, ...]": ("whole numbers", lambda value: _whole(value) or _several(value)),
    "tuple[int, int, int]": ("three whole numbers", lambda value: _several(value) and len(value) == 3),
    "layer": ("the name of a layer", _layer),
}


def constructor_arguments(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The arguments of the constructors of a class and of those that it passes its own on to."""
    found = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and base not in (object, nn.Module):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            found = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} | found
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return {name: parameter for name, parameter in found.items() if name not in PLACES}


def check_arguments(cls: type[nn.Module], kwargs: dict) -> None:
    """Raise ValueError for an argument that the model's constructor does not have, or of another type or range.

    Only names, numbers and truth values pass: none of them can open a file or download weights.
    """
    known = constructor_arguments(cls)
    for name, value in kwargs.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            others = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no argument {name!r}: {others}")
        if name == "depth" and _whole(value) and value > DEEPEST:
            raise ValueError(f"depth must be at most {DEEPEST}, got {value}")
        annotation = known[name].annotation  # a text where a module postpones them
        optional = known[name].default is None
        kind = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        words, fits = KINDS.get(kind.removesuffix(" | None"), KINDS["layer"])
        if not (fits(value) or (optional and value is None)):
            raise ValueError(f"{name} must be {words}, got {str(value)[:60]!r}")


def check_description(found) -> dict:
    """What `description` read of a file, its types checked; the constructor's arguments are left to check_arguments.

    Raises ValueError, which names the entry.
    """

    def require(name: str, value, fits: bool, words: str) -> None:
        if not fits:
            raise ValueError(f"{name} must be {words}, got {str(value)[:60]!r}")

    def words(value) -> bool:
        return isinstance(value, list) and all(isinstance(word, str) for word in value)

    def colours(value) -> bool:
        return isinstance(value, list) and all(map(_number, value))

    require("the description", found, isinstance(found, dict), "a dictionary")
    require("name", found.get("name"), isinstance(found.get("name"), str), "the name of a model")
    require("kwargs", found.get("kwargs"), isinstance(found.get("kwargs"), dict), "a dictionary")
    require("grid", found.get("grid"), _pair(found.get("grid")), "rows and columns")
    require("dtype", found.get("dtype"), found.get("dtype") in DTYPES, f"one of {', '.join(DTYPES)}")
    cfg = found.get("cfg", {})
    require("cfg", cfg, isinstance(cfg, dict), "a dictionary")
    for name, value in cfg.items():
        fits = {"mean": colours, "std": colours, "label_names": words}.get(name, lambda value: isinstance(value, str))
        require(f"cfg.{name}", value, fits(value), {"label_names": "a list of names"}.get(name, "numbers or a word"))
    require("cfg.std", cfg.get("std"), all(cfg.get("std", ())), "numbers other than 0")
    if "resizable" in found:
        resizable = found["resizable"]
        require("resizable", resizable, isinstance(resizable, dict), "a dictionary")
        menu, options = resizable.get("menu"), {k: v for k, v in resizable.items() if k != "menu"}
        fits = isinstance(menu, list) and 0 < len(menu) <= LENGTHS
        fits = fits and (all(map(_pair, menu)) or all(_several(grid) and len(grid) == 3 and all(grid) for grid in menu))
        require("resizable.menu", menu, fits, "a list of grids")
        fits = set(options) <= {"embedding", "positions", "norms"} and words(list(options.values()))
        require("resizable", options, fits, "options of make_resizable")
    return found
