"""What reading costs: its share of an update of the smallest model, and the memory that many tiles need.

    python benchmarks/data_reading.py --gigabytes 8 --output benchmarks/results/data_reading.json

Time: runs of the digits recipe, as it is and with each kind of random view; their logs say how long parts of an update take.
Memory: folders of 64x64 tiles with 13 bands of 16 bits, a thousand of them and as many as fit in half of --gigabytes, are each
cached, and batches are read from all over the cache by a process of its own. Its private memory is what it holds; pages of the
memory-mapped cache that it has touched are counted apart, since the system drops them as soon as it needs the room.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_pipeline.data.mapped import ImageData
from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.data.streamed import open_data
from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training import TrainingOptions, train
from ddpm_pipeline.training.batches import BatchPlan, MicroBatches

VIEWS = {
    "as stored": {},
    "--random_flip": {"random_flip": True},
    "--random_crop 0.8": {"random_crop": 0.8},
    "--random_resized_crop 0.8": {"random_resized_crop": 0.8},
    "--augment 0.12": {"augment": 0.12},
}
TILE, FEW = (64, 64, 13), 1000
PARTS = ("data", "forward", "backward", "optimizer")  # of an update


def share_of_update(options: TrainingOptions) -> dict[str, float]:
    """Seconds per update of reading and of everything, and the share, over the second half of a run's log."""
    lines = [json.loads(line) for line in (train(options) / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "data_seconds" in line][-5:]
    seconds = {part: sum(line[f"{part}_seconds"] for line in lines) / len(lines) for part in PARTS}
    total = sum(seconds.values())
    return {"reading_seconds": seconds["data"], "update_seconds": total, "share": seconds["data"] / total}


def write_tiles(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for start in range(0, count, FEW):
        part = folder / f"{start:07}"
        part.mkdir(parents=True)
        for number in range(start, min(start + FEW, count)):
            np.save(part / f"{number}.npy", random.integers(0, 2**16, TILE, np.uint16))


def tiles(folder: str, cache: str) -> ImageData:
    return open_data(TrainingDataOptions(folder, cache_dir=cache, random_crop=0.875, resolution=56))


def memory() -> dict[str, float]:
    """Resident megabytes of this process: its own, and pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"private_mb": "RssAnon", "file_pages_mb": "RssFile"}
    return {name: int(status[field].split()[0]) / 1000 for name, field in names.items()}


def read_tiles(folder: str, cache: str, batches: int) -> dict[str, Any]:
    """Memory before the data are opened and after so many batches of 64 tiles, each with another epoch's order."""
    before, data = memory(), tiles(folder, cache)
    plan = BatchPlan(0, 64, random_flip=True, window_share=0.875)
    read, began = MicroBatches(data, plan), time.perf_counter()
    for k in range(batches):
        read[k]
    seconds = (time.perf_counter() - began) / batches
    after = {name: value - before[name] for name, value in memory().items()}
    return {"tiles": len(data), "dtype": data.value_range.dtype, "seconds_per_batch": seconds, **after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8, help="of disk for tiles and their cache")
    parser.add_argument("--updates", type=int, default=500, help="of each timed run")
    parser.add_argument("--batches", type=int, default=500, help="that are read to measure memory")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_tiles(*arguments.read, arguments.batches)))
        return
    most = int(arguments.gigabytes * 1e9 / 2 / (np.prod(TILE) * 2))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        timed = {}
        for number, (name, options) in enumerate(VIEWS.items()):
            run = TrainingOptions(
                config="digits", cache_dir=f"{scratch}/cache", output_dir=f"{scratch}/{number}", resolution=8, preview_every=0,
                max_train_steps=arguments.updates, lr_warmup_steps=1, log_every=max(1, arguments.updates // 10),
                checkpoint_every=0, num_samples=1, sample_inference_steps=2, fit_noises=0, **options,
            )  # fmt: skip
            timed[name] = share_of_update(run)
        measured = []
        for count in sorted({FEW, max(FEW, most)}):
            folder, cache = f"{scratch}/tiles-{count}", f"{scratch}/cache-{count}"
            write_tiles(Path(folder), count)
            tiles(folder, cache)
            command = [sys.executable, __file__, "--batches", str(arguments.batches), "--read", folder, cache]
            measured.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    report = {
        "command": f"python benchmarks/data_reading.py {' '.join(sys.argv[1:])}",
        **provenance(torch.device("cpu")),
        "time": timed,
        "memory": measured,
    }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
