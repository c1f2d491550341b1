"""Which columns hold images and conditions, and which of their values are missing."""

import datasets
import pytest
from datasets import Dataset, Features, List, Value

from data_helpers import encoded, make_set, rgb
from ddpm_pipeline.data import DataError
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
        ({"label_column": "pixels"}, r"--label_column 'pixels' has the type"),  # a name that the cache takes
    ]:
        with pytest.raises(DataError, match=message):
            load(tmp_path / "saved", **options)
    with pytest.raises(DataError, match="'score' is no column"):
        loaded.column("score", [0])


def test_a_label_that_no_condition_needs_may_be_missing(load, tmp_path):
    base = {"x": [{"bytes": encoded(rgb(seed)), "path": None} for seed in range(3)]}
    features = Features({"x": datasets.Image(), "n": Value("int64")})
    Dataset.from_dict({**base, "n": [0, None, -1]}, features=features).save_to_disk(tmp_path / "missing")
    data = load(tmp_path / "missing", label_column="n")
    assert len(data) == 3
    assert data.class_names == ["0"]
    assert data.column("n", [0, 2]).tolist() == [0, -1]
    with pytest.raises(DataError, match=r"[Rr]ow 1 .* 'n'"):
        data.column("n", [0, 1])
    Dataset.from_dict({**base, "n": [-1, None, -1]}, features=features).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="'n' holds no label"):
        load(tmp_path / "none", label_column="n")
