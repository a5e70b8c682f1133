"""How one of several processes ends: at once, so that the others and whoever started them notice, and with a reason."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import NoReturn

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")  # gloo's words
_GRACE = 1.0  # seconds that the main process has to say why, since launchers end all once one has ended
_LOST_KINDS = {"DistBackendError", "DistNetworkError"}  # of torch.distributed, which is not imported for this


def is_one_of_several() -> bool:
    """Whether a launcher started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_told(error: Exception) -> bool:
    """Whether another process prints this error, which all of them raise."""
    return is_one_of_several() and getattr(error, "of_all", False) and not _is_main()


def explanation(error: RuntimeError) -> str | None:
    """What to tell users of errors of torch that they can mend; None for others, which are bugs."""
    kind, text = type(error).__name__, str(error)
    if kind == "OutOfMemoryError":
        return f"{text.splitlines()[0]} A larger run.accumulation trains the same in smaller parts."
    if is_one_of_several() and (kind in _LOST_KINDS or any(words in text for words in _LOST)):
        return (
            "another process of this run has ended, see what it says; the same command goes on from the last checkpoint"
        )
    return None


def leave(code: int) -> NoReturn:
    """Exit; of several processes one that failed does so without destructors, which would wait for the others."""
    if code and is_one_of_several():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                stream.flush()
        if not _is_main():
            time.sleep(_GRACE)
        os._exit(code)
    sys.exit(code)
