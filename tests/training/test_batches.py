"""Micro-batches: the same global batch however it is divided, from preprocessed data and from streams."""

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

from data_helpers import load, numbered, numbers, stream_of, write_numbered
from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.data import load_images
from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.ranges_alpha_ddpm import ValueRange
from ddpm_pipeline.support.errors import ConfigError, DataError
from ddpm_pipeline.training import TrainingOptions, batches
from ddpm_pipeline.training.batches import BatchPlan, MicroBatches, batch_loader, lost_workers
from ddpm_pipeline.training.conditions import Condition, build_condition
from ddpm_pipeline.training.loop import losses_of
from ddpm_pipeline.training.options import ConditionOptions
from training_helpers import digits, whole_batch


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize(("sampling", "crop"), [("uniform", "random_crop"), ("stratified", "random_resized_crop")])
def test_a_batch_is_the_same_however_it_is_divided(world_size, accumulation, sampling, crop, tmp_path):
    data = load_images(TrainingDataOptions(resolution=6, cache_dir=str(tmp_path), **{crop: 0.75}))
    common = {"random_flip": True, "timestep_sampling": sampling, "window_share": 0.75, "augment": 0.5}
    whole = MicroBatches(data, BatchPlan(0, 16, **common))[5]
    parts = [
        MicroBatches(data, BatchPlan(0, 16, accumulation, rank, world_size, **common))[5 * accumulation + index]
        for index in range(accumulation)
        for rank in range(world_size)
    ]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


def test_half_of_the_images_are_mirrored(tmp_path):
    data = digits(tmp_path)
    plain, flipped = (MicroBatches(data, BatchPlan(0, 400, random_flip=flip))[2]["pixels"] for flip in (False, True))
    mirrored = [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert 160 < sum(mirrored) < 240
    assert all(torch.equal(a, b) or flip for a, b, flip in zip(flipped, plain, mirrored, strict=True))


@pytest.mark.parametrize("crop", ["random_crop", "random_resized_crop"])
def test_windows_of_training_and_of_evaluation(crop, tmp_path):
    """At random places in training, each time others; the centre, or the whole image resized, in evaluation."""
    options = {"resolution": 6, "cache_dir": str(tmp_path)}
    data, stored = load_images(TrainingDataOptions(**options, **{crop: 0.75})), digits(tmp_path)
    assert (data.size, data.stored_size) == ((6, 6), (8, 8)) and data.fingerprint != stored.fingerprint
    plain, whole = data.pixels(range(50)), stored.pixels(range(50))
    if crop == "random_crop":
        assert torch.equal(plain, whole[:, :, 1:7, 1:7])
    else:
        small = load_images(TrainingDataOptions(**options)).pixels(range(50)).float()
        assert (plain - small).abs().mean() < 1.5  # Pillow, from the same pixels, rounds and clips once more
    seen = [MicroBatches(data, BatchPlan(0, 256, window_share=0.75))[k] for k in range(8)]  # in turn, over an epoch
    pictures, rows = torch.cat([batch["pixels"] for batch in seen]), torch.cat([batch["indices"] for batch in seen])
    for picture, row in zip(pictures[:20], rows[:20].tolist(), strict=True):
        places = [torch.equal(picture, stored.pixels([row])[0, :, y : y + 6, x : x + 6]) for y in range(3) for x in range(3)]
        assert any(places) == (crop == "random_crop")
    assert not torch.equal(pictures[:256], data.pixels(rows[:256]))


def test_the_loss_is_the_definition(tmp_path):
    """Against x_t and the squared error written out by hand from the scheduler's public tables."""
    batch, scheduler = MicroBatches(digits(tmp_path), BatchPlan(0, 4))[0], AlphaDDPMScheduler()
    timesteps = (batch["quantiles"] * len(scheduler)).long()
    seen = {}

    class Network(torch.nn.Module):
        def forward(self, noisy, timesteps):
            seen.update(noisy=noisy, timesteps=timesteps)
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    options = TrainingOptions(objective="simple")
    loss = losses_of(Network(), batch, timesteps, scheduler, Condition(), ValueRange(), options).mean()
    x_0 = batch["pixels"].double() / 127.5 - 1
    alpha = scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noise = (seen["noisy"].double() - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert abs(noise.mean()) < 0.3 and noise.std() == pytest.approx(1, abs=0.15)


# ---- streams ----------------------------------------------------------------------------------------


def loader(data, rank=0, world_size=1, micro_batches=range(1000), state=None, condition=None, workers=0, **plan):
    """Of batches of 8 images, shuffled in blocks of 7."""
    options = TrainingDataOptions(shuffle_buffer=7, dataloader_num_workers=workers)
    divided = BatchPlan(0, 8, rank=rank, world_size=world_size, **plan)
    return batch_loader(data, divided, condition, micro_batches, options, state=state)


@pytest.mark.parametrize(("sizes", "workers"), [([24, 24, 24, 24], 2), ([25, 31, 40], 2), ([96], 0), ([3] * 32, 2)])
def test_two_processes_see_every_row_once_an_epoch(tmp_path, sizes, workers):
    """Files that divide evenly among the readers, files that do not, one, and many."""
    data = stream_of(write_numbered(tmp_path / "x", sizes))
    epochs: list[list[int]] = [[], []]
    for rank in range(2):
        for k, batch in enumerate(loader(data, rank, 2, range(24), workers=workers)):
            assert batch["pixels"].shape == (4, 1, 8, 8)
            epochs[k // 12] += numbers(batch["pixels"])
    assert [sorted(epoch) for epoch in epochs] == [list(range(96))] * 2
    assert epochs[0] != epochs[1]
    ahead = [abs(here - there) for here, there in zip(epochs[0], epochs[0][1:], strict=False)]
    assert np.mean(ahead) > 2  # shuffled, if only a little by a buffer of 7 rows


@pytest.mark.parametrize(
    ("sizes", "workers", "resumed_at"), [([25, 31, 40], 0, (1, 11, 26)), ([24] * 4, 2, (7,)), ([5], 0, (2,))]
)
def test_a_stream_resumes_at_any_batch(tmp_path, sizes, workers, resumed_at):
    """With bad rows among them, in files of parquet and over the ends of blocks and epochs."""
    data = stream_of(write_numbered(tmp_path / "x", sizes, bad={2, 30, 31}), max_bad_fraction=0.5)

    def taken(first, state):
        batches = loader(data, 1, 2, range(first, 40), state, workers=workers, random_flip=True)
        for batch in batches:
            values = {name: value.tolist() for name, value in batch.items()}
            yield values, json.loads(json.dumps(batches.state_dict())), batches.take_skipped()

    whole = list(taken(0, None))
    assert len(whole) == 40 and any(skipped for _, _, skipped in whole)
    for first in resumed_at:
        assert list(taken(first, whole[first - 1][1])) == whole[first:]


def test_a_stream_of_a_folder_with_classes_resumes_too(tmp_path):
    for number in range(23):
        path = tmp_path / "x" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbered(number))
    data = stream_of(tmp_path / "x", cache_dir=str(tmp_path / "cache"), condition="class")
    condition = build_condition(ConditionOptions("class"), data)
    batches = loader(data, micro_batches=range(20), condition=condition)
    taken = [(batch["indices"].tolist(), batch["condition"].tolist(), batches.state_dict()) for batch in batches]
    again = loader(data, micro_batches=range(9, 20), state=taken[8][2], condition=condition)
    assert [(b["indices"].tolist(), b["condition"].tolist(), again.state_dict()) for b in again] == taken[9:]


def test_what_is_drawn_does_not_depend_on_the_kind_of_data(tmp_path):
    folder = write_numbered(tmp_path / "x", [64])
    mapped = load(folder, cache_dir=str(tmp_path / "cache"))
    options = {"accumulation_steps": 2, "random_flip": True}
    batches, plain = loader(stream_of(folder), 1, 2, **options), loader(stream_of(folder), 1, 2, accumulation_steps=2)
    plan = BatchPlan(0, 8, rank=1, world_size=2, **options)
    for k in range(6):
        streamed, expected, unflipped = next(batches), MicroBatches(mapped, plan)[k], next(plain)
        for name in ("quantiles", "noise_seeds"):
            assert torch.equal(streamed[name], expected[name])
        assert streamed["pixels"].dtype == expected["pixels"].dtype and streamed["pixels"].is_contiguous()
        assert streamed["indices"].shape == (2,) and streamed["indices"].dtype == torch.int64
        flips = plan.views(plan.slice_of(k), mapped.view).flips[:, 1]
        for pixels, before, flip in zip(streamed["pixels"], unflipped["pixels"], flips, strict=True):
            assert torch.equal(pixels, before.flip(-1) if flip else before)


def test_a_stream_is_seen_through_the_windows_of_mapped_data(tmp_path):
    folder, crop = write_numbered(tmp_path / "x", [64], group=64), {"resolution": 6, "random_crop": 0.75}
    mapped, streamed = load(folder, cache_dir=str(tmp_path / "cache"), **crop), stream_of(folder, **crop)
    plan = {"random_flip": True, "window_share": 0.75, "augment": 0.5}
    for k, batch in enumerate(loader(streamed, micro_batches=range(3), **plan)):
        views = BatchPlan(0, 8, **plan).views(whole_batch(k, 8), mapped.view)
        assert torch.equal(batch["pixels"], mapped.pixels(batch["indices"], views))
        assert batch["augmentation"].shape == (8, 9)
    assert streamed.first(9).equal(mapped.pixels(range(9)))


def test_bad_rows_are_skipped_and_named_once_in_an_epoch(tmp_path):
    bad = {3, 50, 95}
    data = stream_of(write_numbered(tmp_path / "x", [48, 48], bad=bad), max_bad_fraction=0.05)
    found, seen = [], []
    batches = loader(data, micro_batches=range(24), workers=2)
    for batch in batches:
        seen += numbers(batch["pixels"])
        found += batches.take_skipped()
    assert not set(seen) & bad and set(seen) == set(range(96)) - bad
    assert {one["file"] for one in found} == {f"{number}.png" for number in bad}
    assert {(one["shard"], one["row"]) for one in found} == {(0, 3), (1, 2), (1, 47)}
    state = batches.state_dict()
    assert sum(part["bad"] for part in state["parts"]) == len(found)
    assert sum(part["seen"] for part in state["parts"]) == len(seen) + len(found)


def test_too_many_bad_rows_end_the_run_after_a_thousand_or_at_the_end(tmp_path, monkeypatch):
    data = stream_of(write_numbered(tmp_path / "x", [100], bad=range(0, 100, 10)))
    with pytest.raises(DataError, match=r"max_bad_fraction 0.01") as error:
        for taken, _ in enumerate(loader(data, workers=2)):
            assert taken < 20  # an epoch has 90 usable rows
    assert ".png)" in str(error.value) and "Traceback" not in str(error.value)
    monkeypatch.setattr(batches, "JUDGED_ROWS", 30)
    with pytest.raises(DataError, match=r"of \d\d rows"):
        for taken, _ in enumerate(loader(data, workers=2)):
            assert taken < 5


def test_a_stream_of_nothing_usable_ends_the_run(tmp_path):
    for name, rows, message in [("bad", 30, "no row is left"), ("empty", 0, "has no rows")]:
        with pytest.raises(DataError, match=message):
            next(loader(stream_of(write_numbered(tmp_path / name, [rows], bad=range(rows)), max_bad_fraction=0.9), workers=2))


def test_rows_without_what_the_condition_needs_are_skipped(tmp_path):
    texts = lambda row: None if row == 7 else "" if row == 8 else f"number {row}"  # noqa: E731
    folder = write_numbered(tmp_path / "x", [40, 40], text=texts, kind=lambda row: row % 3)
    data = stream_of(folder, condition="text", text_column="text", max_bad_fraction=0.1)
    condition = build_condition(ConditionOptions("text", text_column="text", condition_dropout=0.0), data)
    assert len(condition.tokenizer) > 256 and condition.captions.examples(3) == ["number 0", "number 1", "number 2"]
    batches = loader(data, condition=condition, micro_batches=range(10))
    for batch in batches:
        assert batch["condition"] == ["" if n == 8 else f"number {n}" for n in numbers(batch["pixels"])]
    assert [(one["row"], "caption" in one["reason"]) for one in batches.take_skipped()] == [(7, True)]
    with pytest.raises(ConfigError, match="label_column"):
        build_condition(ConditionOptions("class"), stream_of(folder, condition="class"))


def test_a_file_that_breaks_on_the_way_ends_the_run_with_its_error(tmp_path):
    data = stream_of(write_numbered(tmp_path / "x", [200, 200], group=20))
    path = tmp_path / "x" / "001.parquet"
    content = bytearray(path.read_bytes())
    content[3000:9000] = bytes(6000)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="stream 'x'"):
        list(loader(data, micro_batches=range(1000), workers=2))


def test_a_stream_resumes_only_as_it_was_divided(tmp_path):
    data = stream_of(write_numbered(tmp_path / "x", [24, 24]))
    batches = loader(data, 0, 2, workers=2)
    next(batches)
    state = batches.state_dict()
    batches.close()
    for changed, message in [
        ({"workers": 4}, "--dataloader_num_workers was 2 and is 4"),
        ({"world_size": 1}, "processes was 2 and is 1"),
        ({"rank": 1}, "rank was 0 and is 1"),
        ({"micro_batches": range(5, 9)}, "micro-batches was 1 and is 5"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loader(data, state=state, **{"world_size": 2, "workers": 2, "micro_batches": range(1, 9)} | changed)
    with pytest.raises(ConfigError, match="position"):
        loader(data, micro_batches=range(3, 9))


# ---- processes --------------------------------------------------------------------------------------

WORKERS = """
import os, signal, sys, time
import datasets
from torch.utils.data._utils import worker
from ddpm_pipeline.data import DataOptions, load_images, open_stream
from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.training.batches import BatchPlan, batch_loader
datasets.disable_progress_bars()
options = DataOptions(sys.argv[1], resolution=8, cache_dir=sys.argv[1] + "-cache")
opened = {"stream": open_stream(options), "map": load_images(options)}
worker.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds, of 5, between looks whether the parent process is alive
readers = []
for kind, end in [line.split() for line in sys.argv[2:]]:
    reader, writer = os.pipe()
    if os.fork():
        readers.append((kind, end, reader))
        continue
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in the background
    batches = batch_loader(opened[kind], BatchPlan(0, 4), None, range(10**9), TrainingDataOptions(dataloader_num_workers=2))
    next(batches)
    children = open(f"/proc/self/task/{os.getpid()}/children").read()
    os.write(writer, f"{os.getpid()} {children}".encode())
    deadline = time.monotonic() + (0.2 if end == "end" else 60)
    while time.monotonic() < deadline:
        next(batches)
        time.sleep(0.05)
    sys.exit(0)
for kind, end, reader in readers:
    print(kind, end, *os.read(reader, 99).decode().split(), flush=True)
for _ in readers:
    os.wait()
"""


def test_workers_end_with_their_process(tmp_path):
    """At its end, when it is interrupted, and when it is killed."""
    cases = ["stream end", "stream SIGINT", "stream SIGKILL", "map SIGKILL"]
    command = [sys.executable, "-c", WORKERS, write_numbered(tmp_path / "x", [40, 40]), *cases]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = []
    for case in cases:
        kind, end, main, *children = process.stdout.readline().split()
        assert f"{kind} {end}" == case and len(children) >= 2, process.stderr.read()
        workers += [psutil.Process(int(child)) for child in children]
        if end != "end":
            os.kill(int(main), getattr(signal, end))
    process.communicate(timeout=60)
    assert process.returncode == 0
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch raises within any code
@pytest.mark.parametrize("kind", ["stream", "map", "connection"])
def test_a_worker_that_is_killed_is_an_error_of_the_data(tmp_path, kind, monkeypatch):
    """However it shows first: by torch's signal handler or, where that comes later, by the broken connection."""
    options = {"resolution": 8, "cache_dir": str(tmp_path / "cache")}
    folder = write_numbered(tmp_path / "x", [40, 40])
    data = stream_of(folder, **options) if kind == "stream" else load(folder, **options)
    prepared = batch_loader(data, BatchPlan(0, 4), None, range(10**9), TrainingDataOptions(dataloader_num_workers=2))
    next(prepared)
    worker = prepared._batches._workers[0]
    with pytest.raises(DataError, match="--resume latest"), lost_workers():
        if kind == "connection":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            monkeypatch.setattr(type(prepared._batches), "_next_data", lambda self: os.read(-1, 1))
        worker.kill()
        for _ in range(500):
            next(prepared)
    prepared.close()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    with pytest.raises(RuntimeError, match="another"), lost_workers():
        raise RuntimeError("another")
