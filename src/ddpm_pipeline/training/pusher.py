"""Pushes to the Hub during training: in the background, one at a time, and never in the way of the training.

Imports huggingface_hub and the package. Used by train.py's main process alone.
"""

import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, fields
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, LocalTokenNotFoundError, validate_repo_id

from ..hub import push, summary
from ..support.errors import ConfigError, PushError
from .options import TrainingConfig

logger = logging.getLogger("train")

SNAPSHOT = ".push"  # the folder, in the output folder, that a push during training reads
EXIT_STATUS = 3  # of a run that is complete on disk, and could not be pushed
LOGS = ("metrics.jsonl",)
# Options that say where and how a run was done, not what came of it
NOT_PART_OF_THE_RECIPE = frozenset(
    ("output_dir", "overwrite", "resume", "cache_dir", "preprocessing_num_workers", "dataloader_num_workers",
     "num_cpu_threads", "checkpoint_every", "checkpoints_total_limit", "log_every", "report_to", "push_to_hub", "push_every",
     "push_logs", "hub_model_id", "hub_private", "hub_license")
)  # fmt: skip


class Pusher:
    """Pushes snapshots of a run while it goes on, and its result at the end.

    Makes sure beforehand that there is a repository and the right to write to it: raises ConfigError if not.
    """

    def __init__(self, config: TrainingConfig, folder: Path, api: HfApi | None = None):
        for client in ("httpx", "httpx2"):  # of older and newer versions of huggingface_hub; they log every request
            logging.getLogger(client).setLevel(logging.WARNING)
        self.api = api or HfApi()
        self.folder = folder
        self.private = config.hub_private or None
        self.include = LOGS if config.push_logs else ()
        self.repo_id = self._prepare(config.hub_model_id)
        self._under_way: Future | None = None
        self._reported = False

    def _prepare(self, repo_id: str | None) -> str:
        """The full name of the repository, which exists afterwards."""
        try:
            user = self.api.whoami()["name"]
            repo_id = repo_id or f"{user}/{self.folder.resolve().name}"
            validate_repo_id(repo_id)
            repo_id = self.api.create_repo(repo_id, private=self.private, exist_ok=True).repo_id
            self.api.auth_check(repo_id, write=True)
        except LocalTokenNotFoundError as error:
            raise ConfigError(
                "--push_to_hub needs a token of the Hub that may write: run `hf auth login`, or set HF_TOKEN."
            ) from error
        except HFValidationError as error:
            raise ConfigError(f"--hub_model_id {repo_id} is no name of a repository: {error}") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == 401:
                raise ConfigError(
                    f"--push_to_hub: the Hub does not accept the token ({summary(error)}). Log in anew by `hf auth login`, "
                    "or set HF_TOKEN to a valid one."
                ) from error
            if status in (403, 404):
                raise ConfigError(
                    f"--hub_model_id {repo_id}: the token has no right to write there ({summary(error)}). Use a token with "
                    "the role 'write', or the name of a repository of yours."
                ) from error
            raise ConfigError(self._unreachable(error)) from error
        except Exception as error:  # of the HTTP client, which differs between versions of the library
            raise ConfigError(self._unreachable(error)) from error
        return repo_id

    @staticmethod
    def _unreachable(error: Exception) -> str:
        return f"--push_to_hub: the Hub cannot be reached now ({summary(error)}); try again, or train without it."

    @property
    def busy(self) -> bool:
        return self._under_way is not None and not self._under_way.done()

    def push_soon(self, step: int, write_snapshot: Callable[[Path], None]) -> bool:
        """Let `write_snapshot` fill a folder, and push it in the background; False where the last push is still going on.

        Whatever goes wrong with the push is reported the first time, and does not reach the caller.
        """
        self._report()
        if self.busy:
            logger.info("the push before is still going on; step %d is left out", step)
            return False
        snapshot = self.folder / SNAPSHOT
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir(parents=True)
        if previews := sorted((self.folder / "samples").glob("step-*.png")):
            shutil.copyfile(previews[-1], snapshot / "samples.png")
        write_snapshot(snapshot)
        message = f"Training in progress, step {step}"
        self._under_way = self.api.run_as_future(self._push, snapshot, message, attempts=3)
        return True

    def finish(self) -> str:
        """Push the finished folder, and return the commit's address. Raises PushError with the command that does it later."""
        if self._under_way is not None:
            self._under_way.exception()  # waits
            self._report()
            self._under_way = None
        shutil.rmtree(self.folder / SNAPSHOT, ignore_errors=True)
        return self._push(self.folder, "Training done")

    def _push(self, folder: Path, message: str, **options: int) -> str:
        return push(
            folder,
            self.repo_id,
            private=self.private,
            commit_message=message,
            include=self.include,
            api=self.api,
            **options,
        )

    def _report(self) -> None:
        error = self._under_way.exception() if self._under_way is not None and self._under_way.done() else None
        if error is not None and not self._reported:
            self._reported = True
            cause = error.__cause__ if isinstance(error, PushError) else error
            logger.warning(
                "pushing to %s failed (%s). Training goes on; later pushes and the last one try again, and this is not "
                "reported again.", self.repo_id, summary(cause or error),
            )  # fmt: skip


def recipe_command(config: TrainingConfig, num_processes: int = 1) -> str:
    """The command line that trains the same model: all that differs from the defaults, and no path of this machine."""
    defaults = {entry.name: entry.default for entry in fields(TrainingConfig)}
    words = ["accelerate", "launch", *(["--num_processes", str(num_processes)] if num_processes > 1 else [])]
    words.append("training/train.py")
    for name, value in asdict(config).items():
        # the data set is always named: with no --dataset the default recipe runs
        if name in NOT_PART_OF_THE_RECIPE or value is None or (value == defaults[name] and name != "dataset"):
            continue
        words += [f"--{name}", public(str(value))]
    return shlex.join(words)


def public(value: str) -> str:
    """A value as the card may show it: of a path only its last part."""
    looks_like_path = os.path.isabs(value) or value.startswith((".", "~")) or re.search(r"[\\*?]|\.\w+$", value)
    return Path(value).name or value if looks_like_path or os.path.exists(value) else value


def is_hub_dataset(config: TrainingConfig) -> bool:
    """Whether the data set's name is that of one on the Hub, by what mapped takes for local."""
    return config.dataset != "digits" and public(config.dataset) == config.dataset
