"""Pipeline folders on their way to the Hub: exported whole, with a card, and pushed in one commit.

Imports huggingface_hub alone, so that the command starts at once. Called by training and by the pipelines' `push_to_hub`.
"""

import errno
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
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers

from ..support.atomic import remove_leftovers, sync, sync_folder, temporary_beside, write_text
from ..support.errors import PushError
from ..support.exceptions import describe_exception
from .card import CARD, card_of_folder, read_card, refresh_card
from .files import INDEX, components_of, files_to_push, read_object, stale_files
from .kinds import facts_of
from .readme import decoded, metadata, private_lines

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

ATTEMPTS, LONGEST_WAIT = 5, 300  # seconds, the window of the Hub's rate limits
PASSING = (408, 412, 425, 429)  # timeouts, another commit in between, too many requests: what else is 4xx stays refused
LEFTOVERS = ".export.*.tmp"  # what a kill leaves of an export


@dataclass(frozen=True)
class PushOptions:
    """How a folder is pushed."""

    private: bool | None = None  #: makes the repository private if the push creates it
    revision: str | None = None  #: the branch, which must exist; main by default
    commit_message: str | None = None  #: "Upload FOLDER" by default
    create_pr: bool = False  #: opens a pull request instead of committing
    include: Sequence[str] = ()  #: patterns of files besides the pipeline, its card, pictures and evaluation.json
    attempts: int = ATTEMPTS
    first_wait: float = 2.0  #: seconds between the first two attempts, doubled from each to the next


def export(pipe: "DiffusionPipeline", folder: str | Path, card: ModelCard | None = None) -> None:
    """Save `pipe` into `folder`, in place of an earlier export, which stays as it is until the new one is complete.

    Then `model_index.json`, which makes a folder a pipeline, is removed first and written last: whoever looks, or whatever
    ends the process, finds the earlier model, the new one, or no pipeline, and never parts of two. A later export clears away
    what a kill left. The card becomes README.md; in a README that exists already only our sections are refreshed. Files that
    saving a pipeline does not write stay, also in the folders of components.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, LEFTOVERS)
    temporary = temporary_beside(folder / "export")
    try:
        pipe.save_pretrained(temporary)
        if card is not None:
            write_text(temporary / CARD, refresh_card(read_card(folder), card))
        sync_folder(temporary)
        _switch(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _switch(source: Path, folder: Path) -> None:
    """Move a complete pipeline from `source` into `folder`, and remove what else an earlier one would load there."""
    new = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    components = {path.split("/")[0] for path in new if "/" in path}
    if blocked := [folder / path for path in new if (folder / path).is_dir()]:  # before the earlier model is touched
        raise FileExistsError(errno.EEXIST, "a folder in the place of a file of the model; move it away", str(blocked[0]))
    for name in components:
        if (folder / name).is_symlink():  # what it leads to is not ours to replace
            (folder / name).unlink()
        (folder / name).mkdir(exist_ok=True)
    old = [path.relative_to(folder).as_posix() for name in components for path in (folder / name).iterdir()]
    (folder / INDEX).unlink(missing_ok=True)
    sync(folder)
    for path in stale_files(dict.fromkeys(old), dict.fromkeys(new, "new"), set(), components):
        (folder / path).unlink()
    for path in new:
        if path != INDEX:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / path, folder / path)
    for name in (*components, "."):
        sync(folder / name)
    os.replace(source / INDEX, folder / INDEX)
    sync(folder)


def push(folder: str | Path, repo_id: str, options: PushOptions | None = None, *, api: HfApi | None = None) -> str:
    """Push a pipeline folder in one commit, and return the commit's address.

    The repository is created if it does not exist. In a card that is there already only our sections are refreshed, and the
    `stale_files` of an earlier model are deleted. If somebody else commits in the meantime, the push starts over from their
    commit. A card that looks as if it holds a token or a path in the home folder is left out, with a warning. `api` is the
    client, with its token; a new one by default.

    Raises:
        ValueError: if the folder or the repository's name cannot be pushed.
        PushError: if the Hub did not take the push, or the repository is public and the push was asked to be private.
    """
    folder, options = Path(folder), options or PushOptions()
    return _push(folder, repo_id, options, api or HfApi(), push_command(folder, repo_id, options))


def _push(folder: Path, repo_id: str, options: PushOptions, api: HfApi, again: str) -> str:
    """`push`, with the line of code or command that an error names for another try."""
    files = files_to_push(folder, options.include)
    facts_of(folder)  # what no card can describe is refused before a repository is made for it
    attempt = 0
    while True:
        attempt += 1
        try:
            return _commit(api, folder, files, repo_id, options)
        except Exception as error:
            if isinstance(error, ValueError | TypeError) and not isinstance(error, HfHubHTTPError):
                raise  # what was given is wrong, and stays so
            if (advice := _refusal(error, repo_id, options)) is not None or attempt >= options.attempts:
                failure = f"pushing to {repo_id} failed ({describe_exception(error)})"
                raise PushError(f"{failure}. {advice or ''}The folder is complete; push it later with\n  {again}") from error
            logger.debug("attempt %d of %d: %s", attempt, options.attempts, describe_exception(error))
            time.sleep(max(options.first_wait * 2 ** (attempt - 1), _asked_wait(error)))


def _asked_wait(error: Exception) -> int:
    """The seconds that the Hub asks to wait for, if its answer names some; at most LONGEST_WAIT."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    limit, asked = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
    seconds = int(asked) if asked.isdecimal() else limit.reset_in_seconds if limit and not limit.remaining else 0
    return min(seconds, LONGEST_WAIT)


def _refusal(error: Exception, repo_id: str, options: PushOptions) -> str | None:
    """What to do where trying again does not help; None where it may."""
    if isinstance(error, PublicRepositoryError | OfflineModeIsEnabled):
        return ""
    if not isinstance(error, HfHubHTTPError):
        return None
    if isinstance(error, RevisionNotFoundError) and options.revision:
        return f"Create the branch with `hf repos branch create {repo_id} {options.revision}`, or name another. "
    status = error.response.status_code
    advice = {
        401: "Log in with `hf auth login`, or set HF_TOKEN to a valid token. ",
        403: "Use a token with the right to write there, or a repository of your own. ",
        404: "Check the name of the repository and who may see it. ",
    }
    return advice.get(status, "") if 400 <= status < 500 and status not in PASSING else None


class PublicRepositoryError(Exception):
    """A push was asked to be private, and the repository exists and is public."""

    def __init__(self, repo_id: str):
        super().__init__(
            f"{repo_id} exists and is public, and the push was asked to be private; make it private in its settings, name "
            "another repository, or push without asking for privacy"
        )


def create_repository(api: HfApi, repo_id: str, private: bool | None, **kind: str) -> str:
    """The full name of the repository, a model's or one of another `kind` as `create_repo` takes it, which exists afterwards.
    Raises PublicRepositoryError rather than to publish what is to be private.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
    if private and not api.repo_info(repo_id, repo_type=kind.get("repo_type")).private:
        raise PublicRepositoryError(repo_id)
    return repo_id


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
    given = {"variant": variant, "private": private, "commit_message": commit_message, "create_pr": create_pr or None}
    call = ", ".join([repr(repo_id), *(f"{name}={value!r}" for name, value in given.items() if value is not None)])
    with tempfile.TemporaryDirectory() as temporary:
        pipe.save_pretrained(temporary, variant=variant)
        return _push(Path(temporary), repo_id, options, HfApi(token=token and token.strip()), f"pipe.push_to_hub({call})")


def push_command(folder: Path, repo_id: str, options: PushOptions) -> str:
    """The command line that pushes a finished folder in the same way."""
    given = {
        "--private": options.private, "--revision": options.revision, "--message": options.commit_message,
        "--create_pr": options.create_pr, "--attempts": options.attempts if options.attempts != ATTEMPTS else None,
    }  # fmt: skip
    words = ["python", "-m", "ddpm_pipeline.hub", "push", str(folder), repo_id]
    for flag, value in (*given.items(), *(("--include", pattern) for pattern in options.include)):
        if value:
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def _commit(api: HfApi, folder: Path, files: Mapping[str, Path], repo_id: str, options: PushOptions) -> str:
    """One attempt to commit the files, and to delete stale ones, on top of the newest commit; the new commit's address."""
    repo_id = create_repository(api, repo_id, options.private)
    info = api.repo_info(repo_id, revision=options.revision, files_metadata=True)
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items() if name != CARD]
    if (readme := _merged_readme(api, folder, repo_id, info.sha)) is not None:
        additions.append(CommitOperationAdd(CARD, readme.encode("utf-8")))
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


def _merged_readme(api: HfApi, folder: Path, repo_id: str, revision: str) -> str | None:
    """The README to push: the folder's, with the repository in its examples, merged into the one that is there; None if the
    Hub would refuse the result.
    """
    ours, theirs = read_card(folder), decoded(_on_the_hub(api, repo_id, CARD, revision))
    if problem := _problem_of(ours):
        logger.warning("%s is not pushed: %s", folder / CARD, problem)
        ours = ""
    new = card_of_folder(folder, repo_id, ours or theirs)
    # a pipeline from memory knows the examples, not the pictures
    merged = refresh_card(theirs, refresh_card(ours, new, ["use"]) if ours else new, None if ours else ["use"])
    try:
        metadata(merged)
    except ValueError as error:
        logger.warning("%s of %s stays as it is: %s", CARD, repo_id, error)
        return None
    return merged


def _problem_of(readme: str) -> str | None:
    """Why a README does not leave this machine."""
    for number, what in private_lines(readme).items():
        return f"its line {number} holds what looks like {what}; remove it there"
    try:
        metadata(readme)
    except ValueError as error:
        return str(error)
    return None


def _components(api: HfApi, repo_id: str, revision: str) -> set[str]:
    """The components of the model in a repository; none if its index cannot be read."""
    try:
        index = json.loads(_on_the_hub(api, repo_id, INDEX, revision) or b"{}")
    except ValueError:
        return set()
    return components_of(index) if isinstance(index, dict) else set()


def _on_the_hub(api: HfApi, repo_id: str, path: str, revision: str) -> bytes:
    """The content of a file of a repository; b"" if there is no file of that name."""
    try:
        return Path(api.hf_hub_download(repo_id, path, revision=revision)).read_bytes()
    except EntryNotFoundError:
        return b""
