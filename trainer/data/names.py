"""The error for a name that is not known: it says which one was meant, and all there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from manifests.errors import UsageError


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error to raise for `name`, given where one of `known` was expected."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return UsageError(f"unknown {what} {name!r}{hint} Known: {', '.join(known)}")
