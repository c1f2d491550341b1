"""What a run does along the way and how often, and from that when it will be done. Imports the standard library alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

CALLS_OF_UPDATE = 2  # calls in sampling that an update takes the time of: of the network alone 3, and samplers take some


@dataclass(frozen=True)
class Every:
    """A job that is due after every `updates` updates; 0 is never."""

    updates: int
    run: Callable[[int], bool | None]  # takes the number of updates done; returns whether the run shall stop
    at_end: Literal["if due", "always", "never"] = "if due"
    on_stop: Literal["if due", "always", "never"] = "if due"  # after the update in which the run was asked to stop
    calls: int = 0  # network calls times images, by which its time is estimated before it has run

    def is_due(self, done: int, total: int, stopping: bool) -> bool:
        if stopping and self.on_stop != "if due":
            return self.on_stop == "always"
        if not self.updates or (done == total and self.at_end == "never"):
            return False
        return done % self.updates == 0 or (done == total and self.at_end == "always")

    def times_left(self, done: int, total: int) -> int:
        """How often it is due after update `done`."""
        if not self.updates or done >= total:
            return 0
        at_end = {"if due": 0, "always": total % self.updates != 0, "never": -(total % self.updates == 0)}[self.at_end]
        return total // self.updates - done // self.updates + at_end


class Forecast:
    """How long a run still takes: updates at their pace so far, each job as long as it last took, and what comes at the end.

    What samples and has not run yet is estimated by its network calls: at the speed of a job that has run, or else from the
    pace of updates.
    """

    def __init__(self, jobs: Sequence[Every], total: int, images_per_update: int, calls_at_end: int):
        """`images_per_update` are those of this process, as calls count them."""
        self.jobs, self.total, self.images, self.calls_at_end = jobs, total, images_per_update, calls_at_end
        self.pace: float | None = None  # seconds per update, without the first, which takes longer
        self._start: tuple[int, float] | None = None
        self._at_jobs = 0.0  # seconds since then
        self._lasted: dict[Every, float] = {}

    def note_update(self, done: int) -> None:
        """After every update."""
        self._done, now = done, time.monotonic()
        if self._start is None:
            self._start = done, now
        else:
            self.pace = max(now - self._start[1] - self._at_jobs, 1e-9) / (done - self._start[0])

    def timed(self, job: Every, done: int) -> bool:
        """Do the job; whether the run shall stop."""
        began = time.monotonic()
        stopping = bool(job.run(done))
        self._lasted[job] = time.monotonic() - began
        self._at_jobs += self._lasted[job]
        return stopping

    def seconds_left(self) -> float:
        """Needs a pace."""
        measured = (seconds / job.calls for job, seconds in self._lasted.items() if job.calls)
        per_call = next(measured, self.pace / (CALLS_OF_UPDATE * self.images))
        seconds = (self.total - self._done) * self.pace + self.calls_at_end * per_call
        return seconds + sum(
            self._lasted.get(job, job.calls * per_call) * job.times_left(self._done, self.total) for job in self.jobs
        )


def duration(seconds: float) -> str:
    """Such as "2 h 10 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, days = minutes // 60 % 24, minutes // 1440
    parts = {"d": days, "h": hours, "min": 0 if days else minutes % 60}
    return " ".join(f"{number} {unit}" for unit, number in parts.items() if number)


def time_of_day(seconds: float) -> str:
    """The local time in so many seconds, such as "14:32", with the date if that is another day's."""
    now, then = time.localtime(), time.localtime(time.time() + seconds)
    return time.strftime("%H:%M" if now[:3] == then[:3] else "%d %b %H:%M", then)
