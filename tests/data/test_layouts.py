"""The folders that docs/data.md draws are read as it says, mapped and streamed."""

import logging
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_helpers import all_pixels, encoded, load, rgb, stream_of
from ddpm_pipeline.data.images import image_extensions
from helpers import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text("utf-8")
LINE = re.compile(r"^(?P<indent>(?:│   |    )*)(?:├── |└── )?(?P<name>\S+)\s*(?:link to (?P<link>\S+))?\s*(?P<note>.*)$")


@dataclass
class Drawing:
    """A drawn folder: the content of its files, and what the page says of each."""

    root: str
    files: dict[str, str | None] = field(default_factory=dict)  # path -> the text that it holds, or None
    links: dict[str, str] = field(default_factory=dict)
    read: dict[str, tuple[str, str | None, str | None]] = field(default_factory=dict)  # path -> split, class, caption
    left_out: dict[str, str] = field(default_factory=dict)  # path -> reason
    second: str | None = None  # --condition_column
    partners: dict[str, str] = field(default_factory=dict)  # path -> that of its condition image

    def make(self, parent: Path) -> dict[bytes, str]:
        """Writes the files; returns which file has which pixels."""
        pixels = {}
        for number, (path, text) in enumerate(self.files.items()):
            place = parent / path
            if path.endswith("/"):
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            suffix = place.suffix.lower()
            if suffix == ".parquet":
                image = [{"bytes": encoded(rgb(number)), "path": None}] if path in self.read else [None]
                columns = {"image": image} if path in self.read else {"feature": [0.5]}
                pq.write_table(pa.table(columns), place)
            elif suffix in image_extensions() or not suffix:
                place.write_bytes(encoded(rgb(number)))
            else:
                place.write_text(text or "", "utf-8")
            pixels[rgb(number).tobytes()] = path
        for path, target in self.links.items():
            (parent / path).symlink_to(target)
        for archive in sorted((path for path in self.files if re.search(r"\.(zip|tar)/$", path)), reverse=True):
            _pack(parent / archive)
        return pixels


def _pack(folder: Path) -> None:
    unpacked = folder.rename(folder.with_name(f"{folder.name}.unpacked"))
    files = sorted(path for path in unpacked.rglob("*") if path.is_file())
    if folder.suffix == ".zip":
        with zipfile.ZipFile(folder, "w") as archive:
            [archive.write(path, path.relative_to(unpacked)) for path in files]
    else:
        with tarfile.open(folder, "w") as archive:
            [archive.add(path, path.relative_to(unpacked)) for path in files]
    for path in sorted(unpacked.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    unpacked.rmdir()


def drawings() -> dict[str, Drawing]:
    found: dict[str, Drawing] = {}
    blocks = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", PAGE.split("## Layouts")[1], re.DOTALL | re.MULTILINE)
    for language, path, block in blocks:
        if language == "text":
            drawing = _parse(block.splitlines())
            drawing.second = path or None
            found[drawing.root] = drawing
        else:
            found[path.split("/")[0]].files[path] = block
    return found


def _parse(lines: list[str]) -> Drawing:
    drawing, folders = Drawing(lines[0].strip("/")), [lines[0].strip()]
    for line in [lines[0], *lines[1:]]:
        match = LINE.match(line)
        depth = len(match["indent"]) // 4 + ("── " in line)
        folders[depth:] = [match["name"]]
        path, note = "".join(folders), match["note"].strip()
        if match["link"]:
            drawing.links[path] = match["link"]
        else:
            drawing.files.setdefault(path, note[1:-1].replace("\\n", "\n") if note.startswith('"') else None)
        if note.startswith("→"):
            split, *others = note[1:].strip().split(", ")
            text = [one[1:-1] for one in others if one.startswith('"')]
            label = [one for one in others if not one.startswith('"')]
            drawing.read[path] = (split, *(label or [None]), *(text or [None]))
        elif note.startswith("condition of "):
            drawing.partners[f"{drawing.root}/{note.removeprefix('condition of ')}"] = path
        elif note.startswith("✗"):
            drawing.left_out[path.rstrip("/")] = note[1:].strip()
    return drawing


DRAWINGS = drawings()


def _rows(data, pixels: dict[bytes, str], split: str) -> dict[str, tuple[str, str | None, str | None]]:
    """What was read, in the form of a drawing."""
    labels = [None] * len(data)
    if data.label_column:
        labels = [None if value is None or value < 0 else data.class_names[value] for value in data.values(data.label_column)]
    elif "label" in data.columns:
        labels = list(data.values("label"))
    texts = list(data.values("text")) if "text" in data.columns else [None] * len(data)
    files = [pixels[image.tobytes()] for image in all_pixels(data)]
    return {file: (split, label, text) for file, label, text in zip(files, labels, texts, strict=True)}


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawn_folders_are_read_as_the_page_says(tmp_path, caplog, name):
    drawing = DRAWINGS[name]
    pixels, options = drawing.make(tmp_path), {"cache_dir": str(tmp_path / ".cache"), "resolution": 8, "channels": 3}
    if name == "facades":
        options["image_column"] = "target"
    if drawing.second:
        options |= {"condition": "image", "condition_column": drawing.second}
    read, partners = {}, {}
    with caplog.at_level(logging.INFO, "ddpm_pipeline"):
        for split in {split: None for split, *_ in drawing.read.values()}:
            caplog.clear()
            data = load(tmp_path / name, split=split, **options)
            rows = _rows(data, pixels, split)
            read |= rows
            if drawing.second:
                second = data.condition_images.pixels(range(len(data))).permute(0, 2, 3, 1).numpy()
                partners |= {file: pixels[image.tobytes()] for file, image in zip(rows, second, strict=True)}
            (line,) = [one for record in caplog.records if f"reading the split {split!r}" in (one := record.getMessage())]
            stream = stream_of(tmp_path / name, split=split, **options)
            assert stream.first(100).equal(data.pixels(range(len(data)))) and stream.class_names == data.class_names
    assert read == drawing.read and partners == drawing.partners
    for path, reason in drawing.left_out.items():
        if not reason.startswith("named by"):
            assert reason in line and os.path.relpath(path, name) in line.split(reason)[1].split(";")[0], line


def test_the_page_draws_every_rule():
    """Each row of the table is drawn, and the layouts are many enough to be the rules."""
    headings = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^### (.*)$", PAGE, re.M)}
    linked = set(re.findall(r"\]\(#([\w-]+)\)", PAGE))
    assert headings - {"links"} == linked
