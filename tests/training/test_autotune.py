"""`--autotune`: what is chosen, and that the run is then the one with the chosen options given by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddpm_pipeline.training import TrainingOptions, autotune, train
from ddpm_pipeline.training.autotune import Trial, tunable
from training_helpers import quick_options, weights

SHORT = {"max_train_steps": 2, "lr_warmup_steps": 1, "mixed_precision": None, "num_samples": 1, "sample_inference_steps": 1}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains with --autotune. Trials are real, but take as long as `seconds` says of their options."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    monkeypatch.setattr(autotune, "_has_bf16", lambda device: True)
    monkeypatch.setattr(autotune, "SHARE", 1e6)
    monkeypatch.setattr(autotune, "UPDATES", 1)
    real, tried = autotune._tried, []

    def train_with(name, seconds=None, **changed):
        def told(options, subject):
            tried.append(options.hardware)
            trial = real(options, subject)
            assert 0 < trial.update < trial.total
            return Trial(seconds(options), trial.total)

        if seconds:
            monkeypatch.setattr(autotune, "_tried", told)
        options = quick_options(tmp_path, **SHORT | changed)
        return train(TrainingOptions(**options, output_dir=str(tmp_path / name)))

    train_with.tried = tried
    return train_with


def seconds(options: TrainingOptions) -> float:
    """bf16 and two micro-batches help, four do not, nor does the memory format; compilation fails."""
    if options.hardware.compile:
        return float("inf")
    factor = 0.5 if options.hardware.mixed_precision == "bf16" else 1.0
    return (
        factor * {1: 1.0, 2: 0.8, 4: 0.9}[options.optimisation.gradient_accumulation_steps]
        + 0.1 * options.hardware.channels_last
    )


def options_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "training_config.yaml").read_text())


def test_a_tuned_run_is_the_one_with_the_chosen_options(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: network)
    tuned = run("tuned", seconds, autotune=True)
    chosen = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    written = options_of(tuned)
    others = {"channels_last": False, "compile": False, "num_cpu_threads": 1, "autotune": False}
    assert {name: written[name] for name in (*chosen, *others)} == {**chosen, **others}
    assert "--mixed_precision bf16, --gradient_accumulation_steps 2" in (tuned / "train.log").read_text()
    by_hand = run("by-hand", **chosen)
    for name, tensor in weights(by_hand).items():
        assert torch.equal(weights(tuned)[name], tensor)

    tries = len(run.tried)
    again = run("again", seconds, autotune=True)  # remembered
    assert len(run.tried) == tries and options_of(again)["gradient_accumulation_steps"] == 2
    run("tuned", seconds, autotune=True, max_train_steps=3, resume="latest")  # though a run of this length was never tried
    assert len(run.tried) == tries and options_of(tuned)["mixed_precision"] == "bf16"


def test_a_remembered_choice_that_cannot_be_read_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = autotune._memory()
    file.parent.mkdir()
    good = {"chosen": {"compile": True}, "why": ""}
    for text in ("", "[]", "{", json.dumps({"a": 1, "b": good}), json.dumps({"a": {"chosen": {"seed": 1}, "why": ""}})):
        file.write_text(text)
        assert autotune._remembered() == {}
    file.write_text(json.dumps({"b": good}))
    assert autotune._remembered() == {"b": good}


def test_what_was_given_is_not_tuned(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert tunable(TrainingOptions()) == ()
    assert tunable(TrainingOptions(autotune=True)) == autotune.TUNED
    given = {"mixed_precision": "no", "channels_last": True, "num_cpu_threads": 2, "gradient_accumulation_steps": 4}
    assert tunable(TrainingOptions(autotune=True, **given)) == ("compile",)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert tunable(TrainingOptions(autotune=True)) == ("channels_last", "num_cpu_threads", "compile")


@pytest.mark.parametrize(
    "updates, share, expected",
    [(100, 0.02, {}), (100, 1.0, {"mixed_precision": "bf16"}), (100_000, 1.0, {"mixed_precision": "bf16", "compile": True})],
)
def test_trials_take_a_small_part_of_the_run(updates, share, expected, monkeypatch):
    """An update takes 1 s, in bf16 0.5 s, compiled 0.4 s after 200 s of compilation."""

    def tried(options, subject):
        update = (0.5 if options.hardware.mixed_precision == "bf16" else 1.0) - 0.1 * options.hardware.compile
        return Trial(update, 6 * update + 200 * options.hardware.compile)

    monkeypatch.setattr(autotune, "_tried", tried)
    monkeypatch.setattr(autotune, "_has_bf16", lambda device: True)
    monkeypatch.setattr(autotune, "SHARE", share)
    options = TrainingOptions(max_train_steps=updates, autotune=True)
    accelerator = autotune.start_processes(options)[0]
    chosen, why = autotune._by_trials(accelerator, options, ("mixed_precision", "channels_last", "compile"), None)
    assert chosen == expected
    assert ("not tried" in why) == (updates == 100)
