"""Numbers as conditions in training: standardised, dropped one by one and all together, shown at their quantiles."""

import datasets
import numpy as np
import pytest
import torch

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.data import DataOptions, load_images
from ddpm_pipeline.data.held_out import part
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training.conditions import build_condition
from ddpm_pipeline.training.models import build_model
from ddpm_pipeline.training.options import ConditionOptions, TrainingOptions
from training_helpers import whole_batch

COUNT = 40


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Images 8x8 whose age counts down, with a weight of which the first is unknown, and 100 labels."""
    folder = tmp_path_factory.mktemp("numbered")
    rows = {
        "image": [np.full((8, 8), 5 * i, np.uint8) for i in range(COUNT)],
        "age": [float(COUNT - i) for i in range(COUNT)],
        "weight": [None if i == 0 else i % 7 for i in range(COUNT)],
        "tags": [[f"tag {i}", f"tag {i + 60}"] for i in range(COUNT)],
    }
    types = {
        "age": datasets.Value("float32"),
        "weight": datasets.Value("int32"),
        "tags": datasets.List(datasets.Value("string")),
    }
    features = datasets.Features({"image": datasets.Array2D((8, 8), "uint8"), **types})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "data"))

    def condition_on(columns: str, kind: str = "vector", **options):
        asked = ConditionOptions(kind, condition_column=columns, **options)
        data = load_images(DataOptions(str(folder / "data"), cache_dir=str(folder / "cache")), asked.columns)
        return build_condition(asked, data), data

    return condition_on


def network_for(condition, data):
    given = TrainingOptions()
    unet, _ = build_model(given.model, given.diffusion, data.size, data.channels, condition)
    return condition.network(unet), unet


@pytest.mark.parametrize("columns, kind", [("age", "timestep"), ("age,weight", "identity")])
def test_a_network_is_told_numbers_in_its_own_way(columns, kind, numbered):
    condition, data = numbered(columns, condition_dropout=0.0)
    network, unet = network_for(condition, data)
    assert unet.config.class_embed_type == kind and network is unet
    drawn = condition.draw(condition.read(data, range(COUNT)), whole_batch(0, COUNT))
    told = condition.inputs(drawn, torch.zeros(COUNT, 1, 8, 8))["class_labels"]
    assert torch.equal(told, condition.encoder.encode(data.vector(range(COUNT)), 128))
    with torch.no_grad():
        x_t, t = torch.randn(1, 1, 8, 8).expand(COUNT, -1, -1, -1), torch.full((COUNT,), 500)
        seen = network(x_t, t, class_labels=told).sample
    assert len(seen.flatten(1).unique(dim=0)) > COUNT // 2


def test_numbers_are_dropped_all_together_and_each_on_its_own(numbered):
    condition, data = numbered("age,weight", condition_dropout=0.2)
    values = condition.read(data, np.arange(1000) % (COUNT - 1) + 1)  # all are known
    drawn = torch.cat([condition.draw(values, whole_batch(step, 1000)) for step in range(4)])
    gone = drawn.isnan()
    shares = [gone.all(dim=1).double().mean(), (gone[:, 0] & ~gone[:, 1]).double().mean()]
    assert abs(shares[0] - (0.2 + 0.8 * 0.04)) < 0.03 and abs(shares[1] - 0.8 * 0.16) < 0.03
    assert torch.equal(drawn[:1000][~gone[:1000]], values[~gone[:1000]])
    part = condition.draw(values[300:500], whole_batch(2, 1000, slice(300, 500)))
    assert torch.equal(part.nan_to_num(-1), drawn[2300:2500].nan_to_num(-1))


def test_previews_go_through_the_quantiles_of_the_first_and_facts_have_the_statistics(numbered):
    condition, _ = numbered("weight,age")
    request, columns = condition.preview(21)
    shown = torch.tensor(request.arguments["condition_vector"][::columns])
    assert (len(shown), columns) == (10, 2) and shown[:, 0].diff().min() >= 0 and shown[[0, -1], 0].tolist() == [0, 6]
    assert condition.row_names(request, columns)[-1].startswith("weight=6, age=")
    told, _ = network_for(condition, condition.data), condition.unet_inputs(request)
    assert (
        "2 numbers (mean ± standard deviation): weight 2.949 ± 1.934, " in condition.facts()["condition"]
        and "age 20.5 ± 11.54" in condition.facts()["condition"]
    )
    assert condition.example() == "condition_vector={'weight': 4.883, 'age': 32.04}, guidance_scale=2"
    assert condition.identity()["condition vector"]["names"] == ["weight", "age"] and told


def test_previews_of_images_whose_numbers_are_not_told(numbered):
    """As of the first rows of a stream, where the others have them."""
    condition, data = numbered("weight,age")
    condition.examples = part(data, np.arange(COUNT) == 0)
    request, columns = condition.preview(4)
    assert condition.row_names(request, columns) == ["weight=nan, age=40"] and len(request) == 4


def test_what_the_numbers_of_a_model_to_start_from_were_is_said(numbered, tmp_path, caplog):
    condition, data = numbered("age")
    given = TrainingOptions(init_from=str(tmp_path))
    _, unet = network_for(condition, data)
    condition.pipeline(unet, AlphaDDPMScheduler()).save_pretrained(tmp_path)
    for columns in ("age", "weight"):
        build_model(given.model, given.diffusion, data.size, data.channels, numbered(columns)[0])
        assert ("condition_vector of" in caplog.text) == (columns == "weight")


def test_more_numbers_than_the_embedding_has_room_for_are_refused(numbered):
    condition, data = numbered("tags")
    assert len(condition.encoder.names) == 80
    assert condition.row_names(*condition.preview(1)) == ["tag 1, tag 61"] and " and 70 more" in condition.facts()["condition"]
    with pytest.raises(ConfigError, match="has no room for 80 numbers; use a larger --model, or at most 64 numbers"):
        network_for(condition, data)
