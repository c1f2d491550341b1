"""Random numbers of training: functions of (seed, step, position), and nothing else."""

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_pipeline.support.draws import BatchSlice, RandomStream, image_indices, noise_of, seeds, uniform


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    num_images, batch_size = 50, 16
    seen = np.concatenate([image_indices(3, num_images, step, batch_size) for step in range(25)])
    epochs = seen[: 8 * num_images].reshape(8, num_images)
    assert all(sorted(epoch) == list(range(num_images)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert not np.array_equal(seen, np.concatenate([image_indices(4, num_images, step, batch_size) for step in range(25)]))


def test_batches_larger_than_the_data():
    assert sorted(image_indices(0, 3, 5, 12)) == sorted([0, 1, 2] * 4)


def test_draws_are_functions_of_seed_step_and_stream():
    first = uniform(1, RandomStream.TIMESTEP, 7, 100)
    np.testing.assert_array_equal(first[:10], uniform(1, RandomStream.TIMESTEP, 7, 10))
    for other in (
        uniform(2, RandomStream.TIMESTEP, 7, 100),
        uniform(1, RandomStream.FLIP, 7, 100),
        uniform(1, RandomStream.TIMESTEP, 8, 100),
    ):
        assert not np.isin(first, other).any()
    many = np.concatenate([uniform(1, RandomStream.TIMESTEP, step, 64) for step in range(500)])
    assert stats.kstest(many, "uniform").pvalue > 1e-3


def test_noise_is_each_images_own_and_standard_normal():
    image_seeds = seeds(0, RandomStream.NOISE, 0, 200)
    noise = noise_of(image_seeds, (3, 8, 8), torch.device("cpu"))
    torch.testing.assert_close(noise_of(image_seeds[50:60], (3, 8, 8), torch.device("cpu")), noise[50:60], atol=0, rtol=0)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1] == pytest.approx(0, abs=0.3)


def test_a_slice_of_the_global_batch_has_the_numbers_of_its_positions():
    where = BatchSlice(seed=3, step=5, batch_size=16, positions=slice(4, 8))
    np.testing.assert_array_equal(where.uniform(RandomStream.FLIP), uniform(3, RandomStream.FLIP, 5, 16)[4:8])
    np.testing.assert_array_equal(where.seeds(RandomStream.NOISE), seeds(3, RandomStream.NOISE, 5, 16)[4:8])
