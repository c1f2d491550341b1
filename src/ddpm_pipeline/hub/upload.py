"""Pipeline folders on their way to the Hub: exported whole, with a card, and pushed in one commit.

Imports huggingface_hub alone, so that the command starts at once. Called by training and by the pipelines' `push_to_hub`.
"""

import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from ..support.atomic import remove_folder, sync, sync_folder, temporary_beside, write_text
from ..support.errors import PushError
from ..support.exceptions import describe_exception
from .card import CARD, card_of_folder, check_private, read_card, refresh_card
from .files import INDEX, components_of, files_to_push, read_object, stale_files

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

ATTEMPTS = 5


@dataclass(frozen=True)
class PushOptions:
    """How a folder is pushed."""

    private: bool | None = None  # makes the repository private if the push creates it
    revision: str | None = None  # the branch, which must exist; main by default
    commit_message: str | None = None  # "Upload FOLDER" by default
    create_pr: bool = False  # opens a pull request instead of committing
    include: Sequence[str] = ()  # patterns of files besides the pipeline, its card, pictures and evaluation.json
    attempts: int = ATTEMPTS
    first_wait: float = 2.0  # seconds between the first two attempts, doubled from each to the next


def export(pipe: "DiffusionPipeline", folder: str | Path, card: ModelCard | None = None) -> None:
    """Save `pipe` into `folder`, in place of an earlier export, which stays as it is until the new one is complete.

    `model_index.json`, which makes a folder a pipeline, is replaced last. The card becomes README.md; in a README that
    exists already only our sections are refreshed. Other files of the folder stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder / "export")
    try:
        pipe.save_pretrained(temporary)
        if card is not None:
            write_text(temporary / CARD, refresh_card(read_card(folder), card))
        sync_folder(temporary)
        for entry in sorted(temporary.iterdir(), key=lambda path: path.name == INDEX):
            target = folder / entry.name
            if target.is_dir():
                remove_folder(target)
            os.replace(entry, target)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def push(folder: str | Path, repo_id: str, options: PushOptions | None = None, *, api: HfApi | None = None) -> str:
    """Push a pipeline folder in one commit, and return the commit's address.

    The repository is created if it does not exist. In a card that is there already only our sections are refreshed, and the
    `stale_files` of an earlier model are deleted. If somebody else commits in the meantime, the push starts over from their
    commit. `api` is the client, with its token; a new one by default.

    Raises:
        ValueError: if the folder or the repository's name cannot be pushed.
        PushError: if the Hub did not take the push.
    """
    folder, options, api = Path(folder), options or PushOptions(), api or HfApi()
    files = files_to_push(folder, options.include)
    attempt = 0
    while True:
        attempt += 1
        try:
            return _commit(api, folder, files, repo_id, options)
        except (ValueError, TypeError):  # what was given is wrong, and stays so
            raise
        except Exception as error:
            if attempt == options.attempts:
                command = push_command(folder, repo_id, options.private, options.include)
                failure = f"pushing to {repo_id} failed ({describe_exception(error)})"
                raise PushError(f"{failure}. {folder} is complete; push it later with\n  {command}") from error
            logger.debug("attempt %d of %d: %s", attempt, options.attempts, describe_exception(error))
            time.sleep(options.first_wait * 2 ** (attempt - 1))


def push_pipeline(
    pipe: "DiffusionPipeline",
    repo_id: str,
    *,
    variant: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push a pipeline that is in memory; see `push`. A card in the repository keeps its facts and figures."""
    message = commit_message or f"Upload {type(pipe).__name__}"
    options = PushOptions(private=private, commit_message=message, create_pr=create_pr)
    with tempfile.TemporaryDirectory() as temporary:
        pipe.save_pretrained(temporary, variant=variant)
        return push(temporary, repo_id, options, api=HfApi(token=token))


def push_command(folder: Path, repo_id: str, private: bool | None = None, include: Sequence[str] = ()) -> str:
    """The command line that pushes a finished folder."""
    flags = (["--private"] if private else []) + [part for pattern in include for part in ("--include", pattern)]
    return shlex.join(["python", "-m", "ddpm_pipeline.hub", "push", str(folder), repo_id, *flags])


def _commit(api: HfApi, folder: Path, files: Mapping[str, Path], repo_id: str, options: PushOptions) -> str:
    """One attempt to commit the files, and to delete stale ones, on top of the newest commit; the new commit's address."""
    repo_id = api.create_repo(repo_id, private=options.private, exist_ok=True).repo_id
    info = api.repo_info(repo_id, revision=options.revision, files_metadata=True)
    readme = _merged_readme(api, folder, repo_id, info.sha).encode("utf-8")
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items() if name != CARD]
    additions.append(CommitOperationAdd(CARD, readme))
    stale = stale_files(
        {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []},
        {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions},
        old=_components(api, repo_id, info.sha),
        new=components_of(read_object(folder / INDEX)),
    )
    return api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(path, is_folder=False) for path in stale)],
        commit_message=options.commit_message or f"Upload {folder.resolve().name}",
        revision=options.revision,
        create_pr=options.create_pr,
        parent_commit=info.sha,
    ).commit_url


def _merged_readme(api: HfApi, folder: Path, repo_id: str, revision: str) -> str:
    """The README to push: the folder's, with the repository in its examples, merged into the one that is there."""
    ours, theirs = read_card(folder), _text_on_the_hub(api, repo_id, CARD, revision)
    new = card_of_folder(folder, repo_id, ours or theirs)
    if ours:
        new = ModelCard(refresh_card(ours, new, ["use"]), ignore_metadata_errors=True)
    check_private(str(new))
    # a pipeline from memory knows the examples, not the pictures
    return refresh_card(theirs, new, None if ours else ["use"])


def _components(api: HfApi, repo_id: str, revision: str) -> set[str]:
    """The components of the model in a repository; none if its index cannot be read."""
    try:
        index = json.loads(_text_on_the_hub(api, repo_id, INDEX, revision) or "{}")
    except ValueError:
        return set()
    return components_of(index) if isinstance(index, dict) else set()


def _text_on_the_hub(api: HfApi, repo_id: str, path: str, revision: str) -> str:
    """A file of a repository, with its line ends as they are; "" if there is no file of that name."""
    try:
        return Path(api.hf_hub_download(repo_id, path, revision=revision)).read_bytes().decode("utf-8")
    except EntryNotFoundError:
        return ""
