"""Failed rows are counted by reason and named; damaged and missing parts count as nothing."""

from manifests import layout
from pipeline.failed_rows import failed_rows
from tests.manifests.builders import write_set


def test_failed_rows_of_parts(tmp_path):
    storage, plan = write_set(str(tmp_path / "set"), failed=["key_1-0"])
    found = failed_rows(storage, range(plan.shards))
    assert found.by_reason() == {"unreadable": 1}
    assert [entry["error"] for entry in found.examples()] == ["unreadable"]
    storage.write(layout.part_name(0), b"")
    assert failed_rows(storage, {0, 1, 7}).by_reason() == {"unreadable": 1}
    assert len(failed_rows(storage, {0, 7})) == 0
