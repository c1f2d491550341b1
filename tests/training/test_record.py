"""What the card of a run says: true however the model came about, and without a place on the machine that trained it."""

import os
import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.training import TrainingOptions
from ddpm_pipeline.training.conditions import Condition
from ddpm_pipeline.training.options import parse_options
from ddpm_pipeline.training.record import model_card, origin_of, public, recipe_command
from helpers import tiny_unet


def card_of_run(done: int, first: int = 0, data_name: str = "digits", images: int | None = 1797, **given: Any) -> ModelCard:
    """The card after `done` updates of a run that began, or was resumed, at `first`."""
    options = TrainingOptions(**{"dataset": "digits", "max_train_steps": 100, **given})
    run = SimpleNamespace(
        options=options, first=first, began=time.monotonic(), condition=Condition(), folder=Path("ddpm-digits"),
        pipe=AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler(20)), state=SimpleNamespace(num_parameters=12_000),
        accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1),
        origin=origin_of(options, data_name, images), data=SimpleNamespace(held_out=None),
    )  # fmt: skip
    return model_card(run, Path("ddpm-digits"), done)


@pytest.mark.parametrize(
    ("done", "first", "steps", "says"),
    [(100, 0, 100, "100"), (40, 0, 100, "40 of 100 so far"), (60, 40, 100, "60 of 100 so far"), (100, 40, 100, "100"),
     (30, 40, 30, "40")],
    ids=["finished", "stopped early", "resumed", "resumed and finished", "resumed with fewer updates than it has had"],
)  # fmt: skip
def test_card_counts_the_updates_that_the_model_has_had(done: int, first: int, steps: int, says: str) -> None:
    text = str(card_of_run(done, first, max_train_steps=steps))
    assert f"| updates | {says} |" in text and "trained from scratch on 1,797 images of `digits`" in text
    assert (f"time since resuming at update {first}" in text) == (first > 0)


def test_card_names_the_model_that_was_fine_tuned(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for base, name, on_hub in (
        ("org/ddpm.v1-5", "org/ddpm.v1-5", True), ("google-ddpm", "google-ddpm", True), ("runs/ddpm-cats", "ddpm-cats", False),
        (f"{tmp_path}/secret/cats", "cats", False), ("../cats.v2", "cats.v2", False), ("here", "here", False),
    ):  # fmt: skip
        if not on_hub:
            Path(base).mkdir(parents=True, exist_ok=True)
        card = card_of_run(100, init_from=base)
        assert f"fine-tuned from `{name}` on 1,797 images of `digits`" in card.text and "from scratch" not in card.text
        assert card.data.base_model == (name if on_hub else None), base
        assert f"--init_from {name}" in card.text and str(tmp_path) not in card.text
    assert card_of_run(100).data.base_model is None


def test_card_names_data_with_their_owner_if_they_are_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    """Also with dots in their names; and data on this machine by the last part of their path, wherever they are by now."""
    monkeypatch.chdir(tmp_path)
    Path("data/cats.v2").mkdir(parents=True)
    Path("cats").mkdir()
    names = {"org/pictures.v1.2": "org/pictures.v1.2", "mnist": "mnist", "data/cats.v2": "cats.v2", "cats": "cats",
             "./data/cats.v2": "cats.v2", f"{tmp_path}/cats": "cats", "data/*.parquet": "*.parquet",
             "digits": "digits"}  # fmt: skip
    on_hub = {"org/pictures.v1.2", "mnist"}
    for dataset, name in names.items():
        card = card_of_run(100, dataset=dataset, data_name=name)
        assert f"of `{name}`" in card.text and card.data.datasets == ([name] if dataset in on_hub else None), dataset
        assert str(tmp_path) not in card.text and "data/" not in card.text
    options = TrainingOptions(dataset="cats", init_from="data/cats.v2")
    origin = origin_of(options, "cats", None)
    os.rename("data", "elsewhere")
    assert origin.hub_dataset is None and origin.hub_base_model is None and "data/" not in origin.command
    assert "on a stream of `cats`" in str(card_of_run(100, dataset="cats", data_name="cats", images=None))


def test_command_in_the_card_names_the_recipe_and_no_place() -> None:
    config = TrainingOptions(
        dataset="/home/somebody/cats", output_dir="/scratch/x", learning_rate=2e-4, random_flip=True, push_to_hub=True,
        hub_model_id="org/x", resolution=64, model="nets/small.json",
    )  # fmt: skip
    command = "accelerate launch --num_processes 2 training/train.py --dataset cats --resolution 64 --random_flip True"
    assert recipe_command(config, "cats", 2) == f"{command} --model small.json --learning_rate 0.0002"
    assert recipe_command(TrainingOptions(), "digits") == "python training/train.py --dataset digits"
    shown = {"data/*.parquet": "*.parquet", "~/x/faces": "faces", "org/name": "org/name", "cosine": "cosine",
             "org/name.v2": "org/name.v2", "C:\\me\\faces": "faces", "a/b/c": "c", "0.25": "0.25", "train[:10%]": "train[:10%]",
             "nets/unet.json": "unet.json", "../captions.yaml": "captions.yaml"}  # fmt: skip
    assert {value: public(value) for value in shown} == shown


@pytest.mark.parametrize("dataset", ["digits", "org/pictures.v2"])
def test_command_in_the_card_trains_the_same_model(dataset: str) -> None:
    """Read back as the command line that it is, it has all options that belong to the recipe."""
    given = {"dataset": dataset, "split": "train[:50%]", "condition": "class", "label_column": "it's a label", "seed": 7,
             "channels_last": True, "max_train_steps": 30, "snr_gamma": 5.0, "init_from": "org/base.v1"}  # fmt: skip
    options = TrainingOptions(**given)
    words = shlex.split(recipe_command(options, dataset))
    assert words[:2] == ["python", "training/train.py"] and parse_options(words[2:]) == options
