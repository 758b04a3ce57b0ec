"""The HTTP interface of `revit serve`: OpenAI's embeddings, classes, and a page. Errors are one sentence each."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from revit_kernels import __version__
from revit_kernels.data.images import ImageError, upright_size
from revit_kernels.serving.batcher import Reply, Stats
from revit_kernels.serving.records import short

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    body:      bytes
    pixels:    of each image
    images:    how many
    reading:   seconds for it to arrive
    answering: seconds for its answer
    fetch:     hosts that images may be fetched from; if empty, URLs are refused
    """

    body: int = 32 << 20
    pixels: int = 50_000_000
    images: int = 64
    reading: float = 30.0
    answering: float = 60.0
    fetch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """The model as the endpoints describe it.

    full: tokens of an image at full length
    crop: whether an image is cropped to its centre
    top:  classes of an answer
    """

    name: str
    features: int
    classes: int
    labels: list[str] | None
    full: int
    crop: bool
    patch_size: tuple[int, int]
    top: int = 5


class Refused(Exception):
    """A request that is refused, with an HTTP status and one sentence."""

    def __init__(self, status: int, message: str, param: str | None = None, retry: bool = False):
        super().__init__(message)
        self.status, self.param, self.retry = status, param, retry


class Unavailable(RuntimeError):
    """The model cannot answer now; the message says why."""


class Endpoints:
    """An ASGI application that answers requests with a backend.

    backend: `await backend.answer([bytes, ...], kind)` gives a list of batcher.Reply, `await backend.stats()` a
             batcher.Stats, `await backend.served()` a Served; they raise Unavailable. While it is None, requests get
             status 503
    limits:  of each request
    key:     the bearer token that /v1 requires, or None
    log:     called with a dictionary for each request that was answered
    """

    def __init__(
        self, backend, limits: Limits = Limits(), key: str | None = None, log: Callable[[dict], None] | None = None
    ):
        self.backend, self.limits, self.key, self.log = backend, limits, key, log
        self.page = (files("revit_kernels.serving") / "page.html").read_text()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.buckets, self.seconds = Counter(), 0.0
        self.known: Served | None = None
        self.begun = time.monotonic()
        self.routes = {
            ("GET", "/"): self._page,
            ("GET", "/healthz"): self._health,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/embeddings"): self._embeddings,
            ("POST", "/v1/classify"): self._classify,
        }

    async def __call__(self, scope, receive, send) -> None:
        """As an ASGI application."""
        if scope["type"] == "http":
            await (await self.respond(Request(scope, receive)))(scope, receive, send)

    async def respond(self, request: Request) -> Response:
        begun, path = time.perf_counter(), request.url.path.rstrip("/") or "/"
        given = request.headers.get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        known, error = any(path == route for _, route in self.routes), None
        try:
            response = await self._routed(request, path, known)
        except Refused as refused:
            kind, error = "invalid_request_error" if refused.status < 500 else "server_error", str(refused)
            body = {"message": error, "type": kind, "param": refused.param, "code": None}
            headers = {"retry-after": "1"} if refused.retry else {}
            if refused.status == 401:
                headers["www-authenticate"] = "Bearer"
            if refused.status in (408, 413):  # what is left of the body is not read
                headers["connection"] = "close"
            response = JSONResponse({"error": body}, refused.status, headers)
        seconds = time.perf_counter() - begun
        response.headers["x-request-id"] = name
        self.statuses[path if known else "other", response.status_code] += 1
        if path.startswith("/v1/") and request.method == "POST":
            self.seconds += seconds
            self.buckets[next((b for b in BUCKETS if seconds <= b), float("inf"))] += 1
        if self.log is not None:
            line = {"time": round(time.time(), 3), "id": name, "client": request.client and request.client.host}
            line |= {"method": request.method, "path": path, "status": response.status_code}
            line |= {"ms": round(1000 * seconds, 1), "images": getattr(request.state, "images", 0)}
            self.log(line | {"tokens": getattr(request.state, "tokens", 0)} | ({"error": error} if error else {}))
        return response

    async def _routed(self, request: Request, path: str, known: bool) -> Response:
        handler = self.routes.get((request.method, path))
        if handler is None and request.method == "HEAD":
            handler = self.routes.get(("GET", path))
        if handler is None and request.method == "GET" and path.startswith("/v1/models/"):
            handler = self._model
        if handler is None:
            raise Refused(405 if known else 404, f"there is no {request.method} {path[:100]}")
        if path.startswith("/v1/") and self.key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                raise Refused(401, "the bearer token is missing or wrong")
        if self.backend is None and path != "/":
            raise Refused(503, "the model is being made ready: try again later", retry=True)
        try:
            return await asyncio.wait_for(handler(request), self.limits.reading + self.limits.answering)
        except asyncio.TimeoutError:
            raise Refused(504, f"there was no answer within {self.limits.answering:g} seconds") from None
        except Unavailable as error:
            raise Refused(503, str(error), retry=True) from None
        except ClientDisconnect:
            raise Refused(400, "the client has gone") from None

    # ------------------------------------------------------------------ what is asked

    async def served(self) -> Served:
        if self.known is None:
            self.known = await self.backend.served()
        return self.known

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.body
        too_large = Refused(413, f"the request is larger than the limit of {limit:,} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdigit():
            raise Refused(400, "content-length must be a whole number")
        stream = request.stream()
        if int(length) > limit:
            await _throw_away(stream, 4 * limit)
            raise too_large

        async def read() -> bytes:
            parts, size = [], 0
            async for part in stream:
                size += len(part)
                if size > limit:
                    await _throw_away(stream, 4 * limit)
                    raise too_large
                parts.append(part)
            return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self.limits.reading)
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {self.limits.reading:g} seconds"
            raise Refused(408, message) from None

    async def _asked(self, request: Request) -> tuple[dict, list[bytes]]:
        """The JSON object, and the images of its `input`."""
        body = await self._body(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("image/") or kind == "application/octet-stream":
            asked, images = dict(request.query_params), [body]
        else:
            try:
                asked = json.loads(body)
            except (ValueError, RecursionError):
                raise Refused(400, "the body must be JSON, or an image with its content-type") from None
            if not isinstance(asked, dict):
                raise Refused(400, f"the body must be a JSON object, not {_kind(asked)}")
            images = await self._images(asked)
        request.state.images = len(images)
        if asked.get("model") is not None:
            await self._check_model(asked["model"])
        for i, data in enumerate(images):
            try:
                height, width = await asyncio.to_thread(upright_size, data)
            except ImageError as error:
                raise Refused(400, f"input[{i}]: {error}", f"input[{i}]") from None
            if height * width > self.limits.pixels:
                message = f"the image has {width} x {height} pixels, more than the limit of {self.limits.pixels:,}"
                raise Refused(400, f"input[{i}]: {message}", f"input[{i}]")
        return asked, images

    async def _check_model(self, name) -> Served:
        served = await self.served()
        if name != served.name:
            raise Refused(404, f"there is no model {str(name)[:100]!r}: this service has {served.name!r}", "model")
        return served

    async def _images(self, asked: dict) -> list[bytes]:
        texts = asked.get("input")
        if texts is None and "messages" in asked:
            texts = _of_messages(asked["messages"])
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not texts:
            raise Refused(400, f"input must be a data URL of an image or a list of them, not {_kind(texts)}", "input")
        if len(texts) > self.limits.images:
            raise Refused(400, f"input has {len(texts):,} images, more than the limit of {self.limits.images}", "input")
        found = []
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise Refused(400, f"input[{i}] must be a data URL of an image, not {_kind(text)}", f"input[{i}]")
            if text[:5].lower() == "data:":
                found.append(_decoded(text, i))
            elif text[:8].lower().startswith(("http://", "https://")):
                found.append(await self._fetched(text, i))
            else:
                message = f"input[{i}] must be a data URL of an image (data:image/png;base64,...), not other text"
                raise Refused(400, message, f"input[{i}]")
        return found

    async def _fetched(self, url: str, i: int) -> bytes:
        host = urllib.parse.urlsplit(url).hostname
        if not self.limits.fetch:
            raise Refused(400, f"input[{i}] is a URL, and this service fetches none: send a data URL", f"input[{i}]")
        if host not in self.limits.fetch:
            raise Refused(400, f"input[{i}] is a URL of a host that this service does not fetch from", f"input[{i}]")
        try:
            return await asyncio.to_thread(_fetch, url, self.limits)
        except (OSError, ValueError) as error:
            raise Refused(400, f"input[{i}] cannot be fetched: {' '.join(str(error).split())[:200]}") from None

    async def _answers(self, images: list[bytes], kind: str) -> list[Reply]:
        try:
            replies = await asyncio.wait_for(self.backend.answer(images, kind), self.limits.answering)
        except asyncio.TimeoutError:
            raise Refused(504, f"there was no answer within {self.limits.answering:g} seconds") from None
        for i, reply in enumerate(replies):
            if reply.error is not None:
                raise Refused(400, f"input[{i}]: {reply.error}", f"input[{i}]")
        return replies

    # ------------------------------------------------------------------ what is answered

    async def _embeddings(self, request: Request) -> Response:
        asked, images = await self._asked(request)
        served = await self.served()
        format, dimensions = asked.get("encoding_format") or "float", asked.get("dimensions")
        if format not in ("float", "base64"):
            raise Refused(400, f"encoding_format must be float or base64, got {str(format)[:50]!r}", "encoding_format")
        if isinstance(dimensions, str) and dimensions.isdigit():  # of a query
            dimensions = int(dimensions)
        if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= served.features):
            raise Refused(400, f"dimensions must be 1 to {served.features}, got {str(dimensions)[:50]}", "dimensions")
        if (normalize := asked.get("normalize") or False) not in (True, False, "true", "false"):
            raise Refused(400, f"normalize must be true or false, got {str(normalize)[:50]!r}", "normalize")
        replies = await self._answers(images, "features")
        data = []
        for i, reply in enumerate(replies):
            values = reply.values[:dimensions].astype("<f4")
            if normalize in (True, "true"):
                values /= max(np.linalg.norm(values), np.finfo(np.float32).tiny)
            text = base64.b64encode(values.tobytes()).decode() if format == "base64" else values.tolist()
            data.append({"object": "embedding", "index": i, "embedding": text})
        return self._response(request, data, replies, served)

    async def _classify(self, request: Request) -> Response:
        asked, images = await self._asked(request)
        served = await self.served()
        if not served.classes:
            raise Refused(404, f"{served.name} has no classes: ask /v1/embeddings")
        lengths = asked.get("lengths") in (True, "true", "1", "all")
        replies = await self._answers(images, "classes")
        data = [_classes(i, reply, served) for i, reply in enumerate(replies)]
        if lengths:
            each = await self._answers(images, "lengths")
            for answer, reply in zip(data, each):
                answer["lengths"] = [_classes(i, other, served) for i, other in enumerate(reply.others)]
            replies = replies + each
        return self._response(request, data, replies, served)

    @staticmethod
    def _response(request: Request, data: list[dict], replies: list[Reply], served: Served) -> Response:
        request.state.tokens = tokens = sum(reply.tokens for reply in replies)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(await self.served())]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_model(await self._check_model(request.url.path.removeprefix("/v1/models/"))))

    async def _page(self, request: Request) -> Response:
        policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        headers = {"content-security-policy": policy + "connect-src 'self'", "x-content-type-options": "nosniff"}
        return HTMLResponse(self.page, headers=headers)

    async def _health(self, request: Request) -> Response:
        await asyncio.wait_for(self.backend.stats(), 5)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        await self.served()
        return PlainTextResponse(self.metrics(await self.backend.stats()), media_type="text/plain; version=0.0.4")

    def metrics(self, stats: Stats) -> str:
        """In Prometheus's text format."""
        lines = []

        def metric(name: str, kind: str, help: str, *values: tuple[str, float]) -> None:
            lines.extend((f"# HELP revit_{name} {help}", f"# TYPE revit_{name} {kind}"))
            lines.extend(f"revit_{name}{labels} {value!r}" for labels, value in values)

        name = self.known.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        metric("info", "gauge", "What is served.", (f'{{model="{name}",version="{__version__}"}}', 1))
        requests = [(f'{{path="{path}",status="{code}"}}', n) for (path, code), n in sorted(self.statuses.items())]
        metric("requests_total", "counter", "Requests by path and status.", *requests)
        count, latency = 0, []
        for bucket in BUCKETS:
            count += self.buckets[bucket]
            latency.append((f'_bucket{{le="{bucket:g}"}}', count))
        count += self.buckets[float("inf")]
        latency += [('_bucket{le="+Inf"}', count), ("_sum", self.seconds), ("_count", count)]
        metric("request_seconds", "histogram", "Seconds from a request to its answer.", *latency)
        metric("images_total", "counter", "Images answered.", ("", stats.images))
        metric("image_errors_total", "counter", "Images that could not be answered.", ("", stats.errors))
        metric("tokens_total", "counter", "Tokens computed.", ("", stats.tokens))
        saved = max(0, stats.full - stats.tokens)
        metric("tokens_saved_total", "counter", "Tokens less than at full length.", ("", saved))
        metric("busy_seconds_total", "counter", "Seconds that the model computed.", ("", stats.busy))
        rate = stats.tokens / stats.busy if stats.busy else 0.0
        metric("tokens_per_second", "gauge", "Tokens a second while the model computed.", ("", rate))
        fill = stats.tokens / stats.capacity if stats.capacity else 0.0
        metric("batch_fill", "gauge", "Tokens of all batches over what they had room for.", ("", fill))
        metric("batches_total", "counter", "Batches computed.", ("", stats.batches))
        metric("waited_seconds_total", "counter", "Seconds of each image before its batch.", ("", stats.waited))
        metric("waiting_images", "gauge", "Images that wait.", ("", stats.waiting))
        metric("waiting_tokens", "gauge", "Tokens of the images that wait.", ("", stats.waiting_tokens))
        return "\n".join(lines) + "\n"


def _classes(i: int, reply: Reply, served: Served) -> dict:
    order = np.argsort(-reply.values, kind="stable")[: served.top]
    labels = served.labels
    classes = [
        {"class": int(c)} | ({"label": labels[c]} if labels else {}) | {"probability": short(reply.values[c])}
        for c in order
    ]
    answer = {"object": "classification", "index": i, "classes": classes, "grid": list(reply.grid)}
    answer |= {"tokens": reply.tokens, "full_tokens": served.full, "crop": served.crop}
    return answer | {"patch_size": list(served.patch_size), "width": reply.size[1], "height": reply.size[0]}


async def _throw_away(stream, size: int) -> None:
    """Read up to `size` bytes more: if the connection is closed while the client sends, it never reads the answer."""

    async def read() -> None:
        seen = 0
        while seen < size:
            seen += len(await asyncio.wait_for(anext(stream), 0.5))

    try:
        await asyncio.wait_for(read(), 5)
    except (asyncio.TimeoutError, StopAsyncIteration, ClientDisconnect):
        pass


def _model(served: Served) -> dict:
    found = {"id": served.name, "object": "model", "created": 0, "owned_by": "revit_kernels"}
    return found | {"features": served.features, "classes": served.classes, "full_tokens": served.full}


def _of_messages(messages) -> list[str]:
    """The one image of a conversation in OpenAI's format, as vLLM's embeddings endpoint takes it."""
    refused = Refused(
        400, "messages must hold one image, as a part of the type image_url, and nothing else", "messages"
    )
    try:
        parts = [part for message in messages for part in message["content"]]
        if [part["type"] for part in parts] != ["image_url"]:
            raise refused
        return [parts[0]["image_url"]["url"]]
    except (TypeError, KeyError):
        raise refused from None


def _decoded(text: str, i: int) -> bytes:
    head, comma, data = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused(400, f"input[{i}] is a data URL without base64", f"input[{i}]")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"input[{i}] has damaged base64", f"input[{i}]") from None


def _kind(value) -> str:
    names = {type(None): "nothing", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "text" if isinstance(value, str) else "an empty list" if value == [] else "a list")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        raise ValueError("it leads to another address")


def _fetch(url: str, limits: Limits) -> bytes:
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=min(10.0, limits.reading)) as response:
        data = response.read(limits.body + 1)
    if len(data) > limits.body:
        raise ValueError(f"it is larger than the limit of {limits.body:,} bytes")
    return data


class Local:
    """A backend in this process: a Batcher."""

    def __init__(self, batcher, name: str, top: int = 5):
        self.batcher, self.name, self.top = batcher, name, top

    async def answer(self, images: list[bytes], kind: str) -> list[Reply]:
        futures = []
        try:
            for data in images:
                futures.append(self.batcher.submit(data, kind))
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        except RuntimeError as error:
            raise Unavailable(str(error)) from None
        finally:
            for future in futures:  # of a request that has ended otherwise
                future.cancel()

    async def stats(self) -> Stats:
        if not self.batcher.thread.is_alive():
            raise Unavailable("the model's thread has ended")
        return self.batcher.totals()

    async def served(self) -> Served:
        prepared = self.batcher.prepared
        model, columns = prepared.model, prepared.columns
        return Served(
            self.name,
            model.num_features,
            columns.classes,
            columns.labels,
            self.batcher.full,
            bool(prepared.rule.grids) and prepared.rule.crop,
            tuple(model.patch_embed.patch_size),
            self.top,
        )


class Listener:
    """An HTTP server of Endpoints, on a thread of its own.

    Raises ValueError where the address cannot be listened on.
    """

    def __init__(self, endpoints: Endpoints, host: str = "127.0.0.1", port: int = 0):
        import uvicorn

        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self.socket = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise ValueError(f"port {port} of {host} cannot be listened on: {error.strerror or error}") from None
        self.endpoints, self.port = endpoints, self.socket.getsockname()[1]
        options = {"log_level": "error", "lifespan": "off", "server_header": False, "timeout_keep_alive": 75}
        self.server = uvicorn.Server(uvicorn.Config(endpoints, timeout_graceful_shutdown=30, **options))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), name="http", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Accept no more connections, and finish open requests within 30 seconds."""
        self.server.should_exit = True
        self.thread.join()
