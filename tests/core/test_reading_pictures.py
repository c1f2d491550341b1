"""One picture, however it is written, is read as the same pixels: by training and evaluation, as `image=`, as `mask_image=`."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_helpers import array_to_image, encoded, load, parquet, stream_of
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, pictures_to_tensor, tensor_to_pictures
from ddpm_pipeline.data.images import BadImage, Form, image_pixels, open_image, to_array
from ddpm_pipeline.pictures_alpha_ddpm import read_pictures
from helpers import tiny_unet
from picture_files import ARRAYS, FILES, HIDDEN, PIL_IMAGES, tiff

SIDE = 8
IN_MEMORY = PIL_IMAGES | ARRAYS
ROUNDING = 0.5 / 255 + 1e-6


def picture() -> np.ndarray:
    """Levels of which the smallest is 0 and the largest 255, and of smooth columns, so that JPEG keeps them."""
    rows = np.linspace(0, 255, SIDE)[:, None] * np.linspace(0.6, 1, SIDE)[None]
    return np.rint(rows).astype(np.uint8)


def black_and_white() -> np.ndarray:
    """One that no turning or mirroring leaves as it is."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:3, :5] = 255
    return mask


@pytest.fixture(scope="module")
def pipe() -> AlphaDDPMPipeline:
    pipe = AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_image(pipe: AlphaDDPMPipeline, given) -> np.ndarray:
    """What a pipeline takes an `image=` for, [H, W] in [0, 1]."""
    return pipe(image=given, strength=0.0, num_inference_steps=1, output_type="np").images[0, ..., 0]


def as_mask(pipe: AlphaDDPMPipeline, given) -> np.ndarray:
    """Where a pipeline paints for a `mask_image=`, bool [H, W]."""
    grey = np.full((SIDE, SIDE), 0.6, np.float32)
    painted = pipe(
        image=grey, mask_image=given, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    return np.abs(painted.images[0, ..., 0] - 0.6) > 1e-4


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> dict[str, np.ndarray]:
    """The pixels that training and evaluation get of each file, [H, W] in [0, 1]."""
    folder = tmp_path_factory.mktemp("files")
    path = parquet(folder / "x.parquet", [write(picture()) for write, _ in FILES.values()])
    options = {"resolution": SIDE, "channels": 1, "cache_dir": str(folder / "cache")}
    data = load(path, max_bad_fraction=0.99, **options)
    assert not data.skipped
    assert data.value_range.dtype == "float32"  # the deepest
    pixels = data.pixels(range(len(data)))[:, 0].numpy()
    streamed = stream_of(path, **options)
    assert streamed.value_range.dtype == "uint8"  # the first one's
    assert np.abs(streamed.first(len(FILES))[:, 0].numpy() / 255 - pixels).max() <= ROUNDING
    return dict(zip(FILES, pixels, strict=True))


@pytest.mark.parametrize("way", FILES)
def test_a_file_is_read_alike_by_all(way, pipe, trained_on):
    write, off = FILES[way]
    assert np.abs(trained_on[way] - picture() / 255).max() <= off + ROUNDING
    for image in (opened(write(picture())), open_image(write(picture()))):  # as a user opens it, and as we do
        for _ in range(2):  # reading leaves an image as it is
            assert np.abs(as_image(pipe, image) - picture() / 255).max() <= off + 1e-6
    if way not in HIDDEN:
        assert np.array_equal(as_mask(pipe, opened(write(black_and_white()))), black_and_white() > 0)


@pytest.mark.parametrize("way", IN_MEMORY)
def test_images_arrays_and_tensors_are_read_alike(way, pipe):
    make, off = IN_MEMORY[way]
    assert np.abs(as_image(pipe, make(picture())) - picture() / 255).max() <= off + 1e-6
    if way in PIL_IMAGES:
        assert np.abs(to_array(make(picture()), (SIDE, SIDE), 1)[..., 0] / 255 - picture() / 255).max() <= off + ROUNDING
    if way not in HIDDEN:
        assert np.array_equal(as_mask(pipe, make(black_and_white())), black_and_white() > 0)


def colourful(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, *shape), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,)])
def test_colours_and_transparency_become_those_that_training_sees(shape, channels):
    """Of 8 bits exactly, of 16 bits and floats within the rounding of 8."""
    values = colourful(*shape)
    expected = to_array(array_to_image(values), (SIDE, SIDE), channels) / np.float32(255)
    tensor = torch.from_numpy(values.reshape(SIDE, SIDE, -1)).movedim(-1, 0)
    for given in (array_to_image(values), values, [tensor], [values], tensor[None]):
        assert np.array_equal(read_pictures(given, "image", channels)[0].movedim(0, -1).numpy(), expected)
    for given in (values.astype(np.uint16) * 257, values / 255, (values / 255).astype(np.float32), values.astype(np.float32)):
        read = read_pictures(given, "image", channels)[0].movedim(0, -1).numpy()
        assert read.dtype == (np.float64 if given.dtype == np.float64 else np.float32)
        assert np.abs(read - expected).max() <= 2 * ROUNDING


def test_batches_keep_their_order(pipe):
    values = np.random.default_rng(2).integers(0, 256, (3, SIDE, SIDE, 1), dtype=np.uint8)
    tensor = torch.from_numpy(values).movedim(-1, 1)
    for given in (values, tensor, list(values), tuple(tensor), [array_to_image(one) for one in values]):
        images = pipe(3, image=given, strength=0.0, num_inference_steps=1, output_type="np").images
        assert np.array_equal(np.rint(images * 255), values)
    black_and_other = [np.zeros((SIDE, SIDE)), values[0].astype(np.float32)]  # 0 is black in any range
    assert np.array_equal(read_pictures(black_and_other, "image").mul(255).round()[1, 0], values[0, ..., 0])


@pytest.mark.parametrize("channels", [2, 5])
def test_models_of_other_channels_take_and_give_arrays(channels):
    pipe = AlphaDDPMPipeline(tiny_unet(in_channels=channels, out_channels=channels), AlphaDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    values = colourful(channels)
    for given in (values, torch.from_numpy(values).movedim(-1, 0), values / 255, [values]):
        back = pipe(image=given, strength=0.0, num_inference_steps=1, output_type="np").images[0]
        assert np.array_equal(np.rint(back * 255), values)
    assert pipe(2, num_inference_steps=2, output_type="pt").images.shape == (2, channels, SIDE, SIDE)
    pipe.unet.forward = None  # nothing is sampled before it is said
    for refused in (
        {},
        {"output_type": "np", "image": colourful(3)},
        {"output_type": "np", "image": Image.new("LA", (SIDE, SIDE))},
    ):
        with pytest.raises(ValueError, match=f"{channels} (are needed|channels)"):
            pipe(num_inference_steps=2, **refused)


def grey(*values, dtype=np.float64, shape=(SIDE, SIDE)) -> np.ndarray:
    """An array that holds these values over and over."""
    return np.resize(np.array(values), shape).astype(dtype)


UNREADABLE = {
    "not a number": grey(0.5, np.nan), "infinite": grey(0, np.inf), "below 0": grey(-1, 1), "a little above 1": grey(0, 1.02),
    "HDR": grey(0, 12.5), "beyond 255": grey(0, 256.0), "integers beyond 255": grey(0, 300, dtype=np.int32),
    "integers below 0": grey(-1, 5, dtype=np.int64), "16 bits in int32": grey(0, 65535, dtype=np.int32),
    "complex": grey(0, 1, dtype=np.complex64), "objects": grey(0, 1, dtype=object), "texts": np.full((SIDE, SIDE), "a"),
    "masked": np.ma.masked_equal(grey(0, 1), 0), "nothing": np.zeros((0, SIDE)), "one dimension": np.zeros(SIDE),
    "five dimensions": np.zeros((1, 1, SIDE, SIDE, 1)), "a list of batches": [np.zeros((1, SIDE, SIDE, 1))], "no pictures": [],
    "a list of numbers": [[0.0] * SIDE] * SIDE, "a path": "seven.png", "sizes": [np.zeros((8, 8)), np.zeros((4, 4))],
    "two ranges": [grey(0, 1.0), grey(0, 255.0)], "channels": np.zeros((SIDE, SIDE, 2)), "channels first": np.zeros((1, 8, 8)),
    "a batch or colours": torch.zeros(3, SIDE, SIDE), "a batch": torch.zeros(2, SIDE, SIDE),
    "complex tensor": torch.zeros(1, SIDE, SIDE, dtype=torch.complex64), "sparse": torch.eye(SIDE).to_sparse(),
    "meta": torch.zeros(SIDE, SIDE, device="meta"), "tensor of numbers beyond 255": torch.full((SIDE, SIDE), 1000),
    "I of 8 bits": Image.fromarray(grey(0, 255, dtype=np.int32)), "I of 17": Image.fromarray(grey(0, 70000, dtype=np.int32)),
    "F below 0": Image.fromarray(grey(-1, 1, dtype=np.float32)), "F above 1": Image.fromarray(grey(0, 1.02, dtype=np.float32)),
    "TIFF of int8": opened(tiff(grey(0, 100, dtype=np.int64), 8, 1, 2)), "no size": Image.new("L", (0, 8)),
    "TIFF of int16": opened(tiff(grey(0, 9999, dtype=np.int64), 16, 1, 2)), "TIFF of 2": opened(tiff(grey(0, 2.0), 32, 0, 3)),
    "bytes that PIL swaps": opened(tiff(grey(0, 1), 32, 1, 3, ">", deflate=True)),
    "bytes that PIL leaves out": opened(tiff(grey(0, 65535, 9, shape=(SIDE, SIDE, 3)), 16, 2, separate=True)),
    "truncated": opened(encoded(grey(7, dtype=np.uint8))[:-30]),
    "EPS": opened(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"),
}  # fmt: skip


@pytest.mark.parametrize("argument", ["image", "mask_image"])
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_rightly_is_refused_with_a_reason(what, argument, pipe):
    pictures = {"image": np.zeros((SIDE, SIDE)), argument: UNREADABLE[what]}
    with pytest.raises(ValueError, match=rf"^{argument}.*[a-z]{{3}}"):
        pipe(num_inference_steps=1, **pictures)
    if isinstance(UNREADABLE[what], Image.Image):
        with pytest.raises(BadImage):
            to_array(UNREADABLE[what], (SIDE, SIDE), 1)


def test_a_dark_file_of_16_bits_stays_dark(pipe):
    dark = grey(*range(200), dtype=np.uint16)
    for data in (encoded(dark), encoded(dark, "TIFF"), b"P5 8 8 65535\n" + dark.astype(">u2").tobytes()):
        for image in (opened(data), open_image(data)):
            np.testing.assert_allclose(as_image(pipe, image), dark / 65535, atol=1e-7)


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int8", "int32", "int64", "uint64"])
def test_integers_whose_white_is_not_clear_are_refused(dtype, pipe):
    """A picture of 8 bits in a type of 16, or black and white as 0 and 1; all black is clear."""
    most = 255 if np.dtype(dtype).name == "uint16" else 1
    for given in (grey(0, most, dtype=dtype), [grey(0, most, dtype=dtype)]):
        with pytest.raises(ValueError, match=r"^image.*white"):
            as_image(pipe, given)
    assert not as_image(pipe, grey(0, dtype=dtype)).any()


def fits(levels: np.ndarray) -> bytes:
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": SIDE, "NAXIS2": SIDE, "BZERO": 32768}
    header = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END"
    return header.ljust(2880).encode() + levels.astype(">i2").tobytes().ljust(2880, b"\0")


def test_formats_of_signed_integers_are_refused_in_training():
    for data in (fits(grey(0, 1, dtype=np.int64)), tiff(grey(0, 100, dtype=np.int64), 16, 1, 2)):
        with pytest.raises(BadImage, match="signed"):
            image_pixels(data, "bytes", Form((SIDE, SIDE), 1))


ZERO_AND_ONE = {
    **{name: np.dtype(name).type for name in ("uint8", "int8", "uint16", "int16", "int32", "uint64", "float32", "bool")},
    "PIL L": lambda mask: Image.fromarray(mask.astype(np.uint8)),
    "PIL I;16": lambda mask: Image.fromarray(mask.astype(np.uint16)),
    "PIL P": lambda mask: Image.fromarray(mask.astype(np.uint8)).convert("P"),
    "PIL RGB": lambda mask: Image.fromarray(np.stack([mask.astype(np.uint8)] * 3, axis=-1)),
    "PNG": lambda mask: opened(encoded(mask.astype(np.uint8))),
    "torch": lambda mask: torch.from_numpy(mask).long(),
    "list": lambda mask: [torch.from_numpy(mask).int()],
}


@pytest.mark.parametrize("kind", ZERO_AND_ONE)
def test_masks_of_0_and_1(kind, pipe):
    mask = black_and_white() > 0
    assert np.array_equal(as_mask(pipe, ZERO_AND_ONE[kind](mask)), mask)
    for none_or_all in (np.zeros_like(mask), np.ones_like(mask)):
        assert np.array_equal(as_mask(pipe, ZERO_AND_ONE[kind](none_or_all)), none_or_all)


def test_half_and_more_is_white(pipe):
    assert as_mask(pipe, grey(0.5, 0.49, 0.51, 0)).sum() == SIDE * SIDE / 2
    assert as_mask(pipe, grey(127, 128, dtype=np.uint8)).sum() == SIDE * SIDE / 2
    tinted = black_and_white()[..., None] // 2 + np.array([60, 70, 63])  # as lossy files are
    assert np.array_equal(as_mask(pipe, tinted), black_and_white() > 0)


@pytest.mark.parametrize(
    "mask",
    [
        grey(0, 2, dtype=np.uint8), grey(0, 255, dtype=np.uint16), grey(0, 1 / 255),
        np.stack([np.zeros((SIDE, SIDE)), grey(0.2)])[..., None],
        grey(255, 255, 255, 255, 0, 0, dtype=np.uint8, shape=(SIDE, SIDE, 3)),
        Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0)), colourful(4), np.zeros((SIDE, SIDE, 2)),
    ],
    ids=["labels", "8 of 16 bits", "0 and 1 of 255", "one of two", "white and red", "transparent", "half so", "channels"],
)  # fmt: skip
def test_masks_that_may_mean_either_are_refused(mask, pipe):
    with pytest.raises(ValueError, match=r"^mask_image.*[a-z]{3}"):
        pipe(2, image=np.zeros((SIDE, SIDE)), mask_image=mask, num_inference_steps=1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pictures_become_tensors_and_the_same_pictures_again(mode):
    levels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, len(mode)), dtype=np.uint8)
    pictures = [Image.fromarray(values.squeeze()) for values in levels]
    x = pictures_to_tensor(pictures)
    torch.testing.assert_close(x, torch.from_numpy(levels).movedim(-1, 1) / 127.5 - 1)
    assert [each.mode for each in tensor_to_pictures(x)] == [mode] * 2
    assert all(np.array_equal(a, b) for a, b in zip(tensor_to_pictures(x), pictures, strict=True))
    assert np.array_equal(tensor_to_pictures(x[0].double() * 1.5)[0], tensor_to_pictures((x[0] * 1.5).clamp(-1, 1))[0])
    assert pictures_to_tensor(pictures[0], channels=1).shape == (1, 1, 5, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(2, 2, 4, 4), "1, 3 or 4 channels"), (torch.zeros(4, 4), "float tensor"), (np.zeros((1, 4, 4)), "ndarray"),
     (torch.zeros(1, 4, 4, dtype=torch.uint8), "uint8"), (torch.full((1, 4, 4), torch.nan), "NaN")],
)  # fmt: skip
def test_tensors_that_are_no_pictures(x, message):
    with pytest.raises(ValueError, match=message):
        tensor_to_pictures(x)
