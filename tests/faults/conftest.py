"""Real processes to kill: the command line in children forked from a server that has imported everything once."""

import multiprocessing
import os
import signal
import time

import pytest

PRELOAD = ["torch", "diffusers", "transformers", "pipeline.generate", "pipeline.worker", "pipeline.sources.open"]
PRELOAD += ["pipeline.generators.sd_variations", "pipeline.generators.load", "pipeline.engines.local", "pipeline.card"]


def _child(arguments, environment, log):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pipeline.cli import run

    os._exit(run(arguments))


class Command:
    """One running `pipeline` command."""

    def __init__(self, context, arguments, environment, log):
        self.log = log
        self.process = context.Process(target=_child, args=(list(map(str, arguments)), environment, str(log)))
        self.process.start()

    def kill(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)

    def wait(self, seconds=120):
        """The exit code; a negative one is the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.log.read_text()}"
        return self.process.exitcode

    def wait_until(self, condition, seconds=60):
        """Poll until `condition()`; False if the command ended before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.exitcode is not None:
                return condition()
            time.sleep(0.002)
        raise AssertionError(f"nothing happened in {seconds} s:\n{self.log.read_text()}")


@pytest.fixture(scope="session")
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


@pytest.fixture
def running():
    """Commands that a test has started; those that are still alive at its end are killed."""
    commands = []
    yield commands
    for command in commands:
        if command.process.is_alive():
            command.process.kill()
            command.process.join()


@pytest.fixture
def start(context, tiny_model, photos, tmp_path, running):
    """Start `pipeline generate` on the photos: `start(out, *flags, RANK="0", ...)`."""

    def call(out, *flags, **environment):
        arguments = ["generate", "--source", photos, "--model", tiny_model, "--out", out]
        arguments += ["--batch-size", "4", "--shards", "6", "--steps", "8", *flags]
        running.append(Command(context, arguments, environment, tmp_path / f"log-{len(running)}.txt"))
        return running[-1]

    return call


@pytest.fixture(scope="session")
def undisturbed(context, tiny_model, photos, tmp_path_factory):
    """Folder of the set that a run makes which nobody disturbs, and how long that took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = ["generate", "--source", photos, "--model", tiny_model, "--out", folder / "set"]
    arguments += ["--batch-size", "4", "--shards", "6", "--steps", "8"]
    warm_up = Command(context, ["--help"], {}, folder / "warm-up.txt")  # imports everything in the server
    assert warm_up.wait() == 0
    started = time.monotonic()
    command = Command(context, arguments, {}, folder / "log.txt")
    assert command.wait() == 0, command.log.read_text()
    return folder / "set", time.monotonic() - started


@pytest.fixture(scope="session")
def forks():
    """Where `trainer` commands are forked from."""
    found = multiprocessing.get_context("forkserver")
    training = ["timm", "trainer.pretrain", "trainer.methods.dino", "torch.utils.tensorboard"]
    tuning = ["trainer.finetune.command", "trainer.tuners.lora", "trainer.tuners.block_expansion", "sklearn.datasets"]
    found.set_forkserver_preload([*PRELOAD, *training, *tuning])
    return found
