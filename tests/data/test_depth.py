"""Images of any depth, number of channels, size and range of values, in real files, against numpy."""

import logging
import re
import sys
from dataclasses import replace
from functools import partial

import imagecodecs
import numpy as np
import pytest
import tifffile
from datasets import Array2D, Array3D, Dataset, Features
from PIL import Image

from data_helpers import data_options, encoded, stream_of
from ddpm_pipeline.data import ConditionColumns, DataError, DataOptions, load_images, open_data, ranges
from ddpm_pipeline.data.arrays import channels_last
from ddpm_pipeline.data.held_out import open_training_data
from ddpm_pipeline.data.images import BadImage, Form, image_pixels
from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.ranges_alpha_ddpm import ValueRange
from ddpm_pipeline.support.errors import ConfigError, MissingExtraError

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 65536, (8, 12, 13), dtype=np.uint16)  # as of Sentinel-2, [H, W, C]
INT16 = RNG.integers(-1000, 3000, (8, 12), dtype=np.int16)  # as of CT


def folder_of(path, *arrays, suffix="npy", **how):
    """A folder with one file per array, by numpy or tifffile."""
    path.mkdir()
    for number, array in enumerate(arrays):
        file = path / f"{number}.{suffix}"
        {"npy": np.save, "npz": np.savez, "tif": tifffile.imwrite}[suffix](file, array, **how)
    return path


def last(data) -> np.ndarray:
    """All images, [N, H, W, C]."""
    return np.moveaxis(data.pixels(range(len(data))).numpy(), 1, -1)


# Files and columns


CONTIGUOUS = {"planarconfig": "contig", "photometric": "minisblack"}
CHANNELS_FIRST = np.moveaxis(BANDS, -1, 0)
FILES = {
    "interleaved": (BANDS, CONTIGUOUS),
    "planar": (CHANNELS_FIRST, {"planarconfig": "separate", "photometric": "minisblack"}),
    "pages": (CHANNELS_FIRST, {"photometric": "minisblack"}),
    "deflate": (BANDS, {**CONTIGUOUS, "compression": "zlib", "predictor": True}),
    "LZW": (BANDS, {**CONTIGUOUS, "compression": "lzw", "predictor": True}),  # as GIS tools write them
    "big-endian": (BANDS, {**CONTIGUOUS, "byteorder": ">"}),
    "BigTIFF": (BANDS, {**CONTIGUOUS, "bigtiff": True}),
    "npy [H, W, C]": (BANDS, {"suffix": "npy"}),
    "npy [C, H, W]": (CHANNELS_FIRST, {"suffix": "npy"}),
    "npy big-endian, Fortran": (np.asfortranarray(BANDS.astype(">u2")), {"suffix": "npy"}),
    "npz": (BANDS, {"suffix": "npz"}),
}


@pytest.mark.parametrize("way", FILES)
def test_bands_keep_their_16_bits(way, load, tmp_path, caplog):
    values, how = FILES[way]
    data = load(folder_of(tmp_path / "tiles", values, **{"suffix": "tif", **how}), channels=13)
    assert (data.size, data.channels, data.value_range) == ((8, 12), 13, ValueRange.of_type("uint16"))
    assert np.array_equal(last(data)[0], BANDS)
    assert all(chunk.dtype == np.uint16 and not chunk.flags.owndata for chunk in data._pixel_chunks)  # in the mapped file
    if "npy" in way or "npz" in way:
        return
    data = load(tmp_path / "tiles")  # of a TIFF, whose header tells which axis holds the channels
    assert np.array_equal(last(data)[0], BANDS[..., :1] if way == "pages" else BANDS)
    said = "several pages, of which the first is read. If pages are channels, say --channels 13" in caplog.text
    assert said == (way == "pages")


def test_colours_of_16_bits_are_kept(load, tmp_path):
    colours = np.ascontiguousarray(BANDS[..., :3])
    data = load(folder_of(tmp_path / "rgb", colours, suffix="tif", photometric="rgb"))
    assert data.channels == 3 and np.array_equal(last(data)[0], colours)
    assert np.abs(last(load(tmp_path / "rgb", channels=1))[0, ..., 0] - colours @ [0.299, 0.587, 0.114]).max() <= 0.5
    rgba = np.concatenate([colours, np.full((8, 12, 1), 65535, np.uint16)], -1)
    turned = folder_of(tmp_path / "turned", rgba, suffix="tif", photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    data = load(turned)
    assert (data.size, data.channels) == ((12, 8), 3) and np.array_equal(last(data)[0], np.rot90(colours, -1))


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_in_a_png_are_kept(channels, load, tmp_path):
    """Pillow gives their upper 8 bits."""
    colours = np.ascontiguousarray(BANDS[..., :channels])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "0.png").write_bytes(imagecodecs.png_encode(colours))
    data = load(tmp_path / "deep", channels=channels)
    assert data.value_range == ValueRange.of_type("uint16") and np.array_equal(last(data)[0], colours)


@pytest.mark.parametrize(
    ("shape", "channels", "found"),
    [
        ((5, 100, 70), None, (100, 70, 5)), ((100, 70, 64), None, (100, 70, 64)), ((3, 8, 9), None, (8, 9, 3)),
        ((13, 32, 32), None, (32, 32, 13)), ((32, 32, 13), None, (32, 32, 13)), ((9, 13, 8), 9, (13, 8, 9)),
        ((3, 3, 3), None, None), ((9, 13, 8), None, None), ((9, 13, 9), 9, None), ((200, 70, 80), None, None),
    ],
)  # fmt: skip
def test_which_axis_holds_the_channels(shape, channels, found):
    if found is None:
        with pytest.raises(BadImage, match=r"not clearly"):
            channels_last(np.zeros(shape), channels)
    else:
        assert channels_last(np.zeros(shape), channels).shape == found


def test_files_of_numpy_that_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=INT16, b=INT16)
    np.savez(tmp_path / "named.npz", image=BANDS, mask=INT16)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    head = encoded_npy((2**20, 2**20), "<f8")
    (tmp_path / "bomb.npy").write_bytes(head)
    (tmp_path / "short.npy").write_bytes((tmp_path / "objects.npy").read_bytes()[:20])
    assert np.array_equal(image_pixels(str(tmp_path / "named.npz"), "image", Form((8, 12), 13, "uint16")), BANDS)
    reasons = {"two.npz": "2 arrays", "objects.npy": "Python objects", "bomb.npy": "at most", "short.npy": "[a-z]{3}"}
    for name, reason in reasons.items():
        for source in (str(tmp_path / name), (tmp_path / name).read_bytes()):
            with pytest.raises(BadImage, match=reason):
                image_pixels(source, "image", Form((8, 12), 1))


def encoded_npy(shape: tuple[int, ...], dtype: str) -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def test_array_columns_of_any_type(load, tmp_path):
    features = Features({"tile": Array3D((8, 12, 13), "uint16"), "slice": Array2D((8, 12), "int16")})
    rows = {"tile": [BANDS, BANDS[::-1]], "slice": [INT16] * 2, "nested": [INT16.tolist()] * 2}
    made = Dataset.from_dict({name: rows[name] for name in features}, features=features)
    made = made.add_column("nested", rows["nested"])
    made.save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", image_column="tile", channels=13)
    assert np.array_equal(last(data), [BANDS, BANDS[::-1]])
    for column in ("slice", "nested"):  # the latter of int64
        data = load(tmp_path / "saved", image_column=column, value_range="-1000,3000")
        assert data.value_range == ValueRange((-1000,), (3000,), "int16")
        assert np.array_equal(last(data)[1, ..., 0], INT16)
    stream = stream_of(tmp_path / "saved", image_column="tile", resolution="8x12", channels=13)
    assert stream.value_range.dtype == "uint16" and np.array_equal(np.moveaxis(stream.first(1)[0].numpy(), 0, -1), BANDS)


def test_without_tifffile_the_command_is_named(load, tmp_path, monkeypatch):
    values, how = FILES["interleaved"]
    folder = folder_of(tmp_path / "tiles", values, suffix="tif", **how)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(MissingExtraError, match=r"needs tifffile.*pip install 'ddpm-pipeline\[tiff\]'"):
        load(folder, channels=13, resolution=4)


def test_bands_are_never_converted(load, tmp_path):
    values, how = FILES["interleaved"]
    folder = folder_of(tmp_path / "tiles", values[..., :4], suffix="tif", **how)
    with pytest.raises(DataError, match="4 channels, which are no colours, where 3"):
        load(folder, channels=3)
    assert load(folder).channels == 4


# Depth


def test_the_depth_is_that_of_the_deepest(load, tmp_path):
    grey = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
    deep = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(grey).save(folder / "0.png")
    assert load(folder).value_range == ValueRange()
    Image.fromarray(deep).save(folder / "1.png")
    data = load(folder)
    assert data.value_range == ValueRange.of_type("uint16")
    assert np.array_equal(last(data)[..., 0], [grey.astype(np.uint16) * 257, deep])
    stream = stream_of(folder)  # from its first image on
    assert stream.value_range.dtype == "uint8" and np.array_equal(stream.first(2)[1, 0], np.rint(deep / 257))
    Image.fromarray((deep / 65535).astype(np.float32)).save(folder / "2.tif")
    data = load(folder)
    assert data.value_range == ValueRange.of_type("float32")
    np.testing.assert_allclose(last(data)[..., 0], [grey / 255, deep / 65535, deep / 65535], atol=1e-7)
    assert len({load(folder, resolution=size).fingerprint for size in (4, 8)}) == 2


# Ranges


def test_stated_ranges(load, tmp_path):
    folder = folder_of(tmp_path / "slices", INT16, INT16 // 2)
    data = load(folder, value_range=(-1000, 3000))
    assert data.value_range == ValueRange((-1000,), (3000,), "int16")
    assert np.array_equal(last(data)[..., 0], [INT16, INT16 // 2])
    assert load(folder, value_range="-1000,3001").fingerprint != data.fingerprint
    with pytest.raises(DataError, match=r"--value_range 0,3000 would clip [\d.]+% of the values of 'slices', which go from -"):
        load(folder, value_range="0,3000")
    with pytest.raises(DataError, match=r"2 pairs.* 1 channels"):
        load(folder, value_range="-1000,3000,0,1")
    with pytest.raises(DataError, match=r"-1000..40000 for the int16 values"):
        load(folder, value_range="-1000,40000")
    stream = stream_of(folder, resolution="8x12", value_range="-1000,3000", channels=None)
    assert stream.value_range == data.value_range and stream.channels == 1
    assert np.array_equal(stream.first(1)[0, 0], INT16)
    with pytest.raises(DataError, match="would clip"):
        stream_of(folder, resolution="8x12", value_range="0,3000")


def test_percentiles_are_measured_per_channel(load, tmp_path, monkeypatch):
    tiles = [RNG.normal(0, 1 + np.arange(3), (8, 12, 3)).astype(np.float32) for _ in range(6)]
    folder = folder_of(tmp_path / "tiles", *tiles)
    expected = np.percentile(np.stack(tiles), [1, 99], axis=(0, 1, 2))
    for _ in range(2):
        found = load(folder, value_range="percentile:1,99").value_range
        np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-6)
    monkeypatch.setattr(ranges, "MEASURED_BYTES", 3 * tiles[0].nbytes)  # as of data beyond it
    found = load(folder, value_range="percentile:1,99").value_range
    np.testing.assert_allclose(
        found.high, np.percentile(np.stack([tiles[0], tiles[2], tiles[5]]), 99, axis=(0, 1, 2)), rtol=1e-6
    )
    slices = folder_of(tmp_path / "slices", INT16)
    found = load(slices, value_range="percentile:1,99").value_range
    low, high = np.percentile(INT16, [1, 99])
    assert (found.low, found.high, found.dtype) == ((np.floor(low),), (np.ceil(high),), "int16")
    with pytest.raises(ConfigError, match=r"percentile:1,99 is measured on all images.*drop --streaming"):
        stream_of(slices, resolution=8, value_range="percentile:1,99")
    with pytest.raises(DataError, match=r"means 7..7 for the uint8 values"):
        load(folder_of(tmp_path / "flat", np.full((8, 8), 7, np.uint8)), value_range="percentile:1,99")


def test_values_without_a_known_range_are_one_clear_line(load, tmp_path):
    floats = RNG.normal(0, 3, (8, 8)).astype(np.float32)
    for number, array in enumerate([INT16, floats, np.eye(8, dtype=np.int64)]):
        folder = folder_of(tmp_path / f"{number}", array, array)
        with pytest.raises(DataError, match=r"^2 of 2 images of .* black and white.*--value_range percentile:1,99 \(.*\)\.$"):
            load(folder)
    tiff = folder_of(tmp_path / "tiff", INT16, suffix="tif")
    with pytest.raises(DataError, match="signed integers"):
        load(tiff)
    assert np.array_equal(last(load(tiff, value_range="-1000,3000"))[0, ..., 0], INT16)
    holes = folder_of(tmp_path / "holes", floats, np.where(floats > 4, np.nan, floats), suffix="tif")
    data = load(holes, value_range="percentile:0,100", max_bad_fraction=0.5)
    assert len(data) == 1 and "nan" in data.skipped[0]["reason"]
    huge = floats.astype(float) * 1e300
    for name, array, reason in [("beyond", huge, "beyond 32 bits"), ("none", huge[:0], r"no pixels.*\(0, 8, 1\)")]:
        with pytest.raises(DataError, match=reason):
            load(folder_of(tmp_path / name, array), value_range="-1,1")


def test_16_bits_of_which_few_are_used_are_told(load, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    load(folder_of(tmp_path / "bright", BANDS), channels=13)
    assert not caplog.text
    load(folder_of(tmp_path / "12 bits", BANDS // 16), channels=13)
    assert re.search(r"'12 bits': 99.9 % of the values are at most 4\d{3} of 65535. .*--value_range percentile", caplog.text)


def test_a_model_s_range_is_that_of_the_data_it_is_judged_on(tmp_path):
    folder = folder_of(tmp_path / "slices", INT16)
    for streaming in (False, True):
        options = data_options(folder, resolution="8x12", channels=1, cache_dir=str(tmp_path / "cache"), streaming=streaming)
        data = open_data(*options, ValueRange((-100,), (500,), "int16"))
        assert data.value_range == ValueRange((-100,), (500,), "int16")
    grey = folder_of(tmp_path / "grey", np.full((8, 12), 9, np.uint8))
    data = open_data(*data_options(grey, cache_dir=str(tmp_path / "cache")), ValueRange.of_type("uint16"))
    assert (last(data) == 9 * 257).all() and data.value_range == ValueRange.of_type("uint16")


def test_held_out_images_are_read_in_the_range_of_the_others(tmp_path, caplog):
    folder, other = folder_of(tmp_path / "train", INT16, INT16 + 5), folder_of(tmp_path / "other", INT16 + 900, INT16 + 950)
    common = {"value_range": "percentile:1,99", "cache_dir": str(tmp_path / "cache")}
    options = TrainingDataOptions(dataset=str(folder), validation_split=str(other), **common)
    data = open_training_data(options, ConditionColumns(), 0)
    assert data.held_out.value_range == data.value_range == load_images(data_options(folder, **common)[0]).value_range
    assert re.search(r"'other': [\d.]+ % of the values lie beyond the model's range, -\d+..\d+, and are clipped", caplog.text)
    with pytest.raises(DataError, match=r"holds out 2 images, and leaves 0 of 2"):
        open_training_data(replace(options, validation_split="train"), ConditionColumns(), 0)


@pytest.mark.parametrize(
    "text", ["1", "3,1", "1,nan", "a,b", "0,1,2", "percentile:1", "percentile:-1,50", "percentile:1,2,3,4", ""]
)
def test_impossible_ranges(text):
    with pytest.raises(ConfigError, match=r"--value_range .* must be low,high such as -1000,3000"):
        DataOptions(value_range=text)


# Sizes


def resized(image: np.ndarray, size: tuple[int, int], **how) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS, **how))


def test_ways_of_resizing():
    image = RNG.integers(0, 256, (40, 30), dtype=np.uint8)
    form = partial(Form, (12, 24), 1)
    made = {way: image_pixels(encoded(image), "bytes", form(resize=way))[..., 0] for way in ("crop", "pad", "stretch")}
    assert np.array_equal(made["crop"], resized(image, (12, 24), box=(0, 12, 30, 27)))
    assert np.array_equal(made["stretch"], resized(image, (12, 24)))
    inside = resized(image, (12, 9))
    assert np.array_equal(made["pad"], np.pad(inside, [(0, 0), (7, 8)], mode="edge"))
    with pytest.raises(BadImage, match=r"its size is 40x30, not 12x24.*--resize"):
        image_pixels(encoded(image), "bytes", form(resize="none"))


@pytest.mark.parametrize("way", ["crop", "pad", "stretch"])
def test_every_depth_and_channel_is_resized_alike(way):
    image = RNG.integers(80, 180, (40, 30, 5), dtype=np.uint8)  # so that overshooting is not clipped
    form = partial(Form, (12, 24), resize=way)
    eight = image_pixels(image, "array", form(5))
    for channel in range(5):
        assert np.array_equal(eight[..., channel], image_pixels(image[..., channel], "array", form(1))[..., 0])
    sixteen = image_pixels(image.astype(np.uint16) * 257, "array", form(5, "uint16"))
    floats = image_pixels(image / 255, "array", form(5, "float32"))
    raw = image_pixels(image.astype(np.int16) - 128, "array", form(5, "int16", raw=True))
    assert np.abs(sixteen / 257 - eight).max() <= 1 and np.abs(floats * 255 - eight).max() <= 1
    assert np.abs(raw + 128.0 - eight.clip(image.min((0, 1)), image.max((0, 1)))).max() <= 1  # raw values stay between those


def test_label_maps_keep_their_numbers():
    labels = RNG.integers(0, 21, (40, 30), dtype=np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    form = Form((20, 15), 1, raw=True, nearest=True)
    expected = labels[1::2, 1::2]
    for source in (encoded(palette), encoded(labels), encoded(np.repeat(labels[..., None], 3, -1))):
        assert np.array_equal(image_pixels(source, "bytes", form)[..., 0], expected)
    with pytest.raises(BadImage, match="label map"):
        image_pixels(encoded(palette.convert("RGB")), "bytes", form)
    with pytest.raises(BadImage, match=r"300.* uint8"):
        image_pixels(np.full((20, 15), 300, np.uint16), "array", form)


def test_images_of_one_size_are_left_alone(load, tmp_path):
    folder = folder_of(tmp_path / "tiles", BANDS, BANDS)
    load = partial(load, channels=13)
    data = load(folder, resize="none")
    assert data.size == data.stored_size == (8, 12)
    with pytest.raises(DataError, match=r"--resize none: .* 8x12, not 8x8"):
        load(folder, resize="none", resolution=8)
    np.save(folder / "2.npy", BANDS[:6])
    with pytest.raises(DataError, match="2 different sizes, from 6x12 to 8x12"):
        load(folder, resize="none", resolution=8)


def test_features_beside_pictures_are_no_images(load, tmp_path):
    folder = folder_of(tmp_path / "pictures", np.zeros(2048))
    Image.new("L", (8, 8)).save(folder / "1.png")
    assert len(load(folder)) == 1
