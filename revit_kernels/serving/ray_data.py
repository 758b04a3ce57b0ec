"""Ray Data: a callable class that answers rows of images, and `revit infer --ray`: a command's images on a cluster."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from ray.data import ActorPoolStrategy, DataContext

from revit_kernels import dispatch
from revit_kernels.data.archives import IMAGE_COLUMNS, Archive, Member, encoded
from revit_kernels.data.images import find_images
from revit_kernels.serving.infer import GridRule, Totals, infer
from revit_kernels.serving.journal import finish_settings, open_settings
from revit_kernels.serving.prepare import Settings, prepare
from revit_kernels.serving.ray_start import connect
from revit_kernels.serving.records import Answer, Columns, open_records

COLUMNS = ("bytes", *IMAGE_COLUMNS, "jpeg", "webp", "path")  # the first that a batch has
UNIT = 1000  # paths that are one piece of work; an archive is one
RETRIES = 3  # of a piece of work whose actor died


class Predictor:
    """Answers rows of images: for `Dataset.map_batches(Predictor, ...)`, as a class.

    column:       of the images: encoded bytes, paths, data URLs, Hugging Face's structs, or arrays (height, width, 3)
                  of uint8; by default the first of COLUMNS that a batch has
    batch_tokens: tokens of one packed batch, prefix tokens counted
    workers:      threads that decode; by default one per core that the actor has
    prefix:       put before the names of the answer's columns
    settings:     those of serving.prepare.Settings; without a model, the ReViT that comes with the package

    A batch is a dictionary of arrays, a column each. All columns but the encoded images pass through; paths do too.
    The answer has for each row: height, width, rows, columns (the grid), tokens, cost (if a policy chose the length),
    error (None for none), and features (rows, features), or classes, probabilities and labels (rows, top), best first.
    A row with an error has zeros, -1, "" and NaN there.

    An actor with a GPU computes on it. Give `map_batches` a `batch_size` of some hundreds: rows are packed within it.
    Raises ValueError for a column that does not exist, or an answer whose name is taken already.
    """

    def __init__(
        self,
        column: str | None = None,
        *,
        batch_tokens: int = 8192,
        workers: int | None = None,
        prefix: str = "",
        **settings,
    ):
        self.prepared = prepare(Settings(**settings))
        if not isinstance(self.prepared.rule, GridRule):
            raise NotImplementedError("Predictor answers images, and this is a model of clips: use `revit infer`")
        self.column, self.batch_tokens, self.prefix = column, batch_tokens, prefix
        self.workers = workers or _cores()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        column = self._column(batch)
        found = Collected()
        images = [_image(value, i) for i, value in enumerate(batch[column])]
        _run(self.prepared, images, found, self.batch_tokens, self.workers)
        answers = {f"{self.prefix}{name}": a for name, a in arrays(found.answers, self.prepared.columns).items()}
        passing = {name: values for name, values in batch.items() if name != column or name == "path"}
        if taken := sorted(passing.keys() & answers.keys()):
            raise ValueError(f"the batch has a column {taken[0]} already: give a prefix, such as prefix='revit_'")
        return passing | answers

    def _column(self, batch) -> str:
        for name in (self.column,) if self.column else COLUMNS:
            if name in batch:
                return name
        wanted = f"named {self.column}" if self.column else f"of images ({', '.join(COLUMNS)})"
        raise ValueError(f"the batch has no column {wanted}: its columns are {', '.join(batch)}")


class Collected:
    """A writer that keeps the answers."""

    def __init__(self):
        self.answers: list[Answer] = []

    def write(self, answer: Answer) -> None:
        self.answers.append(answer)


def _run(prepared, images: Sequence[str], writer, batch_tokens: int, workers: int) -> Totals:
    return infer(
        prepared.answerer,
        images,
        prepared.rule,
        writer,
        features=prepared.features,
        batch_tokens=batch_tokens,
        workers=workers,
        measure=False,
    )


def _image(value, row: int) -> str:
    """A value of a column, as `decode` takes it; a fault in it is reported when it is read."""

    def read() -> bytes:
        if isinstance(value, np.ndarray):
            return _uncompressed(value)
        found = encoded(value, Path())
        return Path(found).read_bytes() if isinstance(found, str) else found

    if isinstance(value, str) and value[:5].lower() != "data:" and len(value) < 4096:
        return value
    return Member(f"row {row}", read)


def _uncompressed(pixels: np.ndarray) -> bytes:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        raise ValueError(f"it must be (height, width, 3) of uint8, but is {pixels.shape} of {pixels.dtype}")
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(file, "TIFF")
    return file.getvalue()


def arrays(answers: Sequence[Answer], columns: Columns) -> dict[str, np.ndarray]:
    """The answers as columns, in the order of the rows; see Predictor."""
    sizes = [answer.size or (0, 0) for answer in answers]
    grids = [answer.grid or (0, 0) for answer in answers]
    found = {
        "height": np.array([height for height, _ in sizes], np.int32),
        "width": np.array([width for _, width in sizes], np.int32),
        "rows": np.array([rows for rows, _ in grids], np.int32),
        "columns": np.array([columns for _, columns in grids], np.int32),
        "tokens": np.array([answer.tokens for answer in answers], np.int32),
        "error": np.array([answer.error for answer in answers], object),
    }
    if columns.adaptive:
        found["cost"] = np.array([np.nan if a.cost is None else a.cost for a in answers], np.float32)
    if columns.features:
        none = np.full(columns.features, np.nan, np.float32)
        found["features"] = np.array([none if a.error else a.features for a in answers], np.float32)
        found["features"] = found["features"].reshape(len(answers), columns.features)
        return found
    best = [columns.best(a) if a.error is None else [] for a in answers]
    for name, key, none, kind in (("classes", "class", -1, np.int32), ("probabilities", "probability", np.nan, "f4")):
        rows = [[one[key] for one in row] or [none] * columns.top for row in best]
        found[name] = np.array(rows, kind).reshape(len(answers), columns.top)
    if columns.labels:
        rows = [[one["label"] for one in row] or [""] * columns.top for row in best]
        found["labels"] = np.array(rows, object).reshape(len(answers), columns.top)
    return found


def _cores() -> int:
    return max(1, min(16, int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))))


# ---------------------------------------------------------------------- a command's images on a cluster


def units(paths: Sequence[str], size: int = UNIT) -> list[list[str]]:
    """Pieces of work: each archive, and the paths between them, `size` at a time."""
    found: list[list[str]] = []
    for path in paths:
        alone = isinstance(path, Archive)
        if alone or not found or len(found[-1]) == size or isinstance(found[-1][0], Archive):
            found.append([])
        found[-1].append(path)
    return found


class Worker:
    """An actor of `revit infer --ray`, which writes one complete shard for each piece of work.

    Work that is repeated, because an actor died or a run resumes, writes the same shard again: no row is lost or
    duplicated.
    """

    def __init__(self, folder: str, output: str, settings: Settings, backend, batch_tokens: int, workers: int | None):
        if os.path.isdir(folder):  # relative names start from where the command was given
            os.chdir(folder)
        self.output, self.backend, self.batch_tokens = Path(output), backend, batch_tokens
        self.prepared, self.workers = prepare(settings), workers or _cores()

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list]]:
        for number, names, is_archive in zip(batch["unit"], batch["paths"], batch["archive"]):
            found = find_images([*names]) if is_archive else None
            images, problems = (list(names), []) if found is None else (found.paths, found.problems)
            totals, tries = Totals(), self._begun(int(number), names[0])
            if images:
                with dispatch.use_backend(self.backend):
                    with open_records(str(shard(self.output, int(number))), self.prepared.columns) as writer:
                        totals = _run(self.prepared, images, writer, self.batch_tokens, self.workers)
            tries.unlink()
            yield {
                "unit": [number],
                "images": [totals.images],
                "kind": [totals.kind],
                "tokens": [totals.tokens],
                "full": [totals.full],
                "errors": [len(totals.errors)],
                "first": ["\n".join(f"{path}\t{error}" for path, error in totals.errors[:10])],
                "problems": ["\n".join(problems)],
                "left_out": ["\n".join(f"{count}\t{kind}" for kind, count in found.left_out.items()) if found else ""],
            }

    def _begun(self, number: int, name: str) -> Path:
        """A file with a byte for each start of the piece of work. Raises RuntimeError after RETRIES: Ray would start it
        for ever."""
        tries = self.output / f"_part-{number:06d}.tries"
        with open(tries, "ab") as file:
            file.write(b".")
            count = file.tell()
        if count > RETRIES + 1:
            raise RuntimeError(f"the shard that begins with {name} has ended its actor {count - 1} times")
        return tries


def shard(output: Path, number: int) -> Path:
    return output / f"part-{number:06d}.parquet"


class Cluster:
    """A run on Ray: `run` yields the totals of each piece of work when it is done.

    paths:    images and archives, of `find_images` with `inside=False`
    output:   a folder that every node sees
    settings: of the model
    actors:   0: one for each GPU of the cluster, or, where there is none, for each `cpus` CPUs
    cpus:     CPUs of an actor

    done, all: pieces of work that were done before, and all of them
    Raises ValueError if the folder belongs to a run with other settings or other sources.
    """

    def __init__(
        self,
        paths: Sequence[str],
        output: str,
        settings: Settings,
        *,
        address: str | None = None,
        backend: str | None = None,
        batch_tokens: int = 8192,
        workers: int | None = None,
        actors: int = 0,
        cpus: int = 1,
    ):
        if settings.untrained:
            raise ValueError("--untrained gives each actor other weights: with --ray, give it a file")
        self.output, self.settings, self.address, self.backend = Path(output), settings, address, backend
        self.batch_tokens, self.workers, self.actors, self.cpus = batch_tokens, workers, actors, cpus
        self.units = units(paths)
        self.problems: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.output.mkdir(exist_ok=True)
        sources = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
        self.lock = open_settings(self.output, _contents(settings) | {"ray": sources})
        self.left = [i for i in range(len(self.units)) if not shard(self.output, i).exists()]
        for tries in self.output.glob("_part-*.tries"):  # of the run before
            tries.unlink()
        self.all, self.done = len(self.units), len(self.units) - len(self.left)

    def run(self) -> Iterator[Totals]:
        """Totals of each piece of work that was not done before. Raises RuntimeError if an actor fails for good."""
        if self.left:
            yield from self._run()
        for left in self.output.glob(".part-*.tmp"):  # of actors that were killed: nothing writes any more
            left.unlink()
        if not self.problems:
            finish_settings(self.output)
        self.lock.close()

    def _run(self) -> Iterator[Totals]:
        connect(self.address)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        DataContext.get_current().enable_progress_bars = False
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if (self.settings.device or "cuda").startswith("cuda") else 0
        actors = self.actors or gpus or max(1, int(resources.get("CPU", 1)) // self.cpus)
        rows = [
            {"unit": i, "paths": self.units[i], "archive": isinstance(self.units[i][0], Archive)} for i in self.left
        ]
        begun, options = time.perf_counter(), {"num_gpus": 1} if gpus else {}
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=(
                os.getcwd(),
                str(self.output),
                self.settings,
                self.backend,
                self.batch_tokens,
                self.workers,
            ),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(actors, len(rows))),
            num_cpus=self.cpus,
            **options,
        )
        try:
            for row in answered.iter_rows():
                totals = Totals(int(row["images"]), kind=row["kind"])
                totals.tokens, totals.full = int(row["tokens"]), int(row["full"])
                totals.errors = [tuple(line.split("\t", 1)) for line in row["first"].splitlines()]
                totals.errors += [("", "")] * (int(row["errors"]) - len(totals.errors))
                totals.seconds = time.perf_counter() - begun
                self.problems += row["problems"].splitlines()
                for line in row["left_out"].splitlines():
                    count, kind = line.split("\t", 1)
                    self.left_out[kind] += int(count)
                yield totals
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"an actor could not go on: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return " ".join(str(error).split())[:300] or type(error).__name__


def _contents(settings: Settings) -> dict:
    """The settings as JSON, files by what is in them."""
    found = {name: value for name, value in asdict(settings).items() if value not in (None, False)}
    for name in ("model", "checkpoint", "assigner", "outcomes", "labels"):
        if name in found and os.path.isfile(found[name]):
            found[name] = hashlib.sha256(Path(found[name]).read_bytes()).hexdigest()
    found.pop("device", None)
    return found
