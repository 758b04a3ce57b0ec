"""`revit serve` under load on one machine: every answer checked, latency, and tokens a second against the model's own.

    python benchmarks/bench_serving.py --output benchmarks/results/scale/serving.json
    python benchmarks/bench_serving.py --output benchmarks/results/scale/serving.json --service padded

The rival: the same service with batches of a fixed number of images, padded to the longest. Loopback only. Clients
share the cores with the service; they make their requests before the clock starts. A service whose figures the output
has keeps them, unless it is named.
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
from concurrent.futures import ProcessPoolExecutor
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
        def full_with(self, images, tokens, more):
            return images == COUNT

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


def make_weights(model: str, path: str) -> None:
    from revit_kernels import create_model
    from revit_kernels.models.checkpoints import save_checkpoint

    torch.manual_seed(0)
    save_checkpoint(create_model(model, num_classes=0), path)


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


def load_service(port: int, images: list[bytes], expected, requests: int, clients: int, queue, begin) -> None:
    """In a process of its own: `requests` from `clients` threads, each answer checked; the results go to the queue."""
    order = np.random.default_rng(2).integers(0, len(images), requests).tolist()
    bodies = {}
    for i in set(order):
        url = f"data:image/jpeg;base64,{base64.b64encode(images[i]).decode()}"
        bodies[i] = json.dumps({"input": url, "encoding_format": "base64", "model": "revit"}).encode()
    queue.put("ready")
    begin.get()
    lock, latencies, wrong, statuses = threading.Lock(), [], [], {}
    begun, spent = time.perf_counter(), time.process_time()

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
    queue.put((time.perf_counter() - begun, time.process_time() - spent, latencies, statuses, len(wrong)))


def processes() -> dict[str, tuple[float, int]]:
    """CPU seconds and peak MB of the service's processes: of the model by Ray's name for it, and of HTTP: this one."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            name = "model" if line.startswith(b"ray::ServeReplica:revit:model") else None
            name = "http" if entry.name == str(os.getpid()) else name
            if name:
                status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
                times = (entry / "stat").read_text().rpartition(")")[2].split()[11:13]
                seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
                found[name] = seconds, int(status["VmHWM"].split()[0]) >> 10
        except (OSError, ValueError):
            continue
    return found


def scrape(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return {name: float(v) for name, v in (li.rsplit(" ", 1) for li in text.splitlines() if not li.startswith("#"))}


def load_from_a_process(port: int, images, tokens, expected, requests: int, clients: int) -> dict:
    spawned = multiprocessing.get_context("fork")
    for count in (2 * clients, requests):  # the first warms up
        queue, begin = spawned.SimpleQueue(), spawned.SimpleQueue()
        process = spawned.Process(target=load_service, args=(port, images, expected, count, clients, queue, begin))
        process.start()
        queue.get()
        before, counted = processes(), scrape(port)
        begin.put("begin")
        seconds, client, latencies, statuses, wrong = queue.get()
        after, counts = processes(), scrape(port)
        process.join()
    p50, p99 = np.percentile(latencies, [50, 99])
    order = np.random.default_rng(2).integers(0, len(images), requests)
    total = sum(tokens[i] for i in order)
    cpu = {name: used - before[name][0] for name, (used, _) in after.items()} | {"clients": client}
    batches, busy = (counts[n] - counted[n] for n in ("revit_batches_total", "revit_busy_seconds_total"))
    found = {"requests": requests, "clients": clients, "seconds": seconds, "statuses": statuses, "wrong": wrong}
    found |= {"tokens_per_s": total / seconds, "p50_ms": 1000 * p50, "p99_ms": 1000 * p99}
    found |= {"images_per_batch": requests / batches, "model_busy_share": busy / seconds}
    found |= {"cpu_ms_per_request": {name: 1000 * used / requests for name, used in cpu.items()}}
    found |= {"peak_mb": {name: most for name, (_, most) in after.items()}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", choices=("packed", "padded"), help="this one alone, anew")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--padded-requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=18555)
    parser.add_argument("--output")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import ray
    from ray import serve

    from revit_kernels.serving.ray_serve import listening

    output = Path(args.output) if args.output else None
    result = json.loads(output.read_text()) if output and output.exists() else {}
    runs = {"packed": args.requests, "padded": args.padded_requests}
    wanted = [args.service] if args.service else [name for name in runs if name not in result]
    images = make_images()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        weights = f"{folder}/model.safetensors"
        other.submit(make_weights, args.model, weights).result()  # there: this process is the service's
        rate, features, tokens = other.submit(own_rate, weights, images, 10.0).result()
        ray.init(num_cpus=args.threads, include_dashboard=False, log_to_driver=False, object_store_memory=500 << 20)
        for name in wanted:
            arguments = {"model": weights, "name": "revit", "features": True, "device": "cpu", "cpus": args.threads}
            arguments |= {"workers": args.threads}
            if name == "padded":
                arguments |= {"batcher": padded_batcher()}
            expected = features if name == "packed" else None  # padding adds other positions
            with listening(arguments, port=args.port):
                run = load_from_a_process(args.port, images, tokens, expected, runs[name], args.clients)
            result[name] = run | {"share_of_the_model": run["tokens_per_s"] / rate, "model_tokens_per_s": [rate]}
            write(result, args, output)
        serve.shutdown()
        ray.shutdown()
        again = other.submit(own_rate, weights, images, 10.0).result()[0]  # machines drift
    for name in wanted:
        result[name]["model_tokens_per_s"] = rate, again
        result[name]["share_of_the_model"] = result[name]["tokens_per_s"] / max(rate, again)
    write(result, args, output)
    print(json.dumps(result, indent=1))


def write(result: dict, args, output: Path | None) -> None:
    result |= {"machine": machine(), "model": args.model, "threads_of_the_model_and_of_decoding": args.threads}
    if result.keys() >= {"packed", "padded"}:
        result["against_padded"] = result["packed"]["tokens_per_s"] / result["padded"]["tokens_per_s"]
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")


def machine() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].partition(":")[2].strip() if found else platform.machine()


if __name__ == "__main__":
    main()
