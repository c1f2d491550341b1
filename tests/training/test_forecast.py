"""When a run will be done: how often jobs are still due, and the seconds that all of it takes."""

import pytest

from ddpm_pipeline.training import forecast
from ddpm_pipeline.training.forecast import Every, Forecast, duration, time_of_day


def nothing(done):
    return None


@pytest.mark.parametrize("at_end", ["if due", "always", "never"])
def test_jobs_are_left_as_often_as_they_will_be_due(at_end):
    for updates in (0, 1, 3, 5, 12, 20):
        job = Every(updates, nothing, at_end)
        for done in range(13):
            due = sum(job.is_due(later, 12, stopping=False) for later in range(done + 1, 13))
            assert job.times_left(done, 12) == due, (updates, done)


def test_the_rest_takes_as_long_as_what_was_done(monkeypatch):
    """An update takes 2 s after a first one of 9 s, a preview of 100 calls 5 s, a checkpoint 1 s."""
    now = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])

    def lasting(seconds):
        return lambda done: now.__setitem__(0, now[0] + seconds)

    preview, checkpoint = Every(10, lasting(5), calls=100), Every(4, lasting(1))
    told = Forecast([preview, checkpoint], total=30, images_per_update=8, calls_at_end=60)
    for done, seconds in enumerate((9, 2, 2, 2), start=1):
        now[0] += seconds
        told.note_update(done)
    assert told.pace == 2
    per_call = 2 / 2 / 8  # half of an update's time for each of its images
    assert told.seconds_left() == pytest.approx(26 * 2 + (3 * 100 + 60) * per_call)
    for job in (preview, checkpoint):
        assert not told.timed(job, 4)
    now[0] += 2
    told.note_update(5)
    assert told.pace == 2, "without the jobs"
    assert told.seconds_left() == pytest.approx(25 * 2 + 3 * 5 + 6 * 1 + 60 * 5 / 100)


@pytest.mark.parametrize(
    "seconds, words", [(7.4, "7 s"), (119, "2 min"), (7800, "2 h 10 min"), (3600, "1 h"), (200_000, "2 d 7 h"), (86_400, "1 d")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_time_of_day_has_a_date_on_another_day():
    assert len(time_of_day(0)) == len("14:32")
    assert len(time_of_day(3 * 86_400)) == len("03 Dec 14:32")
