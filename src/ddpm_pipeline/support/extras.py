"""Names that a room imports on first use, and the one error where an optional library is not installed.

Imports the standard library alone, so that a room costs nothing until a name is asked for.
"""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from .errors import MissingExtraError


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Raises ImportError that names the extra to install where a library that `what` imports is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", __name__.partition(".")[0]):
            raise
        raise MissingExtraError(
            f"{what} needs {missing}, which is not installed. Install it with: pip install 'ddpm-pipeline[{extra}]'",
            name=error.name,
        ) from error


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Imports make objects that stay; to look for garbage among them takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def lazy_exports(package: str, modules: Mapping[str, str], extra: str) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package whose public names are imported on first use. `modules` maps each name to its
    module, such as ".mapped". A library missing there is reported by `needs_extra`.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with needs_extra(extra, package), collecting_no_garbage():
            return getattr(import_module(modules[name], package), name)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return __getattr__, __dir__
