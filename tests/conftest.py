"""Settings of every test."""

import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator

import pytest

# Tiny tensors gain nothing from more threads, and workers share the cores. Set before torch is imported, and for subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell without job control starts `pytest &` with SIGINT ignored, which commands that tests interrupt would inherit.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until the modules of tests are imported: what they make stays


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def diffusers_as_talkative_as_before() -> Iterator[None]:
    """Commands that run within a test make diffusers quieter."""
    logger = logging.getLogger("diffusers")
    levels = {talker: talker.level for talker in (logger, *logger.handlers)}
    yield
    for talker, level in levels.items():
        talker.setLevel(level)
