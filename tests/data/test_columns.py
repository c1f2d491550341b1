"""Which columns hold images and conditions, and which of their values are missing."""

from datetime import datetime

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value

from data_helpers import encoded, make_set, parquet, rgb, stream_of
from ddpm_pipeline.data import DataError, columns
from ddpm_pipeline.data.columns import find_image_column


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
    with pytest.raises(DataError, match=r"\['a', 'b'\].* --image_column"):
        find_image_column(Features({"a": image, "b": image}))
    with pytest.raises(DataError, match=r"no image column\. Its columns are: t \(.*string.*\), n \("):
        find_image_column(Features({"t": Value("string"), "n": List(List(Value("int64")))}))
    with pytest.raises(DataError, match=r"--image_column 'c' is no column .* \['a', 'b'\]"):
        find_image_column(Features({"a": image, "b": image}), "c")
    with pytest.raises(DataError, match=r"--image_column 't' has the type .*string"):
        find_image_column(Features({"t": Value("string"), "a": image}), "t")


def test_columns_for_conditions(load, tmp_path):
    data = make_set(0, 1, 2).add_column("number", [7, 8, 9]).add_column("texts", [["a"], [], ["b", "c"]])
    data = data.add_column("pixels", [0, 1, 2])
    data.save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved", label_column="number", text_column="texts")
    assert loaded.columns == ["kind", "caption", "number", "texts"]
    assert list(loaded.values("number")) == [0, 1, 2]
    assert loaded.column("number", [2, 0]).tolist() == [2, 0]
    assert loaded.column("texts", [2, 1]) == [["b", "c"], []]
    assert loaded.class_names == ["7", "8", "9"]
    assert loaded.column("kind", []).shape == (0,)
    for options, message in [
        ({"label_column": "nope"}, r"--label_column 'nope' is no column"),
        ({"label_column": "photo"}, r"--label_column 'photo' has the type"),
        ({"label_column": "texts"}, r"--label_column 'texts' has the type"),
        ({"text_column": "kind"}, r"--text_column 'kind' has the type"),
        ({"text_column": "photo"}, r"--text_column 'photo' has the type"),
        ({"label_column": "pixels"}, r"--label_column 'pixels' has the type"),  # a name that the cache takes
    ]:
        with pytest.raises(DataError, match=message):
            load(tmp_path / "saved", **options)
    with pytest.raises(DataError, match="'score' is no column"):
        loaded.column("score", [0])


LABELS = {  # values -> (classes, numbers of the values)
    "gaps": ([10**12, 3, 7, 3], ["3", "7", str(10**12)], [2, 0, 1, 0]),
    "negative": ([-1, 1, -1, -20], ["-20", "-1", "1"], [1, 2, 1, 0]),
    "unsigned": (np.array([2**64 - 1, 0, 5, 5], np.uint64), ["0", "5", str(2**64 - 1)], [2, 0, 1, 1]),
    "strings": (["dog", "cat", "", "dog"], ["", "cat", "dog"], [2, 1, 0, 2]),
    "booleans": ([True, False, True, True], ["False", "True"], [1, 0, 1, 1]),
    "times": (
        [datetime(2024, 5, day) for day in (3, 1, 2, 3)],
        [f"2024-05-0{day} 00:00:00" for day in (1, 2, 3)],
        [2, 0, 1, 2],
    ),
}


@pytest.mark.parametrize("name", ["label", "kind"])
@pytest.mark.parametrize("values", LABELS)
def test_the_values_that_occur_are_the_classes(load, tmp_path, values, name):
    given, classes, numbers = LABELS[values]
    images = [encoded(rgb(seed)) for seed in range(4)]
    file = parquet(tmp_path / "x.parquet", images, **{name: pa.array(given)})
    asked = {"condition": "class", **({} if name == "label" else {"label_column": name})}
    data = load(file, **asked)
    assert data.class_names == classes
    assert data.column(data.label_column, range(4)).tolist() == numbers
    stream = stream_of(file, cache_dir=str(tmp_path / "cache"), **asked)
    assert stream.class_names == classes
    assert [value for _, value, *_ in stream._first_rows(4)] == numbers
    assert stream.stored(2, str(tmp_path / "cache")).column(data.label_column, [0, 1]).tolist() == numbers[:2]


def test_a_column_of_as_many_classes_as_rows_is_refused(load, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "MAX_CLASSES", 3)
    file = parquet(tmp_path / "x.parquet", [encoded(rgb(seed)) for seed in range(4)], number=[1, 2, 3, 4])
    with pytest.raises(DataError, match="4 different values"):
        load(file, label_column="number")
    assert load(file).class_names is None


def test_a_column_called_text_is_the_captions(load, tmp_path):
    file = parquet(tmp_path / "x.parquet", [encoded(rgb(0))], text=["a one"], title=["no"], label=[3])
    assert load(file, condition="text").text_column == "text"
    assert load(file, condition="text", text_column="title").text_column == "title"
    assert load(file).text_column is None
    templates = load(file, condition="text", from_labels=True)
    assert templates.text_column is None and templates.class_names == ["3"]


def test_a_label_that_no_condition_needs_may_be_missing(load, tmp_path):
    base = {"x": [{"bytes": encoded(rgb(seed)), "path": None} for seed in range(3)]}
    features = Features({"x": datasets.Image(), "n": Value("int64")})
    Dataset.from_dict({**base, "n": [0, None, -1]}, features=features).save_to_disk(tmp_path / "missing")
    data = load(tmp_path / "missing", label_column="n")
    assert len(data) == 3
    assert data.class_names == ["-1", "0"]
    assert data.column("n", [0, 2]).tolist() == [1, 0]
    with pytest.raises(DataError, match=r"[Rr]ow 1 .* 'n'"):
        data.column("n", [0, 1])
    Dataset.from_dict({**base, "n": [None] * 3}, features=features).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="'n' holds no label"):
        load(tmp_path / "none", label_column="n")
