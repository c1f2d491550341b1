"""The errors that end a command, and the exit status of each. Commands print their messages without a traceback."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator

PUSH_FAILED_STATUS = 3  # the run is complete on disk, and could not be pushed
STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command with --resume latest goes on

# Variables for tqdm's users without one of their own, such as diffusers; for datasets; for the Hub's client and transformers
LIBRARY_BARS_OFF = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


class ConfigError(ValueError):
    """An option cannot be used; the message names it, what is allowed, and what to do."""


class DataError(ValueError):
    """The data cannot be used as asked; the message says what was given, what is allowed and what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says why, and which is the last whole one."""


class NumericalError(RuntimeError):
    """Losses or gradients stay non-finite; the message names the last good checkpoint."""


class PushError(RuntimeError):
    """The Hub did not take a push; the message says why, and which command pushes the folder later."""


class MissingExtraError(ImportError):
    """A library is not installed; the message names the extra that brings it."""


class Stopped(Exception):
    """The run ended early, as it was asked to; the message says what asked and how to resume."""


def only_errors_of(library: str) -> None:
    """For commands: of what a library logs, errors alone are shown. Its verbosity stays, which our own warnings follow."""
    for handler in logging.getLogger(library).handlers:
        handler.setLevel(logging.ERROR)


@contextlib.contextmanager
def reported_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """For commands: the errors above end the process with one line on standard error and their exit status. `interrupted` is
    the line for Ctrl-C. Libraries imported within draw no progress bars into files; ours do not anyway.
    """
    if not sys.stderr.isatty():
        os.environ |= dict.fromkeys(LIBRARY_BARS_OFF, "1")
    try:
        yield
    except (ConfigError, DataError, CheckpointError, NumericalError, MissingExtraError) as error:
        sys.exit(f"error: {error}")
    except PushError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(PUSH_FAILED_STATUS)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED_STATUS)
    except OSError as error:
        if error.errno is None:  # of a library, without a file or a system call to name
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, fix = (f"the disk is full ({error})", "make room") if full else (str(error), "mend that")
        sys.exit(
            f"error: {what}. Files and checkpoints that were written are whole: {fix}, then repeat the command (training with "
            "--resume latest)."
        )
    except KeyboardInterrupt:
        sys.exit(interrupted)
