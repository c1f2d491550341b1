"""One grey picture, uint8 [H, W], written in every way: as files by Pillow and by hand, as PIL images, arrays and tensors."""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_helpers import encoded

DEFLATE = "tiff_adobe_deflate"


def png(width: int, height: int, bits: int, colour: int, rows: bytes, transparent: bytes | None = None) -> bytes:
    """A PNG made by hand: depths and colour keys that PIL cannot write."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    key = b"" if transparent is None else _chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + header + key + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(levels: np.ndarray, bits: int, photometric: int, kind: int = 1, order: str = "<", **options: Any) -> bytes:
    """A TIFF made by hand, of values [H, W] or [H, W, C] as stored: unsigned (`kind` 1), signed (2) or floats (3).

    Options: `colours`, a map [entries, 3]; `deflate`; `separate`, for channels one after the other.
    """
    height, width, samples = (*levels.shape, 1)[:3]
    planes = np.moveaxis(levels, -1, 0) if options.get("separate") else [levels]
    kinds = f"{order}{'?uif'[kind]}{bits // 8}"
    strips = [_packed(plane, bits) if bits in (1, 2, 4, 12) else plane.astype(kinds).tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if options.get("deflate") else strips
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [8 if options.get("deflate") else 1], 262: [photometric]}
    tags |= {273: [0] * len(strips), 277: [samples], 278: [height], 279: [*map(len, strips)]}
    tags |= {284: [2 if options.get("separate") else 1], 339: [kind] * samples}
    if "colours" in options:
        tags[320] = options["colours"].T.ravel().tolist()  # all reds, greens, blues
    long = 8 + 2 + 12 * len(tags) + 4  # where the values begin that do not fit into an entry
    values, entries = b"", b""
    end = long + sum(len(value) * 2 for value in tags.values() if len(value) > 2)
    tags[273] = [end + sum(map(len, strips[:place])) for place in range(len(strips))]
    for tag, value in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(value)}H", *value)
        if len(packed) > 4:
            packed, values = struct.pack(f"{order}I", long + len(values)), values + packed
        entries += struct.pack(f"{order}HHI", tag, 3, len(value)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + values + b"".join(strips)


def _packed(levels: np.ndarray, bits: int) -> bytes:
    """Rows of whole bytes, the highest bit first."""
    digits = (levels.astype(int).reshape(len(levels), -1)[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(digits.reshape(len(levels), -1).astype(np.uint8), axis=1).tobytes()


def psd_bitmap(picture: np.ndarray) -> bytes:
    """Photoshop's bitmap mode, in which a bit that is set is black."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, *picture.shape, 1, 0)
    return header + bytes(12) + struct.pack(">H", 0) + _packed(1 - _levels(picture, 1), 1)


def pgm(picture: np.ndarray, most: int) -> bytes:
    levels = np.rint(picture * (most / 255))
    return (
        f"P5 {picture.shape[1]} {picture.shape[0]} {most}\n".encode() + levels.astype(">u2" if most > 255 else "u1").tobytes()
    )


def _levels(picture: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(picture * ((2**bits - 1) / 255)).astype(np.int64)


def _tiff_levels(bits: int, white_is_zero: bool, order: str = "<") -> Callable[[np.ndarray], bytes]:
    def write(picture: np.ndarray) -> bytes:
        levels = _levels(picture, bits)
        return tiff(2**bits - 1 - levels if white_is_zero else levels, bits, int(not white_is_zero), order=order)

    return write


def _deep_tiff(white_is_zero: bool, **options: Any) -> Callable[[np.ndarray], bytes]:
    """16 bits as Pillow writes them."""
    flip = 65535 if white_is_zero else 0
    return lambda picture: encoded(
        _sixteen(picture) ^ np.uint16(flip), "TIFF", tiffinfo={262: int(not white_is_zero)}, **options
    )


def _sixteen(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.uint16) * 257


def _turned(format: str, orientation: int, **options: Any) -> Callable[[np.ndarray], bytes]:
    turn = {3: lambda p: p[::-1, ::-1], 6: lambda p: np.rot90(p, 1), 7: lambda p: p[::-1, ::-1].T}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda picture: encoded(np.ascontiguousarray(turn(picture)), format, exif=exif.tobytes(), **options)


def _palette(format: str, **options: Any) -> Callable[[np.ndarray], bytes]:
    """Indices that are not the levels."""

    def write(picture: np.ndarray) -> bytes:
        image = Image.fromarray(255 - picture)
        image.putpalette(np.repeat(np.arange(256, dtype=np.uint8)[::-1], 3).tobytes())
        return encoded(image, format, **options)

    return write


def _rgb(picture: np.ndarray) -> np.ndarray:
    return np.stack([picture] * 3, axis=-1)


def _png_rgb16(picture: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in _rgb(_sixteen(picture)).astype(">u2"))
    return png(*picture.shape[::-1], 16, 2, rows)


HIDDEN = ("PNG hidden", "WEBP hidden", "PNG key", "hidden", "[H, W, 4]", "[H, W, 4] float")  # by transparency


def _hidden(picture: np.ndarray) -> np.ndarray:
    """RGBA: white is transparent, with black below."""
    alpha = np.where(picture == 255, 0, 255).astype(np.uint8)
    return np.concatenate([_rgb(np.where(picture == 255, 0, picture).astype(np.uint8)), alpha[..., None]], axis=-1)


def _cmyk(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([np.zeros_like(picture)] * 3 + [255 - picture], axis=-1), "CMYK")


def _convert(mode: str) -> Callable[[np.ndarray], Image.Image]:
    return lambda picture: Image.fromarray(picture).convert(mode.replace("a", "A")).convert(mode)


BITS = {1: 0.5, 2: 0.5 / 3, 4: 0.5 / 15, 8: 0.0}  # -> how far a level may be off, in units of white

# name -> (writer from uint8 [H, W], how far off in units of white)
FILES: dict[str, tuple[Callable[[np.ndarray], bytes], float]] = {
    **{f"TIFF {bits}{'I' * inverted} {order}": (_tiff_levels(bits, inverted, order), off)
       for bits, off in BITS.items() for inverted in (False, True) for order in "<>"},
    "TIFF 12 <": (_tiff_levels(12, False), 2e-4), "TIFF 16 <": (_tiff_levels(16, False), 0),
    "TIFF 16 >": (_tiff_levels(16, False, ">"), 0), "TIFF 16I <": (_tiff_levels(16, True), 0),
    **{f"TIFF 16{'I' * inverted} {name}": (_deep_tiff(inverted, compression=name), 0)
       for inverted in (False, True) for name in ("raw", "tiff_lzw", DEFLATE, "packbits")},
    **{f"TIFF float{'I' * inverted} {order}": (
        lambda p, i=inverted, o=order: tiff(1 - p / 255 if i else p / 255, 32, int(not i), 3, o), 0)
       for inverted in (False, True) for order in "<>"},
    "TIFF float 0..255": (lambda p: encoded(p.astype(np.float32), "TIFF"), 0),
    "TIFF float 0..255 I": (lambda p: tiff(255.0 - p, 32, 0, 3), 0),
    "TIFF I": (lambda p: encoded(_sixteen(p).astype(np.int32), "TIFF"), 0),
    "TIFF RGB 16": (lambda p: tiff(_rgb(_sixteen(p)), 16, 2), 0),
    "TIFF RGB separate": (lambda p: tiff(_rgb(p), 8, 2, separate=True), 0),
    "TIFF float deflated": (lambda p: tiff(p / 255, 32, 1, 3, deflate=True), 0),
    "TIFF 16 > deflated": (lambda p: tiff(_sixteen(p), 16, 1, order=">", deflate=True), 0),
    "TIFF map of 16 bits": (lambda p: tiff(255 - p, 8, 3, colours=_rgb(np.arange(65535, -1, -257))), 0),
    "TIFF map of 8 bits": (lambda p: tiff(255 - p, 8, 3, colours=_rgb(np.arange(255, -1, -1))), 0),
    "TIFF CMYK": (lambda p: encoded(_cmyk(p), "TIFF"), 0),
    "TIFF fax": (lambda p: encoded(p > 127, "TIFF", compression="group4"), 0.5),
    "TIFF fax inverted": (lambda p: encoded(p > 127, "TIFF", compression="group4", tiffinfo={262: 0}), 0.5),
    "PNG 1": (lambda p: encoded(p > 127), 0.5), "PNG L": (encoded, 0), "PNG RGB": (lambda p: encoded(_rgb(p)), 0),
    "PNG LA": (lambda p: encoded(Image.fromarray(p).convert("LA")), 0), "PNG 16": (lambda p: encoded(_sixteen(p)), 0),
    "PNG RGB 16": (_png_rgb16, 0), "PNG P": (_palette("PNG"), 0), "GIF": (_palette("GIF"), 0),
    "PNG hidden": (lambda p: encoded(_hidden(p)), 0), "WEBP hidden": (lambda p: encoded(_hidden(p), "WEBP", lossless=True), 0),
    "PNG key": (lambda p: encoded(np.where(p == 255, 0, np.maximum(p, 1)).astype(np.uint8), transparency=0), 1.01 / 255),
    "PGM 8": (lambda p: pgm(p, 255), 0), "PGM 16": (lambda p: pgm(p, 65535), 0), "PGM 10": (lambda p: pgm(p, 1023), 6e-4),
    "PGM dark 16": (lambda p: pgm(p, 256), 2.1e-3), "PFM": (lambda p: encoded((p / 255).astype(np.float32), "PPM"), 0),
    "PSD bitmap": (psd_bitmap, 0.5), "JPEG CMYK": (lambda p: encoded(_cmyk(p), "JPEG", quality=100), 0.03),
    "JPEG": (lambda p: encoded(p, "JPEG", quality=100), 0.02),
    "JPEG2000 16": (lambda p: encoded(_sixteen(p), "JPEG2000"), 1e-4),
    "AVIF": (lambda p: encoded(_rgb(p), "AVIF", quality=100, subsampling="4:4:4"), 0.03),
    **{name: (lambda p, f=name: encoded(p, f), 0) for name in ("BMP", "JPEG2000", "TGA", "SGI", "PCX")},
    **{f"{format} turned {turn}": (_turned(format, turn, **options), off) for turn in (3, 6, 7) for format, off, options in (
        ("PNG", 0, {}), ("JPEG", 0.02, {"quality": 100}), ("WEBP", 0, {"lossless": True}), ("TIFF", 0, {}),
        ("TIFF", 0, {"compression": "tiff_lzw"}), ("AVIF", 0.03, {"quality": 100}))},
    **{f"TIFF deep turned {turn}": (lambda p, t=turn: _turned("TIFF", t)(_sixteen(p)), 0) for turn in (3, 6)},
}  # fmt: skip

PIL_IMAGES: dict[str, tuple[Callable[[np.ndarray], Image.Image], float]] = {
    **{mode: (_convert(mode), 0) for mode in ("L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "HSV", "F")},
    "1": (lambda p: Image.fromarray(p > 127), 0.5), "YCbCr": (_convert("YCbCr"), 0.005),
    "PA": (lambda p: Image.merge("PA", [Image.fromarray(p).convert("P"), Image.new("L", p.shape, 255)]), 0),
    "LAB": (lambda p: Image.fromarray(np.where(_rgb(p) > 127, [255, 0, 0], 0).astype(np.uint8), "LAB"), 0.51),
    "I": (lambda p: Image.fromarray(_sixteen(p).astype(np.int32)), 0),
    "I;16": (lambda p: Image.fromarray(_sixteen(p)), 0), "I;16B": (lambda p: Image.fromarray(_sixteen(p).astype(">u2")), 0),
    "I;16L": (lambda p: Image.frombytes("I;16L", p.shape, _sixteen(p).astype("<u2").tobytes()), 0),
    "I;16N": (lambda p: Image.frombytes("I;16N", p.shape, _sixteen(p).tobytes()), 0),
    "F 0..1": (lambda p: Image.fromarray((p / 255).astype(np.float32)), 0),
    "hidden": (lambda p: Image.fromarray(_hidden(p)), 0),
}  # fmt: skip

ARRAYS: dict[str, tuple[Callable[[np.ndarray], Any], float]] = {
    **{name: (lambda p, t=name: p.astype(t), 0) for name in ("uint8", "int16", ">i2", "int32", "int64", "uint32", ">u8")},
    **{f"{name} deep": (lambda p, t=name: _sixteen(p).astype(t), 0) for name in ("uint16", ">u2")},
    **{name: (lambda p, t=name: (p / 255).astype(t), off) for name, off in (
        ("float16", 5e-4), ("float32", 0), ("float64", 0), (">f4", 0), ("longdouble", 0))},
    "bool": (lambda p: p > 127, 0.5), "float32 0..255": (lambda p: p.astype(np.float32), 0),
    "[H, W, 1]": (lambda p: p[..., None], 0), "[1, H, W, 1]": (lambda p: p[None, ..., None], 0), "[H, W, 3]": (_rgb, 0),
    "[H, W, 3] deep": (lambda p: _rgb(_sixteen(p)), 0), "[H, W, 4]": (_hidden, 0),
    "[H, W, 4] float": (lambda p: _hidden(p) / 255, 0), "strided": (lambda p: np.repeat(p, 2, axis=1)[:, ::2], 0),
    "list": (lambda p: [p], 0),
    **{f"torch {name}": (lambda p, t=name: torch.from_numpy(p).to(getattr(torch, t)), 0) for name in (
        "uint8", "int16", "int32", "int64", "uint32", "uint64")},
    **{f"torch {name}": (lambda p, t=name: torch.from_numpy(p / 255).to(getattr(torch, t)), off) for name, off in (
        ("float16", 5e-4), ("bfloat16", 2e-3), ("float32", 0), ("float64", 0))},
    "torch uint16": (lambda p: torch.from_numpy(_sixteen(p)), 0), "torch bool": (lambda p: torch.from_numpy(p > 127), 0.5),
    "[1, H, W]": (lambda p: torch.from_numpy(p)[None], 0), "[1, 1, H, W]": (lambda p: torch.from_numpy(p)[None, None], 0),
    "[1, 3, H, W]": (lambda p: torch.from_numpy(_rgb(p)).movedim(-1, 0)[None], 0),
    "gradient": (lambda p: torch.from_numpy(p / 255).requires_grad_(), 0),
    "tensors": (lambda p: [torch.from_numpy(p)[None]], 0),
}  # fmt: skip
