"""Which files are read, and when again: replaced and unreadable ones, archives, and what rows may name."""

import errno
import io
import os
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_helpers import all_pixels, assert_holds, encoded, parquet, rgb, stream_of, write_image
from ddpm_pipeline.data import DataError, files, mapped
from ddpm_pipeline.data.images import BadImage


def three(folder):
    for seed in range(3):
        write_image(folder / f"{seed}.png", rgb(seed))
    return folder


def bitmap(seed: int) -> bytes:
    """A file of the same size for every seed."""
    return encoded(rgb(seed), "BMP")


# Again


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "no"), TimeoutError()]
)
def test_a_file_that_could_not_be_read_once_is_read_the_next_time(load, tmp_path, monkeypatch, error):
    folder, read = three(tmp_path / "x"), files.read_bytes

    def fails(path: str, *limit: int) -> bytes:
        if path.endswith("1.png"):
            raise error
        return read(path, *limit)

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_bytes", fails)
        before = load(folder, max_bad_fraction=0.5)
        assert_holds(before, 0, 2)
        assert [one["row"] for one in before.skipped] == [1]
        with monkeypatch.context() as none:
            none.setattr(mapped, "image_pixels", None)  # it still cannot be read, and nothing else is read again
            assert load(folder, max_bad_fraction=0.5).fingerprint == before.fingerprint
        stream = stream_of(folder, channels=3, max_bad_fraction=0.5)
        assert len(stream.first(3)) == 2
    assert_holds(load(folder), 0, 1, 2)
    assert_holds(stream.stored(3, str(tmp_path / "cache")), 0, 1, 2)


def test_sizes_are_read_from_headers_alone(load, tmp_path, monkeypatch):
    folder, read, asked = three(tmp_path / "x"), files.read_bytes, []
    (folder / "3.png").write_bytes(b"no image")
    monkeypatch.setattr(files, "read_bytes", lambda path, *limit: asked.append(path[-5:]) or read(path, *limit))
    assert_holds(load(folder, max_bad_fraction=0.5), 0, 1, 2)
    assert sorted(asked) == ["0.png", "1.png", "2.png", "3.png", "3.png"]


def test_memory_that_is_short_once_leaves_no_image_out(load, tmp_path, monkeypatch):
    folder = three(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(DataError, match="3 of 3"):
            load(folder, resolution=8, channels=3)
    assert_holds(load(folder, resolution=8, channels=3), 0, 1, 2)


def test_a_damaged_file_is_remembered(load, tmp_path, monkeypatch):
    folder = three(tmp_path / "x")
    (folder / "1.png").write_bytes(encoded(rgb(1))[:100])
    load(folder, max_bad_fraction=0.5)
    monkeypatch.setattr(mapped, "image_pixels", None)
    assert_holds(load(folder, max_bad_fraction=0.5), 0, 2)


@pytest.mark.parametrize("kind", ["folder", "saved paths", "parquet", "parquet paths", "metadata", "zip"])
def test_an_image_replaced_by_one_of_the_same_name_size_and_time_is_read_anew(load, tmp_path, kind):
    folder = tmp_path / "x"
    folder.mkdir()
    named = folder / ("x.parquet" if kind == "parquet" else "x.zip" if kind == "zip" else "1.bmp")

    def write(seed: int) -> None:
        if kind == "parquet":
            pq.write_table(pa.table({"image": [{"bytes": bitmap(seed), "path": None}]}), named, compression="none")
        elif kind == "zip":
            with zipfile.ZipFile(named, "w") as archive:
                archive.writestr("1.bmp", bitmap(seed))
        else:
            named.write_bytes(bitmap(seed))
        os.utime(named, ns=(10**18, 10**18))

    write(1)
    if kind in ("parquet paths", "saved paths"):
        path = "1.bmp" if kind == "parquet paths" else str(named)
        pq.write_table(pa.table({"image": [{"bytes": None, "path": path}]}, parquet_struct()), folder / "x.parquet")
    elif kind == "metadata":
        (folder / "metadata.csv").write_text("file_name\n1.bmp\n")
    source = folder / "x.parquet" if "paths" in kind else folder
    before, streamed = load(source), stream_of(source, channels=3)
    size = named.stat().st_size
    write(2)
    assert named.stat().st_size == size
    after = load(source)
    assert_holds(before, 1)
    assert_holds(after, 2)
    assert after.fingerprint != before.fingerprint
    if kind != "parquet paths" and kind != "saved paths":
        assert stream_of(source, channels=3).fingerprint != streamed.fingerprint


def parquet_struct() -> pa.Schema:
    return pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_is_of_content_not_of_place(load, tmp_path, streaming):
    def fingerprint(folder) -> str:
        options = {"resolution": 8, "channels": 3, "condition": "class", "cache_dir": str(tmp_path / "cache" / folder.name)}
        return (stream_of if streaming else load)(folder, **options).fingerprint

    for seed, name in enumerate(["cat/1.png", "dog/2.png", "dog/3.png"]):
        write_image(tmp_path / "pets" / name, rgb(seed))
    base = fingerprint(tmp_path / "pets")
    shutil.copytree(tmp_path / "pets", tmp_path / "other")
    assert fingerprint(tmp_path / "other") == base
    found = {base}
    for change in ("rename", "caption", "replace", "remove"):
        if change == "rename":
            (tmp_path / "other" / "dog").rename(tmp_path / "other" / "dogs")
        elif change == "caption":
            (tmp_path / "other" / "cat" / "1.txt").write_text("a cat")
        elif change == "replace":
            write_image(tmp_path / "other" / "cat" / "1.png", rgb(9))
        else:
            (tmp_path / "other" / "dogs" / "3.png").unlink()
        found.add(fingerprint(tmp_path / "other"))
    assert len(found) == 5


# Archives


def test_archives_are_read_or_refused_with_what_to_do(load, tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "none.zip").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", "no image")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"), io.BytesIO())
    for name, fix in {
        "broken.zip": "unpack",
        "none.zip": "unpack",
        "notes.zip": "holds no images",
        "images.tar.gz": "Unpack",
    }.items():
        with pytest.raises(DataError, match=fix):
            load(tmp_path / name)
        (tmp_path / "one").mkdir(exist_ok=True)
        shutil.copy(tmp_path / name, tmp_path / "one")
        with pytest.raises(DataError, match=fix):
            load(tmp_path / "one")
        shutil.rmtree(tmp_path / "one")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_packed_elsewhere_or_twice(load, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for seed, name in enumerate(["cat\\1.png", "dog\\1.png", "dog\\1.png"]):
            archive.writestr(name, encoded(rgb(seed)))
    data = load(tmp_path / "x.zip")
    assert_holds(data, 0, 2)
    assert data.class_names == ["cat", "dog"]


def test_a_pattern_of_shards_is_read_as_one(load, tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with zipfile.ZipFile(tmp_path / "shards" / f"{shard:05}.zip", "w") as archive:
            for number in range(2):
                archive.writestr(f"{number}.png", encoded(rgb(2 * shard + number)))
                archive.writestr(f"{number}.txt", f"number {2 * shard + number}")
    data = load(tmp_path / "shards" / "*.zip", condition="text")
    assert_holds(data, 0, 1, 2, 3)
    assert data.name == "shards" and list(data.values("text")) == [f"number {number}" for number in range(4)]
    assert_holds(load(tmp_path / "shards" / "00001.zip"), 2, 3)


def test_a_member_whose_header_lies_is_not_unpacked(load, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", encoded(rgb(1)))
        archive.writestr("bomb.png", bytes(10**6))
    assert_holds(load(tmp_path / "x.zip", max_bad_fraction=0.5), 1)


# What rows name


@pytest.fixture
def service():
    """A local service that counts how often it is asked."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = encoded(rgb(7))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/1.png", asked
    server.shutdown()
    server.server_close()


def table_of(kind: str, folder, paths: list[str]):
    """A data set of rows that name images by these paths."""
    folder.mkdir()
    write_image(folder / "in.png", rgb(0))
    if kind == "metadata":
        (folder / "metadata.csv").write_text("\n".join(["file_name", *paths]))
        return folder
    return parquet(folder / "x.parquet", [None] * len(paths), paths)


@pytest.mark.parametrize("kind", ["metadata", "parquet"])
def test_rows_of_local_data_reach_no_further_than_their_folder(load, tmp_path, service, kind):
    address, asked = service
    write_image(tmp_path / "out.png", rgb(5))
    os.mkfifo(tmp_path / "pipe")
    out = str(tmp_path / "out.png")
    outside = [
        out,
        "../out.png",
        address,
        f"file://{out}",
        "file:///dev/zero",
        "/dev/zero",
        f"zip://a::{address}",
        str(tmp_path / "pipe"),
    ]
    source = table_of(kind, tmp_path / "x", ["in.png", *outside])
    options = {"resolution": 8, "channels": 3, "max_bad_fraction": 0.95}
    data = load(source, **options)
    assert_holds(data, 0)
    assert len(data.skipped) == len(outside) and all("--follow_paths" in one["reason"] for one in data.skipped)
    assert stream_of(source, **options).first(9).equal(data.pixels([0]))
    assert not asked
    trusted = load(source, follow_paths=True, **options)
    assert_holds(trusted, 0, 5, 5, 5, 7)
    assert asked


def test_rows_that_name_no_ordinary_file_of_the_folder_are_skipped(load, tmp_path):
    source = table_of(
        "parquet", tmp_path / "x", ["in.png", "pipe", "zero", "sub", "nul\0l", "", "zip://a::in.png", "missing.png"]
    )
    os.mkfifo(tmp_path / "x" / "pipe")
    os.symlink("/dev/zero", tmp_path / "x" / "zero")
    (tmp_path / "x" / "sub").mkdir()
    options = {"resolution": 8, "channels": 3, "max_bad_fraction": 0.95}
    assert_holds(load(source, **options), 0)
    assert len(stream_of(source, **options).first(9)) == 1
    assert files.content_of([("x", str(tmp_path / "x" / name)) for name in ("pipe", "zero", "sub", "missing.png")])


def test_what_never_ends_is_cut(tmp_path, monkeypatch, service):
    monkeypatch.setattr(files, "MAX_REMOTE_BYTES", 100)
    for path in (service[0], "/dev/zero", "file:///dev/zero"):
        with pytest.raises(BadImage):
            files.Reach(anywhere=True).fetched({"bytes": None, "path": path})


def test_rows_of_the_hub_may_name_the_web_and_the_cache_only(tmp_path, service):
    write_image(tmp_path / "cache" / "1.png", rgb(3))
    reach = files.Reach((str(tmp_path / "cache"),), remote=True)
    assert reach.fetched({"bytes": None, "path": service[0]})["bytes"] == encoded(rgb(7))
    assert reach.fetched({"bytes": None, "path": str(tmp_path / "cache" / "1.png")})["bytes"] == encoded(rgb(3))
    for path in (
        "/etc/hostname",
        "file:///etc/hostname",
        "local:///etc/hostname",
        "memory://x",
        str(tmp_path / "cache" / "../x"),
    ):
        with pytest.raises(BadImage, match="--follow_paths"):
            reach.fetched({"bytes": None, "path": path})


# Folders


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("file_name,text\n1.png,Käse\n".encode("latin-1"), "Save it as UTF-8, with quotes around texts"),
        (b"file_name,text\n1.png,a cat, asleep\n", "Save it as UTF-8, with quotes around texts"),
        (b"file_name,label\n1.png,1.0\n", r"'label' has the type Value\('float64'\)\. Labels must be"),
        (b'{"file_name": "1.png"}\n\n{"file_name', "line 3: Unterminated"),
        (b'{"file_name": "1.png"}\n[]', "line 2 must be an object"),
        (b'{"file_name": "1.png", "label": 1}\n{"label": "1"}', "column 'label' must have values of one type"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error_with_what_to_do(load, tmp_path, content, named):
    write_image(tmp_path / "x" / "1.png", rgb(0))
    (tmp_path / "x" / ("metadata.csv" if content[:1] == b"f" else "metadata.jsonl")).write_bytes(content)
    with pytest.raises(DataError, match=named):
        load(tmp_path / "x", condition="class")


def test_a_folder_that_cannot_be_listed_is_an_error(load, tmp_path, monkeypatch):
    three(tmp_path / "x" / "sub")
    list_folder = os.scandir

    def fails(path):
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr(files.os, "scandir", fails)
    with pytest.raises(DataError, match="sub' cannot be read: Permission denied"):
        load(tmp_path / "x")


def test_preprocessing_starts_no_process_that_could_outlive_this_one(load, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: 1 / 0)
    data = load(three(tmp_path / "x"), preprocessing_num_workers=3)
    assert [image.tobytes() for image in all_pixels(data)] == [rgb(seed).tobytes() for seed in range(3)]
