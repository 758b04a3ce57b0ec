"""`revit infer --ray` over tar shards, against the same command in one process with as many threads.

    python benchmarks/bench_ray_data.py --output benchmarks/results/scale/ray_data.json

The rows are compared bit for bit, in a run in which an actor is killed too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image


def make_shards(folder: Path, shards: int, images: int) -> None:
    """JPEG files of 24 to 120 pixels a side."""
    rng = np.random.default_rng(0)
    for number in range(shards):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as archive:
            for i in range(images):
                width, height = rng.integers(24, 121, 2).tolist()
                coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(coarse).resize((width, height)).save(file, "JPEG")
                entry = tarfile.TarInfo(f"{number:03d}{i:05d}.jpg")
                entry.size = file.tell()
                file.seek(0)
                archive.addfile(entry, file)


def rows(path: Path):
    import pyarrow
    import pyarrow.parquet

    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    return pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files])


def actors() -> list[int]:
    """The processes of actors that descend from this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or b"ray::MapWorker" not in (entry / "cmdline").read_bytes():
                continue
            ancestor = int(entry.name)
            while ancestor > 1 and ancestor != os.getpid():
                ancestor = int((Path("/proc") / str(ancestor) / "stat").read_text().rpartition(")")[2].split()[1])
            if ancestor == os.getpid():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def infer(sources, output, *options) -> float:
    from revit_kernels import cli

    begun = time.perf_counter()
    status = cli.main(["infer", *map(str, sources), "--device", "cpu", "-o", str(output), *options])
    assert status == 0
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000, help="of a shard")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--output")
    args = parser.parse_args()
    import ray
    import torch

    torch.set_num_threads(args.actors)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder, args.shards, args.images)
        sources = sorted(folder.glob("*.tar"))
        infer(sources[:1], folder / "warm.parquet", "-q")
        result = {"images": args.shards * args.images, "actors": args.actors}
        result["one_process_s"] = infer(sources, folder / "one.parquet", "--workers", str(args.actors))
        ray.init(num_cpus=args.actors, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
        result["ray_s"] = infer(sources, f"{folder}/ray/", "--ray")
        written = sorted(p.stat().st_mtime for p in (folder / "ray").glob("part-*"))
        # Of the shards behind the first of each actor: without the time in which actors begin.
        steady = (len(written) - args.actors) * args.images / (written[-1] - written[args.actors - 1])
        result["ray_images_per_s_once_begun"] = steady
        one = rows(folder / "one.parquet")
        result["equal"] = rows(folder / "ray").equals(one)
        killed = []

        def kill():
            while len(list((folder / "killed").glob("part-*"))) < args.shards // 3:
                time.sleep(0.01)
            killed.extend(actors()[:1])
            os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        result["killed_s"] = infer(sources, f"{folder}/killed/", "--ray")
        thread.join()
        result |= {"killed_actors": len(killed), "equal_with_one_killed": rows(folder / "killed").equals(one)}
        result["rows_with_one_killed"] = rows(folder / "killed").num_rows
        ray.shutdown()
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
