"""Second images: where they come from, how they are read and stay aligned, and what is refused."""

import json
import logging
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image

from data_helpers import encoded, rgb, stream_of, write_image
from ddpm_pipeline.data import DataError
from ddpm_pipeline.data.streamed import Position, StreamedBatch, divide, rows_of_part
from ddpm_pipeline.data.views import Views


def ids(seed: int, classes: int = 3, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)


def write_map(path, values: np.ndarray) -> None:
    """A palette PNG, as annotation tools write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)


@pytest.fixture
def masked(tmp_path):
    """Three images, and their label maps in a folder beside them."""
    for seed in range(3):
        write_image(tmp_path / "cars" / "images" / f"{seed}.png", rgb(seed))
        write_map(tmp_path / "cars" / "masks" / f"{seed}.png", ids(seed))
    return tmp_path / "cars"


MASKS = {"condition": "image", "condition_column": "masks", "condition_classes": 3}


def test_palette_maps_are_read_as_ids_beside_their_images(load, masked):
    data = load(masked, **MASKS)
    second = data.condition_images
    assert len(data) == 3 and (second.channels, second.classes, second.value_range.dtype) == (1, 3, "uint8")
    pixels = second.pixels(data.rows_of([2, 0]))
    assert pixels.dtype == torch.uint8 and (pixels[:, 0].numpy() == np.stack([ids(2), ids(0)])).all()
    assert (data.pixels([2])[0].permute(1, 2, 0).numpy() == rgb(2)).all()


def test_the_fingerprint_is_of_both_and_follows_a_changed_partner(load, masked, tmp_path):
    data, alone = load(masked, **MASKS), load(masked)
    assert data.fingerprint != alone.fingerprint == load(masked).fingerprint
    write_map(masked / "masks" / "1.png", ids(7))
    changed = load(masked, **MASKS)
    assert changed.fingerprint != data.fingerprint and (changed.condition_images.pixels([1])[0, 0].numpy() == ids(7)).all()
    by_path = {**MASKS, "condition_column": str(masked / "masks")}
    assert load(masked / "images", **by_path).fingerprint == changed.fingerprint


def test_second_images_are_resized_and_cropped_as_their_images(load, tmp_path):
    """An image that is its own label map, at twice the size and wider, shows the same edges in both."""
    blocks = np.kron(ids(0, 2), np.ones((2, 2), np.uint8))  # [16, 16]
    wide = np.pad(blocks, ((0, 0), (4, 4)))
    write_image(tmp_path / "d" / "images" / "a.png", wide * 255)
    write_image(tmp_path / "d" / "masks" / "a.png", wide)
    data = load(tmp_path / "d", resolution=8, **MASKS)
    assert (data.condition_images.pixels([0])[0, 0].numpy() == ids(0, 2)).all()
    assert ((data.pixels([0])[0, 0].numpy() > 127) == ids(0, 2)).all()
    continuous = load(tmp_path / "d", resolution=8, condition="image", condition_column="masks").condition_images
    assert continuous.classes is None and continuous.channels == 1


def test_columns_of_images_and_of_file_names(load, tmp_path):
    rows = {"photo": [{"bytes": encoded(rgb(seed)), "path": None} for seed in range(3)]}
    rows["depth"] = [encoded(ids(seed, 200)) for seed in range(3)]
    features = Features({"photo": datasets.Image(), "depth": datasets.Value("binary")})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    data = load(tmp_path / "saved", condition="image", condition_column="depth")
    assert (data.condition_images.pixels([1])[0, 0].numpy() == ids(1, 200)).all()
    with pytest.raises(DataError, match="'photo' is the column of the images themselves"):
        load(tmp_path / "saved", condition="image", condition_column="photo", image_column="photo")
    with pytest.raises(DataError, match="'mask' is no column of the data set, and no folder"):
        load(tmp_path / "saved", condition="image", condition_column="mask")
    for seed in range(2):
        write_image(tmp_path / "named" / f"{seed}.png", rgb(seed))
        write_map(tmp_path / "named" / "mask" / f"m{seed}.png", ids(seed))
    lines = [{"file_name": f"{seed}.png", "mask_file_name": f"mask/m{seed}.png", "label": seed} for seed in range(2)]
    (tmp_path / "named" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("mask", "mask_file_name"):
        data = load(tmp_path / "named", **{**MASKS, "condition": "class+image", "condition_column": name})
        assert data.column("label", [1]).tolist() == [1]
        assert (data.condition_images.pixels([1])[0, 0].numpy() == ids(1)).all()


def test_pairs_that_do_not_match_are_told_in_both_directions(load, masked, caplog):
    write_map(masked / "masks" / "9.png", ids(9))
    with caplog.at_level(logging.INFO):
        load(masked, **MASKS)
    assert "condition image without an image: 1 (masks/9.png)" in caplog.text
    (masked / "masks" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images have no .* \(images/1.png\), and 1 files there .* \(masks/9.png\)"):
        load(masked, **MASKS)
    write_map(masked / "masks" / "1.png", ids(1))
    write_map(masked / "masks" / "1.bmp", ids(1))
    with pytest.raises(DataError, match=r"which of images/1.png and, in 'masks', masks/1.bmp, masks/1.png are a pair"):
        load(masked, **MASKS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((8, 8), 7, np.uint8), "it has the id 7; ids of 3 classes are 0..2, and 255 where there is none"),
        (rgb(1), "it has colours; a label map has one number per pixel"),
        (ids(1, height=4, width=16), "it is 4x16, and the image 8x8"),
        (b"broken", "cannot identify its format"),
    ],
)
def test_rows_whose_second_image_does_not_fit_are_bad(load, masked, values, message):
    path = masked / "masks" / "1.png"
    path.write_bytes(values if isinstance(values, bytes) else encoded(values))
    with pytest.raises(DataError, match=rf"1 of 3 rows .*\n.*row 1 \(.*masks/1.png\): .*{message}"):
        load(masked, **MASKS)
    data = load(masked, max_bad_fraction=0.5, **MASKS)
    assert data.rows_of(range(2)).tolist() == [0, 2] and data.skipped[0]["file"] == str(path)
    assert (data.condition_images.pixels(data.rows_of([1]))[0, 0].numpy() == ids(2)).all()


def test_arrays_beside_pictures_and_pictures_beside_arrays(load, masked):
    for seed in range(3):
        (masked / "ids").mkdir(exist_ok=True)
        np.save(masked / "ids" / f"{seed}.npy", ids(seed, 300).astype(np.int16))
    deep = load(masked, **{**MASKS, "condition_column": "ids", "condition_classes": 300}).condition_images
    assert deep.value_range.dtype == "uint16" and (deep.pixels([2])[0, 0].numpy() == ids(2, 300)).all()
    for seed in range(3):
        np.save(masked / "ids" / f"{seed}.npy", ids(seed, 300).astype(np.int16) - 100)
    signed = {"condition": "image", "condition_column": "ids"}
    with pytest.raises(DataError, match=r"3 of 3 images of 'cars \(condition images\)' have no known .*\(as for"):
        load(masked, value_range="0,255", **signed)
    assert load(masked, value_range="percentile:0,100", **signed).condition_images.value_range.low[0] < -90
    arrays = masked / "images"
    for seed in range(3):
        np.save(arrays / f"{seed}.npy", rgb(seed))
        (arrays / f"{seed}.png").unlink()
    data = load(masked, **MASKS)
    assert (data.pixels([2])[0].permute(1, 2, 0).numpy() == rgb(2)).all()
    assert (data.condition_images.pixels([2])[0, 0].numpy() == ids(2)).all()


def test_void_and_black_and_white(load, masked):
    void = ids(1)
    void[0] = 255
    write_map(masked / "masks" / "1.png", void)
    assert (load(masked, **MASKS).condition_images.pixels([1])[0, 0].numpy() == void).all()
    for seed in range(3):
        Image.fromarray(ids(seed, 2) * 255).convert("1" if seed else "L").save(masked / "masks" / f"{seed}.png")
    white = load(masked, **{**MASKS, "condition_classes": 2}).condition_images
    assert (white.pixels(range(3))[:, 0].numpy() == [ids(seed, 2) for seed in range(3)]).all()
    Image.fromarray(ids(1, 2) * 127 + 1).save(masked / "masks" / "1.png")  # neither black nor white
    with pytest.raises(DataError, match=r"it has the id 128; ids of 2 classes are 0\.\.1"):
        load(masked, **{**MASKS, "condition_classes": 2})


def test_streams_read_the_same_pairs(load, masked, tmp_path):
    (masked / "masks" / "1.png").write_bytes(b"broken")
    stream = stream_of(masked, channels=3, max_bad_fraction=0.5, **MASKS)
    assert (stream.condition_images.classes, stream.condition_images.channels) == (3, 1)
    stored, mapped = stream.stored(10, str(tmp_path / "stored")), load(masked, max_bad_fraction=0.5, **MASKS)
    assert stored.rows_of(range(2)).tolist() == mapped.rows_of(range(2)).tolist() == [0, 2]
    assert stored.condition_images.pixels([0, 2]).equal(mapped.condition_images.pixels([0, 2]))
    images = list(islice(rows_of_part(stream, divide(stream, 1), 0, 0, 10, Position()), 4))
    mirrored = Views((8, 8), flips=np.array([[False, True]] * 4))
    second = StreamedBatch(stream, images).condition_images.pixels(range(4), mirrored)[:, 0].numpy()
    for image, seen in zip(images, second, strict=True):
        seed = next(seed for seed in range(3) if (image.pixels == rgb(seed)).all())
        assert (seen == ids(seed)[:, ::-1]).all() and image.vector is None
