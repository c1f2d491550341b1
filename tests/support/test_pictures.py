"""Pictures: grids of images, whole files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline.support import pictures
from ddpm_pipeline.support.pictures import Display


def test_grid_shows_each_image_enlarged_in_reading_order():
    images = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    picture = np.asarray(pictures.grid(images, columns=3))
    side, gap = 48, pictures.GAP
    assert picture.shape == (2 * (side + gap) + gap, 3 * (side + gap) + gap)
    centres = [
        picture[gap + row * (side + gap) + 24, gap + column * (side + gap) + 24] for row in (0, 1) for column in range(3)
    ]
    assert centres == [0, 51, 102, 153, 204, 255]


def test_pictures_appear_whole(tmp_path):
    pictures.save_picture(Image.new("L", (4, 4)), tmp_path / "a" / "p.png")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["p.png"]


def as_array(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def test_grids_are_alike_however_the_images_are_given():
    eight_bits = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = eight_bits / 255
    expected = pictures.grid(floats).tobytes()
    pils, arrays = [Image.fromarray(one) for one in as_array(eight_bits)], (as_array(eight_bits), as_array(floats))
    for images in (eight_bits, *arrays, pils, floats.double(), floats.clone().requires_grad_(), list(floats)):
        assert pictures.grid(images).tobytes() == expected
    grey = [Image.fromarray(one).convert("L") for one in as_array(eight_bits)]
    mixed = [grey[0].convert("RGB"), *grey[1:]]
    assert pictures.grid(mixed).tobytes() == pictures.grid(grey).convert("RGB").tobytes()


@pytest.mark.parametrize(
    "images", [None, [], 3, "a.png", torch.zeros(2, 1, 8, 8) - 1, torch.full((1, 1, 8, 8), torch.nan), [None]], ids=str
)
def test_what_is_no_image_is_refused(images):
    with pytest.raises((ValueError, TypeError), match="image"):
        pictures.grid(images)


def test_pictures_are_enlarged_and_labelled():
    trajectory = torch.linspace(-1, 1, 5).view(5, 1, 1, 1, 1).expand(5, 2, 1, 8, 8)
    plain = pictures.strip(trajectory, count=3, size=80)
    labelled = pictures.strip(trajectory, count=3, size=80, labels=["t = 4", 3, 2, 1, 0])
    assert plain.size == (3 * 84 + 4, 2 * 84 + 4)
    assert labelled.size == (plain.width, plain.height + pictures.TEXT_HEIGHT)
    assert labelled.crop((0, pictures.TEXT_HEIGHT, *labelled.size)).tobytes() == plain.tobytes()
    above = np.asarray(labelled)[: pictures.TEXT_HEIGHT]
    assert all((above[:, 4 + 84 * column : 84 * (column + 1)] < 128).any() for column in range(3))
    named = pictures.strip(trajectory, count=3, size=80, rows=["a long name " * 20, "手"])
    left = named.width - plain.width
    assert 100 < left < 200 and named.crop((left, 0, *named.size)).tobytes() == plain.tobytes()
    beside = np.asarray(named)[:, :left] < 128
    assert beside[:84].any() and beside[84:].any() and not beside[[0, -1]].any(), "each in its row, and cut to fit"
    assert named.tobytes() == pictures.strip(trajectory, count=3, size=80, rows=["a long name " * 20, "row 2"]).tobytes()
    with pytest.raises(ValueError, match="1 names for 2 rows"):
        pictures.strip(trajectory, count=3, rows=["a"])
    with pytest.raises(ValueError, match="2 labels for 5 steps"):
        pictures.strip(trajectory, labels=[1, 2])


@pytest.mark.parametrize(("name", "format"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("b.JPEG", "JPEG"), ("c.webp", "WEBP")])
def test_files_are_what_their_names_say(tmp_path, name, format):
    pictures.save_strip(torch.zeros(3, 1, 3, 8, 8), str(tmp_path / name))
    with Image.open(tmp_path / name) as image:
        assert image.format == format


@pytest.mark.parametrize("name", ["picture", "a.txt", "a.mp4"])
def test_names_of_no_format_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.png"):
        pictures.save_strip(torch.zeros(3, 1, 3, 8, 8), tmp_path / name)
    with pytest.raises(ValueError, match=r"\.gif"):
        pictures.save_gif(torch.zeros(3, 1, 3, 8, 8), tmp_path / name)
    with pytest.raises(ValueError, match="transparency"):
        pictures.save_picture(Image.new("RGBA", (4, 4)), tmp_path / "a.jpg")
    assert not any(tmp_path.iterdir())


def test_what_is_no_trajectory_is_refused(tmp_path):
    for save in (pictures.save_strip, pictures.save_gif):
        with pytest.raises(TypeError, match="output_trajectory=True"):
            save(None, tmp_path / "a.gif")
        with pytest.raises(TypeError, match="list"):
            save([torch.zeros(1, 1, 8, 8)], tmp_path / "a.gif")
        with pytest.raises(ValueError, match=r"\[steps, B, C, H, W\]"):
            save(torch.zeros(2, 1, 8, 8), tmp_path / "a.gif")


def test_a_gif_of_one_image_can_be_seen_and_says_where_it_is(tmp_path):
    trajectory = torch.linspace(-1, 1, 4).view(4, 1, 1, 1, 1).expand(4, 1, 1, 8, 8).numpy()
    pictures.save_gif(trajectory, tmp_path / "a.gif", labels=["t = 3", "t = 2", "t = 1", "t = 0"])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4 and min(gif.size) >= 144
        greys = []
        for frame in range(4):
            gif.seek(frame)
            greys.append(gif.convert("L").getpixel((gif.width // 2, gif.height // 2)))
    assert greys == [0, 85, 170, 255]


# ---- images of any depth and number of channels ---------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "display", "shown", "words"),
    [
        (1, Display(), [1], ""), (3, Display(), [1, 2, 3], ""), (4, Display(), [1, 2, 3, 4], ""),
        (2, Display(), [1], "channel 1 of 2"), (13, Display(), [1, 2, 3], "channels 1, 2, 3 of 13"),
        (13, Display.parse("4, 3,2"), [4, 3, 2], "channels 4, 3, 2 of 13"), (3, Display((2,)), [2], "channel 2 of 3"),
        (4, Display(stretch=True), [1, 2, 3], "channels 1, 2, 3 of 4, contrast stretched from percentile 1 to 99"),
        (1, Display(stretch=True), [1], "contrast stretched from percentile 1 to 99"),
    ],
)  # fmt: skip
def test_a_display_shows_channels_and_says_which(channels, display, shown, words):
    images = torch.arange(1, channels + 1).view(1, channels, 1, 1).expand(2, channels, 3, 5) / 100
    assert display.words(channels).removesuffix(", for viewing only") == words
    if not display.stretch:
        assert (display.show(images)[1, :, 2, 4] * 100).round().tolist() == shown
    assert display.show(images).shape[1] == len(shown)


def test_deep_images_are_stretched_between_percentiles_of_each_channel():
    images = torch.rand(4, 2, 9, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 0.5]).view(2, 1, 1) + 0.2
    found = Display((1, 2, 1), stretch=True).show(images)
    low, high = np.percentile(images[:, 0].numpy(), (1, 99))
    np.testing.assert_allclose(found[:, 0], ((images[:, 0] - low) / (high - low)).clamp(0, 1), atol=1e-4)
    assert torch.equal(found[:, 0], found[:, 2]) and 0 < (found == 1).float().mean() < 0.03
    frames = torch.stack([torch.zeros_like(images), images]) * 2 - 1
    expected = pictures.grid(torch.stack([Display().show(images * 0), found[:, :1]], 1).flatten(0, 1), columns=2)
    assert pictures.strip(frames, 2, display=Display((1,), stretch=True)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("channels", ["1,2", "0", "a", "1,,2", "-1", "1,2,3,4"])
def test_channels_that_cannot_be_shown_are_refused(channels):
    with pytest.raises(ValueError, match="counted from 1"):
        Display.parse(channels)
    with pytest.raises(ValueError, match="1 to 3"):
        pictures.grid(torch.zeros(1, 3, 8, 8), display=Display.parse("4,3,2"))


def test_rows_of_a_grid_begin_with_a_picture_of_their_own():
    images, left = torch.full((4, 1, 6, 12), 0.5), torch.stack([torch.zeros(3, 6, 12), torch.ones(3, 6, 12)])
    picture = pictures.grid(images, columns=2, left=left)
    assert picture.mode == "RGB" and picture.size == (3 * 52 + 4, 2 * 28 + 4)
    assert [picture.getpixel((52 * column + 28, 28 * row + 16))[0] for row in (0, 1) for column in range(3)] == [
        0, 128, 128, 255, 128, 128,
    ]  # fmt: skip
