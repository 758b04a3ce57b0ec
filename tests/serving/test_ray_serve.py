"""The service on Ray Serve: the same answers through two processes, a worker that is killed, a graceful end."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from ray import serve
from test_images import noise

from revit_kernels import cli
from revit_kernels.serving.prepare import Settings, prepare
from revit_kernels.serving.ray_serve import app, listening

PORT = 18000 + os.getpid() % 2000
SIZES = ((64, 64), (300, 200), (28, 28), (120, 90))


def encoded(i):
    file = io.BytesIO()
    noise(SIZES[i % len(SIZES)], seed=i).save(file, "PNG")
    return file.getvalue()


def ask(path, body=None, port=PORT, timeout=60):
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body and json.dumps(body).encode(), headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, response.read().decode()


def url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


ARGUMENTS = {"dtype": "float32", "device": "cpu", "workers": 1, "body": 1_000_000, "reading": 2.0}


@pytest.fixture(scope="module")
def service(ray_here):
    """As `revit serve`; its lines of the log."""
    lines = []
    with listening(ARGUMENTS, port=PORT, log=lines.append):
        yield lines
    serve.shutdown()


@pytest.fixture(scope="module")
def expected():
    """(classes, grid, tokens) of each image, by the batcher alone."""
    from revit_kernels.serving.batcher import Batcher

    batcher = Batcher(prepare(Settings(dtype="float32", device="cpu")))
    replies = [batcher.submit(encoded(i)).result(60) for i in range(12)]
    batcher.close()
    return replies


def check(text, reply):
    answer = json.loads(text)["data"][0]
    assert (answer["grid"], answer["tokens"]) == (list(reply.grid), reply.tokens)
    best = answer["classes"][0]
    assert np.float32(best["probability"]) == reply.values[best["class"]] == reply.values.max()


def test_the_application_behind_rays_proxies(ray_here, expected):
    """As on a cluster. The first of the tests that serve here: how Ray Serve does HTTP is settled when it starts."""
    serve.start(http_options={"host": "127.0.0.1", "port": PORT + 4000})
    try:
        serve.run(app(ARGUMENTS), name="revit", route_prefix="/")
        status, text = ask("/v1/classify", {"input": url(encoded(3))}, PORT + 4000)
        assert status == 200
        check(text, expected[3])
        assert ask("/healthz", port=PORT + 4000)[0] == 200
        status, text = ask("/v1/classify", {"input": "x" * 2_000_000}, PORT + 4000)
        assert status == 413 and "larger than the limit of 1,000,000 bytes" in text
    finally:
        serve.shutdown()


def test_many_clients_get_their_own_answers(service, expected):
    from openai import OpenAI

    def one(i):
        status, text = ask("/v1/classify", {"input": url(encoded(i % 12))})
        assert status == 200, text
        check(text, expected[i % 12])

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(one, range(48)))
    client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="-")
    found = client.embeddings.create(model="revit", input=[url(encoded(i)) for i in range(4)])
    assert len(found.data) == 4 and found.usage.total_tokens > 4
    assert ask("/healthz")[0] == 200 and "revit_images_total 5" in ask("/metrics")[1]
    assert ask("/")[1].startswith("<!doctype html>")
    assert sum(line["images"] for line in service if line["status"] == 200) == 52


def test_4xx(service):
    status, text = ask("/v1/classify", {"input": "data:image/png;base64,!!!"})
    assert status == 400 and json.loads(text)["error"]["message"] == "input[0] has damaged base64"
    status, text = ask("/v1/classify", {"input": "x" * 2_000_000})
    assert status == 413 and "larger than the limit of 1,000,000 bytes" in text


def raw(*parts):
    """The first line that comes back for bytes that are sent piece by piece."""
    with socket.create_connection(("127.0.0.1", PORT), timeout=60) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:  # it has answered, and closed
                break
        return connection.makefile("rb").readline().decode().strip()


def test_slow_and_endless_clients(service):
    head = "POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: image/png\r\n"
    assert "408" in raw(f"{head}content-length: 1000\r\n\r\nx".encode())
    assert "413" in raw(f"{head}content-length: 100000000\r\n\r\nx".encode())
    chunk = b"80000\r\n" + b"x" * 0x80000 + b"\r\n"
    assert "413" in raw(f"{head}transfer-encoding: chunked\r\n\r\n".encode(), *[chunk] * 8)
    assert ask("/healthz")[0] == 200


def workers_of_ours(name):
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or name not in (entry / "cmdline").read_bytes():
                continue
            ancestor = int(entry.name)
            while ancestor > 1 and ancestor != os.getpid():
                ancestor = int((Path("/proc") / str(ancestor) / "stat").read_text().rpartition(")")[2].split()[1])
            if ancestor == os.getpid():
                yield int(entry.name)
        except (OSError, ValueError):
            continue


def test_a_worker_killed_is_retried_or_a_clear_5xx(service, expected):
    """Nobody hangs, nobody gets another's answer, and it answers again."""
    statuses, stop = [], threading.Event()

    def one(i):
        while not stop.is_set():
            status, text = ask("/v1/classify", {"input": url(encoded(i))})
            statuses.append(status)
            if status == 200:
                check(text, expected[i])
            else:
                assert status in (503, 504) and "error" in json.loads(text), (status, text)

    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(one, i) for i in range(4)]
        while len(statuses) < 8:
            time.sleep(0.01)
        killed = list(workers_of_ours(b"ray::ServeReplica:revit:model"))
        for process in killed:
            os.kill(process, signal.SIGKILL)
        before, until = len(statuses), time.monotonic() + 60
        while 200 not in statuses[before + 8 :] and time.monotonic() < until:
            time.sleep(0.05)
        stop.set()
        for future in running:
            future.result(70)
    assert killed and 200 in statuses[before + 8 :] and statuses.count(200) > len(statuses) // 2


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    """The whole command, in a process: under load it is interrupted, and answers all that has come before it ends."""
    port = PORT + 2000
    command = [sys.executable, "-m", "revit_kernels.cli", "serve", "--port", str(port), "--threads", "1"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": ""}
    body = json.dumps({"input": [url(encoded(i)) for i in range(12)] * 4}).encode()
    head = f"POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    log = tmp_path / "log"
    with (
        open(log, "w") as output,
        subprocess.Popen(
            [*command, "--log-requests"], stdout=output, stderr=subprocess.PIPE, text=True, env=env
        ) as process,
        ExitStack() as opened,
    ):
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "serving at" in line:
                    break
            assert ask("/v1/classify", {"input": url(encoded(0))}, port)[0] == 200, lines
            clients = [opened.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(8)]
            for client in clients:
                client.sendall(head.encode() + b"\r\n\r\n" + body)
            assert ask("/healthz", port=port)[0] == 200  # those before it are being answered
        finally:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)  # as a supervisor that does not wait long
        answers = [client.makefile("rb").readline() for client in clients]
        rest = process.stderr.read()
    assert answers == [b"HTTP/1.1 200 OK\r\n"] * 8
    assert process.returncode == 0 and rest.endswith("revit: served\n")
    assert "Traceback" not in "".join(lines) + rest
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["images"] for line in logged if line["path"] == "/v1/classify"] == [1] + [48] * 8


TAKES_SIGNALS = """
import ctypes, os, signal, sys, time
import ray
from revit_kernels import cli
from revit_kernels.serving import batcher, prepare, ray_serve

def take(*args, **kwargs):  # as Ray does, past Python
    ctypes.CDLL(None).signal(int(signal.SIGTERM), 0)

def interrupted(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

def shutdown():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print("whole", file=sys.stderr)
    take()

ray.init, ray.shutdown, ray_serve.listening = take, shutdown, interrupted
prepare.prepare = lambda settings: None
batcher.Batcher = lambda prepared: open(os.devnull)
sys.exit(cli.main(["serve"]))
"""


def test_signals_while_it_starts_and_ends():
    """Ray's handler would have the process aborted in the middle of its end."""
    run = subprocess.run([sys.executable, "-c", TAKES_SIGNALS], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (128 + signal.SIGTERM, "whole\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model"], "unrecognized arguments: --model"),
        (["gone.safetensors"], "there is no checkpoint at gone.safetensors"),
        (["--key-file", "gone"], "the file of the key, gone, cannot be read: No such file"),
        (["--policy", "cascade", "--grids", "7x7"], "--policy gives each image a length of the model's menu"),
    ],
)
def test_misuse(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["serve", *arguments])
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1


def test_arguments_of_the_application():
    with pytest.raises(ValueError, match="there is no argument 'nme' of the application"):
        app({"nme": "revit"})
    app({"grids": [[7, 7], [5, 5]], "fetch": ["a.example"], "name": "revit"})
