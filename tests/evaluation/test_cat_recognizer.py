"""The recognizer of cats, against the cats themselves and their neighbours."""

import numpy as np
import pytest
import torch

from ddpm_pipeline.data.cats import COUNTS, KINDS, NOTHING, PLAIN, all_cats, draw, layers, over
from ddpm_pipeline.evaluation.cats import PLACES, CatRecognizer


def some_cats(count: int, seed: int = 0) -> np.ndarray:
    return all_cats()[np.random.default_rng(seed).choice(len(all_cats()), count, replace=False)]


def pictures(cats: np.ndarray, side: int, noise: float = 0.0) -> torch.Tensor:
    """In [-1, 1], with noise of this standard deviation in units of [0, 1]."""
    x = torch.from_numpy(draw(cats, side)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x + 2 * noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def recognizer():
    return CatRecognizer(32)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_every_part_of_real_cats_is_found(recognizer, noise):
    cats = some_cats(200)
    found = recognizer(pictures(cats, 32, noise))
    assert np.array_equal(found.cats, cats)
    assert torch.allclose(found.distance, torch.full((200,), noise), atol=0.003)


def test_no_change_of_one_part_is_nearer(recognizer):
    """Of pictures that are no cats: mixtures of two."""
    a, b = some_cats(8, 1), some_cats(8, 2)
    mixed = (pictures(a, 32) * 0.7 + pictures(b, 32) * 0.3).clamp(-1, 1)
    found = recognizer(mixed)
    for image, cat, distance in zip(mixed, found.cats.numpy(), found.distance, strict=True):
        near = [np.where(np.arange(5) == place, part, cat) for place in range(5) for part in range(COUNTS[place])]
        errors = (pictures(np.stack(near), 32) - image).square().mean(dim=(1, 2, 3)).sqrt() / 2
        assert distance <= errors.min() + 1e-3


def test_parts_that_hold_each_other_in_a_wrong_place_are_parted():
    """Choosing one part at a time from the eyes upwards ends in plain fur and other eyes."""
    cats = np.array([[13, 4, 0, 1, 2], [13, 4, 0, 7, 5]])
    assert np.array_equal(CatRecognizer(16)(pictures(cats, 16)).cats, cats)


@pytest.mark.parametrize("side", [16, 32])
def test_tolerated_noise_is_valid_and_a_little_more_is_not(side):
    """Of all that noise of the tolerated size does, 1 in 4,000 comparisons is too much, of which there are 11 in a picture."""
    recognizer, cats = CatRecognizer(side), some_cats(1000)
    assert 0.99 <= recognizer(pictures(cats, side, 0.05)).valid.double().mean() < 1
    assert not recognizer(pictures(cats, side, 0.065)).valid.any()


@pytest.mark.parametrize("missing", ["mouth", "eyes", "body"])
def test_a_cat_without_a_part_is_invalid_there(recognizer, missing):
    """However little it is of the picture."""
    cats = some_cats(50)
    cats[:, 4] = NOTHING
    picture = np.ones((len(cats), 32, 32, 3), np.float32)
    for place, kind in enumerate(KINDS):
        if kind != missing:
            picture = over(picture, layers(32)[kind][cats[:, place]])
    found = recognizer(torch.from_numpy(picture).permute(0, 3, 1, 2) * 2 - 1)
    assert not found.valid.any()
    assert (found.excess[:, PLACES.index(missing)] > 1).all()
    if missing == "mouth":
        assert (found.distance < 0.03).all() and (found.excess[:, PLACES.index("picture")] < 1).all()


def test_what_is_above_a_part_is_not_charged_to_it(recognizer):
    """A fault under the hat is the hat's, and of plain fur and no accessory nothing is to be seen."""
    cat = np.array([[1, PLAIN, 3, 1, 5]])
    image = pictures(cat, 32)
    hat = torch.from_numpy(layers(32)["accessory"][5][..., 3] == 1)
    image[:, :, hat] = (image[:, :, hat] + 0.3).clamp(max=1)
    found = recognizer(image)
    assert found.cats.tolist() == cat.tolist()
    assert [place for place, excess in zip(PLACES, found.excess[0], strict=True) if excess > 1] == ["accessory"]
    assert torch.allclose(found.excess[0, :4], torch.zeros(4), atol=0.02)


def test_other_sizes_are_refused(recognizer):
    with pytest.raises(ValueError, match=r"takes \[B, 3, 32, 32\]"):
        recognizer(torch.zeros(1, 3, 16, 16))
