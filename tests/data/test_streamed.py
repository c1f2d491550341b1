"""Reading from streams: every row once an epoch, in parts, resumed at any row, bad rows skipped, from every source."""

import json
from collections import Counter
from itertools import islice, takewhile

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from data_helpers import load as load_data
from data_helpers import numbered, numbers, stream_of, write_numbered
from ddpm_pipeline.data import DataError, streamed
from ddpm_pipeline.data.streamed import Position, StreamData, StreamedImage, divide, rows_of_part

BUFFER = 7


def read(data: StreamData, parts: int = 1, part: int = 0, position: Position | None = None, buffer: int = BUFFER):
    return rows_of_part(data, divide(data, parts), part, 5, buffer, position or Position())


def read_epochs(data: StreamData, parts: int, part: int, epochs: int, **options) -> list[StreamedImage]:
    return list(takewhile(lambda image: image.position.epoch < epochs, read(data, parts, part, **options)))


def number_of(image: StreamedImage) -> int:
    (number,) = numbers(torch.from_numpy(image.pixels.transpose(2, 0, 1)[None]))
    return number


# Order


@pytest.mark.parametrize("parts", [1, 4, 7])
@pytest.mark.parametrize("sizes", [[5, 0, 17, 1, 30], [2], [1, 1, 1], [12] * 7])
def test_the_parts_of_any_stream_make_up_every_epoch(tmp_path, sizes, parts):
    """Also with fewer files or rows than parts, files of no rows, and a buffer larger than the data."""
    data = stream_of(write_numbered(tmp_path / "x", sizes, group=8))
    shards = divide(data, parts).stream.num_shards
    seen: dict[int, Counter] = {0: Counter(), 1: Counter(), 2: Counter()}
    for part in range(parts):
        for image in read_epochs(data, parts, part, 3, buffer=50):
            shard, row = divmod(image.number, 2**32)
            assert 0 <= shard < shards and row < 40
            seen[image.position.epoch][number_of(image)] += 1
    for epoch in seen.values():
        assert epoch == Counter(range(sum(sizes)))


def test_whole_files_or_single_rows_are_dealt_out(tmp_path):
    """Parts read no more than their own files where files divide among them; else the rows of every file by turns."""
    data = stream_of(write_numbered(tmp_path / "x", [6, 6, 6, 7]))
    assert divide(data, 2).by_shard and not divide(data, 3).by_shard
    shards = [{image.number >> 32 for image in read_epochs(data, 2, part, 1)} for part in range(2)]
    assert [len(one) for one in shards] == [2, 2] and not shards[0] & shards[1]
    lengths = [len(read_epochs(data, 3, part, 3)) for part in range(3)]
    assert lengths == [25, 25, 25]  # of three epochs, each of which begins with another part
    single = stream_of(write_numbered(tmp_path / "y", [1] * 7))
    assert [len(read_epochs(single, 3, part, 1)) for part in range(3)] == [3, 2, 2]  # turns go on from file to file


def test_rows_are_shuffled_anew_in_each_epoch_by_the_seed(tmp_path):
    data = stream_of(write_numbered(tmp_path / "x", [25, 31, 40]))
    images = read_epochs(data, 1, 0, 2)
    epochs = [[number_of(image) for image in images if image.position.epoch == epoch] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(96)) and epochs[0] != epochs[1]
    ahead = [abs(here - there) for here, there in zip(epochs[0], epochs[0][1:], strict=False)]
    assert np.mean(ahead) > 2  # if only a little by a buffer of 7 rows
    assert [image.number for image in read_epochs(data, 1, 0, 2)] == [image.number for image in images]
    for alone, buffer in ((stream_of(write_numbered(tmp_path / "one", [96], group=96)), 96), (data, 1)):
        order = [image.number for image in read_epochs(alone, 1, 0, 2, buffer=buffer)]
        assert order[:96] != order[96:]  # rows in a block, and shards by themselves
    other = rows_of_part(data, divide(data, 1), 0, 6, BUFFER, Position())
    assert [image.number for image in islice(other, 96)] != [image.number for image in images[:96]]


def test_a_block_is_bounded_by_its_rows_and_by_its_bytes(tmp_path, monkeypatch):
    data = stream_of(write_numbered(tmp_path / "x", [400], group=400))
    blocks = Counter(image.position.block for image in islice(read(data, buffer=150), 400))
    assert list(blocks.values()) == [150, 150, 100]
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 100 * len(numbered(0)))
    blocks = Counter(image.position.block for image in islice(read(data, buffer=10_000), 400))
    assert len(blocks) == 4 and set(blocks.values()) == {100}


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[25, 31, 40], [24, 24, 24, 24], [5]], ids=["uneven", "even", "tiny"])
def test_reading_resumes_at_any_row(tmp_path, sizes, parts):
    """Bad rows among them, at and over the ends of blocks and epochs; a position survives JSON."""
    data = stream_of(write_numbered(tmp_path / "x", sizes, bad={2, 30, 31}), max_bad_fraction=0.5)
    count = 30 if sum(sizes) == 5 else 110

    def first(images: int, position: Position | None = None) -> list[tuple]:
        return [
            (image.number, image.pixels.tobytes(), image.position, image.skipped)
            for image in islice(read(data, parts, parts - 1, position), images)
        ]

    whole = first(count)
    ends = [k + 1 for k in range(count - 1) if whole[k][2].epoch != whole[k + 1][2].epoch]
    for done in {1, 6, 7, 8, *ends[:2]}:
        position = Position.from_json(json.loads(json.dumps(whole[done - 1][2].to_json())))
        assert first(count - done, position) == whole[done:]


# Bad rows


def test_bad_rows_are_skipped_and_named_once_an_epoch(tmp_path):
    bad = {3, 50, 95}
    data = stream_of(write_numbered(tmp_path / "x", [48, 48], bad=bad), max_bad_fraction=0.05)
    images = read_epochs(data, 1, 0, 3)
    assert {number_of(image) for image in images} == set(range(96)) - bad
    assert len(images) == 3 * 93
    last = images[-1].position
    found = [row for image in images for row in image.skipped]
    assert last.bad == len(found) and last.seen == len(images) + len(found)
    files = Counter(row["file"] for row in found)
    assert set(files) == {f"{number}.png" for number in bad} and set(files.values()) <= {2, 3}
    assert {(row["shard"] % 10, row["row"]) for row in found} <= {(s, r) for s in range(10) for r in range(10)}
    assert all("not an image" in row["reason"] for row in found)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_stream_of_nothing_usable_ends(tmp_path, parts):
    bad = write_numbered(tmp_path / "bad", [30], bad=range(30))
    with pytest.raises(DataError, match=r"30 of 30 rows of 'bad' .* no row is left"):
        stream_of(bad, max_bad_fraction=0.9)
    data = stream_of(write_numbered(tmp_path / "large", [30]), resize="none", resolution=4, max_bad_fraction=0.9)
    for attempt in (lambda: next(read(data, parts)), lambda: data.first(3), lambda: data.stored(3, str(tmp_path))):
        with pytest.raises(DataError, match=r"of 'large' .* no row is left"):
            attempt()
    empty = stream_of(write_numbered(tmp_path / "empty", [0]))
    for attempt in (lambda: next(read(empty, parts)), lambda: empty.first(3)):
        with pytest.raises(DataError, match="'empty' has no rows"):
            attempt()


def test_a_long_run_of_bad_rows_ends_reading_before_the_epoch_does(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "JUDGED_ROWS", 20)
    with pytest.raises(DataError, match="20 of 20 rows"):
        next(read(stream_of(write_numbered(tmp_path / "x", [500], bad=range(500)))))
    allowed = stream_of(write_numbered(tmp_path / "y", [500], bad=range(100)), max_bad_fraction=0.99)
    assert len(read_epochs(allowed, 1, 0, 1, buffer=1)) == 400


def test_rows_without_what_the_condition_reads_are_skipped(tmp_path):
    texts = {7: None, 8: ""}
    folder = write_numbered(
        tmp_path / "x", [40, 40], text=lambda row: texts.get(row, f"number {row}"), kind=lambda row: row % 3
    )
    data = stream_of(folder, condition="text", text_column="text", max_bad_fraction=0.1)
    assert data.columns == ["text", "kind"] and data.text_column == "text"
    assert list(data.values("text"))[6:10] == ["number 6", None, "", "number 9"]
    images = read_epochs(data, 1, 0, 1)
    assert {number_of(image): image.value for image in images} == {
        row: texts.get(row, f"number {row}") for row in range(80) if row != 7
    }
    assert [row["reason"] for image in images for row in image.skipped] == ["there is no caption in the column 'text'"]
    with pytest.raises(DataError, match="'kind'"):
        next(data.values("kind"))  # which is not read
    assert stream_of(folder, condition="class", label_column="kind").class_names == ["0", "1", "2"]
    assert stream_of(folder, label_column="kind").class_names is None  # and nobody asks


def test_a_file_that_breaks_on_the_way_is_an_error(tmp_path):
    data = stream_of(write_numbered(tmp_path / "x", [200, 200], group=20))
    path = tmp_path / "x" / "001.parquet"
    content = bytearray(path.read_bytes())
    content[3000:9000] = bytes(6000)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="Cannot load the stream 'x': "):
        read_epochs(data, 1, 0, 1)
    with pytest.raises(DataError, match="Cannot load the stream 'x': "):
        data.first(400)


# Sources


def saved(folder, rows=20) -> str:
    features = Features({"image": datasets.Image(), "kind": ClassLabel(names=["even", "odd"]), "n": Value("int64")})
    images = [{"bytes": numbered(row), "path": None} for row in range(rows)]
    made = Dataset.from_dict({"image": images, "kind": [r % 2 for r in range(rows)], "n": list(range(rows))}, features)
    made.save_to_disk(str(folder))
    return str(folder)


def test_every_kind_of_source_can_be_streamed(tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    whole = stream_of(saved(tmp_path / "saved"), **cache)
    assert numbers(whole.first(50)) == list(range(20)) and whole.class_names == ["even", "odd"]
    assert numbers(stream_of(tmp_path / "saved", split="train[5:9]", **cache).first(50)) == [5, 6, 7, 8]
    write_numbered(tmp_path / "parquet", [6, 6])
    for source in (tmp_path / "parquet", tmp_path / "parquet" / "*.parquet"):
        assert numbers(stream_of(source).first(50)) == list(range(12))
    for number in range(6):
        path = tmp_path / "folder" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbered(number))
    folder = stream_of(tmp_path / "folder", condition="class", **cache)
    assert {number_of(image): image.value for image in read_epochs(folder, 1, 0, 1)} == {n: n % 2 for n in range(6)}
    digits = stream_of("digits", channels=None, **cache)
    assert digits.channels == 1 and torch.equal(digits.first(30), load_data("digits", **cache).pixels(range(30)))
    assert digits.num_images is None and digits.class_names == list("0123456789")
    colour = stream_of(tmp_path / "parquet", channels=None, max_bad_fraction=0.0)  # nothing says that they are grey
    assert colour.channels == 3 and torch.equal(colour.first(12)[:, 2:], stream_of(tmp_path / "parquet").first(12))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("I;16", 1), ("RGB", 3), ("LA", 3), (None, 3)])
def test_channels_follow_the_declared_mode(tmp_path, mode, channels):
    features = Features({"x": datasets.Image(mode=mode)})
    Dataset.from_dict({"x": [{"bytes": numbered(0), "path": None}]}, features).save_to_disk(str(tmp_path / "saved"))
    assert stream_of(tmp_path / "saved", channels=None).channels == channels
    assert stream_of(tmp_path / "saved", channels=4).first(1).shape == (1, 4, 8, 8)


def test_fingerprints_differ_where_the_stream_does(tmp_path):
    folder = write_numbered(tmp_path / "x", [6], text=str)
    base = stream_of(folder).fingerprint
    assert stream_of(folder).fingerprint == base
    assert stream_of(folder, resolution=4).fingerprint != base
    assert stream_of(folder, condition="text", text_column="text").fingerprint != base
    write_numbered(tmp_path / "x", [7])
    assert stream_of(folder).fingerprint != base


def test_what_cannot_be_streamed_is_named(tmp_path):
    folder = write_numbered(tmp_path / "x", [6])
    with pytest.raises(DataError, match=r"'train\[:10%\]'.* --streaming"):
        stream_of(folder, split="train[:10%]")
    with pytest.raises(DataError, match="no split 'test'"):
        stream_of(folder, split="test")


def test_the_first_images_are_stored_for_evaluation(tmp_path):
    folder = write_numbered(tmp_path / "x", [30, 30], bad={4}, kind=lambda row: row % 2)
    data = stream_of(folder, max_bad_fraction=0.1)
    stored = data.stored(20, str(tmp_path / "cache"))
    assert numbers(stored.pixels(range(20))) == [row for row in range(21) if row != 4]
    assert len(stored) == 20 and [one["row"] for one in stored.skipped] == [4]
    (file,) = (tmp_path / "cache" / "ddpm_pipeline").iterdir()
    written = file.stat().st_mtime_ns
    again = data.stored(20, str(tmp_path / "cache"))
    assert file.stat().st_mtime_ns == written and again.fingerprint == stored.fingerprint
    assert len(data.stored(1000, str(tmp_path / "cache"))) == 59
    with pytest.raises(DataError, match="1 of 21 rows"):
        stream_of(folder).stored(20, str(tmp_path / "other"))


def test_storing_that_fails_leaves_no_file(tmp_path, monkeypatch):
    data = stream_of(write_numbered(tmp_path / "x", [30]))
    monkeypatch.setattr(streamed, "pixels_of", lambda *_: 1 / 0)
    with pytest.raises(DataError, match="ZeroDivisionError"):
        data.stored(20, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "ddpm_pipeline").iterdir())
