"""The real images of a pair set that exists already, to give them variations of another generator."""

from __future__ import annotations

import warnings

import pyarrow as pa
import pyarrow.compute as pc

from manifests import layout
from manifests.catalog import Catalog
from manifests.errors import CorruptSetError, StorageError, UsageError
from manifests.schema import OK
from manifests.storage import open_storage
from pipeline.sources.base import INDEX_SCHEMA, UnreadableImageError, sorted_index
from pipeline.sources.files import is_url, local_path


class PairSource:
    """The `ok` rows of a pair set, local or at a URL; keys, labels and class names stay as they are."""

    kind = "pairs"

    def __init__(self, location: str) -> None:
        self.location = location if is_url(location) else str(local_path(location))
        self.ignored = 0

    def index(self) -> pa.Table:
        """See `Source.index`; raises `UsageError` for a set without finished rows or without real images."""
        with warnings.catch_warnings():
            # A set in progress grows: what is made from it now would not match its fingerprint later.
            warnings.simplefilter("error", UserWarning)
            try:
                catalog = Catalog.open(self.location)
            except (UserWarning, CorruptSetError) as warning:
                raise UsageError(f"{warning}. A pair set must be finished before it can be a source.") from None
        rows = catalog.columns("key", "shard", "status", "label", "class_name", "real.offset", "real.size")
        finished = rows.filter(pc.equal(rows["status"], OK))
        self.ignored = rows.num_rows - finished.num_rows
        if not finished.num_rows:
            raise UsageError(f"{self.location} has no finished rows; run `pipeline status` on it.")
        if finished["real"].null_count:
            raise UsageError(
                f"{self.location} holds only generated images: nothing to vary. Give a set with real ones."
            )
        return sorted_index(_as_index(finished, self.location))

    def read(self, location: str, offset: int | None, size: int | None) -> bytes:
        """See `Source.read`."""
        if offset is None or size is None or layout.shard_of(location, "tar") is None:
            raise UnreadableImageError("not an image of this pair set")
        try:
            data = open_storage(self.location).read_range(location, offset, size)
        except StorageError as error:
            raise UnreadableImageError(f"cannot read {location}") from error
        if len(data) != size:
            raise UnreadableImageError(f"{location} is shorter than its manifest says")
        return data


def _as_index(rows: pa.Table, location: str) -> pa.Table:
    odd = rows.filter(pc.invert(pc.match_substring_regex(rows["key"], rf"\A{layout.KEY_PATTERN.pattern}\z")))
    if odd.num_rows:
        raise UsageError(
            f"{location} has the key {odd['key'][0].as_py()!r}, which is no key; run `pipeline verify` on it."
        )
    shards = pc.unique(rows["shard"])
    names = pa.array([layout.tar_name(shard) for shard in shards.to_pylist()])
    columns = {
        "key": rows["key"],
        "location": names.take(pc.index_in(rows["shard"], shards).combine_chunks()),
        "label": rows["label"],
        "class_name": rows["class_name"],
        "offset": pc.struct_field(rows["real"], "offset"),
        "size": pc.struct_field(rows["real"], "size").cast(pa.int64()),
    }
    return pa.table([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)
