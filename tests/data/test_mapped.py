"""Data sets from every kind of source, their cache, and batches read from it."""

import io
import os
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_pipeline.data import mapped
from ddpm_pipeline.data.mapped import find_image_column, load_images, to_model_range
from ddpm_pipeline.support.errors import DataError


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def load(tmp_path):
    """`load_images` with a cache of this test's own."""

    def load(dataset, **options):
        return load_images(str(dataset), **{"cache_dir": str(tmp_path / "cache"), **options})

    return load


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one for each image that is decoded for the cache in this process."""
    calls = []
    original = mapped.image_pixels
    monkeypatch.setattr(mapped, "image_pixels", lambda *args: calls.append(1) or original(*args))
    return calls


def rgb(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def all_pixels(data) -> list[np.ndarray]:
    """Every image, [H, W, C]."""
    return list(data.pixels(range(len(data))).permute(0, 2, 3, 1).numpy())


def assert_holds(data, *seeds: int) -> None:
    """The images are those of `rgb(seed)`, whatever their order."""
    assert sorted(image.tobytes() for image in all_pixels(data)) == sorted(rgb(seed).tobytes() for seed in seeds)


def make_set(*seeds: int) -> Dataset:
    rows = {
        "photo": [{"bytes": png(rgb(seed)), "path": None} for seed in seeds],
        "kind": [seed % 2 for seed in seeds],
        "caption": [f"number {seed} \N{CAT FACE}" for seed in seeds],
        "score": [0.5 for _ in seeds],
    }
    kind = ClassLabel(names=["even", "odd"])
    types = {"photo": datasets.Image(), "kind": kind, "caption": Value("string"), "score": Value("float32")}
    return Dataset.from_dict(rows, features=Features(types))


# The built-in digits


def test_digits_are_exact(load):
    data = load("digits")
    reference = load_digits()
    assert (len(data), data.resolution, data.channels, data.name) == (1797, 8, 1, "digits")
    assert data.class_names == list("0123456789")
    images = data.pixels(range(1797))
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert np.array_equal((images[:, 0].double() * 16 / 255).round().numpy(), reference.images)
    assert np.array_equal(images[:, 0].numpy(), np.rint(reference.images * 255 / 16))
    assert np.array_equal(data.column("label", range(1797)).numpy(), reference.target)


def test_digits_have_17_levels_in_model_range(load):
    levels = to_model_range(load("digits").pixels(range(1797))).unique()
    assert len(levels) == 17
    assert levels.dtype == torch.float32
    assert levels[0] == -1
    assert levels[-1] == 1
    assert torch.allclose(levels, torch.arange(17) / 8 - 1, atol=1.001 / 255)  # half a level of 255


def test_digits_at_another_size(load):
    data = load("digits", resolution=16, channels=3, split="train[:20]")
    assert data.pixels([0, 19]).shape == (2, 3, 16, 16)
    assert len(data) == 20


def test_a_local_folder_called_digits_is_named_in_a_warning(load, tmp_path, monkeypatch, caplog):
    write(tmp_path / "digits" / "a.png", rgb(0))
    monkeypatch.chdir(tmp_path)
    assert len(load("digits", split="train[:5]")) == 5
    assert "./digits" in caplog.text
    assert_holds(load("./digits"), 0)


def test_model_range():
    levels = to_model_range(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(levels, torch.arange(256, dtype=torch.float32) / 127.5 - 1)
    assert torch.equal(((levels + 1) * 127.5).round(), torch.arange(256.0))


# Folders of images


def test_flat_folder(load, tmp_path):
    for seed in range(3):
        write(tmp_path / "pictures" / f"{seed}.png", rgb(seed))
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    data = load(tmp_path / "pictures")
    assert_holds(data, 0, 1, 2)
    assert (data.resolution, data.channels, data.name) == (8, 3, "pictures")
    assert data.class_names is None
    assert data.label_column is None


def test_folder_of_classes(load, tmp_path):
    for seed, name in enumerate(["cat", "dog", "cat"]):
        write(tmp_path / "pets" / name / f"{seed}.png", rgb(seed))
    data = load(tmp_path / "pets")
    assert_holds(data, 0, 1, 2)
    assert data.class_names == ["cat", "dog"]
    labels = data.column("label", range(3)).tolist()
    dog = [i for i, image in enumerate(all_pixels(data)) if np.array_equal(image, rgb(1))]
    assert [i for i in range(3) if labels[i] == 1] == dog


def test_nested_folders(load, tmp_path):
    write(tmp_path / "deep" / "0.png", rgb(0))
    write(tmp_path / "deep" / "a" / "b" / "1.PNG", rgb(1))
    write(tmp_path / "deep" / ".hidden" / "2.png", rgb(2))
    assert_holds(load(tmp_path / "deep"), 0, 1)


def test_folder_with_metadata(load, tmp_path):
    for seed in range(2):
        write(tmp_path / "pictures" / f"{seed}.png", rgb(seed))
    lines = ['{"file_name": "1.png", "text": "a one"}', '{"file_name": "0.png", "text": "a zero"}']
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    data = load(tmp_path / "pictures", text_column="text")
    for image, text in zip(all_pixels(data), data.column("text", range(2)), strict=True):
        assert np.array_equal(image, rgb({"a zero": 0, "a one": 1}[text]))


@pytest.mark.parametrize("classes", [False, True])
def test_folders_named_after_splits(load, tmp_path, classes):
    for seed in range(4):
        folder = tmp_path / "pictures" / ("train" if seed < 3 else "val")
        write(folder / ("xyz"[seed % 2] if classes else "") / f"{seed}.png", rgb(seed))
    data = load(tmp_path / "pictures")
    assert_holds(data, 0, 1, 2)
    assert data.class_names == (["x", "y"] if classes else None)
    assert_holds(load(tmp_path / "pictures", split="validation"), 3)
    assert len(load(tmp_path / "pictures", split="train[:2]")) == 2
    with pytest.raises(DataError, match=r"no split 'test'; give --split one of \['train', 'validation'\]"):
        load(tmp_path / "pictures", split="test")


def test_words_of_splits_elsewhere_leave_nothing_out(load, tmp_path):
    """The library's own rule would find only train/, and only "my test.png"."""
    for seed, name in enumerate(["bus", "car", "train"]):
        write(tmp_path / "vehicles" / name / f"{seed}.png", rgb(seed))
    data = load(tmp_path / "vehicles")
    assert_holds(data, 0, 1, 2)
    assert data.class_names == ["bus", "car", "train"]
    for seed, name in enumerate(["cat", "my test", "train-1"]):
        write(tmp_path / "mixed" / f"{name}.png", rgb(seed))
    assert_holds(load(tmp_path / "mixed"), 0, 1, 2)


def test_folder_with_pattern_characters_in_its_name(load, tmp_path):
    for seed in range(2):
        write(tmp_path / "my [best] pics*" / "train" / f"{seed} {{a}}.png", rgb(seed))
    assert_holds(load(tmp_path / "my [best] pics*"), 0, 1)


def test_local_folder_goes_before_the_hub(load, tmp_path, monkeypatch):
    write(tmp_path / "mnist" / "a.png", rgb(0))
    monkeypatch.chdir(tmp_path)
    assert_holds(load("mnist"), 0)
    write(tmp_path / "owner" / "name" / "a.png", rgb(1))
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
    with pytest.raises(DataError, match=r"no split 'val'; give --split one of \['train', 'test'\]"):
        load(tmp_path / "saved", split="val")


def test_parquet_file_glob_and_folder(load, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    make_set(0, 1).to_parquet(folder / "part-0.parquet")
    make_set(2).to_parquet(folder / "part-1.parquet")
    assert_is_the_made_set(load(folder / "part-0.parquet"), 0, 1)
    assert_is_the_made_set(load(folder / "*.parquet"), 0, 1, 2)
    assert_is_the_made_set(load(folder), 0, 1, 2)
    with pytest.raises(DataError, match=r"no file matches .*none-\*\.parquet"):
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
    structs = pa.array([{"bytes": png(rgb(seed)), "path": "x.png"} for seed in range(3)])
    pq.write_table(pa.table({"pic": structs, "label": [2, 0, 1]}), tmp_path / "plain.parquet")
    data = load(tmp_path / "plain.parquet", label_column="label")
    assert [image.tolist() for image in all_pixels(data)] == [rgb(seed).tolist() for seed in range(3)]
    assert data.column("label", [0, 1, 2]).tolist() == [2, 0, 1]
    assert data.class_names == ["0", "1", "2"]


@pytest.mark.parametrize("column", ["bytes", "lists", "array"])
def test_parquet_of_bytes_and_arrays(load, tmp_path, column):
    arrays = [rgb(seed) for seed in range(3)]
    if column == "bytes":
        made = Dataset.from_dict({"x": [png(array) for array in arrays]})
    else:
        feature = List(List(List(Value("uint8")))) if column == "lists" else datasets.Array3D((3, 8, 8), "uint8")
        planes = [array.transpose(2, 0, 1) for array in arrays]
        made = Dataset.from_dict({"x": planes if column == "array" else arrays}, features=Features({"x": feature}))
    made.to_parquet(tmp_path / "x.parquet")
    data = load(tmp_path / "x.parquet")
    assert (data.resolution, data.channels) == (8, 3)
    assert [image.tolist() for image in all_pixels(data)] == [array.tolist() for array in arrays]


# The Hub, out of reach and within


def test_hub_name_offline(load, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'owner/none' is no local folder or file, offline mode is on"):
        load("owner/none")


def test_hub_out_of_reach(load, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"'owner/none' is no local folder or file, the Hub cannot be reached"):
        load("owner/none")
    assert not datasets.config.HF_HUB_OFFLINE


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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(DataError, match=r"failed: DatasetNotFoundError: .*'owner/none' doesn't exist on the Hub"):
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


# Columns


def test_the_image_column_is_found_by_its_type():
    image, text = datasets.Image(), Value("string")
    struct = {"bytes": Value("binary"), "path": Value("string")}
    nested = List(List(Value("uint8")))
    assert find_image_column(Features({"image": text, "x": image, "y": struct, "z": nested})) == "x"
    assert find_image_column(Features({"image": text, "y": struct, "z": nested})) == "y"
    assert find_image_column(Features({"a": Value("binary"), "z": nested})) == "z"
    assert find_image_column(Features({"a": Value("binary"), "t": text})) == "a"
    assert find_image_column(Features({"x": image, "y": image, "z": nested}), "z") == "z"


def test_image_column_errors():
    image = datasets.Image()
    with pytest.raises(DataError, match=r"several image columns, \['a', 'b'\]; name one with --image_column"):
        find_image_column(Features({"a": image, "b": image}))
    with pytest.raises(DataError, match=r"no image column; its columns are: t \(.*string.*\), n \("):
        find_image_column(Features({"t": Value("string"), "n": List(List(Value("int64")))}))
    with pytest.raises(DataError, match=r"--image_column 'c' is no column .* \['a', 'b'\]"):
        find_image_column(Features({"a": image, "b": image}), "c")
    with pytest.raises(DataError, match=r"--image_column 't' has the type .*string"):
        find_image_column(Features({"t": Value("string"), "a": image}), "t")


def test_columns_for_conditions(load, tmp_path):
    data = make_set(0, 1, 2).add_column("number", [7, 8, 9]).add_column("texts", [["a"], [], ["b", "c"]])
    data.save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved", label_column="number", text_column="texts")
    assert loaded.columns == ["kind", "caption", "number", "texts"]
    assert list(loaded.values("number")) == [7, 8, 9]
    assert loaded.column("number", [2, 0]).tolist() == [9, 7]
    assert loaded.column("texts", [2, 1]) == [["b", "c"], []]
    assert loaded.class_names == [str(i) for i in range(10)]
    assert loaded.column("kind", []).shape == (0,)
    for options, message in [
        ({"label_column": "nope"}, r"--label_column 'nope' is no column"),
        ({"label_column": "caption"}, r"--label_column 'caption' has the type"),
        ({"text_column": "kind"}, r"--text_column 'kind' has the type"),
        ({"text_column": "photo"}, r"--text_column 'photo' has the type"),
    ]:
        with pytest.raises(DataError, match=message):
            load(tmp_path / "saved", **options)
    with pytest.raises(DataError, match="'score' is no column"):
        loaded.column("score", [0])


def test_a_label_that_no_condition_needs_may_be_missing(load, tmp_path):
    base = {"x": [{"bytes": png(rgb(seed)), "path": None} for seed in range(3)]}
    features = Features({"x": datasets.Image(), "n": Value("int64")})
    Dataset.from_dict({**base, "n": [0, None, -1]}, features=features).save_to_disk(tmp_path / "missing")
    data = load(tmp_path / "missing", label_column="n")
    assert len(data) == 3
    assert data.class_names == ["0"]
    assert data.column("n", [0, 2]).tolist() == [0, -1]
    with pytest.raises(DataError, match="row 1 has no value in the column 'n'"):
        data.column("n", [0, 1])
    Dataset.from_dict({**base, "n": [-1, None, -1]}, features=features).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="label column 'n' holds no label"):
        load(tmp_path / "none", label_column="n")


# Sizes and channels


def test_the_datas_own_resolution(load, tmp_path):
    write(tmp_path / "one" / "a.png", rgb(0, 12, 12))
    assert load(tmp_path / "one").resolution == 12
    write(tmp_path / "one" / "b.png", rgb(0, 10, 20))
    with pytest.raises(DataError, match=r"have 2 different sizes, from 12x12 to 20x10; .* --resolution"):
        load(tmp_path / "one")
    assert load(tmp_path / "one", resolution=6).pixels([0, 1]).shape == (2, 3, 6, 6)
    write(tmp_path / "wide" / "a.png", rgb(0, 10, 20))
    with pytest.raises(DataError, match=r"are all 20x10, which is not square; .* --resolution"):
        load(tmp_path / "wide")


def test_the_datas_own_channels(load, tmp_path):
    folder = tmp_path / "pictures"
    write(folder / "a.png", rgb(0)[..., 0])
    write(folder / "b.png", np.stack([rgb(1)[..., 0]] * 2, axis=-1))  # grey with alpha
    assert load(folder).channels == 1
    write(folder / "c.png", np.concatenate([rgb(2), rgb(3)[..., :1]], axis=-1))  # colour with alpha
    assert load(folder).channels == 3
    assert load(folder, channels=4).pixels([0]).shape == (1, 4, 8, 8)
    assert load(folder, channels=1).pixels([0]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(("option", "value"), [("resolution", 0), ("resolution", "8"), ("channels", 2)])
def test_impossible_options(load, option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        load("digits", **{option: value})
    with pytest.raises(DataError, match="--preprocessing_num_workers -1"):
        load("digits", preprocessing_num_workers=-1)


# Bad data


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
    with pytest.raises(DataError, match=r"no rows|cannot load the parquet files .*none\.parquet"):
        load(tmp_path / "none.parquet")


def test_files_that_are_no_data_set(load, tmp_path):
    (tmp_path / "image.png").write_bytes(png(rgb(0)))
    with pytest.raises(DataError, match="is a file, but not parquet"):
        load(tmp_path / "image.png")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"cannot load the parquet files .*broken\.parquet"):
        load(tmp_path / "broken.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot load the saved data set"):
        load(tmp_path / "saved")


def test_unwritable_cache(load, tmp_path):
    (tmp_path / "file").write_text("in the way")
    make_set(0).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"cannot write the preprocessed images .* --cache_dir"):
        load(tmp_path / "saved", cache_dir=str(tmp_path / "file"))


# The cache


def cache_files(tmp_path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "ddpm_pipeline").iterdir()}


def test_the_cache_is_used_again(load, tmp_path, decoded):
    for seed in range(3):
        write(tmp_path / "pictures" / f"{seed}.png", rgb(seed))
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
    made = make_set(0, 1).add_column("other", [{"bytes": png(rgb(9)), "path": None}] * 2)
    made.save_to_disk(tmp_path / "saved")
    base = {"resolution": 8, "channels": 3, "image_column": "photo"}
    prints = set()
    for change in [{}, {"resolution": 4}, {"channels": 1}, {"channels": 4}, {"image_column": "other"}]:
        prints.add(load(tmp_path / "saved", **{**base, **change}).fingerprint)
    assert len(prints) == 5
    assert len(decoded) == 10
    load(tmp_path / "saved", **base, label_column="kind", text_column="caption")
    assert len(decoded) == 10  # which columns are conditions changes nothing in the cache


def test_changed_data_make_a_new_cache(load, tmp_path):
    for seed in range(2):
        write(tmp_path / "pictures" / f"{seed}.png", rgb(seed))
    before = load(tmp_path / "pictures")
    write(tmp_path / "pictures" / "1.png", rgb(5))
    os.utime(tmp_path / "pictures" / "1.png", ns=(10**18, 10**18))
    after = load(tmp_path / "pictures")
    assert_holds(after, 0, 5)
    assert after.fingerprint != before.fingerprint
    make_set(0, 1).save_to_disk(tmp_path / "saved")
    load(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    make_set(0, 2).save_to_disk(tmp_path / "saved")
    assert_holds(load(tmp_path / "saved"), 0, 2)


def test_the_fingerprint_is_of_the_content(load, tmp_path):
    for seed in range(3):
        write(tmp_path / "here" / f"{seed}.png", rgb(seed))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = load(tmp_path / "here"), load(tmp_path / "there", cache_dir=str(tmp_path / "other"))
    assert here.fingerprint == there.fingerprint
    make_set(0, 1).save_to_disk(tmp_path / "saved")
    relabelled = make_set(0, 1).remove_columns("caption").add_column("caption", ["a", "b"])
    relabelled.save_to_disk(tmp_path / "relabelled")
    assert load(tmp_path / "saved").fingerprint != load(tmp_path / "relabelled").fingerprint
    make_set(1, 0).save_to_disk(tmp_path / "reordered")
    assert load(tmp_path / "saved").fingerprint != load(tmp_path / "reordered").fingerprint


def test_several_processes_give_the_same(load, tmp_path):
    one = load("digits")
    two = load("digits", preprocessing_num_workers=2, cache_dir=str(tmp_path / "other"))
    assert two.fingerprint == one.fingerprint
    assert torch.equal(two.pixels(range(1797)), one.pixels(range(1797)))


def test_preprocessing_shows_how_far_it_is_and_the_cache_shows_nothing(load, capfd):
    datasets.enable_progress_bars()
    load("digits", split="train[:40]", preprocessing_num_workers=2)
    shown = capfd.readouterr().err
    assert "Looking at image sizes (num_proc=2)" in shown and "Preprocessing images (num_proc=2): 100%" in shown
    load("digits", split="train[:40]", preprocessing_num_workers=2)
    assert "Preprocessing" not in capfd.readouterr().err


# Batches


@pytest.fixture
def chunked(load, monkeypatch):
    """200 digits in RGB, in Arrow chunks of 7 rows."""
    monkeypatch.setattr(mapped, "BATCH_BYTES", 7 * 8 * 8 * 3)
    return load("digits", channels=3, split="train[:200]")


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
    assert chunked.pixels([]).shape == (0, 3, 8, 8)


def test_flips(chunked):
    flip = np.array([True, False, True, False])
    plain, flipped = chunked.pixels([3, 50, 50, 199]), chunked.pixels([3, 50, 50, 199], flip)
    for index, mirrored in enumerate(flip):
        expected = plain[index].numpy()[:, :, ::-1] if mirrored else plain[index].numpy()
        assert np.array_equal(flipped[index].numpy(), expected)
    assert not torch.equal(plain, flipped)


@pytest.mark.parametrize("indices", [[-1], [0, 200]])
def test_indices_out_of_range(chunked, indices):
    for read in (chunked.pixels, lambda indices: chunked.column("label", indices)):
        with pytest.raises(IndexError, match=r"outside 0\.\.199"):
            read(indices)


def test_pickling_takes_the_file_along_not_the_pixels(chunked):
    batch = chunked.pixels(range(200))
    pickled = pickle.dumps(chunked)
    assert len(pickled) < batch.numel() / 2
    assert torch.equal(pickle.loads(pickled).pixels(range(200)), batch)
