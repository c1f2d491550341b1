"""What is held out is known by the names that others give to splits, and is never taken for training."""

import pytest
from datasets import Dataset

from data_helpers import encoded, load, parquet, rgb, stream_of
from ddpm_pipeline.data import DataError
from ddpm_pipeline.data.folders import read_folder


def splits(folder, *names: str, **texts: str) -> dict[str, list[str]]:
    """The names of the images that are read, by split."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(rgb(0)) if name.endswith("png") else texts[name.replace(".", "_")].encode())
    rows = {
        split: [row["path"] for row in rows.data["image"].to_pylist()] for split, rows in read_folder(folder).splits.items()
    }
    return {split: [path[len(str(folder)) + 1 :] for path in paths] for split, paths in rows.items()}


@pytest.mark.parametrize(
    "names",
    [
        "TRAIN VALID TEST",
        "trainset valset testset",
        "train_set val_set test_set",
        "TrainData ValData TestData",
        "imagesTr imagesVal imagesTs",
        "train validation_set test_images",
        "train-cat val-cat test-cat",
        "01_train 02_val 03_test",
        "train dev hold-out",
        "train minival test-dev",
        "tr va te",
        "trains vals tests",
    ],
)
@pytest.mark.parametrize("place", ["{}/a/1.png", "x/{}/1.png", "a/{}/1.png b/{}/1.png preview.png", "{}_1.png"])
def test_names_of_folders_and_files(tmp_path, names, place):
    if "{}_" in place:  # too short to mean a split in the name of a file
        names = names.replace("imagesTr imagesVal imagesTs", "a-train a-val a-test").replace("tr va te", "trn val tst")
    train, validation, test = ([one.format(name) for one in place.split() if "{}" in one] for name in names.split())
    found = splits(tmp_path, *train, *validation, *test, *(one for one in place.split() if "{}" not in one))
    assert found == {"train": train, "validation": validation, "test": test}


def test_folders_that_hold_the_same_as_train_are_not_its_classes(tmp_path):
    names = ["train/cat/1.png", "train/dog/1.png", "unseen/cat/1.png"]
    assert splits(tmp_path, *names) == {"train": names[:2], "unseen": names[2:]}


def test_a_tie_of_kinds_is_decided_for_the_images(tmp_path):
    names = [f"{split}_{kind}/1.png" for split in ("train", "test") for kind in ("images", "depth")]
    assert splits(tmp_path, *names) == {
        "train": names[:1], "test": names[2:3], "test_depth": names[3:], "train_depth": names[1:2],
    }  # fmt: skip


def test_splits_of_different_classes(tmp_path):
    assert splits(tmp_path, "train_cats/1.png", "test_dogs/2.png") == {
        "train": ["train_cats/1.png"],
        "test": ["test_dogs/2.png"],
    }


@pytest.mark.parametrize(
    "names", [["cat/1.png", "test tube/1.png", "train station/1.png"], ["test_1.png", "train_1.png", "z.png"]]
)
def test_words_within_other_names(tmp_path, names):
    assert splits(tmp_path, *names) == {"train": names}


def test_what_lies_beside_a_held_out_folder_is_for_training(tmp_path):
    assert splits(tmp_path, "3.png", "a/1.png", "test/2.png") == {"train": ["3.png", "a/1.png"], "test": ["test/2.png"]}


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_lists_that_say_more_or_name_images_that_are_not_there(tmp_path, ending):
    lists = {f"train_list_{ending}": "name,label\nimgs/a.png,0\ngone,1\n", f"val_{ending}": "imgs\\b.png 7\n"}
    files = [f"train_list.{ending}", f"val.{ending}"]
    found = splits(tmp_path, "imgs/a.png", "imgs/b.png", "imgs/c.png", *files, **lists)
    assert found == {"train": ["imgs/a.png"], "validation": ["imgs/b.png"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list_eval_partition.txt", "a.png 0\nb.png 1\nc.png 2\n"),
        ("train_test_split.csv", "image,split\na.png,train\nb.png,val\nc.png,test"),
    ],
)
def test_lists_whose_lines_say_the_split(tmp_path, name, content):
    found = splits(tmp_path, "x/a.png", "x/b.png", "x/c.png", name, **{name.replace(".", "_"): content})
    assert found == {"train": ["x/a.png"], "validation": ["x/b.png"], "test": ["x/c.png"]}


def test_a_list_that_cannot_be_read_is_warned_of(tmp_path, caplog):
    splits(tmp_path, "a.png", "b.png", "train_test_split.txt", train_test_split_txt="1 1\n2 0\n")
    stream_of(tmp_path)
    assert caplog.records[0].levelname == "WARNING" and "train_test_split.txt" in caplog.text


def test_a_list_of_held_out_images_alone(tmp_path):
    """Other lines, and images whose number looks like a name, decide nothing."""
    found = splits(
        tmp_path, "a.png", "b.png", "test.txt", "train_test_split.txt", test_txt="b.png", train_test_split_txt="1 1\n"
    )
    assert found == {"train": ["a.png"], "test": ["b.png"]}


@pytest.mark.parametrize("column", ["split", "Subset", "partition"])
def test_columns_of_metadata(tmp_path, column):
    rows = "\n".join([f"file_name,{column}", "a.png,train", "b.png,holdout", "c.png,extra", "d.png,", "e.png,Val"])
    found = splits(tmp_path, *(f"{name}.png" for name in "abcde"), "metadata.csv", metadata_csv=rows)
    assert found == {"train": ["a.png", "d.png"], "validation": ["e.png"], "test": ["b.png"], "extra": ["c.png"]}
    found = splits(tmp_path, "metadata.csv", metadata_csv=f"file_name,{column}\na.png,left\nb.png,right")
    assert found == {"train": ["a.png", "b.png"]}


def test_empty_cells_and_lines_that_are_no_rows(tmp_path):
    names = ["a.png", "s/b.png", "metadata.csv"]
    splits(tmp_path / "x", *names, metadata_csv="file_name,label,text\na.png,,\ns\\b.png,cat,a cat\n")
    data = load(tmp_path / "x", condition="class", max_bad_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    assert data.class_names == ["cat"] and list(data.values("text")) == ["a cat"]
    assert list(read_folder(tmp_path / "x").splits["train"]["text"]) == ["", "a cat"]
    for number, content in enumerate(("[]", '"a.png"', "", "\n")):
        with pytest.raises(DataError, match="metadata"):
            splits(tmp_path / str(number), "a.png", "metadata.jsonl", metadata_jsonl=content)


def test_codes_in_csv_files_stay_as_they_are(tmp_path):
    rows = "file_name,label,age\na.png,01,7\nb.png,1,-8\nc.png,,0\n"
    splits(tmp_path / "x", *(f"{name}.png" for name in "abc"), "metadata.csv", metadata_csv=rows)
    found = read_folder(tmp_path / "x").splits["train"]
    assert found["label"][:] == ["01", "1", None] and found["age"][:] == [7, -8, 0]
    data = load(tmp_path / "x", condition="class", max_bad_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    assert data.class_names == ["01", "1"] and len(data) == 2


def test_tables(tmp_path, caplog):
    for folder, names in {"x": ("trainset", "holdout"), "y": ("train", "train-val")}.items():
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            parquet(tmp_path / folder / f"{name}.parquet", [encoded(rgb(number))])
    assert len(load(tmp_path / "x", cache_dir=str(tmp_path / "cache"))) == 1
    with pytest.raises(DataError, match=r"others, such as .*train-val\.parquet"):
        stream_of(tmp_path / "y")
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    divided = parquet(tmp_path / "z.parquet", [encoded(rgb(0))] * 2, split=["train", "test"])
    coded = Dataset.from_parquet(str(divided), cache_dir=str(tmp_path / "cache")).class_encode_column("split")
    coded.save_to_disk(tmp_path / "coded")
    for read, source in ((stream_of, divided), (load, divided), (load, tmp_path / "coded")):
        caplog.clear()
        read(source, cache_dir=str(tmp_path / "cache"))
        assert "column 'split'" in caplog.text
