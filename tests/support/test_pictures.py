"""Pictures: grids of images, whole files."""

import numpy as np
import torch
from PIL import Image

from ddpm_pipeline.support import pictures


def test_grid_shows_each_image_enlarged_in_reading_order():
    images = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    picture = np.asarray(pictures.grid(images, columns=3))
    side, gap = 48, pictures.GAP
    assert picture.shape == (2 * (side + gap) + gap, 3 * (side + gap) + gap)
    centres = [
        picture[gap + row * (side + gap) + 24, gap + column * (side + gap) + 24] for row in (0, 1) for column in range(3)
    ]
    assert centres == [0, 51, 102, 153, 204, 255]


def test_grid_takes_what_a_pipeline_returns():
    images = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    expected = np.asarray(pictures.grid(images))
    array = images.permute(0, 2, 3, 1).numpy()
    pils = [Image.fromarray((one[..., 0] * 255).round().astype(np.uint8)) for one in array]
    for given in (array, pils, list(images)):
        assert np.array_equal(pictures.grid(given), expected)
    mixed = pictures.grid([pils[0].convert("RGB"), *pils[1:]])
    assert mixed.mode == "RGB" and np.array_equal(np.asarray(mixed)[..., 1], expected)


def test_pictures_appear_whole(tmp_path):
    pictures.save_picture(Image.new("L", (4, 4)), tmp_path / "a" / "p.png")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["p.png"]
