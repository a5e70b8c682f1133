"""Flags that all ranks share, the clock that can be paused, the line, and signals."""

import io
import os
import signal
import time

import numpy as np
import pytest
import torch

from tests.trainer.ranks import on_ranks
from trainer.engine.meter import Meter
from trainer.engine.progress import ProgressLine, duration, line_of
from trainer.engine.signals import stop_requested
from trainer.engine.watch import Watch

ITEMS = np.array([3, 1])


@pytest.mark.parametrize(("loss", "diverged"), [(1.0, False), (float("nan"), True), (float("inf"), True)])
@pytest.mark.parametrize("stop", [False, True])
def test_verdicts_of_a_cpu_are_immediate(loss, diverged, stop):
    watch = Watch(torch.device("cpu"))
    (verdict,) = watch.look(4, ITEMS, torch.tensor(loss, requires_grad=True), stop=stop)
    assert (verdict.step, verdict.diverged, verdict.stop, verdict.failed) == (4, diverged, stop, False)
    assert verdict.items is ITEMS
    assert watch.drain() == []


def of_rank(loss_of_rank_1, stop_of_rank_1, failed_of_rank_1):
    second = torch.distributed.get_rank() == 1
    loss = torch.tensor(loss_of_rank_1 if second else 1.0)
    stop, failed = second and stop_of_rank_1, second and failed_of_rank_1
    (verdict,) = Watch(torch.device("cpu")).look(0, ITEMS, loss, stop=stop, failed=failed)
    return verdict.diverged, verdict.stop, verdict.failed


def test_what_one_rank_sees_all_know():
    assert on_ranks(of_rank, float("nan"), False, False) == [(True, False, False)] * 2
    assert on_ranks(of_rank, 1.0, True, False) == [(False, True, False)] * 2
    assert on_ranks(of_rank, 1.0, False, True) == [(False, False, True)] * 2
    assert on_ranks(of_rank, 1.0, False, False) == [(False, False, False)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_looking_does_not_wait_for_the_device():
    watch, loss = Watch(torch.device("cuda")), torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert watch.look(0, ITEMS, loss, stop=True) == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (verdict,) = watch.drain()
    assert (verdict.diverged, verdict.stop, verdict.failed) == (False, True, False)


def test_the_meter_leaves_pauses_out(monkeypatch):
    clock = iter([10.0, 12.0, 100.0, 101.0, 101.0, 105.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = Meter(seconds=5.0)
    meter.start()
    meter.count()
    meter.pause()  # 2 s
    meter.start()
    meter.count()
    rate, waited = meter.read(images=30, waited=0.6)  # 1 s more
    assert (rate, waited) == (pytest.approx(60 / 3), pytest.approx(0.2))
    meter.count()
    meter.pause()  # 4 s
    assert meter.seconds == pytest.approx(12.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    assert meter.read(images=30, waited=1.0) == (pytest.approx(30 / 4), pytest.approx(0.1))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_is_rewritten_on_a_terminal_and_seldom_elsewhere():
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        line = ProgressLine(speaks=True, stream=stream)
        line.show("one", force=True)
        line.show("too soon")
        line.show("two", force=True)
        line.say("stays")
        line.close()
    assert terminal.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo\nstays\n"
    assert plain.getvalue() == "one\ntwo\nstays\n"


def test_silent_ranks_and_closed_streams_do_not_matter():
    silent = io.StringIO()
    ProgressLine(speaks=False, stream=silent).say("x")
    assert silent.getvalue() == ""
    closed = io.StringIO()
    line = ProgressLine(speaks=True, stream=closed)
    closed.close()
    line.say("nobody listens")


def test_lines_of_one_run_among_several_name_it():
    stream = io.StringIO()
    line = ProgressLine(speaks=True, stream=stream)
    line.about = "lora-8"
    line.show("step 1", force=True)
    line.say("done")
    line.about = ""
    line.say("all done")
    assert stream.getvalue() == "lora-8: step 1\nlora-8: done\nall done\n"


def test_text_of_a_line():
    values = {"step": 20, "epoch": 1, "loss": 5.43219, "lr": 0.1, "images_per_second": 812.4, "data_wait": 0.0312}
    expected = "step 20/400 | epoch 1 | loss 5.432 | 812 images/s | data wait 3.1% | to go 1:01:05"
    assert line_of(values, 400, 3665.2) == expected
    assert line_of({"step": 0, "epoch": 0, "knn": 0.5}, 400) == "step 0/400 | epoch 0 | knn 0.5"
    assert [duration(seconds) for seconds in (0.4, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_requested() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_obeyed_at_once():
    with pytest.raises(KeyboardInterrupt), stop_requested():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
