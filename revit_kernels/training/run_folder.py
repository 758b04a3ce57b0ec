"""The folder of a training run: its settings, its state to go on from, its logs. Every file is whole or not there."""

from __future__ import annotations

import csv
import json
import os
import warnings
from pathlib import Path

import torch

from revit_kernels.files import is_empty, write_whole

STATE, SETTINGS, LOG = "state.pt", "settings.json", "log.csv"


class RunFolder:
    """A folder with settings.json, state.pt, log.csv, TensorBoard's events and the models.

    path:     made if it is not there
    settings: what decides the result of the run; JSON
    resume:   go on from the state in the folder, if there is one; `epochs` may then be more than before

    Raises ValueError where the folder holds another run, or one that is not to be resumed.
    """

    def __init__(self, path, settings: dict, resume: bool = False):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{path} is not a folder")
        self.settings = json.loads(json.dumps(settings))
        found = self._settings()
        if found is not None and not resume:
            raise ValueError(f"{path} holds a run already: go on with --resume, or give another folder")
        if found is None and resume and not is_empty(self.path):
            raise ValueError(f"{path} holds no run that could be resumed")
        epochs = None if found is None else found.get("epochs")
        longer = isinstance(epochs, int | float) and epochs < self.settings.get("epochs", 0)
        if longer and found | {"epochs": self.settings["epochs"]} == self.settings:
            warnings.warn(
                f"the run goes on to {self.settings['epochs']:g} epochs, begun as one of {found['epochs']:g}: from "
                "here on the learning rate is that of the longer schedule"
            )
            found = None  # written anew
        if found is not None and found != self.settings:
            differ = sorted(k for k in found.keys() | self.settings.keys() if found.get(k) != self.settings.get(k))
            raise ValueError(
                f"{path} holds a run with other settings ({', '.join(differ)}): it can only go on as it was"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if found is None:
            text = json.dumps(self.settings, indent=1)
            write_whole(self.path / SETTINGS, lambda temporary: temporary.write_text(text))
        self._fields: list[str] = []
        self._tensorboard = None

    def _settings(self) -> dict | None:
        path = self.path / SETTINGS
        try:
            found = json.loads(path.read_bytes()) if path.exists() else None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(found, dict | None):
            raise ValueError(f"{path} holds no settings of a run")
        return found

    def state(self) -> dict | None:
        """What `save_state` wrote last, on the CPU; None at the start of a run."""
        path = self.path / STATE
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a zip, a pickle or a tensor may be broken
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read: {why}; without it the run starts anew") from error

    def save_state(self, state: dict) -> None:
        write_whole(self.path / STATE, lambda temporary: torch.save(state, temporary))

    def begin_log(self, step: int, tensorboard: bool, fields: list[str]) -> None:
        """Open the logs, of these fields; rows of steps that will be done again are dropped."""
        self._fields = fields
        path = self.path / LOG
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
            if rows:
                write_whole(path, lambda temporary: _write_rows(temporary, self._fields, rows))
            else:
                path.unlink()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step or None)

    def log(self, row: dict) -> None:
        """Add a row, with "step" in it, to log.csv and TensorBoard."""
        path = self.path / LOG
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, self._fields, lineterminator="\n", restval="")
            if new:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._tensorboard.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def _write_rows(path: Path, fields: list[str], rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
