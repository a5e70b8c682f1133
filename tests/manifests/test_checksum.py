from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import checksum
from tests.manifests.builders import flip


def sealed(rows: int = 3) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"text": [f"diffmix.sha256 {row}" for row in range(rows)]})
    with pq.ParquetWriter(buffer, table.schema, compression="none") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"diffmix.other": "x", **checksum.PLACEHOLDER})
    checksum.seal(buffer)
    return buffer.getvalue()


def test_sealed_files_stay_parquet_for_everyone():
    data = sealed()
    assert checksum.is_sound(io.BytesIO(data))
    assert pq.read_table(io.BytesIO(data)).num_rows == 3
    recorded = pq.read_metadata(io.BytesIO(data)).metadata[b"diffmix.sha256"].decode()
    assert checksum.sealed_value(io.BytesIO(data)) == recorded


def test_every_flipped_bit_is_found():
    data = sealed()
    for position in range(len(data)):
        for bit in range(8):
            assert not checksum.is_sound(io.BytesIO(flip(data, position, bit))), (position, bit)


def test_every_truncation_and_addition_is_found():
    data = sealed()
    assert not any(checksum.is_sound(io.BytesIO(data[:length])) for length in range(len(data)))
    assert not checksum.is_sound(io.BytesIO(data + b"\0")) and not checksum.is_sound(io.BytesIO(b"\0" + data))


def test_files_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch):
    whole = sealed(500)
    monkeypatch.setattr(checksum, "_CHUNK", 100)
    monkeypatch.setattr(checksum, "_TAIL", 2000)
    assert len(whole) > 2000 and checksum.is_sound(io.BytesIO(whole)) and sealed(500) == whole
    assert not checksum.is_sound(io.BytesIO(flip(whole, 150)))


def test_unsealed_files_are_not_sound():
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), buffer)
    assert not checksum.is_sound(buffer) and checksum.sealed_value(buffer) is None
    with pytest.raises(ValueError, match="placeholder"):
        checksum.seal(buffer)
