"""Any exception in one line, and the extra that a missing library belongs to."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

from ddpm_pipeline.support.exceptions import describe_exception
from ddpm_pipeline.support.extras import needs_extra


def test_an_exception_is_one_line_with_its_cause():
    error = ValueError("two\n  lines")
    error.__cause__ = KeyError("inner")
    assert describe_exception(error) == "ValueError: two lines; KeyError: 'inner'"
    assert describe_exception(TimeoutError()) == "TimeoutError"
    error.__cause__ = OSError("lines")
    assert describe_exception(error) == "ValueError: two lines"


def test_what_the_hub_answered_is_its_status_and_words():
    response = SimpleNamespace(status_code=403, reason_phrase="Forbidden", headers={}, request=None)
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response, error.server_message = response, None
    assert describe_exception(error) == "HTTP 403: Forbidden"
    error.server_message = "slow down"
    assert describe_exception(error) == "HTTP 403: slow down"


def test_a_missing_library_names_its_extra_and_our_own_mistakes_do_not():
    missing = pytest.raises(ImportError, match=r"drawing needs no_such_library.*ddpm-pipeline\[train\]")
    with missing, needs_extra("train", "drawing"):
        import no_such_library.part  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as raised, needs_extra("train", "drawing"):
        import ddpm_pipeline.no_such_module  # noqa: F401
    assert "pip install" not in str(raised.value)
