"""Pipeline folders on their way to the Hub: whole on disk, with a card that says only what is known, pushed in one commit.

`python -m ddpm_pipeline.hub push FOLDER REPO` pushes a finished folder. Imports huggingface_hub alone, so that this takes
no seconds to start; pipelines come in as arguments. Called by the training scripts and by `push_to_hub` of the pipelines.
"""

import json
import logging
import os
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..support.errors import PushError
from .card import (
    card_of_folder,
    check_private,
    read_text,
    refresh_card,
    write_text,
)
from .files import INDEX, components_of, files_to_push, read_object, stale_files

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds before the second attempt; doubled before each further one

T = TypeVar("T")


def export(pipe: "DiffusionPipeline", folder: str | Path, card: ModelCard | None = None) -> None:
    """Save `pipe` into `folder`, replacing an earlier export; what was there stays whole until the new one is.

    A card is written beside it; of one that is there already, only our sections are refreshed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        pipe.save_pretrained(temporary)
        if card is not None:
            readme = folder / "README.md"
            text = refresh_card(read_text(readme), card) if readme.is_file() else str(card)
            write_text(Path(temporary, "README.md"), text)
        for entry in sorted(Path(temporary).iterdir(), key=lambda path: path.name == INDEX):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)  # model_index.json last: with it the folder is a pipeline


# ---- pushing --------------------------------------------------------------------------------------


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    include: Sequence[str] = (),
    attempts: int = ATTEMPTS,
    first_wait: float = FIRST_WAIT,
    api: HfApi | None = None,
    give_up: threading.Event | None = None,
) -> str:
    """Push a pipeline folder in one commit, and return the commit's address.

    The repository is made if there is none. Of a card that is there already only our sections are refreshed, and
    `stale_files` of a model that was there before are deleted. If somebody commits meanwhile, that is seen, and done again
    on theirs.

    Args:
        private: for a repository that is made.
        include: patterns of files to push besides the pipeline, its card, pictures and evaluation.json.
        attempts: how often to try, waiting `first_wait` seconds after the first time and twice as long after each next.
        api: the client; by default a new one with `token`.
        give_up: once set, there is no further attempt.

    Raises ValueError for a folder or repository name that cannot be pushed, PushError where the Hub did not take it.
    """
    folder = Path(folder)
    files = files_to_push(folder, include)
    api = api or HfApi(token=token)

    def attempt() -> str:
        full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.repo_info(full_name, revision=revision, files_metadata=True)
        parent = info.sha
        readme = _merged_readme(api, folder, full_name, parent).encode("utf-8")
        contents = {**files, "README.md": readme}
        additions = [CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
                     for name, file in contents.items()]  # fmt: skip
        stale = stale_files(
            {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []},
            {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions},
            old=_components(api, full_name, parent),
            new=components_of(read_object(folder / INDEX)),
        )
        return api.create_commit(
            full_name,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in stale)],
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        ).commit_url

    try:
        return _retried(attempt, attempts, first_wait, give_up)
    except (ValueError, TypeError):
        raise
    except Exception as error:
        raise PushError(
            f"{repo_id} could not be pushed to ({summary(error)}). {folder} is complete; push it later by\n"
            f"  {push_command(folder, repo_id, private, include)}"
        ) from error


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
    """Push a pipeline that is in memory; see `push`. A card that is in the repository keeps its facts and figures."""
    with tempfile.TemporaryDirectory() as temporary:
        pipe.save_pretrained(temporary, variant=variant)
        return push(
            temporary,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message or f"Upload {type(pipe).__name__}",
            create_pr=create_pr,
        )


def push_command(folder: Path, repo_id: str, private: bool | None = None, include: Sequence[str] = ()) -> str:
    """The command line that pushes a finished folder."""
    options = (["--private"] if private else []) + [part for pattern in include for part in ("--include", pattern)]
    return shlex.join(["python", "-m", "ddpm_pipeline.hub", "push", str(folder), repo_id, *options])


def _merged_readme(api: HfApi, folder: Path, repo_id: str, revision: str) -> str:
    """The README to push: the folder's, naming the repository in its examples, poured into the one that is there."""
    path = folder / "README.md"
    theirs = _text_on_the_hub(api, repo_id, "README.md", revision)
    ours = read_text(path) if path.is_file() else None
    fresh = card_of_folder(folder, repo_id, ours or theirs or "")
    new = fresh if ours is None else ModelCard(refresh_card(ours, fresh, ["use"]), ignore_metadata_errors=True)
    check_private(str(new))
    if theirs is None:
        return str(new)
    # a pipeline from memory knows the examples, not the pictures
    return refresh_card(theirs, new, ["use"] if ours is None else None)


def _components(api: HfApi, repo_id: str, revision: str) -> set[str]:
    """The components of the model that is in a repository; none where its index cannot be read."""
    try:
        index = json.loads(_text_on_the_hub(api, repo_id, INDEX, revision) or "{}")
    except ValueError:
        return set()
    return components_of(index) if isinstance(index, dict) else set()


def _text_on_the_hub(api: HfApi, repo_id: str, path: str, revision: str) -> str | None:
    """A file of a repository; None where it has none of that name."""
    try:
        return read_text(Path(api.hf_hub_download(repo_id, path, revision=revision)))
    except EntryNotFoundError:
        return None


def _retried(attempt: Callable[[], T], attempts: int, first_wait: float, give_up: threading.Event | None) -> T:
    """`attempt()`, again after ever longer waits while the Hub or the network fails; the last exception in the end."""
    for count in range(1, attempts + 1):
        try:
            return attempt()
        except (ValueError, TypeError):  # what was given is wrong, and stays so
            raise
        except Exception as error:
            stopped = give_up is not None and give_up.is_set()
            if count == attempts or stopped:
                raise
            wait = first_wait * 2 ** (count - 1)
            logger.debug("attempt %d of %d: %s; again in %.1f s", count, attempts, summary(error), wait)
            time.sleep(wait) if give_up is None else give_up.wait(wait)
    raise AssertionError("unreachable: attempts is at least 1")


def summary(error: BaseException) -> str:
    """One line of an exception: the Hub's status and words where it answered."""
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        said = error.server_message or error.response.reason_phrase
        return f"HTTP {error.response.status_code}: {said}"
    cause = error.__cause__
    inner = f"; {summary(cause)}" if isinstance(cause, Exception) else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}{inner}"
