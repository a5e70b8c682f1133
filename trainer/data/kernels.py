"""How our CPU kernels are compiled: once a machine, kept on disk where there is a place to, free of the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """The function compiled at its first call, for its arguments' types; threads run it in parallel.

    Kept in numba's cache (beside the file, in the user's cache folder, or where NUMBA_CACHE_DIR says); where none
    can be written, it is compiled anew by each process.
    """
    try:
        return cast(F, numba.njit(nogil=True, fastmath=True, cache=True)(function))
    except RuntimeError:  # "no locator available": not one of the places is writable
        return cast(F, numba.njit(nogil=True, fastmath=True)(function))
