"""Rows that cannot be used: left out and listed while they are few, the end of the run where they are many."""

import json

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

from data_helpers import encoded, parquet
from ddpm_pipeline.data import DataError, mapped
from ddpm_pipeline.data.skipped import SkippedLog, check_bad_fraction, skipped_row


def grey(level: int) -> np.ndarray:
    return np.full((8, 8), level, dtype=np.uint8)


def bomb() -> bytes:
    """A GIF of a hundred bytes that says it is 65,000 pixels a side."""
    data = bytearray(encoded(grey(0), "GIF"))
    data[6:10] = b"\xe8\xfd\xe8\xfd"
    return bytes(data)


NOISE = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
BAD = {
    "no image": None,
    "empty": b"",
    "text": b"hello, this is no image",
    "truncated": encoded(NOISE)[:90],
    "cut short": encoded(NOISE, "JPEG")[:-30],
    "bomb": bomb(),
    "no meaning": encoded(np.full((8, 8), np.nan, np.float32), "TIFF"),
}


@pytest.fixture
def mixed(tmp_path):
    """300 rows, of which 7 are bad, each in its own way: (file, the number of the row for each way)."""
    rows: list[bytes | None] = [encoded(grey(i % 256)) for i in range(300)]
    places = {reason: 11 + 40 * i for i, reason in enumerate(BAD)}
    for reason, place in places.items():
        rows[place] = BAD[reason]
    return parquet(tmp_path / "mixed.parquet", rows, number=list(range(300))), places


@pytest.mark.parametrize("options", [{}, {"resolution": 8, "channels": 1, "preprocessing_num_workers": 3}])
def test_few_bad_rows_are_left_out_and_named(load, mixed, options, tmp_path):
    file, places = mixed
    data = load(file, max_bad_fraction=0.03, **options)
    assert (len(data), data.size, data.channels) == (293, (8, 8), 1)
    good = [row for row in range(300) if row not in places.values()]
    assert data.rows_of(range(293)).tolist() == good
    assert data.column("number", range(293)).tolist() == list(data.values("number")) == good
    assert data.pixels(range(293))[:, 0, 0, 0].tolist() == [row % 256 for row in good]
    clean = [encoded(grey(row % 256)) for row in good]
    assert load(parquet(tmp_path / "clean.parquet", clean, number=good)).fingerprint == data.fingerprint
    reasons = {one["row"]: one["reason"] for one in data.skipped}
    assert list(reasons) == sorted(places.values())
    for way, words in {
        "no image": "there is no image", "empty": "0 bytes", "text": "cannot identify", "truncated": "runcated",
        "cut short": "truncated", "bomb": "decompression bomb", "no meaning": "nan",
    }.items():  # fmt: skip
        assert words in reasons[places[way]], reasons


def test_the_cache_knows_what_was_left_out(load, mixed, monkeypatch):
    first = load(mixed[0], max_bad_fraction=0.03)
    monkeypatch.setattr(mapped, "image_pixels", None)  # nothing may be decoded again
    again = load(mixed[0], max_bad_fraction=0.03)
    assert again.skipped == first.skipped and again.fingerprint == first.fingerprint
    with pytest.raises(DataError, match=r"\d of 300 rows"):  # the limit is no part of the cache
        load(mixed[0], resolution=8, channels=1)


def test_the_limit_is_a_share_of_all_rows(load, mixed):
    message = r"7 of 300 rows of '.*mixed\.parquet' cannot be used, more than --max_bad_fraction 0.02 allows"
    with pytest.raises(DataError, match=message) as error:
        load(mixed[0], max_bad_fraction=0.02)
    assert "\n  row 11: there is no image in this row\n" in str(error.value) and "and 2 more" in str(error.value)
    assert len(load(mixed[0], max_bad_fraction=7 / 300)) == 293


def test_no_bad_row_may_be_allowed_and_all_bad_never_are(load, tmp_path):
    one_bad = parquet(tmp_path / "one.parquet", [encoded(grey(0))] * 999 + [b"x"])
    assert len(load(one_bad)) == 999
    with pytest.raises(DataError, match=r"1 of 1,000 rows .* --max_bad_fraction 0 allows.*\n  row 999: "):
        load(one_bad, max_bad_fraction=0)
    all_bad = parquet(tmp_path / "all.parquet", [b"x"] * 20)
    for options in ({}, {"resolution": 8}, {"resolution": 8, "channels": 3}):
        with pytest.raises(DataError, match=r"20 of 20 rows .* no row is left"):
            load(all_bad, max_bad_fraction=0.99, **options)


def test_files_are_named_and_modes_of_every_kind_are_no_reason(load, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for mode in ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"]:
        Image.new(mode, (8, 8)).save(folder / f"{mode}.tif")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    data = load(folder, max_bad_fraction=0.1)
    (skipped,) = data.skipped
    assert skipped["file"] == str(folder / "broken.jpg") and "cannot identify" in skipped["reason"]


def test_arrays_that_are_not_regular(load, tmp_path):
    features = Features({"x": List(List(Value("uint8")))})
    Dataset.from_dict({"x": [[[1, 2], [3, 4]], [[1, 2], [3]]]}, features=features).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", max_bad_fraction=0.5)
    assert len(data) == 1 and "the array is not regular" in data.skipped[0]["reason"]


# What a condition needs


def labelled(path, **columns):
    images = {"image": [grey(i) for i in range(6)]}
    types = {
        "image": datasets.Array2D((8, 8), "uint8"), "label": ClassLabel(names=["a", "b"]), "number": Value("int64"),
        "text": Value("string"), "texts": List(Value("string")),
    }  # fmt: skip
    rows = {
        "label": [0, 1, -1, None, 1, 0],
        "number": [0, 7, -3, None, 2, 0],
        "text": ["a", "", None, "b", "c", "d"],
        "texts": [["a", None], [], [None], None, [""], ["d"]],
    }
    Dataset.from_dict({**images, **rows}, features=Features(types)).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, {}),
        ({"condition": "class", "label_column": "label"}, {2: "the label -1", 3: "no label"}),
        ({"condition": "class", "label_column": "number"}, {3: "no label"}),
        ({"condition": "text", "label_column": "label"}, {2: "the label -1", 3: "no label"}),
        ({"condition": "text", "text_column": "text"}, {2: "no caption"}),
        ({"condition": "text", "text_column": "texts"}, {1: "no caption", 2: "no caption", 3: "no caption"}),
        ({"condition": "class", "label_column": "label", "text_column": "text"}, {2: "the label -1", 3: "no label"}),
        ({"condition": "none", "label_column": "label", "text_column": "text"}, {}),
    ],
)
def test_rows_without_what_the_condition_needs_are_left_out(load, tmp_path, options, missing):
    data = load(labelled(tmp_path / "saved"), max_bad_fraction=0.5, **options)
    assert [one["row"] for one in data.skipped] == list(missing)
    assert all(words in one["reason"] for one, words in zip(data.skipped, missing.values(), strict=True))
    assert len(data) == 6 - len(missing)
    if options.get("label_column") == "number":
        assert data.class_names == ["-3", "0", "2", "7"]


def test_of_two_reasons_the_image_is_named(load, tmp_path):
    both = parquet(tmp_path / "x.parquet", [encoded(grey(0)), b"x"], text=["a", None])
    (skipped,) = load(both, condition="text", text_column="text", max_bad_fraction=0.5).skipped
    assert skipped["row"] == 1 and "cannot identify" in skipped["reason"]


def test_the_cache_is_the_same_whatever_the_condition(load, tmp_path, monkeypatch):
    load(labelled(tmp_path / "saved"))
    monkeypatch.setattr(mapped, "image_pixels", None)
    assert len(load(tmp_path / "saved", condition="class", max_bad_fraction=0.5)) == 4


# Writing them down


def test_the_log_has_each_row_once_and_survives_a_kill(tmp_path, caplog):
    log = SkippedLog(tmp_path)
    log.add([])
    assert not log.path.exists()
    log.add([skipped_row(3, "empty", "a.png"), skipped_row(3, "empty", "a.png"), skipped_row(3, "other", shard=1)])
    log.add([skipped_row(3, "empty", "a.png"), skipped_row(4, "empty")])
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines == [
        {"row": 3, "file": "a.png", "reason": "empty"},
        {"shard": 1, "row": 3, "reason": "other"},
        {"row": 4, "reason": "empty"},
    ]
    assert "2 rows" in caplog.text and "skipped.jsonl): row 3 (a.png): empty; row 3 of shard 1: other" in caplog.text
    log.path.write_text(log.path.read_text() + '{"row": 9, "rea')  # the run was killed here
    again = SkippedLog(tmp_path)
    again.add([skipped_row(4, "empty"), skipped_row(9, "whole")])
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [*lines, {"row": 9, "reason": "whole"}]
    assert len(again) == 4


def test_the_check_needs_no_list_of_all(tmp_path):
    check_bad_fraction("x", [], 0, 5, 0.0)
    check_bad_fraction("x", [], 29, 100, 0.29)  # though 0.29 * 100 < 29
    with pytest.raises(DataError, match=r"300 of 1,000 rows of x .*\n  row 1: why\n  and 295 more"):
        check_bad_fraction("x", [skipped_row(1, "why")], 300, 1000, 0.1)
