"""Streams: every row once an epoch over processes and workers, resumed at any batch, bad rows left out, from every source."""

import json
import os
import signal
import subprocess
import sys

import datasets
import numpy as np
import psutil
import pytest
import torch

import streaming
from data_helpers import load as load_images
from data_helpers import numbered as png
from data_helpers import numbers, stream_of
from data_helpers import write_numbered as write
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.data import streamed
from ddpm_pipeline.evaluation import run
from ddpm_pipeline.support.errors import ConfigError, DataError
from ddpm_pipeline.training.batches import MicroBatches, batch_loader
from ddpm_pipeline.training.conditions import build_conditions
from ddpm_pipeline.training.loop import train
from ddpm_pipeline.training.options import TrainingConfig, parse_config
from helpers import ROOT, TINY_UNET, tiny_unet


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def config(**options) -> TrainingConfig:
    given = {"dataset": "x", "streaming": True, "resolution": 8, "max_train_steps": 1000, "batch_size": 8}
    return TrainingConfig(**{**given, "shuffle_buffer": 7, **options})


def loader(data, settings, rank=0, world_size=1, first=0, last=1000, state=None, conditions=None):
    return batch_loader(data, settings, "cpu", rank, world_size, conditions, first, last, state)


LAYOUTS = {
    "files that divide": [24, 24, 24, 24],
    "files that do not": [25, 31, 40],
    "one file": [96],
    "many files": [3] * 32,
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_two_processes_see_every_row_once_an_epoch(tmp_path, sizes, workers):
    data = stream_of(write(tmp_path / "x", sizes))
    settings = config(dataloader_num_workers=workers)
    epochs: list[list[int]] = [[], []]
    for rank in range(2):
        batches = loader(data, settings, rank, 2, last=24)
        for k, batch in enumerate(batches):
            assert batch["pixels"].shape == (4, 1, 8, 8)
            epochs[k // 12] += numbers(batch["pixels"])
    assert [sorted(epoch) for epoch in epochs] == [list(range(96))] * 2
    assert epochs[0] != epochs[1]
    ahead = [abs(here - there) for here, there in zip(epochs[0], epochs[0][1:], strict=False)]
    assert np.mean(ahead) > 2  # shuffled, if only a little by a buffer of 7 rows


@pytest.mark.parametrize(("workers", "resumed_at"), [(0, (1, 2, 11, 26)), (2, (7,))])
@pytest.mark.parametrize("sizes", [[25, 31, 40], [24, 24, 24, 24], [5]], ids=["uneven", "even", "tiny"])
def test_a_stream_goes_on_from_any_batch(tmp_path, sizes, workers, resumed_at):
    """With bad rows among them, in files of parquet and over the ends of blocks and epochs."""
    data = stream_of(write(tmp_path / "x", sizes, bad={2, 30, 31}), max_bad_fraction=0.5)
    settings = config(dataloader_num_workers=workers, random_flip=True)

    def taken(first, state):
        batches = loader(data, settings, 1, 2, first, 40, state)
        for batch in batches:
            values = {name: value.tolist() for name, value in batch.items()}
            yield values, json.loads(json.dumps(batches.state_dict())), batches.skipped

    whole = list(taken(0, None))
    assert len(whole) == 40 and any(skipped for _, _, skipped in whole)
    for first in resumed_at:
        assert list(taken(first, whole[first - 1][1])) == whole[first:]


def test_a_stream_of_a_folder_goes_on_too(tmp_path):
    for number in range(23):
        path = tmp_path / "x" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    data = stream_of(tmp_path / "x", cache_dir=str(tmp_path / "cache"), condition="class")
    settings = config(condition="class")
    conditions = build_conditions(settings, data)
    batches = loader(data, settings, last=20, conditions=conditions)
    taken = [(batch["indices"].tolist(), batch["condition"].tolist(), batches.state_dict()) for batch in batches]
    again = loader(data, settings, first=9, last=20, state=taken[8][2], conditions=conditions)
    assert [(b["indices"].tolist(), b["condition"].tolist(), again.state_dict()) for b in again] == taken[9:]


def test_what_is_drawn_does_not_depend_on_the_kind_of_data(tmp_path):
    folder = write(tmp_path / "x", [64])
    mapped = load_images(folder, cache_dir=str(tmp_path / "cache"))
    settings = config(random_flip=True, gradient_accumulation_steps=2)
    batches = loader(stream_of(folder), settings, 1, 2)
    for k in range(6):
        streamed, expected = next(batches), MicroBatches(mapped, settings, 1, 2)[k]
        for name in ("quantiles", "noise_seeds"):
            assert torch.equal(streamed[name], expected[name])
        assert streamed["pixels"].dtype == expected["pixels"].dtype and streamed["pixels"].is_contiguous()
        assert streamed["indices"].shape == (2,) and streamed["indices"].dtype == torch.int64
    flipped = loader(stream_of(folder), settings, 1, 2)
    plain = loader(stream_of(folder), config(gradient_accumulation_steps=2), 1, 2)
    mirrored = [
        torch.equal(a, b.flip(-1))
        for _ in range(8)
        for a, b in zip(next(flipped)["pixels"], next(plain)["pixels"], strict=True)
    ]
    assert 0 < sum(mirrored) < len(mirrored)


# Bad rows


def test_bad_rows_are_left_out_and_named_once_in_an_epoch(tmp_path):
    bad = {3, 50, 95}
    data = stream_of(write(tmp_path / "x", [48, 48], bad=bad), max_bad_fraction=0.05)
    settings = config(dataloader_num_workers=2)
    found, seen = [], []
    batches = loader(data, settings, last=24)
    for batch in batches:
        seen += numbers(batch["pixels"])
        found += batches.skipped
    assert not set(seen) & bad and set(seen) == set(range(96)) - bad
    assert {one["file"] for one in found} == {f"{number}.png" for number in bad}
    assert {(one["shard"], one["row"]) for one in found} == {(0, 3), (1, 2), (1, 47)}
    assert all("not an image" in one["reason"] for one in found)
    state = batches.state_dict()
    assert sum(part["bad"] for part in state["parts"]) == len(found)
    assert sum(part["seen"] for part in state["parts"]) == len(seen) + len(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows_end_the_run_after_a_thousand_or_at_the_end(tmp_path, workers, monkeypatch):
    settings = config(dataloader_num_workers=workers)
    data = stream_of(write(tmp_path / "x", [100], bad=range(0, 100, 10)))
    batches = loader(data, settings)
    message = r"of 'x' cannot be used, more than --max_bad_fraction 0.01 allows"
    with pytest.raises(DataError, match=message) as error:
        for taken, _ in enumerate(batches):
            assert taken < 20  # an epoch has 90 usable rows
    assert "row" in str(error.value) and ".png): cannot identify" in str(error.value)
    assert "Traceback" not in str(error.value)
    monkeypatch.setattr("batches.JUDGED_ROWS", 30)
    batches = loader(data, settings)
    with pytest.raises(DataError, match=r"of \d\d rows"):
        for taken, _ in enumerate(batches):
            assert taken < 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("rows", "message"), [(30, r"30 rows of 'x' cannot be used, and no row is left"), (0, "has no rows")]
)
def test_a_stream_of_nothing_usable_ends_the_run(tmp_path, rows, message, workers):
    data = stream_of(write(tmp_path / "x", [rows], bad=range(rows)), max_bad_fraction=0.9)
    message = message.replace("30", "[0-9]+") if workers else message
    with pytest.raises(DataError, match=message):
        next(loader(data, config(dataloader_num_workers=workers)))
    with pytest.raises(DataError, match=message.replace("[0-9]+", "30")):
        data.first(3)


def test_a_long_run_of_bad_rows_ends_the_run_before_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "JUDGED_ROWS", 20)
    data = stream_of(write(tmp_path / "x", [500], bad=range(500)))
    with pytest.raises(DataError, match="20 of 20 rows"):
        next(loader(data, config()))


def test_rows_without_what_the_condition_needs_are_left_out(tmp_path):
    texts = lambda row: None if row == 7 else "" if row == 8 else f"number {row}"  # noqa: E731
    folder = write(tmp_path / "x", [40, 40], text=texts, kind=lambda row: row % 3 - (row == 12))
    data = stream_of(folder, condition="text", text_column="text", max_bad_fraction=0.1)
    settings = config(condition="text", text_column="text", condition_dropout=0.0)
    conditions = build_conditions(settings, data)
    assert len(conditions.tokenizer) > 256 and conditions.captions.examples(3) == ["number 0", "number 1", "number 2"]
    batches = loader(data, settings, conditions=conditions, last=9)
    for batch in batches:
        assert batch["condition"] == ["" if n == 8 else f"number {n}" for n in numbers(batch["pixels"])]
    assert [one["reason"] for one in loader_skipped(data, settings, conditions)] == [
        "there is no caption in the column 'text'"
    ]
    assert data.columns == ["text", "kind"]
    with pytest.raises(DataError, match=r"how many classes .* ClassLabel"):
        stream_of(folder, condition="class", label_column="kind")
    assert stream_of(folder, label_column="kind").class_names is None  # and nobody asks
    with pytest.raises(ConfigError, match="no label column"):
        build_conditions(config(condition="class"), stream_of(folder, condition="class"))


def loader_skipped(data, settings, conditions):
    batches = loader(data, settings, conditions=conditions, last=10)
    list(batches)
    return batches.skipped


def test_what_cannot_be_streamed_is_named(tmp_path):
    folder = write(tmp_path / "x", [6])
    for options, message in [({}, "--resolution"), ({"resolution": 8}, "--max_train_steps")]:
        with pytest.raises(ConfigError, match=f"--streaming needs {message}: .* not known before"):
            TrainingConfig(dataset=folder, streaming=True, **options)
    with pytest.raises(ConfigError, match="--shuffle_buffer 0 must be at least 1"):
        config(shuffle_buffer=0)
    with pytest.raises(ConfigError, match=r"--max_bad_fraction 1\.0 must be at least 0 and below 1"):
        config(max_bad_fraction=1.0)
    assert parse_config(["--dataset", "x", "--streaming", "--resolution", "8", "--max_train_steps", "3"]).streaming


def test_a_file_that_breaks_on_the_way_ends_the_run_with_its_error(tmp_path):
    folder = write(tmp_path / "x", [200, 200], group=20)
    data = stream_of(folder)
    path = tmp_path / "x" / "001.parquet"
    content = bytearray(path.read_bytes())
    content[3000:9000] = bytes(6000)
    path.write_bytes(bytes(content))
    for workers in (0, 2):
        with pytest.raises(DataError, match="Cannot load the stream 'x': "):
            for _ in range(100):
                list(loader(data, config(dataloader_num_workers=workers), last=100))


def test_a_stream_goes_on_only_as_it_was_cut(tmp_path):
    data = stream_of(write(tmp_path / "x", [24, 24]))
    batches = loader(data, config(dataloader_num_workers=2), 0, 2)
    next(batches)
    state = batches.state_dict()
    batches.close()
    for changed, options, message in [
        ({"dataloader_num_workers": 4}, {}, "--dataloader_num_workers was 2 and is 4"),
        ({"dataloader_num_workers": 2}, {"world_size": 1}, "processes was 2 and is 1"),
        ({"dataloader_num_workers": 2}, {"world_size": 2, "rank": 1}, "rank was 0 and is 1"),
        ({"dataloader_num_workers": 2}, {"world_size": 2, "first": 5}, "forward passes was 1 and is 5"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loader(data, config(**changed), state=state, **{"first": 1, "world_size": 2, **options})
    with pytest.raises(ConfigError, match="does not say where in the stream it was"):
        loader(data, config(), first=3)


# Whole runs


def test_a_run_from_a_stream_leaves_a_model_a_card_and_the_list_of_what_it_left_out(tmp_path):
    folder = write(tmp_path / "numbers", [40, 40, 40], bad={7, 80}, text=lambda row: "odd" if row % 2 else "even")
    (tmp_path / "unet.json").write_text(json.dumps({
        **TINY_UNET, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "mid_block_type": None,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 4,
    }))  # fmt: skip
    options = {
        "dataset": folder, "streaming": True, "resolution": 8, "channels": 1, "max_train_steps": 16, "batch_size": 8,
        "shuffle_buffer": 16, "dataloader_num_workers": 2, "max_bad_fraction": 0.05, "num_train_timesteps": 20,
        "beta_end": 0.4, "condition": "text", "text_column": "text", "model": str(tmp_path / "unet.json"), "num_samples": 2,
        "preview_every": 0, "checkpoint_every": 0, "log_every": 4, "num_cpu_threads": 1, "mixed_precision": "no",
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    model = train(TrainingConfig(**options, output_dir=str(tmp_path / "model")))
    skipped = [json.loads(line) for line in (model / "skipped.jsonl").read_text().splitlines()]
    assert sorted(one["file"] for one in skipped) == ["7.png", "80.png"]
    metrics = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["skipped_rows"] == 2 and np.isfinite(metrics[-1]["loss"])
    card = (model / "README.md").read_text()
    assert "trained from scratch on a stream of `numbers`" in card and "--streaming True" in card
    assert not (tmp_path / "cache").exists()  # nothing is stored
    with pytest.raises(DataError, match=r"more than --max_bad_fraction 0\.001 allows"):
        train(TrainingConfig(**options | {"max_bad_fraction": 0.001}, output_dir=str(tmp_path / "none")))


@pytest.mark.filterwarnings("ignore::UserWarning")  # FID of so few images
def test_a_model_is_judged_by_the_first_images_of_a_stream(tmp_path, monkeypatch):
    folder = write(tmp_path / "numbers", [60, 60], bad={5})
    AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler(num_train_timesteps=8, beta_end=0.9)).save_pretrained(
        tmp_path / "model"
    )
    arguments = [
        "--model", str(tmp_path / "model"), "--dataset", folder, "--streaming", "--max_bad_fraction", "0.1",
        "--num_images", "24", "--num_likelihood_images", "6", "--features", "digits", "--cache_dir", str(tmp_path / "cache"),
        "--num_cpu_threads", "1",
    ]  # fmt: skip
    results = run.evaluate(run.parse(arguments))
    assert results["skipped_rows"] == 1 and results["quality"]["num_real"] == 24
    assert results["bits_per_dim"]["num_images"] == 6 and results["dataset"] == "numbers"
    monkeypatch.setattr(streamed, "image_pixels", None)  # the second time they are read from the cache
    again = run.evaluate(run.parse(arguments))
    assert again["quality"] == results["quality"] and again["skipped_rows"] == 1


def test_twenty_thousand_rows_take_no_more_memory_than_the_buffer(tmp_path):
    """The files have 4.4 MB; the buffers of two readers and what a process needs to read at all are in the bound."""
    result = streaming.measure(20_000, workers=2)
    assert result["rows"] == 20_000 // 128 * 128
    assert result["peak_pss_mb"] < result["rss_before_mb"] + 400
    assert result["state_bytes"] < 500


# Processes

WORKERS = """
import datasets, os, sys, time
from ddpm_pipeline.training.batches import batch_loader
from ddpm_pipeline.training.options import TrainingConfig
from ddpm_pipeline.data import DataOptions, open_data
datasets.disable_progress_bars()
for kind, end in [line.split() for line in sys.argv[2:]]:
    reader, writer = os.pipe()
    if os.fork():
        print(kind, end, *os.read(reader, 99).decode().split(), flush=True)
        continue
    folder = sys.argv[1]
    data = open_data(DataOptions(folder, resolution=8, streaming=kind == "stream", cache_dir=folder + "-cache"))
    config = TrainingConfig(
        streaming=kind == "stream", resolution=8, max_train_steps=10, batch_size=4, dataloader_num_workers=2
    )
    batches = batch_loader(data, config, "cpu", 0, 1, None, 0, 10**9)
    next(batches)
    children = open(f"/proc/self/task/{os.getpid()}/children").read()
    os.write(writer, f"{os.getpid()} {children}".encode())
    deadline = time.monotonic() + (1 if end == "end" else 60)
    while time.monotonic() < deadline:
        next(batches)
        time.sleep(0.05)
    sys.exit(0)
for _ in sys.argv[2:]:
    os.wait()
"""


def test_workers_end_with_their_process(tmp_path):
    """At its end, when it is interrupted, and when it is killed."""
    cases = ["stream end", "stream SIGINT", "stream SIGKILL", "map SIGKILL"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}/training", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKERS, write(tmp_path / "x", [40, 40]), *cases]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = []
    for case in cases:
        kind, end, main, *children = process.stdout.readline().split()
        assert f"{kind} {end}" == case and len(children) >= 2, process.stderr.read()
        workers += [psutil.Process(int(child)) for child in children]
        if end != "end":
            os.kill(int(main), getattr(signal, end))
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not psutil.wait_procs(workers, timeout=15)[1]
