"""What `--dataset` names: the digits, folders, saved data sets, parquet files, the Hub; and what is none of these."""

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image
from sklearn.datasets import load_digits

from data_helpers import all_pixels, assert_holds, encoded, make_set, parquet, rgb, stream_of, write_image
from ddpm_pipeline.data import DataError, sources
from ddpm_pipeline.data.images import to_array
from ddpm_pipeline.ranges_alpha_ddpm import ValueRange

# The digits


def test_digits_are_exact(digits):
    reference = load_digits()
    assert (len(digits), digits.size, digits.channels, digits.name) == (1797, (8, 8), 1, "digits")
    assert digits.class_names == list("0123456789")
    images = digits.pixels(range(1797))
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert np.array_equal(images[:, 0].numpy(), np.rint(reference.images * 255 / 16))
    assert np.array_equal(digits.column("label", range(1797)).numpy(), reference.target)
    levels = ValueRange().normalize(images).unique()
    assert levels.dtype == torch.float32 and levels[[0, -1]].tolist() == [-1, 1]
    assert torch.allclose(levels, torch.arange(17) / 8 - 1, atol=1.001 / 255)  # half a level of 255


def test_digits_at_another_size(load, digits):
    data = load("digits", resolution=16, channels=3, split="train[:20]")
    assert len(data) == 20
    original = Image.fromarray(digits.pixels([19])[0, 0].numpy())
    assert np.array_equal(all_pixels(data)[19], to_array(original, (16, 16), 3))


def test_a_local_folder_called_digits_is_named_in_a_warning(load, tmp_path, monkeypatch, caplog):
    write_image(tmp_path / "digits" / "a.png", rgb(0))
    monkeypatch.chdir(tmp_path)
    assert len(load("digits", split="train[:5]")) == 5
    assert "./digits" in caplog.text
    assert_holds(load("./digits"), 0)


# Folders of images


def test_flat_folder(load, tmp_path):
    for seed in range(3):
        write_image(tmp_path / "pictures" / f"{seed}.png", rgb(seed))
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    (tmp_path / "pictures" / "state.json").write_text("{}")  # of some program: a saved data set has more
    data = load(tmp_path / "pictures")
    assert_holds(data, 0, 1, 2)
    assert (data.size, data.channels, data.name) == ((8, 8), 3, "pictures")
    assert data.class_names is None
    assert data.label_column is None
    for one in ("0.png", "*.png"):
        with pytest.raises(DataError, match="name the folder"):
            load(tmp_path / "pictures" / one)


def test_splits_of_folders_are_divided_and_named(load, tmp_path):
    for seed in range(4):
        write_image(tmp_path / "pictures" / ("train" if seed < 3 else "val") / f"{seed}.png", rgb(seed))
    assert_holds(load(tmp_path / "pictures", split="train[:1]+validation"), 0, 3)
    with pytest.raises(DataError, match=r"no split 'test'.*\['train', 'validation'\]"):
        load(tmp_path / "pictures", split="test")


def test_words_of_splits_elsewhere_leave_nothing_out(load, tmp_path):
    """The library's own rule would find only train/, and only "my test.png"."""
    write_image(tmp_path / "beside" / "train" / "0.png", rgb(0))
    write_image(tmp_path / "beside" / "1.png", rgb(1))
    assert_holds(load(tmp_path / "beside"), 0, 1)
    for seed, name in enumerate(["cat", "my test", "train-1"]):
        write_image(tmp_path / "mixed" / f"{name}.png", rgb(seed))
    assert_holds(load(tmp_path / "mixed"), 0, 1, 2)


def test_folder_with_pattern_characters_in_its_name(load, tmp_path):
    for seed in range(2):
        write_image(tmp_path / "my [best] pics*" / "train" / f"{seed} {{a}}.png", rgb(seed))
    assert_holds(load(tmp_path / "my [best] pics*"), 0, 1)


def test_local_folder_goes_before_the_hub(load, tmp_path, monkeypatch):
    write_image(tmp_path / "mnist" / "a.png", rgb(0))
    monkeypatch.chdir(tmp_path)
    assert_holds(load("mnist"), 0)
    write_image(tmp_path / "owner" / "name" / "a.png", rgb(1))
    assert_holds(load("owner/name"), 1)


# Saved data sets and parquet


def assert_is_the_made_set(data, *seeds: int) -> None:
    assert_holds(data, *seeds)
    assert data.label_column == "kind"
    assert data.class_names == ["even", "odd"]
    for index, image in enumerate(all_pixels(data)):
        seed = next(seed for seed in seeds if np.array_equal(image, rgb(seed)))
        assert data.column("kind", [index]).tolist() == [seed % 2]
        assert data.column("caption", [index]) == [f"number {seed} \N{CAT FACE}"]


def test_saved_data_set(load, tmp_path):
    make_set(0, 1, 2).save_to_disk(tmp_path / "saved")
    assert_is_the_made_set(load(tmp_path / "saved", text_column="caption"), 0, 1, 2)


def test_saved_data_set_of_splits(load, tmp_path):
    DatasetDict({"train": make_set(0, 1), "test": make_set(2)}).save_to_disk(tmp_path / "saved")
    assert_is_the_made_set(load(tmp_path / "saved"), 0, 1)
    assert_is_the_made_set(load(tmp_path / "saved", split="test"), 2)
    assert_is_the_made_set(load(tmp_path / "saved", split="train[1:]+test"), 1, 2)
    with pytest.raises(DataError, match=r"no split 'val'.*\['train', 'test'\]"):
        load(tmp_path / "saved", split="val")


def test_parquet_file_glob_and_folder(load, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    make_set(0, 1).to_parquet(folder / "part-0.parquet")
    make_set(2).to_parquet(folder / "part-1.parquet")
    assert_is_the_made_set(load(folder / "part-0.parquet"), 0, 1)
    assert_is_the_made_set(load(folder / "*.parquet"), 0, 1, 2)
    assert_is_the_made_set(load(folder), 0, 1, 2)
    with pytest.raises(DataError, match=r"none-\*\.parquet"):
        load(folder / "none-*.parquet")


def test_parquet_folder_with_splits(load, tmp_path):
    folder = tmp_path / "files" / "data"
    folder.mkdir(parents=True)
    make_set(0, 1).to_parquet(folder / "train-00000-of-00001.parquet")
    make_set(2).to_parquet(folder / "test-00000-of-00001.parquet")
    assert_is_the_made_set(load(tmp_path / "files"), 0, 1)
    assert_is_the_made_set(load(tmp_path / "files", split="test"), 2)
    make_set(3).to_parquet(folder / "more.parquet")
    with pytest.raises(DataError, match=r"named after a split and others, such as .*more\.parquet"):
        load(tmp_path / "files")


def test_parquet_of_plain_structs(load, tmp_path):
    """Written by something other than `datasets`: nothing says that it is an image but the shape of the struct."""
    parquet(tmp_path / "plain.parquet", [encoded(rgb(seed)) for seed in range(3)], ["x.png"] * 3, label=[2, 0, 1])
    data = load(tmp_path / "plain.parquet", label_column="label")
    assert [image.tolist() for image in all_pixels(data)] == [rgb(seed).tolist() for seed in range(3)]
    assert data.column("label", [0, 1, 2]).tolist() == [2, 0, 1]
    assert data.class_names == ["0", "1", "2"]


@pytest.mark.parametrize("column", ["bytes", "lists", "array"])
def test_parquet_of_bytes_and_arrays(load, tmp_path, column):
    arrays = [rgb(seed) for seed in range(3)]
    if column == "bytes":
        made = Dataset.from_dict({"x": [encoded(array) for array in arrays]})
    else:
        feature = List(List(List(Value("uint8")))) if column == "lists" else datasets.Array3D((3, 8, 8), "uint8")
        planes = [array.transpose(2, 0, 1) for array in arrays]
        made = Dataset.from_dict({"x": planes if column == "array" else arrays}, features=Features({"x": feature}))
    made.to_parquet(tmp_path / "x.parquet")
    data = load(tmp_path / "x.parquet")
    assert (data.size, data.channels) == ((8, 8), 3)
    assert [image.tolist() for image in all_pixels(data)] == [array.tolist() for array in arrays]


# The Hub, out of reach and within


def test_hub_name_offline(load, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'owner/none' .* offline mode"):
        load("owner/none")


def test_hub_out_of_reach(load, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"'owner/none' .* cannot be reached"):
        load("owner/none")
    assert not datasets.config.HF_HUB_OFFLINE
    offline = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: offline.append(datasets.config.HF_HUB_OFFLINE) or {}[0])
    with pytest.raises(DataError, match="cannot be reached"):
        load("owner/none")
    assert offline == [True]  # so that the library looks into its cache at once


def test_name_that_is_not_on_the_hub(load, monkeypatch):
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(DataError, match=r"DatasetNotFoundError: .*'owner/none'"):
            load("owner/none")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["", "/nowhere/at/all", "./none", "a/b/c", "~/no-such-folder", "two words", "..", "?"])
def test_what_can_be_nothing_at_all(load, name, tmp_path, monkeypatch):
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inside")
    with pytest.raises(DataError, match=r"no such folder or parquet file|holds no images"):
        load(name)


def test_several_configurations_are_named(load, tmp_path, monkeypatch):
    given = []

    def load_dataset(name, config, **options):
        given.append(options)
        raise ValueError("Config name is missing.")

    with monkeypatch.context() as patch:
        patch.setattr(sources.HfApi, "dataset_info", lambda *_, **__: True)
        patch.setattr(datasets, "load_dataset", load_dataset)
        patch.setattr(datasets, "get_dataset_config_names", lambda name: ["small", "large"])
        patch.setattr(datasets, "get_dataset_default_config_name", lambda name: None)
        for read in (load, stream_of):
            with pytest.raises(DataError, match=r"--dataset_config to one of \['small', 'large'\]"):
                read("owner/data.v1.0")
    assert all(options["trust_remote_code"] is False for options in given)
    for name in ("small", "large"):
        (tmp_path / "copy" / name).mkdir(parents=True)
        make_set(0).to_parquet(tmp_path / "copy" / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("small", "large"))
    (tmp_path / "copy" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(DataError, match=r"several configurations, \['small', 'large'\]"):
        load(tmp_path / "copy")
    assert_holds(load(tmp_path / "copy" / "small" / "*.parquet"), 0)
    with pytest.raises(DataError, match="--dataset_config 'small'"):
        load(tmp_path / "copy" / "small", dataset_config="small")


@pytest.mark.parametrize("name", ["x", "./x", "../here/x", "x/", "x/a/.."])
def test_the_name_of_local_data_is_decided_when_they_are_opened(load, tmp_path, monkeypatch, name):
    write_image(tmp_path / "here" / "x" / "a" / "1.png", rgb(0))
    monkeypatch.chdir(tmp_path / "here")
    data = load(name)
    (tmp_path / "here").rename(tmp_path / "there")
    assert data.name == "x"
    assert_holds(data, 0)


@pytest.mark.parametrize("read", ["mapped", "streamed"])
def test_an_image_outside_of_class_folders_is_left_out_where_a_class_is_needed(load, tmp_path, caplog, read):
    for seed, name in enumerate(["cat/1.png", "dog/2.png", "preview.png"]):
        write_image(tmp_path / "pets" / name, rgb(seed))
    load = load if read == "mapped" else partial(stream_of, resolution=8, channels=3)
    count = len if read == "mapped" else lambda stream: len(stream.first(9))
    images = load(tmp_path / "pets", condition="class", max_bad_fraction=0.0)
    assert "in no class: 1" in caplog.text
    assert count(images) == 2 and images.class_names == ["cat", "dog"]
    assert count(load(tmp_path / "pets")) == 3
    make_only = tmp_path / "none"
    write_image(make_only / "train" / "cat" / "1.png", rgb(0))
    write_image(make_only / "train" / "dog" / "1.png", rgb(1))
    write_image(make_only / "val" / "1.png", rgb(2))
    with pytest.raises(DataError, match="no label"):
        count(load(make_only, split="validation", condition="class"))


# What is no data set


def test_empty_folder(load, tmp_path):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "sub" / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"holds no images \(\.png, \.jpg"):
        load(tmp_path / "empty")


def test_no_rows(load, tmp_path):
    make_set(0).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"has no rows in its split 'train\[:0\]'"):
        load(tmp_path / "saved", split="train[:0]")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"no rows|Cannot load .*none\.parquet"):
        load(tmp_path / "none.parquet")


def test_files_that_are_no_data_set(load, tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(rgb(0)))
    with pytest.raises(DataError, match="is a file, but not parquet"):
        load(tmp_path / "image.png")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"Cannot load .*broken\.parquet"):
        load(tmp_path / "broken.parquet")
    (tmp_path / "saved").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(DataError, match=r"Cannot load .*saved"):
        load(tmp_path / "saved")
