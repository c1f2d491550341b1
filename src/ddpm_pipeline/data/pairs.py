"""Which image of a folder has which condition image in a second folder: by the names of files and folders.

Of the data modules, imports `arrays`, `files`, `images` and `splits` only. docs/data.md draws the layouts.
"""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..support.errors import DataError
from .arrays import ARRAY_FILES
from .files import Account, File, list_files, some
from .images import image_extensions
from .splits import split_word

UNPAIRED = "condition image without an image"  # the reason in the account
Place = tuple[str, ...]  # the folders that a file lies in, without the second folder, and its name without the ending


@dataclass(frozen=True)
class SecondFolder:
    """The condition images of a folder of images."""

    name: str  # as --condition_column gives it
    root: str | None  # the folder, if it was named by its path
    files: dict[Place, list[File]]

    def partners(self, images: Iterable[File], account: Account) -> dict[str, str]:
        """The path of the condition image, by the path of the image. Accounts for files that belong to no image."""
        owners = defaultdict(list)
        for image in images:
            owners[next((place for place in _places(image) if place in self.files), None)].append(image)
        owners.pop(None, None)
        for place, several in owners.items():
            if len(several) > 1 or len(self.files[place]) > 1:
                images, files = ([file.name for file in found] for found in (several, self.files[place]))
                raise DataError(
                    f"The names do not tell which of {some(images)} and, in {self.name!r}, {some(files)} are a pair. Name the "
                    "folder of the images with --dataset, or the pairs in metadata.jsonl."
                )
        for place in self.files.keys() - owners:
            account.leave_out(UNPAIRED, self.files[place])
        return {several[0].path: self.files[place][0].path for place, several in owners.items()}


def find_second_folder(pictures: list[File], names: Sequence[str]) -> tuple[list[File], SecondFolder | None]:
    """(the other pictures, the first of these that is a folder): the name of folders among the pictures', or else a path."""
    for name in names:
        path, root = Path(os.path.abspath(os.path.expanduser(name))), None
        files = {file: place for file in pictures if (place := _place_within(file, name))}
        if not files and path.is_dir():
            root, endings = str(path), {*image_extensions(), *ARRAY_FILES}
            files = {file: (*file.folders, _stem(file)) for file in list_files(path, Account()) if file.suffix in endings}
        if files or root:
            by_place, paths = defaultdict(list), {file.path for file in files}
            for file, place in files.items():
                by_place[place].append(file)
            return [file for file in pictures if file.path not in paths], SecondFolder(name, root, dict(by_place))
    return pictures, None


def missing_partners(images: Sequence[str], of: int, folder: str, account: Account) -> DataError:
    """The error of images without a condition image, out of so many."""
    surplus = account.names.get(UNPAIRED, [])
    beside = f", and {len(surplus):,} files there belong to no image ({some(surplus)})" if surplus else ""
    return DataError(
        f"{len(images):,} of {of:,} images have no condition image in {folder!r} ({some(images)}){beside}. A condition image "
        "has the name of its image, but for the ending, in the same sub-folders. Rename, add or remove files, or name pairs in "
        "metadata.jsonl."
    )


def _stem(file: File) -> str:
    return posixpath.basename(file.stem)


def _place_within(file: File, name: str) -> Place | None:
    """Where a file in a folder of that name, or of one such as trainA or train_masks, would lie without it; None of others."""
    for depth, folder in enumerate(file.folders):
        split, rest = split_word(folder)
        if folder == name or (split and rest.lower() == name.lower()):
            kept = () if folder == name else (split,)
            return (*file.folders[:depth], *kept, *file.folders[depth + 1 :], _stem(file))
    return None


def _places(image: File) -> Iterator[Place]:
    """Where the condition image of an image may lie: in the same folders, or without the one that holds the images."""
    folders = image.folders
    yield (*folders, _stem(image))
    for depth, folder in enumerate(folders):
        for kept in [()] if split_word(folder)[0] is None else [(split_word(folder)[0],), ()]:
            yield (*folders[:depth], *kept, *folders[depth + 1 :], _stem(image))
