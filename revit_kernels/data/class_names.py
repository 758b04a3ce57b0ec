"""Names of classes: matched exactly, or by what they have in common where that is unique; and read from label files."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

LISTS = ("id2label", "label_names", "labels", "names", "classes", "categories")  # where a JSON file keeps the names
NAMES = ("name", "label", "class_name", "label_name", "class")  # columns or entries of a name
NUMBERS = ("id", "index", "idx", "number", "class_id", "label_id", "class_index", "target")
NUMBERED = re.compile(r"(\d+)(?:\s*[:,\t]\s*| +)(.*\S)")  # a line of text: 0: tench
QUOTED = re.compile(r"([\"'])(.*)\1,?")
NO_NAME = re.compile(r"n\d{8}|\d+")  # WordNet's numbers, and others
LETTER = re.compile(r"[^\W\d_]")
OTHERS = (".yaml", ".yml", ".jsonl", ".pbtxt", ".xml", ".toml")  # which are no names a line, and not read


def class_folder(name: str) -> str:
    """A class's name as that of a folder: "T-shirt/top" is t-shirt-top."""
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", name).casefold()).strip("-") or name


def match_classes(names: Sequence[str], classes: Sequence[str], wanted: Sequence[int]) -> list[int | None]:
    """The number in `classes` of each of the `wanted` names, by their places; None for one that is none of them.

    A name that is there exactly is that one. Any other with a letter may differ in case and in what is neither letter
    nor digit, as names of folders do, from one class that no name is exactly, and from no other. Raises ValueError
    where a name could be several classes, or several names the same one.
    """
    exact, alike = {}, {}
    for i, name in enumerate(classes):
        exact.setdefault(name, []).append(i)
    for name in exact.keys() - set(names):
        alike.setdefault(class_folder(name), []).extend(exact[name])
    found, owners = [], {}
    for name in [names[i] for i in wanted]:
        places = exact.get(name) or (alike.get(class_folder(name), []) if LETTER.search(name) else [])
        if len(places) > 1:
            these = " and ".join(f"{i} ({classes[i]!r})" for i in sorted(places)[:3])
            raise ValueError(f"the class {name!r} could be any of the model's {these}")
        place = places[0] if places else None
        other = owners.setdefault(place, name)
        if place is not None and other != name:
            raise ValueError(f"the classes {other!r} and {name!r} would both be the model's {classes[place]!r}")
        found.append(place)
    return found


def read_class_names(path: str, count: int) -> list[str]:
    """The names of `count` classes, in order, out of a file.

    path: text, a name a line, which may begin with its number, from 0 on; JSON, or the same as Python writes it: a
          list, or a dictionary of names by number or of numbers by name, also under "id2label", "names", "classes" or
          the like; .csv: a column of names and perhaps one of numbers, between commas, semicolons or tabs. Of an entry
          that is a list, such as ["n01440764", "tench"], the first that is no number is the name

    Empty lines are passed over. Raises ValueError, without the file's name, where it cannot be read, the numbers are
    not 0, 1, ..., or there are more or fewer names than classes.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        kind = Path(path).suffix.lower()
        lines = [line.strip() for line in re.split(r"\r\n?|\n", text) if line.strip()]
        if kind in OTHERS:
            raise ValueError(f"{kind} is none of .txt, .json, .csv and .tsv")
        table = kind in (".csv", ".tsv")
        if kind == ".json" or (not table and lines and lines[0][0] in "[{" and lines[-1][-1] in "]}"):
            names = _from_json(_literal(text))
        elif table:
            between = next((mark for mark in ",;\t" if lines and mark in lines[0]), ",") if kind == ".csv" else "\t"
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=between)
            names = _from_rows([[cell.strip() for cell in row] for row in rows if any(map(str.strip, row))], count)
        else:
            names = _from_lines(lines)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    if len(names) != count:
        raise ValueError(f"has {len(names)} names, the model {count} classes")
    return names


def _literal(text: str):
    """What JSON says; or Python's text of a list or dictionary, as the names of ImageNet's classes lie about."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("it has a key twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        try:
            found = ast.literal_eval(text.strip())
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise error from None
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else found


def _from_lines(lines: list[str]) -> list[str]:
    if all(quoted := [QUOTED.fullmatch(line) for line in lines]):
        return [found[2] for found in quoted]
    pairs = [NUMBERED.fullmatch(line) for line in lines]
    if len(lines) < 2 or not all(pairs) or sorted(int(pair[1]) for pair in pairs) != list(range(len(lines))):
        return lines
    return _in_order([int(pair[1]) for pair in pairs], [pair[2] for pair in pairs])


def _from_json(found) -> list[str]:
    if isinstance(found, dict):
        inner = next((found[key] for key in LISTS if isinstance(found.get(key), list | dict)), None)
        if inner is not None:
            return _from_json(inner)
        keys, values = list(found), list(found.values())
        if all(re.fullmatch(r"\d+", key) for key in keys):
            return _in_order([int(key) for key in keys], map(_name, values))
        if all(type(value) in (int, str) and re.fullmatch(r"\d+", str(value)) for value in values):
            return _in_order([int(value) for value in values], keys)
        raise ValueError("it is neither names by number nor numbers by name")
    if not isinstance(found, list):
        raise ValueError("it must hold a list of names")
    if found and all(isinstance(entry, dict) for entry in found):
        number = next((key for key in NUMBERS if all(type(entry.get(key)) is int for entry in found)), None)
        names = [_name(entry) for entry in found]
        return names if number is None else _in_order([entry[number] for entry in found], names)
    return [_name(entry) for entry in found]


def _name(entry) -> str:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in NAMES if isinstance(entry.get(key), str)), entry)
    if isinstance(entry, list) and entry and all(isinstance(word, str) for word in entry):
        entry = next((word for word in entry if not NO_NAME.fullmatch(word)), entry[0])
    if not isinstance(entry, str | int) or isinstance(entry, bool) or not str(entry).strip():
        raise ValueError(f"{str(entry)[:60]!r} is not a name")
    return str(entry).strip()


def _in_order(numbers: Sequence[int], names) -> list[str]:
    by_number = dict(zip(numbers, names))
    if sorted(numbers) != list(range(len(numbers))):
        missing = next((i for i in range(len(numbers)) if i not in by_number), None)
        raise ValueError(f"it names no class {missing}" if missing is not None else "it names a class twice")
    return [by_number[i] for i in range(len(numbers))]


def _from_rows(rows: list[list[str]], count: int) -> list[str]:
    """Names of a table's rows, which may have a header."""
    if not rows:
        return []
    width = len(rows[0])
    if any(len(row) != width for row in rows):
        raise ValueError("its rows have different numbers of columns")
    header = [cell.lower() for cell in rows[0]]
    has_header = any(cell in NAMES + NUMBERS for cell in header) and len(rows) != count
    body = rows[1:] if has_header else rows
    whole = [i for i in range(width) if all(row[i].isdecimal() for row in body)]
    words = [i for i in range(width) if i not in whole]
    if has_header:
        words = [header.index(name) for name in NAMES if name in header and header.index(name) in words] or words
        whole = [header.index(name) for name in NUMBERS if name in header and header.index(name) in whole] or whole
    elif len(words) > 1:
        raise ValueError("it has several columns of words and no header that says which has the names")
    if not words:
        words, whole = whole[-1:], whole[:-1]
    names = [row[words[0]] for row in body]
    return _in_order([int(row[whole[0]]) for row in body], names) if whole else names
