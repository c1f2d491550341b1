"""The recognizer of cats, against the cats themselves and their neighbours."""

import numpy as np
import pytest
import torch

from ddpm_pipeline.data.cats import COUNTS, all_cats, draw
from ddpm_pipeline.evaluation.cats import CatRecognizer


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


def test_other_sizes_are_refused(recognizer):
    with pytest.raises(ValueError, match=r"takes \[B, 3, 32, 32\]"):
        recognizer(torch.zeros(1, 3, 16, 16))
