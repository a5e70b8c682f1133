"""What every source gives: a sorted index of its images, and the bytes of one of them."""

from __future__ import annotations

import hashlib
import re
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import UsageError

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("location", pa.string(), nullable=False),  # relative to the source's root: stable when it is moved
        pa.field("label", pa.int32()),
        pa.field("class_name", pa.string()),
        pa.field("offset", pa.int64()),  # where the bytes start inside `location`, or the row of a table
        pa.field("size", pa.int64()),  # bytes; null where the source cannot say
    ]
)

KEY_LENGTH = 80  # `KEY.synNN.jpg` must fit a plain tar header's 100 characters
DIGEST_LENGTH = 12  # hex digits: a million names that differ in nothing but unprintable characters still stay apart
MAX_LABEL = 2**31 - 1
_BATCH_ROWS = 4096  # rows that are Python objects at a time
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}\Z")
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_]+")


class UnreadableImageError(Exception):
    """One image cannot be read or decoded; the message becomes the row's `error`."""


class Source(Protocol):
    """A set of real images.

    `read` is called from several threads and processes at once, with values of one index row.
    """

    kind: str
    location: str  # where it is, as an absolute path or URL
    ignored: int  # files passed over because they are not images by their suffix; known after `index()`

    def index(self) -> pa.Table:
        """Every image, as a table of `INDEX_SCHEMA`, sorted by key, keys unique."""
        ...

    def read(self, location: str, offset: int | None, size: int | None) -> bytes:
        """The encoded image of one index row; raises `UnreadableImageError` with the reason."""
        ...


class IndexBuilder:
    """Collects index rows as Arrow batches: a million rows cost their text, not a million Python objects."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, int | None, str | None, int | None, int | None]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(
        self,
        key: str,
        location: str,
        *,
        label: int | None = None,
        class_name: str | None = None,
        offset: int | None = None,
        size: int | None = None,
    ) -> None:
        """Append one row."""
        self._rows.append((key, location, label, class_name, offset, size))
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def table(self) -> pa.Table:
        """All rows in the order they were added; see `sorted_index` for what an index promises."""
        self._flush()
        return pa.Table.from_batches(self._batches, INDEX_SCHEMA)

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=INDEX_SCHEMA))
        self._rows = []


def sorted_index(table: pa.Table) -> pa.Table:
    """`table` in `INDEX_SCHEMA`, sorted by key; raises `UsageError` naming two images that share a key."""
    table = table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA).sort_by("key").combine_chunks()
    keys = table["key"]
    if len(keys) < 2:
        return table
    clashes = pc.indices_nonzero(pc.equal(keys[1:], keys[:-1]))
    if len(clashes) == 0:
        return table
    first = clashes[0].as_py()
    names = table["location"].slice(first, 2).to_pylist()
    raise UsageError(
        f"two images of the source share the key {keys[first].as_py()!r}: {names[0]!r} and {names[1]!r}. "
        "Keys must be unique: rename or remove one of them."
    )


def make_key(name: str) -> str:
    """A key of `[A-Za-z0-9_-]+` for `name`, the same on every machine and whatever other images there are.

    A name that is a key already stays; any other is reduced to the allowed characters and given twelve hex digits of
    its hash, so that `a/b.jpg`, `a/b.png` and `a-b.jpg` stay apart, and so do the composed and decomposed spellings
    of one accented name.
    """
    if len(name) <= KEY_LENGTH and _KEY.fullmatch(name):
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=DIGEST_LENGTH // 2).hexdigest()
    stem = _SUFFIX.sub("", name)
    readable = _NOT_IN_KEYS.sub("-", stem).strip("-")[-(KEY_LENGTH - DIGEST_LENGTH - 1) :].strip("-")
    return f"{readable}-{digest}" if readable else digest


def to_text(name: str) -> str:
    r"""A file name as text that UTF-8 can hold: bytes that are no UTF-8 become `\xNN`, and so does a backslash."""
    raw = name.replace("\\", r"\x5c").encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")


def from_text(text: str) -> str:
    """The file name that `to_text` wrote down, as `os.fsdecode` would give it."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text.encode("utf-8"))
    return raw.decode("utf-8", "surrogateescape")


def fingerprint(index: pa.Table) -> str:
    """SHA-256 over keys, locations, labels and sizes: changes when an image is added, removed, renamed or resized."""
    digest = hashlib.sha256()
    for batch in index.select(["key", "location", "label", "size"]).to_batches(max_chunksize=_BATCH_ROWS):
        columns = (column.to_pylist() for column in batch.columns)
        # One update per batch, yet the same bytes however the table is cut into batches.
        digest.update("".join(map(repr, zip(*columns, strict=True))).encode())
    return digest.hexdigest()
