"""PSNR and SSIM of pairs of images, against their formulas."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ddpm_pipeline.evaluation.likeness import SAME, likeness


def numpy_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, of one channel in [0, 1]."""
    mean_a, mean_b, aa, bb, ab = (
        gaussian_filter(x, 1.5, truncate=3.5, mode="mirror") for x in (a, b, a * a, b * b, a * b)
    )  # windows of 11
    c1, c2 = 0.01**2, 0.03**2
    variances, covariance = aa - mean_a**2 + bb - mean_b**2, ab - mean_a * mean_b
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return similar.mean()


@pytest.mark.parametrize("shape", [(1, 8, 8), (13, 6, 20)])
def test_each_pair_has_its_own_figures(shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, *shape, generator=generator) * 2 - 1
    samples = (images + 0.3 * torch.randn(3, *shape, generator=generator)).clamp(-1, 1)
    samples[2] = images[2]
    found = likeness(samples, images)
    a, b = (values.double().numpy() / 2 + 0.5 for values in (samples, images))
    psnr = [-10 * np.log10(((a[i] - b[i]) ** 2).mean()) for i in range(2)]
    assert found["psnr"].tolist() == pytest.approx([*psnr, SAME])
    ssim = [np.mean([numpy_ssim(*pair) for pair in zip(a[i], b[i], strict=True)]) for i in range(3)]
    assert found["ssim"].tolist() == pytest.approx(ssim, abs=1e-6) and ssim[2] == pytest.approx(1)
    assert {*likeness(samples[..., :5, :], images[..., :5, :])} == {"psnr"}  # too small for a window
