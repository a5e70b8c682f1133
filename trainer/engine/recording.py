"""What a run tells while it trains, metrics.jsonl and trackers: by the main process, closed however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from manifests.errors import DiffmixError
from trainer.engine.run_folder import Metrics, RunFolder
from trainer.nn.collectives import together


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
    with _explained("start"):
        accelerator.init_trackers("diffmix", init_kwargs={"tensorboard": {"purge_step": after_step + 1}})
    for tracker in accelerator.trackers:
        stack.callback(_finish, tracker, say)
    return metrics


def track(accelerator: Accelerator, values: Mapping[str, float | int], step: int) -> None:
    """Tell the trackers of a step; raises `DiffmixError` if one cannot be told."""
    with _explained("write"):
        accelerator.log(dict(values), step=step)


def _finish(tracker: GeneralTracker, say: Callable[[str], None]) -> None:
    try:
        tracker.finish()
    except Exception as error:  # each has errors of its own; what was measured is in metrics.jsonl all the same
        say(f"the tracker {tracker.name} could not be closed: {error}")


@contextlib.contextmanager
def _explained(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each tracker has errors of its own
        raise DiffmixError(
            f"the trackers cannot {action}: {type(error).__name__}: {error}; mend it, or leave one out of run.trackers"
        ) from error
