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
