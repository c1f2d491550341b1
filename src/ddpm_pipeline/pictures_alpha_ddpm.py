"""One reading of pictures: PIL images, arrays and tensors as pixels whose black and white are known.

Training and evaluation (`data/images.py`) and the pipelines (`editing_alpha_ddpm.py`) read every picture here. What cannot be
read as it was meant is refused with a reason. Travels inside model repositories.

Files and PIL images have the values that their mode and their format say, arrays those of their type: booleans are black and
white, uint16 is 0..65535, other integers 0..255, floats 0..1 or, if the largest is at least 32, 0..255. Where that leaves
black or white in doubt (no value of uint16 above 255; 0 and 1 in other integers but uint8; signed files; NaN), the picture is
refused.

EXIF turns it upright, and white and black are exchanged where a file's 0 is white. PIL itself reduces colours of 16 bits to 8.
ICC profiles are ignored, as by every loader of this field. Grey becomes RGB by repetition, colours become grey by ITU-R 601
luma, and transparency is composited on white, unless RGBA is asked for. Arrays have their channels last and tensors first; 2
channels or more than 4 are taken as they are, never as colours. In masks, integers that are all 0 or 1 are black and white;
masks with transparency or colours are refused.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import OPEN_INFO
from torch import Tensor

from .ranges_alpha_ddpm import ValueRange

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # grey beyond 8 bits; PIL's own conversion clips them

# PIL gives no pixels of these: stubs for formats of other libraries, and pages, for which it would run another program
NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"})

DIMMEST = 32  # largest value that floats of 0..255 have at least; below, they may be floats of 0..1 that overshoot, or HDR
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
# Tags of TIFF, and values of COMPRESSION, PHOTOMETRIC, PLANAR_CONFIGURATION and SAMPLE_FORMAT
BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, PLANAR_CONFIGURATION, COLOUR_MAP, SAMPLE_FORMAT = 258, 259, 262, 284, 320, 339
UNCOMPRESSED, WHITE_IS_ZERO, SEPARATE, SIGNED = 1, 0, 2, 2

Picture = Image.Image | np.ndarray | Tensor
Images = Picture | Sequence[Picture]


class BadImage(ValueError):
    """This picture cannot be used. The message gives the reason, but not the file."""


@dataclass(frozen=True)
class Pixels:
    """A picture, or several of one size, at its own depth: uint8, uint16, float32 or float64."""

    values: np.ndarray  # [..., H, W, C]; C = 1 is grey, 3 RGB, 4 RGBA with straight alpha; else no channel is a colour
    top: int  # white; black is 0

    @property
    def channels(self) -> int:
        return self.values.shape[-1]

    def with_channels(self, channels: int) -> "Pixels":
        """The same picture in grey, RGB or RGBA; raises BadImage where other numbers of channels would have to be converted."""
        if self.channels == channels:
            return self
        if not {self.channels, channels} <= PIL_MODES.keys():
            can = "only pictures of 1 (grey), 3 (RGB) and 4 (RGBA) channels are converted to one another"
            raise BadImage(f"it has {self.channels} channels where {channels} are needed; {can}")
        made = self._on_white() if self.channels == 4 else self
        if channels == 1:
            return made._luma()
        values = np.repeat(made.values, 3, axis=-1) if made.channels == 1 else made.values
        if channels == 4:
            opaque = np.full_like(values[..., :1], self.top)
            values = np.concatenate([values, opaque], axis=-1)
        return Pixels(values, self.top)

    def floats(self) -> np.ndarray:
        """The values in [0, 1], float32; of float64, float64."""
        dtype = self.values.dtype.type if self.values.dtype.kind == "f" else np.float32
        return self.values.astype(dtype) / dtype(self.top)

    def in_8_bits(self) -> "Pixels":
        """Rounded once to uint8."""
        if self.values.dtype == np.uint8:
            return self
        return Pixels(np.rint((self.values * (255 / self.top)).astype(np.float32)).astype(np.uint8), 255)

    def image(self) -> Image.Image:
        """Grey, RGB or RGBA of 8 bits as a PIL image, several pictures one below the other."""
        values = self.values.reshape(-1, *self.values.shape[-2:])
        return Image.fromarray(np.ascontiguousarray(values[..., 0] if self.channels == 1 else values))

    def _on_white(self) -> "Pixels":
        """RGBA as RGB."""
        if self.values.dtype == np.uint8:
            image = self.image()
            return self._with(np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")))
        alpha = self.values[..., 3:] / self.top
        return self._with(self.values[..., :3] * alpha + self.top * (1 - alpha))

    def _luma(self) -> "Pixels":
        """RGB or grey as grey."""
        if self.channels == 1:
            return self
        if self.values.dtype == np.uint8:
            return self._with(np.asarray(self.image().convert("L")))
        return self._with(self.values @ np.array(LUMA))

    def _with(self, values: np.ndarray) -> "Pixels":
        """Other values for the same pixels, rounded if these are integers."""
        values = values if values.dtype.kind != "f" or self.values.dtype.kind == "f" else np.rint(values)
        return Pixels(values.astype(self.values.dtype, copy=False).reshape(*self.values.shape[:-1], -1), self.top)


def read_pictures(pictures: Images, what: str, channels: int | None = None) -> Tensor:
    """One picture, a batch or a list as [N, channels, H, W] in [0, 1]; by default with the most channels that one of them has.

    Raises BadImage, with `what` in its message.
    """
    with _named(what):
        found = _all_pixels(pictures, channels, _read_levels)
        channels = channels or max(pixels.channels for pixels in found)
        values = [pixels.with_channels(channels).floats() for pixels in found]
        return torch.from_numpy(_one_batch(values)).movedim(-1, -3).contiguous()


def pictures_to_tensor(pictures: Images, channels: int | None = None) -> Tensor:
    """What networks and schedulers take: one picture, a batch or a list of one size as [N, channels, H, W] in [-1, 1].

    Pictures are PIL images in any mode, arrays with channels last or tensors with channels first, in 0..255 (uint8), 0..65535
    (uint16) or [0, 1] (floats). `channels` converts to 1 (grey), 3 (RGB) or 4 (RGBA); by default all get the most that
    one of them has. Raises BadImage, a ValueError, for what cannot be read as it was meant.
    """
    return read_pictures(pictures, "pictures", channels) * 2 - 1


def tensor_to_pictures(x: Tensor) -> list[Image.Image]:
    """The inverse: x [N, C, H, W] or [C, H, W] in [-1, 1], clipped to it, as N PIL images of 8 bits, with C = 1, 3 or 4.

    Raises ValueError for other shapes, integers, and values that are not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (3, 4) or x.shape[-3] not in PIL_MODES:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x is {found}; give a float tensor [N, C, H, W] in [-1, 1] with 1, 3 or 4 channels.")
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinite values; pictures need finite ones.")
    levels = (x.detach() / 2 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8).cpu()
    return [Pixels(values, 255).image() for values in levels.reshape(-1, *x.shape[-3:]).movedim(1, -1).numpy()]


def read_values(pictures: Images, what: str, channels: int, values: ValueRange, own_units: bool) -> Tensor:
    """As `read_pictures`, but in the model's [-1, 1], float32 or float64.

    With `own_units` numbers are in the units of the model's data, as integers of the data's own type are in any case. Other
    numbers are fractions of white, which is 1.
    """
    pictures = _as_arrays(pictures, DEEP_MODES) if own_units else pictures
    own_type = values.dtype if values.dtype != "float32" and values != ValueRange() else ""

    def read(array: np.ndarray) -> Pixels:
        if not (array.dtype.kind in "uif" and (own_units or array.dtype.name == own_type)):
            return _read_levels(array)
        if not np.isfinite(array).all():
            raise BadImage("it holds NaN or infinite values")
        return Pixels(array.astype(array.dtype.newbyteorder("="), copy=False), max(values.high))

    with _named(what):
        found = [pixels.with_channels(channels) for pixels in _all_pixels(pictures, channels, read)]
        own = {own_units or pixels.values.dtype.name == own_type for pixels in found}
        if len(own) > 1:
            raise BadImage(f"some pictures hold values of the model's own type, {own_type}, and others do not")
        batch = _one_batch([pixels.values if True in own else pixels.floats() for pixels in found])
        x = torch.from_numpy(batch).movedim(-1, -3).contiguous()
        return values.normalize(x) if True in own else x * 2 - 1


def read_labels(maps: Images, what: str) -> Tensor:
    """The class ids of label maps, int64 [N, 1, H, W]: integers, or PIL images in grey or with any palette.

    Raises BadImage, with `what` in its message.
    """

    def read(ids: np.ndarray) -> Pixels:
        if ids.dtype.kind not in "bui":
            raise BadImage(f"it holds {ids.dtype}; a label map holds integers, the class ids")
        return Pixels(ids, 1)

    with _named(what):
        found = _all_pixels(_as_arrays(maps, ("1", "P", *DEEP_MODES)), 1, read)
        ids = _one_batch([one_number(pixels).values for pixels in found])
        return torch.from_numpy(ids.astype(np.int64)).movedim(-1, -3)


def one_number(pixels: Pixels) -> Pixels:
    """A label map, which may have been saved in grey as RGB. Raises BadImage if it has colours."""
    if pixels.channels not in PIL_MODES or (pixels.values[..., :3] != pixels.values[..., :1]).any():
        raise BadImage("it has colours; a label map has one number per pixel, in grey or with a palette")
    return Pixels(pixels.values[..., :1], pixels.top)


def read_masks(masks: Images, what: str) -> Tensor:
    """Where masks are white, bool [N, 1, H, W]. Raises BadImage, with `what` in its message."""
    with _named(what):
        return torch.from_numpy(_one_batch([_white(pixels) for pixels in _all_pixels(masks, 1, read_array)])).movedim(-1, -3)


def read_image(image: Image.Image) -> Pixels:
    """The pixels [H, W, C] of a PIL image in any mode. Raises BadImage."""
    with as_bad_image():
        image = settled(image)
        if 0 in image.size:
            raise BadImage(f"the image has no pixels; its size is {image.width}x{image.height}")
        if image.mode in DEEP_MODES:
            return _deep_pixels(image)
        if image.has_transparency_data:
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        values = np.asarray(image)
        return Pixels(values[..., None] if values.ndim == 2 else values, 255)


def read_array(values: np.ndarray) -> Pixels:
    """The pixels of an array [..., H, W, C], by its type and, where that does not tell, by its values. Raises BadImage."""
    if values.dtype.kind not in "buif" or np.ma.is_masked(values):
        raise BadImage(f"its type is {values.dtype}, or it is masked; give uint8, uint16, booleans, or floats in [0, 1]")
    if values.size == 0:
        raise BadImage(f"it has no pixels; its shape is {values.shape}")
    values = np.asarray(values, dtype=values.dtype.newbyteorder("="))
    if values.dtype.kind == "b":
        return Pixels(values * np.uint8(255), 255)
    if values.dtype == np.uint16:
        return Pixels(values, 65535)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if low >= 0 and (high <= 1 or DIMMEST <= high <= 255):  # neither is true of NaN
            kept = values.dtype if values.dtype in (np.float32, np.float64) else np.float32
            return Pixels(values.astype(kept, copy=False), 1 if high <= 1 else 255)
        allowed = f"floats must be in [0, 1] (x / 2 + 0.5 for x in [-1, 1]), or in [0, 255] with at least one from {DIMMEST} on"
        raise BadImage(f"its values go from {low:.7g} to {high:.7g}; {allowed}")
    if not (low >= 0 and high <= 255):
        allowed = "only uint16 goes beyond 0..255, to 65535; convert it, or give floats in [0, 1]"
        raise BadImage(f"its values go from {low} to {high} in {values.dtype}; {allowed}")
    return Pixels(values.astype(np.uint8, copy=False), 255)


def settled(image: Image.Image) -> Image.Image:
    """A decoded copy that is upright and whose values are those of its mode, whatever else the file says of them.

    What PIL leaves to its caller is done here. It needs the image that was opened: a copy does not know its file's format.
    """
    refuse_by_format(image)
    _scale_transparent_value(image)
    image.load()
    upright = _upright(image)
    if image.format == "TIFF":
        return _settled_tiff(upright, image.tag_v2)
    if image.format == "PSD" and image.mode == "1":  # a bit that is set is black there
        return ImageChops.invert(upright)
    if image.format in ("PNG", "PPM") and image.mode == "I":  # of 16 bits, the latter scaled by PIL
        return Image.fromarray(np.asarray(upright).astype(np.uint16))
    return upright


@contextmanager
def as_bad_image() -> Iterator[None]:
    """Turns any exception into `BadImage`: PIL's plugins raise almost every type there is on damaged files."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own message has a memory address, so that no two are alike
        raise BadImage("cannot identify its format: it is not an image, or its beginning is damaged") from error
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{what}: {error}.") from error


def refuse_by_format(image: Image.Image) -> None:
    """Raises BadImage for an opened image whose format gives no pixels, or such that mean something else than PIL reads."""
    if image.format in NO_PICTURES:
        raise BadImage(f"the format {image.format} is not accepted: decoding it would run another program, or give no pixels")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, raw = max(tags.get(BITS_PER_SAMPLE, (1,))), tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    if (SIGNED in tags.get(SAMPLE_FORMAT, ()) and bits < 32) or (image.format == "FITS" and image.mode == "I;16"):
        raise BadImage("it holds signed integers of 8 or 16 bits, whose white is unknown; save it as unsigned integers")
    apart = bits > 8 and raw and tags.get(PLANAR_CONFIGURATION) == SEPARATE and image.mode not in DEEP_MODES
    if apart or (bits == 32 and not raw and tags.prefix == b"MM"):  # PIL (13.0) reads half of the bytes, or swaps them
        raise BadImage("PIL mistakes the bytes of this TIFF; save it in little-endian order, and its channels together")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; as stored if the EXIF cannot be read, since the pixels are still sound."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image.copy()


def _scale_transparent_value(image: Image.Image) -> None:
    """Scales a PNG's transparent value like its pixels, which PIL (13.0) omits for 2- and 4-bit grey and for 16-bit RGB."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return
    rawmode = image.tile[0][3]
    if rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]  # to 0..255
    elif rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)  # the high bytes


def _settled_tiff(image: Image.Image, tags: Any) -> Image.Image:
    """12 bits scaled to 16; white and black exchanged beyond 8 bits, where PIL (13.0) omits it; a colour map of 8 bits."""
    if image.mode in ("P", "PA"):
        colours = np.array(tags[COLOUR_MAP])
        if colours.max() < 256:  # of 8 bits rather than 16, as libtiff decides it too
            image.putpalette(colours.reshape(3, -1).T.astype(np.uint8).tobytes())
    if image.mode not in DEEP_MODES:
        return image
    if tuple(tags.get(BITS_PER_SAMPLE, ())) == (12,):
        image = Image.fromarray(np.rint(np.asarray(image) * (65535 / 4095)).astype(np.uint16))
    if tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO and not _inverted_by_pil(image.mode):  # PIL's default as well
        pixels = _deep_pixels(image)
        image = Image.fromarray((pixels.top - pixels.values)[..., 0])
    return image


def _inverted_by_pil(mode: str) -> bool:
    """By the table of its raw modes, such as "L;I", for a later version may invert what this one (13.0) does not."""
    raw_modes = [raw for (_, photometric, *_), (own, raw) in OPEN_INFO.items() if (photometric, own) == (WHITE_IS_ZERO, mode)]
    return any("I" in raw.partition(";")[2] for raw in raw_modes)


def _deep_pixels(image: Image.Image) -> Pixels:
    """Grey of 16 bits or in floats; of 8 bits with alpha if one of its values is transparent."""
    values = np.asarray(image)[..., None]
    if image.mode == "I":
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise BadImage(f"its values go from {low} to {high}, but mode I must hold 0..65535")
        if 0 < high <= 255:
            fix = "convert it to mode L or to I;16"
            raise BadImage(f"its values go from {low} to {high} in mode I, which may be 8 or 16 bits; {fix}")
        values = values.astype(np.uint16)
    grey, key = read_array(values), image.info.get("transparency")
    if key is None:
        return grey
    alpha = np.where(values == key, 0, 255).astype(np.uint8)
    return Pixels(np.concatenate([np.repeat(grey.in_8_bits().values, 3, axis=-1), alpha], axis=-1), 255)


def _as_arrays(pictures: Images, modes: Collection[str]) -> Images:
    """With what PIL images of these modes hold, upright, as arrays [H, W]."""
    each = pictures if isinstance(pictures, list | tuple) else [pictures]
    with as_bad_image():
        each = [np.asarray(settled(one)) if isinstance(one, Image.Image) and one.mode in modes else one for one in each]
    return each if isinstance(pictures, list | tuple) else each[0]


def _all_pixels(pictures: Images, channels: int | None, read: Callable[[np.ndarray], Pixels]) -> list[Pixels]:
    """A picture's or a batch's pixels, or those of each picture in a list: `channels` are needed, and `read` takes arrays."""
    if not isinstance(pictures, list | tuple):
        if isinstance(pictures, Tensor) and pictures.ndim == 3 and len(pictures) not in (1, channels or len(pictures)):
            either = f"one picture of {len(pictures)} channels or so many of one"
            raise BadImage(f"its shape {tuple(pictures.shape)} may mean {either}; give a tensor [N, C, H, W]")
        return [_any_pixels(pictures, 4, read)]
    if not pictures:
        raise BadImage("the list is empty; give at least one picture")
    found = [_any_pixels(picture, 3, read) for picture in pictures]
    if len({pixels.top for pixels in found if pixels.values.dtype.kind == "f" and pixels.values.any()}) > 1:
        raise BadImage("some pictures hold floats in [0, 1] and others in [0, 255]")
    return found


def _any_pixels(picture: Picture, most: int, read: Callable[[np.ndarray], Pixels]) -> Pixels:
    """[H, W, C] or [N, H, W, C] of what has at most so many dimensions."""
    if isinstance(picture, Image.Image):
        return read_image(picture)
    if not isinstance(picture, np.ndarray | Tensor) or np.ma.is_masked(picture):
        raise BadImage(f"it is a {type(picture).__name__}; give PIL images, an array or a tensor, without masked values")
    if not 2 <= picture.ndim <= most:
        allowed = "an array is [N, H, W, C], [H, W, C] or [H, W], a tensor [N, C, H, W], [C, H, W] or [H, W]"
        raise BadImage(f"its shape is {tuple(picture.shape)}; {allowed}; in a list, without N")
    values = _array_of(picture) if isinstance(picture, Tensor) else picture
    if values.ndim == 2:
        return read(values[..., None])
    return read(np.moveaxis(values, -3, -1) if isinstance(picture, Tensor) else values)


def _read_levels(values: np.ndarray) -> Pixels:
    """As `read_array`. Raises BadImage for integers that may be 0 and 1 for black and white, or 8 bits in a type of 16."""
    most = {"uint8": 0, "uint16": 255}.get(values.dtype.name, 1)
    if values.dtype.kind in "iu" and 0 < values.max(initial=0) <= most:
        fix = "give uint8 for 0..255, uint16 for 0..65535, booleans, or floats in [0, 1]"
        raise BadImage(f"its largest value is {values.max()} in {values.dtype}, of which the white is not clear; {fix}")
    return read_array(values)


def _array_of(tensor: Tensor) -> np.ndarray:
    with as_bad_image():  # quantized, sparse and meta tensors have no array
        tensor = tensor.detach().cpu()
        known = tensor.dtype in (torch.float16, torch.float32, torch.float64)
        return (tensor if known or not tensor.is_floating_point() else tensor.float()).numpy()


def _one_batch(pictures: list[np.ndarray]) -> np.ndarray:
    """[N, H, W, C] of arrays [H, W, C] or [N, H, W, C]."""
    if len(sizes := {values.shape[-3:-1] for values in pictures}) > 1:
        raise BadImage(f"the images have different sizes, {sorted(sizes)} as (height, width)")
    return np.concatenate([values.reshape(-1, *values.shape[-3:]) for values in pictures])


def _white(mask: Pixels) -> np.ndarray:
    """Where a mask is white, bool [..., H, W, 1]. Integers that are all 0 or 1 are black and white."""
    values, top = mask.values, mask.top
    if mask.channels not in PIL_MODES:
        raise BadImage(f"it has {mask.channels} channels; a mask has one")
    if mask.channels == 4 and (values[..., 3] < top).any():
        raise BadImage("it is transparent in places, which may mean white or black; give a mask in black and white")
    if values.dtype.kind == "u" and values[..., :3].max() <= 1:
        top = 1
    if (np.ptp(values[..., :3], axis=-1) > top / 8).any():  # more than lossy files make of grey
        raise BadImage("it has colours; give a mask in black and white")
    values = mask.with_channels(1).values
    white = values >= top / 2
    one_mask = (-3, -2, -1)
    if (values.any(one_mask) & ~white.any(one_mask)).any():
        raise BadImage(f"it has no white, of {top}, but is not all 0 either; its largest value is {values.max():.4g}")
    return white
