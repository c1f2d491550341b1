"""Streaming a data set of a million images: the memory it takes, and rows a second.

    python benchmarks/streaming.py [--rows 1000000] [--workers 2] [--output benchmarks/results]

Makes parquet files of tiny images (8x8 PNG, several files and row groups) in a temporary folder, and in a process of its own
goes through one epoch of them as training does: `batch_loader` with reading processes, a shuffle buffer, flips. Meanwhile the
memory of the process and all its children is looked at. Required: below 2 GB, as their resident sizes add up, which counts
what they share several times; the proportional size (PSS), which does not, is given too.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIMIT = 2 * 10**9  # bytes
ROWS_A_GROUP = 10_000
FILES = 8
DIFFERENT = 5_000  # images; making a million would take longer than reading them


def write_images(folder: Path, rows: int, files: int = FILES) -> int:
    """Parquet files of `rows` rows with an image and a label; their size in bytes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for array in rng.integers(0, 256, (DIFFERENT, 8, 8, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        images.append(file.getvalue())
    total = 0
    for index in range(files):
        count = rows // files + (index < rows % files)
        path = folder / f"{index:03}.parquet"
        schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "number": pa.int64()})
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, count, ROWS_A_GROUP):
                numbers = range(total + start, total + min(start + ROWS_A_GROUP, count))
                structs = [{"bytes": images[number % DIFFERENT], "path": None} for number in numbers]
                writer.write_table(pa.table({"image": structs, "number": list(numbers)}, schema=schema))
        total += count
    return sum(path.stat().st_size for path in folder.iterdir())


def go_through(folder: str, rows: int, workers: int, batch_size: int) -> None:
    """One epoch, in this process; prints what was found as JSON."""
    import torch

    from ddpm_pipeline.data import open_stream
    from ddpm_pipeline.data.options import TrainingDataOptions
    from ddpm_pipeline.training.batches import BatchPlan, batch_loader

    torch.set_num_threads(1)
    options = TrainingDataOptions(folder, resolution=8, streaming=True, dataloader_num_workers=workers)
    data = open_stream(options)
    peak = Peak()
    before = peak.look()
    plan = BatchPlan(seed=0, batch_size=batch_size, random_flip=True)
    batches = batch_loader(data, plan, None, range(rows // batch_size), options)
    began = time.monotonic()
    seen = sum(len(batch["pixels"]) for batch in batches)
    seconds = time.monotonic() - began
    peak.stop()
    state = batches.state_dict()
    found = {
        "rows": seen,
        "seconds": round(seconds, 1),
        "rows_per_second": round(seen / seconds),
        "rss_before_mb": before[0] // 10**6,
        "peak_rss_mb": peak.rss // 10**6,
        "peak_pss_mb": peak.pss // 10**6,
        "state_bytes": len(json.dumps(state)),
    }
    print("RESULT " + json.dumps(found))


class Peak:
    """The largest memory of this process and its children together, by looking every fifth of a second."""

    def __init__(self) -> None:
        self.rss = self.pss = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def look(self) -> tuple[int, int]:
        """(resident, proportional) bytes now."""
        import psutil

        rss = pss = 0
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            try:
                memory = process.memory_full_info()
            except psutil.Error:  # it has just ended
                continue
            rss, pss = rss + memory.rss, pss + memory.pss
        self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)
        return rss, pss

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.look()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def measure(rows: int, workers: int, batch_size: int = 128) -> dict:
    """Make the files, go through them in a fresh process, and say what it took."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), rows)
        command = [sys.executable, __file__, "--rows", str(rows), "--workers", str(workers), "--folder", folder]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--batch_size", str(batch_size)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {"rows_made": rows, "bytes": size, "workers": workers, "batch_size": batch_size} | json.loads(line[7:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2, help="reading processes")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--folder", help="the files are there already: go through them, and print the result")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.folder:
        go_through(args.folder, args.rows, args.workers, args.batch_size)
        return
    result = measure(args.rows, args.workers, args.batch_size)
    import datasets
    import torch

    from ddpm_pipeline.support.provenance import provenance

    result |= {
        "limit_mb": LIMIT // 10**6,
        "command": f"python benchmarks/streaming.py --rows {args.rows} --workers {args.workers}",
        **provenance(torch.device("cpu"), datasets),
        "cores": os.cpu_count(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "streaming.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["peak_rss_mb"] * 10**6 > LIMIT:
        sys.exit(f"error: it took {result['peak_rss_mb']} MB, and {LIMIT // 10**6} MB are allowed")


if __name__ == "__main__":
    main()
