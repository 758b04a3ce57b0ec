"""The HTTP interface, in one process: the official openai client, a browser, and whoever means no good."""

import asyncio
import base64
import io
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from browser import Browser, browser_program
from PIL import Image
from test_images import noise

from revit_kernels.serving.batcher import Batcher, Stats
from revit_kernels.serving.endpoints import Endpoints, Limits, Listener, Local, Unavailable
from revit_kernels.serving.prepare import Settings, prepare


def encoded(size, kind="PNG"):
    file = io.BytesIO()
    noise(size).save(file, kind)
    return file.getvalue()


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class Server:
    """The ASGI application on a port of this machine."""

    def __init__(self, endpoints):
        self.listener = Listener(endpoints)
        self.port, self.close = self.listener.port, self.listener.close

    def ask(self, path, body=None, headers=None, method=None):
        """(status, text or JSON)"""
        status, text, _ = self.answer(path, body, headers, method)
        return status, text

    def answer(self, path, body=None, headers=None, method=None):
        """(status, text or JSON, headers)"""
        if isinstance(body, dict | list):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json"} | (headers or {})
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers or {}, method=method)
        try:
            response = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            text = response.read().decode()
        kind = response.headers.get("content-type", "")
        return response.status, json.loads(text) if "json" in kind else text, response.headers


@pytest.fixture(scope="module")
def batcher():
    made = Batcher(prepare(Settings(dtype="float32", device="cpu")), workers=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(batcher):
    limits = Limits(body=200_000, pixels=500_000, images=4, reading=1.0)
    made = Server(Endpoints(Local(batcher, "revit"), limits))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0)


def features(batcher, data):
    return batcher.submit(data, "features").result(60).values


# ---------------------------------------------------------------------- OpenAI's client


def test_embeddings(client, batcher):
    images = [encoded((60, 40)), encoded((200, 120))]
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        found = client.embeddings.create(model="revit", input=list(map(data_url, images)), **options)
        assert [one.index for one in found.data] == [0, 1] and found.model == "revit"
        for one, data in zip(found.data, images):
            values = one.embedding
            if isinstance(values, str):
                values = np.frombuffer(base64.b64decode(values), "<f4")
            np.testing.assert_array_equal(np.float32(values), features(batcher, data))
        assert found.usage.total_tokens == found.usage.prompt_tokens > 2
    short = client.embeddings.create(model="revit", input=data_url(images[0]), dimensions=5).data[0].embedding
    np.testing.assert_array_equal(np.float32(short), features(batcher, images[0])[:5])
    assert [model.id for model in client.models.list()] == ["revit"] == [client.models.retrieve("revit").id]
    unit = client.embeddings.create(model="revit", input=data_url(images[0]), extra_body={"normalize": True})
    np.testing.assert_allclose(np.linalg.norm(np.float64(unit.data[0].embedding)), 1, rtol=4 * np.finfo("f4").eps)


def test_a_conversation_with_an_image(server, batcher):
    """As vLLM takes images for embeddings: one in a message."""
    data = encoded((60, 40))
    part = {"type": "image_url", "image_url": {"url": data_url(data)}}
    status, found = server.ask("/v1/embeddings", {"messages": [{"role": "user", "content": [part]}]})
    assert status == 200
    np.testing.assert_array_equal(np.float32(found["data"][0]["embedding"]), features(batcher, data))
    for messages in ([], 5, [{"role": "user", "content": "a poem"}], [{"content": [part, part]}], [{"content": [{}]}]):
        status, found = server.ask("/v1/embeddings", {"messages": messages})
        assert status == 400 and found["error"]["message"].startswith("messages must hold one image")


def test_what_the_client_is_refused(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="must be a data URL of an image"):
        client.embeddings.create(model="revit", input="a poem")
    with pytest.raises(openai.NotFoundError, match="there is no model 'other': this service has 'revit'"):
        client.embeddings.create(model="other", input=data_url(encoded((8, 8))))


# ---------------------------------------------------------------------- classes


def test_classify(server, batcher):
    data = encoded((60, 40), "JPEG")
    status, found = server.ask("/v1/classify", {"input": data_url(data, "jpeg"), "lengths": True})
    assert status == 200
    answer, expected = found["data"][0], batcher.submit(data).result(60)
    assert (answer["grid"], answer["tokens"]) == (list(expected.grid), expected.tokens)
    best = int(expected.values.argmax())
    labels = batcher.prepared.columns.labels
    assert answer["classes"][0]["class"] == best and answer["classes"][0]["label"] == labels[best]
    assert np.float32(answer["classes"][0]["probability"]) == expected.values[best]
    assert [tuple(one["grid"]) for one in answer["lengths"]] == list(batcher.prepared.model.menu)
    assert found["usage"]["total_tokens"] == answer["tokens"] + sum(one["tokens"] for one in answer["lengths"])
    status, raw = server.ask("/v1/classify", data, {"content-type": "image/jpeg"})
    assert status == 200 and raw["data"][0]["classes"] == answer["classes"]


def test_health_and_metrics(server):
    assert server.ask("/healthz") == (200, {"status": "ok"})
    assert server.ask("/v1/classify", {"input": [data_url(encoded((60, 40)))] * 3})[0] == 200
    status, text = server.ask("/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and float(values["revit_images_total"]) >= 3 and float(values["revit_tokens_per_second"]) > 0
    assert float(values['revit_request_seconds_bucket{le="+Inf"}']) == float(values["revit_request_seconds_count"])
    assert 0 < float(values["revit_batch_fill"]) <= 1 and float(values["revit_tokens_saved_total"]) >= 0
    assert float(values['revit_requests_total{path="/v1/classify",status="200"}']) >= 1
    endpoints = server.listener.endpoints  # a counter is written whole: rates are differences
    assert "revit_tokens_total 12345678901\n" in endpoints.metrics(Stats(tokens=12_345_678_901))


def test_requests_have_names_and_are_logged(batcher):
    lines = []
    server = Server(Endpoints(Local(batcher, "revit"), log=lines.append))
    body = {"input": [data_url(encoded((60, 40)))] * 2}
    status, found, headers = server.answer("/v1/embeddings", body, {"x-request-id": "abc-1"})
    assert status == 200 and headers["x-request-id"] == "abc-1"
    status, _, headers = server.answer("/v1/classify", {"input": 5}, {"x-request-id": "two words"})
    server.close()
    first, second = json.loads(json.dumps(lines))
    assert (first["id"], first["images"], first["tokens"]) == ("abc-1", 2, found["usage"]["total_tokens"])
    assert (first["path"], first["status"], first["client"]) == ("/v1/embeddings", 200, "127.0.0.1")
    assert second["id"] == headers["x-request-id"] != "two words" and second["status"] == 400
    assert second["error"].startswith("input must be a data URL") and second["ms"] >= 0


def test_before_the_model_is_ready(batcher):
    server = Server(Endpoints(None))
    for path in ("/healthz", "/health", "/metrics", "/v1/models"):
        status, found, headers = server.answer(path)
        assert (status, headers["retry-after"]) == (503, "1")
        assert found["error"]["message"] == "the model is being made ready: try again later"
    server.listener.endpoints.backend = Local(batcher, "revit")
    assert server.ask("/health") == (200, {"status": "ok"})
    with pytest.raises(ValueError, match=f"port {server.port} of 127.0.0.1 cannot be listened on: Address already"):
        Listener(Endpoints(None), port=server.port)
    server.close()


# ---------------------------------------------------------------------- whoever means no good


def bomb(width, height):
    """A PNG that says it has so many pixels, and has none."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PIXEL = data_url(encoded((8, 8)))


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/v1/embeddings", b"", 400, "the body must be JSON, or an image"),
        ("/v1/embeddings", b"{", 400, "the body must be JSON"),
        ("/v1/embeddings", b"[" * 100_000, 400, "the body must be JSON"),
        ("/v1/embeddings", b"\xff\xfe", 400, "the body must be JSON"),
        ("/v1/embeddings", b"[]", 400, "the body must be a JSON object, not an empty list"),
        ("/v1/embeddings", {}, 400, "input must be a data URL of an image or a list of them, not nothing"),
        ("/v1/embeddings", {"input": []}, 400, "input must be a data URL of an image or a list of them, not an empty"),
        ("/v1/embeddings", {"input": 5}, 400, "not a number"),
        ("/v1/embeddings", {"input": {"a": 1}}, 400, "not an object"),
        ("/v1/embeddings", {"input": [1, 2]}, 400, "input[0] must be a data URL of an image, not a number"),
        ("/v1/embeddings", {"input": [PIXEL] * 5}, 400, "input has 5 images, more than the limit of 4"),
        ("/v1/embeddings", {"input": "data:image/png;base64,!!!"}, 400, "input[0] has damaged base64"),
        ("/v1/embeddings", {"input": "data:image/png;base64,QUJD"}, 400, "input[0]: it is not an image"),
        ("/v1/embeddings", {"input": "data:image/png;base64,"}, 400, "input[0]: the file is empty"),
        ("/v1/embeddings", {"input": "data:image/png,abc"}, 400, "input[0] is a data URL without base64"),
        ("/v1/embeddings", {"input": "file:///etc/passwd"}, 400, "must be a data URL of an image"),
        ("/v1/embeddings", {"input": "http://127.0.0.1/a.png"}, 400, "this service fetches none"),
        ("/v1/embeddings", {"input": data_url(bomb(60_000, 60_000))}, 400, "more than twice the limit"),
        ("/v1/embeddings", {"input": [PIXEL, data_url(bomb(1000, 1000))]}, 400, "input[1]: the image has 1000 x 1000"),
        ("/v1/embeddings", {"input": data_url(bomb(500, 500))}, 400, "input[0]: the image cannot be decoded"),
        ("/v1/embeddings", {"input": PIXEL, "encoding_format": "xml"}, 400, "encoding_format must be float or base64"),
        ("/v1/embeddings", {"input": PIXEL, "dimensions": 0}, 400, "dimensions must be 1 to "),
        ("/v1/embeddings", {"input": PIXEL, "dimensions": True}, 400, "dimensions must be 1 to "),
        ("/v1/embeddings", {"input": PIXEL, "dimensions": 10**9}, 400, "dimensions must be 1 to "),
        ("/v1/embeddings", {"input": PIXEL, "normalize": "much"}, 400, "normalize must be true or false, got 'much'"),
        ("/v1/models/other", None, 404, "there is no model 'other'"),
        ("/v1/embeddings", {"input": PIXEL, "model": ["a"]}, 404, "there is no model \"['a']\""),
        ("/v1/classify", {"input": "x" * 300_000}, 413, "the request is larger than the limit of 200,000 bytes"),
        ("/v1/classify", None, 405, "there is no GET /v1/classify"),
        ("/v1/nothing", {"input": PIXEL}, 404, "there is no POST /v1/nothing"),
        ("/../../etc/passwd", None, 404, "there is no GET /"),
    ],
)
def test_4xx_in_one_sentence(server, path, body, status, message):
    found, answer = server.ask(path, body)
    error = answer["error"]
    assert found == status and message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 300
    assert server.ask("/healthz")[0] == 200


def raw(server, *parts, pause=0.0):
    """The first line that comes back for bytes that are sent piece by piece."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
            time.sleep(pause)
        return connection.makefile("rb").readline().decode().strip()


HEAD = "POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: image/png\r\n"


def test_a_hundred_megabytes_are_not_read(server):
    assert "413" in raw(server, f"{HEAD}content-length: 100000000\r\n\r\n".encode(), b"x" * 10_000)
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    assert "413" in raw(server, f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode(), *[chunk] * 8)


def test_a_client_that_still_sends_gets_its_413(server):
    """More than sockets buffer: closing at once would reset the connection, and the answer would be lost."""
    for _ in range(5):
        status, answer = server.ask("/v1/classify", b"x" * 700_000, {"content-type": "image/png"})
        assert (status, answer["error"]["message"]) == (413, "the request is larger than the limit of 200,000 bytes")


def test_slow_clients_are_not_waited_for(server):
    begun = time.monotonic()
    line = raw(server, f"{HEAD}content-length: 1000\r\n\r\n".encode(), b"x", b"x", pause=0.1)
    assert "408" in line and time.monotonic() - begun < 10
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # one that leaves
        connection.sendall(f"{HEAD}content-length: 1000\r\n\r\nx".encode())
    assert server.ask("/healthz")[0] == 200


def test_the_bearer_token(batcher):
    server = Server(Endpoints(Local(batcher, "revit"), key="secret"))
    body = {"input": PIXEL}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer é"}):
        status, answer = server.ask("/v1/classify", body, headers)
        assert (status, answer["error"]["message"]) == (401, "the bearer token is missing or wrong")
    assert server.ask("/v1/classify", body, {"authorization": "Bearer secret"})[0] == 200
    assert server.ask("/v1/models")[0] == 401 and server.ask("/healthz")[0] == 200
    server.close()


def test_urls_of_allowed_hosts_alone(batcher):
    class Images(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("location", "http://localhost:1/a.png")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded((30, 20)) if self.path == "/a.png" else b"x" * 400_000)

        def log_message(self, *_):
            pass

    images = HTTPServer(("127.0.0.1", 0), Images)
    threading.Thread(target=images.serve_forever, daemon=True).start()
    server = Server(Endpoints(Local(batcher, "revit"), Limits(body=300_000, fetch=("127.0.0.1",))))
    here = f"http://127.0.0.1:{images.server_port}"

    def ask(url):
        status, answer = server.ask("/v1/classify", {"input": url})
        return status, answer["error"]["message"] if status != 200 else answer["data"][0]["width"]

    assert ask(f"{here}/a.png") == (200, 30)
    refused = "input[0] is a URL of a host that this service does not fetch from"
    assert ask("http://localhost/a.png") == ask("http://127.0.0.1@localhost/a.png") == (400, refused)
    assert ask(f"{here}/away") == (400, "input[0] cannot be fetched: it leads to another address")
    assert ask(f"{here}/large") == (400, "input[0] cannot be fetched: it is larger than the limit of 300,000 bytes")
    server.close()
    images.shutdown()


class Backend(Local):
    """Of a model that does not answer, or cannot."""

    def __init__(self, batcher, error=None):
        super().__init__(batcher, "revit")
        self.error = error

    async def answer(self, images, kind):
        if self.error is not None:
            raise self.error
        await asyncio.sleep(60)


def test_5xx_in_one_sentence(batcher):
    server = Server(Endpoints(Backend(batcher), Limits(answering=0.3)))
    status, answer = server.ask("/v1/classify", {"input": PIXEL})
    assert (status, answer["error"]["message"]) == (504, "there was no answer within 0.3 seconds")
    server.close()
    server = Server(Endpoints(Backend(batcher, Unavailable("the worker died: try again"))))
    status, answer = server.ask("/v1/classify", {"input": PIXEL})
    assert (status, answer["error"]["message"]) == (503, "the worker died: try again")
    assert answer["error"]["type"] == "server_error"
    server.close()


# ---------------------------------------------------------------------- the page


def test_the_page(server, tmp_path):
    """An image is given to the page: it shows its class, tokens and patches at each length."""
    if not (program := browser_program()):
        pytest.skip("no browser is found (chromium, chromium-browser, google-chrome, chrome)")
    Image.effect_mandelbrot((300, 200), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(tmp_path / "image.png")
    browser = Browser(program, tmp_path / "profile")
    try:
        assert browser.show(server.port, tmp_path / "image.png") == "1", browser.value("document.body.innerText")
        cards = browser.value("[...document.querySelectorAll('article')].map(e => e.innerText)")
        data = (tmp_path / "image.png").read_bytes()
        found = server.ask("/v1/classify?lengths=all", data, {"content-type": "image/png"})[1]
        answer = found["data"][0]
        for card, one in zip(cards, answer["lengths"], strict=True):
            rows, columns = one["grid"]
            assert card.startswith(one["classes"][0]["label"])
            assert f"{rows} x {columns} patches, {one['tokens']} tokens" in card
        assert browser.value("document.querySelectorAll('article.chosen').length") == 1
        assert f"{answer['tokens']} tokens paid" in browser.value("document.getElementById('state').textContent")
        # The patches that it was read at: their pixels, and nothing of another size.
        sides = browser.value("[...document.querySelectorAll('canvas')].map(c => [c.height, c.width])")
        for (height, width), one in zip(sides, answer["lengths"]):
            assert height * one["grid"][1] * one["patch_size"][1] == width * one["grid"][0] * one["patch_size"][0]
        assert len(np.unique(np.asarray(Image.open(io.BytesIO(browser.picture())).convert("L")))) > 20
    finally:
        browser.close()


def test_the_page_loads_nothing_from_elsewhere(server):
    status, page = server.ask("/")
    assert status == 200 and "http://" not in page and "https://" not in page and "src=" not in page
