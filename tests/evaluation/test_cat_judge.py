"""Judging models of the cats: counts against samples that are known, in JSON and on the card; the features of cats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import text_models
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, AlphaDDPMTextToImagePipeline, describe_conditions
from ddpm_pipeline.data.cats import KINDS, PARTS, all_cats, draw, mentioned, splits, training_cats
from ddpm_pipeline.data.options import DataOptions
from ddpm_pipeline.data.sources import load_source
from ddpm_pipeline.evaluation import EvaluationOptions, evaluate, feature_extractor, frechet_distance, run
from ddpm_pipeline.evaluation.cat_judge import CatFeatures
from ddpm_pipeline.evaluation.figures import measurements
from ddpm_pipeline.support.draws import image_indices
from helpers import tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the FID of so few images
CONFIG, SIDE, COUNT, SEED = "num_images=60,seed=3", 16, 20, 1


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "model"


def scheduler(**config) -> AlphaDDPMScheduler:
    return AlphaDDPMScheduler(num_train_timesteps=6, beta_start=0.02, beta_end=0.6, **config)


def save(folder: Path, **config) -> None:
    unet = tiny_unet(sample_size=SIDE, in_channels=3, out_channels=3, **config)
    if config:
        describe_conditions(unet, class_names=[names[0] for names in PARTS["body"]])
    AlphaDDPMPipeline(unet, scheduler()).save_pretrained(folder)


def save_text(folder: Path) -> None:
    tokenizer = text_models.make_tokenizer()
    unet = text_models.make_unet(sample_size=SIDE, in_channels=3, out_channels=6)
    describe_conditions(unet, condition_dropout=0.1)
    parts = unet.eval(), text_models.make_encoder("clip", len(tokenizer)).eval(), tokenizer
    AlphaDDPMTextToImagePipeline(*parts, scheduler(variance_type="learned_range")).save_pretrained(folder)


def evaluated(folder: Path, **more) -> dict:
    given = {
        "model": str(folder), "dataset": "cats", "dataset_config": CONFIG, "cache_dir": str(folder.parent / "cache"),
        "num_images": COUNT, "num_likelihood_images": 0, "batch_size": 8, "seed": SEED,
    }  # fmt: skip
    return evaluate(EvaluationOptions(**given | more))


def drawing(monkeypatch, cats: np.ndarray, change=lambda pixels: pixels) -> None:
    """Sample i of any model is the picture of cat i."""
    images = change(draw(cats, SIDE).transpose(0, 3, 1, 2).copy())
    monkeypatch.setattr(run, "sample_values", lambda pipe, numbers, *_, **__: images[list(numbers)])


def asked_for(split: str) -> list[dict]:
    """The rows whose conditions the samples are asked for with."""
    data = load_source(DataOptions("cats", dataset_config=CONFIG, split=split, resolution=SIDE)).dataset
    return [data[int(place)] for place in image_indices(SEED, len(data), 0, COUNT)]


def test_copies_new_cats_and_none_are_counted(folder, monkeypatch):
    known = training_cats(CONFIG)
    assert len(known) == 60 and set(map(tuple, known)) <= set(map(tuple, all_cats()[splits()["train"]]))
    cats = np.concatenate([known[:6], all_cats()[splits()["pairs"][:14]]])

    def without_mouths_and_with_noise(pixels: np.ndarray) -> np.ndarray:
        pixels[[0, 10]] = np.random.default_rng(0).integers(0, 256, pixels[:2].shape)
        pixels[11, :, :8] = 255  # half a cat
        return pixels

    drawing(monkeypatch, cats, without_mouths_and_with_noise)
    save(folder)
    results = evaluated(folder)
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))["cats"]
    assert found == results["cats"]
    assert (found["num_images"], found["training_cats"]) == (COUNT, 60)
    assert [found[name] * COUNT for name in ("valid", "copies", "new")] == pytest.approx([17, 5, 12])
    assert found["valid_standard_error"] == pytest.approx((0.85 * 0.15 / COUNT) ** 0.5)
    assert found["copies_by_chance"] == pytest.approx(60 / 287_550)
    assert found["invalid_at"]["body"] * COUNT == pytest.approx(3)
    assert "attributes" not in found and found["steps"] == 6
    assert results["quality"]["features"] == "CatFeatures"
    shown = {one.metric: one for one in measurements(results)}
    assert (shown["valid cats"].value, shown["copies of training cats"].num_images) == (found["valid"], COUNT)
    assert shown["new cats"].settings["training_cats"] == 60


@pytest.mark.parametrize(("split", "column"), [("train", "text"), ("test", "text"), ("train", "unseen_text")])
def test_parts_that_texts_mention_are_looked_for(folder, monkeypatch, split, column):
    rows = asked_for(split)
    cats = np.array([[row[kind] for kind in KINDS] for row in rows])
    cats[:5, 0] = (cats[:5, 0] + 1) % 15  # of other colours than asked for
    drawing(monkeypatch, cats)
    save_text(folder)
    results = evaluated(folder, split=split, text_column=column, guidance_scale=2)
    attributes, texts = results["cats"]["attributes"], [row[column][0] for row in rows]
    told = ["body" in mentioned(text) for text in texts]
    assert attributes["body"]["asked"] == sum(told)
    assert attributes["body"]["accuracy"] == pytest.approx(1 - sum(told[:5]) / sum(told))
    assert attributes["eyes"] == {"accuracy": 1, "standard_error": 0, "asked": attributes["eyes"]["asked"]}
    assert attributes["all"]["asked"] == sum(attributes[kind]["asked"] for kind in KINDS) > 2 * COUNT
    assert attributes["all"]["accuracy"] == pytest.approx(1 - sum(told[:5]) / attributes["all"]["asked"])
    assert 0 < attributes["all"]["standard_error"] < attributes["body"]["standard_error"]
    assert results["cats"]["guidance_scale"] == 2
    assert "attribute accuracy of accessory" in {one.metric for one in measurements(results)}


def test_of_classes_bodies_are_looked_for(folder, monkeypatch):
    cats = np.array([[row[kind] for kind in KINDS] for row in asked_for("train")])
    cats[:2, 0] = (cats[:2, 0] + 1) % 15
    drawing(monkeypatch, cats)
    save(folder, num_class_embeds=16)
    attributes = evaluated(folder)["cats"]["attributes"]
    assert attributes.keys() == {"all", "body"} and attributes["all"] == attributes["body"]
    assert (attributes["body"]["accuracy"], attributes["body"]["asked"]) == (0.9, COUNT)


def test_what_a_model_really_samples_is_judged(folder):
    save(folder)
    found = evaluated(folder)["cats"]
    assert (found["valid"], found["copies"]) == (0, 0) and found["distance"] > 0.2


def test_models_of_other_data_are_not_judged(folder):
    AlphaDDPMPipeline(tiny_unet(), scheduler()).save_pretrained(folder)
    assert "cats" not in evaluated(folder, dataset="digits", dataset_config=None)


@pytest.mark.parametrize("side", [16, 32])
def test_features_of_cats_tell_real_ones_from_changed_ones(side):
    extractor = feature_extractor("auto", "cats", None)
    assert type(extractor) is CatFeatures is type(feature_extractor("cats", "digits", None))
    chosen = np.random.default_rng(0).choice(len(all_cats()), (2, 1000))
    real, others = (torch.from_numpy(draw(all_cats()[some], side)).permute(0, 3, 1, 2) / 127.5 - 1 for some in chosen)
    features = extractor(real)
    assert features.shape == (1000, CatFeatures.num_features)
    assert features.mean(dim=0).abs().max() < 0.4
    assert 0.3 < features.std(dim=0).median() < 1.5
    mouthless = all_cats()[chosen[1]]
    mouthless[:, 3] = 0
    same_mouth = torch.from_numpy(draw(mouthless, side)).permute(0, 3, 1, 2) / 127.5 - 1
    blurred = torch.nn.functional.avg_pool2d(others, 3, 1, 1, count_include_pad=False)
    distance, *more = (frechet_distance(features, extractor(images)) for images in (others, same_mouth, blurred))
    assert all(other > 1.5 * distance for other in more)


def test_features_of_other_pictures_are_refused():
    with pytest.raises(ValueError, match="squares in colour of 16 to 128 pixels"):
        CatFeatures()(torch.zeros(2, 3, 8, 8))
