"""plan.json: what was asked of a pair set. Written once, before the first shard, and never changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from manifests import layout
from manifests.errors import CorruptSetError, PlanMismatchError, StorageError
from manifests.schema import SCHEMA_VERSION, check_version
from manifests.storage import Storage

# What tells where things lie, not what they are: a moved source or model is still the same plan.
_PLACES = {("source", "location"), ("source", "synthetic"), ("generator", "model")}

_ATTEMPTS, _PAUSE = 5, 0.1  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The identity of a pair set: equal plans give equal keys, shards and seeds, on any hardware.

    `source` holds kind, location and fingerprint; `generator` the resolved spec, None for sets made without a model.
    """

    source: Mapping[str, Any]
    generator: Mapping[str, Any] | None
    seed: int
    variations: int
    shards: int
    rows: int
    limit: int | None
    labelled: bool
    store_real: str | None  # "original" or the short side in pixels; None: the set has no real images
    quality: int
    max_pixels: int
    schema_version: int = SCHEMA_VERSION

    @property
    def generator_id(self) -> str | None:
        """Short hash of the generator's spec, the `generator` column of every row; places do not count."""
        if self.generator is None:
            return None
        spec = {name: value for name, value in self.generator.items() if ("generator", name) not in _PLACES}
        return hashlib.sha256(_canonical(spec)).hexdigest()[:12]

    def shard_rows(self, shard: int) -> int:
        """Number of rows of a shard: sizes differ by at most one, larger ones first."""
        small, larger = divmod(self.rows, self.shards)
        return small + (shard < larger)

    @property
    def largest_shard(self) -> int:
        """Rows of the largest shard."""
        return self.shard_rows(0)

    def to_bytes(self) -> bytes:
        """The file's bytes: indented JSON with a checksum over everything else."""
        values = asdict(self)
        values["checksum"] = _checksum(values)
        return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, what: str = layout.PLAN) -> Plan:
        """The inverse; refuses other schema versions and any byte that is not as written."""
        try:
            values = json.loads(data)
            version = values.get("schema_version")
        except (ValueError, AttributeError) as error:
            raise CorruptSetError(f"{what} is not the JSON that diffmix wrote: {error}") from error
        check_version(version if isinstance(version, int) else None, what)
        recorded = values.pop("checksum", None)
        known = {field.name for field in fields(cls)}
        if recorded != _checksum(values) or set(values) != known or cls(**values).to_bytes() != data:
            raise CorruptSetError(
                f"{what} was damaged or edited; restore it from a copy, or generate into a new folder"
            )
        return cls(**values)


def read_plan(storage: Storage) -> Plan:
    """The plan of the pair set in `storage`; raises `CorruptSetError` if damaged, `StorageError` if absent."""
    if not storage.exists(layout.PLAN):
        raise StorageError(
            f"{storage.url} is no pair set: it has no {layout.PLAN}; `pipeline generate --out` makes one"
        )
    return Plan.from_bytes(storage.read(layout.PLAN), f"{storage.url}/{layout.PLAN}")


def claim(storage: Storage, plan: Plan) -> Plan:
    """Create plan.json, or join the same plan; raises `PlanMismatchError` naming what differs.

    Returns the plan on disk: it may name other places than `plan` for the same source and model.
    """
    # Looked for first, so that a finished set on a read-only disk can be joined.
    if not storage.exists(layout.PLAN) and storage.create(layout.PLAN, plan.to_bytes()):
        return plan
    existing = _read_settled(storage)
    found = differences(existing, plan)
    if found:
        listed = "; ".join(f"{name}: {old!r} in the folder, {new!r} now" for name, old, new in found)
        raise PlanMismatchError(
            f"{storage.url} holds a pair set of another plan ({listed}). "
            "Use the same settings to resume it, another --out for a new set, or --overwrite to delete it first."
        )
    return existing


def _read_settled(storage: Storage) -> Plan:
    # Where `create` cannot link, another process's plan.json is incomplete for a moment after its name appears.
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(CorruptSetError):
            return read_plan(storage)
        time.sleep(_PAUSE)
    return read_plan(storage)


def differences(one: Plan, other: Plan) -> list[tuple[str, Any, Any]]:
    """Dotted names and both values of everything that makes two plans different sets."""
    found = []
    left, right = _flat(one), _flat(other)
    for name in sorted(left.keys() | right.keys(), key=".".join):
        if name not in _PLACES and left.get(name) != right.get(name):
            found.append((".".join(name), left.get(name), right.get(name)))
    return found


def _flat(plan: Plan) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}

    def add(path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, dict):
            for name, entry in value.items():
                add((*path, name), entry)
        else:
            flat[path] = value

    add((), json.loads(_canonical(asdict(plan))))  # as it comes back from the file: a tuple is a list there
    return flat


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(values)).hexdigest()
