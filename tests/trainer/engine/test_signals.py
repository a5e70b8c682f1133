"""One Ctrl-C under torchrun arrives twice, and still means: save and stop."""

import os
import signal
import time

import pytest

from trainer.engine.signals import stop_requested


def test_torchrun_passes_ctrl_c_on(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stop_requested() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_inside_another_it_is_the_same():
    """A signal that comes as one run of a comparison ends is one to the comparison."""
    with stop_requested() as outer:
        with stop_requested() as inner:
            assert not inner
            os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.signal_name == "SIGUSR1"
        with stop_requested() as following:
            assert following, "nor does the next run begin as if nothing had come"
    with stop_requested() as later:
        assert not later
