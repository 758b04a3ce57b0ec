"""Names of classes: what is the same class, and what a file of labels says."""

import json

import numpy as np
import pytest

from revit_kernels.data.class_names import class_folder, match_classes, read_class_names
from revit_kernels.data.image_set import ArraySet, numbered


def matched(names, classes):
    return match_classes(names, classes, range(len(names)))


def test_class_folders():
    assert class_folder("T-shirt/top") == "t-shirt-top" and class_folder("???") == "???"
    assert class_folder("cafe\u0301") == class_folder("Café") == "café"  # file systems take letters apart


@pytest.mark.parametrize(
    "names, classes, expected",
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["c", "c++", "c#"], ["c#", "c", "c++"], [1, 2, 0]),
        (["+5", "5", "-5"], ["-5", "+5", "5"], [1, 2, 0]),
        (["turkey", "Turkey"], ["Turkey", "turkey"], [1, 0]),
        (["t-shirt-top", "ankle-boot"], ["Ankle boot", "T-shirt/top"], [1, 0]),
        (["March", "march"], ["March", "walk"], [0, None]),  # "march" is not what another name is exactly
        (["mole"], ["mole", "Mole"], [0]),
        (["cat"], ["dog"], [None]),
        (["-1", "1.5"], ["1", "1-5"], [None, None]),  # numbers are no spelling of one another
    ],
)
def test_exact_names_come_first(names, classes, expected):
    assert matched(names, classes) == expected


@pytest.mark.parametrize(
    "names, classes, message",
    [
        (["heron", "cat"], ["heron", "cat", "heron"], r"'heron' could be any of the model's 0 .'heron'. and 2"),
        (["c"], ["C", "C++"], r"'c' could be any of the model's 0 .'C'. and 1 .'C\+\+'."),
        (
            ["t shirt", "t-shirt"],
            ["T-Shirt"],
            "the classes 't shirt' and 't-shirt' would both be the model's 'T-Shirt'",
        ),
    ],
)
def test_names_that_could_be_several_are_refused(names, classes, message):
    with pytest.raises(ValueError, match=message):
        matched(names, classes)


def test_a_repeated_name_that_no_image_has_is_no_matter():
    images = ArraySet("set", ["cat", "dog", "heron"], [1, 0], np.zeros((2, 4, 4), np.uint8))
    assert images.with_classes(["heron", "dog", "heron", "cat"]).targets.tolist() == [1, 3]
    some = ArraySet("set", ["polish", "Polish"], [0], np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="set has the class 'polish', which is none of Polish"):
        some.with_classes(["Polish"])


def test_numbers_written_in_two_ways_are_two_classes():
    for _ in range(3):
        assert numbered(["1", "01", "2", "1"])[0] == ["01", "1", "2"]


THREE = ["red", "dark green", "blue"]
TABLE = {"id": 1, "name": "dark green"}, {"id": 0, "name": "red"}, {"id": 2, "name": "blue"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.txt", "red\ndark green\nblue\n"),
        ("x.txt", "\r\n red \r\n\r\ndark green\r\nblue\r\n\r\n"),
        ("x.txt", "0\tred\n1\tdark green\n2\tblue\n"),
        ("x.txt", "2: blue\n0: red\n1: dark green\n"),
        ("x.txt", "0 red\r1 dark green\r2 blue\r"),
        ("x.txt", "{0: 'red',\n 1: 'dark green',\n 2: 'blue'}"),
        ("x.txt", '"red",\n"dark green",\n"blue"\n'),
        ("x.txt", "['red', 'dark green', 'blue']"),
        ("x.json", {"red": "0", "blue": "2", "dark green": "1"}),
        ("x.json", [["0", "red"], ["1", "dark green"], ["2", "blue"]]),
        ("x.csv", "id;name\n1;dark green\n0;red\n2;blue\n"),
        ("x.names", "\ufeffred\ndark green\nblue"),
        ("x.JSON", THREE),
        ("x.json", {"0": "red", "2": "blue", "1": "dark green"}),
        ("x.json", {"dark green": 1, "blue": 2, "red": 0}),
        ("x.json", {"0": ["n00000001", "red"], "1": ["n00000002", "dark green"], "2": ["blue", "azure"]}),
        ("x.json", [["red"], ["dark green", "forest"], ["n00000003", "blue"]]),
        ("x.json", {"model_type": "vit", "id2label": {"0": "red", "1": "dark green", "2": "blue"}, "label2id": {}}),
        ("x.json", {"names": THREE}),
        ("x.json", list(TABLE)),
        ("x.json", [{"label": name} for name in THREE]),
        ("x.csv", "red\ndark green\nblue\n"),
        ("x.csv", "name\nred\ndark green\nblue\n"),
        ("x.csv", "2,blue\n0,red\n1,dark green\n"),
        ("x.csv", "\ufeffid,wordnet,name\n0,n1,red\n1,n2,dark green\n2,n3,blue\n\n"),
        ("x.tsv", "label\tindex\nblue\t2\nred\t0\ndark green\t1\n"),
    ],
    ids=str,
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_files_of_names(tmp_path, name, content, encoding):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text.removeprefix("\ufeff") if encoding == "utf-16" else text, encoding, newline="")
    assert read_class_names(str(tmp_path / name), 3) == THREE


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.txt", None, "cannot be read: No such file"),
        ("x.txt", "red\nblue\n", "has 2 names, the model 3 classes"),
        ("x.txt", b"\xe9\n\xe8", "cannot be read: 'utf-8' codec"),
        ("x.json", "{", "cannot be read: Expecting"),
        ("x.json", "7", "must hold a list of names"),
        ("x.json", {"0": "red", "1": "blue", "3": "green"}, "it names no class 2"),
        ("x.json", {"red": 0, "blue": 1, "green": 1}, "it names no class 2"),
        ("x.json", {"a": 0.5}, "neither names by number nor numbers by name"),
        ("x.json", ["red", None, "blue"], "'None' is not a name"),
        ("x.json", ["red", {"colour": 1}, "blue"], "is not a name"),
        ("x.json", '{"0": "red", "0": "blue", "1": "green"}', "it has a key twice"),
        ("x.yaml", "- red\n- blue\n- green\n", ".yaml is none of .txt, .json"),
        ("x.csv", "red,rot\ngreen,grün\nblue,blau\n", "several columns of words and no header"),
        ("x.csv", "0,red\n1\n2,blue\n", "different numbers of columns"),
        ("x.csv", "0,red\n1,green\n1,blue\n", "it names no class 2"),
    ],
    ids=str,
)
def test_files_that_name_no_classes(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_class_names(str(tmp_path / name), 3)
