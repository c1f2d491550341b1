"""Pictures that a run makes of its samples: which channels they show, and what is said of it."""

import json

import pytest
from PIL import Image

from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training import TrainingOptions, train
from helpers import TINY_UNET
from training_helpers import quick_options


def test_pictures_show_the_channels_that_are_asked_for_and_the_card_says_which(tmp_path):
    options = quick_options(tmp_path, resolution="8x16", channels=3, max_train_steps=2, preview_every=1, num_samples=4)
    options["lr_warmup_steps"] = 0
    config = {**TINY_UNET, "in_channels": 3, "out_channels": 3, "sample_size": [8, 16]}
    (tmp_path / "unet.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="--preview_channels 1,2,4 must be channels of the images, which are 1 to 3"):
        train(TrainingOptions(**options, output_dir=str(tmp_path / "not"), preview_channels="1,2,4"))
    seen = []
    folder = train(TrainingOptions(**options, output_dir=str(tmp_path / "run"), preview_channels="2"), on_preview=seen.append)
    assert seen == [folder / "samples" / "step-00000001.png"] and seen[0].is_file()
    for name in ("samples.txt", "samples/step-00000001.txt"):
        assert (folder / name).read_text() == "shown: channel 2 of 3\n"
    with Image.open(folder / "samples.png") as picture:
        assert (picture.mode, picture.size) == ("L", (2 * (48 + 4) + 4, 2 * (24 + 4) + 4))
    card = (folder / "README.md").read_text()
    assert "RGB 8x16 images" in card and "samples.png: samples (channel 2 of 3)" in card
    assert "pictures show channel 2 of 3" in (folder / "train.log").read_text()
