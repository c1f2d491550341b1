"""The cache of preprocessed images: their size and channels, when it is used again, its fingerprint, batches from it."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data_helpers import all_pixels, assert_holds, encoded, make_set, rgb, write_image
from data_helpers import load as load_data
from ddpm_pipeline.data import DataError, DataOptions, mapped
from ddpm_pipeline.data.images import to_array
from ddpm_pipeline.support.errors import ConfigError


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one for each image that is decoded for the cache in this process."""
    calls = []
    original = mapped.image_pixels
    monkeypatch.setattr(mapped, "image_pixels", lambda *args: calls.append(1) or original(*args))
    return calls


# Sizes and channels


def test_the_datas_own_resolution(load, tmp_path):
    write_image(tmp_path / "one" / "a.png", rgb(0, 12, 12))
    assert load(tmp_path / "one").size == (12, 12)
    write_image(tmp_path / "one" / "b.png", rgb(0, 10, 20))
    with pytest.raises(DataError, match=r"2 different sizes, from 12x12 to 10x20.* --resolution"):
        load(tmp_path / "one")
    for image, shape in zip(all_pixels(load(tmp_path / "one", resolution=6)), [(12, 12), (10, 20)], strict=True):
        assert np.array_equal(image, to_array(Image.fromarray(rgb(0, *shape)), (6, 6), 3))
    write_image(tmp_path / "wide" / "a.png", rgb(0, 10, 20))
    assert load(tmp_path / "wide").size == (10, 20)
    for shape in [(10, 20), (12, 12)]:  # the centre of what just covers it
        write_image(tmp_path / "wide" / "b.png", rgb(0, *shape))
        (_, image) = all_pixels(load(tmp_path / "wide", resolution="4x8"))
        whole = Image.fromarray(rgb(0, *shape))
        box = (0, 0, 20, 10) if shape == (10, 20) else (0, 3, 12, 9)
        assert np.array_equal(image, np.asarray(whole.resize((8, 4), Image.Resampling.LANCZOS, box=box)))


def test_the_datas_own_channels(load, tmp_path):
    folder = tmp_path / "pictures"
    write_image(folder / "a.png", rgb(0)[..., 0])
    write_image(folder / "b.png", np.stack([rgb(1)[..., 0]] * 2, axis=-1))  # grey with alpha
    assert load(folder).channels == 1
    colour = np.concatenate([rgb(2), rgb(3)[..., :1]], axis=-1)
    write_image(folder / "c.png", colour)  # with alpha
    assert load(folder).channels == 3
    for channels in (1, 3, 4):
        expected = to_array(Image.fromarray(colour), (8, 8), channels)
        assert np.array_equal(all_pixels(load(folder, channels=channels))[2], expected)


@pytest.mark.parametrize(
    ("option", "value"), [("resolution", 0), ("resolution", "8x"), ("channels", 65), ("preprocessing_num_workers", -1)]
)
def test_impossible_options(option, value):
    with pytest.raises(ConfigError, match=f"--{option} {value}"):
        DataOptions(**{option: value})


def test_unwritable_cache(load, tmp_path):
    (tmp_path / "file").write_text("in the way")
    make_set(0).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"write the preprocessed images .* --cache_dir"):
        load(tmp_path / "saved", cache_dir=str(tmp_path / "file"))


# The cache


def cache_files(tmp_path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "ddpm_pipeline").iterdir()}


def test_the_cache_is_used_again(load, tmp_path, decoded):
    for seed in range(3):
        write_image(tmp_path / "pictures" / f"{seed}.png", rgb(seed))
    first = load(tmp_path / "pictures")
    assert len(decoded) == 3
    files = cache_files(tmp_path)
    again = load(tmp_path / "pictures")
    assert len(decoded) == 3
    assert cache_files(tmp_path) == files
    assert again.fingerprint == first.fingerprint
    assert load(tmp_path / "pictures", preprocessing_num_workers=2).fingerprint == first.fingerprint
    assert cache_files(tmp_path) == files


def test_a_changed_option_makes_a_new_cache(load, tmp_path, decoded):
    made = make_set(0, 1).add_column("other", [{"bytes": encoded(rgb(9, 4, 4)), "path": None}] * 2)
    made.save_to_disk(tmp_path / "saved")
    base = {"resolution": 8, "channels": 3, "image_column": "photo"}
    prints = set()
    for change in [{}, {"resolution": 4}, {"channels": 1}, {"channels": 4}, {"image_column": "other"}]:
        prints.add(load(tmp_path / "saved", **{**base, **change}).fingerprint)
    assert len(prints) == 5
    assert len(decoded) == 10
    load(tmp_path / "saved", **base, label_column="kind", text_column="caption")
    assert len(decoded) == 10  # which columns are conditions changes nothing in the cache
    assert [load(tmp_path / "saved", image_column=name).size[0] for name in ("photo", "other")] == [8, 4]


def test_changed_data_make_a_new_cache(load, tmp_path):
    for seed in range(2):
        write_image(tmp_path / "pictures" / f"{seed}.png", rgb(seed))
    before = load(tmp_path / "pictures")
    write_image(tmp_path / "pictures" / "1.png", rgb(5))
    os.utime(tmp_path / "pictures" / "1.png", ns=(10**18, 10**18))
    after = load(tmp_path / "pictures")
    assert_holds(after, 0, 5)
    assert after.fingerprint != before.fingerprint
    make_set(0, 1).save_to_disk(tmp_path / "saved")
    load(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    shutil.rmtree(tmp_path / "saved")
    make_set(0, 2).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))  # with the library's fingerprint of the data before
    assert_holds(load(tmp_path / "saved"), 0, 2)


def test_the_fingerprint_is_of_the_content(load, tmp_path):
    for seed in range(3):
        write_image(tmp_path / "here" / f"{seed}.png", rgb(seed))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = load(tmp_path / "here"), load(tmp_path / "there", cache_dir=str(tmp_path / "other"))
    assert here.fingerprint == there.fingerprint
    make_set(0, 1).save_to_disk(tmp_path / "saved")
    relabelled = make_set(0, 1).remove_columns("caption").add_column("caption", ["a", "b"])
    relabelled.save_to_disk(tmp_path / "relabelled")
    assert load(tmp_path / "saved").fingerprint != load(tmp_path / "relabelled").fingerprint
    make_set(1, 0).save_to_disk(tmp_path / "reordered")
    assert load(tmp_path / "saved").fingerprint != load(tmp_path / "reordered").fingerprint


def test_several_threads_give_the_same_and_show_their_progress_once(load, digits, capfd):
    datasets.enable_progress_bars()
    data = load("digits", preprocessing_num_workers=2)
    shown = capfd.readouterr().err
    assert "Looking at image sizes: 100%" in shown and "Preprocessing images: 100%" in shown
    assert data.fingerprint == digits.fingerprint
    assert torch.equal(data.pixels(range(1797)), digits.pixels(range(1797)))
    load("digits", preprocessing_num_workers=2)
    assert "Preprocessing" not in capfd.readouterr().err  # it comes from the cache


# Batches


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """200 digits in RGB, in Arrow chunks of 7 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "BATCH_BYTES", 7 * 8 * 8 * 3)
        return load_data("digits", channels=3, split="train[:200]", cache_dir=str(tmp_path_factory.mktemp("chunked")))


def test_batches_across_chunks(chunked):
    assert len(chunked._pixel_chunks) == 29
    assert not any(view.flags.owndata or view.flags.writeable for view in chunked._pixel_chunks)
    everything = np.asarray(chunked.dataset["pixels"][:], dtype=np.uint8).reshape(200, 8, 8, 3)
    indices = np.random.default_rng(0).integers(0, 200, 64)
    for given in (indices, indices.tolist(), torch.from_numpy(indices)):
        batch = chunked.pixels(given)
        assert batch.is_contiguous()
        assert np.array_equal(batch.numpy(), everything[indices].transpose(0, 3, 1, 2))
    labels = chunked.column("label", indices)
    assert labels.tolist() == load_digits().target[indices].tolist()
    assert list(chunked.values("label")) == load_digits().target[:200].tolist()
    assert chunked.pixels([]).shape == (0, 3, 8, 8)


def test_flips(chunked):
    flip = np.array([True, False, True, False])
    views = replace(chunked.view, flips=np.stack([np.zeros(4, bool), flip], axis=1))
    plain, flipped = chunked.pixels([3, 50, 50, 199]), chunked.pixels([3, 50, 50, 199], views)
    for index, mirrored in enumerate(flip):
        expected = plain[index].numpy()[:, :, ::-1] if mirrored else plain[index].numpy()
        assert np.array_equal(flipped[index].numpy(), expected)
    assert not torch.equal(plain, flipped)


def test_indices_out_of_range(chunked):
    for indices in ([-1], [0, 200]):
        for read in (chunked.pixels, chunked.rows_of, lambda indices: chunked.column("label", indices)):
            with pytest.raises(IndexError, match=r"outside 0\.\.199"):
                read(indices)


def test_pickling_takes_the_file_along_not_the_pixels(chunked):
    batch = chunked.pixels(range(200))
    pickled = pickle.dumps(chunked)
    assert len(pickled) < batch.numel() / 2
    assert torch.equal(pickle.loads(pickled).pixels(range(200)), batch)
