"""Ray Serve: a model behind HTTP, its images in packed batches; `app` is for `serve.run` and for YAML."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import Request
from starlette.responses import Response

from revit_kernels.serving.batcher import Batcher, Reply, Stats
from revit_kernels.serving.endpoints import Endpoints, Limits, Listener, Local, Served, Unavailable
from revit_kernels.serving.prepare import Settings, prepare

APPLICATION = "revit"
ATTEMPTS = 3  # of a request whose worker died
ONGOING = 1024  # requests that a replica holds; the batcher has the limits that count


class Model:
    """A replica of the model, with a queue of its own."""

    def __init__(self, settings: Settings, name: str, options: dict, batcher: type = Batcher):
        self.local = Local(batcher(prepare(settings), **options), name, settings.top)
        self.local.batcher.warm_up()

    async def answer(self, images: list[bytes], kind: str) -> list[Reply]:
        return await self.local.answer(images, kind)

    async def stats(self) -> Stats:
        return await self.local.stats()

    async def served(self) -> Served:
        return await self.local.served()

    def check_health(self) -> None:
        if not self.local.batcher.thread.is_alive():
            raise RuntimeError("the thread of batches has ended")

    async def __del__(self):
        await asyncio.to_thread(self.local.batcher.close)


class Remote:
    """A backend in other processes: the deployment of Model."""

    def __init__(self, handle):
        self.handle = handle

    async def _ask(self, method: str, *arguments):
        for attempt in range(ATTEMPTS):
            try:
                return await getattr(self.handle, method).remote(*arguments)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if hasattr(error, "cause") else error
                if isinstance(cause, Unavailable):
                    raise Unavailable(str(cause)) from None
                raise
            except BackPressureError:
                raise Unavailable("too many requests wait already: try again later") from None
            except (RayError, RayServeException):  # its worker died: another one answers
                if attempt == ATTEMPTS - 1:
                    raise Unavailable("the worker that answered died: try again") from None
                await asyncio.sleep(0.2 * (attempt + 1))

    async def answer(self, images: list[bytes], kind: str) -> list[Reply]:
        return await self._ask("answer", images, kind)

    async def stats(self) -> Stats:
        return await self._ask("stats")

    async def served(self) -> Served:
        return await self._ask("served")


class Door:
    """A replica that reads HTTP requests and writes answers."""

    def __init__(self, handle, limits: Limits, key: str | None):
        self.endpoints = Endpoints(Remote(handle), limits, key)

    async def __call__(self, request: Request) -> Response:
        return await self.endpoints.respond(request)


def app(arguments: dict) -> serve.Application:
    """The application, for `serve.run(app({...}))` or `import_path: revit_kernels.serving.ray_serve:app` in YAML.

    arguments: of prepare.Settings and of endpoints.Limits; and
        name:           of the model in answers
        replicas:       processes with the model (default: 1)
        cpus, gpus:     of each (default: 1 and 0)
        batch_tokens, workers, waiting_tokens, waiting_bytes: of batcher.Batcher
        key_file:       the file of a bearer token that requests must have

    Raises ValueError for other arguments.
    """
    model, limits, key = parts(arguments)
    door = serve.deployment(
        Door, name="door", max_ongoing_requests=ONGOING, ray_actor_options={"num_cpus": 0}, health_check_period_s=5
    )
    return door.bind(model, limits, key)


def parts(arguments: dict) -> tuple[serve.Application, Limits, str | None]:
    """(the model's deployment, without HTTP, the limits of requests, the key) for the arguments of `app`."""
    arguments = dict(arguments)

    def taken(names) -> dict:
        return {name: arguments.pop(name) for name in names if name in arguments}

    settings = taken(field.name for field in fields(Settings))
    if settings.get("grids"):
        settings["grids"] = tuple(tuple(grid) for grid in settings["grids"])
    settings = Settings(**settings)
    limits = taken(field.name for field in fields(Limits))
    limits = Limits(**limits | {"fetch": tuple(limits.get("fetch", ()))})
    options = taken(("batch_tokens", "workers", "waiting_tokens", "waiting_bytes"))
    name = arguments.pop("name", None) or settings.model or "revit"
    replicas, cpus, gpus = (arguments.pop(n, d) for n, d in (("replicas", 1), ("cpus", 1), ("gpus", 0)))
    key, batcher = read_key(arguments.pop("key_file", None)), arguments.pop("batcher", Batcher)
    if arguments:
        raise ValueError(f"there is no argument {sorted(arguments)[0]!r} of the application")
    model = serve.deployment(
        Model,
        name="model",
        num_replicas=replicas,
        max_ongoing_requests=ONGOING,
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus)))}},
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=30,
    )
    return model.bind(settings, name, options, batcher), limits, key


@contextmanager
def listening(
    arguments: dict, host: str = "127.0.0.1", port: int = 8000, log: Callable[[dict], None] | None = None
) -> Iterator[Listener]:
    """A context manager that serves HTTP from this process, which calls the model's replicas directly.

    arguments: as of `app`; log: as of Endpoints

    Requests get status 503 until the model is ready, which it is inside the block. Open requests are finished at the
    end. Ray must be connected. Raises ValueError for wrong arguments, and if the address cannot be listened on.
    """
    model, limits, key = parts(arguments)
    listener = Listener(Endpoints(None, limits, key, log), host, port)
    try:
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
        listener.endpoints.backend = Remote(serve.run(model, name=APPLICATION, route_prefix=None))
        yield listener
    finally:
        listener.close()
        serve.delete(APPLICATION)


def read_key(path: str | None) -> str | None:
    """The bearer token in a file; None without a path. Raises ValueError if the file has none."""
    if path is None:
        return None
    try:
        with open(path) as file:
            key = file.read().strip()
    except OSError as error:
        raise ValueError(f"the file of the key, {path}, cannot be read: {error.strerror}") from None
    if not key:
        raise ValueError(f"the file of the key, {path}, is empty")
    return key
