"""What is found wrong before a run, and what must not end one that is under way."""

import json
import os
import re
import signal
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from transformers import CLIPTextConfig, CLIPTextModel

from ddpm_pipeline import AlphaDDPMPipeline
from ddpm_pipeline.support.errors import STOPPED_STATUS, ConfigError, PushError, Stopped
from ddpm_pipeline.training import TrainingOptions, evaluations, jobs, loop, pusher, stop, telemetry, train
from ddpm_pipeline.training.checkpoints import list_checkpoints
from ddpm_pipeline.training.text_encoders import load_text_encoder, make_tokenizer
from training_helpers import metrics, quick_options, weights

SHORT = {"max_train_steps": 2, "lr_warmup_steps": 1, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")

    def run(output_dir: Path, **changed) -> Path:
        return train(TrainingOptions(**quick_options(folder, **SHORT | changed), output_dir=str(output_dir)))

    return run


# ---- before the run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, environment, named",
    [
        ({}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": 2}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "4 micro-batches"),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--compile"),
        ({"mixed_precision": None}, {"ACCELERATE_MIXED_PRECISION": "int3"}, "int3"),
        ({"mixed_precision": None}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8.*--mixed_precision"),
        ({}, {"ACCELERATE_USE_CPU": "maybe"}, "maybe"),
        ({"report_to": "wandb"}, {}, r"pip install 'ddpm-pipeline\[wandb\]'"),
        ({"lr_scheduler": "polynomial", "lr_warmup_steps": 2}, {}, "--lr_warmup_steps 2"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 1}, {}, "--lr_warmup_steps 1 .* constant_with_warmup"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, {}, "--learning_rate 1e-08"),
    ],
)
def test_what_training_would_not_do_as_told_is_refused(run, changed, environment, named, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        run(tmp_path / "model", **changed)
    assert not (tmp_path / "model").exists()


def test_accumulation_that_comes_twice_divides_once(run, tmp_path, monkeypatch):
    once = run(tmp_path / "once", gradient_accumulation_steps=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    twice = run(tmp_path / "twice", gradient_accumulation_steps=2)
    for name, tensor in weights(once).items():
        assert torch.equal(weights(twice)[name], tensor)


def test_the_longest_warm_up_reaches_the_rate(run, tmp_path):
    model = run(tmp_path / "model", lr_scheduler="polynomial", max_train_steps=3, lr_warmup_steps=2)
    assert [line["learning_rate"] for line in metrics(model)] == pytest.approx([5e-4, 1e-3, 0], abs=2e-7)


def text_encoder(folder: Path, **config) -> None:
    tokenizer = make_tokenizer(["a cat", "a dog"])
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))


def test_code_of_a_text_encoder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    classes = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model", "AutoModelForTextEncoding": "theirs.Model"}
    text_encoder(tmp_path, model_type="theirs", auto_map=classes)
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    with pytest.raises(ConfigError, match="--text_encoder"):
        load_text_encoder(str(tmp_path), None)
    assert not (tmp_path / "run").exists()


def test_only_safetensors_of_a_text_encoder_are_opened(tmp_path, monkeypatch):
    text_encoder(tmp_path)
    load_text_encoder(str(tmp_path), None)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(ConfigError, match="safetensors"):
        load_text_encoder(str(tmp_path), None)


def test_too_little_memory_is_an_error_with_what_to_do(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB.")

    monkeypatch.setattr(loop, "losses_of", fail)
    with pytest.raises(ConfigError, match=r"^CUDA out of memory. Tried to allocate 2.00 GiB: .*--gradient_accumulation_steps"):
        run(tmp_path / "model")


# ---- what does not end a run ------------------------------------------------------------------------


def test_previews_and_evaluations_take_at_most_the_chain(run, tmp_path):
    """By default a preview takes 20 steps."""
    chain = {"num_train_timesteps": 5, "beta_end": 0.9}
    model = run(tmp_path / "model", preview_every=1, preview_images=2, eval_every=1, eval_images=2, **chain)
    assert [path.name for path in (model / "samples").iterdir()] == ["step-00000001.png"]
    assert sum("eval_bits_per_dim" in line for line in metrics(model)) == 2
    assert "failed" not in (model / "train.log").read_text()


def test_the_final_samples_take_the_steps_asked_for_or_those_of_the_fitted_sampler(run, tmp_path, monkeypatch):
    steps = []
    whole = jobs.sample_in_batches
    monkeypatch.setattr(jobs, "sample_in_batches", lambda *given: (steps.append(given[4]), whole(*given))[1])
    for name, asked in (("fewer", 3), ("more", 500)):
        run(tmp_path / name, sample_inference_steps=asked)
    fitted = run(tmp_path / "fitted", fit_noises=12)
    assert steps == [3, 20, 10]
    assert AlphaDDPMPipeline.from_pretrained(fitted).scheduler.fitted_samplers.keys() == {"5", "10"}
    card = (fitted / "README.md").read_text()
    assert "pipe(num_inference_steps=10)" in card and "`num_inference_steps` of 5 or 10 uses" in card


def test_a_picture_a_figure_or_a_tracker_that_fails_does_not_end_the_run(run, tmp_path, monkeypatch):
    """Nor a disk that is full when a figure is written down."""

    def fail(*_, **__):
        raise RuntimeError("no room on the device")

    monkeypatch.setattr(jobs, "save_picture", fail)
    monkeypatch.setattr(jobs, "fit_sampler", fail)
    monkeypatch.setattr(evaluations, "per_image", fail)
    monkeypatch.setattr(Accelerator, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/training_config.yaml").touch()  # by which the folder is a run's
    (tmp_path / "model/metrics.jsonl").symlink_to("/dev/full")
    pictures = {"preview_every": 1, "preview_images": 1, "fit_noises": 3}
    evaluated = {"eval_every": 1, "eval_images": 1, "report_to": "tensorboard", "resume": "latest"}
    model = run(tmp_path / "model", **pictures, **evaluated)
    assert (model / "model_index.json").is_file() and not list(model.rglob("*.png"))
    log = (model / "train.log").read_text()
    for what in ("a preview", "an evaluation", "fitting", "samples.png", "process.png", "the tracker", "metrics.jsonl"):
        assert re.search(f"{what}.* failed", log) and "no room on the device" in log
    assert log.count("the tracker failed") == log.count("No space left on device") == 1


def test_a_tracker_that_cannot_start_is_an_error_before_training(run, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no account")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    with pytest.raises(ConfigError, match=r"--report_to tensorboard.*no account"):
        run(tmp_path / "model", report_to="tensorboard")
    assert "the tracker failed" not in caplog.text  # to end what has not begun


# ---- stops ------------------------------------------------------------------------------------------


def test_a_push_that_stalls_is_given_up_soon_after_a_request(monkeypatch):
    monkeypatch.setattr(stop, "LONGEST_PUSH", 0.3)
    stalled, request, began = Future(), stop.StopRequest(None, 0.0), time.monotonic()
    request._on_signal(signal.SIGTERM, None)
    assert not request.waits_for(stalled) and not request.waits_for(stalled), "the second one waits no longer"
    assert 0.3 <= time.monotonic() - began < 5
    assert request.waits_for(stop.in_background(lambda: 1))
    late = stop.StopRequest(1e-9, 0.0)
    assert late.reason and late.waits_for(stop.in_background(time.sleep, 0.6)), "the clock is no request to hurry"
    assert not late.waits_for(stalled, urgent=True)
    assert stop.in_background(int, "7").result() == 7
    assert isinstance(stop.in_background(int, "x").exception(), ValueError)


@pytest.mark.parametrize("when", ["in mid-run", "at the end"])
def test_a_run_whose_push_stalls_ends_soon_after_a_signal(when, run, tmp_path, monkeypatch, caplog):
    """With its checkpoint or its model, and the command that pushes it."""
    monkeypatch.setattr(stop, "LONGEST_PUSH", 0.2)
    monkeypatch.setattr(pusher.Pusher, "_prepare", lambda *_: "org/name")
    signalled, stalled = [], Event()

    def stall(folder, *_, **__):
        if (folder / "model_index.json").is_file() and not signalled and (when == "in mid-run" or folder == tmp_path / "model"):
            signalled.append(folder)
            os.kill(os.getpid(), signal.SIGTERM)
        stalled.wait(20)

    monkeypatch.setattr(pusher, "push", stall)
    kind = Stopped if when == "in mid-run" else PushError
    changed = {"push_every": 1, "max_train_steps": 2000} if when == "in mid-run" else {}
    began = time.monotonic()
    with pytest.raises(kind, match="SIGTERM") as ended:
        run(tmp_path / "model", push_to_hub=True, **changed)
    stalled.set()
    assert time.monotonic() - began < 15
    assert "ddpm_pipeline.hub" in caplog.text + str(ended.value)
    assert list_checkpoints(tmp_path / "model") or (tmp_path / "model/model_index.json").is_file()


def test_a_stop_after_the_last_update_keeps_the_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "fit_sampler", Mock(side_effect=Stopped("SIGTERM")))
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after the last update: the model is in .*pictures$"):
        run(tmp_path / "model", fit_noises=3)
    assert weights(tmp_path / "model") and (tmp_path / "model/model_index.json").is_file()


def test_a_process_that_asked_to_end_does_so_whatever_its_threads_do(monkeypatch):
    monkeypatch.setattr(stop, "LONGEST_END", 0.2)
    child = os.fork()
    if not child:
        stop.end_soon(STOPPED_STATUS)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == STOPPED_STATUS


# ---- what a run says --------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [True, False])
def test_the_log_and_the_bar_tell_losses_and_the_time_to_go(seen, run, tmp_path, capsys, monkeypatch):
    """In place of a bar a log file gets lines, now and then, without carriage returns."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: seen)
    monkeypatch.setattr(telemetry, "LINES_APART", 0.0)
    log = (run(tmp_path / "model", max_train_steps=14, log_every=7) / "train.log").read_text()
    assert len(re.findall(r"about .* to go at .* updates/s, until .*\d\d:\d\d, with previews", log)) == 1
    told = capsys.readouterr().err
    assert bool(re.search(r"\| 14/14, loss 0\.\d+", told)) == seen
    assert bool(re.search(r"update 7 of 14: loss 0\..*, ends .*\d\d:\d\d \(", told)) == ("\r" not in told) == (not seen)
    assert "update 7 of 14: loss 0." in log and "update 14 of 14: loss 0." in log


def test_pictures_and_figures_that_never_come_are_told(run, tmp_path):
    log = (run(tmp_path / "model", preview_every=3, eval_every=4, eval_images=1) / "train.log").read_text()
    assert "--preview_every 3 is more than the 2 updates" in log and "--eval_every 4 is more than the 2 updates" in log


def test_grids_of_conditional_models_say_which_row_is_what(run, tmp_path):
    model = run(tmp_path / "model", condition="class", num_samples=20)
    assert (model / "samples.txt").read_text().splitlines() == [f"row {digit + 1}: {digit}" for digit in range(10)]
