"""`revit serve`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from contextlib import redirect_stdout

from revit_kernels.cli.arguments import add_batch_tokens, add_grids, add_policy, add_weights, count

EXAMPLES = """\
examples:
  revit serve
  revit serve revit.safetensors --assigner assigner.safetensors --budget 2x
  revit serve vit_small_patch14_dinov2 --checkpoint dinov2.safetensors --features --port 9000

  curl -s localhost:8000/v1/classify -H "content-type: image/jpeg" --data-binary @photo.jpg

  from openai import OpenAI
  OpenAI(base_url="http://localhost:8000/v1", api_key="-").embeddings.create(model="revit", input=["data:image/..."])

The page at / shows the model's answer for an image at each length. The service runs until it is interrupted, and then
finishes open requests.
"""


def add(commands):
    serve = commands.add_parser(
        "serve",
        help="answer over HTTP: classes, embeddings (OpenAI's interface), and a page",
        description="Serves a model over HTTP with Ray Serve. Images of all requests share packed batches, cut by a\n"
        "budget of tokens, first in, first out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "model", nargs="?", metavar="NAME_OR_FILE", help="as `revit infer --model` (default: the ReViT of the package)"
    )
    add_weights(serve, "NAME")
    serve.add_argument("--name", help="of the model in answers (default: revit, or NAME_OR_FILE)")
    serve.add_argument("--features", action="store_true", help="embeddings only: for a model without classes")
    serve.add_argument("--labels", metavar="FILE", help="class names")
    serve.add_argument("--top", type=count, metavar="K", default=5, help="classes of an answer (default: 5)")

    tokens = serve.add_argument_group("tokens")
    add_grids(tokens)
    add_batch_tokens(tokens, 8192)
    add_policy(serve.add_argument_group("lengths chosen by a policy (of a ReViT)"))

    service = serve.add_argument_group("service")
    service.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    service.add_argument("--port", type=count, default=8000, help="default: 8000")
    service.add_argument("--replicas", type=count, default=1, metavar="N", help="processes with the model (default: 1)")
    service.add_argument(
        "--threads", type=count, metavar="N", help="of each, on a CPU (default: the cores, shared out among them)"
    )
    service.add_argument("--workers", type=count, metavar="N", help="threads of each that decode (default: --threads)")
    service.add_argument("--key-file", metavar="FILE", help="requests must have the bearer token in this file")
    service.add_argument(
        "--fetch", metavar="HOST,...", default="", help="fetch images whose URL has one of these hosts (default: none)"
    )
    service.add_argument("--max-body", type=count, default=32, metavar="MB", help="of a request (default: 32)")
    service.add_argument("--max-pixels", type=count, default=50_000_000, help="of an image (default: 50,000,000)")
    service.add_argument("--max-images", type=count, default=64, help="of a request (default: 64)")
    service.add_argument("--timeout", type=count, default=60, metavar="SECONDS", help="for an answer (default: 60)")
    service.add_argument("--log-requests", action="store_true", help="a line of JSON to standard output for each")
    service.add_argument("--ray", metavar="ADDRESS", help="the model on this Ray cluster (default: start one here)")
    return serve


def application(args) -> dict:
    """The arguments of serving.ray_serve.app."""
    cores = len(os.sched_getaffinity(0))
    threads = args.threads or max(1, cores // args.replicas)
    names = ("model", "checkpoint", "pretrained", "untrained", "device", "dtype", "quantize", "features", "labels")
    names += ("top", "grids", "max_tokens", "fit", "policy", "assigner", "outcomes", "budget", "name", "batch_tokens")
    found = {name: getattr(args, name) for name in (*names, "replicas", "key_file")}
    found |= {"cpus": threads, "gpus": _gpus(args.device), "workers": args.workers or threads}
    found |= {"body": args.max_body << 20, "pixels": args.max_pixels, "images": args.max_images}
    return found | {"answering": float(args.timeout), "fetch": [host for host in args.fetch.split(",") if host]}


def _gpus(device: str | None) -> int:
    import torch

    return int(torch.cuda.is_available() and (device or "cuda").startswith("cuda"))


def run(args) -> int:
    """`revit serve`; returns the exit status once it is interrupted."""
    try:
        import ray

        from revit_kernels.serving.batcher import Batcher
        from revit_kernels.serving.prepare import Settings, prepare
        from revit_kernels.serving.ray_serve import listening, parts
        from revit_kernels.serving.ray_start import connect, keep
    except ImportError as error:
        raise ValueError(f"`revit serve` needs Ray Serve: pip install 'ray[data,serve]' pyarrow ({error})") from None
    arguments = application(args)
    parts(arguments)  # report wrong arguments here, not in a worker
    of_the_model = {name: arguments[name] for name in Settings.__dataclass_fields__ if name in arguments}
    Batcher(prepare(Settings(**of_the_model))).close()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ended, ready = threading.Event(), False

    def end(number, frame):
        """The first signal ends the start or the service; later ones do not disturb the shutdown."""
        if not ended.is_set() and not ready:
            ended.set()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        ended.set()

    def log(line: dict, file=sys.stdout) -> None:
        print(json.dumps(line), file=file, flush=True)

    handlers = {number: end for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.getsignal(number) for number in handlers}
    keep(handlers)
    try:
        with redirect_stdout(sys.stderr):  # what Ray says of its processes
            try:
                connect(args.ray)
                with listening(arguments, args.host, args.port, log if args.log_requests else None):
                    ready, where = True, f"http://{args.host}:{args.port}"
                    print(f"revit: serving at {where}, until interrupted", file=sys.stderr, flush=True)
                    while not ended.wait(1):  # a signal delivered to another thread does not wake this one
                        pass
            finally:
                ray.shutdown()
                keep(handlers)  # with the handlers that Ray leaves, a signal would end the process at once
    finally:
        keep(before)
    print("revit: served", file=sys.stderr)
    return 0
