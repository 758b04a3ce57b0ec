"""`revit serve` under load on one machine: every answer checked, latency, and tokens a second against the model's own.

    python benchmarks/bench_serving.py --output benchmarks/results/serving.json

Rivals: the same service with batches of a fixed number of images, padded to the longest. Loopback only.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZES = [(64, 64), (80, 80), (96, 64), (112, 112), (128, 96), (160, 160), (320, 240), (640, 480), (1920, 1080)]
SIZES += [(4000, 3000)]
KINDS = 8  # images of each size
COUNT = 16  # images of a padded batch


def make_images(seed: int = 0) -> list[bytes]:
    rng, images = np.random.default_rng(seed), []
    for width, height in SIZES:
        for _ in range(KINDS):
            coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            images.append(file.getvalue())
    return images


def padded_batcher():
    """A Batcher whose batches are COUNT images, padded to the longest and masked, as an engine without packing has."""
    from revit_kernels.serving.batcher import Batcher, _reply
    from revit_kernels.serving.compare import Resize, rival

    class Padded(Batcher):
        def take(self):
            batch = []
            with self.changed:
                while True:
                    while not self.entries and not batch:
                        if self.closed:
                            return None
                        self.changed.wait()
                    if not self.entries or len(batch) == COUNT:
                        return batch
                    head = self.entries[0]
                    if not head.loaded.done():
                        if batch:
                            return batch
                        self.limit.wait_for(head.number)
                        self.changed.wait()
                        continue
                    self.entries.popleft()
                    self.tokens, self.bytes = self.tokens - head.tokens, self.bytes - head.size
                    if head.reply.set_running_or_notify_cancel():
                        batch.append((head, head.loaded.result()))

        def answer(self, kind, images):
            model = self.prepared.model.model
            if not hasattr(self, "dense"):
                self.dense, _ = rival(model)
                self.resize = Resize(model, self.device, next(model.parameters()).dtype)
            ph, pw = model.patch_embed.patch_size
            lengths = [h * w for h, w in (loaded.grid for loaded in images)]
            longest = max(lengths)
            x = torch.zeros(len(images), 3, ph, longest * pw, dtype=self.resize.dtype)
            mask = torch.arange(longest + self.prefix) < torch.tensor([[n + self.prefix] for n in lengths])
            for row, loaded in enumerate(images):
                h, w = loaded.grid
                patches = self.resize(loaded.pixels, (h * ph, w * pw)).unflatten(1, (h, ph)).unflatten(3, (w, pw))
                x[row, :, :, : h * w * pw] = patches.permute(0, 2, 1, 3, 4).flatten(2)
            values = self.dense.forward_head(self.dense.forward_features(x, attn_mask=mask[:, None, None, :]), True)
            costs = [n + self.prefix for n in lengths]
            return [_reply(v, i, i.grid, c) for v, i, c in zip(values.float().numpy(), images, costs)]

    return Padded


def own_rate(weights: str, images: list[bytes], seconds: float) -> tuple[float, list[np.ndarray], list[int]]:
    """(tokens a second, features, tokens) of the engine alone, on decoded images in batches of 8,192 tokens."""
    from revit_kernels.data.archives import Member
    from revit_kernels.serving.batching import token_batches
    from revit_kernels.serving.infer import answer
    from revit_kernels.serving.loading import load
    from revit_kernels.serving.prepare import Settings, prepare

    made = prepare(Settings(model=weights, features=True, device="cpu"))
    loaded = [load(Member("", lambda data=data: data), made.rule) for data in images]
    tokens = [1 + one.grid[0] * one.grid[1] for one in loaded]
    features, spent, computed = [], 0.0, 0
    order = np.random.default_rng(1).permutation(len(loaded))
    batches = list(token_batches(order.tolist(), 8192, tokens.__getitem__))
    found = {}
    for batch in batches:
        values = answer(made.model, [loaded[i] for i in batch], torch.device("cpu"), True).values.numpy()
        found |= dict(zip(batch, values))
    features = [found[i] for i in range(len(loaded))]
    begun = time.perf_counter()
    while spent < seconds:
        for batch in batches:
            answer(made.model, [loaded[i] for i in batch], torch.device("cpu"), True)
            computed += sum(tokens[i] for i in batch)
        spent = time.perf_counter() - begun
    return computed / spent, features, tokens


def load_service(port: int, images: list[bytes], expected, requests: int, clients: int, queue) -> None:
    """In a process of its own: `requests` from `clients` threads, each answer checked; the results go to the queue."""
    order = np.random.default_rng(2).integers(0, len(images), requests).tolist()
    bodies = {}
    for i in set(order):
        url = f"data:image/jpeg;base64,{base64.b64encode(images[i]).decode()}"
        bodies[i] = json.dumps({"input": url, "encoding_format": "base64", "model": "revit"}).encode()
    lock, latencies, wrong, statuses = threading.Lock(), [], [], {}
    begun = time.perf_counter()

    def work():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                if not order:
                    return
                i = order.pop()
            start = time.perf_counter()
            connection.request("POST", "/v1/embeddings", bodies[i], {"content-type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            seconds = time.perf_counter() - start
            with lock:
                statuses[response.status] = statuses.get(response.status, 0) + 1
                latencies.append(seconds)
            if response.status == 200:
                values = np.frombuffer(base64.b64decode(json.loads(text)["data"][0]["embedding"]), "<f4")
                if expected is not None and not np.array_equal(values, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put((time.perf_counter() - begun, latencies, statuses, len(wrong)))


def memory() -> dict[str, int]:
    """Peak MB of the service's processes, which descend from this one."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"ray::ServeReplica:revit:" in (name := (entry / "cmdline").read_bytes()):
                status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
                found[name.split(b":")[-1].strip(b"\0").decode()] = int(status["VmHWM"].split()[0]) >> 10
        except (OSError, ValueError):
            continue
    return found


def serve_and_load(arguments: dict, port: int, images, expected, requests: int, clients: int) -> dict:
    from ray import serve

    from revit_kernels.serving.ray_serve import app

    serve.run(app(arguments), name="revit", route_prefix="/")
    spawned = multiprocessing.get_context("fork")
    for count in (clients, requests):  # the first warms up
        queue = spawned.SimpleQueue()
        process = spawned.Process(target=load_service, args=(port, images, expected, count, clients, queue))
        process.start()
        seconds, latencies, statuses, wrong = queue.get()
        process.join()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    p50, p99 = np.percentile(latencies, [50, 99])
    order = np.random.default_rng(2).integers(0, len(images), requests)
    found = {"requests": requests, "seconds": seconds, "statuses": statuses, "wrong": wrong}
    found |= {"p50_ms": 1000 * p50, "p99_ms": 1000 * p99, "memory_mb": memory(), "order": order.tolist()}
    found["images_per_batch"] = (float(metrics["revit_images_total"])) / float(metrics["revit_batches_total"])
    serve.delete("revit")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--padded-requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--depth", type=int, default=8, help="blocks of ViT-B/16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=18555)
    parser.add_argument("--output")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)

    import ray
    from ray import serve

    from revit_kernels import create_model
    from revit_kernels.models.checkpoints import save_checkpoint

    images = make_images()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = f"{folder}/model.safetensors"
        save_checkpoint(create_model("vit_base_patch16_224", depth=args.depth, num_classes=0), weights)
        rate, features, tokens = own_rate(weights, images, 5.0)
        ray.init(num_cpus=args.threads, include_dashboard=False, log_to_driver=False, object_store_memory=500 << 20)
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        arguments = {"model": weights, "name": "revit", "features": True, "device": "cpu", "cpus": args.threads}
        arguments |= {"workers": args.threads}
        runs = {}
        runs["packed"] = serve_and_load(arguments, args.port, images, features, args.requests, args.clients)
        rival = arguments | {"batcher": padded_batcher()}
        runs["padded"] = serve_and_load(rival, args.port, images, None, args.padded_requests, args.clients)
        serve.shutdown()
        ray.shutdown()
    for run in runs.values():
        run["tokens_per_s"] = sum(tokens[i] for i in run.pop("order")) / run["seconds"]
    packed, padded = runs["packed"]["tokens_per_s"], runs["padded"]["tokens_per_s"]
    result = {"machine": platform.processor() or platform.machine(), "threads": args.threads, "depth": args.depth}
    result |= {"model_tokens_per_s": rate, "share_of_the_model": packed / rate, "against_padded": packed / padded}
    result |= runs
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
