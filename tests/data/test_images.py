"""Pixels out of image files: every PIL mode, against values computed here with numpy or by hand."""

import colorsys
import json
import struct
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_helpers import encoded
from ddpm_pipeline.data import images as data_images
from ddpm_pipeline.data.images import (
    MAX_PIXELS,
    BadImage,
    Form,
    image_extensions,
    image_pixels,
    image_shape,
    native_channels,
    open_image,
)
from helpers import ROOT, run_command
from picture_files import png

SIDE = 16


def noise(*shape: int, high: int = 256, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def to_array(image: Image.Image, side: int, channels: int) -> np.ndarray:
    return data_images.to_array(image, (side, side), channels)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Straight alpha over white, in float64: colour [..., C], alpha [...]."""
    a = alpha[..., None] / 255.0
    return colour * a + 255.0 * (1 - a)


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


def assert_pixels(actual: np.ndarray, expected: np.ndarray, within: float = 0.51) -> None:
    """Equal up to one rounding to a whole level, or to the tolerance given."""
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(float) - expected).max() <= within


# Modes of up to 8 bits


def test_grey_is_kept_exactly_and_repeated():
    grey = noise(SIDE, SIDE)
    image = open_image(encoded(Image.fromarray(grey)))
    assert image.mode == "L"
    assert np.array_equal(to_array(image, SIDE, 1), grey[..., None])
    assert np.array_equal(to_array(image, SIDE, 3), np.stack([grey] * 3, axis=-1))
    assert np.array_equal(to_array(image, SIDE, 4), np.stack([grey] * 3 + [np.full_like(grey, 255)], axis=-1))


def test_bilevel_is_resized_with_grey_levels():
    board = (np.indices((64, 64)).sum(0) % 2).astype(bool)
    assert_pixels(to_array(Image.fromarray(board), 8, 1), np.full((8, 8, 1), 127.5), within=2)


def test_colour_is_kept_exactly_and_made_grey_by_luma():
    rgb = noise(SIDE, SIDE, 3)
    image = open_image(encoded(Image.fromarray(rgb)))
    assert np.array_equal(to_array(image, SIDE, 3), rgb)
    assert_pixels(to_array(image, SIDE, 1)[..., 0], luma(rgb.astype(float)))
    rgba = to_array(image, SIDE, 4)
    assert np.array_equal(rgba[..., :3], rgb)
    assert (rgba[..., 3] == 255).all()


def test_transparency_is_composited_on_white_unless_asked_for():
    rgba = noise(SIDE, SIDE, 4)
    image = open_image(encoded(Image.fromarray(rgba)))
    expected = on_white(rgba[..., :3], rgba[..., 3])
    assert_pixels(to_array(image, SIDE, 3), expected)
    assert_pixels(to_array(image, SIDE, 1)[..., 0], luma(expected), within=1.01)
    assert np.array_equal(to_array(image, SIDE, 4), rgba)


def test_grey_with_alpha():
    grey, alpha = noise(SIDE, SIDE, seed=1), noise(SIDE, SIDE, seed=2)
    image = open_image(encoded(Image.fromarray(np.stack([grey, alpha], axis=-1))))
    assert image.mode == "LA"
    assert_pixels(to_array(image, SIDE, 1), on_white(grey[..., None], alpha))
    assert np.array_equal(to_array(image, SIDE, 4), np.stack([grey] * 3 + [alpha], axis=-1))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha(mode):
    straight = noise(SIDE, SIDE, 2 if mode == "La" else 4)
    image = Image.fromarray(straight).convert(mode)
    colour = np.broadcast_to(straight[..., :-1], (SIDE, SIDE, 3))
    assert_pixels(to_array(image, SIDE, 3), on_white(colour, straight[..., -1]), within=1.5)  # rounded thrice


def palette_image(palette: np.ndarray, indices: np.ndarray, mode: str = "RGB") -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes(), mode)
    return image


def test_palette():
    palette, indices = noise(256, 3, seed=1), noise(SIDE, SIDE)
    image = open_image(encoded(palette_image(palette, indices)))
    assert image.mode == "P"
    assert np.array_equal(to_array(image, SIDE, 3), palette[indices])
    assert_pixels(to_array(image, SIDE, 1)[..., 0], luma(palette[indices].astype(float)))


def test_palette_is_not_resized_by_index():
    palette = np.zeros((256, 3), np.uint8)
    palette[[0, 200]] = (255, 0, 0), (0, 0, 255)
    stripes = np.where(np.arange(64) % 2, 200, 0).astype(np.uint8)
    array = to_array(palette_image(palette, np.tile(stripes, (64, 1))), 8, 3)
    assert_pixels(array, np.broadcast_to([127.5, 0, 127.5], (8, 8, 3)), within=6)


@pytest.mark.parametrize(("format", "alphas"), [("PNG", "every entry"), ("PNG", "one entry"), ("GIF", "one entry")])
def test_palette_with_transparency(format, alphas):
    palette, indices = noise(256, 3, seed=1), noise(SIDE, SIDE)
    alpha = np.full(256, 255, np.uint8)
    if alphas == "one entry":
        alpha[indices[3, 4]] = 0
        transparency = int(indices[3, 4])
    else:
        alpha = noise(256, seed=2)
        transparency = alpha.tobytes()
    image = open_image(encoded(palette_image(palette, indices), format, transparency=transparency))
    assert_pixels(to_array(image, SIDE, 3), on_white(palette[indices], alpha[indices]))
    assert np.array_equal(to_array(image, SIDE, 4)[..., 3], alpha[indices])


def test_palettes_with_alpha_of_their_own():
    palette, indices, alpha = noise(256, 4, seed=1), noise(SIDE, SIDE), noise(SIDE, SIDE, seed=2)
    image = palette_image(palette, indices, "RGBA")
    assert_pixels(to_array(image, SIDE, 3), on_white(palette[indices, :3], palette[indices, 3]))
    image = Image.merge("PA", [palette_image(palette[:, :3], indices), Image.fromarray(alpha)])
    assert image.mode == "PA"
    assert_pixels(to_array(image, SIDE, 3), on_white(palette[indices, :3], alpha))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_value_of_a_grey_png(bits):
    levels = np.arange(2**bits)
    packed = b"".join(bytes([level << (8 - bits)]) for level in levels.tolist())
    rows = b"".join(b"\0" + packed[i : i + 1] for i in range(len(packed)))  # one pixel a row
    key = 1 if bits == 1 else 2
    image = open_image(png(1, len(levels), bits, 0, rows, struct.pack(">H", key)))
    expected = np.where(levels == key, 255, levels * (255 // (2**bits - 1)))
    assert np.array_equal([to_array(image.crop((0, i, 1, i + 1)), 1, 3)[0, 0, 0] for i in levels.tolist()], expected)
    assert [to_array(image.crop((0, i, 1, i + 1)), 1, 4)[0, 0, 3] for i in (0, key)] == [255, 0]


def test_transparent_colour_of_an_rgb_png():
    rgb = noise(SIDE, SIDE, 3)
    key = tuple(rgb[2, 3].tolist())
    image = open_image(encoded(Image.fromarray(rgb), transparency=key))
    assert image.mode == "RGB"
    hole = (rgb == rgb[2, 3]).all(-1)
    assert np.array_equal(to_array(image, SIDE, 3), np.where(hole[..., None], 255, rgb))
    assert np.array_equal(to_array(image, SIDE, 4)[..., 3], np.where(hole, 0, 255))


def test_transparent_colour_of_a_16_bit_rgb_png():
    rows = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x2234, 0x5678, 0x9ABC)
    image = open_image(png(2, 1, 16, 2, rows, struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    assert np.array_equal(to_array(image.crop((0, 0, 1, 1)), 1, 3)[0, 0], [255, 255, 255])
    assert np.array_equal(to_array(image.crop((1, 0, 2, 1)), 1, 3)[0, 0], [0x22, 0x56, 0x9A])


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk(format):
    inks = np.kron(noise(2, 2, 4), np.ones((SIDE // 2, SIDE // 2, 1), np.uint8))  # flat areas: JPEG keeps them
    image = open_image(encoded(Image.fromarray(inks, "CMYK"), format, **({"quality": 100} if format == "JPEG" else {})))
    assert image.mode == "CMYK"
    expected = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    assert_pixels(to_array(image, SIDE, 3), expected, within=1 if format == "TIFF" else 5)


def test_ycbcr():
    ycc = noise(SIDE, SIDE, 3)
    y, cb, cr = (ycc.astype(float) - [0, 128, 128]).transpose(2, 0, 1)
    expected = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1).clip(0, 255)
    assert_pixels(to_array(Image.fromarray(ycc, "YCbCr"), SIDE, 3), expected, within=1.5)


def test_hsv():
    hsv = noise(SIDE, SIDE, 3)
    expected = np.array([[colorsys.hsv_to_rgb(*(pixel / 255.0)) for pixel in row] for row in hsv]) * 255
    assert_pixels(to_array(Image.fromarray(hsv, "HSV"), SIDE, 3), expected, within=2)


def test_lab():
    lab = np.zeros((4, 4, 3), np.uint8)
    lab[..., 0] = np.array([0, 64, 128, 255])  # L* of 0, 25.1, 50.2 and 100, neutral: a* = b* = 0
    image = open_image(encoded(Image.fromarray(lab, "LAB"), "TIFF"))
    assert image.mode == "LAB"
    lightness = lab[..., :1] * (100 / 255)
    y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    srgb = np.where(y > 0.0031308, 1.055 * y ** (1 / 2.4) - 0.055, 12.92 * y) * 255
    assert_pixels(to_array(image, 4, 3), np.broadcast_to(srgb, (4, 4, 3)), within=2)


# Grey beyond 8 bits


def test_16_bit_values_of_8_bit_images_come_back():
    levels = np.arange(256, dtype=np.uint16).reshape(SIDE, SIDE)
    assert np.array_equal(to_array(Image.fromarray(levels * 257), SIDE, 1)[..., 0], levels)


def test_16_bit_resizing_has_more_than_8_bits():
    """Columns at 100.45, 100.45, 100.45, 101.4 levels mean 100.69; rounded before resizing they would mean 100.25."""
    row = np.tile(np.array([100.45, 100.45, 100.45, 101.4]) * 257, 16).round().astype(np.uint16)
    array = to_array(Image.fromarray(np.tile(row, (64, 1))), 16, 1)
    assert (array[:, 2:-2] == 101).all()


def test_16_bit_resizing_does_not_wrap():
    step = np.where(np.arange(64) < 32, 0, 65535).astype(np.uint16)
    array = to_array(Image.fromarray(np.tile(step, (64, 1))), 12, 1)[0, :, 0].astype(int)
    assert (np.diff(array) >= -1).all()  # Lanczos rings a little
    assert array[[0, -1]].tolist() == [0, 255]


def test_transparent_value_of_a_16_bit_png():
    values = np.array([[0, 300], [40000, 65535]], np.uint16)
    image = open_image(png(2, 2, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values), b"\x01\x2c"))
    assert to_array(image, 2, 1)[..., 0].tolist() == [[0, 255], [156, 255]]
    assert to_array(image, 2, 4)[..., 3].tolist() == [[255, 0], [255, 255]]


# Size


@pytest.mark.parametrize(("width", "height"), [(8, 8), (12, 8), (8, 13), (15, 8)])
def test_centre_crop_without_scaling_is_exact(width, height):
    grey = noise(height, width)
    left, top = (width - 8) // 2, (height - 8) // 2
    assert np.array_equal(to_array(Image.fromarray(grey), 8, 1)[..., 0], grey[top : top + 8, left : left + 8])


def test_centre_crop_after_scaling():
    thirds = np.repeat(np.array([10, 120, 250], np.uint8), 40)
    wide = Image.fromarray(np.tile(thirds, (40, 1)))
    middle = to_array(wide, 10, 1)[..., 0]
    assert_pixels(middle[:, 2:-2], np.full((10, 6), 120.0), within=1)
    assert np.array_equal(to_array(wide.transpose(Image.Transpose.TRANSPOSE), 10, 1)[..., 0], middle.T)


def test_the_crop_is_that_of_the_whole_image_resized():
    image = Image.fromarray(noise(40, 64, 3))
    whole = np.asarray(image.resize((16, 10), Image.Resampling.LANCZOS))
    assert_pixels(to_array(image, 10, 3), whole[:, 3:13].astype(float), within=1)
    wide = noise(40, 60, 3)  # the crop begins 2.5 output columns in, half a column off the grid of the whole
    on_grid = np.asarray(Image.fromarray(wide[:, 2:58]).resize((14, 10), Image.Resampling.LANCZOS))
    assert_pixels(to_array(Image.fromarray(wide), 10, 3)[:, 1:-1], on_grid[:, 3:11].astype(float), within=1)


def test_downscaling_is_antialiased():
    board = ((np.indices((96, 96)).sum(0) % 2) * 255).astype(np.uint8)
    assert_pixels(to_array(Image.fromarray(board), 8, 1), np.full((8, 8, 1), 127.5), within=2)


def test_hidden_colours_do_not_bleed():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :30] = (255, 0, 0, 255)
    rgba[:, 30:] = (0, 255, 0, 0)  # green, but fully transparent
    image = Image.fromarray(rgba)
    four = to_array(image, 16, 4)
    seen = four[..., 3] > 8
    assert (four[seen][:, 0] > 245).all()
    assert (four[seen][:, 1] < 10).all()
    three = to_array(image, 16, 3).astype(int)
    assert (three[..., 0] >= 253).all()
    assert np.array_equal(three[..., 1], three[..., 2])


def test_enlarging_and_extreme_shapes():
    assert (to_array(Image.new("RGB", (3, 2), (10, 20, 30)), 32, 3) == [10, 20, 30]).all()
    assert to_array(Image.new("L", (5000, 1), 7), 4, 1).tolist() == [[[7]] * 4] * 4


# Files


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    upright = np.kron(np.array([[20, 90], [160, 240]], np.uint8), np.ones((16, 16), np.uint8))
    upright = np.concatenate([upright, np.full((16, 32), 60, np.uint8)])  # 48 rows, 32 columns
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.jpg", quality=100, exif=exif)
    image = open_image(tmp_path / "photo.jpg")
    assert image.size == (32, 48) == image_shape(tmp_path / "photo.jpg", "image")[:2]
    assert_pixels(np.asarray(image), upright.astype(float), within=2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_reason_to_refuse():
    data = encoded(Image.new("L", (8, 8), 77), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x01" * 40)
    assert open_image(data).size == (8, 8)


def test_first_frame_of_an_animation():
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (to_array(open_image(data), 4, 1) == 50).all()


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_paths_and_bytes_are_alike(as_path, tmp_path):
    rgb = noise(SIDE, SIDE, 3)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(as_path(tmp_path / "a.png"))), rgb)
    assert image_shape(as_path(tmp_path / "a.png"), "image")[:3] == (SIDE, SIDE, 3)


def bomb(width: int, height: int) -> bytes:
    return png(width, height, 8, 0, b"\0")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"hello, this is text", "cannot identify"),
        (encoded(Image.fromarray(noise(64, 64)))[:2000], "truncated|Truncated"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:900], "truncated"),
        (bomb(20000, 20000), "decompression bomb"),
        (bomb(8192, 8193), "8192x8193 exceeds 67108864 pixels.* bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS is not accepted"),
    ],
    ids=["empty", "text", "truncated png", "truncated jpeg", "bomb", "small bomb", "eps"],
)
def test_bad_files(data, reason, tmp_path):
    (tmp_path / "file").write_bytes(data)
    for source in (data, tmp_path / "file"):
        with pytest.raises(BadImage, match=reason):
            open_image(source)


def test_bombs_are_refused_whatever_pil_is_set_to(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert MAX_PIXELS < 20000 * 20000
    for read in (open_image, partial(image_shape, kind="bytes")):
        with pytest.raises(BadImage, match=r"20000x20000 .* bomb"):
            read(bomb(20000, 20000))


def test_truncated_files_are_refused_and_pil_is_left_as_it_was():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    for data in (b"", encoded(Image.fromarray(noise(64, 64)))[:2000]):
        with pytest.raises(BadImage):
            open_image(data)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


WATCHED = """
import json, sys
from data_helpers import load, parquet
from fuzz_images import fuzz, mutated_files, peak_kib
from pathlib import Path
from ddpm_pipeline.data.images import Form, image_pixels, image_shape
folder = Path(sys.argv[1])
before, large = peak_kib(), {}
for name in ("png", "webp"):
    shape = image_shape(str(folder / name), "image")[:3]
    image_pixels(str(folder / name), "image", Form((64, 64), 3))
    large[name] = [*shape, peak_kib() - before]
result = fuzz(200, 0)
rows = parquet(folder / "x.parquet", [data for *_, data in mutated_files(200, 0)])
data = load(rows, resolution=16, channels=3, max_bad_fraction=0.99, cache_dir=str(folder))
usable = data.rows_of(range(len(data))).tolist()
print(json.dumps(result | {"usable": usable, "large": large, "grown": peak_kib() - before}))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Large and damaged files read in a process of its own, where a crash, a hang or too much memory would be seen."""
    folder = tmp_path_factory.mktemp("files")
    side = int(MAX_PIXELS**0.5) // 2
    for format in ("PNG", "WEBP"):
        (folder / format.lower()).write_bytes(encoded(Image.new("RGBA", (side, side), (1, 2, 3, 4)), format))
    paths = ":".join(str(ROOT / name) for name in ("src", "tests", "benchmarks"))
    done = run_command(sys.executable, "-c", WATCHED, str(folder), PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_mutated_files_end_in_pixels_or_in_bad_image(watched):
    """Of six formats; the benchmark does the same with ten thousand."""
    assert watched["files"] == 200 and 50 < watched["refused"] < 150  # the mutations do bite, and not on everything
    assert set(watched["refused_by_format"]) == {"PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"}
    assert watched["usable"] == [row for row, good in enumerate(watched["_good"]) if good]
    assert watched["grown"] / 1024 < 800


def test_the_largest_image_takes_little_more_than_its_pixels(watched):
    """A quarter of the limit, as RGBA: 64 MiB of pixels, and at most six times as much for a moment."""
    side = int(MAX_PIXELS**0.5) // 2
    for width, height, channels, grown in watched["large"].values():
        assert (width, height, channels) == (side, side, 3)
        assert 64 < grown / 1024 < 6 * 64


def test_the_endings_are_those_of_files_that_give_pixels():
    """Of what PIL writes, all raster formats; and nothing that it opens as a stub or by running another program."""
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".pgm"} <= image_extensions()
    assert not {".eps", ".ps", ".pdf", ".h5", ".hdf", ".grib", ".mpg", ".wmf"} & image_extensions()
    modes = {"BLP": "P", "MSP": "1", "QOI": "RGB", "XBM": "1"}
    for format in {Image.registered_extensions()[ending] for ending in image_extensions()} & Image.SAVE.keys() - {"IM"}:
        data = encoded(Image.new(modes.get(format, "L"), (32, 32)), format)
        assert (to_array(open_image(data), 32, 1) == 0).all(), format


# Native channels


def test_native_channels():
    for channels, modes in {1: "1 L LA La I;16 I;16B I F", 3: "RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV"}.items():
        assert {native_channels(Image.new(mode, (2, 2))) for mode in modes.split()} == {channels}


def test_native_channels_of_palettes_are_those_of_the_colours_in_use():
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    indices = noise(SIDE, SIDE, high=100)
    assert native_channels(palette_image(grey, indices)) == 1
    grey[200] = (255, 0, 0)  # in the palette, but no pixel has it
    assert native_channels(palette_image(grey, indices)) == 1
    grey[indices[0, 0]] = (255, 0, 0)
    assert native_channels(palette_image(grey, indices)) == 3
    assert image_shape(encoded(palette_image(grey, indices)), "bytes")[:3] == (SIDE, SIDE, 3)


# Arrays and arguments


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (1, 5, 6), (5, 6, 3), (3, 5, 6), (5, 6, 4), (4, 5, 6)])
def test_arrays(shape):
    array = noise(*shape)
    channels_last = array.transpose(1, 2, 0) if len(shape) == 3 and shape[0] != 5 else array.reshape(5, 6, -1)
    channels = channels_last.shape[-1]
    assert image_shape(array, "array")[:3] == (6, 5, min(channels, 3))
    assert np.array_equal(image_pixels(array, "array", Form((5, 6), channels)), channels_last)


@pytest.mark.parametrize("array", [noise(5), noise(5, 6, 7), noise(0, 5), noise(2, 2, 2, 2), np.zeros((4, 4), complex)])
def test_arrays_that_are_no_images(array):
    with pytest.raises(BadImage, match=r"array's shape|type|no pixels"):
        image_pixels(array, "array", Form((4, 4), 1))


def test_impossible_sizes_and_channels():
    image = Image.new("L", (8, 8))
    for side in (0, -1, 1.5, "8", True, None):
        with pytest.raises(ValueError, match=r"size=.*height and a width"):
            to_array(image, side, 1)
    for channels in (0, 2, 5, "3", True):
        with pytest.raises(ValueError, match=r"channels=.*\(1, 3, 4\)"):
            to_array(image, 8, channels)
