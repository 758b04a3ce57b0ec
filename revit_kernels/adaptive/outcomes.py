"""What a ReViT said of images at every length: the input of labels, calibration, budgets and reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from revit_kernels.grids import Grid
from revit_kernels.models.checkpoints import fingerprint, write_whole

METADATA = b"revit_kernels"
UNSOLVED = ("smallest", "largest", "drop")
RULES = ("first_correct", "stable")


def label_of(correct: np.ndarray, unsolved: str = "smallest", rule: str = "first_correct") -> np.ndarray:
    """The token-length label of each image: the menu row of the shortest length that answers right.

    correct:  (images, lengths) bool, longest length first
    unsolved: for an image that no length answers right: the "smallest" length (it costs least), the "largest", or
              "drop" (label -1: no image to learn from)
    rule:     "first_correct": the shortest that is right; "stable": the shortest from which on every longer one is too

    Returns (images,) int64. Raises ValueError for an option that is none.
    """
    if unsolved not in UNSOLVED or rule not in RULES:
        raise ValueError(f"unsolved must be one of {UNSOLVED} and rule of {RULES}, got {unsolved!r} and {rule!r}")
    correct = np.asarray(correct, bool)
    if rule == "first_correct":
        label = correct.shape[1] - 1 - correct[:, ::-1].argmax(1)
        solved = correct.any(1)
    else:
        run = np.logical_and.accumulate(correct, axis=1).sum(1)  # how many are right in a row, from the longest on
        label, solved = run - 1, run > 0
    other = {"smallest": correct.shape[1] - 1, "largest": 0, "drop": -1}[unsolved]
    return np.where(solved, label, other).astype(np.int64)


@dataclass(frozen=True)
class Outcomes:
    """What a model said of each image at each length of its menu.

    menu:       grids, longest first
    keys:       the images' names
    targets:    (images,) classes
    correct:    (images, lengths) bool: the answer is the truth, or with against="full" that of the longest length
    predicted:  (images, lengths) int32
    confidence: (images, lengths) float32, the softmax's largest value; margin: it less the second; entropy in nats
    label:      (images,) int64, row of the menu, -1 where dropped
    probabilities: (images, lengths, classes) float16, or None
    assigner:   (images, lengths) float32 logits of an assigner that has not learnt from these images, or None
    fingerprint: of the model
    about:      data set, split and options, for a person to read
    """

    menu: tuple[Grid, ...]
    keys: tuple[str, ...]
    targets: np.ndarray
    correct: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    label: np.ndarray
    fingerprint: str
    probabilities: np.ndarray | None = None
    assigner: np.ndarray | None = None
    about: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def require(self, model) -> Outcomes:
        """Raise ValueError unless they are of this model: of its menu and weights."""
        if tuple(self.menu) != model.menu:
            raise ValueError(f"the labels are of the menu {self.menu}, the model's is {model.menu}")
        if self.fingerprint and self.fingerprint != fingerprint(model):
            raise ValueError("the labels were taken from another model, or from this one before it changed")
        return self

    def take(self, indices) -> Outcomes:
        """The outcomes of some images."""
        indices = np.asarray(indices)
        arrays = {
            name: value[indices] for name, value in vars(self).items() if isinstance(value, np.ndarray) and len(value)
        }
        return replace(self, keys=tuple(self.keys[i] for i in indices), **arrays)

    def relabel(self, unsolved: str = "smallest", rule: str = "first_correct", against: str | None = None) -> Outcomes:
        """The same with other labels. against: "full" or "truth" also decides anew what counts as right."""
        correct = self.correct
        if against is not None:
            truth = self.predicted[:, :1] if against == "full" else self.targets[:, None]
            correct = self.predicted == truth
        about = self.about | {"unsolved": unsolved, "rule": rule} | ({"against": against} if against else {})
        return replace(self, correct=correct, label=label_of(correct, unsolved, rule), about=about)

    # ------------------------------------------------------------------ files

    def save(self, path) -> None:
        """Write a .parquet table, a row an image. The file appears whole or not at all."""
        pyarrow = _pyarrow()
        path = Path(path)
        if path.suffix != ".parquet":
            raise ValueError(f"labels are written to a .parquet file, got {path}")
        lengths = np.array([h * w for h, w in self.menu])
        columns = {
            "key": list(self.keys),
            "target": self.targets.astype(np.int32),
            "label": self.label.astype(np.int16),
            "label_tokens": np.where(self.label >= 0, lengths[self.label], 0).astype(np.int32),
        }
        for name in ("correct", "predicted", "confidence", "margin", "entropy"):
            columns[name] = list(getattr(self, name))
        if self.probabilities is not None:
            columns["probabilities"] = [list(row) for row in self.probabilities.astype(np.float32)]
        if self.assigner is not None:
            columns["assigner"] = list(self.assigner)
        table = pyarrow.table(columns)
        head = {"menu": self.menu, "fingerprint": self.fingerprint, "about": self.about}
        table = table.replace_schema_metadata({METADATA: json.dumps(head).encode()})
        write_whole(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))

    @classmethod
    def load(cls, path) -> Outcomes:
        """What `save` wrote. Raises ValueError for a file that is missing, broken, or no labels."""
        pyarrow = _pyarrow()
        if not Path(path).is_file():
            raise ValueError(f"there are no labels at {path}")
        try:
            table = pyarrow.parquet.read_table(path)
        except Exception as error:  # pyarrow has many, and none names the file
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        head = (table.schema.metadata or {}).get(METADATA)
        if head is None:
            raise ValueError(f"{path} holds no labels that `revit label` wrote")
        head = json.loads(head)

        def array(name, dtype):
            return np.array(table[name].to_pylist(), dtype) if name in table.column_names else None

        return cls(
            menu=tuple(tuple(grid) for grid in head["menu"]),
            keys=tuple(table["key"].to_pylist()),
            targets=array("target", np.int64),
            correct=array("correct", bool),
            predicted=array("predicted", np.int32),
            confidence=array("confidence", np.float32),
            margin=array("margin", np.float32),
            entropy=array("entropy", np.float32),
            label=array("label", np.int64),
            fingerprint=head["fingerprint"],
            probabilities=array("probabilities", np.float16),
            assigner=array("assigner", np.float32),
            about=head["about"],
        )


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("labels are kept as .parquet, which needs pyarrow: pip install pyarrow") from None
    return pyarrow
