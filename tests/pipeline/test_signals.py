"""A signal always ends the process, wherever it strikes."""

import os
import signal
import subprocess
import sys

import pytest

from pipeline.signals import Stopped, stoppable

SWALLOWED = """
import os, signal, time
from pipeline import signals

signals._CLEAN_UP_SECONDS = 1

class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # what is raised here, Python only prints

with signals.stoppable():
    Finalised()
    time.sleep(60)
"""


def test_a_process_whose_clean_up_hangs_ends_all_the_same():
    ended = subprocess.run([sys.executable, "-c", SWALLOWED], timeout=30, capture_output=True)
    assert ended.returncode == 75


def test_after_a_clean_up_nothing_is_left_ticking():
    with pytest.raises(Stopped), stoppable():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.alarm(0) == 0
