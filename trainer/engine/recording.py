"""What a run tells while it trains, metrics.jsonl and trackers: by the main process, closed however it ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

from accelerate import Accelerator

from manifests.storage import explained
from trainer.engine.run_folder import Metrics, RunFolder
from trainer.nn.collectives import together

_PROJECT = "diffmix"  # of the trackers; TensorBoard's folder has its name


@contextlib.contextmanager
def recording(
    folder: RunFolder, accelerator: Accelerator, *, after_step: int, say: Callable[[str], None]
) -> Iterator[Metrics | None]:
    """metrics.jsonl, None on ranks that write nothing, and with it the trackers are open inside; every rank must call.

    What was recorded of steps beyond `after_step`, which will be done again, is dropped. `say` is told of trackers that
    cannot be closed. Raises `DiffmixError`, on all ranks, if the main process cannot open them.
    """
    with contextlib.ExitStack() as stack:
        yield together(lambda: _open(stack, folder, accelerator, after_step, say))


def _open(
    stack: contextlib.ExitStack,
    folder: RunFolder,
    accelerator: Accelerator,
    after_step: int,
    say: Callable[[str], None],
) -> Metrics | None:
    metrics = stack.enter_context(folder.metrics(after_step)) if accelerator.is_main_process else None
    stack.enter_context(_quiet_threads())
    stack.callback(_finish, accelerator, say)
    with explained("start", _named(accelerator), (Exception,)):  # each tracker has errors of its own
        accelerator.init_trackers(_PROJECT, init_kwargs={"tensorboard": {"purge_step": after_step + 1}})
    return metrics


def track(accelerator: Accelerator, values: Mapping[str, float | int], step: int) -> None:
    """Tell the trackers of a step; raises `DiffmixError` if one cannot be told."""
    with explained("write to", _named(accelerator), (Exception,)):
        accelerator.log(dict(values), step=step)


def _named(accelerator: Accelerator) -> str:
    return f"the trackers ({', '.join(map(str, accelerator.log_with))}) in {accelerator.logging_dir}/{_PROJECT}"


def _finish(accelerator: Accelerator, say: Callable[[str], None]) -> None:
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except AttributeError:
            pass  # it could not be started
        except Exception as error:  # what was measured is in metrics.jsonl all the same
            say(f"the tracker {tracker.name} could not be closed: {error}")


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """TensorBoard's writing thread ends with a traceback of what it cannot write, which `track` raises too."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
