"""What the progress line counts, and what must not stop it."""

import errno
import io
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from pipeline.events import Failed, Note
from pipeline.progress import Progress, TooManyFailuresError

PLAN = SimpleNamespace(generator={}, shards=2, rows=1_000_000, variations=1)


def fail(progress, number):
    progress(Failed(shard=0, key=str(number), source=f"{number}.jpg", reason="truncated JPEG"))


def test_failures_before_and_now_count_together_and_a_row_once():
    progress = Progress(PLAN, 0, Counter({"empty file": 2}), 4, io.StringIO())
    for number in (1, 2, 2, 1):
        fail(progress, number)
    assert progress.failed == Counter({"empty file": 2, "truncated JPEG": 2})
    with pytest.raises(TooManyFailuresError, match="5 of 1000000 rows"):
        fail(progress, 3)


def test_many_failures_cost_no_more_each_than_few():
    progress = Progress(PLAN, 0, Counter(), PLAN.rows, io.StringIO())
    started = time.process_time()
    for number in range(50_000):
        fail(progress, number)
    assert time.process_time() - started < 5


def test_a_log_that_nobody_reads_does_not_stop_the_work():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    progress = Progress(PLAN, 0, Counter(), 0, Closed())
    progress(Note(text="out of memory"))
    progress.close()
