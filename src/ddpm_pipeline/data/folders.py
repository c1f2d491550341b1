"""What a folder of images is: the one reading of class folders, splits, metadata, captions and the layouts of other tools.

docs/data.md has its rules and draws the layouts. Which file is in which split and class is decided on names; then what
describes the images is read. An account is kept of all that is left out. Archives are read as if they were folders.
"""

import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

from ..support.errors import DataError
from ..support.exceptions import describe_exception
from .arrays import ARRAY_FILES
from .columns import BESIDE, image_columns
from .files import ARCHIVES, PACKED, Account, File, in_archive, list_archive, list_files, read_bytes, some, text_of
from .images import image_extensions
from .pairs import SecondFolder, find_second_folder
from .splits import SPLIT_COLUMNS, Picture, may_divide, pictures_in_splits, split_in_column, split_word

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTIONS = (".txt", ".caption")
TABLES = (".parquet", ".arrow")
CODE = r"^\s*-?0\d"  # of a number with a leading zero
MAX_TEXT_BYTES = 2**20  # of a file of captions beside an image
BOXES = re.compile(r"\d+(\s+[-+.\deE]+){4,}\s*")  # a line of YOLO's annotations: a class, and coordinates


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
        contents, endings, arrays = cls(), image_extensions(), []
        for file in files:
            if posixpath.basename(file.name).lower() in METADATA:
                contents.metadata.append(file)
            elif file.suffix in endings or (not file.suffix and _is_image(file)):
                contents.pictures.append(file)
            elif file.suffix in ARRAY_FILES:
                arrays.append(file)
            elif file.suffix in TABLES:
                contents.tables.append(file)
            elif file.suffix in (*ARCHIVES, *PACKED):
                contents.archives.append(file)
            else:
                contents.others.append(file)
        (contents.others if contents.pictures else contents.pictures).extend(arrays)  # features are stored so beside pictures
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
    second: SecondFolder | None = None  # of condition images, which are a column of the data sets


def read_folder(path: Path, beside: Sequence[str] = ()) -> Folder:
    """Decides what a folder is, and reads what describes its images. The path must be absolute.

    The first of `beside` that names a folder holds the condition images. Raises DataError for a folder without images, and for
    files that describe images and cannot be read.
    """
    account = Account()
    return _read(Contents.of(list_files(path, account)), path, account, beside)


def read_archives(path: Path, archives: list[File], beside: Sequence[str] = ()) -> Folder:
    """The same for archives, as if each were a folder."""
    return _read(Contents(archives=archives), path, Account(), beside)


def _read(contents: Contents, path: Path, account: Account, beside: Sequence[str]) -> Folder:
    kind, contents = _most(contents, path, account)
    if kind == "tables":
        return Folder(account, tables=contents.tables)
    contents, second = _without_second_folder(contents, beside)
    images = contents.pictures.copy()
    splits, words = _dataset_splits(contents, path, account)
    columns = set(next(iter(splits.values())).column_names)
    kind = f"{kind} {words}".strip()
    if second is None or "image" not in columns or {second.name, second.name.removesuffix("_file_name")} & columns:
        return Folder(account, splits, kind=kind)
    paths = {split: [row and row["path"] for row in rows.data["image"].to_pylist()] for split, rows in splits.items()}
    read = set().union(*paths.values())
    partners = second.partners([file for file in images if file.path in read], account)
    for split, rows in splits.items():
        found = [{"bytes": None, "path": partners[path]} if path in partners else None for path in paths[split]]
        splits[split] = rows.add_column(BESIDE, found, feature=datasets.Image())
    return Folder(account, splits, kind=f"{kind} with condition images in {second.name!r}", second=second)


def _without_second_folder(contents: Contents, beside: Sequence[str]) -> tuple[Contents, SecondFolder | None]:
    """The contents without the folder of condition images, if there is one; pictures or arrays, as the images may be."""
    arrays = {file for file in contents.others if file.suffix in ARRAY_FILES}
    left, second = find_second_folder([*contents.pictures, *sorted(arrays, key=lambda file: file.name)], beside)
    if second is None:
        return contents, None
    if not left:
        raise DataError(f"All images lie in {second.name!r}: none is left that they could be the condition of.")
    pictures = [file for file in left if file not in arrays] or left
    unread = arrays.difference(left) | set(pictures)
    return replace(contents, pictures=pictures, others=[file for file in contents.others if file not in unread]), second


def _most(contents: Contents, path: Path, account: Account) -> tuple[str, Contents]:
    """The kind of file that holds most images: pictures, archives of pictures, or tables. Accounts for the others."""
    if not contents.pictures:
        contents.tables += [file for file in contents.metadata if file.suffix in TABLES]
    rows = {file: _rows(file) for file in contents.tables}
    tables = [file for file in contents.tables if rows[file] is not None]
    archives, within = [file for file in contents.archives if file.suffix in ARCHIVES], Account()
    try:
        inside = _unpacked(archives, within)
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
        account.leave_out("image beside what holds more", contents.pictures)
        account.leave_out("other file", contents.others)
    if kind != "tables":
        account.leave_out("table", [*contents.tables, *inside.tables])
    if kind != "archives of images":
        account.leave_out("archive", contents.archives)
        tables_left = [file for file in contents.tables if file not in tables] if kind == "tables" else []
        account.leave_out("table without images", tables_left)
        return kind, replace(contents, tables=tables)
    account.leave_out("archive", [*inside.archives, *(file for file in contents.archives if file not in archives)])
    account.leave_out("metadata beside archives", contents.metadata)
    for reason, names in within.names.items():
        account.names[reason] += names
    return kind, inside


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
        f"{str(path)!r} holds no images (.png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .npy, ...; sub-folders and zip and tar "
        f"archives are searched too) and no parquet files, and was not written by Dataset.save_to_disk. {holds}{left_out}.{fix}"
    )


def _unpacked(archives: list[File], account: Account) -> Contents:
    """The files in all of them. An archive's name is a folder if it says a split or class, and is none if it has a number."""
    files = []
    for archive in archives:
        name = PurePosixPath(archive.name).stem
        split, _ = split_word(name)
        meant = len(archives) > 1 and (split or not re.search(r"\d", name))
        files += list_archive(archive, (*archive.folders, *([split or name] if meant else [])), account)
    return Contents.of(files)


# What describes the images


def _dataset_splits(contents: Contents, path: Path, account: Account) -> tuple[dict[str, Dataset], str]:
    """The splits as data sets of an image column and what describes it, and a few words on what that is."""
    pictures = pictures_in_splits(contents.pictures, contents.others, bool(contents.metadata), account)
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
    unread = [file for file in contents.others if file.name not in used]
    dividing = {file for file in unread if may_divide(file)} if {split for split, _ in rows} == {"train"} else set()
    account.leave_out("file that may say what is held out, in no known way", sorted(dividing, key=lambda file: file.name))
    account.leave_out("other file", (file for file in unread if file not in dividing))
    if len(names) > 1 and "label" not in features:
        features["label"] = ClassLabel(names=names)
        for _, row in rows:
            row["label"] = labels.get(row["image"]) if "image" in row else None
        words = f"in {len(names)} classes ({some(names)}) {words}".strip()
    splits = {split: [row for its, row in rows if its == split] for split in dict.fromkeys(split for split, _ in rows)}
    order = [name for name in ("train", "validation", "test") if name in splits]
    order += sorted(set(splits) - set(order))
    return {split: _dataset(splits[split], Features(features)) for split in order}, words


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
        read = {p.file.path: text_of(beside[p.file.stem], MAX_TEXT_BYTES) for p in pictures if p.file.stem in beside}
        found = {path: text.strip() for path, text in read.items() if text is not None}
        names = sorted(set(found.values()), key=lambda name: (len(name), name) if name.isdigit() else (0, name))
        contents.others = [file for file in contents.others if file.suffix != ".cls" or not found]
    numbers = {name: number for number, name in enumerate(names)}
    return {path: numbers[name] for path, name in found.items() if name in numbers} if len(names) > 1 else {}, names


def _captions(contents: Contents, pictures: list[Picture]) -> tuple[list[str | list[str] | None], set[str]]:
    """(captions of the pictures, names of the files they are from): of a.txt beside a.png, whose lines are several captions."""
    stems = {picture.file.stem for picture in pictures}
    files = {file.stem: file for file in contents.others if file.suffix in CAPTIONS and file.stem in stems}
    contents_of = {stem: text_of(file, MAX_TEXT_BYTES) for stem, file in files.items()}
    lines = {stem: [*filter(None, map(str.strip, text.splitlines()))] for stem, text in contents_of.items() if text is not None}
    if not lines or any(one and all(BOXES.fullmatch(line) for line in one) for one in lines.values()):
        return [], set()
    texts = {stem: one if len(one) > 1 else "".join(one) for stem, one in lines.items()}
    return [texts.get(picture.file.stem) for picture in pictures], {files[stem].name for stem in lines}


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
    rows, named, start = [], set(), 0
    strings = [field.name for field in whole.schema if pa.types.is_string(field.type)]
    divider = next((name for name in strings if name.lower() in SPLIT_COLUMNS), None)
    divided = divider is None or len({picture.split for picture in pictures}) > 1
    meant = None if divided else split_in_column(whole.column(divider).unique().to_pylist())
    for file, table, columns in tables:
        folder = PurePosixPath(file.name).parent
        for row in whole.slice(start, len(table)).to_pylist():
            splits = []
            for column in columns:
                name, row[column] = _resolved(row[column], folder, by_name, path)
                named.add(name)
                splits += [by_name[name].split] if name in by_name else []
            split = (meant and meant(row[divider])) or [*splits, split_in.get(folder, "train")][0]
            rows.append((split, {image_names.get(key, key): value for key, value in row.items()}))
        start += len(table)
    if not rows:
        raise DataError(f"The metadata files in {str(path)!r} have no rows. Name the images in them, or remove them.")
    account.leave_out("image that the metadata does not name", (p.file for p in pictures if p.file.name not in named))
    return rows, features


def _resolved(value: Any, folder: PurePosixPath, by_name: dict[str, Picture], root: Path) -> tuple[str | None, str | None]:
    """(name within the data, path to read it by) of what a metadata row names, relative to its file's folder."""
    if value is None:
        return None, None
    parts: list[str] = []
    for part in (folder / str(value).replace("\\", "/")).parts:
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
            return _csv_table(content)
        return _json_table(content)
    except (OSError, ValueError, TypeError, DataError) as error:  # pyarrow's are one of these
        fix = " Save it as UTF-8, with quotes around texts that hold commas." if file.suffix == ".csv" else ""
        raise DataError(f"The metadata file {file.path!r} cannot be read: {describe_exception(error)}.{fix}") from error


def _json_table(content: str) -> pa.Table:
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f'line {number} must be an object such as {{"file_name": "1.png"}}')
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException as error:
            raise ValueError(f"the column {name!r} must have values of one type: {error}") from error
    return pa.table(columns)


def _csv_table(content: str) -> pa.Table:
    """File names and texts as they stand, also where they look like numbers, and so columns with numbers such as 01, which are
    codes; a label that is empty is missing.
    """
    head = content.partition("\n")[0]
    try:
        delimiter = csv.Sniffer().sniff(head, ",;\t").delimiter
    except csv.Error:
        delimiter = ","
    names = [name.strip('" \r') for name in head.split(delimiter)]
    words = [name for name in names if name.endswith(("file_name", "text"))]
    parsing = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)

    def read(words: list[str]) -> pa.Table:
        converting = pa.csv.ConvertOptions(column_types=dict.fromkeys(words, pa.string()))
        return pa.csv.read_csv(io.BytesIO(content.encode()), parse_options=parsing, convert_options=converting)

    table = read(words)
    if integers := [field.name for field in table.schema if pa.types.is_integer(field.type)]:
        written = read([*words, *integers])
        codes = [name for name in integers if pc.any(pc.match_substring_regex(written[name], CODE)).as_py()]
        table = read([*words, *codes]) if codes else table
    if "label" in names and pa.types.is_string(table["label"].type):
        labels = pc.if_else(pc.equal(table["label"], ""), None, table["label"])
        table = table.set_column(names.index("label"), "label", labels)
    return table


def _dataset(rows: list[dict[str, Any]], features: Features) -> Dataset:
    """In memory: images as paths, and what describes them."""
    columns = {}
    for name, feature in features.items():
        values = [row.get(name) for row in rows]
        if isinstance(feature, datasets.Image):
            values = [None if value is None else {"bytes": None, "path": value} for value in values]
        columns[name] = pa.array(values, features.arrow_schema.field(name).type)
    return Dataset.from_dict(columns, features=features)
