"""Errors that are written for the user: the command line prints them without a traceback."""

from __future__ import annotations


class DiffmixError(Exception):
    """Base of every error a user can cause or mend: what arrived, what was allowed, what to do next."""

    exit_code = 1
    of_all = False  # whether every process of a run raises it, so that one message is enough


class UsageError(DiffmixError):
    """An option or a combination of options that cannot work."""

    exit_code = 2


class PlanMismatchError(DiffmixError):
    """The folder holds a pair set of another plan."""


class SchemaVersionError(DiffmixError):
    """The files were written by another version of the contract."""


class CorruptSetError(DiffmixError):
    """A file of the pair set does not hold what it should."""

    exit_code = 3


class StorageError(DiffmixError):
    """The target cannot be read or written: missing, full, read-only or unreachable."""
