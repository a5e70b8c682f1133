"""Choices by name: literal dicts of name to "module:Class", so that reading them imports nothing heavy.

And what to say of a name that is none of them.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from manifests.errors import UsageError


def class_of(choices: Mapping[str, str], name: str) -> Any:
    """The class behind a name of the dict."""
    module, _, attribute = choices[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def nearest(name: str, known: Iterable[str], *, alike: float = 0.6) -> str | None:
    """The name that was probably meant; None if all are less than `alike` (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, alike)), None)


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error to raise for `name`, given where one of `known` was expected."""
    known = list(known)
    meant = nearest(name, known, alike=0.4)
    return UsageError(
        f"unknown {what} {name!r}{f'; did you mean {meant!r}?' if meant else '.'} Known: {', '.join(known)}"
    )
