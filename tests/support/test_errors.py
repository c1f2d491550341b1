"""What ends a command: one line and the exit status of its kind."""

import errno
import os

import pytest

from ddpm_pipeline.support import errors
from ddpm_pipeline.support.errors import reported_errors

ENDS = [
    (errors.ConfigError("no such option"), "error: no such option", 1),
    (errors.DataError("no images"), "error: no images", 1),
    (errors.PushError("refused"), "error: refused", errors.PUSH_FAILED_STATUS),
    (errors.Stopped("stopped by SIGTERM"), "stopped by SIGTERM", errors.STOPPED_STATUS),
    (KeyboardInterrupt(), "interrupted", 1),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights"), "error: the disk is full", 1),
    (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "metrics.jsonl"), "metrics.jsonl", 1),
    (OSError(errno.EIO, os.strerror(errno.EIO), "images.arrow"), "images.arrow", 1),
]


@pytest.mark.parametrize(("error", "line", "status"), ENDS, ids=[type(error).__name__ for error, *_ in ENDS])
def test_an_error_ends_a_command_in_one_line(error, line, status, capsys):
    with pytest.raises(SystemExit) as ended, reported_errors():
        raise error
    said = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert line in said and "\n" not in said.strip()
    assert (1 if isinstance(ended.value.code, str) else ended.value.code) == status


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), OSError("of a library")])
def test_a_fault_keeps_its_traceback(error):
    with pytest.raises(type(error)), reported_errors():
        raise error
