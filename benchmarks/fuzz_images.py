"""Damaged image files: none may crash, hang or fill the memory; each ends in pixels or in `BadImage`.

    python benchmarks/fuzz_images.py [--files 10000] [--seed 0] [--output benchmarks/results]

Files of six formats and several modes are mutated from a fixed seed: flipped bits, truncations, inserted and removed bytes,
edits near the beginning (where sizes stand), sizes that are absurd, nothing at all. Each goes through `image_shape` and
`image_pixels` in a process that is watched: one that takes more than 10 seconds ends it with a traceback. Then all go
through `load_images` as a data set. The worst time and the growth of the process's memory are measured. Required: no crash,
no hang, below 1.5 GB (what the largest image that is accepted takes, 8192x8192).
"""

import argparse
import faulthandler
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ddpm_pipeline.data.images import BadImage, Form, image_pixels, image_shape
from ddpm_pipeline.support.provenance import provenance

SECONDS = 10  # that one file may take
LIMIT = 1.5e9  # bytes of growth
RESOLUTION, CHANNELS = 16, 3


def peak_kib() -> int:
    """The largest resident size of this process. Of Linux's, for getrusage's is at least that of the process which began it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def originals() -> list[tuple[str, bytes]]:
    """(format, bytes) of sound files."""
    rng = np.random.default_rng(1)
    colour = Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8))
    grey, alpha, palette = colour.convert("L"), colour.convert("RGBA"), colour.quantize(64)
    deep = Image.fromarray(rng.integers(0, 65536, (48, 40), dtype=np.uint16))
    smooth = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (200, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [grey.rotate(90), grey], "duration": 40}
    made = [
        ("PNG", colour, {}), ("PNG", palette, {"transparency": 3}), ("PNG", alpha, {}), ("PNG", deep, {}),
        ("PNG", grey, {"compress_level": 0}), ("PNG", smooth, frames),
        ("JPEG", colour, {"exif": exif}), ("JPEG", grey, {"progressive": True}), ("JPEG", colour.convert("CMYK"), {}),
        ("JPEG", smooth, {"quality": 95}),
        ("GIF", palette, {"transparency": 1}), ("GIF", grey, frames), ("GIF", palette, {"interlace": True}),
        ("BMP", colour, {}), ("BMP", palette, {}), ("BMP", grey, {}),
        ("TIFF", colour, {}), ("TIFF", deep, {}), ("TIFF", colour, {"compression": "tiff_lzw"}),
        ("TIFF", colour, {"compression": "jpeg"}), ("TIFF", grey, {"compression": "tiff_adobe_deflate", **frames}),
        ("WEBP", colour, {}), ("WEBP", alpha, {"lossless": True}), ("WEBP", alpha, frames),
    ]  # fmt: skip
    found = []
    for format_, image, options in made:
        file = io.BytesIO()
        image.save(file, format_, **options)
        found.append((format_, file.getvalue()))
    return found


def mutate(original: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """(kind of the mutation, the file)."""
    data = bytearray(original)
    kind = ("bits", "truncated", "inserted", "removed", "header", "sizes", "several", "empty")[
        rng.choice(8, p=[0.25, 0.15, 0.12, 0.1, 0.15, 0.12, 0.1, 0.01])
    ]
    if kind == "empty":
        return kind, b""
    if kind in ("bits", "several"):
        for at in rng.integers(0, len(data), rng.integers(1, 20)):
            data[at] ^= 1 << int(rng.integers(8))
    if kind in ("header", "several"):
        for at in rng.integers(0, min(len(data), 120), rng.integers(1, 6)):
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.integers(256)])
    if kind == "sizes":  # a run of bytes of which sizes, counts and offsets are made
        width, at = int(rng.choice([2, 3, 4])), int(rng.integers(0, min(len(data), 200)))
        order = rng.choice(["little", "big"])
        largest = 256**width - 1
        value = min(int(rng.choice([0, 1, 4096, 8192, 16383, 65535, 2**24, largest, rng.integers(largest)])), largest)
        data[at : at + width] = value.to_bytes(width, order)
    if kind in ("inserted", "several"):
        at = int(rng.integers(0, len(data)))
        data[at:at] = rng.integers(0, 256, rng.integers(1, 300), dtype=np.uint8).tobytes()
    if kind == "removed":
        at = int(rng.integers(0, len(data)))
        del data[at : at + int(rng.integers(1, 100))]
    if kind == "truncated" or (kind == "several" and rng.random() < 0.5):
        del data[int(rng.integers(0, len(data))) :]
    return kind, bytes(data)


def mutated_files(count: int, seed: int) -> list[tuple[str, str, bytes]]:
    """(format, mutation, bytes); the first n are the same for every count >= n."""
    sound = originals()
    files = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        format_, data = sound[index % len(sound)]
        files.append((format_, *mutate(data, rng)))
    return files


def look_at(data: bytes) -> str | None:
    """None if the file became pixels, else why it is bad. Any other exception is a failure of ours."""
    try:
        width, height, channels, *_ = image_shape(data, "bytes")
        assert width > 0 and height > 0 and channels in (1, 3)
    except BadImage:
        pass
    try:
        pixels = image_pixels(data, "bytes", Form((RESOLUTION, RESOLUTION), CHANNELS))
    except BadImage as error:
        assert str(error)
        return str(error)
    assert pixels.shape == (RESOLUTION, RESOLUTION, CHANNELS) and pixels.dtype == np.uint8
    return None


def fuzz(count: int, seed: int) -> dict:
    """All files through the functions, in this process; ends it where one takes more than SECONDS."""
    warnings.simplefilter("ignore")  # PIL's of damaged metadata
    files = mutated_files(count, seed)
    for _, data in originals():
        assert look_at(data) is None
    before = peak_kib()
    slowest, refused, by_format, by_mutation = 0.0, 0, Counter(), Counter()
    good = []
    for format_, mutation, data in files:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        began = time.process_time()  # not of the clock, for the machine may be busy
        reason = look_at(data)
        slowest = max(slowest, time.process_time() - began)
        faulthandler.cancel_dump_traceback_later()
        good.append(reason is None)
        if reason is not None:
            refused += 1
            by_format[format_] += 1
            by_mutation[mutation] += 1
    grown = peak_kib() - before
    return {
        "files": len(files),
        "seed": seed,
        "pixels": len(files) - refused,
        "refused": refused,
        "refused_by_format": dict(sorted(by_format.items())),
        "refused_by_mutation": dict(sorted(by_mutation.items())),
        "slowest_cpu_seconds": round(slowest, 2),
        "grown_mb": grown // 1024,
        "_good": good,
    }


def through_load_images(count: int, seed: int, good: list[bool]) -> dict:
    """All files as a data set: exactly those that became pixels are left."""
    import datasets

    from ddpm_pipeline.data import DataOptions, load_images

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        structs = [{"bytes": data, "path": None} for _, _, data in mutated_files(count, seed)]
        column = pa.array(structs, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"image": column}), f"{folder}/x.parquet", row_group_size=500)
        before = peak_kib()
        options = DataOptions(
            f"{folder}/x.parquet", resolution=RESOLUTION, channels=CHANNELS, max_bad_fraction=0.99, cache_dir=folder
        )
        data = load_images(options)
        grown = peak_kib() - before
        assert data.rows_of(range(len(data))).tolist() == np.flatnonzero(good).tolist()
        assert [one["row"] for one in data.skipped] == np.flatnonzero(~np.array(good)).tolist()
        return {"images": len(data), "skipped": len(data.skipped), "grown_mb": grown // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", action="store_true", help="do the work, and print the result")
    args = parser.parse_args()
    if args.child:
        began = time.monotonic()
        result = fuzz(args.files, args.seed)
        result["load_images"] = through_load_images(args.files, args.seed, result.pop("_good"))
        print("RESULT " + json.dumps(result | {"seconds": round(time.monotonic() - began, 1)}))
        return
    command = [sys.executable, __file__, "--files", str(args.files), "--seed", str(args.seed), "--child"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:  # a crash gives a signal's number, a hang a traceback
        sys.exit(f"error: the process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line[7:]) | {
        "limit_mb": round(LIMIT / 1e6),
        "limit_seconds": SECONDS,
        "command": f"python benchmarks/fuzz_images.py --files {args.files} --seed {args.seed}",
        **provenance(torch.device("cpu"), PIL, np),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "fuzz_images.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["grown_mb"] * 2**20 > LIMIT:
        sys.exit(f"error: the memory grew by {result['grown_mb']} MB, and {LIMIT / 1e6:.0f} MB are allowed")


if __name__ == "__main__":
    main()
