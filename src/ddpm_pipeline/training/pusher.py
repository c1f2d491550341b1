"""Pushes to the Hub during training: in the background, one at a time, without holding up the run. For the main process."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, LocalTokenNotFoundError, validate_repo_id

from ..hub import PushOptions, push, push_command
from ..hub.upload import ATTEMPTS, PublicRepositoryError, create_repository
from ..support.errors import ConfigError, PushError, Stopped
from ..support.exceptions import describe_exception
from .options import HubOptions
from .stop import StopRequest, in_background

logger = logging.getLogger(__name__)

NEVER = StopRequest(None, 0.0)  # no request to stop
SNAPSHOT = ".push"  # the folder, in the output folder, that a push during training reads


class Pusher:
    """Pushes snapshots of a run while it continues, and its result at the end. Raises ConfigError beforehand if there is no
    right to write to the repository, which is made if missing.
    """

    def __init__(self, options: HubOptions, folder: Path, api: HfApi | None = None):
        for client in ("httpx", "httpx2"):  # of older and newer versions of huggingface_hub; they log every request
            logging.getLogger(client).setLevel(logging.WARNING)
        self.api, self.folder, self.private = api or HfApi(), folder, options.hub_private or None
        self.include = ("metrics.jsonl",) if options.push_logs else ()
        self.repo_id = self._prepare(options.hub_model_id)
        self._under_way: Future | None = None
        self._message = ""  # of the commit under way
        self._reported = False

    def _prepare(self, repo_id: str | None) -> str:
        """The full name of the repository, which exists afterwards."""
        try:
            user = self.api.whoami()["name"]
            repo_id = repo_id or f"{user}/{self.folder.resolve().name}"
            validate_repo_id(repo_id)
            repo_id = create_repository(self.api, repo_id, self.private)
            self.api.auth_check(repo_id, write=True)
        except PublicRepositoryError as error:
            raise ConfigError(f"--hub_private: {error}.") from error
        except LocalTokenNotFoundError as error:
            raise ConfigError(
                "--push_to_hub needs a Hub token with write access: run `hf auth login`, or set HF_TOKEN."
            ) from error
        except HFValidationError as error:
            raise ConfigError(f"--hub_model_id {repo_id} is not a valid repository name: {error}") from error
        except Exception as error:  # of the HTTP client, which differs between versions of the library, or of the Hub
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            why = describe_exception(error)
            if status == 401:
                raise ConfigError(
                    f"--push_to_hub: the Hub does not accept the token ({why}). Log in again with `hf auth login`, or set "
                    "HF_TOKEN to a valid one."
                ) from error
            if status in (403, 404):
                raise ConfigError(
                    f"--hub_model_id {repo_id}: the token may not write there ({why}). Use a token with the role 'write', or a "
                    "repository of your own."
                ) from error
            raise ConfigError(
                f"--push_to_hub: the Hub cannot be reached now ({why}); try again, or train without it."
            ) from error
        return repo_id

    @property
    def busy(self) -> bool:
        return self._under_way is not None and not self._under_way.done()

    def push_soon(self, step: int, write_snapshot: Callable[[Path], None]) -> bool:
        """Let `write_snapshot` fill a folder, and push it in the background; False if the last push is still under way. A push
        that fails is reported the first time, and never ends the run.
        """
        self._report()
        if self.busy:
            logger.info("the previous push is still under way; step %d is not pushed", step)
            return False
        snapshot = self.folder / SNAPSHOT
        try:
            shutil.rmtree(snapshot, ignore_errors=True)
            snapshot.mkdir(parents=True)
            known = sorted((self.folder / "samples").glob("step-*.png"))
            if previews := [path for path in known if path.stem <= f"step-{step:08d}"]:  # later ones are of another course
                for picture in (previews[-1], previews[-1].with_suffix(".txt")):  # and what its rows are
                    if picture.is_file():
                        shutil.copyfile(picture, (snapshot / "samples").with_suffix(picture.suffix))
            write_snapshot(snapshot)
        except Stopped:
            raise
        except Exception as error:  # a full disk, say: what is needed there is needed by checkpoints
            shutil.rmtree(snapshot, ignore_errors=True)
            self._report_failure(error)
            return False
        self._begin(snapshot, f"Training in progress, step {step}", 3)
        return True

    def abandon(self, stop: StopRequest = NEVER, urgent: bool = False) -> bool:
        """Wait for the push under way, and give it up if it does not end soon after a signal or, if `urgent`, from now on.
        Returns whether it has ended.
        """
        if self._under_way is None or stop.waits_for(self._under_way, urgent):
            return True
        command = push_command(self.folder / SNAPSHOT, self.repo_id, self._options(self._message))
        logger.warning("the push under way is given up; to repeat it:\n  %s", command)
        return False

    def finish(self, stop: StopRequest = NEVER) -> str:
        """Push the finished folder and return the commit's URL. Raises PushError with the command that pushes it later, also
        where the run is asked to stop and the push does not end soon.
        """
        message = "Training done"
        if self.abandon(stop):
            self._report()
            shutil.rmtree(self.folder / SNAPSHOT, ignore_errors=True)
            self._begin(self.folder, message, ATTEMPTS)
            if stop.waits_for(self._under_way):
                return self._under_way.result()
        why = f"the push to {self.repo_id} is given up, since {stop.reason} asked the run to end"
        command = push_command(self.folder, self.repo_id, self._options(message))
        raise PushError(f"{why}. {self.folder} is complete; push it later with\n  {command}")

    def _options(self, message: str, attempts: int = ATTEMPTS) -> PushOptions:
        return PushOptions(self.private, commit_message=message, include=self.include, attempts=attempts)

    def _begin(self, folder: Path, message: str, attempts: int) -> None:
        self._message = message
        self._under_way = in_background(self._push, folder, self._options(message, attempts))

    def _push(self, folder: Path, options: PushOptions) -> str:
        return push(folder, self.repo_id, options, api=self.api)

    def _report(self) -> None:
        error = self._under_way.exception() if self._under_way is not None and self._under_way.done() else None
        if error is not None:
            self._report_failure((error.__cause__ if isinstance(error, PushError) else None) or error)

    def _report_failure(self, error: BaseException) -> None:
        if not self._reported:
            self._reported = True
            what = "Training continues and later pushes try again; their failures are not reported."
            logger.warning("pushing to %s failed (%s). %s", self.repo_id, describe_exception(error), what)
