"""Windows, mirror images and motions: identities, and the same for an image and a label map beside it."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.data.views import STILL, Views
from ddpm_pipeline.support.errors import ConfigError

DTYPES = (np.uint8, np.uint16, np.int16, np.float32)


def places(height: int, width: int, count: int = 1) -> np.ndarray:
    """Images whose two channels are the places of the pixels' middles, down and to the right, float32 [count, H, W, 2]."""
    one = np.stack(np.mgrid[:height, :width], axis=-1) + 0.5
    return np.tile(one.astype(np.float32), (count, 1, 1, 1))


def random_windows(count: int, least: float = 0.5) -> np.ndarray:
    windows = np.random.default_rng(0).random((count, 3))
    windows[:, 0] = least + (1 - least) * windows[:, 0]
    return windows


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_view_of_an_image_is_the_image(dtype):
    images = (np.random.default_rng(0).random((3, 6, 8, 5)) * 100).astype(dtype)
    plain = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    for resized in (False, True):
        views = Views((6, 8), resized, motions=np.tile(STILL, (3, 1, 1)))
        assert torch.equal(views.apply(images), plain) and views.apply(images).is_contiguous()
    inner = Views((4, 4)).apply(list(images))
    assert torch.equal(inner, plain[:, :, 1:5, 2:6])
    with pytest.raises(ValueError, match="images of 6x8 pixels have no window of 7x8"):
        Views((7, 8)).apply(images)


def test_windows_have_their_size_and_reach_every_place():
    images, windows = places(7, 9, 500), np.random.default_rng(0).random((500, 3))
    seen = Views((4, 6), windows=windows).apply(images).numpy()
    corners = seen[:, :, 0, 0]
    assert np.array_equal(seen, corners[:, :, None, None] + places(4, 6)[0].transpose(2, 0, 1) - 0.5)
    assert {tuple(corner) for corner in (corners - 0.5).tolist()} == {(y, x) for y in range(4) for x in range(4)}


def test_a_window_of_a_window_is_a_window():
    images = np.random.default_rng(0).integers(0, 2**16, (2, 9, 9, 1), np.uint16)
    outer, inner = np.array([[1, 0.3, 0.9]] * 2), np.array([[1, 0.6, 0.1]] * 2)  # of 3 and of 3 places, each way
    first = Views((7, 7), windows=outer).apply(images)  # from (0, 2) on
    second = Views((5, 5), windows=inner).apply(first.permute(0, 2, 3, 1).numpy())  # from (1, 0) on
    assert np.array_equal(second.numpy(), images.transpose(0, 3, 1, 2)[:, :, 1:6, 2:7])


@pytest.mark.parametrize("size", [(12, 14), (40, 50), (3, 4)])
def test_resized_windows_are_those_of_pillow(size):
    images, windows = np.random.default_rng(0).random((5, 24, 30, 1)).astype(np.float32), random_windows(5)
    for image, (share, top, left), seen in zip(images, windows, Views(size, True, windows).apply(images), strict=True):
        height, width = (share * min(24 / size[0], 30 / size[1]) * side for side in size)
        box = (left * (30 - width), top * (24 - height), left * (30 - width) + width, top * (24 - height) + height)
        expected = Image.fromarray(image[..., 0]).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
        np.testing.assert_allclose(seen[0], np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("resized", [False, True])
def test_mirrored_windows_are_the_windows_mirrored(resized):
    images, windows = places(10, 12, 4), random_windows(4)
    flips = np.array([[False, False], [False, True], [True, False], [True, True]])
    plain, mirrored = (Views((6, 8), resized, windows, which).apply(images) for which in (None, flips))
    expected = [image.flip([axis for axis, flip in zip((1, 2), which, strict=True) if flip])
                for image, which in zip(plain, flips, strict=True)]  # fmt: skip
    assert torch.equal(mirrored, torch.stack(expected))


def random_motions(count: int) -> np.ndarray:
    """Small enough for the middle of an image to stay within."""
    return STILL + 0.1 * np.random.default_rng(1).standard_normal((count, 2, 3))


@pytest.mark.parametrize("resized", [False, True])
def test_an_image_and_its_label_map_stay_aligned(resized):
    """An image of its own coordinates, seen beside a map of them to the nearest: what both show never differs by a pixel."""
    count, options = 20, {"flips": np.random.default_rng(2).random((20, 2)) < 0.5, "motions": random_motions(20)}
    views = Views((16, 20), resized, random_windows(count), **options)
    image, labels = places(24, 30, count), np.arange(24 * 30, dtype=np.uint16).reshape(1, 24, 30, 1).repeat(count, 0)
    found = views.apply(labels, nearest=True)[:, 0].long()
    assert set(found.unique().tolist()) <= set(range(720))
    by_label = torch.stack([found // 30, found % 30], dim=1) + 0.5
    away = (views.apply(image) - by_label)[:, :, 6:10, 7:13].abs()  # the middle, which no reflection reaches
    assert away.max() < (1.8 if resized else 0.75)


def test_motions_take_values_from_where_they_say():
    motions = random_motions(6)
    middle = np.array([8.0, 10.0])
    seen = Views((16, 20), motions=motions).apply(places(16, 20, 6)).numpy()
    for image, motion in zip(seen, motions, strict=True):
        for y, x in ((7, 9), (9, 12), (6, 10)):  # torch's cubic interpolation is not exact for ramps
            offset = np.array([x + 0.5 - middle[1], y + 0.5 - middle[0]])
            right, down = motion[:, :2] @ (offset - motion[:, 2] * [20, 16])
            np.testing.assert_allclose(image[:, y, x], [middle[0] + down, middle[1] + right], atol=0.1)


def test_a_quarter_turn_is_exact():
    image = np.random.default_rng(0).integers(0, 2**16, (1, 8, 8, 13), np.uint16)
    turn = np.array([[[0.0, -1, 0], [1, 0, 0]]])
    assert np.array_equal(Views((8, 8), motions=turn).apply(image)[0].numpy(), np.rot90(image[0].transpose(2, 0, 1), 1, (1, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_crop": 1.0}, "for --resize none"),
        ({"random_crop": 0.5, "resize": "none"}, "for --resize none"),
        ({"random_crop": 1.0, "resize": "none", "streaming": True, "resolution": 8}, "own size is unknown"),
        ({"random_crop": 0.0}, "must be above 0 and at most 1"),
        ({"random_crop": 0.5, "random_resized_crop": 0.5}, "two kinds of windows; drop one"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingDataOptions(**options)


def test_images_are_stored_larger_than_their_windows():
    assert TrainingDataOptions(random_crop=0.875).stored_size((64, 96)) == (73, 110)
    assert TrainingDataOptions(random_resized_crop=0.5).stored_size((48, 96)) == (96, 192)
    assert TrainingDataOptions().stored_size((48, 96)) == (48, 96)
    with pytest.raises(ConfigError, match=r"--random_crop 0.99 of 8x8 pixels leaves a window only one place; use at most 0.89"):
        TrainingDataOptions(random_crop=0.99).stored_size((8, 8))


def test_windows_of_images_as_they_are():
    whole, resized = (TrainingDataOptions(resize="none", **crop) for crop in ({"random_crop": 1}, {"random_resized_crop": 0.5}))
    assert whole.stored_size((64, 64), (100, 80)) == (100, 80) == resized.stored_size((40, 40), (100, 80))
    with pytest.raises(ConfigError, match="only one place; use a --resolution below that"):
        whole.stored_size((100, 80), (100, 80))
    with pytest.raises(ConfigError, match=r"0.5 of 100x80 pixels is below --resolution 48x48; use 0.6"):
        resized.stored_size((48, 48), (100, 80))
