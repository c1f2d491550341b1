"""Quality figures against numpy and scipy in float64, and the extractor's choices."""

import builtins
import copy
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import ddpm_pipeline.evaluation.quality as quality
from ddpm_pipeline.evaluation.digits import fit_digits_classifier, load_digits_images
from ddpm_pipeline.evaluation.features import InceptionFeatures, real_features
from ddpm_pipeline.evaluation.quality import ImageQuality, frechet_distance, frechet_distance_of_halves, precision_recall
from ddpm_pipeline.ranges_alpha_ddpm import ValueRange


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    images, _ = load_digits_images()
    return ((images + 1) * 127.5).round().to(torch.uint8)


def measured(real, generated, **options) -> quality.Quality:
    metric = ImageQuality(fit_digits_classifier(), **{"kid_subsets": 10, **options})
    for images, kind in ((real, True), (generated, False)):
        for batch in images.split(256):
            metric.update(batch, real=kind)
    return metric.compute()


def numpy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root))


def test_a_set_and_itself(digits):
    result = measured(digits, digits)
    assert abs(result.fid) < 1e-6
    assert result.kid < 0  # subsets that share images are closer than unbiased estimates allow for
    assert (result.precision, result.recall) == (1, 1)
    assert (result.num_real, result.num_generated) == (1797, 1797)
    assert 8 < result.inception_score <= 10


def test_disjoint_halves_match_numpy(digits):
    first, second = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))].chunk(2)
    classifier = fit_digits_classifier()
    features = [classifier.features(half.float() / 127.5 - 1).numpy() for half in (first, second)]
    result = measured(first, second)
    assert result.fid == pytest.approx(numpy_frechet(*features), rel=1e-6)
    assert result.fid > 0.01
    assert 0.5 < result.precision < 1


def test_the_distance_keeps_its_digits_far_from_zero():
    """Sums of squares in float32, or around 0, would lose the covariance of features with a large mean."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    near, far = frechet_distance(a, 1.1 * b), frechet_distance(a + 1e5, 1.1 * b + 1e5)
    assert far == pytest.approx(near, rel=1e-6)
    assert near == pytest.approx(numpy_frechet(a.numpy(), 1.1 * b.numpy()), rel=1e-9)


def test_kid_and_score_match_numpy(digits):
    first, second = digits[:600], digits[600:1200]
    classifier = fit_digits_classifier()
    result = measured(first, second, kid_subsets=400, kid_subset_size=300, splits=1)
    x, y = (classifier.features(half.float() / 127.5 - 1).double().numpy() for half in (first, second))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = sum((kernel(z, z).sum() - np.trace(kernel(z, z))) / (n * (n - 1)) for z in (x, y))
    unbiased = within - 2 * kernel(x, y).mean()
    assert abs(result.kid - unbiased) < 4 * result.kid_std / 400**0.5
    p = classifier(second.float() / 127.5 - 1).double().softmax(dim=1).numpy()
    score = np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean())
    assert result.kid_subset_size == 300
    again = []
    for seed in (5, 6):  # of the global generator, which is not used
        torch.manual_seed(seed)
        again.append(measured(first[:100], second[:100], kid_subset_size=30).kid)
    assert again[0] == again[1]
    metric = ImageQuality(classifier, splits=1)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert metric.compute().inception_score == pytest.approx(score, rel=1e-6)


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)
    generated = torch.tensor([[0.5], [3.5], [30.0], [31.0], [32.5]], dtype=torch.float64)
    # k = 1: radii of the real points 1, 1, 1, 8 cover [-1, 3] and [2, 18]; of the generated 3, 3, 1, 1, 1.5
    assert precision_recall(real, generated, num_neighbours=1) == (2 / 5, 3 / 4)
    # the same by brute force, in more dimensions
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 3, dtype=torch.float64, generator=generator) for _ in range(2))

    def share(points, manifold, k):
        radius = [np.sort(np.linalg.norm(manifold - m, axis=1))[k] for m in manifold]
        return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radius, strict=True)) for p in points])

    assert precision_recall(a, b, 3) == (share(b.numpy(), a.numpy(), 3), share(a.numpy(), b.numpy(), 3))


def test_worse_images_get_worse_figures(digits):
    noisy = (digits.float() + 100 * torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    one_class = digits[:5].repeat(100, 1, 1, 1)
    fine, rough = measured(digits[:900], digits[900:]), measured(digits[:900], noisy[900:].to(torch.uint8))
    assert rough.fid > 3 * fine.fid
    assert rough.kid > fine.kid
    assert measured(digits, one_class).recall < 0.1


def test_any_module_will_do():
    class Means(nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3))

    metric = ImageQuality(Means())
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randint(0, 256, (2, 50, 3, 4, 4), generator=generator, dtype=torch.uint8)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    result, means = metric.compute(), [images.double().mean(dim=(2, 3)).numpy() / 127.5 - 1 for images in (real, generated)]
    assert result.fid == pytest.approx(numpy_frechet(*means), rel=1e-4)
    assert np.isnan(result.inception_score)


def test_what_cannot_be_measured_is_named(digits):
    classifier = fit_digits_classifier()
    with pytest.raises(ValueError, match=r"float32.*uint8"):
        ImageQuality(classifier).update(digits.float(), real=True)
    with pytest.raises(ValueError, match="1797 real and 3 generated"):
        measured(digits, digits[:3])
    metric = ImageQuality(classifier)
    metric.add_real_features(torch.full((20, 64), torch.nan))
    metric.update(digits[:20], real=False)
    with pytest.raises(ValueError, match="NaN"):
        metric.compute()
    with pytest.warns(UserWarning, match="20 images give a singular covariance of 64"):
        measured(digits, digits[:20])


def test_reference_features_are_cached_by_data_and_extractor(digits, tmp_path):
    classifier, extracted = fit_digits_classifier(), []

    class Data:
        value_range = ValueRange()

        def __init__(self, fingerprint: str):
            self.fingerprint = fingerprint

        def __len__(self) -> int:
            return 300  # more than a batch

        def pixels(self, indices: range) -> torch.Tensor:
            extracted.append(len(indices))
            return digits[list(indices)]

    first = real_features(Data("aa"), classifier, str(tmp_path))
    assert torch.allclose(first, classifier.features(digits[:300] / 127.5 - 1), atol=1e-5)
    assert torch.equal(real_features(Data("aa"), classifier, str(tmp_path)), first) and extracted.count(256) == 1
    real_features(Data("bb"), classifier, str(tmp_path))
    other, of_other_code = copy.deepcopy(classifier), copy.deepcopy(classifier)
    other.head.bias.add_(1)
    of_other_code.features = lambda images: 2 * classifier.features(images)
    real_features(Data("aa"), other, str(tmp_path))
    assert torch.equal(real_features(Data("aa"), of_other_code, str(tmp_path)), 2 * first)
    assert extracted.count(256) == 4
    metric = ImageQuality(classifier)
    metric.add_real_features(first)
    metric.update(digits[10:30], real=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert metric.compute().num_real == 300


def test_halves_of_one_set_are_near_and_do_not_depend_on_the_global_generator(digits):
    features = fit_digits_classifier().features(digits.float() / 127.5 - 1)
    found = frechet_distance_of_halves(features, num_splits=2)
    torch.manual_seed(1)
    assert frechet_distance_of_halves(features, num_splits=2) == found
    assert found < frechet_distance(features[:800], features[:800] + 1)


# Inception


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    original = builtins.__import__

    def no_fidelity(name, *args, **kwargs):
        if name.startswith("torch_fidelity"):
            raise ModuleNotFoundError(name, name=name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_fidelity)
    with pytest.raises(ImportError, match=r"ddpm-pipeline\[inception\]"):
        InceptionFeatures()


def test_without_weights_or_network_the_error_says_how_to_supply_the_file(monkeypatch, tmp_path):
    """Where the extra is installed; a name that stands for it serves where it is not, as nothing of it is reached."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", sys.modules.get("torch_fidelity", sys))
    with pytest.raises(FileNotFoundError, match=r"pt_missing\.pth are not a file\. Download https"):
        InceptionFeatures(tmp_path / "pt_missing.pth")

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", unreachable)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*inception_weights"):
        InceptionFeatures()
