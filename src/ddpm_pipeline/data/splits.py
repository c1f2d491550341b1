"""Which split each image of a folder is in, and which of its folders may be its class: by the names of folders and files.

Of the data modules, imports only `files` and `images`. docs/data.md has the rules.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile, zip_longest
from pathlib import PurePosixPath
from typing import Any

from .arrays import ARRAY_FILES
from .files import Account, File, text_of
from .images import image_extensions

_WORDS = {
    "train": "train training trn trainval",
    "validation": "validation validate valid val dev minival",
    "test": "test testing tst eval evaluation holdout heldout",
}  # words in names -> the split; those of the `datasets` library, and more
SPLIT_NAMES = {
    word + end: split for split, words in _WORDS.items() for word in words.split() for end in ("", "s", "set", "data", "list")
}
GENERIC = {"set", "sets", "data", "dataset", "split", "list", "files", "images", "image", "imgs", "img"}  # beside these words
SHORT = {"tr": "train", "va": "validation", "vl": "validation", "te": "test", "ts": "test"}  # if no folder is called otherwise
MEDICAL = re.compile(r"(images|labels)(T[rs])")  # imagesTr, imagesTs
SPLIT_COLUMNS = ("split", "subset", "partition", "phase", "set")
# of the images, where masks and annotations lie beside
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
DOMAINS = ("A", "B")  # of unpaired data: trainA, trainB, testA, testB
LISTS = (".txt", ".csv")
LINES_SAY = re.compile("(split|partition)[^/]*$", re.IGNORECASE)  # names of lists whose lines say the split
PARTITIONS = {"0": "train", "1": "validation", "2": "test"}  # as in CelebA
MAX_LIST_BYTES = 2**28  # of a file that lists the images of a split

Folders = tuple[str, ...]  # that a picture lies in
Splits = dict[str, tuple[str, Folders]]  # name -> (split, the class that is left of the name, if any)


@dataclass(frozen=True)
class Picture:
    file: File
    split: str
    folders: Folders  # that may be its class


def split_word(name: str) -> tuple[str | None, str]:
    """(split, the name's other words) of a name such as "train", "val2017", "DIV2K_train_HR", "testB"; else (None, "").

    "test-dev" is held out; what "train_test" is cannot be told.
    """
    name = re.sub(r"(?i)(h[eo]ld)[-_ ]out", r"\1out", name)
    if medical := MEDICAL.fullmatch(name):
        name = f"{medical[1]} {SHORT[medical[2].lower()]}"
    words = [word for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name) if word]
    found = {SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}
    if not found or (len(found) > 1 and "train" in found):
        return None, ""
    rest = " ".join(word for word in words if word.lower() not in SPLIT_NAMES and word.lower() not in GENERIC)
    return min(found), rest if rest in DOMAINS else rest.lower()  # "test" before "validation"


def splits_of(folders: Mapping[str, set[str]]) -> Splits | None:
    """(split, class folders that are left of the name) of each of these folders, given what is in them; None if they are none.

    A lone "train" among others may be a class, unless they hold the same folders. A "test" among others is no class: the
    others are for training.
    """
    short = {"tr"} < {name.lower() for name in folders} <= SHORT.keys()
    words = {name: (SHORT[name.lower()], "") if short else split_word(name) for name in sorted(folders)}
    marked = {name: word for name, word in words.items() if word[0]}
    if not marked:
        return None
    kinds = {name: "" if rest in DOMAINS else rest for name, (_, rest) in marked.items()}
    counts = Counter(kinds.values())
    usual = max(counts, key=lambda kind: (counts[kind], not kind))
    chosen = {name: word for name, word in marked.items() if kinds[name] == usual}
    if len(marked) == len(folders) and not _divide(chosen.values()) and _divide(marked.values()):
        chosen, usual = marked, ""  # train_cats, test_dogs
    found = {name: (split, (rest,) if rest != usual else ()) for name, (split, rest) in chosen.items()}
    others, held = folders.keys() - found.keys(), {split for split, _ in found.values()}
    inside = [set.union(*(folders[name] for name in names)) if names else set() for names in (found, others)]
    if _divide(found.values()) or ("train" in held and inside[0] & inside[1]):
        return {**found, **{name: (re.sub(r"\W+", "_", name), ()) for name in others}}
    if not usual and (not others or "train" not in held):
        return {**found, **{name: ("train", (name,)) for name in others}}
    return None


def _divide(splits: Iterable[tuple[str | None, Any]]) -> bool:
    """Whether some are for training and some are held out."""
    return {"train"} < {split for split, _ in splits}


def split_in_column(values: Iterable[Any]) -> Callable[[Any], str | None] | None:
    """What the values of a column called split say: the split, by a name of its own if it is another; None if they say none."""
    if not any(split_word(str(value))[0] for value in values):
        return None
    return cache(lambda value: None if value in (None, "") else split_word(str(value))[0] or re.sub(r"\W+", "_", str(value)))


def pictures_in_splits(files: list[File], others: list[File], described: bool, account: Account) -> list[Picture]:
    """The pictures with the splits and classes that their folders say, or lists among the other files (which are removed).

    Masks and the like are left out, unless a metadata file has `described` which are the images.
    """
    files = files if described else _without_companions(files, account)
    folders = {names: tuple(n for n in names if n.lower() not in IMAGE_FOLDERS) for names in {file.folders for file in files}}
    while (first := {names[:1] for names in folders.values()}) and len(first) == 1 and (wrapper := first.pop()):
        if splits_of({wrapper[0]: set()}):
            break
        folders = {path: names[1:] for path, names in folders.items()}
    for level in range(1 + max(map(len, folders.values()))):
        below: dict[str, set[str]] = defaultdict(set)
        for names in folders.values():
            if len(names) > level:
                below[names[level]].update(names[level + 1 : level + 2])
        splits = splits_of(below)
        if splits and ({split for split, _ in splits.values()} != {"train"} or all(len(n) > level for n in folders.values())):
            return _in_folders(files, folders, level, splits, account)
    listed = _listed(files, others, account)
    if listed is not None:
        return [Picture(file, listed[file], folders[file.folders]) for file in files if file in listed]
    named = [*takewhile(bool, (split_word(posixpath.basename(file.stem))[0] for file in files))]  # train_1.png, test_1.png
    divided = len(named) == len(files) and {"train"} < set(named)
    return [Picture(file, split if divided else "train", folders[file.folders]) for file, split in zip_longest(files, named)]


def _in_folders(
    files: list[File], folders: Mapping[Folders, Folders], level: int, splits: Splits, account: Account
) -> list[Picture]:
    pictures, for_training = [], any(split == "train" and kept != (name,) for name, (split, kept) in splits.items())
    for file in files:
        names = folders[file.folders]
        if len(names) > level:
            split, kept = splits[names[level]]
            pictures.append(Picture(file, split, (*names[:level], *kept, *names[level + 1 :])))
        elif for_training:
            account.add("image beside the folders of splits", file.name)
        else:
            pictures.append(Picture(file, "train", names))
    return pictures


def _without_companions(files: list[File], account: Account) -> list[File]:
    """Without masks and the like, which lie beside a folder called "images" that has at least as many pictures."""

    def steps(folders: Folders) -> list[tuple[Folders, str]]:
        return [(folders[:depth], name) for depth, name in enumerate((*folders, ""))]

    counts, held = Counter(), Counter()
    for folders, count in Counter(file.folders for file in files).items():
        for parent, name in steps(folders):
            counts[parent, name] += count
            held[parent] += count if name.lower() in IMAGE_FOLDERS else 0

    @cache
    def companion(folders: Folders) -> bool:
        beside = (step for step in steps(folders) if step[1].lower() not in IMAGE_FOLDERS and not split_word(step[1])[0])
        return any(counts[parent, name] <= held[parent] for parent, name in beside)

    account.leave_out("image beside the folder that holds the images", (file for file in files if companion(file.folders)))
    return [file for file in files if not companion(file.folders)]


def _listed(files: list[File], others: list[File], account: Account) -> dict[File, str] | None:
    """The splits that train.txt, val.txt and test.txt list, or the lines of a file called split or partition; else None.

    Without a list for training, images in no list are for training.
    """
    lists, stems = defaultdict(list), {file.stem for file in files}
    for file in others:
        split, rest = split_word(posixpath.basename(file.stem))
        meant = (split and not rest) or LINES_SAY.search(file.stem)
        if file.suffix in LISTS and meant and file.stem not in stems:
            lists[posixpath.dirname(file.name)].append((None if rest else split, file))
    if not lists:
        return None
    ends = {file: _ends(file.name) for file in files}
    counts = Counter(end for both in ends.values() for end in set(both))
    by_name = {end: file for file, both in ends.items() for end in both if counts[end] == 1}
    best: tuple[dict[File, str], list[File]] = {}, []
    for group in lists.values():
        here, missed = {}, 0
        for of_all, listing in group:
            codes = SPLIT_NAMES | (PARTITIONS if "partition" in listing.name.lower() else {})
            for line in filter(str.strip, (text_of(listing, MAX_LIST_BYTES) or "").splitlines()):
                named = (end for part in (line, *re.split(r"[\s,;]+", line)) for end in reversed(_ends(part)))
                file = next((by_name[end] for end in named if end in by_name), None)
                split = of_all or codes.get(re.split(r"[\s,;]+", line.strip())[-1].lower())
                here.update({file: split} if file and split else {})
                missed += not (file and split)
        if len(here) > len(best[0]) and len(here) >= min(missed, len(files) / 2):
            best = here, [listing for _, listing in group]
    if not best[0]:
        return None
    others[:] = [file for file in others if file not in best[1]]
    if "train" not in best[0].values():
        return {file: best[0].get(file, "train") for file in files}
    account.leave_out("image in no list of a split", (file for file in files if file not in best[0]))
    return best[0]


def may_divide(file: File) -> bool:
    """Whether a file's name says that it is about images that are held out."""
    held_out = split_word(posixpath.basename(file.stem))[0] in ("validation", "test") or LINES_SAY.search(file.stem)
    return bool(held_out) and file.suffix in (*LISTS, ".tsv", ".json", ".jsonl", ".mat")


def _ends(name: str) -> list[str]:
    """The last part of a path, and its last two if it has them, without the suffix of an image."""
    path = PurePosixPath(name.strip().strip('"').replace("\\", "/"))
    path = path.with_suffix("") if path.suffix.lower() in {*image_extensions(), *ARRAY_FILES} else path
    return [path.name, "/".join(path.parts[-2:])]
