"""What a run survives: being killed or stopped, damaged checkpoints, a full disk, numbers that are not finite."""

import contextlib
import errno
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState, debug_launcher
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.multiprocessing import ProcessExitedException

from ddpm_pipeline.support.errors import STOPPED_STATUS, CheckpointError, ConfigError, NumericalError, Stopped
from ddpm_pipeline.training import TrainingOptions, checkpoints, loop, train
from ddpm_pipeline.training.checkpoints import damage_of, find_checkpoint, list_checkpoints
from ddpm_pipeline.training.state import MAX_IN_A_ROW, Updater
from ddpm_pipeline.training.stop import ONE_REQUEST, StopRequest
from helpers import ROOT, run_command
from training_helpers import metrics, quick_options


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    return quick_options(tmp_path_factory.mktemp("options"), checkpoint_every=2, checkpoints_total_limit=3)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory) -> Path:
    return train(TrainingOptions(**options, output_dir=str(tmp_path_factory.mktemp("run") / "model")))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "model"))


def resume(options, folder: Path, **changed) -> Path:
    return train(TrainingOptions(**{**options, "output_dir": str(folder), "resume": "latest", **changed}))


def end_state(folder: Path) -> list[bytes]:
    last = list_checkpoints(folder)[-1]
    names = ("model.safetensors", "ema.safetensors", "optimizer.bin", "parts.pt", "run_state.json")
    return [(last / name).read_bytes() for name in names] + [(folder / "samples.png").read_bytes()]


# ---- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_runs_that_are_killed_end_in_the_same_bytes(kills, tmp_path):
    """With SIGKILL, at random moments and in the middle of a checkpoint: a stream with workers, two processes, captions."""
    benchmark = runpy.run_path(str(ROOT / "benchmarks/kill_and_resume.py"))
    if kills < 10:
        short = {"max_train_steps": 9, "preview_every": 4, "preview_images": 2, "preview_inference_steps": 2}
        benchmark["COMMON"].update(short, num_train_timesteps=10, beta_end=0.6, num_samples=1, fit_noises=0)
    kinds = ["stream, workers"] if kills < 10 else ["two processes, stream", "captions, workers"]
    AcceleratorState._reset_state(True)  # which its forks would have, of one process
    report = benchmark["run"](kills, kinds, 0, 2, tmp_path)
    assert report["kills"] >= kills and report["runs_that_match"] == report["runs"] >= 1, report


def test_a_checkpoint_is_listed_with_its_hashes_and_older_ones_go(finished):
    checkpoints = list_checkpoints(finished)
    assert [path.name for path in checkpoints] == ["step-00000008", "step-00000010", "step-00000012"]
    assert [path.name for path in (finished / "checkpoints").glob(".*")] == []
    for checkpoint in checkpoints:
        assert damage_of(checkpoint) is None
        listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
        files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
        assert set(listed) == files - {"manifest.json"}
        assert torch.load(checkpoint / "optimizer.bin", weights_only=True).keys() == {"state", "param_groups"}


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda folder: os.truncate(folder / "optimizer.bin", 100), "optimizer.bin has 100 bytes instead of"),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors has changed since it was written"),
        (lambda folder: (folder / "manifest.json").unlink(), "its manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": '), "its manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "lists no run_state.json"),
    ],
)
def test_latest_passes_over_a_damaged_checkpoint_and_says_why(damage, told, copied, options, finished, caplog):
    damage(copied / "checkpoints/step-00000012")
    resolved = TrainingOptions(config=copied / "training_config.yaml", output_dir=str(copied), resume="latest")
    identity = json.loads((finished / "checkpoints/step-00000012/identity.json").read_text())
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(copied, resolved, Accelerator(cpu=True), lambda: identity)
    assert found == copied / "checkpoints/step-00000010"
    assert "passing over the checkpoint step-00000012: " in caplog.text and told in caplog.text


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_done_anew(copied, options, finished):
    flip_a_bit(copied / "checkpoints/step-00000012/model.safetensors")
    resume(options, copied)
    assert end_state(copied) == end_state(finished)
    assert [line["step"] for line in metrics(copied)] == list(range(1, 13))


def test_no_whole_checkpoint_is_an_error_and_no_new_start(copied, options):
    for checkpoint in list_checkpoints(copied):
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"none of the 3 checkpoints .* is whole .*model.safetensors is missing.*--overwrite"):
        resume(options, copied)
    with pytest.raises(ConfigError, match=r"step-00000010 is damaged: model.safetensors is missing"):
        resume(options, copied, resume=str(copied / "checkpoints/step-00000010"))


def test_changed_options_are_named(copied, options):
    with pytest.raises(ConfigError, match=r"--learning_rate was 0.001 and is 0.5"):
        resume(options, copied, learning_rate=0.5)
    with pytest.raises(ConfigError, match="--compile was False and is True"):
        resume(options, copied, compile=True)
    resume(options, copied, num_samples=3, max_train_steps=13)
    log = (copied / "train.log").read_text()
    assert "changed options: --max_train_steps was 12 and is 13; --num_samples was 2 and is 3" in log


def test_a_full_disk_leaves_the_last_checkpoint_and_a_clear_error(options, tmp_path, monkeypatch):
    """Room runs out in the middle of a file, while the state is written and while it is brought to the disk."""
    whole, written = checkpoints.save_file, []

    def save_half(tensors, path):
        written.append(path)
        if len(written) < 3:
            return whole(tensors, path)
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", save_half)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step-00000004; make room.*--resume latest"):
        train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))
    names = sorted(path.name for path in (tmp_path / "model/checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]
    assert damage_of(tmp_path / "model/checkpoints/step-00000004") is None

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", whole)
    monkeypatch.setattr(checkpoints, "sync_folder", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step-00000004"):
        resume(options, tmp_path / "model")
    monkeypatch.undo()
    resume(options, tmp_path / "model")
    assert list_checkpoints(tmp_path / "model")[-1].name == "step-00000012"
    assert list((tmp_path / "model/checkpoints").glob(".*")) == []


# ---- stops ------------------------------------------------------------------------------------------


def start_and_wait(options, folder: Path, lines: int, processes: int = 1) -> subprocess.Popen:
    """A run that has logged so many more updates."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**options, "max_train_steps": 100_000, "checkpoint_every": 50_000}))
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["training/train.py", "--config", str(path), "--output_dir", str(folder), "--resume", "latest"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 200
    before = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < before + lines:
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"the run did not start: {process.communicate()[0][-3000:]}")
        time.sleep(0.05)
    return process


def test_a_signal_ends_the_command_after_its_update_with_a_checkpoint(options, tmp_path):
    folder = tmp_path / "model"
    process = start_and_wait(options, folder, 2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED_STATUS == 75, output
    assert "stopped by SIGTERM after update" in output and "--resume latest" in output and "Traceback" not in output
    (last,) = list_checkpoints(folder)
    assert damage_of(last) is None and json.loads((last / "run_state.json").read_text())["step"] >= 2
    assert not (folder / "samples.png").exists()


class Signals:
    """Sends this process a signal in the middle of an update."""

    def __init__(self, monkeypatch, number: int, step: int, rank: int = 0):
        self.number, self.step, self.rank, self.whole = number, step, rank, loop.losses_of
        monkeypatch.setattr(loop, "losses_of", self)
        self.calls = 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls == self.step and PartialState().process_index == self.rank:
            os.kill(os.getpid(), self.number)
        return self.whole(*arguments, **options)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_each_of_these_signals_is_a_request(name):
    """Also where nothing reads what is said of it: the terminal has gone, or Ctrl-C has ended the `tee` behind a pipe."""
    request, number, stderr = StopRequest(None, 0.0), getattr(signal, name), os.dup(2)
    before = signal.signal(number, signal.SIG_DFL)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with request.listening():
            os.dup2(writing, 2)
            os.kill(os.getpid(), number)
            assert request.reason == name
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        os.dup2(stderr, 2)
        signal.signal(number, before)
        for descriptor in (stderr, writing):
            os.close(descriptor)


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (request := StopRequest(None, 0.0)).listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_run_after_its_update_and_it_goes_on(options, finished, tmp_path, monkeypatch):
    Signals(monkeypatch, signal.SIGINT, 5)
    with pytest.raises(Stopped, match=r"stopped by SIGINT after update 5; .* --resume latest"):
        train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))
    monkeypatch.undo()
    resume(options, tmp_path / "model")
    assert end_state(tmp_path / "model") == end_state(finished)


def test_a_second_signal_ends_a_run_at_once():
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        request = StopRequest(None, time.monotonic())
        with request.listening():
            for _ in range(2):  # the second one handed on by a launcher: still the first
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            os.write(writing, str(request.reason).encode())
            time.sleep(ONE_REQUEST)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        os._exit(0)
    assert os.read(reading, 99) == b"SIGTERM"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_the_clock_ends_a_run_and_it_goes_on(options, finished, tmp_path, monkeypatch):
    """In the middle, in a preview, and in the final samples; the end is the same."""
    folder = tmp_path / "model"
    reasons = iter([None] * 5 + ["--max_train_time 1"] * 1000)
    monkeypatch.setattr(StopRequest, "reason", property(lambda self: next(reasons)))
    with pytest.raises(Stopped, match=r"stopped by --max_train_time 1 after update 6; .* --resume latest"):
        train(TrainingOptions(**options, output_dir=str(folder), max_train_time=1.0))
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(folder)][-1] == "step-00000006"
    request = StopRequest(1e-9, 0.0)
    assert request.reason == "--max_train_time 1e-09"
    network = torch.nn.Identity()
    with pytest.raises(Stopped, match="max_train_time"), request.interrupts(network):
        network(torch.zeros(1))
    network(torch.zeros(1))
    resume(options, folder)
    assert end_state(folder) == end_state(finished)


def test_a_preview_that_a_stop_cut_short_is_drawn_on_resuming(options, tmp_path, monkeypatch):
    previews = {**options, "preview_every": 4, "preview_images": 2, "preview_inference_steps": 4}
    whole = train(TrainingOptions(**previews, output_dir=str(tmp_path / "whole")))
    drawn = []

    def stop_in_preview(run, done):
        drawn.append(done)
        raise Stopped("SIGTERM")

    monkeypatch.setattr(loop, "preview", stop_in_preview)
    monkeypatch.setattr(StopRequest, "reason", property(lambda self: "SIGTERM" if drawn else None))
    with pytest.raises(Stopped, match="SIGTERM after update 4"):
        train(TrainingOptions(**previews, output_dir=str(tmp_path / "model")))
    monkeypatch.undo()
    assert drawn == [4] and not (tmp_path / "model/samples").exists()
    resume(previews, tmp_path / "model")
    for name in ("step-00000004.png", "step-00000008.png"):
        assert (tmp_path / "model/samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_stop_together(options, tmp_path):
    process = start_and_wait(options, tmp_path / "model", 2, processes=2)
    process.send_signal(signal.SIGTERM)  # to the launcher, which hands it on
    output = process.communicate(timeout=90)[0]
    assert "stopped by SIGTERM after update" in output
    assert damage_of(list_checkpoints(tmp_path / "model")[-1]) is None


def train_in_a_fork(options: TrainingOptions) -> None:
    AcceleratorState._reset_state(True)  # that of the process which was forked
    with contextlib.suppress(Stopped):
        train(options)


def test_one_process_of_two_that_is_asked_stops_both_and_one_that_dies_takes_the_other_down(options, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    given = TrainingOptions(**options, output_dir=str(folder))
    Signals(monkeypatch, signal.SIGTERM, 3, rank=1)
    debug_launcher(train_in_a_fork, (given,), num_processes=2)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]
    Signals(monkeypatch, signal.SIGKILL, 3, rank=1)
    began, others = time.monotonic(), {*psutil.Process().children()}  # workers that earlier tests left
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        debug_launcher(train_in_a_fork, (given.with_values(resume="latest"),), num_processes=2)
    assert time.monotonic() - began < 60 and {*psutil.Process().children()} <= others
    assert damage_of(list_checkpoints(folder)[-1]) is None


# ---- numbers ----------------------------------------------------------------------------------------


class Poison:
    """Makes losses of chosen updates non-finite, for one of the images."""

    def __init__(self, monkeypatch, updates):
        self.updates, self.calls = set(updates), 0
        self.whole = loop.losses_of
        monkeypatch.setattr(loop, "losses_of", self)

    def __call__(self, *arguments, **options):
        losses = self.whole(*arguments, **options)
        self.calls += 1
        factor = torch.ones_like(losses)
        if self.calls - 1 in self.updates:
            factor[2] = float("nan")
        return losses * factor


def test_an_update_with_a_loss_that_is_not_finite_is_left_out_and_named(options, finished, tmp_path, monkeypatch):
    Poison(monkeypatch, {3, 4, 7})
    folder = train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))
    lines = metrics(folder)
    assert [line["skipped_updates"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert [line["step"] for line in lines if "loss" not in line] == [4, 5, 8]
    log = (folder / "train.log").read_text()
    assert log.count("is skipped: the loss is not finite for the images") == 3
    assert "update 3 is skipped: the loss is not finite for the images " in log
    state = torch.load(list_checkpoints(folder)[-1] / "parts.pt", weights_only=True)
    assert state["updater"] == {"skipped": 3, "in_a_row": 0} and state["lr_scheduler"]["last_epoch"] == 9


def test_ten_in_a_row_end_the_run_and_name_the_last_good_checkpoint(options, tmp_path, monkeypatch):
    Poison(monkeypatch, range(5, 100))
    with pytest.raises(NumericalError, match=r"10 updates in succession .* last good checkpoint is .*step-00000014"):
        train(TrainingOptions(**{**options, "max_train_steps": 30}, output_dir=str(tmp_path / "model")))
    assert MAX_IN_A_ROW == 10


def test_weights_that_are_not_finite_are_not_saved(options, tmp_path, monkeypatch):
    whole = loop.update

    def break_weights(run, objective, step):
        stopping = whole(run, objective, step)
        if step == 3:
            with torch.no_grad():
                next(run.state.network.parameters()).view(-1)[0] = float("inf")
        return stopping

    monkeypatch.setattr(loop, "update", break_weights)
    with pytest.raises(NumericalError, match=r"weights after 4 updates are not finite.*step-00000002"):
        train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))


@pytest.mark.parametrize("fault", ["gradient", "loss", "overflow"])
def test_half_precision_scalers_and_faults(fault, monkeypatch):
    """An overflow of scaled gradients is the scaler's affair; a loss that is not finite is counted. On the CPU's scaler."""
    accelerator = Accelerator(cpu=True)
    network = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    if fault != "gradient":
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        accelerator.native_amp = True
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    network, optimizer = accelerator.prepare(network, optimizer)
    accelerator._optimizers[-1].scaler = accelerator.scaler
    updater = Updater(accelerator, list(network.parameters()), optimizer, schedule, None, 1.0)
    before = network.weight.detach().clone()
    loss = network(torch.ones(3, 2)).squeeze(1)
    scaled = loss.mean() if accelerator.scaler is None else accelerator.scaler.scale(loss.mean())
    scaled.backward()
    if fault != "loss":
        network.weight.grad[0, 0] = float("inf")
    seen = loss.detach() * (float("nan") if fault == "loss" else 1)
    norm, stop = updater(0, seen, [5, 6, 7], stop=True)
    assert norm is None and stop and torch.equal(network.weight, before)
    assert updater.skipped == (0 if fault == "overflow" else 1)
    if accelerator.scaler is not None:
        assert accelerator.scaler.get_scale() == (2.0**15 if fault == "overflow" else 2.0**16)
    network(torch.ones(3, 2)).mean().backward()
    norm, stop = updater(1, torch.ones(3), [5, 6, 7], stop=False)
    assert norm is not None and not stop and not torch.equal(network.weight, before)
    assert updater.in_a_row == 0


def test_the_forward_process_stays_in_float32_in_bf16(options, tmp_path, monkeypatch):
    seen = []
    whole = loop.losses_of

    def look(*arguments, scheduler, **rest):
        def add_noise(*arguments):
            noisy = type(scheduler).add_noise(scheduler, *arguments)
            seen.append((*(value.dtype for value in arguments[:2]), noisy.dtype))
            return noisy

        monkeypatch.setattr(scheduler, "add_noise", add_noise, raising=False)
        losses = whole(*arguments, scheduler=scheduler, **rest)
        seen.append((losses.dtype,))
        return losses

    monkeypatch.setattr(loop, "losses_of", look)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # other tests have an accelerator of their own
    changed = {"mixed_precision": "bf16", "max_train_steps": 1, "lr_warmup_steps": 0, "num_samples": 1}
    train(TrainingOptions(**{**options, **changed}, output_dir=str(tmp_path / "model")))
    assert seen == [(torch.float32,) * 3, (torch.float32,)]


# ---- what a run says of itself ----------------------------------------------------------------------


def test_times_memory_and_counts_are_logged(finished):
    lines = metrics(finished)
    parts = [f"{part}_seconds" for part in ("data", "forward", "backward", "optimizer")]
    assert all(0 < line[part] < 60 for line in lines for part in parts)
    assert all(line["images_per_second"] > 0 and 0.05 < line["memory_gib"] < 10 for line in lines)
    assert [line["step"] for line in lines if "checkpoint_seconds" in line] == [3, 5, 7, 9, 11]


def test_sharded_weights_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigError, match=r"configured for FSDP, which shards weights; use MULTI_GPU"):
        train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_compiled_run_resumes_in_the_same_bytes(options, tmp_path):
    """Compiling takes most of a minute in each process."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**options, "compile": True, "num_samples": 1}))
    command = [sys.executable, "training/train.py", "--config", str(tmp_path / "run.yaml"), "--output_dir"]
    for name in ("whole", "model"):
        done = run_command(*command, str(tmp_path / name), timeout=600)
        assert done.returncode == 0, done.stderr
    for step in (10, 12):
        shutil.rmtree(tmp_path / f"model/checkpoints/step-000000{step}")
    done = run_command(*command, str(tmp_path / "model"), "--resume", "latest", timeout=600)
    assert done.returncode == 0 and "updates 8 to 12" in done.stderr
    assert end_state(tmp_path / "model") == end_state(tmp_path / "whole")
