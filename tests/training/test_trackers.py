"""Pictures of samples in trackers, with what they show."""

import sys
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_pipeline.training import TrainingOptions, trackers, train
from training_helpers import quick_options


def test_tensorboard_has_previews_and_samples_with_the_names_of_their_rows(tmp_path):
    options = quick_options(tmp_path, max_train_steps=2, lr_warmup_steps=1, checkpoint_every=0, condition="class")
    options |= {"preview_every": 1, "preview_images": 10, "num_samples": 10, "report_to": "tensorboard"}
    folder = train(TrainingOptions(**options, output_dir=str(tmp_path / "run")))
    events = EventAccumulator(str(folder / "ddpm-pipeline"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    files = {"preview": "samples/step-00000001.png", "samples": "samples.png", "process": "process.png"}
    assert {*events.Tags()["images"]} == {*files} and "loss" in events.Tags()["scalars"]
    for tag, step in {"preview": 1, "samples": 2, "process": 2}.items():
        (shown,) = events.Images(tag)
        (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
        with Image.open(tmp_path / "shown.png") as picture, Image.open(folder / files[tag]) as file:
            assert shown.step == step and np.array_equal(picture.convert("RGB"), file.convert("RGB"))
        (text,) = events.Tensors(f"{tag}/text_summary")
        caption = text.tensor_proto.string_val[0].decode()
        assert caption.startswith(f"update {step}  \n") and "row 4: 3" in caption


def test_weights_and_biases_get_pictures_with_captions(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda picture, caption: (picture, caption)))
    logged, picture = [], Image.new("L", (8, 8))
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    trackers.SHOW["wandb"](run, "samples", picture, "update 7\nrow 1: a cat", 7)
    assert logged == [({"samples": (picture, "update 7\nrow 1: a cat")}, 7)]
