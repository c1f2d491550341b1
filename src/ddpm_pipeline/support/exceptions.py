"""Any exception in one line, for messages and logs. Imports huggingface_hub's errors alone."""

from huggingface_hub.errors import HfHubHTTPError


def describe_exception(error: BaseException) -> str:
    """The type and message of an exception and, unless it repeats it, of its cause, in one line; of an HTTP error of the Hub,
    its status and words.
    """
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        return f"HTTP {error.response.status_code}: {error.server_message or error.response.reason_phrase}"
    message = " ".join(str(error).split())
    own = f"{type(error).__name__}{': ' if message else ''}{message}"
    cause = describe_exception(error.__cause__) if isinstance(error.__cause__, Exception) else own
    return own if (cause.partition(": ")[2] or cause) in own else f"{own}; {cause}"
