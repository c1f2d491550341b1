"""The tests' own Hub keeps its word: ranges, listings and many clients at once, as streaming of data sets needs them."""

import io
import json
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

import hub_server
from hub_fixtures import environment, run_checks

FILES, ROWS = 3, 40  # rows a file
BIG = bytes(range(256)) * 2**15  # 8 MiB: more than sockets buffer


@pytest.fixture(scope="module")
def pictures(hub: hub_server.Hub) -> np.ndarray:
    """A data set of parquet files with several row groups on the Hub; its images, [N, 8, 8]."""
    images = np.random.default_rng(0).integers(0, 255, (FILES * ROWS, 8, 8), dtype=np.uint8)
    rows = {"image": [Image.fromarray(image) for image in images], "number": range(FILES * ROWS)}
    data = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "number": Value("int64")}))
    files = {"README.md": b"---\npretty_name: Pictures\n---\n"}
    for index in range(FILES):
        file = io.BytesIO()
        data.shard(FILES, index).to_parquet(file, batch_size=7)
        files[f"data/train-{index:05d}-of-{FILES:05d}.parquet"] = file.getvalue()
    hub.write("org/streamed", files, kind="datasets")
    return images


STREAMING = """
import os
import numpy as np
import datasets
from datasets.distributed import split_dataset_by_node

def check_every_row_is_streamed_in_order():
    rows = list(datasets.load_dataset("org/streamed", split="train", streaming=True))
    assert [row["number"] for row in rows] == list(range(len(rows)))
    assert (np.stack([np.asarray(row["image"]) for row in rows]) == np.load(os.environ["IMAGES"])).all()

def check_streams_can_be_left_and_shared_out():
    data = datasets.load_dataset("org/streamed", split="train", streaming=True)
    assert data.num_shards == 3
    assert [row["number"] for row in data.take(2)] == [0, 1]
    assert [row["number"] for row in data.skip(100).take(2)] == [100, 101]
    numbers = [row["number"] for rank in range(2) for row in split_dataset_by_node(data, rank, 2)]
    assert sorted(numbers) == list(range(120))
    half = iter(data)  # of one stream, while another is read
    next(half)
    assert sum(1 for _ in data) == 120

def check_file_system_lists_and_reads_ranges():
    from huggingface_hub import HfFileSystem
    files = HfFileSystem()
    names = files.glob("datasets/org/streamed/**/*.parquet")
    assert len(names) == 3
    with files.open(names[0], block_size=64) as file:
        whole = file.read()
        file.seek(-4, 2)
        assert file.read() == whole[-4:] == b"PAR1" and len(whole) == files.info(names[0])["size"]
        file.seek(100)
        assert file.read(10) == whole[100:110]

def check_data_are_downloaded_too():
    data = datasets.load_dataset("org/streamed", split="train")
    assert data["number"] == list(range(120))
"""
CHECKS = [line[4:].split("(")[0] for line in STREAMING.splitlines() if line.startswith("def check_")]


@pytest.fixture(scope="module")
def streamed(hub: hub_server.Hub, pictures: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("streamed")
    np.save(folder / "images.npy", pictures)
    return run_checks(STREAMING, environment(hub, folder / "home", IMAGES=str(folder / "images.npy")), folder)


@pytest.mark.parametrize("check", CHECKS)
def test_data_set_on_the_hub(streamed: dict, check: str) -> None:
    assert streamed[check] == "passed", streamed[check]


def test_ranges_and_listings(hub: hub_server.Hub) -> None:
    hub.write("org/ranges", {"folder/file.txt": b"0123456789", "top.txt": b""})

    def get(path: str, **headers: str) -> tuple[int, bytes, dict]:
        try:
            with urllib.request.urlopen(urllib.request.Request(hub.url + path, headers=headers), timeout=10) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    address = "/org/ranges/resolve/main/folder/file.txt"
    for wanted, found in {"bytes=2-4": b"234", "bytes=7-": b"789", "bytes=-3": b"789", "bytes=5-99": b"56789"}.items():
        status, content, headers = get(address, Range=wanted)
        low = int(headers["Content-Range"].split()[1].split("-")[0])
        assert (status, content, low) == (206, found, b"0123456789".index(found))
    assert get(address, Range="bytes=10-12")[0] == 416
    assert get(address)[:2] == (200, b"0123456789")
    tree = json.loads(get("/api/models/org/ranges/tree/main?recursive=true&expand=true")[1])
    found = {entry["path"]: entry["type"] for entry in tree if entry["path"] != ".gitattributes"}
    assert found == {"folder": "directory", "folder/file.txt": "file", "top.txt": "file"}


def test_client_that_does_not_read_its_answer_keeps_nobody_waiting(hub: hub_server.Hub, tmp_path: Path) -> None:
    """As one that streams a large file and asks for something else in between."""
    hub.write("org/big", {"big.txt": BIG})
    address = hub.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as slow:
        slow.sendall(b"GET /org/big/resolve/main/big.txt HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        for _ in range(2):
            with urllib.request.urlopen(f"{hub.url}/api/models/org/big", timeout=10) as answer:
                assert json.load(answer)["id"] == "org/big"


def test_many_clients_at_once_are_all_answered(hub: hub_server.Hub) -> None:
    hub.write("org/many", {"file.txt": b"content"})
    found: list[bytes] = []

    def ask() -> None:
        with urllib.request.urlopen(f"{hub.url}/org/many/resolve/main/file.txt", timeout=20) as answer:
            found.append(answer.read())

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"content"] * 60
