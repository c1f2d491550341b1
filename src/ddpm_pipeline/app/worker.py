"""One thread for all calls of a network, however many people ask at once. Imports the standard library alone."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Worker:
    """Jobs run one after another, in the order in which they came: a pipeline holds the state of one chain at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "model")

    def do(self, job: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What the job returns or raises, once it has had its turn."""
        return self._thread.submit(job, *arguments, **options).result()

    def watch(self, job: Callable[[Callable[[Any], bool]], Any]) -> Iterator[Any]:
        """What a job reports on its way, or the newest of it, and at last what it returns.

        The job is called with a function that takes what it has so far and returns whether to stop, because nobody waits for it
        any more: the iterator was closed or lost.
        """
        newest, news, left = deque(maxlen=1), threading.Event(), threading.Event()

        def report(item: Any) -> bool:
            newest.append(item)
            news.set()
            return left.is_set()

        future = self._thread.submit(job, report)
        future.add_done_callback(lambda _: news.set())
        try:
            while not future.done():
                news.wait()
                news.clear()
                if newest and not future.done():
                    yield newest.popleft()
            yield future.result()
        finally:
            left.set()
            future.cancel()
