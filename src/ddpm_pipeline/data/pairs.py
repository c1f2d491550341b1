"""Which image of a folder has which condition image in a second folder: by the names of files and folders.

Of the data modules, imports `files`, `images` and `splits` only. docs/data.md draws the layouts.
"""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..support.errors import DataError
from .files import Account, File, list_files, some
from .images import image_extensions
from .splits import split_word

Place = tuple[str, ...]  # the folders that a file lies in, without the second folder, and its name without the ending


@dataclass(frozen=True)
class SecondFolder:
    """The condition images of a folder of images."""

    name: str  # as --condition_column gives it
    root: str | None  # the folder, if it was named by its path
    files: dict[Place, File]

    def partners(self, images: Iterable[File], account: Account) -> dict[str, str]:
        """The path of the condition image, by the path of the image. Accounts for files that belong to no image."""
        owners = defaultdict(list)
        for image in images:
            place = next((place for place in _places(image) if place in self.files), None)
            if place is not None:
                owners[place].append(image)
        for place, several in owners.items():
            if len(several) > 1:
                names = some([image.name for image in several])
                raise DataError(
                    f"{self.files[place].name!r} in {self.name!r} would be the condition of {len(several)} images ({names}). "
                    "Name the folder of the images with --dataset, or the pairs in metadata.jsonl."
                )
        account.leave_out("condition image without an image", (self.files[place] for place in self.files.keys() - owners))
        return {images[0].path: self.files[place].path for place, images in owners.items()}


def find_second_folder(pictures: list[File], names: Sequence[str]) -> tuple[list[File], SecondFolder | None]:
    """(the other pictures, the first of these that is a folder): the name of folders among the pictures', or else a path."""
    for name in names:
        found = [(place, file) for file in pictures for place in [_place_within(file, name)] if place is not None]
        path = Path(os.path.abspath(os.path.expanduser(name)))
        outside = not found and path.is_dir()
        if outside:
            files = (file for file in list_files(path, Account()) if file.suffix in image_extensions())
            found = [((*file.folders, _stem(file)), file) for file in files]
        if found or outside:
            taken = {file.path for _, file in found}
            second = SecondFolder(name, str(path) if outside else None, dict(found))
            if len(second.files) < len(found):
                twice = next(file.name for place, file in found if second.files[place] is not file)
                same = second.files[next(place for place, file in found if file.name == twice)].name
                raise DataError(f"{twice!r} and {same!r} in {name!r} would be the condition of one image. Keep one of them.")
            return [file for file in pictures if file.path not in taken], second
    return pictures, None


def missing_partners(images: Sequence[str], of: int, folder: str, account: Account) -> DataError:
    """The error of images without a condition image, out of so many."""
    surplus = account.names.get("condition image without an image", [])
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
