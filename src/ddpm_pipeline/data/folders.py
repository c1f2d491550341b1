"""What a folder of images is: the one reading of class folders, splits, metadata, captions and the layouts of other tools.

docs/data.md has its rules and draws the layouts. Which file is in which split and class is decided on names; then what
describes the images is read. An account is kept of all that is left out. Archives are read as if they were folders.
"""

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

from ..support.errors import DataError
from ..support.exceptions import describe_exception
from .columns import image_columns
from .files import ARCHIVES, PACKED, File, in_archive, list_archive, list_files, read_bytes
from .images import image_extensions

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}  # words in the names of folders and files -> the split; the same words as in the `datasets` library
# of the images, where masks and annotations lie beside
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTIONS = (".txt", ".caption")
TABLES = (".parquet", ".arrow")
MAX_TEXT_BYTES = 2**20  # of a file of captions beside an image
MAX_LIST_BYTES = 2**28  # of a file that lists the images of a split
BOXES = re.compile(r"\d+(\s+[-+.\deE]+){4,}\s*")  # a line of YOLO's annotations: a class, and coordinates
DOMAINS = ("A", "B")  # of unpaired data: trainA, trainB, testA, testB
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Picture:
    file: File
    split: str
    folders: tuple[str, ...]  # that may be its class


@dataclass
class Account:
    """What was left out, and why: for one line of the log."""

    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, name: str) -> None:
        self.names[reason].append(name)

    def __str__(self) -> str:
        return "; ".join(f"{reason}: {len(names)} ({_some(names)})" for reason, names in sorted(self.names.items()))


@dataclass
class Contents:
    """The files of a folder or an archive by what they are."""

    pictures: list[File] = field(default_factory=list)
    tables: list[File] = field(default_factory=list)
    archives: list[File] = field(default_factory=list)
    metadata: list[File] = field(default_factory=list)
    others: list[File] = field(default_factory=list)

    @classmethod
    def of(cls, files: Iterable[File]) -> "Contents":
        contents, endings = cls(), image_extensions()
        for file in files:
            if PurePosixPath(file.name).name.lower() in METADATA:
                contents.metadata.append(file)
            elif file.suffix in endings or (not file.suffix and _is_image(file)):
                contents.pictures.append(file)
            elif file.suffix in TABLES:
                contents.tables.append(file)
            elif file.suffix in (*ARCHIVES, *PACKED):
                contents.archives.append(file)
            else:
                contents.others.append(file)
        return contents


def _is_image(file: File) -> bool:
    """Whether a file without a suffix begins like an image."""
    try:
        with Image.open(io.BytesIO(read_bytes(file.path)) if in_archive(file.path) else file.path) as image:
            return image.format is not None
    except Exception:  # PIL's plugins raise almost every type there is
        return False


@dataclass
class Folder:
    """What a folder was taken for: images in splits, or else tables."""

    account: Account
    splits: dict[str, Dataset] = field(default_factory=dict)
    tables: list[File] = field(default_factory=list)
    kind: str = ""


def read_folder(path: Path) -> Folder:
    """Decides what a folder is, and reads what describes its images. The path must be absolute.

    Raises DataError for a folder without images, and for files that describe images and cannot be read.
    """
    account = Account()
    return _read(Contents.of(list_files(path, account.add)), path, account)


def read_archives(path: Path, archives: list[File]) -> Folder:
    """The same for archives, as if each were a folder."""
    return _read(Contents(archives=archives), path, Account())


def _read(contents: Contents, path: Path, account: Account) -> Folder:
    kind, contents = _most(contents, path, account)
    if kind == "tables":
        return Folder(account, tables=contents.tables)
    splits, words = _dataset_splits(contents, path, account)
    return Folder(account, splits, kind=f"{kind} {words}" if words else kind)


def _most(contents: Contents, path: Path, account: Account) -> tuple[str, Contents]:
    """The kind of file that holds most images: pictures, archives of pictures, or tables. Accounts for the others."""
    if not contents.pictures:
        contents.tables += [file for file in contents.metadata if file.suffix in TABLES]
    rows = {file: _rows(file) for file in contents.tables}
    tables = [file for file in contents.tables if rows[file] is not None]
    archives, hidden = [file for file in contents.archives if file.suffix in ARCHIVES], Account()
    try:
        inside = _unpacked(archives, hidden)
    except DataError:
        if not (contents.pictures or tables):
            raise
        inside = Contents()
    found = {
        "images": len(contents.pictures), "archives of images": len(inside.pictures),
        "tables": sum(rows[file] for file in tables),
    }  # fmt: skip
    if not any(found.values()):
        if contents.tables:
            return "tables", contents  # whose columns will be named
        _nothing([contents, inside], path, account)
    kind = max(found, key=found.get)
    if kind != "images":
        _leave_out(account, "image beside what holds more", contents.pictures)
        _leave_out(account, "other file", contents.others)
    if kind != "tables":
        _leave_out(account, "table", [*contents.tables, *inside.tables])
    if kind != "archives of images":
        _leave_out(account, "archive", contents.archives)
        tables_left = [file for file in contents.tables if file not in tables] if kind == "tables" else []
        _leave_out(account, "table without images", tables_left)
        return kind, replace(contents, tables=tables)
    _leave_out(account, "archive", [*inside.archives, *(file for file in contents.archives if file not in archives)])
    _leave_out(account, "metadata beside archives", contents.metadata)
    account.names.update(hidden.names)
    return kind, inside


def _leave_out(account: Account, reason: str, files: Iterable[File]) -> None:
    for file in files:
        account.add(reason, file.name)


def _rows(table: File) -> int | None:
    """How many images a table has; None if it has no column of images."""
    try:
        if table.suffix == ".arrow":
            dataset = Dataset.from_file(table.path)
            return len(dataset) if image_columns(dataset.features) else None
        schema = pq.read_schema(table.path)
        return pq.read_metadata(table.path).num_rows if image_columns(Features.from_arrow_schema(schema)) else None
    except Exception:  # pyarrow's and the library's, on files that are no tables
        return None


def _nothing(contents: list[Contents], path: Path, account: Account) -> None:
    files = [file for each in contents for file in (*each.others, *each.metadata, *each.archives, *each.tables)]
    found = Counter(file.suffix or "no ending" for file in files)
    holds = "It holds " + ", ".join(f"{count} x {ending}" for ending, count in found.most_common(6)) if found else "It is empty"
    left_out = f" but for {account}" if account.names else ""
    packed = any(each.archives for each in contents)
    fix = " Unpack the archives (compressed ones cannot be read in any order) and name the folder." if packed else ""
    raise DataError(
        f"{str(path)!r} holds no images (.png, .jpg, .jpeg, .webp, .avif, .gif, .bmp, .tif, ...; sub-folders and zip and tar "
        f"archives are searched too) and no parquet files, and was not written by Dataset.save_to_disk. {holds}{left_out}.{fix}"
    )


def _unpacked(archives: list[File], account: Account) -> Contents:
    """The files in all of them. An archive's name is a folder if it says a split or class, and is none if it has a number."""
    files = []
    for archive in archives:
        name = PurePosixPath(archive.name).stem
        split, _ = split_word(name)
        meant = len(archives) > 1 and (split or not re.search(r"\d", name))
        files += list_archive(archive, (*archive.folders, *([split or name] if meant else [])), account.add)
    return Contents.of(files)


# Splits


def split_word(name: str) -> tuple[str | None, str]:
    """(split, the name's other words) of a name such as "train", "val2017", "DIV2K_train_HR", "testB"; else (None, "")."""
    if (domain := re.fullmatch(r"([a-z]+)([AB])", name)) and domain[1] in SPLIT_NAMES:
        return SPLIT_NAMES[domain[1]], domain[2]
    words = [word for word in re.split(r"[-_. \d]+", name.lower()) if word]
    found = [word for word in words if word in SPLIT_NAMES]
    if len(found) != 1:
        return None, ""
    return SPLIT_NAMES[found[0]], " ".join(word for word in words if word != found[0])


def splits_of(names: set[str]) -> dict[str, tuple[str, tuple[str, ...]]] | None:
    """(split, class folders that are left of the name) of each of these folders; None if they are no splits.

    A lone "train" among others may be a class. A "test" among others is no class: the others are for training.
    """
    words = {name: split_word(name) for name in names}
    marked = {name: (split, "" if rest in DOMAINS else rest) for name, (split, rest) in words.items() if split}
    if not marked:
        return None
    rest = Counter(rest for _, rest in marked.values()).most_common(1)[0][0]
    found = {name: (split, tuple(words[name][1]) if not rest else ()) for name, (split, its) in marked.items() if its == rest}
    others, splits = names - set(found), {split for split, _ in found.values()}
    if "train" in splits and len(splits) > 1:
        return {**found, **{name: (re.sub(r"\W+", "_", name), ()) for name in others}}
    if not rest and (not others or "train" not in splits):
        return {**found, **{name: ("train", (name,)) for name in others}}
    return None


def _pictures(contents: Contents, account: Account) -> list[Picture]:
    """The pictures with the splits and classes that their folders say."""
    files = contents.pictures if contents.metadata else _without_companions(contents.pictures, account)
    found = [(file, tuple(name for name in file.folders if name.lower() not in IMAGE_FOLDERS)) for file in files]
    while (first := {folders[:1] for _, folders in found}) and len(first) == 1 and (wrapper := first.pop()):
        if splits_of(set(wrapper)):
            break
        found = [(file, folders[1:]) for file, folders in found]
    for level in range(1 + max(len(folders) for _, folders in found)):
        splits = splits_of({folders[level] for _, folders in found if len(folders) > level})
        everywhere = all(len(folders) > level for _, folders in found)
        if level and splits and not (everywhere and all(split_word(name)[0] for name in splits)):
            continue  # below the first folders, splits must be everywhere
        if splits and (everywhere or {split for split, _ in splits.values()} != {"train"}):
            return _in_folders(found, level, splits, account)
    listed = _listed(contents, files, account)
    if listed is not None:
        return [Picture(file, listed[file], folders) for file, folders in found if file in listed]
    return [Picture(file, "train", folders) for file, folders in found]


def _in_folders(
    found: list[tuple[File, tuple[str, ...]]], level: int, splits: dict[str, tuple[str, tuple[str, ...]]], account: Account
) -> list[Picture]:
    pictures, for_training = [], any(split == split_word(name)[0] == "train" for name, (split, _) in splits.items())
    for file, folders in found:
        if len(folders) > level:
            split, kept = splits[folders[level]]
            pictures.append(Picture(file, split, (*folders[:level], *kept, *folders[level + 1 :])))
        elif for_training:
            account.add("image beside the folders of splits", file.name)
        else:
            pictures.append(Picture(file, "train", folders))
    return pictures


def _without_companions(files: list[File], account: Account) -> list[File]:
    """Without masks and the like, which lie beside a folder called "images" that has at least as many pictures."""
    counts = Counter(
        (file.folders[:depth], file.folders[depth].lower() if depth < len(file.folders) else "")
        for file in files
        for depth in range(len(file.folders) + 1)
    )
    held: Counter = Counter()
    for (parent, name), count in counts.items():
        held[parent] += count if name in IMAGE_FOLDERS else 0

    def companion(file: File) -> bool:
        for depth in range(len(file.folders) + 1):
            parent, name = file.folders[:depth], file.folders[depth].lower() if depth < len(file.folders) else ""
            beside = name not in IMAGE_FOLDERS and not split_word(name)[0]
            if beside and counts[parent, name] <= held[parent]:
                return True
        return False

    _leave_out(account, "image beside the folder that holds the images", filter(companion, files))
    return [file for file in files if not companion(file)]


def _listed(contents: Contents, files: list[File], account: Account) -> dict[File, str] | None:
    """The splits that train.txt, val.txt and test.txt list, as in Pascal VOC; None without such files for these images."""
    lists = defaultdict(list)
    for file in contents.others:
        name = PurePosixPath(file.name)
        if file.suffix == ".txt" and name.stem in SPLIT_NAMES:
            lists[str(name.parent)].append(file)
    ends = Counter(end for file in files for end in set(_ends(file.name)))
    by_name = {end: file for file in files for end in _ends(file.name) if ends[end] == 1}
    found: dict[File, str] = {}
    used = ""
    for folder, group in lists.items():
        here: dict[File | None, str] = {}
        for listing in group:
            split = SPLIT_NAMES[PurePosixPath(listing.name).stem]
            for line in filter(str.strip, (_text(listing, MAX_LIST_BYTES) or "").splitlines()):
                here[next((by_name[end] for end in reversed(_ends(line)) if end in by_name), None)] = split
        if None not in here and len(here) > len(found):
            found, used = here, folder
    if "train" not in found.values():
        return None
    contents.others = [file for file in contents.others if file not in lists[used]]
    _leave_out(account, "image in no list of a split", (file for file in files if file not in found))
    return found


def _ends(name: str) -> list[str]:
    """The last part of a path, and its last two if it has them, without the suffix of an image."""
    path = PurePosixPath(name.strip().split("\t")[0])
    path = path.with_suffix("") if path.suffix.lower() in image_extensions() else path
    return [path.name, "/".join(path.parts[-2:])]


# What describes the images


def _dataset_splits(contents: Contents, path: Path, account: Account) -> tuple[dict[str, Dataset], str]:
    """The splits as data sets of an image column and what describes it, and a few words on what that is."""
    pictures = _pictures(contents, account)
    labels, names = _labels(contents, pictures)
    if contents.metadata:
        rows, features = _metadata_rows(contents.metadata, pictures, path, account)
        words = "with " + ", ".join(sorted({PurePosixPath(file.name).name for file in contents.metadata}))
        used: set[str] = set()
    else:
        rows = [(picture.split, {"image": picture.file.path}) for picture in pictures]
        features = {"image": datasets.Image()}
        texts, used = _captions(contents, pictures)
        if texts:
            features["text"] = List(Value("string")) if any(isinstance(text, list) for text in texts) else Value("string")
            for (_, row), text in zip(rows, texts, strict=True):
                row["text"] = text if isinstance(features["text"], Value) or isinstance(text, list | None) else [text]
        words = "with captions beside them" if texts else ""
    _leave_out(account, "other file", (file for file in contents.others if file.name not in used))
    if len(names) > 1 and "label" not in features:
        features["label"] = ClassLabel(names=names)
        for _, row in rows:
            row["label"] = labels.get(row["image"]) if "image" in row else None
        words = f"in {len(names)} classes ({_some(names)}) {words}".strip()
    splits = {split: [row for its, row in rows if its == split] for split in dict.fromkeys(split for split, _ in rows)}
    order = [name for name in ("train", "validation", "test") if name in splits]
    order += sorted(set(splits) - set(order))
    return {split: _dataset(splits[split], Features(features)) for split in order}, words


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _labels(contents: Contents, pictures: list[Picture]) -> tuple[dict[str, int], list[str]]:
    """(class per path, names of classes). A class is the folder that holds the image if all are at one depth, else the first.

    The classes are those of the training images; one alone is none. Without folders, a.cls beside a.png names the class.
    """
    training = [picture for picture in pictures if picture.split == "train"] or pictures
    inner = -1 if len({len(picture.folders) for picture in training}) == 1 else 0
    found = {picture.file.path: picture.folders[inner] for picture in pictures if picture.folders}
    names = sorted({found[picture.file.path] for picture in training if picture.folders})
    if len(names) < 2:
        beside = {file.stem: file for file in contents.others if file.suffix == ".cls"}
        read = {p.file.path: _text(beside[p.file.stem], MAX_TEXT_BYTES) for p in pictures if p.file.stem in beside}
        found = {path: text.strip() for path, text in read.items() if text is not None}
        names = sorted(set(found.values()), key=lambda name: (len(name), name) if name.isdigit() else (0, name))
        contents.others = [file for file in contents.others if file.suffix != ".cls" or not found]
    numbers = {name: number for number, name in enumerate(names)}
    return {path: numbers[name] for path, name in found.items() if name in numbers} if len(names) > 1 else {}, names


def _captions(contents: Contents, pictures: list[Picture]) -> tuple[list[str | list[str] | None], set[str]]:
    """(captions of the pictures, names of the files they are from): of a.txt beside a.png, whose lines are several captions."""
    stems = {picture.file.stem for picture in pictures}
    files = {file.stem: file for file in contents.others if file.suffix in CAPTIONS and file.stem in stems}
    contents_of = {stem: _text(file, MAX_TEXT_BYTES) for stem, file in files.items()}
    lines = {stem: [*filter(None, map(str.strip, text.splitlines()))] for stem, text in contents_of.items() if text is not None}
    if not lines or any(one and all(BOXES.fullmatch(line) for line in one) for one in lines.values()):
        return [], set()
    texts = {stem: one if len(one) > 1 else "".join(one) for stem, one in lines.items()}
    return [texts.get(picture.file.stem) for picture in pictures], {files[stem].name for stem in lines}


def _text(file: File, limit: int) -> str | None:
    """The content of a small UTF-8 file; None of any other."""
    try:
        return read_bytes(file.path, limit).decode("utf-8-sig")
    except (UnicodeDecodeError, DataError):
        return None
    except OSError as error:
        raise DataError(f"The file {file.path!r} cannot be read: {describe_exception(error)}.") from error


def _metadata_rows(
    files: list[File], pictures: list[Picture], path: Path, account: Account
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """(split, row) per row of the metadata files, and the types of the columns; images that no row names are left out."""
    tables = []
    for file in files:
        table = _metadata_table(file)
        columns = [name for name in table.column_names if name == "file_name" or name.endswith("_file_name")]
        if not columns:
            raise DataError(
                f"{file.path!r} has no column file_name, which must name the image of each row. It has {table.column_names}."
            )
        tables.append((file, table, columns))
    try:
        whole = pa.concat_tables([table for _, table, _ in tables], promote_options="default")
    except pa.ArrowInvalid as error:
        raise DataError(f"The metadata files in {str(path)!r} do not have the same columns: {error}") from error
    by_name = {picture.file.name: picture for picture in pictures}
    split_in = {PurePosixPath(picture.file.name).parent: picture.split for picture in pictures}
    image_names = {name: name[: -len("file_name")].rstrip("_") or "image" for _, _, columns in tables for name in columns}
    features = {image_names.get(name, name): feature for name, feature in Features.from_arrow_schema(whole.schema).items()}
    features |= dict.fromkeys(image_names.values(), datasets.Image())
    rows, named, start, divided = [], set(), 0, len({picture.split for picture in pictures}) > 1
    for file, table, columns in tables:
        folder = PurePosixPath(file.name).parent
        for row in whole.slice(start, len(table)).to_pylist():
            splits = []
            for column in columns:
                name, row[column] = _resolved(row[column], folder, by_name, path)
                named.add(name)
                splits += [by_name[name].split] if name in by_name else []
            given = None if divided else SPLIT_NAMES.get(str(row.get("split")).lower())
            split = given or [*splits, split_in.get(folder, "train")][0]
            rows.append((split, {image_names.get(key, key): value for key, value in row.items()}))
        start += len(table)
    _leave_out(account, "image that the metadata does not name", (p.file for p in pictures if p.file.name not in named))
    return rows, features


def _resolved(value: Any, folder: PurePosixPath, by_name: dict[str, Picture], root: Path) -> tuple[str | None, str | None]:
    """(name within the data, path to read it by) of what a metadata row names, relative to its file's folder."""
    if value is None:
        return None, None
    parts: list[str] = []
    for part in (folder / str(value)).parts:
        parts.pop() if part == ".." and parts else parts.append(part)
    name = "/".join(parts)
    if name in by_name:
        return name, by_name[name].file.path
    return name, str(value) if "://" in str(value) or Path(str(value)).is_absolute() else str(root / name)


def _metadata_table(file: File) -> pa.Table:
    """The rows of a metadata file. Words stay as they are: a caption of "null" or "NA" is a caption."""
    try:
        if file.suffix == ".parquet":
            return pq.read_table(io.BytesIO(read_bytes(file.path)))
        content = read_bytes(file.path).decode("utf-8-sig")
        if file.suffix == ".csv":
            delimiter = _delimiter(content)
            words = [
                name
                for name in content.partition("\n")[0].split(delimiter)
                if name.strip('" \r').endswith(("file_name", "text"))
            ]
            types = {name.strip('" \r'): pa.string() for name in words}  # also where they look like numbers
            parsing = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
            converting = pa.csv.ConvertOptions(column_types=types)
            return pa.csv.read_csv(io.BytesIO(content.encode()), parse_options=parsing, convert_options=converting)
        rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    except (OSError, ValueError, AttributeError, TypeError, DataError) as error:  # pyarrow's are ValueErrors
        raise DataError(f"The metadata file {file.path!r} cannot be read: {describe_exception(error)}") from error


def _delimiter(content: str) -> str:
    head = content.partition("\n")[0]
    try:
        return csv.Sniffer().sniff(head, ",;\t").delimiter
    except csv.Error:
        return ","


def _dataset(rows: list[dict[str, Any]], features: Features) -> Dataset:
    """In memory: images as paths, and what describes them."""
    columns = {}
    for name, feature in features.items():
        values = [row.get(name) for row in rows]
        if isinstance(feature, datasets.Image):
            values = [None if value is None else {"bytes": None, "path": value} for value in values]
        columns[name] = pa.array(values, features.arrow_schema.field(name).type)
    return Dataset.from_dict(columns, features=features)
