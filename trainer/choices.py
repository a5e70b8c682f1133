"""Choices by name: literal dicts of name to "module:Class", so that reading them imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def class_of(choices: Mapping[str, str], name: str) -> Any:
    """The class behind a name of the dict."""
    module, _, attribute = choices[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
